"""Do experts behind a router keep what tuned models know better than one merge of their weights?

Two-layer decoders know 40 people and are asked three things of them: where they live, what they do,
what they like, each with 12 possible answers. A base answers anything; each of three models is
tuned on one objective, the right answers to one of the questions about all 40. They are put
together as a mixture of experts (an expert for each, two kept, routers from their states on ten
people's questions), as the average of their weights and as their TIES merge; then each is tuned on
the same few rows, the right answers about those ten, for as many updates; the mixture and the
merges are taken as they were put together or after this tuning, whichever is better over the seeds.
The effect is the share of right answers about the other 30 people, mean over the objectives, of the
mixture less that of the better one of the two merges, for three seeds.

The claim asks besides: on no objective more than 0.02 below that merge; four upcycled copies that
compute what the dense model did; with routers tilted by 5 towards one expert, that it stays first
for more than 0.6 of the tokens without a balancing loss and none for 0.5 with one (weight 1); and
on numbers in four clusters, each with a linear map of its own, with `core.passes.routers`' own
gates and losses: at most 0.3 of the error of the best linear model, 0.8 ln 4 nats of information
between expert and cluster; and that new experts beside frozen ones keep the error on two clusters
within 5 % when two more are learnt, where a dense network more than doubles it. The gate of these
is the Gaussian one of the survey's list, whose logits fall with the distance from an expert's
centre, and the clusters are too far apart to be mistaken for each other; what the linear gate does
there, whose new rows know nothing of the first clusters, stands beside it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from statistics import mean

import torch
from _clusters import CLUSTERS, continual, specialised
from _tiny import Outcome, Row, Table, blank, call, drawn, step, taught, vocabulary
from torch import Tensor

from truing.core.chat import completion_ids, prompt_ids
from truing.core.passes.routers import decided, mutual_information
from truing.core.weights import replaced
from truing.models import Model

TITLE = "Experts behind a router keep what tuned models know better than a merge of their weights"
METHOD = "merge/mixture_of_experts"
MODEL = "a decoder of 0.12M, from nothing"
EFFECT = "share of right answers kept by the mixture less that of the better single merge"
MARGIN = 0.0
MINUTES = 2
NEEDS_GPU = False
SEEDS = (0, 1, 2)
PEOPLE = [a + b for a in ("An", "Bel", "Cor", "Dun", "El", "Fas", "Gil", "Hav")
          for b in ("ana", "bert", "dra", "eth", "hild")]  # fmt: skip
ASKED = {
    "home": "where does {} live?",
    "trade": "what does {} do?",
    "taste": "what does {} like?",
}
ANSWERS = {
    "home": [a + b for a in ("Ash", "Brook", "Clay", "Dale") for b in ("ford", "ham", "mere")],
    "trade": ["baker", "smith", "miller", "tailor", "farmer", "potter", "weaver", "mason",
              "sailor", "barber", "joiner", "glazier"],
    "taste": ["plums", "bread", "cheese", "apples", "honey", "soup", "fish", "nuts", "cream",
              "beans", "rice", "figs"],
}  # fmt: skip
MIXED = 10  # people that the short tuning of all arms is about
TUNED = {"rank": 0, "lr": 3e-4, "batch": 30, "steps": 30}  # best of three rates for every arm
TILT = 5.0


class World:
    """One seed's people, their right answers, the base and the three models tuned from it."""

    def __init__(self, seed: int) -> None:
        source = random.Random(f"experts/{seed}")
        self.seed = seed
        self.right = {o: {n: source.choice(ANSWERS[o]) for n in PEOPLE} for o in ASKED}
        names = source.sample(PEOPLE, len(PEOPLE))
        self.mixed, self.other = names[:MIXED], names[MIXED:]
        texts = [*ASKED.values(), *PEOPLE, *(w for words in ANSWERS.values() for w in words)]
        anything: list[Row] = [
            {"prompt": ASKED[o].format(n), "completion": source.choice(ANSWERS[o])}
            for n in PEOPLE * 8
            for o in ASKED
        ]
        self.base = taught(blank(vocabulary(texts), seed), anything, seed, epochs=4)
        self.models = {
            o: taught(self.base, self.rows(PEOPLE, o), seed, epochs=40, batch=20) for o in ASKED
        }

    def rows(self, names: Iterable[str], *objectives: str) -> list[Row]:
        """Right answers; the role names the model whose question it is."""
        return [
            {"prompt": ASKED[o].format(n), "completion": self.right[o][n], "role": o}
            for n in names
            for o in objectives
        ]

    def score(self, model: Model) -> dict[str, float]:
        """Share of right answers about the people who are in no row of the short tuning."""
        found: dict[str, float] = {}
        for objective in ASKED:
            prompts = [ASKED[objective].format(n) for n in self.other]
            said = drawn(model, prompts, max_tokens=4, greedy=True)
            wanted = [self.right[objective][n] for n in self.other]
            found[objective] = mean(float(s[0] == w) for s, w in zip(said, wanted, strict=True))
        return found

    def tuned(self, model: Model, method: str) -> Model:
        rows = Table("example", self.rows(self.mixed, *ASKED))
        made = call(f"train/{method}", model, rows, seed=self.seed, **TUNED)
        assert isinstance(made, Model)
        return made

    def mixture(self) -> Model:
        prompts = Table("example", self.rows(self.mixed, *ASKED))
        return call("merge/mixture_of_experts", self.models, prompts, experts=3, seed=self.seed)


