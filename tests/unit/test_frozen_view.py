"""Prefix, rewriter and edits act wherever log-probabilities are taken, in training too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from truing.changes import Change, Decoder, Edits, Prefix, Rewriter
from truing.context import Context, use
from truing.core import generate, hooks
from truing.core.chat import Prompt, completion_ids, prompt_ids
from truing.core.judging.rewards import score_model
from truing.core.passes.scoring import ScoreHead, answer_logps, step_scores
from truing.core.tiny import tiny_folder
from truing.errors import InputError
from truing.evaluate.preference import preference
from truing.method import methods
from truing.models import Model
from truing.select.scorers import perplexity
from truing.tables import Row, Table

SYSTEM = [{"role": "system", "content": "Answer in capitals."}]
PREFIX = Prefix(SYSTEM)
WORDS = ("lime", "oak", "rain", "stone")
PAIRS = Table(
    "pair", [{"prompt": f"say {w}", "chosen": w.upper(), "rejected": f"{w}, no"} for w in WORDS]
)
ASKED: list[Row] = [
    {"prompt": "say a", "completion": "A"},
    {"prompt": "say a", "completion": "no, a"},
    {"prompt": [{"role": "user", "content": "say b"}], "completion": "B"},
]


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Of the same tokens and other weights."""
    return Model.open(tiny_folder(tmp_path_factory.mktemp("other"), 7))


@pytest.fixture
def edits(tmp_path: Path) -> Edits:
    vector = torch.randn(128, generator=torch.Generator().manual_seed(2))
    return Edits(hooks.save(tmp_path / "e.safetensors", [hooks.Edit("layers.2.residual", vector)]))


@pytest.fixture
def rewriter(monkeypatch: pytest.MonkeyPatch) -> Rewriter:
    """Puts a word before the prompt."""

    def shout(prompts: list[Prompt], model: Model, held: Mapping[str, object]) -> list[Prompt]:
        assert not model.run_time_changes or [c.kind for c in model.run_time_changes] == ["edits"]
        return [f"LOUD {p}" if isinstance(p, str) else p for p in prompts]

    monkeypatch.setattr(generate, "get_component", lambda kind, ref: shout)
    return Rewriter("shout")


def logp(model: Model, prompt: Prompt, answer: str, laid: Sequence[Edits] = ()) -> Tensor:
    """log p [T] of an answer's tokens and its end, by one plain pass over the row alone."""
    loaded = model.load_module("float32", "cpu")
    head = prompt_ids(loaded.tokenizer, prompt)
    tail = completion_ids(loaded.tokenizer, answer)
    with torch.no_grad(), hooks.applied(loaded.module, laid):
        logits = loaded.module(torch.tensor([[*head, *tail]])).logits[0]
    rows = logits[len(head) - 1 : -1].log_softmax(-1)
    return rows.gather(1, torch.tensor(tail)[:, None])[:, 0]


def told(prompt: object) -> Prompt:
    """A prompt behind the system message."""
    if isinstance(prompt, str):
        return [*SYSTEM, {"role": "user", "content": prompt}]
    assert isinstance(prompt, list)
    return [*SYSTEM, *prompt]


def test_answers_are_read_under_the_prefix(model: Model) -> None:
    made = model.adding(PREFIX)
    want = [float(logp(model, told(r["prompt"]), str(r["completion"])).sum()) for r in ASKED]
    assert answer_logps(made.load_module(), ASKED) == pytest.approx(want, abs=1e-4)
    bare = answer_logps(model.load_module(), ASKED)
    assert all(abs(a - b) > 1e-2 for a, b in zip(want, bare, strict=True))
    # A language model with changes rewards by its ratio to what it was made from.
    assert score_model(made, ASKED) == pytest.approx(
        [a - b for a, b in zip(want, bare, strict=True)], abs=1e-3
    )


def test_a_rewriter_is_asked(model: Model, rewriter: Rewriter, edits: Edits) -> None:
    made = model.with_changes([edits, rewriter, Decoder("none")])
    want = [float(logp(model, f"LOUD {r['prompt']}", str(r["completion"]), [edits]).sum())
            for r in ASKED[:2]]  # fmt: skip
    assert answer_logps(made.load_module(), ASKED[:2]) == pytest.approx(want, abs=1e-4)


