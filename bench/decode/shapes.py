"""Dense models of known shapes with random weights: what a token costs does not depend on their values."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

SHAPES = {
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "llama-2-7b": LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096,
    ),
}  # fmt: skip


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
