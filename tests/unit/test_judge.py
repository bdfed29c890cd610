"""Judges: by log-probabilities on packed trees, by strict parsing, in both orders, as a panel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from misbehaving import good, server
from sklearn.metrics import cohen_kappa_score

from truing.changes import Decoder, Edits, Prefix
from truing.context import Context, current, use
from truing.core import hooks, judge
from truing.core.chat import completion_ids, prompt_ids
from truing.core.generate import generate
from truing.core.generation.options import option_logps
from truing.core.judging import judge_form
from truing.core.judging.agreement import agreement
from truing.core.modelfiles.panel import Panel, panel_of
from truing.core.tiny import tiny_folder
from truing.errors import InputError
from truing.evaluate.win_rate import trust
from truing.models import Model
from truing.tables import Row


@pytest.fixture
def tiny(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TRUING_HOME", str(tmp_path))
    with use(Context()):
        yield


def tiny_folder_of(beside: Path, seed: int) -> Path:
    """A tiny model of other weights."""
    folder = beside.parent / f"{beside.name}-{seed}"
    return folder if folder.is_dir() else tiny_folder(folder, seed)


def _rows(*answers: str) -> list[Row]:
    return [{"prompt": f"Question {i}?", "completion": a} for i, a in enumerate(answers)]


def _plain(model: Model, prompt: Any, option: str) -> float:
    """log P(option as written or in lower case), one spelling at a time, without trees."""
    loaded = model.load_module()
    head = prompt_ids(loaded.tokenizer, prompt)
    logps: list[float] = []
    for text in (option, option.lower()):
        ids = completion_ids(loaded.tokenizer, text, end=False)
        with loaded.run_time(), torch.no_grad():
            logits = loaded.module(torch.tensor([head + ids]), use_cache=False).logits[0].double()
        logp = torch.log_softmax(logits, 1)
        logps.append(sum(float(logp[len(head) - 1 + i, t]) for i, t in enumerate(ids)))
    return float(torch.logsumexp(torch.tensor(logps).double(), 0))


def test_option_logps_equal_the_plain_computation(tiny: Model) -> None:
    prompts = ["Say Yes or No: " + "is it so? " * k for k in (1, 2, 30)] + ["Another start"]
    found = option_logps(tiny, prompts, ("Yes", "No", "Tie"))
    expected = [[_plain(tiny, p, o) for o in ("Yes", "No", "Tie")] for p in prompts]
    assert torch.allclose(found, torch.tensor(expected).double(), atol=1e-4)


def test_edits_and_prefix_of_a_judge_are_in_force(tiny: Model, tmp_path: Path) -> None:
    vector = torch.randn(128, generator=torch.Generator().manual_seed(1)) * 2
    path = hooks.save(tmp_path / "edit.safetensors", [hooks.Edit("layers.2.residual", vector)])
    system = {"role": "system", "content": "Be strict."}
    changed = tiny.adding(Edits(path)).adding(Prefix([system]))
    prompts = ["Is it so?", "Is it thus?"]
    found = option_logps(changed, prompts, ("Yes", "No"))
    asked = [[system, {"role": "user", "content": p}] for p in prompts]
    expected = [[_plain(changed, p, o) for o in ("Yes", "No")] for p in asked]
    assert torch.allclose(found, torch.tensor(expected).double(), atol=1e-4)
    assert (found - option_logps(tiny, prompts, ("Yes", "No"))).abs().min() > 1e-3
    # logprob applies all changes but the decoder, which need not even exist
    decoded = changed.adding(Decoder("not_there"))
    assert torch.equal(option_logps(decoded, prompts, ("Yes", "No")), found)


def test_pointwise_is_yes_against_no(tiny: Model) -> None:
    rows = _rows("An answer.", "Another one, {{ 7 * 7 }} {% raw %}")
    found = judge.pointwise(tiny, rows, criteria="1. Be kind.")
    for row, value in zip(rows, found, strict=True):
        text = judge_form.render(judge_form.ONE, prompt=row["prompt"], completion=row["completion"],
                             criteria="1. Be kind.")  # fmt: skip
        assert str(row["completion"]) in text  # never run as a template itself
        yes, no = (_plain(tiny, f"{text}\n{judge_form.ASK_ONE}", o) for o in ("Yes", "No"))
        assert value == pytest.approx(1 / (1 + math.exp(no - yes)), abs=1e-4)
    without = judge.pointwise(tiny, rows)
    assert without != pytest.approx(found, abs=1e-6)


def test_pairwise_averages_both_orders(tiny: Model) -> None:
    ours, theirs = _rows("Yes, of course.", "Same.", "b"), _rows("No!", "Same.", "a")
    made = judge.compare(tiny, ours, theirs, criteria="Be kind.")
    swapped = judge.compare(tiny, theirs, ours, criteria="Be kind.")
    for a, b in zip(made.chances, swapped.chances, strict=True):
        assert a == pytest.approx(1 - b, abs=1e-6)  # no order is left in the mean
    assert made.position_bias == pytest.approx(swapped.position_bias, abs=1e-6)
    assert made.chances[1] == 0.5  # equal answers are a tie
    assert [1 - (v or 0.0) for v in made.decisions] == swapped.decisions
    # By hand: P(A) with ours first, and P(B) with ours second.
    chances = []
    for first, second, mine in (("Yes, of course.", "No!", "A"), ("No!", "Yes, of course.", "B")):
        text = judge_form.render(judge_form.TWO, prompt="Question 0?", first=first, second=second,
                             criteria="Be kind.")  # fmt: skip
        a, b = (_plain(tiny, f"{text}\n{judge_form.ASK_TWO}", o) for o in ("A", "B"))
        chance = 1 / (1 + math.exp(b - a))
        chances.append(chance if mine == "A" else 1 - chance)
    assert made.chances[0] == pytest.approx(sum(chances) / 2, abs=1e-4)


def test_a_stopped_step_judges_only_what_is_left(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same bits as a plain call, and an error names the prompt by its number in all."""
    asked, ask = list[int](), judge.option_logps

    def dying(one: Model, prompts: list[str], options: Any, first: int) -> torch.Tensor:
        if len(asked) == 2:
            asked.clear()
            raise KeyboardInterrupt
        asked.append(first)
        return ask(one, prompts, options, first)

    monkeypatch.setattr(judge, "CHUNK", 2)
    rows = _rows(*(f"Answer {i}." for i in range(7)))
    plain = judge.pointwise(tiny, rows)
    longer = [*rows[:6], rows[6] | {"completion": "long " * 3000}]
    with pytest.raises(InputError) as error:
        judge.pointwise(tiny, longer)
    assert error.value.where == "prompt 7"
    monkeypatch.setattr(judge, "option_logps", dying)
    for wanted in ([], [5, 7]):
        with use(Context(folder=tmp_path / "step")), suppress(KeyboardInterrupt):
            assert judge.pointwise(tiny, rows) == plain
        assert asked == wanted


