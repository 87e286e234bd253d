"""The streaming bandwidth of this machine's memory, GB/s, by loops compiled for it."""

import ctypes
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from rana_kernels.system.cpu import clock, cold_bytes
from rana_kernels.system.huge_pages import collapse

LOOPS = ("stream_read", "stream_dot", "stream_axpy")


@cache
def _library() -> ctypes.CDLL:
    target = Path(tempfile.mkdtemp(prefix="rana-stream-")) / "stream.so"
    source = Path(__file__).with_name("stream.cpp")
    compiler = os.environ.get("CXX", "c++")
    flags = ["-O3", "-march=native", "-shared", "-fPIC", "-Wno-psabi"]
    subprocess.run([compiler, *flags, "-o", target, source], check=True)
    library = ctypes.CDLL(str(target))
    for name in LOOPS:
        getattr(library, name).argtypes = [ctypes.c_void_p, ctypes.c_int64]
        getattr(library, name).restype = ctypes.c_float
    return library


@cache
def _buffer() -> torch.Tensor:
    buffer = torch.zeros(cold_bytes() // 4, dtype=torch.int32)
    collapse([buffer])  # as weights lie
    return buffer


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count)


def bandwidth(loop: str, threads: int) -> float:
    """GB/s of one pass of `loop` over the buffer, one contiguous share a thread."""
    function, words, now = getattr(_library(), loop), _buffer().numel(), clock(threads)
    share = words // threads
    starts = [_buffer().data_ptr() + 4 * share * i for i in range(threads)]
    over = map if threads == 1 else _threads(threads).map
    begin = now()
    list(over(lambda start: function(start, share), starts))
    return _buffer().nbytes / (now() - begin) / 1e9
