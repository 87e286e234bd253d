"""What can be compressed: plain models and GGUF files. Models that others have quantised are refused."""

import json
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import rana_kernels as rana
from rana_kernels.checkpoint.attachment import attached_plan
from rana_kernels.cli import options
from tests.test_cli import folder, run  # noqa: F401 - fixtures
from tests.test_compress import logits, make_model, tokens

QUANTIZED = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "bitsandbytes, unnamed": {"load_in_8bit": True},
    "torchao": {"quant_method": "torchao", "quant_type": "int4_weight_only"},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "fp8": {"quant_method": "fp8"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
}
REFUSED = r"is quantised \({}\), wanted plain floats: give the original model, or one that was dequantised$"


class Method(str, Enum):
    awq = "awq"


class Fields(dict):
    """A quantization config of transformers: not a dict, but with `to_dict`."""

    def __new__(cls, **fields):
        return SimpleNamespace(**fields, to_dict=lambda: fields)


class PackedLinear(nn.Module):
    """A linear of GPTQ or AWQ: no `nn.Linear`, and no `weight`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(linear.out_features, linear.in_features // 8))


class LinearWithoutWeight(nn.Linear):
    """A linear of compressed-tensors: an `nn.Linear` whose weight is packed under another name."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        del self.weight
        self.register_buffer("weight_packed", torch.zeros(8, dtype=torch.int32))


class PackedTensor(torch.Tensor):
    """A weight of torchao: the dtype is that of floats, the class tells."""


def with_weight(linear: nn.Linear, weight: torch.Tensor) -> nn.Linear:
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


REPLACEMENTS = {
    "PackedLinear, wanted torch.nn.Linear: a quantised or wrapped model": PackedLinear,
    "weight of None, wanted float32": LinearWithoutWeight,
    "weight of torch.uint8, wanted float32": lambda x: with_weight(x, torch.zeros(8, 1, dtype=torch.uint8)),
    "weight of torch.float8_e4m3fn, wanted float32": lambda x: with_weight(
        x, x.weight.to(torch.float8_e4m3fn)
    ),
    "has a PackedTensor as the weight of model.layers.1.mlp.up_proj": lambda x: with_weight(
        x, x.weight.detach().as_subclass(PackedTensor)
    ),
}


def both(model: nn.Module, message: str) -> None:
    """`rana.calibrate` and `rana.compress` refuse the model before any work."""
    calls = [lambda text: rana.calibrate(model, text, progress=False)]
    calls += [lambda text: rana.compress(model, text, flops_reduction=0.3, progress=False)]
    for call in calls:
        text = iter([tokens()])
        with pytest.raises(ValueError, match=message):
            call(text)
        assert next(text) is not None, "nothing was read"


@pytest.mark.parametrize("where", ["config", "object", "text_config", "quantizer"])
@pytest.mark.parametrize("method", QUANTIZED)
def test_a_quantised_model_is_refused_by_its_config(method, where):
    model, fields = make_model(), QUANTIZED[method]
    if where == "text_config":
        model.config.text_config = SimpleNamespace(quantization_config=fields)
    elif where == "quantizer":
        model.hf_quantizer = SimpleNamespace(quantization_config=Fields(**fields))
    else:
        model.config.quantization_config = fields if where == "config" else Fields(**fields)
    both(model, REFUSED.format(method.partition(",")[0]))


def test_a_method_may_be_an_enum():
    model = make_model()
    model.config.quantization_config = {"quant_method": Method.awq}
    both(model, REFUSED.format("awq"))


@pytest.mark.parametrize("message", REPLACEMENTS)
def test_a_quantised_model_is_refused_by_its_linears(message):
    model = make_model()
    mlp = model.model.layers[1].mlp
    mlp.up_proj = REPLACEMENTS[message](mlp.up_proj)
    both(model, message)