def test_steps_and_heads_see_the_prefix(model: Model, tmp_path: Path) -> None:
    head = ScoreHead(128)
    with torch.no_grad():
        head.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    reward = head.added_to(model, tmp_path / "head")
    made = reward.adding(PREFIX)
    rows: list[Row] = [{"prompt": "say a", "steps": ["one", "two"]}]
    instead: list[Row] = [{**rows[0], "prompt": told("say a")}]
    assert step_scores(made, rows, "\n") == step_scores(reward, instead, "\n")
    assert step_scores(made, rows, "\n") != step_scores(reward, rows, "\n")
    behind: list[Row] = [{**r, "prompt": told(r["prompt"])} for r in ASKED]
    assert score_model(made, ASKED) == score_model(reward, behind)
    assert score_model(made, ASKED) != score_model(reward, ASKED)


def test_perplexity_is_that_of_the_model_as_it_answers(model: Model) -> None:
    """Of the words alone, without what ends them."""
    found = perplexity(ASKED, model.adding(PREFIX), sign="high")
    bare = perplexity(ASKED, model, sign="high")
    for row, value, plain in zip(ASKED, found, bare, strict=True):
        words = logp(model, told(row["prompt"]), str(row["completion"]))[:-1]
        assert value == pytest.approx(float((-words.mean()).exp()), rel=1e-3)
        assert abs(value - plain) > 1e-2


def test_preference_is_measured_as_the_model_answers(model: Model, edits: Edits) -> None:
    margins = []
    for row in PAIRS:
        both = [logp(model, told(row["prompt"]), str(row[n]), [edits]).mean()
                for n in ("chosen", "rejected")]  # fmt: skip
        margins.append(float(both[0] - both[1]))
    report = preference(model.with_changes([edits, PREFIX]), PAIRS)
    assert [r["margin"] for r in report.samples or ()] == pytest.approx(margins, abs=1e-4)
    assert [r["prompt"] for r in report.samples or ()] == [r["prompt"] for r in PAIRS]
    bare = preference(model, PAIRS)
    assert [r["margin"] for r in bare.samples or ()] != pytest.approx(margins, abs=1e-2)


Losses = Callable[..., list[float]]


@pytest.fixture
def losses(tmp_path: Path) -> Losses:
    """The losses of a short run, all rows a step and no progress between steps."""

    runs = iter(range(100))

    def run(name: str, model: Model, data: Table, **inputs: object) -> list[float]:
        settings = {"steps": 2, "batch": len(data), "lr": 1e-12, "warmup": 0.0}
        with use(Context(seed=1, folder=tmp_path / f"run{next(runs)}")) as context:
            methods[name](model, data, **settings, **inputs)
        return [float(str(m["loss"])) for m in context.metrics if "loss" in m]

    return run


def dpo_loss(model: Model, reference: Callable[[Prompt, str], Tensor]) -> float:
    """The loss of DPO before any update, beta 0.1."""
    made: list[Tensor] = []
    for row in PAIRS:
        prompt, texts = str(row["prompt"]), (str(row["chosen"]), str(row["rejected"]))
        r = [(logp(model, prompt, text) - reference(prompt, text)).sum() for text in texts]
        made.append(-torch.nn.functional.logsigmoid(0.1 * (r[0] - r[1])))
    return float(torch.stack(made).mean())


def test_a_reference_reads_its_own_prompts(
    model: Model, other: Model, edits: Edits, rewriter: Rewriter, losses: Losses
) -> None:
    want = dpo_loss(model, lambda prompt, text: logp(other, told(prompt), text))
    assert losses("dpo", model, PAIRS, reference=other.adding(PREFIX))[0] == pytest.approx(
        want, abs=1e-4
    )
    want = dpo_loss(model, lambda prompt, text: logp(other, f"LOUD {prompt}", text, [edits]))
    changed = other.with_changes([edits, rewriter])
    assert losses("dpo", model, PAIRS, reference=changed)[0] == pytest.approx(want, abs=1e-4)
    plain = losses("dpo", model, PAIRS, reference=other)[0]
    assert abs(plain - want) > 1e-3
    # What was kept of one is not taken for the other.
    again = losses("dpo", model, PAIRS, reference=changed)[0]
    assert again == pytest.approx(want, abs=1e-4)


