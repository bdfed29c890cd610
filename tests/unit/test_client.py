"""The client against the real server, and against one that misbehaves."""

from __future__ import annotations

import asyncio
import email.utils
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from misbehaving import good, server

from truing.context import Context, use
from truing.core import client, files
from truing.core.client import Limits, limited
from truing.core.endpoints import endpoint
from truing.core.generate import generate
from truing.core.logprob import measure
from truing.core.tree import example_tree, pack
from truing.errors import InputError, Stopped
from truing.kinds import as_prompt
from truing.models import Model
from truing.serve.openai import Address, serving

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of the test's own, and short waits."""
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)


@pytest.fixture(scope="module")
def address(tiny_path: Path) -> Iterator[Address]:
    with serving(Model.open(tiny_path), token="tok-en", name="tiny") as made:
        yield made


@pytest.fixture
def served(address: Address, monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setenv("TRUING_API_KEY", "tok-en")
    return Model.open(f"{address.url}#{address.model}")


PROMPTS: list[Any] = [
    "Hello there",
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
    "Hello there",
]


def test_served_equals_local_when_greedy(served: Model, tiny_path: Path) -> None:
    local = generate(Model.open(tiny_path), PROMPTS, n=2, greedy=True, max_tokens=24)
    far = generate(served, PROMPTS, n=2, greedy=True, max_tokens=24)
    assert [[c.text for c in row] for row in far] == [[c.text for c in row] for row in local]
    for a, b in zip(local, far, strict=True):
        assert [c.finish for c in a] == [c.finish for c in b]
        assert [c.tokens for c in a] == [c.tokens for c in b]
        assert b[0].logprobs == pytest.approx(a[0].logprobs[: len(b[0].logprobs)], abs=1e-4)


def test_stop_texts_and_settings_reach_the_server(served: Model, tiny_path: Path) -> None:
    local = generate(Model.open(tiny_path), ["Hello there"], greedy=True, max_tokens=24)[0][0].text
    stop = local[4:6]
    cut = generate(served, ["Hello there"], greedy=True, max_tokens=24, stop=[stop])[0][0]
    assert cut.text == local[: local.find(stop)]
    assert cut.finish == "stop"
    # min_tokens and top_k go by vLLM's names: the only token of top_k=1 is the greedy one.
    one = generate(served, ["Hello there"], top_k=1, max_tokens=24, min_tokens=24)[0][0]
    assert one.text == local
    assert one.tokens == 24


def test_scores_equal_local_measurements(served: Model, tiny_path: Path) -> None:
    loaded = Model.open(tiny_path).load_module()
    before, text = "Once upon", " a time, in Zürich"
    ids = loaded.tokenizer(before + text)["input_ids"]
    start = len(loaded.tokenizer(before)["input_ids"])
    packed = pack([example_tree(ids, [i >= start for i in range(len(ids))])])[0]
    expected = measure(loaded.module, packed, grad=False)["logp"][0, 0]
    found, whole = client.score(served, [(before, text), ("", before + text)])
    assert torch.allclose(torch.tensor(found), expected, atol=1e-5)
    assert whole[start - 1 :] == pytest.approx(found)
    assert len(whole) == len(ids) - 1  # the first token of all has none


def test_draws_differ_and_are_kept_one_by_one(served: Model, monkeypatch: Any) -> None:
    with limited(Limits()) as spent:
        two = generate(served, ["Hi"], n=2, max_tokens=12, seed=5)[0]
        assert spent.requests == 2
        assert two[0].text != two[1].text
        four = generate(served, ["Hi", "Hi"], n=2, max_tokens=12, seed=5)
        assert spent.requests == 4  # the first two draws were there
        assert four[0] == two
        assert generate(served, ["Hi"], n=2, max_tokens=12, seed=6)[0] != two
        assert spent.requests == 6
    # Another settings, another reply; the kept ones need no server at all.
    monkeypatch.setattr(endpoint.Endpoint, "ask", None)
    assert generate(served, ["Hi", "Hi"], n=2, max_tokens=12, seed=5) == four


def test_same_seed_gives_the_same_answers(served: Model) -> None:
    # Words, not log-probabilities: their last bits depend on what else is in the server's batch.
    first = [c.text for c in generate(served, ["Hi"], n=3, max_tokens=12, seed=5)[0]]
    for path in (files.home() / "replies").rglob("*.json"):
        path.unlink()
    assert [c.text for c in generate(served, ["Hi"], n=3, max_tokens=12, seed=5)[0]] == first


def test_damaged_reply_files_count_as_none() -> None:
    replies = client.Replies()
    replies.put("abcd", {"text": "x"})
    assert replies.get("abcd") == {"text": "x", "schema_version": 1}
    path = next((files.home() / "replies").rglob("*.json"))
    for damaged in (b"", b'{"text": "x', b"[1]", b'{"text": "x"}', b"\xff\xfe"):
        path.write_bytes(damaged)
        assert replies.get("abcd") is None


def test_kept_replies_do_not_grow_without_limit(monkeypatch: Any, capsys: Any) -> None:
    replies = client.Replies()
    paths = [replies.folder / key[:2] / f"{key}.json" for key in ("abcd", "abce", "acde")]
    for i, path in enumerate(paths):
        replies.put(path.stem, {"text": "x"})
        os.utime(path, (i, i))
    assert replies.get("abcd") and paths[0].stat().st_mtime > 3  # reading it makes it young
    monkeypatch.setattr(
        "truing.core.endpoints.replies.LIMIT", 2 * max(paths[0].stat().st_blocks * 512, 1)
    )
    with server(lambda n, body: good()) as (url, _), limited(Limits()):
        generate(_model(url), ["Hi"], max_tokens=4, greedy=True)
        left = set(replies.folder.rglob("*.json"))
        assert paths[1] not in left and {paths[0], paths[2]} < left and len(left) == 3
        assert "replies: 1 replies, longest unused, are deleted" in capsys.readouterr().err
        generate(_model(url), ["Ho"], max_tokens=4, greedy=True)
        assert len(list(replies.folder.rglob("*.json"))) == 4  # what a process writes itself stays
        assert "deleted" not in capsys.readouterr().err


def test_a_kept_reply_has_no_digits_that_say_nothing() -> None:
    said = {"content": [{"token": "x", "logprob": -0.69314718246459961}]}
    with server(lambda n, body: good(logprobs=said)) as (url, _), limited(Limits()):
        made = generate(_model(url), ["Hi"], max_tokens=4, greedy=True)[0][0]
    (path,) = (files.home() / "replies").rglob("*.json")
    assert made.logprobs == (-0.693147,) and b"-0.693147]" in path.read_bytes()


def test_half_a_character_in_a_reply() -> None:
    said = ("fine \ud83d", "\ud83d\ude00")
    with server(lambda n, body: good(said[n])) as (url, _), limited(Limits()):
        texts = [generate(_model(url), [p], max_tokens=4, greedy=True)[0][0].text for p in "ab"]
        assert texts == ["fine \ufffd", "\U0001f600"]
        assert generate(_model(url), ["a"], max_tokens=4, greedy=True)[0][0].text == texts[0]


def test_replies_that_cannot_be_kept_are_told(monkeypatch: Any) -> None:
    home = files.home()
    home.mkdir(parents=True)
    (home / "replies").write_text("in the way")
    with pytest.raises(InputError, match=r"cannot be kept.*TRUING_HOME"):
        client.Replies().put("abcd", {})


def _model(url: str) -> Model:
    return Model.open(f"{url}#m")


def test_settings_that_cannot_be_said_are_refused() -> None:
    from truing.core.sampling import SamplingSettings

    for settings in (SamplingSettings(banned=(3,)), SamplingSettings(first_temperature=2.0)):
        with pytest.raises(InputError, match=r"takes no setting '(banned|first_temperature)'"):
            client.generate(_model("http://127.0.0.1:9/v1"), ["x"], settings)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ((200, {"Content-Type": "text/html"}, b"<html>Welcome!</html>", 0.0), "text/html: <html>W"),
        ((200, {}, b'{"choices": [', 0.0), "not a JSON object"),
        ((200, {}, b"[1, 2]", 0.0), "not a JSON object"),
        ((200, {}, b"[" * 100_000, 0.0), "not a JSON object"),
        ((200, {}, {"choices": []}, 0.0), "no choices"),
        ((200, {}, {"choices": {"0": 1}}, 0.0), "no choices"),
        ((200, {}, {"choices": [{"text": "x"}]}, 0.0), "no message with content"),
        ((200, {}, {"choices": [{"message": {}}]}, 0.0), "no message with content"),
        ((200, {}, {"choices": [{"message": {"content": 3}}]}, 0.0), "is not text"),
        (good(logprobs={"content": [{"token": "x"}]}), "without its log-probability"),
        ((200, {}, {"error": {"message": "no such thing", "code": 400}}, 0.0), "no such thing"),
        ((302, {"Location": "/login"}, b"", 0.0), "refuses the request .302."),
        ((401, {}, {"error": {"message": "who?"}}, 0.0), "who.*TRUING_API_KEY"),
        ((404, {}, {"detail": "Not Found"}, 0.0), "Not Found.*ends in /v1"),
        ((400, {}, {"error": "bad temperature"}, 0.0), "bad temperature"),
    ],
)
def test_garbage_is_one_clear_error(answer: Any, told: str) -> None:
    with server(lambda n, body: answer) as (url, log):
        with pytest.raises(InputError, match=told) as caught:
            generate(_model(url), ["x"])
        assert url in str(caught.value)
        assert len(log.asked) == 1  # what is refused for good is not asked again
        assert caught.value.exit_code == 2
    assert not list((files.home() / "replies").rglob("*.json"))


