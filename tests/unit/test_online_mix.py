"""Losses on given rows beside an online method's: by plain torch, order, resuming, refusals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from truing.context import Context, Json, use
from truing.core.online_training import OnlineTraining
from truing.core.rl.online_mix import Added, added, read_added
from truing.core.rl.online_task import OnlineTask
from truing.core.tiny import tiny_model, tiny_tokenizer
from truing.core.trainer.start import begin
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.tables import Row, Table

HEAD = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
TOKENIZER = tiny_tokenizer()
PROMPTS = Table("prompt", [{"prompt": f"say {w}"} for w in ("lime", "oak", "rain", "ash")])
EXAMPLES = Table(
    "example",
    [
        {"prompt": f"where is {w}", "completion": f"in the {w} town"}
        for w in ("rome", "oslo", "bern")
    ],
)
PAIRS = Table(
    "pair",
    [
        {"prompt": f"where is {w}", "chosen": f"in {w}", "rejected": f"not {'so ' * i}far"}
        for i, w in enumerate(("rome", "oslo", "bern"))
    ],
)
TEXTS = Table("text", [{"text": t} for t in ("a river runs", "stones are old", "it rained")])
LETTERS = {"letters": {"use": "share_of", "letters": "abcdefghijklmnop"}}
EQUAL = {"any": {"use": "max_words", "n": 1000}}
SMALL: dict[str, object] = {
    "steps": 3, "batch": 4, "minibatches": 2, "answers": 2, "max_tokens": 5, "lr": 2e-3,
    "rewards": LETTERS,
}  # fmt: skip


@pytest.fixture
def model(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


def run(
    name: str,
    model: Model,
    folder: Path,
    rows: Table | None,
    data: Table = PROMPTS,
    **more: object,
) -> tuple[Model, list[dict[str, Json]]]:
    inputs: dict[str, object] = {} if rows is None else {"mix_data": rows}
    with use(Context(seed=4, folder=folder)) as context:
        made = methods[name](model, data, **inputs, **{**SMALL, **more})
    assert isinstance(made, Model)
    return made, [m for m in context.metrics if "step" in m]


def begun(
    model: Model, mix: dict[str, object], rows: Table, updates: int = 4, **more: object
) -> tuple[Added, nn.Module]:
    """The losses as a run has them before its first update, and the module that they train."""
    with use(Context(seed=1)):
        settings = OnlineTraining(rank=0, dtype="float32", **more)  # type: ignore[arg-type]
        start = begin(model, settings, "grpo", key="k")
        found = read_added(mix, rows, True, settings, start)
        assert found is not None
        found.begin(start, updates)
    return found, start.loaded.module


def tokens(head: str, tail: str) -> tuple[list[int], int]:
    """Ids of a row, and where its loss begins."""
    before = TOKENIZER(head, add_special_tokens=False)["input_ids"] if head else [0]
    return TOKENIZER(f"{head}{tail}<|im_end|>", add_special_tokens=False)["input_ids"], len(before)


def logp(module: nn.Module, row: tuple[list[int], int]) -> Tensor:
    """Summed log p of the tokens with loss, by transformers alone, with gradients."""
    ids, start = row
    all_TV = module(torch.tensor([ids])).logits[0].log_softmax(-1)
    return torch.stack([all_TV[i - 1, ids[i]] for i in range(start, len(ids))]).sum()


def rows_of(table: Table, numbers: Sequence[int], column: str) -> list[tuple[list[int], int]]:
    some: list[Row] = [table.rows[i] for i in numbers]
    heads = [HEAD.format(r["prompt"]) if "prompt" in r else "" for r in some]
    return [tokens(head, str(r[column])) for head, r in zip(heads, some, strict=True)]


def nll(module: nn.Module, rows: Sequence[tuple[list[int], int]]) -> Tensor:
    many = sum(len(ids) - start for ids, start in rows)
    return -torch.stack([logp(module, row) for row in rows]).sum() / many


@pytest.mark.parametrize(("table", "column"), [(EXAMPLES, "completion"), (TEXTS, "text")])
def test_the_loss_is_the_mean_over_tokens_of_its_rows(
    table: Table, column: str, model: Model
) -> None:
    for budget in (10_000, 1):  # together, or one by one
        found, module = begun(model, {"sft": 0.3}, table, batch=2, budget=budget)
        rows = rows_of(table, found.order.step(0, 2), column)
        wanted = nll(tiny_model()[0], rows)
        parts = list(found.parts(0, 7.0))
        assert len(parts) == (1 if budget > 1 else 2)
        # The engine divides by the weight of the other parts, 7.
        loss = torch.stack([p.loss for p in parts]).sum() / 7
        assert float(loss.detach()) == pytest.approx(0.3 * float(wanted.detach()), rel=1e-5)
        assert all(float(torch.as_tensor(p.weight)) == 0 for p in parts)
        said = [p.metrics["mix_loss"] for p in parts]
        mean = sum(float(v) for v, _ in said) / sum(w for _, w in said)
        assert mean == pytest.approx(float(loss.detach()), rel=1e-5)
        loss.backward()
        plain = tiny_model()[0]
        (0.3 * nll(plain, rows)).backward()
        for a, b in zip(module.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(a.grad, b.grad, atol=1e-6)  # type: ignore[arg-type]


def test_several_losses_on_the_same_pairs_and_the_reference_before_training(model: Model) -> None:
    """DPO against the model as it was, and the chosen answers imitated."""
    mix: dict[str, object] = {"dpo": {"weight": 0.5, "beta": 0.3}, "train/sft": 2.0}
    found, module = begun(model, mix, PAIRS, batch=3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.02)
    (part,) = found.parts(0, 1.0)
    numbers, reference = found.order.step(0, 3), tiny_model()[0]
    chosen, rejected = (rows_of(PAIRS, numbers, c) for c in ("chosen", "rejected"))
    with torch.no_grad():
        margins = [
            logp(module, w) - logp(reference, w) - logp(module, x) + logp(reference, x)
            for w, x in zip(chosen, rejected, strict=True)
        ]
        dpo = -torch.stack([logsigmoid(0.3 * d) for d in margins]).mean()
        want = 0.5 * dpo + 2.0 * nll(module, chosen)
    assert max(abs(float(d)) for d in margins) > 0.05
    assert float(part.loss.detach()) == pytest.approx(float(want), rel=1e-4)
    assert {"dpo/margin", "sft/logp", "mix_loss"} <= set(part.metrics)


def test_each_update_takes_the_next_rows_of_permutations(model: Model) -> None:
    one, again = (begun(model, {"sft": 1.0}, TEXTS, batch=2)[0].order for _ in range(2))
    found = [one.step(s, (s + 1) * 2) for s in range(6)]
    assert found == [again.step(s, (s + 1) * 2) for s in range(6)]
    flat = [row for rows in found for row in rows]
    # Twelve places are four permutations of three rows, where none repeats within an update.
    assert set(flat) == {0, 1, 2} and len(flat) >= 10


def test_kinds_of_rows() -> None:
    """Losses of one kind train on the rows as they are theirs, several as one objective's `mix`."""
    assert added("grpo", {"sft": 1.0}, "pair").rows == "example"
    assert added("grpo", {"kto": 1.0}, "pair").rows == "unpaired"
    assert added("grpo", {"sft": 1.0, "dpo": 1.0}, "dialogue_pair").rows == "pair"
    assert added("grpo", {"sft": 1.0, "dft": 1.0}, "text").rows == "example"
    assert added("grpo", {"sft": 1.0}, "text").weight == 1.0
    assert added("grpo", {"train/grpo": 0.25, "sft": 1.0}, "text").weight == 0.25


