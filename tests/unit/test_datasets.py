"""Data sets by name: shapes, licences, checksums, and each fault told once."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from truing import dataindex, datasets, pipeline
from truing.context import Context, use
from truing.core.modelfiles.licences import allows_commercial
from truing.dataset_rows import dialogue, hh_pair, passages, truthful, word_problem
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.plan import Plan
from truing.store import Store
from truing.tables import Row, Table


def _line(data: object) -> bytes:
    return json.dumps(data).encode() + b"\n"


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with an index, of three small sets."""
    root = tmp_path / "mirror"
    sets: dict[str, tuple[str, bool, dict[str, bytes]]] = {
        "gsm8k": (
            "MIT (repository).",
            False,
            {
                "train.jsonl.gz": gzip.compress(
                    _line({"question": "1+1?", "answer": "It is <<1+1=2>>2\n#### 2"})
                    + _line({"question": "Big?", "answer": "So\n#### 1,200"})
                ),
                "test.jsonl.gz": gzip.compress(_line({"question": "Q", "answer": "A\n#### 0"})),
            },
        ),
        "diary": (
            "CC BY-NC 4.0.",
            True,
            {"a.jsonl": _line({"words": 1}), "sub/a.jsonl": _line({"words": 2})},
        ),
        "novel": ("Public domain", False, {"text.txt": b"One.\n\nTwo.\n", "p.png": b"\x89PNG"}),
    }
    index = []
    for name, (licence, private, held) in sets.items():
        for file, data in held.items():
            path = root / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        index.append(
            {
                "name": name,
                "title": f"About {name}",
                "licence": licence,
                "non_commercial": private,
                "files": [
                    {"file": f, "records": 2, "sha256": hashlib.sha256(d).hexdigest()}
                    for f, d in held.items()
                ],
            }
        )
    (root / "index.json").write_text(json.dumps(index))
    monkeypatch.setenv("TRUING_DATA", str(root))
    return root


def test_dialogue_is_split_at_the_speakers() -> None:
    text = "\n\nHuman: Hi.\n\nSecond paragraph: Human: quoted\n\nAssistant: Hello!\n\nHuman: Bye"
    assert dialogue(text) == [
        {"role": "user", "content": "Hi.\n\nSecond paragraph: Human: quoted"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ]
    joined = dialogue("\n\nHuman: a\n\nAssistant: b\n\nAssistant: c")
    assert joined[1] == {"role": "assistant", "content": "b\n\nc"} and len(joined) == 2


def _hh(chosen: str, rejected: str) -> Row | None:
    return hh_pair({"chosen": chosen, "rejected": rejected})


def test_hh_pair_shares_the_dialogue() -> None:
    head = "\n\nHuman: Why?\n\nAssistant: Because.\n\nHuman: Really?\n\nAssistant:"
    pair = _hh(f"{head} Yes.", f"{head} No. ")
    assert pair is not None
    assert (pair["chosen"], pair["rejected"]) == ("Yes.", "No.")
    assert [m["role"] for m in pair["prompt"]] == ["user", "assistant", "user"]  # type: ignore


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: x\n\nAssistant: c"),  # other dialogue
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: b "),  # same answer
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: "),  # empty answer
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "\n\nHuman: a\n\nAssistant: b\n\nHuman: d"),
        ("\n\nAssistant: b", "\n\nAssistant: c"),  # no human
    ],
)
def test_hh_rows_that_are_no_pairs(chosen: str, rejected: str) -> None:
    assert _hh(chosen, rejected) is None


def test_number_after_the_last_marker() -> None:
    row = word_problem({"question": "q", "answer": "a #### no\n#### 1,200"})
    assert row is not None and row["answer"] == "1200"


def test_truthful_choices() -> None:
    row = truthful(
        {
            "Question": "Q",
            "Best Answer": "b",
            "Correct Answers": "a; b; ",
            "Incorrect Answers": "x; y",
            "Category": "c",
        }
    )
    assert row is not None
    assert row["choices"] == ["b", "x", "y"] and row["answer"] == 0 and row["correct"] == ["b", "a"]


def test_passages_end_at_empty_lines() -> None:
    parts = [str(r["text"]) for r in passages("aaaa\n\nbb\n \ncccc\n\nd", least=5)]
    assert parts == ["aaaa\n\nbb", "cccc\n\nd"]


def test_mirror_rows_carry_source_and_licence(mirror: Path) -> None:
    table = Table.read("gsm8k")
    assert table.kind == "example" and [r["answer"] for r in table] == ["2", "1200"]
    assert table[1]["lineage"] == {"source": "gsm8k/train row 2", "licence": "MIT"}
    assert len(Table.read("gsm8k/test")) == 1 and len(Table.read("gsm8k", limit=1)) == 1
    assert Table.read("gsm8k", "prompt").kind == "prompt"
    assert datasets.licence_of([table]) == "MIT"


