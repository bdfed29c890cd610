"""DeAL: the search on hand-made probabilities, and against a beam search written out here."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path as File
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from truing.changes import Prefix
from truing.context import Context, use
from truing.core.chat import Prompt, prompt_ids
from truing.core.drawing import Completion, Local
from truing.core.generate import generate
from truing.core.generation.prefix_cache import common_start
from truing.core.generation.search import Path, Scored, Writer, enough, fill, top
from truing.core.sampling import SamplingSettings
from truing.decode import deal, deal_segments
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.principles import Principle, Principles
from truing.specify import texts
from truing.tables import Row

PROMPTS = ["What is red?", "Say why.", "Name it."]
WORDS = ["a ", "b ", "goal "]
# P(next | last); row -1 is the start. Token 2 is the word that must appear.
TABLE = {
    -1: [0.60, 0.38, 0.02],
    0: [0.90, 0.08, 0.02],
    1: [0.10, 0.10, 0.80],
    2: [0.05, 0.90, 0.05],
}
MODEL = cast(Model, SimpleNamespace(name="toy"))
GOAL: dict[str, dict[str, object]] = {"goal": {"use": "must_include", "words": ["goal"]}}


class Toy:
    """A language of three tokens without an end, by hand-made probabilities."""

    local = True

    def __init__(self) -> None:
        self.held: dict[str, object] = {}

    def __call__(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingSettings,
        *,
        begun: Sequence[Sequence[int]] | None = None,
    ) -> list[list[Completion]]:
        made: list[list[Completion]] = []
        for start in begun or [()] * len(prompts):
            ids = list(start)
            for _ in range(sampling.max_tokens):
                row = TABLE[ids[-1] if ids else -1]
                ids.append(row.index(max(row)))
            new = tuple(ids[len(start) :])
            made.append([Completion(self.text(new), new, (), "length", len(new))] * sampling.n)
        return made

    def next_tokens(
        self, prompts: Sequence[Prompt], begun: Sequence[Sequence[int]], k: int
    ) -> list[list[tuple[int, float]]]:
        rows = [TABLE[ids[-1] if ids else -1] for ids in begun]
        order = [sorted(range(3), key=lambda t, r=r: -r[t])[:k] for r in rows]
        return [[(t, math.log(r[t])) for t in o] for r, o in zip(rows, order, strict=True)]

    def text(self, ids: Sequence[int]) -> str:
        return "".join(WORDS[i] for i in ids)


def toy(tokens: int = 3, n: int = 1, **settings: object) -> list[Completion]:
    sampling = SamplingSettings(n=n, max_tokens=tokens, stop_ids=())
    plain = {"beams": 1, "candidates": 2, "lookahead": 0, "rewards": GOAL}
    return deal.draw(Toy(), MODEL, ["?"], sampling, **{**plain, **settings})[0]  # type: ignore[arg-type]


def test_look_ahead_finds_what_greedy_misses() -> None:
    assert toy(weight=0.0)[0].ids == (0, 0, 0)
    assert toy(lookahead=0)[0].ids == (0, 0, 0)  # the goal is never among the two likeliest
    found = toy(lookahead=2, weight=4.0)[0]
    assert found.ids[:2] == (1, 2) and found.text == "b goal b "
    assert found.logprobs == pytest.approx([math.log(p) for p in (0.38, 0.80, 0.90)])
    assert toy(lookahead=-1, weight=4.0)[0].ids == found.ids


def test_tokens_ahead_are_no_part_of_the_answer() -> None:
    assert toy(tokens=1, lookahead=9)[0].ids == (0,)  # nothing is left to look ahead to
    assert len(toy(tokens=2, lookahead=9, weight=4.0)[0].ids) == 2


def test_large_weight_takes_the_reward_among_the_likeliest() -> None:
    assert toy(candidates=3, weight=1e6)[0].ids[0] == 2
    assert toy(candidates=2, weight=1e6)[0].ids[0] != 2


def test_score_is_linear_in_the_weights() -> None:
    assert deal.score(-3.0, 4, 0.5, 2.0, False) == pytest.approx(-2.0)
    assert deal.score(-3.0, 4, 0.5, 2.0, True) == pytest.approx(0.25)
    # The goal is worth its weight: log .38 + w > log .60 from w = log(.60 / .38) on.
    turn = math.log(0.60 / 0.38)
    half = {"goal": 0.5}
    assert toy(tokens=3, lookahead=2, weight=turn - 0.01)[0].ids[0] == 0
    assert toy(tokens=3, lookahead=2, weight=turn + 0.01)[0].ids[0] == 1
    assert toy(lookahead=2, weight=2 * turn - 0.01, weights=half)[0].ids[0] == 0
    assert toy(lookahead=2, weight=2 * turn + 0.01, weights=half)[0].ids[0] == 1


def test_constant_reward_is_no_reward() -> None:
    constant: dict[str, dict[str, object]] = {"any": {"use": "max_words", "n": 99}}
    for beams in (1, 2):
        plain = toy(beams=beams, n=beams, weight=0.0, candidates=3)
        assert toy(beams=beams, n=beams, weight=5.0, rewards=constant, candidates=3) == plain


def test_select_by_reward() -> None:
    low = toy(beams=3, candidates=3, weight=0.1)[0]
    assert "goal" not in low.text
    assert "goal" in toy(beams=3, candidates=3, weight=0.1, select="reward")[0].text


def test_whole_answers_are_rewarded_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is on topic counts for a whole answer, and is not asked of a beginning."""
    asked: list[str] = []

    def relevance(rows: list[Row]) -> list[float]:
        asked.extend(str(r["completion"]) for r in rows)
        return [float("goal" in str(r["completion"])) for r in rows]

    monkeypatch.setattr(texts, "relevance", relevance)
    base = Toy()
    calm = Principle("calm", "Be calm.", check={"use": "no_exclamation"})
    base.held["principles"] = Principles([calm])

    def found(beams: int, candidates: int, **settings: object) -> tuple[int, ...]:
        sampling = SamplingSettings(max_tokens=3, stop_ids=())
        made = deal.draw(
            base, MODEL, ["?"], sampling, beams=beams, candidates=candidates, **settings
        )  # type: ignore[arg-type]
        return made[0][0].ids

    assert found(1, 2, lookahead=2, weight=4.0) == (0, 0, 0) and not asked
    assert found(1, 2, lookahead=-1, weight=4.0)[:2] == (1, 2) and "b goal b" in asked
    asked.clear()
    assert found(3, 3, lookahead=0, weight=0.1) == (0, 0, 0) and not asked
    # Of the three that are kept, "a a a", "b goal b" and "a a b", one is on topic.
    assert found(3, 3, lookahead=0, weight=0.1, select="reward") == (1, 2, 1)
    assert sorted(asked) == ["a a a", "a a b", "b goal b"]


