"""Reward models in transformers' form: scored in trees, trained on, a critic, written back."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from truing.context import Context, use
from truing.core.chat import completion_ids, prompt_ids
from truing.core.judging.rewards import score_model
from truing.core.modelfiles.stock import quiet
from truing.core.passes.scoring import HEAD, ScoreHead, has_head
from truing.core.tiny import tiny_config, tiny_tokenizer
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.sources import need_abilities
from truing.tables import Row, Table

PAIRS: list[Row] = [
    {"prompt": "say a", "chosen": "well, a", "rejected": "no"},
    {"prompt": "say b", "chosen": "b", "rejected": "what?"},
]
ROWS: list[Row] = [
    {"prompt": r["prompt"], "completion": r[side]} for r in PAIRS for side in ("chosen", "rejected")
]
SHORT: dict[str, object] = {"steps": 1, "batch": 2, "lr": 1e-3}


def module_of(kind: str) -> PreTrainedModel:
    torch.manual_seed(3)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=259, n_positions=128, n_embd=32, n_layer=2, n_head=2, num_labels=1,
            pad_token_id=2, eos_token_id=2, bos_token_id=1, initializer_range=0.1,
        )  # fmt: skip
        return GPT2ForSequenceClassification(config)
    own = tiny_config()
    own.num_labels, own.num_hidden_layers, own.initializer_range = 1, 2, 0.1
    own.tie_word_embeddings = kind == "tied"
    return LlamaForSequenceClassification(own)


@pytest.fixture(scope="module", params=["tied", "untied", "gpt2"])
def reward(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp(str(request.param)) / "reward"
    with quiet():
        module_of(request.param).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Model.open(folder)


def plain(folder: Path, rows: list[Row]) -> list[float]:
    """What transformers' own class says, one text at a time."""
    tokenizer = tiny_tokenizer()
    with quiet():
        module = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    made: list[float] = []
    for row in rows:
        ids = prompt_ids(tokenizer, str(row["prompt"]))
        ids += completion_ids(tokenizer, str(row["completion"]))
        hidden = module.base_model(torch.tensor([ids])).last_hidden_state
        made.append(float(module.score(hidden[0, -1])))
    return made


def test_it_scores_as_transformers_does(reward: Model) -> None:
    with torch.no_grad():
        want = plain(reward.folder, ROWS)
    assert max(want) - min(want) > 0.01
    assert has_head(reward) and score_model(reward, ROWS) == pytest.approx(want, abs=1e-4)


def test_an_adapter_that_scores_is_a_reward_model(tiny_path: Path, tmp_path: Path) -> None:
    """As TRL's trainer of rewards leaves one: its base has no head, which comes with it."""
    from peft import LoraConfig, get_peft_model

    with quiet():
        module = AutoModelForSequenceClassification.from_pretrained(tiny_path, num_labels=1)
    config = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(module, config).eval()
        source = torch.Generator().manual_seed(1)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "score" in name:
                parameter.data.normal_(0, 0.1, generator=source)
        wrapped.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    tokenizer, want = tiny_tokenizer(), []
    with torch.no_grad():
        for row in ROWS:
            ids = prompt_ids(tokenizer, str(row["prompt"]))
            ids += completion_ids(tokenizer, str(row["completion"]))
            hidden = module.base_model(torch.tensor([ids])).last_hidden_state
            want.append(float(module.score(hidden[0, -1])))
    model = Model.open(tmp_path / "a")
    assert max(want) - min(want) > 0.01
    assert has_head(model) and score_model(model, ROWS) == pytest.approx(want, abs=1e-4)


def loss(reward: Model) -> float:
    """Bradley and Terry's of all pairs."""
    scores = torch.tensor(score_model(reward, ROWS)).view(-1, 2)
    return float(-torch.nn.functional.logsigmoid(scores[:, 0] - scores[:, 1]).mean())


