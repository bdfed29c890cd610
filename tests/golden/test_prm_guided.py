"""Guided steps: the best new step is kept, by what process reward models say of it alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from truing.changes import Decoder
from truing.core.drawing import Completion
from truing.core.generate import generate
from truing.core.generation.search import Path as Way
from truing.core.generation.search import Writer
from truing.core.judging.prm_values import Answer, Candidate, Guide, standardised, weighed
from truing.core.judging.rewards import Rewards, score_model
from truing.core.passes.scoring import ScoreHead, step_scores
from truing.core.sampling import SamplingSettings
from truing.decode import prm_guided as module
from truing.decode.prm_guided import prm_guided
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.tables import Row

END = 0
TEXTS = {1: "good", 2: "bad", 3: "\n\n", 4: "fine", 5: " the", END: ""}


class Script:
    """Draws from a script, one list of candidates for each call of each attempt."""

    local = True

    def __init__(self, script: Sequence[Sequence[Sequence[int]]]) -> None:
        self.script, self.asked = list(script), list[tuple[SamplingSettings, tuple[int, ...]]]()
        self.held: dict[str, object] = {}

    def __call__(
        self, prompts: Sequence[object], sampling: SamplingSettings, *,
        begun: Sequence[Sequence[int]] | None = None,
    ) -> list[list[Completion]]:  # fmt: skip
        assert begun is not None and len(prompts) == 1
        self.asked.append((sampling, tuple(begun[0])))
        return [
            [Completion(self.text(c), tuple(c), (-1.0,) * len(c), "stop", len(c))
             for c in self.script.pop(0)]
        ]  # fmt: skip

    def text(self, ids: Sequence[int]) -> str:
        return " ".join(TEXTS[i] for i in ids)


def liked(rows: list[Row]) -> list[float]:
    """Counts of "good" less twice those of "bad" in the whole text."""
    return [float(str(r["completion"]).count("good") - 2 * str(r["completion"]).count("bad"))
            for r in rows]  # fmt: skip


def answer(script: Sequence[Sequence[Sequence[int]]], monkeypatch: pytest.MonkeyPatch,
           **more: object) -> tuple[Completion, Script]:  # fmt: skip
    base = Script(script)
    monkeypatch.setattr(Guide, "values", lambda self, writer, found: liked(
        [{"completion": writer.text(c.path.ids)} for _, c in found]))  # fmt: skip
    sampling = SamplingSettings(max_tokens=9, stop_ids=(END,), seed=5)
    made = module.draw(base, None, ["p"], sampling, **{"candidates": 2, **more})  # type: ignore[arg-type]
    return made[0][0], base


def test_the_best_step_is_kept_and_the_next_begins_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, base = answer([[[2, 3], [1, 3]], [[4, 3], [1, 4, 3]], [[4, END], [2, END]]], monkeypatch)
    assert made.ids == (1, 3, 1, 4, 3, 4, END) and made.finish == "stop"
    assert made.logprobs == (-1.0,) * 7
    assert [begun for _, begun in base.asked] == [(), (1, 3), (1, 3, 1, 4, 3)]
    first = base.asked[0][0]
    assert first.n == 2 and first.top_k == 50 and first.stop == ("\n\n",)
    assert [s.max_tokens for s, _ in base.asked] == [9, 7, 4]


def test_candidates_without_words_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made, base = answer([[[3], [END]], [[3], [2, END]], [[1, END], [3]]], monkeypatch)
    assert made.ids == (1, END)  # two attempts more, and the better of both that came
    assert len({s.seed for s, _ in base.asked}) == 3
    nothing = [[[END], [3]]] * 3
    made, _ = answer([[[1, 3], [2, 3]], *nothing], monkeypatch)
    assert made.ids == (1, 3, END) and made.finish == "stop"
    made, _ = answer([[[1, 3], [2, 3]]], monkeypatch, steps=1)
    assert made.ids == (1, 3) and made.finish == "length"


def test_steps_lose_what_closed_them_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def values(self: Guide, writer: Writer, found: Sequence[tuple[Answer, Candidate]]) -> object:
        seen.extend(c.step for _, c in found)
        return [0.0] * len(found)

    monkeypatch.setattr(Guide, "values", values)
    base = Script([[[1, 3], [5, 1, END]]])
    sampling = SamplingSettings(max_tokens=9, stop_ids=(END,), seed=5)
    module.draw(base, None, ["p"], sampling, candidates=2, steps=1)  # type: ignore[arg-type]
    assert seen == ["good ", " the good"]


def test_steps_keep_the_marks_that_end_them(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {1: "Why", 2: "? ", 3: "\n\n", 4: "So. ", 5: "\t"}
    monkeypatch.setattr(Script, "text", lambda self, ids: "".join(texts[i] for i in ids))
    seen: list[str] = []

    def values(self: Guide, writer: Writer, found: Sequence[tuple[Answer, Candidate]]) -> object:
        seen.extend(c.step for _, c in found)
        return [0.0] * len(found)

    monkeypatch.setattr(Guide, "values", values)
    base = Script([[[1, 2], [4], [1, 3], [2]], *[[[1, 5]]] * 2])  # a mark alone has no words
    sampling = SamplingSettings(max_tokens=9, stop_ids=(END,), seed=5)
    stops = [". ", "? ", "\t"]
    module.draw(base, None, ["p"], sampling, candidates=4, steps=1, stops=stops)  # type: ignore[arg-type]
    assert base.asked[0][0].stop == (". ", "? ", "\t")
    assert seen == ["Why?", "So.", "Why", "Why"]


def test_values_are_of_the_new_step_and_weighed(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (scorer(tiny_path, tmp_path / str(i), i) for i in (1, 2))
    rewards = Rewards({"short": {"use": "max_words", "n": 1}}, {})
    weights = {"one": 3.0, "short": 0.0}
    guide = Guide({"one": one, "two": two}, {}, rewards, weights, "\n\n", False)
    steps = ["First this.", "Then that."]
    writer = object.__new__(Writer)
    monkeypatch.setattr(Writer, "text", lambda self, ids: "First this. Then that.")
    found = guide.values(writer, [(Answer("q", steps=steps[:1]), Candidate(Way(), steps[1]))])
    p = [1 / (1 + math.exp(-step_scores(m, [{"prompt": "q", "steps": steps}], "\n\n")[0][1]))
         for m in (one, two)]  # fmt: skip
    assert found == pytest.approx([(3 * p[0] + p[1]) / 4], rel=1e-5)
    assert abs(p[0] - p[1]) > 1e-3


def test_weights_choose_between_objectives(monkeypatch: pytest.MonkeyPatch) -> None:
    def terms(self: Guide, rows: list[Row]) -> dict[str, list[float]]:
        texts = [str(r["completion"]) for r in rows]
        return {"kind": [float("good" in t) for t in texts],
                "loud": [3.0 * ("bad" in t) for t in texts]}  # fmt: skip

    monkeypatch.setattr(Guide, "terms", terms)
    sampling = SamplingSettings(max_tokens=9, stop_ids=(END,), seed=5)

    def chosen(standardise: bool = False, **weights: float) -> int:
        base = Script([[[2, END], [1, END], [4, END]]])
        made = module.draw(
            base, None, ["p"], sampling, candidates=3, steps=1, weights=weights,  # type: ignore[arg-type]
            standardise=standardise,
        )  # fmt: skip
        return made[0][0].ids[0]

    assert chosen(kind=1.0, loud=0.0) == 1 and chosen(kind=0.0, loud=1.0) == 2
    # On its own scale the second counts for three times its weight.
    assert chosen(kind=0.6, loud=0.4) == 2 and chosen(True, kind=0.6, loud=0.4) == 1


def test_terms_are_weighed_and_standardised_by_hand() -> None:
    terms = {"a": [0.2, 0.6], "b": [3.0, 1.0]}
    assert weighed(terms, {"a": 3.0}, 2) == pytest.approx([(0.6 + 3.0) / 4, (1.8 + 1.0) / 4])
    assert weighed(terms, {"a": 0.0}, 2) == [3.0, 1.0]  # one objective alone
    assert weighed({}, {}, 2) == [0.0, 0.0]
    assert standardised([1.0, 2.0, 6.0]) == pytest.approx(
        [v / math.sqrt(14 / 3) for v in (-2.0, -1.0, 3.0)]
    )
    assert standardised([0.5, 0.5]) == [0.0, 0.0] and standardised([2.0]) == [0.0]


def test_each_sort_of_model_is_asked_in_its_own_way(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, value, liked = (scorer(tiny_path, tmp_path / f"{i}", i, i == 2) for i in (1, 2, 3))
    guide = Guide({"steps": steps, "value": value}, {"liked": liked}, Rewards({}, {}), {},
                  "\n\n", False)  # fmt: skip
    texts = ["Do this.", "Do that.", "Or so."]
    places = [(i, t) for i in range(2) for t in texts]
    answers = [Answer("q", steps=["First."]), Answer("q")]
    found = [(answers[i], Candidate(Way(ids=(n,)), t)) for n, (i, t) in enumerate(places)]
    whole = ["\n\n".join([*answers[i].steps, t]) for i, t in places]
    writer = object.__new__(Writer)
    monkeypatch.setattr(Writer, "text", lambda self, ids: whole[ids[0]])
    rows: list[Row] = [
        {"prompt": "q", "completion": text, "finished": False, "steps": [*answers[i].steps, t]}
        for text, (i, t) in zip(whole, places, strict=True)
    ]
    want = [
        [1 / (1 + math.exp(-s[-1])) for s in step_scores(steps, rows, "\n\n")],
        [s[-1] for s in step_scores(value, rows, "\n\n")],
        [1 / (1 + math.exp(-s)) for s in score_model(liked, rows)],
    ]
    for term, values in zip(guide.terms(rows).values(), want, strict=True):
        assert term == pytest.approx(values, abs=1e-5)
    assert min(want[1]) < 0  # no sigmoid for a value model
    each = [sum(v) / 3 for v in zip(*want, strict=True)]
    assert guide.values(writer, found) == pytest.approx(each, abs=1e-5)
    # Each term to one scale among the candidates for the step of one answer.
    level = Guide(guide.models, guide.outcome_models, guide.rewards, {}, "\n\n", True)
    made = level.values(writer, found)
    for at in (slice(0, 3), slice(3, 6)):
        scaled = [
            [(v - sum(t[at]) / 3) / math.sqrt(sum((u - sum(t[at]) / 3) ** 2 for u in t[at]) / 3)
             for v in t[at]]
            for t in want
        ]  # fmt: skip
        assert made[at] == pytest.approx([sum(v) / 3 for v in zip(*scaled, strict=True)], abs=1e-2)


def scorer(tiny_path: Path, folder: Path, seed: int, values: bool = False) -> Model:
    head = ScoreHead(128, 128 if values else 0)
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in [head.weight] if not values else head.parameters():
            parameter.normal_(0, 0.1, generator=source)
        head.bias.fill_(-1.0 if values else 0.0)
    return head.added_to(Model.open(tiny_path), folder)


def test_models_are_held_and_faults_named(tiny_path: Path, tmp_path: Path) -> None:
    model, scores = Model.open(tiny_path), scorer(tiny_path, tmp_path / "head", 1)
    made = methods["prm_guided"](
        model, process_models={"right": scores}, candidates=2, steps=2, step_tokens=3
    )
    assert isinstance(made, Model)
    change = made.changes[-1]
    assert isinstance(change, Decoder) and change.holds == {"right": scores.key}
    whole = methods["prm_guided"](
        model, outcome_models={"liked": scores}, candidates=2, steps=2, step_tokens=3
    )
    assert isinstance(whole, Model) and whole.changes[-1].holds == {"liked": scores.key}  # type: ignore[union-attr]
    assert generate(whole, ["say a"], max_tokens=6, seed=1)[0][0].ids
    again = Model.load(made.save(tmp_path / "saved"))
    drawn = [generate(m, ["say a"], n=2, max_tokens=6, seed=1) for m in (made, again)]
    assert drawn[0] == drawn[1] and drawn[0][0][0].ids != drawn[0][0][1].ids
    for wrong, match in (
        ({"process_models": {"right": model}}, "scores no steps"),
        ({}, "nothing to tell steps apart"),
        ({"process_models": {"right": scores}, "weights": {"left": 1.0}}, "'left'"),
        ({"process_models": {"right": scores}, "weights": {"right": -1.0}}, "negative"),
        ({"process_models": {"right": scores}, "weights": {"right": 0.0}}, "all weights are 0"),
        ({"process_models": {"a": scores}, "outcome_models": {"a": scores}}, "one name"),
        ({"outcome_models": {"right": model}}, "nothing was"),
    ):
        with pytest.raises(InputError, match=match):
            prm_guided(model, **wrong)  # type: ignore[arg-type]
