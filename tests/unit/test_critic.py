"""Critics of their own: a reward model's backbone and head, their rate, what is saved and given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from truing.context import Context, Json, aside, current, seeded, use
from truing.core.engine import Paced
from truing.core.logprob import measure
from truing.core.passes.scoring import ScoreHead
from truing.core.rl.critic import HEAD, Critic, valued
from truing.core.tree import group_tree, pack
from truing.errors import InputError
from truing.method import methods
from truing.models import Model, held
from truing.pipeline import perform
from truing.store import Store
from truing.tables import Table

PACKED = pack([group_tree([5, 6], [[7, 8, 9], [10]])])[0]
LETTERS = {"letters": {"use": "share_of", "letters": "abcdefghijklmnop"}}
SMALL: dict[str, object] = {
    "steps": 2, "batch": 2, "answers": 2, "max_tokens": 5, "lr": 1e-3, "rewards": LETTERS,
    "passes": 1, "temperature": 1.0,
}  # fmt: skip
PROMPTS = Table("prompt", [{"prompt": f"say {w}"} for w in ("lime", "oak")])


@pytest.fixture
def reward(tiny_path: Path, tmp_path: Path) -> Model:
    """The tiny model with a made-up reward head."""
    head = ScoreHead(128)
    with torch.no_grad():
        head.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
        head.bias.fill_(0.25)
    return head.added_to(Model.open(tiny_path), tmp_path / "head")


def run(model: Model, folder: Path, **more: object) -> tuple[Model, list[dict[str, Json]]]:
    with use(Context(seed=4, folder=folder)) as context:
        made = methods["ppo"](model, PROMPTS, **{**SMALL, **more})
    assert isinstance(made, Model)
    return made, [m for m in context.metrics if "step" in m]


def saved_critic(folder: Path) -> Model:
    (path,) = (p for p in folder.glob("ppo-critic-*") if not p.name.endswith(("-head", "-trunk")))
    return Model.load(path)


def test_a_reward_model_brings_backbone_and_head(reward: Model) -> None:
    loaded = reward.load_module(fresh=True)
    critic = Critic.of(loaded, own=True)
    policy = reward.with_changes(()).load_module().module
    with torch.no_grad():
        rows = [[5, 6, 7, 8, 9], [5, 6, 10]]
        want: list[float] = []
        for row in rows:
            out = loaded.module(torch.tensor([row]), output_hidden_states=True)
            state = out.hidden_states[-1][0, 1:-1]  # the states before each token of the answer
            want += (state @ loaded.extra["reward_head.weight"][0] + 0.25).tolist()
    found = critic.values(policy, PACKED, grad=False)
    assert PACKED.gather(found).tolist() == pytest.approx(want, abs=1e-5)
    plain = measure(policy, PACKED, ("logp",), grad=False)
    both = valued(policy, PACKED, ("logp",), critic, grad=False)
    assert torch.equal(both["logp"], plain["logp"]) and torch.equal(both["values"], found)
    assert not Critic.of(loaded).weight.any()  # a reward head is no value head of the policy's own


def test_no_gradient_of_the_values_reaches_the_policy(reward: Model) -> None:
    own, policy = (reward.load_module(fresh=True) for _ in range(2))
    critic = Critic.of(own, own=True)
    valued(policy.module, PACKED, ("logp",), critic)["values"].sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in policy.module.parameters())
    named = critic.trained()
    assert len(named) > 10 and {f"{HEAD}.weight", f"{HEAD}.bias"} < set(named)
    moved = [n for n, p in named.items() if p.grad is not None and p.grad.any()]
    assert any(n.startswith("critic/model.layers.0") for n in moved)
    # On the policy's trunk the head alone learns, when it is to learn alone.
    shared = Critic.of(policy)
    with torch.no_grad():
        shared.weight.fill_(0.1)
    shared.values(policy.module, PACKED).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in policy.module.parameters())
    assert shared.weight.grad is not None and shared.weight.grad.any()


def test_a_rate_of_its_own(reward: Model, tmp_path: Path) -> None:
    """A first step of Adam's is as long as the rate."""
    once = {"critic_rate": 3.0, "critic_rollouts": 2, "steps": 1, "lr": 1e-4}
    run(reward.with_changes(()), tmp_path, critic=reward, **once)
    learnt = saved_critic(tmp_path).folded().extra[f"{HEAD}.bias"]
    assert abs(float(learnt) - 0.25) == pytest.approx(3e-4, rel=1e-2)