def test_a_penalty_that_a_search_cannot_keep_is_refused() -> None:
    sampling = SamplingSettings(max_tokens=2, stop_ids=(), repetition_penalty=1.2)
    for draw, fix in ((deal.draw, "no_repetition"), (deal_segments.draw, "propose")):
        with pytest.raises(InputError, match="repetition_penalty") as error:
            draw(Toy(), MODEL, ["?"], sampling, rewards=GOAL)
        assert error.value.seen == 1.2 and fix in error.value.fix
    drawn = deal_segments.draw(Toy(), MODEL, ["?"], sampling, propose="draw", proposals=1)
    assert drawn[0][0].ids == (0, 0)  # as the model draws them under the penalty


def test_kept_set_is_independent_of_order_and_ties_go_by_token() -> None:
    paths = [Scored(s, Path((t,), (0.0,))) for s, t in ((1.0, 7), (2.0, 9), (1.0, 3), (2.0, 4))]
    for seed in range(4):
        mixed = random.Random(seed).sample(paths, len(paths))
        assert [s.path.ids[0] for s in top(mixed, 3)] == [4, 9, 3]


def test_cost_is_counted() -> None:
    with use(Context()) as context:
        toy(tokens=4, beams=2, candidates=3, lookahead=2)
    facts = context.metrics[-1]
    # Steps begin with 1, 2, 2, 2 beams; look-ahead is 2, 2, 1, 0 tokens of 3 candidates each.
    assert facts["extended"] == 7
    assert facts["tokens_ahead"] == 3 * (1 * 2 + 2 * 2 + 2 * 1)


def test_stop_texts_end_a_path_and_are_cut() -> None:
    sampling = SamplingSettings(max_tokens=5, stop=("goal",), stop_ids=())
    writer = Writer(Toy(), MODEL, sampling)
    (grown,) = writer.expand(["?"], [Path((1,), (-1.0,))], 2)
    assert [(p.ids, p.ended) for p in grown] == [((1, 2), True), ((1, 0), False)]
    made = writer.completion(grown[0])
    assert (made.text, made.finish, made.tokens) == ("b ", "stop", 2)
    assert writer.ahead(["?"], [grown[0]], 3) == [("b ", True)]


