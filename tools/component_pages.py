"""docs/components.md: what settings refer to as {use: name}, and where each kind of it goes."""

from __future__ import annotations

from pagetext import NOTE, escape, table

from truing import catalogue, listing
from truing.catalogue import Entry
from truing.method import methods

# Where a reference to a component of each kind is written.
GOES = {
    "check": "Under `check:` of a rule in a principles file, as `checks` of `select/checked`, and "
    "as `task_check` of `recover/weight_restore`.",
    "decoder": "In the change that a method of the verb decode lays over a model. That method "
    "writes it, from settings of the same names: `truing decode best-of-n --n 8`.",
    "embedder": "As `embedder` of `select/deita`.",
    "environment": "As `environment` of online training (`train/grpo` and its like), and as the "
    "first argument of `truing.core.rollout.rollout`.",
    "judge": "As `judge` of a method that takes one, in place of a single model: {judging}; and as "
    "`model` of the rewards that ask a judge.",
    "pool": "Nowhere in a recipe: an online method whose rows are of several sorts names it in its "
    "decorator, and the settings are that method's.",
    "reward": "Under a name in `rewards` of online training, of the decode methods and of "
    "`synthesize/objective_pairs`: `rewards: {short: {use: length_near, n: 40}}`; as `reward` of "
    "`evaluate/win_rate`, `select/magpie_filter` and `synthesize/step_labels`. `model: ...` is a "
    "[model](data-and-models.md) of its own.",
    "scorer": "As `complexity` and `quality` of `select/deita`.",
}


RANKS = ("train/cyclealign",)  # a judge that writes rankings is one model, and refused as a panel


def judging() -> str:
    """The methods whose input `judge` may be of several."""
    own = [e.id for e in catalogue.methods().values() if e.package == "truing"]
    asking = (name for name in sorted(own) if "judge" in methods[name].inputs)
    return ", ".join(f"`{name}`" for name in asking if name not in RANKS)


def components_page() -> str:
    """The page: one table a kind."""
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
        goes = GOES[kind].replace("{judging}", judging()) if kind == "judge" else GOES[kind]
        parts += [f"## {kind}\n", goes + "\n", table(("written as", "what it does"), rows)]
    return "\n".join(parts)
