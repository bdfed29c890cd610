"""Every training written as a plain method, found in the registry: what all trainings must hold.

What it is given follows from its inputs by their names, rows by their kinds, settings by theirs; a
new role, kind or setting that is required fails here until it can be made up.
"""

from __future__ import annotations

import math
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from misbehaving import Answer, good, server
from test_bounds import facts

from truing.context import Context, use
from truing.core.batch.row_kinds import is_taken
from truing.core.passes.scoring import ScoreHead, has_head
from truing.errors import InputError
from truing.method import Kinds, Method, methods
from truing.models import Model
from truing.tables import Row, Table

TRAININGS = [
    n
    for n, method in methods.items()
    if method.verb == "train" and method.entry.kind == "method" and method.entry.package == "truing"
]
WORDS = "lime oak rain stone".split()
PROMPTS: list[Row] = [{"prompt": f"say {w}"} for w in WORDS]
# A setting that holds all of an online run's; the rows are then what that run has saved.
HOW: dict[str, object] = {
    "steps": 2, "batch": 2, "answers": 3, "max_tokens": 6, "lr": 2e-3, "rank": 2, "beta": 0.5,
    "dtype": "float32", "rewards": {"letters": {"use": "share_of", "letters": "abcdefghijklmnop"}},
}  # fmt: skip
SHORT: dict[str, object] = {
    "steps": 1, "batch": 2, "minibatches": 1, "answers": 2, "max_tokens": 6, "rank": 2, "n": 3,
    "critic_rollouts": 0, "cycles": 1, "epochs": 1.0, "lr": 2e-3, "how": HOW,
}  # fmt: skip
# What a model is made of when it is trained, for those that take the settings.
SORTS: dict[str, dict[str, object]] = {
    "adapter": {"rank": 2}, "whole": {"rank": 0}, "top": {"rank": 0, "layers": 1},
}  # fmt: skip


def takes(method: Method) -> set[str]:
    """Settings of the training, in one of its own or by themselves."""
    of_how = set(methods["online_dpo"].settings) if "how" in method.settings else set()
    return set(method.settings) | of_how


def settings_of(method: Method, **more: object) -> dict[str, object]:
    """Short ones, and `more` wherever they belong."""
    found = {n: v for n, v in (SHORT | more).items() if n in method.settings}
    if "how" in method.settings:
        found["how"] = HOW | {n: v for n, v in more.items() if n not in method.settings}
    return found


def ranked(_: int, body: dict[str, typing.Any]) -> Answer:
    """Orders the lettered answers of the last question by the share of letters in them."""
    text = str(body["messages"][-1]["content"]).rsplit("Question:", 1)[1].rsplit("\nOrder:", 1)[0]
    _, *parts = re.split(r"\n([A-J]): ", text)
    of = {
        k: sum(map(str.isalpha, a)) / len(a) for k, a in zip(parts[::2], parts[1::2], strict=True)
    }
    return good(" > ".join(sorted(of, key=lambda k: (-of[k], k))))


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


def scoring(model: Model, folder: Path) -> Model:
    """It with a head that scores steps."""
    head = ScoreHead(128)
    with torch.no_grad():
        head.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    return head.added_to(model, folder, "steps")


@pytest.fixture(scope="module")
def roles(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Model]]:
    """A model for each role that an input may have: one judges from elsewhere, one scores steps."""
    with server(ranked) as (url, _):
        prm = scoring(model, tmp_path_factory.mktemp("prm") / "head")
        yield {"model": model, "judge": Model.open(f"{url}#far"), "process_model": prm}


@pytest.fixture(scope="module")
def tables(model: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Table]:
    """Rows of each kind; pairs are those that an online run has drawn."""
    with use(Context(seed=4, folder=tmp_path_factory.mktemp("stream"))):
        pairs = methods["online_stream"](model, Table("prompt", PROMPTS), how=HOW)
    assert isinstance(pairs, Table)
    steps: list[Row] = [
        {"prompt": f"say {w}", "steps": [f"{w}!", "well?"][:n], "labels": [1.0, 0.2][:n]}
        for w, n in zip(WORDS, (1, 2, 1, 2), strict=True)
    ]
    return {"prompt": Table("prompt", PROMPTS), "pair": pairs, "steps": Table("steps", steps)}


def kinds_of(method: Method, name: str = "data") -> tuple[str, ...]:
    """Kinds of rows that an input takes."""
    return tuple(typing.cast(Kinds, facts(method)["rows"])[name])


def given(
    method: Method, roles: dict[str, Model], tables: dict[str, Table]
) -> dict[str, Model | Table]:
    """All inputs that it cannot do without."""
    wanted = [n for n, one in method.inputs.items() if not one.optional]
    return {n: tables[kinds_of(method)[0]] if n == "data" else roles[n] for n in wanted}