def test_end_tokens_wait_for_the_least_length() -> None:
    writer = Writer(Toy(), MODEL, SamplingSettings(max_tokens=5, min_tokens=1, stop_ids=(0,)))
    (grown,) = writer.expand(["?"], [Path()], 2)
    assert [p.ids for p in grown] == [(1,), (2,)]
    (grown,) = writer.expand(["?"], [Path((1,), (-1.0,))], 3)
    assert [p.ended for p in grown if p.ids[-1] == 0] == [True]


def test_the_look_ahead_keeps_the_least_length(tiny_path: File) -> None:
    model = Model.open(tiny_path)
    ids = generate(model, PROMPTS[:1], max_tokens=2, greedy=True)[0][0].ids
    sampling = SamplingSettings(max_tokens=8, min_tokens=4, stop_ids=(ids[1],))
    writer = Writer(Local(model, None), model, sampling)
    start = Path(ids[:1], (0.0,))
    ((text, ended),) = writer.ahead(PROMPTS[:1], [start], 3)
    assert not ended and text != writer.text(ids[:1])  # the likeliest next token would end it
    assert writer.cost["ahead"] == 3
    free = Writer(Local(model, None), model, replace(sampling, min_tokens=1))
    assert free.ahead(PROMPTS[:1], [start], 3) == [(writer.text(ids[:1]), True)]


def beam_search(
    module: torch.nn.Module, head: list[int], ends: set[int], width: int, tokens: int
) -> list[int]:
    """Ordinary beam search by whole forward passes; finished beams stay in competition."""
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(tokens):
        rivals = [b for b in beams if b[1] and b[1][-1] in ends]
        for total, ids in beams:
            if ids and ids[-1] in ends:
                continue
            with torch.no_grad():
                logits = module(torch.tensor([head + ids])).logits[0, -1]
            logp = torch.log_softmax(logits.double(), -1)
            rivals += [(total + float(v), [*ids, int(t)]) for v, t in zip(*logp.topk(width))]
        beams = sorted(rivals, key=lambda b: -b[0])[:width]
    return beams[0][1]


@pytest.mark.parametrize("width", [1, 3])
def test_without_reward_it_is_beam_search(tiny_path: File, width: int) -> None:
    model = Model.open(tiny_path)
    decoded = methods["deal"](model, beams=width, candidates=width)
    segments = methods["deal_segments"](
        model, proposals=width, keep_best=1, lookahead=5, iterations=1
    )
    assert isinstance(decoded, Model) and isinstance(segments, Model)
    loaded = model.load_module()
    made = [generate(m, PROMPTS, max_tokens=5) for m in (decoded, segments)]
    for i, prompt in enumerate(PROMPTS):
        head = prompt_ids(loaded.tokenizer, prompt)
        expected = beam_search(loaded.module, head, {2}, width, 5)
        assert [list(m[i][0].ids) for m in made] == [expected, expected]


def test_one_round_of_drawn_segments_is_best_of_n(tiny_path: File) -> None:
    model = Model.open(tiny_path)
    refs: dict[str, dict[str, object]] = {"short": {"use": "max_words", "n": 1}}
    best = methods["best_of_n"](model, n=4, rewards=refs)
    segments = methods["deal_segments"](
        model, proposals=4, lookahead=6, iterations=1, propose="draw", rewards=refs
    )
    assert isinstance(best, Model) and isinstance(segments, Model)
    made = [generate(m, PROMPTS, max_tokens=6, seed=2) for m in (best, segments)]
    assert [[c.ids for c in items] for items in made[0]] == [
        [c.ids for c in items] for items in made[1]
    ]


def test_segments_commit_and_the_best_seen_wins() -> None:
    sampling = SamplingSettings(max_tokens=6, stop_ids=())
    settings = {"proposals": 3, "keep_best": 2, "lookahead": 2, "rewards": GOAL}
    found = deal_segments.draw(Toy(), MODEL, ["?"], sampling, **settings)[0][0]  # type: ignore[arg-type]
    # "b goal" of the first round scores 1; later rounds are no better, so it is the answer.
    assert found.ids == (1, 2) and found.finish == "length"
    one = deal_segments.draw(Toy(), MODEL, ["?"], sampling, proposals=1, lookahead=2)[0][0]
    assert one.ids == (0, 0, 0, 0, 0, 0)  # without rewards the last round decides


