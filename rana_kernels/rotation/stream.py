"""The residual stream of a model: who writes it, who reads it, the norms between, and its rotation.

With an orthogonal Q, everything that writes the stream writes Qᵀ of it, and everything that reads it first
undoes Q. A norm that only divides by the root mean square is not changed by Q, after its weights were
multiplied into those of its readers. Models whose norms subtract means, or scale what is written, cannot be
rotated.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rana_kernels.model.architectures import Block, architecture, decoder_name, find_blocks
from rana_kernels.model.head import head_block, is_tied, untie_head
from rana_kernels.model.linears import linear_of


@dataclass(frozen=True)
class Stream:
    """The modules around the residual stream, by full name.

    embedding   writes it first
    readers     the linears that read it, by the norm before them
    writers     the linears that add to it
    blocks      of the model
    """

    embedding: str
    readers: dict[str, tuple[str, ...]]
    writers: tuple[str, ...]
    blocks: list[Block]


def find_stream(model: Any) -> Stream:
    """Return the stream of `model`. Raise ValueError if it cannot be rotated."""
    known, decoder = architecture(model), decoder_name(model)
    head = head_block(model)
    if not known.norms or not decoder or head is None:
        raise ValueError(
            f"{type(model).__name__}: its residual stream cannot be rotated, wanted an architecture with "
            "nothing but RMS norms between the stream and its readers, and an lm_head that is a linear"
        )
    blocks, readers = find_blocks(model), dict[str, tuple[str, ...]]()
    layers = f"{decoder}.{known.layers}"
    for block in blocks:
        attention, mlp = (f"{layers}.{block.index}.{name}" for name in known.norms)
        readers |= {attention: block.qkv, mlp: block.expanding}
    readers[f"{decoder}.norm"] = (head.head,)
    embedding = next(n for n, module in model.named_modules() if module is _embedding(model))
    writers = tuple(name for block in blocks for name in (block.o, block.down))
    stream = Stream(embedding, readers, writers, blocks)
    _require_nothing_else(model, stream)
    for norm in readers:
        scales_of(model.get_submodule(norm), model.config.hidden_size)
    return stream


def _embedding(model: Any) -> nn.Module:
    return model.get_input_embeddings()


def _require_nothing_else(model: nn.Module, stream: Stream) -> None:
    """Raise ValueError if a module has weights that may touch the stream and is none of its own."""
    readers = [name for names in stream.readers.values() for name in names]
    known = {stream.embedding, *stream.readers, *readers, *stream.writers}
    for name, module in model.named_modules():
        within_heads = name.endswith(("q_norm", "k_norm"))
        if name not in known and not within_heads and any(True for _ in module.parameters(recurse=False)):
            raise ValueError(
                f"{name} is a {type(module).__name__} that is not known to leave the residual stream alone: "
                "this model cannot be rotated"
            )


def scales_of(norm: nn.Module, size: int) -> Tensor:
    """Return what a norm multiplies by, float64 [size]. Raise ValueError if it is no RMS norm."""
    weight: Any = norm.weight
    large = torch.full((1, size), 1e4, dtype=torch.float32, device=weight.device)
    wide = torch.nn.Parameter(weight.detach().float(), requires_grad=False)
    narrow, norm.weight = norm.weight, wide
    try:
        scales = norm(large)[0].double()
        x = large * torch.linspace(-2, 3, size, device=weight.device)
        expected = x.double() / x.double().square().mean().sqrt() * scales
        same = torch.allclose(norm(x).double(), expected, rtol=1e-4, atol=1e-4)
    finally:
        norm.weight = narrow
    if not same or getattr(norm, "bias", None) is not None:
        raise ValueError(
            f"{type(norm).__name__} is no RMS norm: the residual stream before it cannot be rotated"
        )
    return scales


@torch.no_grad()
def absorb(model: Any, stream: Stream, Q: Tensor) -> None:
    """Rotate the stream by Q [K, K], orthogonal: change all weights around it, in place.

    An lm_head that is tied to the embedding gets a weight of its own, because the two change differently.
    """
    wide, size = Q.double(), len(Q)
    if is_tied(model):
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
        untie_head(model)
    embedding = model.get_submodule(stream.embedding)
    embedding.weight.copy_(embedding.weight.double() @ wide)
    for name, linears in stream.readers.items():
        norm = model.get_submodule(name)
        scales = scales_of(norm, size)
        for linear in (linear_of(model, linear) for linear in linears):
            linear.weight.copy_(linear.weight.double() * scales @ wide)
        _make_neutral(norm, size)
    for linear in (linear_of(model, name) for name in stream.writers):
        linear.weight.copy_(wide.T @ linear.weight.double())
        if linear.bias is not None:
            linear.bias.copy_(linear.bias.double() @ wide)


def _make_neutral(norm: Any, size: int) -> None:
    """Give a norm the weights with which it multiplies by 1: ones, or in some models zeros."""
    for value in (1.0, 0.0):
        norm.weight.fill_(value)
        if torch.allclose(
            scales_of(norm, size), torch.ones(size, dtype=torch.float64, device=norm.weight.device)
        ):
            return
    raise ValueError(f"{type(norm).__name__} has no weights with which it multiplies by 1")
