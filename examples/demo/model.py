"""The model folder, as `examples.train_demo_model` writes it.

config.json, model.safetensors and the tokenizer's files, as transformers reads them, and
calibration.safetensors and evaluation.safetensors, each with `input_ids` [n, T] int32.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

# the dtype of the stored weights, which a user would run too
DTYPE = torch.bfloat16


@dataclass
class DemoModel:
    dense: nn.Module
    tokenizer: PreTrainedTokenizerBase
    calibration: Tensor
    evaluation: Tensor


def load_demo_model(folder: Path) -> DemoModel:
    """Load the folder. Raise FileNotFoundError, which says how to make the model, if there is none."""
    if not (folder / "model.safetensors").exists():
        raise FileNotFoundError(
            f"{folder} holds no model.safetensors: `python -m examples.train_demo_model train` writes one"
        )
    return DemoModel(
        dense=AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE).eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        calibration=load_file(folder / "calibration.safetensors")["input_ids"],
        evaluation=load_file(folder / "evaluation.safetensors")["input_ids"],
    )
