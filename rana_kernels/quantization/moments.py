"""The second moments of the inputs of a block's weights, with and without a mask: means over tokens.

Tokens count by their importance (`statistics/importance.py`), if the statistics have it.
"""

import torch
from torch import Tensor

from rana_kernels.ops import reference
from rana_kernels.statistics.block import CalibratedBlock

INPUTS = ("qkv", "o", "mlp")  # whose statistics rounding needs; the input of down is computed from "mlp"
MASKED_TOKENS = 2  # times the inputs: a smaller sample gives a worse moment than all tokens without a mask


class Moments:
    """The moments of a block's inputs, each computed once. `names` are linears that read one input."""

    def __init__(self, calibrated: CalibratedBlock) -> None:
        self.calibrated = calibrated
        self._inputs: dict[str, Tensor] = {}

    def of_input(self, names: tuple[str, ...]) -> Tensor:
        """Return the moment [K, K] float64 of the input: of all tokens, or of the sample if need be."""
        name = self.calibrated.input_of(names)
        if name not in self._inputs:
            found = self._of_all_tokens(name)
            self._inputs[name] = self._of_sample(name) if found is None else found
        return self._inputs[name]

    def of_masked(self, names: tuple[str, ...], threshold: float | Tensor, norms: Tensor) -> Tensor:
        """Return the moment [K, K] float64 of the input after a mask of neurons, from the sample.

        If the sample is small and there is a moment of all tokens, return that one without the mask.
        """
        name = self.calibrated.input_of(names)
        x = self.calibrated.sample(name)
        if len(x) < MASKED_TOKENS * x.shape[1] and self._of_all_tokens(name) is not None:
            return self.of_input(names)
        limit = torch.as_tensor(threshold, dtype=torch.float32, device=x.device)
        return self._of_sample(name, reference.keep(x, limit, norms))

    def _of_sample(self, name: str, mask: Tensor | None = None) -> Tensor:
        x = self.calibrated.sample(name)
        return moment_of(x if mask is None else torch.where(mask, x, 0), self.calibrated.importance(name))

    def _of_all_tokens(self, name: str) -> Tensor | None:
        """Return the moment that the calibration summed, or None if it is that of the outputs."""
        block, stats = self.calibrated.block, self.calibrated.stats
        if (block.index, name) in stats.weighed:
            return stats.weighed[block.index, name].double()
        found = stats.inputs.get((block.index, name))
        (reader, *_) = block.inputs[name]
        K = self.calibrated.linear(reader).in_features
        return found.moment / stats.tokens if found is not None and len(found.moment) == K else None


def moment_of(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean moment [K, K] float64 of tokens x [T, K]. weights [T]: of the tokens; None: all 1."""
    weighed = x if weights is None else x * weights[:, None]
    return (weighed.T @ x).double() / max(1, len(x))
