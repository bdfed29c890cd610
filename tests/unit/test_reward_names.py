"""Models named inside rewards: edges of a plan, parts of a step's key, names in a command."""

from __future__ import annotations

import contextlib
import json
import pickle
from pathlib import Path
from typing import cast

import pytest

from truing import models, naming, pipeline, recipe
from truing.cli import main
from truing.context import Context, use
from truing.core import together
from truing.core.judging.answer_steps import step_values, steps_of
from truing.core.rl.train_online import Given
from truing.errors import InputError
from truing.method import methods, score
from truing.models import Decoder, Model, hold
from truing.naming import nouns_in, with_keys
from truing.pipeline import Result
from truing.principles import Principle, Principles
from truing.store import Store
from truing.tables import Table

SMALL = "steps: 1, batch: 2, answers: 2, max_tokens: 6, rank: 2"
RECIPE = """\
name: stepwise
models: {base: BASE}
steps:
  tuned:
    do: train/grpo
    model: base
    data: prompts.jsonl
    SMALL
    rewards: {steps: {use: step_reward, model: prm, separator: "e"}}
  prm: {do: train/process_reward, model: base, data: steps.jsonl, steps: 1, rank: 2, lr: 0.001}
"""


@pytest.fixture
def folder(tmp_path: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place with data and a recipe, whose process has held and opened nothing."""
    new_process(monkeypatch)
    rows = [{"prompt": f"say {w}", "steps": [w, f"{w}!"], "labels": [1, 0]} for w in "abcd"]
    write(tmp_path / "steps.jsonl", rows)
    write(tmp_path / "prompts.jsonl", [{"prompt": r["prompt"]} for r in rows])
    write(tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    text = RECIPE.replace("BASE", str(tiny_path)).replace("SMALL", SMALL.replace(", ", "\n    "))
    (tmp_path / "r.yaml").write_text(text)
    return tmp_path


@pytest.fixture(scope="module")
def prm(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A process reward model, saved in its folder."""
    place = tmp_path_factory.mktemp("prm")
    rows = Table("steps", [{"prompt": "say a", "steps": ["a", "a!"], "labels": [1.0, 0.0]}])
    with use(Context(folder=place / "run")):
        made = methods["process_reward"](Model.open(tiny_path), rows, steps=1, rank=2)
    assert isinstance(made, Model)
    return Model.load(made.save(place / "saved"))


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_held", {})
    monkeypatch.setattr(naming, "_opened", {})


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def run(folder: Path, *changed: str) -> Result:
    plan = recipe.load(folder / "r.yaml", changed)
    return pipeline.run(plan, folder / "runs", store=Store(folder / "store"))


def cached(result: Result) -> dict[str, bool]:
    return {n: bool(s["cached"]) for n, s in result.run.steps.items()}


def test_a_reward_of_an_earlier_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(folder)
    assert list(cached(first).items()) == [("prm", False), ("tuned", False)]
    told = [json.loads(line) for line in (first.folder / "metrics.jsonl").read_text().splitlines()]
    assert any(0 <= m["reward/steps"] <= 1 for m in told if "reward/steps" in m)
    assert cached(run(folder)) == {"prm": True, "tuned": True}

    # Another process that finds one of the two in the store makes the other again, alike.
    new_process(monkeypatch)
    store = Store(folder / "store")
    store.discard(str(first.run.steps["tuned"]["key"]))
    again = run(folder)
    assert cached(again) == {"prm": True, "tuned": False}
    assert again.results["tuned"].key == first.results["tuned"].key

    # What the model is counts, not what it is called.
    other = run(folder, "prm.lr=0.002")
    assert cached(other) == {"prm": False, "tuned": False}
    text = (folder / "r.yaml").read_text()
    (folder / "r.yaml").write_text(
        text.replace("prm:", "judge:").replace("model: prm", "model: judge")
    )
    assert cached(run(folder)) == {"judge": True, "tuned": True}


def test_the_reward_is_what_the_model_says(folder: Path, prm: Model) -> None:
    rows = [{"prompt": "say a", "completion": "seven beetles"}]
    parts = [{"prompt": "say a", "steps": steps_of("seven beetles", "e")}]
    want = min(step_values(prm, parts, "e")[0])
    saved = prm.save(folder / "saved")
    for name in (hold(prm), str(saved)):
        ref = {"use": "step_reward", "model": name, "separator": "e"}
        assert score("reward", ref, rows) == [want]


def test_models_of_the_recipe_and_paths_beside_it(folder: Path, prm: Model) -> None:
    prm.save(folder / "saved")
    text = (folder / "r.yaml").read_text()
    text = text[: text.index("  prm:")].replace("model: prm", "model: NAME")
    for name, named in (("saved", "{base"), ("mine", "{mine: saved, base")):
        made = text.replace("NAME", name).replace("{base", named)
        (folder / "r.yaml").write_text(made)
        # Both are one model: what was made with the first is taken as it is.
        assert cached(run(folder)) == {"tuned": name == "mine"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("model: prmm", r"setting 'rewards': no step, file or model called 'prmm'.*prm"),
        ("model: none/at/all", "setting 'rewards': no step, file or model called 'none/at/all'"),
        ("model: clean", r"setting 'rewards' takes a Model, and step 'clean'.*makes a Table"),
        ("model: tuned", "a step waits for itself"),
    ],
)
def test_a_wrong_name_is_told_with_its_line(folder: Path, change: str, told: str) -> None:
    text = (folder / "r.yaml").read_text().replace("model: prm", change)
    text += "  clean: {do: select/sample, data: prompts.jsonl, n: 2}\n"
    (folder / "r.yaml").write_text(text)
    with pytest.raises(InputError, match=told) as error:
        recipe.load(folder / "r.yaml")
    if "setting" in told:
        assert "r.yaml line 13 step tuned" in str(error.value)