def test_position_bias_by_hand() -> None:
    made = judge.Comparison([1.0, 1.0, 0.0, None], [0.0, 1.0, 0.0, 1.0])
    assert made.chances == [0.5, 1.0, 0.0, None]
    assert made.decisions == [0.5, 1.0, 0.0, None]
    assert made.unparsed == 1
    # The place shown first was chosen in 1 of 1, and in half of the orders of the two others.
    assert made.position_bias == pytest.approx((1 + 0.5 + 0.5) / 3 - 0.5)
    assert made.consistent == pytest.approx(2 / 3)
    nothing = judge.Comparison([None], [None])
    assert (nothing.position_bias, nothing.consistent, nothing.unparsed) == (0.0, 0.0, 1)


def test_pairs_that_are_not_asked_of_tell_nothing_of_the_judge() -> None:
    same = ["same"] * 8
    ours, theirs = _rows("a", "b", *same), _rows("c", "d", *same)
    with server(_prefers(first=True)) as (url, _):
        one = Model.open(url + "#j")
        made = judge.compare(one, ours, theirs)
        panel = judge.compare(panel_of([one, one.called("k")]), ours, theirs)
        none = judge.compare(one, ours[2:], theirs[2:])
    assert made.decisions == [0.5] * 10
    for found in (made, panel):
        assert (found.position_bias, found.consistent, len(found.read)) == (0.5, 0.0, 2)
        told = {m.name: (m.value, m.n) for m in trust(found)}
        assert told["position bias"] == (0.5, 2) and told["consistency"] == (0.0, 2)
    assert panel.agreement is not None and panel.agreement.n == 2
    assert none.decisions == [0.5] * 8 and trust(none) == []
    shy = server(lambda n, body: good("Well." if "mute" in str(body) else "Verdict: A"))
    with shy as (url, _):
        half = judge.compare(Model.open(url + "#j"), _rows("a", "mute", *same), theirs)
    with pytest.raises(InputError, match="here: no verdict could be read of 1 of 2 pairs"):
        judge.check_compared(half, "here")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Rating: 1", 0.0),
        ("It is fine.\n\n**Rating: 4**\n", 0.75),
        ("rating : 5.", 1.0),
        ("Rating: 3\nRating: 3", 0.5),
        ("Rating: 2\nRating: 3", None),
        ("Rating: 6", None),
        ("Rating: 4/5", None),
        ("Rating: 4.5", None),
        ("I give a Rating: 4", None),
        ("4", None),
        ("", None),
    ],
)
def test_ratings_are_parsed_strictly(text: str, value: float | None) -> None:
    assert judge_form.parse_rating(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Verdict: A", 1.0),
        ("A is worse than B.\nVerdict: B", 0.0),
        ("**Verdict:** *tie*", 0.5),
        ("Verdict: A\n...\nVerdict: B", None),
        ("Verdict: A or B", None),
        ("Verdict: both", None),
        ("A", None),
        ("The verdict: A seems better", None),
    ],
)
def test_verdicts_are_parsed_strictly(text: str, value: float | None) -> None:
    assert judge_form.parse_verdict(text) == value


