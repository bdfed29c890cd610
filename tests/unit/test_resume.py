"""Training language models: stopped and resumed, the cached reference, results as models."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from truing.context import Context, use
from truing.core import reference
from truing.core.engine import Order
from truing.core.files import home
from truing.core.trainer.text_task import TextTask
from truing.errors import InputError, Stopped
from truing.method import methods
from truing.models import Model, Prefix
from truing.tables import Row, Table

ROWS: list[Row] = [
    {"prompt": f"what is {i}?", "chosen": f"it is {i}.", "rejected": f"no {i * 7} idea {i}"}
    for i in range(12)
]
PAIRS = Table("pair", ROWS)


def train(name: str, folder: Path, model: Model, **settings: object) -> tuple[Model, Context]:
    with use(Context(seed=4, folder=folder)) as context:
        made = methods[name](model, PAIRS, **{"steps": 6, "batch": 4, "lr": 1e-3, **settings})
    assert isinstance(made, Model)
    return made, context


@pytest.fixture
def model(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


def test_state_of_an_objective_is_resumed(
    model: Model,
    tmp_path: Path,
    always_save: Callable[[], None],
    interrupted: Callable[[type, int], AbstractContextManager[None]],
) -> None:
    expected, whole = train("bco", tmp_path / "whole", model, budget=100)
    always_save()
    with interrupted(TextTask, 4):
        train("bco", tmp_path / "cut", model, budget=100)
    resumed, context = train("bco", tmp_path / "cut", model, budget=100)
    assert resumed.key == expected.key
    deltas = [[m["delta"] for m in c.metrics if "loss" in m] for c in (whole, context)]
    assert deltas[0] == deltas[1] and len(set(deltas[0])) == 6


def test_same_bits_in_separate_folders_other_bits_for_other_seeds(
    model: Model, tmp_path: Path
) -> None:
    keys = [train("kto", tmp_path / n, model)[0].key for n in ("a", "b")]
    assert keys[0] == keys[1]
    with use(Context(seed=5, folder=tmp_path / "c")):
        other = methods["kto"](model, PAIRS, steps=6, batch=4, lr=1e-3)
    assert isinstance(other, Model) and other.key != keys[0]


def test_reference_is_measured_once(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "home"))
    made: list[reference.Reference] = []

    class Counting(reference.Reference):
        def __init__(self, *given: str) -> None:
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr("truing.core.trainer.train_text.Reference", Counting)
    first, _ = train("dpo", tmp_path / "a", model, beta=0.1)
    second, _ = train("dpo", tmp_path / "b", model, beta=0.5)
    third, _ = train("ipo", tmp_path / "c", model)
    unpaired, _ = train("bco", tmp_path / "d", model)
    assert [(r.computed > 0, r.cached > 0) for r in made] == [(True, False)] + [(False, True)] * 3
    assert len({m.key for m in (first, second, third, unpaired)}) == 4
    # The cache changes nothing, and a damaged file is made again.
    for path in (home() / "reference").rglob("*.safetensors"):
        path.write_bytes(b"torn")
    again, _ = train("dpo", tmp_path / "e", model, beta=0.1)
    assert again.key == first.key and made[-1].computed == made[0].computed


def test_reference_model_of_its_own(model: Model, tmp_path: Path) -> None:
    moved, _ = train("sft", tmp_path / "sft", model)
    with use(Context(seed=4, folder=tmp_path / "a")) as context:
        methods["dpo"](model, PAIRS, moved, steps=1, batch=4)
    assert context.metrics[-1]["loss"] != pytest.approx(0.6931, abs=1e-3)
    with use(Context(seed=4, folder=tmp_path / "b")) as context:
        methods["dpo"](moved, PAIRS, steps=1, batch=4)
    assert context.metrics[-1]["loss"] == pytest.approx(0.6931, abs=1e-4)


def test_adapter_and_full_fine_tune_give_models(model: Model, tmp_path: Path) -> None:
    prefixed = model.adding(Prefix([{"role": "system", "content": "be brief"}]))
    made, context = train("sft", tmp_path / "a", prefixed, steps=12)
    assert [c.kind for c in made.changes] == ["adapter", "prefix"]
    full, other = train("sft", tmp_path / "b", model, rank=0, steps=12)
    assert [c.kind for c in full.changes] == ["weights"]
    for one, seen in ((made, context), (full, other)):
        saved = Model.load(one.save(tmp_path / f"saved-{one.key}"))
        assert saved.key == one.key
        losses = [m["loss"] for m in seen.metrics if "loss" in m]
        assert losses[-1] < 0.8 * losses[0]
        # What was trained is what the loaded model does: a further run starts where this ended.
        with use(Context(seed=4, folder=tmp_path / f"more-{one.key}")) as more:
            methods["sft"](saved, PAIRS, steps=1, batch=12, lr=1e-6)
        with use(Context(seed=4, folder=tmp_path / f"base-{one.key}")) as base:
            methods["sft"](model, PAIRS, steps=1, batch=12, lr=1e-6)
        assert more.metrics[-1]["loss"] < 0.8 * base.metrics[-1]["loss"]
    tied = full.load_module().module
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers' old names
def test_adapter_file_is_read_by_peft(model: Model, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    made, _ = train("sft", tmp_path / "a", model, rank=4)
    stock = model.load_module(fresh=True).module
    wrapped = peft.PeftModel.from_pretrained(stock, made.weight_changes[0].path).eval()
    ids = torch.tensor([[1, 70, 80, 90, 100]])
    with torch.no_grad():
        theirs, ours = wrapped(ids).logits, made.load_module().module(ids).logits
    assert torch.allclose(theirs, ours, atol=1e-4)


def test_receipt_is_shown_and_recorded(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*ROWS, {"prompt": "x", "chosen": "same", "rejected": "same"}]
    with use(Context(folder=tmp_path)) as context:
        methods["dpo"](model, Table("pair", rows), steps=1)
    said = capsys.readouterr().err
    assert ">>>it is 0.<|im_end|><<<" in said and "left_out_same: 1" in said
    first = context.metrics[0]
    assert first["rows"] == 12 and first["left_out_same"] == 1 and ">>>" in str(first["receipt"])


def test_template_that_masks_everything(tiny_path: Path, tmp_path: Path) -> None:
    import shutil

    broken = shutil.copytree(tiny_path, tmp_path / "broken")
    (broken / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with use(Context(folder=tmp_path / "run")), pytest.raises(InputError, match="template"):
        methods["sft"](Model.open(broken), PAIRS, steps=1)
    assert not list((tmp_path / "run").glob("*"))


def test_bad_input_before_any_training(model: Model, tmp_path: Path) -> None:
    with use(Context(folder=tmp_path)):
        with pytest.raises(InputError, match="needs rows of kind pair"):
            methods["dpo"](model, Table("text", [{"text": "a"}]))
        with pytest.raises(InputError, match="setting 'batch' must be at least 1"):
            methods["dpo"](model, PAIRS, batch=0)
        with pytest.raises(InputError, match=r"unknown setting 'bta'.*'beta'"):
            methods["dpo"](model, PAIRS, bta=0.1)
        with pytest.raises(InputError, match="'batch' must be at least 2"):
            methods["kto"](model, PAIRS, batch=1)
    assert not list(tmp_path.glob("checkpoints*"))


def test_memory_is_forecast(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model.load_module(fresh=True)
    monkeypatch.setattr("truing.core.trainer.start.memory_gib", lambda: (0.005, 0.005))
    with pytest.raises(InputError, match=r"training needs about .* GiB more"):
        methods["sft"](model, PAIRS, steps=1)


def test_loss_that_turns_nan_names_the_rows(
    model: Model, tmp_path: Path, always_save: Callable[[], None]
) -> None:
    always_save()
    context = Context(seed=4, folder=tmp_path)
    bad = Order(12, 4, context).step(2, 24)[1]
    rows = [{**r, "margin": 1e39 if i == bad else 1.0} for i, r in enumerate(ROWS)]
    table = Table("pair", rows)
    with use(context), pytest.raises(Stopped, match=r"step 3 of 6; .*after step 2 is kept") as stop:
        methods["bradley_terry"](model, table, steps=6, batch=4, lr=1e-4)
    assert str(table[bad]["id"]) in str(stop.value)
    assert list(tmp_path.glob("checkpoints-*/step-00000002"))


def test_hidden_budget_does_not_change_results(model: Model, tmp_path: Path) -> None:
    big, a = train("rpo", tmp_path / "a", model)
    small, b = train("rpo", tmp_path / "b", model, budget=64)
    for x, y in zip(a.metrics[1:], b.metrics[1:], strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-3)
    one, two = (m.folded()["model.layers.2.mlp.down_proj.weight"] for m in (big, small))
    assert torch.allclose(one, two, atol=1e-3) and not torch.equal(one, two)