def test_alone_at_first_then_beside_the_policy(reward: Model, tmp_path: Path) -> None:
    model = reward.with_changes(())
    made, steps = run(model, tmp_path / "a", critic=reward, critic_rollouts=2, critic_rate=5.0)
    assert [c.kind for c in made.weight_changes] == ["adapter"]  # its value head is the critic's

    def logits(of: Model) -> torch.Tensor:
        with torch.no_grad():
            return of.load_module().module(torch.tensor([[5, 6, 7]])).logits

    assert torch.allclose(logits(made), logits(model), atol=1e-6)  # the policy has not moved
    critic = saved_critic(tmp_path / "a")
    assert not torch.allclose(logits(critic), logits(model), atol=1e-5)
    assert all("value_loss" in s and "explained" in s for s in steps)
    # It goes on from where it was: a critic that is given again keeps head and backbone.
    again = Critic.of(critic.load_module(), own=True)
    assert torch.equal(again.weight, critic.folded().extra[f"{HEAD}.weight"])
    assert float(again.bias.detach()) != 0.25 and isinstance(task_like(), Paced)
    both, _ = run(model, tmp_path / "b", critic=critic, critic_rollouts=0)
    assert not torch.allclose(logits(both), logits(model), atol=1e-5)


def test_what_a_stored_step_trained_is_kept_beside_the_policy(
    reward: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "home"))
    model, store, method = reward.with_changes(()), Store(), methods["ppo"]
    settings, nouns = method.validate(SMALL), {"model": model, "data": PROMPTS, "critic": reward}
    first, again = (perform(method, nouns, settings, store=store) for _ in range(2))
    assert again.cached and not store.scratch(first.key).exists()
    told = f"beside it: critic (`{first.key[:12]}/critic`)"
    assert told in first.note and told in again.note
    kept = store.load(f"{first.key}/critic")
    assert isinstance(kept, Model) and f"{HEAD}.bias" in kept.folded().extra
    assert held(f"{first.key[:12]}/critic").key == kept.key  # as settings name it
    store.export(f"{first.key[:8]}/critic", str(tmp_path / "out"))
    assert Model.open(tmp_path / "out").key == kept.key  # head and all: it can be given again
    with pytest.raises(InputError, match=r"unknown by-product 'crtic'.*'critic'"):
        store.export(f"{first.key}/crtic", str(tmp_path / "none"))
    (run := tmp_path / "run").mkdir()
    step = {"method": method.id, "inputs": {}, "key": first.key}
    manifest = {"schema_version": 1, "steps": {"a": step}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert store.export(f"{run}/a/critic", str(tmp_path / "out"))["key"] == f"{first.key}/critic"
    # It is verified as the policy is, and one that is damaged is made again.
    (path,) = (store._place(first.key) / "beside").rglob(f"{HEAD}.safetensors")
    (copy := path.with_name("copy")).write_bytes(path.read_bytes()[:-1] + b"\x01")
    copy.replace(path)
    assert [row["key"] for row in store.verify()] == [first.key] and not store.has(first.key)


def test_a_second_by_product_of_a_name() -> None:
    with use(Context()) as context:
        for _ in range(2):
            with seeded(1), aside("x/"):
                current().keep("critic", PROMPTS)
    assert list(context.beside) == ["critic", "critic-2"]


def task_like() -> object:
    from truing.core.rl.online_task import OnlineTask

    return object.__new__(OnlineTask)


def test_faults(reward: Model, tmp_path: Path) -> None:
    model = reward.with_changes(())
    with pytest.raises(InputError, match="critic_rate"):
        run(model, tmp_path, critic_rate=0.0)
    assert "critic" not in methods["grpo"].inputs and "critic" in methods["ppo_max"].inputs
    assert "critic_rate" not in methods["grpo"].settings
    assert methods["ppo_max"].settings["critic_rate"].default == 3.0
