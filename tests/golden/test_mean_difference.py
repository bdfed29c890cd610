"""Steering by difference of means against activations that transformers itself reports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from truing.context import Context, use
from truing.core.chat import completion_ids, prompt_ids
from truing.core.generate import generate
from truing.core.hooks import load
from truing.core.tiny import tiny_model
from truing.errors import InputError
from truing.method import methods
from truing.models import Edits, Model, Prefix
from truing.steer.mean_difference import mean_difference_vector, middle_layers, scaled
from truing.tables import Message, Row, Table

PAIRS: list[Row] = [
    {"prompt": "one?", "chosen": "yes, yes", "rejected": "never"},
    {"prompt": "two", "chosen": "yes indeed", "rejected": "no, no, no"},
    {"prompt": "and three, is it so?", "chosen": "yes", "rejected": "not at all"},
]


def hidden(layer: int, column: str, lead: Sequence[Message] = ()) -> list[Tensor]:
    """What block `layer` gives to the next, at the answer's words, row by row."""
    module, tokenizer = tiny_model(blocks=6)
    found: list[Tensor] = []
    for row in PAIRS:
        head = prompt_ids(tokenizer, [*lead, {"role": "user", "content": str(row["prompt"])}])
        words = tokenizer(str(row[column]), add_special_tokens=False)["input_ids"]
        assert words == completion_ids(tokenizer, str(row[column]), end=False)
        seen: list[Tensor] = []
        handle = module.model.layers[layer].register_forward_hook(
            lambda _, __, out, seen=seen: seen.append(out)
        )
        with torch.no_grad():
            module(torch.tensor([head + words]))
        handle.remove()
        found.append(seen[0][0, len(head) :])
    return found


def steered(deep_path: Path, folder: Path, **settings: object) -> Model:
    with use(Context(folder=folder)):
        made = methods["mean_difference"](
            Model.open(deep_path), Table("pair", PAIRS), **settings
        )  # fmt: skip
    assert isinstance(made, Model)
    return made


def edits_of(model: Model) -> tuple[Edits, list[object]]:
    (change,) = model.changes
    assert isinstance(change, Edits)
    return change, list(load(change.path))


def test_by_hand() -> None:
    positive = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    negative = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]])
    assert mean_difference_vector(positive, negative).tolist() == [0.0, 3.0]
    vector = torch.tensor([3.0, 4.0])
    assert torch.allclose(scaled(vector, 10.0, 2, True), torch.tensor([3.0, 4.0]))
    assert torch.allclose(scaled(vector, 10.0, 1, True), torch.tensor([6.0, 8.0]))
    assert scaled(vector, 10.0, 2, False) is vector
    assert scaled(torch.zeros(2), 10.0, 2, True).tolist() == [0.0, 0.0]
    assert middle_layers(30) == (9, 10, 11, 12, 13)
    assert middle_layers(6) == (1, 2) and middle_layers(1) == (0,)


@pytest.mark.parametrize("tokens", ["answer", "last"])
def test_vectors_are_differences_of_means(deep_path: Path, tmp_path: Path, tokens: str) -> None:
    made = steered(deep_path, tmp_path, layers=(2, 4), tokens=tokens, unit=False, strength=0.8)
    change, edits = edits_of(made)
    assert change.strength == 0.8
    assert [e.site for e in edits] == ["layers.2.residual", "layers.4.residual"]
    for layer, e in zip((2, 4), edits, strict=True):
        means: list[Tensor] = []
        for column in ("chosen", "rejected"):
            rows = [h.mean(0) if tokens == "answer" else h[-1] for h in hidden(layer, column)]
            means.append(torch.stack(rows).mean(0))
        assert torch.allclose(e.vector_D, means[0] - means[1], atol=1e-5)
        assert e.op == "add" and e.skip_first and e.strength == 1.0


