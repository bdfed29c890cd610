"""On what terms endpoints are asked: keys of each host, room to reason, settings they refuse."""

from __future__ import annotations

import ssl
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from misbehaving import good, server

from truing.context import Context, use
from truing.core import judge
from truing.core.client import Limits, limited
from truing.core.endpoints import endpoint, limits
from truing.core.generate import generate
from truing.errors import InputError
from truing.models import Model, Served
from truing.tables import Row, Table

FIXED = "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1)"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of the test's own, and nothing refused or said before."""
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(endpoint, "_refused", {})
    monkeypatch.setattr(limits, "_said", {})


def test_a_model_of_one_temperature_is_asked_without_and_it_is_told_once(capsys: Any) -> None:
    def script(n: int, body: Any) -> Any:
        if body["model"] == "thinks" and "temperature" in body:
            return 400, {}, {"error": {"message": FIXED}}, 0.0
        return good("Rating: 5")

    rows: list[Row] = [{"prompt": "Say", "completion": c} for c in "ab"]
    with server(script) as (url, log), limited(Limits(concurrency=1)), use(Context()) as seen:
        assert judge.rate(Model.open(f"{url}#thinks"), rows) == judge.rate(
            Model.open(f"{url}#other"), rows
        )
        generate(Model.open(f"{url}#thinks"), ["Write"], temperature=0.7)
    asked = [(body["model"], "temperature" in body) for _, _, body in log.asked]
    # Refused once; another model behind the same address keeps it.
    assert asked == [
        ("thinks", True), ("thinks", False), ("thinks", False),
        ("other", True), ("other", True), ("thinks", False),
    ]  # fmt: skip
    told = [line for line in capsys.readouterr().err.splitlines() if "temperature" in line]
    assert len(told) == 1 and "drawn at its own temperature" in told[0]
    noted = [m for m in seen.metrics if "refused" in m]
    assert noted == [{"endpoint": url, "refused": "temperature"}]


def test_a_temperature_out_of_range_is_an_error() -> None:
    said = {"error": {"message": "temperature must be at most 2, got 3"}}
    with server(lambda n, body: (400, {}, said, 0.0)) as (url, log):
        with pytest.raises(InputError, match="at most 2"):
            generate(Model.open(f"{url}#m"), ["x"], temperature=3.0)
        assert len(log.asked) == 1


def test_room_to_reason_is_asked_for_beyond_the_answer(tmp_path: Path) -> None:
    def script(n: int, body: Any) -> Any:
        cut = body["max_tokens"] < 1000
        return good("" if cut else "fine", finish_reason="length" if cut else "stop")

    with server(script) as (url, log):
        with pytest.warns(UserWarning, match=r"1 of 1 answers .*reasoning_tokens=8000"):
            generate(Model.open(f"{url}#m"), ["x"], max_tokens=50)
        model = Model.open(f"{url}#m?requests=3,reasoning_tokens=2000,timeout=9")
        assert generate(model, ["x"], max_tokens=50)[0][0].text == "fine"
        assert [body["max_tokens"] for _, _, body in log.asked] == [50, 2050]
        assert {body["model"] for _, _, body in log.asked} == {"m"} and model.name == "m"
        assert limits.meter(url, "m").limits.timeout == 9
        plain = Model.open(f"{url}#m")
    # What it is asked for decides its answers: another key, which a saved model keeps.
    assert model.key != plain.key == Model(Served(url, "m")).key
    assert Model.load(model.save(tmp_path / "saved")).base == model.base


