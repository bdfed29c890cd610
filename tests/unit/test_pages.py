"""What the generated pages tell: examples that can work, what models must be able to do, claims."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from truing import catalogue, claims
from truing.context import Json
from truing.core.modelfiles.bases import ALL
from truing.core.objective import objective_of
from truing.inputs import holds
from truing.method import methods
from truing.principles import Principles
from truing.tables import KINDS

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import pages  # noqa: E402
import result_pages  # noqa: E402

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
    assert 'principles="recipes/principles.yaml"' in page
    assert (ROOT / "recipes" / "principles.yaml").is_file()
    page = pages.method_page(methods["decode/prm_guided"])
    assert "--process-models steps=process_model/" in page
    assert 'reward_model="salmon_reward/"' in pages.method_page(methods["train/salmon_ppo"])


def test_pages_tell_what_models_must_be_able_to_do() -> None:
    assert set(pages.ABILITIES) == ALL
    said = "needs models that have weights, give log-probabilities and generate"
    assert said in _facts("train/ppo")
    assert "needs models that generate;" in _facts("decode/best_of_n").replace(".", ";")


def _facts(name: str) -> str:
    return pages.method_page(methods[name]).partition("## Use")[0]


def _inputs(name: str) -> dict[str, str]:
    """What the page of a method says of each input."""
    table = pages.method_page(methods[name]).partition("## Inputs")[2].partition("##")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.M))


def test_a_page_names_the_claims_that_are_about_its_method() -> None:
    about = {c["claim"]: c["method"] for c in claims.catalogue()}
    for name in methods:
        if methods[name].entry.package != "truing":
            continue
        said = _facts(name)
        own = re.findall(r"; claim `([\w-]+)`", said)
        assert sorted(own) == sorted(slug for slug, of in about.items() if of == name), name
        for slug, of in re.findall(r"its paper's claim, `([\w-]+)`, is about \[([\w/]+)\]", said):
            assert about[slug] == of != name and methods[name].paper == slug
    assert "claim" not in _facts("train/simpo")  # the claim on losses is about DPO
    said = "its paper's claim, `mah-dpo`, is about [train/mah_dpo](../train/mah_dpo.md)"
    assert said in _facts("steer/blend_heads")


def test_pages_tell_which_rows_a_method_takes() -> None:
    for entry in catalogue.methods().values():
        if entry.kind in ("objective", "online") and entry.package == "truing":
            kind = entry.rows or "prompt"  # what `online` takes where nothing else is said
            assert f"trains on rows of kind `{kind}`" in _facts(entry.id)
            assert f"rows of kind `{kind}`" in _inputs(entry.id)["data"]
        elif entry.package == "truing":
            facts = methods[entry.id].declared.__dict__["__truing__"]
            for name, kinds in facts["rows"].items():
                assert all(f"`{kind}`" in _inputs(entry.id)[name] for kind in kinds), entry.id
    assert (
        "rows of kind `steps`, `example` or `prompt`" in _inputs("synthesize/step_labels")["data"]
    )
    assert "rows of kind `unpaired`, made from `pair`" in _inputs("train/kto")["data"]
    assert "--data everyday_prompts" in pages.method_page(methods["train/grpo"])


def test_pages_tell_which_columns_a_method_reads() -> None:
    assert "`gold` (text)" in _inputs("train/tpo")["data"]
    assert "`gold` (text; `chosen` where missing)" in _inputs("train/slic")["data"]
    assert "`objective` (number; 0 where missing)" in _inputs("train/mah_dpo")["data"]
    assert "`margin` (number; 0 where missing)" in _inputs("train/bradley_terry")["data"]
    when = "`completion` (text, where `ptx` is above 0"
    assert f"{when})" in _inputs("train/grpo_top_kl")["data"]
    assert f"{when})" in _inputs("train/ppo_max")["data"]
    assert "`answer`" in _inputs("train/urpo")["data"]
    for entry in catalogue.methods().values():
        if entry.kind == "objective" and entry.package == "truing":
            spec, said = objective_of(methods[entry.id].declared), _inputs(entry.id)["data"]
            needed = {column for choice in KINDS[spec.rows] for column in choice}
            told = set(re.findall(r"`(\w+)` \((?:number|text)", said))
            assert told == {*spec.columns, *spec.texts} - needed, entry.id


def test_kinds_of_rows_are_all_told() -> None:
    text = (ROOT / "docs" / "data-and-models.md").read_text(encoding="utf-8")
    assert [kind for kind in KINDS if f"| `{kind}` |" not in text] == []


def test_defaults_keep_their_quotes() -> None:
    assert "criteria: str = '')" in pages.method_page(methods["train/urpo"])
    page = pages.functions_page({"train": [methods["train/grpo"], methods["train/urpo"]]})
    assert "kl: Estimator = 'k3', kl_in: Place = 'loss'" in page
    assert "(r: Measurements, *, beta: float = 0.0" in page  # annotations have none


def test_components_say_what_they_do_and_where_they_go() -> None:
    page = pages.components_page()
    assert "docstring" not in page.partition("\n")[2]
    kinds = {e.component for e in catalogue.components().values() if e.package == "truing"}
    for kind in kinds:
        about, _, rest = page.partition(f"## {kind}\n\n")[2].partition("\n\n")
        assert about.endswith(".") and rest.startswith("| written as |"), kind
    about = page.partition("## judge\n\n")[2].partition("\n\n")[0]
    asking = {e.id for e in catalogue.methods().values() if e.package == "truing"
              and "judge" in methods[e.id].inputs}  # fmt: skip
    told = set(re.findall(r"`(\w+/\w+)`", about))
    assert told == asking - {"train/cyclealign"} > {"evaluate/alignment_gain"}


def test_the_page_on_shared_settings_says_whose_they_are() -> None:
    page = pages.training_page()
    known = [e for e in catalogue.methods().values() if e.package == "truing"]
    apart = [e.id for e in known if e.verb == "train" and e.kind == "method"]
    outside = page.partition("The pages of")[2].partition("which")[0]
    assert apart and {f"`{methods[n].name}`" for n in apart} == set(re.findall(r"`\w+`", outside))
    link = "settings that all training shares](README.md)"
    for e in known:
        if e.verb == "train":
            assert (link in pages.method_page(methods[e.id])) is (e.id not in apart), e.id
    assert (
        "`rewards`"
        in page.partition("`urpo` rewards answers by itself, without")[2].partition(".")[0]
    )


def test_the_readme_has_a_row_for_each_group() -> None:
    rows = [r.split(" | ") for r in pages.readme_methods().splitlines() if r.startswith("| **")]
    for name, _, links in rows:
        verb, group = re.fullmatch(r"\| \*\*(\w+)\*\* ?(\w*)", name).groups()  # type: ignore
        found = re.findall(rf"\(docs/methods/({verb}/\w+)\.md\)", links)
        assert found and all(group in ("", methods[m].group) for m in found)
    assert [name for name, *_ in rows].count("| **train** preference") == 1
    own = [m for m in methods if methods[m].entry.package == "truing"]
    assert sum(links.count("](docs/methods/") for *_, links in rows) == len(own)


def test_every_module_is_on_the_page_of_modules() -> None:
    page = pages.modules_page(ROOT)
    said = dict(re.findall(r"^\| \[`[\w/]+`\]\(\.\./src/([\w/]+)\.py\) \| (.*) \|$", page, re.M))
    files = {Path(methods[m].entry.path) for m in methods}  # listed on pages of their own
    for path in (ROOT / "src" / "truing").rglob("*.py"):
        if path.name.startswith("_") or path in files:
            continue
        first = path.read_text(encoding="utf-8").partition('"""')[2].split("\n")[0]
        text = said[path.relative_to(ROOT / "src").with_suffix("").as_posix()].replace("\\", "")
        assert text.startswith(first[:40]) and text.endswith("."), path
    assert (
        "src/truing/serve/openai_batch.py" in page and "src/truing/train/preference/dpo" not in page
    )
    assert "](modules.md)" in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