def test_null_content_is_an_empty_answer() -> None:
    answer = good(message={"content": None})
    with server(lambda n, body: answer) as (url, _):
        made = generate(_model(url), ["x"])[0][0]
    assert (made.text, made.finish, made.tokens) == ("", "stop", 3)


def test_of_a_content_in_parts_the_text_counts() -> None:
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    parts = [thought, {"type": "text", "text": "So "}, {"type": "text", "text": "4."}]
    for content, text in ((parts, "So 4."), ([thought], ""), ([], "")):
        with server(lambda n, body, c=content: good(message={"content": c})) as (url, _):
            assert generate(_model(url), ["x"])[0][0].text == text
    for garbage in (["x"], [{"type": "text"}]):
        with (
            server(lambda n, body, c=garbage: good(message={"content": c})) as (url, _),
            pytest.raises(InputError, match="is not text"),
        ):
            generate(_model(url), ["y"])


def test_what_the_server_filtered_is_told() -> None:
    answers = [good("half", finish_reason="content_filter"), good()]
    with server(lambda n, body: answers[n]) as (url, log):
        model = _model(url)
        for _ in range(2):  # from the server, then from the disk
            with pytest.warns(UserWarning, match=r"m: 1 of 1 answers were filtered by the server"):
                made = generate(model, ["x"])[0][0]
            assert (made.text, made.finish) == ("half", "stop")
        assert generate(model, ["y"])[0][0].text == "fine" and len(log.asked) == 2


