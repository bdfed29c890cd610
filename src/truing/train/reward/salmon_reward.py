"""What a principle-following reward model says of answers, under principles that are chosen now.

Principles are sentences, or a `Principles` from which `draw` are drawn for each prompt, one after
the other with their priorities as weights, anew at each visit to it; answers to one visit share
them. A row's column `tag` makes some 128 heavier: "reasoning" those whose id names "reason" or
"numerical", "red_teaming" those with "ethical" or "harmless". `always` are told beside them: what
stops a reward from being hacked. The model reads the review that train/salmon was trained on, cut
in the same way where the context is too short.

Source: "SALMON: Self-Alignment with Instructable Reward Models", arXiv 2310.05910.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from typing import cast

from truing.context import current
from truing.core.bounds import check_bounds
from truing.core.judging.rewards import held_model, score_model
from truing.core.passes.scoring import check_reviews
from truing.core.trainer.start import room
from truing.errors import InputError
from truing.method import component
from truing.models import held
from truing.naming import ModelKey, PrinciplesKey
from truing.own_checks import checks
from truing.principles import Principle, Principles
from truing.tables import Row, content_hash, prompt_of
from truing.train.reward.salmon import ROLE, fitted, within

WHERE = "reward salmon_reward"
TAGS = {"reasoning": ("reason", "numerical"), "red_teaming": ("ethical", "harmless")}
HEAVY = 128  # added to the weight of principles that a row's tag asks for


def draw_principles(
    principles: Sequence[Principle], count: int, tag: str, source: random.Random
) -> list[str]:
    """Texts of `count` principles drawn without replacement, by priority as weight."""
    left, texts = list(principles), list[str]()
    while left and len(texts) < count:
        asked = [any(word in p.id for word in TAGS.get(tag, ())) for p in left]
        weights = [max(p.priority, 0) + HEAVY * more for p, more in zip(left, asked, strict=True)]
        if not any(weights):
            break
        at = source.choices(range(len(left)), weights)[0]
        texts.append(left.pop(at).text)
    return texts


def _told(row: Row, principles: list[str] | Principles, count: int) -> list[str]:
    """The principles that hold for this row."""
    if isinstance(principles, Principles):
        if not count:
            return [p.text for p in principles]
        row_id = row.get("id") or content_hash(row["prompt"])
        name = f"principles/{row.get('rollout', '')}/{row_id}"
        source = random.Random(current().stream(name))
        return draw_principles(principles.items, count, str(row.get("tag", "")), source)
    return principles


def _rules(principles: str | list[str]) -> list[str] | Principles:
    """The principles that a setting lists, or names."""
    found = held(principles) if isinstance(principles, str) else principles
    if not isinstance(found, (list, Principles)):
        raise InputError(
            "are not principles",
            where=f"{WHERE} setting 'principles'",
            seen=principles,
            fix="Give a list of sentences, or the name of principles",
        )
    return found


def _check(settings: Mapping[str, object]) -> None:
    """What `core.judging.scores` asks before anything is drawn."""
    check_bounds(settings, {"draw": (0, None)}, WHERE)
    check_reviews(held_model(str(settings["model"]), WHERE), f"{WHERE} setting 'model'")
    _rules(cast("str | list[str]", settings["principles"]))


@component("reward")
@checks(_check)
def salmon_reward(
    rows: list[Row],
    *,
    model: ModelKey,
    principles: PrinciplesKey | list[str],
    draw: int = 0,
    always: list[str] | None = None,
) -> list[float]:
    """What a principle-following reward model says under these principles.

    Args:
        model: name of the model, or in Python its key, as `truing.models.hold` gives it.
        principles: sentences that say what a good answer is like, or a `Principles` as the model.
        draw: how many of a `Principles` are drawn for each prompt; 0 takes all.
        always: sentences that are told besides.
    """
    found, rules = held_model(model, WHERE), _rules(principles)
    loaded = found.load_module()
    fits = within(loaded.tokenizer, room(loaded, sys.maxsize))
    asked: list[Row] = []
    cut = 0
    for row in rows:
        told = [*_told(row, rules, draw), *(always or [])]
        review = fitted(prompt_of(row), str(row["completion"]), told, fits)
        if review is None:
            raise InputError(
                "the principles leave no room for an answer in the model's context",
                where=WHERE,
                seen=f"{len(told)} principles",
                fix="Tell fewer or shorter ones",
            )
        cut += bool(review[1])
        asked.append({"prompt": ROLE, "completion": review[0], "finished": False})
    if cut:
        current().metric(reviews_cut=cut, reviews=len(rows))
    return score_model(found, asked, "reviews")
