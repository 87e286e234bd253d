"""The Plan: the sizes and thresholds of the adapters of all linears of a model, stored as JSON.

A checkpoint stores its plan, because the plan determines the shape of every module. Costs are FLOPs a token
over the linears of the transformer blocks; a multiply-add is two FLOPs.
"""

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

from rana_kernels.nn.format import Format

KINDS = ("rank", "neuron", "dense")
METRICS = ("output", "loss")
PLAN_FORMAT = 4  # of its JSON: raise it when fields or their meaning change


class Setting(NamedTuple):
    """The mask of one neuron adapter at another budget than the planned one (`model/dial.py`).

    live        expected mean live rows a token
    threshold   the smallest score of a live row. None: `compress` chooses it, as for the adapter
    """

    live: float
    threshold: float | None = None


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter, or one linear left dense.

    kind          rank: y = A (m ⊙ Bx) + b · neuron: y = W (m ⊙ x) + b · dense: y = Wx + b
    names         the full names of its linears, in the order in which the model calls them. Several linears
                  are joint: they read the same input, and share ranks or the one mask of a neuron adapter
    in_features   K
    out_features  N of each of `names`
    rank          stored rows: R of a rank adapter, K of a neuron adapter, 0 if dense
    live          expected mean live rows a token
    threshold     the smallest score of a live row; a score is |h_i| / norms_i of a rank, |x_i|·norms_i of a
                  neuron, with norms over the outputs of all its linears. None: `compress` chooses it so that
                  `live` rows a token of the calibration sample are live
    bias          whether any of `names` has a bias
    metric        the unit of its errors, scores and thresholds: "output", or "loss", where every output is
                  weighted by how strongly the loss depends on it
    bits          of its weights: 16 (floats of the model's dtype), 8 or 4. With 4, `rows` of ranks have 8
    group         columns of a weight that share a scale: 32, 64, 128, or None for a whole row
    settings      of a neuron adapter: its mask at each budget of the dial, from the lowest cost
    """

    kind: str
    names: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    rank: int = 0
    live: float = 0.0
    threshold: float | None = None
    bias: bool = False
    metric: str = "output"
    bits: int = 16
    group: int | None = None
    settings: tuple[Setting, ...] = ()

    def __post_init__(self) -> None:
        _check_types(self)
        _check_sizes(self)
        _check_settings(self)

    @property
    def width(self) -> int:
        """N, the total output features of its linears."""
        return sum(self.out_features)

    @property
    def dense_flops(self) -> int:
        return 2 * self.in_features * self.width

    @property
    def flops(self) -> float:
        if self.kind == "dense":
            return self.dense_flops
        through_B = self.rank * self.in_features if self.kind == "rank" else 0
        return 2 * (through_B + self.live * self.width)

    @property
    def format(self) -> Format:
        """The format of its weights. Some `rows` have 8 bits instead of 4 (`rows_format`)."""
        return Format(self.bits, self.group)

    def rows_format(self, columns: int) -> Format:
        """Return the format of `rows` with so many columns."""
        return self.format.for_ranks if self.kind == "rank" else self.format.for_rows(columns)

    @property
    def changes(self) -> bool:
        """Whether a module takes the place of its linears."""
        return self.kind != "dense" or self.format.quantized

    def with_format(self, format: Format) -> "AdapterSpec":
        return replace(self, bits=format.bits, group=format.group)

    def stored_bytes(self, itemsize: int) -> int:
        """Return the bytes of all its tensors, with `itemsize` bytes for each float of weights and biases.

        The float32 thresholds, one for each row, and the norms of a neuron adapter are included. A quantised
        joint adapter may store a few bytes less, if one group has columns of two linears.
        """
        return round(self._bytes(itemsize, self.rank))

    def read_bytes(self, itemsize: int) -> float:
        """Return the bytes of its tensors that one token reads: all of them, but of `rows` the live ones."""
        return self._bytes(itemsize, self.live)

    def _bytes(self, itemsize: int, rows: float) -> float:
        """Return the bytes of all its tensors, but only so many of its rows."""
        biases = itemsize * self.bias * self.width
        if self.kind == "dense":
            return biases + self.width * self.format.row_bytes(self.in_features, itemsize)
        of_B = self.format.row_bytes(self.in_features, itemsize) if self.kind == "rank" else 0
        vectors = 4 * self.rank * (2 if self.kind == "neuron" else 1)
        row = sum(self.rows_format(width).row_bytes(width, itemsize) for width in self.out_features)
        return biases + vectors + self.rank * of_B + rows * row

    @property
    def cost_ratio(self) -> float:
        """The cost of the adapter, as a fraction of the dense cost."""
        return self.flops / self.dense_flops


@dataclass(frozen=True)
class Plan:
    """The adapters of a model. Every linear of the transformer blocks is in exactly one of them.

    adapters          in the order in which the model calls their linears
    method            the method of allocation that chose them
    flops_reduction   the requested reduction of FLOPs, or None
    time_reduction    the requested reduction of time, or None
    max_memory        the requested limit of the bytes of these linears, or None
    bytes_reduction   the requested reduction of the bytes that a token reads, or None
    lm_head           the adapter in place of lm_head: masked, or dense in 8 or 4 bits. None: it keeps its
                      floats

    `reduction` is the reduction of FLOPs that the adapters really have.
    """

    adapters: tuple[AdapterSpec, ...]
    method: str = "custom"
    flops_reduction: float | None = None
    time_reduction: float | None = None
    max_memory: int | None = None
    bytes_reduction: float | None = None
    lm_head: AdapterSpec | None = None

    def __post_init__(self) -> None:
        head = self.lm_head
        fine = head is None or (isinstance(head, AdapterSpec) and len(head.names) == 1)
        _require(fine, "Plan", "lm_head", head, "None or an adapter of one linear")
        _require(head is None or head.changes, "Plan", "lm_head", head, "None, because it stays as it is")
        _require(isinstance(self.method, str), "Plan", "method", self.method, "a string")
        for unit in ("flops_reduction", "time_reduction", "bytes_reduction"):
            asked = getattr(self, unit)
            fine = asked is None or (_is_number(asked) and 0 <= asked < 1)
            _require(fine, "Plan", unit, asked, "None or a number in [0, 1)")
        cap = self.max_memory
        fine = cap is None or (isinstance(cap, int) and not isinstance(cap, bool) and cap > 0)
        _require(fine, "Plan", "max_memory", cap, "None or a positive whole number of bytes")
        seen: set[str] = set()
        for name in (name for adapter in self.all_adapters for name in adapter.names):
            _require(name not in seen, "Plan", f"the linear {name!r}", "two adapters", "one")
            seen.add(name)
        dials = {len(adapter.settings) for adapter in self.all_adapters if adapter.settings}
        _require(len(dials) < 2, "Plan", "settings of its adapters", sorted(dials), "equally many or none")

    @property
    def dense_flops(self) -> int:
        return sum(adapter.dense_flops for adapter in self.adapters)

    @property
    def flops(self) -> float:
        return sum(adapter.flops for adapter in self.adapters)

    @property
    def reduction(self) -> float:
        """The saving over the linears of the blocks, as a fraction of their dense FLOPs."""
        return 1 - self.flops / self.dense_flops if self.adapters else 0.0

    @property
    def all_adapters(self) -> tuple[AdapterSpec, ...]:
        """Its adapters, and that of lm_head if it has one."""
        return self.adapters if self.lm_head is None else (*self.adapters, self.lm_head)

    @property
    def lm_head_format(self) -> Format:
        """The format of the weights of lm_head."""
        return Format() if self.lm_head is None else self.lm_head.format

    @property
    def lm_head_bits(self) -> int:
        return self.lm_head_format.bits

    @property
    def bits(self) -> tuple[int, ...]:
        """The widths of its adapters' weights, widest first."""
        return tuple(sorted({adapter.bits for adapter in self.adapters}, reverse=True))

    def stored_bytes(self, itemsize: int) -> int:
        """Return the bytes that the linears of the blocks store, as in `AdapterSpec.stored_bytes`."""
        return sum(adapter.stored_bytes(itemsize) for adapter in self.adapters)

    def read_bytes(self, itemsize: int) -> float:
        """Return the bytes that one token reads in the linears of the blocks."""
        return sum(adapter.read_bytes(itemsize) for adapter in self.adapters)

    def adapter_of(self, name: str) -> AdapterSpec | None:
        """Return the adapter that covers the linear `name`, or None."""
        return next((adapter for adapter in self.adapters if name in adapter.names), None)

    def with_adapters(self, adapters: tuple[AdapterSpec, ...]) -> "Plan":
        return replace(self, adapters=adapters)

    def to_json(self) -> str:
        return json.dumps({"format": PLAN_FORMAT, **asdict(self)}, indent=1, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> "Plan":
        """Read a plan. Raise ValueError with the wrong field, its value, and the value wanted."""
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"Plan: not JSON: {error}") from None
        _require(isinstance(data, dict), "Plan", "the JSON", type(data).__name__, "an object")
        found = data.pop("format", None)
        _require(found == PLAN_FORMAT, "Plan", "format", found, f"{PLAN_FORMAT}, the one this version reads")
        entries = data.get("adapters")
        _require(isinstance(entries, list), "Plan", "adapters", entries, "a list")
        adapters = tuple(_read(AdapterSpec, entry, f"adapters[{i}]") for i, entry in enumerate(entries))
        head = data.get("lm_head")
        head = None if head is None else _read(AdapterSpec, head, "lm_head")
        return _read(Plan, {**data, "adapters": adapters, "lm_head": head}, "Plan")


def _read(kind: type, data: Any, where: str):
    _require(isinstance(data, dict), "Plan", where, type(data).__name__, "an object")
    known = {field.name for field in fields(kind)}
    unknown = sorted(set(data) - known)
    _require(not unknown, "Plan", f"{where} the fields", unknown, f"only {', '.join(sorted(known))}")
    if kind is AdapterSpec and "settings" in data:
        data = {**data, "settings": _read_settings(data["settings"], where)}
    try:
        return kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in data.items()})
    except TypeError as error:
        raise ValueError(f"Plan: {where}: {error}") from None


