"""Programs of other packages, run unchanged in a process that has imported this one.

They find models by `from_pretrained`, and have no way to name a package to import first.
"""

import sys
from importlib.metadata import entry_points


def run_program(program: str, arguments: list[str], needs: str) -> None:
    """Run the console script `program` with `arguments`, as if it had been called by its own name.

    needs   what pip installs it by. Raises ImportError where it is not installed
    """
    found = entry_points(group="console_scripts", name=program)
    if not found:
        raise ImportError(f"{program} is not installed: pip install {needs}")
    run = next(iter(found)).load()
    sys.argv = [program, *arguments]
    sys.exit(run())
