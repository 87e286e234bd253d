"""The models, their optimizer and learning rate, and one step of training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from examples.train_demo_model.text import ROW, VOCABULARY

SHORT_ROW = 256  # tokens


class Architecture(str, Enum):
    """A Llama of 5.4 million parameters, one of 91 million (for a card), or a GPT-NeoX of 3.5 million."""

    llama = "llama"
    llama_large = "llama_large"
    gpt_neox = "gpt_neox"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the trained weights, apart from the text."""

    architecture: Architecture
    steps: int
    learning_rate: float
    warmup_steps: int
    cosine_steps: int
    cooldown_steps: int
    rows_per_step: int
    seed: int


def new_model(architecture: Architecture, seed: int) -> PreTrainedModel:
    """Build a model with random float32 weights and tied embeddings."""
    torch.manual_seed(seed)
    if architecture is Architecture.gpt_neox:
        return new_gpt_neox()
    return new_llama(SIZES[architecture])


# every configuration has these
SHARED = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": ROW,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


SIZES = {
    Architecture.llama: {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    Architecture.llama_large: {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 14,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
}


def new_llama(sizes: dict[str, int]) -> LlamaForCausalLM:
    """Build a Llama: gated MLPs, grouped-query attention, no biases."""
    return LlamaForCausalLM(LlamaConfig(**sizes, **SHARED))


def new_gpt_neox() -> GPTNeoXForCausalLM:
    """Build a GPT-NeoX like Pythia: GELU without gates, fused qkv, biases, attention beside the MLP."""
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            hidden_size=192, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6, **SHARED
        )
    )


def new_optimizer(model: PreTrainedModel) -> torch.optim.AdamW:
    """Return AdamW that decays matrices and leaves the gains of the norms alone."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    gains = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def cooldown_start(recipe: Recipe) -> int:
    """Return the step from which the rate falls to zero and rows have their full length."""
    return max(0, recipe.steps - recipe.cooldown_steps)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Return the rate at `step` (from 0): a linear warm-up, a cosine, a linear fall to zero.

    The cosine has a length of its own, so a run may be made shorter or longer by moving only its
    end: what was trained before the fall stays valid.
    """
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.cosine_steps - recipe.warmup_steps)
    rate = recipe.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
    left = (recipe.steps - step) / max(1, recipe.cooldown_steps)
    return rate * min(left, 1.0)


def step_rows(recipe: Recipe, rows: Tensor, step: int) -> Tensor:
    """Return the rows of one step, int64 [n, T], from the training rows [total, 512].

    Each pass over the text has its own order, found from the seed and the step alone, so that a
    resumed run needs no data-loader state. Steps before the cooldown cut each row in two:
    attention over short rows is cheaper, and the rest is enough to learn the long positions.
    """
    steps_per_pass = len(rows) // recipe.rows_per_step
    this_pass, place = divmod(step, steps_per_pass)
    generator = torch.Generator().manual_seed(recipe.seed + this_pass)
    order = torch.randperm(len(rows), generator=generator)
    chosen = rows[order[place * recipe.rows_per_step :][: recipe.rows_per_step]].long()
    return chosen.view(-1, SHORT_ROW) if step < cooldown_start(recipe) else chosen


def token_losses(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Return the losses in nats, float32 [n * (T - 1)], of predicting each next token of [n, T]."""
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.float().flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none")


def rows_at_once(model: PreTrainedModel) -> int:
    """Return how many rows to run at once: few on a CPU, whose caches the logits of more exceed."""
    return 4 if model.device.type == "cpu" else 64


def train_step(model: PreTrainedModel, optimizer: torch.optim.AdamW, input_ids: Tensor, rate: float) -> float:
    """Take one optimizer step on `input_ids` [n, T]; return the mean loss in nats a token."""
    total = torch.zeros((), device=model.device)
    for part in input_ids.to(model.device).split(rows_at_once(model)):
        with torch.autocast(model.device.type, torch.bfloat16):
            loss = token_losses(model, part).mean() * (len(part) / len(input_ids))
        loss.backward()
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return total.item()


@torch.inference_mode()
def perplexity(model: PreTrainedModel, input_ids: Tensor) -> float:
    """Return exp(mean next-token loss) over the T - 1 predictions of each row of [n, T].

    A row sees nothing of the rows before it. The losses are added in float64.
    """
    parts = input_ids.to(model.device).split(rows_at_once(model))
    losses = [token_losses(model, part.long()).double() for part in parts]
    return torch.cat(losses).mean().exp().item()
