"""Programs of other packages, run in a process that has imported rana_kernels.

These programs load models with `from_pretrained`, and have no option to import a package first.
"""

import sys
from importlib.metadata import entry_points


def run_program(program: str, arguments: list[str], needs: str) -> None:
    """Run the console script `program` with `arguments`, as if the user had called it.

    needs   the name to give to pip if it is missing

    Raises ImportError if the program is not installed.
    """
    found = entry_points(group="console_scripts", name=program)
    if not found:
        raise ImportError(f"{program} is not installed: pip install {needs}")
    run = next(iter(found)).load()
    sys.argv = [program, *arguments]
    sys.exit(run())
