"""The command line, generated from the registry: `truing VERB METHOD --setting value`.

With --json, stdout carries JSON alone and everything else goes to stderr. Exit codes: 0 done, 2 the
user's input, 3 stopped but resumable, 1 our own defect.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from truing import __version__
from truing.catalogue import VERBS, Entry, find
from truing.catalogue import methods as method_entries
from truing.errors import InputError, Stopped, TruingError, unknown

Command = Callable[[argparse.Namespace], object]


class Parser(argparse.ArgumentParser):
    """Raises InputError instead of exiting, so that every mistake reads alike."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message, where=self.prog, fix="See --help")


def say(text: str = "") -> None:
    """A line for people: always on stderr."""
    print(text, file=sys.stderr)


def _list(args: argparse.Namespace) -> object:
    found = [
        e
        for e in method_entries().values()
        if args.verb in ("", e.verb) and args.field in ("", e.field)
    ]
    found.sort(key=lambda e: (VERBS.index(e.verb), e.group, e.name))
    if not args.json:
        verb = ""
        for e in found:
            if e.verb != verb:
                verb = e.verb
                print(f"\n{verb}")
            print(f"  {e.name:<22} {e.summary}")
    return [
        {k: getattr(e, k) for k in ("name", "verb", "group", "field", "paper", "summary")}
        for e in found
    ]


def _show(args: argparse.Namespace) -> object:
    from truing.method import methods, type_name

    found = methods[args.name]
    inputs = {n: i.noun + (" (optional)" if i.optional else "") for n, i in found.inputs.items()}
    settings = {
        s.name: {
            "type": type_name(s.type),
            "default": None if s.required else s.default,
            "required": s.required,
            "doc": s.doc,
        }
        for s in found.settings.values()
    }
    if not args.json:
        print(f"{found.id} -> {found.returns}\n\n{found.doc}\n")
        print("Inputs:\n" + "\n".join(f"  --{n:<14} {v}" for n, v in inputs.items()))
        print("\nSettings:")
        for name, s in settings.items():
            default = "required" if s["required"] else repr(s["default"])
            head = f"  --{name.replace('_', '-'):<20} {s['type']}, {default}"
            print(head + (f"\n      {s['doc']}" if s["doc"] else ""))
    return {"name": found.id, "returns": found.returns, "inputs": inputs, "settings": settings}


def _run(args: argparse.Namespace) -> object:
    from truing import pipeline, recipe

    plan = recipe.load(args.recipe)
    for text in args.set or []:
        plan.override(text)
    result = pipeline.run(plan, runs=args.runs)
    line = result.line()
    if not args.json:
        say(result.table())
        print(json.dumps(line))
    return line


def _compare(args: argparse.Namespace) -> object:
    from truing import compare

    result = compare.from_options(
        verb=args.verb,
        methods=[m for m in args.methods.split(",") if m],
        model=args.model,
        data=args.data,
        budget=args.budget,
        seeds=args.seeds,
        runs=args.runs,
    )
    if not args.json:
        say(result.table())
        print(json.dumps(result.line()))
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
    line = claims.run(args.slug)
    if not args.json:
        print(json.dumps(line))
    return line


def _models(args: argparse.Namespace) -> object:
    from truing import models
    from truing.core import fetch

    if args.fetch:
        say(str(models.Model.open(args.fetch)))
    found = fetch.catalogue()
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
            print(f"  {d['name']:<24} {d['kind']:<10} {here:<8} {d['licence']:<18} {d['about']}")
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
        "gc": store.gc,
        "export": lambda: store.export(args.key, args.to),
    }
    found = actions[args.action]()
    if not args.json:
        for item in found if isinstance(found, list) else [found]:
            print(item if isinstance(item, str) else json.dumps(item))
    return found


