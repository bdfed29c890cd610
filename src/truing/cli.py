"""The command line, generated from the registry: `truing VERB METHOD --setting value`.

With --json, stdout carries JSON alone and everything else goes to stderr. Exit codes: 0 done, 2 the
user's input, 3 stopped but resumable, 1 our own defect, 141 whoever read our output went away.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, cast

from truing import __version__, faults, interrupt, jsontext, listing, loading, output
from truing.catalogue import VERBS
from truing.catalogue import methods as method_entries
from truing.context import one_of_several
from truing.errors import InputError, Stopped, TruingError, unknown
from truing.words import check_first, json_last


class Found(InputError):
    """What a command found to be wrong: `facts` go beside the message for machines."""

    def __init__(
        self, message: str, facts: Mapping[str, object], *, where: str = "", fix: str = ""
    ) -> None:
        super().__init__(message, where=where, fix=fix)
        self.facts = dict(facts)


Command = Callable[[argparse.Namespace], object]


class Parser(argparse.ArgumentParser):
    """Raises InputError instead of exiting, so that every mistake reads alike."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse for every mistake."""
        raise InputError(message, where=self.prog, fix="See --help")

    def options(self) -> list[str]:
        """Names of its options, as they are typed."""
        return sorted(set(re.findall(r"--[a-z][a-z-]*", self.format_usage())))


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
                print(f"  {c['claim']:<28} {c['title']}")
        return found
    line = claims.claim(args.slug)
    if not args.json:
        print(as_line(line))
    return line


def _models(args: argparse.Namespace) -> object:
    from truing import models
    from truing.core import fetch
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

    found = datasets.catalogue()
    if not args.json:
        for d in found:
            here = "present" if d["present"] else "absent"
            rows = f"{d['records']:,} rows" if d["records"] else ""
            head = f"  {d['name']:<24} {d['kind']:<10} {here:<8} {rows:<13}"
            print(f"{head} {d['licence']:<18} {d['about']}")
            if d["source"]:
                print(f"{'':<27}from {d['source']}")
    return found


def _doctor(args: argparse.Namespace) -> object:
    from truing import doctor

    facts = doctor.examine()
    if not args.json:
        print(doctor.text(facts))
    return facts


