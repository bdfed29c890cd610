"""Rows that are written together fit into so many bytes, and answers do not depend on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig

from truing.core import together
from truing.core.generation import prefix_cache, waves
from truing.core.generation.dialogue_cache import Past
from truing.core.sampling import Sampled, SamplingSettings, next_logps, sample
from truing.core.tiny import tiny_model
from truing.core.trainer.distributed import Processes
from truing.errors import Stopped

MODULE, _ = tiny_model(blocks=6)
PROMPTS = [[5, 6, 7], [33, 4, 90, 12, 11, 10, 9, 8], [9, 41], [5, 6, 7, 8, 9]]
TOKEN = 2 * 6 * 2 * 32 * 4  # keys and values, layers, key heads, head size, float32


def drawn(n: int = 3, **settings: object) -> list[list[Sampled]]:
    chosen = {"max_tokens": 10, "stop_ids": (), "seed": 3, "n": n, **settings}
    return sample(MODULE, PROMPTS, SamplingSettings(**chosen))  # type: ignore[arg-type]


def test_bytes_of_a_token_are_those_of_its_keys_and_values() -> None:
    assert waves.token_bytes(MODULE) == TOKEN
    past = Past([None])
    sample(MODULE, [PROMPTS[1]], SamplingSettings(max_tokens=1, greedy=True), past=past)
    (kept,) = past.rows
    assert kept is not None
    read = [kept.read(layer, 0, 1) for layer in range(kept.layers)]
    assert sum(t.nbytes for pair in read for t in pair) == TOKEN
    other = GPT2LMHeadModel(GPT2Config(n_layer=3, n_head=2, n_embd=8, vocab_size=11))
    assert waves.token_bytes(other.bfloat16()) == 2 * 3 * 8 * 2


def test_what_small_models_ask_for_on_a_cpu_stays_in_one_piece() -> None:
    config = LlamaConfig(  # SmolLM2-135M, the default
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
    )

    class Stub(nn.Linear):
        def __init__(self) -> None:
            super().__init__(1, 1)
            self.config = config

    assert waves.token_bytes(Stub()) == 2 * 30 * 3 * 64 * 4
    assert waves.token_bytes(Stub()) * waves.TOKENS <= waves.BYTES


class OnGpu(nn.Module):
    """Weights that say they are on a GPU, of so many GiB."""

    def __init__(self, gib: int) -> None:
        super().__init__()
        self.gib = gib

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        del recurse
        size = self.gib * 2**30

        class Weight:
            device = torch.device("cuda", 0)

            def numel(self) -> int:
                return size // 2

            def element_size(self) -> int:
                return 2

        return iter([Weight()])


@pytest.mark.parametrize(
    ("memory", "weights", "want"),
    [
        (12, 6, 3), (16, 2, 4), (24, 15, 4.5), (40, 15, 10), (80, 15, 20), (80, 64, 8),
        (80, 56, 12), (80, 90, 0.25), (140, 15, 35),
    ],
)  # fmt: skip
def test_a_larger_gpu_holds_more(
    memory: int, weights: int, want: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for less in (0, 2**27, -(2**27)):  # drivers differ a little, which must not change waves
        monkeypatch.setattr(waves, "memory_of", lambda device, n=less: memory * 2**30 - n)
        assert waves.room(OnGpu(weights)) == want * 2**30
    assert waves.room(MODULE) == waves.BYTES == 2**33  # on the CPU always


def cut(tokens: int, monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int]]]:
    monkeypatch.setattr(waves, "BYTES", tokens * TOKEN)
    with torch.no_grad():  # as sampling asks
        made = list(waves.waves(MODULE, PROMPTS, SamplingSettings(n=3, max_tokens=10)))
    assert sorted(row for wave in made for row in wave) == [
        (i, k) for i in range(len(PROMPTS)) for k in range(3)
    ]
    return made


@pytest.mark.parametrize("tokens", [14, 40, 60, 1000])
def test_a_wave_fits(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt counts once for all of its answers in a wave, filled up to the longest of these."""
    made = cut(tokens, monkeypatch)
    for wave in made:
        inside = {i for i, _ in wave}
        held = 10 * len(wave) + len(inside) * max(len(PROMPTS[i]) for i in inside)
        assert held <= tokens or len(wave) == 1
    assert len(made) == {14: 12, 40: 4, 60: 3, 1000: 1}[tokens]


