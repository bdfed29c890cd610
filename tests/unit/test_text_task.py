"""Whole steps of the text task against plain, unpacked computations with stock transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from truing.core.batch.measure import ref_kl_vocab
from truing.core.batch.reading import read_units
from truing.core.chat import completion_ids, prompt_ids
from truing.core.logprob import Rows
from truing.core.modelfiles import lora
from truing.core.objective import objective_of
from truing.core.reference import Reference
from truing.core.tiny import tiny_model
from truing.core.trainer import distributed
from truing.core.trainer.text_task import TextTask
from truing.core.training import Hook, NoisyEmbeddings
from truing.models import Model
from truing.tables import Row, Table
from truing.train.preference.aot import aot
from truing.train.preference.dpo import dpo
from truing.train.preference.kto import kto
from truing.train.preference.rpo import rpo
from truing.train.preference.tdpo import tdpo1
from truing.train.supervised.sft import neftune, sft

PAIRS: list[Row] = [
    {"prompt": "one?", "chosen": "yes", "rejected": "never, no"},
    {"prompt": "and two, is it so?", "chosen": "it may well be", "rejected": "no"},
    {"prompt": "three", "chosen": "a", "rejected": "bcd"},
]
SINGLES: list[Row] = [
    {"prompt": str(r["prompt"]), "completion": str(r[n]), "label": n == "chosen"}
    for r in PAIRS
    for n in ("chosen", "rejected")
]


SEED = 9  # of a shift that makes answers likelier, so that what clips at 0 is above it


def shift(module: nn.Module, seed: int) -> nn.Module:
    """Move the weights a little: another model of the same shape."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=source))
    return module


class Plain:
    """Log-probabilities of one row at a time."""

    def __init__(self, module: nn.Module) -> None:
        self.module, (_, self.tokenizer) = module, tiny_model()

    def tokens(self, prompt: object, text: object) -> Tensor:
        """log p of each token of the answer, its end included."""
        head = prompt_ids(self.tokenizer, str(prompt))
        tail = completion_ids(self.tokenizer, str(text))
        every = self.full(head + tail)[len(head) - 1 :]
        return every.gather(1, torch.tensor(tail)[:, None])[:, 0]

    def full(self, ids: Sequence[int]) -> Tensor:
        """log p over the vocabulary at each place but the last."""
        return self.module(torch.tensor([list(ids)])).logits[0, :-1].log_softmax(-1)

    def lp(self, prompt: object, text: object) -> Tensor:
        return self.tokens(prompt, text).sum()


def task_of(
    tiny_path: Path, function: object, rows: list[Row], budget: int, hook: Hook | None = None
) -> TextTask:
    """A full fine-tune: the module is shifted, the reference is the model as it lies on disk."""
    model, spec = Model.open(tiny_path), objective_of(function)
    loaded = model.load_module(fresh=True)
    units, _ = read_units(spec, loaded, Table(spec.rows, rows), 512)
    settings = {n: p.default for n, p in spec.settings.items()}
    reference = Reference(model.weights_key, "float32")
    task = TextTask(spec, settings, hook or Hook(), units, loaded.module, reference, budget=budget)
    if spec.with_reference:
        task.measure_reference(loaded.module, [range(len(units))])
        task.compare_with(model.load_module().module)
    shift(loaded.module, SEED)
    return task


def stepped(task: TextTask) -> tuple[float, dict[str, Tensor]]:
    loss = weight = 0.0
    for part in task.parts(range(len(task)), 0):
        part.loss.backward()
        loss += float((part.loss if part.value is None else part.value).detach())
        weight += float(part.weight)
    named = task.trained().items()
    return loss / weight, {n: p.grad / weight for n, p in named if p.grad is not None}


def same(task: TextTask, loss: Tensor, module: nn.Module) -> None:
    """The task's step has this loss and these gradients."""
    loss.backward()
    value, grads = stepped(task)
    assert value == pytest.approx(float(loss.detach()), rel=1e-5)
    expected = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    assert set(grads) == set(expected) and len(grads) > 20
    for name, grad in expected.items():
        assert torch.allclose(grads[name], grad, atol=1e-5 * float(grad.abs().max()) + 1e-7), name


@pytest.mark.parametrize("budget", [1, 10_000])
def test_dpo(tiny_path: Path, budget: int) -> None:
    policy, old = Plain(shift(tiny_model()[0], SEED)), Plain(tiny_model()[0])
    total = torch.zeros(())
    for r in PAIRS:
        with torch.no_grad():
            ref = old.lp(r["prompt"], r["chosen"]) - old.lp(r["prompt"], r["rejected"])
        now = policy.lp(r["prompt"], r["chosen"]) - policy.lp(r["prompt"], r["rejected"])
        total = total - logsigmoid(0.1 * (now - ref)) / 3
    same(task_of(tiny_path, dpo, PAIRS, budget), total, policy.module)


