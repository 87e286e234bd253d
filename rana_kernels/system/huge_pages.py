"""Weights on huge pages. The kept rows are scattered, and with pages of 4 KB each costs a page-table walk.

Most weights in few bits are smaller than a huge page, so `use_huge_pages` lays the weights of a model side by
side. Linux also moves memory that is in use into huge pages (madvise with MADV_COLLAPSE, from 6.1 on). The
contents stay the same, so a request that fails is silently ignored.
"""

import ctypes
import mmap
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

MADV_COLLAPSE = 25  # of linux/mman.h
LINE = 64  # bytes of a line of the caches, where each weight begins
TOGETHER = 64 * 2**20  # about so many bytes are moved at a time, and freed when none of their weights is used
_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")


def use_huge_pages(model: nn.Module) -> int:
    """Move the CPU weights of `model` to huge pages, and return how many bytes lie there now.

    They lie side by side, in the order of the modules. Parameters and buffers stay the objects that they are;
    a view of their former memory no longer follows them. Tensors that share memory with others stay.
    This takes about half a second a gigabyte, and briefly needs 64 MiB more and the bytes of the largest
    weight once more.
    """
    size = _size()
    if size is None:
        return 0
    moved = 0
    for group in _groups(_own(_weights(model))):
        if sum(map(_room, group)) >= size:
            with suppress(OSError):  # no memory can be had: they stay where they are
                moved += _move(group, size)
    return moved


def collapse(tensors: Iterable[Tensor]) -> int:
    """Ask for huge pages for contiguous tensors where they lie, and return how many bytes have them now."""
    size, moved = _size(), 0
    if size is None:
        return 0
    on_cpu = (t for t in tensors if t.device.type == "cpu")
    for begin, end in {(t.data_ptr(), t.data_ptr() + t.nbytes) for t in on_cpu}:
        first, last = -(-begin // size) * size, end // size * size
        if first < last and _advise(first, last - first):
            moved += last - first
    return moved


def available() -> bool:
    """Try whether this machine gives huge pages."""
    size = _size()
    return size is not None and collapse([torch.zeros(2 * size, dtype=torch.uint8)]) > 0


def _size() -> int | None:
    """Return the bytes of a huge page, or None where there are none."""
    return int(_SIZE.read_text()) if sys.platform == "linux" and _SIZE.exists() else None


def _weights(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            yield from (tensor for tensor in held.values() if tensor is not None)


def _own(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return those that are plain, on the CPU, and alone in their memory, each once."""
    different = {id(t): t for t in tensors if type(t.data) is Tensor and t.device.type == "cpu"}
    at: dict[int, list[Tensor]] = {}
    for tensor in different.values():
        at.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    alone = (found[0] for found in at.values() if len(found) == 1)
    return [
        t for t in alone
        if t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes > 0 and not t.is_inference()
    ]  # fmt: skip


def _groups(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    group: list[Tensor] = []
    together = 0
    for tensor in tensors:
        group.append(tensor)
        together += _room(tensor)
        if together >= TOGETHER:
            yield group
            group, together = [], 0
    yield group


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // LINE) * LINE


@torch.no_grad()
def _move(group: list[Tensor], size: int) -> int:
    """Move tensors to new memory that begins at a huge page, and return how many bytes have huge pages."""
    length = -(-sum(map(_room, group)) // size) * size
    memory = mmap.mmap(-1, length + size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    begin = torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()
    offset = first = -begin % size
    for tensor in group:
        place = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        tensor.data = place.view(tensor.shape).copy_(tensor)
        offset += _room(tensor)
    return length if _advise(begin + first, length) else 0


def _advise(address: int, length: int) -> bool:
    """Ask Linux to move these bytes to huge pages, and return whether it did."""
    status = ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), MADV_COLLAPSE)
    return status == 0
