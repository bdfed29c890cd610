"""Answers that are thrown away are not drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import pytest
import torch

from truing.context import Context, Json, use
from truing.core.batch.training_rows import Unit
from truing.core.trainer import own_samples
from truing.core.trainer.held_out_rows import HeldOutRows
from truing.core.trainer.own_samples import Answers, Asked, FinishedSamples
from truing.core.trainer.text_task import TextTask
from truing.errors import InputError
from truing.method import methods
from truing.models import Loaded, Model
from truing.tables import Table


def test_before_training_fresh_ones_are_drawn_for_the_receipt_alone(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each step draws, and so what is learnt, is the same as if all rows had had some."""
    before: list[int] = []
    kept = own_samples.kept

    def counted(loaded: object, asked: Sequence[Asked], *more: object) -> list[Answers]:
        before.append(len(asked))
        return kept(loaded, asked, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(own_samples, "kept", counted)
    model = Model.open(tiny_path)
    rows = Table("example", [{"prompt": f"say {w}", "completion": w} for w in "abcdef"])
    keys: list[str] = []
    for shown in (6, 2):
        monkeypatch.setattr(own_samples, "SHOWN", shown)
        with use(Context(folder=tmp_path / str(shown), seed=3)) as context:
            made = methods["gkd_on_policy"](
                model, rows, teacher=model, steps=3, batch=2, rank=2, max_tokens=5, samples=2
            )
        assert isinstance(made, Model)
        keys.append(made.weights_key)
        (said,) = [m for m in context.metrics if "own_answers" in m]
        assert said["own_answers"] == 2 * shown
    assert before == [6, 2] and keys[0] == keys[1] != model.weights_key


WORDS = "lime oak rain stone river cloud ash fern elm dust snow leaf".split()
KINDS = {
    "d2o": Table("negative", [{"prompt": f"say {w}", "rejected": f"no {w}"} for w in WORDS]),
    "adpa": Table("example", [{"prompt": f"say {w}", "completion": w} for w in WORDS]),
    "on_policy_kd": Table("prompt", [{"prompt": f"say {w}"} for w in WORDS]),
}


def visits(seed: int, batch: int, steps: int) -> list[set[int]]:
    """Rows of each update: torch's permutation under the run's seed, cut into batches."""
    with use(Context(seed=seed)) as context:
        source = torch.Generator().manual_seed(context.stream("order/0"))
    order = torch.randperm(len(WORDS), generator=source).tolist()
    return [set(order[i * batch : (i + 1) * batch]) for i in range(steps)]


class Drawn:
    """What `kept` gives, by the row whose prompt it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.answers: dict[str, Answers] = {}
        kept = own_samples.kept

        def listening(loaded: Loaded, asked: Sequence[Asked], *more: object) -> list[Answers]:
            found = kept(loaded, asked, *more)  # type: ignore[arg-type]
            for row, answers in zip(asked, found, strict=True):
                self.answers[str(loaded.tokenizer.decode(list(row[0][0])))] = answers
            return found

        monkeypatch.setattr(own_samples, "kept", listening)
        monkeypatch.setattr(own_samples, "home", lambda: folder)  # nothing is known of other runs

    def rows(self) -> set[int]:
        return {i for i, w in enumerate(WORDS) if any(f"say {w}" in text for text in self.answers)}


def trained(name: str, path: Path, folder: Path, **more: object) -> tuple[Model, list[Json]]:
    model = Model.open(path)
    how: dict[str, object] = {"batch": 2, "rank": 2, "max_tokens": 6, "samples": 2, "lr": 0.02}
    if name == "adpa":
        how |= {"teacher": model, "teacher_reference": model}
    with use(Context(folder=folder, seed=3)) as context:
        made = methods[name](model, KINDS[name], **how | more)
    assert isinstance(made, Model)
    return made, [m["loss"] for m in context.metrics if "loss" in m]


@pytest.mark.parametrize(("name", "steps"), [("d2o", 1), ("adpa", 3)])
def test_rows_that_no_update_sees_are_not_answered(
    name: str, steps: int, tiny_path: Path, tmp_path: Path
) -> None:
    """Those that are seen have the same answers, and what is learnt is the same bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        some = Drawn(patch, tmp_path / "few")
        model, losses = trained(name, tiny_path, tmp_path / "a", steps=steps)
    with pytest.MonkeyPatch.context() as patch:
        every = Drawn(patch, tmp_path / "many")
        patch.setattr(own_samples.OwnSamples, "foresee", lambda *_: None)
        same, expected = trained(name, tiny_path, tmp_path / "b", steps=steps)
    seen = set[int]().union(*visits(3, 2, steps))
    assert every.rows() == set(range(12)) and some.rows() == seen | {0, 1}  # two are shown
    assert all(every.answers[text] == answers for text, answers in some.answers.items())
    assert losses == expected and model.weights_key == same.weights_key


def test_answers_that_are_drawn_anew_in_time_are_not_drawn_before(
    tiny_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    interrupted: Callable[[type, int], AbstractContextManager[None]],
    always_save: Callable[[], None],
) -> None:
    """With `refresh` of 2 the first two updates alone; a run that was cut off goes on the same."""
    always_save()
    how: dict[str, object] = {"steps": 4, "refresh": 2}
    few = Drawn(monkeypatch, tmp_path / "few")
    model, losses = trained("adpa", tiny_path, tmp_path / "a", **how)
    assert few.rows() == visits(3, 2, 1)[0] | visits(3, 2, 2)[1] | {0, 1} != set(range(12))
    with interrupted(TextTask, 4):
        trained("adpa", tiny_path, tmp_path / "cut", **how)
    again, rest = trained("adpa", tiny_path, tmp_path / "cut", **how)
    assert rest == losses and again.weights_key == model.weights_key
    monkeypatch.setattr(own_samples.OwnSamples, "foresee", lambda *_: None)
    same, expected = trained("adpa", tiny_path, tmp_path / "b", **how)
    assert few.rows() == set(range(12))
    assert losses == expected and model.weights_key == same.weights_key


def test_held_out_rows_are_told_to_be_known_whatever_was_drawn_to_them(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By prompt and given answer: own answers of a row that is trained on may not be drawn yet."""
    some = ("lime", "fog")
    held = Table("negative", [{"prompt": f"say {w}", "rejected": f"no {w}"} for w in some])
    trained("d2o", tiny_path, tmp_path, steps=1, held_out=held)
    assert "d2o held_out: warning: 1 of 2 rows are trained on, too" in capsys.readouterr().err
    prompts = Table("prompt", [{"prompt": row["prompt"]} for row in held])
    more = {"teacher": Model.open(tiny_path), "held_out": prompts}
    trained("on_policy_kd", tiny_path, tmp_path / "kd", steps=1, **more)
    said = capsys.readouterr().err
    assert "on_policy_kd held_out: warning: 1 of 2 rows are trained on, too" in said


def test_all_rows_are_answered_where_the_answers_decide_which_are_left(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = Drawn(monkeypatch, tmp_path / "home")
    rows = KINDS["adpa"]
    with use(Context(folder=tmp_path, seed=3)), suppress(InputError):  # none may have ended
        methods["reward_from_demos"](
            Model.open(tiny_path), rows, steps=1, batch=2, rank=2, max_tokens=4
        )
    assert drawn.rows() == set(range(12))


def test_rows_whose_demonstration_has_no_end_are_left_out(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A score would learn from them what has an end. Nothing is drawn to them."""
    drawn = Drawn(monkeypatch, tmp_path / "home")
    model, rows = Model.open(tiny_path), [dict(row) for row in KINDS["adpa"]]
    rows[0]["completion"] = "lime " * 20  # more than there is room for
    rows[1]["finished"] = False
    how: dict[str, object] = {
        "steps": 1, "batch": 2, "rank": 2, "max_tokens": 4, "max_length": 64,
    }  # fmt: skip
    with use(Context(folder=tmp_path, seed=3)) as context, suppress(InputError):
        methods["reward_from_demos"](model, Table("example", rows), **how)
    assert drawn.rows() == set(range(2, 12))
    found = [m["demonstrations_open"] for m in context.metrics if "demonstrations_open" in m]
    assert found == [2]
    drawn.answers.clear()
    some = Table("example", [row | {"finished": False} for row in rows])
    told = "12 of 12 demonstrations are cut or not finished, and none of the model's own answers"
    with use(Context(folder=tmp_path / "none")), pytest.raises(InputError, match=told):
        methods["reward_from_demos"](model, some, **how)
    assert not drawn.answers


def test_held_out_demonstrations_are_known_however_many_own_answers_ended() -> None:
    def unit(name: str, *answers: int) -> Unit:
        return Unit(name, (1,), tuple((word, 2) for word in answers), {})

    held = [unit("known", 5, 6, 7), unit("new", 8, 6, 7)]
    rows = HeldOutRows(held, FinishedSamples(samples=3), [[0, 1]], 2)
    assert rows.among([unit("trained", 5, 9, 8, 7)]) == 1
