"""`Principles`: typed, versioned rules that synthesis, judges, rewards and reports refer to by id.

A rule's check is a reference to a registered component (`{use: max_words, n: 40}`), never source
text, so that no principles file can execute code.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import cast

from truing.catalogue import used
from truing.core.files import expanded
from truing.errors import InputError, no_file, unknown, yaml_fix
from truing.faults import placing
from truing.references import referred, refuse_bare
from truing.surrogates import mended
from truing.tables import content_hash

SCHEMA_VERSION = 1
EXAMPLE = ("prompt", "good", "bad")
ID = re.compile(r"[\w.-]+")  # rows list ids as "brief, calm"


@dataclass(frozen=True)
class Principle:
    """One rule.

    Args:
        id: short identifier, one word, unique in its file.
        text: the rule as a sentence addressed to the model.
        rationale: why it exists.
        examples: dicts with "prompt" and "good" and/or "bad" answers.
        priority: a higher one wins where two rules conflict.
        kind: free label such as "style" or "content".
        check: reference to a check component, in Python also its function; None when only a judge
            can tell.
        negative: the opposite of the rule, for what learns to tell a rule from its opposite.
    """

    id: str
    text: str
    rationale: str = ""
    examples: tuple[dict[str, str], ...] = ()
    priority: int = 1
    kind: str = ""
    check: dict[str, object] | None = field(default=None, hash=False)
    negative: str = ""

    def __post_init__(self) -> None:
        """A function in place of a reference becomes one; an id that is none is an InputError."""
        _check_id(self.id)
        if callable(cast(object, self.check)):
            object.__setattr__(self, "check", referred(self.check))

    def to_json(self) -> dict[str, object]:
        """Plain data without the empty fields."""
        data = asdict(self) | {"examples": list(self.examples)}
        return {k: v for k, v in data.items() if v not in ("", None, [])}

    @classmethod
    def from_json(cls, data: object, *, where: str) -> Principle:
        """One rule from plain data.

        Args:
            data: a mapping of this class's arguments, of which id and text must be there.
            where: what errors name.
        Raises:
            InputError: naming rule and field.
        """
        if not isinstance(data, Mapping):
            raise InputError(
                "a principle must be a mapping with id and text",
                where=where,
                seen=data,
                fix="Write {id: a-name, text: The rule.}",
            )
        rule = cast(Mapping[str, object], data)
        known = {f.name: f for f in fields(cls)}
        where = f"{where} ({rule['id']})" if isinstance(rule.get("id"), str) else where
        for name in rule:
            if name not in known:
                raise unknown("field", str(name), known, where=where)
        for name in ("id", "text"):
            value = rule.get(name)
            if not isinstance(value, str) or not value.strip():
                raise _no_text(name, value, where)
        _check_id(cast(str, rule["id"]), where)
        for name in ("rationale", "kind", "negative"):
            if not isinstance(rule.get(name, ""), str):
                raise _no_text(name, rule[name], where)
        priority = rule.get("priority", 1)
        if not isinstance(priority, int) or isinstance(priority, bool):
            raise InputError("field 'priority' must be a whole number", where=where, seen=priority)
        examples = _examples(rule.get("examples", []), where)
        check = rule.get("check")
        if check is not None and not (isinstance(check, Mapping) and "use" in check):
            raise InputError(
                "field 'check' must refer to a component: {use: name, ...settings}",
                where=where,
                seen=check,
                fix="`truing list --components` has the names",
            )
        return cls(
            id=cast(str, rule["id"]),
            text=cast(str, rule["text"]).strip(),
            rationale=cast(str, rule.get("rationale", "")),
            examples=examples,
            priority=priority,
            kind=cast(str, rule.get("kind", "")),
            check=dict(cast(Mapping[str, object], check)) if check is not None else None,
            negative=cast(str, rule.get("negative", "")).strip(),
        )


def _check_id(id: str, where: str = "principle") -> None:
    if not ID.fullmatch(id):
        raise InputError(
            "field 'id' must be one word of letters, digits, '_', '-' and '.'",
            where=where,
            seen=id,
            fix="Say what the rule says in 'text'; rows and reports name it by its id",
        )


def _no_text(name: str, value: object, where: str) -> InputError:
    number = isinstance(value, (bool, int, float))  # as YAML reads 3, 1.0 and yes
    fix = "Put quotes around it" if number else f"Write its words behind '{name}:'"
    return InputError(f"field {name!r} must be a text", where=where, seen=value, fix=fix)


def _no_examples(value: object, where: str) -> InputError:
    fix = "Write each as {prompt: ..., good: ...} or {prompt: ..., bad: ...}"
    return InputError(
        "field 'examples' must be a list of mappings", where=where, seen=value, fix=fix
    )


def _examples(data: object, where: str) -> tuple[dict[str, str], ...]:
    """Examples from plain data: each with a prompt and a good or a bad answer, all texts."""
    if not isinstance(data, Sequence) or isinstance(data, str):
        raise _no_examples(data, where)
    for i, item in enumerate(cast(Sequence[object], data), 1):
        at = f"{where} example {i}"
        if not isinstance(item, Mapping):
            raise _no_examples(item, at)
        example = cast(Mapping[str, object], item)
        for name, value in example.items():
            if name not in EXAMPLE:
                raise unknown("field", str(name), EXAMPLE, where=at)
            if not isinstance(value, str):
                raise _no_text(name, value, at)
        if "prompt" not in example or len(example) < 2:
            raise InputError(
                "an example needs 'prompt' and 'good' or 'bad'", where=at, seen=dict(example)
            )
    return tuple(dict(e) for e in cast(Sequence[dict[str, str]], data))


class Principles:
    """An ordered set of principles with a version; iterate it, or take one by id, `rules["brief"]`.

    Args:
        items: at least one, with different ids.
        version: of the set.
        title: what the set is called.
        where: the file that errors name; "" takes the title.
    Raises:
        InputError: none, two of one id, or what is no principle.
    """

    def __init__(
        self,
        items: Sequence[Principle],
        version: str = "1",
        title: str = "",
        *,
        where: str = "",
    ) -> None:
        seen: dict[str, int] = {}
        for i, item in enumerate(items, 1):
            if not isinstance(cast(object, item), Principle):
                fix = 'Write Principle("an-id", "The rule."), or read a file by Principles.read'
                at = f"{where or title} principle {i}".strip()
                raise InputError("this is no principle", where=at, seen=item, fix=fix)
            if item.id in seen:
                raise InputError(
                    f"principles {seen[item.id]} and {i} have the same id",
                    where=where or title,
                    seen=item.id,
                    fix="Give one of them another id",
                )
            seen[item.id] = i
        if not items:
            raise InputError("no principles", where=title, fix="Give at least one rule")
        self.items, self.version, self.title = tuple(items), version, title

    def __iter__(self) -> Iterator[Principle]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, id: str) -> Principle:
        for item in self.items:
            if item.id == id:
                return item
        raise unknown("principle", id, [p.id for p in self.items], where=self.title)

    def __repr__(self) -> str:
        return f"Principles({', '.join(p.id for p in self.items)})"

    @property
    def key(self) -> str:
        """Content hash of version and rules."""
        return content_hash([self.version, [p.to_json() for p in self.items]])

    def as_text(self) -> str:
        """The rules as a numbered list, most important first, for a prompt."""
        ranked = sorted(self.items, key=lambda p: -p.priority)
        return "\n".join(f"{i}. {p.text}" for i, p in enumerate(ranked, 1))

    @placing()
    def save(self, folder: str | Path) -> Path:
        """Write `principles.json` into a folder, atomically.

        Raises:
            InputError: a check is a function without a name, which no file can refer to.
        """
        names = [name for rule in self.items for name in used(rule.check)]
        refuse_bare(names, what="saved principles", where=str(folder))
        path = expanded(folder) / "principles.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = {
            "schema_version": SCHEMA_VERSION,
            "version": self.version,
            "title": self.title,
            "principles": [p.to_json() for p in self.items],
        }
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(partial, path)
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Principles:
        """Read what `save` wrote."""
        return cls.read(Path(folder) / "principles.json")

    @classmethod
    def read(cls, path: str | Path) -> Principles:
        """Read a principles file, YAML or JSON: a list of rules, or a mapping with `principles`.

        Raises:
            InputError: naming the file, the rule and the field of the first fault.
        """
        import yaml

        path = expanded(path)
        if not path.is_file():
            raise no_file("principles file", path, (".yaml", ".yml", ".json"))
        kind = "JSON" if path.suffix == ".json" else "YAML"
        try:
            text = path.read_text(encoding="utf-8")
            # JSON has characters that YAML refuses.
            data: object = json.loads(text) if kind == "JSON" else yaml.safe_load(text)
            data = mended(data)  # an escape can be half a character
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            said = " ".join(str(error).split())
            # What it says beside the problem quotes the file.
            fix = yaml_fix(str(getattr(error, "problem", error))) if kind == "YAML" else ""
            raise InputError(f"not valid {kind}: {said}", where=str(path), fix=fix) from None
        if isinstance(data, Mapping):
            head = cast(Mapping[str, object], data)
            for name in head:
                if name not in ("schema_version", "version", "title", "principles"):
                    raise unknown(
                        "field",
                        str(name),
                        ["schema_version", "version", "title", "principles"],
                        where=str(path),
                    )
            if head.get("schema_version", 1) != SCHEMA_VERSION:
                raise InputError(
                    f"schema_version {head['schema_version']} is not readable here",
                    where=str(path),
                    fix=f"This version reads {SCHEMA_VERSION}",
                )
            rules = head.get("principles")
            version = str(head.get("version", "1"))
            title = str(head.get("title", "")) or path.stem
        else:
            rules, version, title = data, "1", path.stem
        if not isinstance(rules, list) or not rules:
            raise InputError(
                "no principles in the file",
                where=str(path),
                fix="Write a list under 'principles:', each with id and text",
            )
        items = [
            Principle.from_json(r, where=f"{path} principle {i}")
            for i, r in enumerate(cast(list[object], rules), 1)
        ]
        return cls(items, version, title, where=str(path))
