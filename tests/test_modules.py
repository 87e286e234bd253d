"""The modules: what they compute, how they survive copies, casts and compilation, what they refuse."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rana_kernels
from rana_kernels.evaluation.live import count_live
from rana_kernels.nn.adapters import RanaLinear, RanaNeuronLinear, joint_linears
from rana_kernels.nn.base import check_values, fill_module
from rana_kernels.nn.dense import QuantizedLinear, serve_dense
from rana_kernels.nn.factored import from_linears, to_linears
from rana_kernels.nn.format import FLOAT, Format
from rana_kernels.nn.mlp import RanaMLP
from rana_kernels.nn.split_mlp import join_mlp, split_mlp
from rana_kernels.ops import reference
from rana_kernels.ops.quantized import dequantize
from rana_kernels.quantization import quantize

K, N, I = 24, 40, 56  # noqa: E741
INT8, INT4 = Format(8, 32), Format(4, 32)


def filled(module: nn.Module, threshold: float = 0.0) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    for name, buffer in module.named_buffers():
        if buffer.dtype in (torch.int8, torch.uint8):
            buffer.random_(0, 256) if buffer.dtype == torch.uint8 else buffer.random_(-127, 128)
        elif name.endswith("_scale"):
            rows = module.get_buffer(name.removesuffix("_scale"))
            buffer.uniform_(0.5, 2).div_(80 if rows.dtype == torch.int8 else 4)
    for part in module.modules():
        if getattr(part, "norms", None) is not None:
            part.norms.uniform_(0.5, 2)
        if hasattr(part, "threshold"):
            part.threshold.fill_(threshold)
    return module


class Attention(nn.Module):
    """Calls three projections as attention does."""

    def __init__(self, q: nn.Module, k: nn.Module, v: nn.Module) -> None:
        super().__init__()
        self.q, self.k, self.v = q, k, v

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


def make_attention(rank: int | None = 16, format: Format = FLOAT, last: int = 8) -> Attention:
    return filled(Attention(*joint_linears(K, (24, 8, last), rank, True, format=format)), threshold=1.0)


def mlp(
    gated: bool = True, joint: bool = False, activation: str = "silu", threshold: float = 1.0, **formats
) -> RanaMLP:
    gate_rank, bias = (16 if joint else 8) if gated else None, (True,) * 3
    made = RanaMLP(K, I, N, 16, gate_rank, activation, joint=joint, bias=bias, **formats)
    return filled(made, threshold)


def neuron_mlp(gated: bool = True, activation: str = "silu", **formats) -> RanaMLP:
    """Up and gate are neuron adapters with one mask: there is no B."""
    gate, bias = K if gated else None, (True,) * 3
    made = RanaMLP(K, I, N, K, gate, activation, kind="neuron", joint=gated, bias=bias, **formats)
    return filled(made, 0.5)


def packed_mlp(format: Format, kind: str = "rank") -> RanaMLP:
    """One linear computed gate and up."""
    names, rank = ("gate_up_proj", "gate_up_proj", "down_proj"), 16 if kind == "rank" else K
    how = {"kind": kind, "joint": True, "names": names, "bias": (True,) * 3}
    down_format = INT8 if format.quantized else FLOAT
    made = RanaMLP(K, 64, N, rank, rank, "silu", **how, format=format, down_format=down_format)
    return filled(made, 1.0)


MODULES = {
    "linear": lambda: filled(RanaLinear(K, N, 16, bias=True), 1.0),
    "neuron": lambda: filled(RanaNeuronLinear(K, N, bias=True), 0.5),
    "joint": make_attention,
    "joint_neurons": lambda: make_attention(None),
    "mlp": mlp,
    "mlp_joint": lambda: mlp(joint=True),
    "mlp_ungated": lambda: mlp(gated=False, activation="gelu_tanh"),
    "mlp_packed": lambda: packed_mlp(FLOAT),
    "mlp_neurons": neuron_mlp,
    "mlp_neurons_ungated": lambda: neuron_mlp(gated=False, activation="gelu_tanh"),
    "mlp_neurons_packed": lambda: packed_mlp(FLOAT, "neuron"),
    "dense": lambda: served(nn.Linear(K, N)),
}
QUANTIZED = {
    "linear_int8": lambda: filled(RanaLinear(K, N, 16, bias=True, format=INT8), 1.0),
    "linear_int4": lambda: filled(RanaLinear(K, N, 16, bias=True, format=INT4), 1.0),
    "neuron_int8": lambda: filled(RanaNeuronLinear(K, N, bias=True, format=Format(8)), 0.5),
    "neuron_odd": lambda: filled(RanaNeuronLinear(K, 33, bias=True, format=INT4), 0.5),
    "joint_int4": lambda: make_attention(format=INT4),
    "joint_neurons_int8": lambda: make_attention(None, INT8),
    "joint_neurons_int4": lambda: make_attention(None, INT4),
    "joint_neurons_odd": lambda: make_attention(None, INT4, last=7),
    "mlp_int8": lambda: mlp(format=INT8, down_format=INT8),
    "mlp_mixed": lambda: mlp(joint=True, format=INT4, down_format=Format(8, 64)),
    "mlp_ungated_int4": lambda: mlp(gated=False, down_format=INT4),
    "mlp_packed_int4": lambda: packed_mlp(Format(4, 64)),
    "mlp_packed_rows": lambda: packed_mlp(Format(8)),
    "mlp_neurons_int8": lambda: neuron_mlp(format=INT8, down_format=INT8),
    "mlp_neurons_mixed": lambda: neuron_mlp(format=INT4, down_format=Format(8, 64)),
    "mlp_neurons_ungated_int4": lambda: neuron_mlp(gated=False, format=INT4),
    "mlp_neurons_packed_int4": lambda: packed_mlp(Format(4, 64), "neuron"),
    "dense_int4": lambda: filled(QuantizedLinear(K, N, True, INT4)),
    "dense_int8": lambda: filled(QuantizedLinear(K, N, True, INT8)),
}
MODULES |= QUANTIZED
MLPS = [name for name in MODULES if name.startswith("mlp")]
every_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())
every_quantized = pytest.mark.parametrize("make", QUANTIZED.values(), ids=QUANTIZED.keys())


def served(linear: nn.Linear) -> nn.Module:
    model = nn.Sequential(linear)
    serve_dense(model, ["0"])
    return model[0]


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 5, K)


def test_linear_at_threshold_zero_is_the_low_rank_product(x):
    module = filled(RanaLinear(K, N, 16, bias=True))
    torch.testing.assert_close(module(x), x @ module.B.T @ module.rows + module.bias)


def test_linear_above_every_value_is_its_bias(x):
    module = filled(RanaLinear(K, N, 16, bias=True), threshold=1e9)
    torch.testing.assert_close(module(x), module.bias.expand(2, 5, N), rtol=0, atol=0)


def test_neuron_linear_drops_light_inputs(x):
    module = MODULES["neuron"]()
    kept = torch.where(x.abs() * module.norms >= 0.5, x, 0)
    assert 0 < (kept == 0).sum() < x.numel()
    torch.testing.assert_close(module(x), kept @ module.rows + module.bias)


def test_joint_linears_give_each_its_own_part(x):
    module = make_attention()
    y = reference.masked_lowrank_linear(x, module.q.B, module.q.rows, module.q.threshold, module.q.bias)
    torch.testing.assert_close(module(x), y)


def test_joint_neurons_are_kept_by_the_norms_of_all_their_outputs(x):
    module = make_attention(None)
    module.q.norms.copy_(module.q.rows.norm(dim=1))
    parts = module.q.rows.split((24, 8, 8), 1)
    norms = sum(part.square().sum(1) for part in parts).sqrt()
    torch.testing.assert_close(module.q.norms, norms)
    module.q.set_threshold(4.0)
    kept = torch.where(x.abs() * norms >= 4, x, 0)
    assert 0 < (kept == 0).sum() < x.numel()
    torch.testing.assert_close(
        module(x), torch.cat([kept @ part for part in parts], -1) + module.q.bias, rtol=1e-4, atol=1e-4
    )


class OpCalls(TorchDispatchMode):
    """The names of our ops in the order of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "rana":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith(("joint", "mlp"))])
