"""Quantisation: weights are rounded to 8 or 4 bits, with the statistics that are at hand, and packed."""

from rana_kernels.ops.quantized import pack_int4, unpack_int4
from rana_kernels.quantization.rounding import quantize

__all__ = ["pack_int4", "quantize", "unpack_int4"]
