"""MAH-DPO by hand, its equalities, and heads that are blended at inference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from objective_numbers import D, pairs, softminus, total
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from truing.changes import Weights
from truing.context import Context, use
from truing.core.batch.parts import Part
from truing.core.logprob import measure
from truing.core.passes.vocab_heads import VocabHeads, heads_of
from truing.core.trainer.text_task import TextTask
from truing.core.tree import group_tree, pack
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.tables import Table
from truing.train.preference.dpo import dpo
from truing.train.preference.mah_dpo import mah_dpo


def test_by_hand() -> None:
    made = mah_dpo(pairs(objective=[0.0, 1.0, 0.0]), beta=0.3)
    each = [softminus(0.3 * d) for d in D]
    assert total(made) == pytest.approx(((each[0] + each[2]) / 2 + each[1]) / 2, rel=1e-5)


def test_one_objective_is_dpo_and_more_rows_of_one_weigh_no_more() -> None:
    one = mah_dpo(pairs(objective=[0.0] * 3), beta=0.3, objectives=1)
    assert total(one) == pytest.approx(total(dpo(pairs(), beta=0.3)), rel=1e-6)
    m = pairs(objective=[0.0, 1.0, 0.0])
    at = [0, 1, 2, 0, 2]
    more = type(m)(
        m.mask_UKT[at], {n: t[at] for n, t in m.tensors.items()}, {"objective": m["objective"][at]}
    )
    assert total(mah_dpo(more)) == pytest.approx(total(mah_dpo(m)), rel=1e-6)
    for wrong in ([0.0, 2.0, 0.0], [0.5, 0.0, 0.0]):
        with pytest.raises(InputError, match="whole number from 0 to 1"):
            mah_dpo(pairs(objective=wrong))


def test_heads_begin_as_the_models_own_and_learn_from_their_own_rows() -> None:
    heads = VocabHeads(3, 8, 2)
    rows, which = torch.randn(5, 8), torch.tensor([0.0, 2, 0, 2, 2])
    assert torch.equal(heads(rows, which), rows)
    with torch.no_grad():
        heads.up.normal_()
    made = heads(rows, which)
    want = rows[1] + heads.up[2] @ (heads.down[2] @ rows[1])
    assert torch.allclose(made[1], want, atol=1e-6)
    made.square().sum().backward()
    assert heads.up.grad is not None and heads.up.grad[1].abs().sum() == 0
    assert heads.up.grad[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("numbers", "objectives"), [([None, None], 2), ([0, 0], 2), ([0, 1], 3), ([0, 2], 2)]
)
def test_a_head_without_rows_or_rows_without_a_head_are_refused(
    tiny_path: Path, numbers: list[int | None], objectives: int
) -> None:
    rows = [
        {"prompt": "say", "chosen": f"a {i}", "rejected": "b"}
        | ({} if n is None else {"objective": n})
        for i, n in enumerate(numbers)
    ]
    with pytest.raises(InputError, match=r"setting 'objectives' asks for \d heads"):
        methods["mah_dpo"](Model.open(tiny_path), Table("pair", rows), objectives=objectives)


def test_an_objective_whose_rows_are_all_left_out_is_named(tiny_path: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": "say" * (1 + 40 * i), "chosen": "yes", "rejected": "no", "objective": i}
        for i in range(2)
    ]
    with use(Context(folder=tmp_path)), pytest.raises(InputError, match="objective 1 is left"):
        methods["mah_dpo"](Model.open(tiny_path), Table("pair", rows), steps=1, max_length=100)


def test_a_step_without_a_row_of_each_is_refused(tiny_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": f"a{i}", "rejected": "b", "objective": i} for i in range(3)]
    with pytest.raises(InputError, match="setting 'batch' must be at least that of 'objectives'"):
        methods["mah_dpo"](Model.open(tiny_path), Table("pair", rows), objectives=3, batch=2)


def test_batches_are_balanced_and_weigh_objectives_alike(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight pairs of one objective and four of another: every step has two of each."""
    steps: list[list[float]] = []
    parts = TextTask.parts

    def listening(task: TextTask, rows: Sequence[int], step: int) -> Iterator[Part]:
        steps.append([float(str(task.units[r].numbers["objective"])) for r in rows])
        return parts(task, rows, step)

    monkeypatch.setattr(TextTask, "parts", listening)
    rows = [
        {"prompt": f"say {i}", "chosen": "yes", "rejected": "no", "objective": int(i > 7)}
        for i in range(12)
    ]
    with use(Context(folder=tmp_path)) as context:
        methods["mah_dpo"](Model.open(tiny_path), Table("pair", rows), batch=4, epochs=1.1)
    # 13 rows of 12 are three steps of four and a last one, which has one of each.
    assert [sorted(s) for s in steps] == [[0, 0, 1, 1]] * 3 + [[0, 1]]
    first = next(float(str(m["loss"])) for m in context.metrics if "loss" in m)
    assert first == pytest.approx(math.log(2), rel=1e-4)  # 1/H of it where one were missing


