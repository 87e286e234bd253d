"""The demo, end to end on a tiny random model: it writes one self-contained report with finite numbers."""

import json
import math
import re
from unittest import mock

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pytest.importorskip("matplotlib", reason="the plots need the extra `plots`")

from bench.kernels import weights
from bench.kernels.cases import Model
from examples.demo.figures import FIGURES
from examples.demo.run import Settings, run
from tests.results import numbers_in

ROWS, LENGTH = 8, 64
BUDGETS = (0.3, 0.44)
BLOCKS = {"tiny": Model(hidden=64, queries=64, keys=32, neurons=176, blocks=1)}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Return (report.html, report.json) of one run."""
    folder, output = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("out")
    _save_model(folder)
    settings = Settings(
        model=folder, output=output, budgets=BUDGETS, evaluation_rows=4,
        blocks=BLOCKS, linear=(64, 176), densities=(0.1, 0.5, 1.0), rounds=3,
    )  # fmt: skip
    # copies of weights this small fill the cache of no processor in a reasonable time
    with mock.patch.object(weights, "cold_bytes", lambda: 2**20):
        run(settings, Console(quiet=True))
    return (output / "report.html").read_text(), json.loads((output / "report.json").read_text())


def _save_model(folder) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["<end>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", model_input_names=["input_ids", "attention_mask"]
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("calibration", "evaluation"):
        tokens = torch.randint(1, 257, (ROWS, LENGTH), dtype=torch.int32)
        save_file({"input_ids": tokens}, folder / f"{name}.safetensors")


def test_the_page_fetches_nothing(report):
    page, _ = report
    resources = re.findall(r'(?:src|srcset|href)="([^"]{0,40})|url\(([^)]{0,40})', page)
    assert resources
    assert all(url.startswith("data:") for urls in resources for url in urls if url)
    assert not re.search(r"https?://", page)


def test_the_page_has_every_figure_in_light_and_dark(report):
    page, _ = report
    found = set(re.findall(r'<figure id="(\w+)"', page))
    assert found == {*FIGURES, "quality", "bits", "texts", "decode"}
    assert page.count("data:image/png;base64,") == 2 * len(FIGURES)


def test_every_figure_says_what_produced_it(report):
    page, results = report
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page, flags=re.DOTALL)
    made = results["provenance"]
    assert all(made[key] in text for text in captions for key in ("processor", "date", "revision", "torch"))


def test_every_number_is_finite(report):
    _, results = report
    numbers = list(numbers_in(results))
    assert len(numbers) > 100
    assert all(math.isfinite(number) for number in numbers)


def test_costs_are_those_asked_for(report):
    """RaNA's cost varies with the text, and that of static low rank only by rounding to whole ranks."""
    _, results = report
    for variant in results["quality"]["variants"]:
        asked = 1 - variant["flops_reduction"]
        assert variant["planned_cost_ratio"] == pytest.approx(asked, abs=0.03)
        assert variant["cost_ratio"] == pytest.approx(asked, abs=0.06)


def test_four_bits_store_a_third(report):
    """The linears and lm_head in 4 bits; a scale of 2 bytes serves 32 columns."""
    dense, sixteen, four = report[1]["bits"]
    assert [dense["bits"], sixteen["bits"], four["bits"]] == [16, 16, 4]
    assert dense["megabytes"] == dense["read_megabytes"]
    assert four["megabytes"] <= 0.35 * dense["megabytes"]
    assert four["read_megabytes"] < four["megabytes"] < sixteen["megabytes"]
    assert min(model["tokens_per_second"] for model in report[1]["bits"]) > 0


def test_steps_cost_what_they_say(report):
    _, results = report
    for step in results["decode_steps"]:
        assert step["cost_ratio"] == pytest.approx(0.56, abs=0.06)  # ranks are multiples of 16
        assert step["speedup"] == pytest.approx(step["dense"]["median"] / step["rana"]["median"])


def test_no_unfinished_file_is_left(report, tmp_path_factory):
    assert not list(tmp_path_factory.getbasetemp().rglob("*.part"))
