"""Rewards by a judge: by hand from a scripted one, from a local one's chances, by a real server."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from misbehaving import Log, good, server

from truing import cli, models
from truing.changes import Decoder, Prefix
from truing.context import Context, Json, current, use
from truing.core import judge as judging
from truing.core.chat import completion_ids, prompt_ids
from truing.core.drawing import Base, Completion, get_component
from truing.core.generate import generate
from truing.core.judging.rewards import Rewards
from truing.core.sampling import SamplingSettings
from truing.errors import InputError
from truing.method import methods, score
from truing.models import Model, hold
from truing.serve.openai import serving
from truing.tables import Row, Table
from truing.train.reward.judged import filled, judge_of, judged, judged_against

Answered = Callable[[str], str]
ANSWER = re.compile(r"<answer>\n(.*)\n</answer>", re.S)
FAR = "http://127.0.0.1:9/v1#m"


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "home"))
    with use(Context()):
        yield


def scripted(say: Answered) -> Any:
    """A server whose reply depends on the answer that it is shown."""

    def script(_: int, body: dict[str, Any]) -> Any:
        found = ANSWER.search(body["messages"][-1]["content"])
        assert found is not None
        return good(say(found[1]))

    return server(script)


def told(log: Log) -> list[str]:
    return [body["messages"][-1]["content"] for _, _, body in log.asked]


def rows(*answers: str, prompt: str = "Why?") -> list[Row]:
    return [{"prompt": prompt, "completion": a, "finished": True} for a in answers]


def test_ratings_by_hand() -> None:
    def say(answer: str) -> str:
        return f"Well.\nRating: {answer}" if answer.isdigit() else "I would rather not say."

    asked = [*rows("1", "2", "?", "5"), *rows("?", "4", prompt="How?"), *rows("?", prompt="Who?")]
    with scripted(say) as (url, log):
        # 1 to 5: (k - 1) / 4. Unread: the mean of 0, 1/4 and 1; of 3/4; 1/2 where none was read.
        found = judged(asked, model=f"{url}#m", criteria="Be kind.")
        assert found == pytest.approx([0, 0.25, 1.25 / 3, 1, 0.75, 0.75, 0.5], abs=1e-12)
        assert len(log.asked) == 4 + 3 * 3  # what cannot be read is asked for three times
        assert all("Be kind." in t and "from 1 (worst) to 5 (best)" in t for t in told(log))
        # Kept replies: nothing is asked again.
        assert score("reward", {"use": "judged", "model": f"{url}#m", "criteria": "Be kind."},
                     asked) == found  # fmt: skip
        assert len(log.asked) == 13
        seen = [(m["judged"], m["unparsed"]) for m in current().metrics]
        assert seen == [(7, 3), (7, 3)]
    with scripted(say) as (url, log):
        # 1 to 9: (k - 1) / 8.
        found = judged(rows("1", "2", "9"), model=f"{url}#m", scale=9)
        assert found == pytest.approx([0, 0.125, 1], abs=1e-12)
        assert all("from 1 (worst) to 9 (best)" in t for t in told(log))
        assert not any("Be kind." in t for t in told(log))
    with use(Context()), scripted(say) as (url, _):
        # A 4 is on no scale of 3, so it is not read: the mean of 0 and 1.
        assert judged(rows("1", "4", "3"), model=f"{url}#m", scale=3) == [0.0, 0.5, 1.0]
    assert judged([], model=FAR) == []


def test_unread_ones_stand_at_their_group_s_mean() -> None:
    assert filled([0.2, None, 0.6, None, 1.0, None], list("aaabbc")) == pytest.approx(
        [0.2, 0.4, 0.6, 1.0, 1.0, 0.5]
    )
    assert filled([None], ["a"]) == [0.5]
    assert filled([], []) == []


def test_a_judge_that_cannot_be_read_ends_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    def say(answer: str) -> str:
        return "Rating: 3" if answer.startswith("good") else "Fine!"

    with scripted(say) as (url, _):
        # 4 of 20 are a fifth; one more is too much, though it came in a small call of its own.
        judged(rows(*(f"good {i}" for i in range(16)), *"abcd"), model=f"{url}#m")
        with pytest.raises(InputError, match="from 5 of 21 replies") as error:
            judged(rows("e"), model=f"{url}#m")
        assert "follows the form" in str(error.value)
    assert "warning" not in capsys.readouterr().err
    with use(Context()), scripted(say) as (url, _):
        assert judged(rows("a", "b"), model=f"{url}#m") == [0.5, 0.5]
        assert judged(rows("c"), model=f"{url}#m") == [0.5]
    said = capsys.readouterr().err
    assert said.count("reward judged: warning: no rating could be read from 2 of 2 replies") == 1
    assert said.count("warning") == 1 and "follows the form" in said


def _chances(model: Model, prompt: str, options: list[str]) -> list[float]:
    """Probabilities of the options, as written or in lower case, among themselves."""
    loaded = model.load_module()
    head = prompt_ids(loaded.tokenizer, prompt)
    found: list[float] = []
    for option in options:
        total = 0.0
        for text in {option, option.lower()}:
            ids = completion_ids(loaded.tokenizer, text, end=False)
            with loaded.run_time(), torch.no_grad():
                logits = loaded.module(torch.tensor([head + ids]), use_cache=False).logits[0]
            logp = torch.log_softmax(logits.double(), 1)
            each = [logp[len(head) - 1 + i, t] for i, t in enumerate(ids)]
            total += float(torch.stack(each).sum().exp())
        found.append(total)
    return [f / sum(found) for f in found]


def test_a_local_judge_by_its_probabilities(tiny_path: Path) -> None:
    tiny = Model.open(tiny_path)
    key = hold(tiny)
    asked = rows("An answer.", "Another one")
    plain = judged(asked, model=key, criteria="Be kind.")
    scaled = judged(asked, model=key, criteria="Be kind.", scale=5)
    for row, found, graded in zip(asked, plain, scaled, strict=True):
        text = (
            "You judge an answer to a request.\nA good answer keeps these rules:\nBe kind.\n"
            f"<request>\nWhy?\n</request>\n\n<answer>\n{row['completion']}\n</answer>\n"
        )
        yes, _ = _chances(tiny, f"{text}\n{judging.ASK_ONE}", ["Yes", "No"])
        assert found == pytest.approx(yes, abs=1e-4)
        how = "How good is this answer, from 1 (worst) to 5 (best)? Reply with the number alone."
        chances = _chances(tiny, f"{text}\n{how}", list("12345"))
        mean = sum(c * k / 4 for k, c in enumerate(chances))
        assert graded == pytest.approx(mean, abs=1e-4)
    assert scaled != pytest.approx(plain, abs=1e-3)


def test_it_chooses_the_best_of_n_and_is_weighed(tiny_path: Path) -> None:
    with scripted(lambda answer: f"Rating: {grade(answer)}") as (url, _):
        refs: dict[str, dict[str, object]] = {"good": {"use": "judged", "model": f"{url}#m"}}
        decoded = methods["best_of_n"](Model.open(tiny_path), n=4, rewards=refs)
        assert isinstance(decoded, Model)
        draw: dict[str, Any] = {"max_tokens": 8, "seed": 3}
        drawn = generate(Model.open(tiny_path), ["What is red?", "Say why."], n=4, **draw)
        chosen = generate(decoded, ["What is red?", "Say why."], n=1, **draw)
        for items, (answer,) in zip(drawn, chosen, strict=True):
            grades = [grade(c.text.strip()) for c in items]
            assert len(set(grades)) > 1 and answer == items[grades.index(max(grades))]
        value = Rewards(refs, {"good": 2.0}, where="here")
        assert value(rows("abc", "")) == [2 * 0.75, 0.0]


def test_what_a_judge_rewarded_carries_its_licence(tiny_path: Path, tmp_path: Path) -> None:
    base = Model.open(tiny_path)
    judge = base.adding(Prefix([{"role": "system", "content": "Strict."}]), licence="cc-by-nc-4.0")
    refs = {"good": {"use": "judged", "model": hold(judge)}}
    assert base.licence == "apache-2.0"
    guided = methods["prm_guided"](base, rewards=refs)
    assert isinstance(guided, Model) and guided.licence == "cc-by-nc-4.0"
    data = Table("prompt", [{"prompt": "say lime"}])
    with use(Context(folder=tmp_path)):
        trained = methods["grpo"](
            base, data, steps=1, batch=1, answers=2, max_tokens=3, rewards=refs
        )
    assert isinstance(trained, Model) and trained.licence == "cc-by-nc-4.0"


def test_a_saved_decoder_brings_its_judge_along(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Model.open(tiny_path)
    judge = base.adding(Prefix([{"role": "system", "content": "Be strict."}]), licence="mit")
    refs = {"good": {"use": "judged", "model": hold(judge)}}
    made = methods["best_of_n"](base, n=3, rewards=refs)
    assert isinstance(made, Model) and judge.licence in made.licences
    how: dict[str, Any] = {"max_tokens": 4, "seed": 3}
    drawn = generate(made, ["Why?"], **how)
    folder = made.save(tmp_path / "saved")
    monkeypatch.setattr(models, "_held", {})  # as in another process
    again = Model.load(folder)
    assert again.key == made.key and generate(again, ["Why?"], **how) == drawn
    # What was saved without it says what to give.
    card = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(card | {"held": {}}))
    monkeypatch.setattr(models, "_held", {})
    with pytest.raises(InputError, match=r"no judge of that key.*truing\.models\.hold"):
        generate(Model.load(folder), ["Why?"], **how)
    hold(judge)
    assert generate(Model.load(folder), ["Why?"], **how) == drawn


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"model": "http://bob:hunter2@127.0.0.1:9/v1#m"}, "no name and password"),
        ({"model": "http://127.0.0.1:9/v1"}, "does not say which model"),
        ({"model": "0123"}, "unknown model '0123'"),
        ({"model": FAR, "scale": 1}, "'scale'"),
        ({"model": FAR, "scale": 10}, "'scale'"),
        ({}, "'model' is missing"),
    ],
)
def test_mistakes_are_told_before_anything_is_drawn(
    settings: dict[str, object], part: str, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("truing.core.rl.collect.Collector.collect", lambda *_: pytest.fail("drawn"))
    refs = {"good": {"use": "judged", **settings}}
    model = Model.open(tiny_path)
    for run in (
        lambda: methods["best_of_n"](model, n=2, rewards=refs),
        lambda: methods["grpo"](model, Table("prompt", [{"prompt": "Why?"}]), rewards=refs),
    ):
        with pytest.raises(InputError) as error:
            run()
        assert part in str(error.value) and "hunter2" not in str(error.value)


def test_what_cannot_judge_is_refused() -> None:
    rules = Table("prompt", [{"prompt": "Why?"}])
    with pytest.raises(InputError, match="not a model that can judge"):
        judge_of(hold(rules))
    assert judge_of(FAR).is_served


def test_a_damaged_judge_is_not_called_a_missing_one(tiny_path: Path, tmp_path: Path) -> None:
    model = Model.open(tiny_path)
    folder = model.adding(Prefix([{"role": "system", "content": "Strict."}])).save(tmp_path / "j")
    models.hold_at("a key of no other artefact", "Model", folder, model.key)  # another is there
    with pytest.raises(InputError, match="not the one that was saved") as error:
        judge_of("a key of no other artefact")
    assert error.value.where == str(folder)
    with pytest.raises(InputError, match="no judge of that key is at hand"):
        judge_of("a key of nothing")


def test_a_served_reward_model_is_told_what_to_do(tiny_path: Path) -> None:
    with pytest.raises(InputError, match=r"use: judged, model"):
        methods["best_of_n"](Model.open(tiny_path), n=2, reward_model=Model.open(FAR))


# GRPO by a served judge


def grade(answer: str) -> int:
    """From 1 to 5, by the letters in an answer."""
    return 1 + sum(c.isalpha() for c in answer) % 5


def grading(
    base: Base, model: Model, prompts: list[Any], sampling: SamplingSettings
) -> list[list[Completion]]:
    """A decoder: what the tiny model says, then a rating, which it could not write by itself."""
    drawn = base(prompts, replace(sampling, max_tokens=3))
    made: list[list[Completion]] = []
    for prompt, items in zip(prompts, drawn, strict=True):
        found = ANSWER.search(prompt if isinstance(prompt, str) else prompt[-1]["content"])
        assert found is not None
        rating = f"\nRating: {grade(found[1])}"
        made.append([replace(c, text=c.text + rating, finish="stop") for c in items])
    return made


def test_grpo_is_rewarded_by_a_judge_behind_a_real_server(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as when the ratings are given without a server."""

    def component(kind: str, ref: dict[str, Any], **more: str) -> Any:
        return grading if ref["use"] == "grading" else get_component(kind, ref, **more)

    monkeypatch.setattr("truing.core.drawing.get_component", component)
    monkeypatch.setenv("TRUING_API_KEY", "tok-en")
    model = Model.open(tiny_path)
    data = Table("prompt", [{"prompt": f"say {w}"} for w in ("lime", "oak", "rain", "stone")])

    def run(folder: str, url: str) -> tuple[str, list[dict[str, Json]], list[dict[str, Json]]]:
        with use(Context(seed=4, folder=tmp_path / folder)) as context:
            made = methods["grpo"](
                model, data, steps=2, batch=4, answers=3, max_tokens=6, lr=2e-3,
                rewards={"good": {"use": "judged", "model": url, "criteria": "Be kind."}},
            )  # fmt: skip
        assert isinstance(made, Model)
        steps = [{n: v for n, v in m.items() if n != "seconds"} for m in context.metrics]
        return made.key, [m for m in steps if "step" in m], [m for m in steps if "judge" in m]

    with serving(model.adding(Decoder("grading")), token="tok-en", name="judge") as address:
        url = f"{address.url}#{address.model}"
        key, steps, asked = run("served", url)
        assert (tmp_path / "home" / "replies").is_dir()
    assert [(m["judge"], m["judged"], m["unparsed"]) for m in asked] == [("judge", 12, 0)] * 2
    assert all(float(str(m["grad_norm"])) > 0 for m in steps)
    assert all(m["reward"] == m["reward/good"] and 0 < float(str(m["reward"])) < 1 for m in steps)

    def rate(judge: Model, rows: Sequence[Row], **_: object) -> list[float]:
        return [(grade(str(row["completion"])) - 1) / 4 for row in rows]

    monkeypatch.setattr("truing.train.reward.judged.rate", rate)
    assert run("plain", url)[:2] == (key, steps)
    kept = "".join(p.read_bytes().decode("latin-1") for p in tmp_path.rglob("*") if p.is_file())
    assert "tok-en" not in kept