def run(
    method: Method, folder: Path, nouns: dict[str, Model | Table], **more: object
) -> tuple[Model, list[dict[str, object]]]:
    """What is made, and all that was recorded meanwhile."""
    with use(Context(seed=2, folder=folder)) as context:
        made = method(**nouns, **settings_of(method, **more))
    assert isinstance(made, Model)
    return made, [{k: v for k, v in m.items() if k != "seconds"} for m in context.metrics]


def test_there_are_plain_trainings() -> None:
    names = {methods[n].name for n in TRAININGS}
    assert names >= set("cyclealign easy_to_hard_ppo replay step_value embedding_reward".split())


RUNS = [
    (n, sort) for n in TRAININGS for sort, how in SORTS.items() if set(how) <= takes(methods[n])
]
RUNS += [(n, "head") for n in TRAININGS if "rank" not in takes(methods[n])]


@pytest.mark.parametrize(("name", "sort"), RUNS)
def test_what_is_trained_moves_and_the_rest_does_not(
    name: str, sort: str, model: Model, roles: dict[str, Model], tables: dict[str, Table],
    tmp_path: Path,
) -> None:  # fmt: skip
    method = methods[name]
    nouns, before = given(method, roles, tables), model.folded()
    keys = {n: noun.key for n, noun in nouns.items()}
    made, metrics = run(method, tmp_path / "one", nouns, **SORTS.get(sort, {}))
    after = made.folded()
    for tensors in (after, after.extra):
        assert all(bool(tensors[n].isfinite().all()) for n in tensors)
    assert metrics
    numbers = [v for m in metrics for v in m.values() if isinstance(v, float)]
    assert numbers and all(map(math.isfinite, numbers))
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    linear = {n for n in before if n.endswith("proj.weight")}
    top = {n for n in before if n.startswith("model.layers.2.")}
    want = {"adapter": linear, "whole": set(before), "top": top, "head": set[str]()}
    assert moved == want[sort]
    # A head that was put on can be asked for scores; the models that were given stand as they did.
    assert sort != "head" or has_head(made)
    assert {n: noun.key for n, noun in nouns.items()} == keys
    # The same again is the same model, to the bit.
    again, told = run(method, tmp_path / "two", nouns, **SORTS.get(sort, {}))
    assert again.key == made.key and told == metrics


@pytest.mark.parametrize("name", [n for n in TRAININGS if "budget" in takes(methods[n])])
def test_micro_batches_do_not_change_a_step(
    name: str, roles: dict[str, Model], tables: dict[str, Table], tmp_path: Path
) -> None:
    method = methods[name]
    nouns = given(method, roles, tables)
    one, two = (
        [m for m in run(method, tmp_path / str(b), nouns, budget=b)[1] if "grad_norm" in m]
        for b in (100_000, 1)
    )
    assert one and one[0]["grad_norm"] != 0
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", TRAININGS)
def test_rows_of_the_wrong_kind_and_none_at_all(
    name: str, roles: dict[str, Model], tables: dict[str, Table], tmp_path: Path
) -> None:
    """Of each table, whether needed or not."""
    method = methods[name]
    nouns = given(method, roles, tables)
    others = [Table("text", [{"text": "once"}]), Table("record", [{"a": 1}])]
    for table in (n for n, one in method.inputs.items() if one.noun == "Table"):
        kinds = kinds_of(method, table)
        wrong = next(o for o in others if not any(is_taken(o.kind, kind) for kind in kinds))
        empty = [tables[kind].take([]) for kind in kinds if kind in tables]
        for rows in (wrong, wrong.take([]), *empty):
            with use(Context(folder=tmp_path)), pytest.raises(InputError) as error:
                method(**(nouns | {table: rows}), **settings_of(method))
            assert error.value.fix, error.value
    assert not list(tmp_path.rglob("*.safetensors"))


TOKENS = ("reference", "critic", "process_model")  # roles that score or value the model's own


@pytest.mark.parametrize(
    ("name", "role"), [(n, r) for n in TRAININGS for r in TOKENS if r in methods[n].inputs]
)
def test_models_of_other_tokens(
    name: str, role: str, stranger: Model, roles: dict[str, Model], tables: dict[str, Table],
    tmp_path: Path,
) -> None:  # fmt: skip
    method = methods[name]
    wrong = stranger if role == "reference" else scoring(stranger, tmp_path / "head")
    nouns = given(method, roles, tables) | {role: wrong}
    with use(Context(folder=tmp_path)), pytest.raises(InputError, match="tokenizer"):
        method(**nouns, **settings_of(method))
