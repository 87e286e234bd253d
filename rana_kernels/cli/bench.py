"""`rana bench`: the benchmarks of a checkout, which an installed package does not carry."""

import runpy
import sys
from pathlib import Path

import typer

import rana_kernels
from rana_kernels.cli.options import UNCHANGED, app

PARTS = ("gpu", "decode", "quality", "scale", "cost", "rounding", "report")


@app.command("bench", context_settings=UNCHANGED)
def bench(context: typer.Context) -> None:
    """Time the ops against their baselines (`python -m bench` of a checkout; `rana bench --help`)."""
    root = Path(rana_kernels.__file__).parent.parent
    if not (root / "bench" / "__main__.py").exists():
        raise FileNotFoundError(
            "the benchmarks and the tests they run first are not part of the installed package: "
            "run this in a checkout whose package is installed in place (pip install -e .)"
        )
    arguments = list(context.args)
    module = f"bench.{arguments.pop(0)}" if arguments[:1] and arguments[0] in PARTS else "bench"
    sys.path.insert(0, str(root))
    sys.argv = [f"rana {module.replace('.', ' ')}", *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
