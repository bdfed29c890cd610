"""A suggestion is made for a slip, and none where the names have little in common."""

import pytest

from truing.catalogue import check_used
from truing.errors import InputError, nearest, unknown
from truing.method import methods
from truing.other_names import ALSO
from truing.tablefiles import hub_fix


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("base", ["seed", "models", "weights"]),
        ("pairs", ["prose", "digits", "helpful_pairs"]),
        ("rows", ["prose", "digits"]),
        ("nothing", ["hinge"]),
        ("max_tokens", ["beta", "steps"]),
    ],
)
def test_no_suggestion_is_better_than_a_wrong_one(name: str, known: list[str]) -> None:
    assert nearest(name, known) is None
    assert unknown("name", name, known).fix.startswith("Known: ")


@pytest.mark.parametrize(
    ("name", "known", "wanted"),
    [
        ("god", ["good", "bad"], "good"),
        ("dop", ["ipo", "d2o", "dpo", "dro"], "dpo"),
        ("tain", ["test", "train"], "train"),
        ("lamda", ["panda", "lambda"], "lambda"),
        ("bate", ["rate", "beta", "bite"], "bite"),  # as like as "rate"; begins alike
        ("step", ["steps", "stepwise"], "steps"),
        ("dpp", ["dpo", "ipo"], "dpo"),
        ("compl", ["completion", "prompt"], "completion"),
        ("max_tokens", ["max_length", "max_turns"], "max_length"),
        ("max-seq-length", ["max_length", "max_tokens"], "max_length"),
        ("cutoff_len", ["max_length", "current"], "max_length"),
        ("max_token", ["max_length", "max_tokens"], "max_tokens"),
    ],
)
def test_the_nearest_one(name: str, known: list[str], wanted: str) -> None:
    assert nearest(name, known) == wanted
    assert nearest(name, reversed(known)) == wanted


@pytest.mark.parametrize(
    ("method", "name", "told"),
    [
        ("dpo", "learning_rate", "Did you mean 'lr'?"),
        ("dpo", "num_train_epochs", "Did you mean 'epochs'?"),
        ("dpo", "per_device_train_batch_size", "Did you mean 'batch'? It is the rows of one"),
        ("dpo", "ref_model", "Did you mean 'reference'?"),
        ("dpo", "lora_r", "Did you mean 'rank'?"),
        ("dpo", "loss_type", "Each loss is a method of its own"),
        ("dpo", "warmup_steps", "Did you mean 'warmup'? It is a share of the updates"),
        ("f_dpo", "f_divergence_type", "Did you mean 'divergence'?"),
        ("dpo", "f_divergence_type", "Each loss is a method of its own"),
        ("grpo", "num_generations", "Did you mean 'answers'?"),
        ("grpo", "max_completion_length", "Did you mean 'max_tokens'?"),
        ("grpo", "reward_funcs", "Did you mean 'rewards'?"),
        ("gkd_on_policy", "teacher_model", "Did you mean 'teacher'?"),
        ("sft", "packing", "Rows are always packed"),
        ("ppo", "cliprange", "Did you mean 'clip_ratio'?"),
        ("grpo", "clip_ratio", "Did you mean 'clip_low'?"),
        ("ppo", "num_ppo_epochs", "Did you mean 'passes'?"),
        ("ppo", "gae_lambda", "Did you mean 'lam'?"),
        ("dpo", "rpo_alpha", "Each loss is a method of its own"),
        ("dpo", "cpo_alpha", "Each loss is a method of its own"),
        ("cpo", "cpo_alpha", "Did you mean 'alpha'?"),
        ("dpo", "max_prompt_length", "Prompts are never cut"),
        ("dpo", "adam_beta1", "AdamW's first beta"),
        ("dpo", "reference_free", "Each loss is a method of its own"),
        ("dpo", "data_seed", "Rows are drawn by the seed"),
        ("grpo", "top_k", "Answers are drawn by temperature and top_p"),
        ("sft", "val_set_size", "Did you mean 'held_out'? It is a table"),
        ("dpo", "cliprange", "Known: "),
    ],
)
def test_what_other_tools_call_a_setting(method: str, name: str, told: str) -> None:
    with pytest.raises(InputError) as error:
        methods[method].validate({name: 1})
    assert error.value.message == f"unknown setting {name!r}"
    assert error.value.fix.startswith(told)


def test_all_of_these_lead_to_something_that_there_is() -> None:
    some = [methods[n] for n in (
        "train/dpo", "train/grpo", "train/cispo", "train/tr_dpo", "train/f_dpo", "train/kto",
        "train/gkd_on_policy", "train/cpo", "train/simpo", "train/neftune", "train/bradley_terry",
        "train/ppo", "train/gspo", "select/mixture",
    )]  # fmt: skip
    there = {n for m in some for n in (*m.settings, *m.inputs)}
    assert {n for names in ALSO.values() for n in names} <= there


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("owner/set", "hub:owner/set"),
        ("owner/set:train", "hub:owner/set/train"),
        ("owner/set:train[:1%]", "hub:owner/set/train"),
        ("tests/rows", ""),
        ("owner/set.csv", ""),
    ],
)
def test_what_other_tools_call_a_split(name: str, written: str) -> None:
    assert hub_fix(name) == (written and f"A data set of the Hugging Face hub is written {written}")


def test_an_environment_that_is_not_there_is_one_to_register() -> None:
    with pytest.raises(InputError, match="setting 'environment': unknown component") as error:
        check_used({"environment": {"use": "nowhere_at_all"}})
    assert '@component("environment")' in error.value.fix and "reward" not in error.value.fix
    with pytest.raises(InputError, match="unknown component 'nothing_like_it'") as error:
        check_used({"rewards": {"r": {"use": "nothing_like_it"}}})
    assert '@component("reward")' in error.value.fix
