"""The kernel for Hugging Face's `kernels` library: compiled here, loaded by the library, put into a model."""

import pytest
import torch
from torch import nn

import rana_kernels as rana
from hub_kernel.tree import write_tree
from hub_kernel.variant import build_variant
from rana_kernels.nn.dense import DenseLinear
from rana_kernels.ops import reference
from tests.cases import FORMS, QUANTIZED_FORMS, make_inputs
from tests.test_compress import make_model, tokens

kernels = pytest.importorskip("kernels")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """The tree with a CPU variant for the baseline and AVX2, little optimised to save time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXXFLAGS", "-O1")
        tree = write_tree(tmp_path_factory.mktemp("hub") / "tree", sets=["avx2"])
        build_variant(tree)
    return tree


@pytest.fixture(scope="module")
def kernel(repository):
    return kernels.get_local_kernel(repository)


def test_the_compiled_ops_serve(kernel):
    dump = torch._C._dispatch_dump(f"{kernel.__name__}::masked_mlp")
    line = next(line for line in dump.splitlines() if line.startswith("CPU:"))
    assert "torch_binding.cpp" in line and kernel.__name__ != "rana"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [*FORMS, *QUANTIZED_FORMS])
def test_ops_are_exact_on_whole_numbers(kernel, form, dtype):
    case = {**FORMS, **QUANTIZED_FORMS}[form]
    args = make_inputs(case, dtype, integers=True)
    found, wanted = getattr(kernel, case.op)(**args), getattr(reference, case.op)(**args)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_ops_compile_and_have_gradients(kernel):
    args = make_inputs(FORMS["lowrank"], torch.float32)
    args["x"].requires_grad_()
    compiled = torch.compile(
        lambda **a: kernel.masked_lowrank_linear(**a), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(**args), kernel.masked_lowrank_linear(**args))
    compiled(**args).sum().backward()
    assert args["x"].grad.abs().sum() > 0


@pytest.mark.parametrize("bits", [16, 4])
def test_kernelize_puts_the_layers_into_a_compressed_model(repository, kernel, bits, monkeypatch):
    model = make_model()
    rana.compress(model, [tokens(2)], flops_reduction=0.3, bits=bits, progress=False)
    wanted = model(tokens(1)).logits
    used = {type(m).__name__: type(m) for m in model.modules() if hasattr(kernel.layers, type(m).__name__)}
    assert "RanaMLP" in used or "RanaNeuronLinear" in used
    mapping = {}
    for name, module in [*used.items(), ("Linear", nn.Linear), ("Linear", DenseLinear)]:
        monkeypatch.setattr(module, "kernel_layer_name", None, raising=False)
        kernels.replace_kernel_forward_from_hub(module, name)
        mapping[name] = {"cpu": kernels.LocalLayerRepository(repository, layer_name=name)}
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu")
    replaced = [m for m in model.modules() if m.forward.__func__.__module__ == f"{kernel.__name__}.layers"]
    assert replaced
    torch.testing.assert_close(model(tokens(1)).logits, wanted, rtol=1e-3, atol=1e-3)
