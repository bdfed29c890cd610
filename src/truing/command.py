"""One method as a command: flags from its signature, nouns from files and names."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from truing import listing
from truing.catalogue import Entry, find
from truing.catalogue import methods as method_entries
from truing.cli import as_line
from truing.errors import InputError, MissingExtra, unknown
from truing.faults import told
from truing.method import Method, methods
from truing.naming import (
    check_names,
    check_reference,
    holding,
    is_reference,
    nouns_in,
    referred_model,
)
from truing.parser import Parser
from truing.signature import Input, Setting, flow, type_name
from truing.words import json_last

if TYPE_CHECKING:
    from truing.store import Noun

OWN = ("seed", "out", "json", "help")
SERVER = "serve/openai"


def _parser(method: Method, helped: bool) -> Parser:
    """The parser of a method's command; `helped` has it say what inputs hold."""
    from truing.inputs import holds

    parser = Parser(
        prog=f"truing {method.verb} {method.name.replace('_', '-')}",
        description=method.summary,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    nouns = parser.add_argument_group("inputs")
    for entry in method.inputs.values():
        told = holds(method, entry).replace("%", "%%") if helped else ""
        text = entry.noun + (", optional" if entry.optional else "") + (f": {told}" if told else "")
        if entry.many:
            text += "; ROLE=NAME, several with commas between or given several times"
        nouns.add_argument(
            f"--{entry.name.replace('_', '-')}",
            dest=entry.name,
            action="append" if entry.many else "store",
            metavar=entry.noun.upper().split("|")[0],
            help=text,
        )
    settings = parser.add_argument_group("settings")
    for setting in method.settings.values():
        # A switch may stand alone, `--length-normalise`; everything else wants its value.
        switch = setting.type is bool
        settings.add_argument(
            f"--{setting.name.replace('_', '-')}",
            dest=setting.name,
            metavar="V",
            help=_setting_help(setting),
            nargs="?" if switch else None,
            const="true" if switch else None,
        )
    seed = "seed of every random stream (default 0)"
    out = "also save the result there; rows also as a file: NAME.jsonl, .csv, .parquet"
    if method.verb == "serve":  # it draws as requests say, and makes nothing
        seed = out = argparse.SUPPRESS
    parser.add_argument("--seed", type=int, help=seed)
    parser.add_argument("--out", metavar="FOLDER", help=out)
    parser.add_argument("--json", action="store_true", help="JSON alone on stdout")
    return parser


def _setting_help(setting: Setting) -> str:
    default = "required" if setting.required else f"default {setting.default!r}"
    return f"{setting.doc} ({type_name(setting.type)}, {default})".replace("%", "%%").strip()


def _inputs(
    method: Method, given: dict[str, object], settings: Mapping[str, object], where: str
) -> dict[str, Noun | Mapping[str, Noun]]:
    """Nouns by name. Names and tables first: they are checked before a model is fetched."""
    from truing.remedies import option as remedy
    from truing.sources import known_abilities, need_abilities, nowhere, open_noun
    from truing.tables import Table

    found: dict[str, Noun | Mapping[str, Noun]] = {}
    for entry in method.inputs.values():
        if entry.name not in given and not entry.optional:
            option = f"--{entry.name.replace('_', '-')}"
            raise InputError(
                f"input {option} ({entry.noun}) is missing",
                where=method.id,
                fix=remedy(entry),
            )
    refs = _references(method, given)
    texts = {
        entry.name: _roles(entry, given.get(entry.name, entry.default))
        for entry in method.inputs.values()
        if (entry.name in given or entry.default) and entry.name not in refs
    }
    for one in nouns_in(refs):
        able, option = known_abilities(one.text), f"--{one.setting.replace('_', '-')}"
        need_abilities(method, one.setting, "", able, where=option)
    models = [name for name in texts if method.inputs[name].noun == "Model"]
    for name, role, text in ((n, r, t) for n in models for r, t in texts[n].items()):
        able = known_abilities(text)
        need_abilities(method, name, role, able, where=f"--{name.replace('_', '-')}")
    check_names({**settings, **refs}, where=where)

    def take(name: str) -> None:
        entry = method.inputs[name]
        opened = {role: open_noun(entry.noun, text) for role, text in texts[name].items()}
        found[name] = opened if entry.many else opened[""]

    for name in (n for n in texts if n not in models):
        take(name)
    if models or refs or nouns_in(settings):
        tables = {n: t for n, t in found.items() if isinstance(t, Table)}
        method.check(settings, tables, where=where, planned=True)
    for text in (t for n in models for t in texts[n].values() if nowhere(t)):
        open_noun("Model", text)  # which says so, before another one is fetched
    for name in models:
        take(name)
    for name, ref in refs.items():
        found[name] = referred_model(name, ref, where=f"--{name.replace('_', '-')}")
    return found


def _references(method: Method, given: Mapping[str, object]) -> dict[str, Mapping[str, object]]:
    """Inputs that are given as {use: name, ...}, and would be right."""
    refs: dict[str, Mapping[str, object]] = {}
    for name in (n for n in method.inputs if n in given):
        value = flow(str(given[name]))
        if is_reference(name, value):
            refs[name] = cast("Mapping[str, object]", value)
            check_reference(name, refs[name], where=f"--{name.replace('_', '-')}")
    return refs


def _roles(entry: Input, value: object) -> dict[str, str]:
    """Texts by role; of an input that takes one, under ""."""
    if not entry.many:
        return {"": str(value)}
    given = cast("list[object]", value if isinstance(value, list) else [])
    pairs = [one.partition("=") for v in given for one in _several(str(v))]
    roles: dict[str, str] = {}
    for i, (role, is_role, rest) in enumerate(pairs):
        # Addresses have the mark too: MODEL?thinking=true, https://...#sha256=...
        own = bool(is_role) and not set("/?#") & set(role)
        name, source = (role, rest) if own else (str(i), role + is_role + rest)
        if name in roles:
            raise InputError(
                "a role is given twice",
                where=f"--{entry.name.replace('_', '-')}",
                seen=[f"{name}={roles[name]}", f"{name}={source}"],
                fix="Give one of them another name: NAME=SOURCE",
            )
        roles[name] = source
    return roles


def _several(text: str) -> list[str]:
    """What stands between commas; of a place that is there, its name."""
    from truing.contenders import parts

    there = any(Path(name).exists() for name in (text, text.partition("=")[2]) if name)
    return [text] if there else [one.strip() for one in parts(text, ",") if one.strip()]


def _place(out: str, method: Method) -> Path:
    """The folder of --out, or the file for rows, known to be fit before the step runs.

    Raises:
        InputError: the method makes nothing to save, the folder holds something else than an
            earlier result, the name is that of a file which is there or is no table's, or it
            cannot be written.
    """
    from truing.faults import free_file, free_folder
    from truing.store import MARKS
    from truing.tables import names_file

    marks = [MARKS[noun] for noun in method.returns.split("|") if noun in MARKS]
    if not marks:
        raise InputError(
            "the method makes nothing to save",
            where=method.id,
            seen=f"--out {out}",
            fix="Leave out --out",
        )
    if names_file(out):
        return free_file(out, method.returns, f"--out {out}")
    return free_folder(out, marks, f"--out {out}")


def _save(artefact: Noun, place: Path) -> None:
    """Save into a folder, or rows into the new file, that `_place` found to be fit."""
    from truing.reports import Report, rows_of
    from truing.tables import Table, names_file

    if names_file(place):
        rows_of(cast("Table | Report", artefact)).write(place, new=True)
    else:
        artefact.save(place)


def run_verb(verb: str, rest: Sequence[str]) -> object:
    """`truing VERB METHOD ...`; `truing VERB` lists the verb's methods.

    The server of `serve` may go without its name: `truing serve MODEL --port 8001`.
    """
    rest = json_last(rest)
    entries: dict[str, Entry] = {e.name: e for e in method_entries().values() if e.verb == verb}
    words = [w for w in rest if w != "--json"]
    if not words or words[0] in ("-h", "--help"):
        if "--json" not in rest:
            print(f"usage: truing {verb} METHOD --help\n")
            for e in entries.values():
                print(f"  {e.name.replace('_', '-'):<24} {e.summary}")
            if verb == "serve":
                print("\ntruing serve MODEL means the same as truing serve openai --model MODEL:\n")
                try:
                    run_method(find(SERVER), ["--help"])
                except MissingExtra as error:  # the methods can be listed without it
                    print(error)
        return listing.rows(list(entries.values()))
    name = rest[0].replace("-", "_")
    if name in entries:
        return run_method(find(f"{verb}/{name}"), list(rest[1:]))
    if verb == "serve":
        named = list(rest) if rest[0].startswith("-") else ["--model", *rest]
        return run_method(find(SERVER), named)
    if rest[0].startswith("-"):
        named = next((w for w in rest[1:] if w.replace("-", "_") in entries), "METHOD")
        raise InputError(
            "options come after the method",
            where=f"truing {verb}",
            seen=rest[0],
            fix=f"Write: truing {verb} {named} ... {rest[0]}",
        )
    raise unknown("method", rest[0], entries, where=f"truing {verb}")


def run_method(entry: Entry, arguments: list[str]) -> object:
    """Run `truing VERB METHOD ...` as a plan of one step, so that it is stored and resumable."""
    from truing import pipeline
    from truing.core.trainer.preflight import check_given

    method = methods[entry.id]
    parser = _parser(method, helped=not {"-h", "--help"}.isdisjoint(arguments))
    known, extra = parser.parse_known_args(arguments)
    for word in extra:
        if not word.startswith("-"):
            raise InputError(
                "a value stands without its name",
                where=parser.prog,
                seen=word,
                fix="Inputs: " + ", ".join(f"--{n.replace('_', '-')}" for n in method.inputs),
            )
        names = [n for n in (*method.inputs, *method.settings, *OWN) if n not in vars(known)]
        raise unknown("setting", word.lstrip("-").split("=")[0], names, where=parser.prog, limit=40)
    given: dict[str, object] = dict(vars(known))
    as_json = bool(given.pop("json", False))
    out = given.pop("out", None)
    seed = int(str(given.pop("seed", 0)))
    settings = {
        name: method.settings[name].parse(str(value), where=parser.prog)
        for name, value in given.items()
        if name in method.settings
    }
    checked = method.validate(settings, where=parser.prog)
    method.check(checked, {}, where=parser.prog, planned=True)
    check_given(checked, given, lambda _: parser.prog)
    place = _place(str(out), method) if out is not None else None
    inputs = _inputs(method, given, checked, parser.prog)
    settings = holding({n: checked[n] for n in settings}, where=parser.prog)
    if method.verb == "serve":
        return method.function(**inputs, **settings)
    result = pipeline.run_step(method, inputs, settings, seed=seed)
    if place is not None:
        with told(f"--out {out}"):
            _save(result.artefact, place)
    line = result.line()
    if not as_json:
        print(result.text(), file=sys.stderr)
        print(as_line(line))
    return line
