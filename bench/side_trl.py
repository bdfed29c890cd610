"""TRL's side of a training benchmark: its own trainer, timed from token ids to the last update.

Runs in TRL's environment and imports nothing of this project. The rows are tokenised already, so
the trainer's own tokenisation is passed over and not timed; its reference pass is.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer


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


def config_of(job: dict[str, Any]) -> dict[str, Any]:
    """Settings that both of TRL's trainers take: what the protocol fixes, and the job's own."""
    settings = job["settings"]
    micro = settings.get("micro_batch", 8)
    more: dict[str, Any] = {}
    if not settings.get("defaults"):
        more = {"gradient_checkpointing": False}
    return {
        "output_dir": str(Path(job["folder"]) / "out"),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": max(1, job["batch"] // micro),
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
        "max_length": job["most"],
        "dataloader_num_workers": 0,
        "seed": job["seed"],
        **more,
    }


def trainer_of(job: dict[str, Any], clock: Clock) -> Any:
    """The trainer with its model, ready to train."""
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    peft = None
    if job["rank"]:
        peft = LoraConfig(
            r=job["rank"], lora_alpha=2 * job["rank"], lora_dropout=0.0,
            target_modules="all-linear", bias="none", task_type="CAUSAL_LM",
        )  # fmt: skip
    settings = job["settings"]
    given: dict[str, Any] = {
        "model": model, "processing_class": tokenizer, "peft_config": peft, "callbacks": [clock],
    }  # fmt: skip
    if job["task"] == "dpo":
        rows = [
            {"prompt_ids": r["prompt"], "chosen_ids": r["chosen"], "rejected_ids": r["rejected"]}
            for r in job["rows"]
        ]
        config = DPOConfig(
            beta=job["betas"][0], precompute_ref_log_probs=not settings.get("defaults"),
            **config_of(job),
        )  # fmt: skip
        return TimedDPO(args=config, train_dataset=Dataset.from_list(rows), **given)
    rows = [
        {
            "input_ids": r["prompt"] + r["chosen"],
            "completion_mask": [0] * len(r["prompt"]) + [1] * len(r["chosen"]),
        }
        for r in job["rows"]
    ]
    config = SFTConfig(
        completion_only_loss=True, packing=bool(settings.get("packing")), **config_of(job)
    )
    return SFTTrainer(args=config, train_dataset=Dataset.from_list(rows), **given)


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
        found = load_file(Path(job["adapter"]) / "adapter_model.safetensors")
        named = dict(trainer.model.named_parameters())
        with torch.no_grad():
            for name, value in found.items():
                named[name.replace(".weight", ".default.weight")].copy_(value)
    began = time.perf_counter()
    trainer.train()
    seconds = clock.last - began + getattr(trainer, "reference_seconds", 0.0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    trained = {
        n.replace(".default.weight", ".weight"): p.detach().contiguous()
        for n, p in trainer.model.named_parameters()
        if p.requires_grad
    }
    save_file(trained, folder / "trained.safetensors")
    made = {
        "seconds": seconds,
        "reference_seconds": getattr(trainer, "reference_seconds", 0.0),
        "losses": clock.losses,
        "grad_norms": clock.norms,
        "peak_rss": peak,
        "steps": trainer.state.global_step,
    }
    (folder / "made.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main()
