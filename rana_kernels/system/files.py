"""Files that are written whole: after an interruption, the old or the new file is there, never a part."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory


def check_writable(directory: Path) -> None:
    """Raise OSError unless files can be made in `directory`, which need not exist yet."""
    place = directory.absolute()
    there = next(path for path in (place, *place.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is no directory, wanted one to write to: give another place")
    try:
        with TemporaryDirectory(prefix=".rana.", dir=there):
            pass
    except OSError as error:
        raise type(error)(f"{there} cannot be written to ({error.strerror}): give another place") from None


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then move that file to `path`."""
    part = path.with_name(f"{path.name}.part")
    try:
        write(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)  # a full disk needs its space
        raise


def write_json(path: Path, data: object) -> None:
    """Write `data` as JSON to `path`, with `write_whole`."""
    write_whole(path, lambda part: part.write_text(json.dumps(data)))


def read_json(path: Path):
    """Read JSON that `write_json` wrote. Raise ValueError for a damaged file."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): delete the directory and start again") from None
