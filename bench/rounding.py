"""The loss of rounding a dense model to nearest, with groups along the input or along the output of a linear.

`rows` of an adapter are the transposed weight, so their groups lie along the output; B and dense weights have
them along the input.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from bench.quality.subject import BATCH, some_rows
from bench.report.results import RESULTS, conditions, write_json
from bench.report.tables import table
from rana_kernels.cli.options import Dtype, open_model, open_tokenizer
from rana_kernels.cli.tokens import read_token_ids
from rana_kernels.model.architectures import find_blocks
from rana_kernels.ops.quantized import dequantize
from rana_kernels.quantization import quantize

GROUPS = (32, 64, 128, None)
Losses = dict[str, float]


def main(
    model: Annotated[str, typer.Argument(help="The directory of a model, or its name on the hub.")],
    evaluation: Annotated[
        Path | None, typer.Option(help="Text or token ids; default MODEL/evaluation.safetensors.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="About so many, in whole rows of 512.")] = 4096,
    output: Annotated[
        Path | None, typer.Option(help="JSON; default bench/results/rounding-<model>.json.")
    ] = None,
) -> None:
    """Round the blocks' linears to 8 and 4 bits, and compare the predictions with those of the dense model.

    Example:  python -m bench.rounding examples/demo_model
    """
    dense = open_model(model, Dtype.float32).eval()
    text = evaluation or Path(model) / "evaluation.safetensors"
    token_ids = read_token_ids(text, open_tokenizer(model), dense.config.vocab_size, length=512)
    rows = measure(dense, some_rows(token_ids, tokens))
    path = output or RESULTS / f"rounding-{Path(model).name}.json"
    write_json(path, conditions(), {"tokens": some_rows(token_ids, tokens).numel(), "rows": rows})
    typer.echo(f"{tabulated(rows)}wrote {path}")


@torch.inference_mode()
def measure(model: nn.Module, token_ids: Tensor) -> list[dict[str, Any]]:
    """Return the losses for each number of bits and each group, along both sides."""
    linears = [model.get_submodule(name) for block in find_blocks(model) for name in block.linears]
    weights = [linear.weight.detach().clone() for linear in linears]
    dense, rows = _logits(model, token_ids), []
    for bits, group in ((bits, group) for bits in (8, 4) for group in GROUPS):
        row: dict[str, Any] = {"bits": bits, "group": group or "row"}
        for side in ("input", "output"):
            for linear, weight in zip(linears, weights, strict=True):
                linear.weight.copy_(rounded(weight, bits, group, side))
            row[side] = losses(dense, _logits(model, token_ids))
        rows.append(row)
    for linear, weight in zip(linears, weights, strict=True):
        linear.weight.copy_(weight)
    return rows


def rounded(weight: Tensor, bits: int, group: int | None, side: str) -> Tensor:
    """Return a weight [N, K] rounded to nearest, with groups along its input or its output."""
    lines = weight if side == "input" else weight.T.contiguous()
    found = dequantize(*quantize(lines, bits, group), lines.shape[1], weight.dtype)
    return found if side == "input" else found.T


def losses(dense: Tensor, other: Tensor) -> Losses:
    """Return KL(dense || other) in nats, and the share of equal first choices."""
    kl = F.kl_div(other.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    return {"kl": float(kl.mean()), "equal": float((dense.argmax(-1) == other.argmax(-1)).float().mean())}


def _logits(model: nn.Module, token_ids: Tensor) -> Tensor:
    parts = [model(input_ids=part, use_cache=False).logits.flatten(0, 1) for part in token_ids.split(BATCH)]
    return torch.cat(parts).float()


def tabulated(rows: list[dict[str, Any]]) -> str:
    titles = [
        "bits",
        "group",
        "KL, along the input",
        "along the output",
        "equal first choices",
        "along the output",
    ]
    lines = [
        [r["bits"], r["group"], *(f"{r[s]['kl']:.5f}" for s in ("input", "output")),
         *(f"{r[s]['equal']:.1%}" for s in ("input", "output"))]
        for r in rows
    ]  # fmt: skip
    return table(titles, lines)


if __name__ == "__main__":
    typer.run(main)
