"""From a model and text to an adapted model: calibration, decomposition, allocation, compression."""

import copy
import json
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from rana_kernels.allocation.cost import MULTIPLY_ADDS
from rana_kernels.allocation.methods import plan
from rana_kernels.allocation.search import Search
from rana_kernels.allocation.split import Splits
from rana_kernels.compression import run
from rana_kernels.compression.run import compress
from rana_kernels.evaluation.live import count_live
from rana_kernels.model import architectures
from rana_kernels.model.architectures import find_blocks
from rana_kernels.model.head import head_names, output_head
from rana_kernels.model.linears import linear_of
from rana_kernels.model.plan import AdapterSpec, Plan
from rana_kernels.nn.adapters import RanaReceiver
from rana_kernels.nn.mlp import RanaMLP
from rana_kernels.statistics.calibration import INPUTS, calibrate
from rana_kernels.statistics.decomposition import decompose
from rana_kernels.statistics.thresholds import threshold_for
from tests.architectures import MODELS

ARCHITECTURES = tuple(MODELS)


def make_model(architecture: str = "Llama", **sizes) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[architecture].build(**sizes).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def quantised_head(model: nn.Module, bits: int, group: int | None) -> AdapterSpec:
    """Return the spec of a dense lm_head in so many bits."""
    (name,), head = head_names(model), output_head(model)
    sizes = (head.in_features, (head.out_features,))
    return AdapterSpec("dense", (name,), *sizes, bias=head.bias is not None, bits=bits, group=group)