def test_heads_are_not_trained_anew(tiny_path: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "say", "chosen": "yes!", "rejected": "no", "objective": i} for i in range(2)]
    with use(Context(folder=tmp_path)):
        made = methods["mah_dpo"](Model.open(tiny_path), Table("pair", rows), steps=1)
        assert isinstance(made, Model)
        with pytest.raises(InputError, match="has such heads already"):
            methods["mah_dpo"](made, Table("pair", rows), steps=1)


@pytest.fixture(scope="module")
def two_heads(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    words = "lime oak rain stone river cloud".split()
    rows = [
        {"prompt": f"say {w}", "chosen": w + "!?"[i % 2], "rejected": w + "?!"[i % 2],
         "objective": i % 2}
        for i, w in enumerate(words)
    ]  # fmt: skip
    with use(Context(folder=tmp_path_factory.mktemp("heads"))):
        made = methods["mah_dpo"](
            Model.open(tiny_path), Table("pair", rows), steps=8, lr=3e-3, head_rank=4
        )
    assert isinstance(made, Model)
    return made


@pytest.fixture
def blend(tmp_path: Path) -> Callable[..., Model]:
    def make(model: Model, *weights: float) -> Model:
        with use(Context(folder=tmp_path / "blends")):
            made = methods["blend_heads"](model, weights=list(weights))
        assert isinstance(made, Model)
        return made

    return make


def test_heads_outlive_a_training_of_all_weights(two_heads: Model, tmp_path: Path) -> None:
    rows = Table("pair", [{"prompt": "say", "chosen": "yes", "rejected": "no"}])
    with use(Context(folder=tmp_path)):
        made = methods["dpo"](two_heads, rows, rank=0, steps=1, lr=1e-3, dtype="float32")
    assert isinstance(made, Model)
    kept = zip(heads_of(made, "test"), heads_of(two_heads, "test"), strict=True)
    assert all(torch.equal(new, old) for new, old in kept)


IDS = [[5, 6, 7, 8]]


def logits(model: Model) -> torch.Tensor:
    with torch.no_grad():
        return model.load_module().module(torch.tensor(IDS)).logits[0]


def test_blends_are_linear_in_the_logits(
    two_heads: Model, blend: Callable[..., Model], tmp_path: Path
) -> None:
    up, down = heads_of(two_heads, "test")
    assert up.shape == (2, 128, 4) and up[0].abs().sum() > 0 and up[1].abs().sum() > 0
    first, second = (logits(blend(two_heads, *w)) for w in ([1, 0], [0, 1]))
    mixed = blend(two_heads, 1.5, 0.5)
    assert torch.allclose(logits(mixed), 0.75 * first + 0.25 * second, atol=1e-3)
    assert not torch.allclose(first, second, atol=1e-2)
    # One head alone is what training measured.
    packed = pack([group_tree([5, 6], [[7, 8]])])[0]
    module, heads = two_heads.load_module().module, VocabHeads(2, 128, 4)
    with torch.no_grad():
        heads.up.copy_(up)
        heads.down.copy_(down)
    zero = torch.zeros(2)
    trained = measure(module, packed, grad=False, change=lambda r: heads(r, zero))["logp"]
    want = first.log_softmax(-1)[[1, 2], [7, 8]]
    assert torch.allclose(trained[0, 0], want, atol=1e-4)
    for wrong in ([1.0], [-1.0, 2.0], [0.0, 0.0]):
        with pytest.raises(InputError, match=r"heads|weights"):
            blend(two_heads, *wrong)


def test_a_blend_is_a_change_of_two_numbers(
    two_heads: Model, blend: Callable[..., Model], tmp_path: Path
) -> None:
    mixed = blend(two_heads, 0.75, 0.25)
    assert mixed.base is two_heads.base and mixed.changes[:-1] == two_heads.changes
    files = [p for p in (tmp_path / "blends").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 200
    # By hand: the tied head's own weights, and those of the two heads.
    up, down = heads_of(two_heads, "test")
    made, before = mixed.folded(), two_heads.folded()
    embed = before["model.embed_tokens.weight"]
    eye = torch.eye(128)
    want = embed @ (0.75 * (eye + up[0] @ down[0]) + 0.25 * (eye + up[1] @ down[1]))
    assert torch.allclose(made["lm_head.weight"], want, atol=1e-5)
    assert torch.equal(made["model.embed_tokens.weight"], embed) and not made.extra
    assert made.shape("lm_head.weight") == (259, 128) and made.untied and not before.untied
    again = Model.load(mixed.save(tmp_path / "saved"))
    assert again.key == mixed.key and torch.equal(logits(again), logits(mixed))
    # Weights are chosen anew on what has been chosen, saved or not.
    for source in (mixed, again):
        other = blend(source, 0.0, 1.0)
        assert len(other.changes) == len(mixed.changes)
        assert torch.equal(logits(other), logits(blend(two_heads, 0.0, 1.0)))
    assert blend(mixed, 1.0, 3.0).name == f"{two_heads.name}+blend(0.25, 0.75)"
    with pytest.raises(InputError, match="no heads"):
        blend(Model.open(two_heads.folder), 1.0)


def test_an_untied_head_stands_apart_from_later_changes_of_the_embeddings(
    two_heads: Model, blend: Callable[..., Model], tmp_path: Path
) -> None:
    mixed, name = blend(two_heads, 0.5, 0.5), "model.embed_tokens.weight"
    save_file({name: torch.zeros(259, 128)}, tmp_path / "zeros.safetensors")
    later = mixed.adding(Weights(tmp_path / "zeros.safetensors")).folded()
    assert torch.equal(later["lm_head.weight"], mixed.folded()["lm_head.weight"])
    assert later[name].abs().sum() == 0
    own = 0.5 * torch.ones(259, 128)
    save_file({"lm_head.weight": own}, tmp_path / "own.safetensors")
    # A head of its own is laid over a tied one as well as over a blended one.
    for model in (Model.open(two_heads.folder), mixed):
        made = model.adding(Weights(tmp_path / "own.safetensors"))
        assert made.folded().untied and torch.equal(made.folded()["lm_head.weight"], own)
        assert torch.equal(made.folded()[name], model.folded()[name])
        assert made.load_module().module.lm_head.weight[3, 4] == 0.5


def test_a_blend_becomes_a_plain_folder(
    two_heads: Model, blend: Callable[..., Model], tmp_path: Path
) -> None:
    mixed = blend(two_heads, 0.5, 0.5)
    module, facts = AutoModelForCausalLM.from_pretrained(
        mixed.export(tmp_path / "plain"), output_loading_info=True
    )
    assert not facts["missing_keys"] and not facts["unexpected_keys"]
    assert not module.config.tie_word_embeddings
    with torch.no_grad():
        assert torch.equal(module(torch.tensor(IDS)).logits[0], logits(mixed))


@pytest.mark.parametrize("rank", [0, 4])
def test_a_blend_is_trained_and_merged_further(
    two_heads: Model, blend: Callable[..., Model], tmp_path: Path, rank: int
) -> None:
    mixed = blend(two_heads, 0.5, 0.5)
    rows = Table("example", [{"prompt": "say", "completion": "yes"}])
    with use(Context(folder=tmp_path)) as context:
        made = methods["sft"](mixed, rows, steps=2, lr=1e-4, rank=rank, warmup=0.0)
        assert isinstance(made, Model)
        merged = methods["linear"]({"a": made, "b": mixed})
    losses = [float(str(m["loss"])) for m in context.metrics if "loss" in m]
    assert losses[1] < losses[0]
    head, before = (m.folded()["lm_head.weight"] for m in (made, mixed))
    assert torch.equal(head, before) == (rank > 0)  # adapters leave the head alone
    assert isinstance(merged, Model)
    half = merged.folded()["lm_head.weight"]
    assert torch.allclose(half, (head + before) / 2, atol=1e-6)
    assert not torch.equal(half, merged.folded()["model.embed_tokens.weight"])
    saved = Model.load(made.save(tmp_path / "saved"))
    assert torch.equal(logits(saved), logits(made)) and not torch.equal(logits(made), logits(mixed))


def test_a_blend_is_merged_with_the_model_that_it_is_of(
    two_heads: Model, blend: Callable[..., Model], tmp_path: Path
) -> None:
    mixed, plain = blend(two_heads, 0.5, 0.5), Model.open(two_heads.folder)
    name = "model.embed_tokens.weight"
    embed = plain.folded()[name]
    for models in ({"a": mixed, "b": plain}, {"a": plain, "b": mixed}):
        with use(Context(folder=tmp_path / next(iter(models.values())).name)):
            merged = methods["linear"](models, weights={"a": 1.0, "b": 3.0})
        assert isinstance(merged, Model)
        share = 0.25 if models["a"] is mixed else 0.75
        want = share * mixed.folded()["lm_head.weight"] + (1 - share) * embed
        assert torch.allclose(merged.folded()["lm_head.weight"], want, atol=1e-6)
        assert merged.load_module().module.lm_head.weight.shape == embed.shape
