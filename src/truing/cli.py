"""The command line, generated from the registry: `truing VERB METHOD --setting value`.

With --json, stdout carries JSON alone and everything else goes to stderr. Exit codes: 0 done, 2 the
user's input, 3 stopped but resumable, 1 our own defect, 141 whoever read our output went away.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from truing import faults, interrupt, jsontext, listing, loading, output
from truing.catalogue import VERBS
from truing.catalogue import methods as method_entries
from truing.context import one_of_several
from truing.errors import InputError, Stopped, TruingError, unknown
from truing.parser import Parser, command_line
from truing.words import check_first, json_last


class Found(InputError):
    """What a command found to be wrong: `facts` go beside the message for machines."""

    def __init__(
        self, message: str, facts: Mapping[str, object], *, where: str = "", fix: str = ""
    ) -> None:
        super().__init__(message, where=where, fix=fix)
        self.facts = dict(facts)


Command = Callable[[argparse.Namespace], object]


def say(text: str = "") -> None:
    """A line for people: always on stderr."""
    with contextlib.suppress(BrokenPipeError):  # who does not read it is not told
        print(text, file=sys.stderr)


def as_line(value: object) -> str:
    """What stdout carries for machines: JSON in one line, of characters that all terminals know."""
    return jsontext.dumps(value, ascii=True, default=str)


def _list(args: argparse.Namespace) -> object:
    if args.components:
        return listing.components(say=print if not args.json else None)
    return listing.methods(args.verb, args.field, say=print if not args.json else None)


def _show(args: argparse.Namespace) -> object:
    found = listing.one(args.name)
    if not args.json:
        print(listing.text(found))
    return found


def _run(args: argparse.Namespace) -> object:
    from truing import pipeline, recipe

    plan = recipe.load(args.recipe, args.set or ())
    for text in args.watch:
        plan.watched(text)
    if args.check:
        return listing.steps(plan, say=None if args.json else print)
    result = pipeline.run(plan, runs=args.runs)
    line = result.line()
    if not args.json:
        say(result.table())
        print(as_line(line))
    return line


def _compare(args: argparse.Namespace) -> object:
    from truing.compare import from_options
    from truing.contenders import parts, settings_of

    result = from_options(
        verb=args.verb,
        methods=[m for m in parts(args.methods, ",") if m.strip()],
        model=args.model,
        data=args.data,
        budget=args.budget,
        seeds=args.seeds,
        held_out=args.held_out,
        settings=settings_of(args.set, "--set"),
        runs=args.runs,
    )
    if not args.json:
        say(result.table())
        print(as_line(result.line()))
    return result.line()


def _why(args: argparse.Namespace) -> object:
    from truing import lineage

    found = lineage.why(args.row, run=args.run)
    if not args.json:
        print(found.text())
    return found.to_json()


def _claim(args: argparse.Namespace) -> object:
    from truing import claims

    if args.list or not args.slug:
        found = claims.catalogue()
        if not args.json:
            for c in found:
                takes = f"about {c['minutes']} min" + (", GPU" if c["needs_gpu"] else "")
                print(f"  {c['claim']:<28} {takes:<18} {c['title']}")
        return found
    result = claims.measure(args.slug)
    line, missed = claims.line(result), claims.missed(result)
    if missed:
        say(f"not met: {'; '.join(missed)}")
    if not args.json:
        print(as_line(line))
    return line


def _models(args: argparse.Namespace) -> object:
    from truing import models
    from truing.core.modelfiles import fetch
    from truing.store import Store

    if args.fetch:
        say(str(models.Model.open(args.fetch)))
    found = [*fetch.catalogue(), *Store().quarantined()]
    if not args.json:
        for m in found:
            here = "present" if m["present"] else "not fetched"
            print(f"  {m['name']:<26} {m['licence']:<14} {here:<12} {m['about']}")
    return found


def _data(args: argparse.Namespace) -> object:
    from truing import datasets

    if args.rows or args.model or args.max_length is not None:
        return _rows(args)
    found = datasets.catalogue()
    if not args.json:
        for d in found:
            here = "present" if d["present"] else "absent"
            rows = f"{d['records']:,} rows" if d["records"] else ""
            head = f"  {d['name']:<24} {d['kind']:<10} {here:<8} {rows:<13}"
            unchecked = d["present"] and not d["checked"]
            licence = f"{d['licence']}, no checksum" if unchecked else d["licence"]
            print(f"{head} {licence:<18} {d['about']}")
            if d["source"]:
                print(f"{'':<27}from {d['source']}")
    return found


def _rows(args: argparse.Namespace) -> object:
    """What `truing data ROWS` tells."""
    from truing import dataview

    found = dataview.facts(args.rows, args.model, args.max_length)
    if not args.json:
        print(dataview.text(found))
    return found


def _doctor(args: argparse.Namespace) -> object:
    from truing import doctor

    facts = doctor.examine()
    if not args.json:
        print(doctor.text(facts))
    return facts


def _check_store(args: argparse.Namespace) -> None:
    """Raise an InputError for what the action would not heed: `gc KEY` must not delete the rest."""
    takes = dict.fromkeys(("key", "to", "quarantined", "adapter"), "export") | {"days": "gc"}
    for name, action in takes.items():
        value = getattr(args, name)
        if action != args.action and value != args.parser.get_default(name):
            raise InputError(
                f"store {args.action} takes no {name}",
                where="truing store",
                seen=value,
                fix=f"Only store {action} takes it",
            )


def _store(args: argparse.Namespace) -> object:
    from truing.store import Store

    _check_store(args)
    store = Store()
    actions: dict[str, Callable[[], object]] = {
        "ls": store.ls,
        "verify": store.verify,
        "gc": lambda: store.gc() if args.days is None else store.gc(args.days),
        "export": lambda: store.export(
            args.key, args.to, quarantined=args.quarantined, adapter=args.adapter
        ),
    }
    found = actions[args.action]()
    if not args.json:
        for item in found if isinstance(found, list) else [found]:
            print(item if isinstance(item, str) else as_line(item))
    if args.action == "verify" and isinstance(found, list) and found:
        rows = cast("list[object]", found)
        raise Found(
            f"{len(rows)} artefact{'s were' if len(rows) > 1 else ' was'} damaged and deleted",
            {"damaged": rows},
            where="store verify",
            fix="The steps that made them run again when they are asked for",
        )
    return found


# By name; `parser.command_line` says what each takes.
COMMANDS: dict[str, Command] = {
    "list": _list,
    "show": _show,
    "run": _run,
    "compare": _compare,
    "why": _why,
    "claim": _claim,
    "models": _models,
    "data": _data,
    "doctor": _doctor,
    "store": _store,
}


def _command(argv: list[str]) -> object:
    """Run what was asked; its result."""
    argv = json_last(argv)
    if argv and argv[0] in VERBS:
        from truing import command

        return command.run_verb(argv[0], argv[1:])
    parser = command_line()
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        named = [e.id for e in method_entries().values() if e.name == argv[0].replace("-", "_")]
        if named:
            raise InputError(
                f"{argv[0]!r} is a method, not a command",
                fix="Write: truing " + named[0].replace("/", " ").replace("_", "-"),
            )
        raise unknown("command", argv[0], [*COMMANDS, *VERBS])
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help", "--version"):
        check_first(argv, [*COMMANDS, *VERBS])
    args, extra = parser.parse_known_args(argv)
    if extra:
        child = cast(Parser, getattr(args, "parser", parser))
        raise unknown("option", extra[0].split("=")[0], child.options(), where=child.prog)
    if args.command is None:
        parser.print_help()
        return None
    return COMMANDS[args.command](args)


def _dispatch(argv: list[str]) -> None:
    if "--json" not in argv:
        _command(argv)
        return
    # Whatever else is printed, by us or by a library, must not mix with the JSON.
    with contextlib.redirect_stdout(sys.stderr):
        result = _command(argv)
    if result is not None:
        print(as_line(result))


def _fail(error: TruingError, arguments: Sequence[str]) -> int:
    say(f"truing: {error}")
    if "--json" in arguments:
        facts = error.facts if isinstance(error, Found) else {}
        line = as_line({"error": str(error), "exit_code": error.exit_code, **facts})
        with contextlib.suppress(OSError):
            print(line, flush=True)
    if not output.nobody_reads():
        output.fails()
    return error.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Under `torchrun`, all its processes run it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    loading.in_command = argv is None
    if one_of_several():
        from truing.core.together import lead

        return lead(lambda: _main(arguments))
    return _main(arguments)


def _main(arguments: list[str]) -> int:
    try:
        output.check()
        with interrupt.heard(), interrupt.ended():
            _dispatch(arguments)
        sys.stdout.flush()
        return 0
    except TruingError as error:
        return _fail(error, arguments)
    except KeyboardInterrupt:
        return _fail(Stopped("stopped; the same command goes on from here"), arguments)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and output.nobody_reads():
            return 128 + signal.SIGPIPE  # what a shell reports of programs that this ends
        known = faults.of_system(error, "stdout" if output.fails() else "")
        if known is not None:
            return _fail(known, arguments)
        traceback.print_exc()
        what = f"{type(error).__name__}: {error}"
        fix = "This is a defect of truing itself; please report it with the lines above"
        return _fail(TruingError(what, fix=fix), arguments)


if __name__ == "__main__":
    sys.exit(main())
