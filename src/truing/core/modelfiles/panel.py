"""A panel: several models that judge as one.

It stands where one judge would, as the base of a `Model` that holds no weights: the judging of
`core.judge` asks its members and puts their verdicts together. It writes no text of its own.
Panels of small models from different families, pooled by mean or by vote, agree with people better
than one large judge: Replacing Judges with Juries, arXiv 2404.18796.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from truing.core.modelfiles.licences import strictest
from truing.core.modelfiles.loaded import keep_panel
from truing.errors import InputError
from truing.models import Folder, Model
from truing.tables import content_hash

Rule = Literal["mean", "majority"]
LEAST = 2  # members of a panel


@dataclass(frozen=True)
class Panel:
    """What the model that is a panel stands on.

    Args:
        judges: its members, by name.
        rule: the mean of their verdicts, or what more than half of them decide (1, 0, else 0.5).
    """

    judges: Mapping[str, Model]
    rule: Rule = "mean"

    def __post_init__(self) -> None:
        keep_panel(self.local)

    @property
    def local(self) -> int:
        """How many of its members are computed here."""
        bases = [m.base for m in self.judges.values()]
        return sum(b.local if isinstance(b, Panel) else isinstance(b, Folder) for b in bases)

    @property
    def key(self) -> str:
        """Hash of rule and members, in whatever order."""
        return content_hash(["panel", self.rule, sorted(m.key for m in self.judges.values())])

    @property
    def licence(self) -> str:
        """The strictest of the members'."""
        return strictest([m.licence for m in self.judges.values()])

    @property
    def can(self) -> frozenset[str]:
        """As what a judge must: its members write, or say what they would."""
        return frozenset({"generate"})


def panel_of(judges: Sequence[Model], rule: Rule = "mean", *, where: str = "panel") -> Model:
    """A model that judges as these do together.

    Raises:
        InputError: there are fewer than two, or one cannot judge.
    """
    if len(judges) < LEAST:
        names = [m.name for m in judges]
        raise InputError(f"setting 'judges' needs {LEAST} at least", where=where, seen=names)
    named: dict[str, Model] = {}
    for judge in judges:
        if "generate" not in judge.can:
            raise InputError(
                "is not a model that can judge",
                where=where,
                seen=judge.name,
                fix="Give language models, local or served",
            )
        same = sum(one.name == judge.name for one in named.values())
        named[f"{judge.name} {same + 1}" if same else judge.name] = judge
    marks = dict.fromkeys(m.quarantine for m in judges if m.quarantine)
    return Model(
        Panel(named, rule), name=f"panel of {', '.join(named)}", quarantine=", ".join(marks)
    )
