"""Recovery: a short training of low-rank updates, merged, so that a recovered model costs what it did.

Every contender gets the same: LoRA of one rank, the same rows in the same order, the dense model to follow,
and thresholds fitted again so that it keeps what it kept. Where there are adapters it is that of
`rana recover`; the baselines get it on their weights, behind their masks. Needs PEFT, which nothing else
here does: hence the late imports.
"""

from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

import torch

from bench.quality.contenders import Candidate
from bench.quality.masks import refit
from bench.quality.subject import BATCH, Subject, scoped
from rana_kernels.evaluation.metrics import count_live_rows
from rana_kernels.recovery.training import Training, train

LEARNING_RATE = 1e-4  # above it, models that lose little lose more
REFIT_ROWS = 8  # of the calibration text


def check() -> None:
    """Before hours of work. ImportError if PEFT is missing."""
    if find_spec("peft") is None:
        raise ImportError(
            "recovery needs PEFT: pip install rana_kernels[peft], or leave it out by --recovery-steps 0"
        )


def training(steps: int) -> Training:
    return Training(steps=steps, batch=BATCH, learning_rate=LEARNING_RATE)


def settings(subject: Subject, steps: int) -> dict[str, Any]:
    """What recovered models are trained with, as it is written beside the results."""
    how = training(steps)
    tokens = steps * how.batch * how.accumulate * subject.calibration.shape[1]
    return {**asdict(how), "tokens": tokens}


def recover(candidate: Candidate, subject: Subject, steps: int) -> None:
    """Train `candidate` for `steps` on the calibration text, in place."""
    from rana_kernels.recovery import run

    how = training(steps)
    if candidate.plan is not None:
        run.recover(candidate.model, subject.calibration, how, dense=subject.dense, progress=False)
        return
    some = subject.calibration[:REFIT_ROWS]
    live = {
        name: count.mean for name, count in count_live_rows(candidate.model, some, progress=False).items()
    }
    torch.manual_seed(how.seed)
    tuned = run.get_peft_model(candidate.model, _lora(candidate, subject))
    train(tuned, subject.calibration, how, dense=subject.dense, progress=False)
    tuned.merge_and_unload()
    refit(candidate.model, some, live)


def _lora(candidate: Candidate, subject: Subject):
    """On every linear, those behind masks among them."""
    from rana_kernels.recovery import run

    modules = dict(candidate.model.named_modules())
    names = [name for block in subject.blocks for name in scoped(block, "both")]
    return run.LoraConfig(
        r=run.Lora().rank,
        lora_alpha=run.ALPHA,
        use_rslora=True,
        target_modules=[f"{name}.linear" if f"{name}.linear" in modules else name for name in names],
    )
