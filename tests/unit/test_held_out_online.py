"""Held-out prompts of online methods: measured by hand, paired, without effect, kept, cut off."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from misbehaving import good, server

from truing import cli, pipeline, recipe
from truing.context import Context, Journal, Json, use
from truing.core.chat import prompt_ids, reply_ids
from truing.core.drawing import Completion
from truing.core.generate import generate
from truing.core.generation import dialogue_cache
from truing.core.held_out import REWARD, Course, Watch
from truing.core.online import Online, online_of
from truing.core.rl import collect
from truing.core.rollout import Observation, Step
from truing.core.sampling import SamplingSettings, sample
from truing.core.tiny import tiny_tokenizer
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.store import Store
from truing.tables import Message, Row, Table

TOKENIZER = tiny_tokenizer()
ONLINE = [n for n in methods if methods[n].entry.kind == "online"]
WORDS = "lime oak rain stone river cloud ash fern".split()
PROMPTS = Table("prompt", [{"prompt": f"say {w}"} for w in WORDS])
HELD = Table("prompt", [{"prompt": f"sing {w}"} for w in ("moss", "sand", "dune", "reed", "hail")])
HALF = "abcdefghijklmnop"
LETTERS = {"letters": {"use": "share_of", "letters": HALF}}
SMALL: dict[str, object] = {
    "steps": 3, "batch": 4, "answers": 3, "max_tokens": 6, "lr": 2e-3, "rewards": LETTERS,
}  # fmt: skip
Rows = list[dict[str, Json]]


@pytest.fixture
def model(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


def run(
    name: str,
    model: Model,
    folder: Path | None,
    data: Table = PROMPTS,
    held: Table | None = HELD,
    **more: object,
) -> tuple[Model, Context]:
    with use(Context(seed=4, folder=folder)) as context:
        made = methods[name](model, data, held_out=held, **{**SMALL, **more})
    assert isinstance(made, Model)
    return made, context


def measured(context: Context) -> dict[int, dict[str, float]]:
    """What was measured on held-out prompts, by the updates made before."""
    rows = [m for m in context.metrics if any(n.startswith("held_out/") for n in m)]
    return {cast(int, m["step"]): cast("dict[str, float]", m) for m in rows}


def trained(context: Context) -> Rows:
    """What was recorded of updates."""
    rows = [m for m in context.metrics if "grad_norm" in m]
    return [{n: v for n, v in m.items() if n != "seconds"} for m in rows]


def drawn(model: Model, prompts: Table = HELD, temperature: float = 1.0) -> list[Completion]:
    """One answer of a model to each prompt, by the stream of held-out prompts."""
    seed = Context(seed=4).stream("held_out/0") % 2**31
    asked = [str(r["prompt"]) for r in prompts]
    with use(Context()):
        found = generate(model, asked, max_tokens=6, temperature=temperature, seed=seed)
    return [one for (one,) in found]


def share(text: str, letters: str = HALF) -> float:
    text = text.strip()
    return sum(c in letters for c in text) / len(text) if text else 0.0


def mean_share(model: Model) -> float:
    """The reward by hand."""
    texts = [one.text for one in drawn(model)]
    return sum(map(share, texts)) / len(texts)


# Values


def logps(model: Model, answers: Sequence[Completion], heat: float) -> torch.Tensor:
    """log p of every token drawn, under the stock module at a temperature, one row at a time."""
    module, found = model.load_module().module, list[torch.Tensor]()
    for row, one in zip(HELD, answers, strict=True):
        head, tail = prompt_ids(TOKENIZER, str(row["prompt"])), list(one.ids)
        with torch.no_grad():
            logits = module(torch.tensor([[*head, *tail]])).logits[0, len(head) - 1 : -1]
        found.append((logits / heat).log_softmax(-1).gather(1, torch.tensor(tail)[:, None])[:, 0])
    return torch.cat(found)


def test_values_by_hand_before_and_after(model: Model, tmp_path: Path) -> None:
    """Answers drawn by the public call, rewards, lengths, entropy and divergence by hand."""
    digits, heat = {"digits": {"use": "share_of", "letters": string.digits}}, 0.7
    made, context = run(
        "grpo", model, tmp_path, rewards=LETTERS | digits, weights={"letters": 2.0, "digits": -0.5},
        missing_end=0.25, temperature=heat, beta=0.1, rank=0, eval_every=2, lr=5e-4,
    )  # fmt: skip
    seen = measured(context)
    assert list(seen) == [0, 2, 3]
    for step, policy in ((0, model), (3, made)):
        answers, row = drawn(policy, temperature=heat), seen[step]
        ended = [one.finish == "stop" for one in answers]
        letters = [share(one.text) for one in answers]
        numbers = [share(one.text, string.digits) for one in answers]
        rewards = [
            2 * a - 0.5 * b - 0.25 * (not end)
            for a, b, end in zip(letters, numbers, ended, strict=True)
        ]
        assert row["held_out/reward"] == pytest.approx(sum(rewards) / 5, abs=1e-6)
        assert row["held_out/reward/letters"] == pytest.approx(sum(letters) / 5, abs=1e-6)
        assert row["held_out/reward/digits"] == pytest.approx(sum(numbers) / 5, abs=1e-6)
        assert row["held_out/length"] == sum(len(one.ids) for one in answers) / 5
        assert row["held_out/finished"] == pytest.approx(sum(ended) / 5)
        own, other = logps(policy, answers, heat), logps(model, answers, heat)
        assert row["held_out/entropy"] == pytest.approx(-float(own.mean()), rel=1e-4)
        k3 = (other - own).exp() - 1 - (other - own)
        assert row["held_out/kl"] == pytest.approx(float(k3.mean()), rel=1e-3, abs=1e-6)
    assert seen[3]["held_out/kl"] > 1e-4
    # Every name is one of training, beside which it is drawn.
    assert {n.removeprefix("held_out/") for n in seen[0]} <= set(trained(context)[0])


def test_measurements_are_paired(model: Model, tmp_path: Path) -> None:
    """A policy that stays as it is says the same each time, and other things than in training."""
    _, context = run("grpo", model, tmp_path, lr=1e-12, eval_every=1)
    seen = [{n: v for n, v in row.items() if n != "step"} for row in measured(context).values()]
    assert len(seen) == 4 and all(row == pytest.approx(seen[0], rel=1e-5) for row in seen)
    assert seen[0]["held_out/reward"] == pytest.approx(mean_share(model), abs=1e-6)
    said = [path.read_bytes() for path in sorted(tmp_path.glob("rollouts-*/held_out/*.jsonl"))]
    texts = [[a[0][2] for a in json.loads(s.splitlines()[0])[1]] for s in said]
    assert len(said) == 4 and all(one == texts[0] for one in texts)


class Game:
    """Two turns, each paid by its letters, with a word in between."""

    def reset(self, seed: int, task: Row) -> Observation:
        self.turn, self.name = 0, str(task["name"])
        return Observation(f"Tell me of {self.name}.")

    def step(self, action: Json) -> Step:
        self.turn += 1
        told = Observation(f"And of {self.name} again?")
        return Step(told, self.turn * share(str(action)), self.turn == 2)

    def snapshot(self) -> Json:
        return [self.turn, self.name]

    def restore(self, snapshot: Json) -> None:
        self.turn, self.name = cast("tuple[int, str]", snapshot)


def test_episodes_by_hand(model: Model) -> None:
    tasks, held = (Table("record", [{"name": w} for w in some]) for some in (WORDS, WORDS[::-2]))
    _, context = run(
        "grpo", model, None, tasks, held, environment=Game, rewards=None, rank=0, steps=1,
        eval_every=1,
    )  # fmt: skip
    module = model.load_module().module

    def said(prompts: Sequence[Sequence[int]], stream: str) -> list[tuple[list[int], str]]:
        seed = Context(seed=4).stream(stream) % 2**31
        how = SamplingSettings(max_tokens=6, seed=seed, stop_ids=(2,))
        ids = [items[0].ids for items in sample(module, prompts, how)]
        words = [str(TOKENIZER.decode(one, skip_special_tokens=True)).strip() for one in ids]
        return list(zip(ids, words, strict=True))

    talks: list[list[Message]] = [
        [{"role": "user", "content": f"Tell me of {r['name']}."}] for r in held
    ]
    begun = [prompt_ids(TOKENIZER, talk) for talk in talks]
    first = said(begun, "held_out/0")
    for talk, row, (_, words) in zip(talks, held, first, strict=True):
        talk.append({"role": "assistant", "content": words})
        talk.append({"role": "user", "content": f"And of {row['name']} again?"})
    grown = [
        [*head, *ids, *reply_ids(TOKENIZER, talk, ids)]
        for head, (ids, _), talk in zip(begun, first, talks, strict=True)
    ]
    second = said(grown, "held_out/0/turn1")
    rewards = [share(a) + 2 * share(b) for (_, a), (_, b) in zip(first, second, strict=True)]
    row = measured(context)[0]
    assert row["held_out/reward"] == pytest.approx(sum(rewards) / len(held), abs=1e-6)
    assert row["held_out/reward/environment"] == row["held_out/reward"]
    assert row["held_out/turns"] == 2.0 and list(measured(context)) == [0, 1]


MIXED: list[Row] = [
    {"prompt": "1 + 2", "answer": "3"},
    {"prompt": "which?", "completions": ["yes", "no"], "scores": [1.0, 0.0]},
    {"prompt": "tell me a story"},
]


def test_what_a_pool_cannot_reward_is_left_out(model: Model, tmp_path: Path) -> None:
    """This model grades nothing: sums and orders count alone, and where there are none, nothing."""
    data, more = Table("prompt", MIXED), {"rewards": {}, "steps": 1, "batch": 3, "answers": 2}
    with use(Context(seed=4, folder=tmp_path / "a")) as context:
        own = {n: v for n, v in {**SMALL, **more}.items() if n != "rewards"}
        methods["urpo"](model, data, held_out=Table("prompt", MIXED[::-1]), **own)
    row = measured(context)[0]
    assert row["held_out/left_out"] == pytest.approx(1 / 3) and row["held_out/reward"] == 0.0
    with use(Context(seed=4, folder=tmp_path / "b")) as context:
        held = Table("prompt", [{"prompt": f"tell me of {w}"} for w in WORDS])
        methods["urpo"](model, data, held_out=held, **own, keep_best=True)
    seen = measured(context)
    assert all(math.isnan(r["held_out/reward"]) for r in seen.values()) and len(seen) == 2
    assert [m["held_out_highest_after"] for m in context.metrics if "held_out_highest_after" in m]


# Training is what it would be without


TWICE: dict[str, object] = {"passes": 2, "minibatches": 2}


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("grpo", TWICE | {"beta": 0.1, "entropy_share": 0.5}),
        ("ppo", TWICE | {"rank": 0}),
        ("remax", {"layers": 1}),
        ("dapo", {"refill": 2, "punish": 0.0}),
        ("nash_md", {"dtype": "bfloat16"}),
        ("grpo", {"environment": {"use": "running_sum", "terms": 2, "tries": 1}}),
    ],
)
def test_it_changes_no_bit(
    name: str,
    more: dict[str, object],
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        dialogue_cache, "room", lambda: 2**30
    )  # what is free now stands in the journal
    plain, without = run(name, model, tmp_path / "without", held=None, **more)
    watched, context = run(name, model, tmp_path / "with", eval_every=1, **more)
    assert watched.key == plain.key and trained(context) == trained(without)
    assert len(measured(context)) == len(trained(context)) + 1
    told = [sorted((tmp_path / n).glob("rollouts-*/*.jsonl")) for n in ("without", "with")]
    assert [p.read_bytes() for p in told[0]] == [p.read_bytes() for p in told[1]]


def test_a_judge_behind_an_address_is_asked_the_same(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its replies depend on the seed of the draw, and on nothing that was asked before."""

    def script(_: int, body: dict[str, Any]) -> Any:
        text = str(body["messages"][-1]["content"])
        if body.get("seed") is None and len(text) % 2:
            return good("I would rather not say.")  # it is asked again, and drawn from
        return good(f"Rating: {1 + (len(text) + int(body.get('seed') or 0)) % 5}")

    found: list[tuple[str, Rows]] = []
    with server(script) as (url, log):
        rewards = {"judge": {"use": "judged", "model": f"{url}#m"}}
        for held in (HELD, None):
            monkeypatch.setenv("TRUING_HOME", str(tmp_path / f"home-{held is None}"))
            folder = tmp_path / f"run-{held is None}"
            few: dict[str, object] = {"steps": 2, "batch": 2, "answers": 2}
            made, context = run("grpo", model, folder, held=held, rewards=rewards, **few)
            found.append((made.key, trained(context)))
            told = [m["held_out_judged"] for m in context.metrics if "held_out_judged" in m]
            assert told == ([5, 5, 5] if held is not None else [])
    assert found[0] == found[1] and len(log.asked) > 20


