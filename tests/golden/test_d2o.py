"""D2O by hand, its equalities, and own answers that are replayed exactly."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from objective_numbers import LOGP, at_reference, pairs, r, sigma, softminus, total, values

from truing.context import Context, use
from truing.core import own_samples
from truing.core.files import home
from truing.core.objective import Measurements, objective_of
from truing.core.own_samples import GuidedSamples, OwnSamples, reminded
from truing.core.sampling import SamplingSettings
from truing.core.train_text import read_units
from truing.core.training_rows import Unit
from truing.method import methods
from truing.models import Model
from truing.tables import Table
from truing.train.preference.d2o import d2o, gradient_ascent
from truing.train.preference.dpo import dpo


def three() -> Measurements:
    """The negative is branch 1 of the pairs; own answers are branch 0 and branch 1."""
    return pairs().branches(1, 0, 1)


def test_by_hand() -> None:
    made = d2o(three(), beta=0.3, alpha=0.2)
    z = [0.3 * (r(i, 0) + r(i, 1)) / 2 - 0.2 * r(i, 1) for i in range(3)]
    assert values(made) == pytest.approx([softminus(x) for x in z], rel=1e-5)
    assert made.metrics["weight"].tolist() == pytest.approx([sigma(-x) for x in z], rel=1e-5)
    n = [[len(y) for y in row] for row in LOGP]
    z = [0.3 * r(i, 0) / n[i][0] - 0.2 * r(i, 1) / n[i][1] for i in range(3)]
    one = d2o(pairs().branches(1, 0), beta=0.3, alpha=0.2, length_normalise=True)
    assert values(one) == pytest.approx([softminus(x) for x in z], rel=1e-5)


def test_gradient_by_hand() -> None:
    m = three()
    leaf = m.logp_UKT.detach().clone().requires_grad_()
    made = d2o(m.having(logp=leaf), beta=0.3, alpha=0.2)
    made.per_unit.sum().backward()
    assert leaf.grad is not None
    weight = made.metrics["weight"]
    assert torch.allclose(leaf.grad[:, 0, 0], 0.2 * weight)
    assert torch.allclose(leaf.grad[:, 1, 0], -0.3 / 2 * weight)


def test_equalities() -> None:
    own = at_reference().branches(1, 0)
    assert values(d2o(own)) == pytest.approx([math.log(2)] * 3)
    one = d2o(pairs().branches(1, 0), beta=0.3, alpha=0.3).per_unit
    assert torch.allclose(one, dpo(pairs(), beta=0.3).per_unit)
    copies = d2o(pairs().branches(1, 0, 0, 0), beta=0.3, alpha=0.3).per_unit
    assert torch.allclose(copies, one)
    turned = d2o(pairs().branches(1, 1, 0)).per_unit
    assert torch.allclose(turned, d2o(three()).per_unit)


def test_gradient_ascent_has_a_constant_weight() -> None:
    m = pairs()
    made = gradient_ascent(m.branches(1))
    tokens = sum(len(row[1]) for row in LOGP)
    assert total(made) == pytest.approx(sum(sum(row[1]) for row in LOGP) / tokens)
    made.total().backward()
    slope = m.logp_UKT.grad
    assert slope is not None
    assert torch.allclose(slope[:, 1], m.mask_UKT[:, 1] / tokens) and slope[:, 0].abs().sum() == 0


def test_own_answers_are_replayed_token_by_token(tiny_path: Path, tmp_path: Path) -> None:
    model = Model.open(tiny_path)
    data = Table("negative", [{"prompt": f"say {w}", "rejected": "no"} for w in ("a", "b")])
    spec, hook = objective_of(d2o), GuidedSamples(samples=3, new_tokens=8)

    def units(seed: int) -> list[Unit]:
        with use(Context(seed=seed, folder=tmp_path)):
            return read_units(spec, model.load_module(), data, 256, hook)[0]

    first = units(0)
    assert all(len(u.answers) == 4 for u in first)
    assert all(1 <= len(a) <= 8 for u in first for a in u.answers[1:])
    files = {p: p.read_text() for p in (home() / "own").rglob("*.json")}
    assert units(0) == first
    assert {p: p.read_text() for p in (home() / "own").rglob("*.json")} == files
    for path in files:
        path.unlink()
    assert units(0) == first  # drawn again, the same
    for path in (home() / "own").rglob("*.json"):
        path.write_text("[[5],[6],[7]]")  # what is kept is what is used
    assert [u.answers[1:] for u in units(0)] == [((5,), (6,), (7,))] * 2
    assert units(1) != first
    for path in (home() / "own").rglob("*.json"):
        path.unlink()


def test_own_answers_that_are_cut_empty_or_repeated_are_counted(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made_up(
        module: object, asked: own_samples.Asked, how: SamplingSettings
    ) -> own_samples.Answers:
        end = (how.stop_ids or ())[0]
        four = [(end,), (5, 6), (5, 6), (7, end)]  # empty, cut, the same again, whole
        return [four[i % 4] for i in range(len(asked))]

    monkeypatch.setattr(own_samples, "drawn", made_up)
    rows = Table("negative", [{"prompt": f"count {i}", "rejected": "no"} for i in range(3)])
    with use(Context(folder=tmp_path)) as context:
        methods["d2o"](Model.open(tiny_path), rows, steps=1, samples=4, new_tokens=2)
    (said,) = [m for m in context.metrics if "own_answers" in m]
    counts = {n.removeprefix("own_answers"): v for n, v in said.items() if n.startswith("own_")}
    assert counts == {"": 12, "_cut": 6, "_empty": 3, "_repeated": 3}


def test_reminders_are_for_drawing_only(tiny_path: Path, tmp_path: Path) -> None:
    assert reminded("hm", "be kind") == "be kind\n\nhm" and reminded("hm", "") == "hm"
    said = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert reminded(said, "r") == [said[0], {"role": "user", "content": "r\n\nu"}]
    assert said[1]["content"] == "u"
    loaded = Model.open(tiny_path).load_module()
    unit = Unit("x", (1, 2, 3), ((4,),), {})
    with use(Context(folder=tmp_path)):
        plain = GuidedSamples(samples=2, reminders=("",)).asked(loaded, unit, "p")
        guided = GuidedSamples(samples=2).asked(loaded, unit, "p")
        own = OwnSamples(samples=2).asked(loaded, unit, "p")
    assert [draw for _, draw in guided] == [0, 1] and own == [((1, 2, 3), 0), ((1, 2, 3), 1)]
    assert plain[0][0] == plain[1][0] and len(guided[0][0]) > len(plain[0][0])
    assert replace(unit, id="y") != unit