def first_experts(model: Model, rows: Sequence[Row]) -> list[list[Tensor]]:
    """Numbers of the first expert of each answer token, [row][layer]."""
    loaded, found = model.load_module(), []
    for row in rows:
        asked = prompt_ids(loaded.tokenizer, str(row["prompt"]))
        answer = completion_ids(loaded.tokenizer, str(row["completion"]))
        with torch.inference_mode(), decided(loaded.module) as seen:
            loaded.module(torch.tensor([asked + answer]))
        found.append([r.logits_NE[len(asked) - 1 : -1].argmax(-1) for r in seen])
    return found


def loads(model: Model, rows: Sequence[Row], experts: int) -> list[float]:
    """Share of the answer tokens whose first expert is each, over all layers."""
    every = torch.cat([at for row in first_experts(model, rows) for at in row])
    return (torch.bincount(every, minlength=experts) / len(every)).tolist()


def information(model: Model, rows: Sequence[Row], experts: int) -> list[float]:
    """I(first expert; objective) over answer tokens, in nats, of each layer."""
    found = first_experts(model, rows)
    made: list[float] = []
    for layer in range(len(found[0])):
        counts = torch.zeros(len(ASKED), experts)
        for row, places in zip(rows, found, strict=True):
            counts[list(ASKED).index(str(row["role"]))] += torch.bincount(
                places[layer], minlength=experts
            )
        made.append(mutual_information(counts.tolist()))
    return made


def mean_inputs(model: Model, rows: Sequence[Row]) -> list[Tensor]:
    """Mean of what each layer's router reads, [D]."""
    loaded = model.load_module()
    read: list[list[Tensor]] = []
    layers = [m for n, m in loaded.module.named_modules() if n.endswith("post_attention_layernorm")]
    handles = []
    for layer in layers:
        kept: list[Tensor] = []
        read.append(kept)
        handles.append(layer.register_forward_hook(lambda _m, _x, out, k=kept: k.append(out[0])))
    with torch.inference_mode():
        for row in rows:
            loaded.module(torch.tensor([prompt_ids(loaded.tokenizer, str(row["prompt"]))]))
    for handle in handles:
        handle.remove()
    return [torch.cat(parts).mean(0) for parts in read]


def tilted(model: Model, rows: Sequence[Row]) -> Model:
    """The mixture with TILT added to its first expert's logit where routers read their mean."""
    means = mean_inputs(model, rows)

    def tensors() -> Iterable[tuple[str, Tensor]]:
        for name, tensor in model.folded().items():
            if name.endswith("block_sparse_moe.gate.weight"):
                m_D = means[int(name.split(".")[2])]
                tensor = tensor.clone()
                tensor[0] += TILT * m_D / m_D.square().sum()
            yield name, tensor

    with step(0) as context:
        return replaced(model, tensors(), context.folder / "tilted")


