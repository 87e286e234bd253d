"""Hooks on a model that other threads may run meanwhile: a server, or another calibration."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_LOCKS: WeakKeyDictionary[nn.Module, Lock] = WeakKeyDictionary()
_LOCK_OF_LOCKS = Lock()


def of_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return `hook` for the passes of the calling thread alone."""
    here = get_ident()

    def call(*args: Any) -> Any:
        return hook(*args) if get_ident() == here else None

    return call


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Wait until no other thread is in such a block with this model.

    Whoever sets `training` and `requires_grad` for a while needs this. Forward passes need it not.
    """
    with _LOCK_OF_LOCKS:
        lock = _LOCKS.setdefault(model, Lock())
    with lock:
        yield
