"""The quick start's small run, made once for all tests that need one that nothing disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import STEPS, Small, make


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("small") / "template")


@pytest.fixture(scope="session")
def whole(template: Path) -> Small:
    """A run that nothing disturbed, started as users start it: others are held against it."""
    small = Small.copy(template, template.parent / "whole")
    line = small.finish_as_user()
    assert line["cached_steps"] == 0 and set(small.steps()) == set(STEPS)
    assert line["n_prompts"] == 8 and {"violations_after", "ability_after"} <= set(line)
    small.verify()
    return small
