"""Linears that stay dense: the op serves them, and to all else they are the `nn.Linear` that they were."""

import copy

import pytest
import torch
import transformers
from torch import nn

import rana_kernels as rana
from rana_kernels.model.plan import AdapterSpec
from rana_kernels.nn.dense import DenseLinear, serve_dense


def linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(24, 40, bias)


def served(module: nn.Linear) -> DenseLinear:
    model = nn.Sequential(module)
    serve_dense(model, ["0"])
    return model[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (1,), (2, 5), (40,), (0,)], ids=str)
def test_it_computes_what_the_linear_did(lead, bias):
    x = torch.randn(*lead, 24)
    torch.testing.assert_close(served(linear(bias))(x), linear(bias)(x))


def test_it_has_the_parameters_themselves_under_their_names():
    module = linear().eval()
    made = served(module)
    assert isinstance(made, nn.Linear) and made.weight is module.weight and made.bias is module.bias
    assert list(made.state_dict()) == ["weight", "bias"] and not made.training
    assert torch.equal(copy.deepcopy(made).weight, module.weight)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("tokens", [3, 40])
def test_gradients_are_those_of_the_linear(tokens, frozen):
    x, grads = torch.randn(tokens, 24), []
    for make in (linear, lambda: served(linear())):
        module, leaf = make(), x.clone().requires_grad_()
        module.weight.requires_grad_(not frozen)
        module(leaf).square().sum().backward()
        grads.append((leaf.grad, module.weight.grad, module.bias.grad))
    for wanted, found in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted)


def test_what_is_no_plain_linear_is_left_alone():
    class Special(nn.Linear):
        pass

    model = nn.ModuleDict({"special": Special(4, 4), "embedding": nn.Embedding(4, 4)})
    serve_dense(model, model)
    assert type(model["special"]) is Special and type(model["embedding"]) is nn.Embedding


def llama(tied: bool) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, attention_bias=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


IDS = torch.arange(2 * 80).reshape(2, 80) * 37 % 96


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def compressed(request) -> transformers.PreTrainedModel:
    model = llama(request.param)
    rana.compress(model, [IDS], flops_reduction=0.3, method="paper", progress=False)
    return model


def dense_modules(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, DenseLinear)}


def test_compress_serves_lm_head_and_the_linears_left_dense(compressed):
    # the paper's method leaves o dense
    assert dense_modules(compressed) == {"lm_head", *(f"model.layers.{i}.self_attn.o_proj" for i in (0, 1))}


def test_ties_hold_through_compress_save_and_load(compressed, tmp_path):
    tied = compressed.config.tie_word_embeddings
    rana.save(compressed, tmp_path / "saved")
    loaded = rana.load(tmp_path / "saved")
    assert dense_modules(loaded) == dense_modules(compressed)
    for model in (compressed, loaded):
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert loaded.state_dict().keys() == compressed.state_dict().keys()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for ids in (IDS[:1, :5], IDS[:, :40]):
        assert torch.equal(loaded(ids).logits, compressed(ids).logits)
    assert torch.equal(loaded.generate(IDS[:1, :5], **options), compressed.generate(IDS[:1, :5], **options))


def test_a_resized_vocabulary_works(compressed):
    model = copy.deepcopy(compressed)
    model.resize_token_embeddings(100, mean_resizing=False)
    assert model(IDS).logits.shape[-1] == 100


def test_a_plan_of_dense_adapters_is_the_model_itself():
    model = llama(tied=True)
    wanted = model(IDS[:1, :7]).logits
    linears = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"}
    plan = rana.Plan(
        tuple(
            AdapterSpec("dense", (n,), m.in_features, (m.out_features,), bias=m.bias is not None)
            for n, m in linears.items()
        )
    )
    rana.compress(model, [IDS], plan=plan, progress=False)
    assert dense_modules(model) == {*linears, "lm_head"}
    torch.testing.assert_close(model(IDS[:1, :7]).logits, wanted)
