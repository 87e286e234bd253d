"""`push_to_hub` of a compressed model: what would be uploaded, kept in a folder."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from torch import nn
from transformers import AutoModelForCausalLM, modeling_utils
from transformers.utils import hub

import rana_kernels as rana
from rana_kernels.checkpoint.model_card import note, write_card
from tests.test_compress import logits, make_model, tokens


@pytest.fixture(scope="module")
def model() -> nn.Module:
    model = make_model("Llama")
    rana.compress(model, [tokens()], flops_reduction=0.3, method="paper", progress=False)
    note(model, base_model="org/tiny", perplexity={"data": "a text", "compressed": 7.5, "dense": 7.0})
    return model


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """The folder that a push lands in; README.md is there before it if a test puts it there."""
    place = tmp_path / "repository"
    place.mkdir()

    def commit(repo_id, operations, **_):
        for operation in operations:
            (place / operation.path_in_repo).write_bytes(Path(operation.path_or_fileobj).read_bytes())

    def load_card(repo_id, **_):
        if not (place / "README.md").exists():
            raise EntryNotFoundError("no card yet")
        return ModelCard((place / "README.md").read_text())

    api = SimpleNamespace(create_repo=lambda name, **_: SimpleNamespace(repo_id=name), create_commit=commit)
    for module in (hub, modeling_utils):  # 5.0 has the functions, later versions the object
        monkeypatch.setattr(module, "hf_api", lambda: api, raising=False)
        for name, function in vars(api).items():
            monkeypatch.setattr(module, name, function, raising=False)
    monkeypatch.setattr(ModelCard, "load", load_card)
    return place


def push(model: nn.Module, _: Path) -> None:
    model.push_to_hub("me/tiny-rana", tags=["small"])


def save_and_push(model: nn.Module, folder: Path) -> None:
    (folder / "notes.txt").write_text("not of the model, and older than it")
    model.save_pretrained(str(folder), push_to_hub=True, repo_id="me/tiny-rana")


@pytest.mark.parametrize("way", [push, save_and_push])
@pytest.mark.parametrize("loaded", [False, True], ids=["compressed", "loaded"])
def test_the_repository_is_what_save_writes(way, loaded, model, repository, tmp_path):
    rana.save(model, tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    pushed = AutoModelForCausalLM.from_pretrained(tmp_path / "saved") if loaded else model
    way(pushed, tmp_path / "folder")
    names, wanted = ({path.name for path in place.iterdir()} for place in (repository, tmp_path / "saved"))
    assert names == wanted
    assert ModelCard((repository / "README.md").read_text()).text == ModelCard(write_card(model)).text
    assert torch.equal(logits(rana.load(repository)), logits(model))


def test_the_card_of_a_repository_keeps_its_metadata_and_follows_the_model(model, repository):
    before = "---\nlicense: mit\ntags: [mine]\nbase_model: org/old\n---\nA text."
    (repository / "README.md").write_text(before)
    push(model, repository)
    found = ModelCard((repository / "README.md").read_text())
    assert (found.data.license, found.data.base_model) == ("mit", "org/tiny")
    assert set(found.data.tags) == {"rana_kernels", "mine", "small"}
    assert "7.5000 compressed, 7.0000 dense, on a text" in found.text and "A text." not in found.text


def test_a_card_that_was_edited_does_not_make_a_model_unreadable(model, tmp_path):
    rana.save(model, tmp_path / "out")
    with (tmp_path / "out/README.md").open("a") as file:
        file.write("\nWhat else there is to say.\n")
    assert torch.equal(logits(rana.load(tmp_path / "out")), logits(model))


def test_other_models_are_uploaded_as_ever(repository):
    make_model("Llama").push_to_hub("me/dense")
    assert not (repository / "rana.json").exists()
    assert "automatically generated" in (repository / "README.md").read_text()
