"""`linear` in Triton: one launch for decoding, one product for prefill."""

import triton
import triton.language as tl
from torch import Tensor

from rana_kernels.backends.triton import configurations, products
from rana_kernels.backends.triton.launch import packed, run, seated, tokens_of
from rana_kernels.backends.triton.project import project
from rana_kernels.backends.triton.weights import Weight, readable
from rana_kernels.ops import checks


@triton.jit
def kernel(
    x, weight, bias, y, M, K, N, state,
    M_PAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr, THREADS: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """Compute y in a single phase."""
    project(x, weight, bias, y, M, K, N, M_PAD, BLOCK_N, BLOCK_K)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, weight_scale: Tensor | None = None
) -> Tensor:
    checks.linear(x, weight, bias, weight_scale)
    tokens, bias = tokens_of("linear", "x", x), packed(bias)
    N, W = len(weight), readable(weight, weight_scale, x.shape[-1], len(tokens), x.dtype)
    if len(tokens) == 0 or N == 0:
        y = x.new_empty(len(tokens), N)
    elif configurations.decodes(len(tokens), tokens.dtype):
        y = _decode(tokens, W, bias)
    else:
        config = configurations.prefill("linear", tokens, W.stored)
        y = products.expand(tokens, W.stored.T, bias, config)
    return y.view(*x.shape[:-1], N)


def _decode(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    (M, K), N = x.shape, len(weight.stored)
    config = configurations.decode("linear", x, weight.stored)
    block_n, block_k = config.blocks(K, weight.bits)
    y = x.new_empty(M, N)
    run(
        kernel, 1, seated(config, triton.cdiv(N, block_n), x.device), config, x.device,
        x, weight, bias, y, M, K, N,
        M_PAD=configurations.padded(M), BLOCK_N=block_n, BLOCK_K=block_k,
    )  # fmt: skip
    return y
