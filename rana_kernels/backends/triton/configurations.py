"""How a problem is cut up into programs and blocks: a table where one was measured, else a rule.

Nothing is tried out while a model runs. `rana tune` measures on a card and writes its table; none comes
with the package, because none was measured yet.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

_WIDTHS = (2048, 1024, 512, 256, 128, 64)
_MOST_SHARES = 64
_tried: dict[str, dict] = {}


@dataclass(frozen=True)
class Decode:
    """A resident grid.

    warps        of a program
    residents    programs on a multiprocessor
    in_flight    bytes of weights that a thread asks for at a time
    columns      of a tile, at most
    """

    warps: int
    residents: int
    in_flight: int
    columns: int

    @property
    def registers(self) -> int:
        """What a thread may use, so that the residents fit on a multiprocessor, which has 65,536."""
        return min(255, 65536 // (self.residents * self.warps * 32))

    def blocks(self, width: int, itemsize: int) -> tuple[int, int]:
        """(rows, columns) of one block of weights of rows of `width`: as wide as wastes little of it."""
        weights = self.warps * 32 * self.in_flight // itemsize
        fits = [c for c in _WIDTHS if c <= min(self.columns, weights // 16)]
        columns = next((c for c in fits if _waste(width, c) <= 0.125), fits[-1])
        return weights // columns, columns

    def seats(self, device: torch.device) -> int:
        """How many programs run at the same time. The interpreter runs one."""
        return self.residents * _properties(device).multi_processor_count if device.type == "cuda" else 1

    def cut(self, R: int, N: int, itemsize: int, device: torch.device) -> "Cut":
        """How R rows of N are dealt out, so that tiles × shares keep every program busy."""
        rows, columns = self.blocks(N, itemsize)
        tiles, programs = max(1, triton.cdiv(N, columns)), self.seats(device)

        def busy(shares: int) -> float:
            rounds = triton.cdiv(tiles * shares, programs)
            return tiles * shares / (rounds * programs) - 0.002 * shares

        shares = max(range(1, max(1, min(_MOST_SHARES, triton.cdiv(R, rows))) + 1), key=busy)
        return Cut(rows, columns, shares, tiles * shares)


class Cut(NamedTuple):
    """Tiles of `columns` by interleaved `shares` of the rows, read `rows` at a time: `items` of work."""

    rows: int
    columns: int
    shares: int
    items: int


@dataclass(frozen=True)
class Prefill:
    """A tiled product. `cublas`: the second of two products goes to torch, the first has the mask."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    cublas: bool


def _waste(width: int, columns: int) -> float:
    padded = triton.cdiv(width, columns) * columns
    return (padded - width) / padded if padded else 0.0


def decodes(M: int, dtype: torch.dtype) -> bool:
    """Whether a resident grid streams the weights past the tokens; more are for tiled products.

    Without tensor cores the multiplications of float32 take as long as its bytes from 16 tokens on.
    """
    most = 16 if dtype == torch.float32 else 64
    return most >= M


def decode(op: str, x: Tensor, *matrices: Tensor | None) -> Decode:
    """For an op on so few tokens x [M, K] and these weights."""
    found = table(x.device).get(key(op, len(x), size(*matrices), x.dtype))
    return Decode(**found) if found else decode_rule(len(x), x.dtype)


def prefill(op: str, x: Tensor, *matrices: Tensor | None) -> Prefill:
    """For more tokens."""
    found = table(x.device).get(key(op, len(x), size(*matrices), x.dtype))
    return Prefill(**found) if found else prefill_rule(x.dtype)


def decode_rule(M: int, dtype: torch.dtype) -> Decode:
    """What arithmetic suggests: 256 threads on a multiprocessor, 32 KB of weights under way to it.

    Several tokens need registers for their sums, float32 (no tensor cores) most of all: less under way.
    """
    if M == 1:
        return Decode(warps=4, residents=2, in_flight=128, columns=512)
    return Decode(4, 2, 32, 64) if dtype == torch.float32 else Decode(4, 2, 64, 128)


