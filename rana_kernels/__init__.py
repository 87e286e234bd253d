"""RaNA kernels: transformer inference that skips the work an input does not need (arXiv 2503.18216)."""

import os
from importlib.util import find_spec

from rana_kernels import backends, integrations
from rana_kernels.allocate import plan
from rana_kernels.backends import use_backend
from rana_kernels.calibrate import calibrate
from rana_kernels.compress import compress
from rana_kernels.info import report
from rana_kernels.modules import RanaLinear, RanaMLP
from rana_kernels.plan import Plan
from rana_kernels.version import __version__

__all__ = [
    "Plan",
    "RanaLinear",
    "RanaMLP",
    "__version__",
    "calibrate",
    "compress",
    "load",
    "plan",
    "report",
    "save",
    "use_backend",
]

backends.load_libraries()
use_backend(os.environ.get("RANA_BACKEND", "auto"))
integrations.register()


def __getattr__(name: str):
    """`save` and `load`, which need transformers, are looked up when they are first used."""
    if name not in ("save", "load"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not find_spec("transformers"):
        raise ImportError(f"rana_kernels.{name} needs transformers: pip install rana_kernels[transformers]")
    from rana_kernels.integrations import transformers

    return getattr(transformers, name)
