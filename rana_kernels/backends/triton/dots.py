"""Products of tiles, in the precision that each kind of weights needs, and the rounding of their results."""

import triton
import triton.language as tl

from rana_kernels.backends.triton import interpreted

# kernels may read a global only if it is a constexpr
INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def dot(a, b, total):
    """Return total + a b. The product of two 16-bit elements is exact in float32."""
    # the interpreter cannot multiply bfloat16, and "ieee" keeps float32 from being rounded to TF32
    if INTERPRETED or a.dtype == tl.float32:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total)


@triton.jit
def dot_exact(z, w, total):
    """Return total + z w for a float32 z. A 16-bit w fits TF32; "tf32x3" splits z into terms that fit."""
    if w.dtype == tl.float32:
        return tl.dot(z, w, total, input_precision="ieee")
    return tl.dot(z, w.to(tl.float32), total, input_precision="tf32x3")


@triton.jit
def dot_whole(w, tokens, total):
    """Return total + w tokens for whole numbers w in float32, which fit every dtype of tokens, and TF32."""
    if tokens.dtype == tl.float32:
        return tl.dot(w, tokens, total, input_precision="tf32x3")
    return dot(w.to(tokens.dtype), tokens, total)


@triton.jit
def dot_in_two(z, w, total):
    """Return total + z w for a float32 z and whole numbers w: z is a sum of two bfloat16, worth 16 bits."""
    high = (z.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
    total = dot(high.to(tl.bfloat16), w.to(tl.bfloat16), total)
    return dot(rounded(z - high, tl.bfloat16), w.to(tl.bfloat16), total)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """Convert a float32 value to `dtype`, rounded to nearest even."""
    # the interpreter truncates to bfloat16, so round before it does (but not NaN, whose bits could overflow)
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(dtype)
