"""One token of each text through the blocks of a Llama, or of a model whose blocks compute the same.

Blocks that have a recipe run it. In others, those of a LoRA and those with hooks, the modules of linears and
MLPs are called as transformers calls them, and what stands between them is computed by `csrc/cpu/between.h`
and `attention.h`.
"""

from typing import Any

import torch
from torch import Tensor

from rana_kernels.integrations.decoding.cache import GrowingLayer
from rana_kernels.integrations.decoding.recipe import recipe_of


def decode(
    model: Any, input_ids: Tensor, positions: Tensor, seen: Tensor | None, layers: list[GrowingLayer]
) -> Tensor:
    """Return the logits [batch, 1, vocabulary] of one more token of each text, and add it to the cache.

    input_ids, positions   [batch, 1]
    seen                   [batch, length] bool: the tokens that are seen, the new one included. None: all
    """
    decoder = model.model
    x = decoder.embed_tokens(input_ids)
    rotation = decoder.rotary_emb(x, positions.expand(len(x), 1))
    for layer in layers:
        layer.reserve()
    recipe = recipe_of(model)
    y = None if recipe is None else recipe.run(x, rotation, seen, layers)
    return model.lm_head(_through_blocks(decoder, x, rotation, seen, layers) if y is None else y)


# In inference mode our ops are called without the Python that would record derivatives. What outlives a step
# is made outside, because such tensors could not be written to later.
@torch.inference_mode()
def _through_blocks(
    decoder: Any, x: Tensor, rotation: tuple[Tensor, Tensor], seen: Tensor | None, layers: list[GrowingLayer]
) -> Tensor:
    x, delta = x.clone(), None
    for block, layer in zip(decoder.layers, layers, strict=True):
        normal = _normalize(block.input_layernorm, x, delta)
        delta = _attend(block.self_attn, normal, rotation, seen, layer)
        delta = block.mlp(_normalize(block.post_attention_layernorm, x, delta))
    return _normalize(decoder.norm, x, delta)


def _normalize(norm: Any, x: Tensor, delta: Tensor | None = None) -> Tensor:
    """Add `delta` to x in place, and return the norm of the sum."""
    return torch.ops.rana_decoding.add_rms_norm(x, delta, norm.weight, norm.variance_epsilon)


def _attend(
    attention: Any, x: Tensor, rotation: tuple[Tensor, Tensor], seen: Tensor | None, layer: GrowingLayer
) -> Tensor:
    q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    if hasattr(attention, "q_norm"):
        heads = (*x.shape[:-1], -1, attention.head_dim)
        q = _normalize(attention.q_norm, q.reshape(heads).contiguous()).flatten(-2)
        k = _normalize(attention.k_norm, k.reshape(heads).contiguous()).flatten(-2)
    keys, values = layer.rooms()
    y = torch.ops.rana_decoding.attend(
        q, k, v, *rotation, seen, keys.memory, values.memory, keys.length, attention.scaling
    )
    keys.length += 1
    values.length += 1
    return attention.o_proj(y)
