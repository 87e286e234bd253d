"""The base of the modules that replace linears: tensors of fixed dtype, weights of any format, and checks."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from rana_kernels.nn.format import Format, format_of
from rana_kernels.ops.checks import wide_dtype, widen
from rana_kernels.ops.quantized import dequantize

Module = TypeVar("Module", bound=nn.Module)


class AdapterModule(nn.Module):
    """A module whose thresholds, norms and scales keep their dtypes under `.to(bfloat16)` and `.half()`.

    Its matrices are parameters if they are floats. Quantised matrices are buffers, each with a scale.
    Thresholds must be finite and >= 0, and scales finite. Loading a state dict checks this.

    matrices   the columns of each matrix, by its name
    """

    threshold: Tensor
    matrices: dict[str, int]

    def __init__(self) -> None:
        super().__init__()
        self.matrices = {}

    def register_matrix(
        self,
        name: str,
        rows: int,
        columns: int,
        format: Format,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Give the module an empty weight `name`, and `name`_scale, which is None for floats."""
        for old in (name, f"{name}_scale"):
            if hasattr(self, old):
                delattr(self, old)
        self.matrices[name] = columns
        if format.quantized:
            weight, scale = format.empty(rows, columns, device)
            self.register_buffer(name, weight)
            self.register_buffer(f"{name}_scale", scale)
        else:
            self.register_parameter(name, empty_parameter(rows, columns, device=device, dtype=dtype))
            setattr(self, f"{name}_scale", None)  # torch.export takes no buffers of None

    def change_formats(self, given: dict[str, Tensor]) -> None:
        """Change the format of each empty matrix to the format of its tensor in `given`."""
        for name, columns in self.matrices.items():
            old, new = getattr(self, name), given.get(name)
            if new is None or old.dtype == new.dtype:
                continue
            if old.is_floating_point() and new.is_floating_point():
                continue  # a parameter takes floats of any dtype
            wanted = format_of(new, given.get(f"{name}_scale"), columns)
            wanted = wanted.for_rows(columns) if name == "rows" else wanted
            self.register_matrix(name, len(old), columns, wanted, "meta", new.dtype)

    def register_float32(self, name: str, size: int, device: torch.device | str | None) -> None:
        self.register_buffer(name, torch.zeros(size, dtype=torch.float32, device=device))

    def _apply(self, fn, recurse=True):
        scales = {f"{name}_scale" for name in self.matrices}
        fixed = {"threshold", "norms", *scales}
        before = {n: b for n, b in self._buffers.items() if n in fixed and b is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = self.get_buffer(name)
            if now.dtype != torch.float16 if name in scales else now.dtype.itemsize < 4:
                self._buffers[name] = buffer.to(now.device)
        return self

    @property
    def has_threshold(self) -> bool:
        """Whether the module has a mask of its own. The linears within a RanaMLP are masked by it."""
        return "threshold" in self._buffers

    def set_threshold(self, threshold: float | Tensor) -> None:
        """Set one threshold for all rows ([]) or one for each row ([R]).

        Raises ValueError unless every threshold is finite and >= 0.
        """
        new = torch.as_tensor(threshold, dtype=torch.float32)
        _require_threshold(new, type(self).__name__)
        with torch.no_grad():
            self.threshold.copy_(new)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        checks = {f"{name}_scale": _require_scale for name in self.matrices}
        checks["threshold"] = _require_threshold
        for name, check in checks.items():
            loaded = state_dict.get(prefix + name)
            if loaded is not None and not loaded.is_meta:
                try:
                    check(loaded, prefix + name)
                except ValueError as error:
                    errors.append(str(error))
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


def _require_threshold(threshold: Tensor, name: str) -> None:
    bad = threshold[~(threshold.isfinite() & (threshold >= 0))]
    if bad.numel() > 0:
        raise ValueError(f"{name}: threshold has {bad[0].item()}, wanted finite numbers >= 0")


def _require_scale(scale: Tensor, name: str) -> None:
    bad = scale[~scale.isfinite()]
    if bad.numel() > 0:
        raise ValueError(f"{name} has {bad[0].item()}, wanted finite numbers")


def check_values(model: nn.Module) -> None:
    """Raise ValueError if any threshold of `model` is negative or not finite, or any scale not finite.

    Loaders that place tensors themselves need this, because they bypass the check of `load_state_dict`.
    """
    for name, module in model.named_modules():
        if not isinstance(module, AdapterModule):
            continue
        if module.has_threshold:
            _require_threshold(module.threshold, name)
        for matrix in module.matrices:
            scale = getattr(module, f"{matrix}_scale")
            if scale is not None:
                _require_scale(scale, f"{name}.{matrix}_scale".lstrip("."))


def require_floats(module: AdapterModule) -> None:
    """Raise ValueError if a matrix of the module, or of a part of it, is quantised."""
    for part in module.modules():
        for name in part.matrices if isinstance(part, AdapterModule) else ():
            if getattr(part, f"{name}_scale") is not None:
                raise ValueError(
                    f"{type(module).__name__}: {name} is quantised, wanted floats to train or rewrite them: "
                    "compress the original model with bits=16"
                )


def fill_module(module: Module, **tensors: Tensor | None) -> Module:
    """Assign all tensors of an empty module by their names in the state dict, and return the module.

    Nothing is copied. A matrix takes the format of its tensor: floats, or int8 or uint8 with a scale. Every
    adapted linear in the module also gets its empty `weight`. Raises RuntimeError for a tensor that is
    missing, unknown or of another shape.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    device = next((tensor.device for tensor in given.values()), torch.device("cpu"))
    for name, child in module.named_modules():
        if isinstance(child, AdaptedLinear):
            like = given.get(f"{name}.rows".lstrip("."), child.weight)
            dtype = like.dtype if like.is_floating_point() else child.weight.dtype
            given[f"{name}.weight".lstrip(".")] = torch.empty(0, dtype=dtype, device=device)
        if isinstance(child, AdapterModule):
            prefix = f"{name}." if name else ""
            own = {k.removeprefix(prefix): t for k, t in given.items() if k.startswith(prefix)}
            child.change_formats(own)
    module.load_state_dict(given, strict=True, assign=True)
    return module


def empty_parameter(*shape: int, device, dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))


class AdaptedLinear(AdapterModule):
    """The common part of all modules that replace one linear: its sizes, its bias and the empty `weight`."""

    weight: Tensor
    rows: Tensor
    rows_scale: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias_size: int, device, dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))
        self.register_parameter(
            "bias", empty_parameter(bias_size, device=device, dtype=dtype) if bias_size else None
        )

    def extra_repr(self) -> str:
        ranks = f", ranks={self.rows.shape[0]}" if hasattr(self, "rows") else ""
        widths = {torch.int8: 8, torch.uint8: 4}
        dtypes = {name: getattr(self, name).dtype for name in self.matrices}
        bits = "".join(f", {name}_bits={widths[dtype]}" for name, dtype in dtypes.items() if dtype in widths)
        return f"in_features={self.in_features}, out_features={self.out_features}{ranks}{bits}"


def wide_weight(weight: Tensor, scale: Tensor | None, columns: int, dtype: torch.dtype) -> Tensor:
    """Return a weight of any format as floats in the dtype in which sums for `dtype` are accumulated."""
    return dequantize(weight, scale, columns, wide_dtype(dtype))


def wide_product(x: Tensor, B: Tensor, B_scale: Tensor | None = None) -> Tensor:
    """Return `x @ B.T` in the dtype in which masks are decided."""
    return widen(x) @ wide_weight(B, B_scale, x.shape[-1], x.dtype).T
