"""The replacement of a directory: a new one takes the place of an old one once it is complete."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from rana_kernels.checkpoint.manifest import MANIFEST
from rana_kernels.system.files import check_writable


def check_target(directory: str | os.PathLike) -> None:
    """Raise OSError unless `directory` can be written.

    It is a FileExistsError if something else than an older checkpoint would be destroyed.
    """
    place = Path(directory).resolve()
    if place.exists() and not (place / MANIFEST).is_file() and not (place.is_dir() and _is_empty(place)):
        raise FileExistsError(
            f"{place} is there and no rana checkpoint (it has no {MANIFEST}): it is not overwritten. "
            "Choose another directory, or delete it first"
        )
    if place.is_mount():
        raise OSError(f"{place} is a mount point, which cannot be replaced: give a new directory within it")
    if place.is_dir() and Path.cwd().is_relative_to(place):
        raise OSError(
            f"{place} is the working directory or holds it, and is replaced as a whole: give a "
            "directory within it, or change to another one first"
        )
    check_writable(place.parent)


def _is_empty(place: Path) -> bool:
    return not any(place.iterdir())


@contextmanager
def replacing(directory: str | os.PathLike) -> Iterator[Path]:
    """Give a new directory to write into. It replaces `directory` if the block ends without an error.

    Until then, an older checkpoint in `directory` stays as it is. Raises OSError like `check_target`.
    """
    place = Path(directory).resolve()
    check_target(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as beside:
        new, old = Path(beside, "new"), Path(beside, "old")
        new.mkdir()
        yield new
        try:
            if place.exists():
                place.rename(old)
            new.rename(place)
        except BaseException:
            if old.exists() and not place.exists():
                old.rename(place)
            raise
