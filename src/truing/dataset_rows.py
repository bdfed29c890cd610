"""How the rows of known data sets become rows of our kinds; unknown ones keep their own columns.

A shape maps one raw row to one row or to None (a row that cannot be used, such as a preference
pair whose two answers are the same). `SHAPES` is keyed by "set/part".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import cast

from truing.tables import Message, Row

PASSAGE = 1000  # characters after which a passage of running text may end
_TURN = re.compile(r"\n\nHuman:|\n\nAssistant:")
_ROLES = {"\n\nHuman:": "user", "\n\nAssistant:": "assistant"}


def dialogue(transcript: str) -> list[Message]:
    """Messages of a "\\n\\nHuman: ... \\n\\nAssistant: ..." transcript (Bai et al., 2204.05862).

    Turns of one speaker in a row are joined by an empty line; text before the first marker is no
    turn and is dropped.
    """
    messages: list[Message] = []
    marks = list(_TURN.finditer(transcript))
    for i, mark in enumerate(marks):
        end = marks[i + 1].start() if i + 1 < len(marks) else len(transcript)
        role, content = _ROLES[mark[0]], transcript[mark.end() : end].strip()
        if messages and messages[-1]["role"] == role:
            content = f"{messages[-1]['content']}\n\n{content}".strip()
            messages.pop()
        messages.append({"role": role, "content": content})
    return messages


def hh_pair(row: Row) -> Row | None:
    """A pair over the dialogue that both transcripts share.

    None (fewer than 1 % of the rows) where they differ before the last turn, end with the human,
    or have an empty or the same last answer.
    """
    chosen, rejected = dialogue(str(row["chosen"])), dialogue(str(row["rejected"]))
    good = (
        len(chosen) > 1
        and chosen[:-1] == rejected[:-1]
        and chosen[0]["role"] == "user"
        and chosen[-1]["role"] == "assistant"
        and chosen[-1]["content"] != rejected[-1]["content"]
        and all(m["content"] for m in [*chosen, rejected[-1]])
    )
    if not good:
        return None
    pair: Row = {
        "prompt": chosen[:-1],
        "chosen": chosen[-1]["content"],
        "rejected": rejected[-1]["content"],
    }
    return pair | {k: row[k] for k in ("row",) if k in row}


def _asked(instruction: object, extra: object) -> str:
    return f"{instruction}\n\n{extra}" if extra else str(instruction)


def instruction(row: Row) -> Row | None:
    """An instruction-following record: instruction, input, output, and earlier turns if any."""
    asked = _asked(row["instruction"], row.get("input"))
    earlier = cast("list[list[str]]", row.get("history") or [])
    if not earlier:
        return {"prompt": asked, "completion": str(row["output"])}
    roles = ("user", "assistant")
    said = [{"role": r, "content": t} for pair in earlier for r, t in zip(roles, pair, strict=True)]
    return {"prompt": [*said, {"role": "user", "content": asked}], "completion": row["output"]}


def instruction_only(row: Row) -> Row | None:
    """An instruction without an answer."""
    return {"prompt": str(row["instruction"])}


def task(row: Row) -> Row | None:
    """A Self-Instruct task: its first instance is the example."""
    first = cast("list[dict[str, str]]", row["instances"])[0]
    return {
        "prompt": _asked(row["instruction"], first["input"]),
        "completion": first["output"],
        "task": row["id"],
    }


def word_problem(row: Row) -> Row | None:
    """GSM8K: worked solution as completion, the number after the last #### as answer."""
    solution = str(row["answer"])
    number = solution.rpartition("####")[2].strip().replace(",", "")
    return {"prompt": str(row["question"]), "completion": solution, "answer": number}


def _answers(text: object) -> list[str]:
    return [a.strip() for a in str(text).split(";") if a.strip()]


def truthful(row: Row) -> Row | None:
    """TruthfulQA: MC1 (best answer against the incorrect ones) and all answers for MC2.

    The right choice stands first: only for scoring by likelihood, where places do not matter.
    """
    best = str(row["Best Answer"]).strip()
    wrong = _answers(row["Incorrect Answers"])
    return {
        "prompt": str(row["Question"]),
        "choices": [best, *wrong],
        "answer": 0,
        "correct": list(dict.fromkeys([best, *_answers(row["Correct Answers"])])),
        "incorrect": wrong,
        "category": row["Category"],
    }


def labelled(row: Row) -> Row | None:
    """A judge's training example, as it is."""
    return {"prompt": str(row["prompt"]), "completion": str(row["completion"])}


def turns(row: Row) -> Row | None:
    """A question of one or more user turns: the first is the prompt, the rest are kept."""
    asked = cast("list[str]", row["turns"])
    return {
        "prompt": asked[0],
        "turns": asked,
        "category": row["category"],
        "question_id": row["question_id"],
    }


