"""The format of a checkpoint on disk: a directory that transformers can read, and a manifest for its checks.

    config.json          the model's config as transformers writes it; its `quantization_config` is
                         {"quant_method": "rana", "format": 3, "plan": …, "made": …}. The modules can be
                         built from the plan alone; `made` has facts for the model card (`model_card.py`)
    README.md            the model card
    model.safetensors    every tensor under its name in the state dict (large models: shards and an index)
    generation_config.json, the tokenizer's files      if there are any
    rana.json            the manifest, written last: format, versions, savings of the compression, and the
                         size and SHA-256 of config.json and of the weights. Safetensors files have no
                         checksum of their own. The other files are their owner's to change: chat templates,
                         generation settings, the model card

Loading checks the manifest, then sizes, then hashes, then the safetensors headers against the plan
(`headers.py`). Only then does it read a tensor. No file can contain code.
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

from rana_kernels.checkpoint.attachment import CHECKPOINT_FORMAT, check_format
from rana_kernels.checkpoint.headers import CheckpointError, strict_json
from rana_kernels.model.plan import Plan
from rana_kernels.version import __version__

MANIFEST = "rana.json"
CARD = "README.md"
# What transformers calls the weights in a directory, with the variant that `save_pretrained` may put in
_WEIGHTS = re.compile(
    r"model(\.(?P<file>[^.]+?))?(-\d{5}-of-\d{5})?\.safetensors"
    r"|model\.safetensors\.index(\.(?P<index>[^.]+))?\.json"
)
_MEANT = (
    f"Copy the checkpoint again. If the change was meant: delete {MANIFEST}, read the directory with "
    "AutoModelForCausalLM.from_pretrained, and write it there with its save_pretrained"
)
_MAX_MANIFEST = 16_000_000  # bytes


def versions() -> dict[str, str]:
    """Return the versions of this package and of those that write a checkpoint with it."""
    others = ("torch", "transformers", "safetensors")
    return {"rana_kernels": __version__, **{name: metadata.version(name) for name in others}}


@dataclass(frozen=True)
class File:
    """The size in bytes and the SHA-256, in hexadecimal, of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contents of rana.json, checked.

    directory   the checkpoint
    files       {path within `directory`, with forward slashes: File}
    facts       everything else: versions, base model, compression, stored bytes
    """

    directory: Path
    files: dict[str, File]
    facts: dict[str, Any]

    def verify(self, names: Iterable[str]) -> None:
        """Raise CheckpointError unless the SHA-256 of each of these files is the one in the manifest."""
        for name in names:
            if name not in self.files:
                raise CheckpointError(f"{self.directory}: {MANIFEST} does not list {name!r}")
            found = _sha256(self.directory / name)
            if found != self.files[name].sha256:
                raise CheckpointError(
                    f"{self.directory / name} is damaged, or was changed since rana.save: its SHA-256 is "
                    f"{found[:12]}…, wanted {self.files[name].sha256[:12]}… by {MANIFEST}. {_MEANT}"
                )


def weights_variant(name: str) -> str | None:
    """Return the variant of a file of weights, "" for the usual one. None: `name` is no file of weights."""
    found = _WEIGHTS.fullmatch(name)
    return None if found is None else found["file"] or found["index"] or ""


def _is_vouched_for(name: str) -> bool:
    """Say whether the manifest lists a file: what decides the computation, and no other file."""
    return name == "config.json" or weights_variant(name) is not None


def write_manifest(directory: Path, model: nn.Module, plan: Plan) -> None:
    """Write rana.json for the config and the weights in `directory`, and force them to the disk."""
    paths = [path for path in sorted(directory.iterdir()) if _is_vouched_for(path.name)]
    files = {path.name: _describe(path) for path in paths}
    config: Any = model.config
    data = {
        "format": CHECKPOINT_FORMAT,
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
            "bytes_reduction": plan.bytes_reduction,
            "block_flops_reduction": plan.reduction,
            "bits": list(plan.bits),
            "lm_head_bits": plan.lm_head_bits,
        },
        "stored_bytes": sum(file.bytes for file in files.values()),
        "files": {name: vars(file) for name, file in files.items()},
    }
    manifest = directory / MANIFEST
    manifest.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    _force_to_disk(manifest)


def read_manifest(directory: str | os.PathLike) -> Manifest:
    """Read rana.json and check that every listed file exists and has its size. `verify` checks the hashes.

    Entries for files that belong to their owner, which older versions wrote, are left out.
    Raises CheckpointError, whose message says what was found, what is wanted and what to do.
    """
    place = Path(directory)
    if not place.is_dir():
        raise CheckpointError(f"{place}: there is no such directory")
    path = place / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{place} has no {MANIFEST}: it is not a checkpoint of rana.save, or was not copied whole. "
            "AutoModelForCausalLM.from_pretrained loads what save_pretrained wrote, without these checks"
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
    manifest = Manifest(place, {name: file for name, file in files.items() if _is_vouched_for(name)}, facts)
    _check_sizes(manifest)
    return manifest


def _read_file(where: str, name: str, entry: object) -> File:
    pure = PurePosixPath(name)
    # a path must not leave the directory, neither on this system nor on another
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
                f"truncated, or was changed since rana.save. {_MEANT}"
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
    # without this, a rename could reach the disk before the contents of the file
    with path.open("rb") as file:
        os.fsync(file.fileno())