def _read_settings(data: Any, where: str) -> tuple[Setting, ...]:
    pairs = isinstance(data, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in data)
    _require(pairs, "Plan", f"{where} settings", data, "a list of pairs (live, threshold)")
    return tuple(Setting(*pair) for pair in data)


def _require(condition: bool, what: str, field: str, has: object, wanted: str) -> None:
    if not condition:
        raise ValueError(f"{what}: {field} has {has!r}, wanted {wanted}")


def _require_format(where: str, prefix: str, bits: object, group: object) -> None:
    try:
        Format(bits, group)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{where}: {prefix}{error}") from None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_size(value: object) -> bool:
    # no real layer has 2^31 features, and a hostile file must not make us allocate memory for one
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _check_types(a: AdapterSpec) -> None:
    where = f"Adapter {a.names!r}"
    _require(a.kind in KINDS, where, "kind", a.kind, f"one of {', '.join(KINDS)}")
    named = isinstance(a.names, tuple) and len(a.names) > 0 and all(isinstance(n, str) and n for n in a.names)
    _require(named, where, "names", a.names, "a non-empty tuple of module names")
    _require(_is_size(a.in_features), where, "in_features", a.in_features, "a positive whole number")
    widths = isinstance(a.out_features, tuple) and all(_is_size(n) for n in a.out_features)
    _require(widths, where, "out_features", a.out_features, "a tuple of positive whole numbers")
    _require(len(a.out_features) == len(a.names), where, "out_features", a.out_features, "one for each name")
    _require(isinstance(a.bias, bool), where, "bias", a.bias, "true or false")
    _require(a.metric in METRICS, where, "metric", a.metric, f"one of {', '.join(METRICS)}")
    _require(_is_number(a.live) and a.live >= 0, where, "live", a.live, "a finite number >= 0")
    _require_format(where, "", a.bits, a.group)
    fine = a.threshold is None or (_is_number(a.threshold) and a.threshold >= 0)
    _require(fine, where, "threshold", a.threshold, "None or a finite number >= 0")


