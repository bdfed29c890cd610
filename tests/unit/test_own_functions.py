"""Functions of a user's own: bare ones in plain calls, declared ones in scripts and recipes."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import importlib
import io
import json
import pickle
import re
import runpy
import sys
import textwrap
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from truing import catalogue, cli, declared, recipe, references
from truing.context import Context, current, use
from truing.core import together
from truing.core.generate import generate
from truing.core.identity import code
from truing.core.rollout import maker
from truing.errors import InputError
from truing.keys import step_key
from truing.method import component, get_component, method, methods, resolve, score
from truing.models import Model
from truing.plan import Plan
from truing.principles import Principle, Principles
from truing.recipe import load
from truing.tables import Row, Table

WORDS = "lime oak rain stone river cloud ash fern".split()
PROMPTS = Table("prompt", [{"prompt": f"say {w}", "wanted": w} for w in WORDS])
SMALL: dict[str, object] = {"steps": 2, "batch": 4, "answers": 3, "max_tokens": 6, "lr": 2e-3}
ROWS: list[Row] = [{"prompt": "p", "completion": c} for c in ("a", "bb", "ccc")]


@pytest.fixture
def model(deep_path: Path) -> Model:
    return Model.open(deep_path)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing that a test declares or gives is known to the next one."""
    monkeypatch.setattr(declared, "_declared", {})
    monkeypatch.setattr(declared, "_left_out", {})
    monkeypatch.setattr(references, "_bare", weakref.WeakValueDictionary())
    monkeypatch.setattr(references, "_times", Counter())
    monkeypatch.setattr(recipe, "executed", [])
    monkeypatch.setattr(recipe, "_ran", [])
    path = list(sys.path)
    yield
    sys.path[:] = path


def letters(rows: list[Row]) -> list[float]:
    return [float(len(str(row["completion"]))) for row in rows]


# Bare functions


def test_a_function_rewards_online_training_and_sees_every_column(model: Model) -> None:
    seen: list[Row] = []

    def wanted(rows: list[Row]) -> list[float]:
        seen.extend(rows)
        return [float(str(r["wanted"])[0] in str(r["completion"])) for r in rows]

    methods["grpo"](model, PROMPTS, **SMALL, rewards={"w": wanted})
    assert {str(r["wanted"]) for r in seen} <= set(WORDS)
    assert all({"prompt", "completion", "finished"} <= set(r) for r in seen)
    steps = [m for m in current().metrics if "reward/w" in m]
    assert len(steps) == 2
    # The same numbers by hand: two rollouts of four prompts with three answers each.
    for m, rows in zip(steps, (seen[:12], seen[12:]), strict=True):
        paid = [float(str(r["wanted"])[0] in str(r["completion"])) for r in rows]
        assert m["reward/w"] == pytest.approx(sum(paid) / 12)


def test_another_function_is_another_run(model: Model) -> None:
    """Both are called `<lambda>`, and nothing of the first is taken for the second."""
    for sign in (1.0, -1.0):
        made = {"r": lambda rows, sign=sign: [sign * len(r["completion"]) for r in rows]}
        methods["rloo"](model, PROMPTS, **SMALL, rewards=made)
        paid = [sign * float(str(m["reward"])) for m in current().metrics if "reward/r" in m]
        assert len(paid) == 2 and min(paid) > 0


GOAL = {"letters": 1.0}
counted: list[int] = []


def towards_goal(rows: list[Row]) -> list[float]:
    counted.append(len(rows))
    return [abs(len(str(row["completion"])) - GOAL["letters"]) for row in rows]


