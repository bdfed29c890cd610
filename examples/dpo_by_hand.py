"""DPO in plain torch and transformers, step by step beside the engine: the same numbers.

    python examples/dpo_by_hand.py [MODEL] [--pairs 8] [--steps 4]

The upper half knows nothing of truing: chat template, padding, shifted labels, log-probabilities,
the frozen reference, AdamW. The lower half trains the same model on the same pairs with
`truing.methods["dpo"]` and prints both losses and gradient norms at every step. Full fine-tuning,
so that no adapter's random start stands between the two.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys

import torch
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

import truing
from truing.context import Context, use

BETA, LR = 0.1, 1e-5


# By hand


def encode(tokenizer, prompt, answer):
    """(ids of prompt and answer, number of prompt tokens)."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    head = tokenizer(text, add_special_tokens=False)["input_ids"]
    # The token that ends the turn is part of the answer: without it the model never learns to stop.
    return head + tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"], len(head)


def collate(rows):
    """Ids, attention mask and labels, padded on the right; -100 where there is no loss."""
    width = max(len(ids) for ids, _ in rows)
    ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
    mask_BT, labels_BT = torch.zeros_like(ids_BT), torch.full_like(ids_BT, -100)
    for i, (ids, head) in enumerate(rows):
        ids_BT[i, : len(ids)] = torch.tensor(ids)
        mask_BT[i, : len(ids)] = 1
        labels_BT[i, head : len(ids)] = torch.tensor(ids[head:])
    return ids_BT, mask_BT, labels_BT


def sequence_logp(model, ids_BT, mask_BT, labels_BT):
    """Log-probability of each answer, [B]: token t is predicted from position t - 1."""
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT).logits[:, :-1].float()
    target_BT = labels_BT[:, 1:]
    loss_BT = cross_entropy(logits_BTV.transpose(1, 2), target_BT, reduction="none")
    return -loss_BT.sum(1)


def dpo_by_hand(folder, pairs, steps):
    """[(loss, gradient norm)] of each step; every step sees all pairs."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    reference = copy.deepcopy(model).requires_grad_(False)
    chosen = [encode(tokenizer, p["prompt"], p["chosen"]) for p in pairs]
    rejected = [encode(tokenizer, p["prompt"], p["rejected"]) for p in pairs]
    batch = collate(chosen + rejected)
    with torch.no_grad():
        ref_B = sequence_logp(reference, *batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    history = []
    for _ in range(steps):
        ratio_B = sequence_logp(model, *batch) - ref_B
        w_U, l_U = ratio_B.chunk(2)
        loss = -logsigmoid(BETA * (w_U - l_U)).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        history.append((float(loss.detach()), float(norm)))
    return history


# The same with the engine


def dpo_by_engine(model, table, steps):
    """[(loss, gradient norm)] of each step, as the engine recorded them."""
    seen = Context()
    with use(seen):
        truing.methods["dpo"](
            model, table, beta=BETA, lr=LR, steps=steps, batch=len(table), rank=0,
            schedule="constant", warmup=0.0, clip=1.0,
        )  # fmt: skip
    return [(m["loss"], m["grad_norm"]) for m in seen.metrics if "loss" in m]


def main(argv=None):
    parser = argparse.ArgumentParser(description="DPO by hand, and the engine beside it.")
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--data", default="helpful_pairs")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    model = truing.Model.open(args.model)
    table = truing.Table.read(args.data, limit=args.pairs)
    hand = dpo_by_hand(model.folder, table.rows, args.steps)
    engine = dpo_by_engine(model, table, args.steps)
    print("step   loss by hand   by engine      gradient norm by hand   by engine", file=sys.stderr)
    for i, ((a, n), (b, m)) in enumerate(zip(hand, engine, strict=True), 1):
        print(f"{i:>4}   {a:<12.7f}   {b:<12.7f}   {n:<21.6f}   {m:.6f}", file=sys.stderr)
    apart = max(abs(a - b) / abs(a) for (a, _), (b, _) in zip(hand, engine, strict=True))
    steeper = max(abs(n - m) / n for (_, n), (_, m) in zip(hand, engine, strict=True))
    line = {"example": "dpo_by_hand", "max_loss_rel_diff": apart, "max_gradnorm_rel_diff": steeper,
            "loss_first": hand[0][0], "loss_last": hand[-1][0]}  # fmt: skip
    print(json.dumps(line))
    return 0 if apart < 1e-4 and steeper < 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main())
