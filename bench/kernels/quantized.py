"""Weights in 8 and 4 bits, and torch's own products with such weights, which nothing masks."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from bench.kernels.weights import Call, copies, turns, weight
from rana_kernels.ops.quantized import pack_int4
from rana_kernels.system.huge_pages import collapse

GROUP = 32  # columns that share a scale of ours
LARGEST = {8: 127, 4: 7}
RIVALS = ("torch int8", "torch int4 g32", "torch int4 g128")


def quantize(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round a weight to nearest, as fast as can be: its speed is measured, and not its quality."""
    grouped = weight.float().unflatten(-1, (-1, GROUP))
    scale = (grouped.abs().amax(-1) / LARGEST[bits]).half()
    q = (grouped / scale.float()[..., None]).round().clamp(-LARGEST[bits], LARGEST[bits])
    q = q.flatten(1).to(torch.int8)
    return (pack_int4(q) if bits == 4 else q), scale


def bytes_a_value(bits: int) -> float:
    """Return the bytes of a weight's value, with its share of a float16 scale."""
    return bits / 8 + (2 / GROUP if bits < 16 else 0)


def cloned(tensors: tuple[Tensor, ...], read: float | None = None) -> list[tuple[Tensor, ...]]:
    """Return copies of the tensors that leave the cache between two uses. To quantise each would be slow."""
    return copies(lambda: tuple(map(_clone, tensors)), read)


def _clone(tensor: Tensor) -> Tensor:
    made = tensor.clone()
    collapse([made])
    return made


def rivals(x: Tensor, shapes: Sequence[tuple[int, int]], layer: Callable[..., Tensor]) -> dict[str, Call]:
    """Return dense layers with weights of `shapes` [N, K] by torch's products for quantised weights.

    torch has them for bfloat16 only.
    """
    if x.dtype != torch.bfloat16:
        return {}
    forms = (
        (torch._weight_int8pack_mm, _int8),
        *((partial(_int4_linear, group), partial(_int4, group)) for group in (32, 128)),
    )
    found = {}
    for name, (linear, convert) in zip(RIVALS, forms, strict=True):
        weights = [part for shape in shapes for part in convert(weight(*shape, like=x))]
        found[name] = turns(partial(layer, linear=linear), cloned((x, *weights)))
    return found


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = (weight.float().abs().amax(-1) / 127).bfloat16()
    return (weight.float() / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def _int4(group: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    q, scales_and_zeros = _nibbles(weight, group)
    return torch._convert_weight_to_int4pack_for_cpu(q, 1), scales_and_zeros


def _nibbles(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Return whole numbers of 1..15, which stand for -7..7, and steps and zeros as torch takes them."""
    grouped = weight.float().unflatten(-1, (-1, group))
    scale = (grouped.abs().amax(-1) / 7).bfloat16()
    q = (grouped / scale.float()[..., None]).round().clamp(-7, 7).flatten(1).int() + 8
    return q, torch.stack([scale.T, torch.zeros_like(scale.T)], -1).contiguous()


def _int4_linear(group: int, x: Tensor, packed: Tensor, scales_and_zeros: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, scales_and_zeros)


INNER_TILES = 8  # of 16 columns, which lie together in torch's layout on a card


def int4_for_card(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Return a weight [N, K] as torch's product with 4 bits on a card takes it: packed, steps and zeros."""
    q, scales_and_zeros = _nibbles(weight, group)
    pairs = (q[:, ::2] << 4 | q[:, 1::2]).to(torch.uint8)
    return torch.ops.aten._convert_weight_to_int4pack(pairs, INNER_TILES), scales_and_zeros


def int4_on_card(group: int, x: Tensor, packed: Tensor, scales_and_zeros: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm(x, packed, group, scales_and_zeros)
