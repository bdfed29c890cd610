"""A small image model on real handwritten digits: the same loop, resume, store and metrics as text.

The images are UCI's Optical Recognition of Handwritten Digits (8 x 8, CC BY 4.0).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from truing.context import Context, use
from truing.core import engine, opening
from truing.core.engine import train
from truing.core.plain_task import PlainTask
from truing.core.training import Training
from truing.errors import Stopped
from truing.models import Model
from truing.tables import Table


class Reader(nn.Module):
    """Two convolutions, a batch norm (whose running means are state) and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.2),
        )
        self.head = nn.Linear(32 * 16, 10)

    def forward(self, image_B1HW: Tensor) -> Tensor:
        return self.head(self.body(image_B1HW))


@functools.cache
def digits() -> tuple[Tensor, Tensor, list[str]]:
    """Images [1797, 1, 8, 8] in 0..1, labels, ids: read as a Table like everything else."""
    table = Table.read("digits")
    images = torch.stack([torch.as_tensor(r["image"]).float().reshape(1, 8, 8) for r in table])
    labels = torch.tensor([int(str(r["label"])) for r in table])
    return images / images.max(), labels, [str(r["id"]) for r in table]


def task(module: nn.Module, images: Tensor, labels: Tensor, ids: list[str]) -> PlainTask:
    def losses(rows: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        at = list(rows)
        scores = module(images[at])
        loss = nn.functional.cross_entropy(scores, labels[at], reduction="none")
        return loss, {"accuracy": (scores.argmax(1) == labels[at]).float()}

    return PlainTask("digits", module.train(), len(images), losses, micro=32, row_names=ids)


def new_reader() -> Reader:
    torch.manual_seed(0)
    return Reader()


SETTINGS = Training(epochs=3.0, lr=4e-3, batch=64)


def test_reads_digits_after_three_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels, ids = digits()
    assert images.shape == (1797, 1, 8, 8) and sorted(set(labels.tolist())) == list(range(10))
    module = new_reader()
    with use(Context(seed=1, folder=tmp_path / "step")) as context:
        done = train(task(module, images[:1400], labels[:1400], ids), SETTINGS)
    assert done.steps == 66 and [m["step"] for m in context.metrics] == list(range(1, 67))
    assert done.history[0]["accuracy"] < 0.4 < 0.9 < done.history[-1]["accuracy"]
    module.eval()
    with torch.no_grad():
        held_out = (module(images[1400:]).argmax(1) == labels[1400:]).float().mean()
    assert held_out > 0.85

    # Into a Model and back: the store's way of keeping any architecture.
    monkeypatch.setattr(
        importlib.import_module("truing.method"), "get_component", lambda kind, ref: Reader
    )
    made = opening.create(
        tmp_path / "model", {"use": "reader"}, module.state_dict().items(), name="reader"
    )
    made.save(tmp_path / "saved")
    back = Model.load(tmp_path / "saved")
    assert back.key == made.key and back.can == {"hidden", "weights"}
    with torch.no_grad():
        assert torch.equal(back.load_module().module(images[:9]), module(images[:9]))


def test_killed_and_resumed_gives_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels, ids = digits()
    images, labels = images[:256], labels[:256]

    def run(folder: Path, die: int = 0) -> dict[str, Tensor]:
        module = new_reader()
        one = task(module, images, labels, ids)

        def after(step: int) -> None:
            if step == die:
                raise KeyboardInterrupt

        one.after_step = after
        with use(Context(seed=2, folder=folder)):
            train(one, Training(steps=8, lr=3e-3, batch=48))
        return module.state_dict()

    whole = run(tmp_path / "whole")
    monkeypatch.setattr(engine, "CHECKPOINT_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", die=6)
    resumed = run(tmp_path / "cut")
    # Running means of the batch norm and the dropout's masks included.
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    images, labels, ids = digits()
    images, labels = images[:64].clone(), labels[:64]
    module = new_reader()
    module.body[1] = nn.Identity()  # a batch norm would spread the fault over the batch
    images[5] = torch.nan
    with use(Context(folder=tmp_path)), pytest.raises(Stopped, match=ids[5]):
        train(task(module, images, labels, ids), Training(epochs=1.0, batch=16, lr=1e-3))
