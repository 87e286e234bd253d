"""Weights in 8 and 4 bits, from the plan over compression to the checkpoint and back."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import rana_kernels as rana
from rana_kernels.checkpoint.attachment import attached_plan
from rana_kernels.checkpoint.headers import CheckpointError
from rana_kernels.checkpoint.manifest import MANIFEST, read_manifest, write_manifest
from rana_kernels.checkpoint.model_card import describe_bits
from rana_kernels.compression import run
from rana_kernels.model.architectures import find_blocks
from rana_kernels.model.plan import AdapterSpec, Plan
from rana_kernels.nn.adapters import RanaLinear
from rana_kernels.nn.dense import DenseLinear, QuantizedLinear
from rana_kernels.nn.format import Format
from rana_kernels.nn.mlp import RanaMLP
from rana_kernels.quantization import block as quantization_block
from rana_kernels.quantization import quantize
from tests.test_compress import ARCHITECTURES, assert_equal_states, hand_plan, logits, make_model, tokens

WEIGHTS = "model.safetensors"
PACKED = (torch.int8, torch.uint8)
every_width = pytest.mark.parametrize("bits", [8, 4])


def in_bits(plan: Plan, bits: int, group: int | None = 32, lm_head_bits: int = 16) -> Plan:
    adapters = tuple(adapter.with_format(Format(bits, group)) for adapter in plan.adapters)
    head = None
    if lm_head_bits < 16:
        head = AdapterSpec("dense", ("lm_head",), 64, (128,), bits=lm_head_bits, group=group)
    return replace(plan, adapters=adapters, lm_head=head)


def compressed(architecture: str = "Llama", bits: int = 4, sizes: dict | None = None, **options) -> nn.Module:
    model = make_model(architecture, **(sizes or {}))
    options = {"flops_reduction": 0.3, "method": "paper", **options}
    rana.compress(model, [tokens()], bits=bits, progress=False, **options)
    return model


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def written(model: nn.Module) -> list[int]:
    return model.generate(tokens(1, 8), max_new_tokens=8, do_sample=False)[0].tolist()


# plans


def test_a_plan_keeps_its_bits_in_json():
    plan = in_bits(hand_plan(make_model()), 4, 64, lm_head_bits=8)
    again = Plan.from_json(plan.to_json())
    assert again == plan and again.bits == (4,) and again.lm_head_format == Format(8, 64)
    assert again.adapters[0].format == Format(4, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "bits is 3, wanted"),
        ({"group": 7}, "group is 7, wanted"),
        ({"bits": 16, "group": None}, "lm_head has .* wanted None, because it stays"),
        (
            {"names": ["a", "b"], "out_features": [64, 64], "kind": "neuron", "rank": 64},
            "an adapter of one linear",
        ),
    ],
)
def test_a_plan_refuses_an_lm_head_that_is_none(change, message):
    data = json.loads(in_bits(hand_plan(make_model()), 8, lm_head_bits=8).to_json())
    data["lm_head"] |= change
    with pytest.raises(ValueError, match=message):
        Plan.from_json(json.dumps(data))


def test_bytes_follow_the_bits():
    spec = AdapterSpec("rank", ("a",), 64, (96,), rank=16, live=4, threshold=0.0, bias=True)
    assert spec.stored_bytes(2) == 2 * (16 * (64 + 96) + 96) + 4 * 16
    assert spec.read_bytes(2) == 2 * (16 * 64 + 4 * 96 + 96) + 4 * 16
    four = spec.with_format(Format(4, 32))
    # rows of ranks stay in 8 bits
    assert four.stored_bytes(2) == 16 * (32 + 4) + 16 * (96 + 6) + 2 * 96 + 4 * 16
    assert four.read_bytes(2) == 16 * (32 + 4) + 4 * (96 + 6) + 2 * 96 + 4 * 16
    odd = AdapterSpec("neuron", ("a",), 8, (33,), rank=8, live=8, threshold=0.0, bits=4)
    assert odd.stored_bytes(2) == 8 * (33 + 2) + 2 * 4 * 8  # such rows stay in 8 bits
    dense = AdapterSpec("dense", ("a",), 33, (8,), bits=4, group=32)
    assert dense.stored_bytes(2) == dense.read_bytes(2) == 8 * (17 + 4)


# compression


@pytest.mark.parametrize(
    ("architecture", "method", "bits"),
    [*((each, "paper", 4) for each in ARCHITECTURES), ("Llama", "global", 8), ("GPT2", "global", 8)],
)
def test_every_architecture_compresses_saves_and_loads(architecture, method, bits, tmp_path):
    model, exact = (make_model(architecture, num_hidden_layers=1) for _ in range(2))
    dense, asked = logits(model), {"flops_reduction": 0.3, "method": method, "progress": False}
    report = rana.compress(model, [tokens()], bits=bits, **asked)
    rana.compress(exact, [tokens()], **asked)
    lost_by_masks = distance(logits(exact), dense)
    assert distance(logits(model), dense) < 1.5 * lost_by_masks + (0.001 if bits == 8 else 0.03)
    assert report.plan.bits == (bits,) and report.plan.lm_head_bits == bits
    assert report.block_bytes_after <= report.plan.stored_bytes(4) <= 1.01 * report.block_bytes_after
    assert report.read_bytes_after < report.read_bytes_before * (0.3 if bits == 8 else 0.2)
    rana.save(model, tmp_path / "saved")
    again = rana.load(tmp_path / "saved")
    assert_equal_states(model, again)
    assert torch.equal(logits(model), logits(again)) and written(model) == written(again)
    assert attached_plan(again) == report.plan


@pytest.mark.parametrize("first", ["rank", "neuron"])
@pytest.mark.parametrize(
    ("kind", "joint", "group"),
    [("rank", False, 64), ("rank", True, 128), ("neuron", True, None), ("dense", False, 32)],
)
def test_every_kind_of_adapter_is_rounded(kind, joint, group, first, tmp_path):
    model = make_model("Qwen2", num_hidden_layers=1)
    dense, plan = logits(model), in_bits(hand_plan(model, joint, o=kind, down=kind, first=first), 8, group)
    report = rana.compress(model, [tokens()], plan=plan, progress=False)
    assert 0.99 * plan.stored_bytes(4) <= report.block_bytes_after <= plan.stored_bytes(4)
    assert distance(logits(model), dense) < 0.02
    floats = [name for name, p in model.named_parameters() if p.dim() == 2]
    assert floats in (["model.embed_tokens.weight"], ["model.embed_tokens.weight", "lm_head.weight"])
    rana.save(model, tmp_path / "saved")
    assert torch.equal(logits(model), logits(rana.load(tmp_path / "saved")))


@pytest.mark.parametrize("neurons", [64, 176], ids=["whole groups", "groups that straddle"])
def test_one_linear_for_gate_and_up_is_fused_where_groups_allow(neurons):
    model = make_model("Phi3", num_hidden_layers=1, intermediate_size=neurons)
    dense, plan = logits(model), in_bits(hand_plan(model), 8)
    rana.compress(model, [tokens()], plan=plan, progress=False)
    mlp = model.model.layers[0].mlp
    assert isinstance(mlp, RanaMLP) == (neurons == 64)
    assert isinstance(getattr(mlp, "gate_up_proj", None), RanaLinear) == (neurons == 176)
    assert distance(logits(model), dense) < 0.02


def test_joint_neurons_are_rounded_under_their_mask(monkeypatch):
    """All rows of one mask are rounded for the inputs that it keeps."""
    model, moments = make_model(num_hidden_layers=1), {}
    made = in_bits(hand_plan(model, joint=True, first="neuron"), 4)
    halved = tuple(replace(a, threshold=None, live=a.rank / 2) if a.rank else a for a in made.adapters)

    def rounded(w, bits, group, moment, **options):
        moments[tuple(w.shape)] = moment
        return quantize(w, bits, group, moment, **options)

    monkeypatch.setattr(quantization_block, "quantize", rounded)
    rana.compress(model, [tokens()], plan=replace(made, adapters=halved), progress=False)
    K, neurons = model.config.hidden_size, model.config.intermediate_size
    whole = rana.calibrate(make_model(num_hidden_layers=1), [tokens()], progress=False)
    of_mlp, masked = whole.of(0, "mlp").moment, moments[K, neurons]
    assert torch.linalg.eigvalsh(masked).min() >= -1e-6 and masked.trace() < 0.99 * of_mlp.trace()
    assert logits(model).isfinite().all() and isinstance(model.model.layers[0].mlp, RanaMLP)


def test_up_and_gate_of_different_bits_are_not_fused():
    model = make_model(num_hidden_layers=1)
    dense, plan = logits(model), in_bits(hand_plan(model), 8)
    mixed = [a.with_format(Format()) if "up_proj" in a.names[0] else a for a in plan.adapters]
    rana.compress(model, [tokens()], plan=replace(plan, adapters=tuple(mixed)), progress=False)
    assert not isinstance(model.model.layers[0].mlp, RanaMLP)
    assert distance(logits(model), dense) < 0.02 and attached_plan(model).bits == (16, 8)


def test_rounding_with_the_statistics_errs_less(monkeypatch):
    """On its own calibration; the correlated inputs of a trained model would show it better."""
    model = make_model(num_hidden_layers=1)
    dense, plan = logits(model), in_bits(hand_plan(model, o="neuron"), 4)
    rana.compress(model, [tokens()], plan=plan, progress=False)
    nearest = make_model(num_hidden_layers=1)
    monkeypatch.setattr(
        quantization_block, "quantize", lambda w, bits, group, moment, **_: quantize(w, bits, group)
    )
    rana.compress(nearest, [tokens()], plan=plan, progress=False)
    assert distance(logits(model), dense) < 0.9 * distance(logits(nearest), dense)


@pytest.mark.parametrize("method", ["paper", "static"])
def test_in_steps_is_the_same_as_in_one_go(method):
    at_once, in_steps = make_model(), make_model()
    asked = {"flops_reduction": 0.4, "method": method, "bits": 4, "group": 64, "progress": False}
    rana.compress(at_once, [tokens()], **asked)
    stats = rana.calibrate(in_steps, [tokens()], progress=False)
    rana.compress(in_steps, plan=rana.plan(stats, **asked), stats=stats, progress=False)
    assert_equal_states(at_once, in_steps)
    assert attached_plan(in_steps).adapters[0].format == Format(4, 64)


def test_the_search_measures_floats_and_the_result_is_rounded():
    from rana_kernels.allocation.search import Search

    model = make_model(num_hidden_layers=1)
    asked = {"flops_reduction": 0.3, "method": "rankadaptor", "search": Search(tokens(2), 2), "bits": 4}
    report = rana.compress(model, [tokens()], progress=False, **asked)
    assert report.plan.bits == (4,) and logits(model).isfinite().all()


@every_width
def test_max_memory_counts_the_bits(bits):
    model = make_model(num_hidden_layers=1)
    cap = 50_000 if bits == 8 else 28_000
    report = rana.compress(model, [tokens()], flops_reduction=0.2, max_memory=cap, bits=bits, progress=False)
    assert 0.9 * cap < report.block_bytes_after <= cap


def test_resuming_gives_the_same_bits(tmp_path, monkeypatch):
    whole, broken, resumed = make_model("Qwen2"), make_model("Qwen2"), make_model("Qwen2")
    asked = {"flops_reduction": 0.4, "method": "paper", "bits": 4, "progress": False}
    rana.compress(whole, [tokens()], **asked)
    measured = run.measure

    def interrupted(layer, adapter):
        if layer.block.index == 1:
            raise KeyboardInterrupt
        return measured(layer, adapter)

    monkeypatch.setattr(run, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rana.compress(broken, [tokens()], resume_dir=tmp_path, **asked)
    monkeypatch.setattr(run, "measure", measured)
    rana.compress(resumed, [tokens()], resume_dir=tmp_path, **asked)
    assert_equal_states(whole, resumed)
    with pytest.raises(ValueError, match="unfinished work on something else"):
        rana.compress(make_model("Qwen2"), [tokens()], resume_dir=tmp_path, **asked | {"group": 64})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", [None, 16, 8])
def test_lm_head_has_bits_of_its_own(head, tied, tmp_path):
    model = compressed(sizes={"tie_word_embeddings": tied}, lm_head_bits=head)
    embedding = model.get_input_embeddings().weight
    assert embedding.dtype == torch.float32
    assert isinstance(model.lm_head, DenseLinear if head == 16 else QuantizedLinear)
    if head != 16:
        assert model.lm_head.qweight.dtype == (torch.int8 if head == 8 else torch.uint8)
    assert model.config.tie_word_embeddings == (tied and head == 16)
    rana.save(model, tmp_path / "once")
    again = rana.load(tmp_path / "once")
    rana.save(again, tmp_path / "twice")
    assert (tmp_path / "once" / WEIGHTS).read_bytes() == (tmp_path / "twice" / WEIGHTS).read_bytes()
    assert torch.equal(logits(again), logits(model))
    assert again.config.tie_word_embeddings == (tied and head == 16)


def test_what_does_not_fit_together_is_refused():
    model = make_model()
    made = hand_plan(model)
    for arguments, message in [
        ({"flops_reduction": 0.3, "bits": 5}, "bits is 5, wanted 16, 8 or 4"),
        ({"flops_reduction": 0.3, "bits": 4, "group": 48}, "group is 48, wanted 32, 64, 128"),
        ({"flops_reduction": 0.3, "lm_head_bits": 2}, "bits is 2, wanted 16, 8 or 4"),
        ({"plan": made, "bits": 4}, "a plan is given, and bits: wanted exactly one of them"),
        ({"plan": made, "lm_head_bits": 8}, "a plan is given, and bits: wanted exactly one of them"),
    ]:
        with pytest.raises(ValueError, match=message):
            rana.compress(model, [tokens()], progress=False, **arguments)
    assert all(type(model.get_submodule(name)) is nn.Linear for b in find_blocks(model) for name in b.linears)


def test_quantised_models_are_not_compressed():
    model = make_model()
    weight = model.model.layers[1].mlp.up_proj.weight
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"up_proj has a weight of torch.int8, .* start from the original"):
        rana.compress(model, [tokens()], flops_reduction=0.3, progress=False)
    with pytest.raises(ValueError, match="cannot be compressed again"):
        rana.compress(compressed(), [tokens()], flops_reduction=0.3, progress=False)


def test_statistics_without_an_input_are_told_so():
    model = make_model()
    stats = rana.calibrate(model, [tokens()], inputs=("qkv", "mlp"), progress=False)
    with pytest.raises(ValueError, match="nothing of the input 'o' of layer 0"):
        rana.compress(model, stats=stats, flops_reduction=0.3, method="paper", bits=8, progress=False)


# checkpoints


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return compressed(sizes={"num_hidden_layers": 1})


@pytest.fixture
def checkpoint(model, tmp_path) -> Path:
    rana.save(model, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_another_dtype_leaves_quantised_weights_alone(dtype, model, checkpoint):
    state = model.state_dict()
    for again in (
        rana.load(checkpoint, dtype=dtype),
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype),
        rana.load(checkpoint).to(dtype),
    ):
        for name, tensor in again.state_dict().items():
            fixed = state[name].dtype in PACKED or name.endswith(("_scale", "threshold", "norms"))
            assert tensor.dtype == (state[name].dtype if fixed else dtype), name
            assert not fixed or torch.equal(tensor, state[name]), name
        assert logits(again).isfinite().all()


def test_the_report_the_card_and_the_manifest_say_the_bits(model, checkpoint):
    assert describe_bits(attached_plan(model)) == (
        "4, a scale for 32 columns; lm_head 4, a scale for 32 columns"
    )
    card = (checkpoint / "README.md").read_text()
    assert "| bits of the weights | 4, a scale for 32 columns;" in card and "read for a token" in card
    assert read_manifest(checkpoint).facts["compression"]["bits"] == [4]


def test_shards_come_back(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_equal_states(model, rana.load(tmp_path))


def split(path: Path) -> tuple[dict, bytearray]:
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), bytearray(raw[end:])


def forge(checkpoint: Path, model: nn.Module, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    (checkpoint / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint, model, attached_plan(model))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.B_scale", "lm_head.qweight_scale"])
def test_scales_must_be_finite(name, bad, model, checkpoint):
    header, data = split(checkpoint / WEIGHTS)
    begin, _ = header[name]["data_offsets"]
    data[begin : begin + 2] = torch.tensor([bad]).half().numpy().tobytes()
    forge(checkpoint, model, header, data)
    with pytest.raises(ValueError, match=rf"{name} has (inf|nan), wanted finite numbers"):
        rana.load(checkpoint)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("model.layers.0.mlp.B", {"dtype": "I8"}, "has dtype I8, wanted torch.uint8"),
        ("model.layers.0.mlp.B_scale", {"dtype": "BF16"}, "has dtype BF16, wanted torch.float16"),
        ("lm_head.qweight", {"shape": "turned"}, "has shape .* by the plan"),
        ("lm_head.qweight_scale", {"shape": "turned"}, "has shape .* by the plan"),
    ],
)
def test_forged_weights_are_refused(name, fields, message, model, checkpoint):
    header, data = split(checkpoint / WEIGHTS)
    if "shape" in fields:
        fields = {"shape": header[name]["shape"][::-1]}
    header[name] |= fields
    forge(checkpoint, model, header, data)
    with pytest.raises(CheckpointError, match=message):
        rana.load(checkpoint)


@pytest.mark.parametrize(
    ("bits", "message"), [(8, "wanted torch.int8|has shape"), (16, "qweight|wanted .* by the plan")]
)
def test_a_plan_of_other_bits_is_refused(bits, message, model, checkpoint):
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    for adapter in config["quantization_config"]["plan"]["adapters"]:
        adapter |= {"bits": bits, "group": None if bits == 16 else 32}
    path.write_text(json.dumps(config))
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint, model, attached_plan(model))
    with pytest.raises(CheckpointError, match=message):
        rana.load(checkpoint)


def test_a_tied_lm_head_is_not_loaded_quantised(model, checkpoint):
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"tie_word_embeddings": True}))
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint, model, attached_plan(model))
    with pytest.raises(CheckpointError, match="lm_head is tied to the embedding"):
        rana.load(checkpoint)