def tokens(rows: int = 6, length: int = 40) -> torch.Tensor:
    return torch.randint(0, 128, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(tokens()).logits


def hand_plan(
    model: nn.Module, joint: bool = False, o: str = "dense", down: str = "neuron", first: str = "rank"
) -> Plan:
    """Full ranks and threshold 0 everywhere: the dense model, through the adapters.

    first   the kind of the adapters of q, k, v, gate and up
    """
    adapters = []
    for block in find_blocks(model):
        mlp = [(first, block.expanding)] if joint else [(first, (name,)) for name in block.expanding]
        mlp += [(down, (block.down,))] if block.down else []
        for kind, names in [(first, block.qkv), (o, (block.o,)), *mlp]:
            linears = [linear_of(model, name) for name in names]
            K, widths = linears[0].in_features, tuple(linear.out_features for linear in linears)
            rank = {"rank": min(K, sum(widths)), "neuron": K, "dense": 0}[kind]
            bias = any(linear.bias is not None for linear in linears)
            adapters.append(
                AdapterSpec(kind, names, K, widths, rank, rank, None if kind == "dense" else 0.0, bias)
            )
    return Plan(tuple(adapters))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    # on models this small threads would mostly wait for one another
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# calibration


def test_moments_and_sample_do_not_depend_on_the_batches():
    model, ids = make_model(), tokens()
    a = calibrate(model, list(ids), sample_tokens=50, inputs=INPUTS, progress=False)
    b = calibrate(model, iter([ids[:4], ids[4:]]), sample_tokens=50, inputs=INPUTS, progress=False)
    assert a.tokens == b.tokens == 240 and a.digest == b.digest and len(a.inputs) == 8
    for key, found in a.inputs.items():
        torch.testing.assert_close(found.moment, b.inputs[key].moment, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(found.sample, b.inputs[key].sample, rtol=1e-4, atol=1e-6)
        assert len(found.sample) == 50 and found.moment.dtype == torch.float64


def test_moments_are_of_what_the_linears_read():
    model, seen = make_model(), []
    hook = model.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    stats = calibrate(model, [tokens()], sample_tokens=10_000, progress=False)
    hook.remove()
    x = torch.cat(seen).detach().flatten(0, 1)
    each = [part.detach()[0] for part in seen]  # a moment is summed sequence by sequence
    expected = torch.stack([(part.T @ part).double() for part in each]).sum(0)
    torch.testing.assert_close(stats.inputs[1, "mlp"].moment.float(), expected.float())
    torch.testing.assert_close(stats.inputs[1, "mlp"].sample, x)


def test_padding_is_left_out():
    model, ids = make_model(), tokens(1, 30)
    mask = torch.ones_like(ids)
    mask[:, 20:] = 0
    padded = calibrate(model, [{"input_ids": ids, "attention_mask": mask}], progress=False)
    plain = calibrate(model, [ids[:, :20]], progress=False)
    assert padded.tokens == 20 and padded.digest == plain.digest
    torch.testing.assert_close(
        padded.inputs[1, "mlp"].moment, plain.inputs[1, "mlp"].moment, rtol=1e-4, atol=1e-6
    )


def test_the_sample_is_spread_over_the_stream():
    model = make_model(num_hidden_layers=1)
    stats = calibrate(model, [tokens(20, 100)], sample_tokens=200, progress=False)
    table = (
        model.model.layers[0].input_layernorm(model.model.embed_tokens(tokens(20, 100).flatten())).detach()
    )
    where = torch.cdist(stats.inputs[0, "qkv"].sample, table).argmin(1)
    assert len(where.unique()) > 50


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "holds no tokens"),
        ([torch.randn(4, 8)], "input_ids of item 0 has dtype torch.float32, wanted a tensor of integers"),
        (["text"], "input_ids of item 0 has a str"),
        ([torch.zeros(2, 2, 2, dtype=torch.long)], "has shape"),
        (torch.zeros(4, 8, dtype=torch.long), "wanted an iterable of input_ids tensors"),
        (
            [{"input_ids": torch.zeros(1, 4, dtype=torch.long), "attention_mask": torch.ones(1, 3)}],
            "attention_mask",
        ),
    ],
)
def test_calibration_errors(calibration, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        calibrate(model, calibration, progress=False)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_non_finite_activations_name_the_linear_and_leave_the_model_as_it_was():
    model = make_model().train().half()
    model.model.layers[1].input_layernorm.weight.data.fill_(6e4)  # which overflows in 16 bits
    with pytest.raises(ValueError, match=r"input of model\.layers\.1\.self_attn\.q_proj .* not finite"):
        calibrate(model, [tokens()], progress=False)
    assert model.training and not any(module._forward_pre_hooks for module in model.modules())


def test_unknown_architectures_are_told_what_is_known():
    with pytest.raises(ValueError, match="model_type is None, wanted one of llama, mistral"):
        calibrate(nn.Linear(2, 2), [tokens()], progress=False)


# decomposition and split


@pytest.mark.parametrize(("N", "K", "count"), [(96, 64, 500), (48, 64, 500), (64, 64, 20), (176, 64, 10)])
def test_factors_are_orthonormal_ordered_and_exact_at_full_rank(N, K, count):
    torch.manual_seed(0)
    W = torch.randn(N, K)
    X = torch.randn(count, K) @ torch.diag(torch.logspace(0, -3, K)) @ torch.randn(K, K)
    factors = decompose(W, X.double().T @ X.double())
    ranks = min(N, K)
    torch.testing.assert_close(factors.rows @ factors.rows.T, torch.eye(ranks), rtol=0, atol=1e-6)
    torch.testing.assert_close(factors.rows.T @ factors.B, W, rtol=0, atol=1e-5)
    singular = torch.linalg.svdvals(X.double() @ W.double().T)
    torch.testing.assert_close(factors.energy[:8].sqrt(), singular[:8], rtol=1e-8, atol=0)


def test_the_error_of_a_mask_is_the_energy_it_drops():
    torch.manual_seed(0)
    W, X = torch.randn(96, 64, dtype=torch.float64), torch.randn(300, 64, dtype=torch.float64)
    factors = decompose(W, X.T @ X)
    h = X @ factors.B.T
    z = torch.where(h.abs() < 2, 0, h)
    error = (X @ W.T - z @ factors.rows).square().sum()
    torch.testing.assert_close(error, (h - z).square().sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
def test_the_split_is_the_best_there_is(keep):
    torch.manual_seed(0)
    K, N, count = 64, 176, 400
    h = torch.randn(count, K) * torch.logspace(0, -1.5, K) * torch.rand(count, 1)
    split = Splits(h, MULTIPLY_ADDS.rank(K, N)).exact(keep * K * N)

    def captured(rank: int, live: float) -> float:
        return float(h[:, :rank].square().flatten().topk(round(live * count)).values.sum())

    every = {r: min(r, (keep * K * N - r * K) / N) for r in range(16, K + 1, 16)}
    best = max(captured(r, live) for r, live in every.items() if live >= 1)
    assert captured(split.rank, split.live) > 0.999 * best
    assert split.rank * K + split.live * N <= keep * K * N * 1.001
    dropped = float(h.square().sum()) - captured(split.rank, split.live)
    assert split.dropped * count == pytest.approx(dropped, rel=0.03)


def test_thresholds_keep_what_was_asked_and_never_exact_zeros():
    score = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 5.0, 4.0]])
    assert threshold_for(score, 2.0) == (2.0, 2.0)
    assert threshold_for(score, 3.0) == (1.0, 2.5)
    assert threshold_for(score, 4.0) == (0.0, 4.0)
    assert threshold_for(score, 0.0)[1] == 0


