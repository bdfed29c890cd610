"""A panel of judges in place of one: in recipes, on the command line, in Python; faults first."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest

from truing import cli, pipeline, recipe
from truing.changes import Decoder
from truing.context import Context, use
from truing.core import judge as judging
from truing.core.generate import generate
from truing.core.modelfiles import loaded
from truing.core.modelfiles.panel import panel_of
from truing.core.tiny import tiny_folder
from truing.errors import InputError
from truing.listing import one as shown
from truing.method import get_component, methods
from truing.models import Model, held_by, hold
from truing.principles import Principle, Principles
from truing.reports import Report
from truing.specify import texts
from truing.store import Store
from truing.tables import Row, Table

PROMPTS = [{"prompt": f"What is {i}?"} for i in range(6)]
RULES = Principles([Principle("brief", "Be brief.", check={"use": "max_words", "n": 3})])
RECIPE = """\
name: judged
models: {base: A, other: B, third: C}
steps:
  both: {do: merge/linear, models: {a: other, b: third}}
  won:
    do: evaluate/win_rate
    model: base
    baseline: other
    prompts: prompts.jsonl
    max_tokens: 6
    judge: {use: panel, judges: [other, third, both], rule: majority}
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three tiny models of other weights."""
    root = tmp_path_factory.mktemp("judges")
    return [tiny_folder(root / name, seed) for seed, name in enumerate("ABC")]


@pytest.fixture
def here(tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "home"))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in PROMPTS))
    return tmp_path


@pytest.fixture
def models(folders: list[Path]) -> list[Model]:
    return [Model.open(f) for f in folders]


def _recipe(here: Path, folders: list[Path], text: str = RECIPE) -> Path:
    for name, folder in zip("ABC", folders, strict=True):
        text = text.replace(f": {name}", f": {folder}")
    (here / "r.yaml").write_text(text)
    return here / "r.yaml"


def _by_hand(report: Report, judges: list[Model]) -> list[float]:
    """1, 0.5 or 0 for each of the report's pairs: in each order the vote, then the mean of both."""
    samples = list(report.samples or ())
    ours: list[Row] = [{"prompt": r["prompt"], "completion": r["completion"]} for r in samples]
    theirs: list[Row] = [{"prompt": r["prompt"], "completion": r["baseline"]} for r in samples]
    with use(Context()):
        views = [judging.compare(j, ours, theirs) for j in judges]
    won: list[float] = []
    for i in range(len(samples)):
        orders: list[float] = []
        for side in ("shown_first", "shown_second"):
            chances = [getattr(v, side)[i] for v in views]
            ayes, noes = sum(c > 0.5 for c in chances), sum(c < 0.5 for c in chances)
            orders.append(1.0 if ayes > 1 else 0.0 if noes > 1 else 0.5)
        won.append((sum(orders) > 1) + 0.5 * (sum(orders) == 1))
    return won


def test_in_a_recipe_with_a_step_among_its_judges(
    here: Path, folders: list[Path], models: list[Model]
) -> None:
    plan = recipe.load(_recipe(here, folders))
    result = pipeline.run(plan, here / "runs")
    report = result.results["won"]
    assert isinstance(report, Report)
    both = result.results["both"]
    assert isinstance(both, Model)
    won = _by_hand(report, [models[1], models[2], both])
    assert [r["score"] for r in report.samples or ()] == won and len(won) == len(PROMPTS)
    assert report.get("win rate").value == pytest.approx(fmean(won))
    assert 0 <= report.get("agreement").value <= 1 and report.get("agreement").n == len(won)
    step = result.run.steps["won"]
    assert step["inputs"]["judge"] == [str(folders[1]), str(folders[2]), "both"]  # type: ignore[index]
    assert step["settings"]["judge"]["rule"] == "majority"  # type: ignore[index, call-overload]
    again = pipeline.run(recipe.load(here / "r.yaml"), here / "runs")
    assert [s["cached"] for s in again.run.steps.values()] == [True, True]
    text = RECIPE.replace("majority", "mean")
    other = pipeline.run(recipe.load(_recipe(here, folders, text)), here / "runs")
    assert [s["cached"] for s in other.run.steps.values()] == [True, False]
    facts = Store().facts(str(other.run.steps["won"]["key"]))
    assert facts["inputs"]["judge"] != report.meta["judge"]  # type: ignore[index, call-overload]


