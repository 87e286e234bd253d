"""`rana info`."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from rana_kernels.backends import info
from rana_kernels.checkpoint.attachment import read_plan
from rana_kernels.checkpoint.manifest import read_manifest
from rana_kernels.checkpoint.model_card import describe_bits
from rana_kernels.cli.options import AsJson, app, print_json
from rana_kernels.model.dial import cost_ratios
from rana_kernels.model.plan import Plan


@app.command("info")
def show_info(
    directory: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIR]", help="A directory that `rana compress` wrote, to report on it instead."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Report which backend serves each op, the instruction set, the threads and the versions.

    For each thing that makes it slow or incomplete on this machine, a line says what to do.

    With a directory, report how its model is compressed: method, bits, and bytes.
    """
    found = info.report() if directory is None else None
    facts = _facts(directory) if directory is not None else {}
    if as_json:
        print_json(found.to_dict() if found else facts)
    elif found:
        print(found)
    else:
        print("\n".join(f"{name}: {value}" for name, value in facts.items()))


def _linears(plan: Plan, bits: int) -> int:
    return sum(len(adapter.names) for adapter in plan.adapters if adapter.bits == bits)


def _facts(directory: Path) -> dict[str, Any]:
    manifest, plan = read_manifest(directory), read_plan(directory)
    itemsize = getattr(torch, manifest.facts["base"]["dtype"]).itemsize
    return {
        "method": plan.method,
        "block_flops_reduction": plan.reduction,
        "budgets": [round(ratio, 3) for ratio in cost_ratios(plan)],
        "bits": describe_bits(plan),
        "linears_by_bits": {bits: _linears(plan, bits) for bits in plan.bits},
        "stored_bytes": manifest.facts["stored_bytes"],
        "block_stored_bytes": plan.stored_bytes(itemsize),
        "block_read_bytes": round(plan.read_bytes(itemsize)),
        "lm_head_read_bytes": None if plan.lm_head is None else round(plan.lm_head.read_bytes(itemsize)),
    }