# plans


def test_a_plan_meets_its_budget_and_survives_json():
    stats = calibrate(make_model(), [tokens()], inputs=INPUTS, progress=False)
    for method in ("global", "paper", "static"):
        made = plan(stats, flops_reduction=0.4, method=method, progress=False)
        assert made.reduction == pytest.approx(0.4, abs=0.02 if method == "static" else 0.002)
        assert Plan.from_json(made.to_json()) == made


def test_the_paper_leaves_o_dense_and_every_layer_equal():
    stats = calibrate(make_model(), [tokens()], progress=False)
    made = plan(stats, flops_reduction=0.4, method="paper", progress=False)
    by_layer = [made.adapters[:5], made.adapters[5:]]
    for qkv, o, gate, up, down in by_layer:
        assert (qkv.kind, o.kind, gate.kind, up.kind, down.kind) == (
            "rank",
            "dense",
            "rank",
            "rank",
            "neuron",
        )
        assert all(adapter.rank % 16 == 0 for adapter in (qkv, gate, up))
    costs = [sum(adapter.flops for adapter in layer) for layer in by_layer]
    assert costs[0] == pytest.approx(costs[1], rel=0.002)


@pytest.mark.parametrize("reduction", [0, -1, 0.999, float("nan")])
@pytest.mark.parametrize("method", ["global", "paper", "static"])
def test_a_budget_out_of_reach_is_told_the_range(method, reduction):
    stats = calibrate(make_model(), [tokens()], progress=False)
    with pytest.raises(ValueError, match=r"wanted more than 0 and (at most 0\.\d+|less than 1)"):
        plan(stats, flops_reduction=reduction, method=method, progress=False)


def test_the_end_of_the_range_is_in_reach():
    stats = calibrate(make_model(), [tokens()], progress=False)
    for method, most in (("paper", 0.782), ("global", 0.95)):
        for reduction in (0.001, most):
            made = plan(stats, flops_reduction=reduction, method=method, progress=False)
            assert made.reduction >= reduction - 0.005


def test_statistics_that_lack_something_are_told_what():
    stats = calibrate(make_model(), [tokens()], inputs=("qkv", "mlp"), gradients=False, progress=False)
    with pytest.raises(ValueError, match="nothing of the input 'down' of layer 0"):
        plan(stats, flops_reduction=0.4, method="static", progress=False)
    stats = calibrate(make_model(), [tokens()], gradients=False, progress=False)
    with pytest.raises(ValueError, match=r"no gradients of model\.layers\.0.*calibrate with gradients=True"):
        plan(stats, flops_reduction=0.4, method="global", progress=False)


