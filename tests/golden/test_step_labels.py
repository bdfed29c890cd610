"""Step labels by hand: values in hindsight, majorities, judges, dialogues, what is refused."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from truing.context import Context, use
from truing.core import drawing
from truing.core.judging import step_rollouts
from truing.core.judging.step_rollouts import (
    Drawing,
    Trajectory,
    check_rooms,
    continued,
    hindsight,
    majority,
)
from truing.core.sampling import SamplingSettings
from truing.core.tiny import tiny_tokenizer
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.sources import need_abilities
from truing.synthesize import step_labels as module
from truing.synthesize.step_labels import step_labels
from truing.tables import Row, Table
from truing.train.reward import rules

MODEL = SimpleNamespace(key="model-key", name="model", is_served=False)
PLUS: Row = {"prompt": "2 + 3 + 4", "completion": "2 + 3 = 5\n\n5 + 4 = 9\n\nso 9", "answer": "9"}
RIGHT: dict[str, object] = {"use": "numeric_answer"}


def made(data: Table, **more: object) -> list[Row]:
    found = step_labels(MODEL, data, **more)  # type: ignore[arg-type]
    return found.rows


def stand_in(monkeypatch: pytest.MonkeyPatch, drawn: RollOuts) -> RollOuts:
    """Texts in place of a model's roll-outs."""
    monkeypatch.setattr(step_rollouts, "continued", drawn)
    monkeypatch.setattr(module, "check_rooms", lambda model, paths: None)
    return drawn


class RollOuts:
    """Stands for `continued`: hands out texts by the number of steps before them."""

    def __init__(self, texts: dict[int, list[str]]) -> None:
        self.texts, self.places = texts, list[int]()

    def __call__(
        self, model: object, places: Sequence[tuple[Trajectory, int]], n: int, how: Drawing
    ) -> list[list[tuple[str, bool]]]:
        self.places += [k for _, k in places]
        return [[(t, True) for t in self.texts[k][:n]] for _, k in places]


# The equations


def test_values_in_hindsight_by_hand() -> None:
    outcomes = [[(2, 1.0), (3, 0.0)], [(2, 1.0)]]
    assert hindsight([0.2, 0.4], outcomes, 0.5) == pytest.approx([0.2 + 0.5 / 2, 0.4 + 1.0])
    # Without a process reward model and without discount: the share of roll-outs that are right.
    source = random.Random(0)
    for _ in range(20):
        z = [float(source.random() < 0.5) for _ in range(source.randint(1, 6))]
        found = [(source.randint(1, 9), v) for v in z]
        assert hindsight([0.0], [found], 1.0) == pytest.approx([sum(z) / len(z)])


def test_a_majority_is_more_than_half() -> None:
    outcomes = [[(1, 1.0), (1, 0.0)], [(1, 1.0), (1, 0.0), (1, 0.6)], [(1, 0.5)], [(1, 0.51)]]
    assert majority(outcomes) == [0.0, 1.0, 0.0, 1.0]


# Answers


def test_roll_outs_from_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {1: ["5 + 4 = 9", "9\n\nno 8"], 2: ["so 9", "so 7"]}
    drawn = stand_in(monkeypatch, RollOuts(texts))
    (row,) = made(Table("example", [PLUS]), reward=RIGHT, rollouts=2, gamma=0.9)
    assert drawn.places == [1, 2]  # at the last step of an answer that ended nothing is drawn
    assert row["steps"] == ["2 + 3 = 5", "5 + 4 = 9", "so 9"] and row["separator"] == "\n\n"
    # From step 1: right after 2 steps, wrong after 3. From step 2: right and wrong after 3.
    assert row["labels"] == pytest.approx([(0.9 + 0.0) / 2, (0.9 + 0.0) / 2, 1.0])
    lineage = row["lineage"]
    assert isinstance(lineage, dict) and lineage["came_to"] == [0.5, 0.5, 1.0]
    assert lineage["generator"] == "model-key" and lineage["verifier"] == RIGHT
    assert lineage["parents"] == [lineage["prompt"]] and lineage["rollouts"] == 2
    stand_in(monkeypatch, RollOuts(texts))
    (row,) = made(Table("example", [PLUS]), reward=RIGHT, rollouts=2, label="majority")
    assert row["labels"] == [0.0, 0.0, 1.0]
    # One that was cut has no end of its own: it is carried on from its last step too.
    drawn = stand_in(monkeypatch, RollOuts({**texts, 3: ["", "and 8"]}))
    cut = PLUS | {"finished": False}
    (row,) = made(Table("example", [cut]), reward=RIGHT, rollouts=2, gamma=0.5)
    assert drawn.places == [1, 2, 3]
    assert row["labels"] == pytest.approx([0.25, 0.25, 0.5])
    # Where the context is full nothing can be drawn, and what it came to itself, 9, stands.
    stand_in(monkeypatch, RollOuts({**texts, 3: []}))
    (row,) = made(Table("example", [cut]), reward=RIGHT, rollouts=2, gamma=0.6)
    assert row["labels"] == pytest.approx([0.3, 0.3, 1.0])


