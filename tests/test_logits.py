"""Logits a few tokens at a time: the same as those of the whole model, in every loss and its derivatives."""

from functools import partial

import pytest
import torch
from torch import nn

from rana_kernels.compression.run import compress
from rana_kernels.evaluation.divergence import divergence
from rana_kernels.evaluation.live import count_live
from rana_kernels.evaluation.metrics import token_losses
from rana_kernels.model import logits
from rana_kernels.model.head import output_head
from rana_kernels.model.logits import Logits
from rana_kernels.recovery.training import Training, train
from rana_kernels.statistics.calibration import calibrate
from tests.test_compress import ARCHITECTURES, make_model, tokens

SEVEN = 7 * 128  # logits: seven tokens of these models


@pytest.fixture
def in_pieces(monkeypatch):
    """Make pieces of seven tokens, and hold that lm_head sees no more at a time."""

    def watch(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        assert args[0].shape[:-1].numel() <= 7, "lm_head read the whole batch"

    def begin(*models: nn.Module) -> None:
        monkeypatch.setattr(logits, "PIECE", SEVEN)
        for model in models:
            output_head(model).register_forward_pre_hook(watch)

    return begin


def untied(architecture: str = "Llama") -> nn.Module:
    return make_model(architecture, tie_word_embeddings=False)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_pieces_of_every_architecture_are_its_logits(architecture, in_pieces):
    model = make_model(architecture)
    wanted = model(tokens(2)).logits
    in_pieces(model)
    found = Logits(model, tokens(2))
    assert [place for place in found.parts if place[0] == 1][-1] == (1, slice(35, 40))
    rows = torch.cat([found.of(*place) for place in found.parts])
    torch.testing.assert_close(rows, wanted.flatten(0, 1), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_another_thread_may_run_the_model_meanwhile(in_pieces):
    """The model itself is not changed: between two pieces it gives what it always gave."""
    model, ids = make_model("OPT"), tokens(2)
    wanted, modules = model(ids).logits, dict(model.named_modules())
    in_pieces()
    found = Logits(model, ids)
    for place in found.parts:
        assert torch.equal(model(ids).logits, wanted) and dict(model.named_modules()) == modules
        torch.testing.assert_close(found.of(*place), wanted[place], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_forward_that_accelerate_has_set_is_not_that_of_the_original(in_pieces):
    model, ids = make_model(), tokens(2)
    wanted = model(ids).logits
    model.forward = partial(type(model).forward, model)
    in_pieces(model)
    found = Logits(model, ids)
    torch.testing.assert_close(found.of(1, slice(35, 40)), wanted[1, 35:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["Llama", "OPT", "Gemma2"])
def test_calibration_has_the_same_statistics(architecture, in_pieces):
    model, mask = untied(architecture), torch.ones(2, 40, dtype=torch.int64)
    mask[1, 30:] = 0
    text = [{"input_ids": tokens(2), "attention_mask": mask}]
    wanted = calibrate(model, text, progress=False)
    in_pieces(model)
    found = calibrate(model, text, progress=False)
    assert set(found.inputs) == set(wanted.inputs) and set(found.gradients) == set(wanted.gradients)
    for key, own in wanted.inputs.items():
        assert torch.equal(found.inputs[key].moment, own.moment)
        assert torch.equal(found.inputs[key].sample, own.sample)
    for name, square in wanted.gradients.items():
        torch.testing.assert_close(found.gradients[name], square, rtol=1e-3, atol=1e-9)
        slopes = wanted.slopes[name].float()
        torch.testing.assert_close(found.slopes[name].float(), slopes, rtol=2e-2, atol=1e-4)
    for key, own in wanted.paired.items():
        assert torch.equal(found.paired[key], own)


def test_perplexity_divergence_and_live_rows_are_the_same(in_pieces):
    dense, model = untied(), untied()
    compress(model, [tokens()], bytes_reduction=0.5, progress=False)
    losses, apart = token_losses(model, tokens(), progress=False), divergence(model, dense, tokens())
    with count_live(model) as wanted:
        model(tokens())
    in_pieces(model, dense)
    with count_live(model) as counts:
        found = token_losses(model, tokens(), progress=False)
    torch.testing.assert_close(found, losses, rtol=1e-4, atol=1e-5)
    again = divergence(model, dense, tokens(), progress=False)
    assert again.kl == pytest.approx(apart.kl, rel=1e-4) and again.agreed == pytest.approx(apart.agreed)
    assert set(counts) == set(wanted)
    for name, count in wanted.items():
        assert count.tokens == counts[name].tokens
        assert counts[name].mean == pytest.approx(count.mean, rel=1e-3)


@pytest.mark.parametrize("dense", [None, untied], ids=["text", "dense model"])
def test_training_is_the_same(dense, in_pieces):
    how, teacher = Training(steps=3, batch=2), dense() if dense else None
    models = [untied(), untied()]
    for model in models:
        with torch.no_grad():
            model.model.norm.weight += 0.5
        model.requires_grad_(False).model.layers.requires_grad_(True)
    wanted = train(models[0], tokens(), how, dense=teacher, progress=False)
    in_pieces(models[1], *([teacher] if teacher else []))
    found = train(models[1], tokens(), how, dense=teacher, progress=False)
    assert found == pytest.approx(wanted, rel=1e-4) and all(loss > 1e-3 for loss in found)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-4)