def test_rows_that_a_shape_leaves_out_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = dict.fromkeys("S H V HR SH S3 H2 V2".split(), 0)
    rows = [known, {"S": 0}, known | {"H": 1}, {"SH": 1}, {"SH": 0}]
    file = tmp_path / "moderation" / "moderation.jsonl"
    file.parent.mkdir()
    file.write_bytes(b"".join(_line({"prompt": f"t{i}", **r}) for i, r in enumerate(rows)))
    facts = {"name": "moderation", "title": "t", "licence": "MIT", "files": [{"file": file.name}]}
    (tmp_path / "index.json").write_text(json.dumps([facts]))
    monkeypatch.setenv("TRUING_DATA", str(tmp_path))
    with use(Context()) as context:
        table = Table.read("moderation/moderation")
    assert [r["label"] for r in table] == [True, False, False]
    assert table.place(2) == "moderation/moderation row 4"
    assert context.metrics == [{"data": "moderation/moderation", "left_out": 2}]
    plan = Plan("r", folder=tmp_path)
    plan.step("some", "select/sample", data="moderation/moderation", n=1)
    made = pipeline.run(plan, tmp_path / "runs", store=Store(tmp_path / "store"))
    assert made.run.manifest["left_out"] == context.metrics


def test_unknown_columns_are_kept(mirror: Path) -> None:
    table = Table.read("diary/sub/a")
    assert table.kind == "record" and table[0]["words"] == 2
    assert datasets.licence_of([table, Table.read("gsm8k")]) == "CC BY-NC 4.0"
    text = Table.read("novel")
    assert text.kind == "text" and text[0]["text"] == "One.\n\nTwo."
    assert datasets.path("novel/p.png").name == "p.png"
    assert datasets.path("diary") == mirror / "diary"


def test_a_list_of_rows_is_a_table_as_it_is_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": "Hi?", "completion": "Yes."}, {"prompt": "So?", "completion": "No."}]
    held = {
        "listed": {"all.json": json.dumps(rows)},
        "mixed": {"a.jsonl": '{"prompt": "p"}\n', "about.json": json.dumps({"of": "a"})},
        "two": {"x.json": json.dumps(rows), "y.json": json.dumps(rows[:1])},
        "odd": {"odd.json": json.dumps([1])},
    }
    index: list[dict[str, object]] = []
    for name, some in held.items():
        (tmp_path / name).mkdir()
        for file, text in some.items():
            (tmp_path / name / file).write_text(text)
        listed = [{"file": f} for f in some]
        index.append({"name": name, "title": "t", "licence": "MIT", "files": listed})
    (tmp_path / "index.json").write_text(json.dumps(index))
    monkeypatch.setenv("TRUING_DATA", str(tmp_path))
    table = Table.read("listed")
    assert table.kind == "example" and [r["completion"] for r in table] == ["Yes.", "No."]
    assert table[1]["lineage"] == {"source": "listed/all row 2", "licence": "MIT"}
    by_path = Table.read(tmp_path / "listed" / "all.json")
    assert [r["id"] for r in by_path] == [r["id"] for r in table]
    assert len(Table.read("two/y")) == 1 and Table.read("mixed/about")[0]["of"] == "a"
    assert Table.read("mixed").kind == "prompt"  # what tells of a table is none beside it
    with pytest.raises(InputError, match="several files"):
        Table.read("two")
    with pytest.raises(InputError, match=r"odd\.json row 1.*must be a JSON object"):
        Table.read("odd")
    kinds = {str(s["name"]): s["kind"] for s in datasets.catalogue()}
    assert [kinds[n] for n in held] == ["example", "prompt", "record", "record"]