def test_hindsight_labels_each_step_by_its_own_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_rollouts, "continued", None)  # must not be called
    wrong = PLUS | {"completion": "2 + 3 = 6\n\nso 10"}
    one, two = made(Table("example", [PLUS, wrong]), reward=RIGHT, rollouts=0, gamma=0.9)
    assert one["labels"] == pytest.approx([0.81, 0.9, 1.0]) and two["labels"] == [0.0, 0.0]
    # A reward that no rule verifies, in the same way: a model's score through a sigmoid.
    monkeypatch.setattr(
        "truing.core.judging.rewards.score_model", lambda m, rows: [2.0 for _ in rows]
    )
    monkeypatch.setattr("truing.core.passes.scoring.has_head", lambda m: False)
    monkeypatch.setattr(step_rollouts, "check_reward_model", lambda m, where: None)
    z = 1 / (1 + 2.718281828459045**-2)
    (row,) = made(Table("example", [PLUS]), reward_model=MODEL, rollouts=0, gamma=0.5)
    assert row["labels"] == pytest.approx([z / 4, z / 2, z])
    # A process reward model's own r_t is added to it.
    monkeypatch.setattr(module, "check_steps", lambda m, where: None)
    monkeypatch.setattr(
        step_rollouts, "step_values", lambda m, rows, sep, where: [[0.1, 0.2, 0.3]] * len(rows)
    )
    (row,) = made(Table("example", [PLUS]), process_model=MODEL, reward=RIGHT, rollouts=0)
    assert row["labels"] == pytest.approx([0.1 + 0.81, 0.2 + 0.9, 0.3 + 1.0])


def test_models_are_asked_for_all_answers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[object]]] = []
    scored: list[str] = []

    def values(m: object, rows: Sequence[Row], sep: str, where: str) -> list[list[float]]:
        asked.append((sep, [r["steps"] for r in rows]))
        return [[float(len(s)) for s in r["steps"]] for r in rows]  # type: ignore[attr-defined]

    def score(m: object, rows: Sequence[Row]) -> list[float]:
        scored.extend(str(r["completion"]) for r in rows)
        return [0.0] * len(rows)

    monkeypatch.setattr(step_rollouts, "step_values", values)
    paths = [
        Trajectory({}, ("p",) * len(steps), steps, ended, sep)
        for steps, ended, sep in ((("a", "bb"), True, ";"), (("ccc",), False, ","),
                                  (("dd", "e"), False, ";"))
    ]  # fmt: skip
    found = step_rollouts.expected(Model.__new__(Model), paths)
    assert found == [[1.0, 2.0], [3.0], [2.0, 1.0]]
    assert asked == [(";", [["a", "bb"], ["dd", "e"]]), (",", [["ccc"]])]
    # With roll-outs an answer that was cut is not asked for what it came to itself.
    monkeypatch.setattr("truing.core.judging.rewards.score_model", score)
    monkeypatch.setattr("truing.core.passes.scoring.has_head", lambda m: False)
    monkeypatch.setattr(step_rollouts, "continued", RollOuts({1: ["x"], 2: ["y"]}))
    ending = step_rollouts.Ending(None, None, Model.__new__(Model), "")
    came = step_rollouts.outcomes(MODEL, paths, ending, 1, Drawing(4, 1.0, 0))  # type: ignore[arg-type]
    assert came == [[[(2, 0.5)], [(2, 0.5)]], [[(2, 0.5)]], [[(2, 0.5)], [(3, 0.5)]]]
    assert sorted(scored) == ["a;bb", "a;x", "ccc,x", "dd;e;y", "dd;x"]


