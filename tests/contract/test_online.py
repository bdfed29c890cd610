"""Every online method, found in the registry; what is tested follows from what it declares."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from truing.context import Context, use
from truing.core.objective import Loss, Measurements
from truing.core.online import Online, Update, online_of
from truing.core.rl import train_online
from truing.core.rl.collect import Pool, Say
from truing.core.rl.online_task import OnlineTask
from truing.method import methods
from truing.models import Model
from truing.tables import Row, Table

ONLINE = [n for n in methods if methods[n].entry.kind == "online"]
GROUPS, LONGEST = 4, 5
WORDS = "lime oak rain stone river cloud ash fern".split()


def spec_of(name: str) -> Online:
    return online_of(methods[name].declared)


def settings_of(spec: Online, **more: object) -> dict[str, object]:
    """Defaults, with everything switched on that a default leaves out."""
    found: dict[str, object] = {n: p.default for n, p in spec.settings.items()}
    found |= {n: 0.1 for n in ("beta", "entropy", "ptx") if n in found}
    found |= {"entropy_share": 0.5} if "entropy_share" in found else {}
    found |= {"critic_rollouts": 0} if "critic_rollouts" in found else {}
    found |= {"max_tokens": LONGEST, "buffer": 2} if "buffer" in found else {}
    return found | more


def rollout(spec: Online, seed: int = 0, *, flat: Sequence[int] = ()) -> Measurements:
    """A made-up rollout; groups in `flat` have equal rewards."""
    source = torch.Generator().manual_seed(seed)
    own, width = 3, 3 * (2 if spec.opposed else 1) + bool(spec.given)
    lengths = torch.randint(1, LONGEST + 1, (GROUPS, width), generator=source)
    lengths[0, 0] = LONGEST
    mask = (torch.arange(LONGEST) < lengths[..., None]).float()
    shape = (GROUPS, width, LONGEST)
    tensors = {n: -torch.rand(shape, generator=source) * mask for n in ("logp", "ref_logp")}
    tensors["values"] = torch.randn(shape, generator=source) * mask
    tensors["ref_top_kl"] = torch.rand(shape, generator=source) * mask
    tensors["old_entropy"] = torch.rand(shape, generator=source) * mask
    reward = torch.rand(GROUPS, width, generator=source)
    for u in flat:
        reward[u] = 0.25
    is_own = torch.zeros(GROUPS, width)
    is_own[:, :own] = 1.0
    finished = (torch.rand(GROUPS, width, generator=source) > 0.3).float()
    sort = (torch.arange(GROUPS) % 3).float()[:, None].expand(GROUPS, width)
    columns = {"reward": reward, "own": is_own, "finished": finished, "sort": sort}
    columns["unread"] = torch.zeros(GROUPS, width)
    columns |= {"reward/a": reward, "reward/b": reward.flip(0)}
    if spec.opponent == "greedy":
        columns["greedy"] = torch.tensor([0.25, 0.25, 0.5, 0.75])
    return Measurements(mask, tensors, columns)


def given(r: Measurements, update: Update, at: Sequence[int], *, seed: int = 7) -> Measurements:
    """What the loss is called with for the groups `at`: new values beside the fixed ones."""
    source = torch.Generator().manual_seed(seed)
    moved = {
        n: t + 0.1 * torch.randn(t.shape, generator=source) * r.mask_UKT
        for n, t in (("logp", r["logp"]), ("values", r["values"]))
    }
    for name in ("entropy", "ref_top_kl"):
        moved[name] = torch.rand(r.mask_UKT.shape, generator=source) * r.mask_UKT
    fixed = {"old_logp": r["logp"], "old_values": r["values"], "ref_logp": r["ref_logp"]}
    fixed |= {n: t for n, t in update.tensors.items() if t.dim() == 3}
    numbers = {n: t for n, t in update.tensors.items() if t.dim() < 3}
    index = list(at)
    tensors = {n: t[index].clone() for n, t in (moved | fixed).items()}
    for name in moved:
        tensors[name].requires_grad_()
    columns = {n: c[index] for n, c in {**r.columns, **numbers}.items()}
    return Measurements(r.mask_UKT[index], tensors, columns)


def own_part(loss: Loss) -> Tensor:
    return torch.cat([(c * v * w).reshape(len(v), -1).sum(1) for c, v, w in loss.terms()])


def test_the_family_is_listed() -> None:
    names = {methods[n].name for n in ONLINE}
    assert names >= set(
        "grpo dr_grpo dapo gspo cispo rloo reinforce_plus_plus ppo ppo_max online_dpo xpo nash_md"
        " urpo grao remax gmpo sapo vespo".split()
    )


@pytest.mark.parametrize("name", ONLINE)
def test_declaration(name: str) -> None:
    method, spec = methods[name], spec_of(name)
    assert method.returns == "Model" and {"model", "data"} <= set(method.inputs)
    assert ("reference" in method.inputs) == ("ref_logp" in spec.needs or spec.opposed)
    assert {"steps", "lr", "answers", "max_tokens", "passes", "mix"} <= set(method.settings)
    assert "mix_data" in method.inputs
    # What a pool decides itself is not offered, since it would be dropped.
    rewarded = {"rewards", "weights", "missing_end"} <= set(method.settings)
    given_by_hand = {"reward_model", "principles"} <= set(method.inputs)
    assert rewarded == given_by_hand == (not spec.pools)
    values = method.validate({})
    assert method.validate(json.loads(json.dumps(values))) == values
    assert all(s.doc for s in method.settings.values())
    assert "gradient" in method.settings["clip"].doc  # not the clipping of ratios
    assert method.needs == ("weights", "logprob", "generate")
    assert method.loss is method.declared and method.paper and method.entry.rows in ("", spec.rows)


@pytest.mark.parametrize("shift", [-40.0, 0.0, 40.0])
@pytest.mark.parametrize("name", ONLINE)
def test_values_and_gradients_are_finite(name: str, shift: float) -> None:
    """However many nats a token of the answers has moved since they were drawn."""
    spec = spec_of(name)
    r = rollout(spec)
    leaf = r["logp"].clone().requires_grad_()
    update = spec(r.having(logp=leaf.detach()), settings_of(spec))
    assert all(t.isfinite().all() and not t.requires_grad for t in update.tensors.values())
    assert all(v.isfinite().all() for v in update.metrics.values())
    m = given(r, update, range(GROUPS))
    m = m.having(old_logp=m["old_logp"] - shift * m.mask_UKT)
    loss = update.loss(m)
    assert loss.total().isfinite() and not any(v.requires_grad for v in loss.metrics.values())
    assert all(v.isfinite().all() for v in loss.metrics.values())
    loss.total().backward()
    grad = m["logp"].grad
    assert grad is not None and grad.isfinite().all() and (shift or grad.abs().sum() > 0)
    if "values" in spec.needs:
        assert m["values"].grad is not None and m["values"].grad.abs().sum() > 0


@pytest.mark.parametrize("name", [n for n in ONLINE if not spec_of(n).pools])
def test_what_a_missing_end_costs_reaches_the_update(name: str) -> None:
    spec, cost = spec_of(name), 9.0
    r = rollout(spec)
    ended = r.columns["finished"].clone()
    ended[:, ::2], ended[:, 1::2] = 0.0, 1.0
    plain = Measurements(r.mask_UKT, r.tensors, {**r.columns, "finished": ended})
    reward = r["reward"] - cost * (1 - ended)
    costly = Measurements(r.mask_UKT, r.tensors, {**plain.columns, "reward": reward})
    a = spec(plain, settings_of(spec, missing_end=0.0))
    b = spec(costly, settings_of(spec, missing_end=cost))
    assert any(not torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors)


@pytest.mark.parametrize("name", ONLINE)
def test_padding_is_not_looked_at(name: str) -> None:
    spec = spec_of(name)
    r = rollout(spec)
    hidden = r.mask_UKT == 0
    pad = torch.nn.functional.pad
    wide = Measurements(
        pad(r.mask_UKT, (0, 3)),
        {n: pad(torch.where(hidden, 0.37, t), (0, 3), value=0.9) for n, t in r.tensors.items()},
        r.columns,
    )
    a, b = (spec(x, settings_of(spec)) for x in (r, wide))
    one, two = given(r, a, range(GROUPS)), given(wide, b, range(GROUPS))
    moved = {
        n: pad(torch.where(hidden, 0.37, one[n].detach()), (0, 3), value=0.9)
        for n in ("logp", "values", "entropy", "ref_top_kl")
    }
    assert torch.allclose(own_part(a.loss(one)), own_part(b.loss(two.having(**moved))), atol=1e-5)


@pytest.mark.parametrize("name", ONLINE)
def test_micro_batches_add_up_and_weights_are_known_before(name: str) -> None:
    spec = spec_of(name)
    r = rollout(spec)
    update = spec(r, settings_of(spec))
    m = given(r, update, range(GROUPS))
    whole = update.loss(m)
    terms = len(list(whole.terms()))
    together = own_part(whole).reshape(terms, GROUPS).sum(0)
    for u in range(GROUPS):
        alone = Measurements(
            m.mask_UKT[[u]],
            {n: t[[u]] for n, t in m.tensors.items()},
            {n: c[[u]] for n, c in m.columns.items()},
        )
        assert float(own_part(update.loss(alone)).detach().sum()) == pytest.approx(
            float(together[u].detach()), abs=1e-5
        )
    other = update.loss(given(r, update, range(GROUPS), seed=8))
    assert all(torch.equal(a[2], b[2]) for a, b in zip(whole.terms(), other.terms(), strict=True))


@pytest.mark.parametrize("name", ONLINE)
def test_groups_that_are_left_out_have_no_gradient(name: str) -> None:
    spec = spec_of(name)
    r = rollout(spec, flat=[1])
    plain: dict[str, object] = {}
    update = spec(r, settings_of(spec))
    for term in ("alpha", "ptx", "beta"):  # of the loss, beside the advantages: all groups have it
        if update.active_U is None and term in spec.settings:
            plain[term] = 0.0
            update = spec(r, settings_of(spec, **plain))
    if update.active_U is None:
        # A critic learns from every group, and so does whoever is pulled towards what it plays.
        assert spec.values or spec.opponent == "mixture"
        return
    m = given(r, update, range(GROUPS))
    update.loss(m).total().backward()
    grad = m["logp"].grad
    assert grad is not None
    idle = ~update.active_U.bool()
    assert torch.all(grad[idle] == 0) and grad[~idle].abs().sum() > 0


def table_for(spec: Online, rows: int = 4) -> Table:
    made: list[Row] = []
    for i in range(rows):
        row: Row = {"prompt": f"say {WORDS[i]}"}
        if spec.rows == "example":
            row["completion"] = f"a bad {WORDS[i]}"
        if spec.pools and i % 3 == 0:
            row |= {"answer": "3"}
        if spec.pools and i % 3 == 1:
            row |= {"completions": ["yes", "no"], "scores": [1.0, 0.0]}
        made.append(row)
    return Table(spec.rows, made)


class Counting:
    """A pool's own questions, its answers rewarded by their letters: a tiny model cannot grade."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.check, self.facts, self.prompt = pool.check, pool.facts, pool.prompt

    def score(self, groups: Sequence[Sequence[Row]], seed: int, say: Say) -> list[list[float]]:
        assert len(say([WORDS[0]], 2)[0]) == 2
        return [[sum(c < "n" for c in str(r["completion"])) / 6 for r in g] for g in groups]


