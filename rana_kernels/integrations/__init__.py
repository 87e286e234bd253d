"""Other libraries, each in a file of its own: translate for them, decide nothing."""

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

# the module of transformers that holds the table in which plug-ins register
_TABLE = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Make `from_pretrained` know our checkpoints, as soon as transformers is imported.

    Importing transformers here would more than double the time that `import rana_kernels` takes.
    """
    if _TABLE in sys.modules:
        importlib.import_module("rana_kernels.integrations.transformers")
    else:
        sys.meta_path.insert(0, _AfterTable())


class _AfterTable(MetaPathFinder):
    """Sees one import, that of the table, and adds our entry when it is done."""

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if fullname != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then_register(module: ModuleType) -> None:
            execute(module)
            importlib.import_module("rana_kernels.integrations.transformers")

        # on the instance, so that all else about the loader stays as it was
        setattr(spec.loader, "exec_module", execute_then_register)  # noqa: B010
        return spec
