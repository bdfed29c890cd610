"""Tag instructions as Magpie does: difficulty, input quality and task category, by a model.

The tagger sees the query in a fence, the scale and a JSON skeleton, and its answer is prefilled
with an opening brace so that it writes JSON. What it wrote is cut after the last closing brace and
parsed; on any failure the tag's fields are null, which a table leaves out, and the row is kept: its
lineage lists the tags that were asked for, by which select/magpie_filter drops it. Labels outside
the list become null, others among several are left out. The query of a dialogue is its first user
message: follow-ups mean little alone. Greedy, arXiv 2406.08464. The reward, safety and language
tags of the paper are checks and rewards here; near-duplicates are a step of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import cast

from truing.core.batch.template import asking_text
from truing.core.drawing import continued
from truing.core.journaled import kept
from truing.core.sampling import SamplingSettings
from truing.errors import InputError
from truing.method import method
from truing.models import Loaded, Model
from truing.select.near_duplicates import instruction
from truing.tables import Row, Table

CHUNK = 128  # tags that are drawn together: what a kill can cost

DIFFICULTY = ("very easy", "easy", "medium", "hard", "very hard")
QUALITY = ("very poor", "poor", "average", "good", "excellent")
CATEGORIES = (
    "Information seeking",
    "Reasoning",
    "Planning",
    "Editing",
    "Coding & Debugging",
    "Math",
    "Role playing",
    "Data analysis",
    "Creative writing",
    "Advice seeking",
    "Brainstorming",
    "Others",
)
# tag -> (what is asked, allowed labels of its first field, fields of the skeleton -> column)
TAGS: dict[str, tuple[str, tuple[str, ...], dict[str, str]]] = {
    "difficulty": (
        "Say what the user intends, which knowledge is needed, and how difficult the query is: "
        + ", ".join(DIFFICULTY),
        DIFFICULTY,
        {"difficulty": "difficulty", "intent": "intent", "knowledge": "knowledge"},
    ),
    "quality": (
        "Rate how clear and specific the query is: " + ", ".join(QUALITY),
        QUALITY,
        {"input_quality": "input_quality", "explanation": "quality_explanation"},
    ),
    "category": (
        "Choose the one primary task category of the query, and others that fit: "
        + ", ".join(CATEGORIES),
        CATEGORIES,
        {"primary_tag": "task_category", "other_tags": "other_task_category"},
    ),
}


def tag_prompt(query: str, tag: str) -> str:
    """The question put to the tagger for one tag of one query."""
    asked, _, fields = TAGS[tag]
    skeleton = json.dumps(dict.fromkeys(fields, ""))
    return (
        f"```\n{query}\n```\nThe query above was written by a user. {asked}.\n"
        f"Answer with this JSON, filled in, and nothing else:\n{skeleton}"
    )


def _listed(value: object, known: Mapping[str, str]) -> list[str] | None:
    """The known labels of a JSON list, or of a text with commas; None where there is neither."""
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, list):
        return None
    names = [str(v).strip().lower() for v in cast("list[object]", value)]
    return [known[name] for name in names if name in known]


def parse_tag(written: str, tag: str) -> dict[str, object]:
    """Columns of a tag from what the tagger wrote after the opening brace; null if unreadable."""
    _, labels, fields = TAGS[tag]
    empty: dict[str, object] = {column: None for column in fields.values()}  # noqa: C420
    text = "{" + written
    try:
        data = json.loads(text[: text.rindex("}") + 1])
    except ValueError:
        return empty
    if not isinstance(data, dict):
        return empty
    found = cast(dict[str, object], data)
    values = {column: found.get(name) for name, column in fields.items()}
    first = next(iter(values))
    known = {label.lower(): label for label in labels}
    values[first] = known.get(str(values[first]).strip().lower())
    if "other_tags" in fields:
        values[fields["other_tags"]] = _listed(found.get("other_tags"), known)
    return values


def _head(loaded: Loaded, query: str, tag: str) -> list[int]:
    """Token ids of the question and of the brace that the answer begins with."""
    asked = [{"role": "user", "content": tag_prompt(query, tag)}]
    head = asking_text(loaded.tokenizer, asked) + "{"
    return cast(list[int], loaded.tokenizer.encode(head, add_special_tokens=False))


@method(
    paper="magpie",
    needs=("generate", "weights"),
    rows={"data": ()},  # of any kind: prompts, dialogues and texts are tagged alike
    within={"max_tokens": (1, None)},
    makes="data",
)
def magpie_tags(
    data: Table,
    model: Model,
    *,
    tags: tuple[str, ...] = ("difficulty", "quality", "category"),
    max_tokens: int = 256,
) -> Table:
    """Tag instructions as Magpie does: difficulty, input quality and task category, by a model.

    Args:
        tags: which of difficulty, quality and category to ask for.
        max_tokens: length limit of the tagger's answer; the paper's is 1,024.
    """
    for tag in tags:
        if tag not in TAGS:
            raise InputError(
                "no such tag", where="setting 'tags'", seen=tag, fix="Known: " + ", ".join(TAGS)
            )
    loaded = model.load_module()
    asked = list(dict.fromkeys((instruction(row), tag) for row in data for tag in tags))

    sampling = SamplingSettings(max_tokens=max_tokens, greedy=True)

    def write(some: Sequence[tuple[str, str]]) -> list[str]:
        heads = [_head(loaded, query, tag) for query, tag in some]
        return [d[0].text for d in continued(loaded, heads, sampling)]

    texts = kept("tags", [model.key, max_tokens], asked, CHUNK, write)
    written = dict(zip(asked, texts, strict=True))
    rows: list[Row] = []
    for row in data:
        new, query = dict(row), instruction(row)
        for tag in tags:
            new |= parse_tag(written[query, tag], tag)
        lineage = cast(Row, row["lineage"])
        earlier = cast("list[str]", lineage.get("tags") or [])
        new["lineage"] = lineage | {"tags": list(dict.fromkeys([*earlier, *tags]))}
        rows.append(new)
    table = Table(data.kind, rows, where=data.source)
    return table.with_lineage(tagger=model.key)
