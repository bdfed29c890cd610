"""Commands and steps that the documentation, and what the code says, tell are there as told."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from truing import cli
from truing.catalogue import VERBS
from truing.command import OWN
from truing.method import methods
from truing.parser import Parser, command_line

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(p for folder in ("recipes", "bench", "examples") for p in (ROOT / folder).glob("*.md")),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "docs" / "tutorials").glob("*.md"),
]
BLOCK = re.compile(r"^```(?:sh|bash|text)[^\n]*\n(.*?)^```", re.S | re.M)
INLINE = re.compile(r"`(truing [^`\n]+)`|\((truing [^`()\n]+)\)")


def _commands(text: str) -> list[str]:
    """The commands of a page, one line each."""
    lines = [
        line for block in BLOCK.findall(text) for line in block.replace("\\\n", "").split("\n")
    ]
    told = [re.sub(r"^(?:torchrun .*? -m |\$ |[A-Z_]+=\S+ )*", "", line.strip()) for line in lines]
    return [line for line in (*told, *_inline(text)) if line.startswith("truing ")]


def _inline(text: str) -> list[str]:
    return [quoted or bracketed for quoted, bracketed in INLINE.findall(text)]


def _options(words: list[str]) -> list[str]:
    return [w.removeprefix("--").split("=")[0] for w in words if w.startswith("--") and w != "--"]


@pytest.fixture(scope="module")
def parsers() -> dict[str, Parser]:
    """The parsers of the commands that are no verbs, by name."""
    parser = command_line()
    (found,) = (
        action.choices
        for action in parser._actions  # pyright: ignore[reportPrivateUsage]
        if isinstance(action, argparse._SubParsersAction)  # pyright: ignore[reportPrivateUsage]
    )
    return found


def test_every_command_has_a_parser(parsers: dict[str, Parser]) -> None:
    assert list(cli.COMMANDS) == list(parsers)


def _faults(line: str, parsers: dict[str, Parser]) -> str:
    """What a command names that is not there; "" for a right one, and for half a command."""
    try:
        _, first, *words = shlex.split(re.split(r" [|>#;&]| \.\.\.", line)[0])
    except ValueError:  # in an error's text
        return ""
    if first in VERBS and words and words[0].islower() and words[0][0] != "-":
        name = f"{first}/{words[0].replace('-', '_')}"
        name = "serve/openai" if first == "serve" and name not in methods else name
        method = methods[name]
        takes = {*method.inputs, *method.settings, *OWN}
        return " ".join({o.replace("-", "_") for o in _options(words)} - takes)
    if not (first.isalpha() and first.islower()) or first in VERBS:
        return ""
    if first not in parsers:
        return first
    unknown = {f"--{o}" for o in _options(words)} - {*parsers[first].options(), "--help"}
    plain = [w for w in words if not w.startswith("-")][:1]
    return " ".join(unknown or {w for w in plain if first == "store" and w not in ACTIONS})


ACTIONS = {"ls", "verify", "gc", "export"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_methods_and_settings(page: Path, parsers: dict[str, Parser]) -> None:
    for line in _commands(page.read_text(encoding="utf-8")):
        assert not _faults(line, parsers), line


def _texts(node: ast.AST) -> Iterator[str]:
    """All texts in a piece of code, with a word for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        yield "".join(str(v.value) if isinstance(v, ast.Constant) else "X" for v in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    else:
        for child in ast.iter_child_nodes(node):
            yield from _texts(child)


def _said(code: str) -> list[str]:
    """The commands that the texts of some code tell: remedies, help, docstrings."""
    return [line for text in _texts(ast.parse(code)) for line in _inline(text)]


def test_commands_that_the_code_tells_are_there(parsers: dict[str, Parser]) -> None:
    code = {p: _said(p.read_text(encoding="utf-8")) for p in (ROOT / "src").rglob("*.py")}
    wrong = {(p.name, one) for p, lines in code.items() for one in lines if _faults(one, parsers)}
    assert not wrong
    assert sum(map(len, code.values())) > 20


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("fix='Say `truing list --componets`'", "--componets"),
        ("fix=f'See `truing {name} --help`, or `truing stor ls`'", "stor"),
        ("where('x', fix=('`truing store '\n 'empty`' if a else b))", "empty"),
        ("'(truing run r.yaml --sets a=b)'", "--sets"),
        ("f'`truing train dpo --beat {beta}`'", "beat"),
        ("f'`truing train dpo --beta {beta} --model NAME`, `truing store export KEY TO`'", ""),
    ],
)
def test_a_wrong_command_in_the_code_is_told(
    code: str, fault: str, parsers: dict[str, Parser]
) -> None:
    assert _said(code) and "".join(_faults(line, parsers) for line in _said(code)) == fault


def _steps(value: object) -> Iterator[dict[str, object]]:
    """Mappings with `do` anywhere in a piece of YAML."""
    if isinstance(value, dict):
        if "do" in value:
            yield value
        for one in value.values():
            yield from _steps(one)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_steps_name_methods_and_settings(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml[^\n]*\n(.*?)^```", text, re.S | re.M)
    for block in [*blocks, *re.findall(r"`(\{do: [^`]*\})`", text)]:
        for step in _steps(yaml.safe_load(block.replace(", ...", ""))):
            method = methods[str(step.pop("do"))]
            assert set(step) <= {*method.inputs, *method.settings, "seed", "<<"}, (step, method)


def test_commands_are_found_and_a_wrong_one_is_told(
    tmp_path: Path, parsers: dict[str, Parser]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```sh\ntruing train grpo --data x.jsonl \\\n    --new-tokens 64\n```\n`truing lst`\n"
    )
    assert _commands(page.read_text()) == [
        "truing train grpo --data x.jsonl     --new-tokens 64", "truing lst"
    ]  # fmt: skip
    with pytest.raises(AssertionError, match="new-tokens"):
        test_commands_name_methods_and_settings(page, parsers)
    assert sum(len(_commands(p.read_text(encoding="utf-8"))) for p in PAGES) > 60
