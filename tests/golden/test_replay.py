"""An online run's pairs, saved and learnt again in order: the same run, and a plain loop's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from truing.context import Context, Json, use
from truing.core.chat import completion_ids, prompt_ids
from truing.core.rl.online_task import OnlineTask
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.tables import Table
from truing.train.preference.replay import dealt

WORDS = "lime oak rain stone river cloud ash fern".split()
SIDES = ("chosen", "rejected")
PROMPTS = Table("prompt", [{"prompt": f"say {w}"} for w in WORDS])
HOW: dict[str, object] = {
    "steps": 4, "batch": 3, "answers": 3, "max_tokens": 6, "lr": 3e-3, "beta": 0.5, "kind": "ipo",
    "rewards": {"letters": {"use": "share_of", "letters": "abcdefghijklmnop"}}, "dtype": "float32",
}  # fmt: skip


@pytest.fixture
def model(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


def run(
    name: str, folder: Path, *nouns: object, **settings: object
) -> tuple[object, list[dict[str, Json]]]:
    with use(Context(seed=4, folder=folder)) as context:
        made = methods[name](*nouns, **settings)
    return made, [m for m in context.metrics if "step" in m]


def losses(steps: list[dict[str, Json]]) -> list[float]:
    return [float(str(m["loss"])) for m in steps]


def stream_of(model: Model, folder: Path, how: dict[str, object]) -> Table:
    made, _ = run("online_stream", folder, model, PROMPTS, how=how)
    assert isinstance(made, Table)
    return made


def logp(module: LlamaForCausalLM, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Summed log-probability of an answer's tokens."""
    found = module(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
    at = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return found[at, torch.tensor(answer)].sum()


def by_hand(path: Path, stream: Table, how: dict[str, object]) -> tuple[list[float], torch.Tensor]:
    """Losses and a trained weight of IPO over all weights, rollout by rollout, by torch alone."""
    module, frozen = (LlamaForCausalLM.from_pretrained(path) for _ in range(2))
    optimizer = torch.optim.AdamW(module.parameters(), lr=float(str(how["lr"])), weight_decay=0.0)
    found: list[float] = []
    for number in range(int(str(how["steps"]))):
        terms: list[torch.Tensor] = []
        for row in stream:
            if row["rollout"] == number:
                ids = [list(row[f"{n}_ids"]) for n in ("prompt", "chosen", "rejected")]  # type: ignore[call-overload]
                with torch.no_grad():
                    ref = [logp(frozen, ids[0], answer) for answer in ids[1:]]
                w, v = (logp(module, ids[0], a) - r for a, r in zip(ids[1:], ref, strict=True))
                terms.append((w - v - 1 / (2 * float(str(how["beta"])))) ** 2)
        loss = torch.stack(terms).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        found.append(float(loss.detach()))
    return found, module.model.layers[0].mlp.down_proj.weight.detach()


def test_all_weights_in_order_by_hand(model: Model, tiny_path: Path, tmp_path: Path) -> None:
    how = HOW | {"rank": 0}
    stream = stream_of(model, tmp_path / "stream", how)
    assert stream.kind == "pair" and {r["rollouts"] for r in stream} == {4}
    assert [r["rollout"] for r in stream] == sorted(int(str(r["rollout"])) for r in stream)
    assert {r["rollout"] for r in stream} == {0, 1, 2, 3}
    for row in stream:
        assert float(str(row["chosen_reward"])) > float(str(row["rejected_reward"]))
    want, weight = by_hand(tiny_path, stream, how)
    online, first = run("online_dpo", tmp_path / "online", model, PROMPTS, **how)
    again, second = run("replay", tmp_path / "again", model, stream, how=how)
    assert want[0] == pytest.approx(1.0) and len(set(want)) == 4  # d is 0 at the reference
    assert losses(first) == pytest.approx(want, rel=1e-4)
    assert losses(second) == pytest.approx(want, rel=1e-4)
    for made in (online, again):
        assert isinstance(made, Model)
        found, begun = (
            torch.as_tensor(m.folded()["model.layers.0.mlp.down_proj.weight"])
            for m in (made, model)
        )
        # Adam divides gradients near 0 by themselves, so that single weights show every rounding.
        assert (
            float((found - weight).abs().mean()) < 1e-5 < 1e-3 < float((found - begun).abs().mean())
        )


@pytest.mark.parametrize("kind", ["ipo", "sigmoid"])
def test_an_adapter_in_order(kind: str, model: Model, tmp_path: Path) -> None:
    """Also where a rollout made no pair: such a step changes nothing."""
    how = HOW | {"kind": kind, "rank": 2, "answers": 2, "batch": 1, "steps": 6, "max_tokens": 3}
    stream = stream_of(model, tmp_path / "stream", how)
    _, first = run("online_dpo", tmp_path / "online", model, PROMPTS, **how)
    again, second = run("replay", tmp_path / "again", model, stream, how=how)
    assert losses(second) == pytest.approx(losses(first), rel=1e-4)
    assert losses(second).count(0.0) == 6 - len({r["rollout"] for r in stream})
    frozen, _ = run("replay", tmp_path / "given", model, stream, model, how=how)
    assert isinstance(again, Model) and isinstance(frozen, Model)
    name = "model.layers.0.mlp.down_proj.weight"
    same = torch.allclose(
        torch.as_tensor(again.folded()[name]), torch.as_tensor(frozen.folded()[name]), atol=1e-6
    )
    assert same  # the model itself as the reference


def test_other_orders(deep_path: Path, tmp_path: Path) -> None:
    model = Model.open(deep_path)
    rollouts = [[0, 1], [2], [], [3, 4, 5], [6]]
    for window in (1, 2, 5, 9):
        made = dealt(rollouts, window, 7)
        assert [len(m) for m in made] == [2, 1, 0, 3, 1]
        for start in range(0, 5, window):
            here = slice(start, start + window)
            sides = [sorted(i for one in block[here] for i in one) for block in (made, rollouts)]
            assert sides[0] == sides[1]
    assert dealt(rollouts, 5, 7) == dealt(rollouts, 5, 7) != dealt(rollouts, 5, 8)
    how = HOW | {"rank": 2}
    stream = stream_of(model, tmp_path / "stream", how)
    found = {
        order: losses(run("replay", tmp_path / order, model, stream, how=how, order=order)[1])
        for order in ("drawn", "shuffled", "windows")
    }
    assert found["drawn"] != found["shuffled"]
    # One window holds all four rollouts.
    assert found["windows"] == found["shuffled"]
    assert found["drawn"][0] == pytest.approx(found["shuffled"][0])  # all pairs begin at d = 0


def test_a_stream_that_was_stopped_goes_on(
    model: Model,
    tmp_path: Path,
    always_save: Callable[[], None],
    interrupted: Callable[[type, int], AbstractContextManager[None]],
) -> None:
    always_save()
    how = HOW | {"rank": 2}
    whole = stream_of(model, tmp_path / "whole", how)
    with interrupted(OnlineTask, 3):
        stream_of(model, tmp_path / "cut", how)
    assert stream_of(model, tmp_path / "cut", how).key == whole.key


def test_mistakes(model: Model, tmp_path: Path) -> None:
    for wrong, match in (
        ({"stepps": 3}, "setting 'how'.*stepps"),
        ({"passes": 2}, "setting 'how': passes"),
        ({"answers": 1}, "setting 'how'.*answers"),
        ({"environment": {"use": "running_sum"}}, "setting 'how'.*environment"),
        ({"mix": {"sft": 0.5}}, "setting 'how'.*mix"),
    ):
        for name, data in (("online_stream", PROMPTS), ("replay", PROMPTS)):
            with pytest.raises(InputError, match=match):
                methods[name].check({"how": {**HOW, **wrong}}, {})
    pairs = Table("pair", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    with pytest.raises(InputError, match=r"row 1.*column 'rollout'"):
        run("replay", tmp_path, model, pairs, how=HOW)
    equal = HOW | {"rewards": {"any": {"use": "max_words", "n": 1000}}, "steps": 1, "rank": 2}
    with pytest.raises(InputError, match="no rollout made a pair"):
        stream_of(model, tmp_path / "equal", equal)


def test_held_out_pairs_are_measured_and_change_nothing(tiny_path: Path, tmp_path: Path) -> None:
    """Of a stream token by token, others as they read; both by hand before and after."""
    model = Model.open(tiny_path)
    stream = Table(
        "pair",
        [
            {"prompt": "p", "chosen": f"c{i}", "rejected": f"r{i}", "rollout": i // 2,
             "rollouts": 3, "prompt_ids": [5, 6 + i], "chosen_ids": [20 + i, 9],
             "rejected_ids": [40 + i, 41, 9]}
            for i in range(5)
        ],
    )  # fmt: skip
    how = HOW | {"rank": 2, "steps": 3, "lr": 0.02}
    frozen = LlamaForCausalLM.from_pretrained(tiny_path)
    plain, first = run("replay", tmp_path / "plain", model, stream, how=how)
    words = Table("pair", [{"prompt": "say oak", "chosen": "oak", "rejected": "ash"}])
    tokenizer = model.load_module().tokenizer
    read = [prompt_ids(tokenizer, "say oak")]
    read += [completion_ids(tokenizer, word) for word in ("oak", "ash")]
    drawn = [[5, 90], [21, 9], [44, 45]]
    row = dict(stream.rows[0]) | {"chosen": "other"}
    row |= {f"{n}_ids": ids for n, ids in zip(("prompt", "chosen", "rejected"), drawn, strict=True)}
    answers = {"completions": ["fir", "ash", "oak"], "scores": [0.5, 0.0, 1.0]}
    ranked = Table("group", [{"prompt": "say oak", **answers}])  # the best against the worst
    asked = [{"role": "user", "content": "say oak"}]
    sides = {n: [{"role": "assistant", "content": w}] for n, w in zip(SIDES, ("oak", "ash"))}
    spoken = Table("dialogue_pair", [{"prompt": asked, **sides}])
    given = [("words", words, read), ("stream", Table("pair", [row]), drawn)]
    given += [("group", ranked, read), ("dialogue", spoken, read)]
    for name, held, ids in given:
        with use(Context(seed=4, folder=tmp_path / name)) as context:
            made = methods["replay"](model, stream, held_out=held, how=how, eval_every=3)
        assert isinstance(made, Model) and isinstance(plain, Model)
        assert made.weights_key == plain.weights_key
        seen = {m["step"]: m["held_out/loss"] for m in context.metrics if "held_out/loss" in m}
        assert seen.keys() == {0, 3} and seen[0] == pytest.approx(1.0)  # 1 / (2 beta)^2
        with torch.no_grad():
            now = made.load_module("float32").module
            w, v = (logp(now, ids[0], a) - logp(frozen, ids[0], a) for a in ids[1:])  # type: ignore[arg-type]
        assert seen[3] == pytest.approx(float((w - v - 1.0) ** 2), rel=2e-3)
        assert [m["loss"] for m in context.metrics if "loss" in m] == [m["loss"] for m in first]
    with pytest.raises(InputError, match="setting 'patience' counts for nothing"):
        methods["replay"](model, stream, how=how, patience=2)
    with pytest.raises(InputError, match="needs rows of kind pair or dialogue_pair or group"):
        methods["replay"](model, stream, how=how, held_out=PROMPTS)
