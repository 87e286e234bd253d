"""Several processes on one machine: tensor parallelism, DTensor, calibration. They talk over gloo."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import rana_kernels as rana
from rana_kernels.integrations.tensor_parallel import modules
from rana_kernels.model.plan import Plan
from rana_kernels.statistics.processes import exact
from tests.test_compress import hand_plan, make_model, tokens

pytest.importorskip("accelerate", reason="transformers shares models among devices with accelerate")
ROOT = Path(__file__).parent.parent


def ranks_only(model: nn.Module) -> Plan:
    """32 ranks everywhere but in down, half of them live: q, k and v together, o, up and gate together."""
    adapters = [
        replace(a, rank=32, live=16.0, threshold=None) if a.kind == "rank" else a
        for a in hand_plan(model, joint=True, o="rank").adapters
    ]
    return Plan(tuple(adapters))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("models")
    for name in ("Llama", "GPTNeoX"):
        for method in ("global", "paper"):
            model = make_model(name, tie_word_embeddings=name == "Llama")
            rana.compress(model, [tokens()], flops_reduction=0.3, method=method, progress=False)
            rana.save(model, place / f"{name}-{method}")
    model = make_model("Llama")
    rana.compress(model, [tokens()], plan=ranks_only(model), progress=False)
    rana.save(model, place / "Llama-ranks")
    return place


def test_two_processes(models, tmp_path):
    """two_processes.py, in both. No process outlives this test."""
    path = ":".join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(":")])
    shared = {
        "RANA_TEST_MODELS": str(models), "RANA_TEST_STORE": str(tmp_path / "store"), "WORLD_SIZE": "2",
        "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": path,
    }  # fmt: skip
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/two_processes.py"]
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    processes = [
        subprocess.Popen(
            pytest_, cwd=ROOT, stdout=log.open("w"), stderr=subprocess.STDOUT,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, log in enumerate(logs)
    ]  # fmt: skip
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-4000:] for log in logs)
    assert all(" passed" in log.read_text() for log in logs)


def test_sums_of_moments_are_exact():
    """The same bits in every order, which float64 alone does not give, and within the error of float32."""
    x = torch.randn(64, 2, 128) * torch.logspace(-6, 6, 128) * torch.logspace(-1.2, 1.2, 64)[:, None, None]
    products, orders = [batch.T @ batch for batch in x], [torch.randperm(64) for _ in range(5)]
    sums = [sum(exact(products[i]) for i in order) for order in orders]
    plain = [sum(products[i].double() for i in order) for order in orders]
    assert all(torch.equal(sums[0], other) for other in sums)
    assert not all(torch.equal(plain[0], other) for other in plain)
    wanted = torch.einsum("bti,btj->ij", x.double(), x.double())
    scale = wanted.diagonal().sqrt()
    assert ((sums[0] - wanted).abs() < 1e-6 * scale[:, None] * scale).all()
    assert torch.equal(exact(torch.zeros(3, 3)), torch.zeros(3, 3).double())


def test_cards_project_without_a_copy_of_the_weights():
    """Their product has an output of its own dtype; without a card its shapes and dtypes are played."""
    with FakeTensorMode():
        x, B = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in ((2, 3, 8), (16, 8)))
        h = modules._project(x, B)
    assert (h.shape, h.dtype) == ((2, 3, 16), torch.float32)
