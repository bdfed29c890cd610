"""Finding, saving, loading and exporting models: the file side of `truing.models`."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

from truing import changes as change_files
from truing.changes import Decoder, Rewriter
from truing.core import files, private
from truing.core.endpoints import limits
from truing.core.modelfiles import choices
from truing.core.modelfiles.bases import Folder, Served, check_unchanged, kept
from truing.core.modelfiles.licences import strictest
from truing.core.modelfiles.panel import Panel, Rule
from truing.core.modelfiles.weight_files import check_weights
from truing.core.modelfiles.written_folders import (
    CARD,
    EXPORTED,
    MODEL_CARD,
    exported_mark,
    must_be_free,
    text_hash,
)
from truing.errors import InputError, no_file, stems, unknown
from truing.models import (
    SCHEMA_VERSION,
    Model,
    held,
    held_by,
    hold,
    hold_at,
    read_held,
)

HUB_NAME = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")  # and a revision of it
_KEY = re.compile(r"[0-9a-f]{32}")  # of what a change holds, and its folder's name
AGAIN = "Fetch or save the model again"
CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"  # of PEFT


def open_model(source: str, *, anew: bool = False) -> Model:
    """See `Model.open`.

    Args:
        anew: an address without limits takes back those said of its model before.
    """
    from truing.core.modelfiles import fetch

    source, said = choices.named(source)
    if said:
        return choices.taken(open_model(source, anew=anew), said)
    if source.startswith(("http://", "https://")):
        return _served(source, anew)
    folder = files.expanded(source)
    if folder.is_dir():
        return _local(folder)
    choices.check_said(source)
    if source in fetch.names():
        found = fetch.fetch(source)
        name = fetch.canonical(source)
        return Model(Folder(found, fetch.licence(name)), name=name)
    deep = source.partition("@")[0].count("/") > 1  # a revision may have slashes
    if folder.is_absolute() or source.startswith((".", "~")) or deep or folder.is_file():
        raise no_file("folder", folder, folders=True)
    if HUB_NAME.match(source):
        return _local(fetch.from_hub(source)).called(source)
    error = unknown("model", source, fetch.names(), where="model", near=stems(folders=True))
    error.fix = f"Give a folder, owner/name on the hub, or a name of `truing models`. {error.fix}"
    raise error


def _served(source: str, anew: bool) -> Model:
    url, _, name = source.partition("#")
    if not name:
        raise InputError(
            "the address does not say which model",
            where=private.without_login(source),
            fix="Write http://host:port/v1#model-name",
        )
    name, room = limits.with_room(name)
    name = limits.keep(url, name, anew=anew)
    return Model(Served(url.rstrip("/"), name, reasoning_tokens=room), name=name)


def stated_licence(folder: Path) -> str:
    """The licence in the front matter of a model card, or ""."""
    card = folder / "README.md"
    if not card.is_file():
        return ""
    head = card.read_text(encoding="utf-8", errors="replace")[:4000]
    found = re.search(r"^license:\s*(\S+)", head, re.M) if head.startswith("---") else None
    return found[1].strip("\"'") if found else ""


def _local(folder: Path) -> Model:
    if (folder / CARD).is_file():
        return load(folder)
    base = Folder(folder, stated_licence(folder))
    weights = [n for n in base.names() if n.endswith(".safetensors") and n != ADAPTER]
    if (folder / CONFIG).is_file():
        if not weights or "config.json" not in base.names():
            from truing.core.modelfiles import adapters

            return adapters.opened(folder)
        if (folder / ADAPTER).is_file():
            raise InputError(
                "holds an adapter and a whole model, of which one may have the other in it",
                where=str(folder),
                seen=[CONFIG, weights[0]],
                fix=f"Move {CONFIG} and {ADAPTER} into a folder of their own, and name one of them",
            )
    if not {"config.json", "builder.json"} & set(base.names()):
        raise InputError(
            "not a model's folder: neither config.json nor model.json is in it",
            where=str(folder),
            seen=sorted(p.name for p in folder.iterdir())[:6],
            fix="Give the folder in which config.json lies beside the weights",
        )
    check_weights(folder)
    _check_numbers(base)
    return Model(base, name=folder.resolve().name, quarantine=exported_mark(folder))


def _check_numbers(base: Folder) -> None:
    """Raise an InputError for quantised weights, whose packed numbers are none to compute with."""
    inner = base.config.get("text_config")
    configs = [base.config, cast("dict[str, object]", inner if isinstance(inner, dict) else {})]
    found = next((q for c in configs if (q := c.get("quantization_config"))), None)
    if found is not None:
        named = cast("dict[str, object]", found if isinstance(found, dict) else {})
        raise InputError(
            "the weights are quantised",
            where=str(base.path / "config.json"),
            seen=named.get("quant_method", found),
            fix="Give the model in bfloat16 or float32, with ?bits=4 behind its name to pack it; "
            "an adapter opens on that once its base_model_name_or_path names it",
        )


def save(model: Model, folder: Path) -> Path:
    """See `Model.save`."""
    must_be_free(folder, CARD)
    data: dict[str, object] = {
        "schema_version": SCHEMA_VERSION,
        "name": model.name,
        "key": model.key,
        "licences": list(model.licences),
        "licence": model.licence,
        "quarantine": model.quarantine,
    }
    own = files.is_managed(folder)  # elsewhere files may be edited in place, links with them
    with files.new_folder(folder) as partial:
        if isinstance(model.base, Served):
            served: dict[str, object] = {"url": model.base.url, "model": model.base.model}
            if model.base.reasoning_tokens:
                served["reasoning_tokens"] = model.base.reasoning_tokens
            data["served"] = served
        elif isinstance(model.base, Folder):
            from_cache = kept(model.base) if own else contextlib.nullcontext(model.base.parts())
            with from_cache as parts:
                for name, path in parts.items():
                    files.place(path, partial / "base" / name, link=own)
            if not own:
                check_unchanged(model.base)
            told = {} if model.base.thinking is None else {"thinking": model.base.thinking}
            told |= {"bits": model.base.bits} if model.base.bits else {}
            data["base"] = {"key": model.base.key, "licence": model.base.licence, **told}
        else:
            judges = {name: hold(judge) for name, judge in model.base.judges.items()}
            data["panel"] = {"rule": model.base.rule, "judges": judges}
        data["changes"] = [
            change_files.save(c, partial, f"changes/{i}-{c.kind}", link=own and _of_cache(c))
            for i, c in enumerate(model.changes)
        ]
        data["held"], other = _save_held(model, partial)
        if other:
            data["held_as"] = other
        (partial / CARD).write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
    return folder


def _of_cache(change: change_files.Change) -> bool:
    path = getattr(change, "path", None)
    return isinstance(path, Path) and files.is_managed(path)


def _save_held(model: Model, folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Nouns of what it holds, by key; and the keys that files give those that differ."""
    nouns: dict[str, str] = {}
    other: dict[str, str] = {}
    changes = [c for c in model.changes if isinstance(c, (Rewriter, Decoder))]
    keys = [key for change in changes for key in held_by(change)]
    if isinstance(model.base, Panel):
        keys += [judge.key for judge in model.base.judges.values()]
    for key in dict.fromkeys(keys):
        _check_key(key, str(folder / CARD))
        artefact = held(key)
        artefact.save(folder / "held" / key)
        nouns[key] = type(artefact).__name__
        if not isinstance(artefact, Model):
            # Files may hold less than memory, such as a number's width.
            read = type(artefact).load(folder / "held" / key).key
            other |= {key: read} if read != key else {}
    return nouns, other


