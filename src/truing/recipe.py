"""Recipes: a plan in a short YAML file, or a Python file that makes one.

    name: quickstart
    seed: 0
    models:
      base: smollm2-135m-instruct
      judge: {endpoint: http://127.0.0.1:8000/v1, model: large, requests: 500, concurrency: 4}
    data: {mine: {file: pairs.jsonl, columns: {prompt: question}}}
    steps:
      rules: {do: specify/principles_file, path: principles.yaml}
      aligned: {do: train/dpo, model: base, data: mine, beta: 0.1}

Every mistake is named with its line. Steps may share settings by YAML's merge keys: "<<: *first"
takes over what another mapping, marked "&first", has. A Python recipe defines `plan`, or a function
`recipe()` that returns one; it is code of the user's own, run as such.
"""

from __future__ import annotations

import functools
import runpy
import sys
import traceback
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import yaml

from truing import renaming, watchers
from truing.core.endpoints import limits
from truing.core.files import expanded
from truing.declared import drop
from truing.errors import InputError, no_file, unknown, yaml_fix
from truing.plan import Plan
from truing.steps import Step, seed_of

SCHEMA_VERSION = 1
RECIPE = "recipe"  # name of a recipe's file as a module
executed: list[Path] = []  # files of Python run as recipes: one, and those that it loads
MERGE = "tag:yaml.org,2002:merge"  # of the key "<<"
FIELDS = ("schema_version", "name", "seed", "watch", "models", "data", "steps")
# By a field that they have, the tools whose configuration may be taken for a recipe.
PEERS = {
    "merge_method": "mergekit",
    "stage": "LLaMA-Factory",
    "actor_rollout_ref": "verl",
    "base_model": "axolotl",
    "model_name_or_path": "TRL",
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """The plan of a recipe file, checked as a whole; nothing is fetched or run.

    Args:
        path: of the recipe, .yaml or .py.
        overrides: "STEP.SETTING=VALUE" and the like (see `Plan.override`), before it is checked.
    Raises:
        InputError: naming file and line of the first mistake.
    """
    path = expanded(path)
    if not path.is_file():
        raise no_file("recipe", path, (".yaml", ".yml", ".py"))
    plan = _from_python(path) if path.suffix == ".py" else _from_yaml(path)
    plan.command = ["run", str(path)]
    for text in overrides:
        plan.override(text)
    plan.check()
    return plan


def plan_of(given: object) -> Plan:
    """A plan, or that of the recipe at a path; anything else is an InputError."""
    if isinstance(given, (str, Path)):
        return load(given)
    if not isinstance(given, Plan):
        fix = "Give the path of a recipe, .yaml or .py, or a truing.Plan"
        raise InputError("this is no plan", where="run", seen=given, fix=fix)
    return given


@dataclass
class _Ran:
    """What there was before a recipe's file ran, beside which others may be imported.

    Args:
        beside: its folder; added: where modules are looked for, too, because of it.
    """

    beside: str
    added: bool
    modules: frozenset[str]

    def own(self, top: str) -> bool:
        """True for a module or package that was loaded since, from beside the file."""
        if top in self.modules or top == "truing":
            return False
        module = sys.modules.get(top)
        file = getattr(module, "__file__", None)
        places = [Path(p) for p in getattr(module, "__path__", ())]
        places = places or ([Path(file)] if file else [])
        return any(str(place.resolve().parent) == self.beside for place in places)


_ran: list[_Ran] = []
_running: list[Path] = []  # a recipe may load another one, which then belongs to it


def execute(path: Path) -> dict[str, object]:
    """The names of a recipe's file, run as a script is: modules beside it can be imported.

    What the recipe before declared and loaded from its folder is let go first: both may have a
    reward, or a module beside them, of one name. A recipe of YAML lets go of it as well.
    """
    if not _running:
        _leave()
    return _execute(path)


def follow(paths: Sequence[Path]) -> None:
    """Run the files that another process has `executed`, unless they ran last here, too."""
    if list(paths) != executed:
        _leave()
        for path in paths:
            if path not in executed:
                _execute(path)


def _execute(path: Path) -> dict[str, object]:
    beside = str(path.resolve().parent)
    _ran.append(_Ran(beside, beside not in sys.path, frozenset(sys.modules)))
    executed.append(path.resolve())
    if beside not in sys.path:
        sys.path.insert(0, beside)
    _running.append(path)
    try:
        found = runpy.run_path(str(path), run_name=RECIPE)
    finally:
        _running.pop()
    made = types.ModuleType(RECIPE)
    made.__dict__.update(found)
    sys.modules[RECIPE] = made  # by which functions in it are sent to other processes
    return found


def _leave() -> None:
    """Let go of what recipes have declared and loaded so far."""
    from truing.core.identity import code

    tops = {name.partition(".")[0] for name in sys.modules}
    own = {top for top in tops if any(ran.own(top) for ran in _ran)}
    gone = {name for name in sys.modules if name.partition(".")[0] in own}
    files = set(executed)
    drop(lambda e: e.module in gone or (e.module == RECIPE and Path(e.path).resolve() in files))
    for name in gone:
        del sys.modules[name]
    for ran in _ran:
        if ran.added and ran.beside in sys.path:
            sys.path.remove(ran.beside)
    _ran.clear()
    executed.clear()
    code.forget_unloaded()


def _from_python(path: Path) -> Plan:
    try:
        found = execute(path)
        make = found.get("recipe")
        _running.append(path)
        try:
            made = make() if callable(make) else found.get("plan")
        finally:
            _running.pop()
    except (Exception, SystemExit) as error:
        raise _raised(error, path) from error
    if not isinstance(made, Plan):
        raise InputError(
            "the file defines neither a plan nor a function recipe() that returns one",
            where=str(path),
            fix="Write: plan = truing.Plan('name'); plan.step(...)",
        )
    made.source = made.source or str(path)
    made.folder = path.parent
    made.ready = functools.partial(_again, path.absolute())
    return made


def _again(path: Path) -> None:
    """Run a recipe's file again if another one ran since: its plan is of its own functions."""
    if path.resolve() not in executed:
        _from_python(path)


def _raised(error: BaseException, path: Path) -> InputError:
    """What a recipe's own code raised, as a mistake in the recipe: with file and line."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if f.filename == str(path)]
    where = f"{path} line {lines[-1]}" if lines else str(path)
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{error.filename} line {error.lineno}"
        return InputError(f"not valid Python: {error.msg}", where=where, seen=error.text)
    if isinstance(error, InputError):  # of a plan that is put together wrongly
        inner = "" if error.where == str(path) else error.where
        where = f"{where}: {inner}" if inner else where
        return InputError(error.message, where=where, seen=error.seen, fix=error.fix)
    last = frames[-1]
    inside = (
        "" if last.filename == str(path) else f" (raised in {last.filename} line {last.lineno})"
    )
    told = " ".join(f"{type(error).__name__}: {error}".rstrip(": ").split())
    return InputError(f"the recipe raises {told}{inside}", where=where)


class _Node:
    """A YAML mapping with the lines of its keys."""

    def __init__(self, node: yaml.Node | None, path: Path, what: str) -> None:
        self.path, self.what = path, what
        self.items: dict[str, yaml.Node] = {}
        self.lines: dict[str, str] = {}
        if node is None or (isinstance(node, yaml.ScalarNode) and not node.value):
            return
        if not isinstance(node, yaml.MappingNode):
            at, fix = f"{path} {_line(node)}", "Write lines of 'name: value' there"
            raise InputError(f"{what} must be a mapping", where=at, fix=fix)
        own: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in own:
                raise InputError(f"{name!r} stands twice in {what}", where=f"{path} {_line(key)}")
            own.add(name)
        for key, value in _merged(node, path):
            self.items[str(key.value)] = value
            self.lines[str(key.value)] = f"{path} {_line(key)}"

    def value(self, name: str) -> object:
        """The value under a key, as plain data."""
        node = self.items.get(name)
        if node is None:
            return None
        try:
            return yaml.SafeLoader("").construct_document(node)
        except ValueError as error:  # of what looks like a date and is none
            raise InputError(
                f"{self.what}: {name!r} cannot be read: {error}",
                where=self.lines[name],
                seen=node.value if isinstance(node, yaml.ScalarNode) else None,
                fix="Put quotes around a text that looks like a date",
            ) from None

    def mappings(self) -> dict[str, dict[str, object]]:
        """Those of the values that are mappings themselves."""
        nodes = {n: v for n, v in self.items.items() if isinstance(v, yaml.MappingNode)}
        return {n: cast("dict[str, object]", self.value(n)) for n in nodes}

    def texts(self, known: Mapping[str, str] | None = None) -> dict[str, str]:
        """The mapping as texts, some of them `known`; anything else is an InputError."""
        made = {name: self.value(name) for name in self.items} | dict(known or {})
        for name, value in made.items():
            if not isinstance(value, str):
                raise InputError(
                    f"{self.what}: {name!r} must be a text",
                    where=self.lines[name],
                    seen=value,
                    fix="Write the name of a file, a folder, or what is registered",
                )
        return cast("dict[str, str]", made)


def _merged(node: yaml.MappingNode, path: Path) -> list[tuple[yaml.Node, yaml.Node]]:
    """Keys and values, those that "<<: *other" brings from other mappings before its own.

    Of several mappings the first goes before the others, as YAML's merge keys have it.
    """
    brought: list[tuple[yaml.Node, yaml.Node]] = []
    own: list[tuple[yaml.Node, yaml.Node]] = []
    for key, value in node.value:
        if key.tag != MERGE:
            own.append((key, value))
            continue
        others = value.value if isinstance(value, yaml.SequenceNode) else [value]
        for other in reversed(others):
            if not isinstance(other, yaml.MappingNode):
                raise _no_merge(key, path)
            brought += _merged(other, path)
    return brought + own


def _no_merge(key: yaml.Node, path: Path) -> InputError:
    fix = "Such as <<: *defaults, where another mapping is marked &defaults"
    return InputError("'<<' takes other mappings", where=f"{path} {_line(key)}", fix=fix)


def _check_ends(node: yaml.Node, path: Path, within: tuple[yaml.Node, ...], seen: set[int]) -> None:
    """Raise an InputError for a mapping or list that holds itself, by an alias at any depth."""
    if isinstance(node, yaml.ScalarNode) or id(node) in seen:
        return
    within = (*within, node)
    mapping = isinstance(node, yaml.MappingNode)
    pairs = node.value if mapping else [(one, one) for one in node.value]
    for key, value in pairs:
        others = value.value if isinstance(value, yaml.SequenceNode) else []
        if mapping and key.tag == MERGE and any(n in within for n in (value, *others)):
            raise _no_merge(key, path)
        for one in (key, value):
            if one in within:
                where = f"{path} {_line(key if mapping else node)}"
                fix = "Write out there what it stands for, in place of *NAME"
                raise InputError("an alias stands inside what it stands for", where=where, fix=fix)
            _check_ends(one, path, within, seen)
    seen.add(id(node))


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _from_yaml(path: Path) -> Plan:
    _without_others()
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        if root is not None:
            _check_ends(root, path, (), set())
        made = _plan(_Node(root, path, "a recipe"), path)
        made.ready = _without_others
        return made
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        said, fix = f"not valid YAML: {error.problem}", yaml_fix(str(error.problem))
        raise InputError(said, where=f"{path}{line}", fix=fix) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        fix = "Save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise InputError(f"not valid YAML: {error}", where=str(path), fix=fix) from None


def _without_others() -> None:
    """A file of YAML has no functions of its own: those of recipes that ran before are not its.

    Where a recipe of Python loads it, it belongs to that one.
    """
    if not _running:
        _leave()


def _plan(root: _Node, path: Path) -> Plan:
    for name in root.items:
        if name not in FIELDS:
            error = unknown("field", name, FIELDS, where=root.lines[name])
            if peer := next((PEERS[n] for n in PEERS if n in root.items), ""):
                page = "docs/from-trl.md" if peer == "TRL" else "docs/from-others.md"
                error.fix = f"As a configuration of {peer} has it: {page} says what that is here"
            raise error
    if root.value("schema_version") not in (None, SCHEMA_VERSION):
        raise InputError(
            f"this version reads recipes of schema {SCHEMA_VERSION}",
            where=root.lines["schema_version"],
            seen=root.value("schema_version"),
            fix=f"Write schema_version: {SCHEMA_VERSION}, or upgrade truing",
        )
    seed = seed_of(root.value("seed"), root.lines.get("seed", ""))
    name = str(root.value("name") or path.stem)
    try:
        plan = Plan(name, seed=seed or 0, folder=path.parent, source=str(path))
    except InputError as error:
        error.where = root.lines.get("name", str(path))
        raise
    plan.watch = watchers.listed(root.value("watch"), root.lines.get("watch", ""))
    named = _Node(root.items.get("models"), path, "models")
    plan.models = named.texts(
        {n: limits.address(v, where=named.lines[n]) for n, v in named.mappings().items()}
    )
    data = _Node(root.items.get("data"), path, "data")
    plan.data = data.texts(
        {n: renaming.address(v, where=data.lines[n]) for n, v in data.mappings().items()}
    )
    plan.places |= {f"model {n}": at for n, at in named.lines.items()}
    plan.places |= {f"data {n}": at for n, at in data.lines.items()}
    steps = _Node(root.items.get("steps"), path, "steps")
    for name, node in steps.items.items():
        plan.add(_step(name, _Node(node, path, f"step {name}"), steps.lines[name]))
    return plan


def _step(name: str, node: _Node, where: str) -> Step:
    given: Mapping[str, object] = {n: node.value(n) for n in node.items}
    method = given.get("do")
    if not isinstance(method, str):
        raise InputError(
            "a step says what it does: {do: verb/method, ...}",
            where=f"{where} step {name}",
            fix="Such as do: train/dpo; `truing list` has all methods",
        )
    seed = seed_of(given.get("seed"), node.lines.get("seed", ""))
    rest = {n: v for n, v in given.items() if n not in ("do", "seed")}
    return Step(name, method, rest, seed, where, node.lines)
