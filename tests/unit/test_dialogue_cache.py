"""Turns that go on from what was read before: the same answers, and only what is new is computed.

What is expected is computed without any memory: by requests of their own, and by transformers.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from truing.core.generation import dialogue_cache, waves
from truing.core.generation.dialogue_cache import Kept, Memory, Past, reach
from truing.core.generation.prefix_cache import Reading, Shared
from truing.core.generation.prefix_levels import Level
from truing.core.sampling import Sampled, SamplingSettings, sample
from truing.core.tiny import tiny_config, tiny_model

MODULE = tiny_model()[0]
HEAD = [(11 * i + 5) % 251 + 3 for i in range(40)]  # a system message
FIRST = [HEAD + [7, 8, 9], HEAD + [7, 8, 10, 11, 12], HEAD + [200], [33] * 25, [33] * 24 + [5]]
SETTINGS = SamplingSettings(max_tokens=9, stop_ids=(2,), seed=3)


def more(row: int, turn: int) -> list[int]:
    """What is replied, of another length each time."""
    return [(31 * row + 7 * turn + 3 * i) % 250 + 3 for i in range(4 + (5 * row + turn) % 11)]


def drawn(
    prompts: Sequence[Sequence[int]], known: Past | None = None, **other: object
) -> list[Sampled]:
    how = SamplingSettings(**{**vars(SETTINGS), **other})  # type: ignore[arg-type]
    return [items[0] for items in sample(MODULE, prompts, how, past=known)]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Tokens of each pass over prompts."""
    seen: list[int] = []
    before = Shared._read

    def counted(self: Shared, *given: Any) -> Tensor:
        made = before(self, *given)
        seen.append(cast(Reading, self.reading).spans[-1][-1])
        return made

    monkeypatch.setattr(Shared, "_read", counted)
    yield seen


