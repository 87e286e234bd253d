"""Our own work runs without the inference mode, autocast and defaults that a caller has set for torch."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def plain_torch() -> Iterator[None]:
    """Leave inference mode, autocast, and other defaults than float32 on the CPU, until the block ends.

    Statistics would be rounded to 16 bits under autocast, and have no gradients in inference mode. As a
    decorator, it does this for each call of a function. The default dtype is that of the whole process.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if (before := torch.get_default_dtype()) != torch.float32:
            stack.callback(torch.set_default_dtype, before)
            torch.set_default_dtype(torch.float32)
        yield
