"""`masked_mlp` in Triton: one launch for decoding, three products for prefill."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rana_kernels.backends.triton import configurations, products
from rana_kernels.backends.triton.expand import expand
from rana_kernels.backends.triton.launch import (
    list_size,
    packed,
    run,
    scratch,
    seated,
    tokens_of,
    working_dtype,
)
from rana_kernels.backends.triton.phases import finish, finish_neurons, grid_barrier
from rana_kernels.backends.triton.project import project
from rana_kernels.backends.triton.weights import Weight, readable, stored_of
from rana_kernels.ops import checks
from rana_kernels.ops.quantized import columns_of


@triton.jit
def kernel(
    x, B, up_rows, gate_rows, threshold, norms, up_bias, gate_bias,
    down_rows, down_norms, down_threshold, down_bias,
    y, h, up_sums, gate_sums, g, down_sums, kept_r, kept_h,
    M, K, S, R_UP, R_GATE, I, N, state,  # noqa: E741
    PER_ROW: tl.constexpr, DOWN_PER_ROW: tl.constexpr, ACTIVATION: tl.constexpr, M_PAD: tl.constexpr,
    PROJECT_R: tl.constexpr, PROJECT_K: tl.constexpr,
    SHARES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
    DOWN_SHARES: tl.constexpr, BLOCK_DOWN: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr, THREADS: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """Run all phases (PHASE 0), or only phase number PHASE. Without B, h is x, and there is no phase 1.

    Triton cannot compare a weight with None, so what belongs to B and gate says whether they are there.
    """
    if PROJECT_R > 0:
        if PHASE == 0 or PHASE == 1:
            project(x, B, None, h, M, K, S, M_PAD, PROJECT_R, PROJECT_K)
        if PHASE == 0:
            grid_barrier(state)
    if PHASE == 0 or PHASE == 2:
        expand(
            h, up_rows, threshold, norms, up_sums, kept_r, kept_h, M, R_UP, I, S,
            PER_ROW, SHARES, M_PAD, BLOCK_R, BLOCK_I, CHUNK, THREADS,
        )  # fmt: skip
        if gate_sums is not None:
            # separate ranks: gate reads the last R_GATE values of h; otherwise S is R_GATE, and it reads all
            expand(
                h + S - R_GATE, gate_rows, threshold + S - R_GATE, norms, gate_sums, kept_r, kept_h,
                M, R_GATE, I, S,
                PER_ROW, SHARES, M_PAD, BLOCK_R, BLOCK_I, CHUNK, THREADS,
            )  # fmt: skip
    if PHASE == 0:
        grid_barrier(state)
    if PHASE == 0 or PHASE == 3:
        finish_neurons(up_sums, gate_sums, up_bias, gate_bias, g, M, I, SHARES, ACTIVATION)
    if PHASE == 0:
        grid_barrier(state)
    if PHASE == 0 or PHASE == 4:
        expand(
            g, down_rows, down_threshold, down_norms, down_sums, kept_r, kept_h, M, I, N, I,
            DOWN_PER_ROW, DOWN_SHARES, M_PAD, BLOCK_DOWN, BLOCK_N, CHUNK, THREADS,
        )  # fmt: skip
    if PHASE == 0:
        grid_barrier(state)
    if PHASE == 0 or PHASE == 5:
        finish(down_sums, down_bias, y, M, N, DOWN_SHARES)


def masked_mlp(
    x: Tensor,
    B: Tensor | None,
    up_rows: Tensor,
    gate_rows: Tensor | None,
    threshold: Tensor,
    norms: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_rows: Tensor,
    down_norms: Tensor,
    down_threshold: Tensor,
    down_bias: Tensor | None,
    activation: str,
    B_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    gate_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> Tensor:
    checks.masked_mlp(
        x, B, up_rows, gate_rows, threshold, norms, up_bias, gate_bias, down_rows, down_norms, down_threshold,
        down_bias, activation, B_scale, up_scale, gate_scale, down_scale,
    )  # fmt: skip
    tokens, neurons, N = tokens_of("masked_mlp", "x", x), len(down_rows), columns_of(down_rows)
    if len(tokens) == 0 or N == 0:
        return x.new_empty(*x.shape[:-1], N)
    dtype = working_dtype(tokens, B_scale, up_scale, gate_scale)
    tokens = tokens.to(dtype)

    def weight(stored: Tensor | None, scale: Tensor | None, columns: int) -> Weight | None:
        return None if stored is None else readable(stored, scale, columns, len(tokens), dtype)

    form = _decode if configurations.decodes(len(tokens), dtype) else _prefill
    y = form(
        tokens, weight(B, B_scale, x.shape[-1]),
        weight(up_rows, up_scale, neurons), weight(gate_rows, gate_scale, neurons),
        threshold.contiguous(), packed(norms), packed(up_bias, dtype), packed(gate_bias, dtype),
        weight(down_rows, down_scale, N),
        down_norms.contiguous(), down_threshold.contiguous(), packed(down_bias, dtype), activation,
    )  # fmt: skip
    return y.view(*x.shape[:-1], N).to(x.dtype)


def _decode(
    x, B, up_rows, gate_rows, threshold, norms, up_bias, gate_bias,
    down_rows, down_norms, down_threshold, down_bias, activation,
):  # fmt: skip
    (M, K), I, N = x.shape, len(down_rows.stored), columns_of(down_rows.stored)  # noqa: E741
    R_up, R_gate, projected = (0 if w is None else len(w.stored) for w in (up_rows, gate_rows, B))
    S = K if B is None else projected
    config = configurations.decode("masked_mlp", x, *stored_of(B, up_rows, gate_rows, down_rows))
    project_r, project_k = (0, 0) if B is None else config.blocks(K, B.bits)
    bits = max(w.bits for w in (up_rows, gate_rows) if w is not None)
    cut = config.cut(max(R_up, R_gate), I, bits, x.device)
    down = config.cut(I, N, down_rows.bits, x.device)
    projections = 0 if B is None else triton.cdiv(projected, project_r)
    programs = seated(config, max(projections, cut.items, down.items), x.device)
    h, up_sums, gate_sums, g, down_sums, kept_r, kept_h = scratch(
        x.device, M * projected, cut.shares * M * I, cut.shares * M * I, M * I, down.shares * M * N,
        *[list_size(M, programs)] * 2,
    )  # fmt: skip
    y = x.new_empty(M, N)
    run(
        kernel, 5, programs, config, x.device,
        x, B, up_rows, gate_rows, threshold, norms, up_bias, gate_bias,
        down_rows, down_norms, down_threshold, down_bias,
        y, x if B is None else h, up_sums, None if gate_rows is None else gate_sums, g, down_sums,
        kept_r.view(torch.int32), kept_h,
        M, K, S, R_up, R_gate, I, N,
        PER_ROW=threshold.dim() == 1, DOWN_PER_ROW=down_threshold.dim() == 1,
        ACTIVATION=activation, M_PAD=configurations.padded(M),
        PROJECT_R=project_r, PROJECT_K=project_k,
        SHARES=cut.shares, BLOCK_R=cut.rows, BLOCK_I=cut.columns,
        DOWN_SHARES=down.shares, BLOCK_DOWN=down.rows, BLOCK_N=down.columns,
    )  # fmt: skip
    return y


def _prefill(
    x, B, up_rows, gate_rows, threshold, norms, up_bias, gate_bias,
    down_rows, down_norms, down_threshold, down_bias, activation,
):  # fmt: skip
    B, up_rows, gate_rows, down_rows = stored_of(B, up_rows, gate_rows, down_rows)
    config = configurations.prefill("masked_mlp", x, B, up_rows, gate_rows, down_rows)
    # with B, the ranks leave the first product masked; without, x is masked where up and gate read it
    z, mask = (
        (x, (threshold, norms)) if B is None else (products.project(x, B, threshold, config), (None, None))
    )
    first_gate = 0 if gate_rows is None else z.shape[1] - len(gate_rows)
    g = products.neurons(
        z[:, : len(up_rows)], z[:, first_gate:], *mask, up_rows, gate_rows, up_bias, gate_bias,
        down_threshold, down_norms, activation, config,
    )  # fmt: skip
    return products.expand(g, down_rows, down_bias, config)
