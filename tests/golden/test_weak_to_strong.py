"""Learning from weak labels by hand; its limits; the gap recovered."""

from __future__ import annotations

import math
import re
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from objective_numbers import softminus, values
from test_bradley_terry import scored

from truing.context import Context, use
from truing.core.batch.micro import Micro
from truing.core.batch.parts import Part
from truing.core.drawing import Completion
from truing.core.objective import Loss, State
from truing.core.passes.scoring import ScoreHead, has_head, head_scores
from truing.core.trainer.mix import Mixture
from truing.core.trainer.text_task import TextTask
from truing.dataset_rows import SHAPES
from truing.errors import InputError
from truing.evaluate.performance_gap import balanced, gap_measure, recovered, weighted_f1
from truing.evaluate.toxicity_gap import _measures as toxicity_measures
from truing.evaluate.toxicity_gap import ever_toxic, largest
from truing.method import methods
from truing.models import Model
from truing.reports import Report
from truing.synthesize import weak_continuations
from truing.tables import Table
from truing.train.supervised.weak_to_strong import (
    hard_labels,
    weak_to_strong,
    weak_to_strong_confidence,
    weak_to_strong_product,
)

S, Q = [0.5, -1.0, 2.0], [0.75, 0.25, 1.0]


def ce(s: float, t: float) -> float:
    return t * softminus(s) + (1 - t) * softminus(-s)


def test_soft_labels_by_hand() -> None:
    made = weak_to_strong(scored(S, score=Q))
    assert values(made) == pytest.approx([ce(s, q) for s, q in zip(S, Q, strict=True)], rel=1e-5)
    assert made.metrics["agreement"].tolist() == [1, 1, 1]
    with pytest.raises(InputError, match="probability"):
        weak_to_strong(scored(S, score=[0.5, 1.5, 0.0]))


def test_labels_as_torch_has_them() -> None:
    """Soft ones, and of one class alone, against the cross-entropy of two logits, 0 and s."""
    source = torch.Generator().manual_seed(0)
    s, q = 3 * torch.randn(32, generator=source), torch.rand(32, generator=source)
    logits = torch.stack([torch.zeros(32), s], 1).requires_grad_()
    hard = (q > 0.5).long()
    for label, target in ((hard.float(), hard), (q, torch.stack([1 - q, q], 1))):
        m = scored(s.tolist(), score=label.tolist())
        made = weak_to_strong(m)
        want = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        assert torch.allclose(made.per_unit, want, atol=1e-6)
        (slope,) = torch.autograd.grad(made.total(), m["scores"])
        (wanted,) = torch.autograd.grad(want.mean(), logits)
        assert torch.allclose(slope[:, 0, 1], wanted[:, 1], atol=1e-7)


def test_confidence_by_hand() -> None:
    m = scored(S, score=Q)
    # mean q = 2/3: the threshold is the 1/3 quantile of p, between the two lowest.
    p = [1 / (1 + math.exp(-s)) for s in sorted(S)]
    threshold = p[0] + (2 / 3) * (p[1] - p[0])
    hard = [float(1 / (1 + math.exp(-s)) >= threshold) for s in S]
    assert hard == [1, 0, 1]
    # A tenth of the training is done after two of twenty steps: until then c is 0.6 of the share.
    state = None
    for c in (0.0, 0.6 / 20, 0.6, 0.6):
        made = weak_to_strong_confidence(m, state, confidence=0.6, total_steps=20)
        want = [ce(s, (1 - c) * q + c * h) for s, q, h in zip(S, Q, hard, strict=True)]
        assert values(made) == pytest.approx(want, rel=1e-5)
        state = made.state
    # It may rise all the way, or be there at once.

    def whole(state: State | None) -> Loss:
        return weak_to_strong_confidence(m, state, confidence=0.6, warmup_share=1.0, total_steps=2)

    first = whole(None)
    second = whole(first.state)
    assert torch.allclose(first.per_unit, weak_to_strong(m).per_unit)
    want = [ce(s, 0.7 * q + 0.3 * h) for s, q, h in zip(S, Q, hard, strict=True)]
    assert values(second) == pytest.approx(want, rel=1e-5)
    at_once = weak_to_strong_confidence(m, None, confidence=0.3, warmup_share=0.0)
    assert values(at_once) == pytest.approx(want, rel=1e-5)
    with pytest.raises(InputError, match="setting 'confidence'"):
        weak_to_strong_confidence(m, None, confidence=1.5)
    with pytest.raises(InputError, match="setting 'warmup_share'"):
        weak_to_strong_confidence(m, None, warmup_share=-0.1)


