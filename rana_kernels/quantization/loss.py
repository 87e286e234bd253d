"""Estimates of the loss by rounding, before anything is rounded: means over tokens, in the metric "loss".

After GPTQ (`gptq.py`), the loss by a line is its squared rounding error, times the part of its input that
later lines cannot compensate. Both are known without running GPTQ: the first from rounding to nearest, the
second from one Cholesky factor, which serves all widths.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from rana_kernels.nn.format import Format
from rana_kernels.quantization.moments import Moments
from rana_kernels.quantization.rounding import column_errors, row_errors, unexplained_inputs
from rana_kernels.statistics.block import CalibratedBlock

# The loss of neurons is computed where the mask keeps these shares, and between them on straight lines.
SHARES = (0.0, 0.15, 0.4, 0.7, 1.0)


@dataclass(frozen=True)
class RankLoss:
    """The loss by rounding of each rank [F] float64, in the metric.

    of_B      where the rank is live, by the error of its value
    of_rows   for a rank value of 1 in the metric, by the error of its row
    """

    of_B: Tensor
    of_rows: Tensor

    def at(self, live: Tensor, energy: Tensor) -> float:
        """Return the loss of the first R ranks, which are live and keep energy so often [R]."""
        R = len(live)
        return float(live @ self.of_B[:R] + energy @ self.of_rows[:R])


@dataclass(frozen=True)
class NeuronLoss:
    """The loss by rounding of neuron adapters of all costs: at SHARES of the live neurons."""

    points: tuple[float, ...]

    def at(self, share: float) -> float:
        """Return the loss where this share of the neurons is live."""
        i = next(i for i in range(1, len(SHARES)) if share <= SHARES[i] or i == len(SHARES) - 1)
        part = (share - SHARES[i - 1]) / (SHARES[i] - SHARES[i - 1])
        return self.points[i - 1] + part * (self.points[i] - self.points[i - 1])


class RoundingLoss:
    """The loss by rounding of one block's weights. `names` are linears that read one input."""

    def __init__(self, calibrated: CalibratedBlock) -> None:
        self.calibrated, self.moments = calibrated, Moments(calibrated)
        self._unexplained: dict[str, Tensor] = {}
        self._by_row: dict[tuple[tuple[str, ...], Format], Tensor] = {}

    def dense(self, name: str, format: Format) -> float:
        """Return the loss of a dense linear in a quantised format."""
        errors = self._column_errors(self.calibrated.weight((name,)), (name,), format)
        return float(self._importance((name,)) @ errors)

    def ranks(self, names: tuple[str, ...], format: Format) -> RankLoss:
        """Return the loss of rank adapters in a quantised format."""
        factors = self.calibrated.factors(names, "loss")
        squares, of_rows = factors.norms.double().square(), format.for_ranks
        return RankLoss(
            self._column_errors(factors.B, names, format) / squares,
            row_errors(factors.rows, of_rows.bits, of_rows.group, self._importance(names)) * squares,
        )

    def neurons(
        self, names: tuple[str, ...], formats: Iterable[Format], threshold_at: Callable[[float], float]
    ) -> dict[Format, NeuronLoss]:
        """Return the loss of neuron adapters in each of these quantised formats.

        threshold_at   the threshold where a share of the neurons is live, in the metric of the loss
        """
        wanted = [format for format in formats if format.quantized]
        if not wanted:
            return {}
        norms = self.calibrated.joint_norms(names, "loss")
        masked = [self.moments.of_masked(names, threshold_at(share), norms) for share in SHARES[1:-1]]
        parts = [*map(unexplained_inputs, masked), self._unexplained_of(names)]
        losses = {}
        for format in wanted:
            errors = self._row_errors(names, format)
            losses[format] = NeuronLoss((0.0, *(float(part @ errors) for part in parts)))
        return losses

    def _row_errors(self, names: tuple[str, ...], format: Format) -> Tensor:
        """Return `row_errors` of the rows of stacked weights, those of each linear computed once.

        That is their sum, unless a group of columns belongs to two linears.
        """
        widths = [self.calibrated.linear(name).out_features for name in names]
        if len(names) > 1 and all(map(format.splits_at, widths[:-1])) and widths[-1] % 2 == 0:
            return torch.stack([self._row_errors((name,), format) for name in names]).sum(0)
        key = (names, format)
        if key not in self._by_row:
            rows, own = self.calibrated.weight(names).T, format.for_rows(sum(widths))
            self._by_row[key] = row_errors(rows, own.bits, own.group, self._importance(names))
        return self._by_row[key]

    def _column_errors(self, weight: Tensor, names: tuple[str, ...], format: Format) -> Tensor:
        moment, parts = self.moments.of_input(names), self._unexplained_of(names)
        return column_errors(weight, format.bits, format.group, moment, parts)

    def _unexplained_of(self, names: tuple[str, ...]) -> Tensor:
        """Return `unexplained_inputs` of the input without a mask, computed once for each input."""
        name = self.calibrated.input_of(names)
        if name not in self._unexplained:
            self._unexplained[name] = unexplained_inputs(self.moments.of_input(names))
        return self._unexplained[name]

    def _importance(self, names: tuple[str, ...]) -> Tensor:
        return self.calibrated.output_weights(names).square()
