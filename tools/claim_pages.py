"""docs/claims.md: what was seen of each claim, what was not and why, and what has no result yet."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from pagetext import NOTE, escape, table

from truing import claims
from truing.context import Json
from truing.mirrored import MIRRORED


def _result(data: Mapping[str, Json]) -> str:
    if data.get("seen"):
        return "seen"
    missed = claims.missed(data)
    if not missed:
        return "**not seen**"
    further = not claims.missed({**data, "holds": {}})  # the effect itself is as it should be
    word = "effect seen" if further else "not seen"
    return f"**{word}**; not met: {'; '.join(map(escape, missed))}"


def _on(path: Path) -> str:
    """What a claim is measured on, and the sets that it reads from a folder of the user's."""
    read = re.findall(r"Table\.read\(\"(\w+)", path.read_text(encoding="utf-8"))
    sets = [f"; the set `{n}` in `TRUING_DATA`" for n in dict.fromkeys(read) if n in MIRRORED]
    return escape(str(claims.literals(path)["MODEL"])) + "".join(sets)


def _asked(margin: object) -> str:
    return f"at least {margin:g}" if isinstance(margin, (int, float)) and margin else "above 0"


def _row(name: str, data: Mapping[str, Json], model: str) -> list[str]:
    low, high = cast("list[float]", data.get("interval") or [float("nan")] * 2)
    count = len(cast("list[float]", data.get("effects") or []))
    over = f"; {count} {data.get('over')}" if count else ""
    return [
        f"`{data.get('claim', name)}`",
        escape(str(data.get("title") or name)),
        model,
        _result(data),
        escape(str(data.get("measures") or "-")),
        _asked(data.get("margin")),
        f"{cast(float, data.get('effect') or 0.0):.3g} [{low:.3g}, {high:.3g}]{over}",
        f"{claims.cost(data) / 60:.1f} min",
        str(data.get("date", "")),
    ]


def _without(slug: str, path: Path) -> list[str]:
    stated = claims.literals(path)
    result = "no result yet" + (", needs a GPU" if stated["NEEDS_GPU"] else "")
    title = escape(str(stated["TITLE"]))
    measures, asked = escape(str(stated["EFFECT"])), _asked(stated["MARGIN"])
    minutes = f"about {stated['MINUTES']} min"
    return [f"`{slug}`", title, _on(path), result, measures, asked, "-", minutes, "-"]


def claims_page(root: Path) -> str:
    """The page, from the claims and the committed results."""
    folder = root / "claims"
    paths = [p for p in folder.glob("*.py") if not p.name.startswith("_")]
    rows = {claims.slug_of(path): _without(claims.slug_of(path), path) for path in paths}
    models = {claims.slug_of(path): _on(path) for path in paths}
    for path in (folder / "results").glob("*.json"):
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict) and "seen" in data:
            model = models.get(path.stem, "-")
            rows[path.stem] = _row(path.stem, cast("dict[str, Json]", data), model)
    parts = [
        NOTE + "# Claims\n",
        "What a paper says must be seen, measured again at small scale: `truing claim SLUG` does "
        "it on your\nmachine. A claim that is not seen at this scale stands here as such, with "
        "its numbers and with the\nconditions that were not met; so does one that nobody has "
        "measured yet.\n\n"
        "An effect is the mean over seeds, or over prompts, of what is measured. A claim is *seen* "
        "where it is as\nlarge as is asked, its interval lies above 0 and all else that must hold "
        "does; *effect seen* says that only\nsome of this else does not, so that "
        "`truing claim` calls it not seen, and *not seen* that the effect\nitself is too small or "
        "not clear of 0. Where all seeds have one value, the interval has no width.\n",
    ]
    head = (
        "claim", "what must be seen", "on", "result", "measured", "asked",
        "effect [95 % interval]", "cost", "date",
    )  # fmt: skip
    shown = [rows[slug] for slug in sorted(rows)]
    parts.append(table(head, shown) if shown else "There are no claims.\n")
    return "\n".join(parts)
