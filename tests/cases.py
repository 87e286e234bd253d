"""Shapes, inputs and tolerances of the op tests; the benchmarks draw theirs from here too.

Two kinds of inputs. *Integers*: every sum is exact in float32 and every threshold lies between two
integers, so a right answer is one bit pattern. *Gaussian*: every threshold lies in the widest gap of
the scores near the wanted density, so no order of summation can flip a mask, which would move the
output by far more than rounding does.
"""

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import cycle, product
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda h: F.relu(h).square(),
}
# above this many tokens an op may round masked values to the input's dtype for the second product
DECODE = 16


@dataclass(frozen=True)
class Case:
    """One problem: x [*lead, K], B [R, K], rows [R, N], and I neurons in an MLP.

    gate: None (ungated), "shared" (the ranks of up) or a number of ranks of its own; R counts up's.
    per_row: one threshold a row, or a 0-d one; in an MLP this is the down threshold.
    A dense `linear` has no R, density and thresholds.
    """

    op: str
    R: int
    N: int
    K: int = 0
    I: int = 0  # noqa: E741
    gate: int | str | None = None
    lead: tuple[int, ...] = (1,)
    density: float = 0.5
    bias: bool = True
    per_row: bool = True
    scale: bool = True
    activation: str = "silu"

    @property
    def tokens(self) -> int:
        return prod(self.lead)

    @property
    def id(self) -> str:
        mlp, lowrank, masked = self.op == "masked_mlp", self.op != "masked_linear", self.op != "linear"
        parts = [
            self.op,
            "x".join(["M", *map(str, self.lead)]),
            f"K{self.K}" * lowrank,
            f"R{self.R}" * masked,
            f"gate_{self.gate}-{self.activation}-I{self.I}" * mlp,
            f"N{self.N}",
            f"keep{self.density:g}" * masked,
            "bias" * self.bias,
            "scale" * (self.scale and self.op == "masked_linear"),
            ("per_row" if self.per_row else "one_threshold") * masked,
        ]
        return "-".join(filter(None, parts))


# (R, N), (K, R, N) and (K, R, I, N): single, odd, below, at and past vector widths, and empty
LINEAR = [(1, 1), (7, 5), (16, 16), (33, 65), (48, 17), (100, 47), (130, 256), (9, 64), (0, 8), (8, 0)]
LOWRANK = [(1, 1, 1), (7, 3, 5), (16, 16, 16), (33, 17, 65), (64, 48, 100), (96, 80, 130), (15, 31, 63)]
LOWRANK += [(129, 8, 33), (0, 4, 8), (8, 0, 4), (8, 4, 0)]
MLP = [(1, 1, 1, 1), (7, 3, 9, 5), (16, 16, 32, 16), (33, 17, 65, 31), (64, 48, 130, 70), (31, 64, 100, 33)]
MLP += [(0, 4, 8, 4), (8, 0, 6, 4), (8, 4, 0, 4), (8, 4, 6, 0)]
# (K, N) of a dense layer
DENSE = [(1, 1), (7, 5), (16, 16), (33, 65), (64, 100), (17, 48), (130, 256), (0, 8), (8, 0)]
LEADS = [(1,), (5,), (33,), (), (16,), (2, 1), (300,), (0,), (2, 3), (64,), (2, 0, 3)]
# past the sizes at which a CPU backend splits its work: long inputs, wide outputs, many neurons
LONG = [(3, 66000), (30, 4500)], [(4200, 30, 70)], [(33, 17, 4500, 31)], [(4200, 70), (30, 4500)]
LONG_LEADS = [(1,), (2,), (16,), (20,), (40,)]
# projections and MLPs of models of 0.1 to 1 billion weights, with R = 0.4 K
REAL_LINEAR = [(1536, 576), (4096, 2048)]
REAL_LOWRANK = [(576, 240, 1536), (2048, 816, 5632), (768, 304, 3001)]
REAL_MLP = [(576, 240, 1536, 576), (768, 304, 3072, 768)]
REAL_DENSE = [(576, 576), (2048, 3001)]
REAL_LEADS = [(1,), (4,), (40,)]
DENSITIES = (0.5, 0.25, 1.0, 0.0)


def _zip(shapes, leads, *choices) -> Iterator[tuple]:
    """Every shape with every lead; the other choices take turns, in an order that favours none."""
    turns = list(product(*choices))
    random.Random(0).shuffle(turns)
    return zip(product(shapes, leads), cycle(turns), strict=False)


