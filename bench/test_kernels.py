"""The same cases for pytest-benchmark: `pytest bench --benchmark-group-by=param:case`."""

import pytest
import torch

from bench.kernels import DECODE, PREFILL, Case

NAMES = ("dense", "static low rank", "masked in torch", "parts", "rana")


@pytest.mark.parametrize("contender", NAMES)
@pytest.mark.parametrize("case", [*DECODE, *PREFILL], ids=lambda case: case.name)
def test_kernel(benchmark, case: Case, contender: str) -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        calls = case.contenders().calls
        if contender not in calls:
            pytest.skip(f"{case.name} has no {contender}")
        result = benchmark.pedantic(calls[contender], rounds=11, warmup_rounds=2)
    assert result.isfinite().all() and result.abs().sum() > 0
