"""Models and data of the Hugging Face hub, from a server of our own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import struct
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file

from truing.core.modelfiles import fetch, lora
from truing.core.modelfiles.weight_files import INDEX, weight_files
from truing.core.weights import write
from truing.errors import InputError
from truing.models import Model
from truing.tables import Table

NAME, COMMIT, EARLIER = "some/model", "c" * 40, "e" * 40
TOKENS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class Hub(ThreadingHTTPServer):
    """As much of the hub as a snapshot needs: one repository, its files at one commit or more.

    Its files are a model's, or with `sort` "datasets" those of a data set. With `fault` it refuses
    everything, by the name that the hub has for the reason.
    """

    def __init__(self, folder: Path, sort: str = "models") -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.folder, self.sort = folder, sort
        self.asked: list[str] = []
        self.commits = {"main": COMMIT}
        self.folders: dict[str, Path] = {}  # of commits with other files than `folder`
        self.fault = ""
        self.breaks = False  # in the middle of each file


class Answers(BaseHTTPRequestHandler):
    """Answers of the hub."""

    @property
    def hub(self) -> Hub:
        """The server that this answers for."""
        assert isinstance(self.server, Hub)
        return self.server

    def _answer(self, body: bytes, **headers: str) -> None:
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _break(self, body: bytes) -> None:
        """Half of a file, and then the connection is reset."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        time.sleep(0.1)  # for the client to take it
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.asked.append(path)
        sort, (at, commit) = self.hub.sort, self._commit(path)
        folder = self.hub.folders.get(commit, self.hub.folder)
        if self.hub.fault or not commit:
            self.send_response(401 if self.hub.fault else 404)
            self.send_header("X-Error-Code", self.hub.fault or "RevisionNotFound")
            self.end_headers()
            return
        found = [p for p in folder.rglob("*") if p.is_file()]
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}
        place = f"/{'' if sort == 'models' else sort + '/'}{NAME}/resolve/{commit}/"
        if path in (f"/api/{sort}/{NAME}", f"/api/{sort}/{NAME}/revision/{at}"):
            told = {"id": NAME, "sha": commit, "siblings": [{"rfilename": n} for n in files]}
            self._answer(json.dumps(told).encode())
        elif path == f"/api/{sort}/{NAME}/tree/{commit}":
            listed = [
                {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for n, b in files.items()
            ]
            self._answer(json.dumps(listed).encode(), Content_Type="application/json")
        elif path.startswith(place) and path.removeprefix(place) in files:
            body = files[path.removeprefix(place)]
            if self.hub.breaks and self.command == "GET":
                self._break(body)
                return
            tag = hashlib.sha1(body).hexdigest()
            self._answer(body, ETag=f'"{tag}"', X_Repo_Commit=commit)
        else:
            self.send_error(404)

    def _commit(self, path: str) -> tuple[str, str]:
        """What a request calls the commit, and the commit; "" where there is none."""
        commits = self.hub.commits
        at = (re.findall(r"/(?:revision|tree|resolve)/([^/]+)", path) or ["main"])[0]
        return at, at if at in commits.values() else commits.get(unquote(at), "")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def point(monkeypatch: pytest.MonkeyPatch, cache: Path, port: int) -> None:
    address = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


@contextlib.contextmanager
def running(server: Hub) -> Iterator[Hub]:
    """A hub that answers inside the block."""
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def hub(tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that can be reached."""
    with running(Hub(tiny_path)) as server:
        point(monkeypatch, tmp_path / "cache", server.server_address[1])
        yield server


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that cannot be reached."""
    point(monkeypatch, tmp_path / "cache", 9)


def cached(tmp_path: Path, source: Path, names: tuple[str, ...] = ()) -> Path:
    """Some files of a folder in the hub's cache, as transformers leaves them; () for all."""
    repo = tmp_path / "cache" / "models--some--model"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    for path in source.iterdir():
        if not names or path.name in names:
            shutil.copy(path, snapshot / path.name)
    return snapshot


def test_a_tokenizer_alone_is_completed(hub: Hub, tmp_path: Path, tiny_path: Path) -> None:
    """What AutoTokenizer.from_pretrained leaves is no model, and was taken for one."""
    snapshot = cached(tmp_path, tiny_path, TOKENS)
    model = Model.open(NAME)
    assert model.folder.resolve() == snapshot.resolve() and model.licence == "apache-2.0"
    assert next(model.load_module().module.parameters()).shape == (259, 128)
    wanted = f"/{NAME}/resolve/{COMMIT}/model.safetensors"
    assert wanted in hub.asked
    hub.asked.clear()
    assert fetch.from_hub(NAME) == model.folder and not hub.asked


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("names", "lacks"),
    [
        (TOKENS, "its configuration"),
        ((*TOKENS, "config.json"), "all of its weights"),
        ((*TOKENS, "config.json", "model-00001-of-00003.safetensors"), "the index of its weights"),
        (
            (*TOKENS, "config.json", INDEX, "model-00001-of-00003.safetensors"),
            "all of its weights",
        ),
    ],
)
def test_a_part_is_no_model_without_a_network(
    names: tuple[str, ...], lacks: str, tmp_path: Path, tiny_path: Path
) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(tiny_path, whole)
    write(whole, load_file(tiny_path / "model.safetensors").items(), shard_bytes=2**20)
    (whole / "model.safetensors").unlink()
    assert len(list(whole.glob("*.safetensors"))) == 3
    snapshot = cached(tmp_path, whole, names)
    with pytest.raises(InputError, match="only a part") as caught:
        fetch.from_hub(NAME)
    said = str(caught.value)
    assert f"without {lacks}" in said and str(snapshot) in said and "network" in said


@pytest.mark.usefixtures("offline")
def test_a_whole_model_needs_no_network(tmp_path: Path, tiny_path: Path) -> None:
    snapshot = cached(tmp_path, tiny_path)
    assert fetch.from_hub(NAME).resolve() == snapshot.resolve()
    for name in TOKENS:
        (snapshot / name).unlink()
    # It may be one without a tokenizer.
    assert fetch.from_hub(NAME).resolve() == snapshot.resolve()


def test_a_revision_of_a_model(hub: Hub, tmp_path: Path, tiny_path: Path) -> None:
    earlier = tmp_path / "earlier"
    shutil.copytree(tiny_path, earlier)
    (earlier / "chat_template.jinja").write_text("{{ messages }}")
    hub.commits |= {"refs/pr/1": EARLIER, "v1.0": EARLIER}
    hub.folders[EARLIER] = earlier
    newest, old = Model.open(NAME), Model.open(f"{NAME}@v1.0")
    assert (newest.folder.name, old.folder.name) == (COMMIT, EARLIER)
    assert old.key == Model.open(earlier).key != newest.key == Model.open(tiny_path).key
    assert Model.open(f"{NAME}@refs/pr/1").folder == Model.open(f"{NAME}@{EARLIER}").folder
    with pytest.raises(InputError, match=r"no revision 'v9'.*branches, tags and commits"):
        Model.open(f"{NAME}@v9")


@pytest.mark.parametrize(
    ("fault", "told", "fix"),
    [
        ("GatedRepo", "it is gated", "Ask for access at http.*some/model, then set HF_TOKEN"),
        ("RepoNotFound", "the hub has none of that name", "spelling; if an account.*HF_TOKEN"),
    ],
)
def test_what_the_hub_keeps_from_us_names_the_way_to_it(
    hub: Hub, data_hub: Hub, fault: str, told: str, fix: str, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    hub.fault = data_hub.fault = fault
    for server, read in ((hub, Model.open), (data_hub, Table.read)):
        point(monkeypatch, tmp_path / "cache", server.server_address[1])
        with pytest.raises(InputError, match=rf"{told}.*{fix}") as caught:
            read(NAME if server is hub else f"hub:{NAME}/test")
        assert "Request ID" not in str(caught.value)


def test_of_two_copies_of_the_weights_one_is_fetched(
    hub: Hub, tmp_path: Path, tiny_path: Path
) -> None:
    twice = tmp_path / "twice"
    shutil.copytree(tiny_path, twice)
    shutil.copy(tiny_path / "model.safetensors", twice / "consolidated.safetensors")
    hub.folder = twice
    assert Model.open(NAME).key == Model.open(twice).key == Model.open(tiny_path).key
    assert not any("consolidated" in path and "resolve" in path for path in hub.asked)
    assert len(weight_files(twice)) == 1
    (twice / "model.safetensors").rename(twice / "model-a.safetensors")  # of another name: no copy
    assert len(weight_files(twice)) == 2


def test_an_adapter_opens_on_its_base(hub: Hub, tmp_path: Path, tiny_path: Path) -> None:
    base = Model.open(tiny_path)
    made = lora.attach(base.load_module("float32", "cpu", fresh=True).module, 2)
    made.save(tmp_path / "a", base=str(tiny_path))
    (tmp_path / "a" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    hub.folder = tmp_path / "a"
    model = Model.open(NAME)
    assert (model.folder, model.name, model.licence) == (tiny_path, NAME, "cc-by-nc-4.0")
    assert model.key == Model.open(tmp_path / "a").key != base.key
    hub.asked.clear()
    assert Model.open(NAME).key == model.key and not hub.asked


def test_what_the_hub_s_cache_has_is_linked_and_not_copied(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "home"))
    model = Model.open(NAME)
    saved = model.save(tmp_path / "home" / "store" / "m")
    weights = model.folder / "model.safetensors"
    assert (saved / "base" / "model.safetensors").samefile(weights.resolve())
    # A folder that its owner may write to again is copied.
    own = tmp_path / "own"
    shutil.copytree(model.folder, own)
    (own / "chat_template.jinja").write_text("{{ messages }}")
    kept = Model.open(own).save(tmp_path / "home" / "store" / "o")
    assert not (kept / "base" / "model.safetensors").samefile(own / "model.safetensors")


def test_a_revision_of_a_set(data_hub: Hub, tmp_path: Path) -> None:
    earlier = tmp_path / "earlier"
    (earlier / "data").mkdir(parents=True)
    _write(earlier, "data/test.jsonl")
    data_hub.commits["refs/convert/parquet"] = EARLIER
    data_hub.folders[EARLIER] = earlier
    old = Table.read(f"hub:{NAME}@refs%2Fconvert%2Fparquet/test")
    assert [r["prompt"] for r in old] == ["data/test.jsonl"]
    assert [r["prompt"] for r in Table.read(f"hub:{NAME}/test")] == ["q30", "q31"]
    same = Table.read(f"hub:{NAME}@{EARLIER}/test")
    assert [r["prompt"] for r in same] == ["data/test.jsonl"] and same.key != old.key
    with pytest.raises(InputError, match="no revision 'v9'"):
        Table.read(f"hub:{NAME}@v9/test")


@pytest.fixture
def data_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a set of two splits, one in three shards, and a file that is no table."""
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    (folder / "picture.png").write_bytes(b"none")
    names = [f"data/train_sft-0000{i}-of-00003.jsonl" for i in range(3)] + ["data/test.jsonl"]
    for i, name in enumerate(names):
        rows = [{"prompt": f"q{i}{k}", "completion": "a"} for k in range(2)]
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    with running(Hub(folder, "datasets")) as server:
        point(monkeypatch, tmp_path / "cache", server.server_address[1])
        yield server


TRAIN = ["q00", "q01", "q10", "q11", "q20", "q21"]


@pytest.mark.parametrize(
    ("name", "prompts"),
    [("train_sft", TRAIN), ("data/train_sft", TRAIN), ("data/train*", TRAIN),
     ("data/train_sft-00001-of-00003.jsonl", TRAIN[2:4]), ("test", ["q30", "q31"])],
)  # fmt: skip
def test_a_split_is_one_table(data_hub: Hub, name: str, prompts: list[str]) -> None:
    table = Table.read(f"hub:{NAME}/{name}")
    assert [r["prompt"] for r in table] == prompts
    assert all(r["lineage"]["licence"] == "cc-by-4.0" for r in table)  # type: ignore[index]
    fetched = [a for a in data_hub.asked if "/resolve/" in a and a.endswith(".jsonl")]
    wanted = {"test.jsonl"} if name == "test" else {p for p in map(_last, fetched) if "train" in p}
    assert set(map(_last, fetched)) == wanted  # nothing else was downloaded
    assert len(Table.read(f"hub:{NAME}/{name}", limit=1)) == 1
    asked = Table.read(f"hub:{NAME}/{name}?question=prompt&prompt=completion")
    assert [r["question"] for r in asked] == prompts and asked.kind == "prompt"


def _last(path: str) -> str:
    return path.rpartition("/")[2]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("", r"several tables.*data/train_sft.jsonl \(3 files\)"),
        ("/valid", "no file or split 'valid'"),
    ],
)
def test_which_table_is_asked_before_anything_is_downloaded(
    data_hub: Hub, name: str, told: str
) -> None:
    with pytest.raises(InputError, match=told) as raised:
        Table.read(f"hub:{NAME}{name}")
    assert raised.value.fix.startswith(f"Say which: hub:{NAME}/")
    assert not any("/resolve/" in a for a in data_hub.asked)


def test_a_connection_that_breaks_is_told(data_hub: Hub) -> None:
    data_hub.breaks = True
    with pytest.raises(InputError, match=r"could not be had.*network"):
        Table.read(f"hub:{NAME}/test")


def _write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_text(json.dumps({"prompt": name, "completion": "a"}) + "\n")


def test_a_list_of_rows_is_a_table_where_it_is_named_or_alone(data_hub: Hub) -> None:
    folder = data_hub.folder
    (folder / "dataset_infos.json").write_text("{}")
    (folder / "data" / "more.json").write_text(json.dumps([{"prompt": "m", "completion": "a"}]))
    assert [r["prompt"] for r in Table.read(f"hub:{NAME}/more")] == ["m"]
    assert [r["prompt"] for r in Table.read(f"hub:{NAME}/data/t*")] == [*["q30", "q31"], *TRAIN]
    (folder / "data" / "test.json").write_text("[]")
    assert [r["prompt"] for r in Table.read(f"hub:{NAME}/test")] == ["q30", "q31"]
    for file in (folder / "data").glob("t*"):
        file.unlink()
    assert [r["prompt"] for r in Table.read(f"hub:{NAME}")] == ["m"]


def test_files_without_a_shard_s_number_are_tables_of_their_own(data_hub: Hub) -> None:
    for file in (data_hub.folder / "data").iterdir():
        file.unlink()
    _write(data_hub.folder, "v1.0.jsonl", "v1.1.jsonl", "train.jsonl", "train.csv")
    assert [r["prompt"] for r in Table.read(f"hub:{NAME}/v1.0")] == ["v1.0.jsonl"]
    assert [r["prompt"] for r in Table.read(f"hub:{NAME}/train.jsonl")] == ["train.jsonl"]
    with pytest.raises(InputError, match=r"several tables.*train.csv.*train.jsonl"):
        Table.read(f"hub:{NAME}/train")


def test_a_table_of_which_shards_are_missing_is_refused(
    data_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Table.read(f"hub:{NAME}/data/train_sft-00000-of-00003.jsonl")
    point(monkeypatch, tmp_path / "cache", 9)
    with pytest.raises(InputError, match="1 of 3 shards of data/train_sft"):
        Table.read(f"hub:{NAME}/train_sft")
    with pytest.raises(InputError, match="may be a part"):
        Table.read(f"hub:{NAME}")


def test_faults_of_a_shard_name_it(data_hub: Hub) -> None:
    table = Table.read(f"hub:{NAME}/train_sft")
    assert table.place(3).endswith("train_sft-00001-of-00003.jsonl row 2")


def test_shards_of_different_kinds_are_refused(data_hub: Hub) -> None:
    shard = data_hub.folder / "data" / "train_sft-00002-of-00003.jsonl"
    shard.write_text(json.dumps({"text": "other"}) + "\n")
    with pytest.raises(
        InputError, match=r"00002-of-00003.jsonl.*kind 'text', those of .*'example'"
    ):
        Table.read(f"hub:{NAME}/train_sft")


def test_data_in_the_cache_need_no_network(
    data_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Table.read(f"hub:{NAME}/test")
    point(monkeypatch, tmp_path / "cache", 9)
    assert [r["prompt"] for r in Table.read(f"hub:{NAME}/test")] == [r["prompt"] for r in first]
    with pytest.raises(InputError, match="no file or split 'train_sft'"):
        Table.read(f"hub:{NAME}/train_sft")  # not in the cache
