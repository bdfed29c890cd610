"""Pages that follow from the code: one for each method, the tables, the pure functions, the claims.

Everything comes from docstrings and signatures, so that a page cannot say other than the code.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import cast

from claim_pages import claims_page
from pagetext import NOTE, command_name, escape, prose, table

from truing import catalogue, listing
from truing.catalogue import VERBS, Entry
from truing.core import mix
from truing.core.objective import MIX, Mix
from truing.core.online_training import OnlineTraining
from truing.core.training import TextTraining
from truing.method import Method, methods
from truing.signature import Input, Setting, argument_docs, type_name

VERB_TYPES = {
    "specify": "text or examples to Principles",
    "synthesize": "Principles or Table, and models, to Table",
    "select": "Table to Table",
    "train": "Model and Table to Model",
    "merge": "Models to Model",
    "steer": "Model and contrast Table to Model with edits of activations",
    "decode": "Model and rewards or rules to Model with controlled output",
    "evaluate": "Models and Table of prompts or tasks to Report",
    "attack": "Model or Table to the same, damaged, with a record of what was done",
    "recover": "damaged Model and trusted Model to Model",
    "serve": "Model to a running server",
}
ROW_FILES = {"pair": "pairs", "example": "examples", "unpaired": "rated", "group": "groups"}
# Optional inputs without which an example would have nothing to tell answers apart by. Principles
# stand for any reward wherever a method takes them.
ALSO = {
    "decode/prm_guided": ("process_models",),
    "train/salmon_ppo": ("principles", "reward_model"),
}
# What the engine adds to the settings of a training method, by the sort of its function.
SHARED = {"objective": TextTraining, "online": OnlineTraining}
# What a pure function does not take: these read files, hold weights or know of a run.
IMPURE = re.compile(r"\b(Model|Loaded|Module|Path|PreTrained\w*|Context|Journal|Principles)\b")


# One method


def _kind(setting: Setting) -> str:
    return f"`{type_name(setting.type)}`"


def _settings(settings: Iterable[Setting]) -> str:
    rows = [
        [
            f"`{s.name}`",
            _kind(s),
            "**required**" if s.required else f"`{s.default!r}`",
            escape(s.doc),
        ]
        for s in settings
    ]
    return table(("setting", "type", "default", "meaning"), rows)


def _example_inputs(method: Method) -> list[Input]:
    """The inputs of an example: those that are required, and what the method cannot do without."""
    also = ALSO.get(method.id, ("principles",))
    return [i for i in method.inputs.values() if not i.optional or i.name in also]


def _source(method: Method, given: Input) -> str:
    noun = given.noun.split("|")[0]
    if noun == "Table":
        return f"{ROW_FILES.get(method.entry.rows, given.name)}.jsonl"
    if noun == "Model" and given.optional:
        return f"{given.name}/"
    names = {"Model": "smollm2-135m-instruct", "Principles": "recipes/principles.yaml"}
    return names.get(noun, f"{given.name}/")


def _command(method: Method) -> str:
    words = [f"truing {method.verb} {command_name(method.name)}"]
    for i in _example_inputs(method):
        flag, source = f"--{command_name(i.name)}", _source(method, i)
        roles = [""] if not i.many else ["a="] if i.optional else ["a=", "b="]
        words.append(" ".join(f"{flag} {role}{source}" for role in roles))
    words += [
        f"--{command_name(s.name)} {s.name.upper()}" for s in method.settings.values() if s.required
    ]
    line = " ".join(words)
    return line if len(line) < 96 else " \\\n  ".join(words)


def _python(method: Method) -> str:
    given = [f"{i.name}={i.name}" if i.optional else i.name for i in _example_inputs(method)]
    given += [f"{s.name}=..." for s in method.settings.values() if s.required]
    made = method.returns.lower() if method.verb != "serve" else "server"
    call = f'{made} = truing.methods["{method.id}"]({", ".join(given)})'
    if len(call) <= 100:
        return call
    return f'{made} = truing.methods["{method.id}"](\n    {", ".join(given)}\n)'


def _step(method: Method) -> str:
    given = [f"do: {method.id}"]
    for i in _example_inputs(method):
        roles = "{a: ...}" if i.optional else "{a: ..., b: ...}"
        given.append(f"{i.name}: {roles if i.many else '...'}")
    given += [f"{s.name}: ..." for s in method.settings.values() if s.required]
    return f"{method.name}: {{{', '.join(given)}}}"


def _facts(method: Method) -> str:
    entry = method.entry
    facts = [f"Returns a **{method.returns}**"] if method.verb != "serve" else ["Ends a graph"]
    if entry.rows:
        facts.append(f"trains on rows of kind `{entry.rows}`")
    if entry.unit:
        facts.append(f"one value of the loss for each {entry.unit}")
    if entry.kind == "objective":
        facts.append("measures " + ", ".join(f"`{n}`" for n in entry.needs))
    elif method.needs:
        facts.append("needs models that can " + ", ".join(f"`{n}`" for n in method.needs))
    if entry.field != "text":
        facts.append(f"for the field `{entry.field}`")
    if entry.paper:
        facts.append(f"claim `{entry.paper}`")
    return "; ".join(facts) + "."


def method_page(method: Method) -> str:
    """The page of one method."""
    shared = shared_settings(method)
    own = [s for s in method.settings.values() if s.name not in shared]
    inputs = [
        [
            f"`{i.name}`",
            i.noun.replace("|", " or ") + (", several by role" if i.many else ""),
            "optional" if i.optional else "required",
        ]
        for i in method.inputs.values()
    ]
    parts = [
        NOTE + f"# {method.id}\n",
        escape(method.summary) + "\n",
        _facts(method) + "\n",
        "## Use\n",
        f"```sh\n{_command(method)}\n```\n",
        f"```python\n{_python(method)}\n```\n",
        f"```yaml\n{_step(method)}\n```\n",
    ]
    if inputs:
        parts += ["## Inputs\n", table(("input", "noun", ""), inputs)]
    parts.append("## Settings\n")
    if own:
        parts.append(_settings(own))
    if shared:
        parts.append("Also the [settings that all training shares](README.md).\n")
    elif not own:
        parts.append("None.\n")
    parts += ["## How it works\n", prose(method.doc) + "\n"]
    pure = [line for line in functions_of(method) if line]
    if pure:
        parts += ["## Pure functions\n", "".join(pure)]
    source = method.entry.module.replace(".", "/")
    parts.append(f"Source: [`{source}.py`](../../../src/{source}.py)\n")
    return "\n".join(parts)


def shared_settings(method: Method) -> dict[str, Setting]:
    """Settings that the engine adds, with its own defaults; one with another is the method's."""
    if method.entry.kind not in SHARED:
        return {}
    defaults = {f.name: f.default for f in fields(SHARED[method.entry.kind])}
    if method.entry.kind == "objective":
        defaults["mix"] = None
    return {n: s for n, s in method.settings.items() if n in defaults and s.default == defaults[n]}


