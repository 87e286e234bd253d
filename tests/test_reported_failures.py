"""Failures that users of quantisation and sparsity packages reported, tried on small models.

What the other files of tests have already is not repeated here.
"""

import copy
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import rana_kernels as rana
from rana_kernels.checkpoint.replacement import check_target
from rana_kernels.evaluation import metrics
from rana_kernels.evaluation.divergence import divergence
from tests.subprocesses import python
from tests.test_compress import logits, make_model, tokens

FORKED = """
import os, signal, torch, rana_kernels
args = torch.randn(1, 4096), torch.randn(4096, 4096), torch.tensor(0.1)
y = torch.ops.rana.masked_linear(*args)
if (child := os.fork()) == 0:
    signal.alarm(60)
    torch.set_num_threads(1)
    print(torch.equal(torch.ops.rana.masked_linear(*args), y), flush=True)
    os._exit(0)
print(os.waitpid(child, 0)[1])
"""


def compress(model: nn.Module, text=None, **options) -> nn.Module:
    options = {"flops_reduction": 0.3, **options}
    rana.compress(model, [tokens(3)] if text is None else text, progress=False, **options)
    return model


@pytest.fixture(scope="module", params=[16, 4], ids=lambda bits: f"bits={bits}")
def compressed(request):
    """A compressed model that tests do not change."""
    return compress(make_model(), bits=request.param)


def refused(model: nn.Module, message: str, text=None) -> None:
    """`rana.calibrate` and `rana.compress` refuse, and the model is as it was."""
    before = {name: type(module) for name, module in model.named_modules()}
    for call in (rana.calibrate, lambda *a, **k: rana.compress(*a, **k, flops_reduction=0.3)):
        with pytest.raises(ValueError, match=message):
            call(model, [tokens(3)] if text is None else text, progress=False)
    assert {name: type(module) for name, module in model.named_modules()} == before


# the model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.1.mlp.down_proj", "model.norm"])
def test_weights_that_are_not_finite_are_named_before_any_work(name, value):
    model = make_model()
    model.get_submodule(name).weight.data.view(-1)[3] = value
    refused(model, rf"^{name}\.weight holds values that are not finite", text=iter([None]))


def test_logits_that_overflow_are_told():
    model = make_model(tie_word_embeddings=False).half()
    model.model.norm.weight.data.fill_(6e4)
    refused(model, "not finite")


@pytest.mark.parametrize("shared", ["layers", "mlp"])
def test_layers_that_share_modules_are_refused(shared):
    model = make_model()
    first, second = model.model.layers
    if shared == "layers":
        model.model.layers[1] = first
    else:
        second.mlp = first.mlp
    refused(model, r"layers\.0.* and .*layers\.1.* are one module", text=iter([None]))


def test_layers_that_share_weights_are_taken(tmp_path):
    model = make_model()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    rana.save(compress(model), tmp_path / "model")
    assert torch.equal(logits(rana.load(tmp_path / "model")), logits(model))


def test_a_model_without_layers_is_refused_and_one_layer_is_enough():
    refused(make_model(num_hidden_layers=0), r"has no layers in model\.layers, wanted at least one")
    assert logits(compress(make_model(num_hidden_layers=1))).isfinite().all()


@pytest.mark.parametrize("bits", [16, 4])
def test_dead_neurons_and_linears_of_zeros_are_taken(bits, tmp_path):
    model = make_model()
    mlp, attention = model.model.layers[0].mlp, model.model.layers[1].self_attn
    for weight in (mlp.up_proj.weight[:100], mlp.gate_proj.weight[:100], mlp.down_proj.weight[:, :50]):
        weight.data.zero_()
    attention.o_proj.weight.data.zero_()
    rana.save(compress(model, bits=bits), tmp_path / "model")
    assert logits(model).isfinite().all()
    assert torch.equal(logits(rana.load(tmp_path / "model")), logits(model))


# the text


@pytest.mark.parametrize("ids", [[[1, 128]], [[-1, 5]]], ids=["too large", "negative"])
def test_tokens_of_another_tokenizer_are_refused(ids):
    text, message = torch.tensor(ids), r"has token (128|-1), wanted 0 to 127, the vocabulary of Llama"
    model = make_model()
    refused(model, message, text=[text])
    for call in (lambda: metrics.perplexity(model, text), lambda: divergence(model, model, text)):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    "text, message",
    [
        ([tokens(5, 1)], "no row has two tokens, wanted longer rows"),
        (
            [tokens(2), tokens(1, 0)],
            r"input_ids of item 1 has shape \[1, 0\], wanted \[T\] or \[batch, T\], T > 0",
        ),
        (Path("text.txt"), "the calibration is one PosixPath, wanted an iterable of input_ids tensors"),
    ],
    ids=["one token", "empty row", "path"],
)
def test_text_that_says_nothing_is_refused(text, message):
    refused(make_model(), message, text=text)


@pytest.mark.parametrize("bits", [16, 4])
def test_rows_that_are_all_the_same_are_enough(bits):
    """The moment of such text has rank 1, and GPTQ has to invert it."""
    model = compress(make_model(), [torch.full((3, 40), 7)], bits=bits)
    assert logits(model).isfinite().all()


def test_fewer_tokens_than_the_hidden_size_are_enough():
    assert logits(compress(make_model(), [tokens(1, 5)], bits=4)).isfinite().all()


# the state of torch


