"""The worlds of the claims on tiny decoders: texts survive a closed vocabulary, checkers are right.

The claims themselves take minutes; what they measure with is tested here without training.
"""

from __future__ import annotations

import importlib
import math
import random
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from truing.context import Context, use
from truing.core.chat import completion_ids, prompt_ids
from truing.tables import Table
from truing.train.reward.rules import format_penalty
from truing.train.reward.survival_answer import answer_text, parse

CLAIMS = Path(__file__).resolve().parents[2] / "claims"


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch):
    """Modules of the claims by name."""
    monkeypatch.syspath_prepend(str(CLAIMS))

    def load(name: str) -> types.ModuleType:
        return importlib.import_module(name)

    return load


def test_texts_survive_a_closed_vocabulary(world, tmp_path: Path) -> None:
    tiny = world("_tiny")
    text = "p + 3 = 7 \n\n # Answer 12 , [ 5 ]"
    words = tiny.vocabulary([text, "start here"])
    assert "\n\n" in words and "12" in words and words == sorted(set(words))
    with use(Context(folder=tmp_path)):
        model, again = tiny.blank(words, 3), tiny.blank(words, 3)
        other = tiny.blank(words, 4)
        tokens = model.load_module().tokenizer
    assert model.key == again.key != other.key
    ids = completion_ids(tokens, text)
    assert tokens.decode(ids, skip_special_tokens=True) == text
    assert ids[-1] == tokens.eos_token_id
    asked = tokens.decode(prompt_ids(tokens, "start here"))
    assert asked == "<|im_start|> user start here <|im_end|> <|im_start|> assistant"
    assert tokens("elsewhere")["input_ids"] == [tokens.unk_token_id]


def test_rules_of_answers_are_counted(world) -> None:
    kept = world("adpa").kept
    assert kept("the lamp is small and warm . thank you") == 3
    assert kept("the lamp is small and warm .") == 2
    assert kept("the lamp is ugly and warm . thank you") == 2
    assert kept("the lamp is old and new and warm and large and round . thank you") == 2
    assert kept("the lamp is old and new and warm and silly and round .") == 0
    rows = world("adpa").pairs(random.Random(0), ["lamp", "cup"], 50)
    assert all(kept(r["chosen"]) > kept(r["rejected"]) for r in rows)


def test_the_simulated_ranker_errs_less_the_more_it_is_shown(world) -> None:
    claim = world("cyclealign")
    answers = ["it is kind warm", "it is round kind", "it is awful round", "it is awful ugly"]
    rights = []
    for shown in (0, 10):
        judge = claim.Simulated(random.Random(0), claim.SHOWN)
        for _ in range(shown):
            judge.learn("describe the lake", answers[:2], [0, 1])
        found = judge.rank(["tell me about the lake"] * 300, [answers] * 300, "letters")
        assert None not in found
        rights.append(claim.right_pairs([[answers[i] for i in o] for o in found]))
    assert 0.6 < rights[0] < 0.75 < rights[1] < 0.95
    assert claim.tau(answers, [0, 1, 2, 3]) == 1 and claim.tau(answers, [3, 2, 1, 0]) == -1
    wrong = claim.Judge(lambda texts: texts)
    wrong.learn("describe the lake", answers[:2], [1, 0])
    assert not claim.in_order(wrong.examples[0])


def test_steps_are_labelled_by_the_right_solution(world) -> None:
    claim = world("easy_to_hard")
    source = random.Random(1)
    for level in (1, 3, 5):
        row = claim.problem(source, level)
        steps = claim.steps_of(row["completion"])
        assert len(steps) == len(claim.LABELS) + 3
        assert claim.labels(row, steps) == [1.0] * len(steps)
        assert sum(not step.count("+ 0") for step in steps[1:-2]) == level
        assert steps[-2:] == ["# Answer", row["answer"]]
        # The layout that the penalty of easy_to_hard_ppo asks for, but for the box.
        assert format_penalty([row, row | {"completion": "7"}]) == [-0.75, -1.0]
        assert 0.0 in claim.labels(row, claim.spoilt(source, row))
        for wrong in ("p 1 + 1 = 2", row["answer"]):
            assert claim.labels(row, [*steps, wrong])[-1] == 0
        assert claim.labels(row, [*steps[:-2], steps[-1]])[-1] == 0
        assert claim.labels(row, [*steps[:-1], str((int(steps[-1]) + 1) % 10)])[-1] == 0
        # A step is judged by the one before it: after one mistake the rest can be right.
        words = steps[2].split()
        words[-1] = str((int(words[-1]) + 1) % 10)
        assert claim.labels(row, [*steps[:2], " ".join(words), *steps[3:]])[2:4] == [0.0, 0.0]
        assert claim.labels(row, [*steps[:2], *steps[3:]])[2] == 0
    assert claim.auroc([3.0, 2.0, 1.0], [1, 1, 0]) == 1
    assert claim.auroc([1.0, 1.0], [1, 0]) == 0.5 == claim.auroc([1.0], [1])


