"""Several tables as one in a call, a command and a recipe: names, kinds, ids, licences, lineage."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from pathlib import Path
from typing import cast

import pytest

from truing import cli, lineage, pipeline
from truing.command import _roles  # pyright: ignore[reportPrivateUsage]
from truing.context import Context, use
from truing.errors import InputError, unknown
from truing.keys import step_key
from truing.method import methods
from truing.plan import Plan
from truing.recipe import load
from truing.select.mixture import mixture
from truing.signature import Input
from truing.sources import check
from truing.store import Store
from truing.tables import Row, Table

EXAMPLES = [{"prompt": f"chat {i}", "completion": "Yes.", "id": i} for i in range(6)]
PAIRS = [{"prompt": f"ask {i}", "chosen": "Yes.", "rejected": "No."} for i in range(4)]
RECIPE = """
data: {{chat: chat.jsonl, ask: ask.jsonl}}
steps:
  some: {{do: select/sample, data: ask, n: 2}}
  mixed: {{do: select/mixture, data: {{{tables}}}, shares: {shares}}}
  part: {{do: select/split, data: mixed, part: held_out, held_out: 2, threshold: 0}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    Table("", EXAMPLES).write(tmp_path / "chat.jsonl")
    Table("", PAIRS).write(tmp_path / "ask.jsonl")
    Table("", [{"question": "Why?"}]).write(tmp_path / "odd.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(folder: Path, tables: str = "chat: chat, ask: some", shares: str = "null") -> Path:
    (folder / "r.yaml").write_text(RECIPE.format(tables=tables, shares=shares))
    return folder / "r.yaml"


def lineage_of(row: Row) -> Row:
    return cast(Row, row["lineage"])


def test_a_call_takes_names_of_tables_files_and_rows(folder: Path) -> None:
    more = [{"prompt": f"more {i}", "completion": "No."} for i in range(3)]
    made = methods["mixture"]({"chat": "chat.jsonl", "more": more, "own": Table("", more[:1])})
    said = Counter(str(lineage_of(r)["filters"]) for r in made)
    assert said == {"['mixture chat']": 6, "['mixture more']": 3, "['mixture own']": 1}
    by_place = methods["mixture"](["chat.jsonl", more], shares={"0": 1, "1": 1})
    assert len(by_place) == 6


@pytest.mark.parametrize(
    "typed",
    [
        "--data chat=chat.jsonl,ask=ask.jsonl",
        "--data chat=chat.jsonl --data ask=ask.jsonl --seed 1",
    ],
)
def test_a_command_takes_tables_by_name(
    folder: Path, capsys: pytest.CaptureFixture[str], typed: str
) -> None:
    words = ["select", "mixture", *typed.split(), "--shares", "{chat: 2, ask: 1}"]
    assert cli.main([*words, "--out", "made.jsonl"]) == 0
    told = "chat 6 of 6 rows, ask 3 of 4 rows (chosen answers as examples)"
    assert told in capsys.readouterr().err
    made = Table.read("made.jsonl")
    assert made.kind == "example" and len(made) == 9
    # Converted rows name those that they were made from.
    asked = {r["id"] for r in Table.read("ask.jsonl")}
    parents = [lineage_of(r).get("parents") for r in made]
    assert sum(p is not None and set(cast("list[str]", p)) <= asked for p in parents) == 3
    assert cli.main([*words[:-1], "{chat: 2}"]) == 2
    assert "setting 'shares' must have one number for each table" in capsys.readouterr().err


def test_a_recipe_takes_steps_and_data_by_name(folder: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    made = pipeline.run(recipe(folder, shares="{chat: 2, ask: 1}"), tmp_path / "runs", store=store)
    mixed = made.results["mixed"]
    assert isinstance(mixed, Table) and len(mixed) == 6
    assert sum(str(r["prompt"]).startswith("ask") for r in mixed) == 2
    seen = [json.loads(x) for x in (made.folder / "metrics.jsonl").read_text().splitlines()]
    counts = {m["table"]: (m["rows"], m["of"]) for m in seen if m["at"] == "mixed"}
    assert counts == {"chat": (4, 6), "ask": (2, 2)}
    # A converted row leads back to the pair, by whatever steps it went through.
    row = next(r for r in mixed if str(r["prompt"]).startswith("ask"))
    found = lineage.Rows(made.results, made.run.steps).trace(str(row["id"]), "mixed")
    assert "chosen" in found.parents[0].row


@pytest.mark.parametrize(
    ("tables", "shares", "told"),
    [
        ("chat: chat, ask: some", "{chat: 1, asked: 1}", "step mixed.*one number for each table"),
        ("chat: chat, ask: some", "{chat: 1, ask: 0}", "step mixed.*must be above 0"),
        ("chat: chat, odd: odd.jsonl", "null", "step mixed.*mixture odd: needs rows of kind exam"),
        ("odd: odd.jsonl, chat: chat", "null", "step mixed.*Rename columns of 'odd': its rows are"),
        ("ask: some, chat: chat", "null", "step mixed.*needs rows of kind pair.*Give 'chat' first"),
        ("chat: chat, ask: nowhere", "null", "step mixed.*called 'nowhere'"),
    ],
)
def test_a_recipe_is_refused_before_anything_runs(
    folder: Path, tables: str, shares: str, told: str
) -> None:
    with pytest.raises(InputError, match=told):
        check(load(recipe(folder, tables, shares)))


@pytest.mark.parametrize(
    ("tables", "told"),
    [
        ("chat: chat, ask: some", "step best.*needs rows of kind pair, got 'example'"),
        ("ask: some, more: ask.jsonl", ""),
    ],
)
def test_what_follows_is_promised_the_kind_of_the_first(
    folder: Path, tables: str, told: str
) -> None:
    next_one = "best: {do: evaluate/preference, model: base, data: mixed}"
    text = recipe(folder, tables).read_text()
    (folder / "r.yaml").write_text(f"models: {{base: 'hub:a/b'}}{text}  {next_one}\n")
    with pytest.raises(InputError, match=told) if told else contextlib.nullcontext():
        check(load(folder / "r.yaml"))


def test_every_one_of_several_tables_is_of_a_kind_that_is_taken(folder: Path) -> None:
    plan = Plan("labels", folder=folder)
    plan.step("labels", "synthesize/unified_labels", sources={"odd": "odd.jsonl", "a": "ask.jsonl"})
    with pytest.raises(InputError, match="step labels: needs rows of kind steps or pair"):
        check(plan)


def test_rows_keep_their_own_licences_and_numbers() -> None:
    free = Table("", EXAMPLES[:3])
    rows = [{**r, "prompt": f"other {i}"} for i, r in enumerate(EXAMPLES[:3])]
    bound = Table("", rows).with_lineage(licence="CC BY-NC 4.0")
    for tables in ({"free": free, "bound": bound}, {"bound": bound, "free": free}):
        made = methods["mixture"](tables)
        licences = {str(r["prompt"]): lineage_of(r).get("licence") for r in made}
        assert licences == {**{f"chat {i}": None for i in range(3)},
                            **{f"other {i}": "CC BY-NC 4.0" for i in range(3)}}  # fmt: skip
        assert {str(r["id"]) for r in made} == {"0", "1", "2", "0/2", "1/2", "2/2"}


def test_an_error_of_a_mixed_row_names_its_file(folder: Path) -> None:
    tables = {"chat": Table.read("chat.jsonl"), "ask": Table.read("ask.jsonl")}
    with use(Context(0)):
        made = mixture(tables, shuffle=False)
    assert [made.place(i) for i in (0, 5, 6, 9)] == [
        "chat.jsonl row 1", "chat.jsonl row 6", "ask.jsonl row 1", "ask.jsonl row 4",
    ]  # fmt: skip


def test_single_answers_of_dialogues_become_texts_beside_texts() -> None:
    said = [{"prompt": "Why?", "completion": [{"role": "assistant", "content": "So."}]}]
    with use(Context(0)):
        made = mixture({"texts": Table("", EXAMPLES), "said": Table("", said)}, shuffle=False)
    assert made[6]["completion"] == "So."
    turns = [{"role": "assistant", "content": "So."}, {"role": "user", "content": "Oh?"}]
    longer = Table("", [{"prompt": "Why?", "completion": [*turns, turns[0]]}])
    with use(Context(0)), pytest.raises(InputError, match="row 1: needs single answers"):
        mixture({"texts": Table("", EXAMPLES), "said": longer})


def test_older_forms_together_become_what_both_read_as() -> None:
    alpaca = Table("", [{"instruction": "Add.", "input": "1 1", "output": "2"}])
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    shared = Table("", [{"conversations": turns}])
    with use(Context(0)):
        made = mixture({"a": alpaca, "s": shared, "p": Table("", PAIRS)}, shuffle=False)
    assert made.kind == "example" and len(made) == 6
    assert (made[0]["prompt"], made[0]["completion"]) == ("Add.\n1 1", "2")
    assert cast("list[Row]", made[1]["messages"])[1]["content"] == "So."
    with use(Context(0)):
        assert mixture({"a": alpaca, "b": alpaca}).kind == "alpaca"
        asked = mixture({"a": alpaca, "b": Table("", [{"prompt": "Why?"}])})
    assert asked.kind == "prompt" and {r["prompt"] for r in asked} == {"Add.\n1 1", "Why?"}


def test_a_mark_in_an_address_is_no_name() -> None:
    wanted = Input("data", "Table", many=True)
    given = ["a=x.jsonl", "https://host/y.jsonl#sha256=17f3", "b=hub:o/z#sha256=9"]
    assert _roles(wanted, given) == {
        "a": "x.jsonl", "1": "https://host/y.jsonl#sha256=17f3", "b": "hub:o/z#sha256=9",
    }  # fmt: skip


def test_names_of_other_tools_lead_here() -> None:
    own = [*methods["mixture"].inputs, *methods["mixture"].settings]
    assert "Did you mean 'shares'?" in unknown("setting", "interleave_probs", own).fix
    assert "Did you mean 'stop'?" in unknown("setting", "stopping_strategy", own).fix
    learnt = [*methods["train/sft"].inputs, *methods["train/sft"].settings]
    for name in ("mix_strategy", "datasets"):
        assert "select/mixture" in unknown("setting", name, learnt).fix


@pytest.mark.parametrize(
    "given", ["[chat, ask]", "{chat: chat.jsonl, ask: ask.jsonl}", "'chat.jsonl,ask.jsonl'"]
)
def test_several_for_one_input_are_told_how_they_become_one(folder: Path, given: str) -> None:
    text = recipe(folder).read_text()
    told = f"{text}  few: {{do: select/sample, data: {given}, n: 1}}\n"
    (folder / "r.yaml").write_text(told)
    with pytest.raises(InputError, match=r"step few.*select/mixture makes one table of several"):
        load(folder / "r.yaml")
    tables = {"chat": Table("", EXAMPLES), "ask": Table("", PAIRS)}
    lists = [list(tables.values()), ["chat.jsonl", "ask.jsonl"], "chat.jsonl,ask.jsonl"]
    for several in (tables, *lists):
        with pytest.raises(InputError, match="select/mixture makes one table of several"):
            methods["sample"](several, n=1)


def test_the_order_of_tables_is_part_of_a_steps_key() -> None:
    """It decides the kind, the order of the rows and which of them get other ids."""
    told = methods["mixture"].validate({"shuffle": False})
    tables = {"a": Table("", EXAMPLES), "b": Table("", PAIRS)}
    turned = dict(reversed(tables.items()))
    one, other = (step_key(methods["mixture"], {"data": d}, told, 0) for d in (tables, turned))
    assert one != other


def test_a_mixture_of_mixtures_has_each_id_once() -> None:
    a, b, c = (Table("", [{"text": f"{x} {i}", "id": i} for i in range(3)]) for x in "abc")
    made = Table.joined([Table.joined([a, b]), c])
    assert len({row["id"] for row in made}) == 9


def test_what_follows_is_checked_on_the_rows_of_all_tables(folder: Path) -> None:
    """One file for each objective: neither alone names both of the heads."""
    for number in (0, 1):
        rows = [{**row, "objective": number} for row in PAIRS]
        Table("", rows).write(folder / f"{number}.jsonl")
    for asked, refused in ((2, False), (3, True)):
        plan = Plan("p")
        plan.step("mixed", "select/mixture", data={"a": "0.jsonl", "b": "1.jsonl"})
        plan.step("heads", "train/mah_dpo", model="smollm2-135m-instruct", data="mixed",
                  objectives=asked)  # fmt: skip
        error = pytest.raises(InputError, match="setting 'objectives'")
        with error if refused else contextlib.nullcontext():
            check(plan)


def test_a_first_table_of_an_unknown_kind_leaves_all_to_the_step(folder: Path) -> None:
    (folder / "own.py").write_text(
        "from truing import Plan, method\nfrom truing.tables import Table\n\n\n"
        '@method(verb="synthesize")\ndef mine(*, n: int = 1) -> Table:\n'
        '    return Table("", [{"prompt": "a", "completion": "b"}])\n\n\n'
        "def recipe():\n    plan = Plan('p')\n    plan.step('gen', 'synthesize/mine')\n"
        "    plan.step('mixed', 'select/mixture',\n"
        "              data={'gen': 'gen', 'ask': 'ask.jsonl', 'chat': 'chat.jsonl'})\n"
        "    return plan\n"
    )
    check(load(folder / "own.py"))


def test_rows_are_not_repeated_without_measure() -> None:
    many, one = ({"text": f"t {i}"} for i in range(300)), {"text": "one"}
    tables = {"many": Table("", list(many)), "one": Table("", [one])}
    with pytest.raises(InputError, match="repeated 100 times"):
        mixture(tables, shares={"many": 0.001, "one": 0.999}, stop="all_exhausted")
