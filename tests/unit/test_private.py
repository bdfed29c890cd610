"""Secrets that pass through: used, and never in a manifest, a report, a card or the store."""

from __future__ import annotations

import asyncio
import json
import ssl
from pathlib import Path

import httpx
import pytest

from truing import pipeline
from truing.core import private
from truing.core.endpoints.endpoint import Endpoint
from truing.core.endpoints.limits import Limits, Meter
from truing.errors import InputError, shorten
from truing.models import Model, Served
from truing.plan import Plan
from truing.store import Store

FAR = "http://bob:hunter%202@127.0.0.1:9/v1"


def everything(folder: Path) -> str:
    return "".join(p.read_bytes().decode("latin-1") for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        (f"{FAR}#m", "http://127.0.0.1:9/v1#m"),
        ("https://a:b@c@d.e/f", "https://d.e/f"),
        ("http://host/v1?mail=a@b#m@n", "http://host/v1?mail=a@b#m@n"),
        ("http://host#m@n", "http://host#m@n"),
        ("org/model@rev", "org/model@rev"),
    ],
)
def test_addresses_without_login(text: str, bare: str) -> None:
    assert private.without_login(text) == bare


def test_a_password_goes_into_the_header_alone(tmp_path: Path) -> None:
    model = Model.open(f"{FAR}#m")
    assert isinstance(model.base, Served) and model.base.url == "http://127.0.0.1:9/v1"
    assert "hunter" not in repr(model.base)
    model.save(tmp_path / "saved")
    assert "hunter" not in everything(tmp_path) and Model.load(tmp_path / "saved").key == model.key

    async def header() -> str:
        assert isinstance(model.base, Served)
        async with Endpoint(model.base.url, Meter(Limits()), lambda took: None) as endpoint:
            assert "hunter" not in endpoint.shown + endpoint._clean("refused: hunter 2")
            auth = endpoint._client.auth
            assert isinstance(auth, httpx.BasicAuth)
            request = httpx.Request("POST", endpoint.url)
            return next(auth.sync_auth_flow(request)).headers["Authorization"]

    given = httpx.Request("POST", "http://x")
    expected = next(httpx.BasicAuth("bob", "hunter 2").sync_auth_flow(given))
    assert asyncio.run(header()) == expected.headers["Authorization"]


def test_certificates_are_read_once_and_asked_for() -> None:
    contexts = [
        Endpoint(url, Meter(Limits()), lambda took: None)._client._transport._pool._ssl_context  # type: ignore[attr-defined]
        for url in ("https://one.example/v1", "https://two.example/v1")
    ]
    assert contexts[0] is contexts[1]
    assert contexts[0].verify_mode == ssl.CERT_REQUIRED and contexts[0].check_hostname


def test_an_address_without_a_model_is_told_without_its_password() -> None:
    with pytest.raises(InputError) as error:
        Model.open(FAR)
    assert "hunter" not in str(error.value)


def test_nothing_secret_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("truing.serve.openai._made", lambda *_: pytest.fail("it was served"))
    (tmp_path / "rules.yaml").write_text(
        "- {id: brief, text: Be brief., check: {use: max_words, n: 4}}\n"
    )

    def plan(token: str) -> Plan:
        made = Plan("secret", folder=tmp_path)
        made.model("far", f"{FAR}#m")
        made.step("rules", "specify/principles_file", path="rules.yaml")
        made.step("told", "decode/best_of_n", model="far", principles="rules", n=2)
        made.step("end", "serve/openai", model="told", token="x")
        made.override(f"end.token={token}")
        return made

    with pytest.raises(pytest.fail.Exception, match="it was served"):
        pipeline.run(plan("s3cret-one"), tmp_path / "runs", store=Store())
    assert Store().keys()
    kept = everything(tmp_path)
    assert "hunter" not in kept and "s3cret" not in kept and "***" in kept
    assert plan("s3cret-one").key == plan("s3cret-two").key


def test_a_secret_of_the_wrong_type_is_not_shown(tmp_path: Path) -> None:
    plan = Plan("secret", folder=tmp_path)
    plan.step("end", "serve/openai", model="http://127.0.0.1:9/v1#m", token=["s3cret"])
    with pytest.raises(InputError) as error:
        plan.check()
    assert "s3cret" not in str(error.value) and "token" in str(error.value)


def test_an_address_deep_in_a_setting_is_recorded_without_its_login() -> None:
    judged = {"good": {"use": "judged", "model": f"{FAR}#m", "scale": 5}}
    told = private.hidden({"rewards": judged, "terms": [f"{FAR}#m"], "token": "abc", "n": 3})
    bare = "http://127.0.0.1:9/v1#m"
    assert told == {
        "rewards": {"good": {"use": "judged", "model": bare, "scale": 5}},
        "terms": [bare],
        "token": "***",
        "n": 3,
    }


GIVEN = {"endpoint": "http://bob:hunter2@127.0.0.1:9/v1", "model": "m", "key": "sk-s3cret"}


@pytest.mark.parametrize("typed", [False, True])
def test_an_endpoint_in_a_step_is_told_where_to_stand_and_shows_no_secret(typed: bool) -> None:
    plan = Plan("secret")
    plan.step("one", "train/dpo", model="m" if typed else GIVEN)
    if typed:
        plan.override(f"one.model={json.dumps(GIVEN)}")
    with pytest.raises(InputError) as error:
        plan.check()
    said = str(error.value)
    assert "hunter2" not in said and "s3cret" not in said and "127.0.0.1:9/v1" in said
    assert "below models:" in said and "TRUING_API_KEY" in said


def test_a_key_among_the_models_is_told_where_it_goes() -> None:
    with pytest.raises(InputError) as error:
        Plan("secret").model("far", GIVEN)
    said = str(error.value)
    assert "s3cret" not in said and "hunter2" not in said and "TRUING_API_KEY" in said


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("--set a.model={endpoint: http://a:hunter2@h/v1, key: sk-1}", "http://h/v1, key: ***}"),
        ("see http://h/x?token=abc&n=1#m", "see http://h/x?token=***&n=1#m"),
        ("{'api_key': 'sk-1', 'n': 1}", "{'api_key': ***, 'n': 1}"),
        ("Authorization: Bearer abc", "Authorization: ***"),
        ("https://h/x?X-Amz-Signature=abc", "https://h/x?X-Amz-Signature=***"),
        (
            "max_tokens: 5, tokens=6, pad_token='<pad>'",
            "max_tokens: 5, tokens=6, pad_token='<pad>'",
        ),
        ("http://h/v1?mail=a@b#m@n", "http://h/v1?mail=a@b#m@n"),
        ("no key 'a' is known", "no key 'a' is known"),
    ],
)
def test_texts_of_errors(text: str, shown: str) -> None:
    assert str(InputError("wrong", where=text)).endswith(f"{shown}: wrong")
    assert private.shown(text).endswith(shown)


def test_what_an_error_has_seen_is_cut_after_secrets_are_out() -> None:
    long = {"note": "x" * 90, "deep": [{"token": ["s3cret"]}], "at": f"{FAR}#m"}
    seen = str(InputError("wrong", seen=long))
    assert "hunter" not in seen and "s3cret" not in seen and len(seen) < 150
    assert shorten(("a", {"n": 1})) == "('a', {'n': 1})"
