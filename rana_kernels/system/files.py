"""Files that are written whole: an interruption leaves the old file or the new one, and never a part."""

import json
import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then move that file to `path`."""
    part = path.with_name(f"{path.name}.part")
    write(part)
    os.replace(part, path)


def write_json(path: Path, data: object) -> None:
    """Write `data` as JSON to `path`, whole."""
    write_whole(path, lambda part: part.write_text(json.dumps(data)))


def read_json(path: Path):
    """Return what `write_json` wrote. Raise ValueError for a damaged file."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): delete the directory and start again") from None
