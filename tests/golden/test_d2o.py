"""D2O by hand, its equalities, and own answers that are replayed exactly, refreshed or not."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from objective_numbers import LOGP, at_reference, pairs, r, sigma, softminus, total, values
from torch import Tensor

from truing.context import Context, use
from truing.core import engine
from truing.core.batch.micro import Micro
from truing.core.batch.reading import read_units
from truing.core.batch.training_rows import Unit
from truing.core.chat import prompt_ids
from truing.core.files import home
from truing.core.objective import Measurements, objective_of
from truing.core.sampling import SamplingSettings
from truing.core.tiny import tiny_folder
from truing.core.trainer import own_samples
from truing.core.trainer.own_samples import GuidedSamples, OwnSamples, reminded
from truing.core.trainer.text_task import TextTask
from truing.core.tree import Node
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.tables import Table
from truing.train.preference.d2o import d2o, d2o_pair, gradient_ascent
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


def test_a_human_positive_has_a_beta_of_its_own() -> None:
    made = d2o_pair(pairs(), beta=0.3, alpha=0.2)
    z = [0.3 * r(i, 0) - 0.2 * r(i, 1) for i in range(3)]
    assert values(made) == pytest.approx([softminus(x) for x in z], rel=1e-5)
    assert made.metrics["weight"].tolist() == pytest.approx([sigma(-x) for x in z], rel=1e-5)
    assert made.metrics["margin"].tolist() == pytest.approx(z, rel=1e-5)
    n = [[len(y) for y in row] for row in LOGP]
    z = [0.3 * r(i, 0) / n[i][0] - 0.2 * r(i, 1) / n[i][1] for i in range(3)]
    one = d2o_pair(pairs(), beta=0.3, alpha=0.2, length_normalise=True)
    assert values(one) == pytest.approx([softminus(x) for x in z], rel=1e-5)
    assert values(d2o_pair(at_reference())) == pytest.approx([math.log(2)] * 3)
    same = d2o_pair(pairs(), beta=0.3, alpha=0.3).per_unit
    assert torch.allclose(same, dpo(pairs(), beta=0.3).per_unit)
    own = d2o(pairs().branches(1, 0), beta=0.3, alpha=0.2).per_unit  # K = 1
    assert torch.allclose(own, made.per_unit)


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
    spec, hook = objective_of(d2o), GuidedSamples(samples=3, max_tokens=8)

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
        methods["d2o"](Model.open(tiny_path), rows, steps=1, samples=4, max_tokens=2)
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


WORDS = "lime oak rain stone river cloud".split()
NEGATIVES = [{"prompt": f"say {w}", "rejected": f"no {w}"} for w in WORDS]
# Rank 4 and rates at which answers drawn later are others.
REFRESHED: dict[str, object] = {
    "samples": 2, "max_tokens": 6, "batch": 2, "warmup": 0.0, "schedule": "constant", "rank": 4,
    "lr": 0.02,
}  # fmt: skip


def refreshed(path: Path, folder: Path, **settings: object) -> tuple[Model, list[float]]:
    """The model that training makes, and the loss of each step."""
    with use(Context(folder=folder)) as context:
        made = methods["d2o"](
            Model.open(path), Table("negative", NEGATIVES), **REFRESHED | settings
        )
    assert isinstance(made, Model)
    return made, [float(str(m["loss"])) for m in context.metrics if "loss" in m]


@dataclass
class Draw:
    """Prompts that were asked for answers, and some logits of the model that gave them."""

    asked: list[tuple[int, ...]]
    seed: int | None
    logits: Tensor


def test_answers_are_drawn_anew_by_the_model_as_it_then_is(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Draw] = []
    draw = own_samples.drawn

    def listening(
        module: torch.nn.Module, asked: own_samples.Asked, how: SamplingSettings
    ) -> own_samples.Answers:
        with torch.no_grad():
            said = module(torch.tensor([[5, 6, 7]])).logits.clone()
        calls.append(Draw([tuple(ids) for ids, _ in asked], how.seed, said))
        return draw(module, asked, how)

    monkeypatch.setattr(own_samples, "drawn", listening)
    plain = {"reminders": [""], "steps": 5}
    _, once = refreshed(tiny_path, tmp_path / "once", **plain)
    first = len(calls)
    _, often = refreshed(tiny_path, tmp_path / "often", refresh=2, **plain)
    # The same answers until the first time they are drawn anew, others from then on.
    # But for rounding: the reference is asked step by step where answers are new, else in one pass.
    assert often[:2] == pytest.approx(once[:2], rel=1e-6)
    assert abs(often[2] - once[2]) > 1e-3
    assert first == 1 and len(calls) == 3  # those before training were kept
    with use(Context()) as context:
        order = engine.Order(len(NEGATIVES), 2, context)
        rows = [order.step(i, 10) for i in range(5)]
    tokenizer = Model.open(tiny_path).load_module().tokenizer
    prompts = [tuple(prompt_ids(tokenizer, str(n["prompt"]))) for n in NEGATIVES]
    for call, ahead in zip(calls[1:], ({*rows[2], *rows[3]}, {*rows[4]}), strict=True):
        assert call.asked == [prompts[r] for r in sorted(ahead) for _ in range(2)]
    assert len({c.seed for c in calls}) == 3
    before, *after = (c.logits for c in calls)
    assert not torch.equal(before, after[0]) and not torch.equal(*after)
    with pytest.raises(InputError, match="setting 'refresh' must be at least 0"):
        GuidedSamples(refresh=-1)


def plain_logp(model: Model, tree: Node) -> list[float]:
    """Log-probability of each branch of a tree, each computed by itself."""
    made: list[float] = []
    for ids, loss in tree.rows():
        with torch.no_grad():
            logp_TV = model.load_module().module(torch.tensor([ids])).logits[0].log_softmax(-1)
        made.append(sum(float(logp_TV[t - 1, ids[t]]) for t, m in enumerate(loss) if m))
    return made


@pytest.mark.parametrize(("rank", "given"), [(4, False), (0, False), (4, True)])
def test_new_answers_are_measured_under_the_same_reference(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, given: bool
) -> None:
    seen: list[tuple[Micro, Measurements]] = []
    measure = TextTask._measure

    def listening(task: TextTask, micro: Micro, grad: bool) -> Measurements:
        found = measure(task, micro, grad)
        seen.append((micro, found))
        return found

    monkeypatch.setattr(TextTask, "_measure", listening)
    reference = Model.open(tiny_folder(tmp_path / "other", seed=1)) if given else None
    with use(Context(folder=tmp_path)):
        methods["d2o"](
            Model.open(tiny_path), Table("negative", NEGATIVES), reference,
            **REFRESHED | {"steps": 4, "refresh": 2, "rank": rank, "lr": 5e-3},
        )  # fmt: skip
    micro, last = seen[-1]
    frozen = reference or Model.open(tiny_path)
    for tree, summed in zip(micro.trees, last.seq("ref_logp").tolist(), strict=True):
        assert summed == pytest.approx(plain_logp(frozen, tree), abs=2e-3)
    assert given or not torch.allclose(last.seq(), last.seq("ref_logp"), atol=1e-2)


def test_refreshed_answers_are_resumed_to_the_same_bits(
    tiny_path: Path,
    tmp_path: Path,
    always_save: Callable[[], None],
    interrupted: Callable[[type, int], AbstractContextManager[None]],
) -> None:
    always_save()
    how = {"steps": 5, "refresh": 2}
    whole, losses = refreshed(tiny_path, tmp_path / "whole", **how)
    # The checkpoint before the fourth update is in the middle of what was drawn for two.
    with interrupted(TextTask, 4):
        refreshed(tiny_path, tmp_path / "cut", **how)
    resumed, again = refreshed(tiny_path, tmp_path / "cut", **how)
    assert again == losses and resumed.key == whole.key