def _prefers(*, first: bool = False, word: str = "kind") -> Any:
    """A judge behind an endpoint: it takes the answer with the word in it, or the first one."""

    def script(n: int, body: Any) -> Any:
        text = body["messages"][-1]["content"]
        a = text.split("<answer_A>")[1].split("</answer_A>")[0]
        b = text.split("<answer_B>")[1].split("</answer_B>")[0]
        if first or (word in a) == (word in b):
            return good("Verdict: A" if first else "Verdict: tie")
        return good(f"Thinking.\nVerdict: {'A' if word in a else 'B'}")

    return script


def test_served_judge_in_both_orders() -> None:
    ours, theirs = _rows("kind", "rude", "meh"), _rows("rude", "kind", "moh")
    with server(_prefers()) as (url, log):
        assert judge.compare(Model.open(url + "#j"), ours, theirs).decisions == [1.0, 0.0, 0.5]
        assert len(log.asked) == 6
        assert all(body["temperature"] == 0 for _, _, body in log.asked)
    noted = current().metrics[-1]
    assert (noted["position_bias"], noted["consistent"], noted["unparsed"]) == (0.0, 1.0, 0)
    with server(_prefers(first=True)) as (url, _):
        assert judge.compare(Model.open(url + "#j"), ours, theirs).decisions == [0.5, 0.5, 0.5]
    noted = current().metrics[-1]
    assert (noted["position_bias"], noted["consistent"]) == (0.5, 0.0)


def test_unparsed_replies_are_asked_again_then_counted() -> None:
    def script(n: int, body: Any) -> Any:
        text = body["messages"][-1]["content"]
        if "never" in text:
            return good("I would rather not say.")
        if "second" in text and body["temperature"] == 0:
            return good("Hm.")
        return good("Rating: 4")

    rows = _rows(*["fine"] * 8, "second time", "never")
    with server(script) as (url, log):
        model = Model.open(url + "#j")
        assert judge.rate(model, rows) == [0.75] * 9 + [None]
        assert len(log.asked) == 10 + 2 + 1
        assert current().metrics[-1] == {"judge": "j", "judged": 10, "unparsed": 1}
        with pytest.warns(UserWarning, match="no verdict could be read from 1 of 10 replies"):
            assert judge.pointwise(model, rows) == [0.75] * 9 + [0.5]
        with pytest.raises(InputError, match="from 1 of 2 replies"):
            judge.pointwise(model, rows[-2:])


def test_panel_of_judges() -> None:
    ours, theirs = _rows("kind", "rude", "kind"), _rows("rude", "kind", "fair")
    with (
        server(_prefers()) as (one, _),
        server(_prefers(word="rude")) as (two, _),
        server(_prefers()) as (three, _),
    ):
        judges = [Model.open(u + "#j").called(n) for n, u in zip("abc", (one, two, three))]
        mean = judge.compare(panel_of(judges), ours, theirs)
        most = judge.compare(panel_of(judges, "majority"), ours, theirs)
    by_judge = {n: m.decisions for n, m in mean.members.items()}
    assert by_judge == {"a": [1, 0, 1], "b": [0, 1, 0.5], "c": [1, 0, 1]}
    assert mean.chances == pytest.approx([2 / 3, 1 / 3, 2.5 / 3])
    assert mean.decisions == most.decisions == [1.0, 0.0, 1.0] == most.chances
    assert mean.agreement is not None
    assert mean.agreement.raw == pytest.approx(1 / 3)  # a and c agree, b with neither
    assert mean.members["a"].consistent == mean.consistent == 1.0
    noted = [m for m in current().metrics if "panel" in m]
    assert [m["panel"] for m in noted] == [["a", "b", "c"]] * 2
    assert noted[0]["raw_agreement"] == pytest.approx(1 / 3)