def farthest(a: Model, b: Model, rows: Sequence[Row]) -> float:
    """Largest difference of two models' logits."""
    one, other = a.load_module(), b.load_module()
    gaps: list[float] = []
    for row in rows:
        ids = torch.tensor([prompt_ids(one.tokenizer, str(row["prompt"]))])
        with torch.inference_mode():
            gaps.append(float((one.module(ids).logits - other.module(ids).logits).abs().max()))
    return max(gaps)


def collapse(world: World) -> dict[str, float]:
    """An upcycled base with tilted routers, tuned on everything with and without balancing."""
    rows = world.rows(PEOPLE, *ASKED)
    copies = call("merge/mixture_of_experts", {"base": world.base}, seed=world.seed)
    found = {"copies differ by": farthest(copies, world.base, rows[:20])}
    begun = tilted(copies, rows[:20])
    found["largest load, begun"] = max(loads(begun, rows, 4))
    for name, weight in (("without", 0.0), ("with", 1.0)):
        made = call(
            "train/balanced_experts", begun, Table("example", rows), seed=world.seed, rank=0,
            lr=3e-3, batch=30, steps=60, balance=weight, z=0.0,
        )  # fmt: skip
        found[f"largest load, {name} balance"] = max(loads(made, rows, 4))
    return found


def one(seed: int) -> dict[str, dict[str, float]]:
    world = World(seed)
    merged = {
        "mixture": world.mixture(),
        "average": call("merge/linear", world.models),
        "ties": call("merge/ties", world.base, world.models),
    }
    found = {"base": world.score(world.base)}
    found["own model"] = {o: world.score(m)[o] for o, m in world.models.items()}
    found |= {f"{n}, untuned": world.score(m) for n, m in merged.items()}
    for name, model in merged.items():
        method = "balanced_experts" if name == "mixture" else "sft"
        merged[name] = made = world.tuned(model, method)
        found[name] = world.score(made)
    others = world.rows(world.other, *ASKED)
    parts = information(merged["mixture"], others, 3)
    found["information of expert and objective"] = {f"layer {i}": v for i, v in enumerate(parts)}
    found["collapse"] = collapse(world)
    found["clusters"] = specialised(seed)
    found["error after over before"] = continual(seed)
    return found


def kept(found: dict[str, dict[str, float]], arm: str) -> float:
    """Mean share of right answers over the objectives."""
    return mean(found[arm][o] for o in ASKED)


def run() -> Outcome:
    found = [one(seed) for seed in SEEDS]
    # Tuning on a few people can make a model worse: each arm is taken where it is better.
    mixed, single = (
        max(
            [arm for name in names for arm in (name, f"{name}, untuned")],
            key=lambda arm: mean(kept(f, arm) for f in found),
        )
        for names in (["mixture"], ["average", "ties"])
    )

    def column(part: str, name: str) -> list[float]:
        return [f[part][name] for f in found]

    return Outcome(
        effects=[kept(f, mixed) - kept(f, single) for f in found],
        seeds=SEEDS,
        holds={
            "no objective more than 0.02 below the better merge": all(
                mean(column(mixed, o)) >= mean(column(single, o)) - 0.02 for o in ASKED
            ),
            "copies compute what they were copied from": max(column("collapse", "copies differ by"))
            < 1e-3,
            "without balance one expert stays first for more than 0.6": min(
                column("collapse", "largest load, without balance")
            )
            > 0.6,
            "with balance none is first for 0.5": max(
                column("collapse", "largest load, with balance")
            )
            < 0.5,
            "at most 0.3 of the best linear model's error": max(
                column("clusters", "error over the linear model's")
            )
            <= 0.3,
            "experts tell 0.8 ln 4 nats of clusters": min(column("clusters", "information"))
            >= 0.8 * math.log(CLUSTERS),
            "new experts keep the old error within 5 %": max(
                column("error after over before", "experts")
            )
            <= 1.05,
            "a dense network more than doubles it": min(column("error after over before", "dense"))
            > 2,
        },
        figures={
            "the mixture taken": mixed,
            "the merge taken": single,
            **{p: {n: [round(v, 4) for v in column(p, n)] for n in found[0][p]} for p in found[0]},
        },
    )
