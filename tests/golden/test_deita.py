"""Deita's selection: its exact properties, and the filter by hand."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from truing.context import Context, use
from truing.core.chat import prompt_ids
from truing.core.passes import scoring
from truing.errors import InputError
from truing.method import get_component, methods
from truing.models import Model
from truing.select import embedders, scorers
from truing.select.deita import deita, dialogue, repr_filter, row_score, turns
from truing.select.scorers import expected_score_of
from truing.tables import Row, Table

RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=60).tolist()
VECTORS = RNG.normal(size=(60, 4)).astype(np.float32)


def test_filter_by_hand() -> None:
    vectors = np.array([[1, 0], [0, 1], [1, 0.01], [-1, 0]], dtype=np.float32)
    # order by score: 2, 0, 1, 3; row 0 resembles row 2
    assert repr_filter([3, 2, 4, 1], vectors, m=4, tau=0.9) == [2, 1, 3]


def test_a_dropped_row_drops_nothing() -> None:
    # 1 resembles 0 and 2 resembles 1, but 2 does not resemble 0: sequential rule keeps 0 and 2
    angles = np.radians([0, 20, 40])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert repr_filter([3, 2, 1], vectors, m=3, tau=float(np.cos(np.radians(30)))) == [0, 2]


def test_tau_above_one_keeps_the_top_m() -> None:
    doubled = np.concatenate([VECTORS, VECTORS])
    top = np.argsort(-np.array(SCORES * 2), kind="stable")[:10].tolist()
    assert repr_filter(SCORES * 2, doubled, m=10, tau=1.001) == top


def test_tau_below_minus_one_keeps_the_first() -> None:
    assert repr_filter(SCORES, VECTORS, m=10, tau=-1.001) == [int(np.argmax(SCORES))]


def test_selected_are_pairwise_different_and_a_prefix() -> None:
    chosen = repr_filter(SCORES, VECTORS, m=20, tau=0.7)
    unit = VECTORS[chosen] / np.linalg.norm(VECTORS[chosen], axis=1, keepdims=True)
    cosines = unit @ unit.T - 2 * np.eye(len(chosen))
    assert cosines.max() <= 0.7 + 1e-6
    for m in (1, 5, 11):
        assert repr_filter(SCORES, VECTORS, m=m, tau=0.7) == chosen[:m]


def test_scale_of_scores_and_vectors_does_not_matter() -> None:
    chosen = repr_filter(SCORES, VECTORS, m=20, tau=0.7)
    assert repr_filter([4.0 * s for s in SCORES], VECTORS * 8.0, m=20, tau=0.7) == chosen


def test_ties_go_to_the_earlier_row() -> None:
    assert repr_filter([1.0] * 60, VECTORS, m=3, tau=1.1) == [0, 1, 2]


def test_row_score() -> None:
    assert row_score([2.0, 3.0], [4.0, 5.0]) == 23.0
    assert row_score([2.0, 3.0], [4.0, 5.0], mean=True) == 11.5


def test_expected_score() -> None:
    uniform = torch.zeros(1, 6)
    assert expected_score_of(uniform).item() == pytest.approx(3.5)
    for digit in range(6):
        one_hot = torch.full((1, 6), -1e4)
        one_hot[0, digit] = 0.0
        assert expected_score_of(one_hot).item() == pytest.approx(digit + 1)
    z = torch.log(torch.tensor([[0.5, 0.25, 0.25, 0, 0, 0]]) + 1e-12)
    assert expected_score_of(z).item() == pytest.approx(0.5 + 0.5 + 0.75, abs=1e-5)


def test_turns_without_a_reply() -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert turns({"messages": messages}) == [("a", "b"), ("c", "")]


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]


ALL, OTHER = said("a", "b", "c", "d"), said("a", "b", "c", "no")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": ALL},
        {"prompt": ALL[:3], "completion": "d"},
        {"prompt": ALL[:3], "completion": ALL[3:]},
        {"prompt": ALL[:3], "chosen": "d", "rejected": "no"},
        {"prompt": ALL[:3], "chosen": ALL[3:], "rejected": OTHER[3:]},
        {"prompt": "a", "chosen": ALL[1:], "rejected": OTHER[1:]},
        {"prompt": "a", "chosen": ALL, "rejected": OTHER},  # both sides repeat the prompt
        {"chosen": ALL, "rejected": OTHER},
    ],
    ids=lambda row: "-".join(f"{name}:{type(value).__name__}" for name, value in row.items()),
)
def test_a_dialogue_has_the_same_turns_in_every_form(row: Row) -> None:
    assert dialogue(row) == ALL
    assert turns(row) == [("a", "b"), ("c", "d")]
    words = {"use": "length", "of": "completion"}
    (made,) = deita(Table("", [row]), complexity={"use": "constant"}, quality=words,
                    embedder={"use": "exact"})  # fmt: skip
    assert made["quality_scores"] == [1.0, 1.0] and made["final_score"] == 2.0


def test_method_with_scorers_by_name() -> None:
    rows = [{"prompt": "a b", "completion": "w " * n} for n in (3, 9, 5, 9)]
    data = Table("example", rows)
    constant = {"use": "constant"}
    picked = deita(data, m=2, complexity=constant, embedder={"use": "exact"}, tau=0.99)
    assert [len(str(r["completion"]).split()) for r in picked] == [9, 5]
    assert picked[0]["final_score"] == 9.0
    from_column = deita(
        Table("example", [r | {"s": float(-i)} for i, r in enumerate(rows)]),
        m=1,
        complexity=constant,
        quality={"use": "column", "name": "s"},
        embedder={"use": "exact"},
    )
    assert from_column[0]["completion"] == rows[0]["completion"]


# Scorers that ask a model: as many rows at once as the plain loop has one by one.

ROWS: list[Row] = [
    {"prompt": f"What is {i} and {'why ' * (i % 5)}?", "completion": f"It is {i}. " * (1 + i % 3)}
    for i in range(70)
]
ROWS[3] = {"prompt": "Say nothing", "completion": ""}
SCORERS: list[dict[str, object]] = [
    {"use": "expected_score", "of": "complexity", "max_length": 60},
    {"use": "expected_score", "of": "quality", "max_length": 200},
    {"use": "perplexity", "of": "completion", "sign": "high", "max_length": 24},
    {"use": "perplexity", "of": "prompt", "sign": "low"},
]


@pytest.fixture
def model(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


def logits_of(model: Model, ids: list[int]) -> Tensor:
    """[T, V] of one row by itself, as transformers computes it."""
    with torch.no_grad():
        return model.load_module().module(torch.tensor([ids]), use_cache=False).logits[0]


def plain(model: Model, row: Row, ref: dict[str, object]) -> float:
    """A scorer's number of one row, by hand."""
    tokenizer, of = model.load_module().tokenizer, str(ref["of"])
    encode: Callable[[str], list[int]] = lambda t: tokenizer.encode(t, add_special_tokens=False)  # noqa: E731
    most = int(str(ref.get("max_length", 512)))
    if ref["use"] == "expected_score":
        ask = {
            "complexity": "You rate the complexity of questions.\n#Question#: {prompt}\n"
            "##Complexity: ",
            "quality": "You rate the quality of responses to questions.\n#Question#: {prompt}\n"
            "#Response#: {completion}\n##Quality: ",
        }[of].format(**row)
        digits = [encode(ask + d)[-1] for d in "123456"]
        p = logits_of(model, encode(ask)[-most:])[-1][digits].softmax(0)
        return sum(k * float(p_k) for k, p_k in enumerate(p, 1))
    tail = encode(str(row[of]))[:most]
    if not tail:
        return 0.0
    head = [tokenizer.bos_token_id]
    if of == "completion":
        head = prompt_ids(tokenizer, str(row["prompt"]))[-most:]
    logp = logits_of(model, [*head, *tail])[len(head) - 1 : -1].log_softmax(1)
    nll = -sum(float(logp[i, t]) for i, t in enumerate(tail)) / len(tail)
    return math.exp(nll if ref["sign"] == "high" else -nll)


