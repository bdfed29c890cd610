"""How a mixture of experts routes: its experts' loads, how sure its routers are, what has no room.

    load_i        share of the tokens' choices that expert i has (every token chooses k)
    load CV       standard deviation of the loads over their mean: 0 is even, sqrt(E / k - 1) the
                  collapse onto k experts
    entropy       mean over tokens of -sum_i p_i log p_i, in nats: log E is a router that is unsure
                  (p as in `core.passes.routers`, by the router's gate)
    dropped       share of the choices for which a capacity would have no room
    information   I(first expert; domain) of the rows' domains, in nats: 0 says that experts do not
                  divide the domains among them, log of their number that they do

Each is the mean over the layers; the samples hold every layer's own, with the load of each expert,
and of each expert in each domain. A capacity lets ceil(capacity n k / E) of the n tokens of a row
choose an expert, earlier ones first; nothing is dropped here, it is only counted. Rows are prompts,
examples or texts, all of whose tokens are read; the optional column `domain` names their domain.
Intervals are bootstraps over rows; of loads and information, which chance raises, basic ones.

Source: the measures of "A Comprehensive Survey of Mixture-of-Experts", arXiv 2503.07137; capacity,
arXiv 2101.03961, here by row as in `core.passes.routers`.

Shapes: R rows, L layers, N tokens, k choices, E experts, D domains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray

from truing.context import Json, current
from truing.core.chat import Message, Prompt, completion_ids, example_ids, prompt_ids
from truing.core.logprob import check, states
from truing.core.passes.routers import (
    counted,
    decided,
    mutual_information,
    routers,
    softened,
    with_room,
)
from truing.core.stats import ratio_bootstrap, reflected, resampled
from truing.core.tree import BUDGET, example_tree, pack
from truing.errors import InputError
from truing.method import method
from truing.models import Loaded, Model
from truing.reports import Measure, Report
from truing.tables import Row, Table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WHERE = "evaluate/router_report"
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Counts:
    """What was counted of each row, as float64.

    Args:
        chosen_RLE: choices that fell on each expert.
        first_RLE: first choices.
        dropped_RL: choices without room.
        entropy_RL: sum over the tokens.
        tokens_R: number of tokens.
    """

    chosen_RLE: Numbers
    first_RLE: Numbers
    dropped_RL: Numbers
    entropy_RL: Numbers
    tokens_R: Numbers


def variation(chosen_LE: Numbers) -> float:
    """Standard deviation of the experts' loads over their mean, mean over layers."""
    return float((chosen_LE.std(-1) / chosen_LE.mean(-1)).mean())


def largest(chosen_LE: Numbers) -> float:
    """Largest load of an expert, mean over layers."""
    return float((chosen_LE.max(-1) / chosen_LE.sum(-1)).mean())


def information(first_DLE: Numbers) -> float:
    """I(expert; domain), mean over layers."""
    layers = cast("list[list[list[float]]]", first_DLE.swapaxes(0, 1).tolist())
    return sum(map(mutual_information, layers)) / len(layers)


def interval(
    counts_RX: Numbers, value: Callable[[Numbers], float], *cut: float
) -> tuple[float, float]:
    """Interval, cut at (least, most), of `value` of the sum over rows of `counts_RX`."""

    def again(at: NDArray[np.int64]) -> float:
        weight_R = np.bincount(at, minlength=len(counts_RX)).astype(np.float64)
        return value(cast(Numbers, np.tensordot(weight_R, counts_RX, 1)))

    return reflected(value(counts_RX.sum(0)), resampled(again, len(counts_RX)), *cut)