def test_a_judge_labels_steps_until_it_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Row] = []

    def rate(judge: object, rows: list[Row], **told: object) -> list[float | None]:
        asked.extend(rows)
        assert told["criteria"] == "Be lively." and "one step" in str(told["template"])
        return [None if "5 + 4" in str(r["completion"]) else 0.5 + len(asked) / 100 for r in rows]

    monkeypatch.setattr(step_rollouts, "rate", rate)
    brief = {"prompt": "p", "completion": "a\n\nb"}
    rest = {"prompt": "r", "completion": "\n\n".join("cdefg")}
    rows = Table("example", [PLUS, brief, {"prompt": "q", "completion": "5 + 4"}, rest])
    with use(Context()) as context:
        found = made(rows, judge=MODEL, label="judged", criteria="Be lively.")
    assert [r["steps"] for r in found] == [["2 + 3 = 5"], ["a", "b"], list("cdefg")]
    assert [r["labels"] for r in found] == [[1.0], [1.0, 1.0], [1.0] * 5]
    assert {"prompt": "p", "completion": "b"} in asked and len(asked) == 11
    assert context.metrics[-1]["cut_steps"] == 3  # two of the first answer, all of the third
    with pytest.raises(InputError, match="1 of 3 replies on steps"), use(Context()):
        made(Table("example", [PLUS]), judge=MODEL, label="judged", criteria="Be lively.")


def test_answers_are_drawn_to_prompts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(model: object, prompts: list[object], *, n: int, **_: object) -> object:
        items = [
            SimpleNamespace(text="one 9", finish="stop"),
            SimpleNamespace(text=" ", finish="length"),
        ]
        return [items[:n] for _ in prompts]

    monkeypatch.setattr(step_rollouts, "generate", generate)
    data = Table("record", [{"prompt": "4 + 5", "answer": "9"}, {"prompt": "3", "answer": "3"}])
    with use(Context()) as context:
        found = made(data, reward=RIGHT, rollouts=0, answers=2)
        assert context.metrics[0]["left_out_without_steps"] == 2
    assert [r["labels"] for r in found] == [[1.0], [0.0]]


# Dialogues


def test_turns_of_dialogues_are_steps() -> None:
    def talk(*texts: str) -> list[Row]:
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]

    long, one = talk("hi", "hello", "4 + 5?", "that is 9"), talk("hi", "9")
    opening = [{"role": "assistant", "content": "Welcome."}, *long]
    mute = talk("hi", " ", "4 + 5?", "9")
    data = Table("example", [{"messages": m, "answer": "9"} for m in (long, one, mute, opening)])
    with use(Context()) as context:
        found = made(data, reward=RIGHT, rollouts=0, gamma=0.5)
        counts = context.metrics[0]
    assert counts["left_out_single_turns"] == counts["left_out_empty_turns"] == 1
    assert counts["left_out_without_steps"] == 0 and counts["answers"] == 2
    assert [r["steps"] for r in found] == [["hello"], ["that is 9"]] * 2
    assert [r["labels"] for r in found] == [[0.5], [1.0]] * 2
    assert [r["prompt"] for r in found] == [long[:1], long[:3], opening[:2], opening[:4]]
    with pytest.raises(InputError, match="'rollouts' must be 0 for dialogues"):
        made(data, reward=RIGHT)


def test_steps_with_nothing_between_them_are_no_dialogue() -> None:
    row: Row = {"prompt": "4 + 5", "steps": ["that ", "is 9"], "labels": [0.0, 0.0],
                "separator": "", "answer": "9"}  # fmt: skip
    (found,) = made(Table("steps", [row]), reward=RIGHT, rollouts=0, gamma=0.5)
    assert found["steps"] == ["that ", "is 9"] and found["separator"] == ""
    assert found["labels"] == [0.5, 1.0]
    with pytest.raises(InputError, match=r"row 1.*'rollouts' must be 0 for steps with nothing"):
        made(Table("steps", [row]), reward=RIGHT, rollouts=1)
    other = {k: v for k, v in row.items() if k != "separator"}
    (found,) = made(Table("steps", [other]), reward=RIGHT, rollouts=0, separator=";")
    assert found["separator"] == ";"


