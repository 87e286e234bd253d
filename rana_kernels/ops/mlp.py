"""The arithmetic between the linears of an MLP, for the reference, the gradients and the modules."""

from collections.abc import Callable

from torch import Tensor


def gate_ranks(stacked: int, gate: int) -> slice:
    """Return which of the `stacked` rows of B belong to gate: the last `gate` of them.

    With joint ranks `stacked` equals `gate`, so gate and up read the same rows.
    """
    return slice(stacked - gate, stacked)


def combine(up: Tensor, gate: Tensor | None, act: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the input of the down projection: `act(gate) * up`, or `act(up)` in an ungated MLP."""
    return act(up) if gate is None else act(gate) * up
