"""Every claim that needs no GPU, measured on the real model beside the result that is committed."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from truing import claims
from truing.models import Model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
CLAIMS = [str(c["claim"]) for c in claims.catalogue() if not c["needs_gpu"]]


@pytest.fixture(autouse=True)
def the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real models are fetched once for all; tests have an empty home otherwise."""
    home = os.environ["TRUING_TEST_CACHE"] or str(Path.home() / ".cache" / "truing")
    monkeypatch.setenv("TRUING_HOME", home)
    Model.open("smollm2-135m-instruct")


@pytest.mark.parametrize("slug", CLAIMS)
def test_claim_is_as_committed(slug: str) -> None:
    """The interval meets the committed one; what has no result yet gets one, to be committed."""
    committed = claims.results().get(slug)
    made = claims.measure(slug) if committed else claims.record(slug)
    (lo, hi), (effect) = made["interval"], made["effect"]  # type: ignore[misc]
    assert math.isfinite(effect) and lo <= effect <= hi  # type: ignore[operator, arg-type]
    if committed:
        low, high = committed["interval"]  # type: ignore[misc]
        assert lo <= high and low <= hi, (made["interval"], committed["interval"])  # type: ignore[operator]
