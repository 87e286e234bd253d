"""Share a compressed model between processes. Each holds and reads its part of every layer.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py build/compressed

Each process takes a card, or runs on the CPU without cards. This needs accelerate.
"""

import argparse

import torch
from torch import distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

import rana_kernels  # noqa: F401  (before from_pretrained: it registers the format)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("directory", help="a directory that rana.save wrote")
    arguments.add_argument("--prompt", default="import os\nimport sys\n\ndef read_lines(path):")
    arguments.add_argument("--tokens", type=int, default=32)
    asked = arguments.parse_args()

    model = AutoModelForCausalLM.from_pretrained(
        asked.directory, distributed_config=DistributedConfig(tp_plan="auto")
    )
    tokenizer = AutoTokenizer.from_pretrained(asked.directory)
    prompt = tokenizer(asked.prompt, return_tensors="pt").to(model.device)
    with torch.no_grad():
        written = model.generate(**prompt, max_new_tokens=asked.tokens, do_sample=False)
    if dist.get_rank() == 0:
        print(tokenizer.decode(written[0]))
        print(f"{bytes_held(model) / 1e6:.1f} MB in each of {dist.get_world_size()} processes")
    dist.destroy_process_group()


def bytes_held(model: torch.nn.Module) -> int:
    """Return the bytes of parameters and buffers in this process. Of a DTensor only its own part counts."""
    tensors = {*model.parameters(), *model.buffers()}
    return sum(t.to_local().nbytes if hasattr(t, "to_local") else t.nbytes for t in tensors)


if __name__ == "__main__":
    main()
