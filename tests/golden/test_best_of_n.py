"""Best of n: the choice by hand, the rewards against transformers, the request's shape."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaForSequenceClassification

from truing.changes import Adapter, Decoder, Prefix
from truing.core.chat import completion_ids, prompt_ids
from truing.core.generate import generate
from truing.core.judging.rewards import Rewards, score_model
from truing.core.modelfiles import lora
from truing.core.tiny import tiny_config, tiny_model
from truing.decode.best_of_n import best
from truing.decode.rewards import coverage, inflections, keyword_coverage, listed_words
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.principles import Principle, Principles
from truing.specify import texts

PROMPTS = ["What is red?", "Say why."]
DRAW = {"max_tokens": 6, "seed": 3}
SHORT = {"short": {"use": "max_words", "n": 1}}


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


@pytest.fixture(scope="module")
def tuned(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The tiny model with an adapter that does something."""
    module, _ = tiny_model()
    adapters = lora.attach(module, 4, 8.0)
    source = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for adapter in adapters.adapters.values():
            shape = adapter.b_OR.shape
            adapter.b_OR.copy_(0.05 * torch.randn(shape, generator=source))
    folder = tmp_path_factory.mktemp("adapter")
    adapters.save(folder)
    return model.adding(Adapter(folder))


def test_the_first_of_the_best_is_taken() -> None:
    assert best([0.1, 0.7, 0.7]) == 1
    assert best([-2.0]) == 0


def test_it_gives_the_best_of_its_own_candidates(model: Model) -> None:
    drawn = generate(model, PROMPTS, n=6, **DRAW)
    decoded = methods["best_of_n"](model, n=3, rewards=SHORT)
    assert isinstance(decoded, Model)
    chosen = generate(decoded, PROMPTS, n=2, **DRAW)
    for items, given in zip(drawn, chosen, strict=True):
        for start, answer in zip((0, 3), given, strict=True):
            group = items[start : start + 3]
            counts = [len(texts.words(c.text)) for c in group]
            values = [1.0 if c <= 1 else 0.49 / c for c in counts]
            assert answer == group[values.index(max(values))]


def test_a_prompt_asked_again_gets_further_answers_in_any_block(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = methods["best_of_n"](model, n=2, rewards=SHORT)
    assert isinstance(made, Model)
    asked = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]]

    def ids(prompts: list[str]) -> list[list[tuple[int, ...]]]:
        return [[c.ids for c in items] for items in generate(made, prompts, n=2, **DRAW)]

    together = ids(asked)
    assert len({tuple(together[i]) for i in (0, 2, 3)}) == 3
    assert ids(PROMPTS) == together[:2]
    monkeypatch.setattr("truing.core.generate.BLOCK", 2)  # one prompt at a time
    assert ids(asked) == together


def test_weights_combine_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "relevance", lambda rows: [0.5] * len(rows))
    rules = Principles(
        [
            Principle("brief", "Short.", priority=3, check={"use": "max_words", "n": 2}),
            Principle("calm", "Calm.", check={"use": "no_exclamation"}),
        ]
    )
    rows: list[dict[str, object]] = [
        {"prompt": "Use: dog, ball", "completion": "The dogs ran."},
        {"prompt": "Use: dog, ball", "completion": "balls! dog"},
    ]
    refs: dict[str, dict[str, object]] = {"all": {"use": "keyword_coverage"}}
    value = Rewards(refs, {"all": 2.0, "principles": -0.5}, rules, where="here")
    first = 2 * 0.5 - 0.5 * (3 * 0.49 * 2 / 3 + 1) / 4
    second = 2 * 1.0 - 0.5 * (3 * 1.0 + 0.245) / 4
    assert value(rows) == pytest.approx([first, second])
    assert Rewards({}, {})(rows) == [0.0, 0.0]


def test_required_words_in_some_inflection() -> None:
    assert {"dogs", "dog"} <= inflections("dog")
    assert {"stopped", "stopping", "stops"} <= inflections("stop")
    assert {"baked", "baking", "bakes"} <= inflections("bake")
    assert "cities" in inflections("city") and "stopp" not in inflections("stop")
    assert coverage("He bakes two CAKES.", ["bake", "cake", "oven"]) == pytest.approx(2 / 3)
    assert coverage("A dogma.", ["dog"]) == 0.0
    assert coverage("In New York today", ["new york"]) == 1.0
    # Cut as the text is: at hyphens, apostrophes and dots.
    asked = ["t-shirt", "o'clock", "St. Bernard"]
    assert coverage("Two T-shirts at ten o\u2019clock for a St Bernard.", asked) == 1.0
    assert coverage("A shirt at ten on the clock.", asked) == coverage("It's so.", ["-"]) == 0.0
    assert listed_words("Write. Words: dog, red ball and tree.") == ["dog", "red ball", "tree"]
    with pytest.raises(InputError, match="no required words"):
        keyword_coverage([{"prompt": "Write.", "completion": "x"}])