def _shared_table(kind: str, told: Iterable[str] = ()) -> str:
    shared = SHARED[kind]
    said, types = argument_docs(shared.__doc__ or ""), typing.get_type_hints(shared)
    return _settings(
        Setting(f.name, types[f.name], f.default, said.get(f.name, ""))
        for f in fields(shared)
        if f.name not in told
    )


def training_page() -> str:
    """What docs/methods/train says before its methods: the shared settings."""
    given = [f.name for f in fields(TextTraining)]
    return (
        NOTE
        + "# Settings that all training shares\n\n"
        + "Every training method takes these besides its own. What they decide is the engine's:\n"
        + "an objective never sees them.\n\n"
        + _shared_table("objective")
        + "\n## Several losses in one step\n\n"
        + "Methods that train on given rows take one more, losses that are added by weights:\n\n"
        + _settings([Setting("mix", Mix | None, None, MIX)])
        + "\n"
        + prose(inspect.getdoc(mix) or "")
        + "\n\n## On the model's own answers\n\n"
        + "Methods that draw answers while they train (group `rl`) take these as well; `batch`\n"
        + "counts prompts, the rate stays constant, and `steps` counts rollouts.\n\n"
        + _shared_table("online", given)
    )


# Pure functions


def _is_pure(function: object) -> bool:
    signature = inspect.signature(cast("type", function))
    said = " ".join(str(p.annotation) for p in signature.parameters.values())
    return bool(signature.parameters) and not IMPURE.search(said)


def _reference(method: Method) -> str:
    unique = [e for e in catalogue.methods().values() if e.name == method.name]
    return f'truing.methods["{method.name if len(unique) == 1 else method.id}"]'


def _function_line(reference: str, name: str, function: object) -> str:
    signature = str(inspect.signature(cast("type", function))).replace("'", "")
    first = (inspect.getdoc(function) or "").split("\n\n", 1)[0]
    return f"- `{reference}.{name}{signature}`<br>{escape(' '.join(first.split()))}\n"


