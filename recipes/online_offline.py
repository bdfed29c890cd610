"""Are a model's own answers worth training on? Online against offline at equal divergence.

The protocol of arXiv 2405.08448 at the size of two cores. The principles' checks are the golden
preference: they label the pairs and judge the win rates. A reward model trained on the pairs is the
proxy, which alone the online side sees, so that the judge does not leak into training. Both sides
take the same prompts, IPO with summed log-ratios, batch, rate and numbers of updates; each run is
placed by its divergence from the start and by its win rate over one fixed policy. `result` compares
frontiers; `seen_*` tell how each classifies held-out pairs and whether chosen answers lost.
"""

from __future__ import annotations

from truing import Plan

BETAS = (0.1, 0.5)
STEPS = (10, 30, 60)
SAME = {"batch": 4, "lr": 1e-4, "schedule": "constant", "warmup": 0.0}
TOKENS = 48


def recipe() -> Plan:
    """Pairs, proxy, both arms at every beta and length, and the comparison."""
    plan = Plan("online_offline", seed=0)
    plan.model("base", "smollm2-135m-instruct")
    plan.table("everyday", "everyday_prompts")
    plan.step("rules", "specify/principles_file", path="principles.yaml")
    for part in ("train", "held_out"):
        plan.step(f"prompts_{part}", "select/split", data="everyday", part=part, held_out=48)
    for part in ("train", "held_out"):
        plan.step(
            f"pairs_{part}",
            "synthesize/principle_pairs",
            model="base",
            prompts=f"prompts_{part}",
            principles="rules",
            k=4,
            max_tokens=TOKENS,
            relevance_weight=0.0,
            told=1,
        )
    plan.step("proxy", "train/bradley_terry", model="base", data="pairs_train", epochs=2)
    plan.step("fixed", "train/sft", model="base", data="pairs_train", epochs=1)

    arms: dict[str, list[str]] = {"online": ["start"], "offline": ["start"]}
    models = {"start": "base"}
    for beta in BETAS:
        for steps in STEPS:
            how = {"beta": beta, "steps": steps, **SAME}
            offline, online = (f"{arm}_{beta:g}_{steps}".replace(".", "") for arm in
                               ("offline", "online"))  # fmt: skip
            plan.step(
                offline,
                "train/ipo",
                model="base",
                data="pairs_train",
                length_normalise=False,
                **how,
            )
            plan.step(
                online,
                "train/online_dpo",
                model="base",
                data="pairs_train",
                reward_model="proxy",
                kind="ipo",
                answers=2,
                temperature=1.0,
                new_tokens=TOKENS,
                **how,
            )
            for arm, name in (("offline", offline), ("online", online)):
                arms[arm].append(name)
                models[name] = name
    for name, model in models.items():
        plan.step(
            f"moved_{name}",
            "evaluate/divergence",
            model=model,
            reference="base",
            data="prompts_held_out",
            max_tokens=TOKENS,
        )
        plan.step(
            f"won_{name}",
            "evaluate/win_rate",
            model=model,
            baseline="fixed",
            prompts="prompts_held_out",
            principles="rules",
            max_tokens=TOKENS,
        )
    for arm in ("online", "offline"):
        plan.step(
            f"seen_{arm}",
            "evaluate/implicit_preference",
            model=arms[arm][-1],
            reference="base",
            data="pairs_held_out",
        )
    plan.step(
        "result",
        "evaluate/frontier",
        divergences={name: f"moved_{name}" for name in models},
        win_rates={name: f"won_{name}" for name in models},
        arms=arms,
    )
    return plan
