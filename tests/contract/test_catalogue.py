"""Every method, found in the registry: what its file, docstring, signature and settings must be."""

from __future__ import annotations

import ast
import json
import re
import statistics
from pathlib import Path

import pytest

from truing import catalogue, listing
from truing.catalogue import VERBS
from truing.core.held_out import INPUT, Watch
from truing.core.online_training import OnlineTraining
from truing.core.training import HOOKS, TextTraining
from truing.errors import InputError
from truing.method import Method, methods
from truing.signature import NOUNS, argument_docs
from truing.tables import KINDS

OWN = [m for m in methods if methods[m].entry.package == "truing"]
COMPONENTS = [e for e in catalogue.components().values() if e.package == "truing"]
MODULES = sorted({methods[m].entry.path for m in OWN})
FIELDS = {"text", "image", "robot", "graph", "series", "scene", "agent"}
ABILITIES = {"generate", "logprob", "hidden", "weights"}
SNAKE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
MOST_SETTINGS = 12


def own_settings(method: Method) -> list[str]:
    """Those that the method adds to what all training shares and to its hook's."""
    # What other trainings hand on to the engine means the same.
    handed = TextTraining if method.verb == "train" else None
    engine = {"objective": TextTraining, "online": OnlineTraining}.get(method.entry.kind, handed)
    shared = set(engine.__dataclass_fields__) if engine is not None else set()
    shared |= {"mix"} if engine is not None else set()
    watched = engine is not None or INPUT in method.inputs
    shared |= set(Watch.__dataclass_fields__) if watched else set()
    hook = str(getattr(getattr(method.declared, "__objective__", None), "hook", ""))
    shared |= set(argument_docs(HOOKS[hook].__doc__ or "")) if hook else set()
    return [n for n in method.settings if n not in shared]


def test_every_verb_has_a_method() -> None:
    assert {methods[m].verb for m in OWN} == set(VERBS)


def test_the_required_family_is_listed() -> None:
    trained = {methods[m].name for m in OWN if methods[m].verb == "train"}
    assert trained >= set(
        "sft dpo ipo kto orpo simpo cpo d2o mah_dpo grpo rloo ppo ppo_max urpo grao adpa dckd"
        " bradley_terry salmon cyclealign weak_to_strong".split()
    )
    assert "easy_to_hard" in {methods[m].name for m in OWN}


@pytest.mark.parametrize("name", OWN)
def test_names_and_facts(name: str) -> None:
    method = methods[name]
    entry = method.entry
    assert name == f"{entry.verb}/{entry.name}" and entry.verb in VERBS
    assert SNAKE.fullmatch(entry.name), "names are snake_case"
    assert entry.field in FIELDS
    assert not entry.paper or SLUG.fullmatch(entry.paper), "the slug of a paper"
    assert set(method.needs) <= ABILITIES
    folder = Path(entry.path).parent
    assert folder.parts[-1] == (entry.group.rpartition("/")[2] or entry.verb)


@pytest.mark.parametrize("name", OWN)
def test_what_it_says_of_itself(name: str) -> None:
    method = methods[name]
    first, _, rest = method.doc.partition("\n")
    assert first.endswith((".", "?")) and len(first) <= 100, (
        "the first line says what it does for a user"
    )
    assert len(rest.strip()) > 60, "the docstring has the equation, the source, the differences"
    assert 15 < len(method.summary) <= 100 and method.summary.endswith((".", "?"))
    assert method.summary[0].isupper()


@pytest.mark.parametrize("name", OWN)
def test_signature(name: str) -> None:
    method = methods[name]
    if method.verb != "serve":
        assert set(method.returns.replace(" ", "").split("|")) <= set(NOUNS)
    assert method.inputs or method.settings
    assert all(set(i.noun.split("|")) <= set(NOUNS) for i in method.inputs.values())


@pytest.mark.parametrize("name", OWN)
def test_settings_are_few_typed_and_explained(name: str) -> None:
    method = methods[name]
    own = own_settings(method)
    assert len(own) <= MOST_SETTINGS, own
    for setting in method.settings.values():
        assert setting.type is not object and SNAKE.fullmatch(setting.name), setting.name
        assert len(setting.doc) > 5, f"{setting.name} is not in the docstring's Args"


@pytest.mark.parametrize("name", OWN)
def test_defaults_survive_json(name: str) -> None:
    method = methods[name]
    defaults = {n: s.default for n, s in method.settings.items() if not s.required}
    again = json.loads(json.dumps(defaults, default=str))
    for n, value in again.items():
        setting = method.settings[n]
        assert setting.validate(value) == setting.validate(setting.default), n


@pytest.mark.parametrize("name", OWN)
def test_it_can_be_shown(name: str) -> None:
    found = listing.one(name)
    assert json.loads(json.dumps(found, default=str))["name"] == name
    shown = listing.text(found)
    assert all(f"--{s.replace('_', '-')}" in shown for s in methods[name].settings)


@pytest.mark.parametrize("name", OWN)
def test_unknown_settings_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="unknown setting 'no_such_setting'"):
        methods[name].validate({"no_such_setting": 1})


def expected_kinds(path: str) -> set[tuple[str, ...]]:
    """What the functions of a file tell `Table.expect`."""
    calls = (n for n in ast.walk(ast.parse(Path(path).read_text())) if isinstance(n, ast.Call))
    named = (c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "expect")
    return {tuple(str(ast.literal_eval(a)) for a in c.args) for c in named}


@pytest.mark.parametrize("name", OWN)
def test_rows_that_are_expected_are_declared(name: str) -> None:
    method = methods[name]
    declared: dict[str, tuple[str, ...]] = method.declared.__dict__["__truing__"].get("rows", {})
    assert {method.inputs[given].noun for given in declared} <= {"Table"}
    assert all(set(kinds) <= set(KINDS) for kinds in declared.values())
    assert {k for k in declared.values() if k} == expected_kinds(method.entry.path), (
        "rows= of the decorator, which is checked before a model is opened, and the function's own "
        "Table.expect must agree"
    )


def filled(path: str) -> int:
    """Lines of a file that are not blank."""
    return sum(map(bool, Path(path).read_text().split("\n")))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: "/".join(Path(p).parts[-2:]))
def test_files_are_small(path: str) -> None:
    text = Path(path).read_text()
    assert filled(path) <= 250, "something belongs in core/"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno:
            length = node.end_lineno - node.lineno + 1
            assert length <= 90, f"{node.name} has {length} lines"


def test_most_methods_are_short() -> None:
    assert statistics.median(map(filled, MODULES)) < 90


def test_lines_are_not_joined() -> None:
    """All of the source is laid out by the formatter, so that lines can be counted."""
    root = Path(catalogue.__file__).parent
    places = [
        f"{path.relative_to(root)}:{number}"
        for path in root.rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"#\s*fmt:\s*(skip|off)", line)
    ]
    assert not places


def test_no_file_is_long() -> None:
    root = Path(catalogue.__file__).parent
    long = {
        str(p.relative_to(root)): n
        for p in root.rglob("*.py")
        if (n := len(p.read_text().splitlines())) > 400
    }
    assert not long


@pytest.mark.parametrize("entry", COMPONENTS, ids=lambda e: e.id)
def test_components(entry: catalogue.Entry) -> None:
    assert SNAKE.fullmatch(entry.name) and SNAKE.fullmatch(entry.component)
    assert 10 < len(entry.summary) <= 100 and entry.summary.endswith(".")
    for setting in Method(entry).settings.values():
        if not setting.required:
            again = json.loads(json.dumps(setting.default))
            assert setting.validate(again) == setting.validate(setting.default)
