"""`rana compress` says first what it will do, and how long the calibration takes, by a trial."""

import time
from typing import Any

from torch import Tensor, nn

from rana_kernels.allocation.search import Search
from rana_kernels.compression.report import block_bytes, model_bytes
from rana_kernels.model.architectures import Block
from rana_kernels.statistics.calibration import calibrate
from rana_kernels.statistics.fisher import TOKENS
from rana_kernels.system.progress import duration

WORTH = 16  # sequences: for fewer, a trial of two would be a large part of the work


def forecast(
    model: nn.Module, blocks: list[Block], token_ids: Tensor, needs: dict[str, Any], search: Search | None
) -> str:
    """Return sentences on the tokens, blocks and bytes of a compression, and on its time.

    needs   the arguments of `calibrate`
    """
    inside, whole = block_bytes(model, blocks) / 1e6, model_bytes(model) / 1e6
    said = [
        f"{token_ids.numel():,} tokens calibrate {len(blocks)} blocks, whose linears have {inside:.1f} of "
        f"the model's {whole:.1f} MB."
    ]
    if len(token_ids) < WORTH:
        return said[0]
    plain = _seconds(model, token_ids, {**needs, "gradients": False})
    seconds = plain * token_ids.numel()
    if needs["gradients"]:
        first = min(TOKENS, token_ids.numel())
        seconds += (_seconds(model, token_ids, needs) - plain) * first
    said.append(f"By a trial, the calibration takes about {duration(seconds)}.")
    if search is not None:
        tokens = search.held_out.numel()
        said.append(
            f"Each of {search.evaluations} allocations is then measured on {tokens:,} tokens, in at most "
            f"{duration(plain * tokens)}."
        )
    said.append("The time of the blocks is told while they are compressed.")
    return " ".join(said)


def _seconds(model: nn.Module, token_ids: Tensor, needs: dict[str, Any]) -> float:
    """Return the time that a token of the calibration takes, measured on one sequence."""
    started = time.perf_counter()
    calibrate(model, [token_ids[:1]], progress=False, **needs)
    return (time.perf_counter() - started) / token_ids.shape[1]
