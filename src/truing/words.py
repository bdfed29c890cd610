"""The words of a command, in the order in which the command line takes them: options come last."""

from __future__ import annotations

from collections.abc import Sequence

from truing.errors import InputError


def json_last(argv: Sequence[str]) -> list[str]:
    """Words with a --json that stands before all others behind them, where commands take it."""
    words = [w for w in argv if w != "--json"]
    return [*words, "--json"] if words and argv[0] == "--json" else list(argv)


def check_first(argv: Sequence[str], commands: Sequence[str]) -> None:
    """Raise an InputError for an option that stands before the command."""
    first = next((w for w in argv[1:] if w in commands), "")
    if first:
        fix = f"Write: truing {first} ... {argv[0]}"
        raise InputError("options come after the command", where="truing", seen=argv[0], fix=fix)
