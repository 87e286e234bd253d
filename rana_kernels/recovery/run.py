"""The recovery of a compressed model: PEFT trains LoRA, which is then merged into the adapters.

LoRA is added to both factors of every adapter (`nn/factored.py`), as the authors of RaNA do, and to the dense
linears. Merging therefore changes no size, no cost and no format. PEFT's `rank_pattern` sets the rank of each
linear, and rsLoRA (arXiv 2312.03732) scales each update by the root of its rank.
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
from rana_kernels.model.admission import admit, require_in_memory
from rana_kernels.model.head import head_names
from rana_kernels.nn.factored import from_linears, to_linears
from rana_kernels.nn.floats import to_floats
from rana_kernels.recovery import lora_ranks
from rana_kernels.recovery.refit import refit
from rana_kernels.recovery.rounding import install_rounded, rounding_of, tokens_for_rounding
from rana_kernels.recovery.training import Training, train

ALPHA = 16  # rsLoRA multiplies by ALPHA / √rank
REFIT_TOKENS = 4096


@dataclass(frozen=True)
class Lora:
    """The settings of LoRA.

    rank           the rank of every linear, or the average rank if a `search` chooses the ranks
    search_steps   the training steps of each measurement of that search
    """

    rank: int = 16
    search_steps: int = 20

    def __post_init__(self) -> None:
        if self.rank < 1 or self.search_steps < 1:
            raise ValueError(
                f"Lora: rank is {self.rank}, search_steps {self.search_steps}, wanted at least 1"
            )


@torch.inference_mode(False)
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
    """Train a compressed model of `rana.load` on `token_ids` [n, T], in place.

    dense        the original model, to distil from
    search       chooses the ranks of the inputs by measuring. Its `baseline_loss` is the loss before recovery
    resume_dir   keeps the state of search and training, so that the same call continues after an interruption

    Thresholds are refitted at the end, so that every adapter keeps its planned live rows. Quantised weights
    are trained as floats and rounded at the end (`recovery/rounding.py`). lm_head stays as it is.
    Raises ValueError as `train` does.
    """
    model = admit(model, changes=True)
    require_in_memory(model)
    store = (
        ResumeDir(resume_dir, _facts(model, token_ids, training, lora, dense, search)) if resume_dir else None
    )
    rounding, count = rounding_of(model), REFIT_TOKENS
    if rounding is not None:
        count = max(count, tokens_for_rounding(rounding.plan))
        to_floats(model, rounding.names, rounding.dtype)
    to_linears(model, skip=head_names(model))
    pattern = _ranks(model, token_ids, training, lora, dense, search, store, progress)
    tuned = _with_lora(model, pattern, training.seed)
    state = store.file("training.safetensors") if store else None
    train(tuned.get_base_model(), token_ids, training, dense=dense, state=state, progress=progress)
    tuned.merge_and_unload()
    refit(model, token_ids[: max(1, count // token_ids.shape[1])], rounding, progress)
    from_linears(model)
    if rounding is not None:
        install_rounded(model, rounding)


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
    """Return the LoRA rank of each linear: `lora.rank` for all, or the result of a search."""
    inputs, owner = lora_ranks.inputs_of(model)
    if search is None:
        return dict.fromkeys(owner, lora.rank)
    short = Training(
        lora.search_steps, training.batch, training.accumulate, training.learning_rate, training.seed
    )

    def measure(allocation: Tensor) -> float:
        tuned = _with_lora(model, lora_ranks.ranks(model, owner, allocation, lora.rank), training.seed)
        train(tuned.get_base_model(), token_ids, short, dense=dense, progress=False)
        loss = perplexity(tuned.get_base_model(), search.held_out, progress=False).nll
        tuned.unload()
        return loss

    search.baseline_loss = perplexity(model, search.held_out, progress=False).nll
    best = best_allocation("lora", inputs, measure, search, store, progress)
    return lora_ranks.ranks(model, owner, best, lora.rank)


def _with_lora(model: Any, pattern: dict[str, int], seed: int) -> Any:
    """Return the PEFT model with LoRA of the ranks in `pattern`, initialised from `seed`."""
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
    """Return everything that the result of a recovery depends on."""
    searched = {"held-out rows or seed": search.digest, "evaluations": search.evaluations} if search else {}
    return {
        **{name.replace("_", " "): value for name, value in (asdict(training) | asdict(lora)).items()},
        "text": digest(token_ids),
        "model": _weights(model),
        "dense model": None if dense is None else _weights(dense),
        **searched,
    }


def _weights(model: nn.Module) -> str:
    """Return a digest of the sizes and of a few values of every weight, quantised ones included."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        some = digest(tensor.flatten()[:256])
        found.update(f"{name} {list(tensor.shape)} {some}".encode())
    return found.hexdigest()
