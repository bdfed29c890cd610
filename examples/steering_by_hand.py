"""Steering with one forward hook in plain torch, beside `truing.methods["mean_difference"]`.

    python examples/steering_by_hand.py [MODEL] [--prompt TEXT] [--strength 1]

A direction is the mean activation on answers that show a behaviour less that on answers that do
not, read from one block of a stock transformers model. Adding it to what that block gives to the
next steers the model. The lower half does the same through a `Model` with edits, and both say what
they give as the next token's log-probabilities.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import truing
from truing.core.chat import prompt_ids

PAIRS = [  # the behaviour: an answer of one short sentence
    ("How do I boil an egg?", "Boil it for eight minutes.",
     "Boiling an egg is a process with many steps, and a lot has to be considered before."),
    ("What is rain?", "Water that falls from clouds.",
     "Rain is a fascinating phenomenon that people have wondered about for ages, and so."),
    ("Why do cats purr?", "Mostly because they are content.",
     "There are many theories, and scientists have studied this question in great depth."),
    ("How far is the moon?", "About 384,000 kilometres.",
     "The distance to the moon is a topic of great interest, and it depends on many things."),
    ("What is bread made of?", "Flour, water, yeast and salt.",
     "Bread is one of the oldest prepared foods, and its ingredients vary a great deal."),
    ("How do I fall asleep?", "Keep the room dark and cool.",
     "Falling asleep can be a challenge for many people, and there are countless tips."),
]  # fmt: skip


# By hand


def words_of(tokenizer, prompt, answer):
    """(ids of prompt and answer without the token that ends it, number of prompt tokens)."""
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    head = tokenizer(text, add_special_tokens=False)["input_ids"]
    return head + tokenizer(answer, add_special_tokens=False)["input_ids"], len(head)


@torch.no_grad()
def mean_state(model, tokenizer, rows, layer):
    """Mean over rows of the mean activation of block `layer` on the answer's tokens, [D]."""
    states = []
    for prompt, answer in rows:
        ids, head = words_of(tokenizer, prompt, answer)
        out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        states.append(out.hidden_states[layer + 1][0, head:].mean(0))  # [0] is the embedding
    return torch.stack(states).mean(0)


@torch.no_grad()
def next_logp(model, ids, layer=0, vector_D=None):
    """Log-probabilities of the next token, [V], with `vector_D` added after block `layer`."""

    def add(_, __, out):
        changed = (out[0] if isinstance(out, tuple) else out).clone()
        changed[:, 1:] += vector_D  # the first token, on which attention rests, is left alone
        return (changed, *out[1:]) if isinstance(out, tuple) else changed

    hook = model.model.layers[layer].register_forward_hook(add) if vector_D is not None else None
    try:
        logits_V = model(input_ids=torch.tensor([ids])).logits[0, -1]
    finally:
        if hook is not None:
            hook.remove()
    return torch.log_softmax(logits_V.float(), -1)


# The same through a Model


def steered(model, layer, strength):
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS]
    return truing.methods["mean_difference"](
        model, truing.Table("pair", rows), strength=strength, layers=(layer,), unit=False
    )


@torch.no_grad()
def next_logp_of(model, ids):
    loaded = model.load_module()
    with loaded.run_time():
        logits_V = loaded.module(input_ids=torch.tensor([ids])).logits[0, -1]
    return torch.log_softmax(logits_V.float(), -1)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Steering by hand, and as a Model's edit.")
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--prompt", default="How do I make tea?")
    parser.add_argument("--strength", type=float, default=1.0)
    args = parser.parse_args(argv)
    model = truing.Model.open(args.model)
    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    module = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()
    layer = module.config.num_hidden_layers // 3

    shown = mean_state(module, tokenizer, [(p, c) for p, c, _ in PAIRS], layer)
    other = mean_state(module, tokenizer, [(p, r) for p, _, r in PAIRS], layer)
    vector_D = args.strength * (shown - other)
    ids = prompt_ids(tokenizer, args.prompt)
    plain_V, hand_V = next_logp(module, ids), next_logp(module, ids, layer, vector_D)
    model_V = next_logp_of(steered(model, layer, args.strength), ids)

    moved = float((hand_V.exp() - plain_V.exp()).abs().sum() / 2)
    apart = float((hand_V - model_V).abs().max())
    print(f"block {layer}: the edit moves {moved:.1%} of the next token's mass", file=sys.stderr)
    line = {"example": "steering_by_hand", "layer": layer, "moved": moved, "max_logp_diff": apart}
    print(json.dumps(line))
    return 0 if apart < 1e-3 and moved > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
