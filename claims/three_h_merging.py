"""Does electing signs (TIES) keep more of three experts' gains than averaging their weights?

A stand-in of a minute: a network 64-96-96-10 on the 8 x 8 digits is trained upright; three experts
are tuned from it on the same digits turned, mirrored and transposed; then they are merged without
training. A merge's score on an expert's own digits is put on the scale from the base (0) to the
expert (1): g = (score - base) / (expert - base). The effect is mean g of TIES (our defaults,
density 0.2, scale 1) less that of the plain average. Mixing the data of all three in one tuning
stands beside, with the steps of one expert and with those of all three.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from truing.claims import Outcome
from truing.merge.linear import average
from truing.merge.ties import merge as ties
from truing.tables import Table

TITLE = "TIES merging keeps more of three experts' gains than the average of their weights"
METHOD = "merge/ties"
MODEL = "a network of three layers, from nothing"
EFFECT = "mean normalised gain of TIES (density 0.2) less that of the weight average"
MARGIN = 0.0
MINUTES = 2
NEEDS_GPU = False
SEEDS = (0, 1, 2, 3, 4)
TURNS = {
    "turned": lambda x: x.rot90(1, (1, 2)),
    "mirrored": lambda x: x.flip(2),
    "transposed": lambda x: x.transpose(1, 2),
}
Weights = dict[str, Tensor]


def network(weights: Weights | None = None) -> nn.Sequential:
    layers = [nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10)]
    made = nn.Sequential(*layers)
    if weights is not None:
        made.load_state_dict(weights)
    return made


def tune(net: nn.Module, x: Tensor, y: Tensor, epochs: int, batch: int = 32) -> Weights:
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows].flatten(1)), y[rows]).backward()
            optimizer.step()
    return {n: t.detach().clone() for n, t in net.state_dict().items()}


def accuracy(weights: Weights, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((network(weights)(x.flatten(1)).argmax(1) == y).float().mean())


def merges(base: Weights, experts: list[Weights]) -> dict[str, Weights]:
    def each(rule: Callable[[Tensor, list[Tensor]], Tensor]) -> Weights:
        return {n: rule(base[n], [e[n] for e in experts]) for n in base}

    return {
        "average": each(lambda b, e: average(e, [1 / 3] * 3)),
        "ties .2": each(lambda b, e: ties(b, e, [1.0] * 3, 0.2, 1.0)),
        "ties .5": each(lambda b, e: ties(b, e, [1.0] * 3, 0.5, 1.0)),
        "task arithmetic 1": each(lambda b, e: b + sum(t - b for t in e)),
        "task arithmetic .6": each(lambda b, e: b + 0.6 * sum(t - b for t in e)),
    }


def one(seed: int, images: Tensor, labels: Tensor) -> dict[str, float]:
    torch.manual_seed(seed)
    order = torch.randperm(len(images))
    train, test = order[:1200], order[1200:]
    x, y = images[train], labels[train]
    base = tune(network(), x, y, 8)
    sets = {n: (turn(x), turn(images[test])) for n, turn in TURNS.items()}
    experts = {n: tune(network(base), own, y, 6) for n, (own, _) in sets.items()}
    mixed, both = torch.cat([own for own, _ in sets.values()]), y.repeat(3)
    made = merges(base, list(experts.values()))
    made["data mixing, steps of one"] = tune(network(base), mixed, both, 2)
    made["data mixing, steps of three"] = tune(network(base), mixed, both, 6)
    found: dict[str, list[float]] = {n: [] for n in made}
    for name, (_, own) in sets.items():
        low, high = (accuracy(w, own, labels[test]) for w in (base, experts[name]))
        for merge, weights in made.items():
            found[merge].append((accuracy(weights, own, labels[test]) - low) / (high - low))
    return {n: sum(g) / len(g) for n, g in found.items()}


def run() -> Outcome:
    rows = Table.read("digits")
    images = torch.stack([torch.as_tensor(r["image"]).float().view(8, 8) / 16 for r in rows])
    labels = torch.tensor([int(cast(int, r["label"])) for r in rows])
    gains = [one(seed, images, labels) for seed in SEEDS]
    return Outcome(
        effects=[g["ties .2"] - g["average"] for g in gains],
        seeds=SEEDS,
        figures={"mean gain": {n: [round(g[n], 4) for g in gains] for n in gains[0]}},
    )