def test_linears_of_one_adapter_are_one_call(name, x):
    with OpCalls() as calls, torch.inference_mode():
        MODULES[name]()(x)
    rank = "masked_linear" if "neurons" in name else "masked_lowrank_linear"
    assert calls.names == [rank if name.startswith("joint") else "masked_mlp"]


@pytest.mark.parametrize("name", [name for name in MLPS if name not in QUANTIZED])
def test_an_mlp_that_is_split_computes_the_same_and_joins_to_the_same_bits(name, x):
    model = nn.Sequential(MODULES[name]())
    y, state = model(x), model.state_dict()
    split = copy.deepcopy(model)
    to_linears(split)
    torch.testing.assert_close(split(x), y, rtol=5e-4, atol=5e-4)
    from_linears(split)
    joined = split.state_dict()
    assert list(joined) == list(state) and all(torch.equal(joined[n], t) for n, t in state.items())
    assert torch.equal(split(x), y)


def test_joint_neurons_as_linears_are_the_same_bits_again(x):
    module = make_attention(None)
    again = copy.deepcopy(module)
    to_linears(again)
    torch.testing.assert_close(again(x), module(x))
    from_linears(again)
    assert torch.equal(again(x), module(x)) and not x.__dict__


@pytest.mark.parametrize("gated", [True, False])
def test_a_neuron_mlp_is_its_parts(x, gated):
    module = neuron_mlp(gated)
    y, x, parts = module(x).double(), x.double(), copy.deepcopy(module).double()
    kept = torch.where(x.abs() * parts.norms >= 0.5, x, 0)
    assert 0 < (kept == 0).sum() < x.numel()
    up, down = parts.up_proj, parts.down_proj
    g = kept @ up.rows + up.bias
    if gated:
        g = nn.functional.silu(kept @ parts.gate_proj.rows + parts.gate_proj.bias) * g
    else:
        g = nn.functional.silu(g)
    g = torch.where(g.abs() * down.norms >= 0.5, g, 0)
    wanted = g @ down.rows + down.bias
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-5 * float(wanted.detach().abs().max()))


