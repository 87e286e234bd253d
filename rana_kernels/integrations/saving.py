"""`save_pretrained` of compressed models: the files replace older ones, and the manifest is renewed.

transformers writes into the directory file by file. A `model.safetensors` that it leaves beside new shards is
what it reads afterwards, and an error half-way loses the old weights. A compressed model is therefore written
beside its place and then moved. Other models are saved by transformers alone.
"""

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from rana_kernels.checkpoint.attachment import attached_plan
from rana_kernels.checkpoint.manifest import weights_variant, write_manifest
from rana_kernels.integrations import resizing  # noqa: F401  (what transformers resizes)
from rana_kernels.model.plan import Plan


def _replacing(write: Callable[..., Any]) -> Callable[..., Any]:
    """Return `save_pretrained`, which replaces older weights if `self` is a compressed model."""

    @wraps(write)
    def write_beside_then_move(self, save_directory: str | os.PathLike, *arguments: Any, **options: Any):
        plan, place = attached_plan(self), Path(save_directory)
        # of a distributed checkpoint, every process writes a part into the same directory
        if plan is None or place.is_file() or options.get("distributed_checkpoint"):
            return write(self, save_directory, *arguments, **options)
        place.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".saving.", dir=place) as beside:
            new = Path(beside, place.resolve().name)  # a repository on the hub gets the directory's name
            found = write(self, str(new), *arguments, **options)
            _move(new, place, self, plan)
        return found

    return write_beside_then_move


def _move(new: Path, place: Path, model: PreTrainedModel, plan: Plan) -> None:
    """Move all files of `new` to `place`. If weights are among them, delete older ones of their variant."""
    paths = [path for path in new.rglob("*") if path.is_file()]
    variants = {weights_variant(path.name) for path in paths} - {None}
    old = [path for path in place.iterdir() if weights_variant(path.name) in variants]
    for path in paths:
        target = place / path.relative_to(new)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    for path in old:
        if new / path.name not in paths:
            path.unlink()
    if variants:
        write_manifest(place, model, plan)


PreTrainedModel.save_pretrained = _replacing(PreTrainedModel.save_pretrained)  # type: ignore[method-assign]