def test_keys_of_runs(model: Model, tmp_path: Path) -> None:
    for more in ({"held": None}, {}, {"eval_every": 1}, {"held": HELD.take(range(2))}):
        run("rloo", model, tmp_path, steps=1, **more)  # type: ignore[arg-type]
    assert len(list(tmp_path.glob("checkpoints-*"))) == 4


# What follows


def test_decisions_by_hand() -> None:
    def of(*rewards: float) -> Rows:
        return [{"step": 2 * i, "held_out/reward": reward} for i, reward in enumerate(rewards)]

    seen = Course(REWARD, [{"step": 1, "held_out/loss": 9.0}, *of(0.9, 0.1, 0.3, 0.3)])
    assert (seen.best, seen.best_value) == (4, 0.3)  # before training is no update
    assert (seen.first, seen.newest, seen.waited) == (0.9, 0.3, 3)
    assert Course(REWARD, of(-1.0, math.nan, -3.0)).best == 4
    assert Course(REWARD, of(math.nan, math.nan)).best == 2
    waited = [Course(REWARD, of(0.1, 0.4, 0.3, *more)).waited for more in ([], [0.2], [0.5])]
    assert waited == [1, 2, 0]
    facts, said = seen.told(Watch(keep_best=True), 4, 6)
    assert facts == {"held_out_highest_after": 4, "ended_after": 4}
    assert said == (
        "held-out reward 0.3 after update 4, the highest; 0.9 at first; ended after 4 of 6 updates;"
        " the model after update 4 is kept; warning: no update has raised it"
    )