# With a model


def test_roll_outs_go_on_from_the_tokens_of_the_prefix(tiny_path: Path) -> None:
    model = Model.open(tiny_path)
    tokenizer = tiny_tokenizer()
    path = Trajectory({}, ("say a",) * 2, ("one", "two"), True, "\n\n")
    how = Drawing(6, 1.0, 11)
    found = continued(model, [(path, 1), (path, 2), (path, 1)], 3, how)
    asked = [{"role": "user", "content": "say a"}]
    head = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
    for k, items in ((1, found[0]), (2, found[1])):
        pieces = [f"{s}\n\n" for s in ("one", "two")[:k]]
        ids = [i for text in (head, *pieces)
               for i in tokenizer.encode(text, add_special_tokens=False)]  # fmt: skip
        sampling = SamplingSettings(n=3, max_tokens=6, seed=11)
        want = drawing.continued(model.load_module(), [ids], sampling)[0]
        assert items == [(c.text, c.finish == "stop") for c in want]
    assert found[2] == found[0] and found[0] != found[1]


def test_roll_outs_are_as_long_as_the_context_has_room(tiny_path: Path) -> None:
    """What fitted when it was drawn can be carried on; what cannot is named before all else."""
    model, tokenizer = Model.open(tiny_path), tiny_tokenizer()
    limit = int(model.load_module().module.config.max_position_embeddings)
    asked = [{"role": "user", "content": "say a"}]
    head = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))

    def tokens(*steps: str) -> int:
        pieces = (head, *(f"{s}\n\n" for s in steps))
        return sum(len(tokenizer.encode(p, add_special_tokens=False)) for p in pieces)

    many = 1
    while tokens("a " * (many + 1), "b") < limit:
        many += 1
    long = "a " * many
    room, most = limit - tokens(long), 10
    assert 0 < room < most
    path = Trajectory({}, ("say a",) * 2, (long, "b"), False, "\n\n", "rows.jsonl row 7")
    brief = Trajectory({}, ("say a",) * 2, ("one", "two"), False, "\n\n")
    how = Drawing(most, 1.0, 3)
    found = continued(model, [(path, 1), (brief, 1)], 4, how)
    ids = [i for text in (head, f"{long}\n\n")
           for i in tokenizer.encode(text, add_special_tokens=False)]  # fmt: skip
    sampling = SamplingSettings(n=4, max_tokens=room, seed=3)
    want = drawing.continued(model.load_module(), [ids], sampling)[0]
    assert found[0] == [(c.text, c.finish == "stop") for c in want]
    assert found[1] == continued(model, [(brief, 1)], 4, how)[0]
    full = replace(path, steps=("b", long + long))
    assert continued(model, [(full, 2)], 4, how) == [[]]  # cut where the context ended
    check_rooms(model, [full, path, brief])
    over = replace(path, steps=(long + long, "b"))
    with pytest.raises(InputError, match=r"first 1 of 2 steps do not fit into the context") as told:
        check_rooms(model, [brief, over])
    assert told.value.where == "rows.jsonl row 7"
    rows = [PLUS, {"prompt": "say a", "completion": f"{long}{long}\n\nb"}]
    with pytest.raises(InputError, match=r"row 2.*first 1 of 2 steps"):
        step_labels(model, Table("example", rows), reward=RIGHT, rollouts=1)


