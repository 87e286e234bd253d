"""Shapes, inputs and tolerances of the op tests; the benchmarks draw theirs from here too.

Two kinds of inputs. *Integers*: every sum is exact in float32 and every threshold lies between two
integers, so a right answer is one bit pattern. *Gaussian*: every threshold lies in the widest gap of
the scores near the wanted density, so no order of summation can flip a mask, which would move the
output by far more than rounding does.
"""

import random
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, replace
from functools import cache
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

    gate: None (ungated), "joint" (the ranks of up) or a number of ranks of its own; R counts up's.
    R is None in an MLP without B: up and gate then share one mask on x.
    per_row: one threshold a row, or a 0-d one; in an MLP of the down threshold, and of that of x without B.
    bits: the widths of the matrices in the order of the schema, in turns; 16 stands for the input's dtype.
    group: the columns that share a scale; 0 stands for all of a row.
    A dense `linear` has no R, density and thresholds.
    """

    op: str
    _: KW_ONLY
    R: int | None = 0
    N: int
    K: int = 0
    I: int = 0  # noqa: E741
    gate: int | str | None = None
    lead: tuple[int, ...] = (1,)
    density: float = 0.5
    bias: bool = True
    per_row: bool = True
    norms: bool = True
    activation: str = "silu"
    bits: tuple[int, ...] = (16,)
    group: int = 32

    @property
    def tokens(self) -> int:
        return prod(self.lead)

    @property
    def quantized(self) -> bool:
        return self.bits != (16,)

    @property
    def id(self) -> str:
        mlp, lowrank, masked = self.op == "masked_mlp", self.op != "masked_linear", self.op != "linear"
        parts = [
            self.op,
            "x".join(["M", *map(str, self.lead)]),
            f"K{self.K}" * lowrank,
            f"R{self.R}" * (masked and self.R is not None),
            f"gate_{self.gate}-{self.activation}-I{self.I}" * mlp,
            f"N{self.N}",
            f"keep{self.density:g}" * masked,
            "bias" * self.bias,
            "norms" * (self.norms and (self.op == "masked_linear" or self.R is None)),
            ("per_row" if self.per_row else "one_threshold") * masked,
            ("bits" + "_".join(map(str, self.bits)) + f"-g{self.group}") * self.quantized,
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
LONG_QUANTIZED = *LONG[:2], [(33, 17, 4500, 32)], LONG[3]
LONG_LEADS = [(1,), (2,), (16,), (20,), (40,)]
# projections and MLPs of models of 0.1 to 1 billion weights, with R = 0.4 K
REAL_LINEAR = [(1536, 576), (4096, 2048)]
REAL_LOWRANK = [(576, 240, 1536), (2048, 816, 5632), (768, 304, 3001)]
REAL_MLP = [(576, 240, 1536, 576), (768, 304, 3072, 768)]
REAL_DENSE = [(576, 576), (2048, 3001)]
REAL_LEADS = [(1,), (4,), (40,)]
# quantised: even widths, odd and short groups along K, several groups of every size
QUANTIZED = (
    [(1, 2), (7, 6), (33, 66), (17, 64), (48, 130), (20, 300), (0, 8), (8, 0)],
    [(1, 1, 2), (33, 17, 66), (65, 16, 64), (129, 48, 130), (300, 20, 300), (0, 4, 8), (8, 0, 4)],
    [(7, 3, 10, 6), (33, 17, 66, 32), (64, 48, 130, 70), (150, 20, 300, 34), (0, 4, 8, 4), (8, 4, 0, 4)],
    [(1, 1), (7, 5), (33, 66), (65, 64), (129, 48), (300, 130), (0, 8), (8, 0)],
)
QUANTIZED_LEADS = [(1,), (5,), (33,), (2,), (16,), (300,), (2, 3), (0,)]
WIDTHS = [(8,), (4,), (4, 8), (16, 8), (8, 16, 4), (4, 16)]
GROUPS = (32, 64, 128, 0)
DENSITIES = (0.5, 0.25, 1.0, 0.0)


def _zip(shapes, leads, *choices) -> Iterator[tuple]:
    """Every shape with every lead; the other choices take turns, in an order that favours none."""
    turns = list(product(*choices))
    random.Random(0).shuffle(turns)
    return zip(product(shapes, leads), cycle(turns), strict=False)


def _cases(linear, lowrank, mlp, dense, leads) -> list[Case]:
    flag, cases = (True, False), []
    for ((R, N), lead), (density, bias, per_row, norms) in _zip(linear, leads, DENSITIES, flag, flag, flag):
        cases.append(
            Case(
                "masked_linear", R=R, N=N, lead=lead, density=density, bias=bias, per_row=per_row, norms=norms
            )
        )
    for ((K, R, N), lead), (density, bias, per_row) in _zip(lowrank, leads, DENSITIES, flag, flag):
        cases.append(
            Case(
                "masked_lowrank_linear", R=R, N=N, K=K, lead=lead, density=density, bias=bias, per_row=per_row
            )
        )
    gates = ("separate", "joint", None)
    for ((K, R, neurons, N), lead), (density, bias, per_row, activation, gate) in _zip(
        mlp, leads, DENSITIES, flag, flag, ACTIVATIONS, gates
    ):
        gate = R // 2 + 2 if gate == "separate" else gate
        cases.append(
            Case(
                "masked_mlp",
                R=R,
                N=N,
                K=K,
                I=neurons,
                gate=gate,
                lead=lead,
                density=density,
                bias=bias,
                per_row=per_row,
                activation=activation,
            )
        )
    for ((K, N), lead), (bias,) in _zip(dense, leads, flag):
        cases.append(Case("linear", N=N, K=K, lead=lead, bias=bias))
    return cases


def _without_B(mlps: Iterable[Case]) -> list[Case]:
    """The MLPs with one mask on x for up and gate; their K stays, and every other one has norms."""
    return [replace(c, R=None, gate=c.gate and "joint", norms=bool(i % 2)) for i, c in enumerate(mlps)]


def _quantized(cases: list[Case]) -> list[Case]:
    turns = list(product(WIDTHS, GROUPS))
    random.Random(1).shuffle(turns)
    return [replace(c, bits=b, group=g) for c, (b, g) in zip(cases, cycle(turns), strict=False)]


def _mlps(cases: list[Case]) -> list[Case]:
    return [c for c in cases if c.op == "masked_mlp"]


CASES = _cases(LINEAR, LOWRANK, MLP, DENSE, LEADS) + _cases(*LONG, LONG_LEADS)
CASES += _without_B(_mlps(CASES)[::2])
QUANTIZED_CASES = _cases(*QUANTIZED, QUANTIZED_LEADS)
QUANTIZED_CASES = _quantized(QUANTIZED_CASES + _without_B(_mlps(QUANTIZED_CASES)))
QUANTIZED_CASES += _quantized(_cases(*LONG_QUANTIZED, LONG_LEADS[:4]))
# one token, ten rows and more, and a vector of weights that ends within the 32 columns of a scale
HALF_BLOCKS = [
    Case("masked_linear", R=48, N=N, lead=(1,), bits=(bits,), group=32) for N in (144, 272) for bits in (8, 4)
]
QUANTIZED_CASES += HALF_BLOCKS
# rows that are whole packets of 16 bytes, and more of them than the threads of a card take at once
_PACKETS = [
    Case("masked_linear", R=601, N=320),
    Case("masked_lowrank_linear", R=75, N=160, K=1088),
    Case("masked_mlp", R=48, N=96, K=64, I=544, gate=20),
    Case("masked_mlp", R=None, N=96, K=96, I=320, gate="joint"),
    Case("linear", N=150, K=1088),
]
_EVERY_GROUP = list(product(((8,), (4,)), GROUPS))
PACKET_CASES = [
    replace(c, bits=bits, group=group, lead=(M,))
    for c in _PACKETS
    for i, (bits, group) in enumerate(_EVERY_GROUP)
    for M in (1, (2, 3, 16)[i % 3])
]
PACKET_CASES += [
    replace(c, bits=bits, group=64, lead=(M,))
    for c in _PACKETS[1:4]
    for bits, M in (((8, 4), 1), ((4, 8), 9), ((16, 4), 9), ((4, 16), 1), ((8, 16, 4), 9), ((4, 4, 8, 16), 1))
]
# packets of 16 columns that no packet of 32 ends with
PACKET_CASES += [Case("masked_linear", R=48, N=N, lead=(5,), bits=(8,), group=32) for N in (144, 272)]
QUANTIZED_CASES += PACKET_CASES
CASES += QUANTIZED_CASES
# enough for each instruction set
FEW_CASES = [c for c in CASES if zlib.crc32(c.id.encode()) % 6 == 0 or c in HALF_BLOCKS]
LONG_CASES = [c for c in CASES if max(c.N, c.K, c.I) >= 4200]
# past the tiles, tables and lists of the GPU backends, and small enough for an interpreter
_WIDE = [
    Case("masked_linear", R=30, N=700),
    Case("masked_lowrank_linear", R=30, N=70, K=700),
    Case("masked_mlp", R=17, N=32, K=33, I=300, gate=10),
    Case("masked_mlp", R=None, N=32, K=33, I=300, gate="joint"),
    Case("linear", N=70, K=700),
    Case("linear", N=700, K=30),
]
TILED_CASES = [replace(c, lead=(M,)) for M in (1, 5, 40) for c in _WIDE] + [
    Case("masked_linear", R=13000, N=24, density=1.0),
    Case("masked_linear", R=1300, N=24, lead=(5,)),
    Case("masked_linear", R=1300, N=24, lead=(40,)),
    Case("masked_mlp", R=17, N=32, K=33, I=1100, gate=10, lead=(5,)),
]
# the same with quantised weights, odd inputs, and short last groups and blocks: for every op and number of
# tokens another group, and where there is one weight both widths
_WIDE_QUANTIZED = [
    Case("masked_linear", R=30, N=702, bits=(8,)),
    Case("masked_linear", R=30, N=702, bits=(4,)),
    Case("linear", N=70, K=701, bits=(8,)),
    Case("linear", N=70, K=701, bits=(4,)),
    Case("masked_lowrank_linear", R=30, N=158, K=701, bits=(4, 8)),
    Case("masked_lowrank_linear", R=30, N=158, K=701, bits=(16, 4)),
    Case("masked_mlp", R=17, N=34, K=161, I=302, gate=10, bits=(8, 4, 16)),
    Case("masked_mlp", R=None, N=166, K=33, I=302, gate="joint", bits=(4, 4, 8)),
]
QUANTIZED_TILES = [
    replace(c, lead=(M,), group=GROUPS[(i + m) % len(GROUPS)])
    for i, c in enumerate(_WIDE_QUANTIZED)
    for m, M in enumerate((1, 2, 5, 16))
]
CASES += TILED_CASES + QUANTIZED_TILES
REAL_CASES = _cases(REAL_LINEAR, REAL_LOWRANK, REAL_MLP, REAL_DENSE, REAL_LEADS)
# one plain problem an op, for tests about something else than shapes, and the same in other forms
SMALL = {
    "masked_linear": Case("masked_linear", R=33, N=65, lead=(3,)),
    "masked_lowrank_linear": Case("masked_lowrank_linear", R=17, N=65, K=33, lead=(3,)),
    "masked_mlp": Case("masked_mlp", R=17, N=31, K=33, I=65, gate=12, lead=(3,)),
    "linear": Case("linear", N=65, K=33, lead=(3,)),
}
FORMS = {
    "linear": SMALL["masked_linear"],
    "linear_bare": replace(SMALL["masked_linear"], bias=False, norms=False, per_row=False),
    "lowrank": SMALL["masked_lowrank_linear"],
    "lowrank_bare": replace(SMALL["masked_lowrank_linear"], bias=False, per_row=False),
    "mlp_separate": SMALL["masked_mlp"],
    "mlp_joint": replace(SMALL["masked_mlp"], gate="joint", bias=False, activation="gelu_tanh"),
    "mlp_ungated": replace(SMALL["masked_mlp"], gate=None, activation="gelu", per_row=False),
    "mlp_without_B": replace(SMALL["masked_mlp"], R=None, gate="joint"),
    "mlp_without_B_bare": replace(
        SMALL["masked_mlp"], R=None, gate=None, bias=False, norms=False, per_row=False
    ),
    "dense": SMALL["linear"],
    "dense_bare": replace(SMALL["linear"], bias=False),
}
EVEN = {"R": 18, "N": 70, "K": 33, "I": 66}  # 4 bits need an even N
QUANTIZED_FORMS = {
    f"{name}_{bits}": replace(
        FORMS[name], **{k: v for k, v in EVEN.items() if getattr(FORMS[name], k)}, bits=widths, group=group
    )
    for name in ("linear", "lowrank", "mlp_separate", "mlp_without_B", "dense")
    for bits, widths, group in (("int8", (8,), 32), ("int4", (4,), 64), ("mixed", (4, 8, 16), 0))
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
    args = kinds[case.op](case, draw)
    for name, (weight, scale) in draw.quantized.items():
        args |= {name: weight, scale_of(name): scale}
    if case.quantized:
        order = [a.name for a in getattr(torch.ops.rana, case.op).default._schema.arguments]
        args = {name: args.get(name) for name in order}
    return {n: a.to(device) if isinstance(a, Tensor) else a for n, a in args.items()}


def scale_of(matrix: str) -> str:
    """The name of the argument with the scale of a matrix."""
    return matrix.removesuffix("_rows") + "_scale"


def _linear(case: Case, draw) -> dict:
    h, rows = draw.ranks(case.R), draw.matrix("rows", case.R, case.N, fan=64, along=0)
    norms = draw.norms(case.R) if case.norms else None
    scores = h.double().abs() * (1 if norms is None else norms.double())
    threshold = draw.threshold(scores, case.per_row)
    return {"h": h, "rows": rows, "threshold": threshold, "norms": norms, "bias": draw.bias(case.N)}


def _lowrank(case: Case, draw) -> dict:
    x, B = draw.input(case.K, decode=40, prefill=2), draw.matrix("B", case.R, case.K, fan=64, along=1)
    rows = draw.matrix("rows", case.R, case.N, fan=16, along=0)
    threshold = draw.threshold((x.double() @ B.double().T).abs(), case.per_row)
    return {"x": x, "B": B, "rows": rows, "threshold": threshold, "bias": draw.bias(case.N)}


def _mlp(case: Case, draw) -> dict:
    # few and small terms: the neurons are products of two or three sums
    few = {"fan": 3 if case.tokens <= DECODE else 2, "top": 1}
    x, R, norms = draw.input(case.K, decode=3, prefill=1), case.R, None
    if R is None:
        R, B, h = case.K, None, x.double()
        norms = draw.norms(case.K) if case.norms else None
    gate = R if case.gate == "joint" else case.gate
    if case.R is not None:
        B = draw.matrix("B", R if case.gate in ("joint", None) else R + gate, case.K, along=1, **few)
        h = x.double() @ B.double().T
    scores = h.abs() * (1 if norms is None else norms.double())
    args = {
        "x": x,
        "B": B,
        "up_rows": draw.matrix("up_rows", R, case.I, along=0, **few),
        "gate_rows": None if gate is None else draw.matrix("gate_rows", gate, case.I, along=0, **few),
        "threshold": draw.threshold(scores, per_row=B is not None or case.per_row),
        "norms": norms,
        "up_bias": draw.bias(case.I, top=1),
        "gate_bias": None if gate is None else draw.bias(case.I, top=1),
        "down_rows": draw.matrix("down_rows", case.I, case.N, fan=16, along=0),
        "down_norms": draw.norms(case.I),
        "down_threshold": None,
        "down_bias": draw.bias(case.N),
        "activation": draw.activation(case.activation),
    }
    scores = _neurons(_cast(args, torch.float64), _decide).abs() * args["down_norms"].double()
    args["down_threshold"] = draw.threshold(scores, case.per_row, after_rounding=True)
    return args


def _dense(case: Case, draw) -> dict:
    x, weight = (
        draw.input(case.K, decode=40, prefill=2),
        draw.matrix("weight", case.N, case.K, fan=64, along=1),
    )
    return {"x": x, "weight": weight, "bias": draw.bias(case.N)}


class _Gaussian:
    """Inputs of order 1 with outputs of order 1."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.case, self.dtype, self.prefill = case, dtype, case.tokens > DECODE
        self.generator = torch.Generator().manual_seed(zlib.crc32(case.id.encode()))
        self.drawn: list[str] = []
        self.quantized: dict[str, tuple[Tensor, Tensor]] = {}  # weight and scale, by the name of the argument

    def _normal(self, *shape: int, by: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) * by).to(self.dtype)

    def ranks(self, size: int) -> Tensor:
        return self._normal(*self.case.lead, size)

    def input(self, size: int, decode: int, prefill: int) -> Tensor:
        return self._normal(*self.case.lead, size)

    def matrix(self, name: str, rows: int, columns: int, fan: int, along: int, top: int = 2) -> Tensor:
        bits = self.case.bits[len(self.drawn) % len(self.case.bits)]
        self.drawn.append(name)
        values = self._values(rows, columns, fan, along, top)
        if bits == 16:
            return values
        group = self.case.group or max(columns, 1)
        q, scale = self._round(values.float(), bits, group)
        self.quantized[name] = (naive_pack(q) if bits == 4 else q.to(torch.int8), scale)
        return q * spread(scale, columns)

    def _values(self, rows: int, columns: int, fan: int, along: int, top: int) -> Tensor:
        return self._normal(rows, columns, by=max(1, (rows, columns)[along]) ** -0.5)

    def _round(self, values: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
        """Whole numbers and a float16 step a group, by rounding to nearest."""
        largest = 2 ** (bits - 1) - 1
        tops = [part.abs().amax(1) for part in values.split(group, 1)] if values.shape[1] else []
        scale = torch.stack(tops, 1) if tops else values[:, :0]
        scale = (scale / largest + 1e-4).half()
        return (values / spread(scale, values.shape[1])).round().clamp(-largest - 1, largest), scale

    def bias(self, size: int, top: int = 2) -> Tensor | None:
        return self._normal(size, by=0.5) if self.case.bias else None

    def norms(self, size: int) -> Tensor:
        return torch.rand(size, generator=self.generator) + 0.5

    def activation(self, name: str) -> str:
        return name

    def threshold(self, scores: Tensor, per_row: bool, after_rounding: bool = False) -> Tensor:
        """The middle of the widest gap near the wanted density, of each row's scores or of all."""
        # the sums of 4-bit weights may take 15-bit values
        margin = 2e-4 if self.case.quantized else 2e-5
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

    def _values(self, rows: int, columns: int, fan: int, along: int, top: int) -> Tensor:
        values = self._integers(top, rows, columns)
        if (rows, columns)[along] <= fan:
            return values
        order = torch.rand(rows, columns, generator=self.generator)
        kept = order.topk(fan, along, largest=False, sorted=False).indices
        return torch.zeros_like(values).scatter_(along, kept, values.gather(along, kept))

    def _round(self, values: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
        """Steps that are powers of two; the weights keep their values."""
        least = -5 if bits == 8 else -1
        groups = -(-values.shape[1] // group)
        powers = torch.randint(least, 1, (values.shape[0], groups), generator=self.generator)
        scale = (2.0**powers).half()
        return values / spread(scale, values.shape[1]), scale

    def bias(self, size: int, top: int = 2) -> Tensor | None:
        return self._integers(top, size) if self.case.bias else None

    def norms(self, size: int) -> Tensor:
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
        # one threshold for small integers must not pass all of them
        more = torch.randint(0, 2, shape, generator=self.generator) if per_row else 0
        return (more + middle.float() - 0.5).clamp(min=0.5)


# Quantised weights, column by column, as the contract says.


def _nibble(column: int, columns: int) -> tuple[int, int]:
    """The byte of a row that holds a column, and where in it."""
    block, i = divmod(column, 32)
    if (block + 1) * 32 <= columns:
        return 16 * block + i % 16, 4 * (i // 16)
    return 16 * block + i // 2, 4 * (i % 2)


@cache
def _places(columns: int) -> tuple[Tensor, Tensor]:
    places = torch.tensor([_nibble(column, columns) for column in range(columns)]).view(-1, 2)
    return places[:, 0].long(), places[:, 1].int()


def naive_pack(q: Tensor) -> Tensor:
    """Whole numbers of -8..7, two a byte."""
    byte, shift = _places(q.shape[1])
    packed = torch.zeros(q.shape[0], (q.shape[1] + 1) // 2, dtype=torch.int32)
    return packed.index_add_(1, byte, (q.int() & 15) << shift).to(torch.uint8)


def naive_unpack(packed: Tensor, columns: int) -> Tensor:
    byte, shift = (t.to(packed.device) for t in _places(columns))
    q = packed[:, byte].int() >> shift & 15
    return torch.where(q > 7, q - 16, q)


def spread(scale: Tensor, columns: int) -> Tensor:
    """The step of every column, in float32."""
    group = next((g for g in (32, 64, 128) if -(-columns // g) == scale.shape[1]), max(columns, 1))
    return scale.float().repeat_interleave(group, 1)[:, :columns]


def meant(args: dict, name: str, dtype: torch.dtype) -> Tensor | None:
    """The matrix that an argument stands for: a float one as it is, a quantised one dequantised."""
    weight, scale = args[name], args.get(scale_of(name))
    if scale is None:
        return weight if weight is None else weight.to(dtype)
    columns = (
        args["x"].shape[-1]
        if name in ("B", "weight")
        else weight.shape[1] * (1 + (weight.dtype == torch.uint8))
    )
    q = naive_unpack(weight, columns) if weight.dtype == torch.uint8 else weight
    return (q.double() * spread(scale, columns).double()).to(dtype)


# The ops as a user writes them in dense torch: in float64 the oracle, in a dtype the yardstick.
# Written apart from rana_kernels.backends.reference, so that the two hold each other to account.


def dense(op: str, args: dict, dtype: torch.dtype, masks: list[Tensor] | None = None):
    """(y, masks) of an op, computed and returned in `dtype`; `masks` given are used as they are."""
    a, used = _cast(args, dtype), []

    def masked(h: Tensor, threshold: Tensor, norms: Tensor | None = None) -> Tensor:
        used.append(_kept(h, threshold, norms) if masks is None else masks[len(used)])
        return h.where(used[-1], 0)

    if op == "linear":
        return _affine(a["x"], a["weight"].T, a["bias"]), used
    if op == "masked_linear":
        return _affine(masked(a["h"], a["threshold"], a["norms"]), a["rows"], a["bias"]), used
    if op == "masked_lowrank_linear":
        return _affine(masked(a["x"] @ a["B"].T, a["threshold"]), a["rows"], a["bias"]), used
    g = masked(_neurons(a, masked), a["down_threshold"], a["down_norms"])
    return _affine(g, a["down_rows"], a["down_bias"]), used


def _kept(h: Tensor, threshold: Tensor, norms: Tensor | None = None) -> Tensor:
    score = h.abs() if norms is None else h.abs() * norms
    return score.isnan() | (score >= threshold)


def _decide(h: Tensor, threshold: Tensor, norms: Tensor | None = None) -> Tensor:
    return h.where(_kept(h, threshold, norms), 0)


def _affine(z: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    return z @ rows if bias is None else z @ rows + bias


def _neurons(a: dict, masked) -> Tensor:
    """What the down projection reads: act(gate(x)) * up(x)."""
    h = a["x"] if a["B"] is None else a["x"] @ a["B"].T
    z, act = masked(h, a["threshold"], a["norms"]), ACTIVATIONS[a["activation"]]
    up = _affine(z[..., : a["up_rows"].shape[0]], a["up_rows"], a["up_bias"])
    if a["gate_rows"] is None:
        return act(up)
    first = z.shape[-1] - a["gate_rows"].shape[0]
    return act(_affine(z[..., first:], a["gate_rows"], a["gate_bias"])) * up


def _cast(args: dict, dtype: torch.dtype) -> dict:
    matrices = {n: meant(args, n, dtype) for n in matrices_of(args)}
    return {n: a.to(dtype) if isinstance(a, Tensor) else a for n, a in args.items()} | matrices


def exact_result(op: str, args: dict, dtype: torch.dtype) -> Tensor:
    """The float64 result rounded once, as every implementation must give it for integer inputs."""
    return dense(op, args, torch.float64)[0].to(dtype)


def assert_close(y: Tensor, op: str, args: dict, dtype: torch.dtype) -> None:
    """Errors, the largest and the mean square, at most twice those of eager torch in `dtype`.

    With quantised weights they may reach 5e-5.
    """
    truth, masks = dense(op, args, torch.float64)
    eager = dense(op, args, dtype, masks)[0]
    if truth.numel() == 0:
        assert y.shape == truth.shape
        return
    # the last rounding, or a few of float32: a small problem may leave eager without any error, and a running
    # sum of thousands of terms has more error than eager's short ones
    unit = max(torch.finfo(dtype).eps / 2, 32 * torch.finfo(torch.float32).eps)
    if any(args.get(scale_of(n)) is not None for n in matrices_of(args)):
        unit = max(unit, 5e-5)
    floor = unit * max(1.0, float(truth.abs().max()))
    for measure in (lambda e: float(e.abs().max()), lambda e: float(e.square().mean().sqrt())):
        error, eagers = measure(y.double() - truth), measure(eager.double() - truth)
        assert error <= 2 * eagers + floor, (
            f"{op}: error {error:.3g}, eager's {eagers:.3g}, floor {floor:.3g}"
        )
