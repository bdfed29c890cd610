"""The naked loops of examples/ give the engine's numbers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def example(name: str) -> ModuleType:
    path = ROOT / "examples" / f"{name}.py"
    assert len(path.read_text().splitlines()) < 200
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_dpo(tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": f"Say {i}.", "chosen": f"It is {i}, no doubt.", "rejected": "I" * i}
        for i in (1, 2)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(json.dumps(r) for r in rows))
    words = [str(tiny_path), "--data", str(data), "--pairs", "2", "--steps", "3"]
    assert example("dpo_by_hand").main(words) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["max_loss_rel_diff"] < 1e-4 and line["loss_last"] < 0.95 * line["loss_first"]


def test_steering(tiny_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert example("steering_by_hand").main([str(tiny_path)]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["max_logp_diff"] < 1e-3 and line["moved"] > 0.01
    assert example("steering_by_hand").main([str(tiny_path), "--strength", "0"]) == 1
