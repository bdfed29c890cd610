"""What a step's key is made of: all that its result depends on."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path
from typing import cast

import pytest

from truing import datasets, declared, keys, sources
from truing.core.files import place_tree
from truing.core.identity import code
from truing.core.identity.hashes import path_hash
from truing.core.modelfiles import weight_files
from truing.errors import InputError
from truing.keys import modules_of, step_key
from truing.method import methods
from truing.models import Decoder, Folder, Model, hold
from truing.plan import Plan, Source
from truing.tables import Table, content_hash


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


# Code


@pytest.fixture
def plug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """`plug("main", text)` writes a module of a package that a user has."""
    monkeypatch.syspath_prepend(str(tmp_path))
    # Else Python takes what it compiled a moment ago: same second, same size.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "own_plug").mkdir()
    (tmp_path / "own_plug" / "__init__.py").write_text("")

    def write(name: str, text: str) -> None:
        (tmp_path / "own_plug" / f"{name}.py").write_text(text)
        code._known.clear()

    yield write
    for name in [n for n in sys.modules if n.partition(".")[0] == "own_plug"]:
        del sys.modules[name]


def walked(*modules: str) -> set[str]:
    return set(code._walked(modules, code._computing))


@pytest.mark.parametrize(
    "text",
    [
        "import truing\ndef f(): return truing.generate\n",
        "import truing as t\nclass A:\n    def f(self): return t.generate\n",
        "from truing import generate\n",
    ],
)
def test_names_that_truing_finds_lazily_are_code(text: str, plug: Callable[..., None]) -> None:
    plug("main", text)
    assert {"truing.core.generate", "truing.core.sampling"} < walked("own_plug.main")
    plug("main", "import truing\ndef f(): return truing.InputError\n")
    found = walked("own_plug.main")
    assert "truing.errors" in found and "truing.core.sampling" not in found


def test_what_runs_in_another_process_is_code() -> None:
    assert "truing.core.sandbox_inside" in walked("truing.train.reward.passes_tests")


def test_what_only_refuses_is_none() -> None:
    assert "truing.core.engine" not in walked("truing.select.sample")
    assert "truing.core.sandbox" not in walked("truing.train.preference.dpo")  # behind the doctor
    training = walked("truing.train.preference.dpo")
    assert {
        "truing.core.engine",
        "truing.core.logprob",
        "truing.core.trainer.train_text",
    } < training
    assert {"truing.core.rl.train_online", "truing.core.sampling"} < walked("truing.train.rl.grpo")
    for module in ("truing.core.logprob", "truing.core.sampling"):  # as caches name what they hold
        assert {module, "truing.core.passes.attention"} <= walked(module)
    refusing = {"truing.core.trainer.preflight", "truing.keys", "truing.pipeline"}
    assert not refusing & training and refusing - {"truing.pipeline"} < set(
        code._walked(["truing.train.preference.dpo"], code._edited)  # what is refused is of these
    )


def test_caches_name_modules_that_there_are() -> None:
    with pytest.raises(LookupError, match=r"truing\.core\.nothing"):
        code.made_by("truing.core.nothing")
    assert code._read(weight_files.READER) is not None


def test_a_module_that_was_edited_since_it_was_loaded(plug: Callable[..., None]) -> None:
    text = "def f(x):\n    return [i + 1 for i in x]\n"
    plug("main", text)
    module = importlib.import_module("own_plug.main")
    plug("main", f"# a comment\n\n{text}")  # moved, but the same
    first = code.code_key(["own_plug.main"])
    plug("main", text.replace("+ 1", "+ 2"))
    with pytest.raises(InputError, match="function 'f' was edited since its module was loaded"):
        code.code_key(["own_plug.main"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "__loader__", object())  # one that changes code as it loads it
        assert code.code_key(["own_plug.main"]) != first
    code._known.clear()
    importlib.invalidate_caches()
    importlib.reload(module)
    assert code.code_key(["own_plug.main"]) != first


LOADED = """
class C:
    def __init__(self, n=1): self.n = n
    @property
    def p(self): return self.n in {"a", "b", "c"}
    @classmethod
    def k(cls): return cls.d
    def d(self, seen=[]): seen.append(1)

