"""Budget, concurrency, time-out and retries as an address or a recipe says them, on servers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from misbehaving import good, server

from truing import cli
from truing.core.client import Limits, limited, meter
from truing.core.endpoints import endpoint, limits
from truing.core.generate import generate
from truing.errors import InputError, Stopped
from truing.keys import step_key
from truing.method import methods
from truing.models import Model
from truing.plan import Plan
from truing.recipe import load
from truing.runs import Run
from truing.serve.openai import Address, serving
from truing.sources import open_sources
from truing.train.reward.judged import judge_of
from truing.train.reward.served_reward import served_reward

ASKED = ["Hello", "Why?", "Where to?", "When?", "Who is it?"]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of the test's own, short waits, and no limits said before."""
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TRUING_API_KEY", "tok-en")
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(limits, "_said", {})
    monkeypatch.setattr(limits, "_whole", [])


@pytest.fixture(scope="module")
def far(tiny_path: Path) -> Iterator[Address]:
    with serving(Model.open(tiny_path), token="tok-en", name="tiny") as made:
        yield made


def asked(model: Model, prompts: list[str] = ASKED, **settings: Any) -> list[str]:
    drawn = generate(model, prompts, **{"max_tokens": 6, "greedy": True, **settings})
    return [row[0].text for row in drawn]


def test_a_budget_of_the_address_stops_and_the_next_goes_on(far: Address) -> None:
    plain = Model.open(f"{far.url}#tiny")
    few = Model.open(f"{far.url}#tiny?requests=2,concurrency=1")
    # How much may be asked changes no answer, and is no part of what the model is.
    assert few.base == plain.base and few.key == plain.key and few.name == "tiny"
    with pytest.raises(Stopped, match=r"budget of 2 requests.*3 of 5 replies are still") as caught:
        asked(few)
    assert caught.value.exit_code == 3 and "same command goes on" in caught.value.fix
    assert caught.value.fix.endswith("larger one: requests")
    with pytest.raises(Stopped, match=r"2 requests, \d+ tokens so far"):
        asked(few)  # in one process it is spent
    more = Model.open(f"{far.url}#tiny?requests=3")
    texts = asked(more)
    assert meter(far.url, "tiny").requests == 3  # the other two were kept
    with limited(Limits()):
        assert texts == asked(plain)


def test_limits_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Limits.of_environment() == Limits()
    said = {"MAX_REQUESTS": 3, "MAX_TOKENS": 500, "CONCURRENCY": 2, "TIMEOUT": 7.5}
    for name, value in said.items():
        monkeypatch.setenv(f"TRUING_{name}", f" {value} ")
    assert Limits.of_environment() == Limits(requests=3, tokens=500, concurrency=2, timeout=7.5)
    monkeypatch.setenv("TRUING_TIMEOUT", "soon")
    with pytest.raises(InputError, match="TRUING_TIMEOUT: not a number"):
        Limits.of_environment()


def test_opened_without_limits_it_has_none_of_its_own() -> None:
    url = "http://127.0.0.1:9/v1"
    Model.open(f"{url}#m?requests=5")
    Model.open(f"{url}#other")
    # A setting that names the model goes on under what was said where it was opened.
    judge_of(f"{url}#m")
    assert meter(url, "m").limits.requests == 5
    Model.open(f"{url}/#m")
    assert meter(url, "m") is meter() and meter().limits.requests == 0


@pytest.mark.parametrize("names", [("few", "bare"), ("bare", "few")])
def test_of_two_addresses_in_one_plan_the_limits_count(
    names: tuple[str, str], tmp_path: Path
) -> None:
    said = {"few": "http://127.0.0.1:9/v1#m?requests=5", "bare": "http://127.0.0.1:9/v1#m"}
    plan = Plan("p", folder=tmp_path)
    for name in names:
        plan.model(name, said[name])
        plan.step(f"of_{name}", "decode/best_of_n", model=name, n=2)
    open_sources(plan.check())
    assert meter("http://127.0.0.1:9/v1", "m").limits.requests == 5


