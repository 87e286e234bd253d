"""vLLM's models on the CPU, without its engine: the published wheel has no CPU kernels, attention among them.

`python -m tests.stacks.vllm_on_cpu DIR RANK PROCESSES PORT OUT` is one process of several that share a model;
it writes logits to OUT.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")  # before vLLM is imported: it looks for a card
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader import get_model

from tests.test_compress import tokens


def attend(layer: Attention, query: Tensor, key: Tensor, value: Tensor, *_, **__) -> Tensor:
    """What `Attention` computes for one prompt."""
    q, k, v = (x.view(1, len(x), -1, layer.head_size).transpose(1, 2) for x in (query, key, value))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=layer.impl.scale, enable_gqa=True)
    return y.transpose(1, 2).reshape(len(query), -1)


class Loaded:
    """A checkpoint in vLLM's own model; `rank` of `processes` that share it.

    The first one made decides the processes of all that follow.
    """

    def __init__(
        self, place: Path, rank: int = 0, processes: int = 1, port: int = 0, dtype: str = "float32"
    ) -> None:
        self.config = engine_config(place, processes, dtype)
        torch.accelerator.empty_cache = lambda: None  # called after loading, and raises where no card is
        Attention.forward = attend
        with set_current_vllm_config(self.config):
            if not torch.distributed.is_initialized():
                address = f"tcp://127.0.0.1:{port}"
                init_distributed_environment(processes, rank, address, local_rank=rank, backend="gloo")
                initialize_model_parallel(processes)
            self.model = get_model(vllm_config=self.config).eval()

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor | None:
        """[batch, T] -> [batch, T, vocabulary], or None in all processes but the first."""
        with set_current_vllm_config(self.config), set_forward_context(None, self.config):
            rows = [self.model.compute_logits(self.model(row, torch.arange(len(row)))) for row in ids]
        return None if rows[0] is None else torch.stack(rows)


def engine_config(place: Path, processes: int = 1, dtype: str = "float32") -> VllmConfig:
    """As the engine makes it of its arguments: plugins are found, the method by the checkpoint's config."""
    arguments = EngineArgs(
        model=str(place),
        dtype=dtype,
        max_model_len=64,
        enforce_eager=True,
        tensor_parallel_size=processes,
        compilation_config={"custom_ops": ["none"]},  # norms, rotations and activations in plain PyTorch
    )
    return arguments.create_engine_config()


if __name__ == "__main__":
    place, rank, processes, port, out = sys.argv[1:]
    torch.set_num_threads(1)
    logits = Loaded(Path(place), int(rank), int(processes), int(port)).logits(tokens(2, 24))
    if logits is not None:
        save_file({"logits": logits}, out)
