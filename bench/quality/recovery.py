"""Recovery: a short training of low-rank updates, merged, so that a recovered model costs what it did.

Every contender gets the same: LoRA of one rank, the same rows in the same order, the dense model to follow.
Where there are adapters it is that of `rana recover`, which also refits thresholds; the baselines get it
on their weights, behind their masks. Needs PEFT, which nothing else here does: hence the late imports.
"""

import torch

from bench.quality.contenders import Candidate
from bench.quality.subject import Subject, scoped
from rana_kernels.recover import Training, train


def recover(candidate: Candidate, subject: Subject, scope: str, steps: int) -> None:
    """Train `candidate` for `steps` on the calibration text, in place."""
    from rana_kernels.integrations import recovery

    how = Training(steps=steps)
    if candidate.plan is not None:
        recovery.recover(candidate.model, subject.calibration, how, dense=subject.dense, progress=False)
        return
    torch.manual_seed(how.seed)
    tuned = recovery.get_peft_model(candidate.model, _lora(candidate, subject, scope))
    train(tuned, subject.calibration, how, dense=subject.dense, progress=False)
    tuned.merge_and_unload()


def _lora(candidate: Candidate, subject: Subject, scope: str):
    """On every linear in scope, those behind masks among them."""
    from rana_kernels.integrations import recovery

    modules = dict(candidate.model.named_modules())
    names = [name for block in subject.blocks for name in scoped(block, scope)]
    return recovery.LoraConfig(
        r=recovery.Lora().rank,
        lora_alpha=recovery.ALPHA,
        use_rslora=True,
        target_modules=[f"{name}.linear" if f"{name}.linear" in modules else name for name in names],
    )
