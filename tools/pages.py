"""Pages that follow from the code: one for each method, the tables, the pure functions, the claims.

Everything comes from docstrings and signatures, so that a page cannot say other than the code.
"""

from __future__ import annotations

import functools
import inspect
import textwrap
import typing
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from claim_pages import claims_page
from component_pages import components_page
from example_pages import use_block
from function_pages import functions_of, functions_page
from input_pages import inputs_table
from module_pages import modules_page
from pagetext import NOTE, escape, prose, table
from python_pages import python_page
from result_pages import readme_results

from truing import catalogue, claims
from truing.catalogue import VERBS
from truing.core import held_out
from truing.core.held_out import Watch
from truing.core.objective import MIX, Mix
from truing.core.online_training import OnlineTraining
from truing.core.trainer import mix
from truing.core.training import TextTraining, Training
from truing.inputs import kinds_of
from truing.method import Method, methods
from truing.signature import Setting, class_docs, type_name

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
# What models must be able to do, in words.
ABILITIES = {
    "generate": "generate",
    "logprob": "give log-probabilities",
    "hidden": "show hidden states",
    "weights": "have weights",
}
COLLECTION = "preference-losses"  # many papers under one slug: its claim tells of one method alone
# What the engine adds to the settings of a training method, by the sort of its function.
SHARED = {"objective": TextTraining, "online": OnlineTraining}


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


