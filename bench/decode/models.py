"""The models that take turns: all are made from one dense model, and share what they do not replace.

dense          the model as transformers runs it
dense, ours    the same weights with every linear served by `rana::linear`, which shows what RaNA does not
               gain
static         plain low rank at the cost of `rana`, through the same ops
rana           masked ranks and neurons
"""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import rana_kernels as rana
from bench.decode.random_adapters import LIVE_SHARE, adapt
from bench.kernels.cases import MODELS
from rana_kernels.nn.dense import serve_dense
from rana_kernels.system.huge_pages import use_huge_pages

NAMES = ("dense", "dense, ours", "static", "rana")


def _llama(name: str, head: int, vocabulary: int, tied: bool) -> LlamaConfig:
    """Return a configuration with `head` features an attention head, and more positions than we use."""
    shape = MODELS[name]
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=shape.hidden, intermediate_size=shape.neurons,
        num_hidden_layers=shape.blocks, num_attention_heads=shape.queries // head,
        num_key_value_heads=shape.keys // head, head_dim=head, max_position_embeddings=4096,
        tie_word_embeddings=tied,
    )  # fmt: skip


SHAPES = {
    "Llama-3.2-1B": _llama("Llama-3.2-1B", head=64, vocabulary=128256, tied=True),
    "Llama-2-7B": _llama("Llama-2-7B", head=128, vocabulary=32000, tied=False),
}


def random_model(config: LlamaConfig, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Return a dense model with random weights. The time of a token does not depend on their values."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def from_random(dense: PreTrainedModel, cost_ratio: float) -> dict[str, PreTrainedModel]:
    """Return all contenders of a random model. `cost_ratio` is that of all linears of the blocks."""
    static, masked = twin(dense), twin(dense)
    adapt(static, cost_ratio, live_share=1.0)
    adapt(masked, cost_ratio, live_share=LIVE_SHARE)
    return _named(dense, static, masked)


def from_directory(
    folder: Path, calibration: Tensor, cost_ratio: float, dtype: torch.dtype, device: str
) -> dict[str, PreTrainedModel]:
    """Return all contenders of a trained model, compressed on calibration [n, T]."""
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
    static, masked = twin(dense), twin(dense)
    for model, method in ((static, "static"), (masked, "global")):
        rana.compress(model, calibration.split(8), flops_reduction=1 - cost_ratio, method=method)
    return _named(dense, static, masked)


def _named(*made: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """Name the dense, static and masked model. All get the huge pages that compressed models have."""
    dense, static, masked = made
    for model in made:
        use_huge_pages(model)
    return dict(zip(NAMES, (dense, _served(dense), static, masked), strict=True))


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Return a second model with the same parameters, not copies of them."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def _served(dense: PreTrainedModel) -> PreTrainedModel:
    model = twin(dense)
    serve_dense(model, [name for name, module in model.named_modules() if type(module) is nn.Linear])
    return model