def test_with_no_weight_of_its_own_it_is_supervised_tuning(model: Model, tmp_path: Path) -> None:
    """One update on all rows, from the same adapter: grpo with {grpo: 0, sft: 1} is sft."""
    one: dict[str, object] = {
        "steps": 1, "lr": 2e-3, "schedule": "constant", "warmup": 0.0, "dtype": "float32",
    }  # fmt: skip
    made, (step,) = run(
        "grpo", model, tmp_path / "a", EXAMPLES, mix={"grpo": 0.0, "sft": 1.0},
        **{**one, "minibatches": 1, "batch": 3},
    )  # fmt: skip
    with use(Context(seed=4, folder=tmp_path / "b")) as context:
        alone = methods["sft"](model, EXAMPLES, batch=3, **one)
    assert isinstance(alone, Model)
    (other,) = [m for m in context.metrics if "step" in m]
    assert step["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    name = "model.layers.2.mlp.down_proj.weight"
    moved = alone.folded()[name] - model.folded()[name]
    assert moved.abs().max() > 1e-5
    assert torch.allclose(made.folded()[name], alone.folded()[name], atol=1e-6)


def test_rollouts_that_teach_nothing_leave_the_added_losses_alone(
    model: Model, tmp_path: Path
) -> None:
    """Whether their groups are kept or, with `refill`, left out: the losses are the same."""
    more: dict[str, object] = {"mix": {"sft": 0.5}, "rewards": EQUAL}
    _, steps = run("grpo", model, tmp_path / "a", EXAMPLES, **more)
    assert all(m["skipped"] == 1.0 for m in steps if "skipped" in m)
    assert all(float(str(m["grad_norm"])) > 0 for m in steps)
    assert all(m["loss"] == pytest.approx(m["mix_loss"], rel=1e-6) for m in steps)
    _, empty = run("grpo", model, tmp_path / "b", EXAMPLES, refill=1, **more)
    assert [m["left_out"] for m in empty] == [1.0] * 6
    assert [(m["loss"], m["mix_loss"]) for m in empty] == [
        (m["loss"], m["mix_loss"]) for m in steps
    ]
    assert all(float(str(m["grad_norm"])) > 0 for m in empty)


def test_it_is_learnt(model: Model, tmp_path: Path) -> None:
    more: dict[str, object] = {"mix": {"sft": 5.0}, "steps": 5, "lr": 1e-2, "minibatches": 1}
    made, steps = run("rloo", model, tmp_path, TEXTS, **more)
    seen = [float(str(m["mix_loss"])) for m in steps]
    assert seen[-1] < 0.8 * seen[0] and made.licence == model.licence


def test_the_rows_that_are_asked_do_where_they_have_answers(model: Model, tmp_path: Path) -> None:
    data = Table("example", [{**r, "completion": "oh"} for r in PROMPTS.rows])
    _, steps = run("grpo", model, tmp_path / "a", None, data, mix={"sft": 1.0}, steps=1)
    _, other = run("grpo", model, tmp_path / "b", data, data, mix={"sft": 1.0}, steps=1)
    assert [m["loss"] for m in steps] == [m["loss"] for m in other]
    with pytest.raises(InputError, match="needs rows of kind example"):
        run("grpo", model, tmp_path / "c", None, mix={"sft": 1.0})


def test_while_the_critic_learns_alone_nothing_is_added(model: Model, tmp_path: Path) -> None:
    """PPO-ptx: text of its own beside each update of the policy."""
    more: dict[str, object] = {"critic_rollouts": 1, "critic_until": 0.0, "mix": {"sft": 1.0}}
    _, steps = run("ppo_max", model, tmp_path, TEXTS, **more)
    assert ["mix_loss" in m for m in steps] == [False, False, True, True, True, True]


def test_the_critic_learns_alone_whatever_the_policy_weighs(model: Model, tmp_path: Path) -> None:
    """Both updates of its first rollout are those without `mix`."""
    one: dict[str, object] = {
        "critic_rollouts": 1, "critic_until": 0.0, "steps": 1, "reward_shape": "raw",
        "rewards": EQUAL,
    }  # fmt: skip
    _, plain = run("ppo_max", model, tmp_path / "a", None, **one)
    _, mixed = run("ppo_max", model, tmp_path / "b", TEXTS, mix={"ppo_max": 0.0, "sft": 1.0}, **one)
    assert float(str(plain[0]["grad_norm"])) > 0
    assert [(m["loss"], m["grad_norm"]) for m in mixed] == [
        (m["loss"], m["grad_norm"]) for m in plain
    ]


@pytest.mark.parametrize(
    ("name", "mix", "rows"),
    [("ppo_max", {"sft": 0.5}, TEXTS), ("grpo", {"bco": 0.5, "sft": 0.1}, PAIRS)],
)
def test_stopped_between_two_updates_and_resumed(
    name: str,
    mix: dict[str, object],
    rows: Table,
    model: Model,
    tmp_path: Path,
    always_save: Callable[[], None],
    interrupted: Callable[[type, int], AbstractContextManager[None]],
) -> None:
    """BCO keeps a running mean, which the checkpoint holds."""
    always_save()
    more = {"mix": mix, **({"critic_rollouts": 1} if name == "ppo_max" else {})}
    expected, whole = run(name, model, tmp_path / "whole", rows, **more)
    with interrupted(OnlineTask, 4):
        run(name, model, tmp_path / "cut", rows, **more)
    again, rest = run(name, model, tmp_path / "cut", rows, **more)
    assert again.key == expected.key
    timeless = [{n: v for n, v in m.items() if n != "seconds"} for m in whole]
    assert [{n: v for n, v in m.items() if n != "seconds"} for m in rest] == timeless


@pytest.mark.parametrize("rank", [0, 4])
def test_whole_distributions_of_the_reference(rank: int, model: Model, tmp_path: Path) -> None:
    """TDPO compares them while training: with a frozen copy, or the model without its adapter."""
    _, steps = run("grpo", model, tmp_path, PAIRS, mix={"tdpo1": 0.5}, rank=rank, steps=1)
    assert float(str(steps[0]["mix_loss"])) > 0


@pytest.mark.parametrize(
    ("mix", "rows", "told"),
    [
        ({"sft": 1.0, "no_such": 1.0}, EXAMPLES, "setting 'mix': no_such: unknown objective"),
        ({"rloo": 1.0}, EXAMPLES, "setting 'mix': rloo: .*it is no loss on given rows"),
        ({"bradley_terry": 1.0}, PAIRS, "trains a score head"),
        ({"sft": {"weight": 1.0, "beta": 1.0}}, EXAMPLES, "unknown setting 'beta'"),
        ({"dpo": {"weight": 1.0, "beta": -1.0}}, PAIRS, "setting 'beta' must be at least 0"),
        ({"sft": {"weight": "much"}}, EXAMPLES, "a weight must be a finite number"),
        ({"grpo": 1.0}, EXAMPLES, "setting 'mix' adds nothing"),
        ({"dpo": 1.0}, EXAMPLES, "needs rows of kind pair"),
        ({"sft": 1.0, "dpo": 1.0}, EXAMPLES, "trains on rows of kind 'pair'"),
        ({"kto": 1.0}, PAIRS, "an update has one"),
        (None, EXAMPLES, "mix_data counts for nothing"),
    ],
)
def test_what_is_refused(
    mix: dict[str, object] | None, rows: Table, told: str, model: Model, tmp_path: Path
) -> None:
    more = {"mix": mix, "batch": 2} if mix is not None else {}
    with pytest.raises(InputError, match=told):
        run("grpo", model, tmp_path, rows, **more)
    method = methods["grpo"]
    given = method.validate({"batch": 2, "minibatches": 2, **more})
    with pytest.raises(InputError, match=told):
        method.check(given, {"data": PROMPTS, "mix_data": rows})


def test_rows_of_a_step_that_has_not_run_yet() -> None:
    method = methods["grpo"]
    method.check(method.validate({"mix": {"sft": 0.5, "dpo": 0.5}}), {"data": PROMPTS})