def test_room_to_reason_counts_in_keys_and_limits_do_not() -> None:
    text = "http://h/v1#m?requests=5,reasoning_tokens=9,timeout=3"
    assert limits.without(f"judge '{text}' says") == "judge 'http://h/v1#m?reasoning_tokens=9' says"
    assert limits.without("http://h/v1#m?requests=5") == "http://h/v1#m"
    said = {"endpoint": "http://h/v1", "model": "m", "reasoning_tokens": 9}
    assert limits.address(said) == "http://h/v1#m?reasoning_tokens=9"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("-1", "reasoning_tokens must be 0 or more"),
        ("1.5", "reasoning_tokens must be a whole number"),
        ("lots", "reasoning_tokens must be a number"),
    ],
)
def test_room_that_is_none(said: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        Model.open(f"http://127.0.0.1:9/v1#m?reasoning_tokens={said}")


def test_each_host_gets_its_own_key_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUING_API_KEY", "any")
    monkeypatch.setenv("OPENAI_API_KEY", "openais")
    monkeypatch.setenv("TRUING_API_KEY_API_MISTRAL_AI", "theirs")
    monkeypatch.setenv("TRUING_API_KEY_LOCALHOST_8001", "second")
    keys = {
        "https://api.openai.com/v1": "openais",
        "https://api.mistral.ai/v1": "theirs",
        "https://api.mistral.ai:8443/v1": "theirs",
        "http://localhost:8001/v1": "second",
        "http://127.0.0.1:8001/v1": "second",  # the same server, as `truing serve` names it
        "http://me:pw@[::1]:8001/v1": "second",
        "http://localhost:8000/v1": "any",
    }
    assert {url: endpoint.api_key(url) for url in keys} == keys
    monkeypatch.setenv("TRUING_API_KEY_127_0_0_1_8000", "third")
    assert endpoint.api_key("http://127.0.0.1:8000/v1") == "third"
    monkeypatch.setenv("TRUING_API_KEY_API_OPENAI_COM", "mine")
    assert endpoint.api_key("https://api.openai.com/v1") == "mine"
    monkeypatch.setenv("TRUING_API_KEY_LOCALHOST_8001", "two\nlines")
    with pytest.raises(InputError, match="characters that no key has") as caught:
        endpoint.api_key("http://localhost:8001/v1")
    assert caught.value.where == "TRUING_API_KEY_LOCALHOST_8001"


def test_hosts_that_are_sent_the_key_for_all_are_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(endpoint, "_given", set())
    monkeypatch.setenv("TRUING_API_KEY", "any")
    monkeypatch.setenv("TRUING_API_KEY_API_MISTRAL_AI", "theirs")
    for host in ("evil.example:81", "api.mistral.ai", "evil.example", "localhost:8000"):
        assert endpoint.api_key(f"http://{host}/v1")
    (said,) = capsys.readouterr().err.splitlines()
    assert "TRUING_API_KEY is sent to evil.example" in said
    assert "TRUING_API_KEY_EVIL_EXAMPLE" in said and "any" not in said


def test_the_key_that_is_missing_is_named() -> None:
    with server(lambda n, body: (401, {}, {"error": "who?"}, 0.0)) as (url, _):
        with pytest.raises(InputError, match="TRUING_API_KEY_LOCALHOST for this host"):
            generate(Model.open(f"{url}#m"), ["x"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "socks://127.0.0.1:1080/"),  # what GNOME's settings export
        ("ALL_PROXY", "socks5://127.0.0.1:1080"),
        ("NO_PROXY", "localhost,[::1]"),
        ("SSL_CERT_FILE", "/gone"),
    ],
)
def test_a_proxy_or_certificates_that_are_none(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY"):
        monkeypatch.delenv(other, raising=False)
        monkeypatch.delenv(other.lower(), raising=False)
    monkeypatch.setenv(name, value)
    endpoint._trusted.cache_clear()
    with pytest.raises(InputError, match=f"{name}.*http://host:port"):
        generate(Model.open("https://example.test/v1#m"), ["x"])
    with pytest.raises(InputError, match=f"{name}.*http://host:port"):
        Table.read(f"https://example.test/t.jsonl#sha256={'0' * 64}")


def test_a_certificate_that_is_not_trusted_is_told_at_once(tmp_path: Path) -> None:
    key, own = str(tmp_path / "key"), str(tmp_path / "own")
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=own"]
    subprocess.run([*made, "-keyout", key, "-out", own], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own, key)
    met: list[int] = []

    class Own(HTTPServer):
        def get_request(self) -> Any:
            met.append(1)
            return super().get_request()

    with Own(("127.0.0.1", 0), BaseHTTPRequestHandler) as served:
        served.socket = context.wrap_socket(served.socket, server_side=True)
        threading.Thread(target=served.serve_forever, args=(0.02,), daemon=True).start()
        with pytest.raises(InputError, match=r"certificate is not trusted.*SSL_CERT_FILE"):
            generate(Model.open(f"https://127.0.0.1:{served.server_port}/v1#m"), ["x"])
        served.shutdown()
    assert len(met) == 1


def test_an_error_that_is_none_is_no_error() -> None:
    status, headers, body, wait = good("well")
    with server(lambda n, asked: (status, headers, {**body, "error": None}, wait)) as (url, _):
        assert generate(Model.open(f"{url}#m"), ["x"])[0][0].text == "well"
