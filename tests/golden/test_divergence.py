"""Divergence from a reference against transformers' own distributions, answer by answer."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch

from truing.changes import Prefix
from truing.context import Context, use
from truing.core.generate import generate
from truing.core.tiny import tiny_folder
from truing.errors import InputError
from truing.evaluate.divergence import divergence
from truing.models import Loaded, Model
from truing.tables import Table

PROMPTS = Table("prompt", [{"prompt": "Say one."}, {"prompt": "Name a tree, or two."}])
N, TOKENS = 3, 6


@pytest.fixture(scope="module")
def other_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("other") / "model", seed=1)


def logp(loaded: Loaded, head: str, answer: tuple[int, ...]) -> torch.Tensor:
    """Distributions [T, V] that the answer's tokens are drawn from."""
    before = loaded.tokenizer.encode(head)
    with torch.no_grad():
        found = loaded.module(torch.tensor([[*before, *answer]])).logits[0].double()
    return found.log_softmax(-1)[len(before) - 1 : -1]


def asked(prompt: object, system: str = "") -> str:
    start = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return f"{start}<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def by_hand(model: Model, reference: Model, system: str = "") -> tuple[list[float], int]:
    """Mean divergence for each prompt, and the number of tokens drawn."""
    seed = Context(seed=5).stream("answers") % 2**31
    drawn = generate(model, PROMPTS.column("prompt"), n=N, max_tokens=TOKENS, seed=seed)
    sides = model.load_module(), reference.load_module()
    means: list[float] = []
    for row, some in zip(PROMPTS, drawn, strict=True):
        total = 0.0
        for one in some:
            p_TV = logp(sides[0], asked(row["prompt"], system), one.ids)
            q_TV = logp(sides[1], asked(row["prompt"]), one.ids)
            total += float((p_TV.exp() * (p_TV - q_TV)).sum())
        means.append(total / N)
    return means, sum(len(c.ids) for some in drawn for c in some)


def test_it_is_the_sum_over_the_vocabulary_along_own_answers(
    tiny_path: Path, other_path: Path
) -> None:
    model, reference = Model.open(tiny_path), Model.open(other_path)
    means, tokens = by_hand(model, reference)
    with use(Context(seed=5)):
        report = divergence(model, reference, PROMPTS, answers=N, max_tokens=TOKENS)
    assert report.samples is not None
    found = [sum(cast("list[float]", s["divergences"])) / N for s in report.samples]
    assert found == pytest.approx(means, rel=1e-4) and min(found) > 0.1
    assert report.get("divergence").value == pytest.approx(sum(means) / 2, rel=1e-4)
    per_token = sum(means) * N / tokens
    assert report.get("divergence per token").value == pytest.approx(per_token, rel=1e-4)


def test_a_model_is_not_away_from_itself(tiny_path: Path) -> None:
    model = Model.open(tiny_path)
    report = divergence(model, model, PROMPTS, answers=2, max_tokens=TOKENS)
    assert report.get("divergence").value == pytest.approx(0.0, abs=1e-6)


def test_each_model_sees_its_own_prefix(tiny_path: Path) -> None:
    plain = Model.open(tiny_path)
    told = plain.adding(Prefix(({"role": "system", "content": "Be brief."},)))
    means, _ = by_hand(told, plain, "Be brief.")
    with use(Context(seed=5)):
        report = divergence(told, plain, PROMPTS, answers=N, max_tokens=TOKENS)
    assert report.get("divergence").value == pytest.approx(sum(means) / 2, rel=1e-4)
    assert report.get("divergence").value > 1e-3


def test_faults_are_named(tiny_path: Path) -> None:
    model = Model.open(tiny_path)
    with pytest.raises(InputError, match="at least 1"):
        divergence(model, model, PROMPTS, answers=0)
    with pytest.raises(InputError, match="no prompt"):
        divergence(model, model, Table("prompt", []))
