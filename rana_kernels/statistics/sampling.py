"""A uniform sample of a stream of tokens, which several processes can draw together."""

import torch
from torch import Tensor
from torch import distributed as dist

from rana_kernels.statistics.processes import ProcessGroupSums


class Sampler:
    """A uniform sample of a stream of tokens: the tokens whose positions have the smallest hashes.

    The choice depends on positions and seed only, not on how the stream is split into batches.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.seen = size, seed, 0
        self.positions = torch.empty(0, dtype=torch.int64)  # of the tokens in the sample, by slot

    def skip(self, count: int) -> None:
        """Leave the next `count` tokens to another process."""
        self.seen += count

    def select(self, count: int) -> tuple[Tensor, Tensor]:
        """Read `count` tokens. Return the indices of those that enter the sample, and their slots in it.

        The slots are those of tokens that leave the sample, and then new ones at its end (`placed`).
        """
        new, held = torch.arange(self.seen, self.seen + count), len(self.positions)
        chosen = self.choose(torch.cat([self.positions, new]))
        leaves = torch.ones(held, dtype=torch.bool).index_fill_(0, chosen[chosen < held], False)
        take, free = chosen[chosen >= held] - held, leaves.nonzero()[:, 0]
        slots = torch.cat([free, torch.arange(held, held + len(take) - len(free))])
        self.positions = placed(self.positions, slots, new[take])
        self.seen += count
        return take, slots

    def choose(self, positions: Tensor) -> Tensor:
        """Return the ascending indices of the entries of `positions` that are sampled."""
        count = min(self.size, len(positions))
        return _hash(positions, self.seed).topk(count, largest=False).indices.sort().values

    def merge(self, samples: list[Tensor], sums: ProcessGroupSums) -> None:
        """Merge the samples of all processes, each [tokens of this process, any], into one, in place.

        Its tokens are in the order of the stream.
        """
        held = torch.full((sums.size, self.size), -1)
        held[sums.rank, : len(self.positions)] = self.positions
        positions = sums.reduce(held, dist.ReduceOp.MAX).flatten().sort().values
        positions = positions[positions >= 0]
        positions = positions[self.choose(positions)]
        kept = torch.isin(self.positions, positions)
        places = torch.searchsorted(positions, self.positions[kept])
        for sample in samples:
            merged = sample.new_zeros(len(positions), sample.shape[1])
            merged[places.to(sample.device)] = sample[kept.to(sample.device)]
            sample.set_(sums.reduce(merged).untyped_storage(), 0, merged.shape, merged.stride())


def placed(sample: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
    """Return `sample` with `rows` in `slots`. It is written in place, unless some slots are at its end."""
    slots, longer = slots.to(sample.device), int((slots >= len(sample)).sum())
    if longer:
        sample = torch.cat([sample, sample.new_empty(longer, *sample.shape[1:])])
    sample[slots] = rows
    return sample


def _hash(positions: Tensor, seed: int) -> Tensor:
    """Return the splitmix64 hash of every position. int64 products wrap around, as the hash needs."""

    def signed(constant: int) -> int:
        return constant - (1 << 64) if constant >= 1 << 63 else constant

    def xor_shift(z: Tensor, bits: int) -> Tensor:
        return z ^ ((z >> bits) & ((1 << (64 - bits)) - 1))

    z = (positions + 1) * signed(0x9E3779B97F4A7C15) + seed
    z = xor_shift(z, 30) * signed(0xBF58476D1CE4E5B9)
    z = xor_shift(z, 27) * signed(0x94D049BB133111EB)
    return xor_shift(z, 31)
