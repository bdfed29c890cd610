"""The list of methods and components, read with `ast` so that nothing is imported to show it.

What a script, a notebook or a recipe registers by a decorator joins the list of its own process.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import cast

from truing.declared import everything, left_out, source
from truing.entry import Entry as Entry
from truing.entry import place_of, plainly, said
from truing.errors import InputError, unknown
from truing.references import is_bare, refuse_bare

VERBS = (
    "specify",
    "synthesize",
    "select",
    "train",
    "merge",
    "steer",
    "decode",
    "evaluate",
    "attack",
    "recover",
    "serve",
)
DECORATORS = ("method", "objective", "online", "component")
GROUPS = {"method": "truing.methods", "component": "truing.components"}


def _first_line(node: ast.Module | ast.FunctionDef) -> str:
    text = ast.get_docstring(node) or ""
    return text.split("\n", 1)[0].strip()


def _literals(call: ast.expr, where: str) -> dict[str, object]:
    """The decorator's arguments; they must be literals, or the catalogue could not be read."""
    if not isinstance(call, ast.Call):
        return {}
    try:
        found: dict[str, object] = {
            k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg is not None
        }
        if call.args:
            found["component"] = ast.literal_eval(call.args[0])
    except ValueError as error:
        raise InputError(
            "the arguments of a method's decorator must be literals",
            where=where,
            fix="Write the value itself, not a name or an expression",
        ) from error
    return found


def _decorator(node: ast.expr) -> str:
    target = node.func if isinstance(node, ast.Call) else node
    if isinstance(target, ast.Attribute):
        return target.attr
    return target.id if isinstance(target, ast.Name) else ""


def scan(path: Path, module: str, verb: str, group: str, package: str) -> Iterator[Entry]:
    """Entries of one source file."""
    text = path.read_bytes()  # Python itself knows of byte order marks and other encodings
    if not any(f"@{n}".encode() in text or f".{n}(".encode() in text for n in DECORATORS):
        return
    try:
        tree = ast.parse(text, str(path))
    except SyntaxError as error:
        raise InputError(
            f"not valid Python: {error.msg}",
            where=f"{path} line {error.lineno}",
            fix=f"Mend the file, or uninstall {package}",
        ) from None
    summary = _first_line(tree)
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef):
            continue
        for decorator in node.decorator_list:
            kind = _decorator(decorator)
            if kind not in DECORATORS:
                continue
            facts = _literals(decorator, f"{path.name}:{node.lineno}")
            made = Entry(
                name=node.name,
                kind=kind,
                verb=verb,
                group=group,
                module=module,
                attr=node.name,
                summary=_first_line(node) or summary,
                path=str(path),
                line=node.lineno,
                package=package,
            )
            yield said(made, facts)


def _own() -> Iterator[Entry]:
    """truing's own entries: those that were found the last time in the same files."""
    from truing.core.identity import remembered
    from truing.tables import content_hash

    root = Path(__file__).parent
    # Fields hold components, such as environments, and no methods.
    found = [sorted((root / folder).rglob("*.py")) for folder in (*VERBS, "fields")]
    paths = [path for inside in found for path in inside if path.name != "__init__.py"]
    here = [Path(__file__), root / "entry.py", *paths]
    texts = [[str(path), path.read_text(encoding="utf-8")] for path in here]
    name = content_hash(["catalogue", sys.version, texts])
    known = remembered.find(name)
    if isinstance(known, list):
        return map(plainly, cast("list[dict[str, object]]", known))
    made = [entry for path in paths for entry in _of_file(path, path.relative_to(root))]
    remembered.keep(name, [vars(entry) for entry in made])
    return iter(made)


def _of_file(path: Path, below: Path) -> Iterator[Entry]:
    """Entries of one of truing's own files, which lies there below its package."""
    folder, *groups, _ = parts = below.with_suffix("").parts
    verb = folder if folder in VERBS else ""
    return scan(path, ".".join(("truing", *parts)), verb, "/".join(groups), "truing")


def _source(module: str) -> Path:
    """The file of a module, found without importing it or its package; Path() when there is none.

    Asked of the import system, so that editable installs are found as well.
    """
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        return Path()
    if not rest:
        return Path(spec.origin or "")
    for folder in spec.submodule_search_locations or ():
        path = Path(folder, *rest)
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file
    return Path()


def _plugin(point: metadata.EntryPoint, kind: str) -> Entry:
    """An entry point `verb/name = package.module:function` of another package."""
    verb, _, name = point.name.partition("/")
    dist = point.dist
    package = dist.name if dist is not None else point.module
    path = _source(point.module)
    if kind == "method" and (verb not in VERBS or not name):
        raise InputError(
            "an entry point of the group 'truing.methods' must be called verb/name",
            where=f"package {package}",
            seen=point.name,
            fix="The verbs are: " + ", ".join(VERBS),
        )
    if path.is_file():
        for entry in scan(path, point.module, verb, "", package):
            if entry.attr == point.attr:
                return entry
    summary = dist.metadata["Summary"] if dist and "Summary" in dist.metadata else ""
    return Entry(
        name=name,
        kind=kind,
        verb=verb if kind == "method" else "",
        group="",
        module=point.module,
        attr=point.attr,
        summary=summary or "",
        component=verb if kind == "component" else "",
        package=package,
    )


