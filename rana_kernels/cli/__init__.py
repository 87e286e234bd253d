"""The command `rana`: compress a model, evaluate and run the compressed model, and report what runs here.

Results go to stdout (with `--json` as one JSON object), progress and errors to stderr. Exit codes: 0 for
success, 1 for a failure (one line says what to do), 2 for a command that was not understood, 130 for an
interruption. Only `rana --debug COMMAND …` prints tracebacks.
"""

import sys

import rich

try:
    import transformers
except ModuleNotFoundError:  # the package can do without transformers, the commands cannot
    sys.exit("rana: the commands need transformers: pip install rana_kernels[transformers]")

from rana_kernels.cli import bench, compress, evaluate, generate, info, programs, recover, tune  # noqa: F401 - commands register
from rana_kernels.cli.options import app

# what is raised with a message for people, and by libraries about their files and the machine
SPOKEN = (ValueError, OSError, RuntimeError, ImportError)


def main(arguments: list[str] | None = None) -> None:
    """Run `arguments`, by default the command line of this process, and exit."""
    rich.reconfigure(stderr=True)  # progress bars write to this console
    transformers.utils.logging.disable_progress_bar()
    given = sys.argv[1:] if arguments is None else arguments
    try:
        app(given, prog_name="rana")
    except Exception as error:
        if given[:1] == ["--debug"]:
            raise
        print(f"rana: {_line(error)}", file=sys.stderr)
        sys.exit(1)


def _line(error: Exception) -> str:
    """Return one line about an error, with a way to find out more if its message may not say enough."""
    text = " ".join(str(error).split())
    if isinstance(error, SPOKEN) and text:
        return text
    return f"{type(error).__name__}: {text} (`rana --debug COMMAND …` shows where)"