def test_from_the_command_line(tiny_path: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "Why?"}) + "\n")
    with scripted(lambda answer: f"Rating: {grade(answer)}") as (url, log):
        rewards = f"{{good: {{use: judged, model: {url}#m, criteria: Be kind.}}}}"
        words = (
            f"train grpo --model {tiny_path} --data {tmp_path / 'prompts.jsonl'} --steps 1 "
            "--batch 1 --answers 2 --max-tokens 4"
        )
        assert cli.main([*words.split(), "--rewards", rewards]) == 0
        assert 1 <= len(log.asked) <= 2 and all("Be kind." in t for t in told(log))


# Comparisons with a reference

PAIR = re.compile(r"<answer_A>\n(.*)\n</answer_A>\n\n<answer_B>\n(.*)\n</answer_B>", re.S)


def comparing(say: Callable[[str, str], str]) -> Any:
    """A server whose reply depends on the two answers that it is shown."""

    def script(_: int, body: dict[str, Any]) -> Any:
        found = PAIR.search(body["messages"][-1]["content"])
        assert found is not None
        return good(say(found[1], found[2]))

    return server(script)


def by_number(first: str, second: str) -> str:
    """The larger number wins, but 7 is liked wherever it stands first; "?" is not read."""
    if "?" in first + second:
        return "I would rather not say."
    if first == "7":
        return "Verdict: A"
    a, b = int(first), int(second)
    return "Verdict: tie" if a + b == 9 else f"Verdict: {'A' if a > b else 'B'}"