FALLS: dict[str, object] = {"steps": 8, "lr": 3e-2, "rank": 0, "eval_every": 1}


def test_the_update_of_highest_reward_is_kept(model: Model, tmp_path: Path) -> None:
    """At a rate so high that the reward falls again: what comes back was measured as the best."""
    made, context = run("rloo", model, tmp_path / "best", keep_best=True, **FALLS)
    seen = {s: row["held_out/reward"] for s, row in measured(context).items() if s}
    best = max(seen, key=lambda s: seen[s])
    assert best < 8 and seen[best] > seen[8]
    assert mean_share(made) == pytest.approx(seen[best], abs=1e-6)
    (told,) = [m for m in context.metrics if "held_out_highest_after" in m]
    assert told["held_out_highest_after"] == best
    last, other = run("rloo", model, tmp_path / "last", **FALLS)
    assert mean_share(last) == pytest.approx(seen[8], abs=1e-6)
    assert measured(other) == measured(context)


def test_patience_ends_the_training(model: Model, tmp_path: Path) -> None:
    _, whole = run("rloo", model, tmp_path / "whole", **FALLS)
    rewards = [row["held_out/reward"] for row in measured(whole).values()]
    made, context = run("rloo", model, tmp_path / "short", patience=2, **FALLS)
    end = next(i for i in range(2, 9) if max(rewards[i - 1 : i + 1]) <= max(rewards[: i - 1]))
    assert end < 8 and len(trained(context)) == end
    assert [row["held_out/reward"] for row in measured(context).values()] == rewards[: end + 1]
    assert mean_share(made) == pytest.approx(rewards[end], abs=1e-6)


