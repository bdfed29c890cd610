"""Deita: pick the rows that are complex, well answered and mutually different.

With c_t the complexity of turn t's query and q_t the quality of its answer, a row's score is

    s = sum_t c_t q_t            (or the mean over turns: the sum favours long dialogues)

Rows are taken in the order of falling score (ties: the earlier row). A row joins the selection
unless its largest cosine similarity to a row already selected exceeds tau; selection ends at m rows
(the paper's "Repr Filter"). What Makes Good Data for Alignment?, arXiv 2312.15685.

Scorers (expected_score, length, perplexity, random) and embedder (sentence, last_state, exact) are
components, to which one's own can be added.

Differences: by default similarity is by sentence vectors instead of a 13B model's last state, whose
cosines cluster near 1 when the model is small (`embedder: {use: last_state}` is the paper's). The
released code also drops a row that resembles an earlier one of its batch even if that one was
itself dropped; here the sequential rule holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from truing.errors import InputError
from truing.method import check_component, get_component, method
from truing.models import Model
from truing.readings import sides_of
from truing.tables import Message, Row, Table, user_text

WHERE = "select/deita"


def row_score(
    complexity: Sequence[float], quality: Sequence[float], *, mean: bool = False
) -> float:
    """Sum (or mean) over turns of complexity times quality."""
    products = [c * q for c, q in zip(complexity, quality, strict=True)]
    return sum(products) / len(products) if mean and products else sum(products)


def repr_filter(
    scores: Sequence[float], vectors_ND: NDArray[np.floating], *, m: int, tau: float
) -> list[int]:
    """Indices of the selected rows, in the order of selection.

    Args:
        scores: one per row; higher is taken first, the earlier row on ties.
        vectors_ND: one vector per row; they are normalised here.
        m: most rows to select.
        tau: a row whose cosine to a selected one is greater is dropped.
    """
    norms = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    unit_ND = (vectors_ND / np.maximum(norms, 1e-12)).astype(np.float32)
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")
    nearest_N = np.full(len(scores), -np.inf, dtype=np.float32)
    chosen: list[int] = []
    for i in order:
        if len(chosen) >= m:
            break
        if nearest_N[i] > tau:
            continue
        chosen.append(int(i))
        nearest_N = np.maximum(nearest_N, unit_ND @ unit_ND[i])
    return chosen


def turns(row: Row) -> list[tuple[str, str]]:
    """(query, answer) of each turn; a turn without a reply has an empty answer."""
    parts = [row.get("prompt"), row.get("completion", row.get("chosen", ""))]
    if "messages" not in row and not any(isinstance(part, list) for part in parts):
        return [(user_text(parts[0]), str(parts[1]))]
    found: list[tuple[str, str]] = []
    for message in dialogue(row):
        if message["role"] == "user":
            found.append((message["content"], ""))
        elif message["role"] == "assistant" and found:
            found[-1] = (found[-1][0], message["content"] or "")  # None beside calls of tools
    return found or [("", "")]


def dialogue(row: Row) -> list[Message]:
    """All that a row says: its own messages, or the prompt's and the (chosen) answer's."""
    if "messages" in row:
        return cast(list[Message], row["messages"])
    asked, answer = row.get("prompt", ""), row.get("completion", row.get("chosen", ()))
    if "completion" not in row and isinstance(answer, list) and "rejected" in row:
        given, (chosen, _) = sides_of(row)
        return [*given, *chosen]
    if isinstance(asked, str):
        asked = [{"role": "user", "content": asked}]
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    return [*cast(list[Message], asked), *cast(list[Message], answer)]


def turn_scores(
    ref: dict[str, object], data: Table, model: Model | None, *, where: str
) -> list[list[float]]:
    """Scores of a scorer, [row][turn]; all turns go to the scorer in one batch."""
    counts = [turns(r) for r in data]
    flat: list[Row] = [
        row | {"prompt": q, "completion": a}
        for row, items in zip(data, counts, strict=True)
        for q, a in items
    ]
    scorer = get_component("scorer", ref, where=where)
    with data.naming([i for i, items in enumerate(counts) for _ in items]):
        values = cast(list[float], scorer(flat, model=model))
    if len(values) != len(flat) or not np.isfinite(values).all():
        raise InputError(
            "a scorer must return one finite number a row", where=where, seen=ref.get("use")
        )
    rest = iter(values)
    return [[float(next(rest)) for _ in items] for items in counts]


def row_vectors(
    ref: dict[str, object], data: Table, model: Model | None, *, where: str
) -> NDArray[np.floating]:
    """Vectors of an embedder [N, D]; rows have their turns as "text", their dialogue "messages"."""
    rows: list[Row] = []
    for row in data:
        text = "\n".join(f"{query}\n{answer}" for query, answer in turns(row))
        rows.append(row | {"text": text, "messages": dialogue(row)})
    with data.naming():
        made = get_component("embedder", ref, where=where)(rows, model=model)
    try:
        vectors_ND = np.asarray(made, dtype=np.float32)
    except (TypeError, ValueError):  # of different widths, or no numbers
        vectors_ND = np.empty(0, np.float32)
    if vectors_ND.ndim != 2 or len(vectors_ND) != len(rows) or not np.isfinite(vectors_ND).all():
        raise InputError(
            "an embedder must return one vector of finite numbers a row",
            where=where,
            seen=f"{ref.get('use')}: shape {vectors_ND.shape} for {len(rows)} rows",
        )
    return vectors_ND


@method(paper="deita", within={"m": (1, None), "tau": (-1, 1)}, makes="data")
def deita(
    data: Table,
    model: Model | None = None,
    *,
    m: int = 6000,
    tau: float = 0.9,
    complexity: dict[str, object] | None = None,
    quality: dict[str, object] | None = None,
    reduce: Literal["sum", "mean"] = "sum",
    embedder: dict[str, object] | None = None,
) -> Table:
    """Pick the rows that are complex, well answered and mutually different.

    Args:
        m: most rows to keep; the paper finds that a few thousand beat more.
        tau: largest cosine similarity to a row already selected.
        complexity: scorer of the query, {use: name, ...}; default expected_score with a model,
            length without one.
        quality: scorer of the answer; default the same.
        reduce: sum over turns as in the paper, or mean, which does not favour long dialogues.
        embedder: what rows are compared by, {use: name, ...}; default sentence, by meaning.
    """
    use = "expected_score" if model is not None else "length"
    complexity = complexity or {"use": use, "of": "complexity" if model is not None else "prompt"}
    quality = quality or {"use": use, "of": "quality" if model is not None else "completion"}
    embedder = embedder or {"use": "sentence"}
    used = {"complexity": complexity, "quality": quality, "embedder": embedder}
    for name, ref in used.items():
        kind = "embedder" if name == "embedder" else "scorer"
        check_component(kind, ref, where=f"{WHERE} {name}")
    c = turn_scores(complexity, data, model, where=f"{WHERE} complexity")
    q = turn_scores(quality, data, model, where=f"{WHERE} quality")
    scores = [row_score(a, b, mean=reduce == "mean") for a, b in zip(c, q, strict=True)]
    vectors_ND = row_vectors(embedder, data, model, where=f"{WHERE} embedder")
    found = repr_filter(scores, vectors_ND, m=m, tau=tau)
    chosen = data.take(found)
    for row, i in zip(chosen, found, strict=True):  # its own rows, not those of `data`
        row |= {"complexity_scores": c[i], "quality_scores": q[i], "final_score": scores[i]}
    return chosen.with_lineage(filter="deita")
