"""A chat template that is chosen by a model's name, also for a base model without one, or none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import cast

import httpx
import pytest
from transformers import AutoTokenizer, GenerationConfig

from truing.cli import main
from truing.context import Context, use
from truing.core.batch.training_rows import Reader
from truing.core.chat import prompt_ids
from truing.core.generate import generate
from truing.core.generation.stops import ends_of
from truing.core.objective import objective_of
from truing.core.tiny import TEMPLATE
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.plan import Plan
from truing.reports import Report
from truing.serve.openai import serving
from truing.tables import Table
from truing.train.supervised.sft import sft

OTHER, OPEN, CLOSE = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
ASKED = [{"role": "user", "content": "Why?"}]
CHATML = f"{OPEN}user\nWhy?{CLOSE}\n{OPEN}assistant\n"
ROW = {"prompt": "Why?", "completion": " So."}


@pytest.fixture
def bare(tiny_path: Path, tmp_path: Path) -> Path:
    """A base model: no template, and another end token than ChatML's, which is none of its own."""
    folder = shutil.copytree(tiny_path, tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    change(folder / "tokenizer_config.json", eos_token=OTHER, pad_token=OTHER, bos_token=OTHER)
    for name in ("config.json", "generation_config.json"):
        change(folder / name, eos_token_id=0, pad_token_id=0)
    return folder


@pytest.fixture
def chatml(tmp_path: Path) -> Path:
    (tmp_path / "chatml.jinja").write_text(TEMPLATE)
    return tmp_path / "chatml.jinja"


def change(path: Path, **facts: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


def trained(model: Model, folder: Path, rows: list[dict[str, object]]) -> tuple[Model, str]:
    """The model after as many steps as it takes to learn one row by heart, and the receipt."""
    with use(Context(folder=folder)) as context:
        made = methods["sft"](
            model,
            Table("example", rows),
            rank=0,
            steps=12,
            lr=3e-3,
            warmup=0.0,
            schedule="constant",
        )
    return cast(Model, made), str(context.metrics[0]["receipt"])


def test_a_base_model_learns_to_chat_and_stops_at_the_end(
    bare: Path, chatml: Path, tmp_path: Path
) -> None:
    model = Model.open(f"{bare}?template={chatml}&end={CLOSE}")
    made, receipt = trained(model, tmp_path, [dict(ROW)])
    assert f"assistant\n  >>> So.{CLOSE}<<<" in receipt
    for one in (made, Model.open(made.export(tmp_path / "out"))):
        said = generate(one, ["Why?"], greedy=True, max_tokens=9)[0][0]
        assert (said.text, said.finish, said.ids[-1]) == (" So.", "stop", 2)


def test_without_a_template_texts_continue_as_they_stand(tiny_path: Path, tmp_path: Path) -> None:
    model = Model.open(f"{tiny_path}?template=none")
    tokenizer = model.load_module().tokenizer
    assert not tokenizer.chat_template
    plain = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in ROW.values()]
    unit = Reader(tokenizer, objective_of(sft), 512).read(Table("", [dict(ROW)]))[0]
    [(ids, loss)] = unit.tree().rows()
    assert list(ids) == [*plain[0], *plain[1], 2]
    assert list(loss) == [False] * len(plain[0]) + [True] * (len(plain[1]) + 1)
    made, receipt = trained(model, tmp_path, [dict(ROW)])
    assert f"  Why?>>> So.{CLOSE}<<<" in receipt
    said = generate(made, ["Why?"], greedy=True, max_tokens=9)[0][0]
    assert (said.text, said.finish) == (" So.", "stop")
    with pytest.raises(InputError, match=r"no chat template.*NAME\?template=FILE"):
        generate(model, [ASKED], max_tokens=1)
    bare = Model.open(made.export(tmp_path / "out"))
    assert not AutoTokenizer.from_pretrained(bare.folder).chat_template


def test_a_template_in_the_settings_of_the_tokenizer_is_none_either(
    bare: Path, chatml: Path
) -> None:
    change(bare / "tokenizer_config.json", chat_template="{{ messages }}")
    for said, kept in (("none", None), (chatml, TEMPLATE)):
        model = Model.open(f"{bare}?template={said}")
        assert model.load_module().tokenizer.chat_template == kept
        settings = json.loads(model.local.parts()["tokenizer_config.json"].read_text())
        assert "chat_template" not in settings and settings["eos_token"] == OTHER


def test_the_choice_is_part_of_the_model(bare: Path, chatml: Path, tmp_path: Path) -> None:
    names = ["", f"?template={chatml}", f"?template={chatml}&end={CLOSE}"]
    plain, other, both = (Model.open(f"{bare}{said}") for said in names)
    assert len({plain.key, other.key, both.key}) == 3
    assert both.key == plain.with_template(chatml, end=CLOSE).key
    assert both.with_template().key == plain.key  # in the place of what was chosen before
    assert both.thinking(False).key == Model.open(f"{bare}{names[2]}&thinking=false").key
    copy = shutil.copy(chatml, tmp_path / "a & b.jinja")  # by what it says, not by its name
    assert Model.open(f"{bare}?end={CLOSE}&template={copy}").key == both.key
    chatml.write_text(TEMPLATE + "{# another one #}")
    assert Model.open(f"{bare}{names[2]}").key != both.key
    assert prompts(both) == CHATML  # which was opened before that


def prompts(model: Model) -> str:
    tokenizer = model.load_module().tokenizer
    return str(tokenizer.decode(prompt_ids(tokenizer, ASKED)))


def test_what_is_saved_and_exported_has_the_choice(
    bare: Path, chatml: Path, tmp_path: Path
) -> None:
    model = Model.open(f"{bare}?template={chatml}&end={CLOSE}")
    saved, out = model.save(tmp_path / "saved"), model.export(tmp_path / "out")
    assert Model.load(saved).key == Model.open(out).key == model.key
    for one in (model, Model.load(saved), Model.open(out)):
        loaded = one.load_module()
        assert prompts(one) == CHATML
        assert sorted(ends_of(loaded.tokenizer, loaded.module)) == [0, 2]
    # As transformers and vLLM read them, which know nothing of what was chosen.
    theirs = AutoTokenizer.from_pretrained(out)
    assert theirs.chat_template == TEMPLATE and theirs.eos_token == OTHER
    assert theirs.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True) == CHATML
    assert (out / "chat_template.jinja").read_text() == TEMPLATE
    assert GenerationConfig.from_pretrained(out).eos_token_id == [0, 2]
    assert "chat_template.jinja" not in [p.name for p in bare.iterdir()]  # left as it was


