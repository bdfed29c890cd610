"""What a plan or a command would refuse is refused before a model is opened or a step runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from truing import pipeline, recipe
from truing.catalogue import methods as method_entries
from truing.cli import main
from truing.core.objective import Loss, Measurements, Objective
from truing.core.trainer.preflight import check_given, check_loss, check_rows, divisor
from truing.errors import InputError
from truing.method import component, methods
from truing.models import Model
from truing.plan import Plan
from truing.signature import Setting
from truing.sources import check_tables
from truing.store import Store
from truing.tables import Row, Table

PAIR = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
FAR = "smollm2-135m-instruct"
Told = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(Model, "open", lambda *_: pytest.fail("a model was opened"))
    monkeypatch.chdir(tmp_path)
    rows = {
        "pairs": [PAIR | {"prompt": f"Why {i}?"} for i in range(12)],
        "prompts": [{"prompt": "Why?"}],
        "typo": [{"prompt": "Why?", "chosn": "So.", "rejected": "No."}],
        "labelled": [{"prompt": "Why?", "completion": "So.", "lable": True}],
    }
    for name, items in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in items))
    (tmp_path / "good.yaml").write_text("- {id: a, text: Be brief., check: {use: max_words, n: 4}}")
    (tmp_path / "bad.yaml").write_text("- {id: a, text: Be brief., check: {use: max_wrds, n: 4}}")
    return tmp_path


@pytest.fixture
def told(folder: Path, capsys: pytest.CaptureFixture[str]) -> Told:
    """The one line of a command that must fail."""

    def run(words: str) -> str:
        capsys.readouterr()
        assert main(words.split()) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said.splitlines()[-1]

    return run


@pytest.mark.parametrize(
    ("method", "given", "part"),
    [
        ("train dpo", "--lr -1", "'lr' must be at least 0"),
        ("train dpo", "--steps -3", "'steps' must be at least 0"),
        ("train dpo", "--batch 0", "'batch' must be at least 1"),
        ("train dpo", "--epochs 0", "steps and epochs are 0"),
        ("train dpo", "--rank -1", "'rank' must be at least 0"),
        ("train dpo", "--beta nan", "'beta': must be finite"),
        ("train dpo", "--beta -1", "'beta' must be at least 0"),
        ("train robust-dpo", "--label-smoothing 0.7", "'label_smoothing' must be in [0, 0.5)"),
        ("train ld-dpo", "--alpha 2", "'alpha' must be in [0, 1]"),
        ("train tr-dpo", "--share 3", "'share' must be in (0, 1]"),
        ("train ipo", "--beta 0", "'beta' must be above 0"),
        ("train rpo", "--alpha -1", "'alpha' must be at least 0"),
        ("train discopop", "--tau 0", "'tau' must be above 0"),
        ("train bradley-terry", "--centring -1", "'centring' must be at least 0"),
        ("train aot", "--label-smoothing -1", "'label_smoothing' must be at least 0"),
        ("train kto", "--batch 1", "'batch' must be at least 2"),
        ("train cispo", "--cap -1", "'cap' must be above 0"),
        ("train gmpo", "--clip-log -1", "'clip_log' must be at least 0"),
        ("train grpo-top-kl", "--top-k 1", "'top_k' must be at least 2"),
        ("train grpo", "--answers 0", "'answers' must be at least 1"),
        ("train grpo", "--answers 1", "'answers' must be at least 2"),
        ("train grpo", "--top-p 2", "top_p"),
    ],
)
def test_settings_out_of_range(told: Told, method: str, given: str, part: str) -> None:
    online = any(n in method for n in ("grpo", "cispo", "gmpo"))
    data = "prompts.jsonl" if online else "pairs.jsonl"
    said = told(f"{method} --model {FAR} --data {data} {given}")
    assert part in said and f"truing {method}" in said
    name, value = given.removeprefix("--").split()
    plan = Plan("p")
    plan.step("rules", "specify/principles_file", path="good.yaml")
    plan.step("made", method.replace(" ", "/"), model=FAR, data=data)
    plan.override(f"made.{name.replace('-', '_')}={value}")
    with pytest.raises(InputError) as error:
        plan.check()
    assert part in str(error.value) and "step made" in str(error.value)


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("train/dpo", {"lr": True}),
        ("train/dpo", {"steps": True}),
        ("train/grpo", {"rewards": {"a": {"use": "max_words", "n": True}}}),
        ("merge/linear", {"weights": {"a": True}}),
    ],
)
def test_true_is_no_number(method: str, given: dict[str, object]) -> None:
    plan = Plan("p")
    source = {"models": {"a": FAR, "b": FAR}} if "merge" in method else {"model": FAR}
    source |= {"data": "everyday_prompts"} if "grpo" in method else {}
    source |= {"data": "helpful_pairs"} if "dpo" in method else {}
    plan.step("made", method, **source, **given)
    with pytest.raises(InputError, match="must be a number, not true or false"):
        plan.check()
    for place in ("seed", "made.seed"):
        with pytest.raises(InputError, match="the seed must be a whole number"):
            plan.override(f"{place}=true")


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (tuple[int, ...], "3,4", (3, 4)),
        (tuple[int, ...], "3", (3,)),
        (list[str] | None, "END, 42", ["END", "42"]),
        (list[float], "[1, 2]", [1.0, 2.0]),
        (dict[str, int], "{a: 1}", {"a": 1}),
        (str | None, "null", None),
        (str | None, "42", "42"),
        (str, "{a: 1}", "{a: 1}"),
    ],
)
def test_what_is_typed_for_a_setting(kind: object, text: str, value: object) -> None:
    assert Setting("x", kind, None).parse(text) == value


def test_what_is_typed_wrongly_is_told_as_it_was_read() -> None:
    with pytest.raises(InputError, match=r"type tuple\[int, \.\.\.\], such as \[1, 2\]$"):
        Setting("x", tuple[int, ...], ()).parse("3;4")
    with pytest.raises(InputError, match=r"setting 'x', entry 'a': input should be a valid int"):
        Setting("x", dict[str, int], {}).parse("{a: b}")
    for text in ("\n\n", ",", "a,", "", "Sorry, I cannot", "\nUser:", 'a, "b,c"', "'a','b'"):
        with pytest.raises(InputError, match=r'type list\[str\], such as \["a", "b"\]$'):
            Setting("x", list[str], []).parse(text)


@pytest.mark.parametrize(
    ("method", "given", "part"),
    [
        ("cpo", {"loss": "ipo", "beta": 0}, "'beta' must not be 0: the loss divides by it"),
        ("online_dpo", {"kind": "ipo", "beta": 0}, "'beta' must not be 0: the loss divides by it"),
        ("reinforce_plus_plus", {"baseline": True, "answers": 1}, "'answers' must be at least 2"),
        ("dpo", {"mix": {"ipo": {"weight": 1, "beta": 0}}}, "'beta' must be above 0"),
    ],
)
def test_settings_that_do_not_go_together(
    folder: Path, method: str, given: dict[str, object], part: str
) -> None:
    with pytest.raises(InputError, match=re.escape(part)):
        methods[method].check(given, {})


Found = Callable[[Mapping[str, object]], object]


@pytest.mark.parametrize(
    ("call", "given", "name"),
    [
        # The first of two zeros is not what the loss divides by.
        (lambda s: 1 / s["scale"], {"shift": 0.0, "scale": 0.0}, "scale"),
        (lambda s: 1 / (s["shift"] * s["scale"]), {"shift": 0.0, "scale": 0.0}, "scale"),
        (lambda s: 1 / (s["shift"] + s["scale"]), {"shift": 0.0, "scale": 0.0}, "shift"),
        (lambda s: 1 / s["free"], {"shift": 0.0, "free": 0.0}, "free"),  # whose default is 0
        (lambda s: 1 / (s["scale"] - 2), {"shift": 0.0, "scale": 2.0}, ""),
        (lambda s: 1 / (s["on"] * 0), {"shift": 0.0, "on": False}, ""),
    ],
)
def test_the_setting_that_a_loss_divides_by_is_found_by_trying(
    call: Found, given: dict[str, object], name: str
) -> None:
    usual = {"shift": 0.5, "scale": 3.0, "free": 0.0, "on": True}
    assert divisor(call, given, usual) == name


def test_a_zero_beside_the_one_that_is_divided_by_is_not_blamed() -> None:
    def loss(m: Measurements, *, shift: float = 0.5, scale: float = 3.0) -> Loss:
        return Loss((m.seq()[:, 0] + shift) * (1 / scale))

    spec = Objective("made_up", loss, "pair", ("logp",), "pair", {})
    with pytest.raises(InputError, match="setting 'scale' must not be 0: the loss divides by it"):
        check_loss(spec, {"shift": 0.0, "scale": 0.0})
    check_loss(spec, {"shift": 0.0, "scale": 1.0})


@pytest.mark.parametrize(
    ("method", "given", "part"),
    [
        ("merge ties", "--density 3", "'density' must be in (0, 1]"),
        ("decode best-of-n", "--n 0", "'n' must be at least 1"),
        ("decode deal", "--beams 0", "'beams' must be at least 1"),
        ("recover weight-restore", "--batch 0", "'batch' must be at least 1"),
        ("recover weight-restore", "--save-every 0", "'save_every' must be at least 1"),
        ("recover weight-restore", "--rate -1", "'rate' must be from 0 to 1"),
        ("recover weight-restore", "--layers 2", "'layers' must be in (0, 1]"),
        ("recover weight-restore", "--prompts -3", "'prompts' must be at least 1"),
        ("synthesize principle-pairs", "--k 1", "'k' must be at least 2"),
        ("synthesize magpie", "--temperature 0", "'temperature' must be above 0"),
        ("synthesize salmon", "--noise 1", "'noise' must be in [0, 1)"),
        ("attack lora-undo", "--rank 0", "'rank' must be at least 1"),
        ("evaluate adherence", "--top-p 2", "'top_p' must be in (0, 1]"),
        ("specify lint", "--k 0", "'k' must be at least 1"),
        ("select deita", "--m 0", "'m' must be at least 1"),
    ],
)
def test_settings_of_plain_functions(told: Told, method: str, given: str, part: str) -> None:
    said = told(f"{method} {given}")
    assert part in said and f"truing {method}" in said


def test_a_setting_of_a_late_step_is_refused_before_the_first_one(folder: Path) -> None:
    (folder / "r.yaml").write_text(
        f"models: {{base: {FAR}}}\nsteps:\n"
        "  tuned: {do: train/dpo, model: base, data: pairs.jsonl}\n"
        "  merged:\n    do: merge/ties\n    base: base\n    models: {a: tuned}\n"
        "    density: 3\n"
    )
    with pytest.raises(InputError, match=r"r\.yaml line 8 step merged: setting 'density' must be"):
        recipe.load(folder / "r.yaml").check()


@pytest.mark.parametrize("given", ["--eval-every 5", "--keep-best true", "--patience 2"])
def test_what_held_out_rows_are_for_without_any(folder: Path, told: Told, given: str) -> None:
    name, value = given.removeprefix("--").replace("-", "_").split()
    part = f"setting '{name}' counts for nothing: there are no held-out rows"
    said = told(f"train dpo --model {FAR} --data pairs.jsonl {given}")
    assert part in said and "truing train dpo" in said
    text = (
        f"models: {{base: {FAR}}}\nsteps:\n"
        "  held: {do: select/sample, data: pairs.jsonl, n: 4}\n"
        "  tuned:\n    do: train/dpo\n    model: base\n    data: pairs.jsonl\n"
        f"    {name}: {value}\n"
    )
    (folder / "r.yaml").write_text(text)
    with pytest.raises(InputError, match=rf"r\.yaml line 8 step tuned: {part}"):
        recipe.load(folder / "r.yaml").check()
    for rows in ("pairs.jsonl", "held"):  # of a file, or of a step that has not run yet
        (folder / "r.yaml").write_text(f"{text}    held_out: {rows}\n")
        assert "held_out" in recipe.load(folder / "r.yaml").check()[-1].sources


WATCHED = sorted(e.id for e in method_entries().values() if "held_out" in methods[e.id].inputs)


@pytest.mark.parametrize("name", WATCHED)
def test_so_does_every_method_that_takes_such_rows(name: str) -> None:
    defaults = {n: s.default for n, s in methods[name].settings.items()}
    check_given(defaults, {"data"}, lambda setting: setting)
    with pytest.raises(InputError, match="setting 'keep_best' counts for nothing"):
        check_given(defaults | {"keep_best": True}, {"data"}, lambda setting: setting)
    check_given(defaults | {"keep_best": True}, {"data", "held_out"}, lambda setting: setting)


def test_a_method_that_is_called_checks_the_same() -> None:
    with pytest.raises(InputError, match="'density' must be in"):
        methods["ties"]("no model", {"a": "no model"}, density=3.0)
    with pytest.raises(InputError, match="needs rows of kind pair, got 'prompt'"):
        methods["mean_difference"]("no model", Table("prompt", [{"prompt": "Why?"}]))


def test_a_port_that_is_none(told: Told) -> None:
    said = told(f"serve {FAR} --port 99999999")
    assert "'port' must be from 0 to 65535" in said
    assert "'waiting' must be at least 1" in told(f"serve {FAR} --waiting 0")


@pytest.mark.parametrize(
    ("method", "data", "parts"),
    [
        ("train/dpo", "prompts", ["needs rows of kind pair, got 'prompt'"]),
        ("train/dpo", "typo", ["Did you mean 'chosen' by 'chosn'?"]),
        ("train/kto", "labelled", ["Did you mean 'label' by 'lable'?"]),
        ("train/grao", "prompts", ["needs rows of kind example"]),
    ],
)
def test_rows_of_another_kind(
    folder: Path, told: Told, method: str, data: str, parts: list[str]
) -> None:
    said = told(f"{method.replace('_', '-').replace('/', ' ')} --model {FAR} --data {data}.jsonl")
    assert all(p in said for p in parts), said
    for through in (False, True):
        plan = Plan("p", folder=folder)
        plan.step("rules", "specify/principles_file", path="good.yaml")
        given = f"{data}.jsonl"
        if through:
            plan.step("some", "select/sample", data=given, n=1)
            given = "some"
        plan.step("made", method, model=FAR, data=given)
        with pytest.raises(InputError) as error:
            pipeline.run(plan, folder / "runs")
        assert all(p in str(error.value) for p in parts)
        assert not (folder / "runs").exists() and Store().keys() == []


ASKED = {"prompt": [{"role": "user", "content": "Why?"}]}
MESSAGES = {"messages": [*ASKED["prompt"], {"role": "assistant", "content": "So."}]}
ROWS: dict[str, dict[str, object]] = {
    "prompt": ASKED,
    "messages": MESSAGES,
    "example": ASKED | {"completion": "So."},
    "pair": ASKED | {"chosen": "So.", "rejected": "No."},
    "unpaired": ASKED | {"completion": "So.", "label": True},
    "group": ASKED | {"completions": ["So.", "No."], "scores": [1, 0]},
    "steps": ASKED | {"steps": ["So.", "No."], "labels": [1, 0]},
    "dialogue_pair": dict.fromkeys(("chosen", "rejected"), MESSAGES["messages"]),
    "text": {"text": "So."},
    "record": {"start": 3},
}
DECLARED = {
    name: methods[name].declared.__dict__.get("__truing__", {}).get("rows", {}) for name in methods
}
# Kinds of rows by input, of those that do not take any.
PLAIN = {
    name: some
    for name, rows in DECLARED.items()
    if (some := {given: kinds for given, kinds in rows.items() if kinds})
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_functions_take_what_they_themselves_expect(name: str) -> None:
    method = methods[name]
    settings = {n: s.default for n, s in method.settings.items()}
    taken: set[str] = set()
    for given, kinds in PLAIN[name].items():
        for like, row in ROWS.items():
            table = Table("", [row])
            try:
                table.expect(*kinds)
            except InputError as error:
                with pytest.raises(InputError) as told:
                    method.check(settings, {given: table}, where="here")
                assert told.value.message == error.message
            else:
                method.check(settings, {given: table}, where="here")
                taken.add(like)
    assert taken and taken < set(ROWS)
    assert "prompt" not in taken or "messages" in taken


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("evaluate preference --data typo.jsonl", ["kind pair", "Did you mean 'chosen' by"]),
        ("evaluate adherence --prompts text.jsonl --principles good.yaml", ["kind prompt"]),
        ("attack lora-undo --data prompts.jsonl", ["kind example, got 'prompt'"]),
        ("merge mixture-of-experts --models {m} --prompts text.jsonl", ["kind prompt or example"]),
        ("steer mean-difference --data prompts.jsonl", ["kind pair, got 'prompt'"]),
        (f"evaluate win-rate --baseline {FAR} --prompts text.jsonl", ["kind prompt, got 'text'"]),
        ("evaluate ability --texts pairs.jsonl", ["kind text, got 'pair'"]),
        ("specify lint --principles good.yaml --answers prompts.jsonl", ["kind example"]),
        (
            f"recover weight-restore --trusted {FAR} --refuse text.jsonl --task pairs.jsonl",
            ["kind prompt, got 'text'"],
        ),
    ],
)
def test_plain_functions_refuse_rows_before_a_model_is_opened(
    folder: Path, told: Told, words: str, parts: list[str]
) -> None:
    (folder / "text.jsonl").write_text('{"text": "So."}\n')
    said = told(words.replace("{m}", FAR) if "{m}" in words else f"{words} --model {FAR}")
    assert all(p in said for p in parts), said


def test_rows_that_a_step_will_make_are_refused_before_it_makes_them(folder: Path) -> None:
    def plan(method: str, settings: dict[str, object], **asked: object) -> Plan:
        made = Plan("p", folder=folder)
        made.step("asked", "synthesize/magpie", model=FAR, n=2, **asked)
        made.step("some", "select/sample", data="asked", n=1)
        made.step("made", method, model=FAR, data="some", **settings)
        return made

    with pytest.raises(InputError) as error:
        pipeline.run(plan("train/dpo", {}), folder / "runs")
    told = "step made: needs rows of kind pair, got 'prompt' from step asked"
    assert told in str(error.value) and Store().keys() == []
    assert "Their columns are prompt, chosen, rejected" in str(error.value)
    # With answers they are examples; of what else a row will hold nothing is known.
    with pytest.raises(InputError, match="kind example"):
        check_tables(plan("train/sft", {}).check(), {})
    for answered in ({"respond": True}, {"turns": 2}):
        check_tables(plan("train/sft", {}, **answered).check(), {})
    check_tables(plan("train/grpo_top_kl", {"ptx": 0.1}).check(), {})


def test_rows_that_a_step_will_make_are_converted_like_others(folder: Path) -> None:
    plan = Plan("p", folder=folder)
    plan.step("rules", "specify/principles_file", path="good.yaml")
    plan.step(
        "pairs", "synthesize/principle_pairs", model=FAR, prompts="prompts.jsonl",
        principles="rules",
    )  # fmt: skip
    plan.step("kto", "train/kto", model=FAR, data="pairs")
    plan.step("seen", "evaluate/adherence", model="kto", prompts="pairs", principles="rules")
    check_tables(plan.check(), {})
    plan.step("steps", "train/process_reward", model=FAR, data="pairs")
    with pytest.raises(InputError, match=r"step steps: needs rows of kind steps, got 'pair' from"):
        check_tables(plan.check(), {})


def test_the_input_whose_rows_are_refused_is_named(folder: Path) -> None:
    (folder / "text.jsonl").write_text('{"text": "So."}\n')
    (folder / "r.yaml").write_text(
        "steps:\n  seen:\n    do: evaluate/refusal_rate\n"
        f"    model: {FAR}\n    prompts: prompts.jsonl\n    neutral: text.jsonl\n"
    )
    with pytest.raises(InputError, match=r"r\.yaml line 6 step seen: needs rows of kind prompt"):
        pipeline.run(recipe.load(folder / "r.yaml"), folder / "runs")
    assert Store().keys() == []


def test_an_environments_tasks_may_be_of_any_kind() -> None:
    tasks = Table("record", [{"start": 3}])
    grpo = methods["train/grpo"]
    settings = grpo.validate({"environment": {"use": "running_sum"}})
    grpo.check(settings, {"data": tasks})
    with pytest.raises(InputError, match="needs rows of kind prompt"):
        grpo.check(grpo.validate({}), {"data": tasks})


def test_a_column_that_only_some_settings_need() -> None:
    method, data = (
        methods["grpo_top_kl"],
        {"data": Table("prompt", [{"prompt": "a", "compl": "b"}])},
    )
    method.check(method.validate({}), data)
    with pytest.raises(InputError, match=r"'completion'.*Did you mean 'completion' by 'compl'\?"):
        method.check(method.validate({"ptx": 0.1}), data)


def test_rows_that_are_converted_pass() -> None:
    check_rows(Table("pair", [PAIR]), "unpaired", "kto", ["label"])
    check_rows(Table("pair", [PAIR]), "example", "sft")


def test_the_checks_of_principles_are_resolved_before_a_step_runs(folder: Path, told: Told) -> None:
    for words in (
        f"synthesize principle-pairs --model {FAR} --prompts prompts.jsonl --principles bad.yaml",
        "specify principles-file --path bad.yaml",
    ):
        assert "Did you mean 'max_words'?" in told(words)
    for given in ({"principles": "bad.yaml"}, {"principles": "rules"}):
        plan = Plan("p", folder=folder)
        plan.step("few", "select/sample", data="pairs.jsonl", n=2)
        plan.step("rules", "specify/principles_file", path="bad.yaml")
        plan.step("seen", "evaluate/adherence", model=FAR, prompts="prompts.jsonl", **given)
        with pytest.raises(InputError, match=r"step .*Did you mean 'max_words'\?"):
            pipeline.run(plan, folder / "runs")
        assert Store().keys() == []


def test_a_comparison_of_too_many_rows(told: Told) -> None:
    common = f"compare --methods dpo --model {FAR} --seeds 1"
    said = told(f"{common} --data pairs.jsonl --budget 200 --held-out 4")
    assert "--budget 200" in said and "--held-out 4" in said and "12 rows" in said
    assert "needs rows of kind pair" in told(f"{common} --data prompts.jsonl --budget 1")


def test_nearest_names(told: Told, folder: Path) -> None:
    said = told(f"train dpo --model {FAR} --data pairs.jsonl --bata 0.2")
    assert said == "truing: truing train dpo: unknown setting 'bata'. Did you mean 'beta'?"
    said = told(f"compare --methods preferenc --model {FAR} --data pairs.jsonl")
    assert "Did you mean 'preference'?" in said
    plan = Plan("p", folder=folder)
    plan.step("made", "train/dpo", model=FAR, data="pairs.jsonl", bata=0.2)
    with pytest.raises(InputError, match=r"'bata'. Did you mean 'beta'\?"):
        plan.check()


def test_a_name_that_no_model_or_data_set_of_the_recipe_has(folder: Path) -> None:
    (folder / "r.yaml").write_text(
        f"models: {{base: {FAR}}}\ndata: {{mine: pairs.jsonl}}\n"
        "steps:\n  made: {do: train/dpo, model: base, data: mine}\n"
    )
    with pytest.raises(InputError, match=r"unknown model 'bsae'. Did you mean 'base'\?"):
        recipe.load(folder / "r.yaml", ["models.bsae=x"])
    with pytest.raises(InputError, match=r"unknown data set 'mnie'. Did you mean 'mine'\?"):
        recipe.load(folder / "r.yaml", ["data.mnie=x"])
    assert recipe.load(folder / "r.yaml", ["models.base=a/b"]).models == {"base": "a/b"}


@pytest.mark.parametrize(
    ("method", "settings", "part"),
    [
        ("grpo", {"environment": {"use": "runing_sum"}}, "Did you mean 'running_sum'?"),
        ("grpo", {"rewards": {"short": {"use": "max_wrds", "n": 4}}}, "Did you mean 'max_words'?"),
        ("ppo", {"refill": 2}, "groups of equal rewards teach here too"),
        ("grao", {"environment": {"use": "running_sum"}}, "was given in no episode"),
    ],
)
def test_what_settings_refer_to(method: str, settings: dict[str, object], part: str) -> None:
    plan = Plan("p")
    plan.step("made", f"train/{method}", model=FAR, data="everyday_prompts", **settings)
    with pytest.raises(InputError) as error:
        plan.check()
    assert part in str(error.value) and "setting" in str(error.value)


@component("reward")
def scaled_letters(rows: list[Row], *, scale: float) -> list[float]:
    return [scale * len(str(row["completion"])) for row in rows]


@pytest.mark.parametrize(
    ("reward", "part"),
    [
        ("{use: max_words, m: 3}", "unknown setting 'm'"),
        ("{use: max_words, n: x}", "setting 'n': input should be a valid integer"),
        ("{use: max_words}", "setting 'n' is missing"),
        ("{use: max-words, n: 3, rows: []}", "unknown setting 'rows'"),
        ("{use: scaled_letters, scal: 1}", "Did you mean 'scale'?"),
        ("{use: judged, model: {use: panel, judges: [FAR], rule: most}}", "setting 'rule': input"),
    ],
)
def test_settings_of_a_later_steps_reward(folder: Path, reward: str, part: str) -> None:
    (folder / "r.yaml").write_text(
        f"models: {{base: {FAR}}}\nsteps:\n"
        "  first: {do: train/dpo, model: base, data: pairs.jsonl}\n"
        "  second: {do: train/grpo, model: first, data: prompts.jsonl,\n"
        f"    rewards: {{b: {reward.replace('FAR', FAR)}}}}}\n"
    )
    with pytest.raises(InputError) as error:
        recipe.load(folder / "r.yaml")
    said = str(error.value)
    assert "r.yaml line 5 step second" in said and "setting 'rewards': " in said and part in said
    assert error.value.fix


def test_settings_of_rewards_that_are_right(folder: Path) -> None:
    plan = Plan("p", folder=folder)
    plan.step(
        "made", "train/grpo", model=FAR, data="prompts.jsonl",
        rewards={
            "own": {"use": "scaled_letters", "scale": 2},
            "short": {"use": "max_words", "n": 3},
            "liked": {"use": "judged", "model": {"use": "panel", "judges": [FAR, FAR]}},
        },
    )  # fmt: skip
    assert plan.check()
