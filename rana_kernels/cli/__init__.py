"""The command `rana`: compress a model, evaluate and run what came of it, and say what runs here.

Results go to stdout (with `--json` as one JSON object), progress and errors to stderr. Exit codes: 0 for
success, 1 for a failure (one line says what to do), 2 for a command that was not understood, 130 if
interrupted. A traceback is a bug of ours.
"""

import sys

import rich

try:
    import transformers
except ModuleNotFoundError:  # optional for the package, not for its commands
    sys.exit("rana: the commands need transformers: pip install rana_kernels[transformers]")

from rana_kernels.cli import bench, compress, evaluate, generate, info, programs, recover, tune  # noqa: F401 - commands register
from rana_kernels.cli.options import app


def main(arguments: list[str] | None = None) -> None:
    """Run the command line (of this process, or the one given) and exit."""
    rich.reconfigure(stderr=True)  # progress bars write to this console
    transformers.utils.logging.disable_progress_bar()
    try:
        app(arguments, prog_name="rana")
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"rana: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