def test_comparisons_by_hand() -> None:
    asked: list[Row] = [
        {**rows(answer)[0], "given": given}
        for answer, given in [("3", "2"), ("1", "3"), ("5", "4"), ("7", "8"), ("6", "6"),
                              ("7", "3"), ("?", "1")]
    ]  # fmt: skip
    with comparing(by_number) as (url, log):
        found = judged_against(asked, model=f"{url}#m", criterion="helpful")
        # Better, worse, a tie, liked for its place alone, the same text, better; not read is 0.
        assert found == [1.0, -1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
        assert len(log.asked) == 2 * 5 + 2 * 3  # equal texts are not asked of, unread ones thrice
        assert all("accurate, efficient, and adds value" in t for t in told(log))
        first, second = (PAIR.search(t) for t in told(log)[:2])
        assert first is not None and second is not None
        assert {first.groups(), second.groups()} <= {
            (a, b) for r in asked for a, b in ((r["completion"], r["given"]),
                                               (r["given"], r["completion"]))
        }  # fmt: skip
    with comparing(by_number) as (url, log):
        other = [{"prompt": "p", "completion": "1", "gold": "2"}]
        ref = {"use": "judged_against", "model": f"{url}#m", "column": "gold"}
        assert score("reward", {**ref, "criterion": "Be brief."}, other) == [-1.0]
        assert all("Be brief." in t for t in told(log))
        with pytest.raises(InputError, match="reference answer in column 'given'"):
            judged_against(other, model=f"{url}#m")
    with pytest.raises(InputError, match=r"judged_against setting 'model'.*no judge of that key"):
        Rewards({"j": {"use": "judged_against", "model": "nobody"}}, {}).check()


def test_a_judge_of_pairs_that_cannot_be_read_ends_the_step() -> None:
    asked: list[Row] = [{**rows("?" if i < 5 else str(i))[0], "given": "0"} for i in range(20)]
    with comparing(by_number) as (url, _), pytest.raises(InputError, match="of 5 of 20 pairs"):
        judged_against(asked, model=f"{url}#m")


def test_grao_is_rewarded_by_comparison_with_the_rows_own_answer(
    tiny_path: Path, tmp_path: Path
) -> None:
    """Answers win where they have more letters "a"; the row's own answer against itself is 0."""
    seen: list[tuple[str, str]] = []

    def say(first: str, second: str) -> str:
        seen.append((first, second))
        more = first.count("a") - second.count("a")
        return f"Verdict: {'A' if more > 0 else 'B' if more < 0 else 'tie'}"

    data = Table("example", [{"prompt": f"say {w}", "completion": f"a {w}"} for w in ("x", "y")])
    with comparing(say) as (url, _), use(Context(folder=tmp_path, seed=2)) as context:
        methods["grao"](
            Model.open(tiny_path), data, steps=1, batch=2, answers=3, max_tokens=6,
            rewards={"judge": {"use": "judged_against", "model": f"{url}#m"}},
        )  # fmt: skip
    (step,) = [m for m in context.metrics if "step" in m]
    (path,) = tmp_path.glob("rollouts-*/*.jsonl")
    held = dict(json.loads(line) for line in path.read_bytes().splitlines())
    (scored,) = [v for k, v in held.items() if k.endswith("/reward")]
    drawn = next(v for k, v in held.items() if k.startswith("rollout/0//0/"))
    for (reward, _, _), items in zip(scored, drawn, strict=True):
        texts = [text for _, _, text, _ in items]
        want = [(t.count("a") > 1) - (t.count("a") < 1) for t in texts]
        assert reward == [*map(float, want), 0.0]
    assert {"a x", "a y"} & {t for pair in seen for t in pair}
    assert step["reward/judge"] == pytest.approx(
        sum(r for reward, _, _ in scored for r in reward[:3]) / 6
    )
