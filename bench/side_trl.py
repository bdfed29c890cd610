"""TRL's side of a training benchmark: its own trainers, timed from token ids to the last update.

Runs in TRL's environment and imports nothing of this project. The rows are tokenised already, so
the trainers' own tokenisation is passed over and not timed; DPO's reference pass is.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer

HEAD = "reward_head.weight"
SCORE = "base_model.model.score.modules_to_save.default.weight"
LOSS_TYPES = {"dpo": "sigmoid", "ipo": "ipo", "hinge": "hinge", "cpo": "sigmoid", "simpo": "simpo"}


class Clock(TrainerCallback):
    """Losses, gradient norms and the time of the last update."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.last = 0.0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs and "grad_norm" in logs:
            self.losses.append(float(logs["loss"]))
            self.norms.append(float(logs["grad_norm"]))


class TimedDPO(DPOTrainer):
    """Takes token ids as they are and times the reference pass."""

    reference_seconds = 0.0

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        made = super()._precompute_ref_logps(*args, **kwargs)
        self.reference_seconds += time.perf_counter() - began
        return made


class GivenCPO(CPOTrainer):
    """Takes token ids as they are."""

    def tokenize_row(self, feature: Any, model: Any = None) -> Any:
        prompt = feature["prompt_ids"]
        made: dict[str, Any] = {
            "prompt_input_ids": prompt,
            "prompt_attention_mask": [1] * len(prompt),
        }
        for name in ("chosen", "rejected"):
            ids = prompt + feature[f"{name}_ids"]
            made[f"{name}_input_ids"] = ids
            made[f"{name}_attention_mask"] = [1] * len(ids)
            made[f"{name}_labels"] = [-100] * len(prompt) + feature[f"{name}_ids"]
        return made


class TimedGRPO(GRPOTrainer):
    """Takes prompts as token ids by their number, times generation, and can be told the answers."""

    rows: list[dict[str, Any]] = []
    asked: list[int] = []
    generation_seconds = 0.0
    tokens = 0

    def _tokenize_prompts(self, prompts: list[str]) -> Any:
        self.asked = [int(p) for p in prompts]
        return [list(self.rows[i]["prompt"]) for i in self.asked], None, {}

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        if "recorded" in self.rows[0]:
            turn: Counter[int] = Counter()
            ids: list[list[int]] = []
            for i in self.asked:
                ids.append(list(self.rows[i]["recorded"][turn[i]]["ids"]))
                turn[i] += 1
            found = (ids, None)
        else:
            found = super()._generate_single_turn(*args, **kwargs)
        self.generation_seconds += time.perf_counter() - began
        self.tokens += sum(len(ids) for ids in found[0])
        return found


def config_of(job: dict[str, Any], batch: int) -> dict[str, Any]:
    """Settings that all of TRL's trainers take: what the protocol fixes, and the job's own."""
    settings = job["settings"]
    micro = settings.get("micro_batch", 8)
    more: dict[str, Any] = {}
    if not settings.get("defaults"):
        more = {"gradient_checkpointing": False}
    return {
        "output_dir": str(Path(job["folder"]) / "out"),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": max(1, batch // micro),
        "learning_rate": job["lr"],
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "dataloader_num_workers": 0,
        "seed": job["seed"],
        **more,
    }


def pairs_of(job: dict[str, Any]) -> Dataset:
    """Pairs with their prompt apart."""
    names = ("prompt", "chosen", "rejected")
    return Dataset.from_list([{f"{n}_ids": r[n] for n in names} for r in job["rows"]])


def dpo(job: dict[str, Any], given: dict[str, Any]) -> Any:
    """DPO, IPO and hinge: one trainer."""
    config = DPOConfig(
        beta=own_of(job)["beta"], loss_type=[LOSS_TYPES[job["task"]]],
        precompute_ref_log_probs=not job["settings"].get("defaults"),
        max_length=job["most"], **config_of(job, job["batch"]),
    )  # fmt: skip
    return TimedDPO(args=config, train_dataset=pairs_of(job), **given)


def cpo(job: dict[str, Any], given: dict[str, Any]) -> Any:
    """CPO, and SimPO, which is its loss without likelihood."""
    own = own_of(job)
    config = CPOConfig(
        beta=own["beta"], loss_type=LOSS_TYPES[job["task"]], cpo_alpha=own.get("alpha", 0.0),
        simpo_gamma=own.get("gamma", 0.0), max_length=job["most"], **config_of(job, job["batch"]),
    )  # fmt: skip
    return GivenCPO(args=config, train_dataset=pairs_of(job), **given)


def sft(job: dict[str, Any], given: dict[str, Any]) -> Any:
    """Supervised fine-tuning on answers."""
    rows = [
        {
            "input_ids": r["prompt"] + r["chosen"],
            "completion_mask": [0] * len(r["prompt"]) + [1] * len(r["chosen"]),
        }
        for r in job["rows"]
    ]
    config = SFTConfig(
        completion_only_loss=True, packing=bool(job["settings"].get("packing")),
        max_length=job["most"], **config_of(job, job["batch"]),
    )  # fmt: skip
    return SFTTrainer(args=config, train_dataset=Dataset.from_list(rows), **given)


