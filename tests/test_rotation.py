"""Rotations of dense models: predictions stay, masks lose less, and other models are refused."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import rana_kernels as rana
from rana_kernels.evaluation.divergence import divergence
from rana_kernels.model.architectures import find_blocks
from rana_kernels.rotation.heads import uncorrelated
from rana_kernels.rotation.learning import ReadInput, learn, loss_of
from rana_kernels.rotation.stream import absorb, find_stream
from tests.test_compress import make_model, tokens

SMALL = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def uneven(model: nn.Module) -> nn.Module:
    """Give every norm weights of its own: with ones it does not matter which linears take them."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "qwen2":  # biases of q, k and v
        return uneven(Qwen2ForCausalLM(Qwen2Config(**SMALL)))
    if kind == "phi3":  # one linear for q, k and v, one for gate and up
        return uneven(Phi3ForCausalLM(Phi3Config(**SMALL, pad_token_id=0)))
    if kind == "gemma":  # norms that multiply by 1 + weight, and a scaled embedding that is tied
        return uneven(GemmaForCausalLM(GemmaConfig(**SMALL, head_dim=16)))
    return uneven(make_model(tie_word_embeddings=kind == "tied"))


@pytest.mark.parametrize("kind", ["llama", "tied", "qwen2", "gemma", "phi3"])
def test_predictions_stay(kind):
    model = make(kind)
    before, ids = copy.deepcopy(model), tokens(2, 30)
    done = rana.rotate(model, [ids], steps=20, progress=False)
    assert done.blocks == (0 if kind == "phi3" else 2)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before(ids).logits, rtol=1e-3, atol=1e-4)
    changed = [n for n, p in before.named_parameters() if not torch.equal(p, model.get_parameter(n))]
    assert any("down_proj" in n for n in changed) and any("embed" in n for n in changed)
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert not model.config.tie_word_embeddings


def test_value_heads_alone_leave_the_stream_as_it_is():
    model = make("tied")
    before, ids = copy.deepcopy(model), tokens(2, 30)
    assert rana.rotate(model, [ids], steps=0, progress=False).gain == 0
    changed = {n for n, p in before.named_parameters() if not torch.equal(p, model.get_parameter(n))}
    assert changed == {f"model.layers.{i}.self_attn.{n}_proj.weight" for i in (0, 1) for n in "vo"}
    assert model.config.tie_word_embeddings
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before(ids).logits, rtol=1e-3, atol=1e-4)


def test_a_rotated_model_is_compressed_saved_and_loaded(tmp_path):
    model, ids = make("tied"), tokens(2, 30)
    rana.rotate(model, [ids], steps=5, progress=False)
    rana.compress(model, [ids], flops_reduction=0.3, progress=False)
    rana.save(model, tmp_path / "out")
    again = rana.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_inputs_and_slopes_are_uncorrelated_after_the_rotation_of_a_head():
    torch.manual_seed(0)
    x, slopes = (torch.randn(200, 8).double() @ torch.randn(8, 8).double() for _ in range(2))
    M = uncorrelated(x.T @ x, slopes.T @ slopes)
    for turned in (x @ M.T, slopes @ torch.linalg.inv(M)):
        moment = turned.T @ turned
        rest = moment - moment.diagonal().diag()
        assert rest.abs().max() < 1e-4 * moment.diagonal().abs().max()
    torch.testing.assert_close(M.norm(dim=1), torch.ones(8).double())


def test_learning_finds_the_basis_in_which_inputs_are_sparse():
    torch.manual_seed(0)
    hidden, _ = torch.linalg.qr(torch.randn(16, 16))
    sparse = torch.randn(2000, 16) * (torch.rand(2000, 16) < 0.3)
    inputs = [ReadInput(sparse @ hidden.T, torch.randn(2000, 16))]
    Q = learn(inputs, steps=400, progress=False)
    torch.testing.assert_close(Q.T @ Q, torch.eye(16), rtol=0, atol=1e-5)
    assert loss_of(inputs, Q) < 0.1 * loss_of(inputs)
    assert torch.equal(Q, learn(inputs, steps=400, progress=False))


def test_masks_lose_less_after_a_rotation():
    """A model whose stream was turned at random gets back a basis in which masks lose little."""
    model, ids = make("llama"), tokens(4, 60)
    turned = copy.deepcopy(model)
    absorb(turned, find_stream(turned), torch.linalg.qr(torch.randn(64, 64)).Q)
    gain = rana.rotate(turned, [ids], steps=200, progress=False).gain
    assert 0 < gain < 1
    lost = []
    for each in (model, turned):
        dense = copy.deepcopy(each)
        rana.compress(each, [ids], flops_reduction=0.4, progress=False)
        lost.append(divergence(each, dense, ids, progress=False).kl)
    assert lost[1] < lost[0]


def test_models_without_the_freedom_are_refused_before_any_work():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=64, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="its residual stream cannot be rotated"):
        rana.rotate(gpt2, [tokens()], progress=False)
    model = make("llama")
    model.model.layers[0].extra = nn.Linear(64, 64)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.extra is a Linear that is not known to leave"):
        rana.rotate(model, [tokens()], progress=False)
    model = make("llama")
    model.model.norm = nn.LayerNorm(64)
    with pytest.raises(ValueError, match="LayerNorm is no RMS norm"):
        rana.rotate(model, [tokens()], progress=False)
    assert len(find_blocks(model)) == 2
