"""Critics of their own: a reward model's backbone and head, their rate, what is saved and given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from truing.context import Context, Json, use
from truing.core.critic import HEAD, Critic, valued
from truing.core.engine import Paced, optimizer_for
from truing.core.logprob import measure
from truing.core.scoring import ScoreHead
from truing.core.training import Training
from truing.core.tree import group_tree, pack
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
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


def test_a_rate_of_its_own() -> None:
    fast, slow = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = optimizer_for([slow, fast], Training(), [1.0, 3.0])
    assert [g["pace"] for g in optimizer.param_groups] == [1.0, 3.0]
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * group["pace"]
    slow.grad, fast.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    assert torch.allclose(fast, 3 * slow, atol=1e-6) and float(slow.detach()[0]) < -0.09


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


def task_like() -> object:
    from truing.core.online_task import OnlineTask

    return object.__new__(OnlineTask)


def test_faults(reward: Model, tmp_path: Path) -> None:
    model = reward.with_changes(())
    with pytest.raises(InputError, match="critic_rate"):
        run(model, tmp_path, critic_rate=0.0)
    assert "critic" not in methods["grpo"].inputs and "critic" in methods["ppo_max"].inputs
    assert "critic_rate" not in methods["grpo"].settings
    assert methods["ppo_max"].settings["critic_rate"].default == 3.0
