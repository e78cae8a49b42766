#!/usr/bin/env python3
"""Prunes a small Llama of transformers, with grouped-query attention, which has learned to count in steps.

    .venv/bin/python -m pip install -r requirements-examples.txt
    .venv/bin/python examples/language_model.py

Half a minute on two cores. It ends with what the model costs and foresees (in percent of the words), about so:

                params        MACs    foreseen
     dense     76.99 K      0.94 M       97.64
    pruned     38.81 K      0.48 M       33.25
 finetuned     38.81 K      0.48 M       97.88
  reloaded     38.81 K      0.48 M       97.88
It goes on: 16 12 8 4 … 0 19 15 11 7 3 22 18
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import isomorphic as iso
from isomorphic.measure.complexity import count_complexity, format_macs, format_params

try:
    from transformers import LlamaConfig, LlamaForCausalLM  # pyright: ignore[reportMissingImports]
except ImportError:
    raise SystemExit("transformers is missing: python -m pip install -r requirements-examples.txt") from None

parser = argparse.ArgumentParser(description="Prunes a small Llama of transformers.")
parser.add_argument("--steps", type=int, default=300, help="batches of the training, and again of the finetuning")
parser.add_argument("--output", default="output/examples/language_model.safetensors", help="file of the pruned model")
args = parser.parse_args()
torch.manual_seed(0)

# The language: 3 7 11 15 19 0 4 …, from any start in steps of any size, modulo 23: 529 sentences of 12 words. A tenth
# of them is for validation. How a sentence begins says how it goes on.
WORDS, LENGTH = 23, 12
start, step = torch.cartesian_prod(torch.arange(WORDS), torch.arange(WORDS))[torch.randperm(WORDS**2)].T
sentences = (start[:, None] + step[:, None] * torch.arange(LENGTH)) % WORDS  # (529, 12)
training, validation = sentences[53:], sentences[:53]


def build() -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}  # two query heads share one of keys and values
    words = {"vocab_size": WORDS, "bos_token_id": None, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(max_position_embeddings=64, **sizes, **heads, **words))


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """The cross entropy of each next word, which a model of transformers computes where it is given labels."""
    return model(input_ids=batch, labels=batch, use_cache=False).loss


def train(model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, training[torch.randperm(len(training))[:64]]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def show(stage: str, model: nn.Module) -> None:
    """Prints params, MACs of one sentence, and the share of the words that are foreseen, from the fifth on."""
    cost = count_complexity(model, inputs)
    guesses = model.eval()(input_ids=validation, use_cache=False).logits[:, 3:-1].argmax(dim=-1)
    right = 100 * (guesses == validation[:, 4:]).float().mean().item()
    print(f"{stage:>10}{format_params(cost.params):>12}{format_macs(cost.macs_exact):>12}{right:>12.2f}")


inputs = {"input_ids": validation[:1], "use_cache": False}  # a cache that is returned would keep its heads
model = build()
train(model, args.steps)

# Heads get narrower and MLPs and the residual stream thinner; rotary embeddings keep whole heads.
pruned = iso.prune(model, inputs, macs="50%", data=training.split(64), loss=loss)
print(pruned)
print(f"{'':>10}{'params':>12}{'MACs':>12}{'foreseen':>12}")
show("dense", model)
model = pruned.model
show("pruned", model)
train(model, args.steps)
show("finetuned", model)

# save_pretrained would not do: the model's config goes on naming the dense widths.
pruned.save(args.output)
model = iso.load_model(args.output, model=build())
show("reloaded", model)
begun = validation[:1, :4]
asked = {"attention_mask": torch.ones_like(begun), "max_new_tokens": 8, "do_sample": False}
sentence = model.generate(begun, **asked)  # pyright: ignore[reportCallIssue]
print("It goes on:", *begun[0].tolist(), "…", *sentence[0, 4:].tolist())
