"""`python -m bench.gpu.limits`: what the card does at best, compiled from limits.cu and run, as a CSV."""

import csv
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.gpu.card import conditions
from bench.report import Row, write_csv

SOURCE = Path(__file__).with_name("limits.cu")


def main(output: Annotated[Path, typer.Argument(help="CSV.")]) -> None:
    """Measure barriers, gaps between kernels and reading on the first card, and write them down."""
    rows = measure("".join(map(str, torch.cuda.get_device_capability(0))))
    write_csv(output, conditions(), rows)
    for row in rows:
        print(f"{row['what']:75} {row['value']:>10} {row['unit']}")


def measure(capability: str) -> list[Row]:
    """`capability`: 90 for 9.0, what to compile for."""
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