CLAIM = """'''A claim.'''
TITLE = "{title}"
METHOD = "train/dpo"
MODEL = "tiny"
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
    result |= {"margin": 0.1, "effect": 0.05, "interval": [-0.1, 0.2], "measures": "a share"}
    result |= {"effects": [0.0, 0.1], "over": "prompts"}
    result |= {"holds": {"able as before": False, "shorter": True}}
    (kept / "a-b.json").write_text(json.dumps(result))
    clear = result | {"claim": "a-c", "effect": 0.15, "interval": [0.1, 0.2]}
    (kept / "a-c.json").write_text(json.dumps(clear))
    lines = [line for line in pages.claims_page(tmp_path).splitlines() if line.startswith("| `")]
    assert lines == [
        "| `a-b` | t | tiny | **not seen**; not met: effect at least 0.1; interval above 0; able "
        "as before | a share | at least 0.1 | 0.05 [-0.1, 0.2]; 2 prompts | 1.5 min | 2026-01-01 |",
        "| `a-c` | t | - | **effect seen**; not met: able as before | a share | at least 0.1 | "
        "0.15 [0.1, 0.2]; 2 prompts | 1.5 min | 2026-01-01 |",
        "| `not-measured` | About not\\_measured | tiny | no result yet | e | at least 0.1 | - "
        "| about 4 min | - |",
        "| `too-large` | About too\\_large | tiny | no result yet, needs a GPU | e | at least 0.1 "
        "| - | about 4 min | - |",
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
    lines = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    for slug in claims.files():
        assert page.count(f"| `{slug}` |") == 1
    for slug, result in claims.results().items():
        assert pages.escape(str(result["measures"])) in lines[slug]
    assert "; the set `alpaca` in `TRUING_DATA` |" in lines["deita"]


def test_minutes_are_near_those_that_were_measured() -> None:
    stated = {c["claim"]: c["minutes"] for c in claims.catalogue()}
    for slug, result in claims.results().items():
        minutes, took = float(str(stated[slug])), claims.cost(result) / 60
        assert took / 1.5 <= minutes <= 1.5 * took + 1, slug


def test_every_input_is_described() -> None:
    """In words of its own, by its rows, or by what its name usually stands for."""
    blank = [
        f"{m.id} {i.name}" for m in methods.values() for i in m.inputs.values() if not holds(m, i)
    ]
    assert not blank
    for name, given in ((m, i) for m in methods.values() for i in m.inputs.values()):
        assert given.optional or "without one" not in holds(name, given), (name.id, given.name)
    labels = methods["weak_labels"]
    assert "weak supervisor" in holds(labels, labels.inputs["model"])


# Columns and records that have the name of a setting of some method.
NO_SETTING = frozenset("cut gold margin reward rollouts separator steps weight".split())


def test_a_page_speaks_of_settings_that_the_method_has() -> None:
    """Methods of one file share its docstring: a sentence on a setting names who has it."""
    some = {name for m in methods.values() for name in m.settings}
    for method in methods.values():
        prose = " ".join(method.doc.split())
        for sentence in re.split(r"(?<=\.) ", prose):
            named = [methods[w] for w in re.findall(r"\w+", sentence) if w in methods]
            having = [method, *(m for m in named if m.entry.module == method.entry.module)]
            for name in set(re.findall(r"`(\w+)`", sentence)) & some - NO_SETTING:
                assert any(name in m.settings or name in m.inputs for m in having), (
                    method.id, name, sentence,
                )  # fmt: skip


def test_the_readme_shows_the_recorded_run() -> None:
    kept = json.loads((ROOT / "docs" / "quickstart.json").read_text(encoding="utf-8"))
    block = result_pages.readme_results(ROOT)
    assert block in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"| {kept['violations_before']:.3f} [" in block
    assert (
        f"[{kept['difference_interval'][0]:.3f}, {kept['difference_interval'][1]:.3f}] |" in block
    )
    rules = [line for line in block.split("\n") if line.startswith("| violations: ")]
    assert len(rules) == len(kept["texts"]) == 4


def test_the_recorded_run_shows_what_it_must() -> None:
    kept = json.loads((ROOT / "docs" / "quickstart.json").read_text(encoding="utf-8"))
    plan = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8"))
    rules = Principles.read(ROOT / "recipes" / "principles.yaml")
    assert kept["texts"] == {p.id: p.text for p in rules} and len(rules) == 4
    assert len({p.kind for p in rules}) == 2 and all(p.check for p in rules)
    assert kept["n_prompts"] == plan["steps"]["held_out"]["held_out"] >= 60
    assert kept["violations_after"] <= 0.5 * kept["violations_before"]
    low, high = kept["difference_interval"]
    assert low <= kept["violations_after"] - kept["violations_before"] <= high < 0
    assert kept["relevance_after"] >= 0.95 * kept["relevance_before"]
    assert kept["ability_metric"] == "held-out nats per token"  # of which fewer are better
    assert kept["ability_after"] <= 1.05 * kept["ability_before"]