def _check_sizes(a: AdapterSpec) -> None:
    where = f"Adapter {a.names!r}"
    full = min(a.in_features, a.width)
    if a.kind == "rank":
        _require(_is_size(a.rank) and a.rank <= full, where, "rank", a.rank, f"1 to {full}")
    elif a.kind == "neuron":
        _require(a.rank == a.in_features, where, "rank", a.rank, f"{a.in_features}, its in_features")
    else:
        _require(len(a.names) == 1, where, "names", a.names, "one name: a dense linear stands alone")
        _require(a.rank == 0, where, "rank", a.rank, "0, because it is dense")
    if a.kind != "dense":
        _require(a.live <= a.rank, where, "live", a.live, f"at most its rank, {a.rank}")


def _check_settings(a: AdapterSpec) -> None:
    where = f"Adapter {a.names!r}"
    _require(a.kind == "neuron" or not a.settings, where, "settings", a.settings, "(): it has no neurons")
    for live, threshold in a.settings:
        fine = _is_number(live) and 0 <= live <= a.rank
        _require(fine, where, "live of a setting", live, f"0 to its rank, {a.rank}")
        fine = threshold is None or (_is_number(threshold) and threshold >= 0)
        _require(fine, where, "threshold of a setting", threshold, "None or a finite number >= 0")
