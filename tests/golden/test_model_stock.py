"""Model Stock against ratios worked out by hand."""

from __future__ import annotations

import pytest
import torch

from truing.errors import InputError
from truing.merge.model_stock import mean_cosine, merge, model_stock, ratio
from truing.models import Model


def test_ratio_by_hand() -> None:
    assert ratio(0.5, 2) == pytest.approx(2 / 3)  # 2 * 0.5 / (1 + 0.5)
    assert ratio(0.25, 4) == pytest.approx(1 / 1.75)
    assert ratio(1.0, 3) == pytest.approx(1.0)
    assert ratio(0.0, 3) == ratio(-0.4, 3) == 0.0


def test_mean_cosine_by_hand() -> None:
    taus = [torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0, 0.0]]), torch.tensor([[0.0, 2.0]])]
    assert mean_cosine(taus) == pytest.approx((0.6 + 0.8 + 0.0) / 3)
    assert mean_cosine(taus[:1]) == 1.0


def test_one_tensor_by_hand() -> None:
    base = torch.tensor([10.0, 20.0])
    # tau = (3, 4) and (5, 0): c = 0.6, t = 1.2 / 1.6 = 0.75; the mean is (4, 2).
    made = merge(base, [base + torch.tensor([3.0, 4.0]), base + torch.tensor([5.0, 0.0])])
    assert made.tolist() == pytest.approx([13.0, 21.5])
    # Identical task vectors return that model, orthogonal ones the base.
    same = base + torch.tensor([3.0, 4.0])
    assert merge(base, [same, same, same]).tolist() == pytest.approx(same.tolist())
    apart = [base + torch.tensor([1.0, 0.0]), base + torch.tensor([0.0, 1.0])]
    assert merge(base, apart).tolist() == base.tolist()
    assert merge(base, [base, base]).tolist() == base.tolist()
    # Who did not change the tensor says nothing of it.
    assert merge(base, [same, base]).tolist() == pytest.approx(same.tolist())
    assert merge(base, [same]).tolist() == pytest.approx(same.tolist())
    counter = torch.tensor([3])
    assert merge(counter, [counter]) is counter


def test_mistakes(tiny_path: object) -> None:
    model = Model.open(str(tiny_path))
    with pytest.raises(InputError, match="needs experts"):
        model_stock(model, {"base": model})
