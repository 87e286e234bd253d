"""The names of the kernel, for versions of the kernels library that look for them in this folder."""

import importlib.util
import json
import sys
from pathlib import Path

_variant = Path(__file__).parent.parent
_id = json.loads((_variant / "metadata.json").read_text())["id"]
if _id not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_id, _variant / "__init__.py")
    sys.modules[_id] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_id])

__all__ = sys.modules[_id].__all__
globals().update({_name: getattr(sys.modules[_id], _name) for _name in __all__})
