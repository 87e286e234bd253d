"""lm_head in 8 or 4 bits for vLLM, whose own layer pads the vocabulary with rows that are never read."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

from rana_kernels import ops  # noqa: F401  (defines torch.ops.rana)
from rana_kernels.checkpoint.headers import CheckpointError
from rana_kernels.model.plan import AdapterSpec


class RanaHeadMethod(QuantizeMethodBase):
    """The method of vLLM's lm_head for a dense adapter of the plan.

    Raises ValueError if several processes would share the vocabulary.
    """

    def __init__(self, adapter: AdapterSpec) -> None:
        self.adapter, self.loaded = adapter, set[str]()

    def create_weights(
        self, layer: Any, input_size: int, output_sizes: list[int], *_: object, **__: object
    ) -> None:
        """Give the layer empty tensors: `qweight`, its scale, and the `weight` that stays empty."""
        (padded,) = output_sizes
        if padded < self.adapter.width or input_size != self.adapter.in_features:
            raise ValueError(
                f"lm_head has {self.adapter.bits} bits and is {self.adapter.in_features} -> "
                f"{self.adapter.width}, in this process {input_size} -> {padded}: set tensor_parallel_size=1"
            )
        weight, scale = self.adapter.format.empty(padded, input_size, None)
        for name, data in (("qweight", weight), ("qweight_scale", scale), ("weight", torch.empty(0))):
            parameter = nn.Parameter(data.zero_(), requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": partial(self._load, name)})
            layer.register_parameter(name, parameter)

    def _load(self, name: str, mine: nn.Parameter, stored: Tensor) -> None:
        """Copy one tensor of the checkpoint. This is vLLM's `weight_loader`."""
        wanted = (0,) if name == "weight" else (self.adapter.width, mine.shape[1])
        if tuple(stored.shape) != wanted:
            raise CheckpointError(f"lm_head: {name} has shape {tuple(stored.shape)}, wanted {wanted}")
        if not stored.isfinite().all():
            raise CheckpointError(f"lm_head: {name} has values that are not finite")
        mine.data[: len(stored)].copy_(stored)
        self.loaded.add(name)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Raise CheckpointError if a tensor was not loaded."""
        missing = {"qweight", "qweight_scale"} - self.loaded
        if missing:
            raise CheckpointError(f"lm_head: {', '.join(sorted(missing))} were not loaded")

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute the logits of the padded vocabulary."""
        return torch.ops.rana.linear(x, layer.qweight, bias, layer.qweight_scale)
