"""vLLM's engine, scheduler, caches and attention with a compressed model write what transformers writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rana_kernels as rana
from rana_kernels.checkpoint.attachment import read_plan
from tests.stacks.vllm_engine import COUNT, ROOT, can_run, prompts

pytest.importorskip(
    "vllm", reason="vLLM is not installed; `make test-vllm` installs it", exc_type=ImportError
)
if not can_run():
    pytest.skip("no card, and this vLLM has no kernels for the CPU; `make test-vllm` has one that does",
                allow_module_level=True)  # fmt: skip
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what runs on a machine without a card")


@pytest.fixture(scope="module", params=[16, 4], ids=["16 bits", "4 bits"])
def place(request, tmp_path_factory) -> Path:
    """The demo model: rank adapters for q, k and v together and for o, neuron adapters beside them."""
    model = AutoModelForCausalLM.from_pretrained(ROOT / "examples/demo_model", dtype=torch.float32)
    text = load_file(ROOT / "examples/demo_model/calibration.safetensors")["input_ids"].long()
    rana.compress(model, [text[:8, :256]], flops_reduction=0.4, bits=request.param, progress=False)
    rana.save(model, place := tmp_path_factory.mktemp("model") / "out")
    return place


def written_by_transformers(place: Path, device: str) -> list[list[int]]:
    ids = prompts().to(device)
    greedy = {"max_new_tokens": COUNT, "min_new_tokens": COUNT, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    written = rana.load(place, device=device).generate(ids, attention_mask=mask, **greedy)
    return written[:, ids.shape[1] :].tolist()


def written_by_vllm(place: Path, cache: Path, **options) -> list[list[int]]:
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise each process wants a NUMA node
        "VLLM_CACHE_ROOT": str(cache),
    }
    program = [sys.executable, "-m", "tests.stacks.vllm_engine", str(place), json.dumps(options)]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("[["))


ENGINES = {
    "eager": {"enforce_eager": True},
    "compiled": {},
    "two processes": {"enforce_eager": True, "tensor_parallel_size": 2},
}


@on_cpu
@pytest.mark.parametrize("engine", ENGINES)
def test_on_the_cpu(engine, place, tmp_path):
    if engine == "two processes" and read_plan(place).bits != (16,):
        pytest.skip("weights in 4 bits are not shared out")
    assert written_by_vllm(place, tmp_path, **ENGINES[engine]) == written_by_transformers(place, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_on_a_card(engine, place, tmp_path):
    beside = {"gpu_memory_utilization": 0.2}  # other tests run beside this one
    found = written_by_vllm(place, tmp_path, **ENGINES[engine], **beside)
    assert found == written_by_transformers(place, "cuda")
