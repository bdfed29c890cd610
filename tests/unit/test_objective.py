"""Measurements, the algebra of losses, the decorator, and rows as units."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from truing import catalogue
from truing.core.batch.measure import blank, joined, mismatched
from truing.core.batch.row_kinds import CONVERSIONS, as_kind
from truing.core.batch.training_rows import Reader
from truing.core.objective import Loss, Measurements, Objective, objective, objective_of
from truing.core.reference import branch_key, gathered, keys_of
from truing.core.tiny import tiny_tokenizer
from truing.core.training import TextTraining
from truing.core.tree import Node, group_tree
from truing.errors import InputError
from truing.method import methods
from truing.tables import KINDS, Row, Table
from truing.train.preference.cpo import slic
from truing.train.preference.dpo import dpo
from truing.train.preference.kto import kto
from truing.train.preference.rrhf import rrhf
from truing.train.preference.sppo import sppo
from truing.train.preference.tpo import tpo
from truing.train.supervised.sft import sft

MASK = torch.tensor([[[1.0, 1, 0], [1, 0, 0]], [[1.0, 1, 1], [0, 0, 0]]])
LOGP = torch.tensor([[[-1.0, -2, 9], [-4, 9, 9]], [[-1.0, -1, -1], [9, 9, 9]]])


def test_sums_and_means_skip_padding() -> None:
    m = Measurements(MASK, {"logp": LOGP, "ref_logp": LOGP * 2})
    assert m.length_UK.tolist() == [[2, 1], [3, 0]] and m.there_UK.tolist() == [[1, 1], [1, 0]]
    assert m.seq().tolist() == [[-3, -4], [-3, 0]]
    assert m.mean().tolist() == [[-1.5, -4], [-1, 0]]
    assert m.ratio().tolist() == [[3, 4], [3, 0]]
    assert m.branches(1).seq().tolist() == [[-4], [0]]
    assert "logp" in m and "entropy" not in m
    with pytest.raises(InputError, match="'entropy' was not measured"):
        m["entropy"]


def test_losses_add_with_their_own_weights() -> None:
    one = Loss(torch.tensor([1.0, 3.0]), metrics={"a": torch.ones(2)})
    two = Loss(torch.tensor([[2.0, 4.0], [6.0, 0.0]]), torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    assert float(one.total()) == 2.0 and float(two.total()) == 5.0
    both = 0.5 * (one + 2 * two) + one
    assert float(both.total()) == pytest.approx(0.5 * 2 + 5.0 + 2.0)
    assert [c for c, _, _ in both.terms()] == [0.5, 1.0, 1.0]
    assert set(both.metrics) == {"a"}


def test_weight_of_zero_is_no_division_by_zero() -> None:
    assert float(Loss(torch.ones(2), torch.zeros(2)).total()) == 0.0


def test_decorator_keeps_the_function_and_registers_a_method() -> None:
    assert dpo.__name__ == "dpo" and objective_of(dpo).needs == ("logp", "ref_logp")
    method = methods["train/dpo"]
    assert method.group == "preference" and method.needs == ("weights", "logprob")
    assert list(method.inputs) == ["model", "data", "reference", "held_out"]
    assert list(methods["sft"].inputs) == ["model", "data", "held_out"]
    assert method.settings["beta"].default == 0.1
    assert set(TextTraining.__dataclass_fields__) <= set(method.settings)
    with pytest.raises(InputError, match="not a training objective"):
        objective_of(test_sums_and_means_skip_padding)


def test_decorator_refuses_what_cannot_work() -> None:
    def loss(m: Measurements, state: object = None, *, lr: float = 1.0) -> Loss:
        return Loss(m.seq()[:, 0])

    with pytest.raises(InputError, match="unknown unit"):
        objective(unit="row", rows="pair")
    with pytest.raises(InputError, match="unit 'batch' keep state"):
        objective(unit="pair", rows="pair")(loss)
    with pytest.raises(InputError, match="'lr' is the engine's"):
        objective(unit="batch", rows="pair")(loss)


def test_catalogue_reads_objectives_without_importing(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        '"""My loss: first line."""\nimport nowhere\n\n'
        '@objective(unit="pair", rows="pair", needs=("logp",), columns={"margin": 0.0})\n'
        "def mine(m, *, beta=0.1):\n    return None\n"
    )
    (entry,) = catalogue.scan(file, "x.mine", "train", "preference", "x")
    assert (entry.id, entry.unit, entry.rows) == ("train/mine", "pair", "pair")
    assert entry.needs == ("logp",) and entry.summary == "My loss: first line."


def test_joined_pads_to_the_widest() -> None:
    small = Measurements(MASK[:1, :1, :2], {"logp": LOGP[:1, :1, :2]}, {"s": torch.ones(1, 1)})
    big = Measurements(MASK, {"logp": LOGP}, {"s": torch.ones(2, 2)})
    both = joined([small, big])
    assert both.mask_UKT.shape == (3, 2, 3) and both["s"].shape == (3, 2)
    assert both.seq().tolist() == [[-3, 0], [-3, -4], [-3, 0]]


def test_blank_counts_loss_tokens() -> None:
    trees = [group_tree([1, 2], [[3, 4], [5]]), Node((1, 2, 3), (True, True, False))]
    m = blank(trees, ("logp",), {})
    # the first token of a row is predicted by nothing
    assert m.length_UK.tolist() == [[2, 1], [1, 0]] and m.seq().tolist() == [[-2, -1], [-1, 0]]


# Rows as units


def reader(spec: Objective, limit: int = 512) -> Reader:
    return Reader(tiny_tokenizer(), spec, limit)


def test_what_is_left_out_is_counted() -> None:
    rows: list[Row] = [
        {"prompt": "p", "chosen": "good", "rejected": "bad"},
        {"prompt": "p", "chosen": "same", "rejected": "same"},
        {"prompt": "p", "chosen": " ", "rejected": "bad"},
        {"prompt": "x" * 600, "chosen": "good", "rejected": "bad"},
        {"prompt": "x" * 440, "chosen": "good" * 40, "rejected": "bad"},
        {"prompt": "x" * 488, "chosen": "word one", "rejected": "word two"},
    ]
    one = reader(objective_of(dpo))
    units = one.read(Table("pair", rows))
    assert dict(one.counts) == {
        "cut": 1, "left_out_same": 2, "left_out_empty": 1, "left_out_long": 1
    }  # fmt: skip
    assert len(units) == 2 and len(units[0].answers[0]) == 5  # four bytes and the end
    assert max(len(units[1].prompt) + len(a) for a in units[1].answers) == 512
    assert units[1].answers[0][-1] != 2 and units[1].answers[1][-1] == 2  # a cut answer has no end
    with pytest.raises(InputError, match=r"no row can be trained on.*left_out_same"):
        reader(objective_of(dpo)).read(Table("pair", rows[1:2]))


def test_unfinished_answers_have_no_end() -> None:
    row: Row = {"prompt": "p", "chosen": "a", "rejected": "b", "rejected_finished": False}
    (unit,) = reader(objective_of(dpo)).read(Table("pair", [row]))
    assert [a[-1] == 2 for a in unit.answers] == [True, False]


def test_dialogues_learn_every_turn_of_the_assistant() -> None:
    said = [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "bb"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "ddd"},
    ]  # fmt: skip
    (unit,) = reader(objective_of(sft)).read(Table("example", [{"messages": said}]))
    tree = unit.tree()
    assert sum(tree.loss) == 2 + 1 + 3 + 1
    with pytest.raises(InputError, match=r"row 1.*ends with a message of the assistant"):
        reader(objective_of(sft)).read(Table("example", [{"messages": said[:3]}]))


def test_numbers_and_texts_of_rows() -> None:
    pair: Row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    (unit,) = reader(objective_of(sppo)).read(Table("pair", [pair]))
    assert unit.numbers == {"win_chosen": 1.0, "win_rejected": 0.0}
    (unit,) = reader(objective_of(sppo)).read(Table("pair", [pair | {"win_chosen": 0.7}]))
    assert unit.numbers["win_chosen"] == 0.7
    with pytest.raises(InputError, match=r"row 1.*finite number in column 'win_chosen'"):
        reader(objective_of(sppo)).read(Table("pair", [pair | {"win_chosen": "high"}]))
    with pytest.raises(InputError, match=r"row 1.*finite number in column 'win_chosen'"):
        reader(objective_of(sppo)).read(Table("pair", [pair | {"win_chosen": 10**400}]))
    with pytest.raises(InputError, match=r"row 1.*tpo needs the column 'gold'"):
        reader(objective_of(tpo)).read(Table("pair", [pair]))
    (unit,) = reader(objective_of(tpo)).read(Table("pair", [pair | {"gold": "ccc"}]))
    assert [len(a) for a in unit.answers] == [2, 2, 4]
    group: Row = {"prompt": "p", "completions": ["a", "b"], "scores": [1.0]}
    with pytest.raises(InputError, match="one number for each completion"):
        reader(objective_of(rrhf)).read(Table("group", [group]))


def test_answers_that_were_cut_get_no_end() -> None:
    group: Row = {"prompt": "p", "completions": ["aa", "b"], "scores": [1.0, 0.0]}
    (whole,) = reader(objective_of(rrhf)).read(Table("group", [group]))
    (cut,) = reader(objective_of(rrhf)).read(Table("group", [group | {"finished": [False, True]}]))
    assert cut.answers == (whole.answers[0][:-1], whole.answers[1])
    with pytest.raises(InputError, match="one mark for each completion"):
        reader(objective_of(rrhf)).read(Table("group", [group | {"finished": [True]}]))
    # The chosen answer stands in for SLiC's reference answer, with its own end or without.
    pair: Row = {"prompt": "p", "chosen": "aa", "rejected": "b", "chosen_finished": False}
    (unit,) = reader(objective_of(slic)).read(Table("pair", [pair]))
    assert unit.answers[2] == unit.answers[0] == whole.answers[0][:-1]
    (unit,) = reader(objective_of(slic)).read(Table("pair", [pair | {"gold": "aa"}]))
    assert unit.answers[2] == whole.answers[0]


SAID = {"role": "assistant", "content": "a"}
ROWS: dict[str, Row] = {
    "pair": {"prompt": "p", "chosen": "a", "rejected": "b"},
    "unpaired": {"prompt": "p", "completion": "a", "label": True},
    "dialogue_pair": {"prompt": "p", "chosen": [SAID], "rejected": [{**SAID, "content": "b"}]},
    "dialogue_example": {"prompt": "p", "completion": [SAID]},
    "dialogue_unpaired": {"prompt": "p", "completion": [SAID], "label": True},
    "implicit_pair": {"chosen": "p: a", "rejected": "p: b"},
    "stepwise": {"prompt": "p", "completions": ["a", "b"], "labels": [1, 0]},
    "alpaca": {"instruction": "p", "output": "a"},
    "alpaca_pair": {"instruction": "p", "chosen": "a", "rejected": "b"},
    "sharegpt": {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "a"}]},
    "sharegpt_pair": {
        "conversations": [{"from": "human", "value": "p"}],
        "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"},
    },
    "openai_pair": {
        "input": {"messages": [{"role": "user", "content": "p"}]},
        "preferred_output": [SAID], "non_preferred_output": [{**SAID, "content": "b"}],
    },
    "tagged": {"instruction": "p", "output": "a", "kto_tag": True},
    "group": {"prompt": "p", "completions": ["w", "b", "m"], "scores": [0.0, 2.0, 1.0]},
}  # fmt: skip
BAD: Row = {"label": False, "kto_tag": False}


@pytest.mark.parametrize(("kind", "to"), CONVERSIONS)
def test_conversions_make_rows_of_the_kind(kind: str, to: str) -> None:
    table, said = as_kind(Table(kind, [ROWS[kind], ROWS[kind] | BAD]), to, "x")
    assert table.kind == to and said["conversion"] == CONVERSIONS[(kind, to)][0] and len(table)
    assert any(set(need) <= set(table[0]) for need in KINDS[to])


def test_conversions_by_hand() -> None:
    both, _ = as_kind(Table("pair", [ROWS["pair"]]), "unpaired", "x")
    assert [(r["completion"], r["label"]) for r in both] == [("a", True), ("b", False)]
    pair, _ = as_kind(Table("group", [ROWS["group"]]), "pair", "x")
    assert (pair[0]["chosen"], pair[0]["rejected"]) == ("b", "w")
    cut = {**ROWS["group"], "finished": [True, False, True]}
    assert as_kind(Table("group", [cut]), "pair", "x")[0][0]["chosen_finished"] is False
    assert as_kind(Table("group", [cut]), "example", "x")[0][0]["finished"] is False
    group, _ = as_kind(Table("pair", [ROWS["pair"] | {"chosen_finished": False}]), "group", "x")
    assert group[0]["finished"] == [False, True]
    # What a row holds besides goes with it, in every form.
    for kind, to in CONVERSIONS:
        table, _ = as_kind(Table(kind, [ROWS[kind], ROWS[kind] | BAD]), to, "x")
        assert "weight" not in table[0]
        more = {"weight": 0.5, "task": "sums"}
        rows = [ROWS[kind] | more, ROWS[kind] | more | BAD]
        for row in as_kind(Table(kind, rows), to, "x")[0]:
            assert (row["weight"], row["task"]) == (0.5, "sums")
    even = {**ROWS["group"], "scores": [1.0, 1.0, 1.0]}
    left, said = as_kind(Table("group", [even, ROWS["group"]]), "pair", "x")
    assert len(left) == 1 and said["left_out_equal"] == 1
    with pytest.raises(InputError, match="of the 1 of table: in 1 all answers have one score"):
        as_kind(Table("group", [even]), "pair", "x")
    with pytest.raises(InputError, match="needs rows of kind pair"):
        as_kind(Table("text", [{"text": "a"}]), "pair", "x")


# What the reference is measured on


def test_answers_to_one_prompt_share_a_tree() -> None:
    p, q = group_tree([1, 2], [[3], [4]]), group_tree([1, 2], [[4], [5, 6]])
    other = group_tree([1], [[3]])
    found = gathered([p, other, q])
    assert [len(t.children) for t in found] == [3, 1]
    assert keys_of(found[0]) == [*keys_of(p), keys_of(q)[1]]
    singles = gathered([group_tree([1, 2], [[a]]) for a in (3, 4)])
    assert singles == gathered([p])


def test_keys_tell_loss_marks_apart() -> None:
    assert branch_key([1, 2], [False, True]) != branch_key([1, 2], [True, True])
    assert branch_key([1, 2], [False, True]) == branch_key((1, 2), (False, True))


def test_mismatched_answers_do_not_depend_on_the_order() -> None:
    rows: list[Row] = [{"prompt": f"p{i}", "completion": f"c{i}", "label": True} for i in (3, 1, 2)]
    units = reader(objective_of(kto)).read(Table("unpaired", rows))
    own = [u.answers[0] for u in units]
    assert mismatched(units, 99) == [own[1], own[2], own[0]]  # 1 -> 2 -> 3 -> 1
    assert mismatched([units[2], units[0], units[1]], 99) == [own[0], own[1], own[2]]


@pytest.mark.parametrize("each", [[1, 1, 1], [2, 2], [3, 1, 2], [2, 3, 1, 2]])
def test_each_answer_is_another_prompts_mismatched_one_once(each: list[int]) -> None:
    rows: list[Row] = [
        {"prompt": f"p{i}", "completion": f"c{i}{j}", "label": True}
        for i, count in enumerate(each)
        for j in range(count)
    ]
    units = reader(objective_of(kto)).read(Table("unpaired", rows))
    found = mismatched(units, 99)
    assert sorted(found) == sorted(u.answers[0] for u in units)
    own = {u.answers[0]: u.prompt for u in units}
    assert all(own[other] != u.prompt for other, u in zip(found, units, strict=True))


def test_where_one_prompt_has_most_rows_each_gets_another_prompts_answer() -> None:
    rows: list[Row] = [
        {"prompt": p, "completion": f"c{i}", "label": True} for i, p in enumerate("aaab")
    ]
    units = reader(objective_of(kto)).read(Table("unpaired", rows))
    found = mismatched(units, 99)
    assert found[:3] == [units[3].answers[0]] * 3 and found[3] == units[0].answers[0]


def test_a_mismatched_answer_makes_no_row_longer_than_the_data_has() -> None:
    rows: list[Row] = [
        {"prompt": "p" * 40, "completion": "c", "label": True},
        {"prompt": "p", "completion": "c" * 30, "label": False},
    ]
    units = reader(objective_of(kto)).read(Table("unpaired", rows))
    most = max(u.tree().longest for u in units)
    cut, whole = mismatched(units, most)
    assert len(units[0].prompt) + len(cut) == most and len(cut) < 30
    assert whole == units[0].answers[0]
