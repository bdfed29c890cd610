"""Losses mixed by weights: what each term sees, what is refused, how it is written."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from truing import recipe
from truing.cli import main
from truing.context import Context, use
from truing.core.batch.measure import joined
from truing.core.batch.row_kinds import CONVERSIONS
from truing.core.objective import Loss, Measurements, Objective, objective, objective_of
from truing.core.trainer.mix import MEASURED, VIEWS, Mixture, joins, mixed, refusal
from truing.core.training import HOOKS
from truing.errors import InputError
from truing.keys import modules_of, step_key
from truing.method import methods
from truing.models import Model
from truing.plan import Plan
from truing.readings import READINGS
from truing.tables import Row, Table

Mix = dict[str, object]
FAR = "smollm2-135m-instruct"
PAIRS: list[Row] = [
    {"prompt": f"say {i}", "chosen": f"yes {'very ' * (i % 3)}{i}", "rejected": f"no {i * 7}"}
    for i in range(6)
]


def spec_of(name: str) -> Objective:
    return objective_of(methods[f"train/{name}"].declared)


def defaults(name: str) -> dict[str, object]:
    return {n: p.default for n, p in spec_of(name).settings.items()}


def measured(lengths: Sequence[Sequence[int]], **columns: object) -> Measurements:
    """Made-up values of rows whose branches have these lengths; 9 at padding."""
    source = torch.Generator().manual_seed(3)
    longest, width = max(map(max, lengths)), max(map(len, lengths))
    length_UK = torch.tensor([[*row] + [0] * (width - len(row)) for row in lengths])
    mask = (torch.arange(longest) < length_UK[..., None]).float()
    made: dict[str, Tensor] = {}
    for name in ("logp", "ref_logp", "entropy", "sum_p2", "ref_kl_vocab"):
        value = torch.rand(mask.shape, generator=source) * (-2 if name.endswith("logp") else 1)
        made[name] = torch.where(mask > 0, value, 9.0)
    return Measurements(mask, made, {n: torch.tensor(c) for n, c in columns.items()})


def alone(name: str, m: Measurements, **settings: object) -> float:
    return float(spec_of(name)(m, {**defaults(name), **settings}).total())


def of(host: str, mix: Mix, m: Measurements, **settings: object) -> float:
    loss = mixed(spec_of(host), mix)(m, {**defaults(host), **settings})
    return float(loss.total())


# What each term sees


def test_pairs_as_every_kind_that_they_can_be_made_into() -> None:
    m = measured([[3, 2], [1, 4], [2, 2], [4, 1]])
    plain = alone("dpo", m)
    nll = -float((m.logp_UKT[:, 0] * m.mask_UKT[:, 0]).sum()) / 10  # 3 + 1 + 2 + 4 tokens
    assert of("dpo", {"sft": 0.5}, m) == pytest.approx(plain + 0.5 * nll)
    # + lp / |y|, the mean over all 9 tokens of the rejected answers
    worse = float((m.logp_UKT[:, 1] * m.mask_UKT[:, 1]).sum()) / 9
    assert of("dpo", {"gradient_ascent": 0.25}, m) == pytest.approx(plain + 0.25 * worse)
    # The terms of APO-zero on single answers are 1 - sigmoid(beta r_w) and sigmoid(beta r_l).
    r = m.ratio().tolist()
    each = sum(1 / (1 + math.exp(0.1 * w)) + 1 / (1 + math.exp(-0.1 * x)) for w, x in r)
    assert of("dpo", {"apo_zero_unpaired": 2}, m) == pytest.approx(plain + 2 * each / 8)
    # RRHF of two: relu(p_l - p_w) - p_w of mean log-probabilities.
    p = m.mean().tolist()
    ranked = sum(max(0.0, x - w) - w for w, x in p) / 4
    assert of("dpo", {"rrhf": 1.0}, m) == pytest.approx(plain + ranked)


def test_groups_show_their_best_and_their_worst() -> None:
    scores = [[0.0, 2.0, 1.0], [3.0, 1.0, 0.0], [1.0, 1.0, 1.5]]
    m = measured([[2, 3, 1], [1, 4], [2, 2, 3]], scores=scores)
    best, worst = [1, 0, 2], [0, 1, 0]
    lp, ref = m.seq().tolist(), m.seq("ref_logp").tolist()
    z = [
        (lp[i][b] - ref[i][b]) - (lp[i][w] - ref[i][w])
        for i, (b, w) in enumerate(zip(best, worst, strict=True))
    ]
    dpo = sum(math.log1p(math.exp(-0.3 * d)) for d in z) / 3
    nll = -sum(lp[i][b] for i, b in enumerate(best)) / (3 + 1 + 3)
    found = of("rrhf", {"dpo": {"weight": 0.5, "beta": 0.3}, "sft": 2.0}, m)
    assert found == pytest.approx(alone("rrhf", m) + 0.5 * dpo + 2 * nll)


def test_single_answers_show_the_good_or_the_bad_ones() -> None:
    m = measured([[2], [3], [1], [4]], label=[1.0, 0.0, 1.0, 0.0])
    host = alone("apo_zero_unpaired", m)
    lp = m.seq()[:, 0].tolist()
    good, bad = -(lp[0] + lp[2]) / 3, (lp[1] + lp[3]) / 7
    found = of("apo_zero_unpaired", {"sft": 0.5, "gradient_ascent": 0.1}, m)
    assert found == pytest.approx(host + 0.5 * good + 0.1 * bad)
    loss = mixed(spec_of("apo_zero_unpaired"), {"sft": 1.0})(m, defaults("apo_zero_unpaired"))
    assert loss.metrics["sft/logp"].tolist() == pytest.approx([lp[0] / 2, lp[2]])
    none = measured([[2], [3]], label=[0.0, 0.0])
    assert of("apo_zero_unpaired", {"sft": 1.0}, none) == pytest.approx(
        alone("apo_zero_unpaired", none)
    )


def test_further_texts_and_other_rows_answers_are_seen_by_their_own_term_alone() -> None:
    three = measured([[3, 2, 1], [1, 4, 2]])
    two = three.branches(0, 1)
    spec = mixed(spec_of("dpo"), {"slic": 1.0, "ipo": 0.5})
    assert spec.texts == {"gold": "chosen"}
    expected = alone("dpo", two) + alone("slic", three) + 0.5 * alone("ipo", two)
    assert float(spec(three, defaults("dpo")).total()) == pytest.approx(expected)
    # Required where one of the terms needs it.
    assert mixed(spec_of("slic"), {"tpo": 1.0}).texts == {"gold": None}
    # KTO's second branch is another row's answer.
    m = measured([[3, 2], [1, 4], [2, 2]], label=[1.0, 0.0, 1.0], prompt_is_good=[0.5] * 3)
    own = Measurements(m.branches(0).mask_UKT, m.branches(0).tensors, m.columns)
    assert of("bco", {"kto": 0.5}, m) == pytest.approx(alone("bco", own) + 0.5 * alone("kto", m))
    assert of("kto", {"bco": 0.5}, m) == pytest.approx(alone("kto", m) + 0.5 * alone("bco", own))


def test_a_term_sees_what_it_declares_and_nothing_else() -> None:
    """A reward model's measurement and a group's column are both called `scores`."""
    m = measured([[2, 3], [1, 4]], margin=[0.0, 0.0])
    scored = m.having(scores=m["entropy"])
    expected = alone("bradley_terry", scored) + alone("dpo", m)
    ranked = Measurements(m.mask_UKT, m.tensors, {"scores": torch.tensor([[1.0, 0.0]] * 2)})
    expected += 0.5 * alone("rrhf", ranked)
    found = of("bradley_terry", {"dpo": 1.0, "rrhf": 0.5}, scored)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("name", joins(spec_of("dpo")))
def test_all_that_joins_dpo_adds_its_own_value(name: str) -> None:
    spec = spec_of(name)
    three = measured([[3, 2, 2], [1, 4, 3], [2, 2, 1]])  # the third for a further text
    m = three if spec.texts else three.branches(0, 1)
    columns = {n: torch.full((3,), 0.5 if d is None else d) for n, d in spec.columns.items()}
    seen = replace(m, columns=columns)
    if spec.rows in ("example", "negative"):
        seen = m.branches(int(spec.rows == "negative"))
    elif spec.rows == "group":
        seen = replace(m, columns={"scores": torch.tensor([[1.0, 0.0]] * 3)})
    elif spec.rows == "unpaired":
        both = joined([m.branches(0), m.branches(1)])
        label = torch.tensor([1.0] * 3 + [0.0] * 3)
        seen = replace(
            both, columns={n: c.repeat(2) for n, c in columns.items()} | {"label": label}
        )
    loss = mixed(spec_of("dpo"), {name: 0.25})(replace(m, columns=columns), defaults("dpo"))
    expected = alone("dpo", m.branches(0, 1)) + 0.25 * alone(name, seen)
    assert float(loss.total()) == pytest.approx(expected, rel=1e-5)
    own = {n for n in loss.metrics if "/" not in n}
    assert own == {"accuracy", "margin", "reward_chosen", "reward_rejected", "logp_chosen"}
    assert all(n.startswith(f"{name}/") for n in set(loss.metrics) - own)


def test_weights_may_be_of_the_method_too_and_may_be_zero_or_negative() -> None:
    m = measured([[3, 2], [1, 4]])
    dpo, ipo, nca = alone("dpo", m), alone("ipo", m), alone("nca", m)
    assert of("dpo", {"dpo": 0.5, "train/ipo": -2}, m) == pytest.approx(0.5 * dpo - 2 * ipo)
    assert of("dpo", {"ipo": 0, "nca": {}}, m) == pytest.approx(dpo + nca)
    notes = mixed(spec_of("dpo"), {"dpo": 0.5, "sft": 2.0, "bco-pair": 1})
    assert isinstance(notes, Mixture)
    assert notes.notes() == "0.5 dpo + 2 sft (chosen answers as examples) + 1 bco_pair"


def test_what_is_measured_is_the_union_each_once() -> None:
    spec = mixed(spec_of("simpo"), {"wpo": 1.0, "tdpo1": 1.0, "sppo": {"beta": 0.2}})
    assert spec.needs == ("logp", "ref_logp", "sum_p2", "ref_kl_vocab")
    assert spec.columns == {"win_chosen": 1.0, "win_rejected": 0.0}
    assert spec.takes_reference and (spec.name, spec.rows, spec.unit) == ("simpo", "pair", "pair")
    assert mixed(spec_of("simpo"), {"aot": 1.0}).unit == "batch"
    plain = mixed(spec_of("bradley_terry"), {"davidson": 1.0})
    assert plain.asked(defaults("bradley_terry")) == ("scores",)
    more = mixed(spec_of("bradley_terry"), {"sft": 1.0})
    assert set(more.asked(defaults("bradley_terry"))) == {"scores", "logp"}


def test_answers_must_end_where_any_term_learns_them() -> None:
    bradley_terry = spec_of("bradley_terry")
    assert not bradley_terry.answers_end and spec_of("sft").answers_end
    assert mixed(bradley_terry, {"sft": 1.0}).answers_end
    assert not mixed(bradley_terry, {"davidson": 1.0}).answers_end
    assert mixed(spec_of("dpo"), {"ipo": 1.0}).answers_end


def test_every_term_keeps_a_state_of_its_own() -> None:
    spec = mixed(spec_of("dpo"), {"bco": {"weight": 1.0, "beta": 1.0}})
    assert spec.keeps_state and spec.unit == "batch"
    m = measured([[3, 2], [1, 4]], prompt_is_good=[0.5, 0.5])
    first = spec(m, defaults("dpo"))
    assert first.state is not None and set(first.state) == {"bco/mean", "bco/count"}
    mean = float(m.ratio().mean())
    assert float(first.state["bco/mean"]) == pytest.approx(mean) and first.state["bco/count"] == 4
    other = measured([[2, 2], [3, 1]], prompt_is_good=[0.5, 0.5])
    second = spec(other, defaults("dpo"), first.state)
    both = (mean + float(other.ratio().mean())) / 2
    assert second.state is not None and float(second.state["bco/mean"]) == pytest.approx(both)
    assert float(second.metrics["bco/delta"][0]) == pytest.approx(both)


# What is refused, and when


@pytest.mark.parametrize(
    ("host", "mix", "parts"),
    [
        ("dpo", {"ipoo": 1}, ["ipoo: unknown objective 'ipoo'. Did you mean 'ipo'?"]),
        ("dpo", {"grpo": 1}, ["grpo: cannot be added to dpo: it is no loss on given rows", "sft"]),
        ("dpo", {"kto": 1}, ["needs answers to other prompts", "Can be added: alphapo, aot,"]),
        ("dpo", {"neftune": 1}, ["it changes more than the loss (hook 'noisy_embeddings')"]),
        ("dpo", {"forward_kl": 1}, ["it learns from teachers of its own"]),
        ("dpo", {"mah_dpo": 1}, ["it trains output heads of its own"]),
        ("dpo", {"bradley_terry": 1}, ["it trains a score head, and dpo has none"]),
        ("sft", {"dpo": 1}, ["it trains on rows of kind 'pair', sft on 'example'", "added: dft"]),
        ("kto", {"dpo": 1}, ["rows of kind 'pair', kto on 'unpaired'", "apo_zero_unpaired"]),
        ("rrhf", {"slic": 1}, ["its further texts (gold) stand beside other rows"]),
        ("salmon", {"dpo": 1}, ["salmon writes its rows anew", "Can be added: none"]),
        ("outcome_process_reward", {"process_reward": 1}, ["writes its rows anew", "added: none"]),
        ("tr_dpo", {"tdpo1": 1}, ["the reference of tr_dpo moves"]),
        ("dpo", {"ipo": 0, "dpo": 2}, ["adds nothing: no other objective has a weight but 0"]),
        ("dpo", {}, ["adds nothing", "Such as {sft: 0.5}"]),
        ("dpo", {"dpo": 1.0}, ["adds nothing"]),
        ("dpo", {"dpo": {"beta": 0.2}, "sft": 1}, ["its own settings stand beside 'mix'"]),
        ("dpo", {"ipo": 1, "train/ipo": 1}, ["train/ipo: is given twice"]),
        ("dpo", {"ipo": {"weight": "much"}}, ["ipo: a weight must be a finite number"]),
        ("dpo", {"ipo": {"weight": math.inf}}, ["ipo: a weight must be a finite number"]),
        ("dpo", {"ipo": {"bata": 0.2}}, ["ipo: unknown setting 'bata'. Did you mean 'beta'?"]),
        ("dpo", {"ipo": {"lr": 0.2}}, ["ipo: 'lr' holds for the whole step"]),
        ("dpo", {"ipo": {"beta": "x"}}, ["ipo: setting 'beta': input should be a valid number"]),
        ("dpo", {"ipo": {"beta": -1}}, ["ipo: setting 'beta' must be above 0"]),
        ("dpo", {"cdpo": {"label_smoothing": 0.7}}, ["'label_smoothing' must be in [0, 0.5)"]),
        ("dpo", {"ipo": [1]}, ["'mix'"]),
        ("dpo", {"ipo": math.nan}, ["'mix'", "finite"]),
    ],
)
def test_refused_with_one_message_before_a_model_is_opened(
    host: str, mix: Mix, parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "open", lambda *_: pytest.fail("a model was opened"))
    plan = Plan("p")
    plan.step("made", f"train/{host}", model=FAR, data="helpful_pairs", mix=mix)
    with pytest.raises(InputError) as error:
        plan.check()
    said = str(error.value)
    assert all(p in said for p in ["setting 'mix'", "step made", *parts]), said


def test_what_a_term_needs_of_a_step_is_asked_before_a_model_is_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Model, "open", lambda *_: pytest.fail("a model was opened"))
    plan = Plan("p")
    plan.step("made", "train/bco", model=FAR, data="helpful_pairs", mix={"kto": 1.0}, batch=1)
    with pytest.raises(InputError, match="'batch' must be at least 2"):
        plan.check()


def test_columns_of_a_term_are_read_where_another_compares_rows(
    tiny_path: Path, tmp_path: Path
) -> None:
    rows: list[Row] = [
        {"prompt": f"p{i}", "completion": "c", "label": i % 2 == 0, "prompt_is_good": 0.5 + i}
        for i in range(2)
    ]
    with use(Context(folder=tmp_path)), pytest.raises(InputError, match="prompt_is_good") as error:
        methods["bco"](Model.open(tiny_path), Table("unpaired", rows), mix={"kto": 1.0}, steps=1)
    assert error.value.where.endswith("row 2")


def test_what_only_a_plug_in_could_bring_is_refused_too() -> None:
    @objective(unit="pair", rows="pair", needs=("logp", "my_own"))
    def mine(m: Measurements, *, beta: float = 0.1) -> Loss:
        return Loss(m.seq("my_own")[:, 0])

    assert "my_own" not in MEASURED
    assert "(my_own) is its own" in refusal(spec_of("dpo"), objective_of(mine))

    @objective(unit="batch", rows="example")
    def whole(m: Measurements) -> Loss:
        return Loss(m.seq()[:, 0])

    assert "compares all rows of a step" in refusal(spec_of("kto"), objective_of(whole))
    assert refusal(spec_of("dpo"), objective_of(whole)) == ""
    with pytest.raises(InputError, match="'mix' is the engine's"):

        @objective(unit="pair", rows="pair")
        def taken(m: Measurements, *, mix: float = 0.1) -> Loss:
            return Loss(m.seq()[:, 0])


def test_views_are_the_conversions_of_rows() -> None:
    read = {given for given, _ in READINGS}  # as rows of another kind, which views are of
    assert set(VIEWS) == {kinds for kinds in CONVERSIONS if kinds[0] not in read}


@pytest.mark.parametrize("host", ["dpo", "sft", "kto", "rrhf", "bradley_terry", "forward_kl"])
def test_joins_says_what_mixed_takes(host: str) -> None:
    names = joins(spec_of(host))
    assert names and host not in names
    for name in names:
        assert isinstance(mixed(spec_of(host), {name: 1.0}), Mixture)
    hooked = [n for n in names if spec_of(n).hook or spec_of(n).teachers or spec_of(n).heads]
    assert hooked == [] and HOOKS


# How it is written


def test_yaml_the_command_line_and_the_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "open", lambda *_: pytest.fail("a model was opened"))
    head = f"steps:\n  made:\n    do: train/dpo\n    model: {FAR}\n    data: helpful_pairs\n"
    (tmp_path / "r.yaml").write_text(head + "    mix: {nca: 0.5, sft: {weight: 0.2}}\n")
    (one,) = recipe.load(tmp_path / "r.yaml").check()
    assert one.settings["mix"] == {"nca": 0.5, "sft": {"weight": 0.2}}
    (tmp_path / "bad.yaml").write_text(head + "    mix: {nca: 0.5, stf: 0.2}\n")
    with pytest.raises(InputError, match=r"bad\.yaml line 6 step made: setting 'mix': stf: unk"):
        recipe.load(tmp_path / "bad.yaml").check()
    words = ["train", "dpo", "--model", FAR, "--data", "helpful_pairs", "--mix"]
    for written in ('{"ippo": 0.5}', "{ippo: 0.5}"):
        assert main([*words, written]) == 2
        assert "Did you mean 'ipo'?" in capsys.readouterr().err
    assert main(["show", "dpo"]) == 0
    assert "--mix" in capsys.readouterr().out
    dpo = methods["dpo"]
    values = [dpo.validate({"mix": mix}) for mix in (None, {"ipo": 0.5}, {"ipo": 0.25})]
    assert len({step_key(dpo, {}, v, 0) for v in values}) == 3
    assert "truing.train.preference.ipo" in modules_of(dpo, values[1], {})
    assert "truing.train.preference.ipo" not in modules_of(dpo, values[0], {})


def test_columns_that_a_term_needs_are_looked_for_in_the_data() -> None:
    data = {"data": Table("pair", PAIRS)}
    dpo = methods["dpo"]
    dpo.check(dpo.validate({"mix": {"bco": 1.0, "rrhf": 1.0, "slic": 0.1}}), data)
    with pytest.raises(InputError, match="needs the column 'gold'"):
        dpo.check(dpo.validate({"mix": {"tpo": 1.0}}), data)


def test_settings_survive_json() -> None:
    values = methods["dpo"].validate({"mix": {"ipo": {"weight": 1, "beta": 0.2}, "sft": 2}})
    assert methods["dpo"].validate(json.loads(json.dumps(values))) == values
