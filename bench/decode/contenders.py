"""The models that take turns, all made from one dense model and sharing what they do not replace.

dense          the model as transformers runs it
dense, ours    the same weights, every linear served by `rana::linear`: what of a gain is not RaNA's
static         plain low rank at the cost of `rana`, through the same ops
rana           masked ranks and neurons
"""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import rana_kernels as rana
from bench.decode.random_adapters import LIVE_SHARE, adapt
from rana_kernels.nn.dense import serve_dense
from rana_kernels.system.huge_pages import use_huge_pages

NAMES = ("dense", "dense, ours", "static", "rana")


def from_random(dense: PreTrainedModel, keep: float) -> dict[str, PreTrainedModel]:
    """All contenders of a model with random weights; `keep` is over all linears of the blocks."""
    static, masked = twin(dense), twin(dense)
    adapt(static, keep, live_share=1.0)
    adapt(masked, keep, live_share=LIVE_SHARE)
    return _named(dense, static, masked)


def from_directory(
    folder: Path, calibration: Tensor, keep: float, dtype: torch.dtype, device: str
) -> dict[str, PreTrainedModel]:
    """All contenders of a trained model, compressed on calibration [n, T]."""
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
    static, masked = twin(dense), twin(dense)
    for model, method in ((static, "static"), (masked, "global")):
        rana.compress(model, calibration.split(8), flops_reduction=1 - keep, method=method)
    return _named(dense, static, masked)


def _named(*made: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """Dense, static and masked; all on huge pages, as `compress` and `load` leave the last two."""
    dense, static, masked = made
    for model in made:
        use_huge_pages(model)
    return dict(zip(NAMES, (dense, _served(dense), static, masked), strict=True))


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own with the same parameters, not copies of them."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def _served(dense: PreTrainedModel) -> PreTrainedModel:
    model = twin(dense)
    serve_dense(model, [name for name, module in model.named_modules() if type(module) is nn.Linear])
    return model
