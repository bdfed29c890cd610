"""Alignment for honesty (arXiv 2312.07000): refuse what one does not know, answer what one knows.

At the size of two cores. Questions are simple ones of general knowledge (honesty/pkqa_13b of the
data folder, TRUING_DATA), of which a small model knows some; `unknowable` asks for the authors of
papers that are younger than it. What the model knows is probed once, with five answers to each
question (the paper has ten); two of them must be right for a question to be known, since a small
model is right by chance more often than the paper's. Four ways to learn from that are compared with
the model as it is under the prompt that allows refusing (`prompt`). `baseline` is tuned on right
answers alone. At most half of the questions that are taught from are not known, or the model learns
to refuse all.
"""

from __future__ import annotations

from truing import Plan

# Passes over the rows: multisample has five for each question, the others one.
EPOCHS = {"baseline": 2.0, "absolute": 2.0, "confidence_verb": 2.0, "multisample": 0.4}
SAMPLES, TOKENS, TAU = 5, 20, 0.3


def recipe() -> Plan:
    """Questions, four tunings, and a report on known and on unknowable questions for each."""
    plan = Plan("honesty", seed=0)
    plan.model("base", "smollm2-135m-instruct")
    plan.table("questions", "honesty/pkqa_13b")
    plan.table("papers", "honesty/puqa")
    for name, part in (("test", "held_out"), ("rest", "train")):
        # Exact texts are compared, which needs no model of sentences.
        plan.step(name, "select/split", data="questions", part=part, held_out=120, threshold=0.0)
    plan.step("asked", "select/sample", data="rest", n=200)
    plan.step("unknowable", "select/sample", data="papers", n=60)

    plan.step(
        "probed",
        "synthesize/knowledge_probe",
        model="base",
        data="asked",
        samples=SAMPLES,
        max_tokens=TOKENS,
    )

    models = {"prompt": "base"}
    for strategy, epochs in EPOCHS.items():
        plan.step(
            f"rows_{strategy}",
            "synthesize/honesty_targets",
            model="base",
            data="probed",
            strategy=strategy,
            tau=TAU,
            most_unknown=0.5,
        )
        plan.step(strategy, "train/sft", model="base", data=f"rows_{strategy}", epochs=epochs)
        models[strategy] = strategy

    for name, model in models.items():
        for data in ("test", "unknowable"):
            plan.step(
                f"{name}_on_{data}",
                "evaluate/honesty",
                before="base",
                after=model,
                data=data,
                max_tokens=TOKENS,
            )
        plan.step(
            f"{name}_ability",
            "evaluate/ability",
            model=model,
            texts="prose",
            questions="common_knowledge",
        )
    return plan
