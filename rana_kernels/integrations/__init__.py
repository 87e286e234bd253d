"""The connections to other libraries, one file or folder for each."""

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

# {a module of another library: our module that is imported right after it, to register something}
_AFTER = {
    "transformers.quantizers.auto": "rana_kernels.integrations.transformers",  # its table of plug-ins
    "transformers.modeling_utils": "rana_kernels.integrations.saving",
    "torch.distributed.tensor": "rana_kernels.integrations.dtensor",
}


def register() -> None:
    """Register our checkpoints with transformers and our ops with DTensor, once each of them is imported.

    Importing both here would more than double the time of `import rana_kernels`.
    """
    for theirs, ours in _AFTER.items():
        if theirs in sys.modules:
            importlib.import_module(ours)
        else:
            sys.meta_path.insert(0, _After(theirs, ours))


class _After(MetaPathFinder):
    """Waits for the import of the module `theirs`, and imports the module `ours` right after it."""

    def __init__(self, theirs: str, ours: str) -> None:
        self.theirs, self.ours = theirs, ours

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if fullname != self.theirs:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then_register(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(self.ours)

        # set on this one loader, so that everything else about it stays as it was
        setattr(spec.loader, "exec_module", execute_then_register)  # noqa: B010
        return spec
