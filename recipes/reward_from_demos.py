"""A reward inferred from demonstrations, checked before it is trusted, then optimised.

After the survey of arXiv 2507.13158, which gives no recipe of its own. Demonstrations are answers
that keep four principles, which nobody tells the reward: it is inferred from them alone, against
the model's own answers. Before anything follows it, `quality` asks what it is worth: on held-out
data and on another domain, whether a second inference (`again`) agrees with it, whether it is
length, and whether the best of N by it stay good by one of the rules behind the demonstrations.
Only then GRPO follows it; `imitated` is what plain fine-tuning makes of the same demonstrations.
"""

from __future__ import annotations

from truing import Plan

TOKENS = 48
INFERRED = {"samples": 2, "max_tokens": 96, "epochs": 2.0}


def recipe() -> Plan:
    """Demonstrations, a reward and its report, a policy that follows it and one that imitates."""
    plan = Plan("reward_from_demos", seed=0)
    plan.model("base", "smollm2-135m-instruct")
    plan.table("everyday", "everyday_prompts")
    plan.table("elsewhere", "helpful_pairs")
    plan.step("rules", "specify/principles_file", path="principles.yaml")
    for part in ("train", "held_out"):
        plan.step(f"prompts_{part}", "select/split", data="everyday", part=part, held_out=48)
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
    # Of the pairs the chosen answers are the demonstrations; the rejected ones are not looked at.
    plan.step("reward", "train/reward_from_demos", model="base", data="pairs_train", **INFERRED)
    plan.step(
        "again",
        "train/reward_from_demos",
        seed=1,
        model="base",
        data="pairs_train",
        **INFERRED,
    )
    plan.step("far", "select/sample", data="elsewhere", n=48)
    plan.step(
        "quality",
        "evaluate/reward_diagnostics",
        reward="reward",
        data="pairs_held_out",
        policy="base",
        unseen="far",
        others={"again": "again"},
        gold={"use": "max_words", "n": 40},
        answers=16,
        max_tokens=TOKENS,
    )
    plan.step(
        "followed",
        "train/grpo",
        model="base",
        data="prompts_train",
        reward_model="reward",
        beta=0.04,
        steps=24,
        batch=4,
        answers=4,
        max_tokens=TOKENS,
    )
    plan.step("imitated", "train/sft", model="base", data="pairs_train", epochs=1.0)
    for name in ("followed", "imitated"):
        plan.step(
            f"{name}_wins",
            "evaluate/win_rate",
            model=name,
            baseline="base",
            prompts="prompts_held_out",
            principles="rules",
            max_tokens=TOKENS,
        )
        plan.step(
            f"{name}_ability",
            "evaluate/ability",
            model=name,
            texts="prose",
            questions="common_knowledge",
        )
    return plan
