"""OncoReason (arXiv 2510.17532) on a public cohort: survival with reasons, trained in three ways.

German Breast Cancer Study Group 2 (set `survival` of the data folder, TRUING_DATA): time to
recurrence or death, whichever came first, so that "DECEASED" and survival in the answers stand for
this event and the time to it. Compared on the same 100 patients: fine-tuning on the prediction
alone, on reasons and prediction, and GRPO from the latter, rewarded for status, months, form and
trace.
Patients without the event stay, since whether there was one is half of what is predicted; their
months are follow-up, and the errors of months leave them out. Needs the extra `truing[metrics]`.
A research demonstration on old study data: no medical advice.
"""

from __future__ import annotations

from truing import Plan

ATTRIBUTES = {
    "age": "Age",
    "menostat": "Menopause",
    "tsize": "Tumour size in mm",
    "tgrade": "Tumour grade",
    "pnodes": "Positive nodes",
    "progrec": "Progesterone receptor",
    "estrec": "Oestrogen receptor",
    "horTh": "Hormonal therapy",
}
COHORT = {"data": "cohort", "time": "time", "event": "cens", "attributes": ATTRIBUTES}
TUNING = {"epochs": 2, "lr": 1e-4, "rank": 8, "lora_alpha": 32}


def recipe() -> Plan:
    """Cohort, three trainings, three reports, and the general ability before and after each."""
    plan = Plan("oncoreason", seed=0)
    plan.model("base", "smollm2-135m-instruct")
    plan.table("cohort", "survival/gbsg2")
    for form in ("prediction", "reasoned"):
        for part in ("train", "test"):
            plan.step(
                f"{form}_{part}", "synthesize/survival_cohort", part=part, form=form, **COHORT
            )
    plan.step("sft", "train/sft", model="base", data="prediction_train", **TUNING)
    plan.step("sft_cot", "train/sft", model="base", data="reasoned_train", **TUNING)
    plan.step(
        "grpo",
        "train/grpo",
        model="sft_cot",
        data="reasoned_train",
        rewards={"right": {"use": "survival_answer"}},
        answers=4,
        max_tokens=256,
        steps=24,
        beta=0.02,
    )
    for name, form in (("sft", "prediction"), ("sft_cot", "reasoned"), ("grpo", "reasoned")):
        plan.step(
            f"by_{name}",
            "evaluate/survival_prediction",
            model=name,
            data=f"{form}_test",
            reference="prediction_train",
        )
    for name in ("base", "sft", "sft_cot", "grpo"):  # what it cost
        plan.step(f"ability_{name}", "evaluate/ability", model=name)
    return plan
