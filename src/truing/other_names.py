"""What other tools call a setting or an input: TRL, transformers, PEFT, OpenRLHF, verl and others.

Where the letters do not tell what was meant, these do, as `docs/from-trl.md` and
`docs/from-others.md` have them.
"""

from __future__ import annotations

ROWS = "It is the rows of one update, of all devices and accumulated micro-batches together"
SHARE = "It is a share of the updates"
OWN_LOSS = "Each loss is a method of its own: docs/from-trl.md has the table"
ANSWERS = "Only answers carry loss; of messages every turn of the assistant"
COLUMNS = "Columns have names of their own: docs/data-and-models.md has the table"
MIXED = "Several tables become one by select/mixture"
KERNELS = "Kernels are chosen by the machine"
PLAIN = "Adapters are plain LoRA on linear layers; rank 0 trains all weights"
WATCHED = "A recipe's run is watched, of one step as well: truing run --watch tensorboard"

# By their name, what it is called here: the first of these that a method has.
ALSO: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("max_seq_length", "max_seq_len", "cutoff_len", "sequence_len", "max_len", "max_tokens"),
        ("max_length",),
    ),
    **dict.fromkeys(("learning_rate", "peak_learning_rate"), ("lr",)),
    **dict.fromkeys(("num_train_epochs", "num_epochs", "n_epochs"), ("epochs",)),
    **dict.fromkeys(("max_steps", "num_steps", "train_steps"), ("steps",)),
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "train_batch_size",
            "batch_size",
            "micro_batch_size",
            "gradient_accumulation_steps",
        ),
        ("batch",),
    ),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler", "scheduler"), ("schedule",)),
    **dict.fromkeys(("warmup_ratio", "warmup_steps"), ("warmup",)),
    **dict.fromkeys(("max_grad_norm", "gradient_clipping"), ("clip",)),
    **dict.fromkeys(("lora_r", "lora_rank", "r"), ("rank",)),
    **dict.fromkeys(("target_modules", "lora_target_modules", "lora_target"), ("targets",)),
    **dict.fromkeys(("bf16", "fp16", "torch_dtype", "precision"), ("dtype",)),
    **dict.fromkeys(
        ("num_generations", "num_return_sequences", "rloo_k", "group_size", "n_samples_per_prompt"),
        ("answers",),
    ),
    **dict.fromkeys(
        (
            "max_completion_length",
            "max_new_tokens",
            "max_response_length",
            "response_length",
            "generate_max_len",
        ),
        ("max_tokens",),
    ),
    **dict.fromkeys(("num_iterations", "ppo_epochs", "num_ppo_epochs"), ("passes",)),
    **dict.fromkeys(("steps_per_generation", "num_mini_batches"), ("minibatches",)),
    **dict.fromkeys(
        ("kl_coef", "init_kl_coef", "kl_loss_coef", "pref_beta", "dpo_beta", "rl_beta"), ("beta",)
    ),
    **dict.fromkeys(("gae_lambda", "lambd"), ("lam",)),
    **dict.fromkeys(("cliprange_value", "value_clip"), ("clip_value",)),
    "vf_coef": ("vf",),
    "reward_funcs": ("rewards",),
    "reward_weights": ("weights",),
    "missing_eos_penalty": ("missing_end",),
    **dict.fromkeys(
        ("epsilon", "cliprange", "clip_range", "clip_eps", "eps_clip", "clip_ratio"),
        ("clip_low", "clip_ratio"),
    ),
    **dict.fromkeys(("cliprange_low", "clip_ratio_low", "eps_clip_low"), ("clip_low",)),
    **dict.fromkeys(("cliprange_high", "clip_ratio_high", "eps_clip_high"), ("clip_high",)),
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
    **dict.fromkeys(("desirable_weight", "kto_chosen_weight"), ("desirable",)),
    **dict.fromkeys(("undesirable_weight", "kto_rejected_weight"), ("undesirable",)),
    "loss_weights": ("mix",),
    "reward_model_path": ("reward_model",),
    "ref_model": ("reference",),
    "teacher_model": ("teacher",),
    **dict.fromkeys(("model_name_or_path", "base_model", "model_id"), ("model",)),
    **dict.fromkeys(("eval_dataset", "val_size", "val_set_size"), ("held_out",)),
    **dict.fromkeys(("train_dataset", "dataset", "dataset_name", "datasets"), ("data",)),
    **dict.fromkeys(("probabilities", "interleave_probs"), ("shares",)),
    **dict.fromkeys(("stopping_strategy", "mix_strategy"), ("stop",)),
}

