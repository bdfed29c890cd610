"""What claims ask of the library exists: found by reading them, since running them takes hours.

Each claim and helper is imported, and every call in it is held against the catalogue: method,
inputs, names of settings, values where the text alone tells them, and references to components.
"""

from __future__ import annotations

import ast
import importlib
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from truing import catalogue
from truing.errors import InputError
from truing.method import Method, methods

CLAIMS = Path(__file__).resolve().parents[2] / "claims"
NAMES = sorted(p.stem for p in CLAIMS.glob("*.py"))
UNKNOWN = object()  # what only running would tell


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(CLAIMS))


def value_of(node: ast.expr, module: types.ModuleType) -> object:
    """What an expression of constants and of the module's own names is; UNKNOWN for others."""
    if any(isinstance(n, (ast.Call, ast.Lambda, ast.comprehension)) for n in ast.walk(node)):
        return UNKNOWN
    try:
        return eval(compile(ast.Expression(node), "claim", "eval"), dict(vars(module)))
    except (NameError, AttributeError):
        return UNKNOWN


def local_dicts(tree: ast.Module) -> dict[str, list[ast.expr]]:
    """Names that functions bind to dicts: `how = {"rank": 8}`, in whichever function."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
    return found


def spread(
    node: ast.expr, module: types.ModuleType, known: dict[str, list[ast.expr]]
) -> dict[str, object]:
    """Settings that `**node` gives, as far as the text tells."""
    made: dict[str, object] = {}
    if isinstance(node, ast.Dict):
        for key, inner in zip(node.keys, node.values, strict=True):
            if key is None:
                made |= spread(inner, module, known)
            elif isinstance(key, ast.Constant) and isinstance(key.value, str):
                made[key.value] = value_of(inner, module)
        return made
    whole = value_of(node, module)
    if isinstance(whole, dict):
        return whole
    bound = known.get(node.id, []) if isinstance(node, ast.Name) else []
    return spread(bound[0], module, known) if len(bound) == 1 else {}


def asked_of(node: ast.Call) -> tuple[ast.expr, list[ast.expr]] | None:
    """(name, inputs) of `methods[name](...)` and `call(name, ...)`; None for other calls."""
    func = node.func
    if isinstance(func, ast.Subscript) and ast.unparse(func.value) == "methods":
        return func.slice, node.args
    if isinstance(func, ast.Name) and func.id == "call" and node.args:
        return node.args[0], node.args[1:]
    return None


def candidates(name: ast.expr) -> Iterator[Method]:
    """The method, or all that a name made at run time may mean: f"train/{loss}"."""
    if isinstance(name, ast.Constant):
        yield methods[str(name.value)]
        return
    parts = name.values if isinstance(name, ast.JoinedStr) else []
    start = str(parts[0].value) if parts and isinstance(parts[0], ast.Constant) else ""
    yield from (methods[one] for one in methods if one.startswith(start))


def faults(text: str, module: types.ModuleType) -> Iterator[str]:
    """What a claim asks for that there is not, with its line."""
    tree = ast.parse(text)
    known = local_dicts(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (asked := asked_of(node)) is not None:
            name, inputs = asked
            given: dict[str, object] = {}
            for word in node.keywords:
                given |= (
                    spread(word.value, module, known)
                    if word.arg is None
                    else {word.arg: value_of(word.value, module)}
                )
            given.pop("seed", None)  # of the call
            told = [fault(name, len(inputs), given)]
        elif isinstance(node, ast.Dict):
            told = [fault_of_reference(spread(node, module, known))]
        else:
            continue
        yield from (f"line {node.lineno}: {one}" for one in told if one)


def fault(name: ast.expr, inputs: int, given: dict[str, object]) -> str:
    """What is wrong with a call; "" where any of the methods that it may mean takes it."""
    first = ""
    try:
        for one in candidates(name):
            told = fault_of(one, inputs, given)
            if not told:
                return ""
            first = first or told
    except InputError as error:
        return str(error)
    return first


def fault_of(method: Method, inputs: int, given: dict[str, object]) -> str:
    if inputs > len(method.inputs):
        return f"{method.id} takes {len(method.inputs)} inputs, not {inputs}"
    for name, value in given.items():
        if name in method.inputs:
            continue
        if name not in method.settings:
            return f"{method.id} has no setting {name!r}"
        try:
            if value is not UNKNOWN:
                method.settings[name].validate(value, where=method.id)
                catalogue.check_used({name: value})
        except InputError as error:
            return str(error)
    return ""


def fault_of_reference(ref: dict[str, object]) -> str:
    """What is wrong with a dict that refers to a component."""
    if not isinstance(ref.get("use"), str):
        return ""
    entries = [e for e in catalogue.components().values() if e.name == ref["use"]]
    if not entries:
        return f"there is no component {ref['use']!r}"
    missing = [set(ref) - {"use"} - set(Method(e).settings) for e in entries]
    return "" if set() in missing else f"{ref['use']!r} has no setting {sorted(missing[0])}"


@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize("name", NAMES)
def test_a_claim_asks_for_what_there_is(name: str) -> None:
    module = importlib.import_module(name)
    assert list(faults((CLAIMS / f"{name}.py").read_text(encoding="utf-8"), module)) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("call('train/dppo', m, d)", "line 1: unknown method 'train/dppo'"),
        ("call('train/dpo', m, d, seed=3, bata=0.1)", "train/dpo has no setting 'bata'"),
        ("methods['sft'](m, d, seeds=3)", "train/sft has no setting 'seeds'"),
        ("x = 1\ncall('sft', m, d, **HOW)", "line 2: train/sft has no setting 'ranks'"),
        ("how = {'lr': 'high'}\nmethods['sft'](m, d, **how)", "setting 'lr'"),
        ("methods['sft'](m, d, **{'rank': 8, **more, 'lrs': 1.0})", "no setting 'lrs'"),
        ("call(f'train/{loss}', m, d, betta=0.1)", "has no setting 'betta'"),
        ("methods['sft'](m, d, e, f, g, h)", "train/sft takes"),
        ("call('grpo', m, d, rewards={'a': {'use': 'max_word'}})", "'max_word'"),
        ("ref = {'use': 'max_words', 'm': 3}", "'max_words' has no setting ['m']"),
        ("ref = {'use': 'judged', 'model': hold(m), 'scales': 5}", "no setting ['scales']"),
        ("score('reward', {'use': 'none_such'}, rows)", "no component 'none_such'"),
    ],
)
def test_what_is_gone_is_found(text: str, told: str) -> None:
    module = types.ModuleType("some")
    module.__dict__["HOW"] = {"rank": 8, "ranks": 9}
    found = list(faults(text, module))
    assert found and told in found[0]
    right = (
        "call(f'train/{loss}', m, d, beta=0.1, lr=LR, **more); ref = {'use': 'max_words', 'n': 3}"
    )
    assert list(faults(right, module)) == []
