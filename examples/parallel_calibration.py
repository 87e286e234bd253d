"""Calibrate a model in several processes, and compress it in the first. One process writes the same files.

    torchrun --nproc-per-node 2 examples/parallel_calibration.py MODEL TOKENS.safetensors OUTPUT

Each process holds the whole model, on a card of its own where there are cards.
"""

import argparse
import os

import torch
from safetensors.torch import load_file
from torch import distributed as dist
from transformers import AutoModelForCausalLM

import rana_kernels as rana


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("model", help="a directory, or a name on the hub")
    arguments.add_argument("tokens", help="a safetensors file of input_ids [rows, T]")
    arguments.add_argument("output")
    arguments.add_argument("--rows", type=int, help="read at most so many rows of text; default: all")
    arguments.add_argument("--method", default="global")
    arguments.add_argument("--flops-reduction", type=float, default=0.44)
    asked = arguments.parse_args()

    card = int(os.environ["LOCAL_RANK"]) if torch.cuda.is_available() else None
    device = torch.device("cpu" if card is None else f"cuda:{card}")
    dist.init_process_group("gloo" if card is None else "nccl", device_id=None if card is None else device)
    model = AutoModelForCausalLM.from_pretrained(asked.model).to(device)
    token_ids = load_file(asked.tokens)["input_ids"][: asked.rows]
    stats = rana.calibrate(model, token_ids.split(8), group=dist.group.WORLD)
    rank = dist.get_rank()
    dist.destroy_process_group()  # the other processes are done
    if rank == 0:
        rana.compress(model, stats=stats, flops_reduction=asked.flops_reduction, method=asked.method)
        rana.save(model, asked.output)


if __name__ == "__main__":
    main()