def test_on_the_command_line_and_in_python(
    here: Path, folders: list[Path], models: list[Model], capsys: pytest.CaptureFixture[str]
) -> None:
    ref = f"{{use: panel, judges: [{folders[1]}, {folders[2]}]}}"
    words = [
        "evaluate", "win-rate", "--model", folders[0], "--baseline", folders[1], "--prompts",
        here / "prompts.jsonl", "--max-tokens", "6", "--judge", ref, "--json",
    ]  # fmt: skip
    assert cli.main([str(w) for w in words]) == 0
    line = json.loads(capsys.readouterr().out)
    given = {"use": "panel", "judges": [models[1], models[2]]}
    with use(Context()):
        report = methods["win_rate"](
            models[0], models[1], Table("prompt", PROMPTS), judge=given, max_tokens=6
        )
    assert isinstance(report, Report)
    m = report.get("win rate")
    assert line["win rate"] == [m.value, m.lo, m.hi]
    assert report.get("agreement").value == line["agreement"][0]


def test_wherever_a_judge_is_taken(models: list[Model], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "relevance", lambda rows: [0.5] * len(rows))
    panel = {"use": "panel", "judges": [hold(m) for m in models], "rule": "mean"}
    prompts = Table("prompt", PROMPTS[:3])
    calls: dict[str, dict[str, object]] = {
        "principle_pairs": {"k": 2, "max_tokens": 8, "margin": 0.0},
        "synthesize/salmon": {"max_tokens": 24, "passes": 1},
        "step_labels": {"max_tokens": 24},
    }
    for name, settings in calls.items():
        with use(Context(seed=3)) as context:
            nouns = {"principles": RULES} if "principles" in methods[name].inputs else {}
            try:
                methods[name](models[0], prompts, judge=panel, **nouns, **settings)
            except InputError as error:  # of tiny models that agree on nothing
                assert "no principle tells" in error.message or "no pair" in error.message
        noted = [m for m in context.metrics if "raw_agreement" in m]
        assert noted and noted[0]["panel"] == [m.name for m in models], name