def _cases(linear, lowrank, mlp, dense, leads) -> list[Case]:
    flag, cases = (True, False), []
    for ((R, N), lead), (density, bias, per_row, scale) in _zip(linear, leads, DENSITIES, flag, flag, flag):
        cases.append(Case("masked_linear", R, N, 0, 0, None, lead, density, bias, per_row, scale))
    for ((K, R, N), lead), (density, bias, per_row) in _zip(lowrank, leads, DENSITIES, flag, flag):
        cases.append(Case("masked_lowrank_linear", R, N, K, 0, None, lead, density, bias, per_row))
    gates = ("separate", "shared", None)
    for ((K, R, neurons, N), lead), (density, bias, per_row, activation, gate) in _zip(
        mlp, leads, DENSITIES, flag, flag, ACTIVATIONS, gates
    ):
        gate = R // 2 + 2 if gate == "separate" else gate
        cases.append(
            Case("masked_mlp", R, N, K, neurons, gate, lead, density, bias, per_row, activation=activation)
        )
    for ((K, N), lead), (bias,) in _zip(dense, leads, flag):
        cases.append(Case("linear", 0, N, K, lead=lead, bias=bias))
    return cases


CASES = _cases(LINEAR, LOWRANK, MLP, DENSE, LEADS) + _cases(*LONG, LONG_LEADS)
# enough for each instruction set
FEW_CASES = [c for c in CASES if zlib.crc32(c.id.encode()) % 6 == 0]
REAL_CASES = _cases(REAL_LINEAR, REAL_LOWRANK, REAL_MLP, REAL_DENSE, REAL_LEADS)
# one plain problem an op, for tests about something else than shapes, and the same in other forms
SMALL = {
    "masked_linear": Case("masked_linear", 33, 65, lead=(3,)),
    "masked_lowrank_linear": Case("masked_lowrank_linear", 17, 65, 33, lead=(3,)),
    "masked_mlp": Case("masked_mlp", 17, 31, 33, 65, gate=12, lead=(3,)),
    "linear": Case("linear", 0, 65, 33, lead=(3,)),
}
FORMS = {
    "linear": SMALL["masked_linear"],
    "linear_bare": replace(SMALL["masked_linear"], bias=False, scale=False, per_row=False),
    "lowrank": SMALL["masked_lowrank_linear"],
    "lowrank_bare": replace(SMALL["masked_lowrank_linear"], bias=False, per_row=False),
    "mlp_separate": SMALL["masked_mlp"],
    "mlp_shared": replace(SMALL["masked_mlp"], gate="shared", bias=False, activation="gelu_tanh"),
    "mlp_ungated": replace(SMALL["masked_mlp"], gate=None, activation="gelu", per_row=False),
    "dense": SMALL["linear"],
    "dense_bare": replace(SMALL["linear"], bias=False),
}


def input_of(args: dict) -> str:
    return "x" if "x" in args else "h"


def matrices_of(args: dict) -> list[str]:
    return [
        n for n in ("B", "rows", "up_rows", "gate_rows", "down_rows", "weight") if args.get(n) is not None
    ]


def make_inputs(case: Case, dtype: torch.dtype, *, integers: bool = False, device: str = "cpu") -> dict:
    """The arguments of `case.op` by name, in the order of its schema."""
    draw = (_Integers if integers else _Gaussian)(case, dtype)
    kinds = {
        "masked_linear": _linear,
        "masked_lowrank_linear": _lowrank,
        "masked_mlp": _mlp,
        "linear": _dense,
    }
    build = kinds[case.op]
    return {n: a.to(device) if isinstance(a, Tensor) else a for n, a in build(case, draw).items()}


def _linear(case: Case, draw) -> dict:
    h, rows = draw.ranks(case.R), draw.matrix(case.R, case.N, fan=64, along=0)
    scale = draw.scale(case.R) if case.scale else None
    scores = h.double().abs() * (1 if scale is None else scale.double())
    threshold = draw.threshold(scores, case.per_row)
    return {"h": h, "rows": rows, "threshold": threshold, "scale": scale, "bias": draw.bias(case.N)}


def _lowrank(case: Case, draw) -> dict:
    x, B = draw.input(case.K, decode=40, prefill=2), draw.matrix(case.R, case.K, fan=64, along=1)
    rows = draw.matrix(case.R, case.N, fan=16, along=0)
    threshold = draw.threshold((x.double() @ B.double().T).abs(), case.per_row)
    return {"x": x, "B": B, "rows": rows, "threshold": threshold, "bias": draw.bias(case.N)}


