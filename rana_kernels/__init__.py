"""RaNA kernels: transformer inference that skips the work an input does not need (arXiv 2503.18216)."""

import os

from rana_kernels import backends
from rana_kernels.backends import use_backend
from rana_kernels.version import __version__

__all__ = ["__version__", "use_backend"]

backends.load_libraries()
use_backend(os.environ.get("RANA_BACKEND", "auto"))
