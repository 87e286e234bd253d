"""vLLM: its own engine runs our checkpoints. vLLM finds this file by the plugin group `vllm.general_plugins`.

For vLLM, "rana" is a quantization method, which the checkpoint's config names. vLLM's models merge linears
that read the same input (q, k and v; gate and up). One layer of vLLM therefore holds several of our adapters
(`pieces.py`, `weights.py`) and computes them one after the other (`method.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import regex
import torch
from torch import nn
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper

from rana_kernels.checkpoint.attachment import plan_from_config
from rana_kernels.checkpoint.headers import CheckpointError, read_header
from rana_kernels.checkpoint.manifest import MANIFEST, read_manifest
from rana_kernels.integrations.vllm.head import RanaHeadMethod
from rana_kernels.integrations.vllm.method import RanaLinearMethod
from rana_kernels.model.plan import AdapterSpec, Plan
from rana_kernels.model.quantized import QUANT_METHOD


def register() -> None:
    """Register our checkpoints with vLLM. The plugin may be called any number of times in a process."""
    register_quantization_config(QUANT_METHOD)(RanaConfig)


class RanaConfig(QuantizationConfig):
    """`quantization_config` of config.json for vLLM. It says which adapters each layer of vLLM holds."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        if plan.lm_head is not None and plan.lm_head.kind != "dense":
            raise ValueError(
                "the model has a mask on lm_head, which vLLM has not: compress the original model again, "
                "with flops_reduction"
            )
        self.adapters = {name: adapter for adapter in plan.adapters for name in adapter.names}
        self.head = plan.lm_head
        # the checkpoint has these tensors under the MLP's own name, vLLM under the MLP's first layer
        self._renamed: dict[str, str] = {}
        self.packed_modules_mapping["gate_up_proj"] = ["gate_proj", "up_proj"]  # Qwen3-MoE sets this too late

    def get_name(self) -> Any:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> RanaConfig:
        """Read the config. Raise CheckpointError for another format or a broken plan."""
        return cls(plan_from_config(config))

    def maybe_update_config(self, model_name: str, hf_config=None, revision=None) -> None:
        """Check the manifest of a local directory, if it has one, and that it has weights for every linear.

        vLLM calls this after it has read the config and before it reads any weight. With a quantization
        method, vLLM itself does not check that it found all weights. Raises CheckpointError.
        """
        place = Path(model_name)
        if not place.is_dir():
            return
        if (place / MANIFEST).is_file():
            manifest = read_manifest(place)
            manifest.verify(manifest.files)
        found = {name for file in place.glob("*.safetensors") for name in read_header(file)}
        missing = [name for name in self.adapters if f"{name}.weight" not in found]
        if missing:
            raise CheckpointError(
                f"{place} has no weights for {', '.join(missing)}. Copy the checkpoint again"
            )

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return the method for one layer: ours if at least one of its linears has an adapter.

        Raises ValueError if the plan and vLLM group the linears differently.
        """
        if isinstance(layer, ParallelLMHead) and self.head is not None:
            return RanaHeadMethod(self.head)
        if not isinstance(layer, LinearBase):
            return None
        parent, _, own = prefix.rpartition(".")
        names = [f"{parent}.{name}" for name in self.packed_modules_mapping.get(own, [own])]
        adapters = {name: self.adapters[name] for name in names if name in self.adapters}
        if not any(adapter.changes for adapter in adapters.values()):
            return UnquantizedLinearMethod()
        _check_names(prefix, names, adapters)
        if isinstance(layer, ColumnParallelLinear):
            owner = parent.rpartition(".")[2]
            self._renamed[rf"(\.{owner})\.(B|B_scale|threshold|norms)$"] = rf"\1.{own}.\2"
        return RanaLinearMethod(names, list(dict.fromkeys(adapters.values())))

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:  # type: ignore[override]
        """Return how vLLM renames tensors of the checkpoint, beyond the renaming that its models do."""
        return WeightsMapper(orig_to_new_regex={regex.compile(k): v for k, v in self._renamed.items()})


def _check_names(prefix: str, names: list[str], adapters: dict[str, AdapterSpec]) -> None:
    missing = [name for name in names if name not in adapters]
    if missing:
        raise ValueError(f"{prefix}: the plan has nothing for {', '.join(missing)}, which vLLM computes here")
    for adapter in adapters.values():
        if not set(adapter.names) <= set(names):
            raise ValueError(
                f"{prefix}: vLLM computes {', '.join(names)} here, the plan has {', '.join(adapter.names)} "
                "in one adapter. Compress the model with separate adapters for them"
            )
