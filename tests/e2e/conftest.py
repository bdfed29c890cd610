"""The quick start's small run, made once for all tests that need one that nothing disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import STEPS, Small, make

# What the last line of the quick start says, in this order: others read it by these names.
SAYS = [
    "job", "violations_before", "violations_after", "difference_interval", "relevance_before",
    "relevance_after", "words_before", "words_after", "ability_before", "ability_after",
    "ability_metric", "n_prompts", "seconds", "cached_steps", "report",
]  # fmt: skip


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("small") / "template")


@pytest.fixture(scope="session")
def whole(template: Path) -> Small:
    """A run that nothing disturbed, started as users start it: others are held against it."""
    small = Small.copy(template, template.parent / "whole")
    line = small.finish_as_user()
    assert line["cached_steps"] == 0 and set(small.steps()) == set(STEPS)
    assert line["n_prompts"] == 8 and list(line) == SAYS
    small.verify()
    return small
