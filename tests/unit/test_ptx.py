"""PPO-ptx: its loss against plain torch on single rows, its order, resuming, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from truing.context import Context, Json, use
from truing.core import engine
from truing.core.online_task import OnlineTask
from truing.core.ptx import Ptx, text_trees
from truing.core.tiny import tiny_model, tiny_tokenizer
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.tables import Table

HEAD = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = Table("prompt", [{"prompt": f"say {w}"} for w in ("lime", "oak", "rain", "ash")])
EXAMPLES = Table(
    "example",
    [
        {"prompt": f"where is {w}", "completion": f"in the {w} town"}
        for w in ("rome", "oslo", "bern")
    ],
)
TEXTS = Table("text", [{"text": t} for t in ("a river runs", "stones are old", "it rained")])
LETTERS = {"letters": {"use": "share_of", "letters": "abcdefghijklmnop"}}
SMALL: dict[str, object] = {
    "steps": 3, "batch": 4, "minibatches": 2, "answers": 2, "new_tokens": 5, "lr": 2e-3,
    "rewards": LETTERS, "critic_rollouts": 1,
}  # fmt: skip


@pytest.fixture
def model(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


def run(
    model: Model, folder: Path, text: Table | None, **more: object
) -> tuple[Model, list[dict[str, Json]]]:
    inputs: dict[str, object] = {} if text is None else {"ptx_data": text}
    with use(Context(seed=4, folder=folder)) as context:
        made = methods["ppo_max"](model, PROMPTS, **inputs, **{**SMALL, **more})
    assert isinstance(made, Model)
    return made, [m for m in context.metrics if "step" in m]


def nats(ids: list[int], start: int) -> torch.Tensor:
    """Summed -log p of the tokens from `start` on, by transformers alone, with gradients."""
    module = tiny_model()[0]
    logp = module(torch.tensor([ids])).logits[0].log_softmax(-1)
    return -torch.stack([logp[i - 1, ids[i]] for i in range(start, len(ids))]).sum()


@pytest.mark.parametrize("kind", ["example", "text"])
def test_the_loss_is_the_mean_over_tokens_of_the_batch(kind: str) -> None:
    tokenizer = tiny_tokenizer()
    rows: list[tuple[list[int], int]] = []
    table = EXAMPLES if kind == "example" else TEXTS
    for row in table.rows[:2]:
        head = HEAD.format(row.get("prompt")) if kind == "example" else ""
        tail = f"{row['completion']}<|im_end|>" if kind == "example" else f"{row['text']}<|im_end|>"
        start = len(tokenizer(head, add_special_tokens=False)["input_ids"]) if head else 1
        rows.append((tokenizer(head + tail, add_special_tokens=False)["input_ids"], start))
    trees, _ = text_trees(table.take([0, 1]), tokenizer, 200, "x")
    wanted = torch.stack([nats(ids, start) for ids, start in rows]).sum().detach()
    tokens = sum(len(ids) - start for ids, start in rows)
    for budget in (10_000, 1):  # together, or one by one
        module = tiny_model()[0]
        parts = list(Ptx(trees, 0.3, 8, {}).parts(module, 0, 7, budget))
        assert len(parts) == (1 if budget > 1 else 2)
        loss = torch.stack([p.loss for p in parts]).sum()
        # The engine divides by the weight of the other parts, 7.
        assert float(loss.detach()) / 7 == pytest.approx(0.3 * float(wanted) / tokens, rel=1e-5)
        assert all(float(torch.as_tensor(p.weight)) == 0 for p in parts)
        said = [p.metrics["ptx_nats"] for p in parts]
        assert sum(float(v) for v, _ in said) == pytest.approx(float(wanted), rel=1e-5)
        assert sum(n for _, n in said) == tokens


def test_each_update_takes_the_next_rows_of_permutations() -> None:
    trees, _ = text_trees(TEXTS, tiny_tokenizer(), 200, "x")
    with use(Context(seed=1)):
        one, again = (Ptx(trees, 1.0, 2, {}).order for _ in range(2))
    found = [one.step(s, (s + 1) * 2) for s in range(6)]
    assert found == [again.step(s, (s + 1) * 2) for s in range(6)]
    flat = [row for rows in found for row in rows]
    # Twelve places are four permutations of three rows, where none repeats within an update.
    assert set(flat) == {0, 1, 2} and len(flat) >= 10
    with use(Context(seed=2)):
        other = Ptx(trees, 1.0, 2, {}).order
    assert [other.step(s, (s + 1) * 2) for s in range(6)] != found


def test_prompts_need_no_answers_and_the_critic_alone_learns_no_text(
    model: Model, tmp_path: Path
) -> None:
    _, steps = run(model, tmp_path / "a", EXAMPLES, ptx=1.0)
    assert ["ptx_nats" in m for m in steps] == [False, False, True, True, True, True]
    # Text is learnt: its loss falls, where without it the answers' rewards alone count.
    made, steps = run(model, tmp_path / "b", TEXTS, ptx=5.0, steps=6, lr=1e-2, beta=0.0)
    seen = [float(str(m["ptx_nats"])) for m in steps if "ptx_nats" in m]
    assert seen[-1] < 0.8 * seen[0]
    assert made.licence == model.licence


def test_without_it_the_rows_own_answers_are_learnt_as_before(model: Model, tmp_path: Path) -> None:
    with use(Context(folder=tmp_path)), pytest.raises(InputError, match="column 'completion'"):
        methods["ppo_max"](model, PROMPTS, **SMALL, ptx=1.0)
    rows = Table("example", [{**r, "completion": "oh"} for r in PROMPTS.rows])
    with use(Context(folder=tmp_path / "b")) as context:
        methods["ppo_max"](model, rows, **SMALL, ptx=1.0)
    assert not any("ptx_nats" in m for m in context.metrics)


def test_stopped_between_two_updates_and_resumed(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(engine, "CHECKPOINT_SHARE", float("inf"))
    expected, whole = run(model, tmp_path / "whole", TEXTS, ptx=0.5)
    after_step, seen = OnlineTask.after_step, 0

    def dying(task: OnlineTask, step: int) -> None:
        nonlocal seen
        seen += 1
        if seen == 4:
            raise KeyboardInterrupt
        after_step(task, step)

    monkeypatch.setattr(OnlineTask, "after_step", dying)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "cut", TEXTS, ptx=0.5)
    monkeypatch.setattr(OnlineTask, "after_step", after_step)
    again, rest = run(model, tmp_path / "cut", TEXTS, ptx=0.5)
    assert again.key == expected.key
    assert [m["loss"] for m in rest] == [m["loss"] for m in whole]
    assert [m.get("ptx_nats") for m in rest] == [m.get("ptx_nats") for m in whole]


def test_what_is_refused(model: Model, tmp_path: Path) -> None:
    with use(Context(folder=tmp_path)), pytest.raises(InputError, match="setting 'ptx' is 0"):
        methods["ppo_max"](model, PROMPTS, ptx_data=TEXTS, **SMALL)
    method = methods["ppo_max"]
    settings = method.validate({"ptx": 0.5})
    method.check(settings, {"data": PROMPTS})  # the text may be a step's that has not run yet
    method.check(settings, {"data": PROMPTS, "ptx_data": TEXTS})
    with pytest.raises(InputError, match="kind example"):
        method.check(settings, {"data": PROMPTS, "ptx_data": PROMPTS})
    with pytest.raises(InputError, match="setting 'ptx' is 0"):
        method.check(method.validate({}), {"data": PROMPTS, "ptx_data": TEXTS})
    assert "ptx_data" in method.inputs
    assert all("ptx_data" not in methods[n].inputs for n in ("ppo", "grpo", "grao", "grpo_top_kl"))
