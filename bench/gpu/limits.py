"""`python -m bench.gpu.limits`: compile and run limits.cu, which measures the limits of the card."""

import csv
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.report.results import Row, conditions, write_csv

SOURCE = Path(__file__).with_name("limits.cu")


def main(output: Annotated[Path, typer.Argument(help="CSV.")]) -> None:
    """Measure barriers, gaps between kernels and reading on the first card, and write a CSV."""
    rows = measure("".join(map(str, torch.cuda.get_device_capability(0))))
    write_csv(output, conditions("cuda"), rows)
    for row in rows:
        print(f"{row['what']:75} {row['value']:>10} {row['unit']}")


def measure(capability: str) -> list[Row]:
    """Compile for `capability` (90 for 9.0), run, and return what was measured."""
    with tempfile.TemporaryDirectory() as folder:
        program = compiled(Path(folder) / "limits", capability)
        printed = subprocess.run([program], capture_output=True, text=True, check=False)
    if printed.returncode:
        raise RuntimeError(f"{SOURCE.name} fails: {printed.stderr}")
    return list(csv.DictReader(printed.stdout.splitlines(), fieldnames=("what", "value", "unit")))


def compiled(program: Path, capability: str) -> Path:
    target = f"-gencode=arch=compute_{capability},code=sm_{capability}"
    nvcc = f"{os.environ['CUDA_HOME']}/bin/nvcc" if "CUDA_HOME" in os.environ else "nvcc"
    subprocess.run([nvcc, "-O3", "-std=c++17", target, str(SOURCE), "-o", str(program)], check=True)
    return program


if __name__ == "__main__":
    typer.run(main)
