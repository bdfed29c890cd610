"""Both sides of the sampling benchmark: our sampler, or `transformers.generate` batched.

Every answer has the same number of tokens (the end token is not drawn), so that both do the same
work: what our sampler gains by dropping finished rows is left out.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def ours(job: dict[str, object], prompts: list[list[int]]) -> tuple[int, float]:
    """Tokens drawn and seconds of our sampler."""
    from truing.core.sampling import SamplingSettings, sample
    from truing.models import Model

    module = Model.open(str(job["model"])).load_module("float32", "cpu").module
    settings = SamplingSettings(n=job["draws"], max_tokens=job["tokens"], seed=1, stop_ids=())  # type: ignore
    sample(module, prompts[:1], SamplingSettings(max_tokens=2, stop_ids=()))  # what is made once
    began = time.perf_counter()
    made = sample(module, prompts, settings)
    seconds = time.perf_counter() - began
    return sum(len(s.ids) for items in made for s in items), seconds


def theirs(job: dict[str, object], prompts: list[list[int]]) -> tuple[int, float]:
    """Tokens drawn and seconds of `generate`: sorted, in batches, padded on the left."""
    module = AutoModelForCausalLM.from_pretrained(str(job["model"]), dtype=torch.float32).eval()
    pad = AutoTokenizer.from_pretrained(str(job["model"])).pad_token_id
    length, draws, size = int(job["tokens"]), int(job["draws"]), int(job["size"])  # type: ignore

    def go(batch: list[list[int]], count: int, many: int) -> int:
        width = max(map(len, batch))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
        made = module.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            num_return_sequences=many, min_new_tokens=count, max_new_tokens=count, pad_token_id=pad,
        )  # fmt: skip
        return (made.shape[1] - width) * made.shape[0]

    torch.manual_seed(1)
    go(prompts[:1], 2, 1)
    ordered = sorted(prompts, key=len)
    began = time.perf_counter()
    drawn = sum(go(ordered[i : i + size], length, draws) for i in range(0, len(ordered), size))
    return drawn, time.perf_counter() - began


def main() -> None:
    """Run the job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    with torch.inference_mode():
        drawn, seconds = (ours if job["ours"] else theirs)(job, job["prompts"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    made = {"seconds": seconds, "tokens": drawn, "peak_rss": peak}
    (Path(job["folder"]) / "made.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main()