def test_implicit_reward_is_a_log_ratio(tuned: Model) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": "Why?", "completion": "ab"},
        {"prompt": "How?", "completion": "x", "finished": False},
        {"prompt": "Why?", "completion": "abcd"},
        {"prompt": "How?", "completion": "", "finished": False},
    ]
    expected: list[float] = []
    for row in rows:
        total = 0.0
        for sign, m in ((1, tuned), (-1, tuned.with_changes(()))):
            loaded = m.load_module()
            head = prompt_ids(loaded.tokenizer, str(row["prompt"]))
            ended = row.get("finished") is not False
            tail = completion_ids(loaded.tokenizer, str(row["completion"]), end=ended)
            with torch.no_grad():
                logits = loaded.module(torch.tensor([head + tail])).logits[0]
            logp = torch.log_softmax(logits, -1)
            total += sign * sum(float(logp[len(head) - 1 + i, t]) for i, t in enumerate(tail))
        expected.append(total)
    assert score_model(tuned, rows) == pytest.approx(expected, abs=1e-4)
    assert expected[3] == 0.0 and abs(expected[0] - expected[2]) > 1e-3


def test_a_scalar_head_scores(tiny_path: Path, tmp_path: Path) -> None:
    config = tiny_config()
    config.num_labels = 1
    torch.manual_seed(0)
    module = LlamaForSequenceClassification(config).eval()
    module.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / file).write_bytes((tiny_path / file).read_bytes())
    reward = Model.open(tmp_path)
    rows: list[dict[str, object]] = [
        {"prompt": "Why?", "completion": t, "finished": False} for t in ("ab", "zz top")
    ]
    tokenizer = reward.load_module().tokenizer
    ids = [
        prompt_ids(tokenizer, "Why?") + completion_ids(tokenizer, t, end=False)
        for t in ("ab", "zz top")
    ]
    with torch.no_grad():
        expected = [
            float(module.score(module.model(torch.tensor([i])).last_hidden_state[0, -1])[0])
            for i in ids
        ]
    assert score_model(reward, rows) == pytest.approx(expected, abs=1e-5)
    assert not math.isclose(expected[0], expected[1])


def test_it_holds_what_it_needs_when_saved(model: Model, tuned: Model, tmp_path: Path) -> None:
    rules = Principles([Principle("brief", "Short.", check={"use": "max_words", "n": 3})])
    made = methods["best_of_n"](model, rules, tuned, n=2, weights={"principles": 2.0})
    assert isinstance(made, Model)
    change = made.changes[-1]
    assert isinstance(change, Decoder) and set(change.holds) == {"principles", "reward_model"}
    again = Model.load(made.save(tmp_path / "saved"))
    assert again.key == made.key


def test_it_judges_the_prompt_that_the_model_sees(model: Model) -> None:
    led = model.adding(Prefix([{"role": "system", "content": "Words: aa, bb"}]))
    decoded = methods["best_of_n"](led, n=2, rewards=SHORT)
    assert isinstance(decoded, Model)
    plain = generate(led, ["Why?"], n=2, **DRAW)[0]
    assert generate(decoded, ["Why?"], **DRAW)[0][0] in plain


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "at least 1"),
        ({"n": 2}, "nothing to tell answers apart"),
        ({"rewards": {"x": {"use": "max_wrds"}}}, "unknown component 'max_wrds'"),
        ({"rewards": {"x": {"use": "max_words"}}}, "setting 'n' is missing"),
        ({"rewards": {"principles": {"use": "max_words", "n": 2}}}, "is taken"),
        ({"rewards": SHORT, "weights": {"shrt": 1.0}}, "Did you mean 'short'"),
        ({"rewards": SHORT, "weights": {"short": float("nan")}}, "finite"),
    ],
)
def test_faults_are_named_before_anything_is_drawn(
    model: Model, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        methods["best_of_n"](model, **settings)


def test_a_model_that_cannot_reward_is_refused(model: Model) -> None:
    with pytest.raises(InputError, match="nothing was"):
        methods["best_of_n"](model, None, model)
    with pytest.raises(InputError, match="served model"):
        methods["best_of_n"](model, None, Model.open("http://127.0.0.1:1/v1#m"))
