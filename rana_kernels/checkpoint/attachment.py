"""The plan of a compressed model, attached to its config in memory and read from the config on disk."""

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from rana_kernels.checkpoint.headers import CheckpointError, strict_json
from rana_kernels.model.plan import Plan
from rana_kernels.model.quantized import QUANT_METHOD
from rana_kernels.version import __version__

CHECKPOINT_FORMAT = 3  # of the directory: raise it when names or dtypes of stored tensors change


def attach_plan(model: nn.Module, plan: Plan, made: dict[str, Any] | None = None) -> None:
    """Store the plan in `model.config`, in the form of config.json.

    made   facts for the model card

    `model.save_pretrained` then writes a directory that can be loaded.
    """
    config: Any = model.config
    config.quantization_config = {**plan_to_config(plan), "made": made or {}}


def attached_plan(model: nn.Module) -> Plan | None:
    """Return the plan of a compressed model, or None if `model` is not compressed."""
    fields = _fields(model)
    return plan_from_config(fields) if fields.get("quant_method") == QUANT_METHOD else None


def attached_facts(model: nn.Module) -> dict[str, Any]:
    """Return the facts for the model card of `model`, {} if none are known."""
    made = _fields(model).get("made")
    return made if isinstance(made, dict) else {}


def _fields(model: nn.Module) -> dict[str, Any]:
    found = getattr(getattr(model, "config", None), "quantization_config", None)
    return found if isinstance(found, dict) else found.to_dict() if found is not None else {}


def plan_to_config(plan: Plan) -> dict[str, Any]:
    """Return `quantization_config` of config.json for a plan."""
    return {"quant_method": QUANT_METHOD, "format": CHECKPOINT_FORMAT, "plan": json.loads(plan.to_json())}


def plan_from_config(fields: dict[str, Any]) -> Plan:
    """Read the plan from `quantization_config`. Raise CheckpointError for another format or a broken plan."""
    check_format(fields.get("format"), "config.json: quantization_config")
    try:
        return Plan.from_json(json.dumps(fields.get("plan")))
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}") from None


def read_plan(directory: str | os.PathLike) -> Plan:
    """Read the plan from config.json in `directory`. Raise CheckpointError if there is none."""
    path = Path(directory) / "config.json"
    config = strict_json(path.read_bytes(), str(path))
    fields = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(fields, dict) or fields.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{path} has no plan in quantization_config, wanted a compressed model's config"
        )
    return plan_from_config(fields)


def check_format(found: object, where: str) -> None:
    """Raise CheckpointError unless `found` is the format that this version reads."""
    if type(found) is not int or found != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{where}: format is {str(found)[:200]!r}, this version of rana_kernels ({__version__}) reads "
            f"{CHECKPOINT_FORMAT}: install the version that wrote it, or compress the original model again"
        )