def _mlp(case: Case, draw) -> dict:
    gate = case.R if case.gate == "shared" else case.gate
    ranks = case.R if case.gate in ("shared", None) else case.R + gate
    # few and small terms: the neurons are products of two or three sums
    few = {"fan": 3 if case.tokens <= DECODE else 2, "top": 1}
    x, B = draw.input(case.K, decode=3, prefill=1), draw.matrix(ranks, case.K, along=1, **few)
    args = {
        "x": x,
        "B": B,
        "up_rows": draw.matrix(case.R, case.I, along=0, **few),
        "gate_rows": None if gate is None else draw.matrix(gate, case.I, along=0, **few),
        "threshold": draw.threshold((x.double() @ B.double().T).abs(), per_row=True),
        "up_bias": draw.bias(case.I, top=1),
        "gate_bias": None if gate is None else draw.bias(case.I, top=1),
        "down_rows": draw.matrix(case.I, case.N, fan=16, along=0),
        "down_norms": draw.scale(case.I),
        "down_threshold": None,
        "down_bias": draw.bias(case.N),
        "activation": draw.activation(case.activation),
    }
    scores = _neurons(_cast(args, torch.float64), _decide).abs() * args["down_norms"].double()
    args["down_threshold"] = draw.threshold(scores, case.per_row, after_rounding=True)
    return args


def _dense(case: Case, draw) -> dict:
    x, weight = draw.input(case.K, decode=40, prefill=2), draw.matrix(case.N, case.K, fan=64, along=1)
    return {"x": x, "weight": weight, "bias": draw.bias(case.N)}


class _Gaussian:
    """Inputs of order 1 with outputs of order 1."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.case, self.dtype, self.prefill = case, dtype, case.tokens > DECODE
        self.generator = torch.Generator().manual_seed(zlib.crc32(case.id.encode()))

    def _normal(self, *shape: int, by: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) * by).to(self.dtype)

    def ranks(self, size: int) -> Tensor:
        return self._normal(*self.case.lead, size)

    def input(self, size: int, decode: int, prefill: int) -> Tensor:
        return self._normal(*self.case.lead, size)

    def matrix(self, rows: int, columns: int, fan: int, along: int, top: int = 2) -> Tensor:
        return self._normal(rows, columns, by=max(1, (rows, columns)[along]) ** -0.5)

    def bias(self, size: int, top: int = 2) -> Tensor | None:
        return self._normal(size, by=0.5) if self.case.bias else None

    def scale(self, size: int) -> Tensor:
        return torch.rand(size, generator=self.generator) + 0.5

    def activation(self, name: str) -> str:
        return name

    def threshold(self, scores: Tensor, per_row: bool, after_rounding: bool = False) -> Tensor:
        """The middle of the widest gap near the wanted density, of each row's scores or of all."""
        margin = 2e-5
        if after_rounding and self.prefill and self.dtype != torch.float32:
            # h may have been rounded on the way to these scores: too much for one gap among all
            margin, per_row = 8 * torch.finfo(self.dtype).eps, True
        if scores.numel() == 0 or self.case.density in (0, 1):
            value = 0.0 if self.case.density else 2 * float(scores.sum()) + 1
            return torch.full(scores.shape[-1:] if per_row else (), value)
        rows = scores.reshape(-1, scores.shape[-1] if per_row else 1)
        threshold = self._widest_gap(rows, margin * scores.square().mean().sqrt())
        return threshold if per_row else threshold[0]

    def _widest_gap(self, scores: Tensor, margin: Tensor) -> Tensor:
        """[M, R] -> [R]. Where no gap near the density is wide enough, keep all of a row or none."""
        M, R = scores.shape
        s = scores.sort(0).values
        s = torch.cat([-s[:1], s, 2 * s[-1:] + 1])
        below = ((1 - self.case.density) * M + torch.rand(R, generator=self.generator)).floor()
        far = (torch.arange(M + 1)[:, None] - below).abs() > M // 8
        gap, at = s.diff(dim=0).masked_fill(far, 0).max(0)
        all_or_none = torch.where(torch.rand(R, generator=self.generator) < self.case.density, 0, M)
        at = torch.where(gap < margin, all_or_none, at)[None]
        return (s.gather(0, at) + s.gather(0, at + 1)).div(2)[0].float()


