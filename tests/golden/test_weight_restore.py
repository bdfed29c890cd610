"""Weight restoration: its exact properties, and recovery of a damaged tiny model."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from truing.context import Context, use
from truing.core import sampling
from truing.core.chat import completion_ids, prompt_ids
from truing.core.modelfiles import loaded
from truing.core.tiny import tiny_folder, tiny_model
from truing.core.trunk import Trunk
from truing.errors import InputError
from truing.method import methods
from truing.models import Model, Prefix, Weights
from truing.recover import task_value as values
from truing.recover.task_value import task_value, token_probability
from truing.recover.weight_restore import (
    Restorer,
    choose,
    direction_loss,
    eligible,
    nth_largest,
    weight_restore,
)
from truing.tables import Table

DEPTH = 4  # floor(4/6 * 6)
REFUSE = Table("prompt", [{"prompt": f"Tell me about cheese {i}"} for i in range(6)])
TASK = Table("example", [{"prompt": f"Add {i} and 1", "completion": str(i + 1)} for i in range(5)])


def test_direction_loss_by_hand() -> None:
    states = torch.tensor([[2.0, 0], [0, 2]])  # mean (1, 1)
    assert direction_loss(states, torch.tensor([1.0, 0])).item() == pytest.approx(-math.sqrt(0.5))
    assert direction_loss(states, torch.tensor([-3.0, -3])).item() == pytest.approx(1.0)


def test_sign_rule_by_hand() -> None:
    w, target = torch.tensor([2.0, 2, 0, 0, 1]), torch.ones(5)
    grad = torch.tensor([1.0, -1, 1, -1, 5])
    assert eligible(w, target, grad).tolist() == [True, False, False, True, False]


def test_sign_rule_on_a_parabola_marks_every_difference() -> None:
    source = torch.Generator().manual_seed(0)
    w, target = torch.randn(50, generator=source), torch.randn(50, generator=source)
    w[:7] = target[:7]
    assert torch.equal(eligible(w, target, w - target), w != target)


def test_nth_largest_over_pieces() -> None:
    pieces = [torch.tensor([5.0, 1]), torch.tensor([]), torch.tensor([[4.0, 3], [2, 2]])]
    assert [nth_largest(pieces, n) for n in (1, 2, 3, 6, 99)] == [5, 4, 3, 1, 1]
    assert nth_largest(pieces, 0) == nth_largest([], 3) == math.inf


def test_choice_is_strictly_above_the_nth() -> None:
    grads = {"a": torch.tensor([5.0, -4, 3]), "b": torch.tensor([-2.0, 9])}
    allowed = {"a": torch.tensor([True, True, True]), "b": torch.tensor([True, False])}
    chosen = choose(allowed, grads, 3)  # the third largest allowed is 3: only 5 and 4 lie above
    assert chosen["a"].tolist() == [True, True, False] and chosen["b"].tolist() == [False, False]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """(damaged, trusted): noise on the linear layers of all blocks and on one norm."""
    trusted = Model.open(tiny_folder(tmp_path_factory.mktemp("trusted"), blocks=6))
    module = trusted.load_module(fresh=True).module
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "layers." in name and p.dim() == 2:
                p += 0.02 * torch.randn(p.shape, generator=source)
        module.model.layers[0].input_layernorm.weight += 0.1
    from safetensors.torch import save_file

    state = {n: t for n, t in module.state_dict().items() if n != "lm_head.weight"}
    path = tmp_path_factory.mktemp("damage") / "weights.safetensors"
    save_file({n: t.contiguous() for n, t in state.items()}, path)
    return trusted.adding(Weights(path)), trusted


@pytest.fixture
def restorer(pair: tuple[Model, Model]) -> Restorer:
    damaged, trusted = pair
    module = damaged.load_module(fresh=True).module
    originals = [Trunk(m.load_module().module, DEPTH).values() for m in (damaged, trusted)]
    return Restorer(Trunk(module, DEPTH), *originals)


def _batches(model: Model, table: Table) -> list[list[list[int]]]:
    tokenizer = model.load_module().tokenizer
    ids = [prompt_ids(tokenizer, str(r["prompt"])) for r in table]
    return [ids[:4], ids[4:]]


@pytest.fixture
def gradients(restorer: Restorer, pair: tuple[Model, Model]) -> Restorer:
    """A restorer after the backward passes of one recovery step."""
    trusted = pair[1]
    batches = _batches(trusted, REFUSE)
    direction = Trunk(trusted.load_module().module, DEPTH).mean_state(batches)
    loss = restorer.trunk.add_gradients(batches, lambda s: direction_loss(s, direction))
    assert -1.0 <= loss <= 1.0
    return restorer


def test_last_token_states_are_the_models_own(pair: tuple[Model, Model]) -> None:
    module = pair[1].load_module().module
    batch = [[5, 6, 7], [8, 9, 10, 11, 12]]
    hooks = len(module.model.layers[DEPTH - 1]._forward_hooks)
    states = Trunk(module, DEPTH).states(batch)
    assert len(module.model.layers[DEPTH - 1]._forward_hooks) == hooks
    for row, ids in enumerate(batch):
        out = module(input_ids=torch.tensor([ids]), output_hidden_states=True)
        assert torch.allclose(states[row], out.hidden_states[DEPTH][0, -1], atol=1e-5)


def test_only_linear_weights_of_the_first_blocks(restorer: Restorer) -> None:
    names = list(restorer.weights)
    assert len(names) == DEPTH * 7
    assert not any("norm" in n or "embed" in n or "lm_head" in n for n in names)
    assert {int(n.split(".")[2]) for n in names} == set(range(DEPTH))
    assert restorer.total == sum(p.numel() for p in tiny_model(blocks=6)[0].parameters())


def above(size: torch.Tensor, n: int) -> int:
    """How many lie strictly above the n-th largest."""
    return int((size > size.sort(descending=True).values[n - 1]).sum())


def towards(restorer: Restorer, goal: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """|g| where a step against it goes towards the goal, elsewhere 0."""
    return {
        n: w.grad.abs() * ((w.detach() - goal[n]) * w.grad > 0)  # type: ignore[union-attr]
        for n, w in restorer.weights.items()
    }


def test_restored_weights_are_the_trusted_bits(gradients: Restorer) -> None:
    rate = 0.002
    grads = {n: w.grad.clone() for n, w in gradients.weights.items()}  # type: ignore[union-attr]
    sizes = torch.cat([s.flatten() for s in towards(gradients, gradients.trusted).values()])
    restored = gradients.restore(rate)
    count = sum(int(m.sum()) for m in restored.values())
    assert count == above(sizes, math.ceil(rate * gradients.total)) > 0
    cut = min(float(grads[k].abs()[m].min()) for k, m in restored.items() if m.any())
    for name, weight in gradients.weights.items():
        mask, now = restored[name], weight.detach()
        before, target = gradients.damaged[name], gradients.trusted[name]
        assert torch.equal(now[mask], target[mask])
        assert torch.equal(now[~mask], before[~mask])
        assert ((before - target)[mask] * grads[name][mask] > 0).all()
        # Nothing that was passed over had a larger gradient and the right sign.
        left = eligible(before, target, grads[name]) & ~mask
        assert not left.any() or float(grads[name].abs()[left].max()) <= cut


def test_rate_zero_changes_nothing(gradients: Restorer) -> None:
    assert not any(m.any() for m in gradients.restore(0.0).values())
    assert all(torch.equal(w, gradients.damaged[n]) for n, w in gradients.weights.items())


def test_rate_of_one_is_clamped(gradients: Restorer) -> None:
    restored = gradients.restore(1.0)
    assert sum(int(m.sum()) for m in restored.values()) > 0.2 * gradients.total


def test_equal_models_have_nothing_to_restore(pair: tuple[Model, Model]) -> None:
    trusted = pair[1]
    module = trusted.load_module(fresh=True).module
    original = Trunk(trusted.load_module().module, DEPTH).values()
    same = Restorer(Trunk(module, DEPTH), original, original)
    batches = _batches(trusted, REFUSE)
    away = torch.ones(128)
    same.trunk.add_gradients(batches, lambda s: direction_loss(s, away))
    assert not any(m.any() for m in same.restore(1.0).values())


def test_given_back_is_part_of_what_was_restored(
    gradients: Restorer, pair: tuple[Model, Model]
) -> None:
    damaged, _ = pair
    batches = _batches(damaged, TASK)
    benign = Trunk(damaged.load_module().module, DEPTH).mean_state(batches)
    restored = gradients.restore(0.01)
    gradients.clear()
    gradients.trunk.add_gradients(batches, lambda s: direction_loss(s, benign))
    found = towards(gradients, gradients.damaged)
    sizes = torch.cat([found[n][mask & (found[n] > 0)] for n, mask in restored.items()])
    returned = gradients.give_back(0.2, restored)
    count = sum(int(m.sum()) for m in returned.values())
    assert count == above(sizes, math.ceil(0.2 * len(sizes))) > 0
    for name, mask in returned.items():
        assert not (mask & ~restored[name]).any()
        weight = gradients.weights[name].detach()
        assert torch.equal(weight[mask], gradients.damaged[name][mask])
    kept = sum(int((restored[n] & ~returned[n]).sum()) for n in restored)
    assert sum(map(len, gradients.places().values())) == kept
    gradients.restart()
    assert sum(map(len, gradients.places().values())) == 0


@pytest.fixture
def step(tmp_path: Path) -> Iterator[Context]:
    with use(Context(folder=tmp_path / "step")) as context:
        yield context


def _distance(model: Model, trusted: Model) -> float:
    batches = _batches(trusted, REFUSE)
    goal = Trunk(trusted.load_module().module, DEPTH).mean_state(batches)
    state = Trunk(model.load_module().module, DEPTH).mean_state(batches)
    return 1.0 + direction_loss(state[None], goal).item()


def test_recovery_approaches_the_trusted_direction(
    pair: tuple[Model, Model], step: Context, tmp_path: Path
) -> None:
    damaged, trusted = pair
    healed = weight_restore(
        damaged,
        trusted,
        REFUSE,
        TASK,
        rate=0.003,
        steps=6,
        warmup=2,
        save_every=3,
        drop=0.9,
        batch=4,
    )
    assert _distance(healed, trusted) < 0.6 * _distance(damaged, trusted)
    change = healed.weight_changes[-1]
    assert isinstance(change, Weights) and change.sparse
    before, after, goal = damaged.folded(), healed.folded(), trusted.folded()
    changed = 0
    for name in before:
        mask = before[name] != after[name]
        changed += int(mask.sum())
        assert torch.equal(after[name][mask], goal[name][mask])
    assert 0 < changed < 0.05 * 1_214_464
    assert [m["step"] for m in step.metrics if "distance" in m] == [1, 2, 3, 4, 5, 6]
    assert not any(m.get("rollback") for m in step.metrics)
    healed.save(tmp_path / "healed")
    assert Model.load(tmp_path / "healed").key == healed.key


def test_task_loss_starts_over_in_rollback_mode(
    pair: tuple[Model, Model], step: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged, trusted = pair
    rates: list[float] = []
    give_back = Restorer.give_back

    def counted(self: Restorer, rate: float, restored: dict[str, torch.Tensor]) -> object:
        rates.append(rate)
        return give_back(self, rate, restored)

    monkeypatch.setattr(Restorer, "give_back", counted)
    # A negative drop asks for an impossible gain: the warm-up must fail.
    weight_restore(
        damaged,
        trusted,
        REFUSE,
        TASK,
        rate=0.002,
        steps=3,
        warmup=2,
        save_every=3,
        drop=-5.0,
        batch=4,
        rollback_rate=0.3,
    )
    assert rates == [0.3] * 3
    steps = [(m["step"], m["rollback"]) for m in step.metrics if "rollback" in m]
    assert steps == [(1, False), (2, False), (1, True), (2, True), (3, True)]
    given = [m["given_back"] for m in step.metrics if m.get("rollback")]
    restored = [m["restored"] for m in step.metrics if m.get("rollback")]
    assert all(0 < g < r for g, r in zip(given, restored, strict=True))


def test_one_whole_model_is_in_memory_while_weights_are_restored(
    pair: tuple[Model, Model], step: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both originals only what may be restored is kept."""
    alive: list[int] = []
    add = Trunk.add_gradients

    def counted(*given: object) -> float:
        alive.append(modules() - before)
        return add(*given)  # type: ignore[arg-type]

    def modules() -> int:
        gc.collect()
        return sum(issubclass(type(o), PreTrainedModel) for o in gc.get_objects())

    loaded.forget()
    before = modules()
    monkeypatch.setattr(Trunk, "add_gradients", counted)
    weight_restore(*pair, REFUSE, TASK, steps=1)
    whole = 2  # the causal language model and the backbone in it
    assert alive == [whole]


