"""`resize_token_embeddings` of compressed models: refused where lm_head has bits or a mask of its own.

transformers would resize the embedding, then fail at an lm_head without a plain weight, and leave a model of
two vocabularies.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from rana_kernels.nn.base import AdapterModule


def _refusing(resize: Callable[..., Any]) -> Callable[..., Any]:
    """Return `resize_token_embeddings`, which refuses a model whose lm_head is an adapter."""

    @wraps(resize)
    def refuse_or_resize(self, new_num_tokens: int | None = None, *arguments: Any, **options: Any):
        head = self.get_output_embeddings()
        if new_num_tokens is not None and isinstance(head, AdapterModule):
            raise ValueError(
                f"lm_head is a {type(head).__name__}, wanted a plain linear to resize its vocabulary: resize "
                "the original model and compress it again, or compress it with lm_head_bits=16"
            )
        return resize(self, new_num_tokens, *arguments, **options)

    return refuse_or_resize


PreTrainedModel.resize_token_embeddings = _refusing(  # type: ignore[method-assign]
    PreTrainedModel.resize_token_embeddings
)
