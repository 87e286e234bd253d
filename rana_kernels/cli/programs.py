"""`rana serve` and `rana lm-eval` run other programs in a process that can load compressed models."""

import os

import typer

from rana_kernels.checkpoint.budget import VARIABLE
from rana_kernels.cli.options import UNCHANGED, Budget, app, quicken_or_say
from rana_kernels.integrations.programs import run_program
from rana_kernels.integrations.transformers import after_loading


@app.command("serve", context_settings=UNCHANGED)
def serve(context: typer.Context, budget: Budget = None) -> None:
    """Run `transformers serve`, an OpenAI-compatible server, with support for compressed models.

    All arguments but --budget go to `transformers serve`. Single tokens are decoded by the step of `rana
    generate`.
    """
    _set_budget(budget)
    after_loading.append(quicken_or_say)
    run_program("transformers", ["serve", *context.args], "'transformers[serving]'")


@app.command("lm-eval", context_settings=UNCHANGED)
def lm_eval(context: typer.Context, budget: Budget = None) -> None:
    """Run `lm-eval`, the evaluation harness, with support for compressed models.

    All arguments but --budget go to `lm-eval`.
    """
    _set_budget(budget)
    run_program("lm-eval", context.args, "'lm-eval[hf]'")


def _set_budget(budget: float | None) -> None:
    if budget is not None:
        os.environ[VARIABLE] = str(budget)