def distilled(teacher: Model, student: Model, data: Table, laid: Sequence[Edits] = ()) -> float:
    """Mean over tokens of KL(teacher || student), the teacher told, by plain passes."""
    total, count = 0.0, 0
    for row in data:
        sides: list[Tensor] = []
        for model, prompt, edited in (
            (teacher, told(row["prompt"]), laid),
            (student, str(row["prompt"]), ()),
        ):
            loaded = model.load_module("float32", "cpu")
            head = prompt_ids(loaded.tokenizer, prompt)
            tail = completion_ids(loaded.tokenizer, str(row["completion"]))
            with torch.no_grad(), hooks.applied(loaded.module, edited):
                logits = loaded.module(torch.tensor([[*head, *tail]])).logits[0]
            sides.append(logits[len(head) - 1 : -1].log_softmax(-1))
        total += float((sides[0].exp() * (sides[0] - sides[1])).sum())
        count += len(sides[0])
    return total / count


@pytest.mark.parametrize("hold", [2.0, 0.0])
def test_context_is_distilled(
    hold: float, model: Model, edits: Edits, losses: Losses, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher that differs from its student by what it is told alone has something to teach."""
    monkeypatch.setattr("truing.core.trainer.teacher.HOLD", hold)
    rows = [{"prompt": f"say {w}", "completion": w.upper()} for w in WORDS]
    data = Table("example", [*rows, {"prompt": "say lime", "completion": "no"}])
    found = losses("forward_kl", model, data, teacher=model.adding(PREFIX))[0]
    want = distilled(model, model, data)
    assert want > 1e-2 and found == pytest.approx(want, abs=1e-4)
    both = model.with_changes([edits, PREFIX])
    found = losses("forward_kl", model, data, teacher=both)[0]
    assert found == pytest.approx(distilled(model, model, data, [edits]), abs=1e-4)
    assert abs(found - want) > 1e-3
    assert losses("forward_kl", model, data, teacher=model)[0] == pytest.approx(0.0, abs=1e-5)


def test_a_student_on_its_own_answers_learns_what_its_teacher_is_told(
    model: Model, tmp_path: Path
) -> None:
    data = Table("prompt", [{"prompt": f"say {w}"} for w in WORDS])
    settings = {"batch": 4, "steps": 8, "lr": 5e-3, "max_tokens": 4}
    with use(Context(seed=1, folder=tmp_path / "run")) as context:
        methods["on_policy_kd"](model, data, teacher=model.adding(PREFIX), **settings)
    seen = [float(str(m["loss"])) for m in context.metrics if "loss" in m]
    assert seen[0] > 1e-2 and sum(seen[-3:]) < 0.8 * sum(seen[:3])


def refused(model: Model, name: str, data: Table, **inputs: object) -> str:
    with pytest.raises(InputError) as caught:
        methods[name](model, data, steps=1, **inputs)
    return str(caught.value)


def test_changes_that_could_not_act_are_refused_by_name(
    model: Model, other: Model, edits: Edits
) -> None:
    prompts = Table("prompt", [{"prompt": "say a"}])
    reference = other.with_changes([edits, PREFIX])
    for name, data in (("tdpo1", PAIRS), ("grpo", prompts)):
        said = refused(model, name, data, reference=reference, **grpo(name))
        assert "'reference' has run-time changes" in said and "['edits', 'prefix']" in said
    said = refused(model, "ppo", prompts, critic=reference, **grpo("grpo"))
    assert "'critic' has run-time changes" in said
    said = refused(model.adding(Prefix([*SYSTEM, *SYSTEM])), "dpo", PAIRS, reference=reference)
    assert "different run-time changes" in said and "'model': ['prefix']" in said
    turns = [{"role": r, "content": c} for c in "ab" for r in ("user", "assistant")]
    dialogues = Table("example", [{"messages": turns}])
    said = refused(model, "forward_kl", dialogues, teacher=other.adding(PREFIX))
    assert "'teacher' reads other prompts" in said and "['prefix']" in said


def spoken(role: str, text: object) -> dict[str, str]:
    return {"role": role, "content": str(text)}


def test_single_answers_in_messages_are_read_under_the_prefix_too(
    model: Model, other: Model, losses: Losses
) -> None:
    """Pairs as TRL has them, with a prompt of messages or with the question in both sides."""
    reference = other.adding(PREFIX)
    want = dpo_loss(model, lambda prompt, text: logp(other, told(prompt), text))
    asked = [spoken("user", r["prompt"]) for r in PAIRS]
    sides = [{n: spoken("assistant", r[n]) for n in ("chosen", "rejected")} for r in PAIRS]
    apart: list[Row] = [
        {"prompt": [q], **{n: [m] for n, m in side.items()}}
        for q, side in zip(asked, sides, strict=True)
    ]
    within: list[Row] = [
        {n: [q, m] for n, m in side.items()} for q, side in zip(asked, sides, strict=True)
    ]
    for rows in (apart, within):
        found = losses("dpo", model, Table("dialogue_pair", rows), reference=reference)[0]
        assert found == pytest.approx(want, abs=1e-4)
    # Answers that begin alike stay the answers: what they share is not taken for the prompt.
    text: Row = {"prompt": "say oak", "chosen": "oak is OAK", "rejected": "oak is no"}
    chat: Row = {
        "prompt": [spoken("user", "say oak")],
        **{n: [spoken("assistant", text[n])] for n in ("chosen", "rejected")},
    }
    found = losses("dpo", model, Table("dialogue_pair", [chat]), reference=reference)[0]
    plain = losses("dpo", model, Table("pair", [text]), reference=reference)[0]
    assert found == pytest.approx(plain, abs=1e-4)


def test_context_is_distilled_from_chat_rows(model: Model, losses: Losses) -> None:
    texts = [{"prompt": f"say {w}", "completion": w.upper()} for w in WORDS]
    want = distilled(model, model, Table("example", texts))
    both = [(spoken("user", r["prompt"]), spoken("assistant", r["completion"])) for r in texts]
    whole: list[Row] = [{"messages": [q, a]} for q, a in both]
    apart: list[Row] = [{"prompt": [q], "completion": [a]} for q, a in both]
    for data in (Table("example", whole), Table("dialogue_example", apart)):
        found = losses("forward_kl", model, data, teacher=model.adding(PREFIX))[0]
        assert found == pytest.approx(want, abs=1e-4)


def test_a_row_too_long_for_the_prompt_that_is_read_is_named(model: Model, other: Model) -> None:
    long = "word " * 250  # of 2048 tokens of context, in both prompt and prefix
    data = Table("pair", [{"id": "r7", "prompt": long, "chosen": "a", "rejected": "b"}])
    reference = other.adding(Prefix([spoken("system", long)]))
    said = refused(model, "dpo", data, reference=reference, max_length=2048)
    assert "'reference' reads" in said and "context of that model 2048" in said
    assert "r7" in said and "prefix" in said and "'max_length'" in said


def grpo(name: str) -> dict[str, object]:
    """Settings of grpo under which it has a reference."""
    return (
        {"rewards": {"short": {"use": "max_words", "n": 4}}, "beta": 0.1} if name == "grpo" else {}
    )


def test_changes_that_wait_while_a_model_is_trained_are_told(
    model: Model, edits: Edits, capsys: pytest.CaptureFixture[str]
) -> None:
    made = methods["dpo"](model.adding(PREFIX).adding(edits), PAIRS, steps=1)
    assert isinstance(made, Model) and [c.kind for c in made.run_time_changes] == [
        "edits",
        "prefix",
    ]
    assert "carried_on_without_acting: edits, prefix" in capsys.readouterr().err


def test_changes_of_both_act_in_neither(model: Model, other: Model, losses: Losses) -> None:
    """Weights are what is trained; what is laid over both stays outside, as decoders do."""
    plain = losses("dpo", model, PAIRS, reference=other)
    laid: list[Change] = [PREFIX]
    with_both = losses("dpo", model.with_changes(laid), PAIRS, reference=other.with_changes(laid))
    decoded = losses("dpo", model, PAIRS, reference=other.adding(Decoder("none")))
    assert plain == with_both == decoded