def test_a_budget_of_tokens_of_the_address(far: Address) -> None:
    model = Model.open(f"{far.url}#tiny?tokens=130,concurrency=2")
    with pytest.raises(Stopped, match="the budget of 130 tokens"):
        asked(model, [f"word {i}" for i in range(20)])
    assert 20 < meter(far.url, "tiny").tokens <= 130


def test_the_budget_of_all_holds_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    with server(lambda n, body: good()) as (url, log), limited(Limits(requests=3)) as spent:
        with pytest.raises(Stopped, match=r"budget of 3 requests.*TRUING_MAX_REQUESTS"):
            asked(Model.open(f"{url}#m?requests=4,concurrency=1"))
        assert len(log.asked) == 3 == spent.requests and spent.tokens == 30
    monkeypatch.setenv("TRUING_MAX_REQUESTS", "4")
    with server(lambda n, body: good()) as (url, log):
        asked(Model.open(f"{url}#one?requests=3"), ASKED[:3])
        with pytest.raises(Stopped, match="budget of 4 requests"):
            asked(Model.open(f"{url}#other"), ASKED[:3], temperature=0.5)
        assert len(log.asked) == 4


def test_what_an_address_does_not_say_holds_for_all() -> None:
    with server(lambda n, body: (*good()[:3], 0.05)) as (url, log):
        with limited(Limits(concurrency=2)):
            asked(Model.open(f"{url}#m?requests=50"), [str(i) for i in range(8)])
        assert log.most == 2
        asked(Model.open(f"{url}#other?concurrency=3"), [str(i) for i in range(8)])
        assert log.most == 3


def test_time_out_and_retries_of_the_address() -> None:
    with server(lambda n, body: (*good()[:3], 0.6)) as (url, log):
        with pytest.raises(Stopped, match=r"no reply within 0.1 s, 2 times"):
            asked(Model.open(f"{url}#m?timeout=0.1,retries=1"), ASKED[:1])
        assert len(log.asked) == 2


def test_a_reward_behind_an_address_has_its_own_too() -> None:
    rows = [{"prompt": "say", "completion": c} for c in "abc"]

    def score(n: int, body: dict[str, Any]) -> Any:
        return 200, {}, {"data": [{"probs": [0.5]}]}, 0.0

    with server(score) as (url, log):
        place = f"{url.removesuffix('/v1')}/classify"
        with pytest.raises(Stopped, match="budget of 1 requests"):
            served_reward(rows, url=f"{place}#rm?requests=1")
        assert len(log.asked) == 1 and log.asked[0][2]["model"] == "rm"
        assert served_reward(rows, url=f"{place}#rm?requests=2") == [0.5] * 3
        assert len(log.asked) == 3 and "requests" not in json.dumps([b for _, _, b in log.asked])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("m?request=5", "unknown limit 'request'. Did you mean 'requests'"),
        ("m?requests=many", "requests must be a number"),
        ("m?requests=1.5", "requests must be a whole number"),
        ("m?tokens=inf", "tokens must be a number"),
        ("m?retries=-1", "retries must be 0 or more"),
        ("m?concurrency=0", "concurrency must be at least 1"),
        ("m?requests=3,timeout=0", "timeout above 0"),
        ("m?input_price=-1", "input_price must be 0 or more"),
        ("m?cost=3", "where the price of the tokens is said"),
        ("m?cost=3,input_price=1", "where the price of the tokens is said"),
    ],
)
def test_limits_that_are_none(name: str, told: str) -> None:
    with pytest.raises(InputError, match=told.replace("?", r"\?")) as caught:
        Model.open(f"http://bob:pa55@127.0.0.1:9/v1#{name}")
    assert "pa55" not in str(caught.value)


def test_a_question_mark_without_limits_belongs_to_the_name() -> None:
    assert Model.open("http://127.0.0.1:9/v1#what?").name == "what?"
    assert Model.open("http://127.0.0.1:9/v1#org/m:free?tokens=1e6").name == "org/m:free"
    assert meter("http://127.0.0.1:9/v1", "org/m:free").limits == Limits(tokens=1_000_000)


def test_a_login_and_limits_in_one_address() -> None:
    model = Model.open("http://bob:pa55@127.0.0.1:9/v1/#m?requests=2")
    assert "pa55" not in repr(limits._said) and meter(model.base.url, "m").limits.requests == 2  # type: ignore[union-attr]


