"""The plan of a compressed model: attached to its config in memory, and read from the config on disk."""

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from rana_kernels.checkpoint.headers import CheckpointError, strict_json
from rana_kernels.model.plan import Plan
from rana_kernels.version import __version__

FORMAT = 2
METHOD = "rana"  # what transformers calls a "quant_method"


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
    check_format(fields.get("format"), "config.json: quantization_config")
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


def check_format(found: object, where: str) -> None:
    if type(found) is not int or found != FORMAT:
        raise CheckpointError(
            f"{where}: format is {str(found)[:200]!r}, this version of rana_kernels ({__version__}) reads "
            f"{FORMAT}: install the version that wrote it, or compress the original model again"
        )
