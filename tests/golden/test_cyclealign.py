"""Agreement of rankings by hand, what the black box is shown, and cycles with a judge by rule."""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from truing.context import Context, current, use
from truing.core.chat import completion_ids, prompt_ids
from truing.core.drawing import Completion
from truing.core.generate import generate
from truing.core.passes.scoring import answer_logps
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.principles import Principles
from truing.tables import Table
from truing.train.distill.cyclealign import agreement, answers_of, cycle, cyclealign
from truing.train.distill.ranker import GOOD, Judge, own_orders, parse, shown

HOW: dict[str, object] = {"epochs": 1, "rank": 2}


def cycled(model: Model, data: Table, judge: Judge, *, n: int, cycles: int = 1) -> Model:
    """The loop with short answers and a short training."""
    return cycle(
        model,
        data,
        judge,
        cycles=cycles,
        n=n,
        temperatures=[1.0],
        max_tokens=8,
        back_end="rrhf",
        training=HOW,
    )


def test_agreement_by_hand() -> None:
    assert agreement([2, 0, 1, 3], [2, 0, 1, 3]) == [2, 0, 1, 3]
    assert agreement([0, 1, 2], [2, 1, 0]) == [0]  # of equals the black box's best
    assert agreement([0, 1, 2, 3], [1, 0, 2, 3]) == [0, 2, 3]
    for a in itertools.permutations(range(4)):
        for b in itertools.permutations(range(4)):
            found = agreement(a, b)
            assert len(found) == len(agreement(b, a)) >= 1
            for order in (a, b):
                assert [i for i in order if i in found] == found


def test_orders_are_parsed_strictly() -> None:
    assert parse("Order: B > A>C.", 3) == [1, 0, 2] and parse("B > A", 2) == [1, 0]
    for wrong in ("B > A", "A > A > B", "A, B, C", "A > B > D", ""):
        assert parse(wrong, 3) is None


def by(score: Callable[[str, str], float]) -> Callable[[list[str]], list[str]]:
    """Ranks the last question's answers by a function of question and answer, most first."""

    def ranked(prompts: list[str]) -> list[str]:
        said: list[str] = []
        for text in prompts:
            last = text.rsplit("Question:", 1)[1].rsplit("\nOrder:", 1)[0]
            asked, *parts = re.split(r"\n([A-J]): ", last)
            answers = zip(parts[::2], parts[1::2], strict=True)
            found = {letter: score(asked.strip(), answer) for letter, answer in answers}
            said.append(" > ".join(sorted(found, key=lambda k: (-found[k], k))))
        return said

    return ranked


by_rule = by(lambda _, answer: sum(c.isalpha() for c in answer) / len(answer))


def test_the_judge_undoes_its_letters_and_asks_twice() -> None:
    asked: list[list[str]] = []

    def ask(prompts: list[str]) -> list[str]:
        asked.append(prompts)
        return by_rule(prompts) if len(asked) > 1 else ["hm"] + by_rule(prompts[1:])

    judge = Judge(ask, kept=1)
    answers = [["ab1", "1234", "abcd"], ["12", "a1"]]
    with use(Context()):
        assert judge.rank(["p", "q"], answers, "x") == [[2, 0, 1], [1, 0]]
        assert [len(a) for a in asked] == [2, 1]
        assert Judge(lambda p: ["no"] * len(p)).rank(["p"], answers[:1], "x") == [None]
        judge.learn("old", ["x", "y"], [0, 1])
        judge.learn("p", answers[0], [2, 1])
        assert judge.examples[-1] == shown("p", ["1234", "abcd"], [1, 0])
        judge.rank(["p"], answers[:1], "y")
    assert judge.examples[-1] in asked[-1][0] and "old" not in asked[-1][0]
    # Two examples are always shown, each with its best answer at another letter.
    assert re.findall(r"\nOrder: (.*)", asked[-1][0])[:2] == ["B > A", "C > A > B"]
    assert asked[0][0].count("\nOrder:") == 3


