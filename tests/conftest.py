"""Shared by all tests: a private TRUING_HOME, the tiny model as a folder, one thread a worker."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

# Before any import of truing: no test may read or write the user's cache.
_HOME = tempfile.TemporaryDirectory(prefix="truing-test-")
os.environ.setdefault("TRUING_TEST_CACHE", os.environ.get("TRUING_HOME", ""))
os.environ["TRUING_HOME"] = _HOME.name

import pytest  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent / "e2e"))  # of whose forked processes others make use


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file whose tests share costly fixtures stays with one worker, and so do all end to end."""
    for item in items:
        folder = item.path.parent.name
        if folder in ("e2e", "unit"):
            item.add_marker(pytest.mark.xdist_group(folder if folder == "e2e" else item.path.stem))


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
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of the tiny Llama."""
    from truing.core.tiny import tiny_folder

    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def shallow_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with three blocks: a first, one in the middle, a last.

    For what holds of any number of blocks and is tested many times, since all six are half of what
    such a test takes.
    """
    from transformers import LlamaForCausalLM

    from truing.core import tiny
    from truing.core.loaded import quiet

    folder = tiny.tiny_folder(tmp_path_factory.mktemp("shallow"))  # whose card and tokenizer stay
    config = tiny.tiny_config()
    config.num_hidden_layers = 3
    module = LlamaForCausalLM(config)
    tiny.fill(module, tiny.STD, 0)
    module.tie_weights()
    with quiet():
        module.save_pretrained(folder)
    return folder


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
