"""What is on disk: a directory that transformers reads as it is, and a manifest that vouches for it.

    config.json          the model's config as transformers writes it; its `quantization_config` is
                         {"quant_method": "rana", "format": 1, "plan": …, "made": …}: the plan is all that
                         is needed to build the modules, `made` says from what (`card.py`)
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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from rana_kernels.headers import CheckpointError, strict_json
from rana_kernels.plan import Plan
from rana_kernels.version import __version__

MANIFEST = "rana.json"
CARD = "README.md"
FORMAT = 1
METHOD = "rana"  # what transformers calls a "quant_method"
_MAX_MANIFEST = 16_000_000  # bytes


# the plan of a model in memory


def attach_plan(model: nn.Module, plan: Plan, made: dict[str, Any] | None = None) -> None:
    """Note in `model.config` what `model` was compressed by, in the form that config.json has.

    made   facts for the model card. `model.save_pretrained` then writes a directory that can be loaded
    """
    config: Any = model.config
    config.quantization_config = {**plan_to_config(plan), "made": made or {}}


def attached_plan(model: nn.Module) -> Plan | None:
    """The plan that `model` was compressed by; None if it was not."""
    fields = _fields(model)
    return plan_from_config(fields) if fields.get("quant_method") == METHOD else None


def attached_facts(model: nn.Module) -> dict[str, Any]:
    """What the model card will say of how `model` was made; {} if nothing is known."""
    made = _fields(model).get("made")
    return made if isinstance(made, dict) else {}


def _fields(model: nn.Module) -> dict[str, Any]:
    found = getattr(getattr(model, "config", None), "quantization_config", None)
    return found if isinstance(found, dict) else found.to_dict() if found is not None else {}


def plan_to_config(plan: Plan) -> dict[str, Any]:
    return {"quant_method": METHOD, "format": FORMAT, "plan": json.loads(plan.to_json())}


def plan_from_config(fields: dict[str, Any]) -> Plan:
    """Raises CheckpointError for another format or a broken plan."""
    _check_format(fields.get("format"), "config.json: quantization_config")
    try:
        return Plan.from_json(json.dumps(fields.get("plan")))
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}") from None


def read_plan(directory: str | os.PathLike) -> Plan:
    """The plan in config.json. CheckpointError where there is none."""
    path = Path(directory) / "config.json"
    config = strict_json(path.read_bytes(), str(path))
    fields = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(fields, dict) or fields.get("quant_method") != METHOD:
        raise CheckpointError(
            f"{path} has no plan in quantization_config, wanted a compressed model's config"
        )
    return plan_from_config(fields)


# the manifest


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
    _check_format(facts.pop("format", None), str(path))
    listed = facts.pop("files", None)
    if not isinstance(listed, dict) or "config.json" not in listed:
        raise CheckpointError(
            f"{path}: files is {str(listed)[:200]}, wanted an object that lists config.json"
        )
    files = {name: _read_file(str(path), name, entry) for name, entry in listed.items()}
    manifest = Manifest(place, files, facts)
    _check_sizes(manifest)
    return manifest


def _check_format(found: object, where: str) -> None:
    if type(found) is not int or found != FORMAT:
        raise CheckpointError(
            f"{where}: format is {str(found)[:200]!r}, this version of rana_kernels ({__version__}) reads "
            f"{FORMAT}: install the version that wrote it, or compress the original model again"
        )


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


# writing: all of it or nothing


def check_target(directory: str | os.PathLike) -> None:
    """Raise FileExistsError if saving to `directory` would destroy anything but an older checkpoint."""
    place = Path(directory)
    if not place.exists() or (place / MANIFEST).is_file():
        return
    if not place.is_dir() or any(place.iterdir()):
        raise FileExistsError(
            f"{place} is there and no rana checkpoint (it has no {MANIFEST}): it is not overwritten. "
            "Choose another directory, or delete it first"
        )


@contextmanager
def replacing(directory: str | os.PathLike) -> Iterator[Path]:
    """A new directory to write into, which takes the place of `directory` if the block ends well.

    Until then an older checkpoint there stays as it is. Raises as `check_target` does.
    """
    place = Path(directory).resolve()
    check_target(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as beside:
        new, old = Path(beside, "new"), Path(beside, "old")
        new.mkdir()
        yield new
        try:
            if place.exists():
                place.rename(old)
            new.rename(place)
        except BaseException:
            if old.exists() and not place.exists():
                old.rename(place)
            raise