@pytest.mark.parametrize("joint", [False, True])
def test_mlp_is_its_parts(x, joint):
    module = mlp(joint=joint)
    y = module(x).double()
    x, parts = x.double(), copy.deepcopy(module).double()
    up, gate, down = parts.up_proj, parts.gate_proj, parts.down_proj
    h = x @ parts.B.T
    h = torch.where(h.abs() >= 1, h, 0)
    h_up, h_gate = h[..., :16], h[..., 0 if joint else 16 :]
    g = nn.functional.silu(h_gate @ gate.rows + gate.bias) * (h_up @ up.rows + up.bias)
    g = torch.where(g.abs() * down.norms >= 1, g, 0)
    wanted = g @ down.rows + down.bias
    # large terms cancel: the error is one of the terms, not of the sum
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-5 * float(wanted.detach().abs().max()))


@every_module
def test_compiles_whole(make, x):
    module = make()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    torch.testing.assert_close(compiled(-x), module(-x))


@every_module
def test_gradients_reach_every_parameter(make, x):
    module = make()
    module(x.requires_grad_()).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@every_module
def test_copies_stand_alone(make, x):
    module = make()
    y = module(x)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.zero_()
    for copied in copies:
        torch.testing.assert_close(copied(x), y, rtol=0, atol=0)


@every_module
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_leave_thresholds_norms_and_quantised_weights_alone(make, dtype, x):
    module = make()
    exact = {n: b.clone() for n, b in module.named_buffers() if n.rpartition(".")[2] != "weight"}
    dtypes = {torch.float32, torch.int8, torch.uint8, torch.float16}
    module.to(dtype)
    assert module(x.to(dtype)).dtype == dtype
    for name, before in exact.items():
        now = module.get_buffer(name)
        assert torch.equal(now, before) and now.dtype == before.dtype and now.dtype in dtypes


