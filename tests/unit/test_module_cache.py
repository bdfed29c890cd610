"""Modules kept for reuse give way where a device has no room for another one."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from truing.core.modelfiles import loaded
from truing.errors import InputError

Key = tuple[str, str, str]


class Memory:
    """A device of 10 bytes on which each cached module takes 3."""

    def __init__(self, size: int = 10) -> None:
        self.size = size

    def free(self) -> int:
        """Bytes that can be had now."""
        return self.size - 3 * sum(key[2] == "cuda" for key in loaded._cache)


@pytest.fixture
def kept() -> Iterator[None]:
    """Three modules on the device, the first the longest unused, and one in main memory."""
    before = loaded._cache.copy()
    loaded._cache.clear()
    for name, device in (("a", "cuda"), ("main", "cpu"), ("b", "cuda"), ("c", "cuda")):
        loaded._cache[name, "float32", device] = (torch.nn.Identity(), {})
    yield
    loaded._cache.clear()
    loaded._cache.update(before)


def _names() -> list[str]:
    return [key[0] for key in loaded._cache]


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize(
    ("needed", "left"),
    [
        (0, ["a", "main", "b", "c"]),
        (3, ["main", "b", "c"]),
        (4, ["main", "c"]),
        (8, ["main"]),
        (10, ["main"]),  # it fits, if with no room to spare
    ],
)
def test_the_longest_unused_go_first(needed: int, left: list[str]) -> None:
    loaded.make_place(needed, Memory().free, "cuda", "tiny")
    assert _names() == left


@pytest.mark.usefixtures("kept")
def test_what_cannot_fit_is_told() -> None:
    with pytest.raises(InputError, match=r"memory are free.*tiny|tiny.*memory are free"):
        loaded.make_place(11, Memory().free, "cuda", "tiny")


@pytest.mark.usefixtures("kept")
def test_loading_makes_place_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded, "free_on", lambda _: Memory().free())
    moved: list[str] = []

    class Stub(torch.nn.Linear):
        def to(self, device: str) -> Stub:  # type: ignore[override]
            moved.append(device)
            return self

    module = Stub(1, 1)  # 8 bytes
    assert loaded._moved(module, "cuda", "tiny") is module
    assert _names() == ["main"] and moved == ["cuda"]
    assert loaded._moved(module, "cpu", "tiny") is module and moved[-1] == "cpu"


@pytest.mark.usefixtures("kept")
def test_a_module_that_somebody_holds_is_not_forgotten() -> None:
    """It would free nothing, and be read a second time when it is asked for."""
    held = loaded._cache["a", "float32", "cuda"]
    loaded.make_place(4, Memory().free, "cuda", "tiny")
    assert loaded._cache["a", "float32", "cuda"][0] is held[0]
    assert sorted(_names()) == ["a", "main"]


@pytest.mark.usefixtures("kept")
def test_all_that_nobody_holds_can_go() -> None:
    held = loaded._cache["a", "float32", "cuda"]
    loaded.spare("cuda")
    assert _names() == ["main", "a"] and held[0] is loaded._cache["a", "float32", "cuda"][0]


@pytest.mark.usefixtures("kept")
def test_who_says_what_it_holds_waits_for_no_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[int] = []
    collect = gc.collect
    monkeypatch.setattr(gc, "collect", lambda: collected.append(collect()))
    loaded.spare("cuda", but=loaded._cache["a", "float32", "cuda"][0])
    assert _names() == ["a", "main"] and len(collected) == 2