# Cut off


class Putting:
    """Cuts a run off after so many lines of journals of held-out prompts."""

    def __init__(self, patch: pytest.MonkeyPatch, last: int) -> None:
        put, left = Journal.put, [last]

        def dying(journal: Journal, key: str, value: Json) -> None:
            put(journal, key, value)
            left[0] -= journal.path.parent.name == "held_out"
            if not left[0]:
                raise KeyboardInterrupt

        patch.setattr(Journal, "put", dying)


@pytest.mark.parametrize(("name", "cuts"), [("grpo", [2, 7, 13]), ("ppo", [8])])
def test_cut_off_inside_a_measurement(
    name: str,
    cuts: list[int],
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    always_save: Callable[[], None],
) -> None:
    """Between two blocks of answers or before their rewards, at first and between updates."""
    monkeypatch.setattr(collect, "BLOCK", 2)  # three blocks of answers, then the rewards
    always_save()
    more = TWICE | {"steps": 2, "eval_every": 3, "keep_best": True, "beta": 0.1}
    expected, whole = run(name, model, tmp_path / "whole", **more)
    assert list(measured(whole)) == [0, 3, 6, 8]
    for last in cuts:
        folder = tmp_path / str(last)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            Putting(patch, last)
            run(name, model, folder, **more)
        again, rest = run(name, model, folder, **more)
        assert again.key == expected.key
        assert measured(rest) == measured(whole) and trained(rest) == trained(whole)