def test_a_refusal_is_an_answer() -> None:
    answer = good(message={"content": None, "refusal": "I cannot."})
    with server(lambda n, body: answer) as (url, _):
        assert generate(_model(url), ["x"])[0][0].text == "I cannot."


ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
WRITTEN = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": None, "tool_calls": [CALL]}, WRITTEN),
        ({"tool_calls": [CALL, CALL]}, f"{WRITTEN}\n{WRITTEN}"),
        ({"content": "Let me see.", "tool_calls": [CALL]}, f"Let me see.\n{WRITTEN}"),
        (
            {"content": "", "tool_calls": [{"function": {"name": "\u00e9", "arguments": "{"}}]},
            '<tool_call>\n{"name": "\u00e9", "arguments": "{"}\n</tool_call>',
        ),
    ],
)
def test_calls_of_tools_are_text(message: Any, text: str) -> None:
    answer = good(message=message, finish_reason="tool_calls")
    prompt = as_prompt({"prompt": "Add.", "tools": [ADD]})["prompt"]
    with server(lambda n, body: answer) as (url, log):
        made = [generate(_model(url), [prompt])[0][0] for _ in range(2)]
        assert log.asked[0][2]["tools"] == [ADD] and len(log.asked) == 1
    assert [(m.text, m.finish) for m in made] == [(text, "stop")] * 2