@pytest.mark.parametrize("rank", [4, 0])
def test_training_goes_on_from_it(reward: Model, rank: int, tmp_path: Path) -> None:
    need_abilities(methods["bradley_terry"], "model", "", reward.can, where="")
    with use(Context(folder=tmp_path / "step", seed=1)):
        made = methods["bradley_terry"](
            reward, Table("pair", PAIRS), rank=rank, **{**SHORT, "steps": 8}
        )
    assert isinstance(made, Model) and loss(made) < loss(reward) - 0.01
    made.save(tmp_path / "saved")
    again = Model.load(tmp_path / "saved")
    assert score_model(again, ROWS) == pytest.approx(score_model(made, ROWS), abs=1e-5)
    if "GPT2" in str(reward.base.config["architectures"]):  # type: ignore[union-attr]
        with pytest.raises(InputError, match="no class that scores so"):
            made.export(tmp_path / "plain")
        return
    extra = made.folded().extra
    assert float(extra[f"{HEAD}.bias"]) == 0.0  # a loss of differences does not know the constant
    out = made.export(tmp_path / "plain")
    with torch.no_grad():
        assert plain(out, ROWS) == pytest.approx(score_model(made, ROWS), abs=1e-3)
    assert score_model(Model.open(out), ROWS) == pytest.approx(score_model(made, ROWS), abs=1e-3)


def test_of_two_the_layers_are_merged(reward: Model, tmp_path: Path) -> None:
    with use(Context(folder=tmp_path / "step")):
        made = methods["merge/linear"]({"a": reward, "b": reward})
    assert isinstance(made, Model)
    assert score_model(made, ROWS) == pytest.approx(score_model(reward, ROWS), abs=1e-6)


def test_what_truing_exported_is_trained_on(tiny_path: Path, tmp_path: Path) -> None:
    head = ScoreHead(128)
    with torch.no_grad():
        head.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    own = head.added_to(Model.open(tiny_path), tmp_path / "head")
    opened = Model.open(own.export(tmp_path / "out"))
    assert score_model(opened, ROWS) == pytest.approx(score_model(own, ROWS), abs=1e-4)
    with use(Context(folder=tmp_path / "step", seed=1)):
        made = methods["bradley_terry"](opened, Table("pair", PAIRS), **SHORT)
    assert isinstance(made, Model) and loss(made) != loss(opened)


def test_it_is_a_critic(reward: Model, tiny_path: Path, tmp_path: Path) -> None:
    policy = Model.open(tiny_path)
    rule = {"letters": {"use": "share_of", "letters": "abcdefgh"}}
    asked = Table("prompt", [{"prompt": "say a"}, {"prompt": "say b"}])
    with use(Context(folder=tmp_path / "step", seed=1)) as context:
        methods["ppo"](policy, asked, critic=reward, rewards=rule, max_tokens=4, **SHORT)
    (path,) = (
        p
        for p in (tmp_path / "step").glob("ppo-critic-*")
        if not p.name.endswith(("-head", "-trunk"))
    )
    assert "value_head.weight" in Model.load(path).folded().extra
    assert any("step" in m for m in context.metrics)


def test_encoders_are_refused_by_their_role(tiny_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    with quiet():
        BertForSequenceClassification(
            BertConfig(
                vocab_size=259, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                num_attention_heads=2, num_labels=1,
            )
        ).save_pretrained(folder)  # fmt: skip
    tiny_tokenizer().save_pretrained(folder)
    rule = {"letters": {"use": "share_of", "letters": "abcdefgh"}}
    told: dict[str, object] = {"rewards": rule, "max_tokens": 4, **SHORT}
    asked = Table("prompt", [{"prompt": "say a"}])
    with use(Context(folder=tmp_path / "step")):
        with pytest.raises(InputError, match="not a causal language model"):
            methods["bradley_terry"](Model.open(folder), Table("pair", PAIRS), **SHORT)
        with pytest.raises(InputError, match="not a causal language model") as error:
            methods["ppo"](Model.open(tiny_path), asked, critic=Model.open(folder), **told)
    assert "ppo input 'critic'" in error.value.where


def test_its_words_are_refused(reward: Model, tiny_path: Path, tmp_path: Path) -> None:
    table = Table("pair", PAIRS)
    with use(Context(folder=tmp_path / "step")):
        with pytest.raises(InputError, match="has no words of its own") as error:
            methods["dpo"](reward, table, **SHORT)
        assert error.value.fix
        with pytest.raises(InputError, match="has no words of its own"):
            methods["dpo"](Model.open(tiny_path), table, reference=reward, **SHORT)
    with pytest.raises(InputError, match="needs a model that can logprob"):
        need_abilities(methods["dpo"], "model", "", reward.can, where="")