def plain(module: nn.Module, prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
    """log p of each of `ids`, by one plain pass of transformers."""
    with torch.no_grad():
        logp = module(torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
    return logp[len(prompt) - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize("rows", [256, 2])
def test_each_turn_is_that_of_a_request_of_its_own(
    rows: int, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waves, "ROWS_CPU", rows)  # one wave, or several of two rows
    prompts = [list(p) for p in FIRST]
    known: list[Kept | None] = [None] * len(prompts)
    before = [0] * len(prompts)
    for turn in range(5):
        alone = drawn(prompts)
        read.clear()
        told = Past(list(known))
        made = drawn(prompts, told)
        if turn:
            assert sum(read) == sum(map(len, prompts)) - sum(before)
        for prompt, a, b in zip(prompts, alone, made, strict=True):
            assert a.ids == b.ids and a.finish == b.finish
            assert b.logprobs == pytest.approx(a.logprobs, abs=1e-5)
            want = plain(MODULE, prompt, b.ids)
            assert torch.allclose(torch.tensor(b.logprobs), want, atol=1e-4)
        before = [len(p) for p in prompts]
        assert [k.ids for k in told.rows if k] == [tuple(p) for p in prompts]
        prompts = [[*p, *m.ids, *more(i, turn)] for i, (p, m) in enumerate(zip(prompts, made))]
        # One episode ends in each turn but the first, so that neighbours and order change.
        keep = [i for i in range(len(prompts)) if not turn or i != turn % len(prompts)]
        prompts, before = [prompts[i] for i in keep], [before[i] for i in keep]
        known = [told.rows[i] for i in keep]


def test_many_answers_to_one_prompt_each_go_on_from_it(read: list[int]) -> None:
    how = SamplingSettings(**{**vars(SETTINGS), "n": 3})
    told = Past([None] * 3)
    groups = sample(MODULE, FIRST[:3], how, past=told)
    rows = [[*p, *a.ids, *more(i, 0)] for i, (p, g) in enumerate(zip(FIRST, groups)) for a in g]
    again = Past([kept for kept in told.rows for _ in range(3)])
    read.clear()
    made = drawn(rows, again)
    assert sum(read) == sum(map(len, rows)) - 3 * sum(map(len, FIRST[:3]))
    for a, b in zip(drawn(rows), made, strict=True):
        assert a.ids == b.ids and b.logprobs == pytest.approx(a.logprobs, abs=1e-5)


def test_what_a_template_wrote_anew_is_computed_anew(read: list[int]) -> None:
    """As far as both begin alike; the last token of a prompt always, since it gives the logits."""
    first = [FIRST[0] + more(0, t) * 3 for t in range(4)]
    told = Past([None] * 4)
    drawn(first, told)
    at = len(FIRST[0]) + 5
    changed = [
        [*first[0][:at], 99, *first[0][at:]],  # words put into an earlier turn
        [*first[1][:at]],  # its end cut off
        list(first[2]),  # asked again
        [77, *first[3]],  # other from the start
    ]
    assert reach(told.rows, changed) == [at, at - 1, len(first[2]) - 1, 0]
    alone = drawn(changed)
    read.clear()
    made = drawn(changed, told)
    assert sum(read) == (len(changed[0]) - at) + 1 + 1 + len(changed[3])
    for a, b in zip(alone, made, strict=True):
        assert a.ids == b.ids and b.logprobs == pytest.approx(a.logprobs, abs=1e-5)
    # What was known wrongly is known rightly now.
    grown = [[*p, 5, 6, 7] for p in changed]
    for a, b in zip(drawn(grown), drawn(grown, told), strict=True):
        assert a.ids == b.ids and b.logprobs == pytest.approx(a.logprobs, abs=1e-5)


def asked(memory: Memory, prompts: dict[int, list[int]], *, again: bool = False) -> list[Sampled]:
    """A turn of these rows through a memory."""
    rows, names = list(prompts.values()), [(n,) for n in prompts]
    if again:
        memory.again(lambda told: drawn(rows, told), names)
        return []
    return memory.ask(lambda told: drawn(rows, told), names)


def conversation(memory: Memory, turns: int = 4) -> list[dict[int, list[int]]]:
    """The prompts of each turn, and in the end what was drawn in the last one."""
    prompts = {i: list(p) for i, p in enumerate(FIRST)}
    every: list[dict[int, list[int]]] = []
    for turn in range(turns):
        memory.only(prompts)
        made = asked(memory, prompts)
        every.append(prompts)
        rows = zip(prompts.items(), made, strict=True)
        prompts = {i: [*p, *m.ids, *more(i, turn)] for (i, p), m in rows if i != turn}
    return every


def test_a_resumed_run_makes_the_same_bits() -> None:
    every = conversation(Memory(2**40))
    whole, cut = Memory(2**40), Memory(2**40)
    for prompts in every[:-1]:
        whole.only(prompts)
        asked(whole, prompts)
        cut.only(prompts)
        asked(cut, prompts, again=True)
    assert cut.size == 0  # nothing is read before it is needed
    for memory in (whole, cut):
        memory.only(every[-1])
    one, two = asked(whole, every[-1]), asked(cut, every[-1])
    assert one == two and [s.logprobs for s in one] == [s.logprobs for s in two]
    assert cut.size == whole.size > 0


def test_a_limit_holds_and_what_has_ended_is_freed(read: list[int]) -> None:
    free = Memory(2**40)
    every = conversation(free)
    layers, heads, size = 6, 2, 32
    longest = max(map(len, every[-1].values()))
    assert free.size <= 2 * 4 * layers * heads * size * len(every[-1]) * longest
    levels = [weakref.ref(v) for k in free._kept.values() for v, _ in k.parts]
    free.only([])
    gc.collect()
    assert free.size == 0 and levels and not any(r() for r in levels)
    none = Memory(0)
    read.clear()
    assert conversation(none) == every and none.size == 0
    assert sum(read) >= sum(len(p) for prompts in every for p in prompts.values()) - 40 * 9
    # A request that has no room leaves what others have kept.
    some = Memory(2**40)
    asked(some, {0: FIRST[0]})
    held = some.size
    some.limit = held
    asked(some, {1: FIRST[1] * 3})
    assert some.size == held and list(some._kept) == [0]


@pytest.mark.parametrize("draw", [True, False])
def test_a_limit_holds_while_a_request_runs(draw: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most one wave's keys and values are there beside what may be kept."""
    monkeypatch.setattr(waves, "ROWS_CPU", 4)
    there: weakref.WeakSet[Level] = weakref.WeakSet()
    peak = [0]
    before = Level.take

    def counted(self: Level, layer: int, node: int, key_GTD: Tensor, value_GTD: Tensor) -> None:
        before(self, layer, node, key_GTD, value_GTD)
        there.add(self)
        peak[0] = max(peak[0], sum(t.nbytes for v in there for t in (*v.key, *v.value)))

    monkeypatch.setattr(Level, "take", counted)
    prompts = {i: [(7 * i + 3 * j) % 250 + 3 for j in range(30 + i // 4)] for i in range(16)}
    wave = 2 * 4 * 3 * 2 * 32 * 4 * 33  # layers, heads and their size, rows of the longest prompt

    def peak_of(memory: Memory) -> int:
        gc.collect()
        there.clear()
        peak[0] = 0
        asked(memory, prompts, again=not draw)
        if not draw:  # it is read with the next request
            asked(memory, {-1: FIRST[0]})
        return peak[0]

    assert peak_of(Memory(2**40)) > 3 * 2 * 4 * 3 * 2 * 32 * 4 * 30
    for limit in (0, 2 * wave):
        memory = Memory(limit)
        assert peak_of(memory) <= limit + wave and memory.size <= limit
        assert memory.size > limit - wave
        # Rows that are asked again take the place of what they were, of whichever wave.
        prompts = {i: [*p, 9] for i, p in prompts.items()}
        wave += 2 * 4 * 6 * 2 * 32 * 4
        assert peak_of(memory) <= limit + wave and memory.size <= limit


def test_nothing_is_asked_to_be_kept_where_nothing_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Past, "take", lambda *_: pytest.fail("kept"))
    memory = Memory(0)
    asked(memory, {0: FIRST[0]}, again=True)
    assert asked(memory, {1: FIRST[1]}) == drawn([FIRST[1]])


def test_memory_known_by_wrong_names_does_no_harm() -> None:
    memory = Memory(2**40)
    asked(memory, {0: FIRST[0], 1: FIRST[3]})
    rows = {0: FIRST[3] + [9, 9], 1: FIRST[0] + [9, 9]}
    for a, b in zip(drawn(list(rows.values())), asked(memory, rows), strict=True):
        assert a.ids == b.ids and b.logprobs == pytest.approx(a.logprobs, abs=1e-5)


def test_architectures_that_keep_nothing() -> None:
    """Windows that rows outgrow, and position codes that change with a row's length."""
    config = tiny_config()
    config.rope_parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    stretched, windowed = LlamaForCausalLM(config).eval(), tiny_model()[0]
    windowed.config.sliding_window = 16
    for module in (stretched, windowed):
        told = Past([None] * 2)
        made = sample(module, FIRST[:2], SETTINGS, past=told)
        assert told.rows == [None, None]
        rows = [[*p, *m[0].ids, 9] for p, m in zip(FIRST, made)]
        assert sample(module, rows, SETTINGS, past=told) == sample(module, rows, SETTINGS)


def test_room_is_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("truing.doctor.memory_gib", lambda: (16.0, 8.0))
    assert dialogue_cache.room() == 2 * 2**30
    monkeypatch.setattr("truing.doctor.memory_gib", lambda: (0.0, 0.0))
    assert dialogue_cache.room() == dialogue_cache.UNKNOWN
