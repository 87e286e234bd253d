"""GGUF files of a Llama for llama.cpp, written from the weights that every other contender has."""

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

BYTE_TOKENS = 256


def write_gguf(model: PreTrainedModel, path: Path, kind: str) -> None:
    """Write `model` with its matrices, the embedding included, in one kind of GGUF: BF16, Q8_0 or Q4_0.

    Prompts have to be token ids: the texts of the tokens are numbers.
    """
    writer = gguf.GGUFWriter(str(path), "llama")
    write_sizes(writer, model.config)
    _write_tokens(writer, model.config.vocab_size)
    known = gguf.GGMLQuantizationType[kind]
    for name, weight in tensors(model):
        values = weight.float().numpy()
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, known), raw_dtype=known)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def round_like(model: nn.Module, kind: str) -> None:
    """Round all matrices of `model` in place to what a file of this kind holds."""
    known = gguf.GGMLQuantizationType[kind]
    for weight in model.parameters():
        if weight.dim() == 2:
            stored = gguf.quants.quantize(weight.float().numpy(), known)
            weight.copy_(torch.from_numpy(np.array(gguf.quants.dequantize(stored, known))))


def matrix_bytes(path: Path) -> int:
    """Return the bytes of the matrices in a file. Where lm_head is tied, a token reads all of them."""
    return sum(int(t.n_bytes) for t in gguf.GGUFReader(path).tensors if len(t.shape) > 1)


def write_sizes(writer: gguf.GGUFWriter, config: LlamaConfig) -> None:
    """Write the sizes of a Llama."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a Llama by their names in GGUF. A tied lm_head is left out, as it has to be."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = _neighbours(weight, model.config.head_dim)
        yield names.get_name(name, try_suffixes=(".weight",)), weight


def _write_tokens(writer: gguf.GGUFWriter, size: int) -> None:
    """Write a vocabulary of so many tokens, whose texts are numbers."""
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    bytes_ = [f"<0x{i:02X}>" for i in range(BYTE_TOKENS)]
    texts = ["<unk>", "<s>", "</s>", *bytes_, *(f"t{i}" for i in range(size))]
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * BYTE_TOKENS, *[kinds.NORMAL] * size]
    writer.add_token_list(texts[:size])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([int(kind) for kind in types[:size]])


def _neighbours(weight: Tensor, D: int) -> Tensor:
    """Reorder the rows of each head: llama.cpp turns neighbouring pairs, transformers halves."""
    heads = weight.view(-1, 2, D // 2, weight.shape[1])
    return heads.transpose(1, 2).reshape(weight.shape)
