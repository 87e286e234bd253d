"""Rounding of a float weight to 8, 4 or 3 bits: to nearest, or by GPTQ under a second moment."""

import torch
from torch import Tensor

from rana_kernels.ops.quantized import GROUPS, groups_of, pack_int4
from rana_kernels.quantization.gptq import DAMPING, feedback, spread_errors, unexplained
from rana_kernels.quantization.steps import BOUNDS, CHUNK, find_steps, grouped, round_to

LARGEST_FLOAT16 = 65504.0
SMALLEST = 2.0**-20  # the least step that the largest value may have: float16 keeps four bits of it


def quantize(
    weight: Tensor,
    bits: int,
    group: int | None = 32,
    moment: Tensor | None = None,
    *,
    along: str = "columns",
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (quantised weight, scale) of a float weight [R, N], as the ops take them.

    bits     8: int8 [R, N] · 4: uint8 [R, ⌈N/2⌉], two values a byte (`rana_kernels.ops.quantized`). An op can
             read an odd N in 4 bits from B and dense weights only, because it reads their N from x. Round
             `rows` with an odd N to 8 bits · 3: int8 [R, N], one value a byte. It saves nothing, and shows
             what 3 bits would lose
    group    columns that share a step: 32, 64, 128, or None for a whole row
    moment   second moment of the input that multiplies the weight, times any positive number. Errors are then
             spread by GPTQ (arXiv 2210.17323). None: every value is rounded to nearest
    along    what the input multiplies. "columns": y = weight @ x, moment [N, N], as for B and dense weights.
             "rows": y = h @ weight, moment [R, R], as for `rows`
    scale    steps to use [R, groups], as they are returned. None: they are searched

    The scale is float16 [R, groups]. In 4 bits, the step of a group is searched for least squared error, and
    it may be negative (`steps.py`). Raises ValueError for arguments that do not fit, for values that are not
    finite, and for weights whose steps float16 cannot hold.
    """
    weight = weight.detach()
    _check(weight, bits, group, moment, along)
    size = max(1, weight.shape[1] if group is None else group)
    given = None if scale is None else scale.float()
    if moment is None and given is not None:
        pairs = [(_whole_numbers(weight.float(), given, bits, size), given)]
    elif moment is None:
        pairs = [_to_nearest(part, bits, size) for part in _parts(weight)]
    elif along == "rows":
        pairs = [_along_rows(weight.float(), bits, size, moment.to(weight.device), given)]
    else:
        pairs = _along_columns(weight, bits, size, moment.to(weight.device), given)
    q, steps = (torch.cat(each) for each in zip(*pairs, strict=True))
    return (pack_int4(q) if bits == 4 else q), steps.half()


def column_errors(weight: Tensor, bits: int, group: int | None, moment: Tensor, parts: Tensor) -> Tensor:
    """Estimate E[(δ_r x)²] float64 [R] of the rows of a weight that GPTQ rounds along the columns.

    moment   E[x xᵀ] [N, N]
    parts    `unexplained_inputs(moment)` [N], which takes long and serves all weights and bits
    """
    size = max(1, weight.shape[1] if group is None else group)
    errors = [_nearest_errors(part, bits, size, _importance(moment)) for part in _parts(weight)]
    return torch.cat([error.double() @ parts for error in errors])


def row_errors(weight: Tensor, bits: int, group: int | None, importance: Tensor) -> Tensor:
    """Return Σ_n importance_n · δ_rn² float64 [R] of the rows of a weight that is rounded to nearest."""
    size = max(1, weight.shape[1] if group is None else group)
    errors = [_nearest_errors(part, bits, size) for part in _parts(weight)]
    return torch.cat([error.double() @ importance.double() for error in errors])


def unexplained_inputs(moment: Tensor) -> Tensor:
    """Return `gptq.unexplained` [n], in the order of the inputs, of lines in the order of `quantize`."""
    order = _falling(moment)
    return unexplained(moment[order][:, order])[order.argsort()]


def _parts(weight: Tensor) -> tuple[Tensor, ...]:
    """Return the weight as parts of a few rows, which need little extra memory."""
    return weight.split(max(1, CHUNK // max(1, weight.shape[1])))


def _to_nearest(
    weight: Tensor, bits: int, size: int, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the whole numbers int8 [R, N] and their steps."""
    values = weight.float()
    steps = find_steps(
        grouped(values, size), bits, None if importance is None else grouped(importance.float(), size)
    )
    return _whole_numbers(values, steps, bits, size), steps


def _nearest_errors(weight: Tensor, bits: int, size: int, importance: Tensor | None = None) -> Tensor:
    """Return the squared errors [R, N] float32 of rounding to nearest."""
    q, steps = _to_nearest(weight, bits, size, importance)
    return (q * _spread(steps, size, weight.shape[1]) - weight.float()).square()


def _whole_numbers(values: Tensor, steps: Tensor, bits: int, size: int) -> Tensor:
    return round_to(values, _spread(steps, size, values.shape[1]), bits).to(torch.int8)


def _along_rows(
    values: Tensor, bits: int, size: int, moment: Tensor, given: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the whole numbers and their steps. The steps of a row are chosen when it is reached."""
    order = _falling(moment)
    lines, steps = values[order], values.new_zeros(len(values), groups_of(values.shape[1], size))
    if given is not None:
        steps.copy_(given[order])

    def round_line(i: int, lines: Tensor) -> Tensor:
        if given is None:
            steps[i] = find_steps(grouped(lines[i], size), bits)
        own = _spread(steps[i], size, lines.shape[1])
        return round_to(lines[i], own, bits) * own

    spread_errors(lines, feedback(moment[order][:, order]), round_line)
    back = order.argsort()
    return _whole_numbers(lines[back], steps[back], bits, size), steps[back]


def _along_columns(
    weight: Tensor, bits: int, size: int, moment: Tensor, given: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """Return the whole numbers and steps of parts of the rows, which do not depend on one another.

    The steps come first, because a group has many lines.
    """
    order = _falling(moment)
    U, group_of = feedback(moment[order][:, order]), (order // size).tolist()

    def rounded(values: Tensor, steps: Tensor | None) -> tuple[Tensor, Tensor]:
        if steps is None:
            steps = find_steps(grouped(values, size), bits, grouped(_importance(moment), size))
        lines = values.T[order].contiguous()

        def round_line(i: int, lines: Tensor) -> Tensor:
            own = steps[:, group_of[i]]
            return round_to(lines[i], own, bits) * own

        spread_errors(lines, U, round_line)
        return _whole_numbers(lines.T[:, order.argsort()], steps, bits, size), steps

    parts = _parts(weight)
    kept = [None] * len(parts) if given is None else given.split(len(parts[0]))
    return [rounded(part.float(), own) for part, own in zip(parts, kept, strict=True)]


def _importance(moment: Tensor) -> Tensor:
    """Return how much the errors of each column count, float32 [N]."""
    return (moment.diagonal() + DAMPING * moment.diagonal().mean()).float()


def _falling(moment: Tensor) -> Tensor:
    """Return the order in which lines are rounded.

    Lines with large inputs come first, because their errors can be spread over most other lines.
    """
    return moment.diagonal().argsort(descending=True, stable=True)


def _spread(steps: Tensor, size: int, columns: int) -> Tensor:
    """Return the step of every column."""
    return steps.repeat_interleave(size, -1)[..., :columns]


def _check(weight: Tensor, bits: int, group: int | None, moment: Tensor | None, along: str) -> None:
    if not weight.is_floating_point() or weight.dim() != 2:
        raise ValueError(f"quantize: weight is {weight.dtype} {list(weight.shape)}, wanted floats [R, N]")
    if bits not in BOUNDS:
        raise ValueError(f"quantize: bits is {bits!r}, wanted 8, 4 or 3")
    if group is not None and group not in GROUPS:
        wanted = ", ".join(map(str, GROUPS))
        raise ValueError(f"quantize: group is {group!r}, wanted {wanted}, or None for a whole row")
    if along not in ("rows", "columns"):
        raise ValueError(f"quantize: along is {along!r}, wanted 'rows' or 'columns'")
    size = weight.shape[0 if along == "rows" else 1]
    for name, tensor in (("weight", weight), ("moment", moment)):
        if tensor is not None and not tensor.isfinite().all():
            raise ValueError(f"quantize: {name} holds values that are not finite")
    if moment is not None and list(moment.shape) != [size, size]:
        raise ValueError(
            f"quantize: moment has shape {list(moment.shape)}, wanted [{size}, {size}] for the {along} of "
            f"weight {list(weight.shape)}"
        )
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    low, high = (bound * -BOUNDS[bits][0] for bound in (SMALLEST, LARGEST_FLOAT16 / 2))
    if largest and not low <= largest <= high:
        raise ValueError(
            f"quantize: the largest value of weight is {largest:.3g}, wanted {low:.2g} to {high:.2g}, "
            "because scales are float16: multiply the weight by a power of two"
        )
