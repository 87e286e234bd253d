"""The text: which files are read, the split of each, the tokenizer, and rows of tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 4096
ROW = 512  # tokens

# Installed packages differ between machines. The other files are tables written by programs, on which a low
# perplexity would say nothing about the model.
SKIPPED_FOLDERS = {"site-packages", "encodings", "pydoc_data", "encoded_modules", "__pycache__"}
SKIPPED_PREFIXES = ("lib2to3/tests/data/", "config-", "_sysconfigdata")
LARGEST_FILE = 200_000  # bytes; one larger file would be most of a held-out split
HELD_OUT_SHARE = 0.03  # of the files, for each of evaluation and calibration


def library_files(root: Path) -> Iterator[str]:
    """Yield the paths, relative to `root` and sorted, of the source files worth reading."""
    for path in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        skipped = SKIPPED_FOLDERS.intersection(path.split("/")) or path.startswith(SKIPPED_PREFIXES)
        if not skipped and (root / path).stat().st_size <= LARGEST_FILE:
            yield path


def read_library(root: Path) -> dict[str, str]:
    """Return {relative path: text} for every file under `root` that is valid UTF-8."""
    texts = {}
    for path in library_files(root):
        try:
            texts[path] = (root / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    return texts


def path_hash(path: str) -> float:
    """Map a relative path to [0, 1): the first 8 bytes of its SHA-256, over 2**64."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64


def split_of(path: str) -> str:
    """Name the split of a file. It depends on the path alone, so an edit moves nothing."""
    position = path_hash(path)
    if position < HELD_OUT_SHARE:
        return "evaluation"
    if position < 2 * HELD_OUT_SHARE:
        return "calibration"
    return "training"


def split_library(texts: dict[str, str]) -> dict[str, list[str]]:
    """Deal the texts to the three splits, in order of path hash: any prefix is a fair sample."""
    splits: dict[str, list[str]] = {"training": [], "calibration": [], "evaluation": []}
    for path in sorted(texts, key=path_hash):
        splits[split_of(path)].append(texts[path])
    return splits


def corpus_digest(texts: dict[str, str]) -> str:
    """Return the SHA-256 (hex) of all paths and texts: equal digests mean equal training text."""
    digest = hashlib.sha256()
    for path, text in texts.items():
        digest.update(f"{path}\0{text}\0".encode())
    return digest.hexdigest()


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer with V = 4096; byte level, so no text is unknown to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def pack(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """Join the texts, an end-of-text token after each, and cut them to int32 rows [n, 512]."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    stream: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        stream += [*encoding.ids, end]
    rows = len(stream) // ROW
    return torch.tensor(stream[: rows * ROW], dtype=torch.int32).view(rows, ROW)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, for AutoTokenizer."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=ROW,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    # transformers 5 writes its own name for the class, which transformers 4 cannot load.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")
