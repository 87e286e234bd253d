"""`rana serve` and `rana lm-eval`: other programs, in a process that knows compressed models."""

import typer

from rana_kernels.cli.options import UNCHANGED, app
from rana_kernels.integrations.programs import run_program


@app.command("serve", context_settings=UNCHANGED)
def serve(context: typer.Context) -> None:
    """`transformers serve`, which then finds compressed models: an OpenAI-compatible server."""
    run_program("transformers", ["serve", *context.args], "'transformers[serving]'")


@app.command("lm-eval", context_settings=UNCHANGED)
def lm_eval(context: typer.Context) -> None:
    """`lm-eval`, which then finds compressed models: the evaluation harness."""
    run_program("lm-eval", context.args, "'lm-eval[hf]'")
