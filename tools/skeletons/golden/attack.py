"""My method on a row whose damage is known beforehand."""

from __future__ import annotations

from truing.method import methods

ROW: dict[str, object] = {"prompt": "Say hello.", "chosen": "Hello.", "rejected": "No."}
EXPECTED: dict[str, object] = {}  # the damaged row


def test_by_hand() -> None:
    assert EXPECTED, "write down the damaged row"
    assert methods["attack/my_method"].damaged(ROW) == EXPECTED
