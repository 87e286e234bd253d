"""Our models for a table with rivals: weights in 16, 8 or 4 bits, dense or masked at several costs.

A model with random weights has neuron adapters everywhere and one set of weights for all costs, which are
told apart by thresholds. A trained model is compressed for every cost.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import rana_kernels as rana
from bench.decode.models import twin
from bench.kernels.weights import threshold_for_live
from rana_kernels.compression.report import head_bytes, read_bytes
from rana_kernels.integrations.decoding import quicken
from rana_kernels.model.architectures import Block, find_blocks
from rana_kernels.model.head import head_names, untie_head
from rana_kernels.model.install import install
from rana_kernels.model.linears import linear_of
from rana_kernels.model.plan import AdapterSpec, Plan
from rana_kernels.nn.adapters import RanaNeuronLinear
from rana_kernels.nn.base import AdapterModule
from rana_kernels.nn.mlp import RanaMLP
from rana_kernels.quantization import pack_int4
from rana_kernels.statistics.calibration import Stats
from rana_kernels.system.huge_pages import use_huge_pages

GROUP = 32
SAMPLE = 32  # tokens of a prompt, and tokens written after it, that set the thresholds of a random model
Thresholds = list[tuple[AdapterModule, Tensor]]


@dataclass(frozen=True)
class Ours:
    """A model, and what to call before it is timed: the models of several costs may be one.

    read, stored   bytes of the blocks' linears and lm_head: those that a token reads, and all of them
    """

    model: PreTrainedModel
    cost_ratio: float
    read: int
    stored: int
    prepare: Callable[[], None] = lambda: None


def dense(model: PreTrainedModel, bits: int, stats: Stats | None) -> Ours:
    """Return the dense model in so many bits, rounded with its statistics, or at random without them."""
    if stats is None:
        made, plan = without_masks(model, bits)
    else:
        made, plan = twin(model), _dense_plan(model, bits)
        rana.compress(made, stats=replace(stats, model=made), plan=plan, progress=False)
    return _ours(made, plan, 1.0)


def without_masks(model: PreTrainedModel, bits: int) -> tuple[PreTrainedModel, Plan]:
    """Return the dense model in so many bits, with random weights, and its plan."""
    made, plan = twin(model), _dense_plan(model, bits)
    _install(made, plan)
    return made, plan


def masked(model: PreTrainedModel, bits: int, ratios: tuple[float, ...], stats: Stats | None) -> list[Ours]:
    """Return a model for each cost of the blocks' linears."""
    if stats is not None:
        return [_compressed(model, bits, ratio, stats) for ratio in ratios]
    made, plan = with_neurons(model, bits)
    found = []
    for ratio in ratios:
        adapters = tuple(replace(a, live=ratio * a.rank) for a in plan.adapters)
        thresholds = set_thresholds(made, ratio)
        ours = _ours(made, plan.with_adapters(adapters), ratio)
        found.append(replace(ours, prepare=lambda thresholds=thresholds: _set(thresholds)))
    return found


def in_bits(model: PreTrainedModel, bits: int, ratio: float) -> dict[str, PreTrainedModel]:
    """Return the dense model, and ones with random weights in so many bits: without masks, and with them."""
    masked, _ = with_neurons(model, bits)
    set_thresholds(masked, ratio)
    plain, _ = without_masks(model, bits)
    return {"dense": model, f"dense, {bits} bits": plain, f"masked, {bits} bits": masked}


def with_neurons(model: PreTrainedModel, bits: int) -> tuple[PreTrainedModel, Plan]:
    """Return a model with neuron adapters everywhere, random weights and no masks yet, and its plan."""
    plan = _plan(model, bits, _neurons)
    made = twin(model)
    _install(made, plan)
    return made, plan


def _ours(model: PreTrainedModel, plan: Plan, cost_ratio: float) -> Ours:
    use_huge_pages(model)
    quicken(model)
    size = model.dtype.itemsize
    head = head_bytes(model) if plan.lm_head is None else plan.lm_head.stored_bytes(size)
    stored = plan.stored_bytes(size) + head
    return Ours(model, cost_ratio, read_bytes(model, plan, size), stored)


def _compressed(model: PreTrainedModel, bits: int, ratio: float, stats: Stats) -> Ours:
    """Compress to a cost: a share of the multiply-adds of the blocks, or in few bits of their bytes."""
    made = twin(model)
    budget = "flops_reduction" if bits == 16 else "bytes_reduction"
    saved = 1 - ratio if bits == 16 else 1 - _bytes(model, bits, ratio) / _bytes(model, 16, 1.0)
    asked = {budget: saved, "bits": bits, "progress": False}
    return _ours(made, rana.compress(made, stats=replace(stats, model=made), **asked).plan, ratio)


