"""Data sets that are known by name and may not lie in the repository: where each is to be had.

They are read from the folder that TRUING_DATA names, one folder for each set, with an `index.json`
(see docs/data-and-models.md). Files and columns are those of the origin, which the shapes of
`dataset_rows` read as they are; a file may be compressed, as `.jsonl.gz`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mirrored:
    """A set that is known by name.

    Args:
        origin: GitHub repositories or Python packages that carry it.
        licence: in short, as its publisher states it.
        files: columns of each file that is read, by the file's name.
    """

    origin: str
    licence: str
    files: dict[str, str]

    def told(self, name: str) -> str:
        """One line of where it is to be had, and what must lie there."""
        files = "; ".join(f"{name}/{file} ({columns})" for file, columns in self.files.items())
        return f"from {self.origin}, as {files}"


_INSTRUCTED = "instruction, input, output"
MIRRORED = {
    "alpaca": Mirrored(
        "github.com/tatsu-lab/stanford_alpaca",
        "CC BY-NC 4.0",
        {"alpaca_5000.jsonl": _INSTRUCTED, "alpaca_instructions.jsonl": "instruction"},
    ),
    "gsm8k": Mirrored(
        "github.com/openai/grade-school-math",
        "MIT",
        {"train.jsonl": "question, answer", "test.jsonl": "question, answer"},
    ),
    "hh_rlhf": Mirrored(
        "github.com/anthropics/hh-rlhf",
        "MIT",
        {
            f"{part}.test.jsonl": "chosen, rejected"
            for part in (
                "helpful-base",
                "harmless-base",
                "helpful-online",
                "helpful-rejection-sampled",
            )
        },
    ),
    "honesty": Mirrored(
        "github.com/GAIR-NLP/alignment-for-honesty",
        "none stated",
        {
            "pkqa_13b.jsonl": "question, answer",
            "puqa.jsonl": "question, authors",
            "nonambigqa.jsonl": "question, answers, gold_answer",
        },
    ),
    "ifeval": Mirrored(
        "github.com/josejg/instruction_following_eval",
        "Apache-2.0",
        {"ifeval.jsonl": "key, prompt, instruction_id_list, kwargs"},
    ),
    "lima": Mirrored(
        "github.com/PKU-Alignment/ProgressGym", "CC BY-NC-SA 4.0", {"lima.jsonl": _INSTRUCTED}
    ),
    "moderation": Mirrored(
        "github.com/openai/moderation-api-release",
        "MIT",
        {"moderation.jsonl": "prompt, S, H, V, HR, SH, S3, H2, V2"},
    ),
    "mt_bench": Mirrored(
        "github.com/lm-sys/FastChat and github.com/princeton-nlp/LLMBar",
        "Apache-2.0; MIT",
        {
            "mt_bench_questions.jsonl": "question_id, category, turns",
            "vicuna_bench_questions.jsonl": "question_id, category, turns",
        }
        | {
            f"human_judged_pairs_{part}.jsonl": "input, output_1, output_2, label"
            for part in ("mt_bench", "faireval", "llmeval2")
        },
    ),
    "self_instruct": Mirrored(
        "github.com/yizhongw/self-instruct",
        "Apache-2.0",
        {
            "user_oriented_instructions.jsonl": "instruction, instances",
            "seed_tasks.jsonl": "instruction, instances",
        },
    ),
    "survival": Mirrored(
        "the Python packages lifelines and scikit-survival",
        "MIT; public study data",
        {
            "gbsg2.jsonl": "age, menostat, tsize, tgrade, pnodes, progrec, estrec, time, cens",
            "lung.jsonl": "time, status, age, sex, ph.ecog, ph.karno, pat.karno, meal.cal, wt.loss",
        },
    ),
    "text_corpora": Mirrored(
        "github.com/pytorch/examples (WikiText-2), github.com/karpathy/char-rnn (tiny Shakespeare)",
        "CC BY-SA; public domain",
        {
            "wikitext2_test.txt": "plain text",
            "wikitext2_valid.txt": "plain text",
            "tinyshakespeare.txt": "plain text",
        },
    ),
    "truthfulqa": Mirrored(
        "github.com/sylinrl/TruthfulQA",
        "Apache-2.0",
        {
            "truthfulqa.jsonl": "Question, Best Answer, Correct Answers, Incorrect Answers",
            "finetune_truth.jsonl": "prompt, completion",
            "finetune_info.jsonl": "prompt, completion",
        },
    ),
}
