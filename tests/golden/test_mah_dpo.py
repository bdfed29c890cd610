"""MAH-DPO by hand, its equalities, and heads that are blended at inference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from objective_numbers import D, pairs, softminus, total

from truing.context import Context, use
from truing.core.logprob import measure
from truing.core.tree import group_tree, pack
from truing.core.vocab_heads import VocabHeads, heads_of
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.tables import Table
from truing.train.preference.dpo import dpo
from truing.train.preference.mah_dpo import mah_dpo


def test_by_hand() -> None:
    made = mah_dpo(pairs(objective=[0.0, 1.0, 0.0]), beta=0.3)
    each = [softminus(0.3 * d) for d in D]
    assert total(made) == pytest.approx(((each[0] + each[2]) / 2 + each[1]) / 2, rel=1e-5)


def test_one_objective_is_dpo_and_more_rows_of_one_weigh_no_more() -> None:
    one = mah_dpo(pairs(objective=[0.0] * 3), beta=0.3, objectives=1)
    assert total(one) == pytest.approx(total(dpo(pairs(), beta=0.3)), rel=1e-6)
    m = pairs(objective=[0.0, 1.0, 0.0])
    at = [0, 1, 2, 0, 2]
    more = type(m)(
        m.mask_UKT[at], {n: t[at] for n, t in m.tensors.items()}, {"objective": m["objective"][at]}
    )
    assert total(mah_dpo(more)) == pytest.approx(total(mah_dpo(m)), rel=1e-6)
    for wrong in ([0.0, 2.0, 0.0], [0.5, 0.0, 0.0]):
        with pytest.raises(InputError, match="whole number from 0 to 1"):
            mah_dpo(pairs(objective=wrong))


def test_heads_begin_as_the_models_own_and_learn_from_their_own_rows() -> None:
    heads = VocabHeads(3, 8, 2)
    rows, which = torch.randn(5, 8), torch.tensor([0.0, 2, 0, 2, 2])
    assert torch.equal(heads(rows, which), rows)
    with torch.no_grad():
        heads.up.normal_()
    made = heads(rows, which)
    want = rows[1] + heads.up[2] @ (heads.down[2] @ rows[1])
    assert torch.allclose(made[1], want, atol=1e-6)
    made.square().sum().backward()
    assert heads.up.grad is not None and heads.up.grad[1].abs().sum() == 0
    assert heads.up.grad[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("numbers", "objectives"), [([None, None], 2), ([0, 0], 2), ([0, 1], 3), ([0, 2], 2)]
)
def test_a_head_without_rows_or_rows_without_a_head_are_refused(
    tiny_path: Path, numbers: list[int | None], objectives: int
) -> None:
    rows = [
        {"prompt": "say", "chosen": f"a {i}", "rejected": "b"}
        | ({} if n is None else {"objective": n})
        for i, n in enumerate(numbers)
    ]
    with pytest.raises(InputError, match=r"setting 'objectives' asks for \d heads"):
        methods["mah_dpo"](Model.open(tiny_path), Table("pair", rows), objectives=objectives)


def test_heads_are_not_trained_anew(tiny_path: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "say", "chosen": "yes!", "rejected": "no", "objective": i} for i in range(2)]
    with use(Context(folder=tmp_path)):
        made = methods["mah_dpo"](Model.open(tiny_path), Table("pair", rows), steps=1)
        assert isinstance(made, Model)
        with pytest.raises(InputError, match="has such heads already"):
            methods["mah_dpo"](made, Table("pair", rows), steps=1)


def test_blends_are_linear_in_the_logits(tiny_path: Path, tmp_path: Path) -> None:
    words = "lime oak rain stone river cloud".split()
    rows = [
        {"prompt": f"say {w}", "chosen": w + "!?"[i % 2], "rejected": w + "?!"[i % 2],
         "objective": i % 2}
        for i, w in enumerate(words)
    ]  # fmt: skip
    model = Model.open(tiny_path)
    with use(Context(folder=tmp_path)):
        made = methods["mah_dpo"](model, Table("pair", rows), steps=8, lr=3e-3, head_rank=4)
        assert isinstance(made, Model)
        up, down = heads_of(made, "test")
        assert up.shape == (2, 128, 4) and up[0].abs().sum() > 0 and up[1].abs().sum() > 0

        def logits(of: object) -> torch.Tensor:
            assert isinstance(of, Model)
            with torch.no_grad():
                return of.load_module().module(torch.tensor([[5, 6, 7, 8]])).logits[0]

        first, second = (logits(methods["blend_heads"](made, weights=w)) for w in ([1, 0], [0, 1]))
        mixed = methods["blend_heads"](made, weights=[1.5, 0.5])
        assert torch.allclose(logits(mixed), 0.75 * first + 0.25 * second, atol=1e-3)
        assert not torch.allclose(first, second, atol=1e-2)
        # One head alone is what training measured.
        packed = pack([group_tree([5, 6], [[7, 8]])])[0]
        module, heads = made.load_module().module, VocabHeads(2, 128, 4)
        with torch.no_grad():
            heads.up.copy_(up)
            heads.down.copy_(down)
        zero = torch.zeros(2)
        trained = measure(module, packed, grad=False, change=lambda r: heads(r, zero))["logp"]
        want = first.log_softmax(-1)[[1, 2], [7, 8]]
        assert torch.allclose(trained[0, 0], want, atol=1e-4)
        assert isinstance(mixed, Model)
        again = Model.load(mixed.save(tmp_path / "saved"))
        assert torch.equal(logits(again), logits(mixed))
        for wrong in ([1.0], [-1.0, 2.0], [0.0, 0.0]):
            with pytest.raises(InputError, match=r"heads|weights"):
                methods["blend_heads"](made, weights=wrong)
        with pytest.raises(InputError, match="no heads"):
            methods["blend_heads"](model, weights=[1.0])
