"""One model in several threads: run, calibrated and measured, and each thread sees its own tokens alone."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch
from torch import nn

import rana_kernels as rana
from rana_kernels.evaluation.live import count_live
from rana_kernels.statistics.calibration import Stats
from tests.test_compress import make_model, tokens

THREADS = 4


@pytest.fixture(scope="module")
def model() -> nn.Module:
    model = make_model()
    rana.compress(model, [tokens()], flops_reduction=0.3, method="paper", progress=False)
    return model


def in_threads(run: Callable[[int], object]) -> list:
    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(run, range(THREADS)))


def texts(length: int = 12) -> list[torch.Tensor]:
    return [(tokens(2, length) + i).remainder(125) + 3 for i in range(THREADS)]


def run_all(models: list, repeats: int) -> bool:
    """Run each model on a text of its own in a thread of its own. Say whether every result is right."""
    asked = texts()
    with torch.no_grad():
        wanted = [models[0](ids).logits for ids in asked]

    def run(i: int) -> bool:
        with torch.no_grad():
            return all(torch.equal(models[i](asked[i]).logits, wanted[i]) for _ in range(repeats))

    return all(in_threads(run))


def test_requests_are_answered_at_once(model):
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    wanted = [model.generate(ids, **how) for ids in texts()]
    found = in_threads(lambda i: model.generate(texts()[i], **how))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def replica(module: nn.Module) -> nn.Module:
    """A copy as DataParallel makes them for each call: other modules with the attributes of these."""
    made = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        made._parameters[name] = parameter
    for name, child in module._modules.items():
        made._modules[name] = None if child is None else replica(child)
    return made


def test_replicas_run_at_once(model):
    assert run_all([model, *(replica(model) for _ in range(THREADS - 1))], 20)


@pytest.mark.slow
def test_a_whole_compiled_model_in_threads(model):
    torch._dynamo.reset()
    assert run_all([torch.compile(model, backend="eager")] * THREADS, 20)


def same(a: Stats, b: Stats) -> bool:
    pairs = [(a.inputs[key].moment, b.inputs[key].moment) for key in a.inputs]
    pairs += [(a.inputs[key].sample, b.inputs[key].sample) for key in a.inputs]
    pairs += [(a.slopes[key], b.slopes[key]) for key in a.slopes]
    pairs += [(a.gradients[key], b.gradients[key]) for key in a.gradients]
    return a.inputs.keys() == b.inputs.keys() and all(torch.equal(x, y) for x, y in pairs)


def test_a_model_is_calibrated_while_others_run_and_calibrate_it():
    model, asked, done = make_model(num_hidden_layers=1), list(tokens(8)), Event()
    model.train()
    wanted = rana.calibrate(model, asked, progress=False)

    def serve() -> int:
        served = 0
        while not done.is_set():
            with torch.no_grad():
                served += len(model(tokens(2, 9)).logits)
        return served

    with ThreadPoolExecutor(1) as server:
        served = server.submit(serve)
        try:
            found = in_threads(lambda _: rana.calibrate(model, asked, progress=False))
        finally:
            done.set()
        assert served.result() > 0
    assert all(same(stats, wanted) for stats in found)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert model.training and not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_live_rows_are_those_of_the_thread_that_counts(model):
    def count(i: int) -> int:
        with count_live(model) as counts, torch.no_grad():
            for _ in range(5):
                model(tokens(1, 5 + i))
        (found,) = {each.tokens for each in counts.values()}
        return found

    assert in_threads(count) == [5 * (5 + i) for i in range(THREADS)]
