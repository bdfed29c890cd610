"""Comparisons: contenders, budgets, and a whole one on the tiny model."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor
from torch.nn import Module

from truing import cli, contenders, pipeline, tablefiles
from truing.compare import _cost, _shown, compare, plan_of
from truing.contenders import (
    Contender,
    budget_of,
    contender,
    contenders_of,
    lack,
    members,
    parts,
    reasons,
    settings_of,
    taken,
)
from truing.core.reference import Reference
from truing.core.stats import mean_interval
from truing.core.tree import Packed
from truing.errors import Diverged, InputError, Stopped
from truing.method import methods
from truing.models import Model
from truing.plan import Plan
from truing.reports import Measure
from truing.sources import check_abilities, check_tables
from truing.strands import Strands
from truing.tables import Table

MODULE = sys.modules[plan_of.__module__]  # `truing.compare` by name is the function
ROWS = [
    {"prompt": f"Say {i}.", "chosen": f"It is {i}", "rejected": f"No, not {i} at all"}
    for i in range(24)
]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    return path


def test_contenders() -> None:
    one = contender("dpo@beta=0.3@schedule=linear", "train")
    assert (one.method, one.settings) == ("train/dpo", {"beta": 0.3, "schedule": "linear"})
    assert one.label == "dpo_beta_0.3_schedule_linear"
    assert contender("dpo@lr=1e-4", "train", {"lr": 1e-3, "beta": 1}).settings == {
        "lr": 1e-4,
        "beta": 1,
    }
    assert contender("steer/mean_difference", "train").method == "steer/mean_difference"
    shared = settings_of(["reminders=a,b", "targets=42", "other=1"], "--set")
    read = {"reminders": ("a", "b"), "targets": "42", "other": "1"}  # as `run --set` has them
    assert contender("d2o", "train", shared).settings == read
    with pytest.raises(InputError, match=r"^--set beta: setting 'beta'"):
        contender("dpo", "train", settings_of(["beta=high"], "--set"))
    with pytest.raises(InputError, match="setting=value"):
        contender("dpo@beta", "train")
    with pytest.raises(InputError, match="return a model"):
        contender("select/deita", "train")


def test_commas_and_at_signs_inside_of_settings_part_nothing() -> None:
    text = 'dpo@mix={"sft": 0.5, "nca": {"of": [0.2, 1]}},urpo@criteria="short, @ \\" plain",ipo'
    found = parts(text, ",")
    assert found == text.replace(",urpo", "\nurpo").replace(",ipo", "\nipo").split("\n")
    assert contender(found[0], "train").settings == {"mix": {"sft": 0.5, "nca": {"of": [0.2, 1]}}}
    assert contender(found[1], "train").settings == {"criteria": 'short, @ " plain'}
    assert parts('a,b},c"', ",") == [
        "a",
        "b}",
        'c"',
    ]  # what is never opened or closed holds nothing


def test_the_command_line_takes_several_added_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []

    def stop(**options: object) -> None:
        given.append(options["methods"])
        raise InputError("stop here")

    monkeypatch.setattr(MODULE, "from_options", stop)
    named = 'dpo@mix={"sft": 0.5, "nca": 0.2}, ,ipo'
    assert cli.main(["compare", "--methods", named, "--data", "pairs.jsonl"]) == 2
    assert given == [['dpo@mix={"sft": 0.5, "nca": 0.2}', "ipo"]]


def checked_as_a_run_does(found: list[Contender], data: Path) -> None:
    """All that is refused before a model is opened."""
    steps = plan_of(found, "smollm2-135m-instruct", str(data), 4, 1, held_out=4).check()
    check_abilities(steps)
    check_tables(steps, {("Table", str(data)): Table.read(data)})


def test_a_group_stands_for_all_that_the_pairs_can_train(pairs: Path, tmp_path: Path) -> None:
    assert members("dpo@beta=0.3", "train") == members("no_such_thing", "train") == []
    found = contenders_of(["preference"], "train")
    assert {"dpo", "kto", "simpo", "orpo", "d2o"} < {c.label for c in found}
    assert all(methods[c.method].group == "preference" and c.grouped for c in found)
    left = {c.label: why for c in found if (why := lack(c, Table.read(pairs)))}
    # mah_dpo has a head for each objective that the rows name, of which these may be too few, and
    # replay needs to be told which run to replay.
    others = {"mah_dpo", "replay"}
    assert {"tpo", "tpo_l"} <= set(left) <= {"tpo", "tpo_l", *others}
    assert f"tpo, tpo_l: needs the column 'gold' in {pairs}" in reasons(left)
    checked_as_a_run_does([c for c in found if c.label not in left], pairs)
    for name in left:
        with pytest.raises(InputError) as refused:
            checked_as_a_run_does([contender(name, "train")], pairs)
        assert refused.value.message == left[name]
    with_gold = tmp_path / "gold.jsonl"
    with_gold.write_text("".join(json.dumps(r | {"gold": "Well."}) + "\n" for r in ROWS))
    taken = [c for c in found if not lack(c, Table.read(with_gold))]
    assert {c.label for c in found} - {c.label for c in taken} <= others
    checked_as_a_run_does(taken, with_gold)


def test_what_else_a_comparison_cannot_give(pairs: Path) -> None:
    table = Table.read(pairs)
    assert lack(contender("gkd", "train"), table) == "needs teacher"
    assert lack(contender("grpo", "train"), table) == "needs rewards"
    rewards = {"rewards": {"short": {"use": "max_words", "n": 5}}}
    assert lack(contender("grpo", "train", rewards), table) == ""
    assert lack(contender("step_value", "train"), table).startswith("needs rows of kind steps")
    with pytest.raises(InputError, match="setting 'beta' must be at least 0"):
        lack(contender("dpo@beta=-1", "train"), table)  # wrong on any rows
    with pytest.raises(InputError, match="named twice"):
        contenders_of(["preference", "dpo"], "train")


def test_inputs_that_a_comparison_cannot_give_are_not_asked_for(pairs: Path) -> None:
    table = Table.read(pairs)

    def remedy(*names: str) -> str:
        found = [replace(contender(name, "train"), grouped=True) for name in names]
        with pytest.raises(InputError, match="none of these methods") as error:
            taken(found, table)
        return error.value.fix

    assert remedy("gkd") == "Name others; in a recipe a step is given any input"
    assert remedy("grpo") == "Name others, or give the settings that are missing by --set"
    assert remedy("step_value") == "Name others"


def test_left_out_methods_are_told(
    tiny_path: Path,
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    group = {"preference": ["dpo", "tpo"], "gold": ["tpo", "tpo_l"]}
    monkeypatch.setattr(contenders, "members", lambda text, verb: group.get(text, []))

    def run(name: str) -> object:
        return compare(
            [name], model=str(tiny_path), data=str(pairs), budget="8pairs", seeds=1, held_out=8,
            settings={"steps": 1}, runs=tmp_path / "runs",
        )  # fmt: skip

    found = run("preference")
    why = f"needs the column 'gold' in {pairs}"
    said = f"left out: tpo: {why}"
    assert said in capsys.readouterr().err.splitlines()
    assert found.table().endswith(said) and found.line()["left_out"] == {"tpo": why}  # type: ignore
    page = Path(str(found.line()["report"])).read_text()  # type: ignore[attr-defined]
    assert "Left out: tpo (needs the column &#39;gold&#39;" in page
    with pytest.raises(InputError, match="none of these methods can be compared"):
        run("gold")
    with pytest.raises(InputError, match="needs the column 'gold'"):
        run("tpo")


def test_budgets() -> None:
    assert [budget_of(t) for t in ("64pairs", "7", "12 rows")] == [64, 7, 12]
    with pytest.raises(InputError, match="number of rows"):
        budget_of("many")


def test_seconds_are_positive_and_skewed() -> None:
    found = _cost("dpo", [2.0, 2.0, 16.0])  # logarithms to base 2: 1, 1, 4
    half = 4.302652729911275  # Student's t at 2 degrees; sd and root n are both root 3
    assert found.value == pytest.approx(4.0)
    assert (found.lo, found.hi) == pytest.approx((2 ** (2 - half), 2 ** (2 + half)))
    assert 0 < found.lo  # the plain interval reaches from -13.4 to 26.7
    one = _cost("dpo", [0.0])
    assert (one.value, one.lo, one.hi) == pytest.approx((0.01, 0.01, 0.01))


def test_a_method_that_needs_more_is_refused() -> None:
    with pytest.raises(InputError, match="cannot give"):
        plan_of([contender("merge/ties", "train")], "m", "d", 4, 1, held_out=4)


def test_methods_share_rows_and_one_reference_pass(
    tiny_path: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "home"))  # whose cache holds nothing yet
    answers: list[int] = []  # computed in each pass over what the cache does not hold
    sweep, compute = Reference.sweep, Reference.compute

    def counted(self: Reference, *args: object) -> None:
        answers.append(0)
        sweep(self, *args)  # type: ignore[arg-type]

    def measured(self: Reference, module: Module, packed: Packed) -> dict[str, Tensor]:
        answers[-1] += int(packed.mask_UKT.any(-1).sum())
        return compute(self, module, packed)

    monkeypatch.setattr(Reference, "sweep", counted)
    monkeypatch.setattr(Reference, "compute", measured)
    questions = tmp_path / "questions.jsonl"  # two, since thirteen models are asked
    questions.write_text(2 * '{"prompt": "The sky is", "choices": ["soup", "blue"], "answer": 1}\n')
    monkeypatch.setattr(MODULE, "QUESTIONS", str(questions))
    read: list[Path] = []
    lines = tablefiles._json_lines
    monkeypatch.setattr(tablefiles, "_json_lines", lambda p: read.append(p) or lines(p))
    named = [f"{name}@steps=1" for name in ("dpo", "ipo", "simpo", "kto", "bco")] + ["bco@steps=2"]
    found = compare(
        named,
        model=str(tiny_path),
        data=str(pairs),
        budget="8pairs",
        seeds=2,
        held_out=8,
        runs=tmp_path / "runs",
    )
    # Two seeds draw two samples of eight pairs, whose 16 answers the first objective measures: ipo
    # finds them, and so does whatever trains on all rows that the pairs become (bco, two steps). In
    # one step kto sees half of these rows, which is another micro-batch, and mismatched answers;
    # bco sees the same half.
    assert answers == 2 * [16, 0, 8, 8, 0, 0]
    assert read.count(pairs) == 1
    assert [m.category for m in found.report if m.name == "gain"] == [
        name.replace("@", "_").replace("=", "_") for name in named
    ]
    line = found.line()
    assert line["seeds"] == 2
    assert "simpo_steps_1" in found.table()
    assert Path(str(line["report"])).is_file()
    rows = {s: n.key for s, n in found.result.results.items() if s.startswith("rows-")}
    assert rows["rows-0"] != rows["rows-1"]
    drawn = [found.result.results[f"rows-{s}"] for s in (0, 1)]
    held = found.result.results["held_out"]
    asked = [{str(r["prompt"]) for r in part} for part in (*drawn, held)]  # type: ignore[union-attr]
    assert len(set().union(*asked)) == sum(map(len, asked)) == 24  # no row in two of them
    assert found.report.meta["overlap"] is False and "overlap" not in found.table()
    said = "on the same 8 held-out pairs, each at 95 % by itself"
    assert f"intervals are over seeds, {said}" in found.table()
    assert said in Path(str(line["report"])).read_text()
    base = found.report.meta["base"]
    gain = found.report.get("gain", "dpo_steps_1")
    assert isinstance(base, dict)
    after = [
        found.result.results[f"dpo_steps_1-{s}-gain"].get("preference").value  # type: ignore
        for s in (0, 1)
    ]
    assert gain.value == pytest.approx(sum(after) / 2 - float(str(base["preference"])))
    # Seed by seed against the first method named.
    others = [
        found.result.results[f"ipo_steps_1-{s}-gain"].get("preference").value  # type: ignore
        for s in (0, 1)
    ]
    over = found.report.get("gain over first", "ipo_steps_1")
    lo, hi = mean_interval([b - a for a, b in zip(after, others, strict=True)])
    assert (over.value, over.lo, over.hi) == pytest.approx(
        (sum(others) / 2 - sum(after) / 2, lo, hi)
    )
    assert "over dpo_steps_1 [95 %]" in found.table()


def test_a_method_that_diverges_is_left_out(
    tiny_path: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild, tame = "dpo@lr=1e30", "ipo@lr=1e-4"
    words = ["--model", str(tiny_path), "--data", str(pairs), "--budget", "8", "--held-out", "8"]
    words += ["--seeds", "2", "--set", "steps=3", "--set", "warmup=0.0", "--set", "batch=4"]
    words += ["--runs", str(tmp_path / "runs"), "--json"]
    words[words.index("--budget") + 1] = "10"  # two of the 16 that are not held out: they overlap
    assert cli.main(["compare", "--methods", f"{wild},{tame}", *words]) == 0
    out, err = capsys.readouterr()
    line = json.loads(out)
    assert line["overlap"] is True and "the seeds' samples overlap" in err
    assert "whose samples overlap" in Path(line["report"]).read_text()
    why = line["left_out"]["dpo_lr_1e30"]
    assert why.startswith("step dpo_lr_1e30-0: the loss is not finite at step 2 of 3")
    assert f"left out: dpo_lr_1e30: {why}" in err.splitlines()
    measured = {m["category"] for m in line["measures"]}
    assert measured == {"ipo_lr_1e-4"}  # the table begins with the first that is left
    folder = Path(line["report"]).parent
    steps = json.loads((folder / "manifest.json").read_text())["steps"]
    assert steps["dpo_lr_1e30-0"]["status"] == "stopped"
    after = [n for n in steps if n.startswith("dpo_lr_1e30-") and n != "dpo_lr_1e30-0"]
    assert len(after) == 5 and all(steps[n]["status"] == "pending" for n in after)
    assert all(steps[n]["error"] == f"left out: {why}" for n in after)
    assert all(s["status"] == "done" for n, s in steps.items() if n.startswith("ipo"))
    page = Path(line["report"]).read_text()
    runs = str(tmp_path / "runs")
    assert f"<code>truing compare --methods {wild},{tame} --model {tiny_path}" in page
    assert f" --held-out 8 --set steps=3 --set warmup=0.0 --set batch=4 --runs {runs}<" in page
    assert "Left out: dpo_lr_1e30 (step dpo_lr_1e30-0: the loss is not finite" in page

    assert cli.main(["compare", "--methods", f"{wild},dpo@lr=1e31", *words]) == 3
    out, err = capsys.readouterr()
    assert json.loads(out)["exit_code"] == 3 and "is not finite at step" in json.loads(out)["error"]
    assert err.count("left out: dpo_lr_1e3") == 2


def test_only_what_diverges_is_spared() -> None:
    strands = Strands({"a-0": "a", "b-0": "b"})
    for error in (Stopped("the disk is full"), InputError("wrong"), KeyboardInterrupt()):
        with pytest.raises(type(error)), strands.apart("a-0"):
            raise error
    with pytest.raises(Diverged), strands.apart("base"):  # of no strand
        raise Diverged("nan")
    assert strands.lost == {}
    with strands.apart("a-0"):
        raise Diverged("nan")
    assert strands.lost == {"a": "step a-0: nan"} and strands.why_not("b-0") == ""
    with pytest.raises(Diverged), strands.apart("b-0"):
        raise Diverged("nan too")


def test_a_lost_strand_holds_no_memory() -> None:
    strands = Strands({"a-0": "a", "b-0": "b"})
    held: list[weakref.ref[Module]] = []

    def train() -> None:
        module = Module()
        held.append(weakref.ref(module))
        raise Diverged("nan")

    with strands.apart("a-0"):
        train()
    gc.collect()
    assert held[0]() is None and strands.lost == {"a": "step a-0: nan"}


def test_what_takes_something_of_a_lost_strand_falls_with_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    strands = Strands({"a-0": "a", "b-0": "b", "b-1": "b", "c-0": "c"})
    with strands.apart("a-0"):
        raise Diverged("nan")
    why = "step a-0: nan"
    assert strands.why_not("alone", ["base", "a-0"]) == why
    assert strands.why_not("after", ["alone"]) == why
    assert strands.why_not("other", ["base"]) == strands.why_not("c-0", []) == ""
    assert strands.why_not("b-0", ["after"]) == strands.why_not("b-1", []) == why
    assert strands.lost == {"a": why, "b": why} and strands.alone == {"alone": why, "after": why}
    said = capsys.readouterr().err.splitlines()
    assert said == [f"left out: {n}: {why}" for n in ("a", "alone", "after", "b")]
    with pytest.raises(Diverged, match="nan"):  # the last strand
        strands.why_not("c-0", ["b-1"])


def test_a_plan_leaves_out_what_depends_on_a_lost_strand(
    tiny_path: Path, pairs: Path, tmp_path: Path
) -> None:
    plan = Plan("falls")
    plan.model("base", str(tiny_path))
    plan.table("d", str(pairs))
    how = {"data": "d", "batch": 4, "rank": 0, "dtype": "float32"}
    for name, lr in (("a", 1e-4), ("b", 1e30)):
        plan.step(name, "train/dpo", model="base", steps=3, lr=lr, clip=0.0, **how)
    plan.step("after", "train/dpo", model="b", steps=1, **how)
    plan.step("last", "merge/linear", models={"x": "after", "y": "a"})
    plan.step("mixed", "merge/linear", models={"x": "base", "y": "a"})
    found = pipeline.run(plan, tmp_path / "runs", strands={"a": "A", "b": "B"})
    assert set(found.results) == {"a", "mixed"}
    assert set(found.lost) == {"B", "after", "last"} and len(set(found.lost.values())) == 1
    assert found.lost["B"].startswith("step b: the ") and "is not finite" in found.lost["B"]
    for name in ("after", "last"):
        assert found.run.steps[name]["status"] == "pending"
        assert found.run.steps[name]["error"] == f"left out: {found.lost['B']}"


def test_nouns_instead_of_names(tiny_path: Path, tmp_path: Path) -> None:
    model = Model.open(tiny_path).called("mine")
    both = [
        compare("dpo@steps=1, ipo@steps=1", model=model, data=data, budget=8, seeds=1, held_out=8,
                runs=tmp_path / "runs")
        for data in (Table("pair", ROWS), ROWS)
    ]  # fmt: skip
    first, again = (c.report.get("gain", "ipo_steps_1").value for c in both)
    assert first == again and repr(both[0]) == both[0].table()
    manifest = json.loads((both[0].result.folder / "manifest.json").read_text())
    (source,) = manifest["models"]
    assert source == f"mine {model.key[:12]}" and manifest["models"][source]["key"] == model.key
    with pytest.raises(InputError, match="compare: model takes a Model"):
        compare(["dpo"], model=3, data=ROWS, budget=8, held_out=8)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="compare: data takes a Table"):
        compare(["dpo"], model=model, data=3, budget=8, held_out=8)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="--seeds: must be a whole number"):
        compare(["dpo"], model=model, data=ROWS, seeds="3")  # type: ignore[arg-type]


def test_a_group_leaves_out_who_lacks_a_shared_setting() -> None:
    table = Table("pair", ROWS)
    one = Contender("slic", "train/slic", {"beta": 0.2}, grouped=True)
    assert "unknown setting 'beta'" in lack(one, table)
    with pytest.raises(InputError, match="unknown setting 'beta'"):
        lack(replace(one, grouped=False), table)


def test_seeds_that_agree_are_several() -> None:
    assert _shown(Measure("gain", 0.125, 0.125, 0.125, 3, "share", "dpo", ""), 3) == (
        "+0.125 [+0.125, +0.125]"
    )
    assert "one seed" in _shown(Measure("gain", 0.125, 0.125, 0.125, 1, "share", "dpo", ""), 3)
