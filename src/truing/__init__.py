"""truing: from written principles to an aligned model, and the evidence for it.

Four nouns (`Principles`, `Table`, `Model`, `Report`) flow through methods, listed in `methods`.
`run` executes a recipe, `compare` sets several methods side by side.
"""

from __future__ import annotations

import importlib
import sys
import time
import types
from typing import TYPE_CHECKING

__version__ = "0.1.0"
began = time.time()  # before anything else was loaded: files older than this are what is loaded

WHERE = {
    "Model": "truing.models",
    "Table": "truing.tables",
    "Principles": "truing.principles",
    "Principle": "truing.principles",
    "Report": "truing.reports",
    "Measure": "truing.reports",
    "method": "truing.method",
    "component": "truing.method",
    "checks": "truing.own_checks",
    "methods": "truing.method",
    "get_component": "truing.method",
    "objective": "truing.core.objective",
    "online": "truing.core.online",
    "generate": "truing.core.generate",
    "Plan": "truing.plan",
    "run": "truing.pipeline",
    "compare": "truing.compare",
    "claim": "truing.claims",
    "TruingError": "truing.errors",
    "InputError": "truing.errors",
    "Stopped": "truing.errors",
}

if TYPE_CHECKING:
    from truing.claims import claim as claim
    from truing.compare import compare as compare
    from truing.core.generate import generate as generate
    from truing.core.objective import objective as objective
    from truing.core.online import online as online
    from truing.errors import InputError as InputError
    from truing.errors import Stopped as Stopped
    from truing.errors import TruingError as TruingError
    from truing.method import component as component
    from truing.method import get_component as get_component
    from truing.method import method as method
    from truing.method import methods as methods
    from truing.models import Model as Model
    from truing.own_checks import checks as checks
    from truing.pipeline import run as run
    from truing.plan import Plan as Plan
    from truing.principles import Principle as Principle
    from truing.principles import Principles as Principles
    from truing.reports import Measure as Measure
    from truing.reports import Report as Report
    from truing.tables import Table as Table

__all__ = ["__version__", *WHERE]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    # Lazy, so that `import truing` costs milliseconds and never imports torch.
    if name not in WHERE:
        raise AttributeError(f"module 'truing' has no attribute {name!r}")
    found: object = getattr(importlib.import_module(WHERE[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(types.ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        # Importing truing.method would make `truing.method` the module: it stays the decorator,
        # whoever imported what before. The module is had with `from truing.method import ...`.
        if not (name in WHERE and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
