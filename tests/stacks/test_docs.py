"""The README and the pages under docs/: all of their commands, run in the order of the page."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from rana_kernels.allocation.latency import LatencyTable
from rana_kernels.checkpoint.attachment import attached_plan
from rana_kernels.integrations.transformers import load

ROOT = Path(__file__).parent.parent.parent
NEEDS = {
    "README": "transformers",
    "models": "",
    "transformers": "transformers",
    "budgets": "",
    "quantization": "transformers",
    "serving": "fastapi lm_eval",
    "parallel": "accelerate",
    "peft": "peft",
    "recovery": "peft",
    "deployment": "onnx onnxscript onnxruntime",
    "vllm": "vllm",
}
PROGRAMS = {
    "python": "",
    "rana": "-c 'from rana_kernels.cli import main; main()'",
    "torchrun": "-m torch.distributed.run",
    "vllm": "-m vllm.entrypoints.cli.main",
}
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def script(page: str) -> str:
    """Everything in the page as one shell program; what Python it holds is one program, run last."""
    folder = ROOT if page == "README" else ROOT / "docs"
    blocks = BLOCK.findall((folder / f"{page}.md").read_text())
    shell = [text for kind, text in blocks if kind == "sh" and not text.startswith("pip install")]
    python = "".join(text for kind, text in blocks if kind == "python")
    stop = "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT"
    # a file, because vLLM's processes import their main program
    return "\n".join([stop, *shell, f"cat > page.py <<'PYTHON'\n{python}PYTHON\npython page.py"])


@pytest.fixture
def folder(tmp_path) -> Path:
    """With the examples, and `rana` and `python` of this environment."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, arguments in PROGRAMS.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n')
        (programs / name).chmod(0o755)
    return tmp_path


@pytest.fixture
def run(folder):
    def page(name: str) -> str:
        if absent := [module for module in NEEDS[name].split() if not find_spec(module)]:
            target = "test-vllm" if name == "vllm" else "test-stacks"
            pytest.skip(f"not installed: {', '.join(absent)}; `make {target}` installs them")
        environment = {
            **os.environ,
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",  # the models are small: threads would mostly wait for one another
            "HF_DATASETS_CACHE": str(folder / "cache"),
            "VLLM_CACHE_ROOT": str(folder / "cache"),
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        }
        done = subprocess.run(
            ["bash", "-e", "-c", script(name)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    return page


def first_json(out: str) -> Any:
    return json.JSONDecoder().raw_decode(out[out.index('{"id"') :])[0]


def shorten_texts(folder: Path) -> None:
    """Leave 32 sequences of each text of the demo model: in full they take minutes."""
    (folder / "examples").unlink()
    model = folder / "examples/demo_model"
    shutil.copytree(ROOT / "examples/demo_model", model)
    for path in (model / "calibration.safetensors", model / "evaluation.safetensors"):
        save_file({"input_ids": load_file(path)["input_ids"][:32].clone()}, path)


def test_readme(run, folder):
    shorten_texts(folder)
    out = run("README")
    assert "perplexity" in out and "def main():" in out
    assert (folder / "build/compressed/rana.json").is_file()


def test_models(run):
    assert 0.15 < float(run("models").splitlines()[-1]) < 0.25


def test_transformers(run, folder):
    out = run("transformers")
    card = (folder / "build/compressed/README.md").read_text()
    assert "def main(self):" in out
    assert re.search(r"perplexity \| [\d.]+ compressed, [\d.]+ dense", card)


def test_budgets(run, folder):
    run("budgets")
    small, fast = (attached_plan(load(folder / "build" / name)) for name in ("small", "fast"))
    assert small is not None and small.max_memory == 5_000_000
    assert fast is not None and fast.time_reduction == 0.1
    assert LatencyTable.load(folder / "build/times.json").machine["dtype"] == "bfloat16"


def test_quantization(run, folder):
    out = run("quantization")
    before, after = map(int, out.splitlines()[-1].split())
    assert after < 0.35 * before and "bits: 4, a scale for 32 columns" in out and "def main():" in out
    for name in ("small", "in-python"):
        plan = attached_plan(load(folder / "build" / name))
        assert plan is not None and {adapter.bits for adapter in plan.adapters} == {4}


def test_serving(run, folder):
    out = run("serving")
    completion = first_json(out)
    assert completion["choices"][0]["text"].startswith("self")
    assert completion["usage"]["completion_tokens"] == 8
    (results,) = (folder / "build/task/results").rglob("results*.json")
    assert json.loads(results.read_text())["results"]["python_code"]["acc,none"] == 1.0


def test_parallel(run, folder):
    out = run("parallel")
    assert "def read_lines(path):" in out and "MB in each of 2 processes" in out
    assert (folder / "build/calibrated/rana.json").is_file()


def test_peft(run, folder):
    run("peft")
    assert (folder / "build/merged/rana.json").is_file()
    assert (folder / "build/lora/adapter_config.json").is_file()


def test_recovery(run, folder):
    out = run("recovery")
    assert "allocations measured" in out and "became" in out and "with equal ranks" in out
    assert len(list((folder / "build/searches").iterdir())) == 2
    assert "LoRA of rank 4, merged" in (folder / "build/shared/README.md").read_text()


def test_deployment(run, folder):
    run("deployment")
    assert len((folder / "build/c.txt").read_text().split()) == 16


def test_vllm(run):
    from tests.stacks.vllm_engine import can_run

    if not can_run():
        pytest.skip("no vLLM that runs here, on a card or the CPU; `make test-vllm` installs one that does")
    out = run("vllm")
    assert first_json(out)["choices"][0]["text"].startswith("self")
    assert re.search(r"^def main\(self\):", out, re.MULTILINE)
