"""Parts of the work of several processes that one process can test (the rest: test_two_processes.py)."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rana_kernels.integrations.tensor_parallel import modules
from rana_kernels.statistics.processes import exact

pytest.importorskip("accelerate", reason="transformers shares models among devices with accelerate")


def test_sums_of_moments_are_exact():
    """The same bits in every order, which float64 alone does not give, and within the error of float32."""
    x = torch.randn(64, 2, 128) * torch.logspace(-6, 6, 128) * torch.logspace(-1.2, 1.2, 64)[:, None, None]
    products, orders = [batch.T @ batch for batch in x], [torch.randperm(64) for _ in range(5)]
    sums = [sum(exact(products[i]).double() for i in order) for order in orders]
    plain = [sum(products[i].double() for i in order) for order in orders]
    assert all(torch.equal(sums[0], other) for other in sums)
    assert not all(torch.equal(plain[0], other) for other in plain)
    wanted = torch.einsum("bti,btj->ij", x.double(), x.double())
    scale = wanted.diagonal().sqrt()
    assert ((sums[0] - wanted).abs() < 1e-6 * scale[:, None] * scale).all()
    assert torch.equal(exact(torch.zeros(3, 3)), torch.zeros(3, 3))


def test_cards_project_without_a_copy_of_the_weights():
    """Their product has an output of its own dtype; without a card its shapes and dtypes are played."""
    with FakeTensorMode():
        x, B = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in ((2, 3, 8), (16, 8)))
        h = modules._project(x, B, None)
    assert (h.shape, h.dtype) == ((2, 3, 16), torch.float32)
