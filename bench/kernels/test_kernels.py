"""The published cases for pytest-benchmark: `pytest bench --benchmark-group-by=param:case`.

`--benchmark-autosave` stores a baseline, and `--benchmark-compare` shows a later run beside it. These are
plain times. `python -m bench --check` compares ratios, and fails if a kernel is slower.
"""

from functools import lru_cache

import pytest
import torch

from bench.kernels.case import Case, Contenders
from bench.kernels.cases import PUBLISHED

NAMES = (
    "dense", "dense compiled", "dense packed", "static low rank", "static packed", "masked in torch", "parts",
    "rana",
)  # fmt: skip


@lru_cache(maxsize=1)
def contenders(case: Case) -> Contenders:
    """Make the weights of a case once: its contenders follow one another."""
    torch.manual_seed(0)
    return case.contenders()


@pytest.mark.parametrize("contender", NAMES)
@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: case.name)
def test_kernel(benchmark, case: Case, contender: str) -> None:
    with torch.inference_mode():
        calls = contenders(case).calls
        if contender not in calls:
            pytest.skip(f"{case.name} has no {contender}")
        result = benchmark.pedantic(calls[contender], rounds=11, warmup_rounds=2)
    assert result.isfinite().all() and result.abs().sum() > 0