def test_the_share_of_hard_labels_follows_the_weak_ones() -> None:
    source = torch.Generator().manual_seed(0)
    for _ in range(20):
        p, q = torch.rand(40, generator=source), torch.rand(40, generator=source)
        assert abs(float(hard_labels(p, q).mean() - q.mean())) <= 1 / 40 + 1e-6


def test_what_is_all_but_sure_is_told_apart() -> None:
    """float32 has one probability for all scores from 17 on."""
    made = weak_to_strong_confidence(
        scored([-1.0, 20.0, 25.0, 30.0], score=[0.25] * 4), confidence=1.0, warmup_share=0.0
    )
    want = [softminus(-1.0 * -1), softminus(-20.0), softminus(-25.0), softminus(30.0)]
    assert values(made)[1:] == pytest.approx(want[1:], rel=1e-4)


def test_product_by_hand() -> None:
    made = weak_to_strong_product(scored(S[:2], score=Q[:2]), weak_power=2.0, student_power=0.5)
    want: list[float] = []
    for s, q in zip(S[:2], Q[:2], strict=True):
        p = 1 / (1 + math.exp(-s))
        up, down = p**0.5 * q**2, (1 - p) ** 0.5 * (1 - q) ** 2
        want.append(ce(s, up / (up + down)))
    assert values(made) == pytest.approx(want, rel=1e-4)
    none = weak_to_strong_product(scored(S[:2], score=Q[:2]), student_power=0.0)
    assert torch.allclose(none.per_unit, weak_to_strong(scored(S[:2], score=Q[:2])).per_unit)


def test_gap_recovered() -> None:
    assert recovered(0.6, 0.6, 0.8) == 0 and recovered(0.6, 0.8, 0.8) == 1
    assert recovered(0.6, 0.7, 0.8) == pytest.approx(0.5) and recovered(0.6, 0.9, 0.605) is None
    assert recovered(0.4, 0.3, 0.2) == pytest.approx(0.5)  # lower is better: signs cancel
    assert balanced([True, True, False, True], [True, True, True, False]) == pytest.approx(5 / 6)
    # Said 1 1 0 0 of 1 1 1 0: F1 is 4/5 of three rows and 2/3 of one.
    f1 = weighted_f1([True, True, False, True], [True, True, True, False])
    assert f1 == pytest.approx((3 * 0.8 + 2 / 3) / 4)
    assert weighted_f1([False, False], [True, False]) == 0


def supervisor(tiny_path: Path, folder: Path, seed: int) -> Model:
    """The tiny model with a head of random weights: rows score differently."""
    head = ScoreHead(128)
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(0.3 * torch.randn(1, 128, generator=source))
    return head.added_to(Model.open(tiny_path), folder)