def _check_key(key: str, where: str) -> None:
    """Raise unless a key is one: as a path it could lead out of the model's folder."""
    if not _KEY.fullmatch(key):
        text = "what a change holds is named by its key, of 32 hex digits"
        raise InputError(text, where=where, seen=key)


def _held_of(data: dict[str, object], folder: Path) -> list[tuple[str, str, Path, str]]:
    """What a saved model holds: key, noun, folder and the key that its files give, "" if alike."""
    nouns = cast("dict[str, str]", data.get("held") or {})
    other = cast("dict[str, str]", data.get("held_as") or {})
    for key in nouns:
        _check_key(key, str(folder / CARD))
    return [(k, noun, folder / "held" / k, other.get(k, "")) for k, noun in nouns.items()]


def check_held(folder: Path) -> None:
    """Raise an InputError when something that a saved model holds is not what was saved."""
    for key, noun, place, content in _held_of(read_card(folder), folder):
        read_held(key, noun, place, content)
        if noun == "Model":
            check_held(place)


def read_card(folder: Path) -> dict[str, object]:
    """model.json of a saved model, its version checked."""
    path = folder / CARD
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        fix = AGAIN if path.exists() else "Give a folder without that file to Model.open"
        raise InputError(f"not a saved model: {error}", where=str(path), fix=fix) from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(
            f"written with schema version {version!r}; this version reads {SCHEMA_VERSION}",
            where=str(path),
            fix="Save it again with the version of truing that wrote it, or upgrade",
        )
    return cast("dict[str, object]", data)


def load(folder: Path) -> Model:
    """See `Model.load`."""
    data = read_card(folder)
    try:
        return _of_card(data, folder)
    except (LookupError, TypeError, AttributeError) as error:
        told = f"the card of the model is damaged: {error!r}"
        raise InputError(told, where=str(folder / CARD), fix=AGAIN) from None


