"""RaNA kernels: transformer inference that skips the work an input does not need (arXiv 2503.18216).

`import rana_kernels` defines `torch.ops.rana` and registers the checkpoint format with transformers. The
public names below are imported when they are first used, so that loading a checkpoint imports no calibration.
"""

import os
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rana_kernels import backends, integrations
from rana_kernels.backends import use_backend
from rana_kernels.version import __version__

if TYPE_CHECKING:
    from rana_kernels.allocation.methods import plan
    from rana_kernels.backends.info import report
    from rana_kernels.checkpoint.budget import set_budget
    from rana_kernels.checkpoint.draft import make_draft
    from rana_kernels.compression.run import compress
    from rana_kernels.integrations.transformers import load, save
    from rana_kernels.model.plan import Plan
    from rana_kernels.nn.adapters import RanaLinear
    from rana_kernels.nn.mlp import RanaMLP
    from rana_kernels.rotation.run import rotate
    from rana_kernels.statistics.calibration import calibrate

__all__ = [
    "Plan",
    "RanaLinear",
    "RanaMLP",
    "__version__",
    "calibrate",
    "compress",
    "load",
    "make_draft",
    "plan",
    "report",
    "rotate",
    "save",
    "set_budget",
    "use_backend",
]

_HOMES = {
    "Plan": "model.plan",
    "RanaLinear": "nn.adapters",
    "RanaMLP": "nn.mlp",
    "calibrate": "statistics.calibration",
    "compress": "compression.run",
    "load": "integrations.transformers",
    "make_draft": "checkpoint.draft",
    "plan": "allocation.methods",
    "report": "backends.info",
    "rotate": "rotation.run",
    "save": "integrations.transformers",
    "set_budget": "checkpoint.budget",
}

backends.load_libraries()
use_backend(os.environ.get("RANA_BACKEND", "auto"))
integrations.register()


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOMES[name] == "integrations.transformers" and not find_spec("transformers"):
        raise ImportError(f"rana_kernels.{name} needs transformers: pip install rana_kernels[transformers]")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