def test_segments_keep_equal_scores_in_order_of_proposal() -> None:
    paths = [Scored(1.0, Path((t,), (0.0,))) for t in (7, 3, 9, 3)]
    assert [s.path.ids[0] for s in deal_segments.keep(paths, 3)] == [7, 3, 9]


def test_alignment_prompt_is_put_first(tiny_path: File) -> None:
    made = methods["deal"](Model.open(tiny_path), prompt="Be kind.", rewards=GOAL)
    assert isinstance(made, Model)
    assert [c.kind for c in made.changes] == ["prefix", "decoder"]
    prefix = made.changes[0]
    assert isinstance(prefix, Prefix)
    assert list(prefix.messages) == [{"role": "system", "content": "Be kind."}]


def test_faults_are_named(tiny_path: File) -> None:
    model = Model.open(tiny_path)
    with pytest.raises(InputError, match="Set beams to 2 or more"):
        enough(1, 2, "beams", "decode/deal")
    with pytest.raises(InputError, match="setting 'beams'"):
        methods["deal"](model, beams=0)
    with pytest.raises(InputError, match="setting 'lookahead'"):
        methods["deal_segments"](model, lookahead=0)
    served = methods["deal"](Model.open("http://127.0.0.1:1/v1#m"), rewards=GOAL)
    with pytest.raises(InputError, match="does not show"):
        generate(cast(Model, served), ["?"])
    assert fill([Completion("a")], 2) == [Completion("a")] * 2


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("deal", {"beams": 2, "candidates": 3, "lookahead": 2}),
        ("deal_segments", {"proposals": 2, "keep_best": 2, "lookahead": 3, "iterations": 2}),
    ],
)
def test_beginnings_are_read_once(
    name: str, settings: dict[str, object], tiny_path: File, tmp_path: File
) -> None:
    """The same answers as where every step reads them anew, from a part of the positions."""
    letters = {"letters": {"use": "share_of", "letters": "abcdefghijklmnop"}}
    computed: list[int] = []

    def answers(folder: str) -> list[Completion]:
        model = Model.open(tiny_path)
        made = methods[name](model, rewards=letters, **settings)
        assert isinstance(made, Model)
        seen: list[int] = []

        def count(_: object, __: object, named: dict[str, torch.Tensor]) -> None:
            seen.append(named["input_ids"].numel())

        handle = made.load_module().module.register_forward_pre_hook(count, with_kwargs=True)
        with use(Context(folder=tmp_path / folder)):
            found = generate(made, PROMPTS, max_tokens=6)
        handle.remove()
        computed.append(sum(seen))
        return [items[0] for items in found]

    kept = answers("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deal, "remembering", lambda _: nullcontext())
        patch.setattr(deal_segments, "remembering", lambda _: nullcontext())
        anew = answers("anew")
    assert [c.ids for c in kept] == [c.ids for c in anew]
    for a, b in zip(kept, anew, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert 0 < computed[0] < 0.5 * computed[1]


def test_segments_go_on_from_what_was_read(tiny_path: File, tmp_path: File) -> None:
    """Each prompt is read once, then the newest token of each beginning, over all segments."""
    refs: dict[str, dict[str, object]] = {"letters": {"use": "share_of", "letters": "abcdefgh"}}
    made = methods["deal_segments"](
        Model.open(tiny_path), rewards=refs, proposals=3, keep_best=2, lookahead=2, iterations=3
    )
    assert isinstance(made, Model)
    generate(made, PROMPTS[:1], max_tokens=1)  # whether the architecture fits is known by then
    loaded, seen = made.load_module(), list[int]()

    def count(_: object, __: object, named: dict[str, torch.Tensor]) -> None:
        seen.append(named["input_ids"].numel())

    handle = loaded.module.register_forward_pre_hook(count, with_kwargs=True)
    with use(Context(folder=tmp_path)) as context:
        generate(made, PROMPTS, max_tokens=6)
    handle.remove()
    heads = [prompt_ids(loaded.tokenizer, p) for p in PROMPTS]
    prompts = sum(map(len, heads)) - (len(heads) - 1) * common_start(heads)
    extended = cast(int, context.metrics[-1]["extended"])
    assert extended > 3 * len(PROMPTS) and sum(seen) == prompts + extended - len(PROMPTS)