@pytest.mark.parametrize("fields", [{"quant_method": "gguf"}, {"quant_method": "fp8", "dequantize": True}])
def test_traces_of_a_quantizer_that_left_floats_are_dropped(fields, tmp_path):
    """A model that transformers dequantised while loading it, whose quantizer would refuse to save it."""
    model = make_model()
    model.config.quantization_config, model.is_quantized = Fields(**fields), True
    model.hf_quantizer = SimpleNamespace(quantization_config=Fields(**fields), is_serializable=lambda: False)
    rana.compress(model, [tokens()], flops_reduction=0.3, method="paper", progress=False)
    assert not hasattr(model, "hf_quantizer") and not model.is_quantized
    rana.save(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["plan"]
    assert torch.equal(logits(rana.load(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("method", QUANTIZED)
def test_the_command_refuses_before_it_loads(method, folder, tmp_path, run, monkeypatch):  # noqa: F811
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = QUANTIZED[method]
    config.save_pretrained(tmp_path / "model")  # there are no weights to load
    monkeypatch.setattr(options.transformers.AutoModelForCausalLM, "from_pretrained", None)
    code, out, err = run("compress", tmp_path / "model", "--calibration", "x", "-o", tmp_path / "out")
    assert code == 1 and out == "" and f"is quantised ({method.partition(',')[0]}), wanted" in err


@pytest.mark.parametrize("kind", ["classes", "headless"])
def test_the_command_invents_no_weights(kind, tmp_path, run):  # noqa: F811
    """transformers would make an lm_head of random numbers for these, and warn."""
    model = make_model(tie_word_embeddings=False)
    model = model.base_model if kind == "headless" else LlamaForSequenceClassification(model.config)
    model.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("some words")
    code, out, err = run("compress", tmp_path / "model", "--calibration", text, "-o", tmp_path / "out")
    assert code == 1 and out == ""
    assert f"has a {type(model).__name__} without lm_head.weight, wanted a model that writes text" in err


# GGUF


def write_gguf(folder: Path, path: Path, tokenizer: bool = True) -> LlamaForCausalLM:  # noqa: F811
    """Write a tied Llama with the tokenizer of `folder`, in 8 bits where widths allow. Return the model."""
    gguf = pytest.importorskip("gguf", reason="GGUF files are read with the package gguf")
    from bench.decode.gguf_files import tensors, write_sizes

    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = True
    model = LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(path, "llama")
    write_sizes(writer, config)
    if tokenizer:
        _add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text())["model"])
    for name, values in tensors(model):
        whole = values.dim() == 2 and values.shape[1] % 32 == 0
        kind = gguf.GGMLQuantizationType.Q8_0 if whole else gguf.GGMLQuantizationType.F32
        stored = gguf.quants.quantize(np.ascontiguousarray(values.numpy()), kind)
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _add_tokenizer(writer: Any, stored: dict[str, Any]) -> None:
    words = sorted(stored["vocab"], key=stored["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([3 if word == "<end>" else 1 for word in words])
    writer.add_token_merges([" ".join(pair) for pair in stored["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


@pytest.fixture(scope="module")
def gguf_file(folder, tmp_path_factory) -> tuple[Path, LlamaForCausalLM]:  # noqa: F811
    place = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    return place, write_gguf(folder, place)


def test_a_gguf_file_becomes_floats(gguf_file, folder):  # noqa: F811
    place, original = gguf_file
    model = options.open_model(str(place), options.Dtype.float32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=0.02, atol=0.02)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert options.open_model(str(place), options.Dtype.bfloat16).dtype == torch.bfloat16
    text = "def forward(self, x: Tensor) -> Tensor:"
    own, wanted = options.open_tokenizer(place), PreTrainedTokenizerFast.from_pretrained(folder)
    ids = own(text, add_special_tokens=False).input_ids
    assert ids == wanted(text).input_ids and own.decode(ids) == text


def test_a_model_that_was_read_from_gguf_is_compressed_saved_and_loaded(gguf_file, tmp_path):
    """In Python, whose user may not know that transformers keeps a quantizer of what it has dequantised."""
    place = gguf_file[0]
    model = AutoModelForCausalLM.from_pretrained(place.parent, gguf_file=place.name, dtype=torch.float32)
    rana.compress(model, [tokens()], flops_reduction=0.3, method="paper", progress=False)
    rana.save(model, tmp_path / "out")
    loaded = rana.load(tmp_path / "out")
    assert type(loaded) is LlamaForCausalLM and torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("bits", [16, 4])
def test_from_a_gguf_file_to_text(bits, gguf_file, folder, tmp_path, run):  # noqa: F811
    place, out_dir, text = gguf_file[0], tmp_path / "out", folder / "text.txt"
    how = ["--tokens", 1024, "--sequence-length", 64]
    asked = ["compress", place, "--calibration", text, "-o", out_dir, *how, "--flops-reduction", 0.2]
    code, _, err = run(*asked, "--bits", bits)
    assert code == 0, err
    loaded = rana.load(out_dir)
    assert attached_plan(loaded).bits == (bits,) and loaded.dtype == torch.float32
    code, out, err = run("generate", out_dir, "--prompt", "import", "--max-new-tokens", 5, "--json")
    assert code == 0 and json.loads(out)["tokens"] == 5, err
    code, out, err = run("eval", out_dir, "--text", text, "--against", place, *how, "--json")
    found = json.loads(out)
    assert code == 0 and found["dense"]["nll"] == pytest.approx(found["model"]["nll"], rel=0.1), err


def test_a_tokenizer_that_cannot_be_read_is_told(folder, tmp_path, capsys):  # noqa: F811
    write_gguf(folder, tmp_path / "bare.gguf", tokenizer=False)
    assert options.open_tokenizer(tmp_path / "bare.gguf") is None
    assert "reads no tokenizer from bare.gguf (" in capsys.readouterr().err


def test_missing_packages_are_named(tmp_path, run, monkeypatch):  # noqa: F811
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    asked = ("compress", tmp_path / "model.gguf", "--calibration", "x", "-o", tmp_path / "out")
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    code, out, err = run(*asked)
    assert code == 1 and out == ""
    assert "a GGUF file needs gguf and accelerate: pip install gguf accelerate" in err
    (tmp_path / "model.gguf").unlink()
    code, _, err = run(*asked)
    assert code == 1 and "there is no such file, wanted a model in GGUF" in err


def test_the_dequantising_config_is_asked_for_where_it_exists(monkeypatch):
    """Older versions have no config for GGUF, and always dequantise."""
    monkeypatch.setattr(options.transformers, "GgufConfig", lambda **how: how, raising=False)
    seen = {}
    loaded = (nn.Linear(1, 1), {"missing_keys": set()})
    loader = SimpleNamespace(from_pretrained=lambda *_, **how: seen.update(how) or loaded)
    monkeypatch.setattr(options.transformers, "AutoModelForCausalLM", loader)
    monkeypatch.setattr(options, "source_of", lambda _: {"gguf_file": "x.gguf"})
    options.open_model("x.gguf", options.Dtype.auto)
    assert seen["quantization_config"] == {"dequantize": True}
    monkeypatch.setattr(options.transformers, "GgufConfig", None)
    seen.clear()
    options.open_model("x.gguf", options.Dtype.auto)
    assert "quantization_config" not in seen
