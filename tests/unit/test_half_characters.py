"""Half a character (a lone surrogate), in a row or in a model's reply, breaks nothing."""

import hashlib
import json
from pathlib import Path

import pytest

from truing import jsontext
from truing.context import Journal
from truing.core.batch.encoding import encode
from truing.core.generate import generate
from truing.core.modelfiles.loaded import load_tokenizer
from truing.models import Model
from truing.principles import Principles
from truing.reports import Measure, Report
from truing.store import Store
from truing.surrogates import mended
from truing.tables import Table, content_hash

HALF = "caf\u00e9 \ud83d"
WHOLE = "caf\u00e9 \ufffd"


def test_mended() -> None:
    assert mended(HALF) == WHOLE
    assert mended("\ud83d\ude00") == "\U0001f600"  # both halves: the character
    assert mended({HALF: [HALF, (1, HALF)]}) == {WHOLE: [WHOLE, [1, WHOLE]]}
    same = {"a": ["caf\u00e9", 1.5, None]}
    assert mended(same) is same


def test_a_hash_of_half_a_character() -> None:
    assert content_hash(HALF) != content_hash(WHOLE)
    plain = hashlib.blake2b('"caf\u00e9"'.encode(), digest_size=16).hexdigest()
    assert content_hash("caf\u00e9") == plain  # what was stored before keeps its name


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("id", [{}, {"id": "given"}])
def test_a_table_goes_round(tmp_path: Path, suffix: str, id: dict[str, str]) -> None:
    row = {"prompt": [{"role": "user", "content": HALF}], "completion": HALF, "facts": {HALF: 1}}
    (tmp_path / "in.jsonl").write_text(json.dumps(row | id) + "\n")
    assert "\\ud83d" in (tmp_path / "in.jsonl").read_text()
    for table in (Table("example", [row | id]), Table.read(tmp_path / "in.jsonl", "example")):
        assert table[0]["completion"] == WHOLE and table[0]["facts"] == {WHOLE: 1}
        back = Table.read(table.write(tmp_path / f"out{suffix}"), "example")
        assert back.rows == table.rows and back.key == table.key


def test_a_csv_cell(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"text\n\xed\xa0\xbd\n")  # UTF-8 has no such bytes
    with pytest.raises(Exception, match="cannot be read"):
        Table.read(tmp_path / "t.csv")


def test_a_journal_goes_round(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    journal.put(HALF, {"reply": [HALF]})
    journal.put("joined", "\ud83d\ude00")
    journal.put("plain", "caf\u00e9")
    journal.close()
    again = Journal(tmp_path / "j.jsonl")
    assert len(again) == 3
    for key in (HALF, "joined", "plain"):
        assert key in again and again.get(key) == journal.get(key)
    assert again.get(HALF) == {"reply": [HALF]} and again.get("joined") == "\U0001f600"
    again.close()


def test_a_report_goes_round(tmp_path: Path) -> None:
    samples = Table("example", [{"prompt": "a", "completion": HALF}])
    report = Report("t", [Measure("m", 1, 1, 1, 1, category=HALF)], samples, {"reply": HALF})
    report.save(tmp_path)
    assert Report.load(tmp_path).key == report.key


@pytest.mark.parametrize("name", ["p.yaml", "p.json"])
def test_principles_go_round(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('[{"id": "a", "text": "Say \\ud83d"}]')
    rules = Principles.read(tmp_path / name)
    assert rules["a"].text == "Say \ufffd"
    rules.save(tmp_path / "out")
    assert Principles.load(tmp_path / "out").key == rules.key


@pytest.mark.parametrize("ascii", [False, True])
def test_json_text(ascii: bool) -> None:
    class Other:
        """What JSON does not know."""

    def default(_: object) -> str:
        return HALF

    value = {HALF: [HALF, (1.5, Other())], "joined": "\ud83d\ude00"}
    text = jsontext.dumps(value, ascii=ascii, default=default)
    assert json.loads(text.encode()) == {WHOLE: [WHOLE, [1.5, WHOLE]], "joined": "\U0001f600"}
    with pytest.raises(TypeError):
        jsontext.dumps(Other())


def test_what_a_step_says_is_stored(tmp_path: Path) -> None:
    store, table = Store(tmp_path), Table("prompt", [{"prompt": "a"}])
    store.put("ab" * 16, table, {"settings": {"system": HALF}}, [{"at": HALF, "loss": 1.0}])
    (folder,) = (tmp_path / "artefacts").glob("??/*")
    facts = json.loads((folder / "artefact.json").read_bytes())
    assert facts["settings"] == {"system": WHOLE}
    assert json.loads((folder / "metrics.jsonl").read_bytes()) == {"at": WHOLE, "loss": 1.0}


def test_a_prompt_is_mended(tiny_path: Path) -> None:
    model = Model.open(tiny_path)
    asked = {"max_tokens": 4, "stop": [HALF]}
    half, whole = (generate(model, [t], **asked) for t in (HALF, WHOLE))  # type: ignore[arg-type]
    assert half == whole
    tokenizer = load_tokenizer(model)
    assert encode(tokenizer, HALF) == encode(tokenizer, WHOLE)
    assert encode(tokenizer, HALF, before="a") == encode(tokenizer, WHOLE, before="a")
