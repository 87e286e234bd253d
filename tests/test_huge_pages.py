"""Huge pages under weights: asked for, had, and nothing else changed."""

import platform
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from rana_kernels.system.huge_pages import use_huge_pages

LINUX = platform.system() == "Linux"
VERSION = tuple(map(int, re.findall(r"\d+", platform.release())[:2])) if LINUX else (0, 0)


def huge_bytes() -> int:
    """Of this process, as the kernel counts them."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("AnonHugePages")).split()[1])


@pytest.mark.skipif(VERSION < (6, 1), reason="MADV_COLLAPSE came with Linux 6.1")
def test_weights_move_to_huge_pages_and_keep_their_bits():
    model = nn.Linear(4096, 4096, bias=False)  # 64 MiB
    before, bits = huge_bytes(), model.weight.detach().clone()
    place = model.weight.data_ptr()
    moved = use_huge_pages(model)
    if moved == 0:
        pytest.skip("this kernel gives none")
    assert moved >= 60 * 2**20 and huge_bytes() - before >= moved // 2
    assert model.weight.data_ptr() == place and torch.equal(model.weight, bits)


def test_weights_that_are_tied_count_once_and_small_ones_not():
    model = nn.ModuleList([nn.Linear(2048, 2048, bias=False) for _ in range(2)])
    model[1].weight = model[0].weight
    assert use_huge_pages(model) <= model[0].weight.nbytes
    assert use_huge_pages(nn.Linear(16, 16)) == 0
    with torch.device("meta"):
        assert use_huge_pages(nn.Linear(4096, 4096)) == 0