def prefill_rule(dtype: torch.dtype) -> Prefill:
    """Tiles that fit the shared memory of every card from sm_80 on."""
    if dtype == torch.float32:
        return Prefill(64, 64, 32, warps=4, stages=2, cublas=True)
    return Prefill(128, 128, 32, warps=8, stages=3, cublas=True)


def padded(M: int) -> int:
    """The number of token columns that a kernel is compiled for."""
    return 1 if M == 1 else max(16, triton.next_power_of_2(M))


def size(*matrices: Tensor | None) -> int:
    """Weights of a problem, by which it is looked up."""
    return sum(m.numel() for m in matrices if m is not None)


def key(op: str, M: int, weights: int, dtype: torch.dtype) -> str:
    """The bucket of a problem: tokens and weights to the next power of two, and the dtype's bytes."""
    tokens = padded(M) if decodes(M, dtype) else min(4096, triton.next_power_of_2(M))
    return f"{op} M{tokens} weights2^{max(1, weights - 1).bit_length()} bytes{dtype.itemsize}"


@cache
def _properties(device: torch.device):
    return torch.cuda.get_device_properties(device)


def table(device: torch.device) -> dict[str, dict]:
    """The measured configurations for a card, {key: fields}, and before them those being tried."""
    measured = tables(gpu_name(device)) if device.type == "cuda" else {}
    return {**measured, **_tried} if _tried else measured


@contextmanager
def trying(key: str, configuration: Decode | Prefill) -> Iterator[None]:
    """Within the block, this configuration comes before any table: for measuring it."""
    _tried[key] = asdict(configuration)
    try:
        yield
    finally:
        del _tried[key]


def gpu_name(device: torch.device) -> str:
    """The name of a card, as its table's file has it: nvidia-h200."""
    return "-".join(_properties(device).name.lower().split())


@cache
def tables(name: str) -> dict[str, dict]:
    path = own_table(name)
    return read(path) if path.exists() else {}


def own_table(name: str) -> Path:
    """Where `rana tune` puts the table of a card."""
    home = Path(os.environ.get("XDG_CONFIG_HOME", Path.home() / ".config"))
    return home / "rana_kernels" / f"{name}.json"


def read(path: Path) -> dict[str, dict]:
    """The configurations of a table, checked field by field: a bad file is an error, not a guess."""
    try:
        found = json.loads(path.read_text())["configurations"]
        for fields in found.values():
            kind = Prefill if "block_m" in fields else Decode
            _check(kind(**fields))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RuntimeError(
            f"{path} is not a table of kernel configurations ({error!r}): delete it, or write it again "
            "with `rana tune`"
        ) from error
    return found


def _check(configuration: Decode | Prefill) -> None:
    for name, value in asdict(configuration).items():
        fits = isinstance(value, bool) if name == "cublas" else isinstance(value, int) and 0 < value <= 4096
        power = name in ("residents", "stages", "cublas") or value & (value - 1) == 0
        if not (fits and power):
            raise ValueError(f"{name} is {value!r}")


def candidates(M: int, dtype: torch.dtype) -> Iterator[Decode | Prefill]:
    """What `rana tune` tries for M tokens, the rule's own choice first."""
    if decodes(M, dtype):
        yield (rule := decode_rule(M, dtype))
        for warps, residents in ((4, 2), (4, 4), (8, 1), (8, 2)):
            for in_flight in (32, 64, 128):
                for columns in (128, 256, 512, 1024) if M == 1 else (64, 128, 256):
                    if (other := Decode(warps, residents, in_flight, columns)) != rule:
                        yield other
    else:
        yield (first := prefill_rule(dtype))
        for block_m, block_n, warps in ((128, 128, 8), (64, 128, 4), (64, 64, 4), (128, 256, 8)):
            for block_k, stages in ((32, 3), (64, 3), (64, 4)):
                for cublas in (True, False):
                    if (tile := Prefill(block_m, block_n, block_k, warps, stages, cublas)) != first:
                        yield tile