def test_a_model_of_another_sort_is_refused_before_anything_is_drawn(folder: Path) -> None:
    text = (folder / "r.yaml").read_text()
    text = text.replace("train/process_reward", "train/bradley_terry")
    (folder / "r.yaml").write_text(text.replace("steps.jsonl", "pairs.jsonl"))
    with pytest.raises(InputError, match=r"step tuned.*scores whole answers, not their steps"):
        run(folder)
    assert not list((folder / "store" / "scratch").rglob("rollouts-*"))


def test_on_the_command_line(
    folder: Path,
    tiny_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TRUING_HOME", str(folder / "home"))
    train = ["train", "process-reward", "--model", str(tiny_path), "--data", "steps.jsonl"]
    assert main([*train, "--steps", "1", "--rank", "2", "--out", "prm"]) == 0
    grpo = ["train", "grpo", "--model", str(tiny_path), "--data", "prompts.jsonl"]
    for pair in SMALL.split(", "):
        name, value = pair.split(": ")
        grpo += [f"--{name.replace('_', '-')}", value]
    keys: list[str] = []
    for name in ("prm", "./prm", str(folder / "prm")):
        new_process(monkeypatch)
        capsys.readouterr()
        assert main([*grpo, "--rewards", f"{{steps: {{use: step_reward, model: {name}}}}}"]) == 0
        line = json.loads(capsys.readouterr().out.splitlines()[-1])
        keys.append(line["key"])
        assert line["cached"] is (len(keys) > 1)
    assert len(set(keys)) == 1  # however the folder is written
    rewards = "{steps: {use: step_reward, model: prmm}}"
    grpo[grpo.index("--model") + 1] = "fetched-later"
    assert main([*grpo, "--rewards", rewards]) == 2
    assert "setting 'rewards'" in (said := capsys.readouterr().err) and "'prmm'" in said


def test_in_a_plain_call(folder: Path, tiny_path: Path, prm: Model) -> None:
    saved = prm.save(folder / "saved")
    data = Table.read(folder / "prompts.jsonl")
    settings: dict[str, object] = {"steps": 1, "batch": 2, "answers": 2, "max_tokens": 4, "rank": 2}
    for place in (str(saved), hold(prm)):
        rewards = {"steps": {"use": "step_reward", "model": place}}
        with use(Context(folder=folder / f"call-{len(place)}")):
            made = methods["grpo"](Model.open(tiny_path), data, rewards=rewards, **settings)
        assert isinstance(made, Model)
    decoded = methods["best_of_n"](
        Model.open(tiny_path),
        n=2,
        rewards={"steps": {"use": "step_reward", "model": str(saved)}},
    )
    assert isinstance(decoded, Model)
    again = Model.load(decoded.save(folder / "decoded"))  # it brings the reward's model along
    assert list((folder / "decoded" / "held").iterdir()) == [folder / "decoded" / "held" / prm.key]
    assert again.key == decoded.key
    with pytest.raises(InputError, match=r"setting 'rewards'.*nothing-here"):
        rewards = {"steps": {"use": "step_reward", "model": "nothing-here"}}
        methods["grpo"](Model.open(tiny_path), data, rewards=rewards)


def test_a_key_of_the_store_serves_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUING_HOME", str(folder / "home"))
    plan = recipe.load(folder / "r.yaml")
    made = pipeline.run(plan, folder / "runs")
    new_process(monkeypatch)
    key = str(made.run.steps["prm"]["key"])
    ref = {"use": "step_reward", "model": key[:16]}
    assert len(score("reward", ref, [{"prompt": "p", "completion": "a"}])) == 1
    with pytest.raises(InputError, match="no artefact of that key or name"):
        score("reward", {**ref, "model": "0" * 16}, [{"prompt": "p", "completion": "a"}])


seen: list[str] = []


def look(settings: dict[str, dict[str, str]]) -> None:
    """What `joint` runs in each process."""
    seen.append(models.held(settings["r"]["model"]).key)


def ask(given: Given) -> None:
    """What asks a partner that holds a model, which holds one itself."""
    one = given.partner
    while one is not None and one.changes:
        (change,) = cast("tuple[Decoder]", one.changes)
        one = cast(Model, models.held(change.holds["reward_model"]))
        seen.append(one.key)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What this process, the first of several, tells the others."""

    class Quiet:
        def set(self, *_: object) -> None: ...

    told: list[object] = []
    monkeypatch.setattr(together, "begin", lambda: (None, Quiet()))
    monkeypatch.setattr(together, "joined", contextlib.nullcontext)
    monkeypatch.setattr(together, "agree", told.append)
    for name, value in (("leading", True), ("calls", 0)):
        monkeypatch.setattr(together._state, name, value)
    seen.clear()
    return told


def test_the_other_processes_hold_it_too(
    told: list[object], tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = hold(Model.open(tiny_path))
    together.joint(look)({"r": {"use": "guard", "model": key}})
    sent = pickle.dumps(told[0])
    new_process(monkeypatch)
    pickle.loads(sent).run()
    assert seen == [key, key]


def test_they_hold_what_models_hold(
    told: list[object], tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Model.open(tiny_path)
    keys = [hold(base)]
    for _ in range(2):
        partner = base.adding(Decoder("best_of_n", {}, {"reward_model": keys[0]}))
        keys.insert(0, hold(partner))
    together.joint(ask)(Given(partner=partner))
    sent = pickle.dumps(told[0])
    new_process(monkeypatch)
    pickle.loads(sent).run()
    assert seen == 2 * keys[1:]


def test_what_is_named_and_what_stands_for_itself(tiny_path: Path) -> None:
    rules = Principles([Principle("brief", "Be brief.")])
    settings: dict[str, object] = {
        "rewards": {
            "a": {"use": "salmon_reward", "model": "m", "principles": ["Be kind."]},
            "b": {
                "use": "salmon-reward",
                "model": hold(Model.open(tiny_path)),
                "principles": "p",
            },
            "c": {"use": "judged", "model": "http://127.0.0.1:9/v1#m", "criteria": "short"},
            "d": {"use": "numeric_answer", "column": "gold"},
            "e": {"use": "referee", "model": "r"},
        },
        "environment": {"use": "conversation", "reward": {"use": "guard", "model": "g"}},
        "model": "not a reference",
    }
    found = {(n.setting, n.noun, n.text) for n in nouns_in(settings)}
    assert found == {
        ("rewards", "Model", "m"), ("rewards", "Principles", "p"), ("rewards", "Model", "r"),
        ("environment", "Model", "g"),
    }  # fmt: skip
    made = with_keys(settings, {("Model", "m"): "key", ("Principles", "p"): hold(rules)})
    rewards = cast("dict[str, dict[str, object]]", made["rewards"])
    assert rewards["a"]["model"] == "key" and rewards["b"]["principles"] == rules.key
    assert made["model"] == "not a reference" and settings["rewards"] != rewards
