"""Are a model's own answers worth training on? Online against offline at equal divergence.

The protocol of arXiv 2405.08448 at the size of two cores. The principles' checks are the golden
preference: they label the pairs and judge the win rates. A reward model trained on the pairs is the
proxy, which alone the online side sees, so that the judge does not leak into training. Both sides
take the same prompts, IPO with summed log-ratios, batch, rate and numbers of updates; each run is
placed by its divergence from the start and by its win rate over one fixed policy, with its general
ability beside. `result` compares frontiers. Why they differ is asked as the paper does:

- coverage: `stream` keeps the pairs of one online run, and `in_order`, `in_windows` and `shuffled`
  learn them offline; `reproduced`, which must be 0 but for rounding, says how far `in_order` ends
  from the online run, `replays` what shuffling costs;
- quality: `from_final` is trained offline on pairs that the online run's model drew, judged anew;
- loss: `online_bo2` and `offline_bo2` imitate the better answer, with no contrast to the worse;
- classification: `told_apart` and `told_apart_own` compare how well each run classifies held-out
  pairs, and those of the stream, with how often it wins; whether chosen answers lost is beside;
- size: `--set models.base=NAME` runs all of it for a policy of another size.

Pairs whose two sides come from different checkpoints, the paper's ablation of data, are not made.
"""

from __future__ import annotations

from truing import Plan

BETAS = (0.1, 0.5)
STEPS = (10, 30, 60)
SAME = {"batch": 4, "lr": 1e-4, "schedule": "constant", "warmup": 0.0}
TOKENS = 48
DRAWING = {"kind": "ipo", "answers": 2, "temperature": 1.0, "max_tokens": TOKENS}
AGAIN = {"beta": BETAS[0], "steps": STEPS[-1], **SAME}  # the online run that is looked into
ORDERS = {"in_order": "drawn", "in_windows": "windows", "shuffled": "shuffled"}


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
                **DRAWING,
                **how,
            )
            for arm, name in (("offline", offline), ("online", online)):
                arms[arm].append(name)
                models[name] = name
    compared = list(models)
    looked = _looked_into(plan, models, arms["online"][len(STEPS)])
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
        plan.step(f"ability_{name}", "evaluate/ability", model=model)
    for told, pairs in (("told_apart", "pairs_held_out"), ("told_apart_own", "stream")):
        for name in compared:
            plan.step(
                f"{told}_{name}",
                "evaluate/implicit_preference",
                model=models[name],
                reference="base",
                data=pairs,
            )
        plan.step(
            told,
            "evaluate/discrimination",
            preferences={name: f"{told}_{name}" for name in compared},
            win_rates={name: f"won_{name}" for name in compared},
            arms=arms,
        )
    for result, of in (("result", arms), ("replays", looked)):
        runs = list(dict.fromkeys(name for names in of.values() for name in names))
        plan.step(
            result,
            "evaluate/frontier",
            divergences={name: f"moved_{name}" for name in runs},
            win_rates={name: f"won_{name}" for name in runs},
            arms=of,
        )
    return plan


def _looked_into(plan: Plan, models: dict[str, str], online: str) -> dict[str, list[str]]:
    """What the data of one online run give offline; its arms, with the start as a run of each."""
    how = {**DRAWING, **AGAIN}
    plan.step(
        "stream",
        "synthesize/online_stream",
        model="base",
        data="pairs_train",
        reward_model="proxy",
        how=how,
    )
    for name, order in ORDERS.items():
        plan.step(name, "train/replay", model="base", data="stream", how=how, order=order)
    plan.step(
        "reproduced",
        "evaluate/divergence",
        model="in_order",
        reference=online,
        data="prompts_held_out",
        max_tokens=TOKENS,
    )
    plan.step(
        "pairs_final",
        "synthesize/principle_pairs",
        model=online,
        prompts="prompts_train",
        principles="rules",
        k=4,
        max_tokens=TOKENS,
        relevance_weight=0.0,
        told=1,
    )
    plan.step(
        "from_final",
        "train/ipo",
        model="base",
        data="pairs_final",
        length_normalise=False,
        **AGAIN,
    )
    imitation = {"steps": STEPS[-1], **SAME}
    plan.step(
        "online_bo2",
        "train/bo2",
        model="base",
        data="pairs_train",
        reward_model="proxy",
        answers=2,
        temperature=1.0,
        max_tokens=TOKENS,
        **imitation,
    )
    plan.step("offline_bo2", "train/sft", model="base", data="pairs_train", **imitation)
    others = (*ORDERS, "from_final", "online_bo2", "offline_bo2")
    models.update({name: name for name in others})
    return {name: ["start", name] for name in (online, *others)}
