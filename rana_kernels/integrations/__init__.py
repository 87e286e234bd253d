"""Other libraries, each in a file of its own: translate for them, decide nothing."""

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

# modules of others after which one of ours has something to register
_AFTER = {
    "transformers.quantizers.auto": "rana_kernels.integrations.transformers",  # its table of plug-ins
    "torch.distributed.tensor": "rana_kernels.integrations.dtensor",
}


def register() -> None:
    """Make transformers' `from_pretrained` know our checkpoints and DTensor our ops, as soon as each is
    imported.

    Importing them here would more than double the time that `import rana_kernels` takes.
    """
    for theirs, ours in _AFTER.items():
        if theirs in sys.modules:
            importlib.import_module(ours)
        else:
            sys.meta_path.insert(0, _After(theirs, ours))


class _After(MetaPathFinder):
    """Sees one import, that of `theirs`, and imports `ours` when it is done."""

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

        # on the instance, so that all else about the loader stays as it was
        setattr(spec.loader, "exec_module", execute_then_register)  # noqa: B010
        return spec
