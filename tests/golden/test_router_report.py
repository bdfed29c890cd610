"""The router report against counts made by hand from transformers' own router logits."""

from __future__ import annotations

import math
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from test_mixture_of_experts import room_by_hand

from truing.core.chat import completion_ids, prompt_ids
from truing.errors import InputError
from truing.evaluate.router_report import (
    information,
    interval,
    largest,
    router_report,
    variation,
)
from truing.merge.mixture_of_experts import mixture_of_experts
from truing.models import Model
from truing.reports import Report
from truing.tables import Row, Table

ROWS: list[Row] = [
    {"prompt": "say oak", "completion": "oak, oak", "domain": "trees"},
    {"prompt": "2 + 2 = 4, 3 + 3 =", "completion": "6", "domain": "sums"},
    {"prompt": "name a fern", "completion": "moss is none", "domain": "trees"},
    {"prompt": "19 * 7", "completion": "133", "domain": "sums"},
]
LAYERS, EXPERTS = 3, 4


@pytest.fixture(scope="module")
def sparse(tiny_path: Path) -> Model:
    return mixture_of_experts({"base": Model.open(tiny_path)})


def numbers(report: Report) -> dict[str, float]:
    return {m.name: m.value for m in report}


def test_every_measure_by_hand(sparse: Model) -> None:
    report = router_report(sparse, Table("example", ROWS), capacity=0.75)
    loaded = sparse.load_module()
    chosen = [Counter[int]() for _ in range(LAYERS)]
    first = [Counter[tuple[str, int]]() for _ in range(LAYERS)]
    entropy, lost, tokens = [0.0] * LAYERS, [0] * LAYERS, 0
    for row in ROWS:
        ids = prompt_ids(loaded.tokenizer, str(row["prompt"]))
        ids += completion_ids(loaded.tokenizer, str(row["completion"]))
        tokens += len(ids)
        with torch.no_grad():
            found = loaded.module(torch.tensor([ids]), output_router_logits=True).router_logits
        for i, z_TE in enumerate(found):
            p_TE = z_TE.double().softmax(-1)
            entropy[i] -= float((p_TE * p_TE.log()).sum())
            index = p_TE.topk(2).indices.tolist()
            chosen[i].update(e for token in index for e in token)
            first[i].update((str(row["domain"]), token[0]) for token in index)
            lost[i] += sum(not ok for token in room_by_hand(index, EXPERTS, 0.75) for ok in token)
    loads = [[c[e] / (2 * tokens) for e in range(EXPERTS)] for c in chosen]
    assert report.samples is not None
    for i, sample in enumerate(report.samples):
        assert sample["layer"] == i and sample["load"] == pytest.approx(loads[i])
        assert sample["entropy"] == pytest.approx(entropy[i] / tokens, rel=1e-4)
        assert sample["dropped"] == pytest.approx(lost[i] / (2 * tokens))
        sums = cast("list[float]", sample["load in sums"])
        assert sum(sums) == pytest.approx(1.0) and sums != pytest.approx(loads[i])
    seen = numbers(report)
    assert seen["largest load"] == pytest.approx(sum(map(max, loads)) / LAYERS)
    spread = [math.sqrt(sum((x - 0.25) ** 2 for x in load) / 4) / 0.25 for load in loads]
    assert seen["load CV"] == pytest.approx(sum(spread) / LAYERS)
    assert seen["router entropy"] == pytest.approx(sum(entropy) / tokens / LAYERS, rel=1e-4)
    assert seen["dropped"] == pytest.approx(sum(lost) / (2 * tokens * LAYERS)) and sum(lost) > 0
    known = 0.0
    for counts in first:
        for (domain, e), n in counts.items():
            of_domain = sum(v for (d, _), v in counts.items() if d == domain)
            of_expert = sum(v for (_, x), v in counts.items() if x == e)
            known += n / tokens * math.log(n * tokens / (of_domain * of_expert)) / LAYERS
    assert seen["information"] == pytest.approx(known, rel=1e-6) and known > 0
    assert report.meta["tokens"] == tokens and report.meta["experts"] == EXPERTS
    assert all(m.lo < m.hi and m.n == 4 for m in report)


def test_what_is_not_asked_is_not_told(sparse: Model) -> None:
    plain = Table("prompt", [{"prompt": "say oak"}, {"prompt": "say fern"}])
    names = {"largest load", "load CV", "router entropy"}
    assert set(numbers(router_report(sparse, plain, capacity=0.0))) == names
    assert numbers(router_report(sparse, plain, capacity=2.0))["dropped"] == 0.0
    texts = Table("text", [{"text": "oak and fern", "domain": "a"}, {"text": "x", "domain": "a"}])
    report = router_report(sparse, texts, max_length=5)
    assert report.meta["tokens"] == 6 and set(numbers(report)) == {*names, "dropped"}
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    whole = router_report(sparse, Table("example", [{"messages": talk}]))
    same = router_report(sparse, Table("example", [{"prompt": "Hi", "completion": "Yes?"}]))
    assert numbers(whole) == pytest.approx(numbers(same)) and whole.meta == same.meta


def test_information_of_domains_that_have_experts_of_their_own() -> None:
    counts = torch.zeros(2, 3, 2)
    counts[0, :, 0], counts[1, :, 1] = 5.0, 5.0
    assert information(counts.numpy()) == pytest.approx(math.log(2))
    assert information(torch.ones(2, 3, 2).numpy()) == pytest.approx(0.0, abs=1e-9)
    # Rows that are alike leave nothing to chance.
    rows = torch.tensor([[2.0, 6.0]] * 5).double().numpy()
    assert interval(rows, lambda x: float(x[0] / x.sum())) == pytest.approx((0.25, 0.25))


def test_chance_alone_ties_no_domain_to_an_expert() -> None:
    source = np.random.default_rng(1)
    none = 0
    for _ in range(3):
        domain_R = np.eye(4)[source.integers(0, 4, 20)]
        first_RLE = source.multinomial(12, [1 / 8] * 8, (20, 1)).astype(float)
        first_RDLE = domain_R[:, :, None, None] * first_RLE[:, None]
        lo, hi = interval(first_RDLE, information)
        assert lo <= information(first_RDLE.sum(0)) <= hi
        none += lo == 0
        for value, least in ((variation, 0.0), (largest, 1 / 8)):
            lo, hi = interval(first_RLE, value, least)
            assert least <= lo <= value(first_RLE.sum(0)) <= hi
    assert none >= 2


def test_an_interval_of_many_rows_holds_no_resamples() -> None:
    counts = np.random.default_rng(0).random((4_000, 1, 4))
    tracemalloc.start()
    interval(counts, variation)
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_mistakes(sparse: Model, tiny_path: Path) -> None:
    some = Table("prompt", [{"prompt": "a", "domain": "x"}, {"prompt": "b"}])
    with pytest.raises(InputError, match="row 2"):
        router_report(sparse, some)
    with pytest.raises(InputError, match="no mixture"):
        router_report(Model.open(tiny_path), Table("prompt", [{"prompt": "a"}]))
    for rows, more in (([], {}), ([{"prompt": "a"}], {"capacity": -1.0})):
        with pytest.raises(InputError, match="needs a row"):
            router_report(sparse, Table("prompt", rows), **more)
    with pytest.raises(InputError, match="no token"):
        router_report(sparse, Table("text", [{"text": ""}]))
