"""The examples of a method's page, in the shell, in Python and in a recipe: one set of values."""

from __future__ import annotations

import json
from collections.abc import Mapping

import yaml
from pagetext import command_name

from truing.inputs import kinds_of
from truing.method import Method
from truing.signature import Input

Given = dict[str, object]

BASE, RULES = "smollm2-135m-instruct", "recipes/principles.yaml"
# Data sets that every checkout has; of other kinds of rows, a file of the reader's.
ROWS = {
    "pair": "helpful_pairs", "prompt": "everyday_prompts", "example": "examples.jsonl",
    "unpaired": "rated.jsonl", "group": "groups.jsonl", "steps": "steps.jsonl",
    "judgement": "scored.jsonl", "negative": "helpful_pairs",
}  # fmt: skip
# Models that are what others are held against. Any other is one that was made, in its own folder.
STARTS = ("model", "base", "reference", "baseline", "before", "trusted")
TUNED = {"dpo": "aligned/", "sft": "tuned/"}
RUNS = {"dpo": "dpo", "ipo": "ipo", "grpo": "grpo"}
ARMS = {"offline": ["dpo", "ipo"], "online": ["grpo"]}
TOLD = {"before": "before", "n4": "n4", "n16": "n16"}


def _of(folder: str, runs: Mapping[str, str]) -> dict[str, str]:
    return {name: f"{folder}/{run}" for name, run in runs.items()}


# Where a method needs other than the usual, or more: models of a sort of their own, rows with
# further columns, settings without a default, optional inputs that the rest depends on.
OWN: dict[str, Given] = {
    "attack/lora_undo": {"model": "aligned/"},
    "decode/prm_guided": {"process_models": {"steps": "process_model/"}},
    "evaluate/alignment_gain": {"model": "aligned/", "baseline": BASE, "judge": "judge/"},
    "evaluate/before_after": {"before": "refusals/before", "after": "refusals/n4"},
    "evaluate/cost_to_undo": {
        "refusals": _of("refusals", TOLD), "abilities": _of("abilities", TOLD),
        "costs": {"n4": 12, "n16": 48},
    },
    "evaluate/discrimination": {
        "preferences": _of("preferences", RUNS), "win_rates": _of("win_rates", RUNS), "arms": ARMS,
    },
    "evaluate/divergence": {"model": "aligned/"},
    "evaluate/easy_to_hard": {"reward": "process_model/", "data": "sums.jsonl"},
    "evaluate/frontier": {
        "divergences": _of("divergences", RUNS), "win_rates": _of("win_rates", RUNS), "arms": ARMS,
    },
    "evaluate/honesty": {"after": "aligned/", "data": "questions.jsonl"},
    "evaluate/implicit_preference": {"model": "aligned/"},
    "evaluate/poisoned_context": {"data": "conflicts.jsonl"},
    "evaluate/preference": {"model": "aligned/"},
    "evaluate/referee_accuracy": {"model": "referee/"},
    "evaluate/reward_diagnostics": {"reward": "reward_model/"},
    "evaluate/router_report": {"model": "experts/"},
    "evaluate/survival_prediction": {"model": "aligned/", "data": "patients.jsonl"},
    "evaluate/win_rate": {"model": "aligned/", "principles": RULES},
    "recover/weight_restore": {
        "model": "damaged/", "refuse": "harmful.jsonl", "task": "examples.jsonl",
    },
    "select/checked": {"data": "examples.jsonl", "checks": [{"use": "min_words", "n": 5}]},
    "select/deita": {"data": "examples.jsonl"},
    "select/magpie_filter": {"data": "examples.jsonl"},
    "select/mixture": {
        "data": {"mine": "examples.jsonl", "helpful": "helpful_pairs"},
        "shares": {"mine": 0.7, "helpful": 0.3}, "stop": "all_exhausted",
    },
    "select/near_duplicates": {"data": "everyday_prompts"},
    "select/sample": {"data": "helpful_pairs", "n": 64},
    "select/split": {"data": "everyday_prompts", "part": "train", "held_out": 32},
    "serve/openai": {"model": "aligned/"},
    "specify/principles_file": {"path": RULES},
    "steer/blend_heads": {"model": "heads/", "weights": [0.7, 0.3]},
    "steer/mask_experts": {"model": "experts/", "experts": [2]},
    "synthesize/honesty_targets": {"data": "questions.jsonl"},
    "synthesize/knowledge_probe": {"data": "questions.jsonl"},
    "synthesize/magpie_tags": {"data": "examples.jsonl"},
    "synthesize/objective_pairs": {"rewards": {"brief": {"use": "max_words", "n": 30}}},
    "synthesize/online_stream": {"principles": RULES, "how": {"steps": 16, "max_tokens": 64}},
    "synthesize/outcome_labels": {"data": "sums.jsonl"},
    "synthesize/step_labels": {
        "data": "sums.jsonl", "label": "value", "reward": {"use": "numeric_answer"},
    },
    "synthesize/survival_cohort": {
        "data": "patients.csv", "time": "months", "event": "died",
        "attributes": {"age": "age", "stage": "stage"}, "part": "train",
    },
    "synthesize/unified_labels": {"sources": {"right": "steps.jsonl", "liked": "helpful_pairs"}},
    "synthesize/weak_continuations": {"guard": "guard/"},
    "synthesize/weak_labels": {"model": "guard/", "data": "examples.jsonl"},
    "train/balanced_experts": {"model": "experts/"},
    "train/easy_to_hard_ppo": {"data": "sums.jsonl", "process_model": "process_model/"},
    "train/mah_dpo": {"data": "objectives.jsonl", "objectives": 2},
    "train/replay": {"data": "stream/", "how": {"steps": 16, "max_tokens": 64}},
    "train/salmon_ppo": {"reward_model": "salmon_reward/", "principles": RULES},
    "train/tpo": {"data": "gold.jsonl"},
    "train/tpo_l": {"data": "gold.jsonl"},
    "train/urpo": {"data": "sums.jsonl"},
}  # fmt: skip
# Where a result goes, as other pages name it: by the method, or by verb and noun.
OUT = {
    "decode Model": "careful", "merge Model": "merged", "recover Model": "repaired",
    "steer Model": "steered",
}  # fmt: skip
NAMED = {
    "attack/lora_undo": "damaged", "evaluate/ability": "abilities/before",
    "evaluate/divergence": "divergences/dpo", "evaluate/preference": "preferences/dpo",
    "evaluate/refusal_rate": "refusals/before", "evaluate/win_rate": "win_rates/dpo",
    "merge/mixture_of_experts": "experts",
    "synthesize/online_stream": "stream", "train/guard": "guard", "train/mah_dpo": "heads",
    "train/outcome_process_reward": "process_model", "train/process_reward": "process_model",
    "train/salmon": "salmon_reward", "train/step_value": "process_model",
    "train/urpo": "referee",
}  # fmt: skip
WIDTH = 100


