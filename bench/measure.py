"""Cases measured: what becomes a row of the results."""

import statistics
from collections.abc import Iterable, Iterator
from functools import cache

import torch

from bench.baselines import DTYPES
from bench.kernels import Case
from bench.report import Row
from bench.timing import Round, interleave, once, using
from rana_kernels import use_backend

PEAK_SIZE = 1536  # of square matrices whose product shows what the processor can compute


def measure(cases: Iterable[Case], backends: list[str], threads: list[int], rounds: int) -> Iterator[Row]:
    """One row a case, backend and number of threads.

    `x dense` and its neighbours: how many times as fast as that baseline ours is; `% of stream`: the weight
    bytes that ours must read, over its time, against the best streaming loop timed in the same rounds.
    """
    for case in cases:
        torch.manual_seed(0)
        contenders = case.contenders()
        for backend in backends:
            with use_backend(backend), torch.inference_mode():
                error = contenders.error()
                for count in threads:
                    found = interleave(contenders.calls, count, rounds)
                    facts = {"case": case.name, "keep": round(case.keep, 3), "backend": backend}
                    yield (
                        facts
                        | row(count, found, contenders.bytes, contenders.flops)
                        | {
                            "error": f"{error:.1e}",
                            "peak GFLOP/s": round(peak(case.dtype, count), 1),
                        }
                    )


def row(threads: int, found: Round, weight_bytes: float, flops: float) -> Row:
    ours = found.times["rana"]
    gigabytes = weight_bytes / ours.median / 1e3
    ratios = {f"x {name}": t.median / ours.median for name, t in found.times.items() if name != "rana"}
    return {
        "threads": threads,
        "us": round(ours.median, 1),
        "p20": round(ours.p20, 1),
        "p80": round(ours.p80, 1),
        **{name: round(ratio, 2) for name, ratio in ratios.items()},
        "GB/s": round(gigabytes, 2),
        "stream GB/s": round(found.stream, 1),
        "% of stream": round(100 * gigabytes / found.stream),
        "GFLOP/s": round(flops / ours.median / 1e3, 1),
    }


@cache
def peak(dtype: str, threads: int) -> float:
    """GFLOP/s of torch's product of two square matrices, the median of a few."""
    a = torch.randn(PEAK_SIZE, PEAK_SIZE).to(DTYPES[dtype])
    with using(threads):
        seconds = [once(lambda: a @ a, threads, 1) for _ in range(6)][1:]
    return 2 * PEAK_SIZE**3 / statistics.median(seconds) / 1e9
