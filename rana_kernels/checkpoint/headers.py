"""Safetensors headers, read strictly before any tensor: names, dtypes, shapes and byte ranges.

A file consists of 8 bytes (the header's length, little-endian), the header (JSON), and the tensors' bytes
without gaps. No code here allocates memory of a size that it has not compared with the file's size.
"""

import json
from collections.abc import Set
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
# of tensors whose dtype is fixed, whatever the dtype that the model is loaded in
EXACT = (".threshold", ".norms", ".B_scale", ".rows_scale", ".qweight_scale")
STORED_FLOATS = ("F32", "F16", "BF16")
MAX_HEADER = 100_000_000  # bytes: the limit of the safetensors library


class CheckpointError(ValueError):
    """A checkpoint is damaged, incomplete, of another version, or does not match its own description."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. `begin` and `end` count bytes from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def strict_json(text: bytes, where: str) -> Any:
    """Parse JSON from an untrusted file. Raise CheckpointError if it is not JSON or has a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{where}: {twice[:200]!r} is there twice, wanted every name once")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {error}") from None


def read_header(path: Path) -> dict[str, Entry]:
    """Read the tensors of one file. Raise CheckpointError unless they fill it exactly, without overlap."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
            raise CheckpointError(
                f"{path.name}: the header claims {length} bytes of a file of {size}, "
                "wanted a whole safetensors file: it is truncated or damaged"
            )
        header = strict_json(file.read(length), f"{path.name}: the header")
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name}: the header is a {type(header).__name__}, wanted an object")
    header.pop("__metadata__", None)
    entries = {name: _entry(f"{path.name}: {name[:200]!r}", facts) for name, facts in header.items()}
    _check_tiling(path.name, entries, size - 8 - length)
    return entries


def _entry(where: str, facts: object) -> Entry:
    if not isinstance(facts, dict) or set(facts) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} has {str(facts)[:200]}, wanted dtype, shape and data_offsets")
    dtype, shape, offsets = facts["dtype"], facts["shape"], facts["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: dtype is {str(dtype)[:200]!r}, wanted one of {', '.join(DTYPES)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{where}: shape is {str(shape)[:200]} and data_offsets {str(offsets)[:200]}, "
            "wanted lists of whole numbers, two of them for the offsets"
        )
    begin, end = offsets
    wanted = prod(shape) * DTYPES[dtype].itemsize
    if end - begin != wanted:
        raise CheckpointError(
            f"{where}: shape {shape} of {dtype} takes {wanted} bytes, data_offsets give {end - begin}"
        )
    return Entry(dtype, tuple(shape), begin, end)


def _are_sizes(numbers: object) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)


def _check_tiling(file: str, entries: dict[str, Entry], data: int) -> None:
    place = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != place:
            what = "overlaps the tensor before it" if entry.begin < place else "leaves a gap before it"
            raise CheckpointError(f"{file}: {name[:200]!r} begins at byte {entry.begin} and {what} ({place})")
        place = entry.end
    if place != data:
        raise CheckpointError(
            f"{file}: its tensors end at byte {place} of {data}, wanted all of them and nothing after: "
            "it is truncated or damaged"
        )


def check_tensors(
    files: list[Path], expected: dict[str, Tensor], optional: set[str], ignored: Set[str] = frozenset()
) -> None:
    """Raise CheckpointError unless `files` hold exactly the tensors `expected`, by name, shape and dtype.

    expected   the model's tensors, on any device: only their shapes and dtypes matter. Thresholds, norms,
               scales and quantised weights must have the same dtype in the file. Other floats may have any
               dtype in `STORED_FLOATS`, because a model can be loaded in another dtype than it was saved in
    optional   names that may be absent, because these weights are tied to others or are of another head
    ignored    names that may be in the files as well, because they are of another head
    """
    home: dict[str, str] = {}
    for path in files:
        for name, entry in read_header(path).items():
            if name in home:
                raise CheckpointError(f"{name[:200]!r} is in {home[name]} and in {path.name}, wanted it once")
            home[name] = path.name
            if name in ignored:
                continue
            if name not in expected:
                raise CheckpointError(
                    f"{path.name} holds {name[:200]!r}, which the model of this plan has not"
                )
            _check_entry(f"{path.name}: {name}", entry, expected[name])
    missing = sorted(expected.keys() - home.keys() - optional)
    if missing:
        raise CheckpointError(f"{len(missing)} tensors are in no file: {', '.join(missing[:3])}, …")


def _check_entry(where: str, entry: Entry, expected: Tensor) -> None:
    if entry.shape != tuple(expected.shape):
        raise CheckpointError(
            f"{where} has shape {list(entry.shape)}, wanted {list(expected.shape)} by the plan"
        )
    exact = where.endswith(EXACT) or not expected.is_floating_point()
    fits = DTYPES[entry.dtype] == expected.dtype if exact else entry.dtype in STORED_FLOATS
    if not fits:
        wanted = str(expected.dtype) if exact else " or ".join(STORED_FLOATS)
        raise CheckpointError(f"{where} has dtype {entry.dtype}, wanted {wanted}")
