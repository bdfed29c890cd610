"""Adherence and the comparison before/after: counts and intervals against closed forms."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from scipy import stats

from truing.errors import InputError
from truing.evaluate import adherence as module
from truing.evaluate.before_after import before_after
from truing.principles import Principle, Principles
from truing.reports import Measure, Report
from truing.specify import texts
from truing.summary import table_of
from truing.tables import Table

RULES = Principles(
    [
        Principle("brief", "Use at most three words.", check={"use": "max_words", "n": 3}),
        Principle("calm", "Do not shout.", check={"use": "no_exclamation"}),
        Principle("kind", "Be kind."),
    ]
)
PROMPTS = Table("prompt", [{"prompt": f"Question number {i}"} for i in range(8)])
# brief is broken 4 times, calm 3 times; the empty answer breaks both
BEFORE = ["a b c d", "a b c d!", "a b c d e", "a b!", "", "a", "b", "c"]
AFTER = ["a b c", "a b", "a b c d", "a b", "c", "a", "b", "c"]


def model(answers: list[str]) -> SimpleNamespace:
    return SimpleNamespace(key="k" + str(hash(tuple(answers))), name="m", answers=answers)


@pytest.fixture(autouse=True)
def writer(monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(model: SimpleNamespace, prompts: list[str], **_: object) -> list[list[object]]:
        return [
            [SimpleNamespace(text=model.answers[int(p.split()[-1])], finish="stop")]
            for p in prompts
        ]

    monkeypatch.setattr(module, "generate", generate)
    monkeypatch.setattr(
        texts, "relevance", lambda rows: [0.5 if r["completion"] else 0.0 for r in rows]
    )


def measured(answers: list[str]) -> Report:
    return module.adherence(model(answers), PROMPTS, RULES)


def test_rates_and_intervals() -> None:
    report = measured(BEFORE)
    for id, broken in (("brief", 4), ("calm", 3)):
        found = report.get("violation rate", id)
        exact = stats.binomtest(broken, 8).proportion_ci(method="wilson")
        assert found.value == broken / 8 and found.n == 8
        assert (found.lo, found.hi) == pytest.approx((exact.low, exact.high), abs=1e-6)
    assert report.get("violation rate").value == pytest.approx(7 / 16)
    assert report.get("unusable answers").value == 1 / 8
    assert report.get("relevance").value == pytest.approx(0.5 * 7 / 8)
    far = module.adherence(model(BEFORE), PROMPTS, RULES, on_topic=0.6)
    assert far.get("violation rate").value == 1.0
    assert report.get("words").value == pytest.approx((4 + 4 + 5 + 2 + 0 + 1 + 1 + 1) / 8)
    assert report.meta["not_measured"] == ["kind"]


def test_samples_name_what_they_break() -> None:
    samples = measured(BEFORE).samples
    assert samples is not None and samples.kind == "judgement"
    assert [r["violated"] for r in samples][:5] == [
        "brief",
        "brief, calm",
        "brief",
        "calm",
        "brief, calm",
    ]
    assert samples[4]["unusable"] == "empty"
    assert samples[1]["lineage"]["principles"] == ["brief", "calm"]
    assert samples[1]["lineage"]["parents"] == [PROMPTS[1]["id"]]


def ability(value: float) -> Report:
    measures = [
        Measure("ability", value, value, value, 3, "nats per token", "", "lower"),
        Measure("choices", 0.5, 0.4, 0.6, 10, "share", "", "higher"),
    ]
    return Report("general ability", measures, None, {"metric": "held-out nats per token"})


def test_before_after_is_paired() -> None:
    report = before_after(measured(BEFORE), measured(AFTER), ability(3.0), ability(3.1))
    # discordant prompts of brief: 0, 1 and 4 only before, none only after
    assert report.meta["mcnemar"]["brief"] == pytest.approx(stats.binomtest(3, 3).pvalue)
    assert report.get("violations difference", "brief").value == pytest.approx(-3 / 8)
    difference = report.get("violations difference")
    assert difference.value == pytest.approx(1 / 16 - 7 / 16)
    assert difference.lo < difference.value < difference.hi < 0
    assert report.meta["summary"] == {
        "violations_before": 0.4375,
        "violations_after": 0.0625,
        "difference_interval": [round(difference.lo, 4), round(difference.hi, 4)],
        "relevance_before": 0.4375,
        "relevance_after": 0.5,
        "words_before": 2.25,
        "words_after": 1.875,
        "ability_before": 3.0,
        "ability_after": 3.1,
        "ability_metric": "held-out nats per token",
        "n_prompts": 8,
    }
    samples = report.samples
    assert (
        samples is not None and samples[1]["before"] == "a b c d!" and samples[1]["after"] == "a b"
    )


def test_ability_that_was_not_measured_is_told() -> None:
    without = before_after(measured(BEFORE), measured(AFTER))
    told = "general ability was not measured: give ability_before and ability_after"
    assert without.meta["notes"] == [told]
    assert table_of({"result": without}).splitlines()[-2:] == ["8 prompts", told]
    beside = before_after(measured(BEFORE), measured(AFTER), ability(3.0), ability(3.1))
    assert beside.meta["notes"] == [] and "not measured" not in table_of({"result": beside})


def test_the_loss_of_ability_is_paired_by_text() -> None:
    def read(nats: list[float], tokens: int = 10) -> Report:
        rows: list[dict[str, object]] = [
            {"text": f"text {i}", "nats": n, "tokens": tokens if n else 0}
            for i, n in enumerate(nats)
        ]
        return Report("ability", ability(sum(nats) / 40).measures, Table("text", rows))

    def change(before: Report, after: Report) -> Report:
        return before_after(measured(BEFORE), measured(AFTER), before, after)

    before, after = [10.0, 30.0, 50.0, 90.0], [11.0, 31.0, 51.0, 91.0]
    found = change(read(before), read(after)).get("ability difference")
    # Texts differ widely, their changes do not: 1 nat over 10 tokens each.
    assert (found.value, found.lo, found.hi) == pytest.approx((0.1, 0.1, 0.1))
    # A text without a token to score, of which a resample could consist, is no part of it.
    found = change(read([10.0, 0.0]), read([11.0, 0.0])).get("ability difference")
    assert (found.value, found.lo, found.hi, found.n) == pytest.approx((0.1, 0.1, 0.1, 1))
    # Other tokens of the same texts, as of another tokenizer or length: nothing is paired.
    other = change(read(before), read(after, tokens=11))
    assert "ability difference" not in {m.name for m in other}


def test_every_side_effect_is_paired_where_it_can_be() -> None:
    def asked(right: list[int], questions: str) -> Report:
        made = ability(3.0)
        return Report(
            made.title, made.measures, None, made.meta | {"right": right, "questions": questions}
        )

    was, now = [1, 0, 0, 1, 0, 0, 1, 0], [1, 1, 1, 1, 0, 1, 1, 0]
    report = before_after(measured(BEFORE), measured(AFTER), asked(was, "a"), asked(now, "a"))
    change = report.get("choices difference")
    assert (change.value, change.n, change.better) == (pytest.approx(3 / 8), 8, "higher")
    # Newcombe by hand: of 8 pairs 3 are right on both sides, 3 on the later alone and 2 on none, so
    # that phi's numerator is 3 * 2 - 0, less 8 / 2.
    one, two = (stats.binomtest(k, 8).proportion_ci(method="wilson") for k in (3, 6))
    phi = 2 / (3 * 5 * 6 * 2) ** 0.5
    down, up = (6 / 8 - two.low, one.high - 3 / 8), (two.high - 6 / 8, 3 / 8 - one.low)
    reach = [(a * a + b * b - 2 * phi * a * b) ** 0.5 for a, b in (down, up)]
    ends = (3 / 8 - reach[0], 3 / 8 + reach[1])
    assert (change.lo, change.hi) == pytest.approx(ends, abs=1e-9)
    unusable = report.get("unusable answers difference")
    assert (unusable.value, unusable.n, unusable.better) == (-1 / 8, 8, "lower")
    assert unusable.lo < -1 / 8 < 0 < unusable.hi  # one answer of eight is not clear
    other = before_after(measured(BEFORE), measured(AFTER), asked(was, "a"), asked(now, "b"))
    assert "choices difference" not in {m.name for m in other}


def test_answers_to_a_prompt_that_comes_twice_go_together_in_order() -> None:
    twice = Table("prompt", [{"prompt": f"Question number {i % 4}", "id": i} for i in range(8)])

    def report(texts: list[str]) -> Report:
        rows = [
            {"prompt": r["prompt"], "completion": t, "score": 1.0, "violated": "", "unusable": "",
             "relevance": 0.5, "words": len(t.split()), "finished": True}
            for r, t in zip(twice, texts, strict=True)
        ]  # fmt: skip
        names = ("violation rate", "relevance", "words", "unusable answers")
        measures = [Measure(n, 0.0, 0.0, 0.0, 8, "share", "", "lower") for n in names]
        return Report("r", measures, Table("judgement", rows), {"kind": "adherence"})

    before, after = report([f"b{i}" for i in range(8)]), report([f"a{i}" for i in range(8)])
    samples = before_after(before, after).samples
    assert samples is not None
    assert [(r["before"], r["after"]) for r in samples] == [(f"b{i}", f"a{i}") for i in range(8)]
    once = Report("r", after.measures, Table("judgement", after.samples.rows[:4]), after.meta)  # type: ignore[union-attr]
    with pytest.raises(InputError, match="different prompts"):
        before_after(before, once)


def test_a_prompt_that_is_asked_again_is_no_further_prompt() -> None:
    asked = [{"prompt": r["prompt"], "id": f"{i} {r['id']}"} for i in range(3) for r in PROMPTS]
    found = [
        [before_after(was, now), was, now]
        for was, now in (
            [module.adherence(model(texts), table, RULES) for texts in (BEFORE, AFTER)]
            for table in (PROMPTS, Table("prompt", asked))
        )
    ]
    for once, again in zip(*found, strict=True):
        for a, b in zip(once, again, strict=True):
            assert (b.name, b.category, b.n) == (a.name, a.category, a.n)
            assert (b.value, b.lo, b.hi) == pytest.approx((a.value, a.lo, a.hi))
    assert found[1][0].meta["mcnemar"] == pytest.approx(found[0][0].meta["mcnemar"])
    assert found[1][0].meta["summary"]["n_prompts"] == 8
    assert found[1][1].meta["notes"] == ["24 answers to 8 prompts, which intervals take whole"]
    assert "notes" not in found[0][1].meta


def test_what_was_measured_otherwise_is_refused() -> None:
    longer = Principles(
        [
            Principle("brief", "Be brief.", check={"use": "max_words", "n": 5}),
            Principle("calm", "Do not shout.", check={"use": "no_exclamation"}),
        ]
    )
    with pytest.raises(InputError, match=r"reports of other 'checks'.*'n': 3.*'n': 5"):
        before_after(measured(BEFORE), module.adherence(model(AFTER), PROMPTS, longer))
    short = module.adherence(model(AFTER), PROMPTS, RULES, max_tokens=64)
    with pytest.raises(InputError, match=r"reports of other 'how'.*64"):
        before_after(measured(BEFORE), short)


def test_reports_of_something_else_are_refused() -> None:
    with pytest.raises(InputError, match="input 'after': needs a report of evaluate/adherence"):
        before_after(measured(BEFORE), ability(3.0))
    now = measured(AFTER)
    other = Report(now.title, now.measures, now.samples, {**now.meta, "principles": ["x"]})
    with pytest.raises(InputError, match="of other principles"):
        before_after(measured(BEFORE), other)
    with pytest.raises(InputError, match="'ability_after' is missing"):
        before_after(measured(BEFORE), measured(AFTER), ability(3.0))


def test_different_prompts_are_refused() -> None:
    other = Table("prompt", [{"prompt": f"Question other {i}"} for i in range(8)])
    with pytest.raises(InputError, match="different prompts"):
        before_after(measured(BEFORE), module.adherence(model(AFTER), other, RULES))


def test_report_survives_the_store(tmp_path: object) -> None:
    report = before_after(measured(BEFORE), measured(AFTER))
    report.save(tmp_path)
    assert Report.load(tmp_path).key == report.key
