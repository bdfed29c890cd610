"""The divergence over the likeliest tokens by torch's own, and GRPO with it by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from online_numbers import (
    ANSWERS,
    REWARD,
    loss_of,
    mean,
    ratio,
    rollout,
    std,
    surrogate,
    tensor,
    tokens,
    total,
)
from teaching import drawn, rows, slopes

from truing.context import Context, use
from truing.core.chat import completion_ids, prompt_ids
from truing.core.engine import Order
from truing.core.rl.advantages import kl_tokens
from truing.core.tiny import tiny_folder
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.tables import Table
from truing.train.rl.grpo_top_kl import grpo_top_kl, ref_top_kl

KL = [([0.5, 0.25, 1.0], [0.125, 0.0]), ([2.0], [0.75, 0.25, 0.5, 0.5])]


def within(model_CV: torch.Tensor, ref_CV: torch.Tensor, k: int) -> torch.Tensor:
    """KL of the two softmaxes over the reference's k largest logits, by torch's own function."""
    ids = ref_CV.topk(k).indices
    p, q = (z.gather(1, ids).log_softmax(1) for z in (model_CV, ref_CV))
    return torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(1)


def extras(ref_CV: torch.Tensor, k: int) -> dict[str, torch.Tensor]:
    found = ref_CV.log_softmax(1).topk(k)
    return {"ref_ids": found.indices, "ref_top_logp": found.values}


@pytest.mark.parametrize("k", [2, 4, 7])
def test_the_divergence_is_torchs_own_and_never_negative(k: int) -> None:
    model, ref = drawn(1), drawn(2)
    value, slope = slopes(ref_top_kl, model, **extras(ref, k))
    assert value.tolist() == pytest.approx(within(model, ref, k).tolist(), rel=1e-6)
    assert float(value.min()) > 0
    outside = torch.ones_like(slope).scatter_(1, ref.topk(k).indices, 0.0) > 0
    assert torch.all(slope[outside] == 0) and (k == 7) == (not outside.any())
    assert torch.allclose(slope.sum(1), torch.zeros(5, dtype=slope.dtype), atol=1e-9)
    same, _ = ref_top_kl(rows(ref, **extras(ref, k)), False)
    assert same.abs().max() < 1e-9


def test_all_of_the_vocabulary_gives_what_the_estimators_estimate() -> None:
    model, ref = drawn(1), drawn(2)
    p, q = model.log_softmax(1), ref.log_softmax(1)
    whole = (p.exp() * (p - q)).sum(1)
    value, _ = ref_top_kl(rows(model, **extras(ref, 7)), False)
    assert value.tolist() == pytest.approx(whole.tolist(), rel=1e-6)
    for kind in ("k1", "k3"):  # their means over the policy's own tokens; k1 can be negative
        each = kl_tokens(p, q, kind)
        assert (p.exp() * each).sum(1).tolist() == pytest.approx(whole.tolist(), rel=1e-6)
        assert (float(each.min()) < 0) == (kind == "k1")


def test_grpo_by_hand() -> None:
    r = rollout().having(ref_top_kl=tensor(KL))
    update = grpo_top_kl(r, beta=0.3)
    shaped = [[REWARD[u][k] - 0.3 * sum(KL[u][k]) for k in range(2)] for u in range(2)]
    a = [[(x - mean(g)) / (std(g) + 1e-4) for x in g] for g in shaped]
    assert update.tensors["advantage"].flatten().tolist() == pytest.approx(a[0] + a[1], rel=1e-5)
    per = [
        mean([surrogate(ratio(u, k, t), a[u][k], 0.2, 0.2) for t in tokens(u, k)])
        for u, k in ANSWERS
    ]
    assert total(loss_of(update, r)) == pytest.approx(mean(per), rel=1e-5)
    assert update.metrics["top_kl"].tolist() == pytest.approx([mean(KL[u][k]) for u, k in ANSWERS])
    assert update.active_U is not None and update.active_U.tolist() == [True, True]
    plain = grpo_top_kl(rollout(), beta=0.0)  # nothing is measured, and nothing asked for
    assert set(plain.metrics) == set()
    for wrong in ({"top_k": 1}, {"beta": -1.0}, {"ptx": -1.0}):
        with pytest.raises(InputError, match="top_k"):
            grpo_top_kl(r, **wrong)  # type: ignore[arg-type]


def test_given_answers_hold_the_policy_and_take_no_part_in_the_group() -> None:
    r = rollout(own=[[1.0, 0.0], [1.0, 0.0]]).having(ref_top_kl=tensor(KL))
    update = grpo_top_kl(r, beta=0.3, ptx=0.5)
    assert torch.all(update.tensors["advantage"] == 0) and update.active_U is None
    now = [([9.0] * len(a), [0.1 * (t + 1) for t in range(len(b))]) for a, b in KL]
    loss = loss_of(update, r, ref_top_kl=tensor(now))
    given = [x for _, b in now for x in b]
    assert total(loss) == pytest.approx(0.5 * mean(given), rel=1e-5)
    assert update.metrics["top_kl"].tolist() == pytest.approx([mean(KL[0][0]), mean(KL[1][0])])


ASKED = Table(
    "prompt", [{"prompt": f"say {w}", "completion": f"a {w}"} for w in ("oak", "moss", "fern")]
)
RULE = {"letters": {"use": "share_of", "letters": "abcdefghijklmnop"}}
SHORT: dict[str, object] = {
    "steps": 1, "batch": 3, "max_tokens": 5, "lr": 1e-3, "rewards": RULE, "top_k": 20, "beta": 0.1,
}  # fmt: skip


def by_transformers(model: Model, other: Model, prompt: str, answer: list[int]) -> float:
    """Sum over an answer's tokens of the divergence, one row at a time."""
    head = prompt_ids(model.load_module().tokenizer, prompt)
    with torch.no_grad():
        z, ref = (
            m.load_module().module(torch.tensor([head + answer])).logits[0, len(head) - 1 : -1]
            for m in (model, other)
        )
    return float(within(z, ref, 20).sum())


