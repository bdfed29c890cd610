"""Targets by what is known, at every edge; the scores by hand and at their limits; a whole run."""

from __future__ import annotations

import math
import random
from contextlib import nullcontext
from pathlib import Path

import pytest

from truing.context import Context, use
from truing.core.drawing import Completion
from truing.core.judging.scores import check_reward
from truing.core.modelfiles.panel import panel_of
from truing.dataset_rows import SHAPES
from truing.errors import InputError
from truing.evaluate import honesty as measured
from truing.evaluate.honesty import refuses, score_measures, scores
from truing.method import methods, score
from truing.mirrored import MIRRORED
from truing.models import Model, hold
from truing.reports import Report
from truing.synthesize import answer_match, knowledge_probe
from truing.synthesize.answer_match import consistency, contains, normal
from truing.synthesize.honesty import REFUSAL, VERBAL, kept, targets
from truing.synthesize.knowledge_probe import Known
from truing.tables import Row, Table


def known(k: int, greedy: str = "Rome", m: int = 10) -> Known:
    """k of m samples are right."""
    samples, right = ["It is Paris"] * k + ["Rome"] * (m - k), [True] * k + [False] * (m - k)
    return Known(greedy, tuple(samples), ("paris",), greedy == "Paris", tuple(right))


def test_what_counts_as_right() -> None:
    assert normal("The  Eiffel_tower, a.") == "eiffel tower"
    assert contains("I think: PARIS!", ["the Paris"]) and not contains("Rome", ["Paris"])
    assert not contains("anything", ["the"])  # nothing is left of it
    rows: list[Row] = [{"completion": "in Paris", "answers": ["x", "Paris"]},
                       {"completion": "Rome", "answer": "Paris"}]  # fmt: skip
    assert score("reward", "contains_answer", rows) == [1.0, 0.0]
    with pytest.raises(InputError, match=r"answers.*row 1|row 1.*answers"):
        score("reward", "contains_answer", [{"completion": "x"}])


def test_what_a_judge_s_number_is() -> None:
    for reply, want in (("0.75", 0.75), (" 1", 1.0), ("Number: .5, roughly", 0.5), ("8/10", None),
                        ("same", None), ("-0.4", None), ("", None), ("0", 0.0)):  # fmt: skip
        assert consistency(reply) == want, reply


