"""A real pretrained model in 8 and 4 bits, with masks: `python -m examples.real_model`, or `make demo-real`.

SmolLM2-135M-Instruct comes from a wheel on PyPI (`bench/quality/smollm2.py`). It is calibrated once and
compressed twice: 8 bits at 0.80 of the multiply-adds, and 4 bits at 0.70. Perplexity and KL are measured in
float32 on held-out English prose. Texts and speed are those of the models as people run them, with the floats
that are left in bfloat16.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn
from transformers.utils import logging

import rana_kernels as rana
from bench.quality.smollm2 import LENGTH, fetch
from bench.quality.subject import BATCH, Subject, open_subject
from bench.report.tables import terminal_table
from rana_kernels.checkpoint.attachment import attached_plan
from rana_kernels.cli.options import Dtype
from rana_kernels.compression.report import model_bytes, read_bytes
from rana_kernels.evaluation.divergence import divergence
from rana_kernels.evaluation.metrics import decode_speed, perplexity
from rana_kernels.integrations.decoding import quicken
from rana_kernels.model.plan import Plan
from rana_kernels.system.files import write_json

CALIBRATION, EVALUATION = 8192, 12288  # tokens
VARIANTS = ((8, 0.80), (4, 0.70))  # bits, and the share of the multiply-adds of the blocks' linears
QUESTION = "Explain in one paragraph how a river shapes the land around it."
NEW_TOKENS = 90
PROMPT, ROUNDS, TURN = 8, 5, 32  # tokens before, rounds, and tokens that each model writes in a round
COLUMNS = ("model", "perplexity", "KL", "same choice", "MB", "MB a token", "tokens/s")


@dataclass
class Measured:
    """One model. KL from the dense one in nats a token; megabytes of the whole model as it is stored.

    The megabytes that a token reads are those of the blocks' linears and lm_head.
    """

    name: str
    perplexity: float
    kl: float
    agreed: float
    stored_megabytes: float = 0.0
    read_megabytes: float = 0.0
    tokens_per_second: float = 0.0
    text: str = ""

    def cells(self) -> tuple[str, ...]:
        numbers = (self.stored_megabytes, self.read_megabytes, self.tokens_per_second)
        quality = (f"{self.perplexity:.2f}", f"{self.kl:.4f}", f"{self.agreed:.1%}")
        return (self.name, *quality, *(f"{number:.1f}" for number in numbers))


def run(output: Path, console: Console) -> list[Measured]:
    """Compress, save, measure, and write `report.json` into `output`."""
    console.print("fetching SmolLM2-135M-Instruct, if it is not there yet")
    folder = str(fetch())
    subject = open_subject(folder, None, None, CALIBRATION, LENGTH, Dtype.float32, EVALUATION)
    found, models = [_quality("dense", subject.dense, subject)], {"dense": subject.dense}
    console.print(f"calibrating on {CALIBRATION:,} tokens")
    for bits, cost_ratio in VARIANTS:
        name = f"{bits} bits at {cost_ratio:.2f}"
        console.print(f"compressing: {name}")
        model, stats = subject.copy()
        rana.compress(model, stats=stats, flops_reduction=1 - cost_ratio, bits=bits)
        found.append(_quality(name, model, subject))
        models[name] = model
    speed = _tokens_a_second({name: model.bfloat16() for name, model in models.items()}, subject)
    for own in found:
        model = models[own.name]
        plan = attached_plan(model) or Plan(())
        own.stored_megabytes = model_bytes(model) / 1e6
        own.read_megabytes = (read_bytes(model, plan, 2) + _dense_bytes(model, subject)) / 1e6
        own.tokens_per_second, own.text = speed[own.name], _answer(model, subject.tokenizer)
        if own.name != "dense":
            rana.save(model, output / own.name.replace(" ", "-"), subject.tokenizer)
    write_json(output / "report.json", {"models": [asdict(own) for own in found]})
    return found


def _quality(name: str, model: Any, subject: Subject) -> Measured:
    found = perplexity(model, subject.evaluation, batch=BATCH)
    if model is subject.dense:
        return Measured(name, found.perplexity, 0.0, 1.0)
    compared = divergence(model, subject.dense, subject.evaluation)
    return Measured(name, found.perplexity, compared.kl, compared.agreed)


def _dense_bytes(model: nn.Module, subject: Subject) -> int:
    """Return the bytes of the blocks' linears of a model that is not compressed."""
    if attached_plan(model):
        return 0
    return sum(model_bytes(model.get_submodule(name)) for name in subject.linears("both"))


def _tokens_a_second(models: dict[str, Any], subject: Subject) -> dict[str, float]:
    """Return the median speed of each model, which writes as `rana generate` does. The models take turns."""
    found: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        quicken(model)
    for _ in range(ROUNDS):
        for name, model in models.items():
            found[name].append(decode_speed(model, subject.evaluation[:1, :PROMPT], TURN))
    return {name: median(speeds) for name, speeds in found.items()}


@torch.inference_mode()
def _answer(model: Any, tokenizer: Any) -> str:
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    written = model.generate(**asked, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(written[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)


def main(
    output: Annotated[Path, typer.Option(help="Folder for the models and report.json.")] = Path(
        "build/demo-real"
    ),
) -> None:
    """Compress SmolLM2-135M to 8 and 4 bits with masks, and compare quality, bytes, speed and texts."""
    console, started = Console(), time.monotonic()
    logging.disable_progress_bar()  # of transformers; ours is enough
    output.mkdir(parents=True, exist_ok=True)
    found = run(output, console)
    title = f"SmolLM2-135M-Instruct, {EVALUATION:,} tokens of held-out prose"
    console.print(terminal_table(title, COLUMNS, [own.cells() for own in found]))
    console.print(f"\n[bold]{QUESTION}[/bold]")
    for own in found:
        console.print(f"\n[bold]{own.name}[/bold]\n{own.text}", highlight=False)
    console.print(f"\n{output} has the models and report.json; {time.monotonic() - started:.0f} s in all.")


if __name__ == "__main__":
    typer.run(main)
