"""How near a model's answers come to reference answers: BLEU, ROUGE-1, -2, -L and BERTScore.

BLEU is of the whole corpus (sacrebleu), ROUGE the mean F-measure (rouge-score, without stemming),
BERTScore the mean F1 of the authors' own library (bert-score):

    F1 = 2 P R / (P + R),  P = mean_i max_j cos(x_i, y_j),  R = mean_j max_i cos(x_i, y_j)

x_i, y_j are the token states of all-MiniLM-L6-v2 (`minilm`, fetched once), texts cut at its 512
tokens. The library has special tokens matched, yet gives them no weight of their own.
Sources: BLEU, P02-1040 of the ACL Anthology; ROUGE, W04-1013; BERTScore, arXiv 1904.09675, taken
here without idf weights and rescaling, and with a smaller encoder than its own: its values compare
among themselves alone. All three measure wording, not truth. An empty answer scores 0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import cast

import sacrebleu
from bert_score.utils import bert_cos_score_idf
from rouge_score.rouge_scorer import RougeScorer

from truing.context import Json
from truing.core.embed import encoder
from truing.core.stats import shares
from truing.errors import InputError
from truing.evaluate.adherence import answer_all
from truing.method import method
from truing.models import Model
from truing.reports import Measure, Report
from truing.tables import Row, Table

ROUGE = ("rouge1", "rouge2", "rougeL")
BATCH = 64  # texts that are encoded together


def bert_scores(said: Sequence[str], wanted: Sequence[str]) -> list[float]:
    """BERTScore F1 of texts against one reference each; 0 where one of the two is empty."""
    module, tokenizer = encoder()
    made = [0.0] * len(said)
    # The library's form of an empty text is none that tokenizers still know.
    there = [
        i for i, both in enumerate(zip(said, wanted, strict=True)) if all(map(str.strip, both))
    ]
    if there:
        weights: dict[object, float] = defaultdict(lambda: 1.0)
        ends = cast("list[int]", [tokenizer.cls_token_id, tokenizer.sep_token_id])
        weights |= dict.fromkeys(ends, 0.0)
        found = bert_cos_score_idf(
            module,
            [wanted[i] for i in there],
            [said[i] for i in there],
            tokenizer,
            weights,
            batch_size=BATCH,
            device=str(module.device),
        )
        for i, (_, _, f1) in zip(there, found.tolist(), strict=True):
            made[i] = float(f1)
    return made


def overlap(said: Sequence[str], wanted: Sequence[str]) -> list[Measure]:
    """BLEU, ROUGE and BERTScore of texts against one reference each."""
    n = len(said)
    bleu = float(sacrebleu.corpus_bleu(list(said), [list(wanted)]).score) / 100
    made = [Measure("BLEU", bleu, bleu, bleu, n, "share", "", "higher")]
    scorer = RougeScorer(list(ROUGE))
    pairs = list(zip(said, wanted, strict=True))
    scores = [scorer.score(target, text) for text, target in pairs]
    values = {f"ROUGE-{m.removeprefix('rouge')}": [s[m].fmeasure for s in scores] for m in ROUGE}
    values["BERTScore"] = bert_scores(said, wanted)
    for name, each in values.items():
        floats = [float(v) for v in each]
        mean = sum(floats) / n
        made.append(Measure(name, mean, *shares(floats), n, "share", "", "higher"))
    return made


@method(
    paper="oncoreason",
    needs=("generate",),
    rows={"data": ("example",)},
    within={"max_tokens": (1, None), "temperature": (0, None)},
)
def text_overlap(
    model: Model, data: Table, *, max_tokens: int = 192, temperature: float = 0.0
) -> Report:
    """How near a model's answers come to reference answers: BLEU, ROUGE and BERTScore.

    Args:
        max_tokens: longest answer.
        temperature: of sampling; 0 is greedy.
    """
    where = "evaluate/text_overlap"
    rows = [r for r in data.expect("example", where=where) if "completion" in r and "prompt" in r]
    if not rows:
        raise InputError(
            "no row has a prompt and a completion to compare with", where=where, seen=data.columns
        )
    found = answer_all(model, rows, max_tokens=max_tokens, temperature=temperature)
    said, wanted = [t for t, _ in found], [cast(str, r["completion"]) for r in rows]
    samples: list[Row] = [
        {
            "prompt": r["prompt"],
            "completion": text,
            "reference": target,
            "lineage": {"parents": [r["id"]]},
        }
        for r, text, target in zip(rows, said, wanted, strict=True)
    ]
    meta: dict[str, Json] = {"kind": "overlap", "model": model.name, "model_key": model.key}
    measures = overlap(said, wanted)
    return Report("overlap with references", measures, Table("record", samples), meta)
