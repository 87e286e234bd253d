"""What is on disk: a directory that transformers reads as it is, and a manifest that vouches for it.

    config.json          the model's config as transformers writes it; its `quantization_config` is
                         {"quant_method": "rana", "format": 2, "plan": …, "made": …}: the plan is all that
                         is needed to build the modules, `made` says from what (`model_card.py`)
    README.md            the model card
    model.safetensors    every tensor under its name in the state dict (large models: shards, an index)
    generation_config.json, the tokenizer's files      where there are any
    rana.json            written last: format, versions, what the compression saves, and the size and
                         SHA-256 of every other file but the card, which people edit where they share a
                         model. Safetensors alone has no checksum

Reading goes from the cheap to the dear: the manifest, sizes, hashes, then the safetensors headers against
the plan (`headers.py`). Only then is a tensor touched. Nothing on disk can hold code.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from torch import nn

from rana_kernels.checkpoint.attachment import FORMAT, check_format
from rana_kernels.checkpoint.headers import CheckpointError, strict_json
from rana_kernels.model.plan import Plan
from rana_kernels.version import __version__

MANIFEST = "rana.json"
CARD = "README.md"
_MAX_MANIFEST = 16_000_000  # bytes


def versions() -> dict[str, str]:
    others = ("torch", "transformers", "safetensors")
    return {"rana_kernels": __version__, **{name: metadata.version(name) for name in others}}


@dataclass(frozen=True)
class File:
    """Size in bytes and SHA-256, in hexadecimal, of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """rana.json, read and checked. `files` is keyed by path within `directory`, with forward slashes.

    facts   everything else it says: versions, base model, compression, stored bytes
    """

    directory: Path
    files: dict[str, File]
    facts: dict[str, Any]

    def verify(self, names: Iterable[str]) -> None:
        """Raise CheckpointError unless these files have the contents that they were written with."""
        for name in names:
            if name not in self.files:
                raise CheckpointError(f"{self.directory}: {MANIFEST} does not list {name!r}")
            found = _sha256(self.directory / name)
            if found != self.files[name].sha256:
                raise CheckpointError(
                    f"{self.directory / name} is damaged: its SHA-256 is {found[:12]}…, wanted "
                    f"{self.files[name].sha256[:12]}… by {MANIFEST}. Copy the checkpoint again"
                )


def write_manifest(directory: Path, model: nn.Module, plan: Plan, paths: Iterable[Path]) -> None:
    """Describe those of `paths`, within `directory`, that are files, and force them to the disk."""
    names = {path.relative_to(directory).as_posix(): path for path in sorted(paths) if path.is_file()}
    files = {name: _describe(path) for name, path in names.items() if name not in (CARD, MANIFEST)}
    config: Any = model.config
    data = {
        "format": FORMAT,
        "versions": versions(),
        "base": {
            "architecture": type(model).__name__,
            "model_type": config.model_type,
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        },
        "compression": {
            "method": plan.method,
            "flops_reduction": plan.flops_reduction,
            "block_flops_reduction": plan.reduction,
        },
        "stored_bytes": sum(file.bytes for file in files.values()),
        "files": {name: vars(file) for name, file in files.items()},
    }
    manifest = directory / MANIFEST
    manifest.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    _force_to_disk(manifest)


def read_manifest(directory: str | os.PathLike) -> Manifest:
    """Read rana.json and check that every file it lists is there and has its size; hashes are `verify`'s.

    Raises CheckpointError, which says what was found, what is wanted and what to do.
    """
    place = Path(directory)
    if not place.is_dir():
        raise CheckpointError(f"{place}: there is no such directory")
    path = place / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{place} has no {MANIFEST}: it is not a checkpoint of rana.save, or was not copied whole. What "
            "model.save_pretrained wrote, AutoModelForCausalLM.from_pretrained reads, without these checks"
        )
    if path.stat().st_size > _MAX_MANIFEST:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, wanted at most {_MAX_MANIFEST}")
    facts = strict_json(path.read_bytes(), str(path))
    if not isinstance(facts, dict):
        raise CheckpointError(f"{path} holds a {type(facts).__name__}, wanted an object")
    check_format(facts.pop("format", None), str(path))
    listed = facts.pop("files", None)
    if not isinstance(listed, dict) or "config.json" not in listed:
        raise CheckpointError(
            f"{path}: files is {str(listed)[:200]}, wanted an object that lists config.json"
        )
    files = {name: _read_file(str(path), name, entry) for name, entry in listed.items()}
    manifest = Manifest(place, files, facts)
    _check_sizes(manifest)
    return manifest


def _read_file(where: str, name: str, entry: object) -> File:
    pure = PurePosixPath(name)
    # what escapes the directory here, or on another system, is no file of ours
    if pure.is_absolute() or pure.as_posix() != name or ".." in pure.parts or re.search(r"[\\:\0]", name):
        raise CheckpointError(f"{where}: {name[:200]!r} is not a path within the directory")
    size, digest = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
    if type(size) is not int or not re.fullmatch("[0-9a-f]{64}", str(digest)):
        raise CheckpointError(f"{where}: {name!r} has {str(entry)[:200]}, wanted its bytes and sha256")
    return File(size, str(digest))


def _check_sizes(manifest: Manifest) -> None:
    for name, file in manifest.files.items():
        path = manifest.directory / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: {MANIFEST} lists it. Copy the checkpoint again")
        if path.stat().st_size != file.bytes:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes, wanted {file.bytes} by {MANIFEST}: it is "
                "truncated or changed. Copy the checkpoint again"
            )


def _describe(path: Path) -> File:
    _force_to_disk(path)
    return File(path.stat().st_size, _sha256(path))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _force_to_disk(path: Path) -> None:
    # a rename can reach the disk before what was written under the old name
    with path.open("rb") as file:
        os.fsync(file.fileno())
