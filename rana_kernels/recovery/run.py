"""Recovery of a compressed model by LoRA of PEFT, merged into its adapters.

LoRA is added to both factors of every adapter (`factored.py`), as the authors of RaNA do, and to what was
left dense: merging then adds nothing, and sizes, cost and format stay. Ranks are given by PEFT's
`rank_pattern`; rsLoRA (arXiv 2312.03732) scales each linear's by the root of its own.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from rana_kernels.allocation.search import Search, best_allocation
from rana_kernels.checkpoint.resume import ResumeDir, digest
from rana_kernels.evaluation.metrics import perplexity
from rana_kernels.nn.factored import from_linears, to_linears
from rana_kernels.recovery import lora_ranks
from rana_kernels.recovery.refit import refit
from rana_kernels.recovery.training import Training, train

ALPHA = 16  # rsLoRA multiplies by ALPHA / √rank
REFIT_TOKENS = 4096


@dataclass(frozen=True)
class Lora:
    """rank of every linear, or on average where `search` shares them out, which trains for `search_steps`."""

    rank: int = 16
    search_steps: int = 20

    def __post_init__(self) -> None:
        if self.rank < 1 or self.search_steps < 1:
            raise ValueError(
                f"Lora: rank is {self.rank}, search_steps {self.search_steps}, wanted at least 1"
            )


def recover(
    model: nn.Module,
    token_ids: Tensor,
    training: Training = Training(),  # noqa: B008 - frozen
    lora: Lora = Lora(),  # noqa: B008 - frozen
    *,
    dense: nn.Module | None = None,
    search: Search | None = None,
    resume_dir: Path | None = None,
    progress: bool = True,
) -> None:
    """Train a compressed model of `rana.load` on `rows` of tokens [n, T], in place.

    dense        the model that it was compressed from, to distil from
    search       share the ranks out between the inputs by measuring. Its `baseline_loss` is the loss before
    resume_dir   where the search and the training go on from after an interruption

    Thresholds are refitted at the end, so that every adapter keeps its planned live token_ids. Raises ValueError
    as `train` does.
    """
    store = (
        ResumeDir(resume_dir, _facts(model, token_ids, training, lora, dense, search)) if resume_dir else None
    )
    to_linears(model)
    pattern = _ranks(model, token_ids, training, lora, dense, search, store, progress)
    tuned = _with_lora(model, pattern, training.seed)
    state = store.file("training.safetensors") if store else None
    train(tuned, token_ids, training, dense=dense, state=state, progress=progress)
    tuned.merge_and_unload()
    refit(model, token_ids[: max(1, REFIT_TOKENS // token_ids.shape[1])])
    from_linears(model)


def _ranks(
    model: nn.Module,
    token_ids: Tensor,
    training: Training,
    lora: Lora,
    dense: nn.Module | None,
    search: Search | None,
    store: ResumeDir | None,
    progress: bool,
) -> dict[str, int]:
    inputs, owner = lora_ranks.inputs_of(model)
    if search is None:
        return dict.fromkeys(owner, lora.rank)
    short = Training(
        lora.search_steps, training.batch, training.accumulate, training.learning_rate, training.seed
    )

    def measure(allocation: Tensor) -> float:
        tuned = _with_lora(model, lora_ranks.ranks(model, owner, allocation, lora.rank), training.seed)
        train(tuned, token_ids, short, dense=dense, progress=False)
        loss = perplexity(tuned, search.held_out, progress=False).nll
        tuned.unload()
        return loss

    search.baseline_loss = perplexity(model, search.held_out, progress=False).nll
    best = best_allocation("lora", inputs, measure, search, store, progress)
    return lora_ranks.ranks(model, owner, best, lora.rank)


def _with_lora(model: Any, pattern: dict[str, int], seed: int) -> Any:
    torch.manual_seed(seed)
    config = LoraConfig(
        r=max(pattern.values()),
        rank_pattern=pattern,
        lora_alpha=ALPHA,
        use_rslora=True,
        target_modules=list(pattern),
    )
    return get_peft_model(model, config)


def _facts(
    model: nn.Module,
    token_ids: Tensor,
    training: Training,
    lora: Lora,
    dense: nn.Module | None,
    search: Search | None,
) -> dict[str, Any]:
    """All that a recovery depends on."""
    searched = {"held-out rows or seed": search.digest, "evaluations": search.evaluations} if search else {}
    return {
        **{name.replace("_", " "): value for name, value in (asdict(training) | asdict(lora)).items()},
        "text": digest(token_ids),
        "model": _weights(model),
        "dense model": None if dense is None else _weights(dense),
        **searched,
    }


def _weights(model: nn.Module) -> str:
    """The digest of the sizes and a few values of every weight."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        some = digest(parameter.flatten()[:256])
        found.update(f"{name} {list(parameter.shape)} {some}".encode())
    return found.hexdigest()
