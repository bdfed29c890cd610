"""Problems, labels and rewards of easy-to-hard by hand; every piece runs on the tiny model."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest
import torch

from truing.context import Context, use
from truing.core.drawing import Completion
from truing.core.identity import code
from truing.core.online import online_of
from truing.core.passes.scoring import ScoreHead
from truing.core.trainer.preflight import online_training
from truing.errors import InputError
from truing.keys import step_key
from truing.method import get_component, methods
from truing.models import Model, hold
from truing.reports import Report
from truing.synthesize import outcome_labels as labelling
from truing.tables import Row, Table
from truing.train.reward.rules import unformatted
from truing.train.rl.salmon_ppo import salmon_ppo


def headed(tiny_path: Path, folder: Path, bias: float) -> Model:
    """The tiny model with a head that says sigmoid(bias) of every token."""
    head = ScoreHead(128)
    with torch.no_grad():
        head.bias.fill_(bias)
    return head.added_to(Model.open(tiny_path), folder)


@pytest.mark.parametrize(
    ("text", "penalty"),
    [
        ("1 + 1 = \\boxed{2}\n\n# Answer\n\n2", 0.0),
        ("so \\boxed{2}\n\nthat is it\n\n# Answer\n\n2", 0.0),  # anywhere in the solution
        ("first\n\nit is $2$\n\n# Answer\n\n2", 0.5),
        ("first\n\nit is $2.$\n\n# Answer\n\n2", 0.5),
        ("it is $2$\n\nindeed\n\n# Answer\n\n2", 1.0),  # not in the last paragraph
        ("first\n\nit is 2\n\n# Answer\n\n2", 0.75),
        ("it is \\boxed{3}\n\n# Answer\n\n2", 1.0),
        ("it is \\boxed{2}", 1.0),  # no marker
        ("it is \\boxed{2}\n\n# Answer\n\n", 1.0),  # no answer
        ("it is \\boxed{2}\n\n# Answer\n2", 1.0),  # the marker has a blank line on both sides
        ("\\boxed{2}\n\n# Answer\n\n2\n\nand more", 1.0),  # all that follows is the answer
        ("", 1.0),
    ],
)
def test_format_penalty_table(text: str, penalty: float) -> None:
    assert unformatted(text) == penalty
    assert get_component("reward", "format_penalty")([{"completion": text}]) == [-penalty]


def test_another_marker() -> None:
    ref = {"use": "format_penalty", "marker": " = "}
    assert get_component("reward", ref)([{"completion": "$4$ = 4"}]) == [-0.5]
    with pytest.raises(InputError, match="must not be empty"):
        get_component("reward", ref | {"marker": ""})([{"completion": "x"}])


def test_outcomes_of_easy_problems_alone_are_graded() -> None:
    rows: list[Row] = [
        {"completion": "a\n\n# Answer\n\n1/2", "answer": "0.5"},
        {"completion": "so 3", "answer": 4},
        {"completion": "so 3"},
    ]
    assert get_component("reward", "easy_outcome")(rows) == [1.0, 0.0, 0.25]
    other = {"use": "easy_outcome", "unknown": 0.0, "column": "gold"}
    assert get_component("reward", other)(rows) == [0.0, 0.0, 0.0]


def test_an_empty_answer_is_not_known_and_none_is_not_right() -> None:
    rows: list[Row] = [
        {"completion": "I do not know", "answer": ""},  # as a CSV gives for a hard problem
        {"completion": "so 3", "answer": " "},
        {"completion": "so nan", "answer": math.nan},  # as pandas does
        {"completion": "I do not know", "answer": "?"},  # of which nothing is left to compare
        {"completion": "so 0", "answer": 0},
    ]
    assert get_component("reward", "easy_outcome")(rows) == [0.25, 0.25, 0.25, 0.0, 1.0]


def test_the_sum_of_step_rewards(tiny_path: Path, tmp_path: Path) -> None:
    rows: list[Row] = [
        {"prompt": "p", "completion": "a\n\nb\n\nc"},
        {"prompt": "p", "completion": "a"},
        {"prompt": "p", "completion": " "},
    ]
    for place, bias in enumerate((-1.0, 2.0)):
        p = 1 / (1 + math.exp(-bias))
        model = hold(headed(tiny_path, tmp_path / str(place), bias))
        ref: dict[str, object] = {"use": "process_shaping", "model": model}
        low = get_component("reward", ref)(rows)
        assert low == pytest.approx([min(p, 0.5) - 0.5 + 0.25] * 2 + [-0.5], rel=1e-6)
        products = get_component("reward", ref | {"scheme": "prod", "bound": 0.9, "bonus": 0.0})
        want = [min(p**3, 0.9) - 0.9, min(p, 0.9) - 0.9, -0.9]
        assert products(rows) == pytest.approx(want, rel=1e-6)
    table = hold(Table("prompt", [{"prompt": "p"}]))
    with pytest.raises(InputError, match="is not a model"):
        get_component("reward", {"use": "process_shaping", "model": table})(rows)


def test_arithmetic_is_right_and_graded() -> None:
    made = methods["graded_arithmetic"](n=30, levels=[2, 5], largest=12)
    assert isinstance(made, Table) and made.kind == "example" and len(made) == 30
    assert [r["level"] for r in made] == ["2", "5"] * 15
    assert len({str(r["prompt"]) for r in made}) == 30
    for row in made:
        asked = re.fullmatch(r"Work out ([\d +-]+) step by step\.", str(row["prompt"]))
        assert asked and re.fullmatch(r"\d+( [+-] \d+)+", asked[1])
        first, *rest = asked[1].split()
        value, lines = int(first), list[str]()
        for sign, number in zip(rest[::2], rest[1::2]):
            before = value
            value += int(number) * (1 if sign == "+" else -1)
            lines.append(f"{before} {sign} {number} = {value}")
            assert value >= 0 and 1 <= int(number) <= 12
        lines[-1] = lines[-1].rpartition(" ")[0] + f" \\boxed{{{value}}}"
        assert row["answer"] == str(value) and len(lines) == int(str(row["level"]))
        assert str(row["completion"]).split("\n\n") == [*lines, "# Answer", str(value)]
        assert unformatted(str(row["completion"])) == 0
    again = methods["graded_arithmetic"](n=30, levels=[2, 5], largest=12)
    assert isinstance(again, Table) and again.key == made.key
    for tell, told in (("answer", {"answer"}), ("nothing", set[str]())):
        alone = methods["graded_arithmetic"](n=30, levels=[2, 5], largest=12, tell=tell)
        assert isinstance(alone, Table) and alone.kind == "prompt"
        assert [r["prompt"] for r in alone] == [r["prompt"] for r in made]
        assert {"answer", "completion"} & set(alone.columns) == told


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"levels": []}, "setting 'levels'"),
        ({"levels": [0, 1]}, "setting 'levels'"),
        ({"largest": 0}, "setting 'largest'"),
        ({"n": 0}, "setting 'n'"),
        ({"n": 50, "levels": [1], "largest": 2}, "setting 'n'"),
    ],
)
def test_problems_that_there_are_not(settings: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        methods["graded_arithmetic"](**settings)


def test_outcomes_are_labels(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["s\n\n# Answer\n\n4", "t\n\nso 5.0", " ", "no idea"]
    made_of: list[object] = []

    def generate(model: object, prompts: Sequence[object], **how: object) -> list[list[Completion]]:
        made_of.append(how["n"])
        return [[Completion(t, finish="length") for t in texts] for _ in prompts]

    monkeypatch.setattr(labelling, "generate", generate)
    model = Model.open(tiny_path)
    data = Table("prompt", [{"prompt": "2 + 2", "answer": 4, "level": "1"},
                            {"prompt": "2 + 3", "answers": ["five", "5"]}])  # fmt: skip
    given = Table("steps", [{"prompt": "1 + 1", "steps": ["a", "b"], "labels": [1.0, 0.25]}])
    with use(Context(folder=tmp_path)) as context:
        whole = methods["outcome_labels"](model, data, n=4)
        mixed = methods["outcome_labels"](model, data, given, n=4)
    assert isinstance(whole, Table) and isinstance(mixed, Table) and made_of == [4, 4]
    assert (whole.kind, mixed.kind) == ("unpaired", "steps")
    labels = [True, False, False, False, True, False]
    assert [r["label"] for r in whole] == labels and whole[0]["finished"] is False
    assert [r.get("level") for r in whole] == ["1"] * 3 + [None] * 3
    assert mixed[0]["labels"] == [1.0, 0.25] and len(mixed) == 7
    assert [r["steps"] for r in mixed.rows[1:4]] == [
        ["s", "# Answer", "4"], ["t", "so 5.0"], ["no idea"],
    ]  # fmt: skip
    for row, label in zip(mixed.rows[1:], labels, strict=True):
        assert row["labels"] == [float(label)] * len(row["steps"])  # type: ignore[arg-type]
    assert {"solutions": 6, "right": 2} in context.metrics
    monkeypatch.setattr(labelling, "generate", lambda m, p, **_: [[Completion("")] for _ in p])
    with pytest.raises(InputError, match="no solution has a step"):
        methods["outcome_labels"](model, data)
    with pytest.raises(InputError, match="row 1"):
        methods["outcome_labels"](model, Table("prompt", [{"prompt": "p"}]))


def test_problems_as_messages_and_answers_that_are_articles(
    tmp_path: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def generate(model: object, prompts: Sequence[object], **how: object) -> list[list[Completion]]:
        asked.extend(prompts)
        return [[Completion("so\n\n#### A"), Completion("so\n\n#### B")] for _ in prompts]

    monkeypatch.setattr(labelling, "generate", generate)
    talk = [{"role": "user", "content": "A or B?"}]
    data = Table("prompt", [{"messages": talk, "answer": "A"}])
    with use(Context(folder=tmp_path)):
        made = methods["outcome_labels"](Model.open(tiny_path), data, n=2)
    assert isinstance(made, Table) and asked == [talk]
    assert [(r["prompt"], r["label"]) for r in made] == [(talk, True), (talk, False)]
    nothing = Table("prompt", [{"prompt": "p", "answer": "?"}])  # no answer could equal it
    with pytest.raises(InputError, match="row 1"):
        methods["outcome_labels"](Model.open(tiny_path), nothing)


def test_from_problems_to_three_evaluators(tiny_path: Path, tmp_path: Path) -> None:
    model = Model.open(tiny_path)
    prm, orm, oprm = (
        headed(tiny_path, tmp_path / name, bias)
        for name, bias in (("prm", 1.0), ("orm", -1.0), ("oprm", 0.0))
    )
    with use(Context(folder=tmp_path / "run")):
        data = methods["graded_arithmetic"](n=4, levels=[1, 4])
        assert isinstance(data, Table)
        labels = methods["outcome_labels"](model, data, n=2, max_tokens=12)
        assert isinstance(labels, Table) and labels.kind == "unpaired"
        made = methods["easy_to_hard"](model, prm, data, orm, oprm, n=3, max_tokens=12)
    assert isinstance(made, Report) and made.samples is not None
    names = {m.name for m in made}
    assert names == {
        "single", "majority", "best of n", "weighted voting", "best of n, ORM",
        "weighted voting, ORM", "best of n, OPRM", "weighted voting, OPRM",
    }  # fmt: skip
    for row in made.samples:
        for column, bias in (("scores", 1.0), ("scores, ORM", -1.0), ("scores, OPRM", 0.0)):
            p = 1 / (1 + math.exp(-bias))
            some = [s for s in row[column] if s]  # type: ignore[attr-defined]
            assert some == pytest.approx([p] * len(some), rel=1e-5)
    with pytest.raises(InputError, match="outcome_process_reward"):
        methods["easy_to_hard"](model, prm, data, None, model)


def test_hard_problems_are_reinforced_without_answers(tiny_path: Path, tmp_path: Path) -> None:
    model, prm = Model.open(tiny_path), headed(tiny_path, tmp_path / "prm", -1.0)
    with use(Context(folder=tmp_path / "run")) as context:
        data = methods["graded_arithmetic"](n=4, levels=[4], tell="nothing")
        settings: dict[str, object] = {
            "steps": 2, "batch": 2, "minibatches": 1, "answers": 2, "max_tokens": 8, "rank": 2,
            "critic_rollouts": 1, "penalty": 0.5,
        }  # fmt: skip
        known = methods["graded_arithmetic"](n=3, levels=[1])
        made = methods["easy_to_hard_ppo"](
            model, data, prm, held_out=known, eval_every=1, keep_best=True, **settings
        )
    assert isinstance(made, Model) and made.name.endswith("+easy_to_hard_ppo")
    told = [m for m in context.metrics if "reward" in m]
    # Each solution has the layout of none: sigmoid(-1) - 0.5 + 0.25 for its steps, 0.25 unknown.
    shaped = 1 / (1 + math.exp(1.0)) - 0.5 + 0.25
    assert told and all(
        float(str(m["reward"])) == pytest.approx(shaped + 0.25 - 0.5, abs=1e-4) for m in told
    )
    # Held-out ones bring their answers, which the tiny model does not hit: 0 in place of 0.25.
    seen = {m["step"]: m for m in context.metrics if "held_out/reward" in m}
    assert seen.keys() == {0, 1, 2}
    for m in seen.values():
        assert m["held_out/reward/outcome"] == 0.0
        assert float(str(m["held_out/reward"])) == pytest.approx(shaped - 0.5, abs=1e-4)
    with pytest.raises(InputError, match="no score head"):
        methods["easy_to_hard_ppo"](model, data, model, **settings)
    with pytest.raises(InputError, match="setting 'keep_best' counts for nothing"):
        methods["easy_to_hard_ppo"](model, data, prm, keep_best=True, **settings)


@pytest.mark.parametrize("trained", [{"rank": 0}, {"rank": 0, "layers": 1}])
def test_all_weights_or_the_top_blocks_are_reinforced(
    trained: dict[str, object], tiny_path: Path, tmp_path: Path
) -> None:
    model, prm = Model.open(tiny_path), headed(tiny_path, tmp_path / "prm", -1.0)
    how: dict[str, object] = {"steps": 1, "batch": 2, "minibatches": 1, "answers": 2}
    how |= {"max_tokens": 6, "critic_rollouts": 0, "lr": 1e-2, **trained}
    with use(Context(folder=tmp_path / "run")):
        data = methods["graded_arithmetic"](n=2, levels=[4], tell="nothing")
        made = methods["easy_to_hard_ppo"](model, data, prm, **how)
    assert isinstance(made, Model)
    before, after = model.folded(), made.folded()
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    top = {n for n in before if n.startswith("model.layers.2.")}
    assert moved and moved <= top if "layers" in trained else moved == set(before)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"layers": -1}, "setting 'layers' must be at least 0"),
        ({"beta": -1.0}, "setting 'beta' must be at least 0"),
        ({"batch": 4}, "more minibatches than prompts"),
        ({"answers": 0}, "setting 'answers' must be at least 1"),
        ({"max_tokens": 100000}, "max_tokens leaves no room"),
        ({"lr": -1.0}, "setting 'lr' must be at least 0"),
    ],
)
def test_what_ppo_would_refuse_is_refused_before_any_step(
    given: dict[str, object], said: str
) -> None:
    method = methods["easy_to_hard_ppo"]
    data = {"data": Table("prompt", [{"prompt": "1 + 1"}])}
    method.check(method.validate({"batch": 8}), data)
    with pytest.raises(InputError, match=said) as error:
        method.check(method.validate(given), data)
    assert error.value.where in ("", "train/easy_to_hard_ppo")


def test_adam_is_the_papers(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its beta2 0.95 and epsilon 1e-5 the engine has settings, which are no others here."""
    seen: list[dict[str, object]] = []

    def stopped(*given: object) -> Model:
        seen.append(cast("dict[str, object]", given[-1]))
        return Model.open(tiny_path)

    module = importlib.import_module("truing.train.rl.easy_to_hard_ppo")
    monkeypatch.setattr(module, "train_online", stopped)
    prm = headed(tiny_path, tmp_path / "prm", 0.0)
    data = Table("prompt", [{"prompt": "1 + 1"}])
    methods["easy_to_hard_ppo"](Model.open(tiny_path), data, prm)
    (values,) = seen
    found = online_training(online_of(salmon_ppo), values)
    assert (found.adam_beta2, found.adam_epsilon) == (0.95, 1e-5)


def test_the_code_of_all_rewards_is_in_a_steps_key(monkeypatch: pytest.MonkeyPatch) -> None:
    method = methods["easy_to_hard_ppo"]
    settings = method.validate({})
    before, read = step_key(method, {}, settings, 0), code._read
    keys = {before}
    for name in ("rules", "easy_to_hard"):
        edited = f"truing.train.reward.{name}"

        def other(module: str, edited: str = edited) -> tuple[str, frozenset[str]] | None:
            found = read(module)
            return ("edited", found[1]) if found and module == edited else found

        monkeypatch.setattr(code, "_read", other)
        keys.add(step_key(method, {}, settings, 0))
    assert len(keys) == 3
