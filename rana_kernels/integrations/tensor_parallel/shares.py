"""The shares of each process, from transformers' plan (`tp_plan="auto"`) to the modules of `modules.py`.

The plan says for every linear whether its outputs or its inputs are divided. transformers would divide each
tensor of an adapter in that way, which is wrong for adapters. They are therefore set aside while transformers
loads everything else. A line of the plan applies to all layers, so a dense linear is set aside too if another
layer has an adapter at the same place, and so is every quantised dense linear. Each process then reads only
its own shares from the files. The columns of quantised weights are divided between groups only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch import distributed as dist

from rana_kernels.integrations.tensor_parallel import modules
from rana_kernels.model.install import replace_modules
from rana_kernels.nn.adapters import RanaLinear, RanaNeuronLinear, RanaReceiver
from rana_kernels.nn.dense import QuantizedLinear
from rana_kernels.nn.format import Format, format_of
from rana_kernels.nn.mlp import RanaMLP, halves_of_scale

# {style of the plan: whether the outputs are gathered} and {style: whether the inputs arrive complete}
_COLUMN = {"colwise": False, "colwise_rep": True, "colwise_gather_output": True}
_ROW = {"rowwise": False, "rowwise_rep": True, "rowwise_split_input": True}

_ADAPTERS = RanaLinear | RanaReceiver | RanaNeuronLinear | RanaMLP | QuantizedLinear

Read = Callable[[str], Any]  # full name of a tensor -> a tensor, or a view of a file that can be sliced


class Shares:
    """This process's shares of the tensors of one module."""

    def __init__(self, name: str, module: nn.Module, read: Read, group: dist.ProcessGroup) -> None:
        self.name, self.module, self.read, self.group = name, module, read, group

    def of(self, child: str) -> Shares:
        """Return the shares of a submodule."""
        return Shares(f"{self.name}.{child}", self.module.get_submodule(child), self.read, self.group)

    def part(self, width: int) -> int:
        """Return width / P. Raise ValueError if this is not a whole number."""
        size = self.group.size()
        if width % size:
            raise ValueError(
                f"{self.name}: {width} rows or columns are to be shared among {size} processes, wanted a "
                "multiple of their number: take a number that divides it"
            )
        return width // size

    def __call__(self, tensor: str, dim: int | None = None, widths: tuple[int, ...] = ()) -> Any:
        """Return this process's share of `tensor`, or None if the module has no such tensor.

        dim      the dimension that is divided; None: every process has the whole tensor
        widths   widths of the parts along `dim` that are divided one by one (q, k and v, or gate and up);
                 (): there is one part
        """
        like: Tensor | None = getattr(self.module, tensor, None)
        if like is None:
            return None
        windows = None if dim is None else self._windows(widths or (like.shape[dim],))
        return self._cut(tensor, dim, windows).to(like.dtype)

    def matrix(self, name: str, dim: int, widths: tuple[int, ...] = ()) -> dict[str, Any]:
        """Return this process's share of a matrix and of its scale, which is None for floats, by their names.

        Raises ValueError if the columns of a quantised matrix would be divided within a group, or in 4 bits
        within a block of packed columns.
        """
        weight, scale = getattr(self.module, name), getattr(self.module, f"{name}_scale", None)
        if scale is None or dim == 0:
            return {name: self(name, dim, widths), f"{name}_scale": self(f"{name}_scale", dim, widths)}
        matrices = cast(dict[str, int], self.module.matrices)
        columns = matrices[name]
        format, windows = format_of(weight, scale, columns), self._windows(widths or (columns,))
        self._check_borders(name, format, columns, widths or (columns,))
        a_byte, group = (2 if format.bits == 4 else 1), format.group
        stored = [slice(w.start // a_byte, -(-w.stop // a_byte)) for w in windows]
        groups = None if group is None else [slice(w.start // group, -(-w.stop // group)) for w in windows]
        whole = None if groups is None else 1
        return {name: self._cut(name, 1, stored), f"{name}_scale": self._cut(f"{name}_scale", whole, groups)}

    def _windows(self, widths: tuple[int, ...]) -> list[slice]:
        """Return this process's share of each part, as a window of all parts in a row."""
        windows, start = [], 0
        for width in widths:
            share = self.part(width)
            first = start + self.group.rank() * share
            windows.append(slice(first, first + share))
            start += width
        return windows

    def _cut(self, tensor: str, dim: int | None, windows: list[slice] | None) -> Tensor:
        source = self.read(f"{self.name}.{tensor}")
        if dim is None or windows is None:
            return source[:]
        return torch.cat([source[:, w] if dim == 1 else source[w] for w in windows], dim)

    def _check_borders(self, name: str, format: Format, columns: int, widths: tuple[int, ...]) -> None:
        start = 0
        for width in widths:
            share = self.part(width)
            borders = [start + share * i for i in range(self.group.size() + 1)]
            if any(border != columns and not format.splits_at(border) for border in borders):
                raise ValueError(
                    f"{self.name}: {name} is divided into {share} columns a process, wanted a multiple of "
                    f"{format.border}, because it is quantised in {format.bits} bits: take fewer processes, "
                    "or compress with a smaller group or more bits"
                )
            start += width


def form(style: str, own: Shares) -> nn.Module:
    """Build the module that replaces `own.module` in this process. Raise ValueError for an unknown style."""
    if isinstance(own.module, RanaMLP):
        return _mlp(own.module, own)
    if style in _COLUMN:
        return _column(own.module, own, gathered=_COLUMN[style])
    if style in _ROW:
        return _row(own.module, own, split=_ROW[style])
    wanted = ", ".join([*_COLUMN, *_ROW])
    raise ValueError(f"{own.name}: its style in the plan is {style!r}, wanted one of {wanted}")


def _column(module: Any, own: Shares, gathered: bool) -> nn.Module:
    inner: nn.Module
    if isinstance(module, RanaLinear):
        rows = modules.Rows(**own.matrix("rows", 1, module.widths), bias=own("bias", 0, module.widths))
        inner = nn.Sequential(_ranks(own), rows)
    elif isinstance(module, RanaNeuronLinear):
        whole = {name: own(name) for name in ("threshold", "norms")}
        columns = {**own.matrix("rows", 1, module.widths), "bias": own("bias", 0, module.widths)}
        inner = modules.MaskedRows(**columns, **whole)
    else:
        inner = _dense(module, own, 0, own("bias", 0))
    widths = tuple(own.part(width) for width in getattr(module, "widths", (module.out_features,)))
    handoff = getattr(module, "handoff", None)
    return modules.ColumnParallel(inner, widths, own.group, handoff=handoff, gathered=gathered)


def _row(module: Any, own: Shares, split: bool) -> nn.Module:
    inner: nn.Module
    if isinstance(module, RanaLinear):
        ranks = modules.OwnRanks(**own.matrix("B", 1), threshold=own("threshold", 0), group=own.group)
        inner = nn.Sequential(ranks, modules.Rows(**own.matrix("rows", 0)))
    elif isinstance(module, RanaNeuronLinear):
        inner = modules.MaskedRows(
            **own.matrix("rows", 0), threshold=own("threshold", 0), norms=own("norms", 0), bias=None
        )
    else:
        inner = _dense(module, own, 1, None)
    return modules.RowParallel(inner, own("bias"), own.group, split=split)


def _dense(module: Any, own: Shares, dim: int, bias: Tensor | None) -> modules.Dense:
    """Return a share of a dense linear, whose weight may be quantised."""
    weight, scale = own.matrix("qweight" if isinstance(module, QuantizedLinear) else "weight", dim).values()
    return modules.Dense(weight=weight, weight_scale=scale, bias=bias)


def _ranks(own: Shares) -> modules.Ranks:
    return modules.Ranks(**own.matrix("B", 0), threshold=own("threshold", 0), group=own.group)


def _mlp(module: Any, own: Shares) -> nn.Module:
    up_name, gate_name, down_name = module.names
    down, gate = own.of(down_name), None
    if module.gate_rank is not None and gate_name == up_name:  # one linear computes both, gate first
        both, halves = own.of(up_name), (module.get_submodule(down_name).in_features,) * 2
        rows, scale = both.matrix("rows", 1, halves).values()
        bias = both("bias", 0, halves)
        biases = (None, None) if bias is None else bias.chunk(2)
        parts = zip(rows.chunk(2, dim=1), halves_of_scale(scale), biases, strict=True)
        gate, up = (modules.Rows(*part) for part in parts)
    else:
        up = _expanding(own.of(up_name))
        gate = None if module.gate_rank is None else _expanding(own.of(gate_name))
    neurons = modules.Neurons(threshold=down("threshold", 0), norms=down("norms", 0))
    last = modules.Rows(**down.matrix("rows", 0))
    first = _ranks(own) if module.B is not None else modules.Inputs(own("threshold"), own("norms"))
    bias, activation = down("bias"), module.activation
    return modules.ParallelMLP(first, up, gate, neurons, last, bias, activation, own.group)


def _expanding(own: Shares) -> modules.Rows:
    return modules.Rows(**own.matrix("rows", 1), bias=own("bias", 0))


class SetAside:
    """The modules of a model that are divided here, hidden from transformers while it loads the rest.

    The modules are still empty. Raises ValueError if the number of processes does not divide the heads.
    """

    def __init__(self, model: Any) -> None:
        self.plan: dict[str, str] = model._tp_plan
        found = list(_outermost(model))
        own_lines = {
            line
            for name, module in found
            if isinstance(module, _ADAPTERS)
            for line in _lines(name, module)
            if line in self.plan
        }
        holding = [pair for pair in found if not isinstance(pair[1], RanaReceiver)]
        self.modules = {name: module for name, module in holding if own_lines & {*_lines(name, module)}}
        self.styles = {name: self.plan[_lines(name, module)[0]] for name, module in self.modules.items()}
        _check_heads(model)
        model._tp_plan = {line: style for line, style in self.plan.items() if line not in own_lines}
        hidden = {rf"^{re.escape(name)}\." for name in self.modules}
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            *hidden,
        }
        replace_modules(model, {name: nn.Identity() for name in self.modules})

    def put_back(self, model: Any, files: list[Path], device: torch.device) -> None:
        """Read this process's share of each module from `files`, and put it into the model."""
        group, read = _group(model), _reader(files)
        for name, module in self.modules.items():
            share = form(self.styles[name], Shares(name, module, read, group))
            replace_modules(model, {name: share.to(device)})
        model._tp_plan = self.plan  # transformers needs the plan to count the heads of its caches
        model.requires_grad_(False)


def processes(model: Any) -> int:
    """Return how many processes share the model that transformers is about to load."""
    config: Any = getattr(model.config, "distributed_config", None)
    if isinstance(getattr(config, "tp_plan", None), dict):
        raise ValueError(f"tp_plan is {config.tp_plan}, wanted 'auto': adapters follow the model's own plan")
    return getattr(config, "tp_size", None) or 1


def _outermost(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield adapters and linears by full name, but not the parts of a RanaMLP."""
    for name, module in model.named_children():
        if isinstance(module, _ADAPTERS | nn.Linear):
            yield prefix + name, module
        else:
            yield from _outermost(module, f"{prefix}{name}.")


def _lines(name: str, module: nn.Module) -> list[str]:
    """Return the lines of the plan for the linears that `module` replaces. A line applies to all layers."""
    names = [f"{name}.{child}" for child in module.names] if isinstance(module, RanaMLP) else [name]
    return [re.sub(r"\.\d+(?=\.)", ".*", full) for full in names]


def _check_heads(model: Any) -> None:
    config, size = model.config, processes(model)
    for field in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, field, None)
        if heads and heads % size:
            raise ValueError(
                f"{type(model).__name__}: {field} is {heads} and there are {size} processes, wanted a number "
                "of processes that divides it"
            )


def _group(model: Any) -> dist.ProcessGroup:
    mesh = model._device_mesh
    return mesh.get_group("tp") if mesh.ndim > 1 else mesh.get_group()


def _reader(files: list[Path]) -> Read:
    opened = [safe_open(file, framework="pt") for file in files]
    file_of = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - no mapping
    return lambda name: file_of[name].get_slice(name)
