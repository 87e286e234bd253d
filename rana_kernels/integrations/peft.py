"""PEFT's LoRA on compressed models: it can be added, loaded, and merged into the adapters without a loss.

On a rank adapter, LoRA reads the layer's input. Merging appends the LoRA's ranks to B and rows with
threshold 0, so they are always kept. On a neuron adapter, LoRA reads the masked input, so that it can be
merged into the rows. LoRA's A reads the input, like our B. LoRA's B gives the output.

Beside a quantised adapter, or a dense linear that is quantised, LoRA stays in floats. It is not merged there,
because the sum would have to be rounded, which loses most of a LoRA that is smaller than the steps.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from rana_kernels.checkpoint.attachment import attach_plan, attached_facts, attached_plan
from rana_kernels.model.admission import admit
from rana_kernels.model.head import output_head
from rana_kernels.nn.adapters import RanaLinear, RanaNeuronLinear, RanaReceiver
from rana_kernels.nn.dense import QuantizedLinear
from rana_kernels.nn.mlp import RanaMLP
from rana_kernels.nn.split_mlp import RanaSplitMLP, join_mlp, split_mlp

ALL_LINEAR = "all-linear"  # PEFT's word


def add(model: nn.Module, config: LoraConfig) -> PeftModel:
    """Call `get_peft_model` for a compressed model. `target_modules` are named as in the dense model.

    "all-linear" means all linears of the dense model but lm_head. PEFT alone takes those that are still
    `nn.Linear`, which may be very few.

    Every RanaMLP of `model` is split, in place. `merge` joins it again.
    """
    model = admit(model, changes=True)
    _prepare(model, config)
    return get_peft_model(model, config)  # type: ignore[arg-type,return-value]


def load(model: nn.Module, directory: str | os.PathLike, *, is_trainable: bool = False) -> PeftModel:
    """Call `PeftModel.from_pretrained` for a compressed model, and split its MLPs as `add` does."""
    model = admit(model, changes=True)
    config = PeftConfig.from_pretrained(os.fspath(directory))
    _prepare(model, config)
    return PeftModel.from_pretrained(model, os.fspath(directory), config=config, is_trainable=is_trainable)  # type: ignore[arg-type]


def merge(tuned: PeftModel) -> nn.Module:
    """Return the compressed model with its active LoRAs merged, ready for `rana.save`.

    Raises ValueError if a merged adapter would have more ranks than a full-rank layer. Raises it before
    anything is merged if an adapter with a LoRA is quantised.
    """
    for module in tuned.modules():
        if isinstance(module, _Lora):
            module.require_floats()
    model: Any = tuned.merge_and_unload()
    for name, module in list(model.named_modules()):
        if isinstance(module, RanaSplitMLP):
            model.set_submodule(name, join_mlp(module))
    _note_ranks(model)
    return model


def _prepare(model: nn.Module, config: Any) -> None:
    if not isinstance(config, LoraConfig):
        raise ValueError(f"config is a {type(config).__name__}, wanted peft.LoraConfig")
    for name, module in list(model.named_modules()):
        if isinstance(module, RanaMLP):
            model.set_submodule(name, split_mlp(module))
    kinds = (RanaLinear, RanaNeuronLinear)
    owners = {id(m.handoff): m for m in model.modules() if isinstance(m, kinds) and m.handoff}
    for module in model.modules():
        if isinstance(module, RanaReceiver):
            # set in __dict__, because the owner must not become a submodule of its receiver
            module.__dict__["owner"] = owners[id(module.handoff)]
    if config.target_modules == ALL_LINEAR:
        config.target_modules = _all_linears(model)
    layers = {
        RanaLinear: LoraRank, RanaReceiver: _lora_of_receiver, RanaNeuronLinear: LoraNeuron,
        QuantizedLinear: _Lora,
    }  # fmt: skip
    config._register_custom_module(layers)


def _all_linears(model: nn.Module) -> set[str]:
    """Return the full names of the linears and adapters that a LoRA can stand beside, without lm_head."""
    kinds = (nn.Linear, RanaLinear, RanaNeuronLinear, RanaReceiver, QuantizedLinear)
    head = output_head(model)
    return {name for name, m in model.named_modules() if isinstance(m, kinds) and m is not head}


def _note_ranks(model: nn.Module) -> None:
    """Update the ranks in the model's plan, which loading relies on. Merging has appended some."""
    plan = attached_plan(model)
    assert plan is not None, "_prepare was given a compressed model"
    adapters = []
    for adapter in plan.adapters:
        if adapter.kind == "rank":
            rank = _stored_ranks(model, adapter.names[0])
            adapter = replace(adapter, rank=rank, live=adapter.live + rank - adapter.rank)
        adapters.append(adapter)
    attach_plan(model, plan.with_adapters(tuple(adapters)), attached_facts(model))


