"""The search for the fastest configurations on this GPU, for the calls that a model makes.

The model runs once for each number of tokens, and its op calls are recorded with their arguments: real
weights, thresholds and masks. Layers of the same sizes give several calls of one problem. A measurement
makes all of them in turn, which keeps their weights out of the cache, as in the model.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.errors import TritonError
from triton.testing import do_bench_cudagraph

from rana_kernels.backends.triton import configurations
from rana_kernels.backends.triton.weights import MOST_TOKENS
from rana_kernels.system.files import write_whole
from rana_kernels.system.progress import track

Call = tuple[str, tuple]  # an op's name and its arguments


class Choice(NamedTuple):
    """The best configuration of one problem.

    microseconds   a call takes with it
    rule           microseconds that a call takes with the configuration of the rule
    """

    configuration: configurations.Decode | configurations.Prefill
    microseconds: float
    rule: float


class _Recorder(TorchDispatchMode):
    """Records the calls of the package's ops, but not those whose quantised weights are dequantised first.

    That takes longer than any configuration could save.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "rana":
            op = func._schema.name.split("::")[1]
            if _tokens(args) <= MOST_TOKENS or not configurations.quantized(*_weights(op, args)):
                self.calls.append((op, args))
        return func(*args, **(kwargs or {}))


def _tokens(args: tuple) -> int:
    """Return the number of tokens of a call's input."""
    return args[0].numel() // args[0].shape[-1]


def _weights(op: str, args: tuple) -> list[Tensor]:
    """Return the weights among the arguments of a call, in the order of the op's schema."""
    names = [a.name for a in getattr(torch.ops.rana, op).default._schema.arguments]
    named = zip(names, args, strict=False)  # arguments that have their defaults are left out
    return [t for n, t in named if t is not None and (n in ("weight", "B") or n.endswith("rows"))]


def record(model: nn.Module, input_ids: Tensor) -> dict[str, list[Call]]:
    """Return the op calls of one forward pass over input_ids [1, M], by the key of their configuration."""
    with torch.inference_mode(), _Recorder() as recorder:
        model(input_ids=input_ids, use_cache=False)
    found: dict[str, list[Call]] = {}
    for op, args in recorder.calls:
        key = configurations.key(op, _tokens(args), args[0].dtype, *_weights(op, args))
        found.setdefault(key, []).append((op, args))
    return found


def microseconds(calls: list[Call]) -> float:
    """Return the median microseconds of a call, measured in a CUDA graph that makes all of them."""
    functions = [
        (getattr(import_module(f"rana_kernels.backends.triton.{op}"), op), args) for op, args in calls
    ]

    def call_all() -> None:
        for function, args in functions:
            function(*args)

    return 1e3 * do_bench_cudagraph(call_all, rep=20, return_mode="median") / len(calls)


@torch.inference_mode()
def tune(
    model: nn.Module,
    input_ids: Tensor,
    tokens: Iterable[int],
    *,
    time: Callable[[list[Call]], float] = microseconds,
    progress: bool = True,
) -> dict[str, Choice]:
    """Measure every candidate for every problem of `model` on input_ids [1, T], and return {key: choice}.

    tokens     numbers of tokens that a step may have, each at most T
    time       measures the microseconds of a call
    progress   show a progress bar
    """
    problems = {key: calls for M in tokens for key, calls in record(model, input_ids[:, :M]).items()}
    return {key: _best(key, calls, time) for key, calls in track(problems.items(), "tuning", progress)}


def _best(key: str, calls: list[Call], time: Callable[[list[Call]], float]) -> Choice:
    op, args = calls[0]
    quantized = configurations.quantized(*_weights(op, args))
    measured: dict[configurations.Decode | configurations.Prefill, float] = {}
    for candidate in configurations.candidates(_tokens(args), args[0].dtype, quantized):
        with configurations.trying(key, candidate):
            # a GPU may lack the registers or the shared memory for a candidate, which then is no choice
            try:
                measured[candidate] = time(calls)
            except (RuntimeError, TritonError):
                if not measured:
                    raise  # the first candidate is the rule's own, which must run everywhere
    best = min(measured, key=lambda candidate: measured[candidate])
    return Choice(best, measured[best], next(iter(measured.values())))


def write(path: Path, gpu_name: str, choices: dict[str, Choice]) -> None:
    """Add the choices to the table of a GPU. The file is replaced in one step."""
    before = configurations.read(path) if path.exists() else {}
    table: dict[str, Any] = {
        "card": gpu_name,
        "torch": torch.__version__,
        "triton": version("triton"),
        "configurations": {**before, **{key: asdict(c.configuration) for key, c in choices.items()}},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda part: part.write_text(json.dumps(table, indent=1) + "\n"))
    configurations.tables.cache_clear()
