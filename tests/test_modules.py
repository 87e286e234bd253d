"""The modules: what they compute, how they survive copies, casts and compilation, what they refuse."""

import copy
import pickle

import pytest
import torch
from torch import nn

from rana_kernels.evaluation.live import count_live
from rana_kernels.nn.adapters import RanaLinear, RanaMLP, RanaNeuronLinear, check_thresholds, joint_linears
from rana_kernels.ops import reference

K, N, I = 24, 40, 56  # noqa: E741


def filled(module: nn.Module, threshold: float = 0.0) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    for part in module.modules():
        if hasattr(part, "scale"):
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


def make_attention(bias: bool = True) -> Attention:
    return filled(Attention(*joint_linears(K, (24, 8, 8), 16, bias)), threshold=2.0)


def mlp(gated: bool = True, joint: bool = False, activation: str = "silu", threshold: float = 1.0) -> RanaMLP:
    gate_rank = (16 if joint else 8) if gated else None
    return filled(RanaMLP(K, I, N, 16, gate_rank, activation, joint=joint, bias=(True,) * 3), threshold)


MODULES = {
    "linear": lambda: filled(RanaLinear(K, N, 16, bias=True), 1.0),
    "neuron": lambda: filled(RanaNeuronLinear(K, N, bias=True), 0.5),
    "joint": make_attention,
    "mlp": mlp,
    "mlp_joint": lambda: mlp(joint=True),
    "mlp_ungated": lambda: mlp(gated=False, activation="gelu_tanh"),
}
every_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())


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
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


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
    module(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@every_module
def test_copies_stand_alone(make, x):
    module = make()
    y = module(x)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    for parameter in module.parameters():
        parameter.data.zero_()
    for copied in copies:
        torch.testing.assert_close(copied(x), y, rtol=0, atol=0)


@every_module
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_leave_thresholds_and_scales_float32(make, dtype, x):
    module = make()
    exact = {n: b.clone() for n, b in module.named_buffers() if n.endswith(("threshold", "scale"))}
    module.to(dtype)
    assert module(x.to(dtype)).dtype == dtype
    for name, before in exact.items():
        assert torch.equal(module.get_buffer(name), before) and module.get_buffer(name).dtype == torch.float32


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
        check_thresholds(module)


def test_a_receiver_wants_the_tensor_its_owner_had(x):
    module = make_attention()
    with pytest.raises(RuntimeError, match="called before the linear it was decomposed with"):
        module.k(x)
    module.q(x)
    with pytest.raises(RuntimeError, match="with another input"):
        module.k(x.clone())


def test_a_handoff_holds_nothing_after_the_pass(x):
    module = make_attention()
    module(x)
    assert module.q.handoff.held is None
    with pytest.raises(RuntimeError, match="call it first"):
        module.v(x)


def test_mlp_refuses_unknown_activations_and_unequal_shared_ranks():
    with pytest.raises(ValueError, match="activation is 'tanh', wanted one of silu"):
        RanaMLP(K, I, N, 16, 16, "tanh")
    with pytest.raises(ValueError, match="joint ranks are 16 and 8"):
        RanaMLP(K, I, N, 16, 8, "silu", joint=True)


@every_module
def test_count_live_counts_what_the_masks_keep(make, x):
    module = nn.Sequential(make())
    with count_live(module) as counts:
        module(x)
        module(x[:1])
    assert counts
    for count in counts.values():
        assert count.tokens == 15 and 0 < count.mean <= count.rows
    assert not any(part._forward_hooks for part in module.modules())


def test_count_live_by_hand(x):
    module = MODULES["linear"]()
    with count_live(module) as counts:
        module(x)
    assert counts[""].mean == ((x @ module.B.T).abs() >= 1).sum().item() / 10
