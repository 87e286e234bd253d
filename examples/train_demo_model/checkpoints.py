"""The checkpoint of a training, which is replaced whole, and its log."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import typer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

MOMENTS = ("exp_avg", "exp_avg_sq")


def save_checkpoint(
    path: Path, model: PreTrainedModel, optimizer: torch.optim.AdamW, step: int, seconds: float, identity: str
) -> None:
    """Write weights, both AdamW moments, steps done and seconds spent. `identity`: see `train`."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    metadata = {"step": str(step), "seconds": str(seconds), "identity": identity}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata=metadata)
    os.replace(partial, path)


def load_checkpoint(
    path: Path, model: PreTrainedModel, optimizer: torch.optim.AdamW, identity: str
) -> tuple[int, float]:
    """Restore model and optimizer in place; return (steps done, seconds spent), or (0, 0.0)."""
    if not path.exists():
        return 0, 0.0
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    if metadata["identity"] != identity:
        raise typer.BadParameter(
            f"{path} is from other settings or other text; pass --fresh to discard it, "
            "or another --work-dir to keep both"
        )
    tensors = load_file(path, device=str(model.device))
    step = int(metadata["step"])
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[f"weight.{name}"])
        state = {moment: tensors[f"{moment}.{name}"] for moment in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(step), device=model.device), **state}
    return step, float(metadata["seconds"])


@dataclass
class LogLine:
    """One line of training_log.csv; `loss` is in nats a token, `seconds` counts training only."""

    step: int
    tokens: int
    loss: float
    learning_rate: float
    seconds: float
    eval_perplexity: float | None = None

    def cells(self) -> list[str]:
        """Return the line as text, the perplexity empty where it was not measured."""
        perplexity = "" if self.eval_perplexity is None else f"{self.eval_perplexity:.4f}"
        numbers = [f"{self.loss:.4f}", f"{self.learning_rate:.3e}", f"{self.seconds:.1f}"]
        return [str(self.step), str(self.tokens), *numbers, perplexity]


def restart_log(path: Path, step: int) -> None:
    """Write the header, and keep of an earlier log only the lines up to `step`."""
    kept = []
    if path.exists():
        with path.open(newline="") as file:
            kept = [line for line in list(csv.reader(file))[1:] if int(line[0]) <= step]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([[field.name for field in fields(LogLine)], *kept])


def append_log(path: Path, line: LogLine) -> None:
    """Add one line to the log."""
    with path.open("a", newline="") as file:
        csv.writer(file).writerow(line.cells())
