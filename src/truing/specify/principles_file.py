"""Read principles from a YAML file of typed rules with executable checks.

Each rule has an id, a text addressed to the model and, where a program can tell whether an answer
keeps it, a check: `{use: max_words, n: 40}`, a reference to a registered component. The file can
therefore be shared, compared and hashed, and it cannot run code. Our own format; no paper.
"""

from __future__ import annotations

from pathlib import Path

from truing.components import asked
from truing.errors import InputError
from truing.method import method
from truing.principles import Principles


def check_all(principles: Principles, *, where: str = "") -> None:
    """Raise an InputError unless every check names a known component with valid settings."""
    for rule in principles:
        if rule.check is None:
            continue
        at = f"{where} principle {rule.id}".strip()
        function, settings = asked("check", rule.check, where=at)
        try:
            function([], **settings)  # the built-in ones look at the values of their settings first
        except InputError as error:
            raise InputError(
                error.message, where=f"{at} {error.where}", seen=error.seen, fix=error.fix
            ) from None
        except Exception:
            # A check of another package need not be written for no rows at all.
            continue


@method()
def principles_file(*, path: Path) -> Principles:
    """Read principles from a YAML file of typed rules with executable checks.

    Args:
        path: YAML or JSON file; a relative one is sought beside the recipe.
    """
    principles = Principles.read(path)
    check_all(principles, where=str(path))
    return principles