def test_one_long_prompt_takes_no_room_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored is a rectangle: 40 prompts of 5 tokens beside one of 400 are 41 of 400."""
    prompts = [[7 + k % 50 for k in range(5)]] * 40 + [[9] * 400]
    settings = SamplingSettings(max_tokens=4)
    with torch.no_grad():
        assert len(list(waves.waves(MODULE, prompts, settings))) == 1
        monkeypatch.setattr(waves, "TOKENS", 1000)
        few, one = waves.waves(MODULE, prompts, settings)
    assert len(few) == 40 and one == [(40, 0)]
    rooms = [len(w) * (max(len(prompts[i]) for i, _ in w) + 4) for w in (few, one)]
    assert rooms == [360, 404]


def test_a_row_beyond_the_window_slows_none_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the rows that are longer than a window of attention are written the slower way."""
    monkeypatch.setattr(prefix_cache, "fits", lambda module, longest: longest <= 15)
    with torch.no_grad():
        made = list(waves.waves(MODULE, PROMPTS, SamplingSettings(n=2, max_tokens=10)))
    assert [{i for i, _ in wave} for wave in made] == [{0, 2, 3}, {1}]


def test_rows_that_keep_their_prompts_for_themselves_count_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefix_cache, "fits", lambda module, longest: False)
    for wave in cut(40, monkeypatch):
        width = max(len(PROMPTS[i]) for i, _ in wave) + 10  # filled up to the longest
        assert len(wave) * width <= 40


@pytest.mark.parametrize("padded", [False, True])
def test_answers_do_not_depend_on_the_waves(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if padded:
        monkeypatch.setattr(prefix_cache, "fits", lambda module, longest: False)
    whole, next_whole = drawn(), next_logps(MODULE, PROMPTS)
    seen: list[int] = []
    monkeypatch.setattr(waves, "BYTES", 30 * TOKEN)
    cutting = waves.waves

    def counting(
        module: nn.Module, prompts: Sequence[Sequence[int]], settings: SamplingSettings
    ) -> Iterator[list[tuple[int, int]]]:
        for wave in cutting(module, prompts, settings):
            seen.append(len(wave))
            yield wave

    monkeypatch.setattr("truing.core.sampling.waves", counting)
    small = drawn()
    assert len(seen) > 3
    for a, b in zip((s for row in whole for s in row), (s for r in small for s in r), strict=True):
        assert a.ids == b.ids and a.finish == b.finish
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert torch.allclose(next_logps(MODULE, PROMPTS), next_whole, atol=1e-4)


def test_the_end_of_memory_is_told_in_words_of_who_draws() -> None:
    def full(_: Sequence[object], logits: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words")

    def wrong(_: Sequence[object], logits: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("shapes differ")

    settings = SamplingSettings(max_tokens=2)
    with pytest.raises(Stopped, match="not enough memory") as caught:
        sample(MODULE, PROMPTS, settings, logits=full)
    said = str(caught.value)
    assert "max_tokens" in said and "2.00 GiB" in said and "More words" not in said
    assert "budget" not in said and "batch" not in said
    with pytest.raises(RuntimeError, match="shapes differ"):
        sample(MODULE, PROMPTS, settings, logits=wrong)


def test_another_process_says_so_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(together, "begin", lambda: (Processes(1, 2), None))
    full = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    assert together._say(RuntimeError(full)) == Stopped.exit_code
    said = capsys.readouterr().err
    assert "process 2 of 2: this machine has not enough memory" in said and "Traceback" not in said
    assert together._say(RuntimeError("shapes differ")) == 1
    assert "Traceback" in capsys.readouterr().err