def test_a_panel_of_local_judges_takes_their_mean_and_their_vote(tiny_path: Path) -> None:
    """Against its members' own chances, put together by hand."""
    judges = [Model.open(tiny_folder_of(tiny_path, seed)).called(f"m{seed}") for seed in range(3)]
    ours, theirs = _rows("Yes, of course.", "b", "It is so."), _rows("No!", "a", "It is not.")
    alone = [judge.compare(m, ours, theirs) for m in judges]
    mean = judge.compare(panel_of(judges), ours, theirs)
    most = judge.compare(panel_of(judges, "majority"), ours, theirs)
    for side in ("shown_first", "shown_second"):
        chances = [getattr(m, side) for m in alone]
        assert getattr(mean, side) == pytest.approx([sum(c) / 3 for c in zip(*chances)])
        votes = [float(sum(c > 0.5 for c in column) >= 2) for column in zip(*chances)]
        assert getattr(most, side) == votes
    rated = [judge.rate(m, ours, scale=5) for m in judges]
    found = judge.rate(panel_of(judges), ours, scale=5)
    assert found == pytest.approx([sum(map(float, c)) / 3 for c in zip(*rated)])
    assert current().metrics[-1]["judge"] == "panel of m0, m1, m2"
    assert not judge.writes(panel_of(judges)) and judge.writes(panel_of(judges, "majority"))


def test_members_that_cannot_be_read_are_left_out() -> None:
    second = judge.combined([[1.0, None, 0.2], [0.0, None, None], [1.0, None, 0.4]], "mean")
    assert second == [pytest.approx(2 / 3), None, pytest.approx(0.3)]
    votes = [[1.0, 0.5, 1.0, 0.9], [1.0, 0.0, 0.0, None], [0.0, 1.0, 0.5, None]]
    assert judge.combined(votes, "majority") == [1.0, 0.5, 0.5, 1.0]
    mute = server(lambda n, body: good("I would rather not say."))
    with server(_prefers()) as (one, _), mute as (two, _):
        panel = panel_of([Model.open(one + "#a"), Model.open(two + "#b")])
        with pytest.warns(UserWarning, match="of its judge b no verdict could be read in 1 of 1"):
            made = judge.compare(panel, _rows("kind"), _rows("x"))
    assert made.decisions == [1.0] and made.unparsed == 0
    assert made.members["b"].unparsed == 1 and made.agreement is not None
    assert made.agreement.n == 0


