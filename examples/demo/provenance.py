"""What stands behind a number: without these it could not be compared with another machine's."""

import datetime
import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

import rana_kernels
from rana_kernels import backends


@dataclass(frozen=True)
class Provenance:
    date: str
    processor: str
    cores: int
    instruction_set: str
    served_by: str
    python: str
    torch: str
    transformers: str
    rana_kernels: str
    revision: str

    def line(self) -> str:
        """One line, for captions."""
        kernels = f"{self.served_by} kernels" + (
            f" ({self.instruction_set})" if self.served_by == "cpu" else ""
        )
        return (
            f"{self.processor}, {self.cores} cores · {kernels} · torch {self.torch} · "
            f"rana_kernels {self.rana_kernels}, revision {self.revision} · {self.date}"
        )


def provenance() -> Provenance:
    return Provenance(
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        instruction_set=backends.instruction_set(),
        served_by=backends.serving()["masked_mlp"]["cpu"],
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=version("transformers"),
        rana_kernels=rana_kernels.__version__,
        revision=_revision(),
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _revision() -> str:
    """The commit, with a plus where files differ from it; "unknown" outside a checkout."""
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--abbrev=7", "--dirty=+", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
