"""Commands and steps that the documentation tells name methods and settings that are there."""

from __future__ import annotations

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

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(p for folder in ("recipes", "bench", "examples") for p in (ROOT / folder).glob("*.md")),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "docs" / "tutorials").glob("*.md"),
]
BLOCK = re.compile(r"^```(?:sh|bash|text)[^\n]*\n(.*?)^```", re.S | re.M)
INLINE = re.compile(r"`(truing [^`\n]+)`")


def _commands(text: str) -> list[str]:
    """The commands of a page, one line each."""
    lines = [
        line for block in BLOCK.findall(text) for line in block.replace("\\\n", "").split("\n")
    ]
    told = [re.sub(r"^(?:torchrun .*? -m |\$ |[A-Z_]+=\S+ )*", "", line.strip()) for line in lines]
    return [line for line in (*told, *INLINE.findall(text)) if line.startswith("truing ")]


def _options(words: list[str]) -> list[str]:
    return [w.removeprefix("--").split("=")[0] for w in words if w.startswith("--") and w != "--"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_methods_and_settings(page: Path) -> None:
    parser = cli._parser()  # pyright: ignore[reportPrivateUsage]
    known = cli._commands(parser)  # pyright: ignore[reportPrivateUsage]
    for line in _commands(page.read_text(encoding="utf-8")):
        try:
            _, first, *words = shlex.split(re.split(r" [|>#;&]| \.\.\.", line)[0])
        except ValueError:  # half a command, in an error's text
            continue
        if first in VERBS and words and words[0].islower() and words[0][0] != "-":
            name = f"{first}/{words[0].replace('-', '_')}"
            name = "serve/openai" if first == "serve" and name not in methods else name
            method = methods[name]
            takes = {*method.inputs, *method.settings, *OWN}
            assert {o.replace("-", "_") for o in _options(words)} <= takes, line
        elif first.isalpha() and first not in VERBS and first.islower():
            assert first in known, line


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


def test_commands_are_found_and_a_wrong_one_is_told(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```sh\ntruing train grpo --data x.jsonl \\\n    --new-tokens 64\n```\n`truing lst`\n"
    )
    assert _commands(page.read_text()) == [
        "truing train grpo --data x.jsonl     --new-tokens 64", "truing lst"
    ]  # fmt: skip
    with pytest.raises(AssertionError, match="new-tokens"):
        test_commands_name_methods_and_settings(page)
    assert sum(len(_commands(p.read_text(encoding="utf-8"))) for p in PAGES) > 60