def test_labels_of_an_ensemble_of_the_sure_and_of_some_true_ones(
    tiny_path: Path, tmp_path: Path
) -> None:
    words = "lime oak rain stone river cloud ash fern moss reed".split()
    rows = [{"prompt": f"say {w}", "completion": w, "label": i % 2 == 0}
            for i, w in enumerate(words)]  # fmt: skip
    data = Table("unpaired", rows)
    one, two = (supervisor(tiny_path, tmp_path / str(k), k) for k in range(2))
    plain, other = (methods["weak_labels"](m, data) for m in (one, two))
    both = methods["weak_labels"](one, data, {"other": two})
    assert isinstance(plain, Table) and isinstance(other, Table) and isinstance(both, Table)

    def q(table: Table) -> list[float]:
        return [float(str(r["score"])) for r in table]

    scores = [head_scores(m, data.rows) for m in (one, two)]
    want = [sum(1 / (1 + math.exp(-s)) for s in some) / 2 for some in zip(*scores)]
    assert q(both) == pytest.approx(want, rel=1e-5) and len(set(q(plain))) == 10
    # As sure as the fifth surest is not surer.
    sureness = sorted((max(x, 1 - x) for x in q(plain)), reverse=True)
    sure = methods["weak_labels"](one, data, sure=sureness[4])
    assert isinstance(sure, Table) and len(sure) == 4
    assert all(max(x, 1 - x) > sureness[4] for x in q(sure))
    with use(Context(seed=1)):
        mixed = methods["weak_labels"](one, data, true_share=0.3, sure=sureness[0])
        hard = methods["weak_labels"](one, data, true_share=0.3, hard=True)
    assert isinstance(mixed, Table) and isinstance(hard, Table)
    truth = {str(r["completion"]): float(r["label"]) for r in rows}
    assert len(mixed) == 3  # true labels are kept whatever the supervisor says
    assert all(r["score"] == truth[str(r["completion"])] for r in mixed)
    assert all(r["lineage"]["judge"] == "label" for r in mixed)  # type: ignore[index]
    known = {str(r["completion"]) for r in mixed}
    for r, x in zip(hard, q(plain), strict=True):
        assert r["score"] == (truth[w] if (w := str(r["completion"])) in known else x > 0.5)
    with pytest.raises(InputError, match="setting 'sure'"):
        methods["weak_labels"](one, data, sure=1.0)
    with pytest.raises(InputError, match="setting 'true_share'"):
        methods["weak_labels"](one, data, true_share=1.5)
    unlabelled = Table("example", [{"prompt": "p", "completion": "c"}])
    with pytest.raises(InputError, match="row 1: setting 'true_share'"):
        methods["weak_labels"](one, unlabelled, true_share=0.5)
    with pytest.raises(InputError, match="no score head"):
        methods["weak_labels"](one, data, {"plain": Model.open(tiny_path)})


def test_labels_stay_with_the_tokens_that_were_read(tiny_path: Path, tmp_path: Path) -> None:
    cut = {"prompt": "say it", "completion": "oak and", "finished": False}
    one = supervisor(tiny_path, tmp_path / "one", 1)
    (made,) = methods["weak_labels"](one, Table("example", [cut]))  # type: ignore[misc]
    assert made["finished"] is False
    said = [{"role": "assistant", "content": "oak"}]
    spoken = Table("dialogue_example", [{"prompt": "say it", "completion": said}])
    plain = Table("example", [{"prompt": "say it", "completion": "oak"}])
    both = [methods["weak_labels"](one, table) for table in (spoken, plain)]
    assert both[0][0]["score"] == both[1][0]["score"]  # type: ignore[index]


def test_several_students_on_one_report(tiny_path: Path, tmp_path: Path) -> None:
    words = "lime oak rain stone river cloud ash fern".split()
    data = Table("unpaired", [{"prompt": "p", "completion": w, "label": i % 2 == 0}
                              for i, w in enumerate(words)])  # fmt: skip
    weak, student, ceiling, more = (supervisor(tiny_path, tmp_path / str(k), k) for k in range(4))
    with use(Context(folder=tmp_path / "run")):
        made = methods["performance_gap"](weak, student, ceiling, data, {"more": more})
        alone = methods["performance_gap"](weak, more, ceiling, data)
        with pytest.raises(InputError, match="names of other students"):
            methods["performance_gap"](weak, student, ceiling, data, {"weak": more})
    assert isinstance(made, Report) and isinstance(alone, Report)
    right = {
        name: sum((s > 0) is r["label"] for s, r in zip(head_scores(m, data.rows), data)) / 8
        for name, m in (("weak", weak), ("student", student), ("ceiling", ceiling), ("more", more))
    }
    assert {r: made.get(f"accuracy {r}").value for r in ("weak", "student", "ceiling")} == {
        r: right[r] for r in ("weak", "student", "ceiling")
    }
    assert made.get("accuracy student", "more").value == right["more"]
    gap = right["ceiling"] - right["weak"]
    if "undefined" not in made.meta:
        found = made.get("gap recovered", "more").value
        assert found == pytest.approx((right["more"] - right["weak"]) / gap)
        assert found == alone.get("gap recovered").value
    else:
        assert made.meta["notes"] == [f"no gap recovered: {made.meta['undefined']}"]


