"""Checkpoints: written without a second copy of what is in memory, and read back as it was."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from truing.core.trainer import checkpoint, distributed
from truing.core.trainer.checkpoint import Checkpoints, writable
from truing.errors import InputError


def _trained() -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    """Two tied weights and one laid out the other way round, after an update."""
    source = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(64, 32, generator=source))
    turned = nn.Parameter(torch.randn(16, 8, generator=source).T)
    named = {"in": weight, "out": nn.Parameter(weight.detach()), "turned": turned}
    optimizer = torch.optim.AdamW(list(named.values()), lr=0.1, fused=True)
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return named, optimizer


def test_only_what_must_be_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, optimizer = _trained()
    written: dict[str, Tensor] = {}
    save_file = checkpoint.save_file

    def watched(tensors: dict[str, Tensor], path: Path) -> None:
        written.update(tensors)
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", watched)
    Checkpoints(tmp_path, "k").save(1, named, optimizer, {}, [])
    held = {p.data_ptr() for p in named.values()}
    held |= {t.data_ptr() for state in optimizer.state.values() for t in state.values()}
    copied = {n for n, t in written.items() if t.data_ptr() not in held}
    # The second of tied weights, and what does not lie in order.
    turned = {f"optimizer/turned/{m}" for m in ("exp_avg", "exp_avg_sq")}
    assert copied == {"parameter/out", "parameter/turned", *turned}


def test_files_that_cannot_be_deleted_yet_stop_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, where a file that is mapped still goes on under another name."""

    def full(path: Path, **_: object) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    kept = Checkpoints(tmp_path, "k")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", full)
        for step in range(1, 5):
            kept.write(step, {"a": torch.ones(1) * step}, [])
    found = kept.last()
    assert found is not None and float(found.tensors["a"]) == 4
    kept.write(5, {"a": torch.ones(1)}, [])
    assert kept.steps() == [4, 5]


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    named, optimizer = _trained()
    view = torch.arange(6.0)
    state = {"whole": view, "part": view[2:4], "turned": view.view(2, 3).T}
    Checkpoints(tmp_path, "k").save(7, named, optimizer, state, [{"loss": 1.0}])
    found = Checkpoints(tmp_path, "k").last()
    assert found is not None and found.step == 7 and found.history == [{"loss": 1.0}]
    assert all(torch.equal(found.state[n], t) for n, t in state.items())
    wanted = {n: p.detach().clone() for n, p in named.items()}
    other, fresh = _trained()
    with torch.no_grad():
        for parameter in other.values():
            parameter.zero_()
    found.restore(other, fresh)
    assert all(torch.equal(other[n], t) for n, t in wanted.items())
    for name, parameter in named.items():
        for part, value in optimizer.state[parameter].items():
            assert torch.equal(fresh.state[other[name]][part], value)


def test_all_processes_go_on_from_the_same_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Checkpoints(tmp_path, "k")
    kept.write(2, {"a": torch.ones(1)}, [])
    monkeypatch.setattr(distributed, "everyone", lambda step: [4, step])
    with pytest.raises(InputError, match="after updates 4, 2"):
        kept.last()


def test_shared_memory_is_written_once_each() -> None:
    whole = torch.arange(4.0)
    made = writable({"a": whole, "b": whole, "c": whole[1:3], "d": whole.view(2, 2).T})
    assert made["a"].data_ptr() == whole.data_ptr()
    assert len({t.untyped_storage().data_ptr() for t in made.values()}) == 4
    assert made["c"].tolist() == [1.0, 2.0] and made["d"].tolist() == [[0.0, 2.0], [1.0, 3.0]]


def test_large_ones_are_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that of what lies elsewhere no more is in main memory at a time."""
    named, optimizer = _trained()
    sizes: list[list[int]] = []
    save_file = checkpoint.save_file

    def watched(tensors: dict[str, Tensor], path: Path) -> None:
        sizes.append([t.nbytes for t in tensors.values()])
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", watched)
    monkeypatch.setattr(checkpoint, "PART", 9000)
    Checkpoints(tmp_path, "k").save(3, named, optimizer, {}, [])
    assert len(sizes) > 3 and all(len(part) == 1 or sum(part) <= 9000 for part in sizes)
    found = Checkpoints(tmp_path, "k").last()
    assert found is not None and all(
        torch.equal(found.tensors[f"parameter/{n}"], p) for n, p in named.items()
    )
    assert len(found.tensors) == sum(map(len, sizes))
    next(tmp_path.glob("*/tensors-2.safetensors")).unlink()
    assert Checkpoints(tmp_path, "k").last() is None
