"""What transformers does with a model, done with a compressed one: the same as it does by hand."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import rana_kernels as rana
from tests.test_compress import logits, make_model, tokens

EVERY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}


def prompt(rows: int = 1) -> torch.Tensor:
    return tokens(rows, 8).clamp_min(3)


@pytest.fixture(scope="module", params=["Llama", "GPTNeoX"])
def model(request) -> nn.Module:
    model = make_model(request.param)
    rana.compress(model, [tokens()], flops_reduction=0.3, method="paper", progress=False)
    return model


def by_hand(model: nn.Module) -> torch.Tensor:
    """Greedy, without a cache: the whole text again for each token."""
    ids = prompt()
    with torch.no_grad():
        for _ in range(8):
            best = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, best], 1)
    return ids


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static", "disable_compile": True},
        {"prompt_lookup_num_tokens": 3},
        {"use_cache": False},
    ],
    ids=["dynamic", "static", "lookup", "none"],
)
def test_every_cache_gives_the_same_tokens(options, model):
    written = model.generate(prompt(), **EVERY, **options)
    assert torch.equal(written[:, :16], by_hand(model))  # transformers 5.0 may look up one too many


def test_speculative_decoding_with_a_compressed_draft_or_target(model):
    name = {"llama": "Llama", "gpt_neox": "GPTNeoX"}[model.config.model_type]
    dense = make_model(name)
    for target, draft in ((dense, model), (model, dense)):
        written = target.generate(prompt(), assistant_model=draft, **EVERY)
        assert torch.equal(written, by_hand(target))


def test_a_row_of_a_batch_is_padded_and_masked(model):
    ids = torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt()], 1)
    mask = (torch.arange(11) >= 3).long()[None]
    both = model.generate(
        torch.cat([ids, tokens(1, 11).clamp_min(3)]), attention_mask=torch.cat([mask, torch.ones_like(mask)]),
        **EVERY,
    )  # fmt: skip
    assert torch.equal(both[:1, 3:], by_hand(model))


def test_gradient_checkpointing_changes_no_gradient(model):
    model.train()
    ids = tokens(2, 12)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    plain = gradients()
    model.gradient_checkpointing_enable()
    again = gradients()
    model.gradient_checkpointing_disable()
    model.eval()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_transformers_alone_writes_and_reads_it_again_and_again(model, tmp_path):
    last = model
    for place in ("once", "twice"):
        last.save_pretrained(tmp_path / place)
        last = AutoModelForCausalLM.from_pretrained(tmp_path / place)
        assert torch.equal(logits(last), logits(model))
    files = [(tmp_path / place / "model.safetensors").read_bytes() for place in ("once", "twice")]
    assert files[0] == files[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"], ids=str)
def test_dtype_on_load(dtype, model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    wanted = torch.float32 if dtype == "auto" else dtype
    assert isinstance(loaded, PreTrainedModel) and loaded.dtype == wanted
    kinds = {tensor.dtype for name, tensor in loaded.state_dict().items() if name.endswith("threshold")}
    assert kinds == {torch.float32}
    torch.testing.assert_close(logits(loaded).float(), logits(model), rtol=0.1, atol=0.2)


@pytest.mark.parametrize("name", ["GPTNeoX", "Mixtral"])
def test_weights_that_have_another_name_in_the_file_change_their_dtype_too(name, tmp_path):
    model = make_model(name, tie_word_embeddings=False)
    rana.compress(model, [tokens()], flops_reduction=0.3, method="paper", progress=False)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(loaded).float(), logits(model), rtol=0.1, atol=0.2)


def test_another_quantization_on_top_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    bits = pytest.importorskip("transformers").BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match="quantiz"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=bits)
