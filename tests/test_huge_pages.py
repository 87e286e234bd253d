"""Huge pages under weights: asked for, had, and nothing else changed."""

import copy
import errno
import platform
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn

from rana_kernels.system import huge_pages
from rana_kernels.system.huge_pages import use_huge_pages

LINUX = platform.system() == "Linux"
VERSION = tuple(map(int, re.findall(r"\d+", platform.release())[:2])) if LINUX else (0, 0)


def huge_bytes() -> int:
    """Of this process, as the kernel counts them."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("AnonHugePages")).split()[1])


def places(model: nn.Module) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


@pytest.mark.skipif(VERSION < (6, 1), reason="MADV_COLLAPSE came with Linux 6.1")
@pytest.mark.parametrize(("count", "width"), [(1, 4096), (256, 256)], ids=["one large", "many small"])
def test_weights_move_to_huge_pages_and_keep_their_bits(count, width):
    model = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(count)])  # 64 MiB
    parameters = list(model.parameters())
    before, bits = huge_bytes(), [parameter.detach().clone() for parameter in parameters]
    moved = use_huge_pages(model)
    if moved == 0:
        pytest.skip("this kernel gives none")
    assert moved >= 60 * 2**20 and huge_bytes() - before >= moved // 2
    assert all(map(torch.equal, parameters, bits)) and parameters == list(model.parameters())


@pytest.mark.skipif(not huge_pages.available(), reason="this machine gives no huge pages")
def test_weights_lie_in_the_order_of_the_modules():
    model = nn.Sequential(*(nn.Linear(512, 512, dtype=torch.bfloat16) for _ in range(8)))
    use_huge_pages(model)
    assert places(model) == sorted(places(model)) and all(place % 64 == 0 for place in places(model))
    last, state = model[7].bias, model.state_dict()
    assert last.data_ptr() + last.nbytes - places(model)[0] == sum(t.nbytes for t in state.values())


def test_weights_that_are_tied_count_once_and_small_ones_not():
    model = nn.ModuleList([nn.Linear(2048, 2048, bias=False) for _ in range(2)])
    model[1].weight = model[0].weight
    assert use_huge_pages(model) <= model[0].weight.nbytes
    assert model[1].weight is model[0].weight
    assert use_huge_pages(nn.Linear(16, 16)) == 0
    with torch.device("meta"):
        assert use_huge_pages(nn.Linear(4096, 4096)) == 0


def test_weights_that_share_memory_stay():
    """They would no longer follow one another."""
    both = torch.randn(2, 1024, 1024)
    model = nn.ModuleList([nn.Linear(1024, 1024, bias=False) for _ in range(2)])
    for linear, weight in zip(model, both, strict=True):
        linear.weight = nn.Parameter(weight)
    assert use_huge_pages(model) == 0
    assert places(model) == [weight.data_ptr() for weight in both]


def test_a_model_on_huge_pages_trains_is_copied_and_is_saved(tmp_path):
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024))
    use_huge_pages(model)
    twin = copy.deepcopy(model)
    model(torch.ones(1024)).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert not torch.equal(model[0].weight, twin[0].weight)
    save_model(model, tmp_path / "model.safetensors")
    load_model(twin, tmp_path / "model.safetensors")
    assert torch.equal(model[0].weight, twin[0].weight)


def test_a_machine_without_memory_leaves_them_where_they_are(monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(huge_pages.mmap, "mmap", refuse)
    model = nn.Linear(2048, 2048)
    before = places(model)
    assert use_huge_pages(model) == 0 and places(model) == before