def bradley_terry(job: dict[str, Any], given: dict[str, Any]) -> Any:
    """A reward model: adapters and a score head."""
    rows = [{f"{n}_ids": r["prompt"] + r[n] for n in ("chosen", "rejected")} for r in job["rows"]]
    config = RewardConfig(max_length=job["most"], **config_of(job, job["batch"]))
    return RewardTrainer(args=config, train_dataset=Dataset.from_list(rows), **given)


def grpo(job: dict[str, Any], given: dict[str, Any]) -> Any:
    """GRPO; all answers of an update are drawn together, from the weights that it starts with."""
    letters, answers = set(job["letters"]), job["batch"] * job["answers"]

    def rule(completions: list[str], **_: Any) -> list[float]:
        texts = [c.strip() for c in completions]
        return [sum(c in letters for c in t) / len(t) if t else 0.0 for t in texts]

    config = GRPOConfig(
        num_generations=job["answers"], generation_batch_size=answers,
        max_completion_length=job["tokens"], num_iterations=job["passes"], beta=0.0,
        loss_type="grpo", scale_rewards="group", shuffle_dataset=False, temperature=1.0,
        **config_of(job, answers),
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": str(i)} for i in range(len(job["rows"]))])
    made = TimedGRPO(args=config, reward_funcs=rule, train_dataset=rows, **given)
    made.rows = job["rows"]
    return made


TRAINERS: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "dpo": dpo, "ipo": dpo, "hinge": dpo, "simpo": cpo, "cpo": cpo, "sft": sft,
    "bradley_terry": bradley_terry, "grpo": grpo,
}  # fmt: skip


def own_of(job: dict[str, Any]) -> dict[str, Any]:
    """Settings of the loss."""
    return job.get("losses", {}).get(job["task"]) or {"beta": job["betas"][0]}


def trainer_of(job: dict[str, Any], clock: Clock) -> Any:
    """The trainer with its model, ready to train."""
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    scores = job["task"] == "bradley_terry"
    if scores:
        model = AutoModelForSequenceClassification.from_pretrained(
            job["model"], dtype=torch.float32, num_labels=1
        )
        # Scored is the last token that is not padding: it must not be the one that ends answers.
        tokenizer.pad_token = tokenizer.unk_token
    else:
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    peft = None
    if job["rank"]:
        peft = LoraConfig(
            r=job["rank"], lora_alpha=2 * job["rank"], lora_dropout=0.0,
            target_modules="all-linear", bias="none",
            task_type="SEQ_CLS" if scores else "CAUSAL_LM",
        )  # fmt: skip
    given: dict[str, Any] = {
        "model": model, "processing_class": tokenizer, "peft_config": peft, "callbacks": [clock],
    }  # fmt: skip
    return TRAINERS[job["task"]](job, given)


def start(trainer: Any, job: dict[str, Any]) -> None:
    """Give the trainer the adapter and the head that both sides begin with."""
    found = load_file(Path(job["adapter"]) / "adapter_model.safetensors")
    begun = {n.replace(".weight", ".default.weight"): t for n, t in found.items()}
    if job["task"] == "bradley_terry":
        begun[SCORE] = load_file(job["head"])[HEAD]
    named = dict(trainer.model.named_parameters())
    with torch.no_grad():
        for name, value in begun.items():
            named[name].copy_(value)


def offered() -> list[str]:
    """Names of all trainers of this release: "dpo", "online_dpo", ..."""
    folder = Path(str(trl.__file__)).parent
    own = (p.stem.removesuffix("_trainer") for p in (folder / "trainer").glob("*_trainer.py"))
    more = (p.parent.name for p in (folder / "experimental").glob("*/__init__.py"))
    return sorted({*own, *more})


def main() -> None:
    """Run the job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(job["folder"])
    torch.set_num_threads(job["threads"])
    # Rows in the order in which the other side takes them.
    job["rows"] = [job["rows"][i] for step in job["steps"] for i in step]
    clock = Clock()
    trainer = trainer_of(job, clock)
    if job["rank"]:
        start(trainer, job)
    gc.freeze()  # the trainer collects garbage first: what imports left is start-up, not training
    began = time.perf_counter()
    trainer.train()
    referenced = getattr(trainer, "reference_seconds", 0.0)
    made: dict[str, Any] = {
        "seconds": clock.last - began + referenced,
        "reference_seconds": referenced,
        "losses": clock.losses,
        "grad_norms": clock.norms,
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "steps": trainer.state.global_step,
        "offered": offered(),
    }
    if job["task"] == "grpo":
        made["generation_seconds"] = trainer.generation_seconds
        made["update_seconds"] = made["seconds"] - trainer.generation_seconds
        made["tokens"] = trainer.tokens
    trained = {
        HEAD if n == SCORE else n.replace(".default.weight", ".weight"): p.detach().contiguous()
        for n, p in trainer.model.named_parameters()
        if p.requires_grad
    }
    save_file(trained, folder / "trained.safetensors")
    (folder / "made.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main()