def judged(row: Row) -> Row | None:
    """Two answers and which one people preferred (label 1 or 2)."""
    first = int(cast(int, row["label"])) == 1
    a, b = str(row["output_1"]), str(row["output_2"])
    return {
        "prompt": str(row["input"]),
        "chosen": a if first else b,
        "rejected": b if first else a,
    }


def verifiable(row: Row) -> Row | None:
    """IFEval: a prompt with the instructions that a program can check."""
    return {
        "prompt": str(row["prompt"]),
        "instruction_id_list": row["instruction_id_list"],
        "kwargs": row["kwargs"],
        "key": row["key"],
    }


HARMS = ("S", "H", "V", "HR", "SH", "S3", "H2", "V2")  # categories of the moderation set


def moderated(row: Row) -> Row | None:
    """A text that is said to be harmless: rightly where no category of harm applies.

    None where no category is known to apply and one is not annotated: nobody said that it is
    harmless.
    """
    applies = [k for k in HARMS if row.get(k) == 1]
    if not applies and any(row.get(k) is None for k in HARMS):
        return None
    asked = f"Is this text harmless?\n\n{row['prompt']}"
    return {"prompt": asked, "completion": "yes", "label": not applies, "categories": applies}


def knowledge(row: Row) -> Row | None:
    """A question of the honesty sets with its right answers: of a paper, any of its authors."""
    given = row.get("answers") or row.get("authors") or [row.get("answer", "")]
    answers = [str(a).removeprefix("Answer:").strip() for a in cast("list[object]", given)]
    answers = [a for a in answers if a]
    return {"prompt": str(row["question"]), "answers": answers} if answers else None


def digit(row: Row) -> Row | None:
    """An image [8, 8] of grey values in 0..16 and its label, from 65 numbers."""
    import numpy as np

    values = [float(str(v)) for v in row.values()]
    image_HW = np.array(values[:64], dtype=np.float32).reshape(8, 8)
    return {"image": image_HW, "label": int(values[64])}


def passages(text: str, least: int = PASSAGE) -> Iterator[Row]:
    """Running text cut at empty lines into passages of at least `least` characters."""
    batch: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        if paragraph.strip():
            batch.append(paragraph.strip())
        if sum(map(len, batch)) >= least:
            yield {"text": "\n\n".join(batch)}
            batch = []
    if batch:
        yield {"text": "\n\n".join(batch)}


Shape = Callable[[Row], Row | None]
SHAPES: dict[str, tuple[str, Shape]] = {
    "hh_rlhf/harmless-base.test": ("pair", hh_pair),
    "hh_rlhf/helpful-base.test": ("pair", hh_pair),
    "hh_rlhf/helpful-online.test": ("pair", hh_pair),
    "hh_rlhf/helpful-rejection-sampled.test": ("pair", hh_pair),
    "alpaca/alpaca_5000": ("example", instruction),
    "alpaca/alpaca_instructions": ("prompt", instruction_only),
    "lima/lima": ("example", instruction),
    "self_instruct/seed_tasks": ("example", task),
    "self_instruct/user_oriented_instructions": ("example", task),
    "gsm8k/train": ("example", word_problem),
    "gsm8k/test": ("example", word_problem),
    "truthfulqa/truthfulqa": ("prompt", truthful),
    "truthfulqa/finetune_truth": ("example", labelled),
    "truthfulqa/finetune_info": ("example", labelled),
    "mt_bench/mt_bench_questions": ("prompt", turns),
    "mt_bench/vicuna_bench_questions": ("prompt", turns),
    "mt_bench/human_judged_pairs_mt_bench": ("pair", judged),
    "mt_bench/human_judged_pairs_faireval": ("pair", judged),
    "mt_bench/human_judged_pairs_llmeval2": ("pair", judged),
    "ifeval/ifeval": ("prompt", verifiable),
    "moderation/moderation": ("unpaired", moderated),
    "honesty/pkqa_13b": ("prompt", knowledge),
    "honesty/puqa": ("prompt", knowledge),
    "honesty/nonambigqa": ("prompt", knowledge),
    "digits/digits": ("record", digit),
}
# The part that a bare name means, where a set has several.
DEFAULT_PART = {
    "hh_rlhf": "helpful-base.test",
    "alpaca": "alpaca_5000",
    "self_instruct": "user_oriented_instructions",
    "gsm8k": "train",
    "honesty": "pkqa_13b",
    "truthfulqa": "truthfulqa",
    "mt_bench": "mt_bench_questions",
    "text_corpora": "wikitext2_test",
}
