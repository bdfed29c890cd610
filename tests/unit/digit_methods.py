"""Read handwritten digits: methods and a model of images, as another package would bring them.

The model is two convolutions with a batch norm, whose running means are state, and dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from truing import component, method
from truing.context import current
from truing.core.engine import train
from truing.core.plain_task import PlainTask
from truing.core.stats import wilson
from truing.core.training import Training
from truing.core.weights import replaced
from truing.datasets import licence_of
from truing.models import Model
from truing.reports import Measure, Report
from truing.tables import Row, Table, content_hash


@component("builder")
def digit_reader(*, width: int = 16, norm: bool = True) -> nn.Module:
    """Images [B, 1, 8, 8] to scores of ten digits [B, 10]."""
    body = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width) if norm else nn.Identity(),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
    )
    return nn.Sequential(body, nn.Linear(32 * width, 10))


def tensors(data: Table) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 8, 8] in 0..1 and labels [N]."""
    images = [torch.as_tensor(r["image"]).float().reshape(1, 8, 8) / 16 for r in data]
    return torch.stack(images), torch.tensor([int(str(r["label"])) for r in data])


@method(field="image")
def digits_part(data: Table, *, part: Literal["train", "held_out"], held_out: int = 397) -> Table:
    """The last rows, or all before them.

    Args:
        part: which of the two.
        held_out: how many the last are.
    """
    first = len(data) - held_out
    rows = range(first) if part == "train" else range(first, len(data))
    return data.take(rows).with_lineage(filter=part)


@method(field="image", needs=("weights",))
def digits(
    model: Model, data: Table, *, epochs: float = 3.0, lr: float = 4e-3, batch: int = 64
) -> Model:
    """Learn to read digits.

    Args:
        epochs: passes over the rows.
        lr: peak learning rate.
        batch: rows of one update.
    """
    module = model.load_module(fresh=True).module.train()
    images, labels = tensors(data)

    def losses(rows: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        at = list(rows)
        scores = module(images[at])
        loss = nn.functional.cross_entropy(scores, labels[at], reduction="none")
        return loss, {"accuracy": (scores.argmax(1) == labels[at]).float()}

    settings = Training(epochs=epochs, lr=lr, batch=batch)
    key = content_hash([model.weights_key, data.key, vars(settings), current().seed], 8)
    names = [str(r["id"]) for r in data]
    train(PlainTask("digits", module, len(data), losses, micro=32, row_names=names), settings,
          key=key)  # fmt: skip
    made = replaced(model, module.state_dict().items(), current().folder / f"digits-{key}")
    return made.with_licences([licence_of([data])]).called(f"{model.name}+digits")


@method(name="digits", field="image", needs=("weights",))
def accuracy(model: Model, data: Table) -> Report:
    """How many digits a model reads right, with Wilson intervals."""
    images, labels = tensors(data)
    with torch.inference_mode():
        said = model.load_module().module(images).argmax(1)
    right = (said == labels).tolist()

    def share(name: str, hits: list[bool]) -> Measure:
        lo, hi = wilson(sum(hits), len(hits))
        value = sum(hits) / len(hits)
        return Measure("accuracy", value, lo, hi, len(hits), "share", name, "higher")

    by_digit = [[r for r, y in zip(right, labels.tolist()) if y == digit] for digit in range(10)]
    measures = [share("", right), *(share(str(d), hits) for d, hits in enumerate(by_digit))]
    rows: list[Row] = [
        {"image": r["image"], "label": r["label"], "said": s, "lineage": {"parents": [r["id"]]}}
        for r, s in zip(data, said.tolist(), strict=True)
    ]
    return Report("reading digits", measures, Table("record", rows), {"model": model.name})
