"""What other tools call a setting or an input: TRL, transformers and PEFT, and older recipes.

Where the letters do not tell what was meant, these do, as `docs/from-trl.md` has them.
"""

from __future__ import annotations

ROWS = "It is the rows of one update, of all devices and accumulated micro-batches together"
SHARE = "It is a share of the updates"
OWN_LOSS = "Each loss is a method of its own: docs/from-trl.md has the table"

# By their name, what it is called here: the first of these that a method has.
ALSO: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("max_seq_length", "max_seq_len", "cutoff_len", "max_tokens"), ("max_length",)),
    **dict.fromkeys(("learning_rate", "peak_learning_rate"), ("lr",)),
    **dict.fromkeys(("num_train_epochs", "num_epochs", "n_epochs"), ("epochs",)),
    **dict.fromkeys(("max_steps", "num_steps", "train_steps"), ("steps",)),
    **dict.fromkeys(
        ("per_device_train_batch_size", "train_batch_size", "batch_size", "micro_batch_size",
         "gradient_accumulation_steps"),
        ("batch",),
    ),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler", "scheduler"), ("schedule",)),
    **dict.fromkeys(("warmup_ratio", "warmup_steps"), ("warmup",)),
    **dict.fromkeys(("max_grad_norm", "gradient_clipping"), ("clip",)),
    **dict.fromkeys(("lora_r", "lora_rank", "r"), ("rank",)),
    **dict.fromkeys(("target_modules", "lora_target_modules"), ("targets",)),
    **dict.fromkeys(("bf16", "fp16", "torch_dtype", "precision"), ("dtype",)),
    **dict.fromkeys(("num_generations", "num_return_sequences"), ("answers",)),
    **dict.fromkeys(("max_completion_length", "max_new_tokens"), ("max_tokens",)),
    "num_iterations": ("passes",),
    "steps_per_generation": ("minibatches",),
    "reward_funcs": ("rewards",),
    "reward_weights": ("weights",),
    "missing_eos_penalty": ("missing_end",),
    "epsilon": ("clip_low", "clip_ratio"),
    "epsilon_high": ("clip_high", "cap"),
    "delta": ("bound",),
    "scale_rewards": ("scale",),
    "top_entropy_quantile": ("entropy_share",),
    "mask_truncated_completions": ("drop_unfinished",),
    "off_policy_mask_threshold": ("opsm",),
    "ref_model_mixup_alpha": ("share",),
    "ref_model_sync_steps": ("every",),
    "f_divergence_type": ("divergence",),
    "f_alpha_divergence_coef": ("divergence_alpha",),
    "eval_steps": ("eval_every",),
    "eval_strategy": ("eval_every",),
    "load_best_model_at_end": ("keep_best",),
    "early_stopping_patience": ("patience",),
    "lmbda": ("on_policy",),
    "cpo_alpha": ("alpha",),
    "simpo_gamma": ("gamma",),
    "neftune_noise_alpha": ("noise",),
    "center_rewards_coefficient": ("centring",),
    "desirable_weight": ("desirable",),
    "undesirable_weight": ("undesirable",),
    "loss_weights": ("mix",),
    "reward_model_path": ("reward_model",),
    "ref_model": ("reference",),
    "teacher_model": ("teacher",),
    "model_name_or_path": ("model",),
    "eval_dataset": ("held_out",),
    **dict.fromkeys(("train_dataset", "dataset", "dataset_name"), ("data",)),
}  # fmt: skip

# What there is to say beside the name here, or where there is none.
NOTES: dict[str, str] = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "micro_batch_size", "gradient_accumulation_steps"), ROWS
    ),
    **dict.fromkeys(("warmup_ratio", "warmup_steps"), SHARE),
    "loss_type": OWN_LOSS,
    **dict.fromkeys(
        ("use_weighting", "ld_alpha", "sync_ref_model", "f_divergence_type", "neftune_noise_alpha"),
        OWN_LOSS,
    ),
    "peft_config": "Give rank, lora_alpha and targets; rank 0 trains all weights",
    "use_peft": "Give rank, lora_alpha and targets; rank 0 trains all weights",
    "lora_dropout": "Adapters are trained without dropout",
    "output_dir": "The result is saved by --out FOLDER of a command, by .save(folder) in Python",
    "packing": "Rows are always packed, and none sees another",
    "padding_free": "Rows are always packed, and none sees another",
    "precompute_ref_log_probs": "That is always done, and kept between runs",
    "assistant_only_loss": "Only answers carry loss; of messages every turn of the assistant",
    "completion_only_loss": "Only answers carry loss; of messages every turn of the assistant",
    "save_steps": "Checkpoints are written by time, and the last two stay",
    "save_total_limit": "Checkpoints are written by time, and the last two stay",
    "logging_steps": "Every update is a line of metrics.jsonl",
    "report_to": "A run writes metrics.jsonl and report.html",
    "use_vllm": "Answers are drawn in the training process",
    "load_in_4bit": "Weights of 4 or 8 bits cannot be trained on",
    "load_in_8bit": "Weights of 4 or 8 bits cannot be trained on",
    "resume_from_checkpoint": "The same command once more goes on from its checkpoint",
}


def plain(name: str) -> str:
    """A name as the tables have it."""
    return name.lower().replace("-", "_")


def here(name: str, known: dict[str, str]) -> str | None:
    """What a name of another tool is called among `known`, by their plain names; else None."""
    asked = plain(name)
    if asked in known:
        return None
    return next((known[n] for n in ALSO.get(asked, ()) if n in known), None)
