"""The door: wrappers are taken off or refused, and so are weights that are not there, before any work."""

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import rana_kernels as rana
from rana_kernels.checkpoint.attachment import attached_plan
from tests.test_compress import hand_plan, logits, make_model, tokens

PAPER: dict = {"flops_reduction": 0.3, "method": "paper", "progress": False}


class BaseTunerLayer(nn.Module):
    """What every layer of PEFT is."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer


class PeftModel(nn.Module):
    """The wrapper of PEFT, which finds everything else in the model within."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def __getattr__(self, name: str):
        return super().__getattr__(name) if name == "base_model" else getattr(self.base_model, name)


class FullyShardedDataParallel(nn.Module):
    pass


def compiled(model: nn.Module) -> nn.Module:
    wrapped = torch.compile(model, backend="eager")
    logits(wrapped)  # compiled before it is changed
    return wrapped


def refused(model: nn.Module, message: str, to_change: bool = True) -> None:
    """Every function refuses the model before it reads a text or writes a file."""
    calls = [
        lambda text: rana.compress(model, text, **PAPER),
        lambda text: rana.rotate(model, text, progress=False),
    ]
    calls += [] if to_change else [lambda text: rana.calibrate(model, text, progress=False)]
    for call in calls:
        text = iter([tokens()])
        with pytest.raises(ValueError, match=message):
            call(text)
        assert next(text) is not None, "nothing was read"


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    place = tmp_path_factory.mktemp("process") / "store"
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel])
def test_a_wrapper_is_taken_off_and_runs_what_becomes_of_its_model(wrap, tmp_path):
    plain, inner = make_model(num_hidden_layers=1), make_model(num_hidden_layers=1)
    wanted = rana.compress(plain, [tokens()], **PAPER).plan
    wrapped = wrap(inner)
    assert rana.compress(wrapped, [tokens()], **PAPER).plan == wanted == attached_plan(inner)
    assert torch.equal(logits(wrapped), logits(plain))
    rana.save(wrapped, tmp_path / "out")
    assert torch.equal(logits(rana.load(tmp_path / "out")), logits(plain))


def test_statistics_of_a_wrapped_model_are_those_of_the_model():
    model = make_model()
    wrapped = torch.compile(nn.DataParallel(model), backend="eager")  # one within the other
    stats = rana.calibrate(wrapped, [tokens()], progress=False)
    assert stats.model is model
    assert rana.compress(torch.compile(model, backend="eager"), stats=stats, **PAPER).plan.reduction > 0


def test_distributed_data_parallel_is_read_and_not_changed(one_process, tmp_path):
    model = make_model()
    wrapped = DistributedDataParallel(model)
    stats = rana.calibrate(wrapped, [tokens()], progress=False)
    assert stats.model is model
    refused(wrapped, r"DistributedDataParallel, .* give model\.module, and wrap the result")
    rana.compress(model, stats=stats, **PAPER)
    rana.save(DistributedDataParallel(model), tmp_path / "out")
    assert torch.equal(logits(rana.load(tmp_path / "out")), logits(model))


def test_other_wrappers_are_refused_with_the_remedy():
    refused(FullyShardedDataParallel(), "load the model without FSDP", to_change=False)
    for wrap in (PeftModel, lambda model: torch.compile(PeftModel(model), backend="eager")):
        refused(
            wrap(make_model()), r"wrapper of PEFT .*model = model\.merge_and_unload\(\)$", to_change=False
        )
    model = make_model()
    model.lm_head = BaseTunerLayer(model.lm_head)
    for wrap in (PeftModel, lambda model: model):
        message = (
            r"layers of PEFT \((base_model\.)?lm_head\), wanted plain layers: merge first, model = model\."
        )
        refused(wrap(model), message, to_change=False)


def test_a_compressed_model_with_a_lora_is_not_saved(tmp_path):
    model = make_model()
    rana.compress(model, [tokens()], **PAPER)
    model.lm_head = BaseTunerLayer(model.lm_head)
    with pytest.raises(
        ValueError, match=r"merge first, model = rana_kernels\.integrations\.peft\.merge\(model\)"
    ):
        rana.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_part_that_is_not_in_memory_is_named(name):
    model = make_model()
    place, _, own = name.rpartition(".")
    setattr(model.get_submodule(place), own, nn.Parameter(model.get_parameter(name).detach().to("meta")))
    refused(model, f"^{name} is on the meta device: .*load the model without device_map", to_change=False)


def test_a_model_that_transformers_offloads_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    make_model().save_pretrained(tmp_path / "model")
    names = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", offload_folder=tmp_path / "disk",
        device_map={**names, "model.rotary_emb": "cpu", "lm_head": "cpu"},
    )  # fmt: skip
    refused(model, r"^model\.layers\.1\..* is on the meta device: it was offloaded", to_change=False)


# linears that only look like one


class FakeQuantized(nn.Linear):
    """A linear that rounds while it trains, like those of torch.ao.nn.qat."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.round(decimals=1), self.bias)


def patched(linear: nn.Linear) -> nn.Linear:
    linear.forward = lambda x: nn.functional.linear(x.tanh(), linear.weight)  # type: ignore[method-assign]
    return linear


def fake_quantized(linear: nn.Linear) -> nn.Linear:
    made = FakeQuantized(linear.in_features, linear.out_features, bias=False)
    made.weight = linear.weight
    return made


@pytest.mark.parametrize("like", [patched, fake_quantized])
def test_what_only_looks_like_a_linear_is_refused_or_left(like):
    model = make_model(tie_word_embeddings=False)
    model.lm_head = like(model.lm_head)
    before = logits(model)
    stats = rana.calibrate(model, [tokens()], inputs=("mlp", "qkv"), gradients=False, progress=False)
    rana.compress(model, stats=stats, plan=hand_plan(model), progress=False)
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)  # lm_head is as it was
    model = make_model()
    model.lm_head = like(model.lm_head)
    with pytest.raises(ValueError, match=r"lm_head is a \w+( with another forward)?, wanted torch.nn.Linear"):
        rana.compress(model, [tokens()], **PAPER, lm_head_bits=8)
    model = make_model()
    model.model.layers[1].mlp.up_proj = like(model.model.layers[1].mlp.up_proj)
    refused(model, r"mlp\.up_proj is a .*, wanted torch\.nn\.Linear: a quantised or wrapped", to_change=False)


# inference mode and dtypes


@pytest.mark.parametrize("method", ["global", "paper"])
def test_under_inference_mode_it_is_the_same_model_and_can_be_trained(method):
    how = {**PAPER, "method": method}
    plain, model = make_model(), make_model()
    wanted = rana.compress(plain, [tokens()], **how).plan
    with torch.inference_mode():
        assert rana.compress(model, [tokens()], **how).plan == wanted
        assert torch.is_inference_mode_enabled()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.inference_mode():
        turned = make_model()
    refused(turned, "was made under torch.inference_mode, .* load the model outside of it", to_change=False)


def test_a_model_is_rotated_under_inference_mode():
    model, wanted = make_model(), make_model()
    rana.rotate(wanted, [tokens()], steps=0, progress=False)
    with torch.inference_mode():
        rana.rotate(model, [tokens()], steps=0, progress=False)
    assert torch.equal(logits(model), logits(wanted))


def test_float64_is_refused():
    message = r"has a weight of torch\.float64, wanted float32, bfloat16 or float16: .*model\.float\(\)"
    refused(make_model().double(), message, to_change=False)