def test_non_commercial_only_from_the_mirror(
    mirror: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TRUING_DATA")
    with pytest.raises(InputError, match="unknown data set 'diary'"):
        Table.read("diary")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "x.jsonl").write_bytes(_line({"text": "t"}))
    notice = "Data\n====\n\nx.jsonl\n  What: x\n  Licence: CC BY-NC 4.0\n  SHA-256: 0\n"
    (folder / "NOTICE").write_text(notice)
    monkeypatch.setattr(dataindex, "repository", lambda: folder)
    with pytest.raises(InputError, match="non-commercial"):
        datasets.sets()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gsm9k", "Did you mean 'gsm8k'"),
        ("gsm8k/tain", "Did you mean 'train'"),
        ("diary", "several files"),
        ("novel/p.png", "not a table"),
        ("hh_rlhf", "Set TRUING_DATA"),
        ("missing/file.jsonl", "no such file"),
    ],
)
def test_faults_are_named(mirror: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Table.read(name)


def test_wrong_kind_is_refused(mirror: Path) -> None:
    with pytest.raises(InputError, match="pair"):
        Table.read("gsm8k", "pair")


def test_wrong_checksum(mirror: Path) -> None:
    (mirror / "novel" / "text.txt").write_text("Changed.")
    with pytest.raises(InputError, match="wrong checksum"):
        Table.read("novel")


def test_missing_field_names_the_row(mirror: Path) -> None:
    path = mirror / "gsm8k" / "test.jsonl.gz"
    path.write_bytes(gzip.compress(_line({"question": "q", "answer": "a"}) + _line({"q": "x"})))
    index = json.loads((mirror / "index.json").read_text())
    index[0]["files"][1]["sha256"] = ""
    (mirror / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"row 2.*'answer'"):
        Table.read("gsm8k/test")


def test_broken_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUING_DATA", str(tmp_path))
    with pytest.raises(InputError, match=r"index\.json"):
        datasets.catalogue()


def test_shipped_sets_match_their_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRUING_DATA", raising=False)
    shipped = {n: s for n, s in datasets.sets().items() if s.origin == "repository"}
    assert {"prose", "digits", "helpful_pairs"} <= set(shipped)
    for name, entry in shipped.items():
        assert allows_commercial(entry.licence), name
        assert len(entry.files[0].sha256) == 64
        assert len(Table.read(name)) > 0  # checks the checksum
    absent = {str(c["name"]) for c in datasets.catalogue() if not c["present"]}
    assert "hh_rlhf" in absent and "digits" not in absent


def test_digits_are_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRUING_DATA", raising=False)
    table = Table.read("digits")
    image = table[0]["image"]
    assert isinstance(image, np.ndarray) and image.shape == (8, 8) and image.max() <= 16
    assert len(table) == 1797 and [r["label"] for r in table][:5] == [0, 1, 2, 3, 4]


@pytest.fixture
def address(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """(address, sha256) of a small JSON Lines file on a local server."""
    folder = tmp_path / "www"
    folder.mkdir()
    (folder / "rows.jsonl").write_bytes(_line({"prompt": "a", "completion": "b"}))
    digest = hashlib.sha256((folder / "rows.jsonl").read_bytes()).hexdigest()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, directory=str(folder), **kwargs)  # type: ignore

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/rows.jsonl", digest
    server.shutdown()
    server.server_close()


def test_address_with_checksum(address: tuple[str, str]) -> None:
    url, digest = address
    table = Table.read(f"{url}#sha256={digest}")
    assert table.kind == "example" and table[0]["lineage"]["licence"] == "unknown"  # type: ignore
    with pytest.raises(InputError, match="needs the file's checksum"):
        Table.read(url)
    with pytest.raises(InputError, match="wrong checksum"):
        Table.read(f"{url}#sha256={'0' * 64}")
    with pytest.raises(InputError, match="could not be downloaded"):
        Table.read(f"{url}.no#sha256={'1' * 64}")


def test_secrets_of_an_address_are_neither_kept_nor_shown(address: tuple[str, str]) -> None:
    url, digest = address
    far = url.replace("http://", "http://bob:hunter2@")
    table = Table.read(f"{far}?token=s3cret#sha256={digest}")
    assert table[0]["lineage"]["source"] == f"{url}?token=***#sha256={digest}"  # type: ignore
    for end in ("", f"#sha256={'0' * 64}"):
        for name in (f"{far}?token=s3cret", f"{far}.no?token=s3cret"):
            with pytest.raises(InputError) as error:
                Table.read(name + end)
            assert url in str(error.value)
            assert "hunter2" not in str(error.value) and "s3cret" not in str(error.value)


def test_what_a_method_makes_has_the_licence_of_its_rows(tiny_path: Path, tmp_path: Path) -> None:
    told = [{"lineage": {"licence": name}} for name in ("MIT", "cc-by-nc-4.0")]
    rows = [{"prompt": f"p{i}", "completion": "a b\n\nc", **told[i]} for i in range(2)]
    reward: dict[str, object] = {"use": "max_words", "n": 3}
    with use(Context(folder=tmp_path / "plain")):
        made = methods["step_labels"](
            Model.open(tiny_path), Table("example", rows), rollouts=0, reward=reward
        )
    assert isinstance(made, Table) and len(made) == 2
    assert {r["lineage"]["licence"] for r in made} == {"cc-by-nc-4.0"}  # type: ignore[index]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    plan = Plan("r", folder=tmp_path)
    plan.model("m", str(tiny_path))
    plan.step("labels", "synthesize/step_labels", model="m", data="t.jsonl", rollouts=0,
              reward=reward)  # fmt: skip
    found = pipeline.run(plan, tmp_path / "runs", store=Store(tmp_path / "store"))
    kept = found.results["labels"]
    assert isinstance(kept, Table) and datasets.licence_of([kept]) == "cc-by-nc-4.0"


def test_rows_that_had_no_licence_and_were_kept_get_none() -> None:
    private = {"prompt": "a", "lineage": {"licence": "cc-by-nc-4.0"}}
    data = Table(
        "prompt", [private, {"prompt": "b"}, {"prompt": "c", "lineage": {"licence": "MIT"}}]
    )
    made = Table("prompt", [data[1], data[2], {"prompt": "new"}, {"prompt": "a"}])
    found = datasets.licensed(made, {"data": {"role": data}, "model": None})
    assert isinstance(found, Table)
    licences = [r["lineage"].get("licence") for r in found]  # type: ignore[attr-defined]
    assert licences == [None, "MIT", "cc-by-nc-4.0", "cc-by-nc-4.0"]
    assert [r["id"] for r in found] == [r["id"] for r in made]
    free = data.take([1])
    assert datasets.licensed(made, {"data": free}) is made and datasets.licensed(3, {}) == 3