class _Integers(_Gaussian):
    """Integers whose sums are exact in float32 and, for prefill, masked values exact in bfloat16.

    `fan` bounds how many terms of a sum are not zero, `top` how large a weight is. For decode the
    ranks pass 256, where bfloat16 rounds: a backend that rounds them early is found out.
    """

    def _integers(self, top: int, *shape: int) -> Tensor:
        return torch.randint(-top, top + 1, shape, generator=self.generator).to(self.dtype)

    def ranks(self, size: int) -> Tensor:
        return self._integers(200, *self.case.lead, size)

    def input(self, size: int, decode: int, prefill: int) -> Tensor:
        return self._integers(prefill if self.prefill else decode, *self.case.lead, size)

    def matrix(self, rows: int, columns: int, fan: int, along: int, top: int = 2) -> Tensor:
        values = self._integers(top, rows, columns)
        if (rows, columns)[along] <= fan:
            return values
        rank = torch.rand(rows, columns, generator=self.generator).argsort(along).argsort(along)
        return values.where(rank < fan, 0)

    def bias(self, size: int, top: int = 2) -> Tensor | None:
        return self._integers(top, size) if self.case.bias else None

    def scale(self, size: int) -> Tensor:
        return torch.randint(1, 4, (size,), generator=self.generator).float()

    def activation(self, name: str) -> str:
        return "relu2" if name in ("gelu", "gelu_tanh", "relu2") else "relu"

    def threshold(self, scores: Tensor, per_row: bool, after_rounding: bool = False) -> Tensor:
        shape = scores.shape[-1:] if per_row else ()
        if scores.numel() == 0 or self.case.density == 1:
            return torch.zeros(shape)
        if self.case.density == 0:
            return torch.full(shape, float(scores.max()) + 0.5)
        middle = scores.flatten().sort().values[int((1 - self.case.density) * (scores.numel() - 1))]
        return (torch.randint(0, 2, shape, generator=self.generator) + middle.float() - 0.5).clamp(min=0.5)


# The ops as a user writes them in dense torch: in float64 the oracle, in a dtype the yardstick.
# Written apart from rana_kernels.backends.reference, so that the two hold each other to account.


def dense(op: str, args: dict, dtype: torch.dtype, masks: list[Tensor] | None = None):
    """(y, masks) of an op, computed and returned in `dtype`; `masks` given are used as they are."""
    a, used = _cast(args, dtype), []

    def masked(h: Tensor, threshold: Tensor, scale: Tensor | None = None) -> Tensor:
        used.append(_kept(h, threshold, scale) if masks is None else masks[len(used)])
        return h.where(used[-1], 0)

    if op == "linear":
        return _affine(a["x"], a["weight"].T, a["bias"]), used
    if op == "masked_linear":
        return _affine(masked(a["h"], a["threshold"], a["scale"]), a["rows"], a["bias"]), used
    if op == "masked_lowrank_linear":
        return _affine(masked(a["x"] @ a["B"].T, a["threshold"]), a["rows"], a["bias"]), used
    g = masked(_neurons(a, masked), a["down_threshold"], a["down_norms"])
    return _affine(g, a["down_rows"], a["down_bias"]), used


def _kept(h: Tensor, threshold: Tensor, scale: Tensor | None = None) -> Tensor:
    score = h.abs() if scale is None else h.abs() * scale
    return score.isnan() | (score >= threshold)


def _decide(h: Tensor, threshold: Tensor) -> Tensor:
    return h.where(_kept(h, threshold), 0)


def _affine(z: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    return z @ rows if bias is None else z @ rows + bias


def _neurons(a: dict, masked) -> Tensor:
    """What the down projection reads: act(gate(x)) * up(x)."""
    z, act = masked(a["x"] @ a["B"].T, a["threshold"]), ACTIVATIONS[a["activation"]]
    up = _affine(z[..., : a["up_rows"].shape[0]], a["up_rows"], a["up_bias"])
    if a["gate_rows"] is None:
        return act(up)
    first = z.shape[-1] - a["gate_rows"].shape[0]
    return act(_affine(z[..., first:], a["gate_rows"], a["gate_bias"])) * up


def _cast(args: dict, dtype: torch.dtype) -> dict:
    return {n: a.to(dtype) if isinstance(a, Tensor) else a for n, a in args.items()}


def exact_result(op: str, args: dict, dtype: torch.dtype) -> Tensor:
    """The float64 result rounded once, as every implementation must give it for integer inputs."""
    return dense(op, args, torch.float64)[0].to(dtype)


def assert_close(y: Tensor, op: str, args: dict, dtype: torch.dtype) -> None:
    """Errors, the largest and the mean square, at most twice those of eager torch in `dtype`."""
    truth, masks = dense(op, args, torch.float64)
    eager = dense(op, args, dtype, masks)[0]
    if truth.numel() == 0:
        assert y.shape == truth.shape
        return
    # the last rounding, or a few of float32: a small problem may leave eager without any error
    unit = max(torch.finfo(dtype).eps / 2, 16 * torch.finfo(torch.float32).eps)
    floor = unit * max(1.0, float(truth.abs().max()))
    for measure in (lambda e: float(e.abs().max()), lambda e: float(e.square().mean().sqrt())):
        error, eagers = measure(y.double() - truth), measure(eager.double() - truth)
        assert error <= 2 * eagers + floor, (
            f"{op}: error {error:.3g}, eager's {eagers:.3g}, floor {floor:.3g}"
        )
