"""The importance of tokens to the rounding of weights.

The errors of rounded weights reach all outputs of a linear. A token therefore counts by the squared
derivatives of the loss by these outputs, summed over the linears that read one input. Moments of tokens that
are weighed like this are the Hessian that GPTQ should see (GuidedQuant, arXiv 2505.07004). Without weights, a
token whose predictions no error can change counts as much as the others.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from rana_kernels.statistics.processes import ProcessGroupSums, exact
from rana_kernels.statistics.sampling import Sampler, placed

Key = tuple[int, str]  # the index of a block, and one of its inputs


class Importance:
    """The importance of the sampled tokens by input, and the moments of all tokens weighed by theirs.

    widths   K of every input, and of those in `summed` the moment is summed

    `read` and `add` collect from a sequence, which may come in parts, and `finish_sequence` ends it.
    Importance is on any scale until `finish`.
    """

    def __init__(self, widths: Mapping[Key, int], summed: set[Key]) -> None:
        self.widths, self.summed = widths, summed
        self.sampled = {key: torch.empty(0, 1) for key in widths}
        self.moments: dict[Key, Tensor] = {}
        self.totals: dict[Key, Tensor] = {}
        self._inputs: dict[Key, list[Tensor]] = {}
        self._weights: dict[Key, dict[str, list[Tensor]]] = {}

    def read(self, key: Key, x: Tensor) -> None:
        """Hold the next tokens [T, K] of an input in `summed` until their weights are known."""
        self._inputs.setdefault(key, []).append(x)

    def add(self, key: Key, name: str, squares: Tensor) -> None:
        """Add the squared derivatives [T, N] by outputs of the linear `name`, for the next tokens."""
        self._weights.setdefault(key, {}).setdefault(name, []).append(squares.sum(1))

    def finish_sequence(self, unpadded: Tensor, take: Tensor, slots: Tensor) -> None:
        """Use what the sequence gave. The samples take some of its unpadded tokens, into these slots."""
        for key in self.widths:
            weights = torch.stack([torch.cat(parts) for parts in self._weights.pop(key).values()]).sum(0)
            weights = weights[unpadded.to(weights.device)]
            self._sample(key, slots, weights[take.to(weights.device), None].cpu())
            self.totals[key] = self.totals.get(key, 0) + weights.sum(dtype=torch.float64).cpu()
            if key in self.summed:
                x = torch.cat(self._inputs.pop(key))[unpadded.to(weights.device)].float()
                product = exact((x * weights[:, None]).T @ x)
                self.moments[key] = (
                    self.moments[key].add_(product) if key in self.moments else product.double()
                )

    def leave_out(self, slots: Tensor) -> None:
        """Let the samples take tokens whose importance is not measured."""
        for key in self.widths:
            self._sample(key, slots, torch.full((len(slots), 1), torch.nan))

    def finish(
        self, sampler: Sampler, tokens: int, sums: ProcessGroupSums
    ) -> tuple[dict[Key, Tensor], dict[Key, Tensor]]:
        """Merge what all processes have, from `tokens` tokens.

        Return the importance [sampled tokens] float32, which is 1 on average and where it is not known, and
        the mean moments [K, K] float32 of tokens weighed by it.
        """
        sampler.merge(list(self.sampled.values()), sums)
        importance, moments = {}, {}
        for key, width in self.widths.items():
            total = sums.reduce(self.totals.get(key, torch.zeros((), dtype=torch.float64)))
            mean = float(total) / max(1, tokens) or 1.0
            importance[key] = (self.sampled[key][:, 0] / mean).nan_to_num(1.0)
            if key in self.summed:
                empty = torch.zeros(width, width, dtype=torch.float64, device=sums.device)
                moments[key] = (sums.reduce(self.moments.get(key, empty)) / (mean * max(1, tokens))).float()
        return importance, moments

    def _sample(self, key: Key, slots: Tensor, taken: Tensor) -> None:
        self.sampled[key] = placed(self.sampled[key], slots, taken)