# Every method


def table_for(spec: Online, words: Sequence[str]) -> Table:
    rows: list[Row] = []
    for i, word in enumerate(words):
        row: Row = {"prompt": f"say {word}"}
        row |= {"completion": f"a bad {word}"} if spec.rows == "example" else {}
        row |= {"answer": str(i)} if spec.pools else {}
        rows.append(row)
    return Table(spec.rows, rows)


@pytest.mark.parametrize("name", ONLINE)
def test_every_online_method_measures_and_trains_as_without(
    name: str, model: Model, tmp_path: Path
) -> None:
    method, spec = methods[name], online_of(methods[name].declared)
    assert "held_out" in method.inputs and method.inputs["held_out"].optional
    assert {"eval_every", "keep_best", "patience"} <= set(method.settings)
    assert all("reward" in method.settings[n].doc for n in ("eval_every", "keep_best", "patience"))
    printed = {"printed": {"use": "share_of", "letters": string.printable}}
    settings: dict[str, object] = {
        "steps": 1, "batch": 2, "answers": 2, "max_tokens": 4, "lr": 2e-3, "minibatches": 1,
        "passes": 1, **({} if spec.pools else {"rewards": printed}),
    }  # fmt: skip
    found: list[tuple[str, Rows]] = []
    for held in (table_for(spec, WORDS[2:5]), None):
        folder = tmp_path / str(held is None)
        with use(Context(seed=2, folder=folder)) as context:
            made = method(model, table_for(spec, WORDS[:2]), held_out=held, **settings)
        found.append((cast(Model, made).key, trained(context)))
        seen = measured(context)
        assert list(seen) == ([0, 1] if held is not None else [])
        for row in seen.values():
            assert math.isfinite(row["held_out/reward"]) and 1 <= row["held_out/length"] <= 4
            assert ("held_out/kl" in row) == ("kl" in trained(context)[0])
    assert found[0] == found[1]