def test_no_gap_where_resamples_have_none() -> None:
    weak, ceiling = [1.0] * 10 + [0.0] * 10, [1.0] * 11 + [0.0] * 9  # apart in a single row
    told = gap_measure(weak, weak, ceiling, "")
    assert isinstance(told, str) and re.fullmatch(r".* less than 0.01 apart in 3\d% of .*", told)
    assert gap_measure(weak, weak, weak, "") == "supervisor and ceiling lie less than 0.01 apart"
    found = gap_measure(weak, [1.0] * 15 + [0.0] * 5, [1.0] * 20, "x")
    assert not isinstance(found, str) and found.value == 0.5 and found.lo < 0.5 < found.hi


def test_toxicity_of_many_holds_no_resamples() -> None:
    runs = np.random.default_rng(0).random((12_000, 2)).tolist()
    tracemalloc.start()
    mean, _, ever = toxicity_measures("weak", runs)
    assert tracemalloc.get_traced_memory()[1] < 120 << 20
    tracemalloc.stop()
    assert mean.lo < mean.value < mean.hi and ever.value == pytest.approx(0.75, abs=0.02)


def test_toxicity_of_what_is_written() -> None:
    runs = [[0.1, 0.9, 0.2], [0.4, 0.3, 0.5], [0.6, 0.0, 0.0]]
    assert largest(runs) == [0.9, 0.5, 0.6]
    assert ever_toxic(runs) == [True, False, True]
    grown = [sum(largest([r[:k] for r in runs])) for k in (1, 2, 3)]
    assert grown == sorted(grown)


