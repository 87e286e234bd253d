"""Each op on each implementation: exact, close, memory, framework, meaning, errors."""

import resource
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import rana_kernels
from rana_kernels import backends
from rana_kernels.ops import reference
from tests.cases import (
    ACTIVATIONS,
    CASES,
    DENSITIES,
    DTYPES,
    FEW_CASES,
    FORMS,
    LONG_CASES,
    PACKET_CASES,
    QUANTIZED_FORMS,
    QUANTIZED_TILES,
    REAL_CASES,
    SMALL,
    TILED_CASES,
    Case,
    assert_close,
    dense,
    exact_result,
    input_of,
    make_inputs,
    matrices_of,
    naive_pack,
)

NAN, INF = float("nan"), float("inf")
MASKED = ("threshold", "norms", "down_norms", "down_threshold")


def grid(cases):
    kinds = {"isa": {*FEW_CASES}, "long": {*LONG_CASES}, "tiled": {*TILED_CASES}, "slow": {*REAL_CASES}}
    kinds["quantized_tiles"] = {*QUANTIZED_TILES}
    kinds["packets"] = {*PACKET_CASES}
    marks = {c: [getattr(pytest.mark, name) for name, some in kinds.items() if c in some] for c in cases}
    return pytest.mark.parametrize("case", [pytest.param(c, id=c.id, marks=marks[c]) for c in cases])


def named(values: dict):
    return [pytest.param(v, id=k) for k, v in values.items()]


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
every_op = pytest.mark.parametrize("case", named(SMALL))
every_form = pytest.mark.parametrize("case", named(FORMS | QUANTIZED_FORMS))
every_masked_op = pytest.mark.parametrize("case", named({n: c for n, c in SMALL.items() if n != "linear"}))
every_masked_form = pytest.mark.parametrize(
    "case", named({n: c for n, c in (FORMS | QUANTIZED_FORMS).items() if c.op != "linear"})
)


def assert_same_bits(y, wanted, what: str = "") -> None:
    """Equal, NaN counting as itself."""
    torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}")


# 1. exact, 2. close


@grid(CASES)
def test_integers_are_exact(implementation, case):
    for dtype in implementation.dtypes(case):
        args = make_inputs(case, dtype, integers=True, device=implementation.device)
        y = implementation(case.op, args)
        assert y.dtype == dtype and y.is_contiguous()
        assert_same_bits(y, exact_result(case.op, args, dtype), f"{case.id} in {dtype}")


@grid([*CASES, *REAL_CASES])
def test_gaussians_are_close(implementation, case):
    for dtype in implementation.dtypes(case):
        args = make_inputs(case, dtype, device=implementation.device)
        assert_close(implementation(case.op, args), case.op, args, dtype)


@pytest.mark.parametrize("integers", [True, False], ids=["integers", "gaussians"])
@every_masked_op
def test_cases_mask_what_they_say(case, integers):
    """The inputs themselves: not zero, neither are the outputs, and the masks near the wanted density."""
    sizes = {"masked_linear": ["N"], "masked_lowrank_linear": ["K"], "masked_mlp": ["K", "I"]}[case.op]
    cases = [c for c in CASES if c.op == case.op and min(terms(c), c.N, *(getattr(c, s) for s in sizes)) > 4]
    kept = {density: [] for density in DENSITIES}
    for c in cases:
        args = make_inputs(c, torch.bfloat16, integers=integers)
        y, masks = dense(c.op, args, torch.float64)
        assert args[input_of(args)].any() and all(args[n].any() for n in matrices_of(args))
        assert y.any() or c.density == 0, c.id
        kept[c.density] += [m.double().mean() for m in masks]
    means = {density: float(torch.stack(shares).mean()) for density, shares in kept.items()}
    assert means[0.0] == 0 and means[1.0] == 1 and 0.1 < means[0.25] < means[0.5] < 0.7, means


