"""What a step's key is made of: all that its result depends on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from truing import datasets, sources
from truing.keys import modules_of, step_key
from truing.method import methods
from truing.models import Folder, Model
from truing.plan import Plan, Source
from truing.tables import Table


def test_components_that_an_online_method_names_itself() -> None:
    assert "truing.train.reward.salmon_reward" in modules_of(methods["salmon_ppo"], {}, {})
    assert "truing.train.rl.urpo" in modules_of(methods["urpo"], {}, {})


@pytest.mark.parametrize("field", ["base", "licences"])
def test_the_licence_of_a_model_is_part_of_the_key(tiny_path: Path, field: str) -> None:
    free = Model(Folder(tiny_path, "mit"), licences=("mit",))
    bound = (
        replace(free, base=Folder(tiny_path, "cc-by-nc-4.0"))
        if field == "base"
        else free.with_licences(["cc-by-nc-4.0"])
    )
    assert free.key == bound.key
    method, table = methods["train/dpo"], Table("pair", [])
    found = {
        step_key(method, {"model": m, "data": table}, method.validate({}), 0) for m in (free, bound)
    }
    assert len(found) == 2
    merge = methods["merge/linear"]
    assert len({step_key(merge, {"models": {"a": m}}, {}, 0) for m in (free, bound)}) == 2


def test_data_sets_that_stand_in_are_part_of_the_key(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan("able")
    plan.step("able", "evaluate/ability", model=str(tiny_path), questions=None)
    (one,) = plan.check()
    assert one.sources["texts"] == {"": Source("prose")}
    assert one.sources["questions"] == {"": Source("common_knowledge")}
    opened = sources.open_sources([one])
    assert ("Table", "prose") in opened
    method, model = methods["ability"], Model.open(tiny_path)

    def key() -> str:
        nouns = sources.with_defaults(method, {"model": model})
        return step_key(method, nouns, method.validate({}), 0)

    before = key()
    assert key() == before
    monkeypatch.setattr(datasets, "read", lambda *_, **__: Table("text", [{"text": "other"}]))
    assert key() != before


def test_a_given_table_is_not_replaced(tiny_path: Path) -> None:
    mine = Table("text", [{"text": "mine"}])
    found = sources.with_defaults(
        methods["ability"], {"model": Model.open(tiny_path), "texts": mine}
    )
    assert found["texts"] is mine and len(cast(Table, found["questions"])) > 10