def test_limits_are_no_part_of_keys(tmp_path: Path) -> None:
    def plan(said: str) -> Plan:
        made = Plan("p", folder=tmp_path)
        made.model("far", f"http://h/v1#m{said}")
        reward = {"good": {"use": "judged", "model": f"http://h/v1#judge{said}"}}
        made.step("aligned", "train/grpo", model="far", data="everyday_prompts", rewards=reward)
        made.step("other", "decode/best_of_n", model=f"http://h/v1#m{said}", n=2)
        return made

    few, more = plan("?requests=5"), plan("?requests=6,timeout=9.5")
    assert plan("").key == few.key == more.key
    model = Model.open("http://h/v1#m?tokens=9")
    keys = [
        step_key(methods["grpo"], {"model": model}, p.steps["aligned"].given, 0)
        for p in (plan(""), few, more, plan("2"))
    ]
    assert len(set(keys[:3])) == 1 and keys[3] != keys[0]


RECIPE = """
models:
  far: {endpoint: "URL", model: tiny, requests: N, concurrency: 1, timeout: 60}
steps:
  told: {do: synthesize/weak_continuations, model: far, data: asked.jsonl, max_tokens: 6}
"""


def test_a_recipe_stops_with_3_and_goes_on_under_a_larger_budget(
    far: Address, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"prompt": p}) for p in ASKED]
    (tmp_path / "asked.jsonl").write_text("\n".join(lines))
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.replace("URL", far.url).replace("N", "2"))
    words = ["run", str(path), "--runs", str(tmp_path / "runs"), "--json"]
    assert cli.main(words) == 3
    said = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert "the budget of 2 requests" in said and "3 of 5 replies are still to come" in said
    # On the command line the same model is one text; the run goes on in its folder.
    more = f"models.far={far.url}#tiny?requests=3"
    assert cli.main([*words, "--set", more]) == 0
    capsys.readouterr()
    (folder,) = (tmp_path / "runs").iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "done" and not manifest["steps"]["told"]["cached"]
    assert list(manifest["models"]) == [f"{far.url}#tiny?requests=3"]
    path.write_text(RECIPE.replace("URL", far.url).replace("N", "1"))
    assert cli.main(words) == 0  # nothing is left to be asked
    capsys.readouterr()
    assert json.loads((folder / "manifest.json").read_text())["steps"]["told"]["cached"]


PRICE = "input_price=1e6,output_price=2e6"  # 1 and 2 a token: a reply of 7 and 3 tokens costs 13


def test_a_budget_of_money_is_never_passed() -> None:
    with server(lambda n, body: good()) as (url, log):
        model = Model.open(f"{url}#m?{PRICE},cost=400,concurrency=4")
        with pytest.raises(
            Stopped, match=r"budget of 400 in cost .*a cost of \d+ so far"
        ) as caught:
            asked(model, [f"p{i}" for i in range(60)], max_tokens=3)
        assert caught.value.fix.endswith("larger one: cost")
        spent = meter(url, "m")
        assert spent.cost == 13 * len(log.asked) == meter().cost and 200 < spent.cost <= 400
        Model.open(f"{url}#m?{PRICE}")  # without a budget it is only counted
        asked(model, [f"p{i}" for i in range(60)], max_tokens=3)
        assert len(log.asked) == 60 and meter().cost == 13 * 60


def test_what_is_not_told_costs_what_it_may_at_most() -> None:
    said = {"total_tokens": 10}, {"prompt_tokens": 4}, {"total_tokens": 9, "prompt_tokens": 8}
    for usage, want in zip((*said, None), (None, None, 8 + 2, None), strict=True):

        def script(n: int, body: dict[str, Any], usage: object = usage) -> Any:
            status, headers, reply, wait = good()
            return status, headers, {**reply, "usage": usage}, wait

        with server(script) as (url, log):
            asked(Model.open(f"{url}#m?{PRICE}"), ["Hello"], max_tokens=3)
            sent = json.dumps(log.asked[0][2], ensure_ascii=False)
            guess = len(sent.encode()) // 3  # tokens of the prompt, by its length
            most = 10.0 if usage == said[0] else guess + 2 * 3  # of ten in all none is an answer's
            assert meter(url, "m").cost == (want or most)


