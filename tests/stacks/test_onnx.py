"""The ops as ONNX operators, run by onnxruntime: the same numbers, the same masks, NaN kept."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rana_kernels as rana
from rana_kernels import ops
from rana_kernels.model.plan import Plan
from tests.cases import DTYPES, FORMS, QUANTIZED_FORMS, assert_close, exact_result, input_of, make_inputs
from tests.test_compress import hand_plan, make_model, tokens

onnxruntime = pytest.importorskip("onnxruntime")
translation_table = import_module("rana_kernels.integrations.onnx").translation_table
CASES = {name: replace(case, lead=(5,)) for name, case in (FORMS | QUANTIZED_FORMS).items()}
ODD = {"lowrank": {"K": 47}, "dense": {"K": 33}}  # a 4-bit weight with an odd width along the sum
CASES |= {
    f"{name}_odd": replace(QUANTIZED_FORMS[f"{name}_int4"], lead=(5,), **sizes) for name, sizes in ODD.items()
}


class Calls(nn.Module):
    """The ops of `problems` with their arguments, one after the other; float32 goes in and comes out."""

    def __init__(self, problems: list[tuple[str, dict]]) -> None:
        super().__init__()
        self.calls = [(op, list(args.values())[1:]) for op, args in problems]
        self.dtypes = [args[input_of(args)].dtype for _, args in problems]
        for i, (_, rest) in enumerate(self.calls):
            for k, value in enumerate(rest):
                if isinstance(value, Tensor):
                    self.register_buffer(f"tensor_{i}_{k}", value)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        calls = zip(self.calls, inputs, self.dtypes, strict=True)
        return tuple(
            getattr(torch.ops.rana, op).default(x.to(dtype), *rest).float() for (op, rest), x, dtype in calls
        )


def session(module: nn.Module, inputs: tuple, path: Path, **options) -> "onnxruntime.InferenceSession":
    table = translation_table()
    program = torch.onnx.export(module, inputs, dynamo=True, custom_translation_table=table, **options)
    assert {node.domain for node in program.model.graph} == {""}  # standard operators alone
    program.save(path)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(session: "onnxruntime.InferenceSession", inputs: list[Tensor]) -> list[Tensor]:
    names = [given.name for given in session.get_inputs()]
    feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, feed)]


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def exported(request, tmp_path_factory):
    """(dtype, problems, session): every form of every op, with integers and with Gaussian numbers."""
    dtype = request.param
    problems = [(c.op, make_inputs(c, dtype, integers=i)) for i in (True, False) for c in CASES.values()]
    inputs = tuple(args[input_of(args)].float() for _, args in problems)
    path = tmp_path_factory.mktemp("onnx") / "ops.onnx"
    return dtype, problems, session(Calls(problems), inputs, path)


def test_the_table_is_the_list_of_ops():
    assert list(translation_table()) == [getattr(torch.ops.rana, op).default for op in ops.SCHEMAS]


def test_exact_on_integers_and_close_on_the_rest(exported):
    dtype, problems, runtime = exported
    results = run(runtime, [args[input_of(args)].float() for _, args in problems])
    for i, ((op, args), y) in enumerate(zip(problems, results, strict=True)):
        if i < len(CASES):
            assert torch.equal(y.to(dtype), exact_result(op, args, dtype)), op
        else:
            assert_close(y.to(dtype), op, args, dtype)


def test_nan_reaches_its_row_and_no_other(exported):
    _, problems, runtime = exported
    inputs = [args[input_of(args)].float() for _, args in problems]
    clean = run(runtime, inputs)
    for x in inputs:
        x[2, 1] = float("nan")
    for (op, _), y, before in zip(problems, run(runtime, inputs), clean, strict=True):
        assert y[2].isnan().all(), op
        others = torch.arange(5) != 2
        assert torch.equal(y[others], before[others]), op


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.mark.parametrize("architecture", ["Llama", "GPTNeoX", "Llama of joint neurons"])
def test_a_model_of_any_length(architecture, tmp_path):
    model = make_model(architecture.partition(" ")[0])
    asked = {"flops_reduction": 0.3, "method": "paper"}
    if "neurons" in architecture:
        made = hand_plan(model, joint=True, o="neuron", first="neuron")
        asked = {"plan": Plan(tuple(replace(a, threshold=None, live=0.6 * a.rank) for a in made.adapters))}
    rana.compress(model, [tokens()], progress=False, **asked)
    shapes = {"input_ids": {1: torch.export.Dim("tokens", min=1, max=64)}}
    runtime = session(Logits(model), (tokens(1, 8),), tmp_path / "model.onnx", dynamic_shapes=shapes)
    for length in (1, 8, 40):
        (logits,) = run(runtime, [tokens(1, length)])
        error = (logits - Logits(model)(tokens(1, length))).abs().amax(-1)[0]
        # a score at its threshold may be rounded to the other side of it, which moves that token alone
        assert error.median() < 1e-5 and error.max() < 1e-2, error
