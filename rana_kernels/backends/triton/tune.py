"""Which configuration is fastest on this card, for the calls that a model makes.

The model runs once for each number of tokens, and its op calls are kept with their arguments: real
weights, thresholds and masks. Layers that are alike make copies of one problem, and taking turns on
them keeps the weights out of the cache, as in the model.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.errors import TritonError
from triton.testing import do_bench_cudagraph

from rana_kernels.backends.triton import configurations

Call = tuple[str, tuple]  # an op's name and its arguments


class Choice(NamedTuple):
    """The best configuration of one problem, and the microseconds a call of it and of the rule's."""

    configuration: configurations.Decode | configurations.Prefill
    microseconds: float
    rule: float


class _Recorder(TorchDispatchMode):
    """Keeps the calls of the package's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "rana":
            self.calls.append((func._schema.name.split("::")[1], args))
        return func(*args, **(kwargs or {}))


def record(model: nn.Module, input_ids: Tensor) -> dict[str, list[Call]]:
    """The op calls of one forward pass over input_ids [1, M], by the key of their configuration."""
    with torch.inference_mode(), _Recorder() as recorder:
        model(input_ids=input_ids, use_cache=False)
    found: dict[str, list[Call]] = {}
    for op, args in recorder.calls:
        x, *others = args
        weights = configurations.size(*(t for t in others if isinstance(t, Tensor) and t.dim() == 2))
        key = configurations.key(op, x.numel() // x.shape[-1], weights, x.dtype)
        found.setdefault(key, []).append((op, args))
    return found


def microseconds(calls: list[Call]) -> float:
    """Median microseconds a call, in a CUDA graph that makes all of them."""
    functions = [
        (getattr(import_module(f"rana_kernels.backends.triton.{op}"), op), args) for op, args in calls
    ]

    def all_of_them() -> None:
        for function, args in functions:
            function(*args)

    return 1e3 * do_bench_cudagraph(all_of_them, rep=20, return_mode="median") / len(calls)


@torch.inference_mode()
def tune(
    model: nn.Module,
    input_ids: Tensor,
    tokens: Iterable[int],
    *,
    time: Callable[[list[Call]], float] = microseconds,
    progress: bool = True,
) -> dict[str, Choice]:
    """Measure every candidate for every problem that `model` has on input_ids [1, T]; {key: choice}.

    tokens    how many tokens a step may have, each at most T
    """
    problems = {key: calls for M in tokens for key, calls in record(model, input_ids[:, :M]).items()}
    return {
        key: _best(key, calls, time)
        for key, calls in track(problems.items(), "tuning", disable=not progress, transient=True)
    }


def _best(key: str, calls: list[Call], time: Callable[[list[Call]], float]) -> Choice:
    x = calls[0][1][0]
    measured: dict[configurations.Decode | configurations.Prefill, float] = {}
    for candidate in configurations.candidates(x.numel() // x.shape[-1], x.dtype):
        with configurations.trying(key, candidate):
            # a card may lack the registers or the shared memory for one: then it is no choice there
            try:
                measured[candidate] = time(calls)
            except (RuntimeError, TritonError):
                if not measured:
                    raise  # the rule's own, the first, must run
    best = min(measured, key=lambda candidate: measured[candidate])
    return Choice(best, measured[best], next(iter(measured.values())))


def write(path: Path, card: str, choices: dict[str, Choice]) -> None:
    """Add the choices to the table of a card, replaced in one step."""
    before = configurations.read(path) if path.exists() else {}
    table: dict[str, Any] = {
        "card": card,
        "torch": torch.__version__,
        "triton": version("triton"),
        "configurations": {**before, **{key: asdict(c.configuration) for key, c in choices.items()}},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(table, indent=1) + "\n")
    partial.replace(path)
    configurations.tables.cache_clear()