@every_quantized
def test_quantised_modules_compute_with_the_weights_they_mean(make, x):
    """The twin of floats gives the same, the masks too, and scales keep their bits in float64."""
    module = make()
    twin, wanted = copy.deepcopy(module), {}
    for part in twin.modules():
        for name, columns in getattr(part, "matrices", {}).items():
            if (scale := getattr(part, f"{name}_scale")) is not None:
                weight = dequantize(getattr(part, name), scale, columns)
                part.register_matrix(name, *weight.shape, FLOAT, None, None)
                getattr(part, name).data.copy_(weight)
    if isinstance(module, QuantizedLinear):
        wanted = nn.functional.linear(x, twin.qweight, twin.bias)
    else:
        wanted = twin(x)
    torch.testing.assert_close(module(x), wanted, rtol=1e-3, atol=5e-3)  # kernels round sums of 4 bits
    for part, other in zip(module.modules(), twin.modules(), strict=True):
        if hasattr(part, "masks"):
            masks, others = part.masks(x), other.masks(x)
            assert masks.keys() == others.keys() and all(torch.equal(masks[k], others[k]) for k in masks)
    with rana_kernels.use_backend("reference"):  # the only one that takes float64
        assert module.double()(x.double()).dtype == torch.float64
    assert all(b.dtype == torch.float16 for n, b in module.named_buffers() if n.endswith("_scale"))


@every_quantized
def test_quantised_modules_work_under_autocast(make, x):
    module = make()
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


def test_tensors_alone_say_the_width_of_each_matrix(x):
    made = filled(RanaLinear(K, N, 16, format=INT8))
    tensors = {name: tensor for name, tensor in made.state_dict().items() if name != "weight"}
    rows = torch.randn(16, N)
    tensors["rows"], tensors["rows_scale"] = quantize(rows, 4, None)
    module = fill_module(RanaLinear(K, N, 16, device="meta"), **tensors)
    assert module.B.dtype == torch.int8 and module.rows.dtype == torch.uint8
    assert "B_bits=8, rows_bits=4" in repr(module)
    wanted = x @ dequantize(module.B, module.B_scale).T @ dequantize(module.rows, module.rows_scale)
    torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-4)
    floats = fill_module(module, B=made.B.float(), rows=rows, threshold=made.threshold)
    assert isinstance(floats.B, nn.Parameter) and floats.rows_scale is None
    with pytest.raises(RuntimeError, match="size mismatch for rows_scale"):
        fill_module(RanaLinear(K, N, 16, device="meta"), **tensors | {"rows_scale": torch.ones(16, 3).half()})
    with pytest.raises(RuntimeError, match='Missing key.* "rows_scale"'):
        fill_module(RanaLinear(K, N, 16, device="meta"), **{**tensors, "rows_scale": None})


def test_scales_are_finite():
    module = MODULES["mlp_int8"]()
    module.up_proj.rows_scale[2, 0] = float("inf")
    with pytest.raises(RuntimeError, match=r"up_proj\.rows_scale has inf, wanted finite numbers"):
        MODULES["mlp_int8"]().load_state_dict(module.state_dict())
    with pytest.raises(ValueError, match=r"up_proj\.rows_scale has inf, wanted finite numbers"):
        check_values(module)


@pytest.mark.parametrize("name", [name for name in MLPS if name in QUANTIZED])
def test_a_quantised_mlp_is_split_and_joined_to_the_same_bits(name, x):
    module = MODULES[name]()
    split = split_mlp(module)
    y, found = module(x), split(x)
    assert (found - y).norm() < 0.01 * y.norm()  # a rounding may turn a mask over
    joined = join_mlp(split)
    state, again = module.state_dict(), joined.state_dict()
    assert again.keys() == state.keys() and all(torch.equal(again[n], t) for n, t in state.items())
    assert torch.equal(joined(x), y)


def test_quantised_modules_are_not_rewritten_as_linears():
    with pytest.raises(ValueError, match="B is quantised, wanted floats"):
        to_linears(nn.Sequential(MODULES["mlp_int8"]()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5,), "bits is 5"),
        ((16, 32), "None with 16 bits"),
        ((4, 48), "group is 48"),
        ((True,), "bits is True"),
    ],
)
def test_formats_that_are_none_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Format(*arguments)


def test_a_packed_mlp_is_split_on_a_border_of_groups_only():
    with pytest.raises(ValueError, match="split at column 64, wanted a multiple of the group"):
        packed_mlp(Format(8, 128))