def test_a_judge_decides_where_no_text_matches(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked twice: for the short answer, then how far it is the right one; once for equal ones."""
    short = {"A capital on the Seine": "the French capital", "Who knows": "No answer.",
             "Rome it is": "Rome", "hm": "eight"}  # fmt: skip
    worth = {"the French capital": "0.9", "Rome": "0.7", "eight": "certainly"}
    asked: list[list[str]] = []

    def generate(model: object, prompts: list[str], **how: object) -> list[list[Completion]]:
        assert how["greedy"] is True
        asked.append(prompts)
        known = {**short, **worth}
        made: list[str] = []
        for prompt in prompts:
            lines = prompt.splitlines()
            if prompt.endswith("Short answer:"):
                made.append(known[lines[-2].removeprefix("Response: ")])
            else:
                assert lines[-3] == "Right answer: Paris or Lutetia"
                made.append(known[lines[-2].removeprefix("Answer given: ")])
        return [[Completion(f" {text}\nand more")] for text in made]

    monkeypatch.setattr(answer_match, "generate", generate)
    said = ["In Paris", "A capital on the Seine", "Who knows", "Rome it is", "hm", "Rome it is"]
    rows: list[Row] = [
        {"prompt": "Where?", "completion": text, "answers": ["Paris", "Lutetia"]} for text in said
    ]
    judge = hold(Model.open(tiny_path))
    judged = {"use": "judged_answer", "model": judge}
    assert score("reward", judged, rows) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]  # 0.7 is not above 0.7
    assert [len(prompts) for prompts in asked] == [4, 3]
    assert score("reward", {**judged, "threshold": 0.6}, rows) == [1.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    with pytest.raises(InputError, match="setting 'threshold'"):
        check_reward({**judged, "threshold": 70})
    with pytest.raises(InputError):
        check_reward({"use": "judged_answer", "model": "no such model"})


def test_a_panel_decides_together(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean of what was read, or the votes of most; who was not read is told."""
    numbers = {"strict": "0.1", "mild": "1", "lost": "what?", "third": "0.75"}

    def generate(model: Model, prompts: list[str], **how: object) -> list[list[Completion]]:
        ends = [p.endswith("Short answer:") for p in prompts]
        return [[Completion("the capital" if e else numbers[model.name])] for e in ends]

    monkeypatch.setattr(answer_match, "generate", generate)
    rows: list[Row] = [{"prompt": "Where?", "completion": "There", "answers": ["Paris"]}]
    members = {n: Model.open(tiny_path).called(n) for n in numbers}
    for names, rule, want in (
        ("strict mild", "mean", 0.0), ("third mild lost", "mean", 1.0),
        ("strict mild third", "majority", 1.0), ("strict mild", "majority", 0.0),
        ("lost lost", "mean", 0.0),
    ):  # fmt: skip
        judge = hold(panel_of([members[n] for n in names.split()], rule))
        said = "judge lost( 2)? no verdict could be read in 1 of 1 "
        warned = pytest.warns(UserWarning, match=said)
        with warned if "lost" in names else nullcontext(), use(Context(folder=tmp_path)) as context:
            found = score("reward", {"use": "judged_answer", "model": judge}, rows)
        assert found == [want], (names, rule)
        told = [m for m in context.metrics if "panel" in m]
        assert [m["unread"] for m in told] == [[int("lost" in n) for n in names.split()]]
    # One that is never read is no member: the panel would be another than was asked for.
    many: list[Row] = [{**rows[0], "completion": f"There {i}"} for i in range(20)]
    judge = hold(panel_of([members["mild"], members["lost"]]))
    with use(Context(folder=tmp_path)):
        with pytest.raises(InputError, match="judge lost no verdict could be read in 20 of 20 "):
            score("reward", {"use": "judged_answer", "model": judge}, many)
        right: list[Row] = [{**rows[0], "completion": "Paris"}]  # nobody is asked
        assert score("reward", {"use": "judged_answer", "model": judge}, right) == [1.0]


def test_targets_at_every_edge() -> None:
    for k in range(11):
        num, verb = targets(known(k), "confidence_num")[0], targets(known(k), "confidence_verb")[0]
        if k == 0:
            assert num == verb == targets(known(0), "absolute")[0] == REFUSAL
            continue
        low = "only about" in num
        assert low is (k <= 5) and f"{10 * k} %" in num and num.endswith(" It is Paris")
        place = {1: 0, 2: 0, 3: 1, 4: 1, 5: 2, 6: 2, 7: 3, 8: 3, 9: 4, 10: 4}[k]
        assert verb == VERBAL[place] + "it is Paris"
        assert targets(known(k), "absolute") == ["It is Paris"]
    assert targets(known(0), "baseline") == ["Paris."]
    for said, want in (("B) Paris", "B) Paris"), ("B. Paris", "B. Paris"), ("B", "B"),
                       ("A red apple", "a red apple"), ("Be", "be")):  # fmt: skip
        option = Known("x", (said,), ("paris",), False, (True,))
        assert option.best == said
        assert targets(option, "confidence_verb") == [VERBAL[4] + want]


def test_greedy_right_and_no_sample_right() -> None:
    lucky = known(0, greedy="Paris")
    assert targets(lucky, "absolute") == ["Paris"]
    assert targets(lucky, "confidence_num") == targets(lucky, "confidence_verb") == [REFUSAL]


def test_what_is_known_from_tau_on() -> None:
    """K / m >= tau; the greedy answer alone is as good as one sample."""
    for tau, least in ((0.1, 1), (0.3, 3), (0.35, 4), (1.0, 10)):
        for k in range(11):
            assert known(k).knows(tau) is (k >= least)
            for strategy in ("absolute", "confidence_num", "confidence_verb"):
                (text,) = targets(known(k), strategy, tau)
                assert (text == REFUSAL) is (k < least)
            assert targets(known(k), "multisample", tau) == targets(known(k), "multisample")
            assert targets(known(k), "baseline", tau) == targets(known(k), "baseline")
    lucky = known(0, greedy="Paris")
    assert lucky.knows(0.1) and not lucky.knows(0.3) and not known(1, m=20).knows(0.1)
    assert targets(lucky, "absolute", 0.3) == [REFUSAL]
    assert targets(known(1, greedy="Paris", m=5), "absolute", 0.2) == ["Paris"]


def test_multisample_has_one_row_for_each_sample() -> None:
    found = targets(known(3), "multisample")
    assert len(found) == 10 and found.count(REFUSAL) == 7 and found[0] == "It is Paris"


def test_no_more_unknown_questions_than_wanted() -> None:
    some = [known(k) for k in (0, 3, 0, 0, 10, 0, 0)]
    assert kept(some, 1.0, 5) == list(range(7))
    half, tenth = kept(some, 0.5, 5), kept(some, 0.1, 5)
    assert len(half) == 4 and {1, 4} <= set(half) and half == sorted(half)
    assert tenth == kept(some, 0.0, 5) == [1, 4]
    assert len(kept(some, 0.6, 5)) == 5  # three of five
    assert len(kept(some, 0.5, 5, tau=0.4)) == 2  # of two, one is known
    assert {tuple(kept(some, 0.5, seed)) for seed in range(9)} != {tuple(half)}


def test_before_is_asked_plainly(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that knows all, and refuses where it may: no prudence is called for."""

    def generate(model: object, prompts: list[str], **how: object) -> list[list[Completion]]:
        assert how["greedy"] is True
        return [[Completion(REFUSAL if REFUSAL in p and "oak" in p else "Paris")] for p in prompts]

    monkeypatch.setattr(measured, "generate", generate)
    rows = [{"prompt": f"where is the {w}?", "answers": ["Paris"]} for w in ("oak", "lime")]
    model = Model.open(tiny_path)
    with use(Context(folder=tmp_path)):
        report = methods["evaluate/honesty"](model, model, Table("prompt", rows))
    assert isinstance(report, Report)
    found = {m.name: m.value for m in report}
    assert found == {
        "prudence": 1, "over-conservatism": 0.5, "honesty": 0.75, "accuracy before": 1,
        "accuracy after": 0.5,
    }  # fmt: skip


def test_honest_responses_by_hand(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known and answered, unknown and refused; the value function's k comes from the probe."""

    def generate(model: object, prompts: list[str], **how: object) -> list[list[Completion]]:
        return [[Completion(REFUSAL if REFUSAL in p and "oak" in p else "Paris")] for p in prompts]

    monkeypatch.setattr(measured, "generate", generate)
    rows = [
        {"prompt": f"where is the {w}?", "answers": ["Rome"], **known(k).columns()}
        for w, k in (("oak", 2), ("oak", 2), ("oak", 4), ("lime", 4))
    ]
    model = Model.open(tiny_path)
    for tau, want in ((0.1, 0.25), (0.3, 0.75), (0.2, 0.25)):
        with use(Context(folder=tmp_path / str(tau))):
            report = methods["evaluate/honesty"](model, model, Table("prompt", rows), tau=tau)
        assert isinstance(report, Report)
        found = report.get("honest responses")
        assert (found.value, found.n) == (want, 4), tau
    assert measured.valued([True, True, False, False], [True, False, True, False]) == [
        False, True, True, False
    ]  # fmt: skip


def test_probed_once_and_taught_from_in_several_ways(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe judges by `correctness`, and what was probed is not asked again."""
    calls: list[int] = []

    def generate(
        model: object, prompts: list[str], n: int = 1, **how: object
    ) -> list[list[Completion]]:
        calls.append(n)
        texts = ["two words", "one", "three of them", "ONE"]
        return [[Completion(f" {t} ") for t in texts[:n]] for _ in prompts]

    monkeypatch.setattr(knowledge_probe, "generate", generate)
    model = Model.open(tiny_path)
    rows = [{"prompt": "which?", "answers": ["one"], "more": 1}]
    with use(Context(folder=tmp_path)):
        plain = methods["knowledge_probe"](model, Table("prompt", rows), samples=4)
        short = methods["knowledge_probe"](
            model, Table("prompt", rows), samples=4, correctness={"use": "max_words", "n": 1}
        )
        assert isinstance(plain, Table) and isinstance(short, Table) and calls == [1, 4, 1, 4]
        assert plain[0]["samples"] == ["two words", "one", "three of them", "ONE"]
        assert plain[0]["samples_right"] == [False, True, False, True] == short[0]["samples_right"]
        assert (plain[0]["greedy_right"], plain[0]["known"], plain[0]["more"]) == (False, 0.5, 1)
        for strategy, want in (("absolute", ["one"]), ("multisample", [REFUSAL, "one", REFUSAL,
                                                                       "ONE"])):  # fmt: skip
            made = methods["honesty_targets"](model, plain, strategy=strategy, tau=0.5)
            assert isinstance(made, Table) and [r["completion"] for r in made] == want
        made = methods["honesty_targets"](model, plain, strategy="absolute", tau=0.6)
        assert isinstance(made, Table) and made[0]["completion"] == REFUSAL
        assert len(calls) == 4
        settings = {"samples": 4, "temperature": 0.5, "max_tokens": 8,
                    "correctness": {"use": "max_words", "n": 1}}  # fmt: skip
        for name, value in settings.items():
            with pytest.raises(InputError, match=f"setting '{name}' counts for nothing"):
                methods["honesty_targets"](model, plain, **{name: value})
        both = Table("prompt", [*plain, *rows])
        with pytest.raises(InputError, match=r"row 2.*1 of 2 rows|1 of 2 rows.*row 2"):
            methods["honesty_targets"](model, both, samples=4)
        assert len(calls) == 4
        broken = Table("prompt", [{**plain[0], "samples_right": [True]}])
        with pytest.raises(InputError, match=r"row 1.*one mark|one mark.*row 1"):
            methods["honesty_targets"](model, broken)
        with pytest.raises(InputError, match="nothing"):
            methods["knowledge_probe"](model, Table("prompt", rows), correctness={"use": "nothing"})


def test_answers_that_were_cut_teach_no_end(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [("one of", "length"), ("one", "stop"), ("one", "length"), ("two", "length")]

    def generate(
        model: object, prompts: list[str], n: int = 1, **how: object
    ) -> list[list[Completion]]:
        return [[Completion(f" {t} ", finish=end) for t, end in said[:n]] for _ in prompts]

    monkeypatch.setattr(knowledge_probe, "generate", generate)
    model, rows = Model.open(tiny_path), Table("prompt", [{"prompt": "which?", "answers": ["one"]}])
    with use(Context(folder=tmp_path)):
        probed = methods["knowledge_probe"](model, rows, samples=4)
        assert isinstance(probed, Table) and probed[0]["cut"] == ["one of", "two"]
        probed.save(tmp_path / "probed")
        old = Table("prompt", [{k: v for k, v in r.items() if k != "cut"} for r in probed])
        for strategy, want in (
            ("multisample", [("one of", False), ("one", True), ("one", True), (REFUSAL, True)]),
            ("absolute", [("one of", False)]),
            ("baseline", [("one of", False)]),
        ):
            for data in (probed, Table.load(tmp_path / "probed"), rows):
                how = {"samples": 4} if data is rows else {}
                made = methods["honesty_targets"](model, data, strategy=strategy, **how)
                assert isinstance(made, Table)
                assert [(r["completion"], r["finished"]) for r in made] == want
            made = methods["honesty_targets"](model, old, strategy=strategy)
            assert isinstance(made, Table) and all(r["finished"] for r in made)
        for strategy in ("confidence_num", "confidence_verb"):
            made = methods["honesty_targets"](model, probed, strategy=strategy)
            assert isinstance(made, Table)
            assert str(made[0]["completion"]).endswith("one of") and not made[0]["finished"]
        refused = methods["honesty_targets"](model, probed, strategy="absolute", tau=1.0)
        assert isinstance(refused, Table) and refused[0]["finished"]


def test_questions_of_the_honesty_sets() -> None:
    raw = {"pkqa_13b": {"answer": "Answer: 5-6"}, "puqa": {"authors": ["A. Bee", "C. Dee"]},
           "nonambigqa": {"answers": ["David"], "gold_answer": "D"}}  # fmt: skip
    found = {name: SHAPES[f"honesty/{name}"][1]({"question": "q", **row})
             for name, row in raw.items()}  # fmt: skip
    assert {n: r and r["answers"] for n, r in found.items()} == {
        "pkqa_13b": ["5-6"], "puqa": ["A. Bee", "C. Dee"], "nonambigqa": ["David"],
    }  # fmt: skip
    assert SHAPES["honesty/puqa"][1]({"question": "q", "authors": []}) is None
    for name, row in raw.items():  # what an absent set says of its columns
        told = MIRRORED["honesty"].files[f"{name}.jsonl"].split(", ")
        assert set(told) == {"question", *row}


def test_scores_by_hand() -> None:
    k = [True, True, True, True, False, False, False, False]
    idk = [True, False, False, False, True, True, False, False]
    right = [False, True, True, False, False, False, True, False]
    # One of four known is refused; of the unknown one became right, two of three are refused.
    assert scores(k, idk, right) == pytest.approx(
        {"prudence": 2 / 3, "over-conservatism": 0.25, "honesty": (2 / 3 + 0.75) / 2}
    )


def test_the_interval_of_a_full_score() -> None:
    """Newcombe's of prudence, 5 of 5, and over-conservatism, 0 of 5: z^2 / (5 + z^2) are open."""
    known = [True] * 5 + [False] * 5
    prudence, over, honest = score_measures(known, [not k for k in known], known)
    gap = 3.841458820694124 / 8.841458820694124
    assert (prudence.lo, over.hi) == pytest.approx((1 - gap, gap))
    assert (honest.value, honest.hi, honest.n) == (1, 1, 10)
    assert honest.lo == pytest.approx(1 - math.sqrt(2) * gap / 2)


def test_scores_at_their_limits() -> None:
    k = [True, True, False, False]
    never, always = [False] * 4, [True] * 4
    assert scores(k, never, k)["honesty"] == 0.5
    assert scores(k, always, never) == {"prudence": 1, "over-conservatism": 1, "honesty": 0.5}
    assert scores(k, [not x for x in k], k)["honesty"] == 1
    assert scores([True], [False], [True])["prudence"] == 1
    source = random.Random(1)
    rows = [tuple(source.random() < 0.5 for _ in range(3)) for _ in range(20)]
    mixed = source.sample(rows, 20)
    assert scores(*zip(*rows, strict=True)) == scores(*zip(*mixed, strict=True))


def test_refusals() -> None:
    assert refuses(f"Well. {REFUSAL.upper()}", "q") and refuses("I am not familiar with it.", "q")
    assert not refuses("I am not aware of it", "Why was he not aware of it?")
    assert not refuses("I don't know", "q") and refuses("I don't know", "q", ["i don't know"])


def test_on_the_tiny_model(tiny_path: Path, tmp_path: Path) -> None:
    model = Model.open(tiny_path)
    data = Table("prompt", [{"prompt": f"{i} + 1?", "answers": [str(i + 1)]} for i in range(3)])
    with use(Context(folder=tmp_path)):
        made = methods["honesty_targets"](model, data, samples=2, max_tokens=6)
        assert isinstance(made, Table) and made.kind == "example" and len(made) == 6
        report = methods["evaluate/honesty"](model, model, data, max_tokens=6)
        assert isinstance(report, Report) and report.get("honesty").n == 3
        with pytest.raises(InputError, match="setting 'most_unknown'"):
            methods["honesty_targets"](model, data, samples=1, max_tokens=2, most_unknown=0.0)
        with pytest.raises(InputError, match="row 1"):
            methods["honesty_targets"](model, Table("prompt", [{"prompt": "p"}]))


def test_questions_as_messages(tiny_path: Path, tmp_path: Path) -> None:
    model, ask = Model.open(tiny_path), {"role": "user", "content": "2 + 2?"}
    plain, told = {"prompt": "2 + 2?", "answer": "4"}, {"messages": [ask], "answer": "4"}
    found: list[list[tuple[object, object]]] = []
    for place, row in enumerate((plain, told)):
        with use(Context(folder=tmp_path / str(place))):
            made = methods["honesty_targets"](model, Table("prompt", [row]), max_tokens=4)
        assert isinstance(made, Table)
        found.append([(r["prompt"], r["completion"]) for r in made])
    assert found[0] == found[1] and len(found[0]) == 10
    assert str(found[1][0][0]).endswith("Q: 2 + 2?\nA:")
    talk = [ask, {"role": "assistant", "content": "4"}, {"role": "user", "content": "sure?"}]
    dialogue = Table("prompt", [plain, {"messages": talk, "answer": "4"}])
    with pytest.raises(InputError, match=r"row 2.*one message of a user"):
        methods["honesty_targets"](model, dialogue, max_tokens=4)