def test_members_are_read_once_however_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: list[Model]
) -> None:
    judges = [Model.open(tiny_folder(tmp_path / str(i), seed=90 + i)) for i in range(6)]
    made: list[str] = []
    build = loaded._build

    def counted(model: Model, *args: object, **named: object) -> object:
        made.append(model.name)
        return build(model, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(loaded, "_build", counted)
    panel = panel_of([panel_of(judges[:4]), judges[4], judges[5]])
    rows: list[Row] = [{"prompt": "Why?", "completion": "So."}]
    for _ in range(2):
        models[0].load_module()  # what the answers are of, say
        judging.rate(panel, rows)
    assert sorted(n for n in made if n != models[0].name) == [m.name for m in judges]


def test_in_a_reward_that_is_saved(
    models: list[Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean of two judges' ratings, in a decoder that brings them along."""
    panel = {"use": "panel", "judges": [hold(m) for m in models[1:]]}
    rewards = {"good": {"use": "judged", "model": panel, "scale": 5}}
    made = methods["best_of_n"](models[0], n=4, rewards=rewards)
    assert isinstance(made, Model)
    how = {"max_tokens": 8, "seed": 1}
    with use(Context()):
        (drawn,) = generate(made, ["Why?"], **how)  # type: ignore[arg-type]
        plain = generate(models[0], ["Why?"], n=4, **how)[0]  # type: ignore[arg-type]
        rows: list[Row] = [{"prompt": "Why?", "completion": c.text.strip()} for c in plain]
        rated = [judging.rate(m, rows, scale=5) for m in models[1:]]
    means = [sum(map(float, column)) for column in zip(*rated, strict=True)]  # type: ignore[arg-type]
    assert drawn[0].text == plain[means.index(max(means))].text
    made.save(tmp_path / "made")
    monkeypatch.setattr("truing.models._held", {})  # as in another process
    again = Model.load(tmp_path / "made")
    assert again.key == made.key
    with use(Context()):
        assert generate(again, ["Why?"], **how)[0][0].text == drawn[0].text  # type: ignore[arg-type]


def test_in_a_reward_of_a_recipe(here: Path, folders: list[Path], models: list[Model]) -> None:
    panel = "{use: panel, judges: [other, third], rule: majority}"
    text = RECIPE.partition("steps:")[0] + (
        "steps:\n  best:\n    do: decode/best_of_n\n    model: base\n    n: 2\n"
        f"    rewards: {{good: {{use: judged, model: {panel}}}}}\n"
    )
    for cached in (False, True):
        result = pipeline.run(recipe.load(_recipe(here, folders, text)), here / "runs")
        assert result.run.steps["best"]["cached"] is cached
        made = result.results["best"]
        assert isinstance(made, Model)
        (decoder,) = made.changes
        assert isinstance(decoder, Decoder)
        (key,) = held_by(decoder)
        assert key == panel_of(models[1:], "majority").key
    with use(Context()):
        assert generate(made, ["Why?"], max_tokens=4, seed=1)[0][0].text


def test_what_a_panel_cannot_do_is_said_first(
    models: list[Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "truing.train.distill.cyclealign.cycle", lambda *_, **__: pytest.fail("ran")
    )
    panel = {"use": "panel", "judges": models[1:]}
    with pytest.raises(InputError, match="writes rankings, which a panel of several does not"):
        methods["cyclealign"](models[0], Table("prompt", PROMPTS), panel)


def test_as_a_component(models: list[Model], folders: list[Path]) -> None:
    assert shown("judge:panel")["usage"] == '{use: panel, judges: ..., rule: "mean"}'
    made = get_component("judge", {"use": "panel", "judges": [str(folders[0]), hold(models[1])]})()
    assert isinstance(made, Model) and made.name == "panel of A, B"
    far = "http://127.0.0.1:9/v1#m"  # nothing is asked of it before it judges
    mixed = get_component("judge", {"use": "panel", "judges": [far, far]})()
    assert isinstance(mixed, Model) and mixed.name == "panel of m, m 2"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("{use: panel, judges: [other]}", "line 11 .*setting 'judges' needs 2 at least"),
        ("{use: panel, judges: [other, nobody]}", "line 11 .*called 'nobody'"),
        ("{use: panel, judges: [other, base], rule: median}", "line 11 .*setting 'rule'"),
        ("{use: panel, judge: [other, base]}", "line 11 .*setting 'judge'.*judges"),
        ("{use: pannel, judges: [other, base]}", "line 11 .*pannel.*Did you mean 'panel'"),
        ("{judges: [other, base]}", "line 11 .*takes the name of a step or a source"),
        ("{use: panel, judges: [other, graded]}", "judge that can generate"),
    ],
)
def test_faults_are_told_before_anything_runs(
    spec: str, said: str, here: Path, folders: list[Path]
) -> None:
    graded = here / "graded"
    graded.mkdir()
    (graded / "config.json").write_text('{"architectures": ["BertForSequenceClassification"]}')
    spec = spec.replace("graded", str(graded))
    text = RECIPE.replace("{use: panel, judges: [other, third, both], rule: majority}", spec)
    path = _recipe(here, folders, text)
    with pytest.raises(InputError, match=said) as caught:
        pipeline.run(recipe.load(path), here / "runs")
    assert "won" in str(caught.value) and not (here / "runs").exists()


def test_faults_on_the_command_line(
    here: Path, folders: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "evaluate", "win-rate", "--model", "nowhere/model", "--baseline", "x", "--prompts",
        str(here / "prompts.jsonl"), "--judge",
    ]  # fmt: skip
    for ref, said in (
        ("{use: panel, judges: [a]}", "'judges' needs 2 at least"),
        ("{use: panel, judges: 3}", "setting 'judges'"),
        ("{use: jury}", "jury"),
    ):
        assert cli.main([*words, ref]) == 2
        assert said in capsys.readouterr().err
