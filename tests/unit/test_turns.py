"""Several turns: rows that begin alike, dialogues and pairs of them, environments in the loop.

What is expected is computed by transformers alone on padded rows, whose texts are written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from any_tree import nodes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import LlamaForCausalLM

from truing.context import Context, Journal, Json, use
from truing.core import tree
from truing.core.batch.reading import read_units
from truing.core.batch.row_kinds import as_kind
from truing.core.chat import example_ids, prompt_ids, receipt, reply_ids
from truing.core.generation.prefix_cache import Reading, Shared
from truing.core.objective import Measurements, objective_of
from truing.core.online import placed
from truing.core.play import episodes
from truing.core.reference import Reference
from truing.core.rl import collect, train_online
from truing.core.rl.answers import Group
from truing.core.rl.online_task import OnlineTask
from truing.core.rollout import Observation, Step
from truing.core.tiny import tiny_model, tiny_tokenizer
from truing.core.trainer.text_task import TextTask
from truing.core.training import HOOKS, Hook
from truing.core.tree import Node, fork, group_tree, pack, split
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.tables import Row, Table
from truing.train.preference.dpo import dpo
from truing.train.preference.tpo import tpo
from truing.train.supervised.sft import neftune, sft

TOKENIZER = tiny_tokenizer()
HEAD, END = "<|im_start|>{}\n", "<|im_end|>"


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


# By hand: texts, padded rows, and which of their tokens an assistant said


def talk(*said: str) -> list[dict[str, str]]:
    """Words of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": s} for i, s in enumerate(said)]


def written(messages: Sequence[dict[str, str]]) -> str:
    return "".join(HEAD.format(m["role"]) + m["content"] + END + "\n" for m in messages)


