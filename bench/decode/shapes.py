"""Dense models of known shapes with random weights: what a token costs does not depend on their values."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bench.models import MODELS


def _llama(name: str, head: int, vocabulary: int, tied: bool) -> LlamaConfig:
    """`head`: features of an attention head. Positions: more than is benchmarked."""
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
    """A model of that configuration, as transformers initialises it."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