def _of_card(data: dict[str, object], folder: Path) -> Model:
    for one in _held_of(data, folder):
        hold_at(*one)
    base: Folder | Served | Panel
    if "served" in data:
        served = cast("dict[str, str]", data["served"])
        room = int(served.get("reasoning_tokens", 0))
        base = Served(served["url"], served["model"], reasoning_tokens=room)
    elif "panel" in data:
        panel = cast("dict[str, dict[str, str]]", data["panel"])
        judges = {name: cast(Model, held(key)) for name, key in panel["judges"].items()}
        base = Panel(judges, cast(Rule, panel["rule"]))
    else:
        facts = cast("dict[str, str]", data["base"])
        thinking = cast("bool | None", facts.get("thinking"))
        bits = int(facts.get("bits", 0))
        base = Folder(folder / "base", facts.get("licence", ""), thinking, bits=bits)
        if base.key != facts["key"]:
            told = "the files of the base are not those that were saved"
            seen = f"key {base.key}, saved as {facts['key']}"
            raise InputError(told, where=str(folder / "base"), seen=seen, fix=AGAIN)
    laid = [change_files.load(c, folder) for c in cast("list[dict[str, object]]", data["changes"])]
    licences = tuple(cast("list[str]", data.get("licences") or []))
    mark = str(data.get("quarantine") or "")
    return Model(base, tuple(laid), str(data["name"]), licences, mark)


def card_text(model: Model) -> str:
    """README.md of an exported model: licence and what it was made of."""
    lines = [
        "---",
        f"license: {model.licence}",
        "---",
        f"# {model.name}",
        "",
        "Exported by truing. Weight changes folded in, in this order:",
        "",
        *(f"- {c.kind} {c.key}" for c in model.weight_changes),
        "",
        f"Key of the weights: {model.weights_key}",
        "Licences of the lineage: " + _licences(model),
    ]
    if model.quarantine:
        lines += ["", f"Quarantined: {model.quarantine} made it, as a test. Do not put it to use."]
    return "\n".join(lines) + "\n"


def _licences(model: Model) -> str:
    given: Iterable[str] = (model.base.licence or "unknown", *model.licences)
    return ", ".join(dict.fromkeys(given)) + f" (strictest: {strictest(given)})"


def export(model: Model, folder: Path, *, weights_only: bool) -> Path:
    """See `Model.export`."""
    from truing.core.modelfiles import classifier
    from truing.core.weights import untie, write

    parts = {n: p for n, p in model.local.parts().items() if ".safetensors" not in n}
    fix = "Save the model instead, or give weights_only=True"
    if model.run_time_changes and not weights_only:
        raise InputError(
            "a plain folder cannot express run-time changes",
            where=model.name,
            seen=[c.kind for c in model.run_time_changes],
            fix=fix,
        )
    fault = "" if weights_only else classifier.why_not(model)
    if fault:
        raise InputError(
            "a plain folder cannot keep the model's head", where=model.name, seen=fault, fix=fix
        )
    must_be_free(folder, EXPORTED)
    with files.new_folder(folder) as partial:
        lay_out(model, partial, parts)
        folded = model.folded()
        card = card_text(model)
        if folded.extra and not weights_only:
            card += classifier.note(folded.extra)
            classifier.describe(model, partial)
            write(partial, classifier.tensors(folded, folded.extra))
        else:
            write(partial, ((n, folded[n]) for n in folded))
            if folded.untied:
                untie(partial)
        sign(model, partial, card)
    return folder


def lay_out(model: Model, folder: Path, parts: Mapping[str, Path]) -> None:
    """Put files of a model's base into `folder`; its template says there what it was told."""
    from truing.core.modelfiles.loaded import load_tokenizer

    for name, path in parts.items():
        files.place(path, folder / name, link=False)
    if model.local.thinking is not None and (told := load_tokenizer(model).chat_template):
        (folder / "chat_template.jinja").write_bytes(str(told).encode())


def sign(model: Model, folder: Path, card: str) -> None:
    """Write an export's model card, and the mark that tells it from folders of others."""
    written = card.encode()
    (folder / MODEL_CARD).write_bytes(written)
    facts = {"schema_version": SCHEMA_VERSION, "key": model.weights_key}
    facts |= {"card": text_hash(written), "quarantine": model.quarantine}
    (folder / EXPORTED).write_text(json.dumps(facts) + "\n")


def create(
    folder: Path,
    builder: dict[str, object],
    tensors: Iterable[tuple[str, object]],
    *,
    name: str,
    licence: str = "apache-2.0",
) -> Model:
    """A base of an architecture outside transformers: builder.json and its weights.

    Args:
        folder: made, or replaced as a whole.
        builder: reference to a registered component of kind "builder", `{use: name, ...}`, that
            returns a module.
        tensors: its state dict.
        name: of the model.
        licence: of the builder and of weights given with it.
    """
    import torch

    from truing.core.weights import write

    must_be_free(folder, "builder.json")
    with files.new_folder(folder) as partial:
        text = json.dumps({"schema_version": SCHEMA_VERSION, "builder": builder}, indent=1)
        (partial / "builder.json").write_text(text + "\n")
        write(partial, ((n, t) for n, t in tensors if isinstance(t, torch.Tensor)))
    return Model(Folder(folder, licence), name=name)