@pytest.mark.parametrize("ref", SCORERS, ids=lambda r: f"{r['use']}-{r['of']}")
def test_scores_are_those_of_the_plain_loop(
    ref: dict[str, object], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    measure = scoring.measure

    def counted(*args: object, **named: object) -> dict[str, Tensor]:
        passes.append(1)
        return measure(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(scoring, "measure", counted)
    found = get_component("scorer", ref)(list(ROWS), model=model)
    want = [plain(model, row, ref) for row in ROWS]
    assert found == pytest.approx(want, rel=1e-4)
    assert len({f"{v:.4g}" for v in want}) > 10
    assert 0 < len(passes) < len(ROWS) / 2


def test_texts_without_a_token_to_score_are_the_worst(model: Model) -> None:
    for sign in ("high", "low"):
        found = scorers.perplexity(ROWS[3:5], model, sign=sign)  # type: ignore[arg-type]
        assert found[0] == 0.0 < found[1]


def test_without_a_start_token_the_first_one_is_read_alone(tiny_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "startless"
    shutil.copytree(tiny_path, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("bos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    startless = Model.open(folder)
    tokenizer = startless.load_module().tokenizer
    assert tokenizer.bos_token_id is None
    ids = tokenizer.encode("Why so?", add_special_tokens=False)
    logp = logits_of(startless, ids)[:-1].log_softmax(1)
    want = math.exp(-sum(float(logp[i, t]) for i, t in enumerate(ids[1:])) / (len(ids) - 1))
    rows: list[Row] = [{"prompt": "Why so?"}, {"prompt": "W"}]
    found = scorers.perplexity(rows, startless, of="prompt", sign="high")
    assert found == pytest.approx([want, 0.0], rel=1e-4)


def test_a_row_is_encoded_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, encode = list[str](), scorers.encode

    def counted(tokenizer: object, text: str, **how: object) -> object:
        seen.append(text)
        return encode(tokenizer, text, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(scorers, "encode", counted)
    scorers.expected_score(ROWS[:9], model, of="quality")
    assert sum("#Question#" in text for text in seen) == 9


def test_texts_begin_as_their_tokenizer_begins_them(tiny_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "begins"
    shutil.copytree(tiny_path, folder)
    core = json.loads((folder / "tokenizer.json").read_text())
    start = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    core["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            start,
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {
            "<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(core))
    begins = Model.open(folder)
    tokenizer = begins.load_module().tokenizer
    ask = "You rate the complexity of questions.\n#Question#: Why?\n##Complexity: "
    ids = tokenizer.encode(ask)  # with the beginning, as the released scorer encodes it
    assert ids[0] == 1 and 1 not in ids[1:]
    digits = [tokenizer.encode(d, add_special_tokens=False)[0] for d in "123456"]
    for most, read in ((512, ids), (20, [1, *ids[-19:]])):
        p = logits_of(begins, read)[-1][digits].softmax(0)
        want = sum(k * float(p_k) for k, p_k in enumerate(p, 1))
        found = scorers.expected_score([{"prompt": "Why?"}], begins, max_length=most)
        assert found == pytest.approx([want], rel=1e-4)


def test_unreadable_scores_are_counted(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorers, "digit_ids", lambda loaded, text: None)
    with use(Context()) as context:
        assert scorers.expected_score(ROWS[:3], model) == [3.0, 3.0, 3.0]
        assert context.metrics == [{"scorer": "expected_score", "of": "complexity", "unknown": 3}]


class Stop(BaseException):
    """Stands for the death of the process."""


@pytest.mark.parametrize("ref", [*SCORERS[:3], {"use": "last_state"}], ids=lambda r: str(r["use"]))
def test_a_stopped_step_goes_on_where_it_was(
    ref: dict[str, object], model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    by_tree = scoring.by_tree

    def counted(*args: object) -> object:
        names.append("chunk")
        return by_tree(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(scorers, "by_tree", counted)
    monkeypatch.setattr(embedders, "by_tree", counted)
    kind = "embedder" if ref["use"] == "last_state" else "scorer"
    rows = [r | {"messages": [{"role": "user", "content": r["prompt"]}]} for r in ROWS]

    def run(folder: str, stop: int = 0) -> np.ndarray:
        def told(done: int, total: int, label: str) -> None:
            if stop and done >= stop:
                raise Stop

        with use(Context(folder=tmp_path / folder, on_progress=told)):
            return np.asarray(get_component(kind, ref)(rows, model=model))

    whole = run("whole")
    assert len(names) == 3  # 70 rows, 32 at a time
    with pytest.raises(Stop):
        run("cut", stop=33)
    names.clear()
    assert np.array_equal(run("cut"), whole) and len(names) == 1
    names.clear()
    assert np.array_equal(run("cut"), whole) and not names


# Embedders


def test_last_states_are_the_models_own(model: Model) -> None:
    data = Table("example", [{**r, "id": str(i)} for i, r in enumerate(ROWS[:5])])
    loaded, asked = model.load_module(), "<|im_start|>user\n{}<|im_end|>\n"
    said = "<|im_start|>assistant\n{}<|im_end|>\n"
    want: list[Tensor] = []
    for row in data:
        text = asked.format(row["prompt"]) + said.format(row["completion"])
        ids = loaded.tokenizer.encode(text, add_special_tokens=False)[-50:]
        with torch.no_grad():
            out = loaded.module(torch.tensor([ids]), output_hidden_states=True)
        want.append(out.hidden_states[-1][0, -1])
    seen: list[np.ndarray] = []

    def spy(rows: list[Row], model: Model) -> np.ndarray:
        ref = {"use": "last_state", "max_length": 50, "centre": bool(seen)}
        seen.append(get_component("embedder", ref)(rows, model=model))  # type: ignore[arg-type]
        return seen[-1]

    for _ in range(2):
        methods["deita"](data, model, m=5, quality={"use": "constant"}, embedder=spy,
                         complexity={"use": "length", "of": "prompt"})  # fmt: skip
    plain_ND = torch.stack(want)
    assert np.allclose(seen[0], plain_ND, atol=1e-4)
    assert np.allclose(seen[1], plain_ND - plain_ND.mean(0), atol=1e-4)
    with pytest.raises(InputError, match="needs a model"):
        deita(data, embedder={"use": "last_state"})


def test_last_states_see_the_whole_dialogue(model: Model) -> None:
    """System messages and earlier turns count, and nobody speaks who has not spoken."""
    said = [("system", "Be curt."), ("user", "Hi"), ("assistant", "Yes."), ("user", "Why?")]
    messages = [{"role": role, "content": text} for role, text in said]
    other = [{"role": "system", "content": "Be a pirate."}, *messages[1:]]
    rows: list[Row] = [
        {"messages": messages},
        {"messages": other},
        {"prompt": messages, "completion": "So."},
        {"prompt": messages, "chosen": "So.", "rejected": "No."},
        {"prompt": "Why?"},
    ]
    ends = ["", "", *["<|im_start|>assistant\nSo.<|im_end|>\n"] * 2, ""]
    seen: list[np.ndarray] = []

    def spy(rows: list[Row], model: Model) -> np.ndarray:
        seen.append(get_component("embedder", {"use": "last_state"})(rows, model=model))  # type: ignore[arg-type]
        return seen[-1]

    loaded, alike = model.load_module(), {"use": "constant"}
    for row, end in zip(rows, ends):
        asked = row.get("messages", row.get("prompt"))
        turns_of = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in turns_of)  # type: ignore[union-attr]
        ids = loaded.tokenizer.encode(text + end, add_special_tokens=False)
        with torch.no_grad():
            out = loaded.module(torch.tensor([ids]), output_hidden_states=True)
        methods["deita"]([row], model, complexity=alike, quality=alike, embedder=spy)
        assert np.allclose(seen[-1][0], out.hidden_states[-1][0, -1], atol=1e-4), row
    both = methods["deita"](rows[:2], model, tau=0.99999, complexity=alike, quality=alike,
                            embedder={"use": "last_state"})  # fmt: skip
    assert len(both) == 2  # type: ignore[arg-type]


def test_exact_vectors_are_as_wide_for_any_number_of_rows() -> None:
    texts = [f"text {i}" for i in range(600)]
    twice: list[Row] = [{"text": t} for t in [*texts, *(f" {t.upper()} " for t in texts)]]
    found = np.asarray(get_component("embedder", {"use": "exact"})(twice), np.float64)
    assert found.shape == (1200, 256)
    assert np.array_equal(found[:600], found[600:])
    cosines = found[:600] @ found[:600].T
    assert np.array_equal(np.diag(cosines), np.ones(600))
    others = cosines[~np.eye(600, dtype=bool)]
    assert abs(others.mean()) < 1e-3 and 0.061 < others.std() < 0.064  # 1/16 is 0.0625
    assert np.abs(others).max() < 0.4
    alone = np.asarray(get_component("embedder", {"use": "exact"})([twice[7]]))
    assert np.array_equal(alone[0], found[7])  # the text alone decides


def test_sentence_vectors_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def embed(texts: list[str]) -> np.ndarray:
        asked.append(list(texts))
        return np.eye(4, dtype=np.float32)[[len(t) % 4 for t in texts]]

    monkeypatch.setattr("truing.core.embed.embed", embed)
    monkeypatch.setattr("truing.core.embed.TEXTS", 3)
    data = Table("example", [{"prompt": "a" * (1 + i), "completion": "b"} for i in range(5)])
    chosen = deita(data, m=9, tau=0.5)
    assert asked == [["a\nb", "aa\nb", "aaa\nb"], ["aaaa\nb", "aaaaa\nb"]]
    assert [len(str(r["prompt"])) for r in chosen] == [1, 2, 3, 4]  # the fifth is as the first


def test_an_empty_table_is_refused() -> None:
    data = Table("example", [{"prompt": "a", "completion": "b"}]).take([])
    with pytest.raises(InputError, match="input 'data' has no rows: table is empty") as error:
        methods["deita"](data)
    assert error.value.where == "select/deita" and error.value.fix == "Give a table with rows"


def test_own_embedders() -> None:
    data = Table("example", [{"prompt": p, "completion": "x"} for p in ("b", "a", "ba", "ab")])
    plain = {"complexity": {"use": "constant"}, "quality": {"use": "constant"}}

    def first_letter(rows: list[Row]) -> list[list[float]]:
        return [[1.0, 0.0] if str(r["text"])[0] == "a" else [0.0, 1.0] for r in rows]

    chosen = methods["deita"](data, embedder=first_letter, **plain)
    assert isinstance(chosen, Table) and [r["prompt"] for r in chosen] == ["b", "a"]
    for bad in (lambda rows: [[1.0]], lambda rows: [[1.0], [1.0, 2.0], [1.0], [1.0]],
                lambda rows: [[float("nan")]] * 4, lambda rows: [1.0] * 4):  # fmt: skip
        with pytest.raises(InputError, match="one vector of finite numbers a row"):
            methods["deita"](data, embedder=bad, **plain)
    with pytest.raises(InputError, match="sentence"):
        methods["deita"](data, embedder={"use": "sentense"}, **plain)