def test_an_adapter_brings_the_choice_along(bare: Path, chatml: Path, tmp_path: Path) -> None:
    model = Model.open(f"{bare}?template={chatml}&end={CLOSE}")
    with use(Context(folder=tmp_path)):
        made = methods["sft"](model, Table("example", [dict(ROW)]), rank=2, steps=1)
    again = Model.open(cast(Model, made).export_adapter(tmp_path / "adapter"))
    loaded = again.load_module()
    assert prompts(again) == CHATML and again.base_key == model.base_key
    assert sorted(ends_of(loaded.tokenizer, loaded.module)) == [0, 2]
    assert prompts(Model.open(f"{tmp_path / 'adapter'}?template={chatml}")) == CHATML


def test_an_end_at_which_the_model_does_not_stop(bare: Path, chatml: Path, tmp_path: Path) -> None:
    """As of base models that bring a template, whose settings of generation know their own end."""
    shutil.copy(chatml, bare / "chat_template.jinja")
    change(bare / "tokenizer_config.json", additional_special_tokens=[CLOSE])
    with pytest.raises(InputError, match="at which the model does not stop") as met:
        trained(Model.open(bare), tmp_path, [dict(ROW)])
    assert f"NAME?end={CLOSE};" in met.value.fix
    (bare / "generation_config.json").unlink()
    model = Model.open(f"{bare}?end={CLOSE}")
    made = trained(model, tmp_path / "b", [dict(ROW)])[0]
    assert generate(made, ["Why?"], greedy=True, max_tokens=9)[0][0].finish == "stop"
    assert json.loads(model.local.parts()["generation_config.json"].read_text()) == {
        "bos_token_id": 1, "eos_token_id": [0, 2], "pad_token_id": 0
    }  # fmt: skip
    assert model.load_module().tokenizer.chat_template == TEMPLATE