def test_what_the_judge_is_told_and_shown_and_the_answer_that_a_row_brings(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rules take the place of the usual words, ranked rows that of the usual example."""
    asked: list[str] = []

    def generated(model: Model, prompts: list[object], **more: object) -> list[list[Completion]]:
        if "n" not in more:  # the judge
            asked.extend(map(str, prompts))
            texts = [[text] for text in by_rule([str(p) for p in prompts])]
        else:
            texts = [["1234", "ab12"] for _ in prompts]
        return [[Completion(t, finish="stop") for t in some] for some in texts]

    for place in (cyclealign.__module__, Judge.__module__):
        monkeypatch.setattr(importlib.import_module(place), "generate", generated)
    model = Model.open(tiny_path)
    data = Table("example", [{"prompt": "say oak", "completion": "oak tree"}])
    shots = Table("group", [{"prompt": "Which?", "completions": ["7", "x"], "scores": [0.0, 1.0]}])
    (tmp_path / "rules.yaml").write_text("- {id: a, text: Write letters.}")
    rules = Principles.read(tmp_path / "rules.yaml")
    with use(Context(folder=tmp_path)) as context:
        methods["cyclealign"](model, data, model, rules, shots, cycles=1, n=2, rank=4)
    (text,) = asked
    assert "Write letters." in text and GOOD not in text and "boil an egg" not in text
    assert "Question: Which?\nA: 7\nB: x\nOrder: B > A" in text
    assert all(answer in text for answer in ("1234", "ab12", "oak tree"))
    assert [m["ranked"] for m in context.metrics if "cycle" in m] == [1]


def test_dialogues_bring_their_last_answers(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def generated(model: Model, prompts: list[object], **_: object) -> list[list[Completion]]:
        asked.extend(prompts)
        return [[Completion(t, finish="stop") for t in ("1234", "ab12")] for _ in prompts]

    monkeypatch.setattr(importlib.import_module(cyclealign.__module__), "generate", generated)
    told: list[str] = []

    def ask(prompts: list[str]) -> list[str]:
        told.extend(prompts)
        return by_rule(prompts)

    user, answer = {"role": "user", "content": "say oak"}, {"role": "assistant", "content": "oak!"}
    data = Table("example", [{"messages": [user, answer]}])
    open_ = Table("prompt", [{"messages": [user]}])
    for table, n in ((data, 3), (open_, 2)):
        told.clear()
        asked.clear()
        with use(Context(folder=tmp_path / str(n))):
            cycled(Model.open(tiny_path), table, Judge(ask), n=2)
        assert asked == [[user]]
        (text,) = told
        last = text.rsplit("Question: say oak", 1)[1]
        assert len(re.findall(r"\n[A-J]: ", last)) == n and ("oak!" in last) == (n == 3)


def test_the_judge_sees_the_whole_dialogue_and_a_cut_answer_gets_no_end(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generated(model: Model, prompts: list[object], **_: object) -> list[list[Completion]]:
        return [[Completion("1234", finish="stop")] for _ in prompts]

    monkeypatch.setattr(importlib.import_module(cyclealign.__module__), "generate", generated)
    told: list[str] = []

    def ask(prompts: list[str]) -> list[str]:
        told.extend(prompts)
        return by_rule(prompts)

    turns = [("user", "My dog is Rex."), ("assistant", "Nice."), ("user", "Who is he?")]
    asked = [{"role": role, "content": text} for role, text in turns]
    rows = [{"prompt": asked, "completion": "A dog that", "finished": False}]
    found: list[list[dict[str, bool]]] = []
    plain = importlib.import_module(cyclealign.__module__).own_orders

    def orders(model: Model, prompts: list[object], ended: list[dict[str, bool]]) -> object:
        found.append(ended)
        return plain(model, prompts, ended)

    monkeypatch.setattr(importlib.import_module(cyclealign.__module__), "own_orders", orders)
    with use(Context(folder=tmp_path)):
        cycled(Model.open(tiny_path), Table("example", rows), Judge(ask), n=1)
    (text,) = told
    assert all(words in text for _, words in turns)
    assert found == [[{"1234": True, "A dog that": False}]]


@pytest.mark.parametrize("turned", [None, "say rain"])
def test_it_ends_once_all_rankings_are_equal(
    turned: str | None, tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A black box that ranks as the model does, but for one question."""
    texts = ["oak", "ab12", "x y z"]
    monkeypatch.setattr(
        importlib.import_module(cyclealign.__module__),
        "generate",
        lambda model, prompts, **_: [[Completion(t) for t in texts] for _ in prompts],
    )
    model = Model.open(tiny_path)
    loaded = model.load_module()

    def as_the_model(question: str, answer: str) -> float:
        (logp,) = answer_logps(loaded, [{"prompt": question, "completion": answer}], mean=True)
        return -logp if question == turned else logp

    data = Table("prompt", [{"prompt": "say oak"}, {"prompt": "say rain"}])
    with use(Context(folder=tmp_path)) as context:
        made = cycled(model, data, Judge(by(as_the_model)), n=3, cycles=1 if turned else 3)
    (only,) = [m for m in context.metrics if "cycle" in m]
    assert only["ranked"] == 2 and only["same"] == (1 if turned else 2)
    assert (made is model) == (turned is None) and len(made.weight_changes) == bool(turned)


def test_a_single_answer_teaches_nothing_and_is_counted(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All answers to a prompt are one text, or only one is drawn."""
    texts = {"say oak": ["same", "same", " "], "say rain": ["ab12", "1234", "x"]}
    module = importlib.import_module(cyclealign.__module__)
    monkeypatch.setattr(
        module,
        "generate",
        lambda model, prompts, n, **_: [[Completion(t) for t in texts[p][:n]] for p in prompts],
    )
    learnt: list[list[object]] = []
    train = module.train_model

    def counted(spec: object, model: Model, rows: Table, *more: object, **how: object) -> Model:
        learnt.append(rows.column("prompt"))
        return train(spec, model, rows, *more, **how)

    monkeypatch.setattr(module, "train_model", counted)
    model, data = Model.open(tiny_path), Table("prompt", [{"prompt": p} for p in texts])
    with use(Context(folder=tmp_path)) as context:
        for n in (3, 1):
            with pytest.raises(InputError, match="ranked no answers") if n == 1 else nullcontext():
                cycled(model, data, Judge(by_rule), n=n)
    turns = [m for m in context.metrics if "cycle" in m]
    assert [(m["ranked"], m["not_ranked"]) for m in turns] == [(1, 1), (0, 2)]
    assert learnt == [["say rain"]]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"n": 10}, r"setting 'n' must be at most 9 where rows bring"),
        ({"n": 11}, r"setting 'n' must be from 2 to 10"),
        ({"n": 1}, r"setting 'n' must be from 2 to 10"),
        ({"batch": 0}, r"setting 'batch' must be at least 1"),
        ({"rank": -1}, r"setting 'rank' must be at least 0"),
        ({"epochs": 0}, r"setting 'epochs' must be above 0"),
        ({"lr": -1.0}, r"setting 'lr' must be at least 0"),
        ({"layers": -1}, r"setting 'layers' must be at least 0"),
        ({"temperatures": []}, r"setting 'temperatures' must be at least one"),
        ({"temperatures": [0.8, 0.0]}, r"setting 'temperatures' .* all above 0"),
        ({"temperatures": [float("inf")]}, r"setting 'temperatures'"),
        ({"temperatures": [1.0, 0.9, 0.8], "n": 2}, r"setting 'temperatures' .* at most n"),
        ({"max_tokens": 0}, r"setting 'max_tokens' must be at least 1"),
    ],
)
def test_nothing_is_drawn_for_what_would_be_refused(
    given: dict[str, object], told: str, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("something was drawn")

    monkeypatch.setattr(importlib.import_module(cyclealign.__module__), "generate", never)
    data = Table("example", [{"prompt": "say oak", "completion": "oak"}])
    model = Model.open(tiny_path)
    with pytest.raises(InputError, match=told):
        methods["cyclealign"](model, data, model, **given)
    prompts = Table("prompt", [{"prompt": "say oak"}])
    methods["cyclealign"].check(methods["cyclealign"].validate({"n": 10}), {"data": prompts})


@pytest.mark.parametrize(
    ("completions", "scores", "told"),
    [
        (["a", "b", "c"], [1.0, 0.0], "one number for each completion"),
        (["a", "b"], [1.0, 0.0, 0.5], "one number for each completion"),
        (["a"], [1.0], "has 2 to 10 answers"),
        ([str(i) for i in range(11)], [float(i) for i in range(11)], "has 2 to 10 answers"),
    ],
)
def test_examples_of_rankings_are_checked_first(
    completions: list[str], scores: list[float], told: str
) -> None:
    good = {"prompt": "p", "completions": ["a", "b"], "scores": [0.0, 1.0]}
    bad = {"prompt": "p", "completions": completions, "scores": scores}
    method = methods["cyclealign"]
    settings = method.validate({})
    method.check(settings, {"examples": Table("group", [good])})
    with pytest.raises(InputError, match=told) as error:
        method.check(settings, {"examples": Table("group", [good, bad])})
    assert "row 2" in str(error.value)


def test_answers_are_drawn_at_temperatures_in_turn(tiny_path: Path, tmp_path: Path) -> None:
    model, rows = Model.open(tiny_path), [{"prompt": "say oak"}, {"prompt": "say rain"}]
    prompts = [row["prompt"] for row in rows]

    def texts(n: int, temperature: float, name: str) -> list[list[str]]:
        seed = current().stream(name) % 2**31
        how: dict[str, object] = {"n": n, "temperature": temperature, "max_tokens": 6, "seed": seed}
        return [[c.text for c in some] for some in generate(model, prompts, **how)]  # type: ignore[arg-type]

    with use(Context(folder=tmp_path, seed=3)):
        found = answers_of(model, rows, "a", 3, [0.5, 1.5], 6)
        for some, cool, hot in zip(found, texts(2, 0.5, "a"), texts(1, 1.5, "a/1"), strict=True):
            assert list(some) == [*cool, *hot] and len(some) == 3
        one = answers_of(model, rows, "a", 3, [1.0], 6)
        assert [list(some) for some in one] == texts(3, 1.0, "a")


@pytest.mark.parametrize(
    "trained", [{"rank": 0}, {"rank": 0, "layers": 1}, {"rank": 2, "layers": 1}]
)
def test_all_weights_or_the_top_blocks_are_trained(
    trained: dict[str, object], tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(cyclealign.__module__)
    monkeypatch.setattr(module, "asking", lambda judge, where: by_rule)
    model = Model.open(tiny_path)
    words = ("oak", "rain")  # whose rows bring an answer that ends
    data = Table("example", [{"prompt": f"say {w}", "completion": w} for w in words])
    how: dict[str, object] = {"cycles": 1, "n": 3, "max_tokens": 8, "lr": 1e-2, **trained}
    with use(Context(folder=tmp_path)):
        made = methods["cyclealign"](model, data, model, **how)
    assert isinstance(made, Model)
    before, after = model.folded(), made.folded()
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    top = {n for n in before if n.startswith("model.layers.2.")}
    assert moved and moved <= top if "layers" in trained else moved == set(before)


def test_cycles_move_the_model_to_the_ranking(tiny_path: Path, tmp_path: Path) -> None:
    model = Model.open(tiny_path)
    data = Table("prompt", [{"prompt": f"say {w}"} for w in ("oak", "rain", "moss", "reed")])
    judge = Judge(by_rule)
    with use(Context(folder=tmp_path)) as context:
        made = cycle(
            model,
            data,
            judge,
            cycles=2,
            n=3,
            temperatures=[1.0],
            max_tokens=96,
            back_end="rrhf",
            training={"epochs": 4, "batch": 4, "lr": 1e-3, "rank": 8},
        )
        turns = [m for m in context.metrics if "cycle" in m]
        assert [t["cycle"] for t in turns] == [1, 2] and all(t["ranked"] == 4 for t in turns)
        assert len(judge.examples) == sum(int(str(t["agreements"])) for t in turns) > 0
        assert len(made.weight_changes) == 2 and made.weights_key != model.weights_key
        # By mean log-probability: of a prompt's answers as of each alone.
        asked = [{"aaaa": True, "b c": False}, {"oak": True, "a": True, "rain": True}]
        prompts = ["say oak", "say rain"]
        rows = [
            [{"prompt": p, "completion": text, "finished": end} for text, end in some.items()]
            for p, some in zip(prompts, asked, strict=True)
        ]
        want = [answer_logps(model.load_module(), some, mean=True) for some in rows]
        assert own_orders(model, prompts, asked) == [
            sorted(range(len(one)), key=lambda i: -one[i]) for one in want
        ]
        with pytest.raises(InputError, match="ranked no answers"):
            cycle(
                model,
                data,
                Judge(lambda p: [""] * len(p)),
                cycles=1,
                n=3,
                temperatures=[1.0],
                max_tokens=96,
                back_end="pro",
                training={"rank": 4},
            )


def test_held_out_rankings_are_measured_in_each_cycle(tiny_path: Path, tmp_path: Path) -> None:
    """RRHF's loss by hand, by log-probabilities of transformers; a cycle begins where one ended."""
    model = Model.open(tiny_path)
    words = ("oak", "rain")  # whose rows bring an answer that ends
    data = Table("example", [{"prompt": f"say {w}", "completion": w} for w in words])
    held = Table("group", [{"prompt": "say", "completions": ["a b", "moss"], "scores": [0.0, 2.0]}])
    pair = Table("pair", [{"prompt": "say", "chosen": "moss", "rejected": "a b"}])

    def measured(rows: Table, cycles: int) -> list[float]:
        with use(Context(folder=tmp_path / rows.kind)) as context:
            cycle(
                model,
                data,
                Judge(by_rule),
                cycles=cycles,
                n=3,
                temperatures=[1.0],
                max_tokens=8,
                back_end="rrhf",
                training={"batch": 2, "lr": 2e-3, "rank": 4, "eval_every": 1},
                held_out=rows,
            )
        return [float(str(m["held_out/loss"])) for m in context.metrics if "held_out/loss" in m]

    seen = measured(held, 2)
    loaded = model.load_module("float32")
    head = prompt_ids(loaded.tokenizer, "say")
    p: list[float] = []
    for text in ("a b", "moss"):
        ids = completion_ids(loaded.tokenizer, text)
        with torch.no_grad():
            logp_TV = loaded.module(torch.tensor([[*head, *ids]])).logits[0].log_softmax(-1)
        at = range(len(head) - 1, len(head) + len(ids) - 1)
        p.append(sum(float(logp_TV[t, i]) for t, i in zip(at, ids, strict=True)) / len(ids))
    assert len(seen) == 4 and seen[0] == pytest.approx(max(0.0, p[0] - p[1]) - p[1], rel=1e-4)
    assert seen[2] == pytest.approx(seen[1], rel=1e-4) and seen[1] != seen[0]
    assert measured(pair, 1) == pytest.approx(seen[:2], rel=1e-5)  # a ranking of two
    with pytest.raises(InputError, match="setting 'eval_every' counts for nothing"):
        methods["cyclealign"](model, data, model, eval_every=2)
    with pytest.raises(InputError, match="needs rows of kind group or pair"):
        methods["cyclealign"](model, data, model, held_out=data)
