"""The online loop: killed and resumed, rewards, groups left out, bad input, learning."""

from __future__ import annotations

import importlib
import math
import string
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from truing.context import Context, Journal, Json, use
from truing.core.judging.scores import named_scores
from truing.core.modelfiles.lora import attach
from truing.core.online import online_of
from truing.core.rl import collect
from truing.core.rl.advantages import normalised
from truing.core.rl.online_task import OnlineTask
from truing.core.rl.players import Players
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.principles import Principles
from truing.tables import Row, Table
from truing.train.reward.rules import final_number, length_near, numeric_answer, share_of

component_module = importlib.import_module("truing.components")
WORDS = "lime oak rain stone river cloud ash fern".split()
PROMPTS = Table("prompt", [{"prompt": f"say {w}"} for w in WORDS])
LETTERS = {"letters": {"use": "share_of", "letters": "abcdefghijklmnop"}}


@pytest.fixture
def model(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


def run(
    name: str, model: Model, folder: Path, data: Table = PROMPTS, seed: int = 4, **settings: object
) -> tuple[Model, list[dict[str, Json]]]:
    small: dict[str, object] = {
        "steps": 3, "batch": 4, "answers": 3, "max_tokens": 6, "lr": 2e-3, "rewards": LETTERS,
    }  # fmt: skip
    with use(Context(seed=seed, folder=folder)) as context:
        made = methods[name](model, data, **{**small, **settings})
    assert isinstance(made, Model)
    return made, [m for m in context.metrics if "step" in m]


# Resuming

SEVERAL: dict[str, object] = {"passes": 2, "minibatches": 2}


@pytest.mark.parametrize(
    ("name", "more", "puts", "steps"),
    [
        ("ppo", {}, 5, 0),
        ("ppo_max", {"critic_rollouts": 1}, 0, 7),
        ("dapo", {}, 4, 0),
        ("grpo", {"entropy_share": 0.4}, 0, 7),  # by what the policy was before the rollout
        ("remax", {}, 7, 0),  # the greedy answers are there, their rewards are not
        ("remax", {"beta": 0.1}, 0, 7),
    ],
)
def test_stopped_inside_a_rollout_and_resumed(
    name: str,
    more: dict[str, object],
    puts: int,
    steps: int,
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    always_save: Callable[[], None],
) -> None:
    """Between two blocks of answers, and after the third of four updates of one rollout."""
    monkeypatch.setattr(collect, "BLOCK", 6)
    always_save()
    settings = SEVERAL | more
    expected, whole = run(name, model, tmp_path / "whole", **settings)
    seen = {"puts": 0, "steps": 0}
    put, after_step = Journal.put, OnlineTask.after_step

    def dying_put(journal: Journal, key: str, value: Json) -> None:
        put(journal, key, value)
        seen["puts"] += 1
        if seen["puts"] == puts:
            raise KeyboardInterrupt

    def dying_step(task: OnlineTask, step: int) -> None:
        seen["steps"] += 1
        if seen["steps"] == steps:
            raise KeyboardInterrupt  # the update is lost, the checkpoint before it is there
        after_step(task, step)

    monkeypatch.setattr(Journal, "put", dying_put)
    monkeypatch.setattr(OnlineTask, "after_step", dying_step)
    with pytest.raises(KeyboardInterrupt):
        run(name, model, tmp_path / "cut", **settings)
    monkeypatch.setattr(Journal, "put", put)
    monkeypatch.setattr(OnlineTask, "after_step", after_step)
    again, rest = run(name, model, tmp_path / "cut", **settings)
    assert again.key == expected.key
    timeless = [{n: v for n, v in m.items() if n != "seconds"} for m in whole]
    assert [{n: v for n, v in m.items() if n != "seconds"} for m in rest] == timeless


def test_rollouts_that_no_checkpoint_goes_on_with_are_deleted(
    model: Model, tmp_path: Path, always_save: Callable[[], None]
) -> None:
    """Before the last is drawn there are checkpoints of its beginning and the update before."""
    plain, _ = run("grpo", model, tmp_path / "plain", steps=4, passes=2)
    always_save()
    made, _ = run("grpo", model, tmp_path / "saved", steps=4, passes=2)
    left = [sorted((tmp_path / n).glob("rollouts-*/*")) for n in ("plain", "saved")]
    assert [[int(p.stem) for p in paths] for paths in left] == [[0, 1, 2, 3], [2, 3]]
    assert made.key == plain.key


# What is sampled, measured and left out


def test_sampled_log_probabilities_are_those_of_training(model: Model, tmp_path: Path) -> None:
    """With several passes the first update's ratio is 1 up to rounding: loss -mean(A) = 0."""
    _, steps = run("grpo", model, tmp_path, passes=2, steps=2)
    first, second = steps[2:]
    assert abs(float(str(first["loss"]))) < 1e-5 and first["clip_fraction"] == 0.0
    assert float(str(second["clip_fraction"])) > 0 and float(str(second["loss"])) < -1e-3
    assert "reward" in first and "reward" not in second  # one rollout, two updates


def test_equal_rewards_teach_nothing_and_are_counted(model: Model, tmp_path: Path) -> None:
    rewards = {"any": {"use": "max_words", "n": 1000}}
    made, steps = run("grpo", model, tmp_path, rewards=rewards)
    assert [(m["skipped"], m["grad_norm"]) for m in steps] == [(1.0, 0.0)] * 3
    adapter = made.folded()["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(adapter, model.folded()["model.layers.0.mlp.down_proj.weight"])
    # Dynamic sampling asks further prompts, in vain, and says so.
    _, empty = run("dapo", model, tmp_path / "dapo", rewards=rewards, refill=2, punish=0.0)
    assert [m["left_out"] for m in empty] == [1.0] * 3


def test_skipping_changes_nothing(model: Model, tmp_path: Path) -> None:
    """Groups without advantages count in the denominators: KL weight 1e-12 computes them all."""
    few: dict[str, object] = {"steps": 1, "answers": 2, "max_tokens": 10, "batch": 8}
    _, skipped = run("grpo", model, tmp_path / "a", **few)
    _, computed = run("grpo", model, tmp_path / "b", beta=1e-12, **few)
    assert 0 < float(str(skipped[0]["skipped"])) < 1 and computed[0]["skipped"] == 0.0
    assert computed[0]["grad_norm"] == pytest.approx(skipped[0]["grad_norm"], rel=1e-4)


def test_refilled_groups_all_teach(model: Model, tmp_path: Path) -> None:
    rewards = {"rare": {"use": "share_of", "letters": "abcd"}}
    _, steps = run("dapo", model, tmp_path, rewards=rewards, answers=2, refill=6, punish=0.0)
    assert all(m["flat"] == 0.0 for m in steps)
    assert any("left_out" in m for m in steps)


def test_what_teaches_is_what_the_method_says(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two terms that cancel in every sum: GRPO learns nothing from them, GDPO from each of them."""
    kept: list[int] = []
    groups_of = OnlineTask._groups

    def counted(task: OnlineTask, number: int) -> object:
        groups, counts = groups_of(task, number)
        kept.append(len(groups))
        assert all(max(g.reward) - min(g.reward) < 1e-12 for g in groups)
        return groups, counts

    def half(rows: list[Row]) -> list[float]:
        return [v / 2 for v in share_of(rows, letters="abcdefghijklm")]

    monkeypatch.setattr(OnlineTask, "_groups", counted)
    rewards = {"low": {"use": "share_of", "letters": "abcdefghijklm"}, "half": half}
    small: dict[str, object] = {
        "steps": 1, "batch": 4, "answers": 3, "max_tokens": 6, "rewards": rewards, "refill": 1,
        "weights": {"half": -2.0},
    }  # fmt: skip
    for name in ("gdpo", "grpo"):
        with use(Context(seed=4)) as context:  # without a folder, where functions are taken
            methods[name](model, PROMPTS, **small)
    first = next(m for m in context.metrics if "step" in m)
    assert first["left_out"] == 1.0
    # A group whose answers have one share of the letters each teaches nobody.
    assert kept[0] >= 3 and kept[1] == 0
    # Answers of other lengths are punished otherwise, though their rewards are the same.
    equal: dict[str, object] = {"rewards": {"any": {"use": "max_words", "n": 1000}}, "steps": 1}
    long = {**equal, "refill": 1, "max_tokens": 24, "buffer": 24, "answers": 8}
    run("dapo", model, tmp_path / "dapo", punish=1.0, **long)
    _, (step,) = run("dapo", model, tmp_path / "plain", punish=0.0, **long)
    assert kept[2] > 0 and kept[3] == 0 and step["left_out"] == 1.0


def test_groups_that_teach_nothing_stay_at_zero_when_the_batch_is_normalised() -> None:
    """The mean of centred groups is 0 but for rounding, which no advantage may be made of."""
    value = torch.tensor([[0.1, 0.2, -0.3], [0.0, 0.0, 0.0], [0.7, -0.7, 1e-6]])
    made = normalised(value, torch.ones(3, 3))
    want = (value - value.mean()) / (value.std() + 1e-4)
    assert made[1].tolist() == [0.0] * 3 != want[1].tolist()
    assert torch.allclose(made, want, atol=1e-5)


def test_prompts_without_room_are_left_out(model: Model, tmp_path: Path) -> None:
    rows = [*PROMPTS.rows, {"prompt": "word " * 40}]
    with use(Context(folder=tmp_path)) as context:
        methods["grpo"](
            model, Table("prompt", rows), rewards=LETTERS, steps=1, batch=2, answers=2,
            max_tokens=4, max_length=80,
        )  # fmt: skip
    assert context.metrics[0]["rows"] == 8 and context.metrics[0]["left_out_long"] == 1
    with use(Context(folder=tmp_path / "b")), pytest.raises(InputError, match="leaves room"):
        methods["grpo"](model, PROMPTS, rewards=LETTERS, max_tokens=70, max_length=80)


def test_answers_without_end_cost_what_was_said(model: Model, tmp_path: Path) -> None:
    _, plain = run("rloo", model, tmp_path / "a", steps=1)
    _, costly = run("rloo", model, tmp_path / "b", steps=1, missing_end=2.0)
    share = 1 - float(str(plain[0]["finished"]))
    assert 0 < share
    lost = float(str(plain[0]["reward"])) - float(str(costly[0]["reward"]))
    assert lost == pytest.approx(2.0 * share, abs=1e-5)
    assert costly[0]["reward/letters"] == plain[0]["reward/letters"]


def test_principles_and_weights(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("principles:\n- {id: short, text: Be short., check: {use: max_words, n: 40}}\n")
    principles = Principles.read(path)
    with use(Context(folder=tmp_path / "run", seed=1)) as context:
        methods["grpo"](
            model, PROMPTS, principles=principles, rewards=LETTERS, weights={"letters": -0.5},
            steps=1, batch=3, answers=2, max_tokens=4,
        )  # fmt: skip
    step = context.metrics[-1]
    whole = float(str(step["reward/principles"])) - 0.5 * float(str(step["reward/letters"]))
    assert step["reward"] == pytest.approx(whole, abs=1e-6)


# Mistakes


class Fake:
    def __init__(self, value: object) -> None:
        self.value = value

    def __call__(self, rows: object) -> object:
        return self.value


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([1.0], "one score a row"),
        ("no", "one score a row"),
        ([1.0, math.nan], "not a finite number"),
        ([1.0, "x"], "not a finite number"),
        ([{"a": 1.0}, {"b": 1.0}], "same values for every row"),
        ([{"a": 1.0}, {"a": math.inf}], "not a finite number"),
    ],
)
def test_rewards_that_are_wrong(value: object, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(component_module, "get_component", lambda *a, **k: Fake(value))
    with pytest.raises(InputError, match=told):
        named_scores("r", {"use": "share_of"}, [{}, {}], where="grpo")


def test_named_values_of_one_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [{"a": 1.0, "b": 2}, {"a": 0.0, "b": 5}]
    monkeypatch.setattr(component_module, "get_component", lambda *a, **k: Fake(made))
    found = named_scores("r", {"use": "share_of"}, [{}, {}])
    assert found == {"r/a": [1.0, 0.0], "r/b": [2.0, 5.0]}


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("grpo", {"answers": 1}, "'answers' must be at least 2"),
        ("grpo", {"rewards": None}, "nothing to reward answers by"),
        ("grpo", {"rewards": {"x": {"use": "no_such"}}}, "unknown"),
        ("grpo", {"weights": {"other": 1.0}}, "unknown term"),
        ("grpo", {"minibatches": 9}, "more minibatches than prompts"),
        ("grpo", {"max_tokens": 0}, "must be at least 1"),
        ("grpo", {"temperature": 0.0}, "temperature must be above 0"),
        ("grpo", {"bta": 0.1}, "unknown setting 'bta'.*'beta'"),
        ("nash_md", {"mixture_coef": 1.5}, "setting 'mixture_coef' must be from 0 to 1"),
        ("grpo", {"entropy_share": 0.0}, "setting 'entropy_share' must be in .0, 1."),
        ("dapo", {"entropy_share": 1.2}, "setting 'entropy_share' must be in .0, 1."),
        ("ppo", {"refill": 2, "answers": 1}, "teach here too"),
        ("grao", {}, "needs rows of kind example"),
    ],
)
def test_mistakes_before_anything_runs(
    name: str, settings: dict[str, object], told: str, model: Model, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=told):
        run(name, model, tmp_path, **settings)
    assert not list(tmp_path.glob("rollouts-*"))


# Rewards by rule


def test_rules() -> None:
    rows = [{"completion": t, "answer": "#### 1,200"} for t in ("so 1200.0", "12", "none", "")]
    assert numeric_answer(rows) == [1.0, 0.0, 0.0, 0.0]
    assert numeric_answer([{"completion": "1190", "answer": "1200"}], tolerance=0.01) == [1.0]
    assert final_number(r"first 3, then \boxed{-7}, not 9") == -7
    assert final_number("it costs $1,024.50") is not None
    texts = ("a b", "a b c d", "", "a b c d e f g h i")
    assert length_near([{"completion": t} for t in texts], n=4) == [0.5, 1.0, 0.0, 0.0]
    assert share_of([{"completion": "Yes no yes"}], words_from=["yes"]) == pytest.approx([2 / 3])
    assert share_of([{"completion": "abz "}, {"completion": ""}], letters="ab") == [
        pytest.approx(2 / 3), 0.0,
    ]  # fmt: skip
    with pytest.raises(InputError, match="holds no number"):
        numeric_answer([{"completion": "1"}])
    with pytest.raises(InputError, match="either"):
        share_of([{"completion": "1"}])


# Critic, opponents, learning


def test_the_critic_comes_back_and_goes_on(model: Model, tmp_path: Path) -> None:
    made, _ = run("ppo", model, tmp_path / "a", passes=1, steps=6, lr=2e-2, vf=1.0)
    head = made.load_module().extra
    assert set(head) == {"value_head.weight", "value_head.bias"} and head["value_head.weight"].any()
    saved = Model.load(made.save(tmp_path / "saved"))
    _, steps = run("ppo", saved, tmp_path / "b", passes=1, steps=1)
    assert abs(float(str(steps[0]["explained"]))) > 1e-4  # a new head explains nothing at all


def test_head_alone_leaves_the_policy_as_it_is(model: Model, tmp_path: Path) -> None:
    made, steps = run("ppo", model, tmp_path, critic_rollouts=3, passes=1)
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(made.folded()[name], model.folded()[name])
    assert made.load_module().extra["value_head.bias"].abs() > 0
    assert float(str(steps[0]["grad_norm"])) > 0


def test_full_fine_tune_and_its_reference(model: Model, tmp_path: Path) -> None:
    made, steps = run("grpo", model, tmp_path, rank=0, beta=0.1, lr=1e-3)
    assert [c.kind for c in made.changes] == ["weights"]
    assert float(str(steps[0]["kl"])) == pytest.approx(0.0, abs=1e-6)
    assert float(str(steps[2]["kl"])) > 1e-5


def test_the_reference_answers_as_the_model_did(model: Model) -> None:
    """With adapters that do something, an opponent's answers are those of the model without."""
    from truing.core.drawing import continued
    from truing.core.sampling import SamplingSettings

    loaded = model.load_module(fresh=True)
    prompts, sampling = [[70, 80, 90], [70, 81]], SamplingSettings(n=2, max_tokens=8)
    before = continued(loaded, prompts, sampling)
    lora = attach(loaded.module, 4, 8.0)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.add_(0.3)
    players = Players(loaded, lora, None)
    assert players.reference(prompts, sampling, [0, 0]) == before
    assert players.policy(prompts, sampling, [0, 0]) != before
    assert players.mixture(1.0)(prompts, sampling, [0, 0])[0][0].ids == before[0][0].ids


@pytest.mark.parametrize(("name", "least"), [("grpo", 0.5), ("ppo_max", 0.5), ("remax", 0.25)])
def test_it_learns(name: str, least: float, model: Model, tmp_path: Path) -> None:
    """The share of eight letters in random text is a thirtieth; it becomes most of it.

    A quarter of it where advantages are neither scaled nor those of a whole group.
    """
    settings: dict[str, object] = {
        "steps": 14, "answers": 8, "max_tokens": 12, "lr": 4e-3, "minibatches": 1,
        "rewards": {"letters": {"use": "share_of", "letters": "abcdefgh"}},
    }  # fmt: skip
    more = {"critic_rollouts": 1, "temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0}
    _, steps = run(name, model, tmp_path, **settings, **(more if name == "ppo_max" else {}))
    rewards = [float(str(m["reward"])) for m in steps]
    assert sum(rewards[:3]) / 3 < 0.15 and sum(rewards[-3:]) / 3 > least
    assert all(m["empty"] is not None and float(str(m["length"])) > 6 for m in steps)


ONLINE = {n: online_of(methods[n].declared) for n in methods if methods[n].entry.kind == "online"}
# What a method shapes rewards or sampling by is off, where it has it.
PLAIN: dict[str, object] = {
    "bonus": 0.0, "punish": 0.0, "missing_end": 0.0, "critic_rollouts": 0, "passes": 1,
    "minibatches": 1, "refill": 0, "temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n, spec in ONLINE.items() if not spec.pools])
def test_every_method_that_takes_rewards_learns(name: str, model: Model, tmp_path: Path) -> None:
    """Three in eight characters of random text can be printed: after two updates more of them.

    With advantages of the other sign there are fewer, a third at most. Here all weights are
    trained, and rewards are large enough for methods that ask for a probability of winning.
    """
    rows = [{"prompt": f"say {w}", "completion": f"a bad {w}"} for w in WORDS]
    settings: dict[str, object] = {
        "steps": 4, "answers": 12, "max_tokens": 4, "rank": 0, "lr": 6e-3,
        "rewards": {"printed": {"use": "share_of", "letters": string.printable}},
        "weights": {"printed": 4.0},
    }  # fmt: skip
    plain = {n: v for n, v in PLAIN.items() if n in methods[name].settings}
    _, steps = run(name, model, tmp_path, Table(ONLINE[name].rows, rows), **settings, **plain)
    printed = [float(str(m["reward/printed"])) for m in steps]
    assert len(printed) == 4 and printed[0] < 0.45 < sum(printed[2:]) / 2
