"""The critic of policy-gradient methods: values of states, on the policy's trunk or on its own.

    V_t = w . h_t + b      h_t: last hidden state of the token before token t, in float32

On the policy's trunk it is one layer (`value_head.weight` [1, D], `value_head.bias` [1]), zero at
first or the model's own, and comes back with the model as further tensors. A critic that is given
as a model of its own, such as a reward model, brings its trunk and its head (`value_head`, else
`reward_head`, else zero), which are trained beside the policy as that is: an adapter, or all
weights. It is kept beside the result and can be given again: what a stored step made of it is named
KEY/critic, and `truing store export KEY/critic FOLDER` writes it.

Shapes: N tokens, M loss tokens, U trees, K branches, T loss tokens of a branch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from truing.changes import Weights
from truing.context import current
from truing.core.files import new_folder
from truing.core.logprob import Extras, check, measure, states
from truing.core.modelfiles.lora import Lora
from truing.core.modelfiles.reach import width_of
from truing.core.passes.scoring import HEAD as REWARD_HEAD
from truing.core.passes.scoring import check_linear
from truing.core.trainer import distributed
from truing.core.trainer.train_text import trained_model
from truing.core.tree import Packed
from truing.models import Loaded, Model
from truing.tables import Table

HEAD, OWN = "value_head", "critic/"


class Critic(nn.Module):
    """Values of states.

    Args:
        width: D.
        trunk: a causal language model of its own; None reads the policy's states.
        lora: the trunk's adapters; None trains all its weights.
    """

    def __init__(self, width: int, trunk: nn.Module | None = None, lora: Lora | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, width))
        self.bias = nn.Parameter(torch.zeros(1))
        # Kept out of what torch sees as this layer's parameters.
        self.__dict__["trunk"], self.lora = trunk, lora

    @staticmethod
    def of(loaded: Loaded, *, own: bool = False, lora: Lora | None = None) -> Critic:
        """The critic that this model brings, with `own` on its trunk."""
        width = width_of(loaded.module)
        critic = Critic(width, loaded.module if own else None, lora)
        prefix = HEAD
        if own:
            check(loaded.module)
            check_linear(loaded)
            prefix = HEAD if f"{HEAD}.weight" in loaded.extra else REWARD_HEAD
        for name, parameter in critic.named_parameters():
            if f"{prefix}.{name}" in loaded.extra:
                with torch.no_grad():
                    parameter.copy_(loaded.extra[f"{prefix}.{name}"])
        return critic.to(loaded.device)

    @property
    def trunk(self) -> nn.Module | None:
        """Its own trunk."""
        return cast("nn.Module | None", self.__dict__["trunk"])

    def forward(self, rows_MD: Tensor) -> Tensor:
        """Values [M, 1] of states."""
        return torch.nn.functional.linear(rows_MD, self.weight, self.bias)

    def trained(self) -> dict[str, nn.Parameter]:
        """What is learnt, by name; the trunk's names begin with "critic/"."""
        named = dict(self.named_parameters(HEAD))
        if self.trunk is not None:
            own = (self.trunk if self.lora is None else self.lora).named_parameters()
            named |= {OWN + n: p for n, p in own if p.requires_grad}
        return named

    def values(self, policy: nn.Module, packed: Packed, *, grad: bool = True) -> Tensor:
        """Values [U, K, T] at the states that predict the loss tokens, 0 at padding.

        No gradient reaches the policy, even where the critic is on its trunk.
        """
        trunk = self.trunk
        with torch.set_grad_enabled(grad and trunk is not None):
            rows_MD = states(policy if trunk is None else trunk, packed)[packed.source_M]
        with torch.set_grad_enabled(grad):
            return packed.spread(self(rows_MD.float())[:, 0])

    def saved(self, made: Model, model: Model | None, data: Table, folder: Path) -> Model:
        """`made` with this head, or unchanged beside the critic, a model that `folder` holds, too.

        Args:
            made: the trained policy.
            model: that the critic's own trunk came from.
        """
        head = folder.with_name(f"{folder.name}-head")
        with distributed.first_alone():
            if not head.is_dir():
                with new_folder(head) as partial:
                    own = {n: p.detach().cpu().contiguous() for n, p in self.named_parameters(HEAD)}
                    save_file(own, partial / f"{HEAD}.safetensors")
        if model is None or self.trunk is None:
            return made.adding(Weights(head))
        weights = folder.with_name(f"{folder.name}-trunk")
        critic = trained_model(model, self.trunk, self.lora, weights, data, "critic")
        critic = critic.adding(Weights(head)).with_licences(made.licences)
        with distributed.first_alone():
            if not folder.is_dir():
                critic.save(folder)
        current().keep("critic", critic)
        return made


def valued(
    module: nn.Module,
    packed: Packed,
    needs: Sequence[str],
    critic: Critic | None,
    *,
    grad: bool = True,
    extras: Extras | None = None,
    temperature: float = 1.0,
    given_UK: Tensor | None = None,
) -> Mapping[str, Tensor]:
    """`measure`, and the critic's "values" where there is one."""
    shared = critic is not None and critic.trunk is None
    heads = {"values": critic} if critic is not None and shared else {}
    made = measure(
        module,
        packed,
        needs,
        grad=grad,
        heads=heads,
        extras=extras,
        temperature=temperature,
        given_UK=given_UK,
    )
    if critic is not None and not shared:
        made["values"] = critic.values(module, packed, grad=grad)
    return made