# What is said


def test_bad_input(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("eval_every", 5), ("keep_best", True), ("patience", 1)):
        with pytest.raises(InputError, match=f"setting '{name}' counts for nothing"):
            run("grpo", model, tmp_path, held=None, **{name: value})
    with pytest.raises(InputError, match="setting 'patience' must be at least 0"):
        run("grpo", model, tmp_path, patience=-1)
    with pytest.raises(InputError, match=r"unknown setting 'eval_evry'.*'eval_every'"):
        run("grpo", model, tmp_path, eval_evry=1)
    with pytest.raises(InputError, match="grpo held_out: needs rows of kind prompt"):
        run("grpo", model, tmp_path, held=Table("text", [{"text": "a"}]))
    long = Table("prompt", [{"prompt": "word " * 400}])
    with pytest.raises(InputError, match="grpo held_out: no prompt leaves room"):
        run("grpo", model, tmp_path, held=long, max_length=80)
    wrong = Table("prompt", [{"prompt": "1 + 2", "answer": "three"}])
    with use(Context(folder=tmp_path)), pytest.raises(InputError, match="urpo held_out"):
        methods["urpo"](model, Table("prompt", MIXED), held_out=wrong, steps=1)
    with pytest.raises(InputError, match="a stream has no keep_best"):
        methods["online_stream"](model, PROMPTS, how={"rewards": LETTERS, "keep_best": True})
    assert not list(tmp_path.glob("rollouts-*")) and not list(tmp_path.glob("checkpoints-*"))
    capsys.readouterr()
    both = Table("prompt", [PROMPTS[0], *HELD])
    _, context = run("grpo", model, tmp_path, held=both, steps=1)
    said = capsys.readouterr().err
    assert "grpo held_out: warning: 1 of 6 rows are trained on, too" in said
    assert "held_out_rows: 6" in said and "held-out reward" in said
    assert context.metrics[0]["held_out_rows"] == 6 and context.metrics[0]["rows"] == 8


def test_command_recipe_and_report(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, rows in (("data", PROMPTS), ("held", HELD)):
        lines = [json.dumps({"prompt": r["prompt"]}) for r in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    words = ["train", "rloo", "--model", str(tiny_path), "--data", str(tmp_path / "data.jsonl")]
    words += ["--rewards", json.dumps(LETTERS), "--steps", "2", "--batch", "2", "--answers", "2"]
    words += ["--max-tokens", "4", "--rank", "2", "--eval-every", "1"]
    assert cli.main(words) == 2
    assert "setting 'eval_every' counts for nothing" in capsys.readouterr().err
    held = ["--held-out", str(tmp_path / "held.jsonl"), "--keep-best", "true"]
    assert cli.main([*words, *held, "--json"]) == 0
    assert "the highest" in capsys.readouterr().err
    (tmp_path / "r.yaml").write_text(
        f"name: watched\nmodels: {{base: {tiny_path}}}\nsteps:\n"
        "  held: {do: select/sample, data: data.jsonl, n: 3}\n"
        "  rest: {do: select/sample, data: data.jsonl, n: 3, part: rest}\n"
        "  tuned: {do: train/rloo, model: base, data: rest, held_out: held, steps: 3, rank: 2,\n"
        "    batch: 2, answers: 2, max_tokens: 4, rewards: {brief: {use: max_words, n: 3}},\n"
        "    eval_every: 1}\n"
    )
    result = pipeline.run(
        recipe.load(tmp_path / "r.yaml"), tmp_path / "runs", store=Store(tmp_path / "store")
    )
    lines = (result.folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [r["step"] for r in rows if "held_out/reward" in r] == [0, 1, 2, 3]
    page = (result.folder / "report.html").read_text()
    assert page.count("step 0: held-out reward") >= 1 and "line held" in page