@pytest.mark.parametrize("calls", [{"0": CALL}, ["add"], [{"function": {"arguments": "{}"}}]])
def test_calls_that_are_none_are_garbage(calls: Any) -> None:
    answer = good(message={"content": None, "tool_calls": calls})
    with (
        server(lambda n, body: answer) as (url, _),
        pytest.raises(InputError, match=r"of a? ?tools? "),
    ):
        generate(_model(url), ["x"])


def test_retries_after_overload_and_failures() -> None:
    def script(n: int, body: Any) -> Any:
        return [
            (500, {}, b"oops", 0.0),
            (429, {"Retry-After": "0.3"}, {"error": {"message": "slow down"}}, 0.0),
            (503, {"retry-after-ms": "200"}, b"", 0.0),
            good("at last"),
        ][n]

    with server(script) as (url, log):
        start = time.monotonic()
        made = generate(_model(url), ["x"])[0][0]
        taken = time.monotonic() - start
    assert made.text == "at last"
    assert len(log.asked) == 4
    assert 0.5 <= taken < 3


def test_retry_after_as_a_date() -> None:
    when = int(time.time()) + 2  # dates are whole seconds
    dated = {"Retry-After": email.utils.formatdate(when, usegmt=True)}
    answers = [(429, dated, b"", 0.0), good()]
    with server(lambda n, body: answers[n]) as (url, _):
        generate(_model(url), ["x"])
        assert time.time() >= when - 0.1


def test_waits_double_with_jitter(monkeypatch: Any) -> None:
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.5)
    for attempt, top in ((1, 0.5), (2, 1.0), (3, 2.0), (20, 30.0)):
        waits = [endpoint._delay(attempt, 0.0) for _ in range(200)]
        assert top / 2 <= min(waits) <= max(waits) <= top
        assert max(waits) - min(waits) > top / 4
    assert 5.0 <= endpoint._delay(1, 5.0) <= 5.5


def test_gives_up_as_resumable_and_keeps_what_came() -> None:
    def script(n: int, body: Any) -> Any:
        bad = body["messages"][0]["content"] == "bad"
        return (429, {}, {"error": {"message": "busy"}}, 0.05) if bad else good()

    with server(script) as (url, log):
        with pytest.raises(Stopped, match=r"answers 429, 3 times.*busy.*goes on") as caught:
            with limited(Limits(retries=2, concurrency=2)):
                generate(_model(url), ["a", "bad", "b"])
        assert caught.value.exit_code == 3
        assert url in str(caught.value)
        asked = len(log.asked)
        assert [c[0].text for c in generate(_model(url), ["a", "b"])] == ["fine", "fine"]
        assert len(log.asked) == asked  # both were kept


def test_a_long_retry_after_is_not_waited_for() -> None:
    with server(lambda n, body: (429, {"Retry-After": "3600"}, b"", 0.0)) as (url, log):
        with pytest.raises(Stopped, match="asks to wait 3600 s"):
            generate(_model(url), ["x"])
        assert len(log.asked) == 1


def test_slow_replies_time_out() -> None:
    answers = [(*good()[:3], 1.0), good("second")]
    with server(lambda n, body: answers[n]) as (url, _):
        with limited(Limits(timeout=0.3)):
            assert generate(_model(url), ["x"])[0][0].text == "second"
    with server(lambda n, body: (*good()[:3], 1.0)) as (url, _):
        with limited(Limits(timeout=0.2, retries=1)):
            with pytest.raises(Stopped, match=r"no reply within 0.2 s, 2 times"):
                generate(_model(url), ["y"])


