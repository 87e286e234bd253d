"""The facts that stand beside every result (machine, versions, date, revision), and the files of results."""

import csv
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from io import StringIO
from pathlib import Path

import torch

from rana_kernels import backends
from rana_kernels.system.cpu import cpu_field, processor_name
from rana_kernels.system.files import write_whole

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "bench" / "results"
Row = dict[str, object]


def conditions(device: str = "cpu") -> str:
    """Return the machine, what serves the ops on `device` ("cpu" or "cuda"), versions, date and revision."""
    served = ", ".join(sorted({s[device] for s in backends.serving().values()}))
    parts = [f"{machine() if device == 'cpu' else card()}, served by {served}, {versions()}"]
    if device == "cuda":
        parts.append(f"CUDA {torch.version.cuda}")
        parts += [f"triton {version('triton')}"] if backends.installed("triton") else []
    return ", ".join([*parts, f"{date.today()}", f"revision {revision()}"])


def machine() -> str:
    """Return the part of `conditions` that two runs must share for their times to be compared."""
    facts = [processor(), cpu_field("cpu family"), cpu_field("model"), cpu_field("stepping")]
    name = " ".join(part for part in (facts[0], "-".join(filter(None, facts[1:]))) if part)
    return f"{name}, {torch.get_num_threads()} threads, {backends.instruction_set()}"


def processor() -> str:
    """Return the processor's name as a file name."""
    return re.sub(r"\W+", "-", processor_name()).strip("-").lower()


def card() -> str:
    """Return the name of the first graphics card as a file name: nvidia-h200."""
    return "-".join(torch.cuda.get_device_name(0).lower().split())


def versions() -> str:
    return f"torch {torch.__version__}, Python {platform.python_version()}"


def revision() -> str:
    """Return the revision of the code, "-dirty" if it has changes. Results and pages do not count as code.

    RANA_REVISION names the revision of a copy without its history.
    """
    if named := os.environ.get("RANA_REVISION"):
        return named
    if not shutil.which("git"):
        return "unknown"
    found = _git("describe", "--always").stdout.strip()
    pages = (":!bench/results", ":!docs", ":!*.md")
    changed = _git("diff", "--quiet", "HEAD", "--", ".", *pages).returncode != 0
    return f"{found}-dirty" if found and changed else found or "unknown"


def _git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def columns(rows: Sequence[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def write_csv(path: Path, stamp: str, rows: list[Row]) -> None:
    """Write rows, with the stamp on the first line, after a `#`."""
    text = StringIO(newline="")
    writer = csv.DictWriter(text, columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, f"# {stamp}\n{text.getvalue()}")


def read_csv(path: Path) -> tuple[str, list[dict[str, str]]]:
    """Return (stamp, rows) of a file that `write_csv` wrote."""
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    if not first.startswith("# "):
        raise ValueError(f"{path} does not begin with the conditions of its run: it is not a result of ours")
    return first[2:], list(csv.DictReader(lines))


def write_json(path: Path, stamp: str, data: dict[str, object]) -> None:
    write(path, json.dumps({"conditions": stamp, **data}, indent=1, allow_nan=False) + "\n")


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8", newline=""))
