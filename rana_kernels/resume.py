"""Finished blocks on disk, so that an interrupted compression can go on where it stopped.

A block is a safetensors file and a JSON file. Each is written beside its place and moved there, the
JSON last: where it is, the block is whole.
"""

import hashlib
import json
import os
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rana_kernels.layer import linear_of
from rana_kernels.models import Block


def fingerprint(model: nn.Module, blocks: list[Block], *facts: str) -> str:
    """Of what a compression depends on: `facts` (plan, calibration), and the sizes, dtypes and a few
    values of every weight. Read before anything is replaced."""
    digest = hashlib.sha256("\0".join(facts).encode())
    for name in (name for block in blocks for name in block.linears):
        weight = linear_of(model, name).weight.detach()
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
        digest.update(weight[0].float().cpu().numpy().tobytes())
    return digest.hexdigest()


class ResumeDir:
    """The finished blocks of one compression. ValueError if the directory holds another one's."""

    def __init__(self, path: str | os.PathLike, fingerprint: str) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        marker = self.path / "fingerprint.json"
        if not marker.exists():
            _write_json(marker, fingerprint)
        elif _read_json(marker) != fingerprint:
            raise ValueError(
                f"{self.path} holds blocks of another compression (another model, budget or calibration): "
                "give an empty directory, or delete this one"
            )

    def load(self, index: int) -> tuple[dict[str, Tensor], dict] | None:
        """Tensors and record of a finished block, or None."""
        record = self.path / f"block_{index:04d}.json"
        if not record.exists():
            return None
        return load_file(record.with_suffix(".safetensors")), _read_json(record)

    def save(self, index: int, tensors: dict[str, Tensor], record: dict) -> None:
        path = self.path / f"block_{index:04d}.json"
        part = path.with_suffix(".part")
        save_file({name: tensor.to("cpu", copy=False) for name, tensor in tensors.items()}, part)
        os.replace(part, path.with_suffix(".safetensors"))
        _write_json(path, record)


def _write_json(path: Path, data: object) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data))
    os.replace(part, path)


def _read_json(path: Path):
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): delete the directory and start again") from None
