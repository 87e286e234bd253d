"""The phases of the decode kernels, and the barrier between them.

A decode kernel is one launch of a grid that stays resident. Its programs work through a phase, wait
for one another, and start the next phase, which reads the results from scratch memory. `project` and
`expand`, which read weights, have files of their own.

    project   h = x Bᵀ                                        scratch h [M, R], or y
    expand    the kept rows times their h, in tiles of        scratch sums [SHARES, M, N]
              columns × interleaved shares of the rows
    finish    sums over the shares, in order; bias; dtype     y [M, N]

All sums are float32. Their grouping depends only on the shapes and on the token's own mask, so the other
tokens of the batch do not change a token's result.
"""

import triton
import triton.language as tl

from rana_kernels.backends.triton.dots import rounded


@triton.jit
def grid_barrier(state):
    """Wait until every program of the grid has arrived. `state` is int32 [2]: [arrived, generation].

    The last program to arrive sets the count to 0 for the next barrier and increments the generation, for
    which the others wait. The state therefore never needs filling. The whole grid must be resident (a
    cooperative launch). Each atomic orders the memory of its program as a whole, because the barriers
    before and after the atomics synchronise the program's threads.
    """
    tl.debug_barrier()
    generation = tl.atomic_add(state + 1, 0, sem="acquire", scope="gpu")
    arrived = tl.atomic_add(state, 1, sem="acq_rel", scope="gpu")
    if arrived == tl.num_programs(0) - 1:
        tl.atomic_xchg(state, 0, sem="relaxed", scope="gpu")
        tl.atomic_add(state + 1, 1, sem="release", scope="gpu")
    else:
        while tl.atomic_add(state + 1, 0, sem="acquire", scope="gpu") == generation:
            pass
    tl.debug_barrier()


@triton.jit
def finish(sums, bias, y, M, N, SHARES: tl.constexpr, BLOCK: tl.constexpr = 128):
    """Compute y [M, N]: add the sums of the shares [SHARES, M, N] in order, then the bias."""
    for first in range(tl.program_id(0) * BLOCK, M * N, tl.num_programs(0) * BLOCK):
        e = first + tl.arange(0, BLOCK)
        total = _add_shares(sums, bias, e, M, N, SHARES)
        tl.store(y + e, rounded(total, y.dtype.element_ty), mask=e < M * N)


@triton.jit
def finish_neurons(
    up_sums, gate_sums, up_bias, gate_bias, g, M, N,
    SHARES: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr = 128,
):  # fmt: skip
    """Compute g [M, N] float32 = act(gate) · up, or act(up) without a gate."""
    for first in range(tl.program_id(0) * BLOCK, M * N, tl.num_programs(0) * BLOCK):
        e = first + tl.arange(0, BLOCK)
        up = _add_shares(up_sums, up_bias, e, M, N, SHARES)
        if gate_sums is None:
            value = activate(up, ACTIVATION)
        else:
            value = activate(_add_shares(gate_sums, gate_bias, e, M, N, SHARES), ACTIVATION) * up
        tl.store(g + e, value, mask=e < M * N)


@triton.jit
def _add_shares(sums, bias, e, M, N, SHARES: tl.constexpr):
    total = tl.load(sums + e, mask=e < M * N, other=0, cache_modifier=".cg")
    for share in tl.static_range(1, SHARES):
        total += tl.load(sums + share * M * N + e, mask=e < M * N, other=0, cache_modifier=".cg")
    if bias is not None:
        total += tl.load(bias + e % N, mask=e < M * N, other=0).to(tl.float32)
    return total


@triton.jit
def keeps(value, r, threshold, norms, R, PER_ROW: tl.constexpr):
    """Return the mask: false where |h|·norms < threshold. NaN is therefore kept."""
    score = tl.abs(value)
    if norms is not None:
        score *= tl.load(norms + r, mask=r < R, other=0)
    if PER_ROW:
        return (score < tl.load(threshold + r, mask=r < R, other=0)) == 0
    return (score < tl.load(threshold)) == 0


@triton.jit
def activate(value, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return value / (1 + tl.exp(-value))
    if ACTIVATION == "gelu":
        return 0.5 * value * (1 + tl.erf(value * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (value + 0.044715 * value * value * value)
        return value / (1 + tl.exp(-2 * inner))
    positive = tl.where(value < 0, 0, value)  # NaN stays
    return positive if ACTIVATION == "relu" else positive * positive
