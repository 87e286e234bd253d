"""The training of a recovery: a short training of a compressed model, with the masks in the forward pass.

It trains all parameters that require gradients (`recovery/run.py` adds LoRA). It uses AdamW, a linear
warm-up, a cosine decay and no dropout. Batches depend only on seed and step, so an interrupted training
continues with the same batches.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rana_kernels.checkpoint.resume import differences, digest
from rana_kernels.model.logits import Logits
from rana_kernels.model.positions import require_rows
from rana_kernels.system.files import write_whole
from rana_kernels.system.progress import meter

SAVED_EVERY = 25  # steps
WARMUP = 0.05  # of the steps
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Training:
    """The settings of a training. A step has `batch` · `accumulate` sequences, read `batch` at a time."""

    steps: int = 300
    batch: int = 4
    accumulate: int = 1
    learning_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"Training: {name} is {value}, wanted at least 1")
        if not self.learning_rate > 0:
            raise ValueError(f"Training: learning_rate is {self.learning_rate}, wanted more than 0")


def train(
    model: nn.Module,
    token_ids: Tensor,
    training: Training,
    *,
    dense: nn.Module | None = None,
    state: Path | None = None,
    progress: bool = True,
) -> list[float]:
    """Train on `token_ids` [n, T], in place, and return the loss of each step of this call.

    dense   the original model. With it the loss is the Kullback-Leibler divergence from its next-token
            distributions (Hinton et al., 2015, at temperature 1), else the cross-entropy; nats a token
    state   the file that keeps the state of the training. If it exists, the training continues from it

    Raises ValueError for too few or too long sequences, a loss that is not finite, or the state of another
    training.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if len(token_ids) < training.batch:
        raise ValueError(
            f"train: the text has {len(token_ids)} rows, wanted at least a batch of {training.batch}"
        )
    require_rows(model, token_ids.shape[1], "train: the text")
    optimizer = torch.optim.AdamW(trained.values(), lr=training.learning_rate, weight_decay=0.0)
    facts = _facts(trained, token_ids, training, dense)
    done = _restore(state, facts, trained, optimizer)
    losses: list[float] = []
    model.eval()
    with meter("training", training.steps, progress, done) as advance:
        for step in range(done, training.steps):
            losses.append(_step(model, optimizer, token_ids, training, step, dense))
            advance(f"training, loss {losses[-1]:.4f}")
            if state and ((step + 1) % SAVED_EVERY == 0 or step + 1 == training.steps):
                _save(state, facts, trained, optimizer, step + 1)
    return losses


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    token_ids: Tensor,
    training: Training,
    step: int,
    dense: nn.Module | None,
) -> float:
    """Run one step of the optimizer, and return its mean loss."""
    device, total = next(model.parameters()).device, 0.0
    for part in range(training.accumulate):
        ids = _batch(token_ids, training, step * training.accumulate + part).to(device)
        total += _differentiate(model, ids, dense, 1 / training.accumulate)
    if not math.isfinite(total):
        raise ValueError(
            f"train: the loss of step {step + 1} is {total}, wanted a finite number: lower the learning rate"
        )
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(training, step)
    optimizer.step()
    optimizer.zero_grad()
    return total


def learning_rate(training: Training, step: int) -> float:
    """Return the learning rate at `step` (from 0): a linear warm-up, then a cosine down to 0."""
    warmup = max(1, round(WARMUP * training.steps))
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, training.steps - warmup)
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def _batch(token_ids: Tensor, training: Training, number: int) -> Tensor:
    """Return batch `number` [batch, T]. Every pass over the token ids has its own order."""
    turn, place = divmod(number, len(token_ids) // training.batch)
    order = torch.randperm(len(token_ids), generator=torch.Generator().manual_seed(training.seed + turn))
    return token_ids[order[place * training.batch :][: training.batch]]


def _differentiate(model: nn.Module, ids: Tensor, dense: nn.Module | None, weight: float) -> float:
    """Differentiate and return `weight` times the divergence from the dense model, or the cross-entropy."""
    weight /= ids[:, 1:].numel()
    wanted = None
    if dense is not None:
        with torch.no_grad():
            wanted = Logits(dense, ids)

    def loss(row: int, part: slice, logits: Tensor) -> Tensor:
        follows = ids[row, 1:][part]  # the last token of a sequence predicts nothing
        said = logits[: len(follows)].float()
        if wanted is None:
            return weight * F.cross_entropy(said, follows, reduction="sum")
        with torch.no_grad():
            aim = wanted.of(row, part)[: len(follows)].float().log_softmax(-1)
        return weight * F.kl_div(said.log_softmax(-1), aim, reduction="sum", log_target=True)

    return Logits(model, ids).backward(loss)


# the state of an unfinished training: weights and moments in one file, which is replaced as a whole


def _facts(
    trained: dict[str, nn.Parameter], token_ids: Tensor, training: Training, dense: nn.Module | None
) -> dict[str, Any]:
    """Return the facts that a training and its saved state must share."""
    facts = {name.replace("_", " "): value for name, value in asdict(training).items()}
    sizes = {name: list(p.shape) for name, p in trained.items()}
    return {**facts, "text": digest(token_ids), "distilled": dense is not None, "choice of weights": sizes}


def _save(
    path: Path,
    facts: dict[str, Any],
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    step: int,
) -> None:
    tensors = {name: p.detach() for name, p in trained.items()}
    for name, p in trained.items():
        tensors |= {f"{moment}:{name}": optimizer.state[p][moment] for moment in MOMENTS}
    about = {"step": str(step), "facts": json.dumps(facts)}
    whole = {name: t.contiguous() for name, t in tensors.items()}
    write_whole(path, lambda part: save_file(whole, part, metadata=about))


def _restore(
    path: Path | None,
    facts: dict[str, Any],
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> int:
    """Load the weights and moments of the state, and return the number of steps done (0 without a state)."""
    if path is None or not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    step = int(about["step"])
    if other := differences(json.loads(about["facts"]), facts):
        raise ValueError(
            f"{path} is of an unfinished training of another kind ({other}): ask for the same, or delete it"
        )
    tensors = load_file(path)
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(tensors[name])
            moments = {moment: tensors[f"{moment}:{name}"].to(p.device) for moment in MOMENTS}
            optimizer.state[p] = {"step": torch.tensor(float(step)), **moments}
    return step