def functions_of(method: Method) -> list[str]:
    """One line for each pure function that `truing.methods[...]` reaches through this method."""
    reference = _reference(method)
    lines: list[str] = []
    if method.entry.kind in SHARED:
        lines.append(_function_line(reference, "loss", method.declared))
    registered = {e.module for e in catalogue.entries()} - {method.entry.module}
    for name, function in inspect.getmembers(method.module, inspect.isfunction):
        home = function.__module__
        # Its own functions, and those of helper modules beside it that hold no method themselves.
        near = home == method.entry.module or (
            home.startswith(f"truing.{method.verb}.") and home not in registered
        )
        if name[0] != "_" and near and not hasattr(function, "__truing__") and _is_pure(function):
            lines.append(_function_line(reference, name, function))
    return lines


def functions_page() -> str:
    """docs/functions.md."""
    parts = [
        NOTE + "# Pure functions\n",
        "The mathematics of every method is a function on tensors or rows: no files, no devices, "
        "no seeds.\nAll are reached by the method's name, from Python:\n",
        "```python\nimport truing\n\n"
        'truing.methods["dpo"].loss  # the objective itself\n'
        'truing.methods["dpo"].difference  # what it is made of\n```\n',
        "Tensor names end in their shape; the legend is in the method's page.\n",
    ]
    for verb in VERBS:
        seen: set[str] = set()
        for method in of_verb(verb):
            lines = [line for line in functions_of(method) if line.split(".", 1)[1] not in seen]
            seen |= {line.split(".", 1)[1] for line in lines}
            if lines:
                title = f"[{method.id}](methods/{method.id}.md)"
                parts.append(f"## {title}\n\n" + "".join(lines))
    return "\n".join(parts)


# Tables


def of_verb(verb: str) -> list[Method]:
    """Truing's own methods of a verb, by group and name."""
    found = [e for e in catalogue.methods().values() if e.verb == verb and e.package == "truing"]
    return [methods[e.id] for e in sorted(found, key=lambda e: (e.group, e.name))]


def index_page() -> str:
    """docs/methods/README.md: every method by verb."""
    parts = [NOTE + "# Methods\n", "`truing list` shows the same, `truing show NAME` a page.\n"]
    for verb in VERBS:
        found = of_verb(verb)
        if not found:
            continue
        rows = [
            [
                f"[`{m.name}`]({m.id}.md)",
                m.group.rpartition("/")[2] or "-",
                m.field,
                escape(m.summary),
            ]
            for m in found
        ]
        parts.append(f"## {verb}\n\n{VERB_TYPES[verb][0].upper()}{VERB_TYPES[verb][1:]}.\n")
        parts.append(table(("name", "group", "field", "what it does"), rows))
    return "\n".join(parts)


def readme_methods() -> str:
    """The block of the README: one row for each verb."""
    rows = [
        [
            f"**{verb}**",
            VERB_TYPES[verb],
            ", ".join(f"[`{m.name}`](docs/methods/{m.id}.md)" for m in of_verb(verb)),
        ]
        for verb in VERBS
        if of_verb(verb)
    ]
    count = sum(len(of_verb(verb)) for verb in VERBS)
    head = f"{count} methods under eleven verbs; [all of them with a line each]"
    return f"{head}(docs/methods/README.md).\n\n" + table(("verb", "from, to", "methods"), rows)


def components_page() -> str:
    """docs/components.md: what settings refer to as {use: name}."""
    parts = [
        NOTE + "# Components\n",
        "What crosses a step's boundary and can be called is a registered function, referred to as "
        "`{use: name, ...settings}`:\nthe check of a principle, a scorer, a reward. Your own: "
        "[plugins](plugins.md).\n",
    ]
    found: dict[str, list[Entry]] = {}
    for e in sorted(catalogue.components().values(), key=lambda e: (e.component, e.name)):
        if e.package == "truing":
            found.setdefault(e.component, []).append(e)
    for kind, entries in found.items():
        rows = [[f"`{listing.usage(e)}`", escape(e.summary)] for e in entries]
        parts += [f"## {kind}\n", table(("written as", "what it does"), rows)]
    return "\n".join(parts)


# All of them


def replace_block(text: str, name: str, block: str) -> str:
    """`text` with what stands between the markers of `name` replaced."""
    start, end = f"<!-- generated: {name} -->\n", f"<!-- end: {name} -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"README.md lacks the markers {start.strip()} ... {end}")
    return before + start + block + end + after


def generate(root: Path) -> dict[str, str]:
    """All generated files, by path relative to the repository."""
    made = {
        "docs/methods/README.md": index_page(),
        "docs/methods/train/README.md": training_page(),
        "docs/functions.md": functions_page(),
        "docs/components.md": components_page(),
        "docs/claims.md": claims_page(root),
    }
    for verb in VERBS:
        made |= {f"docs/methods/{m.id}.md": method_page(m) for m in of_verb(verb)}
    readme = (root / "README.md").read_text(encoding="utf-8")
    made["README.md"] = replace_block(readme, "methods", readme_methods())
    return made
