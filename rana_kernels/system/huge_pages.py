"""Weights on huge pages. The kept rows are scattered, and with pages of 4 KB each costs a page-table walk.

On request, Linux moves pages that are in use into huge ones (madvise with MADV_COLLAPSE, from 6.1 on). The
contents stay the same, so a request that fails is silently ignored.
"""

import ctypes
import sys
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

MADV_COLLAPSE = 25  # of linux/mman.h
_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")


def use_huge_pages(model: nn.Module) -> int:
    """Ask for huge pages for the CPU weights of `model`, and return how many bytes have them now.

    This takes about half a second a gigabyte, and briefly needs one more huge page of memory.
    """
    return collapse(chain(model.parameters(), model.buffers()))


def collapse(tensors: Iterable[Tensor]) -> int:
    """Do the same for contiguous tensors. Tensors that share memory count once."""
    if sys.platform != "linux" or not _SIZE.exists():
        return 0
    size, moved = int(_SIZE.read_text()), 0
    on_cpu = (t for t in tensors if t.device.type == "cpu")
    for begin, end in {(t.data_ptr(), t.data_ptr() + t.nbytes) for t in on_cpu}:
        first, last = -(-begin // size) * size, end // size * size
        if first < last and _advise(first, last - first):
            moved += last - first
    return moved


def available() -> bool:
    """Try whether this machine gives huge pages."""
    if sys.platform != "linux" or not _SIZE.exists():
        return False
    return collapse([torch.zeros(2 * int(_SIZE.read_text()), dtype=torch.uint8)]) > 0


def _advise(address: int, length: int) -> bool:
    """Ask Linux to move these bytes to huge pages, and return whether it did."""
    status = ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), MADV_COLLAPSE)
    return status == 0