def test_killed_and_resumed_gives_the_same_rows(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model.open(tiny_path)
    monkeypatch.setattr(module, "CHUNK", 2)
    rows = [{"prompt": f"say {w}", "completion": f"a {w}\n\nb {w}"} for w in "lime oak ash".split()]
    how = {"reward": {"use": "share_of", "letters": "aeiou"}, "rollouts": 2, "max_tokens": 5}

    def run(folder: Path) -> list[Row]:
        with use(Context(seed=3, folder=folder)):
            table = methods["step_labels"](model, Table("example", rows), **how)
        assert isinstance(table, Table)
        return table.rows

    whole, calls = run(tmp_path / "a"), list[int]()
    real = step_rollouts.continued

    def dies(*args: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(step_rollouts, "continued", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b")
    assert run(tmp_path / "b") == whole and len(calls) == 3  # the first chunk was kept
    values = [v for r in whole for v in r["labels"]]  # type: ignore[attr-defined]
    assert len(values) == 6 and len(set(values)) > 2 and all(0 <= v <= 1 for v in values)


# What is refused


def test_a_process_model_must_score_steps(tiny_path: Path) -> None:
    model = Model.open(tiny_path)
    with pytest.raises(InputError, match=r"scores no steps.*step_value"):
        step_labels(model, Table("example", [PLUS]), process_model=model, reward=RIGHT, rollouts=0)


def test_a_served_model_is_enough_where_nothing_is_drawn_from_steps() -> None:
    served, data = Model.open("http://localhost:1/v1#m"), Table("example", [PLUS])
    labels = methods["step_labels"]
    for name, able in (("model", {"generate"}), ("process_model", {"hidden", "weights"})):
        need_abilities(labels, name, "", frozenset(able), where="")
    made_of = step_labels(served, data, reward=RIGHT, rollouts=0, gamma=0.5)
    assert made_of[0]["labels"] == [0.25, 0.5, 1.0]
    with pytest.raises(InputError, match=r"served model cannot go on.*rollouts to 0"):
        step_labels(served, Table("record", [{"prompt": "p"}]), reward=RIGHT, rollouts=1)
    with pytest.raises(InputError, match="process model that can weights"):
        need_abilities(labels, "process_model", "", frozenset({"generate"}), where="")


def test_rewards_that_are_no_numbers_or_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    data, ref = Table("example", [PLUS, PLUS | {"answer": "8"}]), {"use": "length_near", "n": 3}
    given: list[float] = []

    @functools.wraps(rules.length_near)
    def broken(rows: list[Row], *, n: int) -> list[float]:
        return given

    monkeypatch.setattr(rules, "length_near", broken)
    for values, match in (
        ([0.5, float("nan")], r"row 2.*not a finite number"),
        ([0.5], "one score a row"),
        ([0.5, 1.5], r"row 2.*lies in \[0, 1\].*reward_model"),
    ):
        given[:] = values
        with pytest.raises(InputError, match=match):
            made(data, reward=ref, rollouts=0)


@pytest.mark.parametrize(
    ("rows", "more", "match"),
    [
        ([PLUS], {}, "one of reward, judge and reward_model"),
        ([PLUS], {"reward": RIGHT, "judge": MODEL}, "one of reward, judge and reward_model"),
        ([PLUS], {"reward": {"use": "numeric_answr"}}, "numeric_answer"),
        ([PLUS], {"label": "judged"}, "'label'.*judge"),
        (
            [PLUS],
            {"label": "judged", "judge": MODEL, "reward": RIGHT, "process_model": MODEL},
            "'label': judged makes no use of process_model and reward[.]",
        ),
        ([PLUS], {"label": "judged", "judge": MODEL, "gamma": 0.5}, "judged makes no use of gamma"),
        (
            [PLUS],
            {"label": "majority", "reward": RIGHT, "process_model": MODEL, "gamma": 0.5},
            "'label': majority makes no use of gamma and process_model[.]",
        ),
        ([PLUS], {"reward": RIGHT, "separator": ""}, "'separator' must not be empty"),
        ([{"prompt": "p", "completion": " \n\n "}], {"reward": RIGHT}, "none of 1 answers has"),
        (
            [{"prompt": "p", "steps": ["a", ""], "labels": [1, 1]}],
            {"reward": RIGHT},
            "row 1.*a step must be a text",
        ),
    ],
)
def test_faults_are_named(rows: list[Row], more: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        made(Table("", rows), **{"rollouts": 0, **more})


def test_settings_out_of_range_are_refused_before_anything_is_drawn() -> None:
    method = methods["step_labels"]
    for name, value in (("rollouts", -1), ("gamma", 1.5), ("answers", 0), ("max_tokens", 0)):
        settings = method.validate({name: value})
        with pytest.raises(InputError, match=f"setting '{name}'"):
            method.check(settings, {"data": Table("example", [PLUS])})
