"""Save and load the compressed model, and let each model continue the same prompt."""

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

import rana_kernels as rana
from examples.demo.results import Text

# without a newline at its end, because the tokenizer joins a newline with the indentation after it
PROMPT = "import os\nimport sys\n\ndef read_lines(path):"
NEW_TOKENS = 64


def reload(model: nn.Module, folder: Path, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """Save a compressed model to `folder` and load it from there.

    Raise RuntimeError if the loaded model writes other tokens than the saved one.
    """
    rana.save(model, folder, tokenizer)
    loaded = rana.load(folder)
    if continuation(loaded, tokenizer) != continuation(model, tokenizer):
        raise RuntimeError(f"the model read back from {folder} writes other tokens than the one saved there")
    return loaded


def write_texts(models: dict[str, nn.Module], tokenizer: PreTrainedTokenizerBase) -> list[Text]:
    """Continue `PROMPT` with each of `models`, by label; the first is the dense one."""
    written = {label: continuation(model, tokenizer) for label, model in models.items()}
    dense = next(iter(written.values()))
    return [
        Text(label, tokenizer.decode(tokens, skip_special_tokens=True), len(tokens), _common(dense, tokens))
        for label, tokens in written.items()
    ]


@torch.inference_mode()
def continuation(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens after `PROMPT`, each the likeliest."""
    prompt = tokenizer(PROMPT, return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    return written[0, prompt["input_ids"].shape[1] :].tolist()


def _common(a: list[int], b: list[int]) -> int:
    """Return the length of the longest common beginning."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
