"""The rotation within value heads. o reads weighted sums of v's outputs, which are rotated with the outputs.

For any invertible M, o(v(x)) stays the same if a head's rows of v are multiplied by M and its columns of o by
M⁻¹. This M makes the inputs of o uncorrelated, and the slopes of the loss by them too. A neuron adapter of o
then drops what a rank adapter would, and needs no B.
"""

from typing import Any

import torch
from torch import Tensor, nn

from rana_kernels.model.architectures import Block
from rana_kernels.model.linears import linear_of
from rana_kernels.statistics.block import CalibratedBlock

JITTER = 1e-6  # of the mean square of the inputs of o: directions that no token had still get a basis


def has_value_heads(model: nn.Module, block: Block) -> bool:
    """Say whether v and o are linears of their own, whose sizes are those of the heads in the config."""
    if len(block.qkv) != 3 or not block.o or not hasattr(model, "config"):
        return False
    queries, values, size = _heads(model.config)
    v, o = linear_of(model, block.qkv[2]), linear_of(model, block.o)
    return v.out_features == values * size and o.in_features == queries * size and queries % values == 0


@torch.no_grad()
def rotate_heads(calibrated: CalibratedBlock) -> None:
    """Rotate the value heads of a block, in place. Query heads that share a value head share its rotation."""
    model, block = calibrated.model, calibrated.block
    queries, values, size = _heads(model.config)
    v, o = linear_of(model, block.qkv[2]), linear_of(model, block.o)
    x, slopes = (t.double() for t in (calibrated.paired("o"), calibrated.slopes(block.o)))
    rows, columns = v.weight.double(), o.weight.double()
    bias = None if v.bias is None else v.bias.double()
    for head in range(values):
        own = slice(head * size, (head + 1) * size)
        readers = range(head * queries // values, (head + 1) * queries // values)
        places = [slice(i * size, (i + 1) * size) for i in readers]
        M = uncorrelated(*(torch.stack([t[:, i].T @ t[:, i] for i in places]).sum(0) for t in (x, slopes)))
        rows[own] = M @ rows[own]
        if bias is not None:
            bias[own] = M @ bias[own]
        for place in places:
            columns[:, place] = torch.linalg.solve(M, columns[:, place], left=False)
    v.weight.copy_(rows)
    o.weight.copy_(columns)
    if v.bias is not None and bias is not None:
        v.bias.copy_(bias)


def uncorrelated(moment: Tensor, curvature: Tensor) -> Tensor:
    """Return M [n, n] for which M S Mᵀ and M⁻ᵀ C M⁻¹ are diagonal, for the moment S and the curvature C.

    The rows of M have length 1. S and C are symmetric, positive semi-definite and float64.
    """
    unit = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    jitter = JITTER * float(moment.diagonal().mean()) or 1.0
    factor = torch.linalg.cholesky(moment + jitter * unit)
    _, U = torch.linalg.eigh(factor.T @ curvature @ factor)
    M = torch.linalg.solve_triangular(factor, U.flip(1).T, upper=False, left=False)
    return M / M.norm(dim=1, keepdim=True)


def _heads(config: Any) -> tuple[int, int, int]:
    """Return the number of query heads, the number of value heads, and their size."""
    queries = getattr(config, "num_attention_heads", 0)
    values = getattr(config, "num_key_value_heads", None) or queries
    size = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // max(1, queries)
    return queries, max(1, values), size
