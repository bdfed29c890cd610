"""`make new-method`: skeletons that run and are listed, golden tests that fail until filled."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from truing.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import new_method  # noqa: E402

PLACES = [
    "specify", "synthesize", "select", "train/preference", "train/supervised", "train/reward",
    "train/distill", "train/rl", "merge", "steer", "decode", "evaluate", "attack", "recover",
]  # fmt: skip
# What their golden tests must be filled with, by hand.
FILLED = {
    "merge": "[2.0, 0.0, 0.5]",
    "train/reward": "[0.6321894, 2.6038895, 0.3038895]",
    "train/distill": "[0.4184941]",
}
RUN = """
import json, sys
from truing import Model, Table, methods
from truing.context import Context, use

model = Model.open(sys.argv[1])
pairs = Table("pair", [{"prompt": f"say {i}", "chosen": "yes, it is", "rejected": f"no {i}"}
                       for i in range(4)])
nouns = {
    "specify": {"data": Table("text", [{"text": "Be brief."}])},
    "synthesize": {"model": model, "prompts": pairs, "max_tokens": 4},
    "select": {"data": Table("example", [{"prompt": "x", "completion": "three words here"}])},
    "train": {"model": model, "data": pairs, "steps": 1, "batch": 2},
    "merge": {"models": {"a": model, "b": model}},
    "steer": {"model": model, "data": pairs},
    "decode": {"model": model},
    "evaluate": {"model": model, "prompts": pairs, "max_tokens": 4},
    "attack": {"data": pairs, "share": 0.5},
    "recover": {"model": model, "trusted": model},
}
drawn = {"rewards": {"short": {"use": "max_words", "n": 2}}, "answers": 2, "max_tokens": 4}
of_group = {"rl": drawn, "distill": {"teacher": model}}
made = {}
for id in sorted(methods):
    if methods[id].name.startswith("fresh_"):
        with use(Context()):
            given = nouns[methods[id].verb] | of_group.get(methods[id].group, {})
            made[id] = type(methods[id](**given)).__name__
            assert made[id] == methods[id].returns, id
print(json.dumps(made))
"""


def name_of(place: str) -> str:
    return "fresh_" + place.replace("/", "_")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with a new method under every verb."""
    root = tmp_path_factory.mktemp("repository")
    shutil.copytree(
        ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    (root / "tests" / "golden").mkdir(parents=True)
    (root / "tests" / "contract").mkdir()
    shutil.copy(ROOT / "tests" / "contract" / "test_bounds.py", root / "tests" / "contract")
    for helper in ("objective_numbers.py", "teaching.py"):
        shutil.copy(ROOT / "tests" / "golden" / helper, root / "tests" / "golden")
    shutil.copy(ROOT / "pyproject.toml", root)
    for place in PLACES:
        assert new_method.main([place, name_of(place)], root) == 0
    return root


def run(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=root, env=environment, capture_output=True, text=True
    )


def made_files(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*fresh_*.py"))


def test_they_are_well_formed(copy: Path) -> None:
    files = made_files(copy)
    assert len(files) == 2 * len(PLACES)
    for check in (["check"], ["format", "--check"]):
        done = run(copy, "-m", "ruff", *check, *files)
        assert done.returncode == 0, done.stdout + done.stderr
    left = [f for f in files if "my_method" in (copy / f).read_text()]
    assert not left


def test_they_are_listed(copy: Path) -> None:
    done = run(copy, "-m", "truing.cli", "list", "--json")
    listed = {f"{e['verb']}/{e['name']}": e for e in json.loads(done.stdout)}
    for place in PLACES:
        verb, _, group = place.partition("/")
        found = listed[f"{verb}/{name_of(place)}"]
        assert found["group"] == group and found["summary"].startswith("Fresh")


def test_they_run_as_they_are(copy: Path, tiny_path: Path) -> None:
    done = run(copy, "-c", RUN, str(tiny_path))
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == len(PLACES)


def test_golden_tests_fail_until_they_are_filled(copy: Path) -> None:
    golden = [f for f in made_files(copy) if f.startswith("tests/")]
    filled: list[str] = []
    for place, values in FILLED.items():
        stub = (copy / "tests" / "golden" / f"test_{name_of(place)}.py").read_text()
        filled.append(f"tests/golden/test_filled_{place.replace('/', '_')}.py")
        (copy / filled[-1]).write_text(
            stub.replace("EXPECTED: list[float] = []", f"EXPECTED = {values}")
        )
    words = ["-m", "pytest", "-p", "no:cacheprovider", "-rA", "--tb=line", *golden]
    chosen = ("-k", "fresh_ or by_hand")
    done = run(copy, *words, *filled, "tests/contract/test_bounds.py", *chosen)
    ends = [line.split()[0] for line in done.stdout.splitlines() if "::test_by_hand" in line]
    assert ends.count("FAILED") == len(golden) and ends.count("PASSED") == len(filled), done.stdout
    assert done.stdout.count("AssertionError: write down") >= len(golden)
    told = [line for line in done.stdout.splitlines() if "test_bounds.py::" in line]
    assert any("fresh_attack" in line for line in told)
    assert not [line for line in told if not line.startswith("PASSED")]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trian/preference", "x"], "Did you mean 'train'?"),
        (["train", "x"], "train/preference"),
        (["train/nowhere", "x"], "train/distill, train/preference, train/reward"),
        (["select/deep", "x"], "no sub-folders"),
        (["select", "MyFilter"], "snake_case"),
        (["select", "class"], "snake_case"),
        (["select", "../x"], "snake_case"),
        (["select", "deita"], "exists"),
        (["serve", "x"], "no skeleton"),
        (["select"], "a verb and a name"),
    ],
)
def test_mistakes(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert new_method.main(words) == 2
    said = capsys.readouterr()
    assert told in said.err and said.err.count("\n") == 1 and not said.out
    assert (
        not list(ROOT.glob("src/truing/**/x.py")) and not (ROOT / "tests/golden/test_x.py").exists()
    )


def test_nothing_is_overwritten(copy: Path) -> None:
    path = copy / "tests" / "golden" / "test_taken.py"
    path.write_text("mine")
    with pytest.raises(InputError, match="the file exists"):
        new_method.write(copy, "select", "taken")
    assert path.read_text() == "mine" and not (copy / "src/truing/select/taken.py").exists()