def _usual(method: Method, given: Input) -> object:
    """What stands for an input of which nothing else is said."""
    noun = given.noun.split("|")[0]
    if noun == "Table":
        kinds = kinds_of(method).get(given.name) or ("",)
        return ROWS.get(kinds[0], f"{given.name}.jsonl")
    if noun == "Principles":
        return RULES
    if noun == "Model" and given.many:
        return TUNED
    return BASE if noun == "Model" and given.name in STARTS else f"{given.name}/"


def example(method: Method) -> Given:
    """Inputs and settings by name, in the order of the signature, that a call can be made with.

    Principles stand for any reward wherever a method takes them.
    """
    own = OWN.get(method.id, {})
    also = ("principles",) if not own.keys() & {"process_models", "process_model"} else ()
    inputs = {
        name: own.get(name, _usual(method, given))
        for name, given in method.inputs.items()
        if not given.optional or name in own or name in also
    }
    return inputs | {n: v for n, v in own.items() if n in method.settings}


def out(method: Method) -> str:
    """The folder that the result is saved in; "" for what is only shown."""
    usual = {"Table": "rows", "Model": "aligned", "Report": "report"}.get(method.returns, "")
    usual = {"reward": "reward_model", "supervised": "tuned"}.get(method.group, usual)
    return NAMED.get(method.id, OUT.get(f"{method.verb} {method.returns}", usual))


def flow(value: object) -> str:
    """A value as YAML has it on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def command(method: Method) -> str:
    """The line for a shell."""
    words = [f"truing {method.verb} {command_name(method.name)}"]
    for name, value in example(method).items():
        flag = f"--{command_name(name)}"
        if name in method.inputs and isinstance(value, dict):
            words += [f"{flag} {role}={source}" for role, source in value.items()]
        elif isinstance(value, (dict, list)):
            words.append(f"{flag} '{flow(value)}'")
        else:
            words.append(f"{flag} {value}")
    words += [f"--out {out(method)}"] if out(method) else []
    line = " ".join(words)
    return line if len(line) <= WIDTH else " \\\n  ".join(words)


def python(method: Method) -> str:
    """The call in Python, and where its result is saved."""
    given = [
        json.dumps(v)
        if n in method.inputs and not method.inputs[n].optional
        else f"{n}={json.dumps(v)}"
        for n, v in example(method).items()
    ]
    made = method.returns.lower() if method.verb != "serve" else "server"
    call = f'{made} = truing.methods["{method.id}"]'
    line = f"{call}({', '.join(given)})"
    if len(line) > WIDTH:
        inside = f"    {', '.join(given)}\n"
        fits = len(inside) <= WIDTH
        line = f"{call}(\n" + (inside if fits else "".join(f"    {g},\n" for g in given)) + ")"
    return line + (f'\n{made}.save("{out(method)}")' if out(method) else "")


def step(method: Method) -> str:
    """The step of a recipe."""
    given: Given = {"do": method.id} | example(method)
    line = f"{method.name}: {flow(given)}"
    if len(line) <= WIDTH:
        return line
    return f"{method.name}:\n" + "".join(f"  {n}: {flow(v)}\n" for n, v in given.items()).rstrip()


def use_block(method: Method) -> str:
    """What a page shows under "Use"."""
    return (
        f"```sh\n{command(method)}\n```\n\n```python\nimport truing\n\n{python(method)}\n```\n\n"
        f"```yaml\n{step(method)}\n```\n"
    )
