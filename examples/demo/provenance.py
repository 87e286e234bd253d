"""What stands behind a number: without these it could not be compared with another machine's."""

import datetime
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version

import torch

import rana_kernels
from bench import report
from rana_kernels import backends
from rana_kernels.system.cpu import processor_name


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
        processor=processor_name(),
        cores=len(os.sched_getaffinity(0)),
        instruction_set=backends.instruction_set(),
        served_by=backends.serving()["masked_mlp"]["cpu"],
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=version("transformers"),
        rana_kernels=rana_kernels.__version__,
        revision=report.revision(),
    )