def f(rows, w=0.5, *, k=-1, other=len):
    def g(): return [(1, x) for x in rows]
    return g
"""


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("    def g", '    """A docstring."""\n    def g', ""),
        ("def g(): ", 'def g():\n        "And one."\n        ', ""),
        ("n=1", "n=True", "C.__init__"),
        ('"c"', '"d"', "C.p"),
        ("cls.d", "cls.p", "C.k"),
        ("w=0.5", "w=0.7", "f"),
        ("k=-1", "k=1", "f"),
        ("w=0.5", "w", "f"),
        ("(1, x)", "(1.0, x)", "f"),
    ],
)
def test_what_counts_as_edited(old: str, new: str, name: str, plug: Callable[..., None]) -> None:
    plug("main", LOADED)
    importlib.import_module("own_plug.main").C().d()
    first = code.code_key(["own_plug.main"])
    plug("main", LOADED.replace(old, new))
    if not name:
        assert code.code_key(["own_plug.main"]) == first
        return
    with pytest.raises(InputError, match=f"function '{name}' was edited"):
        code.code_key(["own_plug.main"])


def test_files_that_a_component_reads(plug: Callable[..., None], tmp_path: Path) -> None:
    plug("main", WORDS)
    importlib.import_module("own_plug.main")
    data, found = Table("example", [{"prompt": "p", "completion": "c"}]), []
    method = methods["select/checked"]
    settings = {"checks": [{"use": "words_of_file", "words": str(tmp_path / "words.txt")}]}
    for words in ("one", "two", "two"):
        (tmp_path / "words.txt").write_text(words)
        found.append(step_key(method, {"data": data}, method.validate(settings), 0))
    declared.drop(lambda entry: entry.name == "words_of_file")
    assert found[0] != found[1] == found[2]


WORDS = '''
from pathlib import Path

from truing import component


@component("check")
def words_of_file(rows, *, words: Path):
    """A word of the file is said."""
    return [float(words.read_text() in row["completion"]) for row in rows]
'''


def test_models_that_settings_of_a_decoder_name(tiny_path: Path) -> None:
    model = Model.open(tiny_path)
    judge = hold(model.adding(Decoder("own_decoder_of_a_judge")))
    reward = {"r": {"use": "reward_model", "model": judge}}
    picky = model.adding(Decoder("best_of_n", {"rewards": reward}))
    assert "own_decoder_of_a_judge" in keys._of_model(picky)


def test_folders_behind_links_are_content(tmp_path: Path) -> None:
    for name in ("inner", "outer"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / "outer" / "link").symlink_to(tmp_path / "inner")
    (tmp_path / "outer" / "back").symlink_to(tmp_path / "outer")
    first = path_hash(tmp_path / "outer")
    (tmp_path / "inner" / "file").write_text("changed")
    assert path_hash(tmp_path / "outer") != first
    place_tree(tmp_path / "outer", tmp_path / "placed", link=False)
    assert (tmp_path / "placed" / "link" / "file").read_text() == "changed"
    assert path_hash(tmp_path / "placed") == path_hash(tmp_path / "outer")


def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lost+found").mkdir()
    plain = Path.iterdir

    def iterdir(self: Path) -> Iterator[Path]:  # as for all but root, who may read any
        if self.name == "lost+found":
            raise PermissionError(13, "Permission denied", str(self))
        return plain(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(InputError, match=r"lost\+found: this folder cannot be read"):
        path_hash(tmp_path)


def test_times_are_hashed_by_what_they_say() -> None:
    class Timestamp(datetime):
        """As pandas has them, where it is installed."""

    day = (2026, 1, 1, 12)
    assert content_hash(Timestamp(*day)) == content_hash(datetime(*day))
    assert content_hash(datetime(2026, 1, 1)) != content_hash(date(2026, 1, 1))
