"""What an MLP does between its linears, written once for the reference, the gradients and the modules."""

from collections.abc import Callable

from torch import Tensor


def gate_ranks(stacked: int, gate: int) -> slice:
    """Return which of the `stacked` rows of B gate reads: its own `gate` rows are the last ones.

    With joint ranks `stacked` equals `gate`, and gate reads the rows that up reads.
    """
    return slice(stacked - gate, stacked)


def combine(up: Tensor, gate: Tensor | None, act: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what the down projection reads: `act(gate) * up`, or `act(up)` in an ungated MLP."""
    return act(up) if gate is None else act(gate) * up
