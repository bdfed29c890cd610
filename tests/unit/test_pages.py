"""What the generated pages tell: examples that can work, what models must be able to do, claims."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from truing import claims
from truing.context import Json
from truing.method import methods
from truing.models import ALL

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import pages  # noqa: E402

REWARDED = [
    m for m in methods if "rewards" in methods[m].settings and methods[m].entry.package == "truing"
]


@pytest.mark.parametrize("name", REWARDED)
def test_an_example_has_something_to_reward_answers_by(name: str) -> None:
    use = pages.method_page(methods[name]).partition("## Use")[2].partition("## Inputs")[0]
    assert len(re.findall(r"```(sh|python|yaml)\n", use)) == 3
    for block in re.findall(r"```\w+\n(.*?)```", use, re.S):
        assert re.search("principles|process.models|rewards", block), block


def test_examples_name_the_rules_of_the_checkout() -> None:
    page = pages.method_page(methods["train/grpo"])
    assert "--principles recipes/principles.yaml" in page.replace("\\\n  ", "")
    assert "(model, data, principles=principles)" in page
    assert (ROOT / "recipes" / "principles.yaml").is_file()
    assert "--process-models a=process_models/" in pages.method_page(methods["decode/prm_guided"])
    assert "reward_model=reward_model" in pages.method_page(methods["train/salmon_ppo"])


def test_pages_tell_what_models_must_be_able_to_do() -> None:
    for name in methods:
        for said in re.findall(r"needs models that can ([^;]*?)[;.]", _facts(name)):
            assert set(re.findall(r"\w+", said)) <= ALL, (name, said)
    assert "needs models that can `weights`, `logprob`, `generate`" in _facts("train/ppo")


def _facts(name: str) -> str:
    return pages.method_page(methods[name]).partition("## Use")[0]


CLAIM = """'''A claim.'''
TITLE = "{title}"
METHOD = "train/dpo"
EFFECT = "e"
MARGIN = 0.1
MINUTES = 4
NEEDS_GPU = {gpu}
"""


def test_claims_say_what_was_not_met_and_what_has_no_result(tmp_path: Path) -> None:
    kept = tmp_path / "claims" / "results"
    kept.mkdir(parents=True)
    for name, gpu in (("not_measured", False), ("too_large", True), ("a_b", False)):
        (kept.parent / f"{name}.py").write_text(CLAIM.format(title=f"About {name}", gpu=gpu))
    (kept.parent / "_helper.py").write_text("")
    result = {"claim": "a-b", "title": "t", "seen": False, "seconds": 90, "date": "2026-01-01"}
    result |= {"margin": 0.1, "effect": 0.05, "interval": [-0.1, 0.2]}
    result |= {"holds": {"able as before": False, "shorter": True}}
    (kept / "a-b.json").write_text(json.dumps(result))
    lines = [line for line in pages.claims_page(tmp_path).splitlines() if line.startswith("| `")]
    assert lines == [
        "| `a-b` | t | **not seen**; not met: effect at least 0.1; interval above 0; able as before"
        " | 0.05 [-0.1, 0.2] | 1.5 min | 2026-01-01 |",
        "| `not-measured` | About not\\_measured | no result yet | - | about 4 min | - |",
        "| `too-large` | About too\\_large | no result yet, needs a GPU | - | about 4 min | - |",
    ]


def test_what_was_missed() -> None:
    seen: dict[str, Json] = {
        "margin": 0.1,
        "effect": 0.2,
        "interval": [0.1, 0.3],
        "holds": {"a": True},
    }
    assert claims.missed(seen) == []
    assert claims.missed(seen | {"effect": 0.05}) == ["effect at least 0.1"]
    assert claims.missed(seen | {"interval": [0.0, 0.3]}) == ["interval above 0"]
    assert claims.missed(seen | {"holds": {"a": False, "b": True}}) == ["a"]
    for result in claims.results().values():
        assert bool(claims.missed(result)) is not result["seen"]


def test_every_claim_of_the_repository_is_on_the_page() -> None:
    page = pages.claims_page(ROOT)
    for slug in claims.files():
        assert page.count(f"| `{slug}` |") == 1


def test_minutes_are_near_those_that_were_measured() -> None:
    stated = {c["claim"]: c["minutes"] for c in claims.catalogue()}
    for slug, result in claims.results().items():
        minutes, took = float(str(stated[slug])), float(str(result["seconds"])) / 60
        assert took / 1.5 <= minutes <= 1.5 * took + 1, slug
