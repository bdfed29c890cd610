"""Reward models in use: the plain computation, components, saving, principles, clear errors."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from truing.changes import Weights
from truing.context import Context, use
from truing.core.chat import completion_ids, prompt_ids, step_ids
from truing.core.judging.rewards import score_model
from truing.core.judging.scores import check_reward
from truing.core.passes import scoring
from truing.core.passes.scoring import HEAD, ScoreHead, answer_logps, has_head, step_scores
from truing.core.tiny import tiny_folder, tiny_tokenizer
from truing.core.tree import Node
from truing.errors import InputError
from truing.method import methods, score
from truing.models import Loaded, Model, hold
from truing.tables import Row, Table
from truing.train.reward.salmon import ROLE, reviewed

ROWS: list[Row] = [
    {"prompt": "say a", "completion": "well, a"},
    {"prompt": "say b", "completion": "b"},
    {"prompt": "say a", "completion": "no", "finished": False},
]


@pytest.fixture
def reward(tiny_path: Path, tmp_path: Path) -> Model:
    """The tiny model with a made-up head."""
    model = Model.open(tiny_path)
    head = ScoreHead(128)
    with torch.no_grad():
        head.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
        head.bias.fill_(0.25)
    return head.added_to(model, tmp_path / "head")


def plain(reward: Model, ids: list[int]) -> torch.Tensor:
    """Scores at all tokens of one row by itself."""
    loaded = reward.load_module()
    with torch.no_grad():
        out = loaded.module(torch.tensor([ids]), output_hidden_states=True)
        states = out.hidden_states[-1][0]
    return states @ loaded.extra[f"{HEAD}.weight"][0] + loaded.extra[f"{HEAD}.bias"]


def test_the_head_outlives_a_training_of_all_weights(reward: Model, tmp_path: Path) -> None:
    rows = Table("example", [{"prompt": "say a", "completion": "well, a"}])
    with use(Context(folder=tmp_path / "step")):
        made = methods["sft"](reward, rows, rank=0, steps=1, lr=1e-3, dtype="float32")
        again = methods["sft"](made, rows, rank=0, steps=1, lr=1e-3, dtype="float32")
    assert isinstance(made, Model) and isinstance(again, Model)
    assert made.weights_key != again.weights_key != reward.weights_key
    before = reward.folded().extra
    for one in (made, again):
        extra = one.folded().extra
        assert list(extra) == list(before) == [f"{HEAD}.bias", f"{HEAD}.weight"]
        assert all(torch.equal(extra[n], t) for n, t in before.items())
        assert len(one.changes) == 1
    # It scores what the trained weights say now.
    ids = prompt_ids(tiny_tokenizer(), "say b") + completion_ids(tiny_tokenizer(), "b")
    want = float(plain(made, ids)[-1])
    assert score_model(made, [ROWS[1]]) == pytest.approx([want], abs=1e-4)
    assert abs(want - float(plain(reward, ids)[-1])) > 1e-3


def test_scores_are_those_of_the_plain_computation(reward: Model, tiny_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    want: list[float] = []
    for row in ROWS:
        end = row.get("finished") is not False
        text = str(row["completion"])
        ids = prompt_ids(tokenizer, str(row["prompt"])) + completion_ids(tokenizer, text, end=end)
        want.append(float(plain(reward, ids)[-1]))
    assert score_model(reward, ROWS) == pytest.approx(want, abs=1e-4)
    assert has_head(reward) and not has_head(Model.open(tiny_path))
    assert score("reward", {"use": "reward_model", "model": hold(reward)}, ROWS) == pytest.approx(
        want, abs=1e-4
    )


@pytest.mark.parametrize("head", [True, False])
def test_a_stopped_step_scores_only_what_is_left(
    head: bool, reward: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Row] = [{"prompt": f"say {i % 5}", "completion": "a" * i} for i in range(10)]
    asked, compute = list[int](), scoring.by_tree

    def scores() -> list[float]:
        return score_model(reward, rows) if head else answer_logps(reward.load_module(), rows)

    def dying(loaded: Loaded, trees: list[Node], values: Any) -> object:
        if len(asked) == 2:
            asked.clear()
            raise KeyboardInterrupt
        asked.append(len(trees))
        return compute(loaded, trees, values)

    monkeypatch.setattr(scoring, "CHUNK", 2)
    whole = scores()
    monkeypatch.setattr(scoring, "by_tree", dying)
    for wanted in ([], [1]):
        with use(Context(folder=tmp_path / "step")), suppress(KeyboardInterrupt):
            assert scores() == whole
        assert asked == wanted


def test_steps_are_scored_where_they_close(reward: Model) -> None:
    tokenizer = tiny_tokenizer()
    rows: list[Row] = [{"prompt": "p", "steps": ["one", "two"]}, {"prompt": "q", "steps": ["x"]}]
    pieces = step_ids(tokenizer, ["one", "two"], "\n")
    head = prompt_ids(tokenizer, "p")
    ends = [len(head) + len(pieces[0]) - 1, len(head) + len(pieces[0]) + len(pieces[1]) - 1]
    all_scores = plain(reward, [*head, *pieces[0], *pieces[1]])
    found = step_scores(reward, rows, "\n")
    assert [len(f) for f in found] == [2, 1]
    assert found[0] == pytest.approx([float(all_scores[e]) for e in ends], abs=1e-4)
    asked: list[Row] = [
        {"prompt": "p", "completion": "one\ntwo\n"},
        {"prompt": "p", "completion": ""},
    ]
    ref = {"use": "step_reward", "model": hold(reward), "separator": "\n"}
    p = [1 / (1 + 2.718281828459045 ** -float(all_scores[e])) for e in ends]
    assert score("reward", ref, asked) == pytest.approx([min(p), 0.0], abs=1e-4)
    mean = score("reward", {**ref, "aggregate": "mean"}, asked)[0]
    assert mean == pytest.approx(sum(p) / 2, abs=1e-4)


def test_a_reward_model_learns_is_saved_and_goes_on(tiny_path: Path, tmp_path: Path) -> None:
    words = "lime oak rain stone river cloud ash fern".split()
    pairs = [{"prompt": f"say {w}", "chosen": f"{w}!", "rejected": f"{w}?"} for w in words]
    model, data = Model.open(tiny_path), Table("pair", pairs)
    with use(Context(folder=tmp_path / "a")):
        made = methods["bradley_terry"](model, data, steps=12, lr=3e-3)
        assert isinstance(made, Model)
        new = [
            {"prompt": f"say {w}", "completion": w + end} for w in ("tree", "sun") for end in "!?"
        ]
        found = score_model(made, new)
        assert found[0] > found[1] and found[2] > found[3]
        again = Model.load(made.save(tmp_path / "saved"))
        assert score_model(again, new) == pytest.approx(found, abs=1e-5)
        further = methods["bradley_terry"](made, data, steps=1, lr=1e-9, warmup=0.0)
        assert isinstance(further, Model)
        assert score_model(further, new) == pytest.approx(found, abs=1e-3)
        whole = methods["bradley_terry"](model, data, steps=2, rank=0, lr=1e-4)
        assert isinstance(whole, Model) and has_head(whole)
        assert all(isinstance(c, Weights) for c in whole.weight_changes)


def test_one_reward_model_for_all_principles(tiny_path: Path, tmp_path: Path) -> None:
    words = "lime oak rain stone river cloud ash fern".split()
    good, bad = "It ends in !", "It ends in ?"
    rows: list[Row] = []
    for i, w in enumerate(words):
        one, two = (f"{w}!", f"{w}?") if i % 2 else (f"{w}?", f"{w}!")
        rows.append(
            {"prompt": w, "chosen": one, "rejected": two, "principles": [good if i % 2 else bad]}
        )
    with use(Context(folder=tmp_path)):
        made = methods["train/salmon"](Model.open(tiny_path), Table("pair", rows), steps=2)
    assert isinstance(made, Model) and has_head(made)
    asked: list[Row] = [{"prompt": "sun", "completion": "sun!"}]
    found = score(
        "reward", {"use": "salmon_reward", "model": hold(made), "principles": [bad]}, asked
    )
    text = reviewed("sun", "sun!", [bad])
    assert text.index("sun!") < text.index("Question") < text.index(bad) < text.index("quality")
    review: Row = {"prompt": ROLE, "completion": text, "finished": False}
    assert found == score_model(made, [review], "reviews")
    with pytest.raises(InputError, match=r"row 1.*principles"):
        methods["train/salmon"](
            Model.open(tiny_path), Table("pair", [{**rows[0], "principles": "short"}]), steps=1
        )


def test_implicit_rewards(tiny_path: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": "say a", "chosen": "a!", "rejected": "a?"}]
    model = Model.open(tiny_path)
    with use(Context(folder=tmp_path)):
        tuned = methods["dpo"](model, Table("pair", pairs), steps=3, lr=1e-3)
    assert isinstance(tuned, Model)
    plain_scores = score_model(tuned, ROWS)
    ref = {"use": "implicit_reward", "model": hold(tuned), "beta": 0.5}
    assert score("reward", ref, ROWS) == pytest.approx([0.5 * v for v in plain_scores], abs=1e-5)
    again = {**ref, "reference": hold(tuned)}
    assert score("reward", again, ROWS) == pytest.approx([0.0] * 3, abs=1e-6)
    with pytest.raises(InputError, match="implies no reward"):
        score("reward", {"use": "implicit_reward", "model": hold(model)}, ROWS)
    # Before anything is drawn: a served model has no probabilities, other tokens compare nothing.
    served = hold(Model.open("http://127.0.0.1:9/v1#m"))
    for given in ({"model": served}, {"reference": served}):
        with pytest.raises(InputError, match=r"reward implicit_reward: a served model") as error:
            check_reward(ref | given)
        assert "{use: judged" in error.value.fix
    other = tiny_folder(tmp_path / "other")
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "helper"))
    check_reward(again)
    with pytest.raises(InputError, match=r"reward implicit_reward.*differ in tokenizer or chat"):
        check_reward(ref | {"reference": hold(Model.open(other))})


def test_a_score_that_is_no_number_is_told(reward: Model, tmp_path: Path) -> None:
    head = ScoreHead(128)
    with torch.no_grad():
        head.bias.fill_(float("nan"))
    broken = head.added_to(reward, tmp_path / "broken")
    with pytest.raises(InputError, match="not a finite number"):
        score_model(broken, ROWS)


@pytest.mark.parametrize("name", ["dpo", "rloo"])
def test_a_head_that_is_not_trained_is_told(
    name: str, reward: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row: Row = {"prompt": "say a", "chosen": "a", "rejected": "b"}
    online: dict[str, object] = {"answers": 2, "max_tokens": 2}
    online["rewards"] = {"a": {"use": "share_of", "letters": "a"}}
    table = Table("pair", [row]) if name == "dpo" else Table("prompt", [{"prompt": "say a"}])
    with use(Context(folder=tmp_path / "step")):
        made = methods[name](reward, table, steps=1, **({} if name == "dpo" else online))
    assert isinstance(made, Model) and has_head(made)
    assert f"{name}: warning: the model has a score head" in capsys.readouterr().err


def test_a_head_that_is_trained_is_not_told(
    reward: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row: Row = {"prompt": "say a", "chosen": "a", "rejected": "b"}
    with use(Context(folder=tmp_path / "step")):
        methods["bradley_terry"](reward, Table("pair", [row]), steps=1)
    assert "warning: the model has a score head" not in capsys.readouterr().err


def test_what_scores_by_a_head_implies_no_reward(reward: Model, tiny_path: Path) -> None:
    for reference in ("", hold(Model.open(tiny_path))):
        ref = {"use": "implicit_reward", "model": hold(reward), "reference": reference}
        with pytest.raises(InputError, match="scores by a head") as error:
            score("reward", ref, ROWS)
        assert "{use: reward_model" in error.value.fix


@pytest.mark.parametrize(
    ("up", "learnt"),
    [([0.3, -0.3 - 3e-8], 0.0), ([0.3, -0.29], 0.01), ([1.0, 2.0], 3.0), ([0.0, 0.0], 0.0)],
)
def test_rounding_teaches_the_constant_nothing(up: list[float], learnt: float) -> None:
    head = ScoreHead(4)
    head(torch.randn(2, 4)).backward(torch.tensor(up))
    assert head.bias.grad is not None and float(head.bias.grad) == pytest.approx(learnt, abs=1e-7)
    if not learnt:
        assert not head.bias.grad.any()