@functools.cache
def entries() -> tuple[Entry, ...]:
    """Every installed method and component: our own by folder, others by entry point."""
    found = list(_own())
    for kind, group in GROUPS.items():
        found += [_plugin(point, kind) for point in metadata.entry_points(group=group)]
    return _unique(found)


def _unique(found: Sequence[Entry]) -> tuple[Entry, ...]:
    seen: dict[str, Entry] = {}
    for entry in found:
        other = seen.setdefault(entry.id, entry)
        if other is not entry:
            raise InputError(
                f"two functions are registered as {entry.id!r}",
                where=f"{place_of(other)} and {place_of(entry)}",
                fix="Give one of them another name=",
            )
    return tuple(found)


def registered() -> tuple[Entry, ...]:
    """Every method and component: those installed, and those declared in this process.

    Raises:
        InputError: two of them have one name.
    """
    installed = entries()
    if not (here := everything()):
        return installed
    known = {(e.module, e.attr) for e in installed}  # a package's, once it is imported
    own = (d.entry for d in here if (d.entry.module, d.entry.attr) not in known)
    return _unique([*installed, *(e for e in own if e.kind == "component" or e.verb)])


def methods() -> dict[str, Entry]:
    """Methods by id `verb/name`."""
    return {e.id: e for e in registered() if e.kind != "component"}


def components(kind: str = "") -> dict[str, Entry]:
    """Components by name, of one kind; by `kind:name` when no kind is given."""
    return {
        (e.name if kind else e.id): e
        for e in registered()
        if e.kind == "component" and kind in ("", e.component)
    }


def used(value: object) -> list[str]:
    """Names of the components that a setting refers to, `{use: name, ...}` at whatever depth."""
    return [str(ref["use"]) for ref in references(value)]


def references(value: object) -> Iterator[Mapping[str, object]]:
    """References to components, `{use: name, ...}`, in a setting at whatever depth."""
    if isinstance(value, Mapping):
        items = cast("Mapping[str, object]", value)
        if "use" in items:
            yield items
        value = list(items.values())
    if isinstance(value, (list, tuple)):
        for one in cast("Sequence[object]", value):
            yield from references(one)


def no_component(
    kind: str, name: str, known: Iterable[str], *, where: str = "", of: str = "reward"
) -> InputError:
    """The error for a component that does not exist: the nearest one, or how to register it.

    Args:
        kind: "component" where it may be of several.
        of: what one would be registered as then.
    """
    told = unknown(kind, name, known, where=where)
    told.fix = left_out(kind) + told.fix
    if "Did you mean" not in told.fix:
        of = kind if kind != "component" else of
        told.fix = (
            f'One of your own is registered by @component("{of}") in the script or recipe file. '
            + told.fix
        )
    return told


def check_used(settings: Mapping[str, object], *, stored: bool = False) -> None:
    """Raise an InputError for a setting that refers to a component which does not exist.

    Args:
        stored: or of which no stored step can tell the next version from this one.
    """
    known = {e.name: e for e in components().values()}
    for setting, value in settings.items():
        alone = setting == "environment"  # nothing else is one, while checks are rewards, too
        try:
            for name in used(value):
                if stored:
                    refuse_bare([name])
                entry = known.get(name.replace("-", "_"))
                if entry is None and not is_bare(name):
                    meant = [n for n, e in known.items() if not alone or e.component == setting]
                    raise no_component("component", name, meant, of=setting if alone else "reward")
                if entry is not None and stored:
                    source(entry)
        except InputError as error:
            text = f"setting {setting!r}: {error.message}"
            raise InputError(text, where=error.where, seen=error.seen, fix=error.fix) from None


def called(name: str) -> list[Entry]:
    """The methods that `verb/name` or a bare name may mean; hyphens count as underscores."""
    known, wanted = methods(), name.strip().replace("-", "_")
    return [known[wanted]] if wanted in known else [e for e in known.values() if e.name == wanted]


def find(name: str, *, where: str = "") -> Entry:
    """The method called `verb/name`, or by its bare name where that is unique.

    Hyphens count as underscores.
    """
    known, matches = methods(), called(name)
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise InputError(
            f"the name {name!r} is not unique",
            where=where,
            fix="Write one of: " + ", ".join(e.id for e in matches),
        )
    wanted = name.strip().replace("-", "_")
    for entry in (d.entry for d in everything()):
        if entry.kind == "method" and not entry.verb and entry.name == wanted.rpartition("/")[2]:
            raise InputError(
                f"the method {entry.name!r} has no verb",
                where=where or place_of(entry),
                fix='Write @method(verb="select") or another of: ' + ", ".join(VERBS),
            )
    names = known if "/" in wanted else [e.name for e in known.values()]
    raise unknown("method", name, names, where=where)


def training(name: str) -> Entry:
    """The method of the verb train of that name, with or without its verb.

    Raises:
        InputError: there is none; it offers the nearest objective.
    """
    plain = name.removeprefix("train/").replace("-", "_")
    known = {e.name: e for e in methods().values() if e.verb == "train"}
    if plain not in known:
        objectives = [n for n, e in known.items() if e.kind == "objective"]
        raise unknown("objective", name, objectives)
    return known[plain]