def _bytes(model: PreTrainedModel, bits: int, ratio: float) -> float:
    """Return the bytes of lm_head in so many bits, and a share of those of the blocks' linears."""
    plan, size = _dense_plan(model, bits), model.dtype.itemsize
    blocks = plan.stored_bytes(size)
    return read_bytes(model, plan, size) - (1 - ratio) * blocks


def _dense_plan(model: PreTrainedModel, bits: int) -> Plan:
    return _plan(model, bits, lambda block: [("dense", (name,)) for name in block.linears])


def _plan(model: PreTrainedModel, bits: int, kinds: Callable[[Block], list]) -> Plan:
    specs = [_spec(model, bits, *kind) for block in find_blocks(model) for kind in kinds(block)]
    head = None if bits == 16 else _spec(model, bits, "dense", tuple(head_names(model)))
    return Plan(tuple(specs), lm_head=head)


def _neurons(block: Block) -> list[tuple[str, tuple[str, ...]]]:
    return [("neuron", names) for names in (block.qkv, (block.o,), block.expanding, (block.down,))]


def _spec(model: PreTrainedModel, bits: int, kind: str, names: tuple[str, ...]) -> AdapterSpec:
    linears = [linear_of(model, name) for name in names]
    K = linears[0].in_features
    rows = (K, float(K)) if kind == "neuron" else (0, 0.0)
    widths = tuple(linear.out_features for linear in linears)
    return AdapterSpec(kind, names, K, widths, *rows, bits=bits, group=None if bits == 16 else GROUP)


def _install(model: PreTrainedModel, plan: Plan) -> None:
    """Put the modules of a plan in place, with random weights of a size that leaves values near 1."""
    if plan.lm_head is not None:
        untie_head(model)
    install(model, plan)
    for module in model.modules():
        if isinstance(module, AdapterModule):
            for name, columns in module.matrices.items():
                _randomize(getattr(module, name), getattr(module, f"{name}_scale"), columns)
            for name, buffer in module.named_buffers(recurse=False):
                if name == "norms":
                    buffer.fill_(1.0)


@torch.no_grad()
def _randomize(weight: Tensor, scale: Tensor | None, columns: int) -> None:
    std = max(len(weight), columns) ** -0.5
    if scale is None:
        weight.normal_(std=std)
    else:
        # without a mean, or all outputs would have one direction in common
        packed = weight.dtype == torch.uint8
        if packed:
            weight.copy_(pack_int4(torch.randint(-7, 8, (len(weight), columns), dtype=torch.int8)))
        else:
            weight.random_(-127, 128)
        scale.fill_(std / (4.3 if packed else 73))  # the standard deviation of such values is 1 by it


@torch.no_grad()
def set_thresholds(model: PreTrainedModel, ratio: float) -> Thresholds:
    """Set thresholds by which each adapter keeps `ratio` of its inputs, on average of written tokens.

    What a model with random weights writes depends on its thresholds, so they are found twice.
    """
    found: Thresholds = []
    torch.manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (1, SAMPLE), device=model.device)
    for _ in range(2):
        scores = _scores(model, prompt)
        found = [(module, _threshold(torch.cat(of_one), ratio)) for module, of_one in scores.items()]
        _set(found)
    return found


def _threshold(scores: Tensor, ratio: float) -> Tensor:
    """Return a threshold for each input, alike, that keeps `ratio` of the scores [tokens, K]."""
    return threshold_for_live(round(ratio * scores.shape[1]), scores).expand(scores.shape[1])


def _scores(model: PreTrainedModel, prompt: Tensor) -> dict[AdapterModule, list[Tensor]]:
    """Return the scores of each adapter's inputs for tokens that the model writes after a prompt."""
    scores: dict[AdapterModule, list[Tensor]] = defaultdict(list)

    def keep(module: AdapterModule, h: Tensor) -> None:
        scores[module].append(h.reshape(-1, h.shape[-1]).float().abs())

    def before(module: nn.Module, inputs: tuple[Tensor]) -> None:
        if inputs[0].shape[1] > 1:
            return
        keep(module, inputs[0])
        if isinstance(module, RanaMLP):
            a = module.op_arguments()
            product = torch.ops.rana.masked_linear
            up = product(inputs[0], a.up_rows, a.threshold, a.norms, None, a.up_scale)
            gate = product(inputs[0], a.gate_rows, a.threshold, a.norms, None, a.gate_scale)
            keep(module.get_submodule(module.names[2]), nn.functional.silu(gate) * up)

    parts = [m for m in model.modules() if isinstance(m, RanaNeuronLinear | RanaMLP)]
    hooks = [part.register_forward_pre_hook(before) for part in parts]
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=SAMPLE, do_sample=False,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    for hook in hooks:
        hook.remove()
    return scores


def _set(thresholds: Thresholds) -> None:
    for module, threshold in thresholds:
        module.set_threshold(threshold)
