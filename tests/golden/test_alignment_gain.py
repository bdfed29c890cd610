"""RAS and NAG by hand, by a judge and by a reward, from answers that are written here."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from truing.core import judge as judge_module
from truing.core.judge import Comparison
from truing.errors import InputError
from truing.evaluate import adherence
from truing.evaluate.alignment_gain import alignment_gain, beats, gains
from truing.method import methods
from truing.tables import Row, Table
from truing.train.reward.judged import CRITERIA, verdicts

DATA = Table(
    "example", [{"prompt": f"Question {i}", "completion": f"reference {i}"} for i in range(5)]
)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """A model, the one before training, and a judge."""

    def generate(model: SimpleNamespace, prompts: list[str], **_: object) -> list[list[object]]:
        return [[SimpleNamespace(text=f" {model.key} {p[-1]} ", finish="stop")] for p in prompts]

    monkeypatch.setattr(adherence, "generate", generate)
    return [SimpleNamespace(key=k, name=k) for k in "abj"]


def test_both_by_hand() -> None:
    assert beats([1.0, 0.5, 0.0, -0.5]) == [1.0, 1.0, 0.0, 0.0]
    assert gains([1.0, 0.5, 0.0, 0.3], [0.5, 0.5, 1.0, 0.1 + 0.2]) == [1.0, 0.0, -1.0, 0.0]


def test_verdicts_are_the_mean_of_both_orders() -> None:
    """Won, lost, the first place in both orders, a tie, won and a tie, won and not read."""
    first = [0.9, 0.2, 0.9, 0.5, 1.0, 0.8, None]
    second = [0.6, 0.1, 0.2, 0.5, 0.5, None, None]
    assert verdicts(Comparison(first, second)) == [1.0, -1.0, 0.0, 0.0, 0.5, 0.5, 0.0]


def test_by_a_judge(models: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[list[str], list[str], str]] = []
    views = {
        "a": Comparison([1.0, 0.0, 1.0, 0.5, 1.0], [1.0, 0.0, 0.0, 0.5, None]),
        "b": Comparison([1.0, 1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]),
    }

    def compare(
        judge: SimpleNamespace, ours: list[Row], theirs: list[Row], *, criteria: str
    ) -> Comparison:
        assert judge.key == "j" and [r["prompt"] for r in ours] == [r["prompt"] for r in theirs]
        texts = [[str(r["completion"]) for r in side] for side in (ours, theirs)]
        told.append((texts[0], texts[1], criteria))
        return views[texts[0][0][0]]

    monkeypatch.setattr(judge_module, "compare", compare)
    model, before, judge = models
    report = alignment_gain(model, DATA, before, judge, criterion="harmless")
    references = [f"reference {i}" for i in range(5)]
    assert told[0] == ([f"a {i}" for i in range(5)], references, CRITERIA["harmless"])
    assert told[1] == ([f"b {i}" for i in range(5)], references, CRITERIA["harmless"])
    found = {m.name: (m.value, m.n, m.unit) for m in report.measures}
    # R: 1, -1, 0, 0, 1/2. Before: 1, 0, -1, -1, -1, so that it is equal, worse, and three times
    # better.
    assert found["RAS"] == (pytest.approx(2 / 5), 5, "share")
    assert found["NAG"] == (pytest.approx((0 - 1 + 3) / 5), 5, "wins less losses")
    assert found["unparsed"][0] == pytest.approx(1 / 5)
    nag = report.get("NAG")
    assert -1 <= nag.lo < nag.value < nag.hi <= 1
    assert report.samples is not None
    assert [r["score"] for r in report.samples] == [1.0, -1.0, 0.0, 0.0, 0.5]
    assert [r["baseline_score"] for r in report.samples] == [1.0, 0.0, -1.0, -1.0, -1.0]
    assert [r["given"] for r in report.samples] == references
    views["a"] = Comparison([None, None, 1.0, 0.5, 1.0], [1.0] * 5)
    with pytest.raises(InputError, match="no verdict could be read of 2 of 5 pairs"):
        alignment_gain(model, DATA, None, judge)


def test_by_a_reward(models: list[SimpleNamespace]) -> None:
    """Whoever has more words of a set than the reference; pairs say what it is."""
    rows: list[Row] = [
        {"prompt": f"Question {i}", "chosen": c, "rejected": "none"}
        for i, c in enumerate(("a b", "a a", "c d"))
    ]
    reward: dict[str, object] = {"use": "share_of", "words_from": ["a", "b"]}
    # "a 0", "a 1", "a 2": one word of two; the references have all, all and none.
    report = alignment_gain(models[0], Table("pair", rows), models[1], reward=reward)
    assert report.get("RAS").value == pytest.approx(1 / 3)
    assert report.get("NAG").value == 0.0  # "b 0" has as many
    assert [r["score"] for r in report.samples or []] == pytest.approx([-0.5, -0.5, 0.5])
    alone = alignment_gain(models[0], Table("pair", rows), reward=reward)
    assert [m.name for m in alone.measures] == ["RAS"]


def test_what_is_refused(models: list[SimpleNamespace]) -> None:
    model, _, judge = models
    reward: dict[str, object] = {"use": "share_of", "letters": "a"}
    for more in ({}, {"judge": judge, "reward": reward}):
        with pytest.raises(InputError, match="either a judge or a reward"):
            alignment_gain(model, DATA, **more)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown"):
        alignment_gain(model, DATA, reward={"use": "no_such"})
    talk = [{"role": "user", "content": "a"}]  # no answer is its last
    with pytest.raises(InputError, match="reference answer in column 'completion'"):
        alignment_gain(model, Table("example", [{"messages": talk}]), reward=reward)
    assert methods["evaluate/alignment_gain"].returns == "Report"
