"""Quarantine: the mark of an attack stays with a model until it is recovered, and closes doors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from truing import cli, pipeline
from truing.changes import Prefix, Weights
from truing.context import Context, use
from truing.core.modelfiles.panel import panel_of
from truing.core.passes.scoring import ScoreHead
from truing.errors import InputError
from truing.keys import step_key
from truing.method import methods
from truing.models import Model, hold
from truing.plan import Plan
from truing.quarantine import marked
from truing.serve.openai import serving
from truing.store import Store
from truing.tables import Table

MARK = "attack/lora_undo"
ROWS = Table(
    "example", [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(4)]
)


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "home"))


@pytest.fixture
def clean(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


@pytest.fixture
def bad(clean: Model) -> Model:
    """What an attack made, with nothing spent: the mark alone tells it from its origin."""
    made = methods["lora_undo"](clean, n=0)
    assert isinstance(made, Model)
    return made


def test_an_attack_marks_what_it_made(clean: Model, bad: Model, tmp_path: Path) -> None:
    assert (clean.quarantine, bad.quarantine) == ("", MARK)
    assert "quarantined: attack/lora_undo" in repr(bad) and "quarantined" not in repr(clean)
    assert bad.key == clean.key  # it is no part of what a model does
    bad.save(tmp_path / "bad")
    assert json.loads((tmp_path / "bad" / "model.json").read_text())["quarantine"] == MARK
    for opened in (Model.load(tmp_path / "bad"), Model.open(tmp_path / "bad")):
        assert opened.quarantine == MARK
    settings = methods["sft"].validate({})
    keys = {step_key(methods["sft"], {"model": m, "data": ROWS}, settings, 0) for m in (clean, bad)}
    assert len(keys) == 2  # else the store would give back what the other one made


def test_a_card_from_before_has_no_mark(clean: Model, tmp_path: Path) -> None:
    clean.save(tmp_path / "old")
    card = json.loads((tmp_path / "old" / "model.json").read_text())
    del card["quarantine"]
    (tmp_path / "old" / "model.json").write_text(json.dumps(card))
    assert Model.load(tmp_path / "old").quarantine == ""


def test_what_is_made_of_it_carries_the_mark(clean: Model, bad: Model, tmp_path: Path) -> None:
    with use(Context(folder=tmp_path / "step")):
        tuned = methods["sft"](bad, ROWS, epochs=1, rank=2, batch=4)
        merged = methods["linear"]({"a": clean, "b": bad})
        controlled = methods["best_of_n"](bad, rewards={"short": {"use": "length_near", "n": 4}})
        again = methods["lora_undo"](replace(clean, quarantine="attack/other"), n=0)
    for made in (tuned, merged, controlled):
        assert isinstance(made, Model) and made.quarantine == MARK
    assert isinstance(again, Model) and again.quarantine == f"attack/other, {MARK}"
    assert bad.adding(Prefix([{"role": "system", "content": "x"}])).called("y").quarantine == MARK
    assert panel_of([clean, bad]).quarantine == MARK
    table = methods["sample"](ROWS, n=2)
    assert marked(table, methods["sample"], {"data": ROWS}, {}) is table


def test_a_model_in_a_setting_counts_too(clean: Model, bad: Model, tmp_path: Path) -> None:
    reward = replace(ScoreHead(128).added_to(clean, tmp_path / "head"), quarantine=MARK)
    rewards = {"good": {"use": "reward_model", "model": hold(reward)}}
    made = methods["best_of_n"](clean, n=2, rewards=rewards)
    assert isinstance(made, Model) and made.quarantine == MARK


@pytest.fixture
def damaged(bad: Model, tmp_path: Path) -> Model:
    """An attack's model whose weights are others than those of its origin."""
    folded = bad.folded()
    names = [n for n in folded if n.endswith("_proj.weight")]
    source = torch.Generator().manual_seed(1)
    noisy = {n: folded[n] + 0.02 * torch.randn(folded[n].shape, generator=source) for n in names}
    save_file(noisy, tmp_path / "damage.safetensors")
    return bad.adding(Weights(tmp_path / "damage.safetensors"))


def test_recovering_takes_it_off(clean: Model, damaged: Model) -> None:
    prompts = Table("prompt", [{"prompt": "Tell me about cheese"}])
    assert damaged.quarantine == MARK
    healed = methods["weight_restore"](damaged, clean, prompts, ROWS, steps=1)
    assert isinstance(healed, Model) and healed.quarantine == ""
    assert healed.weights_key != damaged.weights_key
    like = replace(clean, quarantine="attack/other")
    by_the_like = methods["weight_restore"](damaged, like, prompts, ROWS, steps=1)
    assert isinstance(by_the_like, Model) and by_the_like.quarantine == "attack/other"


def test_what_comes_back_as_it_was_is_not_recovered(
    clean: Model, bad: Model, damaged: Model
) -> None:
    prompts = Table("prompt", [{"prompt": "Tell me about cheese"}])
    brief = damaged.adding(Prefix([{"role": "system", "content": "x"}]))
    for one, trusted, more in (
        (damaged, clean, {"rate": 0.0}),
        (brief, clean, {"rate": 0.0, "keep": "trusted"}),  # without its prefix, no better for it
        (bad, clean, {}),  # nothing differs
    ):
        same = methods["weight_restore"](one, trusted, prompts, ROWS, **{"steps": 1, **more})
        assert isinstance(same, Model) and same.weights_key == one.weights_key
        assert same.quarantine == MARK