BROKEN = {
    "kind": ({"kind": "magic"}, "kind has 'magic', wanted one of rank, neuron, dense"),
    "rank": ({"rank": 999}, "rank has 999, wanted 1 to 64"),
    "live": ({"live": 65.0}, "live has 65.0, wanted at most its rank, 64"),
    "threshold": ({"threshold": float("inf")}, "threshold has inf, wanted None or a finite number"),
    "names": ({"names": []}, r"names has \(\), wanted a non-empty tuple"),
    "size": ({"in_features": 2**40}, "in_features has"),
    "widths": ({"out_features": [8, "x"]}, "out_features has"),
    "surplus": ({"code": "x"}, r"the fields has \['code'\]"),
    "bias": ({"bias": 1}, "bias has 1, wanted true or false"),
    "bits": ({"bits": 5}, "bits is 5, wanted 16, 8 or 4"),
    "truth": ({"bits": True}, "bits is True, wanted 16, 8 or 4"),
    "group": ({"bits": 4, "group": 48}, "group is 48, wanted 32, 64, 128, or None for a whole row"),
    "float group": ({"bits": 4, "group": 32.0}, "group is 32.0, wanted 32"),
    "group of floats": ({"group": 32}, "group is 32, wanted None with 16 bits"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_plans_are_refused(change, message):
    data = json.loads(hand_plan(make_model()).to_json())
    data["adapters"][0] |= change
    with pytest.raises(ValueError, match=message):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", '{"format": 3}', '{"format": 2, "adapters": [3]}', "[" * 10**5]
)
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(ValueError, match="Plan"):
        Plan.from_json(text)


def test_plans_that_do_not_fit_the_model_leave_it_alone():
    model = make_model()
    good = hand_plan(model).adapters
    swapped = AdapterSpec(
        **{**vars(good[0]), "names": good[0].names[::-1], "out_features": good[0].out_features[::-1]}
    )
    for adapters, message in [
        (good[1:], "nothing for model.layers.0.self_attn.q_proj"),
        (hand_plan(make_model(num_hidden_layers=3)).adapters, "no linears of this model"),
        (hand_plan(make_model("Llama", intermediate_size=160)).adapters, "the plan has"),
        (hand_plan(make_model("Qwen2")).adapters, "bias=True, the model the opposite"),
        ((swapped, *good[1:]), "in the order in which the model calls them"),
    ]:
        with pytest.raises(ValueError, match=message):
            compress(model, [tokens()], plan=Plan(tuple(adapters)), progress=False)
    assert all(type(model.get_submodule(name)) is nn.Linear for b in find_blocks(model) for name in b.linears)


# compression


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_compresses_and_generates(architecture):
    model = make_model(architecture)
    report = compress(model, [tokens()], flops_reduction=0.3, progress=False)
    with count_live(model) as counts:
        assert logits(model).isfinite().all()
    # a ReLU's exact zeros are never kept, whatever they would be worth
    assert report.block_flops_reduction == pytest.approx(0.3, abs=0.02 if architecture == "OPT" else 0.005)
    assert 0 < report.model_flops_reduction < report.block_flops_reduction
    for adapter in report.adapters:
        assert counts[adapter.names[0]].mean == pytest.approx(adapter.live, rel=0.3)
        assert 0 < len(adapter.spectrum) <= 64
    assert model.generate(tokens(1, 8), max_new_tokens=4, do_sample=False).shape == (1, 12)
    assert Plan.from_json(json.dumps(json.loads(report.to_json())["plan"])) == report.plan


QKV_AND_O = [("rank", "rank"), ("rank", "neuron"), ("rank", "dense"), ("neuron", "neuron")]
DOWN = ("rank", "neuron", "dense")
# torch.compile takes most of the time. Every combination of the others is compiled with one kind of down.
DOWN_COMPILED = {
    (*kinds, joint): DOWN[(i + joint) % 3] for i, kinds in enumerate(QKV_AND_O) for joint in (False, True)
}


@pytest.mark.parametrize("down", DOWN)
@pytest.mark.parametrize(("first", "o"), QKV_AND_O)
@pytest.mark.parametrize("joint", [False, True], ids=["separate", "joint"])
def test_full_rank_at_threshold_zero_is_the_dense_model(joint, first, o, down):
    model = make_model("Qwen2", num_hidden_layers=1)
    dense = logits(model)
    compress(model, [tokens(2)], plan=hand_plan(model, joint, o, down, first), progress=False)
    torch.testing.assert_close(logits(model), dense, rtol=0, atol=2e-6)
    layer = model.model.layers[0]
    assert isinstance(layer.mlp, RanaMLP) == (down == "neuron" and (joint or first == "rank"))
    assert isinstance(layer.self_attn.v_proj, RanaReceiver)
    if DOWN_COMPILED[first, o, joint] != down:
        return
    torch._dynamo.reset()
    compiled = torch.compile(model.model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        hidden = compiled(tokens(), use_cache=False).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), dense, rtol=0, atol=2e-6)


def test_what_the_paper_drops_is_the_error_of_the_output():
    model = make_model()
    report = compress(model, [tokens()], flops_reduction=0.3, method="paper", progress=False)
    for adapter in report.adapters:
        assert adapter.output_error**2 == pytest.approx(1 - adapter.captured_energy, abs=0.02)


@pytest.mark.parametrize("first", ["rank", "neuron"])
@pytest.mark.parametrize("metric", ["output", "loss"])
def test_missing_thresholds_are_chosen_from_the_sample(first, metric):
    model = make_model()
    asked = hand_plan(model, joint=True, o="neuron", first=first)
    changes = {"threshold": None, "metric": metric}
    adapters = [replace(a, **changes, live=a.rank / 2) for a in asked.adapters]
    report = compress(model, [tokens()], plan=Plan(tuple(adapters)), progress=False)
    with count_live(model) as counts:
        logits(model)
    for adapter, measured in zip(report.plan.adapters, report.adapters, strict=True):
        assert adapter.threshold > 0 and 0.5 < measured.captured_energy < 1
        assert counts[adapter.names[0]].mean == pytest.approx(adapter.rank / 2, rel=0.2)


@pytest.mark.parametrize("bits", [16, 8])
def test_joint_neurons_are_one_mask_on_the_norms_of_all_rows(bits):
    """It is the same model as one that masks each input once, by hand."""
    model, by_hand = make_model("Qwen2", num_hidden_layers=1), make_model("Qwen2", num_hidden_layers=1)
    asked = hand_plan(model, joint=True, first="neuron", down="dense")
    changes = {"threshold": 0.6, "bits": bits}
    adapters = tuple(replace(a, **changes) if a.kind == "neuron" else a for a in asked.adapters)
    compress(model, [tokens()], plan=Plan(adapters), progress=False)

    def mask(names: tuple[str, ...]):
        norms = torch.cat([linear_of(by_hand, name).weight for name in names]).norm(dim=0)

        def hook(module: nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
            return torch.where(args[0].abs() * norms < 0.6, 0, args[0])

        return hook

    for names in (find_blocks(by_hand)[0].qkv, find_blocks(by_hand)[0].expanding):
        for name in names:
            by_hand.get_submodule(name).register_forward_pre_hook(mask(names))
    wanted = logits(by_hand)
    error = float((logits(model) - wanted).norm() / wanted.norm())
    assert error < (1e-5 if bits == 16 else 0.02)
    assert float((logits(make_model("Qwen2", num_hidden_layers=1)) - wanted).norm() / wanted.norm()) > 0.05


def test_in_steps_is_the_same_as_in_one_go():
    at_once, in_steps = make_model(), make_model()
    compress(at_once, [tokens()], flops_reduction=0.4, progress=False)
    stats = calibrate(in_steps, [tokens()], progress=False)
    compress(in_steps, plan=plan(stats, flops_reduction=0.4, progress=False), stats=stats, progress=False)
    assert_equal_states(at_once, in_steps)


def assert_equal_states(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_bfloat16_models_stay_so_and_thresholds_do_not():
    model = make_model().bfloat16()
    compress(model, [tokens()], flops_reduction=0.3, progress=False)
    kinds = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    for name, dtype in kinds.items():
        assert dtype == (torch.float32 if name.endswith(("threshold", "norms")) else torch.bfloat16), name
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("method", ["global", "paper"])
def test_resuming_gives_the_same_bits_and_redoes_nothing(tmp_path, monkeypatch, method):
    whole, broken = make_model("Qwen2"), make_model("Qwen2")
    first = compress(whole, [tokens()], flops_reduction=0.4, method=method, progress=False)
    measured, done = run.measure, []

    def interrupted(layer, adapter):
        if layer.block.index == 1:
            raise KeyboardInterrupt
        return measured(layer, adapter)

    monkeypatch.setattr(run, "measure", interrupted)
    arguments = {"flops_reduction": 0.4, "method": method, "resume_dir": tmp_path, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        compress(broken, [tokens()], **arguments)
    monkeypatch.setattr(run, "measure", lambda *a: done.append(a[0].block.index) or measured(*a))
    resumed = make_model("Qwen2")
    report = compress(resumed, [tokens()], **arguments)
    assert set(done) == {1} and report.adapters == first.adapters
    assert_equal_states(whole, resumed)


def test_another_compression_does_not_resume_this_one(tmp_path):
    compress(make_model(), [tokens()], flops_reduction=0.4, resume_dir=tmp_path, progress=False)
    for calibration, reduction in [([tokens()], 0.3), ([tokens(3)], 0.4)]:
        with pytest.raises(ValueError, match="unfinished work on something else"):
            compress(
                make_model(), calibration, flops_reduction=reduction, resume_dir=tmp_path, progress=False
            )


def test_arguments_that_do_not_fit_together():
    model = make_model()
    made = hand_plan(model)
    stats = calibrate(model, [tokens()], progress=False)
    for arguments, message in [
        ({"calibration": [tokens()]}, "exactly one of them"),
        ({"calibration": [tokens()], "plan": made, "flops_reduction": 0.4}, "exactly one of them"),
        ({"flops_reduction": 0.4}, "exactly one of calibration and stats"),
        (
            {"flops_reduction": 0.4, "stats": calibrate(make_model(), [tokens()], progress=False)},
            "another model",
        ),
        ({"flops_reduction": 0.4, "stats": stats, "method": "magic"}, "wanted one of global, rankadaptor"),
    ]:
        with pytest.raises(ValueError, match=message):
            compress(model, progress=False, **arguments)


def test_an_adapted_model_is_not_compressed_again():
    model = make_model()
    compress(model, [tokens()], flops_reduction=0.4, progress=False)
    with pytest.raises(ValueError, match="cannot be compressed again"):
        compress(copy.deepcopy(model), [tokens()], flops_reduction=0.4, progress=False)


@pytest.mark.parametrize("method", ["global", "paper", "rankadaptor"])
def test_blocks_are_found_once(monkeypatch, method):
    found = []
    original = architectures.find_blocks

    def counted(model):
        found.append(model)
        return original(model)

    for name, module in list(sys.modules.items()):
        if name.startswith("rana_kernels.") and getattr(module, "find_blocks", None) is original:
            monkeypatch.setattr(module, "find_blocks", counted)
    search = {"search": Search(tokens(2), 2)} if method == "rankadaptor" else {}
    compress(make_model(), [tokens()], flops_reduction=0.3, method=method, progress=False, **search)
    assert len(found) == 1