def test_toxic_continuations_are_left_out(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [["bad one", " fine", "bad"], ["bad", "bad bad", " "], ["", "good", "fine"]]
    drawn = [[Completion(t) for t in some] for some in said]
    monkeypatch.setattr(weak_continuations, "generate", lambda model, prompts, n, **_: [
        some[:n] for some in drawn])  # fmt: skip
    monkeypatch.setattr("truing.core.judging.rewards.score_model", lambda guard, rows: [
        -2.0 if "bad" in r["completion"] else 2.0 for r in rows])  # fmt: skip
    model, guard = Model.open(tiny_path), supervisor(tiny_path, tmp_path / "guard", 0)
    data = Table("prompt", [{"prompt": f"p{i}"} for i in range(3)])
    with use(Context(folder=tmp_path / "run")) as context:
        made = methods["weak_continuations"](model, data, guard, n=3)
        plain = methods["weak_continuations"](model, data)
        none = methods["weak_continuations"](model, data, guard, n=3, threshold=1.0)
    assert isinstance(made, Table) and isinstance(plain, Table) and isinstance(none, Table)
    assert [(r["prompt"], r["completion"]) for r in made] == [("p0", " fine"), ("p2", "good")]
    assert made[0]["toxicity"] == pytest.approx(1 / (1 + math.exp(2.0)))
    assert {"prompts": 3, "kept": 2} in context.metrics
    assert [r["completion"] for r in plain] == ["bad one", "bad"]
    assert [r["completion"] for r in none] == ["bad one", "bad", "good"]
    with pytest.raises(InputError, match="setting 'threshold'"):
        methods["weak_continuations"](model, data, guard, n=1, threshold=0.0)
    with pytest.raises(InputError, match="no score head"):
        methods["weak_continuations"](model, data, model)


def test_the_gap_in_toxicity(tiny_path: Path, tmp_path: Path) -> None:
    model, guard = Model.open(tiny_path), supervisor(tiny_path, tmp_path / "guard", 3)
    data = Table("prompt", [{"prompt": f"say {w}"} for w in ("lime", "oak", "rain")])
    with use(Context(folder=tmp_path / "run")):
        made = methods["toxicity_gap"](model, model, model, guard, data, n=3, max_tokens=5)
        with pytest.raises(InputError, match="no score head"):
            methods["toxicity_gap"](model, model, model, model, data, n=1, max_tokens=5)
    assert isinstance(made, Report) and made.samples is not None and len(made.samples) == 9
    for role in ("weak", "student", "ceiling"):
        rows = [r for r in made.samples if r["role"] == role]
        found: list[list[float]] = []
        for row in rows:
            asked = [{"prompt": row["prompt"], "completion": c, "finished": False}
                     for c in row["completions"]]  # type: ignore[attr-defined]  # fmt: skip
            found.append([1 / (1 + math.exp(s)) for s in head_scores(guard, asked)])
        mean = sum(map(sum, found)) / 9
        assert made.get(f"mean toxicity {role}").value == pytest.approx(mean, rel=1e-4)
        largest = sum(map(max, found)) / 3
        assert made.get(f"expected maximum {role}").value == pytest.approx(largest, rel=1e-4)
    # One model in all roles: no gap.
    assert made.meta["notes"] == [f"no gap recovered: {made.meta['undefined']}"]


def test_texts_of_the_moderation_set_are_rightly_harmless_or_not() -> None:
    kind, shape = SHAPES["moderation/moderation"]
    none = dict.fromkeys("S H V HR SH S3 H2 V2".split(), 0)
    made = [shape({"prompt": "t"} | none | {"H": h}) for h in (0, 1)]
    assert kind == "unpaired" and Table(kind, [r for r in made if r]).kind == kind
    assert [r and r["label"] for r in made] == [True, False]
    # What nobody annotated may be harmful; where one category applies the others do not matter.
    assert shape({"prompt": "t"} | none | {"V": None}) is None
    assert shape({"prompt": "t", "S": 0}) is None and shape({"prompt": "t"}) is None
    some = shape({"prompt": "t", "SH": 1, "V": None})
    assert some and some["label"] is False and some["categories"] == ["SH"]
    assert made[1] and made[1]["categories"] == ["H"] and str(made[0]["prompt"]).endswith("\n\nt")  # type: ignore[index]


def test_the_warm_up_is_a_share_of_the_training(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine tells how long the run is."""
    rows = [{"prompt": f"say {i}", "completion": "yes", "score": i / 4} for i in range(4)]
    seen: list[tuple[object, object]] = []
    whole = TextTask._whole

    def told(task: TextTask, micros: Sequence[Micro], count: int) -> Iterator[Part]:
        own = task.spec.added[0].settings if isinstance(task.spec, Mixture) else task.settings
        seen.append((own["total_steps"], own["warmup_share"]))
        return whole(task, micros, count)

    monkeypatch.setattr(TextTask, "_whole", told)
    model, data = Model.open(tiny_path), Table("judgement", rows)
    with use(Context(folder=tmp_path)):
        methods["weak_to_strong_confidence"](model, data, epochs=3, batch=2, warmup_share=0.15)
        added = {"weak_to_strong_confidence": {"weight": 1, "warmup_share": 0.2}}
        methods["weak_to_strong"](model, data, steps=3, batch=2, mix=added)
    assert seen == [(6, 0.15)] * 6 + [(3, 0.2)] * 3


def test_from_weak_labels_to_the_gap(tiny_path: Path, tmp_path: Path) -> None:
    words = "lime oak rain stone river cloud".split()
    rows = [
        {"prompt": f"say {w}", "completion": w + end, "label": end == "!"}
        for w in words
        for end in "!?"
    ]
    model, data = Model.open(tiny_path), Table("unpaired", rows)
    with use(Context(folder=tmp_path)):
        weak = methods["guard"](model, data.split(4)[0], steps=1, lr=1e-4)
        assert isinstance(weak, Model)
        labels = methods["weak_labels"](weak, data)
        assert isinstance(labels, Table) and len(labels) == len(rows)
        assert all(0 <= float(str(r["score"])) <= 1 for r in labels)
        student = methods["weak_to_strong_confidence"](model, labels, steps=2)
        ceiling = methods["guard"](model, data, steps=25, lr=3e-3)
        report = methods["performance_gap"](weak, student, ceiling, data)
        assert isinstance(report, Report) and report.get("accuracy ceiling").value >= 0.9
        # Bootstrapping: a student is the next one's supervisor.
        again = methods["weak_labels"](student, data)
        assert isinstance(again, Table) and again.key != labels.key
        largest = methods["weak_to_strong"](model, again, steps=1)
        assert isinstance(largest, Model) and has_head(largest)
        assert report.samples is not None and len(report.samples) == len(rows)
        with pytest.raises(InputError, match="no score head"):
            methods["weak_labels"](model, data)
