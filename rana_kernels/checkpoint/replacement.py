"""Writing a checkpoint: a new directory takes the place of an old one when it is whole, or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from rana_kernels.checkpoint.manifest import MANIFEST


def check_target(directory: str | os.PathLike) -> None:
    """Raise FileExistsError if saving to `directory` would destroy anything but an older checkpoint."""
    place = Path(directory)
    if not place.exists() or (place / MANIFEST).is_file():
        return
    if not place.is_dir() or any(place.iterdir()):
        raise FileExistsError(
            f"{place} is there and no rana checkpoint (it has no {MANIFEST}): it is not overwritten. "
            "Choose another directory, or delete it first"
        )


@contextmanager
def replacing(directory: str | os.PathLike) -> Iterator[Path]:
    """A new directory to write into, which takes the place of `directory` if the block ends well.

    Until then an older checkpoint there stays as it is. Raises as `check_target` does.
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
