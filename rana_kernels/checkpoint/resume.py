"""A directory of finished work, so that an interrupted command can continue where it stopped.

A finished block is a safetensors file and a JSON file. Each file is written under another name and then
moved to its own. The JSON file comes last: if it exists, the block is complete.
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
    """Return a digest of everything that a compression depends on.

    It covers `facts` (plan, calibration), and of every weight its size, dtype and first row. Call this before
    any linear is replaced.
    """
    found = hashlib.sha256("\0".join(facts).encode())
    for name in (name for block in blocks for name in block.linears):
        weight = linear_of(model, name).weight.detach()
        found.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
        found.update(weight[0].float().cpu().numpy().tobytes())
    return found.hexdigest()


def digest(*tensors: Tensor) -> str:
    """Return a digest of the shapes, dtypes and values of these tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{list(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def differences(stored: dict[str, Any], asked: dict[str, Any]) -> str:
    """Describe how two sets of facts differ, with the values that are short. Return "" if they are equal."""
    found = []
    for name in stored | asked:
        values = stored.get(name), asked.get(name)
        if values[0] != values[1]:
            short = max(map(len, map(str, values))) < 32
            found.append(f"{name} {values[0]}, asked for {values[1]}" if short else f"another {name}")
    return "; ".join(found)


class ResumeDir:
    """The finished parts of one piece of work. Raises ValueError if the directory belongs to other work.

    facts   everything that the work depends on, by name: numbers, words, digests
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
        """Create the directory when the first result is stored, so a request that fails early leaves none."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not self._marker.exists():
            write_json(self._marker, self.facts)

    def load(self, index: int) -> tuple[dict[str, Tensor], dict] | None:
        """Return the tensors and the record of block `index`, or None if it is not finished."""
        record = self._record(index)
        if not record.exists():
            return None
        return load_file(record.with_suffix(".safetensors")), read_json(record)

    def load_json(self, name: str):
        """Return the data that `save_json` stored under this name, or None."""
        path = self.path / f"{name}.json"
        return read_json(path) if path.exists() else None

    def save_json(self, name: str, data: object) -> None:
        """Store data that can be written as JSON."""
        self._begin()
        write_json(self.path / f"{name}.json", data)

    def file(self, name: str) -> Path:
        """Return the path for a file that the caller writes. The caller must replace it whole."""
        self._begin()
        return self.path / name

    def save(self, index: int, tensors: dict[str, Tensor], record: dict) -> None:
        """Store the tensors and the record of block `index`, which is finished."""
        self._begin()
        path = self._record(index)
        on_cpu = {name: tensor.to("cpu", copy=False) for name, tensor in tensors.items()}
        write_whole(path.with_suffix(".safetensors"), lambda part: save_file(on_cpu, part))
        write_json(path, record)

    def _record(self, index: int) -> Path:
        return self.path / f"block_{index:04d}.json"