def test_a_member_that_is_never_read_is_no_member(monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as it was asked twenty times in the step, in however many calls; of pairs as well."""
    read = {"a": [0.75] * 7, "b": [0.25] * 5 + [None] * 2, "c": [1.0] * 6 + [None]}

    def asked(one: Model, prompts: list[str], *_: object) -> list[Any]:
        return read[one.name][: len(prompts)]

    monkeypatch.setattr(judge, "_written", asked)
    a, b, c = (Model.open(f"http://127.0.0.1:9/v1#{n}").called(n) for n in "abc")
    rows = _rows(*"abcdefg")
    with use(Context()):
        for times in (1, 2, 3):  # 3 of 21 are few enough
            with pytest.warns(UserWarning, match=f"judge c no verdict .* {times} of {7 * times}"):
                found = judge.rate(panel_of([a, c]), rows)
            assert found == [0.875] * 6 + [0.75]
    with use(Context()):
        for times in (1, 2):
            said = f"judge b no verdict .* {2 * times} of {7 * times}"
            with pytest.warns(UserWarning, match=said):
                judge.rate(panel_of([a, b]), rows)
        with pytest.raises(InputError, match=r"panel of a, b: of its judge b .* 6 of 21 cases"):
            judge.rate(panel_of([a, b]), rows)
    read["b"] = [None] * 48
    read["a"] = [1.0] * 48
    with use(Context()), pytest.raises(InputError, match=r"of its judge b .* 24 of 24 cases"):
        judge.compare(panel_of([a, b], "majority"), _rows(*["x"] * 24), _rows(*["y"] * 24))


def test_a_panel_renders_nothing_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[str] = []

    def render(template: str, **_: object) -> str:
        rendered.append(template)
        return "text"

    monkeypatch.setattr(judge, "render", render)
    monkeypatch.setattr(judge, "_written", lambda one, prompts, *_: [0.5] * len(prompts))
    two = [Model.open(f"http://127.0.0.1:9/v1#{n}").called(n) for n in "ab"]
    assert judge.rate(panel_of(two), _rows("x", "y", "z")) == [0.5] * 3
    assert len(rendered) == 6


def members(model: Model) -> dict[str, Model]:
    assert isinstance(model.base, Panel)
    return dict(model.base.judges)


def test_what_a_panel_is(tiny: Model, tmp_path: Path) -> None:
    two = panel_of([tiny, tiny.called("other")])
    assert [*members(two)] == [tiny.name, "other"]
    assert [*members(panel_of([tiny, tiny]))] == [tiny.name, f"{tiny.name} 2"]
    assert judge.pointwise(two, _rows("x", "y")) == judge.pointwise(tiny, _rows("x", "y"))
    other = tiny.adding(Prefix([{"role": "system", "content": "Be strict."}]))
    keys = {panel_of(js, rule).key for rule in ("mean", "majority") for js in
            ([tiny, other], [other, tiny], [tiny, tiny])}  # fmt: skip
    assert len(keys) == 4  # the order of the judges is no difference
    assert panel_of([tiny, replace(other, licences=("cc-by-nc-4.0",))]).licence == "cc-by-nc-4.0"
    with pytest.raises(InputError, match="'judges' needs 2 at least"):
        panel_of([tiny])
    for act in (lambda: two.load_module(), lambda: generate(two, ["Hi"], max_tokens=2)):
        with pytest.raises(InputError, match="a panel of judges has no weights here"):
            act()
    two.save(tmp_path / "saved")
    again = Model.load(tmp_path / "saved")
    assert (again.key, again.name, again.licence) == (two.key, two.name, two.licence)
    assert judge.rate(again, _rows("x")) == judge.rate(two, _rows("x"))


def test_own_templates_are_sandboxed(tiny: Model) -> None:
    rows = _rows("An answer.")
    own = judge.rate(tiny, rows, template="{{ prompt }} {{ completion }}")
    assert own != judge.pointwise(tiny, rows)
    for bad in ("{{ wrong }}", "{% if %}", "{{ prompt.__class__.__mro__ }}"):
        with pytest.raises(InputError, match="template fails"):
            judge.rate(tiny, rows, template=bad)


def test_bad_rows_are_named(tiny: Model) -> None:
    with pytest.raises(InputError, match=r"row 2: a judge needs.*\['prompt'\]"):
        judge.pointwise(tiny, [*_rows("x"), {"prompt": "y"}])
    with pytest.raises(InputError, match="differ in length"):
        judge.compare(tiny, _rows("x"), [])
    with pytest.raises(InputError, match=r"prompt 1: .* do not fit"):
        judge.pointwise(tiny, _rows("x" * 4000))
    assert judge.pointwise(tiny, []) == []


def test_dialogues_are_shown_with_their_speakers() -> None:
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Why?"},
    ]
    assert judge_form.shown({"prompt": turns}) == "user: Hi\n\nassistant: Hello\n\nuser: Why?"
    assert judge_form.shown({"prompt": turns[:1]}) == "Hi"


def test_cohens_kappa() -> None:
    # Two readers of 50 proposals: both yes 20, only the first 5, only the second 10, neither 15.
    one = [1] * 25 + [0] * 25
    other = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    found = agreement([one, other])
    assert found.raw == pytest.approx(0.7)
    assert found.kappa == pytest.approx(0.4)
    assert found.kappa == pytest.approx(cohen_kappa_score(one, other))
    assert found.n == 50


def test_fleiss_kappa() -> None:
    # Fleiss' own layout: 10 subjects, 14 raters, 5 categories; 0.378 and 0.213 worked out by hand.
    counts = [
        (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
        (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
    ]  # fmt: skip
    items = [[k for k, c in enumerate(row) for _ in range(c)] for row in counts]
    found = agreement(list(zip(*items)))
    assert found.raw == pytest.approx(0.378, abs=5e-4)
    assert found.kappa == pytest.approx(0.210, abs=5e-4)


def test_agreement_at_its_limits() -> None:
    same = agreement([[1, 1, 1], [1, 1, 1]])
    assert (same.raw, same.kappa) == (1.0, None)  # nothing to agree about
    assert agreement([[1, 0], [1, 0]]).kappa == 1.0
    assert agreement([[1, 0], [0, 1]]).kappa == -1.0
    part = agreement([[1, None, 0, 1], [1, 1, 0, None], [1, 1, 0, 0]])
    assert (part.n, part.raw, part.kappa) == (2, 1.0, 1.0)
    assert agreement([[None], [1]]).n == 0
    with pytest.raises(InputError, match="same items"):
        agreement([[1, 0], [1]])