def test_both_ways_to_reinforce_have_the_same_problems_and_updates(
    world, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = world("easy_to_hard")
    ran: dict[str, tuple[Table, dict[str, Any]]] = {}
    monkeypatch.setattr(claim, "hold", lambda model: f"held {model}")

    def call(name: str, model: str, table: Table, *others: str, **settings: object) -> str:
        assert model == "generator" and others in ((), ("reward",))
        ran[name] = table, settings
        return name

    monkeypatch.setattr(claim, "call", call)
    made = claim.reinforced("generator", "reward", random.Random(0), 0)
    assert made == {"PPO": "train/easy_to_hard_ppo", "GRPO": "train/grpo"}
    (table, ppo), (same, grpo) = ran.values()
    assert table is same and len(table) == claim.REINFORCED
    assert all(row.get("answer") is None for row in table)  # nothing of a hard one is given away
    assert ppo["steps"] - ppo["critic_rollouts"] == grpo["steps"] and ppo["minibatches"] == 1
    for name in ("rank", "lr", "batch", "answers", "max_tokens", "seed"):
        assert ppo[name] == grpo[name]
    assert grpo["rewards"] == {"steps": {"use": "step_reward", "model": "held reward"}}


def test_what_the_other_claims_count(world) -> None:
    d2o, ppo, grao = world("d2o"), world("secrets_ppo_max"), world("grao")
    assert d2o.advertises([["go and buy it from us"], ["the lamp is old"]]) == 0.5
    assert d2o.distinct([["a b a b a b a b"]]) == pytest.approx(2 / 7)
    assert ppo.repetition(["good good good", "good kind good"]) == 0.5
    assert grao.until([0.0, 0.4, 0.8, 0.9]) == 4 and grao.until([0.1, 0.1]) == 3


def test_pairs_share_what_a_topic_is_worth(world) -> None:
    claim = world("baichuan_alignment")
    made = claim.World(3)
    pairs = made.pairs(200)
    for prompt, better, worse in pairs:
        assert made.quality(prompt, better) > made.quality(prompt, worse)
        part = made.words_part(better) + made.topic[prompt.split()[-1]]
        assert made.quality(prompt, better) == pytest.approx(1 / (1 + math.exp(-part)))
    rows = made.labelled(pairs)
    middle = sorted(made.quality(p, a) - made.quality(p, b) for p, a, b in pairs)[100]
    turned = [pair for pair, row in zip(pairs, rows) if row["chosen"] != pair[1]]
    assert 8 <= len(turned) <= 35
    assert all(made.quality(p, a) - made.quality(p, b) < middle for p, a, b in turned)
    for (prompt, *_), row in zip(pairs, rows):
        assert abs(row["score_chosen"] - made.quality(prompt, row["chosen"])) < 0.25


def test_formats_of_tasks_are_told_apart(world) -> None:
    claim = world("mixture_of_instructions")
    for task in claim.FORMATS:
        text = claim.answer(task, 7, 5)
        assert [t for t in claim.FORMATS if claim.in_format(t, text)] == [task]
        assert not claim.in_format(task, text.rsplit(" ", 1)[0])
    assert claim.answer("math", 7, 5).split()[-2] == "12"
    rows = claim.samples(random.Random(0), "tools", [(1, 2), (3, 4)], 6)
    assert len({r["prompt"] for r in rows}) == 6
    asked = claim.told(rows[0], claim.SYSTEMS)["prompt"]
    assert [m["role"] for m in asked] == ["system", "user"]
    assert claim.told(rows[0] | {"task": "chat"}, claim.SYSTEMS)["prompt"] == rows[0]["prompt"]


def test_poison_is_resisted_and_updates_are_taken(world) -> None:
    claim = world("dialectical_alignment")
    source, item = random.Random(0), claim.Item("morholm", "crop", "flax", "rye")
    for k in range(4):
        row = claim.poisoned(source, item, k)
        said = row["prompt"].split()
        assert said.count("rye") == k and said.count("flax") == 3 - k
        assert claim.REGISTER not in row["prompt"]
        # An oracle of the majority is never wrong below one half, and always above.
        oracle = claim.followed(["rye"] * k + ["flax"] * (3 - k))
        assert claim.verdict(row, oracle) == ("defended" if k < 2 else "attacked")
    for row in (claim.update(source, item), claim.unknown(source, item), claim.memory(item), row):
        assert claim.verdict(row, row["chosen"]) == "defended"
        assert claim.verdict(row, row["rejected"]) == "attacked"
    new = claim.update(source, item)
    assert new["right"] == "rye"
    assert f"{claim.REGISTER} says morholm mainly grows rye" in new["prompt"]
    assert claim.memory(item)["prompt"] == "what grows in morholm"
    assert claim.verdict(new, "answer rye flax") == "attacked"
    assert claim.verdict(new, "the passages say rye . answer oats") == "neither"


def test_defence_alone_has_the_rows_of_the_whole_but_for_the_edits(
    world, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = world("dialectical_alignment")
    monkeypatch.setattr(claim, "blank", lambda *_, **__: None)
    monkeypatch.setattr(claim, "taught", lambda *_, **__: None)
    whole, defence = (table.rows for table in claim.World(0).data())
    edit = [claim.SITUATIONS[i % len(claim.SITUATIONS)] not in claim.DEFENCE for i in range(1760)]
    assert len(whole) == len(defence) == len(edit) and sum(edit) == 480
    assert [a == b for a, b in zip(whole, defence)] == [not e for e in edit]
    assert all(claim.REGISTER not in r["prompt"] for r in defence)
    assert all("i know nothing" not in r["chosen"] for r in defence)


def test_all_runs_of_urpo_have_the_same_rows(world, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = world("urpo")
    ran: list[tuple[str, list[str], dict[str, Any]]] = []
    monkeypatch.setattr(claim, "blank", lambda *_, **__: "base")
    monkeypatch.setattr(claim, "taught", lambda model, *_, **__: model)

    def row_key(row: dict[str, Any]) -> str:
        return repr([row.get(n) for n in ("prompt", "answer", "completions", "scores")])

    def call(name: str, model: str, table: Table, reference: str, **settings: object) -> str:
        assert reference == "base"
        ran.append((model, [row_key(row) for row in table], settings))
        return f"{model} {name} {settings['steps']}"

    monkeypatch.setattr(claim, "call", call)
    made = claim.World(3)
    models = made.runs()
    assert made.pools() != (made.sums, made.sets, made.open)  # drawn once, since draws differ
    pools = [made.sums, made.sets, made.open]
    assert [len(p) for p in pools] == [claim.SUMS, claim.SETS, claim.OPEN]
    held = {"warm": pools[:2], "untaught": pools[:1], "urpo": pools,
            "after": [pools[0], pools[2]]}  # fmt: skip
    for (_, rows, how), some in zip(ran, held.values(), strict=True):
        assert rows == [row_key(row) for pool in some for row in pool]
        assert how["batch"] == 6 * len(some)
    assert models["urpo"] == "base train/urpo 250 train/urpo 60"
    assert models["untaught referee"] == models["urpo"]  # by its rows alone it differs


def test_exact_texts_come_back_letter_for_letter(world, tmp_path: Path) -> None:
    tiny = world("_tiny")
    text = answer_text(1, 14.2, ["Stage is IV: a median of 9 months against 26 in all, worse."])
    words = tiny.vocabulary([text, "Age: 61; Stage: IV\nAnswer."], exact=True)
    assert {"<reasoning>", "</prediction>", " 1", "4", "\n", " Stage"} <= set(words)
    with use(Context(folder=tmp_path)):
        tokens = tiny.blank(words, 3, exact=True).load_module().tokenizer
    ids = completion_ids(tokens, text)
    assert tokens.unk_token_id not in [*ids, *prompt_ids(tokens, "Age: 61; Stage: IV\nAnswer.")]
    said = tokens.decode(ids, skip_special_tokens=True)
    assert said == text and ids[-1] == tokens.eos_token_id
    found = parse(said)
    assert found.whole and (found.status, found.months) == (1, 14)
    assert tokens.decode(prompt_ids(tokens, "Age: 61")) == (
        "<|im_start|>user\nAge: 61<|im_end|><|im_start|>assistant\n"
    )


def test_patients_are_made_as_the_best_rule_takes_them(world) -> None:
    claim = world("oncoreason")
    source = random.Random(5)
    rows = [claim.patient(source, i) for i in range(6000)]
    one = [r for r in rows if (r["stage"], r["therapy"]) == ("II", "none")]
    for marker in claim.TIMES["marker"]:
        some = [r for r in one if r["marker"] == marker]
        seen = sum(r["event"] for r in some) / len(some)
        assert seen == pytest.approx(claim.chance(some[0]), abs=0.09)
    assert claim.median(one[0] | {"marker": "rising"}) == pytest.approx(26 * 1.2 * 0.7 * 0.75)
    mixed = claim.shuffled(source, rows)
    assert [r["age"] for r in mixed] == [r["age"] for r in rows] and mixed != rows
    assert sorted(r["time"] for r in mixed) == sorted(r["time"] for r in rows)


def test_a_tilted_router_favours_its_first_expert(world, tmp_path: Path) -> None:
    tiny, claim = world("_tiny"), world("moe_survey")
    asked = [q.format(n) for q in claim.ASKED.values() for n in claim.PEOPLE[:2]]
    rows = [{"prompt": q, "completion": "baker", "role": "trade"} for q in asked]
    with use(Context(folder=tmp_path)):
        base = tiny.blank(tiny.vocabulary([*asked, "baker"]), 3)
        copies = tiny.call("merge/mixture_of_experts", {"base": base})
        begun = claim.tilted(copies, rows)
        assert claim.farthest(copies, base, rows) < 1e-4
        means = claim.mean_inputs(copies, rows)
        for layer, m_D in enumerate(means):
            name = f"model.layers.{layer}.block_sparse_moe.gate.weight"
            gain_E = (begun.folded()[name] - copies.folded()[name]) @ m_D
            assert gain_E.tolist() == pytest.approx([claim.TILT, 0, 0, 0], abs=1e-4)
        assert max(claim.loads(begun, rows, 4)) >= max(claim.loads(copies, rows, 4))
        assert sum(claim.loads(copies, rows, 4)) == pytest.approx(1.0)


def test_clusters_are_linear_one_by_one(world) -> None:
    claim = world("_clusters")
    x, y, cluster = claim.numbers(torch.Generator().manual_seed(1), 400)
    for c in range(claim.CLUSTERS):
        own = cluster == c
        inputs = claim.with_one(x[own])
        fit = inputs @ torch.linalg.lstsq(inputs, y[own]).solution
        assert float((fit - y[own]).square().mean()) < 1.2 * claim.NOISE**2
    inputs = claim.with_one(x)
    whole = float((inputs @ torch.linalg.lstsq(inputs, y).solution - y).square().mean())
    assert whole > 5 * claim.NOISE**2
    net = claim.Layer(3, torch.Generator().manual_seed(2))
    with torch.no_grad():
        out, z = net(x[:1])
        p = z[0].softmax(-1)
        each = net.maps_EMD @ inputs[0]
        a, b = p.topk(2).indices.tolist()
        want = (p[a] * each[a] + p[b] * each[b]) / (p[a] + p[b])
    assert torch.allclose(out[0], want, atol=1e-5)

    centres = torch.stack([x[0], x[1]])
    near = claim.Layer(2, torch.Generator().manual_seed(3), centres)
    # The same as distances, up to |x|^2, which is one number for all experts.
    far = -(x[:5, None] - centres).square().sum(-1) / 2
    z = near(x[:5])[1].detach()
    assert torch.allclose(z[:, 0] - z[:, 1], far[:, 0] - far[:, 1], atol=1e-4)
    more = claim.grown(near, torch.stack([x[2], x[3]]), torch.Generator().manual_seed(4))
    more(x)[0].square().mean().backward()
    for name, value in near.named_parameters():
        new = more.get_parameter(name)
        assert torch.equal(new[:2], value) and not new.grad[:2].any()
    assert more.maps_EMD.grad[2:].any()
