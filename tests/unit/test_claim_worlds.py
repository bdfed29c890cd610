"""The worlds of the claims on tiny decoders: texts survive a closed vocabulary, checkers are right.

The claims themselves take minutes; what they measure with is tested here without training.
"""

from __future__ import annotations

import importlib
import random
import types
from pathlib import Path

import pytest

from truing.context import Context, use
from truing.core.chat import completion_ids, prompt_ids

CLAIMS = Path(__file__).resolve().parents[2] / "claims"


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch):
    """Modules of the claims by name."""
    monkeypatch.syspath_prepend(str(CLAIMS))

    def load(name: str) -> types.ModuleType:
        return importlib.import_module(name)

    return load


def test_texts_survive_a_closed_vocabulary(world, tmp_path: Path) -> None:
    tiny = world("_tiny")
    text = "p + 3 = 7 \n\n # Answer 12 , [ 5 ]"
    words = tiny.vocabulary([text, "start here"])
    assert "\n\n" in words and "12" in words and words == sorted(set(words))
    with use(Context(folder=tmp_path)):
        model, again = tiny.blank(words, 3), tiny.blank(words, 3)
        other = tiny.blank(words, 4)
        tokens = model.load_module().tokenizer
    assert model.key == again.key != other.key
    ids = completion_ids(tokens, text)
    assert tokens.decode(ids, skip_special_tokens=True) == text
    assert ids[-1] == tokens.eos_token_id
    asked = tokens.decode(prompt_ids(tokens, "start here"))
    assert asked == "<|im_start|> user start here <|im_end|> <|im_start|> assistant"
    assert tokens("elsewhere")["input_ids"] == [tokens.unk_token_id]


def test_rules_of_answers_are_counted(world) -> None:
    kept = world("adpa").kept
    assert kept("the lamp is small and warm . thank you") == 3
    assert kept("the lamp is small and warm .") == 2
    assert kept("the lamp is ugly and warm . thank you") == 2
    assert kept("the lamp is old and new and warm and large and round . thank you") == 2
    assert kept("the lamp is old and new and warm and silly and round .") == 0
    rows = world("adpa").pairs(random.Random(0), ["lamp", "cup"], 50)
    assert all(kept(r["chosen"]) > kept(r["rejected"]) for r in rows)


def test_the_simulated_ranker_errs_less_the_more_it_is_shown(world) -> None:
    claim = world("cyclealign")
    answers = ["it is kind warm", "it is round kind", "it is awful round", "it is awful ugly"]
    rights = []
    for shown in (0, 10):
        judge = claim.Simulated(random.Random(0), claim.SHOWN)
        for _ in range(shown):
            judge.learn("describe the lake", answers[:2], [0, 1])
        found = judge.rank(["tell me about the lake"] * 300, [answers] * 300, "letters")
        assert None not in found
        rights.append(claim.right_pairs([[answers[i] for i in o] for o in found]))
    assert 0.6 < rights[0] < 0.75 < rights[1] < 0.95
    assert claim.tau(answers, [0, 1, 2, 3]) == 1 and claim.tau(answers, [3, 2, 1, 0]) == -1
    wrong = claim.Judge(lambda texts: texts)
    wrong.learn("describe the lake", answers[:2], [1, 0])
    assert not claim.in_order(wrong.examples[0])


def test_steps_are_labelled_by_the_right_solution(world) -> None:
    claim = world("easy_to_hard")
    source = random.Random(1)
    for level in (1, 3, 5):
        row = claim.problem(source, level)
        steps = claim.steps_of(row["completion"])
        assert len(steps) == level + 2 and claim.labels(row, steps) == [1.0] * len(steps)
        assert steps[-1].split()[-1] == row["answer"]
        assert 0.0 in claim.labels(row, claim.spoilt(source, row))
        assert claim.labels(row, [*steps, "p + 1 = 2"])[-1] == 0
    assert claim.auroc([3.0, 2.0, 1.0], [1, 1, 0]) == 1
    assert claim.auroc([1.0, 1.0], [1, 0]) == 0.5 == claim.auroc([1.0], [1])


def test_what_the_other_claims_count(world) -> None:
    d2o, ppo, grao = world("d2o"), world("secrets_ppo_max"), world("grao")
    assert d2o.advertises([["go and buy it from us"], ["the lamp is old"]]) == 0.5
    assert d2o.distinct([["a b a b a b a b"]]) == pytest.approx(2 / 7)
    assert ppo.repetition(["good good good", "good kind good"]) == 0.5
    assert grao.until([0.0, 0.4, 0.8, 0.9]) == 4 and grao.until([0.1, 0.1]) == 3
