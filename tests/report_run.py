"""A small run for tests of the report: answers written by hand, measured by the real checks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from truing.core.stats import bootstrap, wilson
from truing.evaluate.adherence import sample_rows, violation_measures
from truing.evaluate.before_after import before_after
from truing.principles import Principles
from truing.reports import Measure, Report
from truing.specify.satisfaction import satisfaction
from truing.specify.texts import words
from truing.synthesize.principle_pairs import Answer, choose, pair_row
from truing.tables import Row, Table

PRINCIPLES = Path(__file__).parents[1] / "recipes" / "principles.yaml"
HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
)

LONG = (
    "There are several things that you should think about before you begin, because each of them "
    "matters in its own way, and I have always found in my own work that the best results come to "
    "those who take their time, read widely, and ask people who have done it before for advice."
)
# prompt, answer before, relevance, answer after, relevance
ASKED: tuple[tuple[str, str, float, str, float], ...] = (
    ("How do I keep basil alive on a windowsill?",
     "Here are some tips:\n1. Water it daily\n2. Give it light\n3. Pinch the flowers", 0.71,
     "Give basil six hours of light, water it when the soil is dry, and pinch it.", 0.78),
    ("Why does bread go stale?", LONG, 0.41,
     "Starch in the crumb crystallises and pushes water to the crust, so the bread hardens.", 0.69),
    ("What is a good first instrument for a child?",
     "I started with the piano myself, and my daughter loves hers.", 0.58,
     "A ukulele or a keyboard suits small hands and rewards a beginner early.", 0.66),
    ("How long should I boil an egg?",
     "- Soft: six minutes\n- Medium: eight minutes\n- Hard: ten minutes", 0.73,
     "Six minutes gives a soft yolk, eight a jammy one, and ten a firm one.", 0.76),
    ("Explain what a mortgage is.", LONG + " And so on, and", 0.32,
     "A mortgage is a loan for a house, which the lender may sell if the loan is not repaid.", 0.8),
    ("Write a message to thank a colleague.",
     "Thank you for your help with the launch. It made all the difference.", 0.62,
     "Thank you for your help with the launch; it made all the difference.", 0.63),
    ("What should I pack for a rainy hike?",
     "1. A rain jacket\n2. Dry socks\n3. A hat\n4. Some food", 0.7,
     "1. A rain jacket\n2. Dry socks\n3. A hat", 0.69),
    ("Can cats eat cheese?", "I think cats can have a little cheese, but mine never did.", 0.75,
     "Most cats digest milk sugar badly, so a crumb of cheese is the limit.", 0.74),
    ("How do vaccines work?", LONG, 0.29,
     "A vaccine shows the immune system a harmless part of a germ, so that it is known.", 0.71),
    ("What does a carburettor do?",
     "It mixes air and fuel for an engine in the right proportion.", 0.68,
     "It mixes air and fuel for an engine in the right", 0.67),
    ("Suggest a name for a bakery.", "The Rising Sun is a fine name for a bakery.", 0.61,
     "Crumb and Crust is a fine name for a bakery.", 0.64),
    ("How do I remove red wine from a carpet?",
     "* Blot it\n* Add salt\n* Rinse with cold water", 0.66,
     "Blot the stain, cover it with salt, wait until it is dry, and rinse with cold water.", 0.7),
    ("What is the point of a tax allowance?", LONG, 0.22,
     "Earnings beneath the allowance are not taxed, which spares people on low pay.", 0.59),
    ("How do I learn the names of stars?", "", 0.0,
     "Begin with the Plough, follow its handle to Arcturus, and add one star a night.", 0.72),
    ("Is it safe to swim after a meal?",
     "Yes, my family always swims straight after lunch and I feel fine.", 0.55,
     "Swimming after a meal is safe for healthy people.", 0.68),
    ("What is <b>bold</b> in HTML? " + HOSTILE,
     "I would write " + HOSTILE + " in my page.", 0.64,
     "The element b marks text that stands out, such as " + HOSTILE + " here.", 0.61),
)  # fmt: skip
TAUGHT = (
    "What makes a good cup of tea?", "How do magnets work?", "Plan a small birthday party.",
    "Why is the sea salty?", "How can I sleep better?", "Describe a lighthouse.",
)  # fmt: skip
PLAN = (
    # name, method, noun, about, inputs, seconds
    ("rules", "specify/principles_file", "Principles", "4 principles", {}, 0.02),
    ("drawn", "synthesize/magpie", "Table", "256 prompt rows", {"model": ["base"]}, 41.7),
    ("clean", "select/checked", "Table", "221 prompt rows", {"data": ["drawn"]}, 0.1),
    ("prompts", "select/near_duplicates", "Table", "190 prompt rows", {"data": ["clean"]}, 2.9),
    ("held_out", "select/split", "Table", "16 prompt rows", {"data": ["prompts"]}, 0.02),
    ("training", "select/split", "Table", "6 prompt rows", {"data": ["prompts"]}, 0.02),
    ("pairs", "synthesize/principle_pairs", "Table", "6 pair rows",
     {"model": ["base"], "prompts": ["training"], "principles": ["rules"]}, 94.2),
    ("picked", "select/deita", "Table", "6 pair rows", {"data": ["pairs"]}, 1.4),
    ("aligned", "train/dpo", "Model", "SmolLM2 + adapter",
     {"model": ["base"], "data": ["picked"]}, 121.9),
    ("before", "evaluate/adherence", "Report", "11 measures",
     {"model": ["base"], "prompts": ["held_out"], "principles": ["rules"]}, 18.3),
    ("after", "evaluate/adherence", "Report", "11 measures",
     {"model": ["aligned"], "prompts": ["held_out"], "principles": ["rules"]}, 11.2),
    ("ability_before", "evaluate/ability", "Report", "2 measures", {"model": ["base"]}, 8.8),
    ("ability_after", "evaluate/ability", "Report", "2 measures", {"model": ["aligned"]}, 9.1),
    ("result", "evaluate/before_after", "Report", "before and after",
     {"before": ["before"], "after": ["after"], "ability_before": ["ability_before"],
      "ability_after": ["ability_after"]}, 0.3),
)  # fmt: skip
CACHED = ("drawn", "clean", "prompts", "before")


def _mean(name: str, values: list[float], unit: str, better: str = "") -> Measure:
    lo, hi = bootstrap(values)
    return Measure(name, sum(values) / len(values), lo, hi, len(values), unit, "", better)


def adherence(principles: Principles, prompts: Table, side: int, key: str) -> Report:
    """What `evaluate/adherence` reports of the answers above; side 1 is before, 3 is after."""
    rows = list(prompts)
    answers = [(str(a[side]), True) for a in ASKED]
    asked: list[Row] = [
        {"prompt": r["prompt"], "completion": text, "finished": True}
        for r, (text, _) in zip(rows, answers, strict=True)
    ]
    cosines = [float(a[side + 1]) for a in ASKED]
    kept = satisfaction(principles, asked, relevance=cosines)
    measures = violation_measures(kept, principles, rows)
    measures.append(_mean("relevance", cosines, "cosine", "higher"))
    measures.append(_mean("words", [float(len(words(t))) for t, _ in answers], "words"))
    facts = {
        "kind": "adherence",
        "model": "smollm2-135m-instruct",
        "model_key": key,
        "principles": [p.id for p in principles],
        "texts": {p.id: p.text for p in principles},
        "not_measured": [],
    }
    samples = Table("judgement", sample_rows(rows, answers, kept)).with_lineage(generator=key)
    return Report("adherence to principles", measures, samples, facts)


def ability(nats: float, right: int) -> Report:
    """What `evaluate/ability` reports: 26 texts, 80 questions."""
    lo, hi = wilson(right, 80)
    return Report(
        "general ability",
        [
            Measure("ability", nats, nats - 0.09, nats + 0.1, 26, "nats per token", "", "lower"),
            Measure("choices", right / 80, lo, hi, 80, "share", "", "higher"),
        ],
        meta={"kind": "ability", "metric": "held-out nats per token"},
    )


def pairs(principles: Principles, prompts: Table) -> Table:
    """What `synthesize/principle_pairs` makes of two answers to each training prompt."""
    rows: list[Row] = []
    for i, prompt in enumerate(prompts):
        texts = [str(ASKED[i][1]) or LONG, str(ASKED[i][3])]
        asked: list[Row] = [{"prompt": prompt["prompt"], "completion": t} for t in texts]
        kept = satisfaction(principles, asked, relevance=[0.5, 0.6])
        answers = [
            Answer(t, True, bool(j), k, k.value(principles) + k.relevance)
            for j, (t, k) in enumerate(zip(texts, kept, strict=True))
        ]
        chosen = choose(answers, 0.05, False)
        if chosen:
            rows.append(pair_row(prompt, answers, *chosen, principles))
    return Table("pair", rows).with_lineage(generator="base-key", judge="checks", seed=0)


def results() -> dict[str, object]:
    """What every step made, but for the model."""
    rules = Principles.read(PRINCIPLES)
    drawn = Table("prompt", [{"prompt": p} for p in (*(a[0] for a in ASKED), *TAUGHT)])
    drawn = drawn.with_lineage(generator="base-key", seed=0, step="drawn")
    held_out, training = drawn.split(len(ASKED))
    made = pairs(rules, training)
    before = adherence(rules, held_out, 1, "base-key")
    after = adherence(rules, held_out, 3, "aligned-key")
    abilities = ability(3.214, 41), ability(3.243, 42)
    return {
        "rules": rules,
        "drawn": drawn,
        "held_out": held_out,
        "training": training,
        "pairs": made,
        "picked": made,
        "before": before,
        "after": after,
        "ability_before": abilities[0],
        "ability_after": abilities[1],
        "result": before_after(before, after, *abilities),
    }


def manifest() -> dict[str, object]:
    """Its manifest.json."""
    steps = {
        name: {
            "method": method,
            "verb": method.split("/")[0],
            "summary": f"What {method} does for a user.",
            "settings": {"beta": 0.1, "lr": 4e-4, "epochs": 4} if method == "train/dpo" else {},
            "inputs": inputs,
            "key": f"{name}-step-key",
            "artefact": "aligned-key" if name == "aligned" else f"{name}-key",
            "noun": noun,
            "about": about,
            "status": "done",
            "cached": name in CACHED,
            "seconds": seconds,
            "error": "",
        }
        for name, method, noun, about, inputs, seconds in PLAN
    }
    return {
        "schema_version": 1,
        "name": "quickstart",
        "recipe": "recipes/quickstart.yaml",
        "plan_key": "4f1c2a9be0d35c77",
        "seed": 0,
        "started": "2026-02-03T10:15:42+00:00",
        "seconds": 267.4,
        "status": "done",
        "versions": {
            "truing": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "python": "3.11",
        },
        "hardware": {"cpu": "a processor of two cores", "cores": 2, "memory_gib": 31.2, "gpus": []},
        "models": {
            "base": {"key": "base-key", "licence": "Apache-2.0", "source": "smollm2-135m-instruct"}
        },
        "steps": steps,
        "result": {},
    }


def metrics(total: int = 48) -> list[dict[str, object]]:
    """Its metrics.jsonl: a receipt, then falling losses, as preference training tells them."""
    rows: list[dict[str, object]] = [
        {"at": "aligned", "rows": 6, "device": "cpu", "dtype": "float32", "budget": 700,
         "threads": 2, "receipt": "user: Why is the sea salty?\nassistant: >>>Rivers.<|im_end|><<<"}
    ]  # fmt: skip
    for i in range(total):
        done = i / total
        wave = 0.06 * math.sin(2.7 * i) * (1 - done)
        rows.append(
            {
                "at": "aligned",
                "step": i + 1,
                "loss": 0.693 * math.exp(-2.4 * done) + 0.05 + wave,
                "lr": 4e-4 * min((i + 1) / 4, 0.5 * (1 + math.cos(math.pi * done))),
                "grad_norm": 1.4 + 2 * math.exp(-3 * done) + 5 * wave,
                "accuracy": min(1.0, 0.5 + done + wave),
                "margin": 4.2 * done + 3 * wave,
                "chosen_reward": 1.1 * done + wave,
                "seconds": 2.5,
            }
        )
    return rows


def write_run(folder: Path, about: Mapping[str, object], observed: list[dict[str, object]]) -> Path:
    """A run's folder with its manifest and metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(about))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in observed))
    return folder
