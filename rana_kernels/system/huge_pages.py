"""Weights on huge pages. Masked rows lie scattered, and on pages of 4 KB each costs a walk of the page table.

Linux gathers pages that are in use into huge ones on request (madvise with MADV_COLLAPSE, from 6.1 on). It
moves memory and changes none, so where it does not, nothing is said.
"""

import ctypes
import sys
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from torch import Tensor, nn

MADV_COLLAPSE = 25  # of linux/mman.h
_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")


def use_huge_pages(model: nn.Module) -> int:
    """Ask for huge pages under the CPU weights of `model`; gives the bytes that have them now.

    Takes about half a second a gigabyte, and for a moment one huge page of memory.
    """
    return collapse(chain(model.parameters(), model.buffers()))


def collapse(tensors: Iterable[Tensor]) -> int:
    """The same for tensors, which are contiguous. Tied ones count once."""
    if sys.platform != "linux" or not _SIZE.exists():
        return 0
    size, moved = int(_SIZE.read_text()), 0
    here = (t for t in tensors if t.device.type == "cpu")
    for begin, end in {(t.data_ptr(), t.data_ptr() + t.nbytes) for t in here}:
        first, last = -(-begin // size) * size, end // size * size
        if first < last and _advise(first, last - first):
            moved += last - first
    return moved


def _advise(address: int, length: int) -> bool:
    found = ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), MADV_COLLAPSE)
    return found == 0
