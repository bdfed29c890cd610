"""Numbers in clusters, each with a linear map of its own: gates and balancing on linear experts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from truing.core.passes.routers import balance_value, first_share, mutual_information, top_k_gate

DIM, CLUSTERS, NOISE = 8, 4, 0.1


class Layer(nn.Module):
    """E linear experts of which each input goes to two.

    Args:
        experts: E.
        source: of the weights.
        centres_ED: where the experts of a Gaussian gate begin, whose logits are - |x - mu_e|^2 / 2;
            without them the gate is linear.
    """

    def __init__(
        self, experts: int, source: torch.Generator, centres_ED: Tensor | None = None
    ) -> None:
        super().__init__()
        self.near = centres_ED is not None
        begun_ED = 0.1 * torch.randn(experts, DIM, generator=source)
        self.router_ED = nn.Parameter(begun_ED if centres_ED is None else centres_ED.clone())
        drawn_ = torch.randn(experts, DIM, DIM + 1, generator=source)
        self.maps_EMD = nn.Parameter(drawn_ / math.sqrt(DIM))

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [N, M] and the router's logits [N, E]."""
        z_NE = x_ND @ self.router_ED.T
        if self.near:  # |x|^2 is the same for all experts
            z_NE = z_NE - self.router_ED.square().sum(-1) / 2
        gate_Nk, at_Nk = top_k_gate(z_NE, 2)
        y_NEM = torch.einsum("nd,emd->nem", with_one(x_ND), self.maps_EMD)
        kept_NkM = y_NEM.gather(1, at_Nk[..., None].expand(-1, -1, DIM))
        return (gate_Nk[..., None] * kept_NkM).sum(1), z_NE


def with_one(x_ND: Tensor) -> Tensor:
    return torch.cat([x_ND, torch.ones(len(x_ND), 1)], 1)


def numbers(
    source: torch.Generator, n: int, apart_by: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [N, D] around four centres, standardised noisy targets [N, M], clusters [N]."""
    centres_CD = apart_by * torch.randn(CLUSTERS, DIM, generator=source)
    maps_CMD = torch.randn(CLUSTERS, DIM, DIM, generator=source)
    cluster_N = torch.arange(n) % CLUSTERS
    x_ND = centres_CD[cluster_N] + torch.randn(n, DIM, generator=source)
    y_NM = torch.einsum("nmd,nd->nm", maps_CMD[cluster_N], x_ND)
    y_NM = (y_NM - y_NM.mean(0)) / y_NM.std(0)
    return x_ND, y_NM + NOISE * torch.randn(n, DIM, generator=source), cluster_N


def fitted(net: nn.Module, x: Tensor, y: Tensor, balance: float = 0.05) -> None:
    """Adam on all rows at once; a Layer is kept balanced."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(1500):
        out = net(x)
        if isinstance(out, Tensor):
            loss = (out - y).square().mean()
        else:
            made, z_NE = out
            value_N = balance_value(z_NE.softmax(-1), first_share(z_NE))
            loss = (made - y).square().mean() + balance * value_N.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def error(net: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        out = net(x)
        return float(((out if isinstance(out, Tensor) else out[0]) - y).square().mean())


def specialised(seed: int) -> dict[str, float]:
    """Error beside that of the best linear model, and what experts tell of clusters."""
    source = torch.Generator().manual_seed(seed)
    x, y, cluster = numbers(source, 2000)
    net, half = Layer(CLUSTERS, source), 1000
    fitted(net, x[:half], y[:half])
    # Least squares is the best that any linear model does, whatever its number of parameters.
    best = torch.linalg.lstsq(with_one(x[:half]), y[:half]).solution
    linear = float((with_one(x[half:]) @ best - y[half:]).square().mean())
    with torch.no_grad():
        first = net(x[half:])[1].argmax(-1)
    counts = torch.zeros(CLUSTERS, CLUSTERS)
    counts.index_put_((cluster[half:], first), torch.ones(half), accumulate=True)
    return {
        "error over the linear model's": error(net, x[half:], y[half:]) / linear,
        "information": mutual_information(counts.tolist()),
    }


def apart(x_ND: Tensor) -> Tensor:
    """Two inputs far from each other: the farthest from the mean, and the farthest from that."""
    first_D = x_ND[(x_ND - x_ND.mean(0)).square().sum(-1).argmax()]
    return torch.stack([first_D, x_ND[(x_ND - first_D).square().sum(-1).argmax()]])


def continual(seed: int) -> dict[str, float]:
    """Error on two clusters after two more were learnt, over that before.

    Of a layer that grows new experts beside frozen ones, once with a linear gate and once with a
    Gaussian one, and of a dense network. New experts never see the first clusters' inputs: a linear
    gate's new rows may have any logit there, a Gaussian gate's a small one, since it falls with the
    distance from what they were made for.
    """
    source = torch.Generator().manual_seed(seed)
    # So far apart that inputs of one cluster are not met among another's.
    x, y, cluster = numbers(source, 2000, apart_by=4.0)
    old, test = cluster < 2, torch.arange(len(x)) >= 1000
    first, second, kept = (old & ~test, ~old & ~test, old & test)
    layers = {"experts": Layer(2, source, apart(x[first])), "linear gate": Layer(2, source)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dense: nn.Module = nn.Sequential(nn.Linear(DIM, 32), nn.GELU(), nn.Linear(32, DIM))
    made: dict[str, float] = {}
    for name, net in (*layers.items(), ("dense", dense)):
        fitted(net, x[first], y[first])
        before = error(net, x[kept], y[kept])
        later = grown(net, apart(x[second]), source) if isinstance(net, Layer) else net
        fitted(later, x[second], y[second], balance=0.0)
        made[name] = error(later, x[kept], y[kept]) / before
    return made


def grown(net: Layer, centres_ED: Tensor, source: torch.Generator) -> Layer:
    """The layer with two more experts; its own and their rows of the router stand still."""
    begun_ED = torch.cat([net.router_ED.detach(), centres_ED]) if net.near else None
    made = Layer(4, source, begun_ED)
    with torch.no_grad():
        for name, value in net.named_parameters():
            made.get_parameter(name)[:2] = value
    for parameter in made.parameters():
        parameter.register_hook(lambda g: torch.cat([torch.zeros_like(g[:2]), g[2:]]))
    return made
