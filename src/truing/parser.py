"""What the commands of `truing` take, but for those of methods, which `command` makes."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, cast

from truing import __version__
from truing.catalogue import VERBS
from truing.errors import InputError

Add = Callable[[str, str], "Parser"]


class _Once(argparse.Action):
    """Keeps an option's value, and refuses a second one: neither of two is dropped in silence."""

    given = False

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        if option_string and self.given:
            rows = "; truing select mixture makes one of several" if self.metavar == "TABLE" else ""
            fix = f"Give one of them{rows}"
            raise InputError(f"{option_string} is given twice", where=parser.prog, fix=fix)
        self.given = True
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """Raises InputError instead of exiting, so that every mistake reads alike."""

    def __init__(self, *words: Any, **facts: Any) -> None:
        super().__init__(*words, **facts)
        for name in (None, "store"):  # whatever says nothing else
            self.register("action", name, _Once)

    def error(self, message: str) -> NoReturn:
        """Called by argparse for every mistake."""
        raise InputError(message, where=self.prog, fix="See --help")

    def options(self) -> list[str]:
        """Names of its options, as they are typed."""
        return sorted(set(re.findall(r"--[a-z][a-z-]*", self.format_usage())))


def _evidence(add: Add) -> None:
    """The commands that show what holds and where it comes from."""
    child = add("compare", "several methods on the same data, budget and seeds")
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
    child = add("why", "which principle, generator, judge and filter made a row")
    child.add_argument("row", help="id of a row or of a report's sample, or STEP/ID")
    child.add_argument("--run", default="", help="folder of the run to look in")
    child = add("claim", "measure a paper's claim again")
    child.add_argument("slug", nargs="?", default="", help="a claim's name, as --list gives it")
    child.add_argument("--list", action="store_true", help="all claims, and what they take")


def _run(add: Add) -> None:
    child = add("run", "run a recipe (.yaml or .py); resumes where it stopped")
    child.add_argument("recipe", help="its path")
    child.add_argument(
        "--set",
        action="append",
        metavar="STEP.SETTING=VALUE",
        help="instead of what the recipe has; a relative path is meant from the current directory",
    )
    child.add_argument("--runs", default="runs", help="folder for the run (default: runs)")
    child.add_argument(
        "--watch",
        action="append",
        default=[],
        metavar="NAME",
        help="told of the run as it goes: tensorboard, wandb, or what a package brings",
    )
    child.add_argument(
        "--check", action="store_true", help="only check it and show its steps: no model is fetched"
    )


def command_line() -> Parser:
    """The parser of `truing COMMAND`: it says which `command` it is, and whose `parser` read it."""
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
    # `prog` said: Python 3.14.0 makes it of a usage that has colours.
    sub = parser.add_subparsers(
        dest="command", metavar="COMMAND", parser_class=Parser, prog="truing"
    )

    def add(name: str, text: str) -> Parser:
        child = cast(Parser, sub.add_parser(name, help=text, description=text, allow_abbrev=False))
        child.add_argument("--json", action="store_true", help="JSON alone on stdout")
        child.set_defaults(parser=child)
        return child

    child = add("list", "all methods")
    child.add_argument("--verb", default="", help="only this verb's")
    child.add_argument("--field", default="", help="only methods for this field")
    child.add_argument(
        "--components", action="store_true", help="checks, scorers, ... that settings refer to"
    )
    child = add("show", "one method or component: equation, inputs, settings")
    child.add_argument("name", help="such as dpo, train/dpo or check:max_words")
    _run(add)
    _evidence(add)
    add("models", "models by name").add_argument(
        "--fetch", metavar="NAME", default="", help="bring this one onto the disk now"
    )
    child = add("data", "data sets by name; of rows their kind, and how many tokens they are")
    child.add_argument("rows", nargs="?", default="", help="a file, or a name of the list")
    child.add_argument("--model", default="", help="whose tokens are counted, as training does")
    child.add_argument(
        "--max-length", type=int, help="where answers are cut (default: that of training)"
    )
    add("doctor", "what is installed, what is missing, how fast this machine is")
    _of_store(add("store", "the store of artefacts"))
    return parser


def _of_store(child: Parser) -> None:
    child.add_argument(
        "action",
        choices=["ls", "verify", "gc", "export"],
        help="list it, check every file, delete what nothing refers to, write one artefact out",
    )
    child.add_argument(
        "key",
        nargs="?",
        default="",
        help="export: a key or its beginning, or RUN_FOLDER/STEP; /NAME of what lies beside it",
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
    child.add_argument(
        "--adapter",
        action="store_true",
        help="export: of a model its adapters alone, as one in PEFT's format",
    )
