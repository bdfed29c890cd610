"""Every attack and synthesis, found in the registry: stopped and resumed, the same result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from truing.context import Context, use
from truing.core.passes.scoring import ScoreHead
from truing.core.tiny import tiny_folder
from truing.method import Method, methods
from truing.models import Model
from truing.principles import Principle, Principles
from truing.sources import kind_made
from truing.specify import texts
from truing.tables import Table

METHODS = [n for n in methods if n.startswith(("attack/", "synthesize/"))]
# Small enough for the tiny model, which seldom ends a turn; only what a method has is set.
SMALL: dict[str, object] = {
    "n": 8,
    "k": 8,
    "tags": ("quality",),
    "max_length": 40,
    "max_tokens": 40,
    "epochs": 2,
    "rank": 2,
    "batch": 4,
    "margin": 0.0,
    "response_tokens": 40,
    "reward": {"use": "share_of", "letters": "aeiou"},
}
# Columns that a method must be told, and which of a table's parts it makes.
COLUMNS: dict[str, object] = {
    "time": "days", "event": "died", "attributes": {"age": "age"}, "part": "train",
    "rewards": {"letters": {"use": "share_of", "letters": "abcdefghijklmnopqrstuvwxyz"}},
    "how": {
        "rewards": {"small": {"use": "share_of", "letters": "abcdefghijklmnopqrstuvwxyz"}},
        "answers": 4, "steps": 2, "batch": 2, "max_tokens": 24, "rank": 2, "temperature": 1.0,
    },
}  # fmt: skip
RULES = Principles([Principle("brief", "Be brief.", check={"use": "max_words", "n": 3})])
PROMPTS = Table(
    "example",
    [
        {
            "prompt": f"What is {i}?",
            "completion": f"It is {i}.",
            "answers": [str(i)],
            "days": 100 * i + 50,
            "died": i % 2,
            "age": 50 + i,
        }
        for i in range(3)
    ],
)
PAIRS = Table(
    "pair",
    [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No."} for i in range(3)],
)


class Stop(BaseException):
    """Stands for the death of the process: nothing may catch it."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, always_save: Callable[[], None]) -> None:
    """A checkpoint after each update; no sentence vectors, which the network would bring."""
    always_save()
    monkeypatch.setattr(texts, "relevance", lambda rows: [0.5] * len(rows))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A tiny model of two blocks, with a score head for those methods that judge by one."""
    folder = tmp_path_factory.mktemp("attacked")
    head = ScoreHead(128)
    with torch.no_grad():
        head.weight.copy_(torch.linspace(-0.1, 0.1, 128)[None])
    return head.added_to(Model.open(tiny_folder(folder / "model", blocks=2)), folder / "head")


def small(method: Method) -> dict[str, object]:
    found = {k: v for k, v in SMALL.items() if k in method.settings}
    found |= {k: COLUMNS[k] for k, s in method.settings.items() if s.required}
    if "time" in found:
        found["test"] = 1
    if method.verb == "attack":
        found.pop("max_length", None)  # of rows, which must fit, not of answers
    return found


def inputs(method: Method, model: Model) -> dict[str, object]:
    nouns = {"Model": model, "Table": PROMPTS, "Principles": RULES}
    kinds = getattr(method.declared, "__truing__", {}).get("rows", {})
    found: dict[str, object] = {}
    for one in method.inputs.values():
        if not one.optional:
            pairs = "pair" in kinds.get(one.name, ())
            noun = PAIRS if one.noun == "Table" and pairs else nouns[one.noun]
            found[one.name] = {"a": noun} if one.many else noun
    return found


def made(name: str, model: Model, folder: Path, stop_after: int = 0) -> tuple[str, int]:
    """(key of the result, how often progress was told); dies at call `stop_after`."""
    calls = 0

    def told(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == stop_after:
            raise Stop

    method = methods[name]
    settings = small(method)
    nouns = inputs(method, model)
    with use(Context(seed=7, folder=folder, on_progress=told, on_metric=told)):
        result = method(**nouns, **settings)
    assert isinstance(result, (Model, Table))
    if isinstance(result, Table):
        promised = kind_made(method, {**nouns, **method.validate(settings)})
        assert result.kind == getattr(nouns.get(promised), "kind", promised)
        assert all(row["lineage"] for row in result)
    return result.key, calls


def test_there_are_attacks_and_syntheses() -> None:
    assert {"attack/lora_undo", "synthesize/magpie", "synthesize/principle_pairs"} <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_stopped_and_resumed_gives_the_same(name: str, model: Model, tmp_path: Path) -> None:
    key, calls = made(name, model, tmp_path / "whole")
    # Stopped at the first word of progress it does all of it again, in another folder.
    if not calls:
        assert made(name, model, tmp_path / "again")[0] == key
    for at in sorted({1, (calls + 1) // 2, calls} if calls else ()):
        folder = tmp_path / f"stopped-{at}"
        with pytest.raises(Stop):
            made(name, model, folder, stop_after=at)
        assert made(name, model, folder)[0] == key


@pytest.mark.parametrize("name", METHODS)
def test_another_seed_gives_another_result(name: str, model: Model, tmp_path: Path) -> None:
    method = methods[name]
    if "temperature" not in method.settings and not name.startswith("attack/"):
        pytest.skip("draws nothing from the model")
    settings = small(method)
    keys: set[str] = set()
    for seed in (1, 2):
        with use(Context(seed=seed, folder=tmp_path / str(seed))):
            result = method(**inputs(method, model), **settings)
        assert isinstance(result, (Model, Table))
        keys.add(result.key)
    assert len(keys) == 2


@pytest.mark.parametrize("name", [n for n in METHODS if n.startswith("attack/")])
def test_an_attack_says_what_it_did_and_leaves_its_input(name: str, model: Model) -> None:
    before = model.key
    settings = small(methods[name])
    with use(Context(seed=1)) as context:
        result = methods[name](**inputs(methods[name], model), **settings)
    records = [m for m in context.metrics if "attack" in m]
    assert [r["attack"] for r in records] == [name.removeprefix("attack/")]
    assert model.with_changes(model.changes).key == before
    if isinstance(result, Model):
        assert result.quarantine == name and result.base_key == model.base_key