# What there is to say beside the name here, or where there is none.
NOTES: dict[str, str] = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "micro_batch_size", "gradient_accumulation_steps"), ROWS
    ),
    **dict.fromkeys(("warmup_ratio", "warmup_steps"), SHARE),
    "loss_type": OWN_LOSS,
    **dict.fromkeys(
        (
            "use_weighting",
            "ld_alpha",
            "sync_ref_model",
            "f_divergence_type",
            "neftune_noise_alpha",
            "pref_loss",
            "rpo_alpha",
            "pref_ftx",
            "cpo_alpha",
            "reference_free",
        ),
        OWN_LOSS,
    ),
    **dict.fromkeys(("val_size", "val_set_size"), "It is a table: select/split makes one"),
    **dict.fromkeys(
        ("datasets", "interleave_probs", "probabilities", "mix_strategy", "stopping_strategy"),
        MIXED,
    ),
    "max_prompt_length": "Prompts are never cut: rows whose prompt leaves no room within "
    "max_length are left out and counted",
    "adam_beta1": "AdamW's first beta is 0.9",
    "optim": "The optimizer is AdamW",
    "top_k": "Answers are drawn by temperature and top_p",
    "data_seed": "Rows are drawn by the seed: --seed, or seed= in a call",
    **dict.fromkeys(("dataset_text_field", "formatting_func"), COLUMNS),
    **dict.fromkeys(
        ("chat_template_path", "chat_template", "clone_chat_template", "template"),
        "It is said with the model: NAME?template=FILE",
    ),
    "eos_token": "It is said with the model: NAME?end=TOKEN, beside the tokens at which it stops",
    "pad_token": "Rows are packed, without padding",
    **dict.fromkeys(("use_rslora", "use_dora", "modules_to_save"), PLAIN),
    **dict.fromkeys(("deepspeed", "fsdp"), "torchrun alone does: docs/several-gpus.md"),
    **dict.fromkeys(("attn_implementation", "flash_attn", "use_liger_kernel"), KERNELS),
    "push_to_hub": "truing store export writes a plain folder, which any upload takes",
    "peft_config": "Give rank, lora_alpha and targets; rank 0 trains all weights",
    "use_peft": "Give rank, lora_alpha and targets; rank 0 trains all weights",
    "lora_dropout": "Adapters are trained without dropout",
    "output_dir": "The result is saved by --out FOLDER of a command, by .save(folder) in Python",
    "packing": "Rows are always packed, and none sees another",
    "padding_free": "Rows are always packed, and none sees another",
    "precompute_ref_log_probs": "That is always done, and kept between runs",
    **dict.fromkeys(("assistant_only_loss", "completion_only_loss", "train_on_inputs"), ANSWERS),
    "save_steps": "Checkpoints are written by time, and the last two stay",
    "save_total_limit": "Checkpoints are written by time, and the last two stay",
    "logging_steps": "Every update is a line of metrics.jsonl",
    **dict.fromkeys(("report_to", "watch"), WATCHED),
    "use_vllm": "Answers are drawn in the training process",
    **dict.fromkeys(("load_in_4bit", "quantization_bit"), "Name the model with ?bits=4 behind it"),
    "load_in_8bit": "Weights of 8 bits cannot be trained on; name the model with ?bits=4 behind it",
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