@pytest.fixture(scope="module")
def wanted():
    return logits(compress(make_model(), bits=4))


@pytest.mark.parametrize(
    "state",
    [
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.device("meta"),
        lambda: torch.set_grad_enabled(False),
        pytest.param(None, id="default dtype"),
    ],
    ids=["autocast", "default device", "no gradients", ""],
)
def test_what_is_set_for_all_of_torch_changes_nothing(state, wanted):
    model, text = make_model(), [tokens(3)]
    if state is None:
        torch.set_default_dtype(torch.float64)
        try:
            compress(model, text, bits=4)
            assert torch.get_default_dtype() == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)
    else:
        with state():
            compress(model, text, bits=4)
    assert torch.equal(logits(model), wanted)


def test_a_forked_worker_of_one_thread_gets_the_same_bits():
    child = python("-c", FORKED, OMP_NUM_THREADS="2")
    assert child.stdout.split() == ["True", "0"], child.stdout + child.stderr


def test_the_random_state_stays_as_it_was():
    model, before = make_model(), torch.random.get_rng_state()
    compress(model)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_dropout_takes_no_part_and_training_goes_on():
    sizes = {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}
    models = [make_model("GPT2", **sizes).train(mode) for mode in (False, True)]
    for model in models:
        compress(model)
    assert [model.training for model in models] == [False, True]
    assert torch.equal(logits(models[0]), logits(models[1].eval()))


# the compressed model


def test_an_lm_head_with_bits_of_its_own_is_not_resized():
    model = compress(make_model(), bits=4)
    with pytest.raises(ValueError, match="lm_head is a QuantizedLinear, wanted a plain linear to resize"):
        model.resize_token_embeddings(140)
    assert model.get_input_embeddings().num_embeddings == 128, "nothing was resized"
    assert model.resize_token_embeddings() is model.get_input_embeddings()


def test_tied_embeddings_are_resized_before_and_after(tmp_path):
    model = make_model()
    model.resize_token_embeddings(136)
    compress(model)
    model.resize_token_embeddings(140)
    rana.save(model, tmp_path / "model")
    loaded = rana.load(tmp_path / "model")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight and logits(loaded).shape[-1] == 140
    assert torch.equal(logits(loaded), logits(model))


def test_padding_on_the_left_changes_no_token(compressed):
    ids = tokens(2, 12)
    mask = (torch.arange(17) >= 5).long().expand(2, 17)
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], 1)
    positions = (mask.cumsum(1) - 1).clamp(0)
    found = compressed(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    torch.testing.assert_close(found, compressed(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"use_cache": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_ways_to_generate(compressed, options):
    assert compressed.generate(tokens(1, 8), max_new_tokens=4, min_new_tokens=4, **options).shape == (1, 12)


def test_another_compressed_model_may_assist(compressed):
    ids = tokens(1, 8)
    alone = compressed.generate(ids, max_new_tokens=4, do_sample=False)
    helped = compressed.generate(
        ids, max_new_tokens=4, do_sample=False, assistant_model=compress(make_model())
    )
    assert torch.equal(alone, helped)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    found = []
    for checkpointing in (False, True):
        model = compress(make_model()).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(tokens(2), labels=tokens(2)).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(found[0]) > 10
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_copies_and_state_dicts(compressed, tmp_path):
    expected = logits(compressed)
    copied = copy.deepcopy(compressed)
    assert torch.equal(logits(copied), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(compressed))), expected)
    rana.save(copied, tmp_path / "model")
    torch.save(compressed.state_dict(), tmp_path / "state.pt")
    loaded = rana.load(tmp_path / "model")
    for parameter in loaded.parameters():
        parameter.data.zero_()
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload"])
def test_accelerate_offloads_a_loaded_model(compressed, offload, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    rana.save(compressed, tmp_path / "model")
    loaded = rana.load(tmp_path / "model")
    folder = {"offload_dir": str(tmp_path / "offloaded")} if offload == "disk_offload" else {}
    getattr(accelerate, offload)(loaded, **folder)
    assert torch.equal(logits(loaded), logits(compressed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_while_loading_and_later(compressed, dtype, tmp_path):
    rana.save(compressed, tmp_path / "model")
    early = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype, low_cpu_mem_usage=True)
    late = rana.load(tmp_path / "model").to(dtype)
    assert logits(early).dtype == logits(late).dtype == dtype
    for model in (early, late):
        torch.testing.assert_close(logits(model).float(), logits(compressed), rtol=0.1, atol=0.03)
    thresholds = [b.dtype for name, b in late.named_buffers() if name.endswith("threshold")]
    assert thresholds and set(thresholds) == {torch.float32}


# paths


def test_links_and_relative_paths(compressed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rana.save(compressed, "a b/ü/")
    os.symlink("a b/ü", "link")
    rana.save(compressed, "link")
    assert Path("link").is_symlink() and torch.equal(logits(rana.load("link")), logits(compressed))


@pytest.mark.parametrize("place", [".", ".."])
def test_the_working_directory_is_not_replaced(compressed, tmp_path, monkeypatch, place):
    inside = tmp_path / "out" / "inside"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    if place == "..":
        (tmp_path / "out" / "rana.json").write_text("{}")
    for call in (lambda: check_target(place), lambda: rana.save(compressed, place)):
        with pytest.raises(
            OSError, match="is the working directory or holds it, .* give a directory within it"
        ):
            call()
    assert Path.cwd() == inside and not any(inside.iterdir())