def _all_of(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


@functools.cache
def _claimed() -> dict[str, str]:
    """The method that each claim is about."""
    return {str(c["claim"]): str(c["method"]) for c in claims.catalogue()}


def _claims(method: Method) -> list[str]:
    """Its claims; of a method without one, that of another method of the same paper."""
    own = [f"claim `{slug}`" for slug, of in _claimed().items() if of == method.id]
    other = _claimed().get(method.paper, "")
    if own or not other or method.paper == COLLECTION:
        return own
    return [f"its paper's claim, `{method.paper}`, is about [{other}](../{other}.md)"]


def _facts(method: Method) -> str:
    entry = method.entry
    facts = [f"Returns a **{method.returns}**"] if method.verb != "serve" else ["Ends a graph"]
    if entry.kind in SHARED:
        facts.append(f"trains on rows of kind `{kinds_of(method)['data'][0]}`")
    if entry.unit:
        facts.append(f"one value of the loss for each {entry.unit}")
    if entry.kind == "objective":
        facts.append("measures " + ", ".join(f"`{n}`" for n in entry.needs))
    elif method.needs:
        facts.append(f"needs models that {_all_of(ABILITIES[n] for n in method.needs)}")
    if entry.field != "text":
        facts.append(f"for the field `{entry.field}`")
    facts += _claims(method)
    return "; ".join(facts) + "."


def method_page(method: Method) -> str:
    """The page of one method."""
    shared = shared_settings(method)
    own = [s for s in method.settings.values() if s.name not in shared]
    parts = [
        NOTE + f"# {method.id}\n",
        escape(method.summary) + "\n",
        _facts(method) + "\n",
        "## Use\n",
        use_block(method),
    ]
    if inputs := inputs_table(method):
        parts += ["## Inputs\n", inputs]
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
    defaults = {f.name: f.default for f in (*fields(SHARED[method.entry.kind]), *fields(Watch))}
    if method.entry.kind == "objective":
        defaults["mix"] = None
    return {n: s for n, s in method.settings.items() if n in defaults and s.default == defaults[n]}


def _shared_table(shared: type[Training | Watch], told: Iterable[str] = ()) -> str:
    said, types = class_docs(shared), typing.get_type_hints(shared)
    return _settings(
        Setting(f.name, types[f.name], f.default, said.get(f.name, ""))
        for f in fields(shared)
        if f.name not in told
    )


def _code(names: Iterable[str]) -> str:
    return _all_of(f"`{n}`" for n in names)


def training_page() -> str:
    """What docs/methods/train says before its methods: the shared settings."""
    text, drawn = ([f.name for f in fields(c)] for c in (TextTraining, OnlineTraining))
    apart = [m for m in of_verb("train") if m.entry.kind not in SHARED]
    online = [m for m in of_verb("train") if m.entry.kind == "online"]
    own = [m for m in online if "rewards" not in m.settings]  # rewarded by their pools
    critic = [n for n in drawn if any(n not in m.settings for m in online if m not in own)]
    with_critic = [m.name for m in online if critic[0] in m.settings]
    rewards = [n for n in drawn if n not in critic and any(n not in m.settings for m in own)]
    shared = (
        "Methods that are declared by their loss, or by what they make of a rollout, take these "
        "besides their own; a page says so, and tells its own default where it has another. What "
        "they decide is the engine's: an objective never sees them. The pages of "
        f"{_code(m.name for m in apart)}, which are declared otherwise, tell all that they take."
    )
    answers = (
        "Methods that draw answers while they train (those of the group `rl` that are not named "
        "above) take these as well; `batch` counts prompts, the rate stays constant, and `steps` "
        f"counts rollouts. {_code(critic)} are for those with a critic: {_code(with_critic)}. "
        f"{_code(m.name for m in own)} rewards answers by itself, without {_code(rewards)}."
    )
    watched = (
        "Methods that train on given rows, or on their own answers, take a second table as the "
        "input `held_out`, and what follows. Of those that draw answers it holds prompts, and the "
        "reward decides in place of the loss: the highest is the best."
    )
    return (
        NOTE
        + f"# Settings that all training shares\n\n{textwrap.fill(shared, 92)}\n\n"
        + _shared_table(TextTraining)
        + "\n## Held-out rows\n\n"
        + f"{textwrap.fill(watched, 92)}\n\n"
        + _shared_table(Watch)
        + "\n"
        + prose(inspect.getdoc(held_out) or "")
        + "\n"
        + "\n## Several losses in one step\n\n"
        + "Methods that train on given rows take one more, losses that are added by weights:\n\n"
        + _settings([Setting("mix", Mix | None, None, MIX)])
        + "\n"
        + prose(inspect.getdoc(mix) or "")
        + f"\n\n## On the model's own answers\n\n{textwrap.fill(answers, 92)}\n\n"
        + _shared_table(OnlineTraining, text)
    )


# Tables


def of_verb(verb: str) -> list[Method]:
    """Truing's own methods of a verb, by group and name."""
    found = [e for e in catalogue.methods().values() if e.verb == verb and e.package == "truing"]
    return [methods[e.id] for e in sorted(found, key=lambda e: (e.group, e.name))]


def index_page() -> str:
    """docs/methods/README.md: every method by verb."""
    parts = [
        NOTE + "# Methods\n",
        "`truing list` shows the same, `truing show NAME` a page. Examples on the pages run in a "
        "checkout, which holds\n`everyday_prompts` and `helpful_pairs`; `NAME.jsonl` is a file of "
        "your own, with the rows that the page tells,\n`NAME/` a folder that another command has "
        "saved with `--out NAME`.\n",
    ]
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
    """The block of the README: one row for each verb, or for each of its groups."""
    rows: list[list[str]] = []
    for verb in VERBS:
        found = of_verb(verb)
        groups = list(dict.fromkeys(m.group for m in found))
        for group in groups:
            links = [f"[`{m.name}`](docs/methods/{m.id}.md)" for m in found if m.group == group]
            name = f"**{verb}** {group}" if len(groups) > 1 else f"**{verb}**"
            rows.append([name, VERB_TYPES[verb] if group == groups[0] else "", ", ".join(links)])
    count = sum(len(of_verb(verb)) for verb in VERBS)
    head = f"{count} methods under eleven verbs; [all of them with a line each]"
    return f"{head}(docs/methods/README.md).\n\n" + table(("verb", "from, to", "methods"), rows)


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
        "docs/functions.md": functions_page({verb: of_verb(verb) for verb in VERBS}),
        "docs/components.md": components_page(),
        "docs/claims.md": claims_page(root),
        "docs/modules.md": modules_page(root),
        "docs/python.md": python_page(),
    }
    for verb in VERBS:
        made |= {f"docs/methods/{m.id}.md": method_page(m) for m in of_verb(verb)}
    readme = (root / "README.md").read_text(encoding="utf-8")
    readme = replace_block(readme, "result", readme_results(root))
    made["README.md"] = replace_block(readme, "methods", readme_methods())
    return made
