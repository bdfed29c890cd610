"""Shared by all tests: a private TRUING_HOME, the tiny model as a folder, one thread a worker."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

# Before any import of truing: no test may read or write the user's cache.
_HOME = tempfile.TemporaryDirectory(prefix="truing-test-")
os.environ.setdefault("TRUING_TEST_CACHE", os.environ.get("TRUING_HOME", ""))
os.environ["TRUING_HOME"] = _HOME.name

import pytest  # noqa: E402

SHARING = {"test_report_browser": "test_kill"}  # files that share what one of them makes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file whose tests share costly fixtures stays with one worker."""
    for item in items:
        if item.path.parent.name in ("e2e", "unit"):
            stem = item.path.stem
            item.add_marker(pytest.mark.xdist_group(SHARING.get(stem, stem)))


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


@pytest.fixture
def interrupted() -> Callable[[type, int], AbstractContextManager[None]]:
    """`interrupted(TextTask, 3)`: inside the block a training of such a task is cut off.

    That is after its update 3, counted from 0, as by Ctrl-C.
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
