"""Value models: loss and head by hand, a frozen trunk, values that are no logits."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from truing.context import Context, use
from truing.core.judging.answer_steps import step_values
from truing.core.judging.prm_values import Guide
from truing.core.judging.rewards import Rewards, probabilities
from truing.core.judging.step_rollouts import Ending
from truing.core.passes.scoring import ScoreHead, gives_values, has_head, step_scores
from truing.core.rl.critic import Critic
from truing.core.tiny import tiny_tokenizer
from truing.errors import InputError
from truing.evaluate.easy_to_hard import scores_of
from truing.method import methods, score
from truing.models import Model, hold
from truing.synthesize.weak_continuations import toxicities
from truing.tables import Row, Table
from truing.train.reward.step_value import squared_errors

WORDS = "lime oak rain stone river cloud ash fern".split()
# Values that one token of the step decides, one of them outside of [0, 1].
ROWS: list[Row] = [
    {"prompt": f"say {w}", "steps": [f"{w}!", "well?"][: 1 + i % 2],
     "labels": [1.6, 0.2][: 1 + i % 2]}
    for i, w in enumerate(WORDS)
]  # fmt: skip


def test_loss_by_hand() -> None:
    values = [torch.tensor([0.5, 2.0]), torch.tensor([-1.0])]
    labels = [torch.tensor([1.0, 1.0]), torch.tensor([0.5])]
    assert squared_errors(values, labels).tolist() == pytest.approx([(0.25 + 1.0) / 2, 2.25])


def test_head_by_hand() -> None:
    head, source = ScoreHead(3, 4), np.random.default_rng(0)
    given = {n: source.normal(size=p.shape) for n, p in head.named_parameters()}
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(torch.tensor(given[name]))
    rows = source.normal(size=(5, 3))
    hidden = np.maximum(rows @ given["hidden.weight"].T + given["hidden.bias"], 0)
    want = hidden @ given["weight"][0] + given["bias"][0]
    assert head(torch.tensor(rows)).tolist() == pytest.approx(want.tolist(), rel=1e-5)


@pytest.fixture(scope="module")
def trained(deep_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """The model before and the value model."""
    model, folder = Model.open(deep_path), tmp_path_factory.mktemp("value")
    with use(Context(folder=folder, seed=1)):
        made = methods["step_value"](model, Table("steps", ROWS), epochs=60, lr=1e-2, batch=4)
    assert isinstance(made, Model)
    return model, made


def plain(made: Model, row: Row) -> list[float]:
    """Values by transformers' own hidden states and the head's numbers."""
    tokenizer, loaded = tiny_tokenizer(), made.load_module()
    asked = [{"role": "user", "content": str(row["prompt"])}]
    ids = tokenizer.encode(
        str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)),
        add_special_tokens=False,
    )
    ends: list[int] = []
    for step in row["steps"]:  # type: ignore[attr-defined]
        ids += tokenizer.encode(f"{step}\n\n", add_special_tokens=False)
        ends.append(len(ids) - 1)
    with torch.no_grad():
        states = loaded.module(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
    head = {n.removeprefix("reward_head."): t for n, t in loaded.extra.items()}
    hidden = (states[ends] @ head["hidden.weight"].T + head["hidden.bias"]).clamp(min=0)
    return (hidden @ head["weight"][0] + head["bias"]).tolist()


def test_it_learns_values_beyond_1_and_leaves_the_trunk(trained: tuple[Model, Model]) -> None:
    model, made = trained
    assert gives_values(made) and has_head(made) and not gives_values(model)
    found = step_values(made, ROWS)
    for row, values in zip(ROWS, found, strict=True):
        assert values == pytest.approx(plain(made, row), abs=1e-4)
        assert values == pytest.approx(row["labels"], abs=0.2)
    before, after = model.folded(), made.folded()
    assert all(torch.equal(before[n], after[n]) for n in before)
    new: Row = {"prompt": "say tree", "steps": ["tree!", "well?"]}
    values = step_values(made, [new])[0]
    assert values[0] > 1.2 > 0.6 > values[1]
    ref = {"use": "step_reward", "model": hold(made), "aggregate": "last"}
    asked: list[Row] = [{"prompt": "say tree", "completion": "tree!\n\nwell?"}]
    assert score("reward", ref, asked) == pytest.approx([values[1]], abs=1e-5)


def test_it_is_saved_and_the_same_seed_gives_the_same_bits(
    trained: tuple[Model, Model], tmp_path: Path
) -> None:
    model, made = trained
    again = Model.load(made.save(tmp_path / "saved"))
    assert step_scores(again, ROWS, "\n\n") == step_scores(made, ROWS, "\n\n")
    found: list[Model] = []
    for seed in (7, 7, 8):
        with use(Context(folder=tmp_path / f"{len(found)}", seed=seed)):
            one = methods["step_value"](model, Table("steps", ROWS), epochs=1, lr=1e-3)
        assert isinstance(one, Model)
        found.append(one)
    assert found[0].key == found[1].key != found[2].key


def test_held_out_rows_by_hand(trained: tuple[Model, Model], tmp_path: Path) -> None:
    """The head after the update whose loss on them was lowest; training is what it was without."""
    model, _ = trained
    data, held = Table("steps", ROWS[:5]), Table("steps", ROWS[5:])
    small: dict[str, object] = {"epochs": 6, "lr": 2e-2, "batch": 2}
    made: list[Model] = []
    more: tuple[dict[str, object], ...] = ({}, {"held_out": held}, {"held_out": held})
    for i, one in enumerate(more):
        with use(Context(folder=tmp_path / str(i), seed=1)) as context:
            asked = small | one | ({"eval_every": 2, "keep_best": True} if i == 2 else {})
            found = methods["step_value"](model, data, **asked)
        assert isinstance(found, Model)
        made.append(found)
    assert made[0].key == made[1].key
    rows = [m for m in context.metrics if "held_out/loss" in m]
    seen = {int(str(m["step"])): float(str(m["held_out/loss"])) for m in rows}
    assert list(seen) == [0, 2, 4, 6, 8, 10, 12, 14, 15]
    assert [m["held_out_rows"] for m in context.metrics if "held_out_rows" in m] == [3]
    errors = [
        np.mean((np.array(plain(made[2], row)) - np.array(row["labels"])) ** 2) for row in held
    ]
    assert min(v for s, v in seen.items() if s) == pytest.approx(float(np.mean(errors)), rel=1e-3)
    with pytest.raises(InputError, match="setting 'patience' counts for nothing"):
        methods["step_value"](model, data, patience=1)


def test_a_classifier_goes_through_the_sigmoid(tiny_path: Path, tmp_path: Path) -> None:
    head = ScoreHead(128)
    with torch.no_grad():
        head.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    made = head.added_to(Model.open(tiny_path), tmp_path / "head")
    scores = step_scores(made, ROWS, "\n\n")
    want = [[1 / (1 + math.exp(-s)) for s in row] for row in scores]
    for values, row in zip(step_values(made, ROWS), want, strict=True):
        assert values == pytest.approx(row, rel=1e-6)
    with pytest.raises(InputError, match=r"row 2.*has no steps"):
        step_values(made, [ROWS[0], {"prompt": "p", "steps": []}])
    with torch.no_grad():
        head.bias.fill_(float("nan"))
    made = head.added_to(Model.open(tiny_path), tmp_path / "nan")
    with pytest.raises(InputError, match=r"row 1.*not a finite number"):
        step_values(made, ROWS, where="test")


def test_a_head_of_values_is_not_taken_for_one_of_logits(
    trained: tuple[Model, Model], tmp_path: Path
) -> None:
    _, made = trained
    shares = Table("steps", [r | {"labels": [0.0] * len(r["labels"])} for r in ROWS])  # type: ignore[arg-type]
    with (
        use(Context(folder=tmp_path)),
        pytest.raises(InputError, match="scores are no logits"),
    ):
        methods["process_reward"](made, shares, steps=1)
    with pytest.raises(InputError, match="scores are no logits"):
        Critic.of(made.load_module(), own=True)


def test_faults_are_named(tiny_path: Path) -> None:
    model = Model.open(tiny_path)
    for row, match in (
        ({"labels": [float("nan")]}, r"row 2.*finite number"),
        ({"labels": [1.0, 1.0]}, r"row 2.*one number for each step"),
    ):
        data = Table("steps", [ROWS[0], ROWS[2] | row])
        with pytest.raises(InputError, match=match):
            methods["step_value"](model, data)
    with pytest.raises(InputError, match="can be trained on"):
        methods["step_value"](model, Table("steps", [ROWS[0] | {"steps": [], "labels": []}]))
    with pytest.raises(InputError, match="rows of kind steps"):
        methods["step_value"](model, Table("prompt", [{"prompt": "p"}]))
    with pytest.raises(InputError, match="setting 'lr'"):
        methods["step_value"](model, Table("steps", ROWS), lr=-1.0)


def test_values_are_never_taken_for_logits(trained: tuple[Model, Model], tmp_path: Path) -> None:
    model, made = trained
    rows: list[Row] = [{"prompt": "say oak", "completion": "oak!"}]
    table, told = Table("example", rows), "a head of values|scores the steps of answers"
    refused = pytest.raises(InputError, match=told)
    graded = Table("prompt", [{"prompt": "1 + 1", "answer": 2}])
    guide = Guide({}, {"liked": made}, Rewards({}, {}, None, None), {}, "\n\n", False)
    with use(Context(folder=tmp_path)):
        with refused:
            methods["weak_labels"](made, table)
        with refused:
            toxicities(made, rows)
        with refused:
            Ending(None, None, made, "").check()
        with refused:
            Ending(None, None, made, "")(rows)
        with refused:
            guide.terms(rows)
        with refused:
            scores_of(made, "say oak", ["oak!"], "outcome", [True])
        with refused:
            methods["easy_to_hard"](model, made, graded, by="outcome")
    # A linear head's scores are logits.
    head = ScoreHead(128)
    with torch.no_grad():
        head.bias.fill_(2.0)
    linear = head.added_to(model, tmp_path / "head")
    assert probabilities(linear, rows, "here") == pytest.approx([1 / (1 + math.exp(-2.0))])