def test_a_server_asks_and_refuses_by_the_choice(bare: Path, chatml: Path) -> None:
    body = {"model": "base", "max_tokens": 1}
    chat, text = {**body, "messages": ASKED}, {**body, "prompt": "Why?"}
    with serving(Model.open(f"{bare}?template={chatml}&end={CLOSE}")) as made:
        reply = httpx.post(f"{made.url}/chat/completions", json=chat, headers=key(made.token))
        assert reply.json()["usage"]["prompt_tokens"] == 23, reply.text
    with serving(Model.open(f"{bare}?template=none")) as made:
        reply = httpx.post(f"{made.url}/completions", json=text, headers=key(made.token))
        assert reply.json()["usage"]["prompt_tokens"] == 4, reply.text
        reply = httpx.post(f"{made.url}/chat/completions", json=chat, headers=key(made.token))
        assert reply.status_code == 400 and "NAME?template=FILE" in reply.text


def key(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_answers_are_scored_under_the_choice(bare: Path, chatml: Path) -> None:
    """So that evaluation reads what training has learnt: log P of the same tokens."""
    model = Model.open(f"{bare}?template={chatml}&end={CLOSE}")
    copy = shutil.copytree(bare, chatml.parent / "copy")
    shutil.copy(chatml, copy / "chat_template.jinja")
    change(copy / "tokenizer_config.json", additional_special_tokens=[CLOSE])
    pairs = Table("pair", [{"prompt": "Why?", "chosen": "So.", "rejected": "No."}])
    ours, theirs = (
        cast(Report, methods["preference"](one, pairs)) for one in (model, Model.open(copy))
    )
    assert ours.measures == theirs.measures
    assert ours.measures != cast(Report, methods["preference"](Model.open(bare), pairs)).measures


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("?template=chatnl.jinja", r"no such file with a chat template.*chatml.jinja"),
        ("?template=empty.jinja", r"the chat template is empty.*template=none"),
        ("?template=broken.jinja", r"broken.jinja: the chat template refuses these messages"),
        ("?template=words.jinja", r"words.jinja: the chat template does not put an answer"),
        ("?template=weights", r"not UTF-8"),
        ("?template=", r"nothing is said of 'template'.*Leave out template="),
        ("?template=none&template=none", r"'template' is said twice"),
        ("?template=none&end=<|im_end|>", r"ends with the tokenizer's own end token"),
        ("?template=none&thinking=true", r"cannot be told to think.*Leave out thinking=true"),
        ("?thinking=yes", r"'thinking' is true or false.*\?thinking=true"),
        ("?end=<|im_end|>", r"no chat template that could write.*\?template=FILE&end=<\|im_end\|>"),
        ("?template=chatml.jinja&end=<|im_stop|>", r"no special token '<\|im_stop\|>'.*<\|im_"),
        ("?template=chatml.jinja&end=So", r"no special token 'So'.*not added to a model"),
        ("?template=chatml.jinja&end=<|im_start|>", r"does not end an answer with.*im_end"),
        ("?templat=chatml.jinja", r"word 'templat' behind a model's name.*template"),
    ],
)
def test_misuse(
    bare: Path, chatml: Path, monkeypatch: pytest.MonkeyPatch, said: str, told: str
) -> None:
    monkeypatch.chdir(chatml.parent)
    texts = {"empty": " \n", "broken": "{% for m in messages %}", "words": "{{ bos_token }}"}
    for name, text in texts.items():
        Path(f"{name}.jinja").write_text(text)
    Path("weights").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=told) as met:
        Model.open(f"{bare}{said}")
    assert met.value.fix


def test_a_recipe_names_the_file_beside_itself(
    bare: Path, chatml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan("p", folder=tmp_path)
    plan.model("mine", f"base?template=chatml.jinja&end={CLOSE}")
    plan.step("a", "train/sft", model="mine", data="rows.jsonl")
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    monkeypatch.chdir("/")
    source = plan.check()[0].sources["model"][""].text
    assert source == f"{bare}?template={chatml}&end={CLOSE}"
    plan.steps["a"].given["model"] = "mine?thinking=false"  # beside what the recipe says of it
    assert plan.check()[0].sources["model"][""].text == f"{source}&thinking=false"
    plan.steps["a"].given["model"] = "mine?template=none"  # whose end belonged to the other one
    assert plan.check()[0].sources["model"][""].text == f"{bare}?template=none"
    monkeypatch.chdir(tmp_path)
    for said in ("", "?template=none"):  # by a command, whose paths are seen from here
        made = f"base?template=chatml.jinja&end={CLOSE}" if not said else f"base{said}"
        words = ["--data", "rows.jsonl", "--steps", "1", "--rank", "2", "--out", f"out{said[1:9]}"]
        assert main(["train", "sft", "--model", made, *words]) == 0
    assert prompts(Model.load("out")) == CHATML