@pytest.mark.parametrize("budget", [1, 10_000])
def test_sum_of_means_over_pairs_and_tokens(tiny_path: Path, budget: int) -> None:
    policy, old = Plain(shift(tiny_model()[0], SEED)), Plain(tiny_model()[0])
    preference, likelihood, count = torch.zeros(()), torch.zeros(()), 0
    for r in PAIRS:
        with torch.no_grad():
            ref = old.lp(r["prompt"], r["chosen"]) - old.lp(r["prompt"], r["rejected"])
        chosen = policy.tokens(r["prompt"], r["chosen"])
        z = 0.1 * (chosen.sum() - policy.lp(r["prompt"], r["rejected"]) - ref)
        preference = preference - logsigmoid(z) / 3
        likelihood, count = likelihood - chosen.sum(), count + len(chosen)
    same(task_of(tiny_path, rpo, PAIRS, budget), preference + likelihood / count, policy.module)


@pytest.mark.parametrize("budget", [1, 10_000])
def test_sorting_sees_the_whole_step(tiny_path: Path, budget: int) -> None:
    policy, old = Plain(shift(tiny_model()[0], SEED)), Plain(tiny_model()[0])

    def gaps(of: Plain) -> Tensor:
        return torch.stack(
            [of.lp(r["prompt"], r["chosen"]) - of.lp(r["prompt"], r["rejected"]) for r in PAIRS]
        )

    with torch.no_grad():
        ref = gaps(old).sort().values
    loss = -logsigmoid(0.1 * (gaps(policy).sort().values - ref)).mean()
    same(task_of(tiny_path, aot, PAIRS, budget), loss, policy.module)


@pytest.mark.parametrize("rows", [[1], [0, 1, 2]])
def test_what_a_whole_step_records_is_recorded_once(
    tiny_path: Path, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first process has no share of the step, as of one row's."""
    task = task_of(tiny_path, aot, PAIRS, 10_000)
    whole = [task._measure(m, grad=False) for m in task._micro_batches(rows, task._trees(rows))]
    (alone,) = task.parts(rows, 0)
    monkeypatch.setattr(distributed, "gathered", lambda own: whole)
    found: list[dict[str, tuple[float, float]]] = []
    shares: list[int] = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "_now", distributed.Processes(rank, 2))
        parts = list(task.parts(rows, 0))
        shares.append(len(parts))
        found += [{n: (float(s), w) for n, (s, w) in p.metrics.items()} for p in parts]
    assert shares == ([0, 1] if len(rows) == 1 else [1, 1])
    wanted = {n: (float(s), w) for n, (s, w) in alone.metrics.items()}
    assert wanted and [m for m in found if m] == [
        {n: pytest.approx(v, rel=1e-5) for n, v in wanted.items()}
    ]


@pytest.mark.parametrize("budget", [1, 10_000])
def test_kto_with_mismatched_answers(tiny_path: Path, budget: int) -> None:
    policy, old = Plain(shift(tiny_model()[0], SEED)), Plain(tiny_model()[0])
    task = task_of(tiny_path, kto, SINGLES, budget)
    order = sorted(range(6), key=lambda i: task.units[i].content)
    after = {i: order[(at + 2) % 6] for at, i in enumerate(order)}  # each prompt is that of two
    with torch.no_grad():
        drift = []
        for i, r in enumerate(SINGLES):
            text = SINGLES[after[i]]["completion"]
            drift.append(policy.lp(r["prompt"], text) - old.lp(r["prompt"], text))
        z0 = torch.stack(drift).mean().clamp(min=0)
    assert float(z0) > 0.01  # else it would not show which answers are compared
    total = torch.zeros(())
    for r in SINGLES:
        with torch.no_grad():
            ref = old.lp(r["prompt"], r["completion"])
        ratio = policy.lp(r["prompt"], r["completion"]) - ref
        gap = ratio - z0 if r["label"] else z0 - ratio
        total = total + (1 - (0.1 * gap).sigmoid()) / 6
    same(task, total, policy.module)


