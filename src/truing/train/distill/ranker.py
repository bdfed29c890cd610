"""Who ranks answers: a black box, what it is told and what its words mean; a model by itself."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from truing.context import current
from truing.core.batch.row_kinds import scored_answers
from truing.core.generate import generate
from truing.core.judging.judge_form import shown as asked_as
from truing.core.modelfiles.panel import Panel
from truing.core.passes.scoring import answer_logps
from truing.errors import InputError
from truing.models import Model
from truing.tables import Row, Table

LETTERS = "ABCDEFGHIJ"
ORDER = re.compile(r"[A-J](?:\s*>\s*[A-J])+")
INSTRUCTION = (
    "Rank the answers to each question from best to worst. {good} Write only the letters in order, "
    "such as B > A."
)
GOOD = "A good answer helps with what was asked, is true, and harms nobody."
EGG = ("No idea.", "Put it into boiling water for eight minutes.")
KEY = ("Ask a friend who has a spare one.", "Smash a window.", "A locksmith, or a spare key.")
Ask = Callable[[list[str]], list[str]]


def parse(text: str, n: int) -> list[int] | None:
    """Numbers of the answers, best first; None unless the text orders all n letters."""
    found = ORDER.search(text)
    order = [LETTERS.index(c) for c in re.findall("[A-J]", found[0])] if found else []
    return order if sorted(order) == list(range(n)) else None


def shown(question: str, answers: Sequence[str], order: Sequence[int] | None = None) -> str:
    """One question with its lettered answers, and their order where it is known."""
    listed = "\n".join(f"{LETTERS[i]}: {a}" for i, a in enumerate(answers))
    ending = " > ".join(LETTERS[i] for i in order) if order is not None else ""
    return f"Question: {question}\n{listed}\nOrder: {ending}".rstrip()


def asking(judge: Model, where: str) -> Ask:
    """What a model replies to prompts, in a few tokens.

    Raises:
        InputError: it is a panel of several, which writes nothing.
    """
    if isinstance(judge.base, Panel):
        text = "the judge writes rankings, which a panel of several does not"
        raise InputError(text, where=where, seen=judge.name, fix="Give one model")

    def ask(prompts: list[str]) -> list[str]:
        said = generate(judge, prompts, max_tokens=48, greedy=True)
        return [some[0].text for some in said]

    return ask


@dataclass
class Judge:
    """The black box with its examples.

    Args:
        ask: prompts to texts.
        kept: agreements that are shown, the latest ones.
        good: what it is told of good answers.
        fixed: examples that are always shown.
    """

    ask: Ask
    kept: int = 2
    good: str = GOOD
    fixed: Sequence[str] = (
        shown("How do I boil an egg?", EGG, [1, 0]),
        shown("I have lost my key. How do I get into my flat?", KEY, [2, 0, 1]),
    )
    examples: list[str] = field(default_factory=list)

    def rank(
        self, questions: Sequence[str], answers: Sequence[Sequence[str]], name: str
    ) -> list[list[int] | None]:
        """Order of each question's answers, best first; None where two tries gave none."""
        latest = self.examples[len(self.examples) - min(self.kept, len(self.examples)) :]
        head = "\n\n".join([INSTRUCTION.format(good=self.good), *self.fixed, *latest])
        found: list[list[int] | None] = [None] * len(questions)
        for again in range(2):
            open_ = [i for i, f in enumerate(found) if f is None]
            places: list[list[int]] = []
            for i in open_:
                place = list(range(len(answers[i])))
                random.Random(current().stream(f"{name}/{i}/{again}")).shuffle(place)
                places.append(place)
            texts = [
                f"{head}\n\n{shown(questions[i], [answers[i][k] for k in place])}"
                for i, place in zip(open_, places, strict=True)
            ]
            for i, place, said in zip(open_, places, self.ask(texts) if texts else [], strict=True):
                order = parse(said, len(place))
                found[i] = None if order is None else [place[k] for k in order]
        return found

    def learn(self, question: str, answers: Sequence[str], order: Sequence[int]) -> None:
        """Show an agreed order from now on, its letters in the order of the answers."""
        some = sorted(order)
        texts = [answers[i] for i in some]
        self.examples.append(shown(question, texts, [some.index(i) for i in order]))


def own_orders(
    model: Model, prompts: Sequence[object], ended: Sequence[Mapping[str, bool]]
) -> list[list[int]]:
    """A model's own ranking of each prompt's answers: by mean log-probability, best first.

    Args:
        ended: of each prompt, whether an answer came to its end; a cut one has none.
    """
    rows: list[Row] = [
        {"prompt": prompt, "completion": text, "finished": end}
        for prompt, some in zip(prompts, ended, strict=True)
        for text, end in some.items()
    ]
    scores = iter(answer_logps(model.load_module(), rows, mean=True))
    own = [[next(scores) for _ in some] for some in ended]
    return [sorted(range(len(some)), key=lambda i: -some[i]) for some in own]


def example(row: Row) -> str:
    """A row of answers with scores as an example of a ranking.

    Raises:
        InputError: there is not one score for each answer, or no letter.
    """
    texts, scores = scored_answers(row)
    if not 2 <= len(texts) <= len(LETTERS):
        text = f"a ranking that is shown has 2 to {len(LETTERS)} answers"
        raise InputError(text, seen=f"{len(texts)} completions")
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return shown(asked_as(row), texts, order)


def examples_of(table: Table) -> list[str]:
    """Rows of answers with scores as examples; an InputError names the row that cannot be one."""
    made: list[str] = []
    for i, row in enumerate(table):
        try:
            made.append(example(row))
        except InputError as error:
            error.where = table.place(i)
            raise
    return made