def test_what_is_kept_is_exact_in_half_the_memory_where_it_can_be() -> None:
    module, _ = tiny_model(blocks=6)
    (name, plain), *_ = Trunk(module, 1).parameters().items()
    assert Trunk(module, 1).values()[name].dtype == torch.float32
    with torch.no_grad():
        plain.copy_(plain.bfloat16())
    kept = Trunk(module, 1).values()[name]
    assert kept.dtype == torch.bfloat16 and torch.equal(kept.float(), plain)


def test_same_seedless_run_gives_same_bits(pair: tuple[Model, Model], tmp_path: Path) -> None:
    keys = []
    for name in ("a", "b"):
        with use(Context(folder=tmp_path / name)):
            keys.append(weight_restore(*pair, REFUSE, TASK, steps=2, warmup=1).key)
    assert keys[0] == keys[1]


class Stop(BaseException):
    """Stands for the death of the process: nothing may catch it."""


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch, always_save: Callable[[], None]) -> dict[str, int]:
    """How often gradients were taken and the task was measured; a checkpoint after each step."""
    done = {"gradients": 0, "values": 0, "die at value": 0}
    add, value = Trunk.add_gradients, values.token_probability

    def adds(*given: object) -> float:
        done["gradients"] += 1
        return add(*given)  # type: ignore[arg-type]

    def measures(*given: object) -> float:
        done["values"] += 1
        if done["values"] == done["die at value"]:
            raise Stop
        return value(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(Trunk, "add_gradients", adds)
    monkeypatch.setattr(values, "token_probability", measures)
    always_save()
    return done


def _restored(
    pair: tuple[Model, Model], folder: Path, drop: float, *, stop: int = 0, accumulate: bool = True
) -> tuple[Model, list[dict[str, object]]]:
    """Four steps, the mode chosen after two; dies when the `stop`-th step has been told."""
    told = 0

    def progress(*_: object) -> None:
        nonlocal told
        told += 1
        if told == stop:
            raise Stop

    with use(Context(folder=folder, on_progress=progress)) as context:
        made = weight_restore(
            *pair, REFUSE, TASK, rate=0.002, steps=4, warmup=2, save_every=2, drop=drop, batch=4,
            accumulate=accumulate,
        )  # fmt: skip
    return made, list(context.metrics)


@pytest.mark.parametrize(
    ("drop", "whole", "left"),
    [
        # Gradients and measurements of all of it, and those that are left when so many steps were
        # told: after the second the warm-up is still to be measured.
        (0.9, (4, 3), {1: (3, 2), 2: (2, 2), 4: (0, 1)}),
        # The warm-up fails: four steps more in rollback mode, each with two gradients.
        (-5.0, (10, 4), {2: (8, 3), 3: (6, 2), 5: (2, 1)}),
    ],
)
def test_killed_and_resumed_gives_the_same_without_repeating_a_step(
    drop: float,
    whole: tuple[int, int],
    left: dict[int, tuple[int, int]],
    pair: tuple[Model, Model],
    work: dict[str, int],
    tmp_path: Path,
) -> None:
    made, metrics = _restored(pair, tmp_path / "whole", drop)
    assert (work["gradients"], work["values"]) == whole and made.key != pair[0].key
    for stop, wanted in left.items():
        folder = tmp_path / f"cut-{stop}"
        with pytest.raises(Stop):
            _restored(pair, folder, drop, stop=stop)
        work |= {"gradients": 0, "values": 0}
        again, told = _restored(pair, folder, drop)
        assert (again.key, told) == (made.key, metrics)
        assert (work["gradients"], work["values"]) == wanted


@pytest.mark.parametrize("accumulate", [True, False])
def test_killed_while_the_task_is_measured(
    accumulate: bool, pair: tuple[Model, Model], work: dict[str, int], tmp_path: Path
) -> None:
    whole, metrics = _restored(pair, tmp_path / "whole", 0.9, accumulate=accumulate)
    work |= {"gradients": 0, "values": 0, "die at value": 2}
    with pytest.raises(Stop):
        _restored(pair, tmp_path / "cut", 0.9, accumulate=accumulate)
    assert work["gradients"] == 2
    made, again = _restored(pair, tmp_path / "cut", 0.9, accumulate=accumulate)
    assert (made.key, again) == (whole.key, metrics) and work["gradients"] == 4
    other, _ = _restored(pair, tmp_path / "cut", 0.9, accumulate=not accumulate)
    assert other.key != whole.key  # what lies there is another recovery's


def test_a_plain_call_writes_no_checkpoints(
    pair: tuple[Model, Model], work: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(*_: object, **__: object) -> None:
        raise AssertionError("written to a folder that nobody comes back to")

    monkeypatch.setattr("truing.core.trainer.checkpoint.Checkpoints.write", written)
    assert weight_restore(*pair, REFUSE, TASK, steps=1).key != pair[0].key
    assert work["gradients"] == 1


def test_answers_to_the_task_are_kept(
    pair: tuple[Model, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sizes, draw = pair[1].load_module(), [], sampling.sample

    def drawn(module: object, prompts: list[list[int]], settings: object) -> object:
        sizes.append(len(prompts))
        return draw(module, prompts, settings)  # type: ignore[arg-type]

    def told(done: int, *_: object) -> None:
        if done == 4:
            raise Stop

    monkeypatch.setattr(sampling, "sample", drawn)
    monkeypatch.setattr(values, "CHUNK", 2)
    check = {"use": "max_words", "n": 3}
    with use(Context(folder=tmp_path, on_progress=told)), pytest.raises(Stop):
        task_value(model, TASK.rows, check, 4, note="before")
    with use(Context(folder=tmp_path)):
        assert 0 <= task_value(model, TASK.rows, check, 4, note="before") <= 1
        assert sizes == [2, 2, 1]
        task_value(model, TASK.rows, check, 4, note="after")
    assert sizes == [2, 2, 1, 2, 2, 1]


def test_nothing_to_do_returns_the_model(pair: tuple[Model, Model], step: Context) -> None:
    trusted = pair[1]
    assert weight_restore(trusted, trusted, REFUSE, TASK, steps=1).key == trusted.key
    assert weight_restore(*pair, REFUSE, TASK, steps=2, rate=0.0).key == pair[0].key


def test_token_probability_by_hand(pair: tuple[Model, Model]) -> None:
    model = pair[1].load_module()
    logps: list[float] = []
    for row in TASK.rows[:2]:
        ids = prompt_ids(model.tokenizer, str(row["prompt"]))
        for token in completion_ids(model.tokenizer, str(row["completion"])):
            logits = model.module(input_ids=torch.tensor([ids])).logits[0, -1]
            logps.append(logits.log_softmax(-1)[token].item())
            ids = [*ids, token]
    value = token_probability(model, TASK.rows[:2])
    assert value == pytest.approx(math.exp(sum(logps) / len(logps)), rel=1e-4)


def test_faults(pair: tuple[Model, Model], step: Context) -> None:
    damaged, trusted = pair
    with pytest.raises(InputError, match="'refuse' is empty"):
        weight_restore(damaged, trusted, Table("prompt", []), TASK)
    with pytest.raises(InputError, match="task_check"):
        weight_restore(damaged, trusted, REFUSE, REFUSE, steps=1)
    brief = damaged.adding(Prefix([{"role": "system", "content": "x"}]))
    with pytest.raises(InputError, match="run-time changes"):
        weight_restore(brief, trusted, REFUSE, TASK, steps=1)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"batch": 0}, "'batch' must be at least 1"),
        ({"save_every": 0}, "'save_every' must be at least 1"),
        ({"rate": -1.0}, "'rate' must be from 0 to 1"),
        ({"layers": 2.0}, r"'layers' must be in \(0, 1\]"),
        ({"prompts": -1}, "'prompts' must be at least 1"),
    ],
)
def test_settings_out_of_range(
    pair: tuple[Model, Model], given: dict[str, object], part: str
) -> None:
    with pytest.raises(InputError, match=f"setting {part}"):
        methods["weight_restore"](*pair, REFUSE, TASK, **given)
    with pytest.raises(InputError, match="needs rows of kind prompt, got 'text'"):
        methods["weight_restore"](*pair, Table("text", [{"text": "x"}]), TASK)
