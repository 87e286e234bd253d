"""A report on this machine: which backend serves each op on each device, and how the package was built."""

import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from io import StringIO
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from rana_kernels import backends
from rana_kernels.backends.remedies import remedies
from rana_kernels.system.cpu import features
from rana_kernels.version import __version__


@dataclass(repr=False)
class Report:
    """The result of `report()`. It prints as tables; `to_dict` is for programs.

    serving           {op: {device: backend}}, as torch's dispatcher has it now
    instruction_set   the instruction set that the compiled CPU ops use; None if they were not built
    threads           CPU threads that torch uses
    processors        processors of the machine
    cards             names of the graphics cards
    versions          {package: version}; None for a package that is not installed
    features          {vector extension that the CPU ops can use: whether this processor has it}
    build             compiler, torch and instruction sets of the build; None without the optional module `_C`
    remedies          what makes it slow or incomplete here: a line for each thing, with its remedy
    """

    serving: dict[str, dict[str, str]]
    instruction_set: str | None
    threads: int
    processors: int
    cards: list[str]
    versions: dict[str, str | None]
    features: dict[str, bool]
    build: dict[str, Any] | None
    remedies: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __rich__(self) -> Group:
        lines = [Text(f"- {line}") for line in self.remedies]
        more = [Text("\nWhat would make it faster or complete here:"), *lines] if lines else []
        return Group(_serving_table(self.serving), _facts_table(self), *more)

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=100).print(self)
        return text.getvalue().rstrip()

    __repr__ = __str__


def report() -> Report:
    """Report which backend serves each op on each device, and the facts about the machine and the build."""
    host = _host_module()
    return Report(
        serving=backends.serving(),
        instruction_set=backends.instruction_set() if backends.installed("cpu") else None,
        threads=torch.get_num_threads(),
        processors=os.cpu_count() or 1,
        cards=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        versions={
            "rana_kernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _version(name) for name in ("transformers", "safetensors")},
        },
        features=features(),
        build=dict(host.build_facts()) if host else None,
        remedies=remedies(),
    )


def _host_module() -> Any:
    try:
        from rana_kernels import _C
    except ImportError:  # optional: built only where pybind11 was found, and for one Python
        return None
    return _C


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _serving_table(serving: dict[str, dict[str, str]]) -> Table:
    devices = list(next(iter(serving.values())))
    table = Table("op", *devices, title="Backend of each op", title_justify="left")
    for op, servers in serving.items():
        table.add_row(op, *(servers[device] for device in devices))
    return table


def _facts_table(found: Report) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("instruction set", found.instruction_set or "none: the CPU ops were not compiled")
    table.add_row("threads", f"{found.threads} of {found.processors} processors")
    table.add_row("graphics cards", ", ".join(found.cards) or "none")
    table.add_row("versions", _list(found.versions))
    table.add_row("processor", _list(found.features))
    table.add_row("build", _list(found.build) if found.build else "not known: _C was not built")
    return table


def _list(facts: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_word(value)}" for key, value in facts.items())


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not installed" if value is None else str(value)
