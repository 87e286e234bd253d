"""The configurations that divide a problem into programs and blocks: from a measured table, or by a rule.

No configuration is tried out while a model runs. `rana tune` measures on a GPU and writes its table. The
package contains no table, because none was measured yet.
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

from rana_kernels.ops.quantized import is_quantized

_WIDTHS = (2048, 1024, 512, 256, 128, 64)
_tried: dict[str, dict] = {}


@dataclass(frozen=True)
class Decode:
    """The configuration of a decode kernel, whose grid is resident on the GPU as a whole.

    warps        warps of a program
    residents    programs on a multiprocessor
    in_flight    bytes of weights that a thread requests at a time
    columns      the most columns of a tile
    """

    warps: int
    residents: int
    in_flight: int
    columns: int

    @property
    def registers(self) -> int:
        """Return how many registers a thread may use so that the residents fit (65,536 a multiprocessor)."""
        return min(255, 65536 // (self.residents * self.warps * 32))

    @property
    def most_shares(self) -> int:
        """Return how many shares a thread can add up at once: 64, or as many as its registers take."""
        return (self.registers + 1) // 4

    def blocks(self, width: int, bits: int) -> tuple[int, int]:
        """Return (rows, columns) of a block of weights: as wide as possible with little waste of `width`."""
        weights = self.warps * 32 * self.in_flight * 8 // bits
        fits = [c for c in _WIDTHS if c <= min(self.columns, weights // 16)]
        columns = next((c for c in fits if _waste(width, c) <= 0.125), fits[-1])
        return weights // columns, columns

    def seats(self, device: torch.device) -> int:
        """Return how many programs run at the same time. The interpreter runs one."""
        return self.residents * _properties(device).multi_processor_count if device.type == "cuda" else 1

    def cut(self, R: int, N: int, bits: int, device: torch.device) -> "Cut":
        """Divide R rows of N columns so that tiles × shares keep every program busy."""
        rows, columns = self.blocks(N, bits)
        tiles, programs = max(1, triton.cdiv(N, columns)), self.seats(device)

        def busy(shares: int) -> float:
            rounds = triton.cdiv(tiles * shares, programs)
            return tiles * shares / (rounds * programs) - 0.002 * shares

        shares = max(range(1, max(1, min(self.most_shares, triton.cdiv(R, rows))) + 1), key=busy)
        return Cut(rows, columns, shares, tiles * shares)


class Cut(NamedTuple):
    """A division of a matrix into pieces of work.

    rows      rows that a program reads at a time
    columns   columns of a tile
    shares    number of shares into which the rows are interleaved
    items     pieces of work: tiles × shares
    """

    rows: int
    columns: int
    shares: int
    items: int


@dataclass(frozen=True)
class Prefill:
    """The configuration of a tiled product.

    cublas   torch computes the products that have no mask to apply; Triton computes the others
    """

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
    """Return whether M tokens are few enough for a decode kernel. More tokens use tiled products.

    float32 runs without tensor cores, so from 16 tokens on its multiplications take as long as its bytes.
    """
    most = 16 if dtype == torch.float32 else 64
    return most >= M


def decode(op: str, x: Tensor, *matrices: Tensor | None) -> Decode:
    """Return the configuration of an op for few tokens x [M, K] and these weights, as they are stored."""
    found = table(x.device).get(key(op, len(x), x.dtype, *matrices))
    return Decode(**found) if found else decode_rule(len(x), x.dtype, quantized(*matrices))


def prefill(op: str, x: Tensor, *matrices: Tensor | None) -> Prefill:
    """Return the configuration of an op for many tokens x [M, K] and these weights."""
    found = table(x.device).get(key(op, len(x), x.dtype, *matrices))
    return Prefill(**found) if found else prefill_rule(x.dtype)


def decode_rule(M: int, dtype: torch.dtype, quantized: bool = False) -> Decode:
    """Return the configuration that arithmetic suggests: 32 KB in flight a multiprocessor for one token.

    Quantised weights take more instructions a byte, so twice as many warps take turns at waiting and
    computing. Several tokens need registers for their sums, float32 (without tensor cores) the most, and
    quantised weights for their floats, so fewer bytes are in flight.
    """
    if M == 1:
        return Decode(8, 2, 64, 256) if quantized else Decode(4, 2, 128, 512)
    if dtype == torch.float32:
        return Decode(4, 2, 32, 128 if quantized else 64)
    return Decode(4, 2, 32, 256) if quantized else Decode(4, 2, 64, 128)


def prefill_rule(dtype: torch.dtype) -> Prefill:
    """Return tiles that fit the shared memory of every GPU from sm_80 on."""
    if dtype == torch.float32:
        return Prefill(64, 64, 32, warps=4, stages=2, cublas=True)
    return Prefill(128, 128, 32, warps=8, stages=3, cublas=True)


def padded(M: int) -> int:
    """Return the number of token columns that a kernel is compiled for."""
    return 1 if M == 1 else max(16, triton.next_power_of_2(M))


def quantized(*matrices: Tensor | None) -> bool:
    """Say whether one of the weights is quantised."""
    return any(is_quantized(m) for m in matrices if m is not None)


def key(op: str, M: int, dtype: torch.dtype, *matrices: Tensor | None) -> str:
    """Return the key of a problem: tokens and elements to the next power of two, and the input's bytes.

    If there are quantised weights, the dtypes of the weights follow.
    """
    tokens = padded(M) if decodes(M, dtype) else min(4096, triton.next_power_of_2(M))
    given = [m for m in matrices if m is not None]
    power = max(1, sum(m.numel() for m in given) - 1).bit_length()
    found = f"{op} M{tokens} weights2^{power} bytes{dtype.itemsize}"
    kinds = "+".join(dict.fromkeys(str(m.dtype).removeprefix("torch.") for m in given))
    return f"{found} {kinds}" if quantized(*given) else found


@cache
def _properties(device: torch.device):
    return torch.cuda.get_device_properties(device)


def table(device: torch.device) -> dict[str, dict]:
    """Return the measured configurations of a GPU, {key: fields}. A configuration on trial comes first."""
    measured = tables(gpu_name(device)) if device.type == "cuda" else {}
    return {**measured, **_tried} if _tried else measured


@contextmanager
def trying(key: str, configuration: Decode | Prefill) -> Iterator[None]:
    """Use this configuration within the block, whatever the table says, to measure it."""
    _tried[key] = asdict(configuration)
    try:
        yield
    finally:
        del _tried[key]


def gpu_name(device: torch.device) -> str:
    """Return the name of a GPU as in the file name of its table: nvidia-h200."""
    return "-".join(_properties(device).name.lower().split())


@cache
def tables(name: str) -> dict[str, dict]:
    """Return what is measured for the GPU `name`, read once: the shipped table, and one's own over it."""
    paths = [shipped_table(name), own_table(name)]
    return {key: fields for path in paths if path.exists() for key, fields in read(path).items()}


def shipped_table(name: str) -> Path:
    """Return where the package has the table of a GPU, if it has one."""
    return Path(__file__).parent / "tables" / f"{name}.json"


def own_table(name: str) -> Path:
    """Return where `rana tune` puts the table of a GPU."""
    home = Path(os.environ.get("XDG_CONFIG_HOME", Path.home() / ".config"))
    return home / "rana_kernels" / f"{name}.json"


def read(path: Path) -> dict[str, dict]:
    """Return the configurations of a table. Raise RuntimeError if a field of the file is not valid."""
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


def candidates(M: int, dtype: torch.dtype, quantized: bool = False) -> Iterator[Decode | Prefill]:
    """Yield the configurations that `rana tune` tries for M tokens. The rule's own choice comes first."""
    if decodes(M, dtype):
        yield (rule := decode_rule(M, dtype, quantized))
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