def test_token_level_divergence(tiny_path: Path) -> None:
    policy, old = Plain(shift(tiny_model()[0], SEED)), Plain(tiny_model()[0])
    total = torch.zeros(())
    for r in PAIRS:
        value: list[Tensor] = []
        for name in ("chosen", "rejected"):
            head = prompt_ids(policy.tokenizer, str(r["prompt"]))
            tail = completion_ids(policy.tokenizer, str(r[name]))
            with torch.no_grad():
                ref = old.full(head + tail)[len(head) - 1 :]
            now = policy.full(head + tail)[len(head) - 1 :]
            at = torch.tensor(tail)[:, None]
            kl = (ref.exp() * (ref - now)).sum()
            value.append((now.gather(1, at) - ref.gather(1, at)).sum() + kl)
        total = total - logsigmoid(0.1 * (value[0] - value[1])) / 3
    same(task_of(tiny_path, tdpo1, PAIRS, 100), total, policy.module)


def test_divergence_from_the_model_without_its_adapter(tiny_path: Path) -> None:
    task = task_of(tiny_path, tdpo1, PAIRS, 10_000)
    task._other = None
    task.adapt(lora.attach(task.module, 4, 8.0))
    (micro,) = task._micro_batches(range(3), task._trees(range(3)))
    first = task._measure(micro, grad=False)
    assert first["ref_kl_vocab"].abs().max() < 1e-5  # an adapter begins as nothing
    with torch.no_grad():
        for parameter in task.trained().values():
            parameter.add_(0.02)
    assert (task._measure(micro, grad=False)["ref_kl_vocab"].sum(-1) > 1e-3).all()


def test_gradient_of_the_divergence() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    other = torch.randn(3, 5, dtype=torch.float64).log_softmax(-1)
    target = torch.zeros(3, dtype=torch.long)
    logp = logits.log_softmax(-1)
    (other.exp() * (other - logp)).sum().backward()
    value, slope = ref_kl_vocab(Rows(logp.detach(), target, {"ref_logp": other}), True)
    assert slope is not None and logits.grad is not None
    assert torch.allclose(slope, logits.grad) and (value >= 0).all()


def test_noise_on_embeddings(tiny_path: Path) -> None:
    rows: list[Row] = [{"prompt": "p", "completion": "word " * n} for n in (1, 9)]
    still = stepped(task_of(tiny_path, sft, rows, 10_000))[0]
    none = stepped(task_of(tiny_path, neftune, rows, 10_000, NoisyEmbeddings(noise=0.0)))[0]
    assert none == pytest.approx(still, rel=1e-6)
    task = task_of(tiny_path, neftune, rows, 10_000, NoisyEmbeddings(noise=5.0))
    seen: list[Tensor] = []
    plain = task.module.get_input_embeddings()
    task.module.model.layers[0].register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0][0].detach())
    )
    (micro,) = task._micro_batches(range(2), task._trees(range(2)))
    task._measure(micro, grad=True)
    noise = seen[-1] - plain(micro.packed.ids_N).detach()
    first = micro.trees[0].size
    for part, tree in ((noise[:first], micro.trees[0]), (noise[first:], micro.trees[1])):
        bound = 5.0 / (tree.longest * 128) ** 0.5
        assert 0.9 * bound < float(part.abs().max()) <= bound
    task._measure(micro, grad=False)  # what is only measured gets no noise
    assert torch.equal(seen[-1], plain(micro.packed.ids_N).detach())


def test_mismatched_answers_are_to_other_prompts(tiny_path: Path) -> None:
    rows: list[Row] = [
        {"prompt": f"Question {i % 3}", "completion": f"answer {i}", "label": i % 2 == 0}
        for i in range(6)
    ]
    task = task_of(tiny_path, kto, rows, 10_000)
    own = [u.answers[0] for u in task.units]
    for unit, tree in zip(task.units, task._trees(range(6)), strict=True):
        taken = task.units[own.index(tree.children[-1].ids)]
        assert taken.prompt != unit.prompt


def test_one_row_left_over_makes_no_update(tiny_path: Path) -> None:
    task = task_of(tiny_path, kto, SINGLES, 10_000)
    assert list(task.parts([0], 1)) == []


def test_nobody_waits_for_micro_batches_that_a_common_beginning_saves(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Row] = [{"prompt": "a long beginning " * 3, "completion": w} for w in "abcd"]
    task = task_of(tiny_path, sft, rows, budget=0)
    trees = task._trees(range(4))
    task.budget = 2 * trees[0].size - 8  # two rows fit, since most of the second is the first's
    monkeypatch.setattr(distributed, "_now", distributed.Processes(0, 2))
    monkeypatch.setattr(distributed, "is_sharded", lambda module: True)
    monkeypatch.setattr(distributed, "everyone", lambda count: [count, count])
    assert [m.idle for m in task._micro_batches(range(4), trees)] == [False]
