"""Shared by all tests: a private TRUING_HOME, the tiny model as a folder, one thread a worker."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

# Before any import of truing: no test may read or write the user's cache, or depend on a key, a
# proxy, a limit or a folder that the environment names. What it named is kept for
# `users_environment`; other workers inherit it.
_USERS = re.compile(r"TRUING_(?!TEST_)|HF_|OPENAI_BASE_URL$|.*(_API_KEY|_PROXY|_proxy)$")
_named = {n: os.environ.pop(n) for n in list(os.environ) if _USERS.match(n)}
os.environ.setdefault("TRUING_TEST_NAMED", json.dumps(_named))
_HOME = tempfile.TemporaryDirectory(prefix="truing-test-")
os.environ["TRUING_HOME"] = _HOME.name
if not os.environ.get("TRUING_TEST_GPU"):  # bits, types and kernels are those of the CPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest  # noqa: E402

if TYPE_CHECKING:
    from truing.models import Model

sys.path.insert(0, str(Path(__file__).parent / "e2e"))  # of whose forked processes others make use


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file whose tests share costly fixtures stays with one worker.

    So do all that take the run which is made once for them.
    """
    for item in items:
        if item.path.parent.name in ("e2e", "unit"):
            shared = {"template", "whole"} & set(getattr(item, "fixturenames", ()))
            item.add_marker(pytest.mark.xdist_group("quickstart" if shared else item.path.stem))


# Why a test may be skipped. With any other reason it fails, or tests would vanish unseen.
SKIPPED = re.compile(
    r"Chromium|playwright is not installed|make is not installed|no /dev/full|namespace"
    r"|takes more than a model|no setting called|draws nothing|could not import '(?!truing)"
)
R = TypeVar("R", pytest.TestReport, pytest.CollectReport)


def _explained(report: R) -> R:
    expected = hasattr(report, "wasxfail")
    if report.skipped and not expected and not SKIPPED.search(str(report.longrepr)):
        report.outcome = "failed"
        report.longrepr = f"skipped for no known reason: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _explained((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _explained((yield))


def pytest_collection_finish() -> None:
    """No collection of garbage looks again through all modules and tests, which took it 0.5 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_context() -> Iterator[None]:
    """Each test starts outside any step."""
    from truing import context

    token = context._current.set(None)
    yield
    context._current.reset(token)


@pytest.fixture(scope="session")
def users_environment() -> dict[str, str]:
    """What the environment named, which tests do not see."""
    return json.loads(os.environ["TRUING_TEST_NAMED"])


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of the tiny Llama, of three blocks."""
    from truing.core.tiny import tiny_folder

    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def deep_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with six blocks, for what acts on some of several in the middle."""
    from truing.core.tiny import tiny_folder

    return tiny_folder(tmp_path_factory.mktemp("deep"), blocks=6)


@pytest.fixture(scope="session")
def stranger(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The model of `tiny_path` with two letters of its tokenizer exchanged."""
    from truing.models import Model

    folder = tmp_path_factory.mktemp("stranger") / "model"
    shutil.copytree(tiny_path, folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return Model.open(folder)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, of which this process knows nothing."""
    from truing import described
    from truing.method import methods

    monkeypatch.setattr(methods, "_made", {})
    monkeypatch.setattr(described, "_kept", set())
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def always_save(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """`always_save()`: from here on a training has a checkpoint of each update."""
    from truing.core import engine

    def call() -> None:
        monkeypatch.setattr(engine, "CHECKPOINT_SECONDS", -1.0)
        monkeypatch.setattr(engine, "CHECKPOINT_SHARE", float("inf"))

    return call


@pytest.fixture
def interrupted() -> Callable[[type, int], AbstractContextManager[None]]:
    """`interrupted(TextTask, 3)`: inside the block a training of such a task is cut off.

    That is after its third update, as by Ctrl-C.
    """

    @contextmanager
    def block(task: type, last: int) -> Generator[None]:
        after_step = task.after_step

        def dying(self: object, step: int) -> None:
            after_step(self, step)
            if step == last:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(task, "after_step", dying)
            with pytest.raises(KeyboardInterrupt):
                yield

    return block
