"""Compressed models in vLLM: its own models with our layers, on the CPU, without its engine."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rana_kernels as rana
from rana_kernels.checkpoint.headers import CheckpointError
from rana_kernels.checkpoint.manifest import MANIFEST
from rana_kernels.model.plan import AdapterSpec, Plan
from tests.test_compress import hand_plan, make_model, tokens

if not torch.cuda.is_available():
    os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
pytest.importorskip(
    "vllm", reason="vLLM is not installed; `make test-vllm` installs it", exc_type=ImportError
)
ROOT = Path(__file__).parent.parent.parent
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the models that run without vLLM's engine")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def masking(plan: Plan) -> Plan:
    """Half the ranks, and thresholds that mask."""
    changed = []
    for adapter in plan.adapters:
        rank = max(adapter.rank // 32 * 16, 16) if adapter.kind == "rank" else adapter.rank
        threshold = None if adapter.kind != "dense" else adapter.threshold
        changed.append(replace(adapter, rank=rank, live=0.6 * rank, threshold=threshold))
    return Plan(tuple(changed))


def separate(plan: Plan, kinds: dict[str, tuple[str, int]]) -> Plan:
    """Every linear that `kinds` names with an adapter of its own: kind and ranks (0: as many as inputs)."""
    changed: list[AdapterSpec] = []
    for adapter in plan.adapters:
        found = [kinds.get(name.rpartition(".")[2]) for name in adapter.names]
        if None in found:
            changed.append(adapter)
            continue
        for name, width, (kind, rank) in zip(adapter.names, adapter.out_features, found, strict=True):
            rank = adapter.in_features if kind == "neuron" else min(rank, width)
            threshold = 0.0 if kind != "dense" else None
            changed.append(
                AdapterSpec(kind, (name,), adapter.in_features, (width,), rank, rank, threshold, adapter.bias)
            )
    return Plan(tuple(changed))


@torch.no_grad()
def saved(model: nn.Module, plan: Plan, place: Path) -> Path:
    """Compress and save `model`, with thresholds that no score equals."""
    return written(model, masking(plan), place)


@torch.no_grad()
def written(model: nn.Module, plan: Plan, place: Path) -> Path:
    rana.compress(model, [tokens()], plan=plan, progress=False)
    for name, tensor in model.state_dict().items():
        # `compress` takes the score of a calibration token as the threshold, and the tests run such tokens.
        # The last bits of a score depend on how many tokens an op gets: 48 in `wanted`, 24 in vLLM. They
        # must not decide a mask. With this factor, no score of these models is within 1e-5 of a threshold.
        if name.endswith("threshold"):
            tensor *= 1 - 5e-5
    rana.save(model, place)
    return place


@torch.no_grad()
def wanted(place: Path, ids: torch.Tensor) -> torch.Tensor:
    return rana.load(place)(ids).logits


def assert_same(place: Path) -> None:
    from tests.stacks.vllm_on_cpu import Loaded

    ids = tokens(2, 24)
    torch.testing.assert_close(Loaded(place).logits(ids), wanted(place, ids), rtol=1e-4, atol=1e-5)


def test_the_plugin_is_found_and_may_be_called_again():
    from vllm.model_executor.layers.quantization import get_quantization_config

    from rana_kernels.integrations.vllm import RanaConfig, register

    (plugin,) = entry_points(group="vllm.general_plugins", name="rana")
    assert plugin.load() is register
    register()
    register()
    assert get_quantization_config("rana") is RanaConfig


@on_cpu
def test_without_the_plugin_vllm_refuses(tmp_path):
    model = make_model("Llama")
    place = saved(model, hand_plan(model), tmp_path / "out")
    program = f"from tests.stacks.vllm_on_cpu import engine_config; engine_config({str(place)!r})"
    environment = {**os.environ, "VLLM_PLUGINS": "another"}
    refused = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert refused.returncode != 0 and "Unknown quantization method: rana" in refused.stderr, refused.stderr


KINDS = {
    "ranks": {
        "q_proj": ("rank", 64), "k_proj": ("rank", 32), "v_proj": ("rank", 32),
        "gate_proj": ("rank", 64), "up_proj": ("rank", 32), "o_proj": ("neuron", 0),
    },
    "mixed": {
        "q_proj": ("rank", 32), "k_proj": ("neuron", 0), "v_proj": ("dense", 0), "o_proj": ("rank", 64),
        "gate_proj": ("dense", 0), "up_proj": ("neuron", 0), "down_proj": ("rank", 32),
    },
    "dense down": {"gate_proj": ("rank", 64), "up_proj": ("rank", 32), "down_proj": ("dense", 0)},
}  # fmt: skip


@on_cpu
@pytest.mark.parametrize("kinds", KINDS)
def test_a_merged_layer_holds_adapters_of_all_kinds(kinds, tmp_path):
    model = make_model("Qwen2")
    assert_same(saved(model, separate(hand_plan(model), KINDS[kinds]), tmp_path / "out"))


FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "Phi3", "OPT", "GPT2")


@on_cpu
@pytest.mark.parametrize(
    ("joint", "first"),
    [(False, "rank"), (True, "rank"), (True, "neuron")],
    ids=["separate", "joint", "neurons"],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_models_of_vllm_compute_the_same(name, joint, first, tmp_path):
    # of GPT-2's own activation vLLM has kernels only
    model = make_model(name, **({"activation_function": "gelu"} if name == "GPT2" else {}))
    assert_same(saved(model, hand_plan(model, joint, o="rank", first=first), tmp_path / "out"))


def in_bits(plan: Plan, bits: int) -> Plan:
    """The plan with masks, and all weights in so many bits, those of lm_head too."""
    adapters = tuple(replace(adapter, bits=bits, group=32) for adapter in masking(plan).adapters)
    return Plan(adapters, lm_head=AdapterSpec("dense", ("lm_head",), 64, (128,), bits=bits, group=32))


@on_cpu
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "kinds",
    [(False, "rank"), (True, "rank"), (True, "neuron"), "mixed"],
    ids=["separate", "joint", "neurons", "mixed"],
)
def test_weights_in_8_and_4_bits(kinds, bits, tmp_path):
    model = make_model("Qwen2")
    if kinds == "mixed":
        plan = separate(hand_plan(model), KINDS["mixed"])
    else:
        plan = hand_plan(model, kinds[0], o="rank", first=kinds[1])
    assert_same(written(model, in_bits(plan, bits), tmp_path / "out"))


@on_cpu
def test_bits_of_linears_in_one_layer_may_differ(tmp_path):
    model = make_model("Qwen2")
    plan = separate(hand_plan(model), KINDS["mixed"])
    widths = [16, 4, 8]
    adapters = [
        replace(a, bits=widths[i % 3], group=None if widths[i % 3] == 16 else 64)
        for i, a in enumerate(masking(plan).adapters)
    ]
    assert_same(written(model, Plan(tuple(adapters)), tmp_path / "out"))


def test_quantised_weights_are_not_shared_out():
    from rana_kernels.integrations.vllm.pieces import Share
    from rana_kernels.integrations.vllm.weights import pieces_of

    layer = SimpleNamespace(prefix="layers.0.o_proj", tp_rank=0, tp_size=2)
    adapter = AdapterSpec("neuron", ("o_proj",), 64, (64,), 64, 16, 0.0, bits=4, group=32)
    with pytest.raises(ValueError, match="have 4 bits, and 2 processes would share"):
        pieces_of(layer, ["o_proj"], [adapter], Share(0, 32, 64), [64])


@on_cpu
def test_thresholds_stay_float32_and_layers_compile_whole(tmp_path):
    from tests.stacks.vllm_on_cpu import Loaded

    model, ids = make_model("Qwen2"), tokens(2, 24)
    place = saved(model, separate(hand_plan(model), KINDS["mixed"]), tmp_path / "out")
    served = Loaded(place, dtype="bfloat16")
    layer = served.model.model.layers[0]
    assert {p.dtype for n, p in layer.named_parameters() if n.endswith(("threshold", "norms"))} == {
        torch.float32
    }
    assert layer.self_attn.qkv_proj.rows.dtype == layer.mlp.down_proj.B.dtype == torch.bfloat16
    exact = wanted(place, ids)
    assert (served.logits(ids) - exact).norm() < 0.03 * exact.norm()
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    for part in (layer.mlp, layer.self_attn.qkv_proj, layer.self_attn.o_proj):
        found = torch.compile(part, fullgraph=True, dynamic=True, backend="eager")(x)
        torch.testing.assert_close(found, part(x), rtol=0, atol=0)


@on_cpu
def test_the_demo_model_writes_the_same_tokens(tmp_path):
    from transformers import AutoModelForCausalLM

    from tests.stacks.vllm_on_cpu import Loaded

    model = AutoModelForCausalLM.from_pretrained(ROOT / "examples/demo_model", dtype=torch.float32)
    text = load_file(ROOT / "examples/demo_model/calibration.safetensors")["input_ids"].long()
    rana.compress(model, [text[:8, :256]], flops_reduction=0.4, method="paper", progress=False)
    rana.save(model, tmp_path / "out")
    ids, served = text[-1:, :16], Loaded(tmp_path / "out")
    found = ids
    for _ in range(12):
        found = torch.cat([found, served.logits(found)[:, -1:].argmax(-1)], dim=1)
    greedy = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(found, rana.load(tmp_path / "out").generate(ids, **greedy))


@on_cpu
@pytest.mark.parametrize("heads", [2, 1], ids=["shared out", "copied"])
def test_two_processes_share_a_model(heads, tmp_path):
    model = make_model("Qwen2", num_key_value_heads=heads)
    kinds = KINDS["ranks" if heads == 1 else "mixed"] | {"o_proj": ("rank", 64)}
    place = saved(model, separate(hand_plan(model), kinds), tmp_path / "out")
    found = run_processes(place, tmp_path / "logits.safetensors")
    torch.testing.assert_close(found, wanted(place, tokens(2, 24)), rtol=1e-4, atol=1e-5)


@on_cpu
@pytest.mark.parametrize("first", ["rank", "neuron"])
def test_two_processes_share_joint_adapters(first, tmp_path):
    model = make_model("Qwen2")
    place = saved(model, hand_plan(model, joint=True, o="neuron", first=first), tmp_path / "out")
    found = run_processes(place, tmp_path / "logits.safetensors")
    torch.testing.assert_close(found, wanted(place, tokens(2, 24)), rtol=1e-4, atol=1e-5)


def run_processes(place: Path, out: Path) -> torch.Tensor:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    program = [sys.executable, "-m", "tests.stacks.vllm_on_cpu", str(place)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*program, str(rank), "2", port, str(out)], cwd=ROOT, env=environment)
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=500) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return load_file(out)["logits"]


def test_ranks_must_be_divisible():
    from rana_kernels.integrations.vllm.pieces import Share
    from rana_kernels.integrations.vllm.weights import pieces_of

    layer = SimpleNamespace(prefix="layers.0.o_proj", tp_rank=0, tp_size=3)
    adapter = AdapterSpec("rank", ("o_proj",), 96, (64,), 32, 16, 0.0)
    with pytest.raises(ValueError, match="32 ranks cannot be shared out among 3 processes"):
        pieces_of(layer, ["o_proj"], [adapter], Share(0, 32, 96), [64])


def test_a_plan_that_divides_the_model_otherwise_is_refused():
    from vllm.model_executor.layers.linear import QKVParallelLinear

    from rana_kernels.integrations.vllm import RanaConfig

    layer = object.__new__(QKVParallelLinear)
    joint = AdapterSpec("rank", ("a.q_proj", "a.k_proj"), 64, (64, 32), 32, 16, 0.0)
    config = RanaConfig(Plan((joint,)))
    with pytest.raises(
        ValueError, match="a.q_proj: vLLM computes a.q_proj here, the plan has a.q_proj, a.k_proj"
    ):
        config.get_quant_method(layer, "a.q_proj")
    config.packed_modules_mapping["qkv_proj"] = ["q_proj", "k_proj", "v_proj"]
    with pytest.raises(ValueError, match="a.qkv_proj: the plan has nothing for a.v_proj"):
        config.get_quant_method(layer, "a.qkv_proj")


@on_cpu
def test_what_vllm_cannot_hold_says_so(tmp_path):
    from tests.stacks.vllm_on_cpu import Loaded

    model = make_model("Llama")
    adapters = []
    for adapter in hand_plan(model).adapters:
        if len(adapter.names) == 3:
            (q, k, v), (a, b, c) = adapter.names, adapter.out_features
            adapters += [
                replace(adapter, names=(q, v), out_features=(a, c), rank=64),
                replace(adapter, names=(k,), out_features=(b,), rank=32, live=32),
            ]
        else:
            adapters.append(adapter)
    with pytest.raises(ValueError, match="q_proj, .*v_proj, which are no neighbours"):
        Loaded(saved(model, Plan(tuple(adapters)), tmp_path / "out"))


@on_cpu
def test_damage_is_found(tmp_path):
    from tests.stacks.vllm_on_cpu import Loaded, engine_config

    model = make_model("Llama")
    place = saved(model, hand_plan(model), tmp_path / "out")
    tensors = load_file(place / "model.safetensors")
    (place / "model.safetensors").write_bytes((place / "model.safetensors").read_bytes()[:-1] + b"\x01")
    with pytest.raises(Exception, match="model.safetensors is damaged, or"):
        engine_config(place)
    (place / MANIFEST).unlink()  # without it, what is missing and what does not fit are still found
    rows = tensors.pop("model.layers.0.self_attn.o_proj.weight")
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="no weights for model.layers.0.self_attn.o_proj"):
        engine_config(place)
    tensors["model.layers.0.self_attn.o_proj.weight"] = rows
    threshold = tensors.pop("model.layers.1.mlp.threshold")
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="layers.1.mlp.gate_up_proj: 0 of 64 numbers of threshold"):
        Loaded(place)
    tensors["model.layers.1.mlp.threshold"] = threshold[:-16].clone()
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="threshold has"):
        Loaded(place)
    config = json.loads((place / "config.json").read_text())
    config["quantization_config"]["format"] = 4
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match="format is '4'"):
        engine_config(place)
