"""One checkpoint and the classes of its architecture: causal, headless, and with a head for classes."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import rana_kernels as rana
from rana_kernels.checkpoint.attachment import attached_plan
from rana_kernels.checkpoint.headers import CheckpointError
from tests.test_cli import run  # noqa: F401 - a fixture
from tests.test_compress import logits, make_model, quantised_head, tokens

PAPER: dict = {"flops_reduction": 0.3, "method": "paper", "progress": False}
NAMES = [
    "Llama",
    "OPT",
    "GPTNeoX",
    "GPT2",
    "Mixtral",
]  # the layers are at different depths, or have other names


@torch.no_grad()
def hidden(model: nn.Module) -> torch.Tensor:
    """The last hidden state, of the model without its head."""
    return model.base_model(tokens()).last_hidden_state


def compressed(name: str, **sizes) -> nn.Module:
    model = make_model(name, **sizes)
    rana.compress(model, [tokens()], **PAPER)
    return model


def comes_back(model: nn.Module, place: Path) -> nn.Module:
    """Save and load `model`: the same class, bits and plan."""
    rana.save(model, place)
    again = rana.load(place)
    assert type(again) is type(model) and attached_plan(again) == attached_plan(model)
    assert torch.equal(again(tokens())[0], model(tokens())[0])
    return again


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", NAMES)
def test_a_causal_checkpoint_is_read_without_its_head_and_with_another(name, tied, tmp_path):
    model = compressed(name, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "causal")
    for auto in (AutoModel, AutoModelForSequenceClassification):
        other = auto.from_pretrained(tmp_path / "causal")
        assert torch.equal(hidden(other), hidden(model))
        other = comes_back(other, tmp_path / auto.__name__)
        assert torch.equal(hidden(auto.from_pretrained(tmp_path / auto.__name__)), hidden(model))
        if tied:  # nothing is missing that a causal model needs
            assert torch.equal(
                logits(AutoModelForCausalLM.from_pretrained(tmp_path / auto.__name__)), logits(model)
            )
        else:  # transformers alone would invent an lm_head
            message = (
                rf"(lm_head|embed_out).weight.* is of \['{type(other).__name__}'\], .*rana_kernels\.load"
            )
            with pytest.raises(CheckpointError, match=message):
                AutoModelForCausalLM.from_pretrained(tmp_path / auto.__name__)


@pytest.mark.parametrize("name", NAMES)
def test_a_headless_model_is_compressed_saved_and_loaded(name, tmp_path):
    model = make_model(name).base_model
    rana.compress(model, [tokens()], **PAPER)
    comes_back(model, tmp_path / "out")
    assert torch.equal(hidden(AutoModel.from_pretrained(tmp_path / "out")), hidden(model))


def test_a_head_for_classes_is_saved_and_loaded(tmp_path):
    model = LlamaForSequenceClassification(make_model().config).eval()
    rana.compress(model, [tokens()], **PAPER)
    comes_back(model, tmp_path / "out")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_the_adapter_of_lm_head_stays_behind(tmp_path):
    model = make_model(tie_word_embeddings=False)
    plan = rana.plan(rana.calibrate(model, [tokens()], progress=False), **PAPER)
    plan = type(plan)(plan.adapters, lm_head=quantised_head(model, 8, 32))
    rana.compress(model, [tokens()], plan=plan, progress=False)
    rana.save(model, tmp_path / "causal")
    headless = AutoModel.from_pretrained(tmp_path / "causal")
    assert attached_plan(headless).lm_head is None and torch.equal(hidden(headless), hidden(model))
    comes_back(headless, tmp_path / "headless")


def test_what_is_missing_or_too_much_in_the_layers_is_refused(tmp_path):
    """Another class may have another head, and nothing else."""
    model = compressed("Llama")
    model.model.extra = nn.Linear(2, 2)
    model.save_pretrained(tmp_path / "more")
    with pytest.raises(
        CheckpointError, match=r"holds 'model\.extra\.\w+', which the model of this plan has not"
    ):
        AutoModel.from_pretrained(tmp_path / "more")
    del model.model.extra, model.model.layers[1].input_layernorm.weight
    model.save_pretrained(tmp_path / "less")
    with pytest.raises(CheckpointError, match=r"in no file: model\.layers\.1\.input_layernorm\.weight"):
        AutoModel.from_pretrained(tmp_path / "less")


def test_a_class_that_could_not_be_loaded_is_not_saved(tmp_path):
    class Own(LlamaForCausalLM):
        pass

    model = Own(make_model().config).eval()
    rana.compress(model, [tokens()], **PAPER)
    with pytest.raises(ValueError, match="transformers has no class Own, and rana.load would not find it"):
        rana.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "out")
    rana.save(compressed("Llama"), tmp_path / "known")
    (tmp_path / "known" / "rana.json").rename(tmp_path / "out" / "rana.json")
    with pytest.raises(CheckpointError):
        rana.load(tmp_path / "out")


def test_a_model_without_a_head_is_rounded_without_a_loss():
    model = make_model().base_model
    report = rana.compress(model, [tokens()], **PAPER, bits=8)
    assert set(report.plan.bits) == {8}


@pytest.mark.parametrize("command", [("eval", "--text"), ("generate", "--prompt")])
def test_commands_want_a_head_that_makes_logits(command, tmp_path, run):  # noqa: F811
    model = make_model().base_model
    rana.compress(model, [tokens()], **PAPER)
    rana.save(model, tmp_path / "out")
    text = tmp_path / "text.txt"
    text.write_text("some words")
    code, _, err = run(command[0], tmp_path / "out", command[1], text)
    assert code == 1 and "holds a LlamaModel, wanted a model with an lm_head" in err
