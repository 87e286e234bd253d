"""`rotate`: the rotation of a dense model before it is compressed."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from rana_kernels.model.admission import admit, require_dense
from rana_kernels.model.architectures import find_blocks
from rana_kernels.rotation.heads import has_value_heads, rotate_heads
from rana_kernels.rotation.learning import STEPS, ReadInput, learn, loss_of
from rana_kernels.rotation.stream import Stream, absorb, find_stream, scales_of
from rana_kernels.statistics.block import CalibratedBlock
from rana_kernels.statistics.calibration import Stats, calibrate_blocks
from rana_kernels.system.progress import track
from rana_kernels.system.torch_state import plain_torch

TOKENS = 8192  # of a calibration are enough to learn from


@dataclass(frozen=True)
class Rotation:
    """What a rotation did.

    blocks   the number of blocks whose value heads were rotated
    gain     the part of the loss of masks on the residual stream that the rotation took away, as estimated on
             the tokens that it was learned from
    """

    blocks: int
    gain: float


@plain_torch()
def rotate(
    model: nn.Module, calibration: Iterable, *, steps: int = STEPS, seed: int = 0, progress: bool = True
) -> Rotation:
    """Rotate the value heads and the residual stream of a dense model, in place, so that masks lose less.

    calibration   as in `calibrate`
    steps         of learning the rotation of the stream; 0: rotate the value heads alone

    The predictions stay the same, up to the rounding of the new weights to the dtype of the model. Compress
    the model afterwards, with statistics of its own. An lm_head that is tied to the embedding gets a weight
    of its own. Raises ValueError for a model that is not dense, or whose residual stream cannot be rotated.
    """
    model = admit(model, changes=True)
    blocks = find_blocks(model)
    require_dense(model, blocks)
    stream = find_stream(model) if steps else None
    stats = calibrate_blocks(
        model, blocks, calibration, sample_tokens=1, seed=seed, inputs=("qkv",), progress=progress
    )
    turned = 0
    for block in track(blocks, "rotating value heads", progress):
        if has_value_heads(model, block):
            rotate_heads(CalibratedBlock(model, block, stats))
            turned += 1
    if stream is None:
        return Rotation(turned, 0.0)
    inputs = _inputs(model, stream, stats)
    Q = learn(inputs, steps=steps, seed=seed, progress=progress)
    before, after = loss_of(inputs), loss_of(inputs, Q)
    absorb(model, stream, Q)
    return Rotation(turned, 1 - after / before)


def _inputs(model: nn.Module, stream: Stream, stats: Stats) -> list[ReadInput]:
    """Return the inputs of the blocks as they are before the weights of the norms."""
    norm_before = {linears: norm for norm, linears in stream.readers.items()}
    found = []
    for block in stream.blocks:
        calibrated = CalibratedBlock(model, block, stats)
        for name in ("qkv", "mlp"):
            x = calibrated.paired(name)
            norm = model.get_submodule(norm_before[block.inputs[name]])
            scales = scales_of(norm, x.shape[1]).float()
            slopes = torch.stack([calibrated.slopes(linear) for linear in block.inputs[name]]).sum(0)
            found.append(ReadInput(x / scales, slopes * scales))
    return found