def by_hand(messages: Sequence[dict[str, str]], first: int = 0) -> tuple[list[int], list[bool]]:
    """Ids of the whole text up to its last end, and the tokens of answer `first` and later ones."""
    text = written(messages).removesuffix("\n")
    spans = [m.span(1) for m in re.finditer(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", text)]
    made = TOKENIZER(text, return_offsets_mapping=True, add_special_tokens=False)
    loss = [any(a <= s and e <= b for a, b in spans[first:]) for s, e in made["offset_mapping"]]
    return made["input_ids"], loss


def padded(module: nn.Module, rows: Sequence[Sequence[int]]) -> Tensor:
    """log p of each token but the first, [B, T - 1], by transformers alone."""
    width = max(map(len, rows))
    ids = torch.tensor([[*r, *[0] * (width - len(r))] for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    logp = module(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    return logp.gather(2, ids[:, 1:, None])[..., 0]


def stock(model: Model) -> LlamaForCausalLM:
    """The model as transformers reads it."""
    return LlamaForCausalLM.from_pretrained(model.folder).eval()


def marks(rows: Sequence[Sequence[bool]]) -> Tensor:
    """Loss marks of each token but the first, [B, T - 1]."""
    width = max(map(len, rows))
    return torch.tensor([[*r, *[False] * (width - len(r))] for r in rows])[:, 1:].float()


def close(got: dict[str, Tensor], module: nn.Module) -> None:
    """The gradients are those that the module has, to 1e-5 of the largest."""
    want = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    assert set(got) == set(want) and len(want) > 25
    for name, grad in want.items():
        assert torch.allclose(got[name], grad, atol=1e-5 * float(grad.abs().max()) + 1e-8), name


# Rows that begin alike

node = nodes(ids=3, length=5, leaves=6)


@settings(derandomize=True, database=None, max_examples=150, deadline=None)
@given(st.lists(node, min_size=1, max_size=5), st.integers(1, 60), st.sampled_from([1, 3]))
def test_each_row_is_whole_and_what_is_alike_is_there_once(
    trees: list[Node], budget: int, least: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree, "COMMON", least)
        patch.setattr(tree, "ROOT", 10**9)
        packs = pack(trees, budget, share=True)
    assert sum(map(len, packs)) == len(trees)
    left = iter(trees)
    for packed in packs:
        here = [next(left) for _ in range(len(packed))]
        rows = [row for t in here for row in t.rows()]
        assert len(packed.ids_N) <= budget or len(here) == 1
        if least == 1:
            known = {ids[:i] for ids, _ in rows for i in range(1, len(ids) + 1)}
            assert len(packed.ids_N) == len(known)
        assert packed.longest == max(t.longest for t in here)
        assert len(set(packed.place_M.tolist())) == len(packed.place_M)  # each scored once
        for u, one in enumerate(here):
            for k, (ids, loss) in enumerate(one.rows()):
                end = int(packed.ends_UK[u, k])
                (own,) = [s for s in packed.segments if s.start <= end < s.stop]
                places = [i for a, b in own.before for i in range(a, b)]
                places += range(own.start, end + 1)
                assert packed.ids_N[places].tolist() == list(ids)
                assert packed.positions_N[places].tolist() == list(range(len(ids)))
                wanted = [i for i, mark in enumerate(loss) if mark and i]
                found = packed.index_UKT[u, k][packed.mask_UKT[u, k] > 0]
                assert packed.place_M[found].tolist() == [places[i] for i in wanted]
                assert packed.source_M[found].tolist() == [places[i - 1] for i in wanted]
                assert packed.target_M[found].tolist() == [ids[i] for i in wanted]


def test_sharing_is_asked_for_and_must_be_worth_it() -> None:
    one, two = group_tree(range(40), [[1] * 20]), group_tree([*range(39), 99], [[2] * 20])
    assert len(pack([one, two])[0].ids_N) == 120
    (packed,) = pack([one, two], share=True)
    assert len(packed.ids_N) == 120 - 39 and len(packed.segments) == 2
    few = group_tree([*range(7), 99, 98], [[1] * 20])
    assert len(pack([one, few], share=True)[0].ids_N) == 60 + 29  # seven tokens are not
    # A root with ancestors is read by a slower kernel on a GPU: a quarter of it, or none, is there.
    much, little = (group_tree([*range(n), *[99] * (40 - n)], [[2] * 20]) for n in (10, 9))
    for there, on_cpu, on_gpu in ((much, 110, 110), (little, 111, 120)):
        for device, size in (("cpu", on_cpu), ("cuda", on_gpu)):
            assert len(pack([one, there], share=True, device=device)[0].ids_N) == size
    alike = group_tree([5], [[1] * 9 + [2], [1] * 9 + [3], [1] * 9])
    assert len(pack([alike], share=True)[0].ids_N) == 1 + 9 + 2
    # Micro-batches take as many rows as fit with what they share counted once.
    rows = [group_tree(range(40), [[i] * 10]) for i in range(4)]
    assert [len(p) for p in pack(rows, 80)] == [1, 1, 1, 1]
    assert [len(p) for p in pack(rows, 80, share=True)] == [4]
    assert split([50] * 4, 80, [0, 40, 40, 40]) == [[0, 1, 2, 3]]


def test_forks() -> None:
    made = fork([([1, 2, 3], [False, True, True]), ([1, 2, 4], [False, True, True])])
    assert made == Node((1, 2), (False, True), (Node((3,), (True,)), Node((4,), (True,))))
    apart = fork([([1, 2, 3], [False, True, True]), ([1, 2], [False, False])])
    assert [ids for ids, _ in apart.rows()] == [(1, 2, 3), (1, 2)]
    assert [loss for _, loss in apart.rows()] == [(False, True, True), (False, False)]
    with pytest.raises(InputError, match="begin alike"):
        fork([([1, 2], [False, True]), ([2, 2], [False, True])])


# Dialogues

FIRST = talk("What is it?", "A stone, I think.", "Which one?", "The grey one there.")
DIALOGUES = [
    [*FIRST, *talk("Why?", "It is heavy.")],
    [*FIRST, *talk("Whose is it?", "Mine.", "Since when?", "Since noon.")],
    [*FIRST[:2], *talk("No!", "Then I was wrong.")],
    talk("Something else: rain?", "No rain."),
]


def task_of(model: Model, function: object, rows: list[Row], budget: int = 10_000) -> TextTask:
    spec = objective_of(function)
    loaded = model.load_module(fresh=True)
    units, _ = read_units(spec, loaded, Table("", rows), 2048)
    own = {n: p.default for n, p in spec.settings.items()}
    reference = Reference(model.weights_key, "float32")
    task = TextTask(spec, own, Hook(), units, loaded.module, reference, budget=budget)
    if spec.with_reference:
        task.measure_reference(loaded.module, [range(len(units))])
        moved(loaded.module)
    return task


def moved(module: nn.Module) -> nn.Module:
    source = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=source))
    return module


def stepped(task: TextTask | OnlineTask, rows: Sequence[int]) -> tuple[float, dict[str, Tensor]]:
    loss = weight = 0.0
    for part in task.parts(rows, 0):
        part.loss.backward()
        loss, weight = loss + float(part.loss.detach()), weight + float(part.weight)
    named = task.trained().items()
    return loss / weight, {n: p.grad / weight for n, p in named if p.grad is not None}


@pytest.mark.parametrize("budget", [1, 200, 10_000])
def test_dialogues_that_part_are_exact_and_computed_once(model: Model, budget: int) -> None:
    task = task_of(model, sft, [{"messages": d} for d in DIALOGUES], budget)
    ids, loss = zip(*map(by_hand, DIALOGUES), strict=True)
    module = tiny_model()[0]
    mask = marks(loss)
    want = -(padded(module, ids) * mask).sum() / mask.sum()
    want.backward()
    value, grads = stepped(task, range(len(DIALOGUES)))
    assert value == pytest.approx(float(want.detach()), rel=1e-5)
    close(grads, module)
    if budget == 10_000:
        micros = task._micro_batches(range(4), task._trees(range(4)))
        known = {tuple(row[:i]) for row in ids for i in range(1, len(row) + 1)}
        (packed,) = [m.packed for m in micros]
        assert len(packed.ids_N) < 0.65 * sum(map(len, ids))
        # The last row begins like the others too, with a tag that is not worth a segment.
        assert len(packed.ids_N) - len(known) == len("user\n") + 1


def test_the_receipt_shows_every_turn_of_the_assistant(model: Model) -> None:
    task = task_of(model, sft, [{"messages": d} for d in DIALOGUES])
    shown = receipt(TOKENIZER, [u.tree() for u in task.units], 4)
    for said in DIALOGUES:
        text = written(said).removesuffix("\n")
        for m in said:
            if m["role"] == "assistant":
                text = text.replace(m["content"] + END, f">>>{m['content']}{END}<<<")
        assert text.replace("\n", "\n  ") in shown


def test_noise_is_each_row_s_own(model: Model) -> None:
    """Rows that begin alike have tokens of their own where embeddings get noise."""
    spec = objective_of(neftune)
    task = task_of(model, neftune, [{"messages": DIALOGUES[0]}] * 2)
    task.hook = HOOKS[spec.hook]()
    (micro,) = task._micro_batches(range(2), task._trees(range(2)))
    assert len(micro.packed.ids_N) == sum(t.size for t in micro.trees)


PAIR: Row = {
    "prompt": FIRST[:3],
    "chosen": talk("x", "The grey one.", "Sure?", "Yes, quite sure.")[1:],
    "rejected": talk("x", "The grey one.", "Why?", "Because.", "Well...", "No more.")[1:],
}


@pytest.mark.parametrize("prompt", [True, False])
def test_pairs_of_dialogues_are_exact(model: Model, prompt: bool) -> None:
    """With a prompt every later turn counts; without one, those after the common messages."""
    sides = [[*FIRST[:3], *cast("list[dict[str, str]]", PAIR[n])] for n in ("chosen", "rejected")]
    row = PAIR if prompt else dict(zip(("chosen", "rejected"), sides, strict=True))
    plain: Row = {"prompt": "a?", "chosen": "b", "rejected": "c"}
    table = Table("", [row])
    assert table.kind == "dialogue_pair"
    ids, loss = zip(*(by_hand(s, 1 if prompt else 2) for s in sides), strict=True)
    module, old = moved(tiny_model()[0]), tiny_model()[0]
    mask = marks(loss)
    with torch.no_grad():
        ref = (padded(old, ids) * mask).sum(1)
    gap = (padded(module, ids) * mask).sum(1) - ref
    want = -logsigmoid(0.1 * (gap[0] - gap[1]))
    want.backward()
    task = task_of(model, dpo, [row])
    (tree_of,) = task._trees([0])
    assert tree_of.size < sum(map(len, ids)) - len(by_hand(FIRST[:2])[0])
    assert [list(r) for r, _ in tree_of.rows()] == list(ids)
    value, grads = stepped(task, [0])
    assert value == pytest.approx(float(want.detach()), rel=1e-5)
    close(grads, module)
    assert task_of(model, dpo, [plain]).units[0].dialogue is None


def test_pairs_of_dialogues_that_cannot_be_used(model: Model) -> None:
    same = {**PAIR, "rejected": PAIR["chosen"]}
    empty = {**PAIR, "rejected": talk("x", " ")[1:]}
    asks = {**PAIR, "rejected": talk("x", "y", "z")[1:]}
    with pytest.raises(InputError, match="left_out_same"):
        task_of(model, dpo, [same])
    with pytest.raises(InputError, match="left_out_empty"):
        task_of(model, dpo, [empty])
    with pytest.raises(InputError, match=r"row 1.*ends with a message of the assistant"):
        task_of(model, dpo, [asks])
    with pytest.raises(InputError, match=r"tpo needs single answers, not dialogues"):
        task_of(model, tpo, [{**PAIR, "gold": "x"}])
    with pytest.raises(InputError, match=r"row 2: field 'rejected' must be a list"):
        Table("", [PAIR, {**PAIR, "rejected": ["no"]}])
    with pytest.raises(InputError, match="table row 1: needs single answers, not dialogues"):
        Table("", [PAIR]).expect("pair")
    rows, notes = as_kind(Table("", [PAIR]), "example", "x")
    assert rows[0]["messages"] == [*FIRST[:3], *cast("list[object]", PAIR["chosen"])]
    assert notes == {"conversion": "chosen dialogues as examples"}


def test_replies_continue_a_row_as_a_dialogue_is_tokenised() -> None:
    whole, _ = example_ids(TOKENIZER, DIALOGUES[1])
    ids = prompt_ids(TOKENIZER, DIALOGUES[1][:1])
    for i in range(1, len(DIALOGUES[1]), 2):
        answer = TOKENIZER(DIALOGUES[1][i]["content"] + END, add_special_tokens=False)["input_ids"]
        ids += answer
        if i + 1 < len(DIALOGUES[1]):
            ids += reply_ids(TOKENIZER, DIALOGUES[1][: i + 2], answer)
    assert ids == whole
    cut = reply_ids(TOKENIZER, FIRST[:3], answer[:-1])  # an answer without its end gets one
    assert TOKENIZER.decode(cut) == f"{END}\n" + written(FIRST[2:3]) + HEAD.format("assistant")


def test_templates_that_rewrite_earlier_turns_are_refused() -> None:
    other = tiny_tokenizer()
    words = "message['content']"
    other.chat_template = str(other.chat_template).replace(
        words, f"({words} if loop.last or message['role'] == 'user' else '...')"
    )
    with pytest.raises(InputError, match="rewrites earlier turns"):
        reply_ids(other, FIRST[:3], [2])


# Environments


class Game:
    """Tells how long the last answer was; pays for letters a to m, a little more each turn."""

    def __init__(self, turns: int = 3, pay: Callable[[str, int], float] | None = None) -> None:
        self.turns, self.pay = turns, pay or letters
        self.said: list[str] = []
        self.name = ""

    def reset(self, seed: int, task: Row) -> Observation:
        self.said, self.name = [], str(task["name"])
        return Observation(f"Tell me of {self.name}.", system="Be brief.")

    def step(self, action: Json) -> Step:
        self.said.append(str(action))
        n = len(self.said)
        told = f"That makes {n} of {self.turns} on {self.name}: go on."
        return Step(Observation(told), self.pay(str(action), n), n == self.turns)

    def snapshot(self) -> Json:
        return {"said": list(self.said), "name": self.name}

    def restore(self, snapshot: Json) -> None:
        state = cast("dict[str, object]", snapshot)
        self.said, self.name = list(cast("list[str]", state["said"])), str(state["name"])


def letters(text: str, turn: int) -> float:
    return turn * sum(c in "abcdefghijklm" for c in text) / 10


TASKS = Table("record", [{"name": n} for n in ("rain", "oak", "lime", "stone")])
SMALL: dict[str, object] = {
    "environment": Game, "steps": 1, "batch": 4, "answers": 3, "max_tokens": 6, "lr": 2e-3,
}  # fmt: skip


class Held(Exception):
    """Ends a run where training would begin."""


def held(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    model: Model,
    data: Table = TASKS,
    **more: object,
) -> tuple[OnlineTask, list[Group]]:
    """The task of a run as training would get it, and the groups of its first rollout."""
    tasks: list[OnlineTask] = []

    def hold(task: OnlineTask, *_: object, **__: object) -> None:
        tasks.append(task)
        raise Held

    monkeypatch.setattr(train_online, "train", hold)
    with pytest.raises(Held):
        methods[name](model, data, **{**SMALL, **more})
    rollout = tasks[0]._ready(0)
    assert rollout is not None
    return tasks[0], list(rollout.groups)


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def parted(ids: Sequence[int], between: Sequence[Sequence[int]]) -> list[list[int]]:
    """`ids` cut at the runs `between`, which are left out."""
    parts: list[list[int]] = []
    left = list(ids)
    for run_of in between:
        at = next(i for i in range(len(left)) if left[i : i + len(run_of)] == list(run_of))
        parts, left = [*parts, left[:at]], left[at + len(run_of) :]
    return [*parts, left]


def test_a_rollout_of_several_turns(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with use(Context(seed=3)):
        task, groups = held(monkeypatch, "grpo", model, rank=0)
    module, new = tiny_model()[0], 6
    assert sorted(g.number for g in groups) == sorted(task.order.step(0, task.end)) == [0, 1, 2, 3]
    for group in groups:
        name = str(TASKS[group.number]["name"])
        system = [{"role": "system", "content": "Be brief."}]
        opening = written([*system, *talk(f"Tell me of {name}.")]) + HEAD.format("assistant")
        assert list(group.prompt) == ids_of(opening)
        told = [f"That makes {n} of 3 on {name}: go on." for n in (1, 2)]
        between = [ids_of("\n" + written(talk(words)) + HEAD.format("assistant")) for words in told]
        for answer, reward in zip(group.answers, group.reward, strict=True):
            turns = parted(answer.ids, between)
            words = [re.sub(r"<\|\w+\|>", "", TOKENIZER.decode(t)) for t in turns]
            pays = [letters(t, n) for n, t in enumerate(words, 1)]
            assert reward == pytest.approx(sum(pays)) and answer.turns == 3
            assert [p for p in answer.paid if p] == pytest.approx([p for p in pays if p])
            # The loss falls on what was drawn: an end that had to be put there carries none.
            loss: list[bool] = []
            for turn, run_of in zip(turns, [*between, []], strict=True):
                assert len(turn) <= new + 1 and (turn[-1] == 2 or turn is turns[-1])
                loss += [i < new for i in range(len(turn))] + [False] * len(run_of)
            assert list(answer.loss) == loss
            assert sum(loss) == len(answer.logprobs) == len(answer.paid)
            # Log-probabilities are those of the plain computation.
            with torch.no_grad():
                logp = padded(module, [[*group.prompt, *answer.ids]])[0, len(group.prompt) - 1 :]
            own = [float(p) for p, mark in zip(logp, loss, strict=True) if mark]
            assert list(answer.logprobs) == pytest.approx(own, abs=1e-4)
            assert cast("list[dict[str, str]]", answer.more["prompt"])[-1]["content"] == told[1]


def test_only_what_is_new_is_read_in_a_later_turn(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens as without a memory; nothing is read twice."""
    read: list[int] = []
    before = Shared._read

    def counted(self: Shared, *given: Any) -> Tensor:
        made = before(self, *given)
        read.append(cast(Reading, self.reading).spans[-1][-1])
        return made

    monkeypatch.setattr(Shared, "_read", counted)
    monkeypatch.setattr(collect, "BLOCK", 6)  # several requests in each turn
    found: list[tuple[list[Group], int]] = []
    for room in (2**30, 0):
        monkeypatch.setattr(episodes.dialogue_cache, "room", lambda room=room: room)
        read.clear()
        with use(Context(seed=3)):
            found.append((held(monkeypatch, "grpo", model, rank=0)[1], sum(read)))
    (ours, some), (theirs, more) = found
    new = 0
    for a, b in zip(ours, theirs, strict=True):
        assert [x.ids for x in a.answers] == [x.ids for x in b.answers] and a.prompt == b.prompt
        new += len(a.prompt)
        for x, y in zip(a.answers, b.answers, strict=True):
            assert x.logprobs == pytest.approx(y.logprobs, abs=1e-5)
            new += max(i for i, on in enumerate(x.loss) if not on) + 1  # up to the last turn
    # A beginning that is common to the prompts of one of the two requests is read once there.
    assert new - 2 * max(len(g.prompt) for g in ours) < some <= new
    assert more > 1.5 * some


def same_turn(prompts: Sequence[Sequence[int]]) -> list[str]:
    """A first turn that all of a group say alike, then words that differ."""
    made: list[str] = []
    for i, ids in enumerate(prompts):
        text = str(TOKENIZER.decode(list(ids)))
        turn = text.count("assistant\n")
        made.append("I say the very same thing." if turn == 1 else f"word {i} {turn} {'ab' * i}.")
    return made


@pytest.mark.parametrize("name", ["grpo", "rloo", "ppo", "reinforce_plus_plus"])
def test_the_update_is_that_of_padded_rows(
    name: str, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At ratio 1 the gradient is that of - A log p over the policy's own tokens, row by row."""
    from truing.core.drawing import Completion
    from truing.core.rl.train_online import Players

    module = stock(model)

    def scripted(
        self: Players, prompts: Sequence[Sequence[int]], sampling: object, *_: object
    ) -> list[list[Completion]]:
        n = int(sampling.n)  # type: ignore[attr-defined]
        rows: list[list[Completion]] = []
        for ids, text in zip(prompts, same_turn(prompts), strict=True):
            own = TOKENIZER(text + END, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logp = padded(module, [[*ids, *own]])[0, len(ids) - 1 :]
            one = Completion(text, tuple(own), tuple(logp.tolist()), "stop", len(own))
            rows.append([one] * n)
        return rows

    monkeypatch.setattr(Players, "policy", scripted)
    more = {"passes": 1, "minibatches": 1, "beta": 0.0, "rank": 0, "max_tokens": 40, "answers": 3}
    more["temperature"] = 1.0  # what the padded rows are computed at
    more |= {"vf": 0.0, "lam": 1.0} if name == "ppo" else {}
    with use(Context(seed=3)):
        task, groups = held(monkeypatch, name, model, **more)
        value, grads = stepped(task, range(4))
    rollout = task.rollout
    assert rollout is not None
    rows = [[*g.prompt, *a.ids] for g in groups for a in g.answers]
    loss = [[False] * len(g.prompt) + list(a.loss) for g in groups for a in g.answers]
    # What is common is computed once: the prompt, the first turn and the reply to it.
    whole = sum(map(len, rows))
    packed = pack([g.tree() for g in groups], 10**6, share=True)[0]
    assert len(packed.ids_N) < 0.65 * whole
    alone = pack([groups[0].tree()], 10**6, share=True)[0]
    known = {tuple(r[:i]) for r in rows[:3] for i in range(1, len(r) + 1)}
    assert len(alone.ids_N) == len(known)
    mask = marks(loss)
    logp = padded(module, rows)
    rewards = torch.tensor([r for g in groups for r in g.reward])
    by_group = rewards.view(4, 3)
    turn = torch.zeros_like(mask)  # what was paid, at the tokens where it was
    for i, a in enumerate(a for g in groups for a in g.answers):
        at = [t for t, on in enumerate(mask[i].tolist()) if on]
        turn[i, at] = torch.tensor(a.paid)
    to_go = turn.flip(1).cumsum(1).flip(1) * mask
    if name == "grpo":
        spread = by_group - by_group.mean(1, keepdim=True)
        a = (spread / (by_group.std(1, keepdim=True) + 1e-4)).flatten()
        want = -((logp * mask).sum(1) / mask.sum(1) * a).mean()
    elif name == "rloo":
        a = (1.5 * (by_group - by_group.mean(1, keepdim=True))).flatten()
        want = -((logp * mask).sum(1) * a).mean()
    else:  # returns to go from each turn's own rewards, whitened over all tokens; values are 0
        own = to_go[mask > 0]
        a = (to_go - own.mean()) / (own.var() + 1e-8).sqrt() * mask
        want = -(logp * a).sum() / mask.sum()
    want.backward()
    for parameter in module.parameters():
        if parameter.grad is not None and not parameter.grad.abs().any():
            parameter.grad = None
    close({n: g for n, g in grads.items() if not n.startswith("value_head")}, module)
    assert abs(value) < 10


def test_rewards_fall_where_they_were_given() -> None:
    mask = torch.tensor([[[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]]])
    paid = torch.tensor([[[0.0, 0.5, 0.0, 1.0], [0.0, 2.0, 9.0, 9.0]]])
    r = Measurements(mask, {"token_reward": paid}, {})
    made = placed(r, torch.tensor([[1.5, 1.0]]))
    assert made.tolist() == [[[0.0, 0.5, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]]]
    without = placed(Measurements(mask), torch.tensor([[1.5, 1.0]]))
    assert without.tolist() == [[[0.0, 0.0, 0.0, 1.5], [0.0, 1.0, 0.0, 0.0]]]


def run(
    name: str, model: Model, folder: Path, data: Table = TASKS, **more: object
) -> tuple[Model, list[dict[str, Json]]]:
    with use(Context(seed=4, folder=folder)) as context:
        made = methods[name](model, data, **{**SMALL, "environment": SUMS, **more})
    assert isinstance(made, Model)
    return made, [m for m in context.metrics if "step" in m]


SUMS: dict[str, object] = {"use": "running_sum", "terms": 2, "tries": 1}


def values(steps: list[dict[str, Json]]) -> list[dict[str, Json]]:
    return [{n: v for n, v in m.items() if n != "seconds"} for m in steps]


TWICE: dict[str, object] = {
    "steps": 2, "passes": 2, "rewards": {"letters": {"use": "share_of", "letters": "aeiou"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def uncut(
    model: Model, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Model, list[dict[str, Json]]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "BLOCK", 6)  # two tasks
        return run("ppo", model, tmp_path_factory.mktemp("whole"), **TWICE)


@pytest.mark.parametrize("puts", [1, 4, 5, 9])
def test_stopped_inside_an_episode_and_resumed(
    puts: int,
    model: Model,
    uncut: tuple[Model, list[dict[str, Json]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    always_save: Callable[[], None],
) -> None:
    """After the opening, between turns, after replies, in the second rollout: the same bits."""
    monkeypatch.setattr(collect, "BLOCK", 6)
    always_save()
    expected, whole = uncut
    put, seen = Journal.put, 0

    def dying(journal: Journal, key: str, value: Json) -> None:
        nonlocal seen
        put(journal, key, value)
        seen += 1
        if seen == puts:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "put", dying)
    with pytest.raises(KeyboardInterrupt):
        run("ppo", model, tmp_path / "cut", **TWICE)
    monkeypatch.setattr(Journal, "put", put)
    again, rest = run("ppo", model, tmp_path / "cut", **TWICE)
    assert again.key == expected.key
    assert values(rest) == values(whole)
    assert whole[0]["turns"] == 2.0
    parts = float(str(whole[0]["reward/environment"])) + float(str(whole[0]["reward/letters"]))
    assert whole[0]["reward"] == pytest.approx(parts, abs=1e-6)


def test_equal_rewards_are_skipped_and_long_episodes_cut(model: Model) -> None:
    def grpo(**more: object) -> list[dict[str, Json]]:
        return use_metrics(lambda: methods["grpo"](model, TASKS, **{**SMALL, **more}))

    steps = grpo(environment=lambda: Game(pay=lambda text, n: 1.0), steps=2)
    assert [(m["skipped"], m["grad_norm"], m["turns"]) for m in steps] == [(1.0, 0.0, 3.0)] * 2
    two = grpo(turns=2)
    assert two[0]["turns"] == 2.0 and two[0]["finished"] == 0.0  # the game has three
    system = [{"role": "system", "content": "Be brief."}]
    opening = written([*system, *talk("Tell me of stone.")]) + HEAD.format("assistant")
    first = len(ids_of(opening))
    short = grpo(max_length=first + 48)
    assert short[0]["turns"] == 1.0 and short[0]["finished"] == 0.0
    with pytest.raises(InputError, match=r"no task begins with a prompt that leaves room"):
        grpo(max_length=first)
    some = grpo(max_length=first + 5)
    assert some[0]["left_out"] == 0.25  # "stone" is the longest name


def use_metrics(act: Callable[[], object]) -> list[dict[str, Json]]:
    with use(Context(seed=4)) as context:
        act()
    return [m for m in context.metrics if "step" in m]


def test_a_partner_acts_in_the_other_role(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulated user: the second model's words are in the row, and carry no loss."""
    rewards = {"use": "share_of", "letters": "abcdefgh"}
    world = {"use": "conversation", "turns": 2, "reward": rewards}
    asked = Table("prompt", [{"prompt": f"say {n}"} for n in ("oak", "lime", "rain", "ash")])
    with use(Context(seed=3)):
        _, groups = held(monkeypatch, "rloo", model, asked, environment=world, partner=model)
    for group in groups:
        for answer in group.answers:
            text = str(TOKENIZER.decode(list(answer.ids)))
            assert answer.turns == 2 and text.count("<|im_start|>user") >= 1
            said = cast("list[dict[str, str]]", answer.more["prompt"])
            assert [m["role"] for m in said] == ["user", "assistant", "user"]
            assert f"<|im_start|>user\n{said[2]['content']}{END}" in text
            assert sum(answer.loss) <= 12 and not any(answer.paid[:-1])
    replies = {str(a.more["prompt"]) for g in groups for a in g.answers}
    assert len(replies) == 12  # each episode has a user of its own
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"another role, in which nobody acts.*'user'.*partner"):
        methods["rloo"](model, asked, **{**SMALL, "environment": world})


class Numbers(Game):
    def reset(self, seed: int, task: Row) -> Observation:
        return Observation([1.0])


class Endless(Game):
    def step(self, action: Json) -> Step:
        return Step(Observation("?", "user"), 0.0, done=False)


def test_mistakes_are_named(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episodes, "ROUNDS", 2)

    def grpo(**more: object) -> object:
        return methods["grpo"](model, TASKS, **{**SMALL, **more})

    with pytest.raises(InputError, match=r"unknown component 'runing_sum'.*'running_sum'"):
        grpo(environment={"use": "runing_sum"})
    with pytest.raises(InputError, match=r"unknown setting 'term'.*'terms'"):
        grpo(environment={"use": "running_sum", "term": 2})
    with pytest.raises(InputError, match="only be shown texts"):
        grpo(environment=Numbers)
    with pytest.raises(InputError, match="does not come back to the policy"):
        grpo(environment=Endless, partner=model)
    with pytest.raises(InputError, match="'turns' must be at least 1"):
        grpo(turns=0)
    with pytest.raises(InputError, match="not a finite number"):
        grpo(environment=lambda: Game(pay=lambda text, n: float("nan")))
    with pytest.raises(InputError, match="unknown term 'environmen'"):
        grpo(weights={"environmen": 1.0})
    with pytest.raises(InputError, match="nothing to reward answers by"):
        methods["grpo"](model, Table("prompt", [{"prompt": "x"}]), steps=1)
    with pytest.raises(InputError, match="given in no episode"):
        rows = Table("example", [{"prompt": "x", "completion": "y"}])
        methods["grao"](model, rows, environment={"use": "running_sum"}, steps=1)
    with use(Context(folder=tmp_path)), pytest.raises(InputError, match="@component"):
        grpo()


def test_it_learns_over_several_turns(model: Model) -> None:
    """Paid by the share of eight letters in both turns, it comes to say them."""

    def share(text: str, turn: int) -> float:
        return sum(c in "abcdefgh" for c in text) / max(1, len(text)) / 2

    more: dict[str, object] = {
        "environment": lambda: Game(2, share), "steps": 12, "answers": 8, "max_tokens": 8,
        "lr": 4e-3,
    }  # fmt: skip
    steps = use_metrics(lambda: methods["grpo"](model, TASKS, **{**SMALL, **more}))
    rewards = [float(str(m["reward"])) for m in steps]
    assert sum(rewards[:3]) / 3 < 0.15 and sum(rewards[-3:]) / 3 > 0.4
    assert all(m["turns"] == 2.0 for m in steps)