def _parser() -> Parser:
    parser = Parser(
        prog="truing",
        description="From written principles to an aligned model, and the evidence for it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="verbs:\n"
        + textwrap.fill(", ".join(VERBS), 76, initial_indent="  ", subsequent_indent="  ")
        + "\n\n  truing VERB METHOD --help   a method's inputs and settings\n"
        "  truing train dpo --model smollm2-135m-instruct --data pairs.parquet --beta 0.1",
    )
    parser.add_argument("--version", action="version", version=f"truing {__version__}")
    sub = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        child = sub.add_parser(name, help=text, description=text)
        child.add_argument("--json", action="store_true", help="JSON alone on stdout")
        child.set_defaults(run=command)
        return child

    child = add("list", _list, "all methods")
    child.add_argument("--verb", default="", choices=["", *VERBS])
    child.add_argument("--field", default="")
    add("show", _show, "one method: equation, inputs, settings").add_argument("name")
    child = add("run", _run, "run a recipe (.yaml or .py); resumes where it stopped")
    child.add_argument("recipe")
    child.add_argument("--set", action="append", metavar="STEP.SETTING=VALUE")
    child.add_argument("--runs", default="runs", help="folder for the run (default: runs)")
    child = add("compare", _compare, "several methods on the same data, budget and seeds")
    child.add_argument("--verb", default="train", choices=VERBS)
    child.add_argument("--methods", required=True, help="comma-separated names")
    child.add_argument("--model", default="smollm2-135m-instruct")
    child.add_argument("--data", required=True)
    child.add_argument("--budget", default="64pairs", help="rows to train on, such as 64pairs")
    child.add_argument("--seeds", type=int, default=3)
    child.add_argument("--runs", default="runs")
    child = add("why", _why, "which principle, generator, judge and filter made a row")
    child.add_argument("row", help="id of a row or of a report's sample")
    child.add_argument("--run", default="", help="folder of the run to look in")
    child = add("claim", _claim, "measure a paper's claim again")
    child.add_argument("slug", nargs="?", default="")
    child.add_argument("--list", action="store_true")
    add("models", _models, "models by name").add_argument("--fetch", metavar="NAME", default="")
    add("data", _data, "data sets by name")
    add("doctor", _doctor, "what is installed, what is missing, how fast this machine is")
    child = add("store", _store, "the store of artefacts")
    child.add_argument("action", choices=["ls", "verify", "gc", "export"])
    child.add_argument("key", nargs="?", default="")
    child.add_argument("to", nargs="?", default="")
    return parser


def _verb_command(verb: str, rest: Sequence[str]) -> object:
    """`truing VERB METHOD ...`; `truing VERB` lists the verb's methods."""
    from truing import command

    entries: dict[str, Entry] = {
        e.name: e for e in method_entries().values() if e.verb == verb
    }
    if not rest or rest[0] in ("-h", "--help"):
        print(f"usage: truing {verb} METHOD --help\n")
        for e in entries.values():
            print(f"  {e.name.replace('_', '-'):<24} {e.summary}")
        return None
    name = rest[0].replace("-", "_")
    if name in entries:
        return command.run_method(find(f"{verb}/{name}"), list(rest[1:]))
    if verb == "serve" and not rest[0].startswith("-"):
        return command.run_method(find("serve/openai"), ["--model", *rest])
    raise unknown("method", rest[0], entries, where=f"truing {verb}")


def _dispatch(argv: list[str]) -> int:
    if argv and argv[0] in VERBS:
        result = _verb_command(argv[0], argv[1:])
    else:
        parser = _parser()
        args = parser.parse_args(argv)
        if args.command is None:
            parser.print_help()
            return 0
        result = args.run(args)
    if "--json" in argv and result is not None:
        print(json.dumps(result, default=str))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except TruingError as error:
        say(f"truing: {error}")
        if "--json" in arguments:
            print(json.dumps({"error": str(error), "exit_code": error.exit_code}))
        return error.exit_code
    except KeyboardInterrupt:
        say("truing: stopped; the same command goes on from here")
        return Stopped.exit_code
    except BrokenPipeError:
        # The reader of our output went away, as `truing list | head` does.
        sys.stderr.close()
        return 0
    except Exception:
        traceback.print_exc()
        say("truing: this is a defect of truing itself; please report it with the lines above")
        return 1


if __name__ == "__main__":
    sys.exit(main())