def terms(case: Case) -> int:
    """A number that is small where a mask may leave nothing: without B one mask decides for all."""
    return case.tokens * (case.K // 16 if case.R is None else case.R)


@pytest.mark.parametrize("integers", [True, False], ids=["integers", "gaussians"])
def test_dense_cases_are_not_zero(integers):
    for c in CASES:
        if c.op == "linear" and min(c.tokens * c.N, c.K) > 4:
            args = make_inputs(c, torch.bfloat16, integers=integers)
            assert args["x"].any() and args["weight"].any() and dense(c.op, args, torch.float64)[0].any()


# 3. memory


def dirt_like(t: torch.Tensor, *shape: int) -> torch.Tensor:
    """NaN, or large numbers where whole ones are stored, in t's dtype."""
    return torch.full(shape, NAN if t.is_floating_point() else 119, dtype=t.dtype, device=t.device)


def embedded(t: torch.Tensor, before: int = 0, after: int = 64) -> torch.Tensor:
    """The same values, `before` elements into a buffer of dirt."""
    buffer = dirt_like(t, before + t.numel() + after)
    view = buffer[before : before + t.numel()].view(t.shape)
    return view.copy_(t)


def padded(t: torch.Tensor) -> torch.Tensor:
    """The same values, in rows that lie apart with dirt between them."""
    return dirt_like(t, *t.shape[:-1], t.shape[-1] + 13)[..., : t.shape[-1]].copy_(t)


def spread(t: torch.Tensor) -> torch.Tensor:
    """The same values, every third element of a buffer of dirt."""
    return dirt_like(t, *t.shape, 3)[..., 1].copy_(t)


def transposed(t: torch.Tensor) -> torch.Tensor:
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


@every_dtype
@every_form
def test_any_offset(implementation, case, dtype):
    """The input and each matrix, at every alignment, with NaN before and after."""
    args = make_inputs(case, dtype, integers=True, device=implementation.device)
    wanted = exact_result(case.op, args, dtype)
    for name in (input_of(args), *matrices_of(args)):
        for offset in range(41):
            view = embedded(args[name], before=offset)
            buffer = view._base.clone()
            assert_same_bits(implementation(case.op, {**args, name: view}), wanted, f"{name} at {offset}")
            assert_same_bits(view._base, buffer, f"memory around {name} at {offset}")


@pytest.mark.parametrize("lead", [(1,), (3,), (2, 3), (40,)], ids=str)
@every_dtype
@every_form
def test_any_strides(implementation, case, dtype, lead):
    case = replace(case, lead=lead)
    args = make_inputs(case, dtype, integers=True, device=implementation.device)
    wanted = exact_result(case.op, args, dtype)
    x = input_of(args)
    vectors = [n for n, t in args.items() if isinstance(t, torch.Tensor) and t.dim() == 1 and n != x]
    layouts = [(x, transposed), (x, padded), (x, spread)]
    scales = [n for n, t in args.items() if n.endswith("_scale") and t is not None]
    layouts += [(m, padded) for m in (*matrices_of(args), *scales)] + [(v, spread) for v in vectors]
    for name, layout in layouts:
        y = implementation(case.op, {**args, name: layout(args[name])})
        assert_same_bits(y, wanted, f"{layout.__name__} {name}")


@every_form
def test_expanded_arguments(implementation, case):
    """Stride 0: one token, one threshold, one norms, one bias and one row for all."""
    args = make_inputs(case, torch.float32, integers=True, device=implementation.device)
    for name, t in args.items():
        if isinstance(t, torch.Tensor) and t.dim() > 0:
            once = t[:1].expand_as(t)
            y = implementation(case.op, {**args, name: once})
            assert_same_bits(y, implementation(case.op, {**args, name: once.contiguous()}), name)


@every_dtype
@every_form
def test_fresh_memory_is_not_read(implementation, case, dtype):
    """Memory of the sizes that outputs and temporaries have, freed full of NaN just before the call."""
    for lead in ((1,), (3,), (40,)):
        case = replace(case, lead=lead)
        args = make_inputs(case, dtype, integers=True, device=implementation.device)
        wanted = exact_result(case.op, args, dtype)
        sizes = {case.tokens * n for n in (case.N, case.K, case.R or 0, case.I, (case.R or 0) + 12)}
        sizes |= {64, 256, 1024}
        dirt = [
            torch.full((n,), NAN, dtype=d, device=implementation.device)
            for n in sizes
            for d in [dtype, torch.float32] * 4
        ]
        del dirt
        assert_same_bits(implementation(case.op, args), wanted)


@every_form
def test_arguments_are_left_alone(implementation, case):
    for lead in ((1,), (40,)):
        args = make_inputs(replace(case, lead=lead), torch.bfloat16, device=implementation.device)
        before = {n: t.clone() for n, t in args.items() if isinstance(t, torch.Tensor)}
        y = implementation(case.op, args)
        assert all(torch.equal(args[n], t) for n, t in before.items())
        assert all(y.data_ptr() != args[n].data_ptr() for n in before)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@every_op
def test_calls_leave_no_memory_behind(implementation, case):
    args = make_inputs(case, torch.float32, device=implementation.device)

    def call_often(times: int = 20_000) -> None:
        for _ in range(times):
            implementation(case.op, args)

    call_often(1000)
    before = resident_bytes()
    call_often()
    assert resident_bytes() - before < 20_000 * 50


# 4. framework


def call_registered(case: Case, args: dict) -> torch.Tensor:
    return getattr(torch.ops.rana, case.op).default(*args.values())


def requiring_grad(args: dict, dtype: torch.dtype | None = None) -> dict:
    """Leaves that require gradients; thresholds, norms and what is quantised do not. In `dtype` if given."""
    tensors = {
        n: t.to(dtype, copy=True) for n, t in args.items() if is_cast(n, t) or n in MASKED and t is not None
    }
    return {**args, **{n: t.requires_grad_(n not in MASKED) for n, t in tensors.items()}}


def is_cast(name: str, argument) -> bool:
    """Whether an argument has the dtype of the input: no thresholds, norms, scales or quantised weights."""
    floats = isinstance(argument, torch.Tensor) and argument.is_floating_point()
    return floats and name not in MASKED and not name.endswith("_scale")


def traced_dtypes(forms: Iterable[Case]) -> dict[Case, list[torch.dtype]]:
    """Return the dtypes to trace a form in. The forms of an op in the same widths share all dtypes."""
    alike: dict[tuple, list[Case]] = {}
    for case in forms:
        alike.setdefault((case.op, case.bits), []).append(case)
    traced: dict[Case, list[torch.dtype]] = {}
    for turn, cases in enumerate(alike.values()):
        for i in range(max(len(DTYPES), len(cases))):
            traced.setdefault(cases[i % len(cases)], []).append(DTYPES[(turn + i) % len(DTYPES)])
    return traced


TRACED = traced_dtypes((FORMS | QUANTIZED_FORMS).values())


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@every_dtype
@every_form
def test_opcheck(case, dtype, grad):
    """All checks, except that AOTAutograd, which takes most of the time, traces some.

    With gradients every op in all widths and dtypes, without them every form in one dtype.
    """
    args = make_inputs(case, dtype)
    if grad:
        args = requiring_grad(args)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    checks += ["test_aot_dispatch_dynamic"] * (dtype in TRACED[case][: None if grad else 1])
    torch.library.opcheck(getattr(torch.ops.rana, case.op).default, tuple(args.values()), test_utils=checks)


@every_form
def test_compile_without_breaks(case):
    """One graph for all sizes of a batch, empty and single ones included."""
    torch._dynamo.reset()
    args = make_inputs(replace(case, lead=(5,)), torch.float32, integers=True)
    x, rest = args.pop(input_of(args)), tuple(args.values())
    op = getattr(torch.ops.rana, case.op)

    def function(x):
        return op(2 * x, *rest) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for M in (5, 2, 1, 0):
        assert_same_bits(compiled(x[:M]), function(x[:M]))


def test_inductor_compiles_all_ops():
    torch._dynamo.reset()
    inputs = {
        op: tuple(make_inputs(case, torch.float32, integers=True).values()) for op, case in SMALL.items()
    }

    def every():
        return [getattr(torch.ops.rana, op)(2 * x, *rest).relu() for op, (x, *rest) in inputs.items()]

    for y, wanted in zip(torch.compile(every, fullgraph=True)(), every(), strict=True):
        assert_same_bits(y, wanted)


@every_form
def test_export_with_any_batch(case):
    class Layer(torch.nn.Module):
        def forward(self, x, *rest):
            return getattr(torch.ops.rana, case.op)(x, *rest)

    args = make_inputs(replace(case, lead=(5,)), torch.float32, integers=True)
    x, *rest = args.values()
    batch = ({0: torch.export.Dim("batch")}, tuple(None for _ in rest))
    exported = torch.export.export(Layer(), (x, *rest), dynamic_shapes=batch).module()
    for M in (5, 2, 3):
        assert_same_bits(exported(x[:M], *rest), Layer()(x[:M], *rest))


OTHER_ACTIVATIONS = {a: replace(FORMS["mlp_ungated"], activation=a) for a in ("silu", "relu", "relu2")}


@pytest.mark.parametrize("case", named(FORMS | OTHER_ACTIVATIONS))
def test_gradients_in_float64(case):
    """Against finite differences, which the reference alone is precise enough for."""
    tiny = {"R": case.R and 4, "N": 3, "K": 5, "I": 6, "gate": 3 if case.gate == 12 else case.gate}
    args = requiring_grad(make_inputs(replace(case, lead=(2,), **tiny), torch.float64), torch.float64)
    with rana_kernels.use_backend("reference"):
        assert torch.autograd.gradcheck(getattr(torch.ops.rana, case.op).default, tuple(args.values()))


@pytest.mark.parametrize("lead", [(), (2, 3), (40,), (0,)], ids=str)
@every_form
def test_gradients_are_those_of_dense_math(case, lead):
    inputs = make_inputs(replace(case, lead=lead), torch.float32)
    args, wide = requiring_grad(inputs), requiring_grad(inputs, torch.float64)
    y, (wanted, _) = call_registered(case, args), dense(case.op, wide, torch.float64)
    direction = torch.randn_like(wanted)
    (y * direction).sum().backward()
    (wanted * direction).sum().backward()
    for name, t in args.items():
        if isinstance(t, torch.Tensor) and t.requires_grad:
            torch.testing.assert_close(t.grad.double(), wide[name].grad, rtol=1e-4, atol=1e-5, msg=name)


@every_form
def test_autocast_casts_all_but_the_thresholds(case):
    args = make_inputs(case, torch.float32)
    half = {n: t.bfloat16() if is_cast(n, t) else t for n, t in args.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = call_registered(case, args)
        again = call_registered(case, half)
    assert y.dtype == torch.bfloat16
    assert_same_bits(y, call_registered(case, half))
    assert_same_bits(again, y)


def test_autocast_keeps_a_threshold_that_bfloat16_would_round():
    x = torch.ones(1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        y = rana_kernels.ops.masked_linear(x, torch.ones(1, 1), torch.tensor(1.0001))
    assert y.item() == 0


@every_form
def test_inference_mode(case):
    with torch.inference_mode():
        args = make_inputs(case, torch.float32, integers=True)
        y = call_registered(case, args)
    assert y.is_inference() and torch.equal(y, exact_result(case.op, args, torch.float32))


@every_form
def test_meta_tensors_have_the_shape_of_real_ones(case):
    for lead, dtype in product([(), (0,), (2, 3)], DTYPES):
        case = replace(case, lead=lead)
        y, fake = (call_registered(case, make_inputs(case, dtype, device=d)) for d in ("cpu", "meta"))
        wanted = (y.shape, dtype, y.stride(), "meta")
        assert (fake.shape, fake.dtype, fake.stride(), fake.device.type) == wanted


# 5. meaning


LOW_RANK = Case("masked_lowrank_linear", R=24, N=40, K=32, lead=(5,), density=1.0)


@every_dtype
def test_threshold_0_is_the_low_rank_product(implementation, dtype):
    args = make_inputs(LOW_RANK, dtype, integers=True, device=implementation.device)
    x, B, rows, bias = (args[n].double() for n in ("x", "B", "rows", "bias"))
    assert_same_bits(implementation(LOW_RANK.op, args), (x @ B.T @ rows + bias).to(dtype))


def test_full_rank_and_threshold_0_is_the_dense_layer(implementation):
    W, bias = torch.randn(40, 32), torch.randn(40)
    U, S, V = torch.linalg.svd(W.double(), full_matrices=False)
    x, B, rows = torch.randn(5, 32), (S[:, None] * V).float().contiguous(), U.T.float().contiguous()
    args = {"x": x, "B": B, "rows": rows, "threshold": torch.zeros(()), "bias": bias}
    y = implementation("masked_lowrank_linear", {n: t.to(implementation.device) for n, t in args.items()})
    torch.testing.assert_close(y.cpu(), F.linear(x, W, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lead", [(1,), (5,), (40,)], ids=str)
@every_masked_form
def test_a_huge_threshold_leaves_the_bias(implementation, case, lead):
    last, of_bias = ("down_threshold", "down_bias") if case.op == "masked_mlp" else ("threshold", "bias")
    for dtype in DTYPES:
        args = make_inputs(replace(case, lead=lead), dtype, device=implementation.device)
        for huge in (1e30, INF):
            y = implementation(case.op, {**args, last: torch.full_like(args[last], huge)})
            wanted = torch.zeros_like(y) if args[of_bias] is None else args[of_bias].expand_as(y)
            assert_same_bits(y, wanted, f"{huge} in {dtype}")


def test_ranks_of_an_mlp_dropped_leave_its_biases(implementation):
    """Separate ranks have separate thresholds: without those of gate, gate is its bias, and up is whole."""
    args = make_inputs(replace(SMALL["masked_mlp"], density=1.0), torch.float32, integers=True)
    args["threshold"][17:] = INF
    up = args["x"] @ args["B"][:17].T @ args["up_rows"] + args["up_bias"]
    g = F.relu(args["gate_bias"]) * up
    wanted = g @ args["down_rows"] + args["down_bias"]
    args = {n: t.to(implementation.device) if isinstance(t, torch.Tensor) else t for n, t in args.items()}
    assert_same_bits(implementation("masked_mlp", args).cpu(), wanted)


@pytest.mark.parametrize("M", [1, 5, 40])
@every_dtype
def test_a_score_equal_to_its_threshold_is_kept(implementation, dtype, M):
    h = torch.tensor([[-2.0, 2.0, 1.0, 3.0]], dtype=dtype).expand(M, -1)
    norms, threshold = torch.tensor([1.0, 1.0, 2.0, 0.5]), torch.tensor(2.0)
    args = {"h": h, "rows": torch.eye(4, dtype=dtype), "threshold": threshold, "norms": norms}
    args = {n: t.to(implementation.device) for n, t in args.items()}
    wanted = torch.tensor([-2.0, 2.0, 1.0, 0.0], dtype=dtype).expand(M, -1)
    assert_same_bits(implementation("masked_linear", args).cpu(), wanted)


# (what h sums to, its threshold, kept?): rounding either number to 16 bits reverses the verdict
FINE = {"kept": (1 + 2**-13, 1 + 2**-14, True), "dropped": (1 - 2**-14, 1 - 2**-15, False)}


@pytest.mark.isa
@pytest.mark.parametrize("M", [1, 5, 40])
@every_dtype
@pytest.mark.parametrize("h, threshold, kept", [pytest.param(*v, id=k) for k, v in FINE.items()])
def test_masks_are_decided_in_float32(implementation, dtype, h, threshold, kept, M):
    one = torch.ones(1, 1, dtype=dtype, device=implementation.device)
    rest, unit = one[0] * (h - 1), one[0].float()
    tokens = one.expand(M, -1)
    lowrank = {
        "x": torch.stack([one[0], rest], 1).expand(M, -1),
        "B": one.expand(1, 2).contiguous(),
        "rows": one,
    }
    linear = {"h": tokens, "rows": one, "threshold": unit * threshold, "norms": unit * h}
    mlp = {"x": tokens, "B": one, "up_rows": one, "gate_rows": None, "threshold": unit * 0, "norms": None}
    mlp |= {
        "up_bias": rest,
        "gate_bias": None,
        "down_rows": one,
        "down_norms": unit,
        "down_threshold": unit * threshold,
    }
    calls = {
        "masked_linear": linear,
        "masked_lowrank_linear": {**lowrank, "threshold": unit * threshold},
        "masked_mlp": {**mlp, "down_bias": None, "activation": "relu"},
    }
    for op, args in calls.items():
        y = implementation(op, args)
        assert bool(y.all()) == bool(y.any()) == kept, op


@pytest.mark.isa
@pytest.mark.parametrize("M", [1, 5, 40])
@every_dtype
@pytest.mark.parametrize("q, bits", [(127, 8), (7, 4)], ids=["int8", "int4"])
def test_masks_of_quantized_ranks_are_decided_in_float32(implementation, dtype, q, bits, M):
    """q · (1 + 2⁻¹⁰) lies between numbers of 16 bits, and the threshold between it and either of them."""
    # up to so many tokens, such a processor multiplies whole numbers
    whole = {"amx": 4, "avx512_bf16": 8}.get(backends.instruction_set(), M)
    if implementation.name == "registered" and dtype == torch.bfloat16 and whole < M:
        pytest.xfail("where the processor multiplies pairs of bfloat16, q · scale is rounded to it")
    scale = torch.full((1, 1), 1 + 2**-10, dtype=torch.float16)
    B = torch.tensor([[q, 0]], dtype=torch.int8)
    one = torch.ones(1, 2, dtype=dtype)
    for below, kept in ((2**-12, True), (-(2**-12), False)):
        threshold = torch.tensor(q * (1 + 2**-10) - below)
        args = {"x": one.expand(M, 2), "B": naive_pack(B) if bits == 4 else B, "rows": one}
        args |= {"threshold": threshold, "bias": None, "B_scale": scale, "rows_scale": None}
        args = {n: t if t is None else t.to(implementation.device) for n, t in args.items()}
        y = implementation("masked_lowrank_linear", args)
        assert bool(y.all()) == bool(y.any()) == kept


def test_ranks_may_pass_the_range_of_float16(implementation):
    """300 · 300 is infinite in float16, but h is float32 in a decode step."""
    args = {"x": [[300.0]], "B": [[300.0]], "rows": [[0.25]]}
    args = {n: torch.tensor(v, dtype=torch.float16, device=implementation.device) for n, v in args.items()}
    args["threshold"] = torch.tensor(1e5, device=implementation.device)
    assert implementation("masked_lowrank_linear", args).item() == 0
    args["threshold"] = torch.tensor(8e4, device=implementation.device)
    assert implementation("masked_lowrank_linear", args).item() == torch.tensor(22500.0).half()


WITH_NAN = {
    k: FORMS[k]
    for k in ("linear", "linear_bare", "lowrank", "lowrank_bare", "mlp_separate", "mlp_joint", "dense")
}
WITH_NAN |= {k: (FORMS | QUANTIZED_FORMS)[k] for k in ("mlp_without_B", "mlp_without_B_int4", "lowrank_int8")}
WITH_NAN |= {a: replace(FORMS["mlp_ungated"], activation=a) for a in ACTIVATIONS}


@pytest.mark.isa
@pytest.mark.parametrize("M", [1, 3, 40])
@pytest.mark.parametrize("density", [0.5, 0.0])
@pytest.mark.parametrize("case", named(WITH_NAN))
def test_nan_reaches_its_row_and_no_other(implementation, case, density, M):
    case = replace(case, lead=(M,), density=density)
    args = make_inputs(case, torch.float32, device=implementation.device)
    clean = implementation(case.op, args)
    args[input_of(args)][M // 2, 1] = NAN
    y = implementation(case.op, args)
    assert y[M // 2].isnan().all()
    y[M // 2] = clean[M // 2]
    assert_same_bits(y, clean)


@pytest.mark.parametrize("M", [1, 3, 40])
@pytest.mark.parametrize("value", [INF, -INF], ids=str)
@every_dtype
@pytest.mark.parametrize("op", ["masked_linear", "masked_lowrank_linear", "linear"])
def test_infinity_reaches_y(implementation, op, dtype, value, M):
    args = make_inputs(replace(SMALL[op], lead=(M,), density=0.0), dtype, device=implementation.device)
    args[input_of(args)][0, 1] = value
    y = implementation(op, args)
    assert not y[0].isfinite().any() and y[1:].isfinite().all()


@pytest.mark.isa
@pytest.mark.parametrize("M", [1, 3, 20, 40])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_sums_at_their_extremes(implementation, M, bits):
    """The largest whole numbers, of one sign and mixed, and one value a thousand times the rest."""
    least, R, N = -(2 ** (bits - 1)), 57, 160
    q = torch.full((R, N), least)
    q[:, 1::3], q[::2, 2::3] = -least - 1, 1
    ops, sizes = (("masked_linear", q), ("linear", q.T)), product((1e-25, 1.0, 1e25), (6e-8, -1.0, 65504.0))
    for (op, weight), (magnitude, scale) in product(ops, sizes):
        x = torch.full((M, R), magnitude)
        x[:, 7] *= 1000
        x[M // 2, ::3] *= -1
        w = weight.contiguous().to(torch.int8)
        packed = w if bits == 8 else naive_pack(w)
        steps = torch.full((w.shape[0], -(-w.shape[1] // 32)), scale, dtype=torch.float16)
        args = {"x": x, "weight": packed, "bias": None, "weight_scale": steps}
        if op == "masked_linear":
            threshold = torch.tensor(0.0)
            args = {
                "h": x,
                "rows": packed,
                "threshold": threshold,
                "norms": None,
                "bias": None,
                "rows_scale": steps,
            }
        moved = {n: t if t is None else t.to(implementation.device) for n, t in args.items()}
        y = implementation(op, moved).cpu().double()
        matrix = weight if op == "masked_linear" else weight.T
        terms = x.double()[:, :, None] * (matrix.double() * steps[0, 0].double())
        assert ((y - terms.sum(1)).abs() <= 5e-5 * terms.abs().amax(1) * 8).all(), (op, magnitude, scale)


@pytest.mark.isa
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_the_whole_range(implementation, activation):
    v = torch.logspace(-30, 15, 500)
    v = torch.cat([-v, torch.zeros(1), v, torch.linspace(-20, 20, 999)]).to(implementation.device)
    one = torch.ones(1, 1, device=implementation.device)
    args = {"x": v[:, None], "B": one, "up_rows": one, "gate_rows": None, "threshold": one[0] * 0}
    args |= {"norms": None, "up_bias": None, "gate_bias": None, "down_rows": one, "down_norms": one[0]}
    args |= {"down_threshold": one[0] * 0, "down_bias": None, "activation": activation}
    wanted = ACTIVATIONS[activation](v.double())
    for block in (v.numel(), 1):
        y = torch.cat([implementation("masked_mlp", {**args, "x": x})[:, 0] for x in v[:, None].split(block)])
        # left of 0 gelu is a small difference of numbers near 1: float32 leaves an absolute error there
        torch.testing.assert_close(y.double(), wanted, rtol=2e-6, atol=1e-6)


def every_number(dtype: torch.dtype, device: str) -> torch.Tensor:
    """All finite numbers of a 16-bit dtype, the subnormal and the largest ones among them."""
    numbers = torch.arange(-(2**15), 2**15, device=device).to(torch.int16).view(dtype)
    return numbers[numbers.isfinite()]


def assert_same_numbers(y: torch.Tensor, wanted: torch.Tensor) -> None:
    # bfloat16 instructions of processors take its subnormals, below 1e-38, for 0
    tiny = torch.finfo(torch.bfloat16).tiny if y.dtype == torch.bfloat16 else 0
    torch.testing.assert_close(y, wanted, rtol=0, atol=tiny)


@pytest.mark.isa
@pytest.mark.parametrize("M", [1, 4, 5, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_every_number_is_read_and_written(implementation, dtype, M):
    numbers = every_number(dtype, implementation.device)
    one = torch.ones(1, 1, dtype=dtype, device=implementation.device)
    zero = torch.zeros((), device=implementation.device)
    args = {"h": one.expand(M, 1), "rows": numbers[None], "threshold": zero}
    assert_same_numbers(implementation("masked_linear", args), numbers.expand(M, -1))
    for some in numbers.split(500)[::16]:
        args = {"x": some[:M, None], "B": one, "rows": one, "threshold": zero}
        assert_same_numbers(implementation("masked_lowrank_linear", args), some[:M, None])
        args = {"x": one.expand(M, 1), "B": some[:, None], "rows": torch.eye(500).to(one), "threshold": zero}
        assert_same_numbers(implementation("masked_lowrank_linear", args), some.expand(M, -1))
    args = {"x": one.expand(M, 1), "weight": numbers[:, None], "bias": None}
    assert_same_numbers(implementation("linear", args), numbers.expand(M, -1))


@pytest.mark.isa
@pytest.mark.parametrize("M", [1, 5, 40])
@pytest.mark.parametrize("added, wanted", [(15.0, 65504.0), (16.0, INF)], ids=["rounds_down", "overflows"])
def test_sums_beyond_float16_are_infinite(implementation, added, wanted, M):
    h = torch.ones(M, 2, dtype=torch.float16, device=implementation.device)
    rows = torch.tensor([[65504.0], [added]], dtype=torch.float16, device=implementation.device)
    args = {"h": h, "rows": rows, "threshold": torch.zeros((), device=implementation.device)}
    assert (implementation("masked_linear", args) == wanted).all()
    assert (implementation("linear", {"x": h, "weight": rows.T.contiguous(), "bias": None}) == wanted).all()


OTHERS = {"random": None, "zero": 0.0, "huge": 6e4, "inf": INF, "nan": NAN}


@pytest.mark.parametrize("M", [2, 5, 16, 33, 300])
@every_dtype
@every_form
def test_a_row_does_not_depend_on_the_others(implementation, case, dtype, M):
    args = make_inputs(replace(case, lead=(M,)), dtype, device=implementation.device)
    x, y = args[input_of(args)], implementation(case.op, args)
    for m in {0, M // 2, M - 1}:
        for what, value in OTHERS.items():
            other = torch.randn_like(x) if value is None else torch.full_like(x, value)
            other[m] = x[m]
            again = implementation(case.op, {**args, input_of(args): other})
            assert_same_bits(again[m], y[m], f"row {m} among {what}")


WIDE = {
    "masked_linear": Case("masked_linear", R=512, N=1000),
    "masked_lowrank_linear": Case("masked_lowrank_linear", R=256, N=1000, K=4200),
    "masked_mlp": Case("masked_mlp", R=256, N=500, K=300, I=1000, gate="joint"),
    "linear": Case("linear", N=1000, K=4200),
}


@pytest.mark.parametrize("M", [1, 4, 40])
@every_dtype
@pytest.mark.parametrize("case", named(WIDE))
def test_the_same_bits_every_time(case, dtype, M, threads):
    """On every run and with any number of threads."""
    args = make_inputs(replace(case, lead=(M,)), dtype)
    wanted = call_registered(case, args)
    assert_close(wanted, case.op, args, dtype)
    for count in (1, 2, 3, 4):
        threads(count)
        for _ in range(2):
            assert_same_bits(call_registered(case, args), wanted, f"{count} threads")


# 6. errors


BAD = {
    "h_scalar": ("masked_linear", "h", lambda h: h.sum()),
    "h_integer": ("masked_linear", "h", lambda h: h.long()),
    "h_too_wide": ("masked_linear", "rows", lambda rows: rows[1:]),
    "rows_dtype": ("masked_linear", "rows", lambda rows: rows.half()),
    "rows_vector": ("masked_linear", "rows", lambda rows: rows[:, 0]),
    "rows_transposed": ("masked_linear", "rows", lambda rows: rows.T.contiguous().T),
    "rows_elsewhere": ("masked_linear", "rows", lambda rows: rows.to("meta")),
    "threshold_dtype": ("masked_linear", "threshold", lambda t: t.bfloat16()),
    "threshold_double": ("masked_linear", "threshold", lambda t: t.double()),
    "threshold_short": ("masked_linear", "threshold", lambda t: t[1:]),
    "threshold_matrix": ("masked_linear", "threshold", lambda t: t[None]),
    "threshold_elsewhere": ("masked_linear", "threshold", lambda t: t.to("meta")),
    "norms_dtype": ("masked_linear", "norms", lambda s: s.half()),
    "norms_long": ("masked_linear", "norms", lambda s: s.repeat(2)),
    "norms_0d": ("masked_linear", "norms", lambda s: s[0]),
    "bias_dtype": ("masked_linear", "bias", lambda b: b.double()),
    "bias_short": ("masked_linear", "bias", lambda b: b[1:]),
    "lowrank_x_scalar": ("masked_lowrank_linear", "x", lambda x: x.sum()),
    "lowrank_x_integer": ("masked_lowrank_linear", "x", lambda x: x.int()),
    "B_narrow": ("masked_lowrank_linear", "B", lambda B: B[:, 1:]),
    "B_dtype": ("masked_lowrank_linear", "B", lambda B: B.bfloat16()),
    "B_transposed": ("masked_lowrank_linear", "B", lambda B: B.T.contiguous().T),
    "B_3d": ("masked_lowrank_linear", "B", lambda B: B[None]),
    "B_elsewhere": ("masked_lowrank_linear", "B", lambda B: B.to("meta")),
    "lowrank_rows_short": ("masked_lowrank_linear", "rows", lambda rows: rows[1:]),
    "lowrank_rows_transposed": ("masked_lowrank_linear", "rows", lambda rows: rows.T.contiguous().T),
    "lowrank_threshold": ("masked_lowrank_linear", "threshold", lambda t: t[:1]),
    "lowrank_bias": ("masked_lowrank_linear", "bias", lambda b: b[None]),
    "mlp_x_integer": ("masked_mlp", "x", lambda x: x.bool()),
    "mlp_B_short": ("masked_mlp", "B", lambda B: B[1:]),
    "mlp_B_narrow": ("masked_mlp", "B", lambda B: B[:, 1:]),
    "up_rows_dtype": ("masked_mlp", "up_rows", lambda rows: rows.half()),
    "up_rows_transposed": ("masked_mlp", "up_rows", lambda rows: rows.T.contiguous().T),
    "gate_rows_narrow": ("masked_mlp", "gate_rows", lambda rows: rows[:, 1:]),
    "mlp_threshold_0d": ("masked_mlp", "threshold", lambda t: t[0]),
    "mlp_threshold_short": ("masked_mlp", "threshold", lambda t: t[1:]),
    "up_bias_long": ("masked_mlp", "up_bias", lambda b: b.repeat(2)),
    "gate_bias_dtype": ("masked_mlp", "gate_bias", lambda b: b.half()),
    "down_rows_short": ("masked_mlp", "down_rows", lambda rows: rows[1:]),
    "down_rows_elsewhere": ("masked_mlp", "down_rows", lambda rows: rows.to("meta")),
    "down_norms_dtype": ("masked_mlp", "down_norms", lambda s: s.half()),
    "down_norms_short": ("masked_mlp", "down_norms", lambda s: s[1:]),
    "down_threshold_short": ("masked_mlp", "down_threshold", lambda t: t[1:]),
    "down_bias_short": ("masked_mlp", "down_bias", lambda b: b[1:]),
    "linear_x_scalar": ("linear", "x", lambda x: x.sum()),
    "linear_x_integer": ("linear", "x", lambda x: x.int()),
    "weight_narrow": ("linear", "weight", lambda weight: weight[:, 1:]),
    "weight_dtype": ("linear", "weight", lambda weight: weight.half()),
    "weight_vector": ("linear", "weight", lambda weight: weight[0]),
    "weight_transposed": ("linear", "weight", lambda weight: weight.T.contiguous().T),
    "weight_elsewhere": ("linear", "weight", lambda weight: weight.to("meta")),
    "linear_bias_short": ("linear", "bias", lambda b: b[1:]),
    "linear_bias_dtype": ("linear", "bias", lambda b: b.double()),
    "activation": ("masked_mlp", "activation", lambda a: "swish"),
    "activation_empty": ("masked_mlp", "activation", lambda a: ""),
    "mlp_norms_beside_B": ("masked_mlp", "norms", lambda n: torch.ones(17)),
}
BAD_QUANTIZED = {
    "scale_dtype": ("dense_int4", "weight_scale", lambda s: s.float()),
    "scale_short": ("dense_int8", "weight_scale", lambda s: s[1:]),
    "scale_groups": ("dense_int8", "weight_scale", lambda s: s.repeat(1, 3)),
    "scale_elsewhere": ("dense_int8", "weight_scale", lambda s: s.to("meta")),
    "int8_narrow": ("dense_int8", "weight", lambda w: w[:, 1:]),
    "int4_narrow": ("dense_int4", "weight", lambda w: w[:, 1:]),
    "int4_transposed": ("dense_int4", "weight", lambda w: w.T.contiguous().T),
    "int4_short": ("linear_int4", "rows", lambda rows: rows[1:]),
    "rows_scale_vector": ("linear_int4", "rows_scale", lambda s: s[:, 0]),
    "B_scale_short": ("lowrank_int8", "B_scale", lambda s: s[:, 1:].repeat(1, 3)),
    "up_scale_short": ("mlp_without_B_int4", "up_scale", lambda s: s[1:]),
    "up_rows_short": ("mlp_without_B_int4", "up_rows", lambda rows: rows[1:]),
    "gate_scale_short": ("mlp_without_B_int4", "gate_scale", lambda s: s[1:]),
    "down_scale_dtype": ("mlp_separate_int8", "down_scale", lambda s: s.bfloat16()),
    "mlp_norms_short": ("mlp_without_B_int4", "norms", lambda n: n[1:]),
    "mlp_x_threshold_short": ("mlp_without_B_int4", "threshold", lambda t: t[1:]),
}


def message(call, *args) -> str:
    with pytest.raises(RuntimeError) as raised:
        call(*args)
    return str(raised.value)


@pytest.mark.parametrize("op, argument, change", [pytest.param(*v, id=k) for k, v in BAD.items()])
def test_bad_arguments_are_named(implementation, op, argument, change):
    args = make_inputs(SMALL[op], torch.float32, device=implementation.device)
    args[argument] = change(args[argument])
    names_the_argument(implementation, op, args, argument)


@pytest.mark.parametrize("form, argument, change", [pytest.param(*v, id=k) for k, v in BAD_QUANTIZED.items()])
def test_bad_quantized_arguments_are_named(implementation, form, argument, change):
    case = QUANTIZED_FORMS[form]
    args = make_inputs(case, torch.float32, device=implementation.device)
    args[argument] = change(args[argument])
    names_the_argument(implementation, case.op, args, argument)


def test_weights_and_scales_belong_together(implementation):
    args = make_inputs(QUANTIZED_FORMS["dense_int8"], torch.float32, device=implementation.device)
    names_the_argument(implementation, "linear", args | {"weight": args["weight"].float()}, "weight")
    names_the_argument(implementation, "linear", args | {"weight_scale": None}, "weight")
    mlp = make_inputs(SMALL["masked_mlp"], torch.float32, device=implementation.device)
    scales = dict.fromkeys(("B_scale", "up_scale", "gate_scale", "down_scale"))
    scale = torch.ones(17, 3, dtype=torch.float16, device=implementation.device)
    without_gate = mlp | {
        "gate_rows": None,
        "gate_bias": None,
        "B": mlp["B"][:17],
        "threshold": mlp["threshold"][:17],
    }
    names_the_argument(
        implementation, "masked_mlp", without_gate | scales | {"gate_scale": scale}, "gate_scale"
    )


def names_the_argument(implementation, op: str, args: dict, argument: str) -> None:
    wanted = message(lambda: getattr(reference, op)(*args.values()))
    assert wanted.startswith(f"rana::{op}: {argument} has ") and ", wanted " in wanted
    assert wanted in message(implementation, op, args)


def test_a_gate_bias_needs_a_gate(implementation):
    case = replace(SMALL["masked_mlp"], gate=None)
    args = make_inputs(case, torch.float32, device=implementation.device)
    args["gate_bias"] = args["up_bias"]
    wanted = "rana::masked_mlp: gate_bias has a value, wanted None, because gate_rows is None"
    assert wanted in message(implementation, case.op, args)


@pytest.mark.parametrize("op", SMALL)
def test_meta_tensors_are_checked_in_the_same_words(op):
    args = make_inputs(SMALL[op], torch.float32)
    weight = matrices_of(args)[-1]
    args[weight] = args[weight][:-1]
    meta = {n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in args.items()}
    wanted = message(lambda: getattr(reference, op)(*args.values()))
    assert wanted in message(call_registered, SMALL[op], meta)
