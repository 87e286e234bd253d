"""`rana serve` and `rana lm-eval` run other programs in a process that can load compressed models."""

import typer

from rana_kernels.cli.options import UNCHANGED, app, quicken_or_say
from rana_kernels.integrations.programs import run_program
from rana_kernels.integrations.transformers import after_loading


@app.command("serve", context_settings=UNCHANGED)
def serve(context: typer.Context) -> None:
    """Run `transformers serve`, an OpenAI-compatible server, with support for compressed models.

    All arguments go to `transformers serve`. Single tokens are decoded by the step of `rana generate`.
    """
    after_loading.append(quicken_or_say)
    run_program("transformers", ["serve", *context.args], "'transformers[serving]'")


@app.command("lm-eval", context_settings=UNCHANGED)
def lm_eval(context: typer.Context) -> None:
    """Run `lm-eval`, the evaluation harness, with support for compressed models.

    All arguments go to `lm-eval`.
    """
    run_program("lm-eval", context.args, "'lm-eval[hf]'")
