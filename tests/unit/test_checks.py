"""Every check on answers that keep and break it, by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from truing.catalogue import components
from truing.context import Context, use
from truing.core.judging.scores import check_reward
from truing.errors import InputError
from truing.method import Method, methods, score
from truing.models import Model
from truing.own_checks import check_of
from truing.principles import Principle, Principles
from truing.references import reference
from truing.specify import checks, texts
from truing.specify.satisfaction import satisfaction
from truing.tables import Row, Table

CASES: list[tuple[dict[str, object], str, bool]] = [
    ({"use": "max_words", "n": 3}, "one two three", True),
    ({"use": "max_words", "n": 3}, "one two three four", False),
    ({"use": "max_words", "n": 2}, "well-known don't", True),
    ({"use": "min_words", "n": 3}, "one two", False),
    ({"use": "min_words", "n": 2}, "one two", True),
    ({"use": "max_sentences", "n": 1}, "One. Two.", False),
    ({"use": "max_sentences", "n": 2}, 'He said "go." Then he went.', True),
    ({"use": "no_lists"}, "Buy eggs, milk and bread.", True),
    ({"use": "no_lists"}, "Buy:\n- eggs\n- milk", False),
    ({"use": "no_lists"}, "1. Eggs\n2. Milk", False),
    ({"use": "no_lists"}, "First 1. eggs and 2. milk", False),
    ({"use": "no_lists"}, "It cost 3.50 in 1999.", True),
    ({"use": "no_lists", "allow": 2}, "- a\n- b", True),
    ({"use": "no_lists", "allow": 2}, "- a\n- b\n- c", False),
    ({"use": "no_markdown"}, "Plain text, 2 * 3 = 6.", True),
    ({"use": "no_markdown"}, "# Title\ntext", False),
    ({"use": "no_markdown"}, "This is **bold**.", False),
    ({"use": "no_markdown"}, "```\ncode\n```", False),
    ({"use": "no_markdown"}, "See [this](http://x.org).", False),
    ({"use": "one_paragraph"}, "One line.", True),
    ({"use": "one_paragraph"}, "One.\n\nTwo.", False),
    ({"use": "ends_with_sentence"}, "This ends.", True),
    ({"use": "ends_with_sentence"}, 'He said "stop."', True),
    ({"use": "ends_with_sentence"}, "This does not end and", False),
    ({"use": "ends_with_sentence"}, "", False),
    ({"use": "no_exclamation"}, "Good.", True),
    ({"use": "no_exclamation"}, "Good!", False),
    ({"use": "no_question"}, "Is it?", False),
    ({"use": "no_preamble"}, "Water boils at 100 degrees.", True),
    ({"use": "no_preamble"}, "Sure! Water boils at 100 degrees.", False),
    ({"use": "no_preamble"}, "Certainly, here it is.", False),
    ({"use": "no_preamble"}, "I'd be happy to help.", False),
    ({"use": "no_preamble"}, "Surely water boils.", True),
    ({"use": "no_refusal"}, "I'm sorry, but no.", False),
    ({"use": "no_refusal"}, "The shop is closed.", True),
    ({"use": "no_first_person"}, "I think so.", False),
    ({"use": "no_first_person"}, "It is my view.", False),
    ({"use": "no_first_person"}, 'The title is "I, Robot".', True),
    ({"use": "no_first_person"}, "World War I ended in 1918.", True),
    ({"use": "no_first_person"}, "Mining is hard.", True),
    ({"use": "no_repetition"}, "The cat sat here. The cat sat here.", False),
    ({"use": "no_repetition"}, "The cat sat here. The dog lay there.", True),
    ({"use": "forbidden_words", "words": ["very"]}, "A very big one", False),
    ({"use": "forbidden_words", "words": ["very"]}, "Every big one", True),
    ({"use": "forbidden_words", "words": ["in fact"]}, "In fact, no", False),
    ({"use": "must_include", "words": ["water", "ice"]}, "Ice melts.", True),
    ({"use": "must_include", "words": ["water", "ice"], "all": True}, "Ice melts.", False),
    ({"use": "language", "code": "en"}, "This is the answer to the question.", True),
    ({"use": "language", "code": "en"}, "Das ist die Antwort und nicht mehr.", False),
    ({"use": "language", "code": "de"}, "Das ist die Antwort und nicht mehr.", True),
    ({"use": "language", "code": "fr"}, "Le chat est dans la maison avec les autres.", True),
    ({"use": "language", "code": "zh"}, "\u4f60\u597d\u4e16\u754c", True),
    ({"use": "language", "code": "en"}, "\u4f60\u597d\u4e16\u754c", False),
    # "The capital of Japan is Tokyo": six of ten letters are Chinese characters.
    (
        {"use": "language", "code": "ja"},
        "\u65e5\u672c\u306e\u9996\u90fd\u306f\u6771\u4eac\u3067\u3059\u3002",
        True,
    ),
    (
        {"use": "language", "code": "zh"},
        "\u65e5\u672c\u306e\u9996\u90fd\u306f\u6771\u4eac\u3067\u3059\u3002",
        False,
    ),
    (
        {"use": "language", "code": "zh"},
        "\u65e5\u672c\u7684\u9996\u90fd\u662f\u4e1c\u4eac\u3002",
        True,
    ),
    ({"use": "language", "code": "en"}, "The word for cat is \u306d\u3053.", True),
    # The dot between the parts of a foreign name is written in Chinese as well.
    (
        {"use": "language", "code": "zh"},
        "\u4f5c\u8005\u662f\u5217\u30fb\u8fbe\u30fb\u82ac",
        True,
    ),
]


@pytest.mark.parametrize(
    "ref,text,kept", CASES, ids=[f"{i}-{c[0]['use']}" for i, c in enumerate(CASES)]
)
def test_check(ref: dict[str, object], text: str, kept: bool) -> None:
    value = score("check", ref, [{"prompt": "p", "completion": text}])[0]
    assert (value == 1.0) if kept else (0.0 <= value < 0.5)


def test_an_answer_cut_at_the_limit_is_not_held_to_its_end() -> None:
    rows = [{"prompt": "p", "completion": "It goes on and", "finished": f} for f in (True, False)]
    assert score("check", {"use": "ends_with_sentence"}, rows) == [0.0, 1.0]


def test_worse_breaches_score_lower() -> None:
    rows = [{"prompt": "p", "completion": "w " * n} for n in (40, 41, 60, 120)]
    values = score("check", {"use": "max_words", "n": 40}, rows)
    assert values == sorted(values, reverse=True) and len(set(values)) == 4
    assert values[3] == pytest.approx(checks.BROKEN * 40 / 120)


def test_echo_of_the_prompt() -> None:
    prompt = "Tell me how a bicycle keeps its balance on the road"
    rows = [
        {"prompt": prompt, "completion": prompt + "."},
        {"prompt": prompt, "completion": "Steering puts the wheels back under the rider."},
        {"prompt": [{"role": "user", "content": prompt}], "completion": prompt},
    ]
    assert checks.not_an_echo(rows) == [0.0, 1.0, 0.0]
    asked = "Which is larger, the Earth or Mars?"
    short: list[tuple[str, str, float]] = [
        (asked, "The Earth.", 1.0),  # a choice among what is asked
        (asked, "Larger, the Earth or", 0.0),
        ("Say hi", "Say hi.", 0.0),
        ("", "", 1.0),
    ]
    rows = [{"prompt": p, "completion": c} for p, c, _ in short]
    assert checks.not_an_echo(rows) == [wanted for *_, wanted in short]


def test_repetition_share() -> None:
    assert texts.repetition("a b c d") == 0.0
    # 8 words, five 4-grams, of which "a b c d" comes twice
    assert texts.repetition("a b c d a b c d") == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "It's a well-known fact, 3.5 times.",
            ["It's", "a", "well-known", "fact", "3", "5", "times"],
        ),
        ("\u6211\u4e0d\u77e5\u9053\u3002OK\uff01", ["\u6211", "\u4e0d", "\u77e5", "\u9053", "OK"]),
        ("\u30ab\u30ca\u30fb\u3072\u3089", ["\u30ab", "\u30ca", "\u3072", "\u3089"]),
        (
            "\u0e44\u0e17\u0e22\u0e19\u0e35\u0e49",
            ["\u0e44", "\u0e17", "\u0e22", "\u0e19\u0e35\u0e49"],
        ),
        (
            "\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902",  # "in Hindi"
            ["\u0939\u093f\u0928\u094d\u0926\u0940", "\u092e\u0947\u0902"],
        ),
        ("cafe\u0301 \ud55c\uad6d\uc5b4", ["cafe\u0301", "\ud55c\uad6d\uc5b4"]),
        ("\u0645\u06cc\u200c\u0631\u0648\u0645", ["\u0645\u06cc\u200c\u0631\u0648\u0645"]),
        ("snake_case \u2014 \u0301 _", ["snake", "case"]),
    ],
)
def test_words_of_all_scripts(text: str, wanted: list[str]) -> None:
    assert texts.words(text) == wanted
    assert checks.max_words([{"completion": text}], n=len(wanted)) == [1.0]


def test_sentences_end_at_the_stops_of_all_scripts() -> None:
    assert texts.sentences("\u5bf9\u3002\u5bf9\uff01\uff1f\u597d") == [
        "\u5bf9\u3002",
        "\u5bf9\uff01\uff1f",
        "\u597d",
    ]
    assert texts.sentences("\u300c\u306f\u3044\u3002\u300d\u3068") == [
        "\u300c\u306f\u3044\u3002",
        "\u3068",
    ]
    assert texts.sentences("\u0939\u0948\u0964 \u0914\u0930?") == [
        "\u0939\u0948\u0964",
        "\u0914\u0930?",
    ]
    assert texts.sentences('He said "Hi." Then 3.5!\nNo') == ['He said "Hi.', "Then 3.5!", "No"]
    long = "\u6211\u4e0d\u77e5\u9053\u4e86\u3002"
    assert texts.repeats_a_sentence(long * 2) and not texts.repeats_a_sentence(long)


def test_unknown_settings_and_languages_are_named() -> None:
    with pytest.raises(InputError, match="Did you mean 'max_words'"):
        score("check", {"use": "max_word", "n": 3}, [])
    with pytest.raises(InputError, match="no language 'xx'"):
        score("check", {"use": "language", "code": "xx"}, [{"prompt": "", "completion": "a"}])
    with pytest.raises(InputError, match="at least one word"):
        score("check", {"use": "forbidden_words", "words": []}, [])


def test_relevance_and_what_leaves_the_topic(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, near, far = "Where does Rome lie?", "It lies in Italy.", "Some cats purr."
    vectors = {asked: (1.0, 0.0), near: (0.6, 0.8), far: (0.0, 1.0), "": (1.0, 0.0)}
    monkeypatch.setattr(
        "truing.core.embed.embed", lambda given: np.array([vectors[t] for t in given])
    )
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": asked}]
    rows: list[Row] = [
        {"prompt": asked, "completion": near}, {"prompt": talk, "completion": far},
        {"prompt": asked, "completion": ""}, {"prompt": asked, "completion": asked},
    ]  # fmt: skip
    assert texts.relevance(rows) == pytest.approx([0.6, 0, 0, 1])
    broken = checks.BROKEN * 0.6 / 0.8
    assert checks.on_topic(rows, least=0.8) == pytest.approx([broken, 0, 0, 1])
    rules = Principles([Principle("short", "Be short.", check={"use": "max_words", "n": 9})])
    for least, reason in ((0.6 - 1e-3, ""), (0.6 + 1e-3, "off topic")):
        kept = satisfaction(rules, rows, on_topic=least)
        assert [k.unusable for k in kept] == [reason, "off topic", "empty", "echo"]
        assert kept[0].by_principle == {"short": 0.0 if reason else 1.0}


def test_no_check_escapes_its_range_on_odd_texts() -> None:
    settings = {
        "max_words": {"n": 5},
        "min_words": {"n": 5},
        "max_sentences": {"n": 2},
        "forbidden_words": {"words": ["x"]},
        "must_include": {"words": ["x"]},
        "language": {"code": "en"},
    }
    texts = [
        "",
        " ",
        "!",
        "\n\n",
        "1.",
        "a" * 5000,
        "\u0000",
        "\U0001f60e",
        "I" * 3,
        "- ",
        "? " * 50,
    ]
    rows = [{"prompt": "x", "completion": t} for t in texts]
    for name in components("check"):
        if name == "on_topic":
            continue
        values = score("check", {"use": name, **settings.get(name, {})}, rows)
        assert all(0.0 <= v <= 1.0 for v in values), name


@pytest.mark.parametrize(
    ("ref", "said"),
    [
        ({"use": "max_words", "n": -1}, "'n' must be 0 or more"),
        ({"use": "min_words", "n": -1}, "'n' must be 0 or more"),
        ({"use": "max_sentences", "n": -1}, "'n' must be 0 or more"),
        ({"use": "no_lists", "allow": -1}, "'allow' must be 0 or more"),
        ({"use": "no_repetition", "share": 2}, r"'share' must lie in \[0, 1\]"),
        ({"use": "not_an_echo", "share": -0.1}, r"'share' must lie in \[0, 1\]"),
        ({"use": "on_topic", "least": 30}, r"'least' must lie in \[0, 1\]"),
    ],
)
def test_settings_out_of_range(ref: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        score("check", ref, [])


@pytest.mark.parametrize(
    ("ref", "said"),
    [
        ({"use": "length_near", "n": 0}, "length_near setting 'n': must be at least 1"),
        ({"use": "max_words", "n": -1}, "'n' must be 0 or more"),
        ({"use": "share_of"}, "give either words_from or letters"),
        ({"use": "numeric_answer", "tolerance": -0.1}, "'tolerance' must be at least 0"),
    ],
)
def test_settings_of_rewards_are_refused_before_anything_is_drawn(
    ref: dict[str, object], said: str, tiny_path: Path, tmp_path: Path
) -> None:
    prompts = Table("prompt", [{"prompt": "1 + 1", "answer": 2}])
    with use(Context(folder=tmp_path)), pytest.raises(InputError, match=said):
        methods["grpo"](
            Model.open(tiny_path), prompts, rewards={"r": ref}, steps=1, batch=1, answers=2,
            max_tokens=2, rank=2,
        )  # fmt: skip
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize("kind", ["check", "reward"])
def test_every_one_of_truing_itself_bears_that_there_are_no_rows(kind: str) -> None:
    """By which `check_reward` asks what it thinks of its settings."""
    given = {"n": 1, "words": ["x"], "words_from": ["x"], "code": "en"}
    tried: list[str] = []
    for name, entry in components(kind).items():
        found = Method(entry)
        if entry.package != "truing" or check_of(found.function) is not None:
            continue
        settings = {n: v for n, v in given.items() if n in found.settings}
        assert score(kind, {"use": name, **settings}, []) == []
        check_reward({"use": name, **settings})
        tried.append(name)
    assert len(tried) > 7


def test_a_reward_of_one_s_own_need_not() -> None:
    def best(rows: list[Row]) -> list[float]:
        raise AssertionError("called without rows")

    check_reward(reference(best))