SHORT: dict[str, object] = {
    "steps": 2, "batch": 3, "answers": 3, "max_tokens": 6, "lr": 2e-3, "minibatches": 1,
}  # fmt: skip
RULE = {"letters": {"use": "share_of", "letters": "abcdefghijklmnop"}}


@pytest.mark.parametrize("name", ONLINE)
def test_a_run_and_the_split_into_micro_batches(
    name: str, tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, model = spec_of(name), Model.open(tiny_path)
    rewards: dict[str, object] = {} if spec.pools else {"rewards": RULE}
    filters = {"entropy_share": 0.5} if "entropy_share" in spec.settings else {}
    build = train_online.pool_of
    monkeypatch.setattr(
        train_online, "pool_of", lambda *a: Counting(pool) if (pool := build(*a)) else None
    )
    runs: list[list[dict[str, object]]] = []
    counted = 0
    parts = OnlineTask.parts

    def counting(task: OnlineTask, rows: Sequence[int], step: int) -> object:
        nonlocal counted
        for part in parts(task, rows, step):
            counted += 1
            yield part

    monkeypatch.setattr(OnlineTask, "parts", counting)
    for budget in (100_000, 1):
        with use(Context(folder=tmp_path / str(budget), seed=3)) as context:
            made = methods[name](
                model, table_for(spec), **SHORT, **rewards, **filters, passes=2, budget=budget
            )
        assert isinstance(made, Model)
        kinds = [c.kind for c in made.weight_changes]
        assert kinds == ["adapter", *(["weights"] if "values" in spec.needs else [])]
        runs.append([dict(m) for m in context.metrics if "step" in m])
    assert len(runs[0]) == 4 and counted > 8
    assert any(float(str(s["grad_norm"])) > 0 for s in runs[0])
    # Later steps follow what floating point made of the first one's sums.
    for a, b in zip(runs[0][:2], runs[1][:2], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3, abs=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-2, abs=1e-4)


ONCE = SHORT | {"steps": 1, "passes": 1, "batch": 2, "answers": 2, "max_tokens": 4}
SORTS: dict[str, dict[str, object]] = {"full": {"rank": 0}, "top": {"rank": 0, "layers": 1}}


@pytest.mark.parametrize("sort", list(SORTS))
@pytest.mark.parametrize("name", ONLINE)
def test_whole_weights_and_a_frozen_trunk(
    name: str, sort: str, tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One update moves what is trained, everywhere in it, and nothing else."""
    spec, model = spec_of(name), Model.open(tiny_path)
    printed = {"printed": {"use": "share_of", "letters": string.printable}}
    rewards: dict[str, object] = {} if spec.pools else {"rewards": printed}
    critic = {"critic_rollouts": 0} if spec.values else {}
    build = train_online.pool_of
    monkeypatch.setattr(
        train_online, "pool_of", lambda *a: Counting(pool) if (pool := build(*a)) else None
    )
    with use(Context(folder=tmp_path, seed=2)) as context:
        made = methods[name](model, table_for(spec, 2), **ONCE, **rewards, **critic, **SORTS[sort])
    assert isinstance(made, Model)
    (step,) = [m for m in context.metrics if "step" in m]
    assert float(str(step["grad_norm"])) > 0
    before, after = model.folded(), made.folded()
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    top = {n for n in before if n.startswith("model.layers.2.")}
    assert moved == (set(before) if sort == "full" else top)