def _stored_ranks(model: nn.Module, name: str) -> int:
    rows: Any = model.get_submodule(name).rows
    return rows.shape[0]


class _Lora(LoraLinear):
    """PEFT's LoRA linear with another way of merging. It supports plain LoRA and rsLoRA only."""

    @property
    def lora_variants(self):
        return {(): None}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            self.require_floats()
            if self.lora_bias[name]:
                raise ValueError("LoRA with lora_bias=True is not merged: train without, or keep it unmerged")
            down, up = self.lora_A[name].weight, self.lora_B[name].weight * self.scaling[name]
            if safe_merge and not (down.isfinite().all() and up.isfinite().all()):
                raise ValueError(f"the LoRA {name!r} holds values that are not finite")
            self._merge(down.detach(), up.detach())
            self.merged_adapters.append(name)

    def require_floats(self) -> None:
        """Raise ValueError if the weights that the LoRA would be merged into are quantised."""
        owner, _ = _owner_of(self.get_base_layer())
        if any(getattr(owner, f"{name}_scale") is not None for name in owner.matrices):
            raise ValueError(
                f"merging wants floats, and this {type(owner).__name__} is quantised: the sum would be "
                "rounded, and part of the LoRA lost. Keep it unmerged"
            )

    def unmerge(self) -> None:
        raise ValueError("a LoRA that was merged stays so: load the compressed model again")


class LoraRank(_Lora):
    """LoRA on a rank adapter, or on one of the linears that share ranks."""

    def _merge(self, down: Tensor, up: Tensor) -> None:
        owner, index = _owner_of(self.get_base_layer())
        full, wanted = min(owner.in_features, sum(owner.widths)), owner.B.shape[0] + down.shape[0]
        if wanted > full:
            raise ValueError(
                f"merging needs {wanted} ranks of a layer that has at most {full}: keep this LoRA unmerged, "
                "or compress to fewer ranks"
            )
        rows = owner.rows.new_zeros(down.shape[0], sum(owner.widths))
        rows.split(owner.widths, 1)[index].copy_(up.T)
        owner.B = _grown(owner.B, down)
        owner.rows = _grown(owner.rows, rows)
        owner.threshold = torch.cat([owner.threshold, owner.threshold.new_zeros(len(down))])


class LoraNeuron(_Lora):
    """LoRA on a neuron adapter, or on one of the linears that share its mask. It reads the masked input."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs or args:
            raise ValueError(f"LoRA on a neuron adapter takes an input alone, it was given {args or kwargs}")
        base: Any = self.get_base_layer()
        owner, _ = _owner_of(base)
        result = base(x)
        if self.disable_adapters or self.merged:
            return result
        x = torch.where(owner.masks(x)[""], x, 0)
        for name in self.active_adapters:
            if name in self.lora_A:
                down, up = self.lora_A[name], self.lora_B[name]
                z = self.lora_dropout[name](self._cast_input_dtype(x, down.weight.dtype))
                result = result + up(down(z)) * self.scaling[name]
        return result.to(x.dtype)

    def _merge(self, down: Tensor, up: Tensor) -> None:
        owner, index = _owner_of(self.get_base_layer())  # its norms, and so its masks, stay the same
        rows = owner.rows.detach().clone()
        rows.split(owner.widths, 1)[index].add_((up @ down).T.to(rows.dtype))
        owner.rows = nn.Parameter(rows, owner.rows.requires_grad)


def _owner_of(base: Any) -> tuple[Any, int]:
    """Return the adapter that holds the rows of a linear, and the number of the linear among its outputs."""
    return (base.owner, base.index + 1) if isinstance(base, RanaReceiver) else (base, 0)


def _lora_of_receiver(target: Any, *args: Any, **kwargs: Any) -> _Lora:
    """Build the LoRA of a receiver, by the kind of its adapter."""
    kind = LoraNeuron if isinstance(target.owner, RanaNeuronLinear) else LoraRank
    return kind(target, *args, **kwargs)


def _grown(weight: nn.Parameter, more: Tensor) -> nn.Parameter:
    """Return `weight` with the rows `more` appended."""
    return nn.Parameter(torch.cat([weight.detach(), more.to(weight.dtype)]), weight.requires_grad)
