"""Small random models of every architecture: what the tests build, and the table of docs/models.md."""

from dataclasses import dataclass, field
from typing import Any

import transformers
from torch import nn

SIZES = {
    "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "tie_word_embeddings": True,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# what these configs call the same sizes, or do not have
_GPT_NEOX = {"num_key_value_heads": None, "head_dim": None}
_OPT = {"intermediate_size": "ffn_dim", "num_key_value_heads": None, "head_dim": None}
_GPT2 = {
    "hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head", "num_key_value_heads": None, "head_dim": None,
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A line of the table: `models` that have the architecture, and `note`, what is special about it."""

    models: str
    note: str
    name: str
    config: str = ""
    renamed: dict[str, str | None] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def build(self, **sizes) -> nn.Module:
        """A random one, of `SIZES` but for those given."""
        wanted = {self.renamed.get(key, key): value for key, value in {**SIZES, **sizes}.items()}
        wanted.pop(None, None)
        config = getattr(transformers, f"{self.config or self.name}Config")(**{**self.extra, **wanted})
        return transformers.AutoModelForCausalLM.from_config(config)


_GATED = "q/k/v together; MLP in one op"
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "Llama": Model("Llama, SmolLM, Yi", _GATED, "Llama"),
    "Mistral": Model("Mistral", _GATED, "Mistral"),
    "Qwen2": Model("Qwen2, Qwen2.5", f"{_GATED}; biases", "Qwen2"),
    "Qwen3": Model("Qwen3", _GATED, "Qwen3"),
    "Gemma": Model("Gemma", _GATED, "Gemma"),
    "Gemma2": Model("Gemma 2", _GATED, "Gemma2"),
    "Gemma3": Model("Gemma 3 (text)", _GATED, "Gemma3", "Gemma3Text"),
    "Phi3": Model(
        "Phi-3, Phi-4", "fused qkv; fused gate/up share their ranks; MLP in one op", "Phi3",
        extra={"partial_rotary_factor": 1.0},
    ),
    "GPTNeoX": Model(
        "GPT-NeoX, Pythia", "fused qkv; ungated MLP in one op; biases", "GPTNeoX", renamed=_GPT_NEOX
    ),
    "OPT": Model(
        "OPT", "q/k/v together; fc1, fc2 one by one; biases", "OPT", renamed=_OPT,
        extra={"word_embed_proj_dim": 64},
    ),
    "GPT2": Model("GPT-2", "fused qkv; ungated MLP in one op; biases", "GPT2", renamed=_GPT2),
    "Mixtral": Model("Mixtral", "attention only: the experts stay dense", "Mixtral", extra=_EXPERTS),
    "Qwen3Moe": Model(
        "Qwen3-MoE", "attention, and the MLP of layers without experts: experts stay dense", "Qwen3Moe",
        extra={
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [1],
        },
    ),
}  # fmt: skip


def table() -> str:
    """Return the table of docs/models.md."""
    lines = ["| Models | `model_type` | What is adapted, and how |", "| --- | --- | --- |"]
    for model in MODELS.values():
        config = getattr(transformers, f"{model.config or model.name}Config")
        lines.append(f"| {model.models} | `{config.model_type}` | {model.note} |")
    return "\n".join(lines)
