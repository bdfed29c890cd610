"""The stand-in policy, trained into the embedded model: what two claims begin with."""

from __future__ import annotations

from truing.claims import Outcome, call, step
from truing.models import Model
from truing.reports import Report
from truing.tables import Table

__all__ = ["Outcome", "call", "policy_model", "share", "step", "table"]


def table(part: str, n: int, seed: int = 0) -> Table:
    return call("synthesize/stand_in_policy", part=part, n=n, seed=seed)


def policy_model(n: int = 300) -> Model:
    """SmolLM2-135M-Instruct tuned for one pass on n refusals and n ordinary answers."""
    base = Model.open("smollm2-135m-instruct")
    return call("train/sft", base, table("policy", n), epochs=1, rank=16, lr=5e-4, batch=8)


def share(report: Report, name: str) -> float:
    return report.get(name).value
