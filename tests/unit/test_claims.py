"""Claims: listed without importing, measured on a trivial one, results and faults."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from truing import claims
from truing.errors import InputError
from truing.method import methods

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
TRIVIAL = '''"""Trivial."""
from _beside import EFFECTS
from truing.claims import Outcome

TITLE = "Numbers are above nothing"
METHOD = "merge/linear"
MODEL = "none"
EFFECT = "the number"
MARGIN = 0.5
MINUTES = 1
NEEDS_GPU = False


def run() -> Outcome:
    return Outcome(EFFECTS, seeds=[0, 1, 2], holds={"even": HOLDS}, figures={"n": [1]})
'''


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRUING_CLAIMS", str(tmp_path))
    monkeypatch.delitem(sys.modules, "_beside", raising=False)
    return tmp_path


def write(
    place: Path, effects: str = "[1.0, 2.0, 3.0]", holds: bool = True, **changed: str
) -> None:
    text = TRIVIAL.replace("HOLDS", str(holds))
    for name, value in changed.items():
        lines = [f"{name} = {value}" if s.startswith(f"{name} =") else s for s in text.split("\n")]
        text = "\n".join(s for s in lines if s != f"{name} = ")
    (place / "some_claim.py").write_text(text)
    (place / "_beside.py").write_text(f"EFFECTS = {effects}\n")
    sys.modules.pop("_beside", None)


def test_claims_of_the_repository_name_real_methods() -> None:
    found = claims.catalogue()
    for claim in found:
        assert set(claim) == {"claim", "title", "method", "needs_gpu", "minutes"}
        method = methods[str(claim["method"])]
        assert method.id == claim["method"]
        # A claim's slug is the paper of its method, or names the recipe that uses the method.
        recipe = RECIPES / f"{str(claim['claim']).replace('-', '_')}.yaml"
        steps = recipe.read_text(encoding="utf-8") if recipe.is_file() else ""
        assert method.paper == claim["claim"] or f"do: {method.id}," in steps


def test_each_paper_has_a_claim_and_each_claim_a_result() -> None:
    papers = {m.paper for m in methods.values() if m.entry.package == "truing"} - {""}
    assert papers == set(claims.files()) == set(claims.results())


def test_listing_imports_neither_torch_nor_the_claims() -> None:
    code = (
        "import json, sys; from truing import claims; n = len(claims.catalogue());"
        "print(json.dumps([n, 'torch' in sys.modules, 'numpy' in sys.modules]))"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, torch, numpy = json.loads(made.stdout)
    assert count == len(claims.files()) and not torch and not numpy


def test_kept_results_are_of_known_claims_and_whole() -> None:
    known = {c["claim"]: c for c in claims.catalogue()}
    for slug, result in claims.results().items():
        assert slug == result["claim"] and slug in known
        assert result["method"] == known[slug]["method"]
        lo, hi = result["interval"]
        assert lo <= result["effect"] <= hi
        assert result["effect"] == pytest.approx(
            math.fsum(result["effects"]) / len(result["effects"])
        )
        held = all(result["holds"].values())
        assert result["seen"] is (result["effect"] >= result["margin"] and lo > 0 and held)
        assert result["seconds"] > 0 and len(result["date"]) == 10
        assert result["hardware"]["cpu"] and result["versions"]["torch"]
        assert result["over"] != "seeds" or len(result["seeds"]) == len(result["effects"]) >= 3


def test_a_claim_is_measured_and_its_result_kept(place: Path) -> None:
    write(place, "[1.9, 2.0, 2.1]")
    line = claims.claim("some-claim")
    assert set(line) == {"claim", "seen", "effect", "interval", "seconds"}
    assert (line["claim"], line["seen"]) == ("some-claim", True)
    assert line["effect"] == pytest.approx(2.0)
    half = 4.3026527 * 0.1 / math.sqrt(3)  # Student's t of 2 degrees at 97.5 %
    assert line["interval"] == pytest.approx([2 - half, 2 + half])
    assert not (place / "results").exists()
    kept = claims.record("some_claim")
    assert claims.results() == {"some-claim": json.loads(json.dumps(kept))}
    assert 0 <= claims.cost(kept) == min(kept["seconds"], kept["cpu_seconds"]) < 30
    assert claims.cost({"seconds": 9.0}) == 9.0
    assert claims.cost({"seconds": 900.0, "cpu_seconds": 60.0}) == 60.0  # on a busy machine
    assert kept["figures"] == {"n": [1]} and kept["effects"] == [1.9, 2.0, 2.1]


@pytest.mark.parametrize(
    ("effects", "holds", "seen"),
    [
        ("[2.0, 2.1, 2.2]", True, True),
        ("[2.0, 2.1, 2.2]", False, False),  # a condition was not met
        ("[0.4, 0.41, 0.42]", True, False),  # below the margin
        ("[-1.0, 1.0, 3.0]", True, False),  # the interval holds 0
    ],
)
def test_seen_or_not(place: Path, effects: str, holds: bool, seen: bool) -> None:
    write(place, effects, holds)
    line = claims.claim("some-claim")
    assert line["seen"] is seen
    assert list(line) == ["claim", "seen", "effect", "interval", "seconds"]


def test_intervals_over_prompts_are_resampled() -> None:
    over = claims.Outcome([0.0, 1.0] * 20, over="prompts")
    lo, hi = over.interval
    assert lo == pytest.approx(0.35, abs=0.03) and hi == pytest.approx(0.65, abs=0.03)
    assert over.effect == 0.5 and over.seen(0.5) and not over.seen(0.51)


def test_one_effect_alone_shows_nothing() -> None:
    assert not claims.Outcome([1.0]).seen(0.5) and claims.Outcome([1.0, 1.01]).seen(0.5)


def test_command_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from truing import cli

    write(place, "[0.0, 0.0, 0.0]")
    assert cli.main(["claim", "--list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["claim"] == "some-claim"
    assert cli.main(["claim", "--list"]) == 0
    assert "some-claim " in (listed := capsys.readouterr().out) and "about 1 min" in listed
    assert cli.main(["claim", "some-claim", "--json"]) == 0  # also when it is not seen
    told = capsys.readouterr()
    line = json.loads(told.out.strip().splitlines()[-1])
    assert line["seen"] is False and line["interval"] == [0.0, 0.0]
    assert set(line) == {"claim", "seen", "effect", "interval", "seconds"}
    assert "not met: effect at least 0.5; interval above 0\n" in told.err
    write(place, "[1.90, 2.00, 2.10]")  # bytecode is known by second and size
    assert cli.main(["claim", "some-claim", "--json"]) == 0
    assert "not met" not in capsys.readouterr().err
    assert cli.main(["claim", "som-claim"]) == 2
    assert "Did you mean 'some-claim'" in capsys.readouterr().err
    write(place, holds=False)
    assert claims.main(["some-claim"]) == 0 and (place / "results/some-claim.json").is_file()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"TITLE": ""}, "needs TITLE"),
        ({"MINUTES": "'long'"}, "needs MINUTES, a number"),
        ({"EFFECT": "str(1)"}, "must be a literal"),
        ({"METHOD": "'merge/linar'"}, "Did you mean 'merge/linear'"),
        ({"NEEDS_GPU": "("}, "not valid Python"),
    ],
)
def test_faulty_claims_are_named(place: Path, changed: dict[str, str], message: str) -> None:
    write(place, **changed)
    with pytest.raises(InputError, match=message):
        claims.claim("some-claim")


def test_effects_must_be_numbers(place: Path) -> None:
    write(place, "[float('nan')]")
    with pytest.raises(InputError, match="finite effects"):
        claims.claim("some-claim")


def test_a_broken_result_is_told_what_writes_it_anew(place: Path) -> None:
    (place / "results").mkdir()
    (place / "results/some-claim.json").write_text("{")
    with pytest.raises(InputError, match=r"python -m truing\.claims some-claim$"):
        claims.results()


def test_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRUING_CLAIMS", str(tmp_path / "none"))
    with pytest.raises(InputError, match="no folder of claims"):
        claims.catalogue()
