"""What results say of the card that they are from."""

from datetime import date
from importlib.metadata import version

import torch

from bench.report import revision, versions
from rana_kernels import backends


def conditions() -> str:
    """Card, what serves the ops on it, versions, date and revision."""
    served = ", ".join(sorted({s["cuda"] for s in backends.serving().values()}))
    parts = [f"{card()}, served by {served}, {versions()}, CUDA {torch.version.cuda}"]
    if backends.installed("triton"):
        parts.append(f"triton {version('triton')}")
    return ", ".join([*parts, f"{date.today()}", f"revision {revision()}"])


def card() -> str:
    """Its name, as files have it: nvidia-h200."""
    return "-".join(torch.cuda.get_device_name(0).lower().split())