def row_ids(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[int]:
    """Tokens of a row: of its text, of its dialogue, or of its prompt and answer."""
    if "text" in row:
        return cast("list[int]", tokenizer(str(row["text"]))["input_ids"])
    if "prompt" not in row:
        messages = cast("list[Message]", row["messages"])
        ends = messages[-1].get("role") == "assistant"
        return example_ids(tokenizer, messages)[0] if ends else prompt_ids(tokenizer, messages)
    ids = prompt_ids(tokenizer, cast(Prompt, row["prompt"]))
    answer = row.get("completion")
    return ids + completion_ids(tokenizer, answer) if isinstance(answer, str) else ids


def count(loaded: Loaded, rows: Sequence[Sequence[int]], capacity: float) -> Counts:
    """Read the rows, each by itself, and count what the routers decide."""
    check(loaded.module)  # now, since that passes through the routers too
    found: list[list[torch.Tensor]] = [[], [], [], []]
    trees = [example_tree(ids, [True] * len(ids)) for ids in rows]
    done = 0
    for packed in pack(trees, BUDGET):
        with torch.inference_mode(), loaded.run_time(), decided(loaded.module) as seen:
            states(loaded.module, packed.to(loaded.device))
        size_R = torch.tensor([s.stop - s.start for s in packed.segments])
        row_N = torch.arange(len(size_R)).repeat_interleave(size_R)
        sums: list[list[torch.Tensor]] = [[], [], [], []]
        for routed in seen:
            z_NE, index_Nk = routed.logits_NE.double().cpu(), routed.index_Nk.cpu()
            logp_NE, experts = softened(z_NE, routed.gate).log_softmax(-1), z_NE.shape[1]
            full_Nk = torch.zeros_like(index_Nk, dtype=torch.bool)
            if capacity:
                full_Nk = ~with_room(index_Nk, row_N, experts, capacity)
            values = (
                counted(index_Nk, experts),
                counted(index_Nk[:, :1], experts),
                full_Nk.sum(1),
                -(logp_NE.exp() * logp_NE).sum(1),
            )
            for each, value in zip(sums, values, strict=True):
                whole = torch.zeros((len(size_R), *value.shape[1:]), dtype=torch.float64)
                each.append(whole.index_add_(0, row_N, value.double()))
        for all_rows, layers in zip(found, sums, strict=True):
            all_rows.append(torch.stack(layers, 1))
        done += len(size_R)
        current().progress(done, len(rows), "rows")
    tokens_R = np.array([len(ids) for ids in rows], dtype=np.float64)
    chosen, first, dropped, entropy = (cast(Numbers, torch.cat(p).numpy()) for p in found)
    return Counts(chosen, first, dropped, entropy, tokens_R)


def domains_of(data: Table) -> list[str]:
    """Domain of each row; [] where no row has one."""
    found = [row.get("domain") for row in data]
    found = [str(f) if isinstance(f, (int, float)) else f for f in found]  # as .csv has them
    if not any(f is not None for f in found):
        return []
    for i, name in enumerate(found):
        if not isinstance(name, str):
            raise InputError(
                "column 'domain' must be text, in every row or in none",
                where=f"{WHERE} {data.place(i)}",
                seen=name,
            )
    return [str(name) for name in found]


def layer_rows(c: Counts, domains: Sequence[str]) -> list[Row]:
    """What was found in each layer."""
    rows: list[Row] = []
    names = sorted(set(domains))
    for i in range(c.chosen_RLE.shape[1]):
        chosen_RE = c.chosen_RLE[:, i]
        load_E = chosen_RE.sum(0)
        row: Row = {
            "layer": i,
            "load": (load_E / load_E.sum()).tolist(),
            "load_cv": variation(load_E[None]),
            "entropy": float(c.entropy_RL[:, i].sum() / c.tokens_R.sum()),
            "dropped": float(c.dropped_RL[:, i].sum() / load_E.sum()),
        }
        for name in names:
            own_E = chosen_RE[[d == name for d in domains]].sum(0)
            row[f"load in {name}"] = (own_E / own_E.sum()).tolist()
        rows.append(row)
    return rows


@method(
    paper="moe-survey",
    needs=("hidden",),
    rows={"data": ("prompt", "example", "text")},
    within={"capacity": (0, None), "max_length": (1, None)},
)
def router_report(
    model: Model, data: Table, *, capacity: float = 1.25, max_length: int = 256
) -> Report:
    """How a mixture of experts routes: loads, entropy, what a capacity would drop.

    Args:
        capacity: how many tokens of a row an expert would take, over its even share; 0 for any.
        max_length: tokens of each row that are read.
    """
    items = data.expect("prompt", "example", "text", where=WHERE)
    if not len(items) or capacity < 0 or max_length < 1:
        raise InputError(
            "needs a row, a capacity that is not negative, and a token to read",
            where=WHERE,
            seen={"rows": len(items), "capacity": capacity, "max_length": max_length},
        )
    domains = domains_of(items)
    loaded = model.load_module()
    routers(loaded.module, WHERE)
    ids = [row_ids(loaded.tokenizer, row)[:max_length] for row in items]
    if not all(ids):
        place = next(i for i, some in enumerate(ids) if not some)
        raise InputError("the row has no token", where=f"{WHERE} {items.place(place)}")
    c = count(loaded, ids, capacity)
    choices_R, layers, n = c.chosen_RLE.sum((1, 2)), c.chosen_RLE.shape[1], len(items)
    whole_LE = c.chosen_RLE.sum(0)

    def ratio(name: str, top_R: Numbers, bottom_R: Numbers, unit: str, better: str) -> Measure:
        spread = ratio_bootstrap(top_R.tolist(), bottom_R.tolist())
        value = float(top_R.sum() / bottom_R.sum())
        return Measure(name, value, *spread, n, unit, "", better)

    by_load = [("largest load", largest, "share", 1 / whole_LE.shape[1], 1.0)]
    by_load.append(("load CV", variation, "", 0.0, float("inf")))
    measures = [
        Measure(name, value(whole_LE), *interval(c.chosen_RLE, value, *cut), n, unit, "", "lower")
        for name, value, unit, *cut in by_load
    ]
    measures.append(ratio("router entropy", c.entropy_RL.sum(1), layers * c.tokens_R, "nats", ""))
    if capacity:
        measures.append(ratio("dropped", c.dropped_RL.sum(1), choices_R, "share", "lower"))
    if len(set(domains)) > 1:
        own_RD = np.array([[d == name for name in sorted(set(domains))] for d in domains])
        first_RDLE = own_RD[:, :, None, None] * c.first_RLE[:, None]
        known, spread = information(first_RDLE.sum(0)), interval(first_RDLE, information)
        measures.append(Measure("information", known, *spread, n, "nats", "", ""))
    meta: dict[str, Json] = {
        "kind": "routers",
        "model": model.name,
        "experts": whole_LE.shape[1],
        "layers": layers,
        "capacity": capacity,
        "tokens": int(c.tokens_R.sum()),
    }
    samples = Table("record", layer_rows(c, domains), where=WHERE)
    return Report("routing of experts", measures, samples, meta)