@pytest.mark.parametrize("rank", [4, 0])
def test_a_run_measures_it_against_the_reference(
    rank: int, tiny_path: Path, tmp_path: Path
) -> None:
    model, other = Model.open(tiny_path), Model.open(tiny_folder(tmp_path / "other", 3))
    values: list[list[dict[str, object]]] = []
    for budget in (10_000, 1):
        folder = tmp_path / str(budget)
        with use(Context(seed=2, folder=folder)) as context:
            made = methods["grpo_top_kl"](
                model, ASKED, reference=other, rank=rank, ptx=0.4, budget=budget, **SHORT
            )
        assert isinstance(made, Model)
        values.append([dict(m) for m in context.metrics if "step" in m])
    one, two = (v[0] for v in values)
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)
    (path,) = (tmp_path / "10000").glob("rollouts-*/000000.jsonl")
    lines = dict(json.loads(line) for line in path.read_text().splitlines())
    drawn_ids = [[a[0] for a in items] for items in lines["rollout/0//0/0"]]
    assert len(drawn_ids) == 3 and all(len(g) == 3 for g in drawn_ids)
    # Which group is which prompt's is not in the journal: the order of the run says it.
    context = Context(seed=2)
    asked = [str(ASKED[i]["prompt"]) for i in Order(3, 3, context).step(0, 3)]
    per_token: list[float] = []
    for prompt, answers in zip(asked, drawn_ids, strict=True):
        per_token += [by_transformers(model, other, prompt, ids) / len(ids) for ids in answers]
    assert one["top_kl"] == pytest.approx(mean(per_token), rel=1e-3)
    # At the first update the surrogate's value is minus the mean advantage, which is 0: what is
    # left is the divergence on the given answers.
    given: list[float] = []
    count = 0
    for row in ASKED:
        ids = completion_ids(model.load_module().tokenizer, str(row["completion"]))
        given.append(by_transformers(model, other, str(row["prompt"]), ids))
        count += len(ids)
    assert one["loss"] == pytest.approx(0.4 * math.fsum(given) / count, rel=1e-3, abs=1e-4)


def test_without_divergence_it_is_grpo(tiny_path: Path, tmp_path: Path) -> None:
    model = Model.open(tiny_path)
    plain = SHORT | {"beta": 0.0, "answers": 3}
    norms: list[object] = []
    for name in ("grpo_top_kl", "grpo"):
        more = {n: v for n, v in plain.items() if n != "top_k" or name == "grpo_top_kl"}
        with use(Context(seed=2, folder=tmp_path / name)) as context:
            methods[name](model, ASKED, **more)
        norms += [m["grad_norm"] for m in context.metrics if "step" in m]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
