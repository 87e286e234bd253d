"""Finished work on disk, so that what was interrupted can go on where it stopped.

A block is a safetensors file and a JSON file. Each is written beside its place and moved there, the
JSON last: where it is, the block is whole.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rana_kernels.model.architectures import Block
from rana_kernels.model.linears import linear_of
from rana_kernels.system.files import read_json, write_json, write_whole


def fingerprint(model: nn.Module, blocks: list[Block], *facts: str) -> str:
    """Of what a compression depends on: `facts` (plan, calibration), and the sizes, dtypes and a few
    values of every weight. Read before anything is replaced."""
    digest = hashlib.sha256("\0".join(facts).encode())
    for name in (name for block in blocks for name in block.linears):
        weight = linear_of(model, name).weight.detach()
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
        digest.update(weight[0].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def digest(*tensors: Tensor) -> str:
    """Of their shapes, dtypes and values."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{list(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def differences(kept: dict[str, Any], asked: dict[str, Any]) -> str:
    """What two sets of facts differ in, for a message: short ones with their values. "" if nothing."""
    found = []
    for name in kept | asked:
        values = kept.get(name), asked.get(name)
        if values[0] != values[1]:
            short = max(map(len, map(str, values))) < 32
            found.append(f"{name} {values[0]}, asked for {values[1]}" if short else f"another {name}")
    return "; ".join(found)


class ResumeDir:
    """What is finished of one piece of work. ValueError if the directory holds another one's.

    facts   all that the work depends on, by name: numbers, words, digests
    """

    def __init__(self, path: str | os.PathLike, facts: dict[str, Any]) -> None:
        self.path, self.facts = Path(path), facts
        if self._marker.exists() and (other := differences(read_json(self._marker), facts)):
            raise ValueError(
                f"{self.path} holds unfinished work on something else ({other}): give an empty directory, "
                "or delete this one"
            )

    @property
    def _marker(self) -> Path:
        return self.path / "facts.json"

    def _begin(self) -> None:
        """Before anything is kept: a request that fails at once leaves nothing behind."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not self._marker.exists():
            write_json(self._marker, self.facts)

    def load(self, index: int) -> tuple[dict[str, Tensor], dict] | None:
        """Tensors and record of a finished block, or None."""
        record = self.path / f"block_{index:04d}.json"
        if not record.exists():
            return None
        return load_file(record.with_suffix(".safetensors")), read_json(record)

    def load_json(self, name: str):
        """What `save_json` wrote under that name, or None."""
        path = self.path / f"{name}.json"
        return read_json(path) if path.exists() else None

    def save_json(self, name: str, data: object) -> None:
        self._begin()
        write_json(self.path / f"{name}.json", data)

    def file(self, name: str) -> Path:
        """A place for a file that its writer replaces whole."""
        self._begin()
        return self.path / name

    def save(self, index: int, tensors: dict[str, Tensor], record: dict) -> None:
        self._begin()
        path = self.path / f"block_{index:04d}.json"
        here = {name: tensor.to("cpu", copy=False) for name, tensor in tensors.items()}
        write_whole(path.with_suffix(".safetensors"), lambda part: save_file(here, part))
        write_json(path, record)