def test_the_budget_of_money_of_all_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUING_MAX_COST", "150")
    with server(lambda n, body: good()) as (url, _):
        with pytest.raises(InputError, match=r"where the price of the tokens is said.*price: "):
            asked(Model.open(f"{url}#local"))
        free = Model.open(f"{url}#local?input_price=0,output_price=0")
        assert len(asked(free)) == 5
        asked(Model.open(f"{url}#one?{PRICE},concurrency=1"), ["a"], max_tokens=1)
        with pytest.raises(Stopped, match=r"budget of 150 in cost.*TRUING_MAX_COST"):
            other = Model.open(f"{url}#other?{PRICE},concurrency=1")
            asked(other, [f"p{i}" for i in range(20)], max_tokens=1)
        assert meter().cost == meter(url, "one").cost + meter(url, "other").cost <= 150


def test_what_a_step_cost_is_in_manifest_and_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"prompt": p}) for p in ASKED]
    (tmp_path / "asked.jsonl").write_text("\n".join(lines))
    path, words = tmp_path / "r.yaml", ["--runs", str(tmp_path / "runs"), "--json"]
    with server(lambda n, body: good()) as (url, log):
        # A reply of 7 and 3 tokens costs 0.013; before it comes, more than that is reserved.
        for budget, code in ((0.1, 3), (5, 0), (5, 0)):
            said = f"price: {{input: 1000, output: 2000}}, cost: {budget}, concurrency: 1"
            path.write_text(RECIPE.replace("URL", url).replace("requests: N, concurrency: 1", said))
            assert cli.main(["run", str(path), *words]) == code
            line = json.loads(capsys.readouterr().out.splitlines()[-1])
            asked_by_then = len(log.asked)
            assert (0 < asked_by_then < 5) if code else asked_by_then == 5
    (folder,) = (tmp_path / "runs").iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    step = manifest["steps"]["told"]
    # Of both runs together, also where a third one took the step from the store.
    assert step["cost"] == pytest.approx(0.065) and step["cached"] and "cost" not in line
    assert "cost 0.065, cached" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("{endpoint: http://h/v1, model: m, price: {input: 1, outptu: 2}}", "price is .input"),
        ("{endpoint: http://h/v1, model: m, price: 3}", "price is .input"),
        (
            "{endpoint: http://h/v1, model: m, price: {input: cheap}}",
            "input_price must be a number",
        ),
        ("{endpoint: http://h/v1}", "address and name"),
        ("{model: m, requests: 3}", "address and name"),
        ("{endpoint: http://h/v1#m, model: m}", "address and name"),
        ("{endpoint: http://h/v1, model: m, budget: 3}", "unknown limit 'budget'"),
        ("{endpoint: http://h/v1, model: m, requests: yes}", "requests must be a number"),
        ("[http://h/v1]", "'far' must be a text"),
    ],
)
def test_a_model_of_a_recipe_that_is_none(given: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"models:\n  far: {given}\nsteps:\n  a: {{do: train/dpo}}\n")
    with pytest.raises(InputError, match=told) as caught:
        load(path)
    assert caught.value.where == f"{path} line 2"


def test_a_plan_takes_the_same_in_python(tmp_path: Path) -> None:
    plan = Plan("p", folder=tmp_path)
    plan.model("far", {"endpoint": "http://h/v1", "model": "m", "tokens": 1_234_567, "timeout": 5})
    assert plan.models["far"] == "http://h/v1#m?tokens=1234567,timeout=5.0"
    folder = Run(plan, tmp_path / "runs").folder
    priced = {"price": {"input": 0.15, "output": 0.6}, "cost": 2}
    plan.model("far", {"endpoint": "http://h/v1", "model": "m", **priced})
    assert plan.models["far"] == "http://h/v1#m?cost=2.0,input_price=0.15,output_price=0.6"
    plan.model("far", {"endpoint": "http://h/v1", "model": "m"})
    assert Run(plan, tmp_path / "runs").folder == folder
