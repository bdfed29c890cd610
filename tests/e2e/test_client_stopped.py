"""Ctrl-C while a served model is asked: it ends at once and keeps the replies that came."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from forked import Started
from misbehaving import good, server


def test_ctrl_c_ends_at_once_and_keeps_replies(tmp_path: Path) -> None:
    def script(n: int, body: Any) -> Any:
        return good() if body["messages"][0]["content"] == "quick" else (*good()[:3], 20.0)

    code = (
        "import sys; from truing.core.generate import generate; from truing.models import Model\n"
        "generate(Model.open(sys.argv[1] + '#m'), ['quick', 'slow'])"
    )
    with server(script) as (url, log):
        env = {**os.environ, "TRUING_HOME": str(tmp_path / "other")}
        child = Started(["-c", code, url], env=env)
        try:
            for _ in range(3000):
                if len(log.asked) == 2 and list((tmp_path / "other").rglob("*.json")):
                    break
                time.sleep(0.02)
            start = time.monotonic()
            child.send_signal(signal.SIGINT)
            _, err = child.communicate(timeout=30)
        finally:
            child.send_signal(signal.SIGKILL)
        assert "KeyboardInterrupt" in err
        assert time.monotonic() - start < 10
    assert len(list((tmp_path / "other").rglob("*.json"))) == 1