def test_a_dripping_reply_times_out_too() -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        try:
            while True:
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.05)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def main() -> None:
        made = await asyncio.start_server(drip, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{made.sockets[0].getsockname()[1]}/v1"

        def ask() -> None:
            with limited(Limits(timeout=0.4, retries=0)):
                generate(_model(url), ["x"])

        try:
            with pytest.raises(Stopped, match=r"no reply within 0.4 s"):
                await asyncio.to_thread(ask)
        finally:
            made.close()

    start = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - start < 3


def test_nobody_listens() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(InputError, match=f"127.0.0.1:{port}/v1: nothing answers.*Is it running"):
        generate(_model(f"http://127.0.0.1:{port}/v1"), ["x"])


def test_budget_of_requests() -> None:
    with server(lambda n, body: good()) as (url, log):
        with limited(Limits(requests=3, concurrency=2)) as spent:
            with pytest.raises(Stopped, match=r"budget of 3 requests.*same command"):
                generate(_model(url), ["a", "b", "c", "d", "e"])
        assert len(log.asked) == 3 == spent.requests
        assert len(list((files.home() / "replies").rglob("*.json"))) == 3
        # With a larger budget the same call goes on from there.
        assert len(generate(_model(url), ["a", "b", "c", "d", "e"])) == 5
        assert len(log.asked) <= 6


def test_budget_of_tokens_is_never_passed() -> None:
    with server(lambda n, body: good()) as (url, log):  # each reply says 10 tokens
        with limited(Limits(tokens=150, concurrency=4)) as spent:
            with pytest.raises(Stopped, match="budget of 150 tokens"):
                generate(_model(url), [f"p{i}" for i in range(40)], max_tokens=3)
        assert 60 <= spent.tokens <= 150
        assert spent.tokens == 10 * len(log.asked)


def test_budget_from_the_environment(monkeypatch: Any) -> None:
    monkeypatch.setenv("TRUING_MAX_REQUESTS", "1")
    with server(lambda n, body: good()) as (url, log):
        with pytest.raises(Stopped, match="budget of 1 requests"):
            generate(_model(url), ["a", "b"])
        assert len(log.asked) == 1
    monkeypatch.setenv("TRUING_MAX_REQUESTS", "many")
    with pytest.raises(InputError, match="TRUING_MAX_REQUESTS: not a number"):
        generate(_model(url), ["a", "b"])


def test_concurrency_is_bounded_and_used() -> None:
    with server(lambda n, body: (*good()[:3], 0.05)) as (url, log):
        with limited(Limits(concurrency=3)):
            generate(_model(url), [f"p{i}" for i in range(12)])
    assert log.most == 3


def test_equal_requests_are_sent_once() -> None:
    with server(lambda n, body: good()) as (url, log):
        made = generate(_model(url), ["a", "a", "a"], n=4, greedy=True)
    assert len(log.asked) == 1
    assert [len(row) for row in made] == [4, 4, 4]
    path, _, body = log.asked[0]
    assert path == "/v1/chat/completions"
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 128,
        "temperature": 0,
        "logprobs": True,
    }


def test_what_a_server_does_not_know_is_left_out() -> None:
    def script(n: int, body: Any) -> Any:
        if "logprobs" in body:
            return 400, {}, {"error": {"message": "Unrecognized argument: logprobs"}}, 0.0
        if "max_tokens" in body:
            said = "'max_tokens' is not supported, use 'max_completion_tokens' instead"
            return 400, {}, {"error": {"message": said}}, 0.0
        return good()

    with server(script) as (url, log):
        with limited(Limits(concurrency=1)):
            generate(_model(url), ["a", "b"], max_tokens=9)
        assert len(log.asked) == 4  # what it refused once is remembered
        assert log.asked[-1][2]["max_completion_tokens"] == 9
    with server(lambda n, body: (400, {}, {"error": "max_tokens is too large"}, 0.0)) as (url, log):
        with pytest.raises(InputError, match="too large"):
            generate(_model(url), ["a"])
        assert len(log.asked) == 1