@every_module
def test_state_dict_fits_an_empty_twin_from_meta(make, x):
    module = make()
    with torch.device("meta"):
        twin = make()
    twin.to_empty(device="cpu").load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(twin(x), module(x))


def test_every_linear_keeps_an_empty_weight():
    for module in (make_attention(), mlp()):
        names = [name for name, _ in module.named_children()]
        assert all(module.state_dict()[f"{name}.weight"].shape == (0,) for name in names)


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), -1.0])
def test_thresholds_are_finite_and_not_negative(bad):
    module = RanaLinear(K, N, 16)
    with pytest.raises(ValueError, match="wanted finite numbers >= 0"):
        module.set_threshold(bad)
    state = filled(RanaLinear(K, N, 16), threshold=bad).state_dict()
    with pytest.raises(RuntimeError, match="wanted finite numbers >= 0"):
        module.load_state_dict(state)
    module.threshold.fill_(bad)
    with pytest.raises(ValueError, match="wanted finite numbers >= 0"):
        check_values(module)


def test_a_receiver_wants_the_tensor_its_owner_had(x):
    module = make_attention()
    with pytest.raises(RuntimeError, match="called before the linear that it shares an adapter"):
        module.k(x)
    module.q(x)
    with pytest.raises(RuntimeError, match="with another input"):
        module.k(x.clone())


def test_a_handoff_holds_nothing_after_the_pass(x):
    module = make_attention()
    module(x)
    assert not x.__dict__
    with pytest.raises(RuntimeError, match="call it first"):
        module.v(x)


@pytest.mark.parametrize("rank", [16, None], ids=["ranks", "neurons"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_many_threads_call_one_model(x, compiled, rank):
    module = make_attention(rank)
    torch._dynamo.reset()
    run = torch.compile(module, fullgraph=True) if compiled else module
    inputs = [x + i for i in range(8)]
    with torch.inference_mode():
        wanted = [run(each) for each in inputs]

    def call(i: int) -> bool:
        with torch.inference_mode():
            return all(torch.equal(run(inputs[i]), wanted[i]) for _ in range(1000))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(call, range(8)))


def test_a_call_within_a_call_keeps_the_outputs_of_both(x):
    module, other = make_attention(), x + 1
    wanted, inner = module(x), []
    wanted_inner = module(other)

    def call_again(*_) -> None:
        hook.remove()
        inner.append(module(other))

    hook = module.q.register_forward_hook(call_again)
    assert torch.equal(module(x), wanted) and torch.equal(inner[0], wanted_inner)


def test_mlp_refuses_unknown_activations_and_unequal_shared_ranks():
    with pytest.raises(ValueError, match="activation is 'tanh', wanted one of silu"):
        RanaMLP(K, I, N, 16, 16, "tanh")
    with pytest.raises(ValueError, match="joint ranks are 16 and 8"):
        RanaMLP(K, I, N, 16, 8, "silu", joint=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "dense"}, "kind is 'dense', wanted rank or neuron"),
        ({"kind": "neuron"}, f"neuron adapters have 16 and 16 rows and joint=True, wanted {K}"),
        ({"kind": "neuron", "up_rank": K, "gate_rank": K, "joint": False}, "joint=False, wanted"),
    ],
)
def test_mlp_refuses_neurons_without_one_mask(arguments, message):
    sizes = {"up_rank": 16, "gate_rank": 16, "activation": "silu", "joint": True}
    with pytest.raises(ValueError, match=message):
        RanaMLP(K, I, N, **sizes | arguments)


@every_module
def test_count_live_counts_what_the_masks_keep(make, x):
    module = nn.Sequential(make())
    with count_live(module) as counts:
        module(x)
        module(x[:1])
    assert bool(counts) != isinstance(module[0], nn.Linear | QuantizedLinear)
    for count in counts.values():
        assert count.tokens == 15 and 0 < count.mean <= count.rows
    assert not any(part._forward_hooks for part in module.modules())


def test_count_live_by_hand(x):
    module = MODULES["linear"]()
    with count_live(module) as counts:
        module(x)
    assert counts[""].mean == ((x @ module.B.T).abs() >= 1).sum().item() / 10
