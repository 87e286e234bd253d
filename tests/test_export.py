"""Programs without model classes, and without Python: torch.export, AOTInductor, examples/deployment."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import rana_kernels as rana
from examples.deployment.compile import compile_program
from examples.deployment.export import export, package
from examples.deployment.run import continuation
from rana_kernels import backends, ops
from tests.architectures import MODELS
from tests.test_compress import make_model, tokens
from tests.test_modules import K, every_module

ROOT = Path(__file__).parent.parent
PACKAGE = Path(rana.__file__).parent
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
PROMPT = tokens(1, 8).clamp_min(3)[0].tolist()


def run_in(folder: Path, *command: object) -> subprocess.CompletedProcess:
    """The package's own directory on the path, one thread, nothing of the package imported before."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True)


def small(architecture: str, dtype: torch.dtype = torch.float32, bits: int = 16) -> nn.Module:
    model = make_model(architecture, num_hidden_layers=1)
    rana.compress(model, [tokens()], flops_reduction=0.3, method="paper", bits=bits, progress=False)
    return nn.Module.to(model, dtype)


def generated(model: nn.Module, prompt: list[int], count: int = 8) -> list[int]:
    options = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    written = model.generate(torch.tensor([prompt]), max_new_tokens=count, **options)
    return written[0, len(prompt) :].tolist()


@every_module
@every_dtype
@pytest.mark.parametrize("strict", [True, False])
def test_modules_export_with_any_batch(make, dtype, strict):
    """The joint q, k and v among them: what one hands to the others is no state of the program."""
    module, x = make().to(dtype), torch.randn(3, 2, K).to(dtype)
    batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(module, (x,), dynamic_shapes=(batch,), strict=strict)
    called = {str(node.target) for node in program.graph.nodes if "rana" in str(node.target)}
    assert called and called <= {f"rana.{op}.default" for op in ops.SCHEMAS}
    for part in (x, x[:1], -x):
        assert torch.equal(program.module()(part), module(part))


@every_dtype
@pytest.mark.parametrize(("architecture", "bits"), [("Llama", 16), ("OPT", 16), ("Llama", 4)])
def test_a_model_exports_with_its_cache(architecture, bits, dtype):
    model = small(architecture, dtype, bits)
    program = export(model, 32).module()
    for prompt in (PROMPT, PROMPT[:1], PROMPT[2:]):
        assert continuation(program, prompt, 8) == generated(model, prompt)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", MODELS)
def test_every_architecture_exports(architecture):
    model = small(architecture)
    assert continuation(export(model, 32).module(), PROMPT, 8) == generated(model, PROMPT)


def library(name: str) -> Path:
    path = PACKAGE / f"{name}.abi3.so"
    if not path.exists():
        pytest.skip(f"{path.name} is not built")
    return path


def test_the_schemas_for_programs_without_python_are_those_of_ops(tmp_path):
    show = "[print(getattr(torch.ops.rana, op).default._schema) for op in sys.argv[2:]]"
    code = f"import sys, torch; torch.ops.load_library(sys.argv[1]); {show}"
    done = run_in(tmp_path, sys.executable, "-c", code, library("_schemas"), *ops.SCHEMAS)
    wanted = [str(getattr(torch.ops.rana, op).default._schema) for op in ops.SCHEMAS]
    assert done.stdout.splitlines() == wanted, done.stderr


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """run.cpp, compiled."""
    library("_schemas"), library(f"_cpu_{backends.instruction_set()}")
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not shutil.which(compiler):
        pytest.skip(f"no C++ compiler ({compiler})")
    output = tmp_path_factory.mktemp("program") / "run"
    compile_program(output)
    return output


@pytest.fixture(scope="module")
def packaged(program, tmp_path_factory, request) -> tuple[nn.Module, Path]:
    """A model of one layer in 16 or 4 bits, and its package."""
    path, model = tmp_path_factory.mktemp("package") / "model.pt2", small("Llama", bits=request.param)
    package(model, 32, path)
    return model, path


@pytest.mark.parametrize("packaged", [16, 4], indirect=True)
def test_a_package_runs_from_python_and_from_c(program, packaged, tmp_path):
    model, file = packaged
    wanted = generated(model, PROMPT)
    assert continuation(torch._inductor.aoti_load_package(str(file)), PROMPT, 8) == wanted
    (tmp_path / "prompt.txt").write_text(" ".join(map(str, PROMPT)))
    done = run_in(tmp_path, program, PACKAGE, file, "prompt.txt", 8)
    assert [int(token) for token in done.stdout.split()] == wanted, done.stderr


@pytest.mark.parametrize("packaged", [16], indirect=True)
def test_the_c_program_says_what_is_wrong(program, packaged, tmp_path):
    _, file = packaged
    (tmp_path / "prompt.txt").write_text("5 6 seven")
    (tmp_path / "_schemas.abi3.so").symlink_to(library("_schemas"))
    for words, arguments in {
        "wanted four arguments": [],
        "_schemas.abi3.so": ["nowhere", file, "prompt.txt", 8],
        "_cpu_": [tmp_path, file, "prompt.txt", 8],
        "prompt.txt is no text file of token ids": [PACKAGE, file, "prompt.txt", 8],
    }.items():
        done = run_in(tmp_path, program, *arguments)
        assert done.returncode == 1 and not done.stdout
        assert re.match(rf"run: .*{re.escape(words)}", done.stderr), done.stderr


@pytest.mark.parametrize("packaged", [16], indirect=True)
def test_more_tokens_than_the_cache_holds_are_refused(program, packaged, tmp_path):
    _, file = packaged
    (tmp_path / "prompt.txt").write_text(" ".join(map(str, PROMPT)))
    for command in ((sys.executable, "-m", "examples.deployment.run"), (program, PACKAGE)):
        done = run_in(tmp_path, *command, file, "prompt.txt", 25)
        assert done.returncode != 0 and not done.stdout
        assert "prompt and count are 33 tokens, the cache holds 32" in done.stderr


@pytest.mark.slow
@every_dtype
def test_the_checked_in_model_from_compression_to_the_c_program(dtype, program, tmp_path):
    texts = load_file(ROOT / "examples/demo_model/calibration.safetensors")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(ROOT / "examples/demo_model", dtype=dtype)
    rana.compress(model, [texts[:4]], flops_reduction=0.4, method="paper", progress=False)
    rana.save(model, tmp_path / "compressed")
    prompt = texts[-1, :40].tolist()
    (tmp_path / "prompt.txt").write_text(" ".join(map(str, prompt)))
    example = (sys.executable, "-m")
    exported = run_in(tmp_path, *example, "examples.deployment.export", "compressed", "-o", "model.pt2")
    assert exported.returncode == 0, exported.stderr
    wanted = generated(rana.load(tmp_path / "compressed"), prompt, 32)
    for command in ((*example, "examples.deployment.run"), (program, PACKAGE)):
        done = run_in(tmp_path, *command, "model.pt2", "prompt.txt", 32)
        assert [int(token) for token in done.stdout.split()] == wanted, done.stderr
