"""The store: artefacts by the key of the step that made them, each whole or not there at all.

    artefacts/<k2>/<key>/artefact.json   noun, method, settings, inputs, versions, content key
                        /metrics.jsonl   what the step observed, one JSON object a line
                        /data/           what the noun saved
                        /beside/<name>/  the same of a by-product, such as a critic: KEY/NAME
    scratch/<key>/                       journals and checkpoints of a step that has not ended
    locks/<key>.lock                     held while the step runs
    roots/, recent/                      what is to be kept: `truing.roots`

An artefact is written beside its place, flushed to the disk and renamed. It is never changed.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import cast

from truing import jsontext
from truing.context import Json
from truing.core import files
from truing.core.identity import hashes
from truing.errors import Damaged, InputError, OtherVersion, Unread, unknown
from truing.faults import free_file, free_folder, make_folder, unreadable
from truing.models import Model
from truing.principles import Principles
from truing.reports import Report, rows_of
from truing.roots import KEEP_DAYS, Roots
from truing.tables import Table, names_file

SCHEMA_VERSION = 1
ANEW = "The step that made it makes it again"
Noun = Model | Table | Principles | Report
NOUNS: dict[str, type[Model] | type[Table] | type[Principles] | type[Report]] = {
    c.__name__: c for c in (Model, Table, Principles, Report)
}

# The file that tells a folder as a saved noun.
MARKS = {
    "Model": "model.json",
    "Table": "table.parquet",
    "Principles": "principles.json",
    "Report": "report.json",
}


def load_noun(name: str, folder: Path) -> Noun:
    """The noun that `save` wrote into `folder`."""
    if name not in NOUNS:
        fix = "Upgrade truing: another version wrote it"
        raise OtherVersion("unknown sort of artefact", where=str(folder), seen=name, fix=fix)
    return NOUNS[name].load(folder)


def _saved(noun: Noun, folder: Path) -> str:
    """Save a noun; the key that it is compared by later."""
    noun.save(folder)
    # Files may hold less than memory, such as a number's width: what can be read back counts.
    return noun.key if isinstance(noun, Model) else load_noun(type(noun).__name__, folder).key


class Store:
    """Artefacts under one folder; by default `$TRUING_HOME/store`."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or files.home() / "store"
        self.roots = Roots(self.root)

    def _place(self, key: str) -> Path:
        return self.root / "artefacts" / key[:2] / key

    def has(self, key: str) -> bool:
        """True when the artefact is there."""
        return (self._place(key) / "artefact.json").is_file()

    def facts(self, key: str) -> dict[str, Json]:
        """What is known of an artefact: see the module's docstring."""
        path = self._place(key) / "artefact.json"
        try:
            data = cast("dict[str, Json]", json.loads(path.read_text(encoding="utf-8")))
            if not {"noun", "content", "schema_version"} <= set(data):
                raise ValueError("artefact.json lacks what every artefact has")
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise unreadable(error, "no readable artefact", f"store key {key}", ANEW) from error
        if data.get("schema_version") != SCHEMA_VERSION:
            raise OtherVersion(
                "artefact of another schema",
                where=str(path),
                seen=data.get("schema_version"),
                fix=f"This version reads {SCHEMA_VERSION}; run the step again",
            )
        return data

    def metrics(self, key: str) -> list[dict[str, Json]]:
        """What the step observed, in order."""
        path = self._place(key) / "metrics.jsonl"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        return cast("list[dict[str, Json]]", jsontext.read_lines(text))

    def load(self, key: str) -> Noun:
        """The artefact itself, or of "KEY/NAME" what lies beside it by that name.

        Raises:
            Damaged: it is not what was put there.
        """
        folder, facts = self._part(key)
        found = self._read(key, folder, facts)
        if found.key != facts["content"]:
            raise Damaged(
                "the artefact is not the one that was stored",
                where=f"store key {key}",
                seen=f"content {found.key}, stored as {facts['content']}",
                fix=ANEW,
            )
        return found

    def beside(self, key: str) -> dict[str, Noun]:
        """By-products of the step, which lie beside the artefact, by name."""
        names = cast("dict[str, Json]", self.facts(key).get("beside") or {})
        return {name: self.load(f"{key}/{name}") for name in names}

    def _part(self, key: str) -> tuple[Path, Mapping[str, Json]]:
        """Folder and facts of the artefact, or of what lies beside it."""
        key, _, name = key.partition("/")
        place, facts = self._place(key), self.facts(key)
        if not name:
            return place / "data", facts
        beside = cast("dict[str, dict[str, Json]]", facts.get("beside") or {})
        if name not in beside:
            raise unknown("by-product", name, beside, where=f"store key {key}")
        return place / "beside" / name, beside[name]

    def _read(self, key: str, folder: Path, facts: Mapping[str, Json]) -> Noun:
        """The artefact as it lies there, with what it holds; its own content is not compared."""
        from truing.core.opening import check_held

        try:
            found = load_noun(str(facts["noun"]), folder)
            if isinstance(found, Model):
                check_held(folder)
            return found
        except (Damaged, Unread, OtherVersion):
            raise
        # Damaged files fail in as many ways as there are formats.
        except (InputError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise unreadable(error, "cannot be read", f"store key {key}", ANEW) from error

    def lock(self, key: str, *, wait: bool = True, said: str = "") -> AbstractContextManager[bool]:
        """Held while a step runs: another process that wants the same step waits for it.

        Args:
            said: to who waits.
        """
        make_folder(self.root / "locks", f"TRUING_HOME {files.home()}")
        return files.lock(self.root / "locks" / f"{key}.lock", wait=wait, said=said)

    def scratch(self, key: str) -> Path:
        """Folder of a running step; it outlives a kill and is gone when the step has ended."""
        return self.root / "scratch" / key

    def put(
        self,
        key: str,
        noun: Noun,
        facts: Mapping[str, Json],
        metrics: Iterable[Mapping[str, Json]] = (),
        *,
        beside: Mapping[str, Noun] | None = None,
    ) -> Noun:
        """Keep an artefact under `key`, drop its scratch, and give it back as the store has it.

        Args:
            beside: by-products of the step, by name.
        """
        for left in self._place(key).parent.glob(f".{key}.*"):  # of a process that was killed here
            shutil.rmtree(left, ignore_errors=True)
        with files.new_folder(self._place(key)) as partial:
            data: dict[str, Json] = {
                "schema_version": SCHEMA_VERSION,
                "key": key,
                "noun": type(noun).__name__,
                "content": _saved(noun, partial / "data"),
                **facts,
            }
            if isinstance(noun, Model) and noun.quarantine:
                data["quarantine"] = noun.quarantine
            if beside:
                data["beside"] = {
                    n: {"noun": type(b).__name__, "content": _saved(b, partial / "beside" / n)}
                    for n, b in beside.items()
                }
            lines = [jsontext.dumps(m) + "\n" for m in metrics]
            (partial / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
            text = jsontext.dumps(dict(sorted(data.items())), indent=1)
            (partial / "artefact.json").write_text(text + "\n", encoding="utf-8")
        made = self._read(key, *self._part(key))
        shutil.rmtree(self.scratch(key), ignore_errors=True)
        return made

    def keys(self) -> list[str]:
        """Keys of all artefacts; what a killed process left half-made beside them is none."""
        found = (self.root / "artefacts").glob("??/*/artefact.json")
        return sorted(p.parent.name for p in found if not p.parent.name.startswith("."))

    def ls(self) -> list[dict[str, Json]]:
        """Every artefact: key, noun, method, size in bytes, whether a run refers to it."""
        used = self.roots.referred()
        listed: list[dict[str, Json]] = []
        for key in self.keys():
            try:
                facts = self.facts(key)
            except InputError as error:
                listed.append({"key": key, "used": key in used, "fault": str(error)})
                continue
            size = sum(p.stat().st_size for p in self._place(key).rglob("*") if p.is_file())
            row: dict[str, Json] = {"key": key, "bytes": size, "used": key in used}
            row |= {n: facts.get(n) for n in ("noun", "method", "made")}
            listed.append(row | {n: v for n in ("quarantine", "beside") if (v := facts.get(n))})
        return listed

    def quarantined(self) -> list[dict[str, Json]]:
        """Models here that an attack made, as `truing models` lists models; named by their keys."""
        found: list[dict[str, Json]] = []
        for key in self.keys():
            with contextlib.suppress(InputError):
                if mark := self.facts(key).get("quarantine"):
                    row: dict[str, Json] = {"name": key[:12], "licence": "", "present": True}
                    row["about"] = f"in the store, quarantined: {mark}"
                    row["where"] = str(self._place(key) / "data")
                    found.append(row | {"quarantine": mark})
        return found

    def verify(self) -> list[dict[str, Json]]:
        """Read every artefact and compare it with its content key; one row for each damaged one.

        Damaged ones are deleted, so that the steps that made them run again when asked for. What
        another version wrote is left as it is.
        Raises:
            Unread: something cannot be read now, and nothing else is damaged; it is left, too.
        """
        damaged: list[dict[str, Json]] = []
        unread: Unread | None = None
        with hashes.reading_all():
            for key in self.keys():
                with self.lock(key, wait=False) as free:
                    if not free or not self.has(key):  # at work, or collected since
                        continue
                    fault = self._fault(key)
                    if isinstance(fault, Unread):
                        unread = fault
                    elif fault is not None:
                        damaged.append({"key": key, "fault": str(fault)})
                        self.discard(key)
        if unread is not None and not damaged:
            raise unread
        return damaged

    def _fault(self, key: str) -> InputError | None:
        """What is wrong with an artefact: Damaged or Unread, or None."""
        try:
            self.load(key)
            self.beside(key)
            self.metrics(key)
        except OtherVersion:
            return None
        except (Damaged, Unread) as error:
            return error
        except (OSError, ValueError) as error:
            return unreadable(error, "metrics cannot be read", f"store key {key}", ANEW)
        return None

    def gc(self, days: float = KEEP_DAYS) -> list[dict[str, Json]]:
        """Delete what no run and no recent command refers to, and scratch of steps that ended.

        Args:
            days: how long results of single commands are kept, and the scratch of stopped steps
                that no run refers to. What a run goes on from stays as long as its folder.
        """
        from truing.core.modelfiles.bases import sweep

        if not days >= 0:
            raise InputError("must be a number of days", where="store gc --days", seen=days)
        self.roots.referred(drop=True, days=days)
        gone: list[dict[str, Json]] = []
        for key in self.keys():
            with self.lock(key):
                # Asked anew under the lock: a run may have taken it up since.
                if self.roots.in_use(key, days) or not self.has(key):
                    continue
                self.discard(key)
            gone.append({"key": key, "deleted": "artefact"})
        for scratch in sorted((self.root / "scratch").glob("*")):
            key = scratch.name
            with self.lock(key, wait=False) as free:  # else its step runs
                old = free and not self.roots.in_use(key, days) and files.age(scratch) >= days
                if old or (free and self.has(key)):
                    shutil.rmtree(scratch, ignore_errors=True)
                    gone.append({"key": key, "deleted": "scratch"})
        # What a kill left half-made or half-deleted: nobody but the key's holder works on it.
        for left in sorted((self.root / "artefacts").glob("??/.*")):
            key = left.name[1:].partition(".")[0]
            with self.lock(key, wait=False) as free:
                if free and left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                    gone.append({"key": key, "deleted": "remains"})
        return gone + [{"key": k, "deleted": "base"} for k in sweep()]

    def discard(self, key: str) -> None:
        """Delete an artefact; it is out of sight in one rename, whatever happens afterwards."""
        place = self._place(key)
        gone = place.with_name(f".{key}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        files.put_aside(place, gone, "artefact.json")
        shutil.rmtree(gone, ignore_errors=True)

    def find(self, start: str) -> str:
        """The key that begins with `start`; an InputError when none or several do.

        What lies beside an artefact has its name behind it, as in "KEY/critic".
        """
        head, _, name = start.partition("/")
        found = [k for k in self.keys() if k.startswith(head)] if head else []
        if len(found) != 1:
            raise InputError(
                f"{len(found)} artefacts have a key that begins so",
                where="store",
                seen=start,
                fix="`truing store ls` lists the keys",
            )
        if not name:
            return found[0]
        self._part(f"{found[0]}/{name}")
        return f"{found[0]}/{name}"

    def export(
        self, key: str, to: str, *, quarantined: bool = False, adapter: bool = False
    ) -> dict[str, Json]:
        """Write an artefact outside the store: a model as a plain Hugging Face folder where it can.

        Args:
            key: or its beginning, or a step of a run: its folder, a slash and the step's name. Of
                what lies beside either, such as a critic, a slash and its name follow.
            to: a new or empty folder, or an earlier export, which is replaced; for a table, or
                a report's samples, also a new file that ends in .jsonl, .csv or .parquet.
            quarantined: a model in quarantine, too.
            adapter: of a model its adapters alone, as one in PEFT's format.
        """
        from truing import quarantine
        from truing.core.modelfiles.written_folders import EXPORTED
        from truing.runs import key_of_step

        where = "truing store export KEY FOLDER"
        if not to:
            raise InputError("say where to", where=where, seen=key, fix="Name a new folder")
        full = self.find(key_of_step(key) or key)
        noun = self.load(full)
        if isinstance(noun, Model):
            quarantine.refuse(noun, "exported", asked=quarantined, fix="say --quarantined")
        elif adapter:
            said = f"a {type(noun).__name__} has no adapter"
            raise InputError(said, where=where, seen=key, fix="Leave out --adapter")
        line: dict[str, Json] = {"key": full, "noun": type(noun).__name__}
        if names_file(to):
            file = free_file(to, type(noun).__name__, where)
            rows = rows_of(cast("Table | Report", noun))
            return line | {"file": str(rows.write(file, new=True))}
        marks = [MARKS[type(noun).__name__], *([EXPORTED] if isinstance(noun, Model) else [])]
        folder, line["folder"] = free_folder(to, marks, where), str(Path(to))
        if adapter:
            cast(Model, noun).export_adapter(folder, quarantined=quarantined)
            return line
        if isinstance(noun, Model) and not noun.run_time_changes and not noun.is_served:
            from truing.core.modelfiles import classifier

            if not classifier.why_not(noun):
                noun.export(folder, quarantined=quarantined)
                return line
            if classifier.of_training(noun) and "/" not in full:
                noun.export(folder, weights_only=True, quarantined=quarantined)
                return line | {"left_out": "the critic, which only training goes on from"}
        noun.save(folder)
        return line
