"""What transformers does with a compressed model that takes other packages, or long."""

import pytest
import torch
from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig

import rana_kernels as rana
from tests.test_compress import make_model, tokens
from tests.test_transformers import EVERY, by_hand, prompt


@pytest.fixture(scope="module", params=[16, 4], ids=["floats", "int4"])
def place(tmp_path_factory, request):
    model, bits = make_model("Llama", num_hidden_layers=4), request.param
    rana.compress(model, [tokens()], flops_reduction=0.3, method="paper", bits=bits, progress=False)
    rana.save(model, place := tmp_path_factory.mktemp("model") / "out")
    return place


def test_the_static_cache_compiles_whole(place):
    model = rana.load(place)
    config = CompileConfig(fullgraph=True, mode="default")
    config._compile_all_devices = True  # transformers compiles on its own accord on cards only
    written = model.generate(prompt(), cache_implementation="static", compile_config=config, **EVERY)
    assert torch.equal(written, by_hand(model)) and hasattr(model, "_compiled_call")


def test_continuous_batching(place):
    model = rana.load(place)
    wanted = by_hand(model)[0, 8:].tolist()
    greedy = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found = model.generate_batch(inputs=[prompt()[0].tolist(), [5, 6, 7]], generation_config=greedy)
    assert list(next(iter(found.values())).generated_tokens) == wanted and len(found) == 2


@pytest.mark.parametrize("where", ["auto", "cpu", "disk"])
def test_device_maps_and_offloading_to_disk(where, place, tmp_path):
    pytest.importorskip("accelerate")
    device_map = {"auto": "auto", "cpu": {"": "cpu"}}.get(where)
    if device_map is None:
        names = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
        layers = {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
        device_map = {**dict.fromkeys(names, "cpu"), **layers}
    model = AutoModelForCausalLM.from_pretrained(place, device_map=device_map, offload_folder=tmp_path)
    assert any(p.is_meta for p in model.parameters()) == (where == "disk")
    assert torch.equal(model.generate(prompt(), **EVERY), by_hand(rana.load(place)))


def test_offloading_every_module(place):
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(rana.load(place), execution_device=torch.device("cpu"))
    assert torch.equal(model.generate(prompt(), **EVERY), by_hand(rana.load(place)))
