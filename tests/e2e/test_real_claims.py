"""Every claim that needs no GPU, measured on the real model beside the result that is committed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from truing import claims
from truing.models import Model

pytestmark = pytest.mark.slow
# Three times what a claim says that it takes, and a minute for the model to be fetched.
CLAIMS = [
    pytest.param(c["claim"], marks=pytest.mark.timeout(60 + 180 * float(str(c["minutes"]))))
    for c in claims.catalogue()
    if not c["needs_gpu"]
]


@pytest.fixture(autouse=True)
def the_users_cache(monkeypatch: pytest.MonkeyPatch, users_environment: dict[str, str]) -> None:
    """Real models are fetched once for all; tests have an empty home otherwise."""
    home = str(Path.home() / ".cache" / "truing")
    for name, value in ({"TRUING_HOME": home} | users_environment).items():
        monkeypatch.setenv(name, value)
    Model.open("smollm2-135m-instruct")


@pytest.mark.parametrize("slug", CLAIMS)
def test_claim_is_as_committed(slug: str) -> None:
    """Seen or not as committed, and the intervals meet; what has no result yet gets one."""
    committed = claims.results().get(slug)
    made = claims.measure(slug) if committed else claims.record(slug)
    (lo, hi), (effect) = made["interval"], made["effect"]  # type: ignore[misc]
    assert math.isfinite(effect) and lo <= effect <= hi  # type: ignore[operator, arg-type]
    if committed:
        low, high = committed["interval"]  # type: ignore[misc]
        assert made["seen"] is committed["seen"], (claims.missed(made), committed["interval"])
        assert lo <= high and low <= hi, (made["interval"], committed["interval"])  # type: ignore[operator]