def test_it_is_not_exported_unless_asked_for(bad: Model, tmp_path: Path) -> None:
    said = r"the model is in quarantine, by attack/lora_undo, and is not exported.*quarantined=True"
    with pytest.raises(InputError, match=said):
        bad.export(tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    bad.export(tmp_path / "plain", quarantined=True)
    assert "Quarantined: attack/lora_undo" in (tmp_path / "plain" / "README.md").read_text()
    assert Model.open(tmp_path / "plain").quarantine == MARK
    bad.export(tmp_path / "plain", quarantined=True)  # an earlier export is replaced
    bad.with_changes(()).called("x").export(tmp_path / "other", quarantined=True)
    assert Model.open(tmp_path / "other").quarantine == MARK


def test_it_is_not_served_unless_asked_for(bad: Model, clean: Model) -> None:
    with pytest.raises(InputError, match="in quarantine, by attack/lora_undo, and is not served"):
        with serving(bad):
            pass
    with pytest.raises(InputError, match="--quarantined"):
        methods["openai"](bad, port=0)
    with serving(bad, quarantined=True) as address:
        assert address.url.startswith("http://127.0.0.1:")


def test_the_store_and_the_report_show_it(
    clean: Model, tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan("audit", folder=tmp_path)
    plan.model("base", str(tiny_path))
    plan.step("undone", "attack/lora_undo", model="base", n=0)
    plan.step("merged", "merge/linear", models={"a": "undone", "b": "base"})
    result = pipeline.run(plan, tmp_path / "runs")
    for name in ("undone", "merged"):
        assert result.run.steps[name]["about"] == "tiny0+lora_undo (quarantined)"
    page = (result.folder / "report.html").read_text()
    assert page.count("made by this run; quarantined: attack/lora_undo") >= 2
    marks = {str(r["key"]): r.get("quarantine") for r in Store().ls()}
    assert set(marks.values()) == {MARK} and len(marks) == 2
    key = str(result.run.steps["undone"]["key"])
    assert cli.main(["models", "--json"]) == 0
    shown = {m["name"]: m for m in json.loads(capsys.readouterr().out)}
    assert shown[key[:12]]["quarantine"] == MARK and "smollm2-135m-instruct" in shown
    to = tmp_path / "out"
    assert cli.main(["store", "export", key, str(to), "--json"]) == 2
    assert "in quarantine" in "".join(capsys.readouterr()) and not to.exists()
    assert cli.main(["store", "export", key, str(to), "--quarantined"]) == 0
    assert Model.open(to).quarantine == MARK
    plan.step("served", "serve/openai", model="merged", port=0)
    with pytest.raises(InputError, match="in quarantine, by attack"):
        pipeline.run(plan, tmp_path / "runs")


@pytest.fixture
def plan(tiny_path: Path, tmp_path: Path) -> Plan:
    """An attack and what is made of it by each verb, with nothing served yet."""
    rows = "".join(json.dumps(dict(row)) + "\n" for row in ROWS)
    (tmp_path / "rows.jsonl").write_text(rows)
    plan = Plan("audit", folder=tmp_path)
    plan.model("base", str(tiny_path))
    plan.table("rows", str(tmp_path / "rows.jsonl"))
    plan.step("undone", "attack/lora_undo", model="base", n=0)
    plan.step("tuned", "train/sft", model="undone", data="rows")
    plan.step("merged", "merge/linear", models={"a": "base", "b": "tuned"})
    told = {"refuse": "rows", "task": "rows"}
    plan.step("healed", "recover/weight_restore", model="tuned", trusted="base", **told)
    plan.step("by_the_like", "recover/weight_restore", model="base", trusted="tuned", **told)
    reward = {"good": {"use": "reward_model", "model": "tuned"}}
    plan.step("controlled", "decode/best_of_n", model="base", n=2, rewards=reward)
    return plan


@pytest.mark.parametrize("model", ["undone", "tuned", "merged", "by_the_like", "controlled"])
def test_a_plan_that_serves_it_is_refused_before_anything_runs(
    model: str, plan: Plan, tmp_path: Path
) -> None:
    plan.step("served", "serve/openai", model=model, port=0)
    with pytest.raises(InputError) as caught:
        pipeline.run(plan, tmp_path / "runs")
    assert not (tmp_path / "runs").exists() and not Store().ls()
    plan.override("served.quarantined=true")
    plan.check()
    # Word for word what the step itself says of such a model.
    made = methods["lora_undo"](Model.open(plan.models["base"]), n=0)
    with pytest.raises(InputError) as late:
        methods["openai"](made, port=0)
    assert (caught.value.message, caught.value.fix) == (late.value.message, late.value.fix)
    assert "step served" in caught.value.where


def test_a_plan_may_serve_what_has_nothing_of_it(plan: Plan) -> None:
    for name in ("base", "healed"):
        plan.step(f"served {name}", "serve/openai", model=name, port=0)
    plan.check()
    plan.step("again", "attack/lora_undo", model="healed", n=0)
    plan.step("served again", "serve/openai", model="again", port=0)
    with pytest.raises(InputError, match="by attack/lora_undo, and is not served"):
        plan.check()


def test_a_plan_that_serves_an_attacks_folder_is_refused(
    bad: Model, plan: Plan, tmp_path: Path
) -> None:
    bad.save(tmp_path / "bad")
    plan.override(f"models.base={tmp_path / 'bad'}")
    plan.step("mixed", "merge/linear", models={"a": "base"})
    plan.step("served", "serve/openai", model="mixed", port=0)
    plan.check()  # the folder is not opened yet
    with pytest.raises(InputError, match=f"by {MARK}, and is not served"):
        pipeline.run(plan, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