@pytest.mark.parametrize("code", ["unsupported", "unsupported_parameter"])
def test_a_setting_that_an_error_names_beside_its_words_is_left_out(code: str) -> None:
    said = {"error": {"message": "Not here.", "param": "logprobs", "code": code}}
    with server(lambda n, body: good() if n else (400, {}, said, 0.0)) as (url, log):
        assert generate(_model(url), ["a"])[0][0].text == "fine"
    assert ["logprobs" in body for _, _, body in log.asked] == [True, False]


def test_a_refused_seed_is_told_and_noted_once(capsys: Any) -> None:
    def script(n: int, body: Any) -> Any:
        if "seed" in body:
            return 400, {}, {"error": {"message": "Unsupported parameter: 'seed'"}}, 0.0
        return good()

    with server(script) as (url, log), limited(Limits()), use(Context()) as seen:
        generate(_model(url), list("abcdefgh"), seed=4)  # several are refused at the same time
        generate(_model(url), ["more"], seed=5)
    assert "seed" not in log.asked[-1][2]
    said = [line for line in capsys.readouterr().err.splitlines() if "seed" in line]
    assert said == [
        f"truing: warning: {url} refuses 'seed': the same seed may draw other answers there"
    ]
    assert [m for m in seen.metrics if "refused" in m] == [{"endpoint": url, "refused": "seed"}]


def test_the_key_goes_nowhere_but_into_the_header(monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.setenv("TRUING_API_KEY", "sk-very-secret")
    answers = [good(), (401, {}, {"error": {"message": "bad key sk-very-secret"}}, 0.0)]
    with server(lambda n, body: answers[n]) as (url, log):
        generate(_model(url), ["x"])
        with pytest.raises(InputError) as caught:
            generate(_model(url), ["y"])
    assert log.asked[0][1]["Authorization"] == "Bearer sk-very-secret"
    assert "sk-very-secret" not in str(caught.value)
    assert "bad key ***" in str(caught.value)
    assert "secret" not in "".join(capfd.readouterr())
    for path in files.home().rglob("*"):
        assert path.is_dir() or "secret" not in path.read_text()


def test_openais_key_goes_to_its_own_host_only(monkeypatch: Any) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-theirs")
    with server(lambda n, body: good()) as (url, log):
        generate(_model(url), ["x"])
        assert "Authorization" not in log.asked[0][1]
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        generate(_model(url), ["y"])
        assert log.asked[1][1]["Authorization"] == "Bearer sk-theirs"
    monkeypatch.delenv("OPENAI_BASE_URL")
    assert endpoint.api_key("https://api.openai.com/v1") == "sk-theirs"
    assert endpoint.api_key("http://api.openai.com/v1") == ""  # where all can read it
    monkeypatch.setenv("TRUING_API_KEY", "line\nbreak")
    with pytest.raises(InputError, match="characters that no key has") as caught:
        endpoint.api_key(url)
    assert "line" not in str(caught.value)


def test_bad_addresses() -> None:
    with pytest.raises(InputError, match="not an address"):
        generate(_model("http:///v1"), ["x"])
    with server(lambda n, body: (400, {}, b"no", 0.0)) as (url, _):
        hidden = url.replace("http://", "http://user:pa55word@")
        with pytest.raises(InputError) as caught:
            generate(_model(hidden), ["x"])
    assert "pa55word" not in str(caught.value)


def test_works_inside_a_running_loop() -> None:
    async def cell() -> str:
        return generate(_model(url), ["x"])[0][0].text

    with server(lambda n, body: good()) as (url, _):
        assert asyncio.run(cell()) == "fine"


def test_tools_are_sent_beside_the_messages() -> None:
    tool = {"name": "add", "parameters": {"type": "object", "properties": {}}}
    asked = [as_prompt({"prompt": "a", **more})["prompt"] for more in ({"tools": [tool]}, {})]
    with server(lambda n, body: good()) as (url, log):
        generate(_model(url), asked, greedy=True)
    bodies = sorted((body for _, _, body in log.asked), key=len)
    assert [b["messages"] for b in bodies] == [[{"role": "user", "content": "a"}]] * 2
    assert "tools" not in bodies[0] and bodies[1]["tools"] == [tool]
