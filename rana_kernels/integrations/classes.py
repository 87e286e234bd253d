"""The classes of transformers that one checkpoint can be read by: the one that wrote it, and its relatives.

A causal model, a classifier and the headless model of an architecture share all layers. What differs is the
head, and whether the names of the shared tensors begin with `base_model_prefix`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor

from rana_kernels.checkpoint.headers import CheckpointError, read_header, strict_json
from rana_kernels.model.head import is_tied, output_head


def class_of(directory: Path) -> Any:
    """Return the class that config.json names, or AutoModelForCausalLM if it names none.

    Raises CheckpointError if this version of transformers has no model of that name.
    """
    path = directory / "config.json"
    named = strict_json(path.read_bytes(), str(path)).get("architectures")
    if not named:
        return transformers.AutoModelForCausalLM
    found = find_class(str(named[0])) if isinstance(named, list) else None
    if found is None:
        raise CheckpointError(
            f"{path}: architectures is {str(named)[:200]}, and transformers {transformers.__version__} has "
            "no such model: install the version that wrote the checkpoint"
        )
    return found


def find_class(name: str) -> type | None:
    """Return the class of models that transformers has under this name, or None."""
    found = getattr(transformers, name, None)
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def is_foreign(model: transformers.PreTrainedModel) -> bool:
    """Say whether the config that `model` was made of names another class."""
    named = model.config.architectures
    return named is not None and type(model).__name__ not in named


@dataclass(frozen=True)
class Stored:
    """What the files of a checkpoint have to hold for a model.

    tensors    of the model, by the names that they have in the files
    optional   names that may be absent
    ignored    names in the files of which the model has nothing: the head of another class
    """

    tensors: dict[str, Tensor]
    optional: set[str]
    ignored: set[str]


def stored_tensors(model: transformers.PreTrainedModel, files: list[Path]) -> Stored:
    """Return what `files` have to hold for `model`: everything, or without its head for another class.

    An lm_head has to be there in any case, unless it is tied to the embedding. transformers makes any other
    head anew, and says so.
    """
    names = {name for file in files for name in read_header(file)}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    own: dict[str, Tensor] = model.state_dict()
    if not is_foreign(model):
        return Stored(own if names <= own.keys() else _older_form(model, own), tied, set())
    prefix = f"{model.base_model_prefix}."
    headless, written_with_head = model.base_model is model, any(n.startswith(prefix) for n in names)

    def in_files(name: str) -> str:
        if headless:
            return prefix + name if written_with_head else name
        return name if written_with_head else name.removeprefix(prefix)

    if not names >= {in_files(name) for name in own}:
        own = _older_form(model, own)
    tensors = {in_files(name): tensor for name, tensor in own.items()}
    needs_head = output_head(model) is not None and not is_tied(model)
    new = {name for name in own if not (headless or name.startswith(prefix) or needs_head)}
    foreign = {name for name in names - tensors.keys() if written_with_head and not name.startswith(prefix)}
    return Stored(tensors, {in_files(name) for name in new | tied}, foreign)


def _older_form(model: transformers.PreTrainedModel, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict as transformers still writes mixtures of experts: one tensor for each expert."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return own
    return revert_weight_conversion(model, own)
