"""SALMON by hand: odds that agree, labels under drawn principles, rewards told what to reward."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from objective_numbers import LOGP, OTHER, mask_of, padded, softminus
from online_numbers import (
    ANSWERS,
    OLD,
    REF,
    REWARD,
    VALUE,
    loss_of,
    mean,
    ratio,
    rollout,
    surrogate,
    total,
)
from online_numbers import tokens as tokens_of
from test_bradley_terry import scored

from truing.context import Context, use
from truing.core.batch.reading import read_units
from truing.core.chat import prompt_ids
from truing.core.judge import Comparison
from truing.core.judging.rewards import score_model, telling
from truing.core.objective import Measurements, objective_of
from truing.core.passes.scoring import ScoreHead, has_head
from truing.errors import InputError
from truing.method import methods, score
from truing.models import Model, hold
from truing.principles import Principle, Principles
from truing.synthesize import salmon as module
from truing.synthesize.salmon_labels import Decided, agreed, dominant, drawn, log_odds, ruled
from truing.tables import Row, Table
from truing.train.reward.salmon import ROLE, Reviewed, fitted, reviewed, within
from truing.train.reward.salmon import salmon as loss_of_pairs
from truing.train.reward.salmon_reward import draw_principles
from truing.train.rl.salmon_ppo import ALWAYS, salmon_ppo, token_rewards, whitened

SHORT = Principle("short", "Be brief.", negative="Be wordy.", priority=1)
KIND = Principle("kind", "Be kind.", negative="Be rude.", priority=3)
PLAIN = Principle("plain", "Be plain.", priority=2)
RULES = Principles([SHORT, KIND, PLAIN])
LONG, BRIEF = "Wood burns since it is dry, and the air feeds it.", "It burns as it is dry."


# Synthesis


def test_scores_agree_in_both_orders_or_are_nothing() -> None:
    odds = [(1.0, 3.0), (2.0, -1.0), (-1.0, -2.0), (0.0, 4.0)]
    every = [s for both in odds for s in both]
    variance = mean([(s - mean(every)) ** 2 for s in every])
    assert agreed(odds) == pytest.approx([2.0 / variance, 0.0, -1.5 / variance, 0.0])
    assert agreed([(1.0, 1.0), (1.0, 1.0)]) == [0.0, 0.0]  # nothing varies
    assert log_odds(0.8) == pytest.approx(math.log(4))
    assert log_odds(0.8, written=True) == pytest.approx(0.6) and log_odds(None) == 0.0
    assert [log_odds(1.0), -log_odds(0.0)] == pytest.approx([12 * math.log(10)] * 2, rel=1e-4)


def test_the_largest_score_decides_and_negatives_flip_it() -> None:
    scores = {"short": 0.5, "kind": -2.0, "plain": 0.0}
    assert dominant(scores, [(SHORT, False), (KIND, False)]) == Decided(-1, "kind")
    assert dominant(scores, [(SHORT, False), (KIND, True)]) == Decided(1, "kind")
    assert dominant(scores, [(PLAIN, False)]) == Decided(0, "plain")
    shown = [(SHORT, True), (KIND, False)]
    flipped = [(p, not negated) for p, negated in shown]
    assert dominant(scores, shown).sign == -dominant(scores, flipped).sign


def test_how_many_principles_are_drawn() -> None:
    ten = [Principle(f"p{i}", "x", negative="y" * (i % 2)) for i in range(10)]
    found = [drawn(ten, random.Random(i), 0.2, 8) for i in range(4000)]
    weights = [0.2 * 0.8 ** (m - 1) for m in range(1, 9)]
    want = sum(m * w for m, w in enumerate(weights, 1)) / sum(weights)
    assert mean([float(len(f)) for f in found]) == pytest.approx(want, abs=0.12)
    assert {len(f) for f in found} == set(range(1, 9))
    assert all(len({p.id for p, _ in f}) == len(f) for f in found)
    turned = [negated for f in found for p, negated in f if p.negative]
    assert mean([float(t) for t in turned]) == pytest.approx(0.5, abs=0.03)
    assert not any(negated for f in found for p, negated in f if not p.negative)


def test_rules_come_before_principles() -> None:
    source = random.Random(0)
    decided = Decided(1, "kind")
    other = "Das Holz ist nicht nass und die Luft ist mit dabei."
    assert ruled("Why?", (LONG, BRIEF), decided, source) == decided
    assert ruled("Why?", (other, BRIEF), decided, source) == Decided(-1, rule="language")
    assert ruled("Why?", (other, other), decided, source).sign == 0
    found = [ruled("Why?", ("As an AI language model, I", BRIEF), decided, source)
             for _ in range(400)]  # fmt: skip
    share = mean([float(f == Decided(-1, rule="disclaimer")) for f in found])
    assert share == pytest.approx(0.5, abs=0.08) and {f.sign for f in found} == {1, -1}


class Writer:
    """Stands for `generate`: two answers to every prompt, in turn the one and the other first."""

    def __call__(self, model: object, prompts: list[object], *, n: int, **_: object) -> object:
        made = [SimpleNamespace(text=t, finish="stop") for t in (LONG, BRIEF)] * (n // 2)
        return [made[::-1] if i % 2 else made for i in range(len(prompts))]


def shorter(
    judge: object, ours: Sequence[Row], theirs: Sequence[Row], *, criteria: str
) -> Comparison:
    """Stands for a judge: sure that shorter is brief, swayed by place in all else."""
    first = [0.9 if len(str(a["completion"])) < len(str(b["completion"])) else 0.1
             for a, b in zip(ours, theirs, strict=True)]  # fmt: skip
    if criteria != SHORT.text:
        return Comparison([0.8] * len(first), [0.2] * len(first))
    return Comparison(first, first)


def test_pairs_with_lineage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "generate", Writer())
    monkeypatch.setattr(module, "compare", shorter)
    model = SimpleNamespace(key="policy", name="policy", is_served=False, base=None)
    prompts = Table("prompt", [{"prompt": f"Why does wood burn, {i}?"} for i in range(20)])
    with use(Context(seed=3, folder=tmp_path)) as context:
        made = module.salmon(model, prompts, RULES, n=1, noise=0.0)
    assert made.kind == "pair" and 20 < len(made) < 80
    for row in made:
        lineage = row["lineage"]
        assert isinstance(lineage, dict) and row["principle"] == "short"
        turned = "short" in lineage["negated"]
        told = row["principles"]
        assert isinstance(told, list) and (SHORT.negative if turned else SHORT.text) in told
        assert row["chosen"] == (LONG if turned else BRIEF)
        assert row["rejected"] == (BRIEF if turned else LONG)
        assert [abs(s) for s in lineage["odds"]["short"]] == pytest.approx([math.log(9)] * 2)
        assert lineage["generator"] == lineage["judge"] == "policy" and not lineage["flipped"]
    assert {("short" in r["lineage"]["negated"]) for r in made} == {True, False}  # type: ignore[index]
    with use(Context(seed=3, folder=tmp_path / "noisy")):
        noisy = module.salmon(model, prompts, RULES, n=1, noise=0.5, rule_noise=0.0)
    turned = [r["lineage"]["flipped"] for r in noisy]  # type: ignore[index]
    assert set(turned) == {True, False}
    for row, other, flipped in zip(made, noisy, turned, strict=True):
        assert other["chosen"] == row["rejected" if flipped else "chosen"]
    facts = next(m for m in context.metrics if "consistent" in m)
    assert facts["consistent"] == pytest.approx(1 / 3) and facts["rows"] == len(made)
    with use(Context(seed=3)), pytest.raises(InputError, match="tells the two answers"):
        module.salmon(model, prompts, RULES, least_characters=90)
    with pytest.raises(InputError, match="'rate'"):
        module.salmon(model, prompts, RULES, rate=0.0)


# The reward model and what it is told


def test_the_loss_is_of_the_difference_and_ln_2_where_there_is_none() -> None:
    none = [0.0] * 3
    one = loss_of_pairs(scored([1.0, 2.0, 0.5], [0.0, 3.0, 0.5], margin=none)).per_unit.detach()
    two = loss_of_pairs(scored([0.0, 3.0, 0.5], [1.0, 2.0, 0.5], margin=none)).per_unit.detach()
    gap = torch.tensor([1.0, -1.0, 0.0])
    assert torch.allclose(two - one, gap)  # -log s(-d) + log s(d) = d
    assert float(one[2]) == pytest.approx(math.log(2))


def test_imitation_is_of_the_chosen_answers_own_tokens() -> None:
    tensors = {"scores": padded(OTHER), "logp": padded(LOGP).requires_grad_()}
    columns = {"margin": torch.zeros(3), "answer_tokens": torch.tensor([2.0, 1.0, 3.0])}
    m = Measurements(mask_of(LOGP), tensors, columns)
    ranked = mean([softminus(w[-1] - x[-1]) for w, x in OTHER])
    spoken = mean([-mean(w[:n]) for (w, _), n in zip(LOGP, (2, 1, 3), strict=True)])
    made = loss_of_pairs(m, imitation=0.5)
    assert total(made) == pytest.approx(ranked + 0.5 * spoken, rel=1e-5)
    made.total().backward()
    slope = m["logp"].grad
    assert slope is not None and slope[:, 1].abs().sum() == 0
    assert slope[2, 0].tolist() == pytest.approx([-0.5 / 9] * 3 + [0.0], rel=1e-5)
    with pytest.raises(InputError, match="imitation"):
        loss_of_pairs(m, imitation=-1.0)


STUB = "By this guideline, the quality of the answer is"


def test_a_long_review_keeps_principles_and_stub() -> None:
    question = "Which of " + "many many " * 40 + "things burn?"
    answer, told = "Wood does, " + "and also " * 30 + "coal.", ["Be brief.", "Be kind."]
    plain = reviewed(question, answer, told)

    def at(room: int) -> tuple[str, str] | None:
        return fitted(question, answer, told, lambda text: len(text) <= room)

    assert at(len(plain)) == (plain, "")
    for room, what in ((len(plain) - 1, "question"), (len(plain) - 330, "question"),
                       (len(plain) - 400, "answer"), (420, "answer")):  # fmt: skip
        found = at(room)
        assert found is not None
        text, part = found
        assert part == what and len(text) == room  # no more is cut than must be
        assert text.endswith(f"- Be brief.\n- Be kind.\n\n{STUB}")
        assert text.startswith("Answer:\nWood does, and")
        assert "Question:\nWhich of many" in text and "things burn?\n\nGuideline" in text
        assert text.count(" ... ") == (1 if part == "question" else 2)
        assert (f"Answer:\n{answer}\n\n" in text) == (part == "question")
    assert at(240) is None
    # A short question is never cut, and an answer in its place.
    found = fitted("Why?", answer, told, lambda text: len(text) <= 300)
    assert found is not None and "Question:\nWhy?\n" in found[0] and found[1] == "answer"
    assert fitted("Why?", "Since.", told, lambda text: len(text) <= 100) is None


def test_rows_are_cut_to_the_limit_and_counted(tiny_path: Path) -> None:
    loaded = Model.open(tiny_path).load_module()
    head = len(prompt_ids(loaded.tokenizer, ROLE))
    rows: list[Row] = [
        {"prompt": "Why? " * 60, "chosen": LONG, "rejected": BRIEF, "principles": ["Be brief."]},
        {"prompt": "Why?", "chosen": "No. " * 120, "rejected": BRIEF, "principles": ["Be kind."]},
        {"prompt": "Why?", "chosen": LONG, "rejected": BRIEF, "principles": ["Be plain. " * 50]},
        {"prompt": "Why?", "chosen": LONG, "rejected": BRIEF},
    ]
    spec, limit = objective_of(loss_of_pairs), head + 320
    table = Table("pair", rows)
    units, notes = read_units(spec, loaded, table, limit, Reviewed())
    wanted = {"rows": 3, "cut_question": 2, "cut_answer": 1, "left_out_long": 1}
    carried = {"with_margin": 0, "with_answer_tokens": 3}
    assert notes == wanted | carried  # and no "cut": nothing is lost at an end
    for unit in units:
        for ids in unit.answers:
            assert head + len(ids) <= limit
            assert loaded.tokenizer.decode(list(ids)).endswith(STUB)
    # One token is a byte: the whole answer with what stands before it.
    assert units[0].numbers["answer_tokens"] == len("Answer:\n" + LONG)
    with pytest.raises(InputError, match="no room"):
        read_units(spec, loaded, table, head + 100, Reviewed())


TALK = [{"role": "user", "content": "Is it dry?"}, {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why?"}]  # fmt: skip
TOLD = "user: Is it dry?\n\nassistant: Yes.\n\nuser: Why?"


def test_of_a_dialogue_all_is_the_question(judge: Model) -> None:
    """As the judge reads it that compares the answers."""
    assert f"Question:\n{TOLD}\n\nGuideline" in reviewed(TALK, "x", [])
    short = fitted(TALK, LONG * 9, [], lambda text: len(text) <= 400)
    assert short is not None and short == fitted(TOLD, LONG * 9, [], lambda text: len(text) <= 400)
    ref = {"use": "salmon_reward", "model": hold(judge), "principles": ["Be brief."]}
    rows: list[Row] = [{"prompt": p, "completion": LONG} for p in (TALK, TOLD, "Why?")]
    whole, same, last = score("reward", ref, rows)
    assert whole == pytest.approx(same, abs=1e-5) and abs(whole - last) > 1e-4


def test_tools_are_part_of_the_question_alone(tiny_path: Path) -> None:
    loaded = Model.open(tiny_path).load_module()
    tool = {"type": "function", "function": {"name": "dry", "parameters": {}}}
    row: Row = {"prompt": TALK, "chosen": LONG, "rejected": BRIEF, "tools": [tool]}
    spec = objective_of(loss_of_pairs)
    (unit,), _ = read_units(spec, loaded, Table("pair", [row]), 2048, Reviewed())
    assert list(unit.prompt) == prompt_ids(loaded.tokenizer, ROLE)
    for ids in unit.answers:
        text = loaded.tokenizer.decode(list(ids))
        assert f"Question:\ntools: {json.dumps([tool])}\n\n{TOLD}\n\nGuideline" in text


def test_a_reward_model_that_imitates(tiny_path: Path, tmp_path: Path) -> None:
    words = "lime oak rain stone river cloud".split()
    table = Table("pair", [{"prompt": w, "chosen": f"{w}!", "rejected": f"{w}?"} for w in words])
    seen: dict[float, list[dict[str, object]]] = {}
    for weight in (0.0, 2.0):
        with use(Context(folder=tmp_path / str(weight))) as context:
            made = methods["train/salmon"](
                Model.open(tiny_path), table, imitation=weight, steps=6, lr=3e-3, batch=6
            )
        assert isinstance(made, Model) and has_head(made)
        seen[weight] = [dict(m) for m in context.metrics if "loss" in m]
    assert all("logp" not in m for m in seen[0.0])
    first, last = (float(str(seen[2.0][i]["logp"])) for i in (0, -1))
    assert last > first + 0.1
    # At the start all scores are 0, so the two losses differ by the term alone.
    gap = float(str(seen[2.0][0]["loss"])) - float(str(seen[0.0][0]["loss"]))
    assert gap == pytest.approx(-2 * first, rel=1e-4)


def test_principles_are_drawn_by_weight_without_replacement() -> None:
    first = [draw_principles(RULES.items, 1, "", random.Random(i))[0] for i in range(3000)]
    for rule in RULES:
        share = first.count(rule.text) / len(first)
        assert share == pytest.approx(rule.priority / 6, abs=0.03)
    every = draw_principles(RULES.items, 9, "", random.Random(0))
    assert sorted(every) == sorted(p.text for p in RULES)
    sums = [*RULES, Principle("numerical_care", "Count well.")]
    found = [draw_principles(sums, 1, "reasoning", random.Random(i))[0] for i in range(200)]
    assert found.count("Count well.") > 180  # 129 of 135


@pytest.fixture
def judge(tiny_path: Path, tmp_path: Path) -> Model:
    """The tiny model with a made-up head."""
    head = ScoreHead(128)
    with torch.no_grad():
        head.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    return head.added_to(Model.open(tiny_path), tmp_path / "head")


def test_the_same_weights_reward_what_they_are_told(judge: Model) -> None:
    rows: list[Row] = [
        {"prompt": "Why?", "completion": t, "id": "a", "rollout": "rollout/0/"} for t in "xy"
    ]

    def said(rows: list[Row] = rows, **more: object) -> list[float]:
        return score("reward", {"use": "salmon_reward", "model": hold(judge), **more}, rows)

    key = hold(RULES)
    every = said(principles=key)
    assert every == said(principles=[p.text for p in RULES])
    assert every != said(principles=[p.negative or p.text for p in RULES])
    assert said(principles=["a"], always=["b"]) == said(principles=["a", "b"])
    one = said(principles=key, draw=1)
    texts = [p.text for p in RULES if said(principles=[p.text]) == one]
    assert len(texts) == 1  # both answers of a visit are told the same
    visits = [said([r | {"rollout": f"rollout/{i}/"} for r in rows], principles=key, draw=1)
              for i in range(12)]  # fmt: skip
    assert len({v[0] for v in visits}) > 1  # another visit, another draw
    with pytest.raises(InputError, match="not principles"):
        said(principles=hold(judge))
    # Beyond the context of 2048 tokens the question's middle goes, and is said.
    long: list[Row] = [{"prompt": "Why? " * 600, "completion": "x"}]
    context = Context()
    with use(context):
        found = said(long, principles=["a"])
    fits = within(judge.load_module().tokenizer, 2048)
    cut = fitted(long[0]["prompt"], "x", ["a"], fits)
    assert cut is not None and cut[1] == "question" and cut[0].endswith(STUB)
    plain: Row = {"prompt": ROLE, "completion": cut[0], "finished": False}
    assert found == score_model(judge, [plain], "reviews")
    assert context.metrics == [{"reviews_cut": 1, "reviews": 1}]
    with pytest.raises(InputError, match="no room for an answer"):
        said(long, principles=["a " * 1200])


def test_rl_is_told_the_principles(judge: Model, tiny_path: Path, tmp_path: Path) -> None:
    rows = Table("prompt", [{"prompt": f"say {i}"} for i in range(2)])
    short = {"steps": 1, "batch": 2, "max_tokens": 4, "lr": 1e-4, "missing_end": 0.0, "draw": 0}
    model = Model.open(tiny_path)
    with use(Context(folder=tmp_path / "run", seed=1)):
        made = methods["salmon_ppo"](
            model, rows, reward_model=judge, principles=RULES, minibatches=1, **short
        )
        assert isinstance(made, Model) and len(made.weight_changes) == 2
        (path,) = (tmp_path / "run").glob("rollouts-*/000000.jsonl")
        lines = dict(json.loads(line) for line in path.read_text().splitlines())
        answers = [items[0][2] for items in lines["rollout/0//0/0"]]
        rewards = [values[0] for values, *_ in lines["rollout/0//reward"]]
        order = {p: i for i, p in enumerate(r["prompt"] for r in rows)}
        asked = [{"prompt": p, "completion": a} for p in order for a in answers]
        ref = {"use": "salmon_reward", "model": hold(judge), "principles": hold(RULES)}
        found = score("reward", {**ref, "always": ALWAYS}, asked)
        assert all(min(abs(r - f) for f in found) < 1e-5 for r in rewards)
        with pytest.raises(InputError, match="'principles'"):
            methods["salmon_ppo"](model, rows, reward_model=judge, **short)
    assert telling("salmon_reward", {}, None, None, "x") == {}


# RL by hand

BETA, BONUS, CAP, LONGEST = 0.2, 5.0, 0.6, 4


def steps(u: int, k: int, kind: str = "k1") -> list[float]:
    gaps = [OLD[u][k][t] - REF[u][k][t] for t in tokens_of(u, k)]
    cost = [max(g, 0.0) if kind == "k1" else math.exp(-g) + g - 1 for g in gaps]
    made = [-BETA * c for c in cost]
    made[-1] += REWARD[u][k] + BONUS * min(len(gaps) / LONGEST, CAP)
    return made


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_shaped_rewards(kind: str) -> None:
    made = token_rewards(rollout(), BETA, kind, BONUS, CAP, LONGEST)
    for u, k in ANSWERS:
        want = steps(u, k, kind)
        assert made[u, k, : len(want)].tolist() == pytest.approx(want, rel=1e-5)
        assert float(made[u, k].sum()) == pytest.approx(sum(want), rel=1e-5)


def whole(values: list[list[float]], longest: int) -> list[list[float]]:
    """Whitened over answers x longest, the places beyond an answer 0."""
    flat = [x for row in values for x in row + [0.0] * (longest - len(row))]
    m = mean(flat)
    deviation = math.sqrt(mean([(x - m) ** 2 for x in flat]) + 1e-8)
    return [[(x - m) / deviation for x in row] for row in values]


def test_salmon_ppo_by_hand() -> None:
    r = rollout()
    update = salmon_ppo(r, beta=BETA, cap=CAP, bonus=BONUS, max_tokens=6, vf=0.0)
    returns: list[list[float]] = []
    for u, k in ANSWERS:
        reward = [-BETA * max(OLD[u][k][t] - REF[u][k][t], 0.0) for t in tokens_of(u, k)]
        reward[-1] += REWARD[u][k] + BONUS * min(len(reward) / 6, CAP)
        returns.append([10 * sum(reward[t:]) for t in range(len(reward))])
    advantage = [
        [g - v for g, v in zip(row, VALUE[u][k], strict=True)]
        for row, (u, k) in zip(returns, ANSWERS, strict=True)
    ]
    white = whole(advantage, 6)
    policy: list[float] = []
    for i, (u, k) in enumerate(ANSWERS):
        n = len(returns[i])
        assert update.tensors["returns"][u, k, :n].tolist() == pytest.approx(returns[i], rel=1e-5)
        assert update.tensors["advantage"][u, k, :n].tolist() == pytest.approx(white[i], rel=1e-4)
        policy += [surrogate(ratio(u, k, t), white[i][t], 0.2, 0.2) for t in tokens_of(u, k)]
    assert total(loss_of(update, r)) == pytest.approx(mean(policy), rel=1e-4)


def test_rewards_whitened_without_their_mean_shifted() -> None:
    r = rollout()
    made = whitened(token_rewards(r, BETA, "k1", BONUS, CAP, 4), r, 6, shift=False)
    rows = [steps(u, k) for u, k in ANSWERS]
    flat = [x for row in rows for x in row + [0.0] * (6 - len(row))]
    for (u, k), want in zip(ANSWERS, whole(rows, 6), strict=True):
        shifted = [x + mean(flat) for x in want]
        assert made[u, k, : len(want)].tolist() == pytest.approx(shifted, rel=1e-4)
    alone = salmon_ppo(r, critic_rollouts=1)
    assert alone.head_only and not salmon_ppo(r, alone.state, critic_rollouts=1).head_only
