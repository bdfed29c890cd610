"""What a score head was trained on goes with it, and the other use of the model is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from truing.context import Context, use
from truing.core.judging.answer_steps import step_values
from truing.core.judging.rewards import check_reward_model, probabilities, score_model
from truing.core.judging.scores import check_reward
from truing.core.modelfiles.classifier import why_not
from truing.core.passes.scoring import ScoreHead, head_scores, sort_of, step_scores
from truing.errors import InputError
from truing.method import methods, score
from truing.models import Model, hold
from truing.principles import Principle, Principles
from truing.tables import Row, Table

ROWS: list[Row] = [{"prompt": "say a", "completion": "a\n\nb"}]
STEPS: list[Row] = [{"prompt": "say a", "steps": ["a", "b"]}]
PAIRS = Table("pair", [{"prompt": "say a", "chosen": "a", "rejected": "b"}])
LABELLED = Table("steps", [{**STEPS[0], "labels": [1.0, 0.0]}])
PROMPTS = Table("prompt", [{"prompt": "say a"}])
ONCE: dict[str, object] = {"steps": 1, "rank": 2}


@pytest.fixture(scope="module")
def trained(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """A model by each way to train a head."""
    model, folder = Model.open(tiny_path), tmp_path_factory.mktemp("trained")
    labels = Table("unpaired", [{"prompt": "say a", "completion": "a", "label": True}])
    data = {"bradley_terry": PAIRS, "salmon": PAIRS, "guard": labels, "outcome_reward": labels}
    data |= dict.fromkeys(("process_reward", "outcome_process_reward", "step_value"), LABELLED)
    made: dict[str, Model] = {}
    for name, table in data.items():
        with use(Context(folder=folder / name)):
            one = methods[f"train/{name}"](
                model, table, **({"epochs": 1} if name == "step_value" else ONCE)
            )
        assert isinstance(one, Model)
        made[name] = one
    return made


def test_the_sort_is_what_the_rows_were_and_is_saved(
    trained: dict[str, Model], tmp_path: Path
) -> None:
    want = dict.fromkeys(("bradley_terry", "guard", "outcome_reward"), "answers")
    want |= dict.fromkeys(("process_reward", "outcome_process_reward", "step_value"), "steps")
    want["salmon"] = "reviews"
    assert {n: sort_of(m) for n, m in trained.items()} == want
    for name in ("bradley_terry", "process_reward", "salmon"):
        again = Model.load(trained[name].save(tmp_path / name))
        assert sort_of(again) == want[name] and again.key == trained[name].key


def test_a_later_head_decides(trained: dict[str, Model], tmp_path: Path) -> None:
    made = trained["bradley_terry"]
    for name, table, sort in (("process_reward", LABELLED, "steps"), ("guard", None, "answers")):
        rows = table or Table("unpaired", [{"prompt": "p", "completion": "a", "label": False}])
        with use(Context(folder=tmp_path / name)):
            found = methods[name](made, rows, **ONCE)
        assert isinstance(found, Model) and sort_of(found) == sort
        made = found


def test_each_use_takes_its_own_sort(trained: dict[str, Model]) -> None:
    for name in ("bradley_terry", "guard", "outcome_reward"):
        model = trained[name]
        assert len(score_model(model, ROWS)) == 1
        for wrong in (lambda m: step_scores(m, STEPS, "\n\n"), lambda m: step_values(m, STEPS)):
            with pytest.raises(InputError, match="scores whole answers, not their steps"):
                wrong(model)
    for name in ("process_reward", "outcome_process_reward", "step_value"):
        model = trained[name]
        assert len(step_values(model, STEPS)[0]) == 2
        for wrong in (
            lambda m: score_model(m, ROWS),
            lambda m: head_scores(m, ROWS),
            lambda m: (
                probabilities(m, ROWS, "here") if name != "step_value" else head_scores(m, [])
            ),
            lambda m: check_reward_model(m, "here"),
        ):
            with pytest.raises(InputError, match=r"scores the steps of answers.*step_reward"):
                wrong(model)


@pytest.mark.parametrize(
    ("ref", "model", "told"),
    [
        ("reward_model", "process_reward", "reward reward_model.*scores the steps of answers"),
        ("guard", "process_reward", "reward guard.*scores the steps of answers"),
        ("step_reward", "bradley_terry", "reward step_reward.*scores whole answers"),
        ("process_shaping", "guard", "reward process_shaping.*scores whole answers"),
        ("process_shaping", "step_value", "reward process_shaping.*head of values"),
        ("reward_model", "salmon", "reward reward_model.*scores answers beside the principles"),
        ("guard", "salmon", "reward guard.*scores answers beside the principles"),
        ("step_reward", "salmon", "reward step_reward.*not their steps"),
        ("salmon_reward", "bradley_terry", "reward salmon_reward.*does not score answers beside"),
        ("salmon_reward", "guard", "reward salmon_reward.*does not score answers beside"),
        ("salmon_reward", "process_reward", "reward salmon_reward.*does not score answers beside"),
    ],
)
def test_a_wrong_use_is_told_before_anything_is_drawn(
    ref: str, model: str, told: str, trained: dict[str, Model], tiny_path: Path, tmp_path: Path
) -> None:
    told_too = {"principles": ["Be brief."]} if ref == "salmon_reward" else {}
    rewards = {"r": {"use": ref, "model": hold(trained[model]), **told_too}}
    with pytest.raises(InputError, match=told):
        check_reward(rewards["r"])
    with use(Context(folder=tmp_path)), pytest.raises(InputError, match=told):
        methods["grpo"](Model.open(tiny_path), PROMPTS, rewards=rewards, steps=1)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_methods_refuse_the_wrong_sort(trained: dict[str, Model], tiny_path: Path) -> None:
    model = Model.open(tiny_path)
    told = "scores whole answers, not their steps"
    for name, given in (
        ("easy_to_hard_ppo", {"process_model": trained["guard"]}),
        (
            "step_labels",
            {"process_model": trained["guard"], "reward": {"use": "min_words", "n": 1}},
        ),
        ("prm_guided", {"process_models": {"p": trained["guard"]}}),
    ):
        data = {} if name == "prm_guided" else {"data": PROMPTS}
        with pytest.raises(InputError, match=told):
            methods[name](model, **data, **given)
    graded = Table("prompt", [{"prompt": "1 + 1", "answer": 2}])
    with pytest.raises(InputError, match=told):
        methods["evaluate/easy_to_hard"](model, trained["guard"], graded)
    with pytest.raises(InputError, match="scores the steps of answers"):
        methods["evaluate/easy_to_hard"](model, trained["process_reward"], graded, by="outcome")
    with pytest.raises(InputError, match="head of values"):
        methods["easy_to_hard_ppo"](model, PROMPTS, trained["step_value"])
    with pytest.raises(InputError, match="scores the steps of answers"):
        methods["grpo"](model, PROMPTS, reward_model=trained["process_reward"], steps=1)


RULES = Principles([Principle("brief", "Be brief.")])


def test_reviews_are_scored_by_what_was_trained_on_them_alone(
    trained: dict[str, Model], tiny_path: Path, tmp_path: Path
) -> None:
    model = Model.open(tiny_path)
    with use(Context(folder=tmp_path / "tuned")):
        tuned = methods["dpo"](model, PAIRS, **ONCE)
    assert isinstance(tuned, Model)
    others = {n: m for n, m in trained.items() if n != "salmon"} | {"dpo": tuned, "plain": model}
    for name, wrong in others.items():
        with (
            use(Context(folder=tmp_path / name)),
            pytest.raises(InputError, match=r"input 'reward_model'.*does not score answers beside"),
        ):
            methods["salmon_ppo"](model, PROMPTS, reward_model=wrong, principles=RULES, steps=1)
        with pytest.raises(InputError, match="does not score answers beside"):
            score("reward", told := {"use": "salmon_reward", "model": hold(wrong),
                                     "principles": ["a"]}, ROWS)  # fmt: skip
        with pytest.raises(InputError, match=r"setting 'model'.*does not score answers beside"):
            check_reward(told)
        assert not list((tmp_path / name).rglob("*.jsonl"))
    asked = {"use": "salmon_reward", "model": hold(trained["salmon"]), "principles": ["a"]}
    check_reward(asked)
    assert len(score("reward", asked, ROWS)) == 1
    for more, told in (({"principles": hold(model)}, "not principles"), ({"draw": -1}, "'draw'")):
        with pytest.raises(InputError, match=told):
            check_reward(asked | more)
    for name, given in (("grpo", {"data": PROMPTS}), ("best_of_n", {}), ("ppo", {"data": PROMPTS})):
        with pytest.raises(InputError, match=r"scores answers beside.*salmon_reward"):
            methods[name](model, **given, reward_model=trained["salmon"])
    # Of what says nothing of its sort it is believed.
    old = ScoreHead(128).added_to(model, tmp_path / "old")
    assert score("reward", asked | {"model": hold(old)}, ROWS) == [0.0]


def test_a_guard_is_asked_for_logits(tiny_path: Path, tmp_path: Path) -> None:
    model = Model.open(tiny_path)
    values = ScoreHead(128, 8).added_to(model, tmp_path / "values")
    with pytest.raises(InputError, match=r"reward guard.*head of values"):
        score("reward", {"use": "guard", "model": hold(values)}, ROWS)
    head = ScoreHead(128)
    with torch.no_grad():
        head.bias.fill_(-1000.0)
    low = head.added_to(model, tmp_path / "low")
    assert score("reward", {"use": "guard", "model": hold(low)}, ROWS) == [0.0]


def test_a_head_that_says_nothing_of_its_sort_still_serves_both(
    tiny_path: Path, tmp_path: Path
) -> None:
    old = ScoreHead(128).added_to(Model.open(tiny_path), tmp_path / "head")
    assert sort_of(old) == "" and set(old.folded().extra) == {
        "reward_head.weight", "reward_head.bias",
    }  # fmt: skip
    assert score_model(old, ROWS) == [0.0] and step_values(old, STEPS) == [[0.5, 0.5]]


def test_a_head_of_steps_is_no_sequence_classification(trained: dict[str, Model]) -> None:
    assert "scores the steps of answers" in why_not(trained["process_reward"])
    assert why_not(trained["bradley_terry"]) == ""