def _store(args: argparse.Namespace) -> object:
    from truing.store import Store

    store = Store()
    actions: dict[str, Callable[[], object]] = {
        "ls": store.ls,
        "verify": store.verify,
        "gc": lambda: store.gc() if args.days is None else store.gc(args.days),
        "export": lambda: store.export(args.key, args.to, quarantined=args.quarantined),
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


def _evidence(add: Callable[[str, Command, str], Parser]) -> None:
    """The commands that show what holds and where it comes from."""
    child = add("compare", _compare, "several methods on the same data, budget and seeds")
    child.add_argument("--verb", default="train", help="of bare names")
    child.add_argument(
        "--methods",
        required=True,
        help="comma-separated names; a group's name for all of it that the data can train",
    )
    child.add_argument(
        "--model",
        default="smollm2-135m-instruct",
        help="what each of them starts from: a folder, a hub name or one of `truing models`",
    )
    child.add_argument(
        "--data", required=True, help="preference pairs: a file, or a name of `truing data`"
    )
    child.add_argument("--budget", default="64pairs", help="rows to train on, such as 64pairs")
    child.add_argument(
        "--seeds", type=int, default=3, help="repetitions, each on another sample (default: 3)"
    )
    child.add_argument(
        "--set", action="append", default=[], metavar="SETTING=VALUE", help="of every method"
    )
    child.add_argument("--held-out", type=int, default=128, help="rows that all are measured on")
    child.add_argument("--runs", default="runs", help="folder for the run (default: runs)")
    child = add("why", _why, "which principle, generator, judge and filter made a row")
    child.add_argument("row", help="id of a row or of a report's sample")
    child.add_argument("--run", default="", help="folder of the run to look in")
    child = add("claim", _claim, "measure a paper's claim again")
    child.add_argument("slug", nargs="?", default="", help="a claim's name, as --list gives it")
    child.add_argument("--list", action="store_true", help="all claims, and what they take")


def _parser() -> Parser:
    parser = Parser(
        prog="truing",
        description="From written principles to an aligned model, and the evidence for it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="verbs:\n"
        + textwrap.fill(", ".join(VERBS), 76, initial_indent="  ", subsequent_indent="  ")
        + "\n\n  truing VERB METHOD --help   a method's inputs and settings\n"
        "  truing train dpo --model smollm2-135m-instruct --data pairs.parquet --beta 0.1",
    )
    parser.add_argument("--version", action="version", version=f"truing {__version__}")
    sub = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)

    def add(name: str, command: Command, text: str) -> Parser:
        child = cast(Parser, sub.add_parser(name, help=text, description=text, allow_abbrev=False))
        child.add_argument("--json", action="store_true", help="JSON alone on stdout")
        child.set_defaults(call=command, parser=child)
        return child

    child = add("list", _list, "all methods")
    child.add_argument("--verb", default="", help="only this verb's")
    child.add_argument("--field", default="", help="only methods for this field")
    child.add_argument(
        "--components", action="store_true", help="checks, scorers, ... that settings refer to"
    )
    child = add("show", _show, "one method or component: equation, inputs, settings")
    child.add_argument("name", help="such as dpo, train/dpo or check:max_words")
    child = add("run", _run, "run a recipe (.yaml or .py); resumes where it stopped")
    child.add_argument("recipe", help="its path")
    child.add_argument(
        "--set",
        action="append",
        metavar="STEP.SETTING=VALUE",
        help="instead of what the recipe has; a relative path is meant from the current directory",
    )
    child.add_argument("--runs", default="runs", help="folder for the run (default: runs)")
    child.add_argument(
        "--check", action="store_true", help="only check it and show its steps: no model is fetched"
    )
    _evidence(add)
    add("models", _models, "models by name").add_argument(
        "--fetch", metavar="NAME", default="", help="bring this one onto the disk now"
    )
    add("data", _data, "data sets by name")
    add("doctor", _doctor, "what is installed, what is missing, how fast this machine is")
    child = add("store", _store, "the store of artefacts")
    child.add_argument(
        "action",
        choices=["ls", "verify", "gc", "export"],
        help="list it, check every file, delete what nothing refers to, write one artefact out",
    )
    child.add_argument(
        "key", nargs="?", default="", help="export: a key or its beginning, or RUN_FOLDER/STEP"
    )
    child.add_argument(
        "to",
        nargs="?",
        default="",
        help="export: a new folder; for a table, or a report's samples, also a file: NAME.jsonl, "
        ".csv or .parquet",
    )
    child.add_argument(
        "--days",
        type=float,
        help="gc: how long results of single commands and what they left unfinished are kept "
        "(default 30)",
    )
    child.add_argument(
        "--quarantined", action="store_true", help="export: also a model that an attack made"
    )
    return parser


def _commands(parser: Parser) -> list[str]:
    return re.findall(r"^    ([a-z]+) ", parser.format_help(), re.M)


def _command(argv: list[str]) -> object:
    """Run what was asked; its result."""
    argv = json_last(argv)
    if argv and argv[0] in VERBS:
        from truing import command

        return command.run_verb(argv[0], argv[1:])
    parser = _parser()
    if argv and not argv[0].startswith("-") and argv[0] not in _commands(parser):
        named = [e.id for e in method_entries().values() if e.name == argv[0].replace("-", "_")]
        if named:
            raise InputError(
                f"{argv[0]!r} is a method, not a command",
                fix="Write: truing " + named[0].replace("/", " ").replace("_", "-"),
            )
        raise unknown("command", argv[0], [*_commands(parser), *VERBS])
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help", "--version"):
        check_first(argv, [*_commands(parser), *VERBS])
    args, extra = parser.parse_known_args(argv)
    if extra:
        child = cast(Parser, getattr(args, "parser", parser))
        raise unknown("option", extra[0].split("=")[0], child.options(), where=child.prog)
    if args.command is None:
        parser.print_help()
        return None
    return args.call(args)


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
        with interrupt.heard():
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