@pytest.mark.parametrize("registered", [False, True])
def test_a_reward_that_reads_something_else_is_another_run(
    registered: bool, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same function, same settings: what it reads of its module is in no note."""
    if registered:
        component("reward", name="towards_goal")(towards_goal)
    given: object = {"use": "towards_goal"} if registered else (lambda rows: towards_goal(rows))
    told: list[list[float]] = []
    for goal in (1.0, -500.0):
        monkeypatch.setitem(GOAL, "letters", goal)
        counted.clear()
        methods["rloo"](model, PROMPTS, **SMALL, rewards={"r": given})
        assert sum(counted) == 24  # two rollouts of four prompts with three answers each
        told.append([float(str(m["reward"])) for m in current().metrics if "reward/r" in m])
    assert len(told[0]) == len(told[1]) == 2 and max(told[0]) < 500 <= min(told[1])


class Large:
    """Something that a function holds."""

    def scores(self, rows: list[Row]) -> list[float]:
        return letters(rows)


def test_a_function_is_let_go_with_what_refers_to_it(model: Model) -> None:
    """After the call, or with the model that decodes by it; its name is not given again."""
    held = [Large(), Large()]
    left = [weakref.ref(one) for one in held]
    methods["rloo"](model, PROMPTS, **SMALL, rewards={"r": lambda rows, o=held[0]: o.scores(rows)})
    best = methods["best_of_n"](model, n=2, rewards={"r": lambda rows, o=held[1]: o.scores(rows)})
    assert isinstance(best, Model)
    held.clear()
    gc.collect()
    assert left[0]() is None and left[1]() is not None
    again = copy.deepcopy(best.changes[-1].settings)
    assert again == {"rewards": {"r": {"use": "<lambda>() 2"}}} | dict(best.changes[-1].settings)
    assert generate(best, ["say oak"], n=1, max_tokens=4, seed=3)
    del best
    gc.collect()
    assert left[1]() is not None and resolve("reward", again["rewards"]["r"])  # type: ignore[index]
    del again
    gc.collect()
    assert left[1]() is None and not references.any_bare()
    assert references.referred(lambda rows: [1.0]) == {"use": "<lambda>() 3"}


def test_a_function_decides_between_answers(model: Model) -> None:
    best = methods["best_of_n"](model, n=4, rewards={"length": lambda rows: letters(rows)})
    assert isinstance(best, Model)
    four = generate(model, ["say oak"], n=4, max_tokens=8, seed=3)[0]
    one = generate(best, ["say oak"], n=1, max_tokens=8, seed=3)[0]
    assert len(one[0].text.strip()) == max(len(c.text.strip()) for c in four)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("deal", {"rewards": {"r": letters}, "beams": 1, "candidates": 2, "lookahead": 1}),
        ("deal_segments", {"rewards": {"r": letters}}),
        ("prm_guided", {"rewards": {"r": letters}}),
    ],
)
def test_every_decoder_takes_functions(
    name: str, settings: dict[str, object], model: Model, tmp_path: Path
) -> None:
    made = methods[name](model, **settings)
    assert isinstance(made, Model)
    with pytest.raises(InputError, match="cannot be part of a saved model"):
        made.save(tmp_path / "made")
    again = getattr(methods[name].module, name)(model, **settings)  # without its checks
    assert again.changes[-1].settings["rewards"] == {"r": {"use": "letters()"}}


def test_functions_wherever_a_reference_is_taken() -> None:
    data = Table("example", ROWS)
    kept = methods["checked"](
        data, checks=[lambda rows: [float(len(r["completion"]) > 1) for r in rows]], of="completion"
    )
    assert [r["completion"] for r in kept] == ["bb", "ccc"]
    ranked = methods["magpie_filter"](
        Table("example", [r | {"prompt": "What is it?"} for r in ROWS]),
        reward=letters, cut=1.5,
    )  # fmt: skip
    assert sorted(str(r["completion"]) for r in ranked) == ["bb", "ccc"]


def test_a_principle_is_checked_by_a_function(model: Model, tmp_path: Path) -> None:
    rules = Principles([Principle("short", "Be short.", check=short)])  # type: ignore[arg-type]
    kept = methods["best_of_n"](model, rules, n=4)
    assert isinstance(kept, Model)
    drawn = generate(kept, ["say oak", "say fern"], n=2, max_tokens=8, seed=3)
    plain = generate(model, ["say oak", "say fern"], n=8, max_tokens=8, seed=3)
    for best, all_of_it in zip(drawn, plain, strict=True):
        for i, one in enumerate(best):
            four = [len(c.text.strip()) for c in all_of_it[4 * i : 4 * i + 4]]
            assert (len(one.text.strip()) < 4) == (min(four) < 4)
    with pytest.raises(InputError, match="part of saved principles"):
        rules.save(tmp_path)
    nouns = {"model": model, "prompts": PROMPTS, "principles": rules}
    with pytest.raises(InputError, match="part of a stored step"):
        step_key(methods["adherence"], nouns, {}, 0)


def short(rows: list[Row]) -> list[float]:
    return [float(len(str(row["completion"])) < 4) for row in rows]


class Echo:
    """An environment of one turn."""

    def __init__(self) -> None:
        self.asked = ""


def test_an_environment_is_found_by_its_function(tmp_path: Path) -> None:
    assert isinstance(maker(Echo)(), Echo) and isinstance(maker(lambda: Echo())(), Echo)
    with use(Context(folder=tmp_path)), pytest.raises(InputError, match="part of a stored step"):
        maker(Echo)


def test_numbers_of_other_libraries_are_numbers() -> None:
    assert score("reward", lambda rows: np.arange(3.0), ROWS) == [0.0, 1.0, 2.0]
    assert score("reward", lambda rows: torch.ones(3), ROWS) == [1.0] * 3
    assert score("reward", lambda rows: (1, 2, 3), ROWS) == [1.0, 2.0, 3.0]
    assert score("reward", lambda rows: [np.float32(0.5)] * 3, ROWS) == [0.5] * 3
    with pytest.raises(InputError, match=r"reward '<lambda>\(\) 5' must return one score a row"):
        score("reward", lambda rows: [1.0], ROWS)
    with pytest.raises(InputError, match="not a finite number"):
        score("reward", lambda rows: [None] * 3, ROWS)


def as_trl(completions: list[str], **columns: object) -> list[float]:
    return [float(len(c)) for c in completions]


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (as_trl, r"takes one argument, the rows.*Wrap it: lambda rows: as_trl\(completions=\["),
        (lambda prompts, completions: [], r"prompts=\[r\['prompt'\] for r in rows\], completions"),
        (lambda: [1.0], "takes nothing"),
        (lambda a, b: [], r"takes a, b.*def reward\(rows\)"),
        (lambda *, rows: [], "takes rows"),
    ],
)
def test_functions_that_take_something_else(
    function: Callable[..., object], told: str, model: Model
) -> None:
    with pytest.raises(InputError, match=told):
        methods["grpo"](model, PROMPTS, **SMALL, rewards={"r": function})


@pytest.mark.parametrize(
    "function",
    [lambda rows, scale=1.0: [scale] * len(rows), lambda *rows: [1.0] * 3, print, letters],
)
def test_functions_of_rows_in_other_words(function: Callable[..., object]) -> None:
    assert resolve("reward", function)[0] is function


def test_a_stored_step_takes_no_bare_function(model: Model, tmp_path: Path) -> None:
    told = r'nothing would tell its next version.*@component\("reward"\).*write \{use: NAME'
    with use(Context(folder=tmp_path)), pytest.raises(InputError, match=told):
        methods["grpo"](model, PROMPTS, **SMALL, rewards={"r": letters})
    plan = Plan("mine")
    plan.step(
        "a", "train/grpo", model=str(model.folder), data="answer_or_ask", rewards={"r": letters}
    )
    with pytest.raises(InputError, match=told) as error:
        plan.check()
    assert "setting 'rewards'" in str(error.value) and __file__ in error.value.where
    best = methods["best_of_n"](model, n=2, rewards={"r": letters})
    assert isinstance(best, Model)
    with pytest.raises(InputError, match=told):
        step_key(methods["refusal_rate"], {"model": best}, {}, 0)


# Declared ones


def declared_letters(rows: list[Row], *, scale: float = 1.0) -> list[float]:
    """Letters of the answer."""
    return [scale * value for value in letters(rows)]


def others_letters(rows: list[Row]) -> list[float]:
    return letters(rows)


def others_in_two(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(c)) for c in completions]


def declare_again(name: str = "own_letters", kind: str = "reward") -> None:
    component(kind, name=name)(declared_letters)


def test_a_declared_function_goes_by_its_name() -> None:
    declare_again()
    assert score("reward", {"use": "own-letters", "scale": 2.0}, ROWS) == [2.0, 4.0, 6.0]
    assert references.referred({"r": declared_letters}) == {"r": {"use": "own_letters"}}
    entry = catalogue.components("reward")["own_letters"]
    assert entry.summary == "Letters of the answer." and entry.path == __file__
    with pytest.raises(InputError, match=r"unknown setting 'scael'.*'scale'"):
        get_component("reward", {"use": "own_letters", "scael": 2.0})


def test_a_declared_function_takes_rows_too() -> None:
    component("reward", name="own_letters")(others_in_two)
    with pytest.raises(InputError, match=r"takes one argument, the rows.*lambda rows: others_in"):
        resolve("reward", "own_letters")


def test_one_inside_another_function_has_no_name() -> None:
    @component("reward")
    def near(rows: list[Row]) -> list[float]:
        return letters(rows)

    assert "near" not in catalogue.components("reward")
    assert score("reward", near, ROWS) == [1.0, 2.0, 3.0]  # it is a function all the same
    with pytest.raises(InputError, match=r'by @component\("reward"\) in the script'):
        resolve("reward", {"use": "near_by_name_of_its_own"})


def hiding(function: Callable[..., object]) -> Callable[..., object]:
    """A decorator that forgets functools.wraps."""

    def wrapper(rows: list[Row]) -> object:
        return function(rows)

    return wrapper


def test_a_decorator_that_hides_a_function_is_named() -> None:
    component("reward")(hiding(declared_letters))
    told = (
        r"hiding\.<locals>\.wrapper \(.*test_own_functions\.py line \d+\).*needs functools\.wraps"
    )
    with pytest.raises(InputError, match=told):
        resolve("reward", "letters_of_own")
    with pytest.raises(InputError, match=told):
        catalogue.check_used({"rewards": {"r": {"use": "letters_of_own"}}})
    with pytest.raises(InputError) as error:
        resolve("check", "letters_of_own")
    assert "wraps" not in str(error.value)
    component("reward", name="in_full")(functools.wraps(declared_letters)(hiding(declared_letters)))
    assert score("reward", "in_full", ROWS) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("given", [functools.partial(declared_letters, scale=2.0), len])
def test_what_has_no_name_of_its_own_is_not_registered(given: Callable[..., object]) -> None:
    with pytest.raises(InputError, match=r"registers functions and classes.*Write def NAME"):
        component("reward", name="twice")(given)
    with pytest.raises(InputError, match="registers functions and classes"):
        method(verb="select")(given)


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ("a: &a {mix: {<<: *a}}", "line 2: '<<' takes other mappings"),
        ("a: &a {mix: {<<: [{n: 1}, *a]}}", "line 2: '<<' takes other mappings"),
        ("a: &a {mix: *a}", "line 2: an alias stands inside what it stands for"),
        ("a: {mix: &l [1, [*l]]}", "line 2: an alias stands inside what it stands for"),
        ("a: &a {? {<<: *a} : 1}", "line 2: '<<' takes other mappings"),
    ],
)
def test_a_recipe_that_holds_itself(steps: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"steps:\n  {steps}\n")
    with pytest.raises(InputError) as error:
        load(path)
    assert str(error.value).startswith(f"{path} {told}")


def test_two_of_one_name_are_one_error() -> None:
    declare_again()
    # The same function again, as when a file is run again, is no second one.
    declare_again()
    assert "own_letters" in catalogue.components("reward")
    component("reward", name="own_letters")(others_letters)
    with pytest.raises(
        InputError, match="two functions are registered as 'reward:own_letters'"
    ) as e:
        catalogue.components("reward")
    assert "declared_letters and" in e.value.where and "another name=" in e.value.fix


def test_one_of_the_name_of_an_installed_one() -> None:
    declare_again("max_words", "check")
    with pytest.raises(InputError, match="'check:max_words'") as error:
        catalogue.components("check")
    assert __file__ in error.value.where and "truing.specify" in error.value.where


def cell(text: str) -> dict[str, object]:
    """Run code as a notebook does: it is in no file."""
    held: dict[str, object] = {"__name__": "__main__"}
    exec(compile(textwrap.dedent(text), "<cell 3>", "exec"), held)
    return held


NOTEBOOK = """
    from truing import component

    @component("reward")
    def in_a_cell(rows):
        return [{value} * (1 + len(row["completion"])) for row in rows]
"""


def test_of_a_notebook_the_code_is_not_known(model: Model) -> None:
    cell(NOTEBOOK.format(value="1.0"))
    assert score("reward", "in_a_cell", ROWS) == [2.0, 3.0, 4.0]
    plan = Plan("mine")
    ref = {"r": {"use": "in_a_cell"}}
    plan.step("a", "train/grpo", model=str(model.folder), data="answer_or_ask", rewards=ref)
    with pytest.raises(InputError, match=r"'reward:in_a_cell' is in no file.*a .py file"):
        plan.check()


def test_a_cell_that_is_run_again_counts(model: Model) -> None:
    """Plain calls share their scratch folder: what is in it is of the code before."""
    ref = {"r": {"use": "in_a_cell"}}
    paid: list[float] = []
    for value in ("1.0", "-1.0", "-1.0"):
        held = cell(NOTEBOOK.format(value=value))
        methods["rloo"](model, PROMPTS, **SMALL, rewards=ref)
        found = [m["reward"] for m in current().metrics if "reward/r" in m]
        paid.append(float(str(found[0])))
        assert len(found) == 2 and held["in_a_cell"]
    assert paid[0] > 0 and paid[1] == paid[2] == -paid[0]


def test_a_method_of_a_script_says_its_verb() -> None:
    def first(data: Table, *, count: int = 1) -> Table:
        """The first rows.

        Args:
            count: how many.
        """
        return data.take(range(count))

    first.__qualname__ = "first_of_script"  # as at the top of a file
    method(name="first_of_script")(first)
    with pytest.raises(InputError, match=r'has no verb.*@method\(verb="select"\)'):
        methods["first_of_script"]
    with pytest.raises(InputError, match=r"unknown verb 'selct'.*'select'"):
        method(verb="selct")
    method(name="first_of_script", verb="select")(first)
    found = methods["first_of_script"]
    assert found.id == "select/first_of_script" and found.summary == "The first rows."
    assert found.settings["count"].doc == "how many."
    assert len(found(Table("example", ROWS), count=2)) == 2  # type: ignore[arg-type]
    assert isinstance(methods["select/first_of_script"].module.Table, type)


# The code of a file as part of a key


def key_of(path: Path, name: str) -> str:
    """Of the component that a recipe file declares, as a step would have it."""
    load(path)
    entry = catalogue.components("reward")[name]
    own = declared.source(entry)
    assert own is not None
    return code.code_key([], [own])


RECIPE = '''
"""A recipe with a reward of its own."""

import truing
from helpers_of_recipe import clip

MOST = 3
BASE = "tiny"
{state}


@truing.component("reward")
def few(rows):
    """Few letters."""
    return [clip(-float(len(r["completion"])), -MOST) for r in rows]


def recipe():
    """The plan."""
    plan = truing.Plan("own", seed={seed})
    plan.step(
        "longest", "select/magpie_filter", data=BASE + ".jsonl", reward={{"use": "few"}}, cut={cut}
    )
    {more}
    return plan
'''
HELPERS = "def clip(value, least):\n    return max(value, least)\n"


class Files:
    """A recipe with a module beside it and its data."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "my_recipe.py"
        rows = [{"prompt": "What is it?", "completion": "x" * n} for n in (1, 2, 5)]
        (folder / "tiny.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (folder / "helpers_of_recipe.py").write_text(HELPERS)
        self.write()

    def write(self, old: str = "", new: str = "", **facts: object) -> Path:
        told = {"seed": 0, "cut": -4.0, "state": "", "more": "", **facts}
        text = RECIPE.format(**told)
        assert old in text
        self.path.write_text(text.replace(old, new) if old else text)
        return self.path

    def cached(self) -> object:
        """Steps that `truing run my_recipe.py` takes from the store."""
        return line_of(self.path)["cached_steps"]


def line_of(path: Path) -> dict[str, object]:
    """The last line of `truing run`."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main(["run", str(path), "--json", "--runs", str(path.parent / "runs")]) == 0
    return dict(json.loads(out.getvalue().splitlines()[-1]))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.delitem(sys.modules, "helpers_of_recipe", raising=False)
    return Files(tmp_path)


def test_an_edited_recipe_runs_again_and_another_does_not(files: Files) -> None:
    assert files.cached() == 0
    assert files.cached() == 1
    files.write("Few letters.", "Fewer letters.  # as said")
    assert files.cached() == 1
    files.write("MOST = 3", "MOST = 4")
    assert files.cached() == 0
    (files.folder / "helpers_of_recipe.py").write_text(HELPERS.replace("max(", "max(0 * least, "))
    del sys.modules["helpers_of_recipe"]  # as in a process of its own
    assert files.cached() == 0
    assert files.cached() == 1


def test_what_of_a_file_counts(files: Files) -> None:
    first = key_of(files.path, "few")
    assert key_of(files.write(), "few") == first
    # The plan's steps have keys of their own, with their settings.
    assert key_of(files.write(seed=3, cut=-2.0), "few") == first
    assert key_of(files.write("-MOST", "-2 * MOST"), "few") != first
    # What `recipe` changes of the file, or may, is what the reward depends on.
    state = 'SEEN = ["x"]'
    held = key_of(files.write(state=state), "few")
    assert held != first and key_of(files.write(state=state, seed=3), "few") == held
    kept = key_of(files.write(state=state, more="SEEN.clear()"), "few")
    assert kept != held and key_of(files.write(state=state, more="SEEN.pop()"), "few") != kept
    moved = key_of(files.write(more="global MOST; MOST = 5"), "few")
    assert moved != key_of(files.write(more="global MOST; MOST = 6"), "few")


@pytest.mark.parametrize(
    ("state", "more"),
    [
        ("import helpers_of_recipe as hx", "hx.LIMIT = {n}"),
        ("import helpers_of_recipe as hx", "hx.at_most({n})"),
        ("from helpers_of_recipe import clip as cut_off", "cut_off({n}, 1)"),
        ("import os", "os.environ['LIMIT'] = '{n}'"),
        ("", "setattr(truing, 'LIMIT', {n})"),
        ("def limit(n):\n    global MOST\n    MOST = n", "limit({n})"),
    ],
)
def test_what_a_plans_function_changes_counts(files: Files, state: str, more: str) -> None:
    keys = set[str]()
    for n in (5, 6):
        declared._declared.clear()
        own = declared_in(files.write(state=state, more=more.format(n=n)))
        keys.add(code.code_key([], [own]))
    assert len(keys) == 2


def declared_in(path: Path) -> declared.Declared:
    """The reward of a recipe file that is not run, as if its plan changed nothing."""
    entry = catalogue.Entry("few", "component", "", "", "recipe", "few", "", str(path))
    return declared.Declared(entry, letters, path.read_text())


def test_a_helper_that_is_edited_while_a_plan_runs(files: Files) -> None:
    """What was loaded when the plan was checked is what runs, and what the key is of."""
    edited = HELPERS.replace("max(", "max(0 * least, ")
    load(files.path)
    own = declared.everything()[0]
    (files.folder / "helpers_of_recipe.py").write_text(edited)
    keys = [code.code_key([], [own])]
    for text in (edited, HELPERS):  # loaded again, as in a process of its own
        (files.folder / "helpers_of_recipe.py").write_text(text)
        del sys.modules["helpers_of_recipe"]
        importlib.import_module("helpers_of_recipe")
        keys.append(code.code_key([], [own]))
    assert keys[0] == keys[2] != keys[1]


def test_what_python_m_runs_imports_its_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m pkg.train` runs the file as __main__, whose relative imports are pkg's."""
    folder = tmp_path / "pkg_of_own"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "train.py").write_text(
        "import truing\nfrom truing.core.identity.code import code_key\n"
        "from truing.declared import everything\n"
        "from .near import worth\n\n\n"
        "@truing.component('reward')\ndef few(rows):\n    return [worth(r) for r in rows]\n\n\n"
        "key = code_key([], everything())\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    # Else Python takes what it compiled a moment ago: same second, same size.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    keys: list[object] = []
    for value in (1, 2):
        (folder / "near.py").write_text(f"def worth(row):\n    return {value}\n")
        sys.modules.pop("pkg_of_own.near", None)
        importlib.invalidate_caches()
        made = runpy.run_module("pkg_of_own.train", run_name="__main__", alter_sys=True)
        keys.append(made["key"])
    assert keys[0] != keys[1]


others: list[tuple[object, list[float]]] = []


def in_another_process(function: Callable[..., object]) -> None:
    others.append((function, score("reward", "few", ROWS)))


def test_other_processes_know_a_recipes_functions(files: Files, tmp_path: Path) -> None:
    """What `torchrun` sends them: arguments may be functions of the recipe, settings name some."""
    load(files.path)
    here = declared.everything()[0].function
    given = pickle.dumps(((here,), {}))
    call = together._Call(
        __name__, "in_another_process", given, 0, tmp_path, "a", (), tuple(recipe.executed)
    )
    recipe.executed.clear()
    declared._declared.clear()
    call.run()
    ((function, scores),) = others
    assert function is not here and scores == [-1.0, -2.0, -3.0]
    assert function.__qualname__ == here.__qualname__ == "few"  # type: ignore[attr-defined]


def test_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its files in its order, then `truing run` twice: the second run makes nothing."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "plugins.md").read_text()
    found = re.findall(r"^```\w+ file=(\S+)\n(.*?)^```", page, re.S | re.M)
    for name, text in found:
        (tmp_path / name).write_text(text)
    names = ["first.py", "sums.jsonl", "my_recipe.py", "careful.py", "points.py", "watched.py"]
    assert [name for name, _ in found] == names
    monkeypatch.chdir(tmp_path)
    runpy.run_path("first.py", run_name="__main__")
    assert [line_of(Path("my_recipe.py"))["cached_steps"] for _ in range(2)] == [0, 1]
    capsys.readouterr()
    runpy.run_path("careful.py", run_name="__main__")
    said = capsys.readouterr().out
    assert "has no answer" in said and "row 1" in said and "column `answer`" in said
    runpy.run_path("points.py", run_name="__main__")
    capsys.readouterr()
    runpy.run_path("watched.py", run_name="__main__")
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in said[:2]] == [["trained", "1"], ["trained", "2"]]
    assert said[2].startswith("trained took longest; all of it: runs/brief-")


def test_two_recipes_with_one_name_between_them(files: Files, tmp_path: Path) -> None:
    """Each has its own reward and the module beside it, and a plan the functions of its recipe."""
    (tmp_path / "other").mkdir()
    other = Files(tmp_path / "other")
    (other.folder / "helpers_of_recipe.py").write_text(
        HELPERS.replace("max(value", "max(2 * value")
    )
    first, keys = load(files.path), list[str]()
    for path, scores in ((files.path, [-1.0, -2.0, -3.0]), (other.path, [-2.0, -3.0, -3.0])) * 2:
        keys.append(key_of(path, "few"))
        assert score("reward", "few", ROWS) == scores
    assert keys[:2] == keys[2:] and len(set(keys)) == 2
    assert recipe.executed == [other.path] and str(files.folder) not in sys.path
    first.check()
    assert score("reward", "few", ROWS) == [-1.0, -2.0, -3.0]


def test_a_recipe_of_yaml_sees_no_functions_of_another(files: Files, tmp_path: Path) -> None:
    """Nor does one that was loaded before; the one of Python has them again when it is checked."""
    written = tmp_path / "plain.yaml"
    steps = "steps:\n  a: {do: select/sample, data: everyday_prompts, n: 1}\n"
    written.write_text(steps)
    early, python = load(written), load(files.path)
    assert "few" in catalogue.components("reward")
    early.check()
    assert "few" not in catalogue.components("reward") and recipe.executed == []
    assert str(files.folder) not in sys.path
    python.check()
    assert "few" in catalogue.components("reward")
    written.write_text(steps + "  b: {do: select/magpie_filter, data: a, reward: {use: few}}\n")
    with pytest.raises(InputError, match="'few'") as caught:
        load(written)
    assert "line 3" in caught.value.where
    outer = tmp_path / "outer.py"  # to which a file of YAML belongs that it loads
    outer.write_text(
        "import truing\nfrom truing.recipe import load\n\n\n"
        "@truing.component('reward')\ndef few(rows):\n    return [0.0] * len(rows)\n\n\n"
        f"def recipe():\n    return load({str(written)!r})\n"
    )
    assert list(load(outer).steps) == ["a", "b"]


def test_a_recipe_may_load_another(files: Files, tmp_path: Path) -> None:
    outer = tmp_path / "outer.py"
    outer.write_text(
        "import truing\nfrom truing.recipe import load\n\n\n"
        "@truing.component('reward')\ndef outer_one(rows):\n    return [0.0] * len(rows)\n\n\n"
        "def recipe():\n"
        f"    plan = load({str(files.path)!r})\n"
        "    given = dict(data='tiny.jsonl', reward={'use': 'outer_one'}, cut=0.0)\n"
        "    plan.step('more', 'select/magpie_filter', **given)\n"
        "    return plan\n"
    )
    assert list(load(outer).steps) == ["longest", "more"]
    assert {"few", "outer_one"} <= set(catalogue.components("reward"))
    both = list(recipe.executed)
    load(files.path)
    recipe.follow(both)  # as another process does
    assert {"few", "outer_one"} <= set(catalogue.components("reward"))
    load(files.path)
    assert "outer_one" not in catalogue.components("reward")


def test_an_objective_of_a_script_is_a_method(model: Model, tmp_path: Path) -> None:
    script = tmp_path / "square_script.py"
    script.write_text(
        "from truing import Model, Table, methods, objective\n"
        "from truing.core.objective import Loss\n\n\n"
        '@objective(unit="pair", rows="pair", needs=("logp", "ref_logp"))\n'
        "def own_square(m, *, target: float = 2.0) -> Loss:\n"
        '    """Squared margin.\n\n    Args:\n        target: margin, in nats.\n    """\n'
        "    r = m.ratio()\n"
        "    return Loss((r[:, 0] - r[:, 1] - target) ** 2)\n\n\n"
        "def main(model):\n"
        '    rows = [{"prompt": f"p{i}", "chosen": "yes", "rejected": "no"} for i in range(4)]\n'
        '    return methods["own_square"](model, Table("pair", rows), steps=2, target=0.5)\n'
    )
    made = runpy.run_path(str(script), run_name="__main__")["main"](model)
    assert isinstance(made, Model)
    losses = [m["loss"] for m in current().metrics if "grad_norm" in m]
    assert losses[0] == pytest.approx(0.25, abs=1e-5)  # both log-ratios begin at 0: 0.5 squared
    found = methods["train/own_square"]
    assert found.settings["target"].default == 2.0 and found.entry.rows == "pair"


IN_A_FILE = """
from truing import component

@component("reward")
def edited_reward(rows):
    return [{value} * (1 + len(row["completion"])) for row in rows]
"""


def test_an_edited_function_is_another_run_in_a_folder_of_ones_own(
    model: Model, tmp_path: Path
) -> None:
    """What an earlier version paid and made lies there, too."""
    made: list[str] = []
    for value in ("1.0", "-1.0", "1.0"):
        (tmp_path / "rewards.py").write_text(IN_A_FILE.format(value=value))
        runpy.run_path(str(tmp_path / "rewards.py"))
        with use(Context(seed=1, folder=tmp_path / "scratch")) as context:
            trained = methods["rloo"](
                model, PROMPTS, **SMALL, rewards={"r": {"use": "edited_reward"}}
            )
        made.append(trained.key)
        assert any("reward/r" in m for m in context.metrics)
    assert made[0] != made[1] and made[0] == made[2]
    parts = sorted(p.name for p in (tmp_path / "scratch").iterdir())
    assert len(parts) == 2 and all(p.startswith("code-") for p in parts)


def test_a_file_with_a_byte_order_mark_as_editors_of_windows_write(files: Files) -> None:
    files.write("MOST = 3", "MOST = 17")
    files.path.write_bytes(b"\xef\xbb\xbf" + files.path.read_bytes())
    assert [files.cached(), files.cached()] == [0, 1]
    files.path.write_bytes(b"# coding: latin-1\n# \xe4\n" + files.path.read_bytes()[3:])
    assert files.cached() == 1  # a comment in another encoding
