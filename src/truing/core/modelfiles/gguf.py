"""GGUF files read with numpy: the header, and tensors of type F32, F16, Q8_0 and Q4_1.

A GGUF file is: magic, version, number of tensors and of facts; the facts (name, type, value); for
each tensor its name, dimensions (fastest first), type and offset; padding; the data. Q8_0 holds
blocks of 32 weights, w = d q with an 8-bit q and a 16-bit float d; Q4_1 holds w = d q + m with
4-bit q, the low halves of its 16 bytes first.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from truing.errors import InputError

Array = NDArray[np.float32]
BLOCK = 32
AGAIN = "Fetch it again"
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9


def _f32(raw: NDArray[np.uint8]) -> Array:
    return raw.view(np.float32)


def _f16(raw: NDArray[np.uint8]) -> Array:
    return raw.view(np.float16).astype(np.float32)


def q8_0(raw: NDArray[np.uint8]) -> Array:
    """Weights of Q8_0 blocks: 2 bytes of scale, 32 signed bytes."""
    blocks = raw.reshape(-1, 34)
    d_N1 = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    q_NB = blocks[:, 2:].view(np.int8).astype(np.float32)
    return d_N1 * q_NB


def q4_1(raw: NDArray[np.uint8]) -> Array:
    """Weights of Q4_1 blocks: 2 bytes of scale, 2 of minimum, 16 bytes of two weights each."""
    blocks = raw.reshape(-1, 20)
    scale_N2 = blocks[:, :4].copy().view(np.float16).astype(np.float32)
    q_NH = blocks[:, 4:]
    q_NB = np.concatenate([q_NH & 15, q_NH >> 4], axis=1).astype(np.float32)
    return scale_N2[:, :1] * q_NB + scale_N2[:, 1:]


# type -> (name, weights in a block, bytes of a block, decoder)
TYPES: dict[int, tuple[str, int, int, Callable[[NDArray[np.uint8]], Array]]] = {
    0: ("F32", 1, 4, _f32),
    1: ("F16", 1, 2, _f16),
    3: ("Q4_1", BLOCK, 20, q4_1),
    8: ("Q8_0", BLOCK, 34, q8_0),
}


@dataclass(frozen=True)
class _Place:
    shape: tuple[int, ...]
    type: int
    offset: int


class Gguf:
    """An opened GGUF file: `facts` by name, tensors by `tensor(name)`.

    Raises:
        InputError: not a GGUF file, cut off, or of a tensor type not read here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data = np.memmap(path, dtype=np.uint8, mode="r")
        self._at = 0
        if bytes(self._data[:4]) != b"GGUF":
            raise InputError(
                "not a GGUF file", where=str(path), seen=bytes(self._data[:4]), fix=AGAIN
            )
        self._at = 4
        try:
            version, tensors, facts = self._number("<I"), self._number("<Q"), self._number("<Q")
            if version not in (2, 3):
                fix = "Write it again as version 2 or 3, as llama.cpp does"
                raise InputError("unknown GGUF version", where=str(path), seen=version, fix=fix)
            self.facts: dict[str, object] = {}
            for _ in range(int(facts)):
                name = self._string()
                self.facts[name] = self._value(int(self._number("<I")))
            self._places = dict(self._place() for _ in range(int(tensors)))
        except (struct.error, UnicodeDecodeError, KeyError) as error:
            said = f"the GGUF header is damaged: {error}"
            raise InputError(said, where=str(path), fix=AGAIN) from None
        step = int(cast(int, self.facts.get("general.alignment", 32)))
        self._start = -(-self._at // step) * step

    def _number(self, form: str) -> int | float:
        size = struct.calcsize(form)
        value = struct.unpack(form, self._data[self._at : self._at + size].tobytes())[0]
        self._at += size
        return cast("int | float", value)

    def _string(self) -> str:
        size = int(self._number("<Q"))
        text = self._data[self._at : self._at + size].tobytes()
        if len(text) != size:
            raise struct.error("cut off")
        self._at += size
        return text.decode("utf-8")

    def _value(self, sort: int) -> object:
        if sort == _STRING:
            return self._string()
        if sort == _ARRAY:
            inner, size = int(self._number("<I")), int(self._number("<Q"))
            return [self._value(inner) for _ in range(size)]
        return self._number(_SCALARS[sort])

    def _place(self) -> tuple[str, _Place]:
        name = self._string()
        rank = int(self._number("<I"))
        shape = tuple(int(self._number("<Q")) for _ in range(rank))[::-1]
        return name, _Place(shape, int(self._number("<I")), int(self._number("<Q")))

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return list(self._places)

    def tensor(self, name: str) -> Array:
        """One tensor in float32, with its own memory."""
        place = self._places[name]
        if place.type not in TYPES:
            raise InputError(
                "this tensor type is not read",
                where=f"{self.path} {name}",
                seen=place.type,
                fix=f"Give a file in {', '.join(kind for kind, *_ in TYPES.values())}",
            )
        _, weights, size, decode = TYPES[place.type]
        start = self._start + place.offset
        number = math.prod(place.shape) // weights * size
        raw = np.array(self._data[start : start + number])
        if len(raw) != number:
            raise InputError(
                "the file is cut off",
                where=f"{self.path} {name}",
                seen=f"{len(self._data)} bytes",
                fix=AGAIN,
            )
        return decode(raw).reshape(place.shape)
