"""Every decode method, found in the registry: greedy at its limit, bits, requests, saved whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from truing.core.drawing import Completion
from truing.core.generate import generate
from truing.errors import InputError
from truing.method import methods
from truing.models import Decoder, Model, Prefix

ALL = [name for name in methods if name.startswith("decode/")]
PROMPTS = ["What is red?", "Say why.", [{"role": "user", "content": "Name it."}]]
# Settings that say how many candidates a decoder chooses from: 1 each is its greedy limit.
COUNTS = ("n", "beams", "candidates", "proposals", "keep_best", "width", "samples")
DECODERS = [name for name in ALL if set(COUNTS) & set(methods[name].settings)]
TELLING = sorted({*ALL} - {*DECODERS})  # they choose nothing: the model is told something first
SHORT: dict[str, dict[str, object]] = {"short": {"use": "max_words", "n": 1}}


def limit(name: str) -> dict[str, object]:
    return {s: 1 for s in methods[name].settings if s in COUNTS}


def decoded(name: str, model: Model, **settings: object) -> Model:
    made = methods[name](model, **settings)
    assert isinstance(made, Model)
    return made


def rewarded(name: str, model: Model) -> Model:
    """With a reward where the method takes one, and few candidates."""
    few = {s: 2 for s in methods[name].settings if s in COUNTS}
    more = {"rewards": SHORT} if "rewards" in methods[name].settings else {}
    more |= {"text": "Be brief."} if name in TELLING else {}
    return decoded(name, model, **few, **more)


def words(made: list[list[Completion]]) -> list[list[tuple[object, ...]]]:
    return [[(c.ids, c.text, c.finish, c.tokens) for c in items] for items in made]


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


def test_there_are_decoders() -> None:
    assert {"decode/best_of_n", "decode/deal"} <= set(DECODERS)
    assert "decode/system_prompt" in TELLING


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_limit_is_greedy(name: str, model: Model) -> None:
    plain = generate(model, PROMPTS, max_tokens=7, greedy=True)
    made = generate(decoded(name, model, **limit(name)), PROMPTS, max_tokens=7, greedy=True)
    assert words(made) == words(plain)
    for items, expected in zip(made, plain, strict=True):
        assert items[0].logprobs == pytest.approx(expected[0].logprobs, abs=1e-4)


@pytest.mark.parametrize("name", DECODERS)
def test_weights_and_what_logprob_sees_stay(name: str, model: Model) -> None:
    made = rewarded(name, model)
    assert made.weights_key == model.weights_key and made.key != model.key
    assert isinstance(made.changes[-1], Decoder)
    assert made.with_changes(c for c in made.changes if not isinstance(c, Decoder)).key == model.key


@pytest.mark.parametrize("name", TELLING)
def test_what_a_model_is_told_is_a_prefix(name: str, model: Model) -> None:
    assert methods[name].settings["text"].default == ""
    made = decoded(name, model, text="Be brief.")
    assert made.weights_key == model.weights_key and made.key != model.key
    assert isinstance(made.changes[-1], Prefix) and made.changes[:-1] == model.changes
    with pytest.raises(InputError, match=name):
        decoded(name, model)


@pytest.mark.parametrize("name", ALL)
def test_as_many_answers_as_asked_and_the_same_bits_again(name: str, model: Model) -> None:
    made = rewarded(name, model)
    first = generate(made, PROMPTS, n=2, max_tokens=5, seed=3)
    assert [len(items) for items in first] == [2, 2, 2]
    assert generate(made, PROMPTS, n=2, max_tokens=5, seed=3) == first
    assert all(c.tokens == len(c.ids) == len(c.logprobs) <= 5 for items in first for c in items)


@pytest.mark.parametrize("name", ALL)
def test_answers_do_not_depend_on_what_else_is_asked(name: str, model: Model) -> None:
    made = rewarded(name, model)
    whole = words(generate(made, PROMPTS, max_tokens=5, seed=3))
    alone = [words(generate(made, [p], max_tokens=5, seed=3))[0] for p in PROMPTS]
    assert whole == alone


@pytest.mark.parametrize("name", ALL)
def test_saved_and_loaded_it_answers_the_same(name: str, model: Model, tmp_path: Path) -> None:
    made = rewarded(name, model)
    again = Model.load(made.save(tmp_path / "saved"))
    assert again.key == made.key
    first = generate(made, PROMPTS[:1], max_tokens=4, seed=1)
    assert generate(again, PROMPTS[:1], max_tokens=4, seed=1) == first
    with pytest.raises(InputError, match="run-time"):
        made.export(tmp_path / "plain")


@pytest.mark.parametrize("name", DECODERS)
def test_settings_round_trip_through_json(name: str, model: Model) -> None:
    change = rewarded(name, model).changes[-1]
    assert isinstance(change, Decoder)
    assert json.loads(json.dumps(dict(change.settings))) == dict(change.settings)
    defaults = {n: s.default for n, s in methods[name].settings.items() if not s.required}
    assert methods[name].validate(json.loads(json.dumps(defaults))) == methods[name].validate({})