def test_answers_are_read_as_the_model_is_asked(deep_path: Path, tmp_path: Path) -> None:
    lead: list[Message] = [{"role": "system", "content": "Say no."}]
    told = Model.open(deep_path).adding(Prefix(lead))
    with use(Context(folder=tmp_path)):
        made = methods["mean_difference"](told, Table("pair", PAIRS), layers=(2,), unit=False)
    assert isinstance(made, Model)
    (change,) = [c for c in made.changes if isinstance(c, Edits)]
    (e,) = load(change.path)
    means: list[Tensor] = []
    for column in ("chosen", "rejected"):
        rows = [h.mean(0) for h in hidden(2, column, lead)]
        means.append(torch.stack(rows).mean(0))
    assert torch.allclose(e.vector_D, means[0] - means[1], atol=1e-5)


def test_strength_is_in_lengths_of_the_residual_stream(deep_path: Path, tmp_path: Path) -> None:
    _, edits = edits_of(steered(deep_path, tmp_path, layers=(1, 3, 4)))
    for layer, e in zip((1, 3, 4), edits, strict=True):
        rows = [h.mean(0) for c in ("chosen", "rejected") for h in hidden(layer, c)]
        norm = float(torch.stack(rows).norm(dim=1).mean())
        assert float(e.vector_D.norm()) == pytest.approx(norm / 3, rel=1e-4)


def test_the_model_moves_towards_the_chosen_answers(deep_path: Path, tmp_path: Path) -> None:
    """Projected on the direction, every answer's state lies further along it than before."""
    plain = Model.open(deep_path).load_module()
    made = steered(deep_path, tmp_path, layers=(2,), strength=0.5)
    _, (e,) = edits_of(made)
    unit = e.vector_D / e.vector_D.norm()
    ids = torch.tensor([prompt_ids(plain.tokenizer, "one?")])
    seen: list[Tensor] = []
    handle = plain.module.model.layers[3].register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0][0] @ unit)
    )
    with torch.no_grad():
        plain.module(ids)
        with made.load_module().run_time():
            plain.module(ids)
    handle.remove()
    moved = seen[1] - seen[0]
    assert moved[0] == 0  # the first token is left alone
    assert torch.allclose(moved[1:], 0.5 * e.vector_D.norm().expand(len(moved) - 1), atol=1e-4)


def test_pairs_with_an_empty_answer_are_left_out_and_counted(
    deep_path: Path, tmp_path: Path
) -> None:
    more: list[Row] = [*PAIRS, {"prompt": "hello", "chosen": "", "rejected": "bye"}]
    with use(Context(folder=tmp_path)) as context:
        made = methods["mean_difference"](Model.open(deep_path), Table("pair", more))
    assert isinstance(made, Model)
    assert [m["left_out_empty"] for m in context.metrics if "left_out_empty" in m] == [1]
    plain = steered(deep_path, tmp_path / "plain")
    pairs = zip(edits_of(made)[1], edits_of(plain)[1], strict=True)
    assert all(torch.equal(a.vector_D, b.vector_D) for a, b in pairs)  # type: ignore[attr-defined]


def test_saved_with_the_model(deep_path: Path, tmp_path: Path) -> None:
    made = steered(deep_path, tmp_path / "step", strength=2.0)
    made.save(tmp_path / "out")
    again = Model.open(tmp_path / "out")
    assert again.key == made.key
    answers = generate(made, ["hello"], max_tokens=8)
    assert generate(again, ["hello"], max_tokens=8) == answers
    assert generate(Model.open(deep_path), ["hello"], max_tokens=8) != answers
    assert steered(deep_path, tmp_path / "step").weights_key == made.weights_key


def test_mistakes_are_named(deep_path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="6 layers"):
        steered(deep_path, tmp_path, layers=(6,))
    empty: list[Row] = [{"prompt": "a", "chosen": "b", "rejected": " "}]
    with pytest.raises(InputError, match="no pair with two answers"):
        methods["mean_difference"](Model.open(deep_path), Table("pair", empty))
    one: list[Row] = [{"prompt": "a", "completion": "b"}]
    with pytest.raises(InputError, match="pair"):
        methods["mean_difference"](Model.open(deep_path), Table("example", one))
