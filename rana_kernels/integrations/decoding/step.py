"""The step of one token in place of transformers' own: `quicken`, and when the step is taken.

Between our ops, a step of transformers spends much time in Python and in torch's small ops, which quantised
weights do not shorten. Sampling, streaming and stopping stay with `generate`, which calls `forward`.
"""

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from rana_kernels.integrations.decoding.blocks import decode
from rana_kernels.integrations.decoding.cache import growing_layers
from rana_kernels.integrations.decoding.recipe import forget_recipe

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # whose blocks `blocks.py` computes
# arguments of `forward` that a step knows; the last three say nothing about a single token
KNOWN = {
    "input_ids", "attention_mask", "position_ids", "cache", "past_key_values", "use_cache", "return_dict",
    "logits_to_keep", "cache_position", "tokenizer",
}  # fmt: skip


def quicken(model: PreTrainedModel) -> None:
    """Let `model.generate` decode single tokens on the CPU with little besides the ops of the model.

    This replaces `model.forward` by one that computes a step for one new token of each text itself, and
    leaves everything else to transformers: prompts, training, several tokens at once, other caches.
    A step calls linears and MLPs, hooks included, and no hooks of other modules. `unquicken` undoes it.

    Raises ValueError for a model that has no such step, and says why.
    """
    if not _is_quick(model):
        _require_step(model)
        model.forward = MethodType(_with_step(type(model).forward), model)


def unquicken(model: PreTrainedModel) -> None:
    """Undo `quicken`."""
    if _is_quick(model):
        del model.forward


def _is_quick(model: PreTrainedModel) -> bool:
    forward = vars(model).get("forward")
    return getattr(forward, "__wrapped__", None) is type(model).forward


def _require_step(model: PreTrainedModel) -> None:
    name, kind = type(model).__name__, getattr(model.config, "model_type", None)
    own = type(model).__module__.startswith(f"transformers.models.{kind}.") and name.endswith("ForCausalLM")
    if kind not in FAMILIES or not own:
        raise ValueError(f"{name} is of the type {kind}, wanted a causal model of {', '.join(FAMILIES)}")
    if "forward" in vars(model):
        raise ValueError(f"{name} has a forward that another program replaced, wanted transformers' own")
    other = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers} - {"DynamicLayer"}
    if other:
        raise ValueError(f"{name} caches keys in a {min(other)}, wanted every layer to see the whole text")
    if not hasattr(torch.ops.rana_decoding, "attend"):
        raise ValueError("the CPU library was not built, wanted an installation with a C++ compiler at hand")
    devices = {p.device.type for p in model.parameters()} - {"cpu"}
    if devices:
        raise ValueError(f"{name} has parameters on {min(devices)}, wanted all on the CPU")


def _with_step(forward: Callable) -> Callable:
    @functools.wraps(forward)
    def step_or_forward(model: Any, *args: Any, **given: Any) -> Any:
        if args or not _is_step(model, given):
            forget_recipe(model)
            return forward(model, *args, **given)
        name = "cache" if given.get("cache") is not None else "past_key_values"
        layers = growing_layers(given.get(name))
        if layers is None:
            return forward(model, **given)
        positions = given.get("position_ids")
        if positions is None:
            positions = torch.tensor([[layers[0].get_seq_length()]])
        seen = _seen(given.get("attention_mask"))
        output = CausalLMOutputWithPast(logits=decode(model, given["input_ids"], positions, seen, layers))
        output[name] = given[name]
        return output

    # transformers asks for it in every step, and would follow `__wrapped__` each time
    step_or_forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return step_or_forward


def _is_step(model: PreTrainedModel, given: dict[str, Any]) -> bool:
    """Say whether these arguments ask for the logits of one token a text, on the CPU, and for no more."""
    input_ids, mask = given.get("input_ids"), given.get("attention_mask")
    return (
        input_ids is not None
        and input_ids.shape[1] == 1
        and input_ids.device.type == "cpu"
        and given.get("use_cache") is True
        and given.get("return_dict") is not False
        and (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2))
        and all(not value for name, value in given.items() if name not in KNOWN)
        and not (model.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
    )


def _seen(attention_mask: Tensor | None) -> Tensor | None:
    """Return the tokens that are seen, [batch, length] bool, or None if all are."""
    return None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
