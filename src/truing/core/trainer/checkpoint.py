"""Checkpoints of a training run: safetensors and JSON, written atomically, the last two kept.

They hold whole tensors, however these are cut over processes: another number can go on from them.
Large ones are several files, so that what lies on a GPU is never in main memory all at once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from truing.context import Json
from truing.core.files import new_folder
from truing.core.trainer import distributed
from truing.core.training import State
from truing.errors import InputError

SCHEMA_VERSION = 1
KEEP = 2
PART = 2**30  # bytes of a file, unless one tensor is larger


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint holds: the updates made, tensors, and the metrics up to here."""

    step: int
    tensors: dict[str, Tensor]
    history: list[dict[str, Json]]

    @property
    def state(self) -> State:
        """The task's own state."""
        return self._part("state/")

    def _part(self, prefix: str) -> State:
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}

    def restore(self, named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Put values into parameters and optimizer, in place."""
        for name, value in self._part("parameter/").items():
            distributed.put(named[name], value)
        for name, parameter in named.items():
            kept = self._part(f"optimizer/{name}/")
            if kept:  # a parameter that never had a gradient has no state
                # The count of steps too: a fused kernel reads it where the parameter lies.
                optimizer.state[parameter] = {
                    n: distributed.like(parameter, t) for n, t in kept.items()
                }


def writable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values as safetensors can write them: in main memory, each with memory of its own.

    Copied is only what must be. Weights and both moments are three times the model, for which a
    machine that trains it need not have room a second time.
    """
    made: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        here = tensor.detach().to("cpu").contiguous()
        memory = here.untyped_storage().data_ptr()
        if memory in taken:  # tied weights, views
            here = here.clone()
            memory = here.untyped_storage().data_ptr()
        taken.add(memory)
        made[name] = here
    return made


def _parts(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The same tensors, in order, a file's together."""
    made: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        if made[-1] and size > PART:
            made.append({})
            size = tensor.nbytes
        made[-1][name] = tensor
    return made


def _file(path: Path, number: int) -> Path:
    return path / (f"tensors-{number}.safetensors" if number else "tensors.safetensors")


class Checkpoints:
    """The checkpoints of the run that `key` names, in `folder`."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key

    def steps(self) -> list[int]:
        """Updates after which there is a checkpoint, in order."""
        return sorted(int(p.name[5:]) for p in self.folder.glob("step-[0-9]*") if p.is_dir())

    def save(
        self,
        step: int,
        named: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        state: State,
        history: list[dict[str, Json]],
        *,
        spare: int = 0,
    ) -> None:
        """Write one, whole or not at all, and delete all but the last two and that of `spare`.

        All processes call it, since tensors are gathered from all; the first one writes.
        """
        tensors = {f"parameter/{n}": p.detach() for n, p in named.items()}
        tensors |= {f"state/{n}": t for n, t in state.items()}
        for name, parameter in named.items():
            for part, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{name}/{part}"] = cast(Tensor, value)
        tensors = distributed.full(tensors)
        if distributed.leads():
            self.write(step, tensors, history, spare=spare)

    def write(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        history: list[dict[str, Json]],
        *,
        spare: int = 0,
    ) -> None:
        """Write these tensors, whole or not at all; older ones go as `save` says."""
        parts = _parts(tensors)
        facts = {"schema_version": SCHEMA_VERSION, "key": self.key, "step": step}
        facts |= {"files": len(parts)}
        with new_folder(self.folder / f"step-{step:08d}") as partial:
            for number, part in enumerate(parts):
                save_file(writable(part), _file(partial, number))
            (partial / "facts.json").write_text(json.dumps(facts | {"history": history}))
        for old in [s for s in self.steps()[:-KEEP] if s != spare]:
            # What is left, as of files on NFS that are mapped still, goes with the next.
            shutil.rmtree(self.folder / f"step-{old:08d}", ignore_errors=True)

    def last(self) -> Checkpoint | None:
        """The newest one that is whole and of this run; of several processes all go on from it.

        Raises:
            InputError: they do not find the same one.
        """
        found = next(filter(None, map(self.at, reversed(self.steps()))), None)
        steps = distributed.everyone(found.step if found is not None else 0)
        if len(set(steps)) > 1:
            raise InputError(
                "not all processes can read the same last checkpoint",
                where=str(self.folder),
                seen=f"after updates {', '.join(map(str, steps))}",
                fix="Put that folder on a disk that all machines share, or run the command again",
            )
        return found

    def at(self, step: int) -> Checkpoint | None:
        """That of this run after update `step`; None where it is damaged or not there."""
        path = self.folder / f"step-{step:08d}"
        tensors: dict[str, Tensor] = {}
        try:
            facts = json.loads((path / "facts.json").read_text())
            for number in range(facts.get("files", 1)):
                tensors |= load_file(_file(path, number))
        except (OSError, ValueError, SafetensorError):
            return None  # for the last: the one before is as good, only older
        if facts.get("key") == self.key and facts.get("schema_version") == SCHEMA_VERSION:
            return Checkpoint(step, tensors, facts["history"])
        return None
