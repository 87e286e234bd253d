"""Hugging Face transformers: its own `from_pretrained` and `save_pretrained` read and write our checkpoints.

For transformers, "rana" is a quantization method. transformers builds the model on the meta device, this
file puts our modules in place of the linears, and transformers loads the tensors.

This file is imported before the import of transformers has finished (see `__init__.py`). At module level it
may therefore use only modules that transformers' table of quantization methods imports too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rana_kernels.checkpoint.attachment import attached_plan, plan_from_config, plan_to_config, read_plan
from rana_kernels.checkpoint.budget import set_budget_of_environment
from rana_kernels.checkpoint.headers import CheckpointError, check_tensors
from rana_kernels.checkpoint.manifest import CARD, MANIFEST, read_manifest
from rana_kernels.checkpoint.model_card import write_card
from rana_kernels.checkpoint.replacement import replacing
from rana_kernels.integrations import hub  # noqa: F401  (what transformers uploads)
from rana_kernels.integrations.classes import class_of, find_class, is_foreign, stored_tensors
from rana_kernels.integrations.tensor_parallel.shares import SetAside, processes
from rana_kernels.model.admission import admit
from rana_kernels.model.install import install, plan_for
from rana_kernels.model.plan import Plan
from rana_kernels.model.quantized import QUANT_METHOD
from rana_kernels.nn.base import check_values
from rana_kernels.system.huge_pages import use_huge_pages

# what a program does to every model that it lets transformers load (`rana serve`)
after_loading: list[Callable[[Any], None]] = []


def save(model: nn.Module, directory: str | os.PathLike, tokenizer: Any = None) -> None:
    """Write a compressed model, its tokenizer if given, and a model card.

    `load` restores the same bits, and the directory can be uploaded as it is. An older checkpoint in
    `directory` is replaced once the new one is complete; an interruption leaves the older one as it was.
    `checkpoint/manifest.py` lists the files.

    Raises ValueError for a model that is not compressed or whose class transformers does not have, and
    FileExistsError if `directory` holds anything other than a checkpoint of this function.
    """
    model = admit(model, changes=False)
    plan = attached_plan(model)
    if plan is None or not isinstance(model, transformers.PreTrainedModel):
        raise ValueError(
            f"rana.save: {type(model).__name__} is not a compressed transformers model, "
            "wanted one that rana.compress changed or rana.load gave"
        )
    if find_class(type(model).__name__) is None:
        raise ValueError(
            f"rana.save: transformers has no class {type(model).__name__}, and rana.load would not find it: "
            "keep the plan and the state dict instead (docs/models.md)"
        )
    with replacing(directory) as new:
        model.save_pretrained(new)  # writes the manifest too (`saving.py`)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        (new / CARD).write_text(write_card(model), encoding="utf-8")


def load(
    directory: str | os.PathLike,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
) -> transformers.PreTrainedModel:
    """Check and read a checkpoint that `save` wrote. Return a model of the class that was saved, in
    evaluation mode.

    dtype    dtype of the weights; "auto": the dtype in the file. Thresholds and norms are always float32
    device   where to put the model; None: the CPU

    Raises CheckpointError (a ValueError) for a checkpoint that is damaged, incomplete or of another
    format. The message says what was found, what is wanted and what to do.
    """
    manifest = read_manifest(directory)
    # from_pretrained calls the quantizer, which verifies the weights before they are read
    manifest.verify(name for name in manifest.files if not name.endswith(".safetensors"))
    read_plan(directory)  # its error is clearer than one from inside transformers
    model = class_of(Path(directory)).from_pretrained(
        os.fspath(directory),
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    return model if device is None else model.to(device)  # type: ignore[arg-type]


@register_quantization_config(QUANT_METHOD)
class RanaConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json: the format, the Plan as JSON, and facts for the model card."""

    def __init__(
        self,
        plan: dict[str, Any] | None = None,
        format: int | None = None,
        made: dict[str, Any] | None = None,
        **_: object,
    ) -> None:
        self.quant_method: Any = QUANT_METHOD
        self.format, self.plan, self.made = format, plan, made


@register_quantizer(QUANT_METHOD)
class RanaQuantizer(HfQuantizer):
    """The hooks that `from_pretrained` calls. They accept `**_`, because versions differ in the arguments."""

    requires_calibration = True
    aside: SetAside | None = None  # the modules that are divided, if several processes share the model

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **_):
        plan = plan_from_config(self.quantization_config.to_dict())
        self.files = [Path(file) for file in checkpoint_files or ()]
        _check_files(model, plan, self.files)
        try:
            plan = plan_for(model, plan)
            install(model, plan)
        except ValueError as error:
            raise CheckpointError(
                f"config.json: the plan does not fit {type(model).__name__}: {error}"
            ) from None
        self.quantization_config.plan = plan_to_config(plan)["plan"]
        stored = stored_tensors(model, self.files)
        try:
            check_tensors(self.files, stored.tensors, stored.optional, stored.ignored)
        except CheckpointError as error:
            if not is_foreign(model):
                raise
            raise CheckpointError(
                f"{error}. The checkpoint is of {model.config.architectures}, and this is a "
                f"{type(model).__name__}: load it by rana_kernels.load"
            ) from None
        self.dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        if processes(model) > 1:
            self.aside = SetAside(model)
        return model

    def _process_model_after_weight_loading(self, model, **_):
        if self.aside:
            self.aside.put_back(model, self.files, next(model.parameters()).device)
        elif (getattr(model, "_tp_size", None) or 1) > 1:  # an older version tells its quantizers too late
            raise ImportError(
                f"transformers {transformers.__version__} has tp_plan, wanted 5.17 or later for it"
            )
        _convert(model, self.dtypes)
        # transformers places tensors itself, which bypasses the check of load_state_dict
        check_values(model)
        set_budget_of_environment(model)
        use_huge_pages(model)
        for act in after_loading:
            act(model)
        return model

    def is_serializable(self, **_) -> bool:
        if self.aside:
            raise ValueError("each process has a share of this model: to save it, load it without tp_plan")
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _convert(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Give every parameter the dtype in `dtypes`.

    In a quantized model, some versions of transformers (5.0, 5.17) leave a weight in the file's dtype if the
    file has another name for it (experts, lm_head of GPT-NeoX).
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtypes[name]:
            model.get_submodule(name.rpartition(".")[0]).to(dtypes[name])


def _check_files(model: transformers.PreTrainedModel, plan: Plan, files: list[Path]) -> None:
    """Raise CheckpointError if weights lie outside of the checkpoint or differ from its manifest, if any.

    They have to lie beside the config.json that the plan came from: in the directory given, in a subfolder of
    it, or in the cache of the hub.
    """
    if not files:
        return
    given, directory = Path(str(model.config.name_or_path)), files[0].parent
    home = given if given.is_dir() else directory
    outside = [file for file in files if file.parent != directory or not _is_within(file, home)]
    if outside or not _has_plan(directory, plan):
        where = (outside or files)[0]
        raise CheckpointError(f"{home} refers to weights outside of it, {where}: they are not read")
    if (directory / MANIFEST).is_file():
        manifest = read_manifest(directory)
        manifest.verify({*(file.name for file in files), *manifest.files})


def _is_within(file: Path, directory: Path) -> bool:
    return file.is_relative_to(directory) and ".." not in file.relative_to(directory).parts


def _has_plan(directory: Path, plan: Plan) -> bool:
    return (directory / "config.json").is_file() and read_plan(directory) == plan
