"""Calibration: the inputs of a model's linears as second moments and a sample of tokens.

The text is streamed: memory is O(K²) for each distinct input (q, k and v share one, up and gate share one)
plus the sample, for any number of tokens. RaNA (arXiv 2503.18216, algorithm 1) keeps all tokens, but its
decomposition needs only their second moment Σ x xᵀ. Several processes can share the work (`processes.py`) and
get the same statistics as one.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist

from rana_kernels.model.admission import admit, require_dense
from rana_kernels.model.architectures import Block, decoder_name, find_blocks, is_described
from rana_kernels.model.head import head_block
from rana_kernels.model.hooks import alone, of_this_thread
from rana_kernels.model.positions import require_ids, require_rows
from rana_kernels.statistics.fisher import Derivatives, sequences
from rana_kernels.statistics.processes import ProcessGroupSums, exact
from rana_kernels.statistics.sampling import Sampler, placed
from rana_kernels.system.progress import track
from rana_kernels.system.torch_state import plain_torch

INPUTS = ("qkv", "o", "mlp", "down")  # of the blocks
ALL_INPUTS = (*INPUTS, "lm_head")


@dataclass
class InputStats:
    """The statistics of one distinct input of a block.

    moment   Σ x xᵀ [K, K] float64 over all tokens; or Σ y yᵀ [N, N] of y = Wx if its only reader has N < K
    sample   the sampled tokens [T, K]
    """

    moment: Tensor
    sample: Tensor


@dataclass
class Stats:
    """The result of a calibration.

    model       the calibrated model, because plans need its weights too
    blocks      the blocks of that model
    head        its lm_head as a block (`model.head`), if statistics of it were asked for
    tokens      the number of tokens read, without padding
    seed        the seed of the sample
    digest      a digest of the token ids and of the sampler's settings: equal runs have equal digests
    inputs      InputStats by (index of the block, "qkv" | "o" | "mlp" | "down" | "lm_head")
    gradients   [N] float64 by full name of a linear: the mean over tokens of the squared derivative of the
                loss by each output (`fisher.py`). Empty unless `calibrate` was called with gradients=True
    slopes      [P, K] bfloat16 by full name of a linear: the derivatives of the loss by its input, through
                this linear alone, of P sampled tokens
    paired      [P, K] by (index of the block, input) but "down": the inputs of the same tokens
    importance  [T] float32 by (index of the block, input): of the tokens in `inputs` (`importance.py`)
    weighed     [K, K] float32 by (index of the block, input) but "down": mean moments of tokens weighed by
                their importance
    """

    model: nn.Module
    blocks: list[Block]
    tokens: int = 0
    seed: int = 0
    digest: str = ""
    head: Block | None = None
    inputs: dict[tuple[int, str], InputStats] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    slopes: dict[str, Tensor] = field(default_factory=dict)
    paired: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    importance: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    weighed: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def of(self, index: int, name: str) -> InputStats:
        """Return the statistics of an input of block `index`. Raise ValueError if it was not collected."""
        if (index, name) not in self.inputs:
            where = "" if name == "lm_head" else f" of layer {index}"
            raise ValueError(
                f"the statistics have nothing of the input {name!r}{where}: "
                f"calibrate with inputs=(..., {name!r})"
            )
        return self.inputs[index, name]

    def require(self, names: Iterable[str]) -> None:
        """Raise ValueError unless each input in `names` was collected for every block that has it."""
        head = head_block(self.model) if "lm_head" in names else None
        for block in [*self.blocks, *([head] if head else [])]:
            for name in set(names) & set(block.inputs):
                self.of(block.index, name)


class _Batch:
    """The facts about the running batch that the hooks read.

    tokens   bool [batch · T]: which tokens are not padding
    take     indices of tokens of this batch that enter the sample
    slots    their slots in the sample
    """

    tokens: Tensor
    take: Tensor
    slots: Tensor


@plain_torch()
def calibrate(
    model: nn.Module,
    calibration: Iterable,
    *,
    sample_tokens: int = 4096,
    seed: int = 0,
    inputs: Iterable[str] = ALL_INPUTS,
    gradients: bool = True,
    group: dist.ProcessGroup | None = None,
    progress: bool = True,
) -> Stats:
    """Run `calibration` through the blocks of `model` and collect statistics of the inputs of their linears.

    calibration     an iterable, read once, of `input_ids` ([T] or [batch, T], integers) or of dicts
                    of model inputs; tokens whose `attention_mask` is 0 are left out
    sample_tokens   size of the token sample, uniform over all tokens
    inputs          which distinct inputs to collect: "qkv", "o", "mlp" (up and gate), "down" and "lm_head"
    gradients       also collect derivatives of the loss by outputs and inputs, on the first tokens. This
                    takes one backward pass for each sequence, and a model with a language-model head
    group           processes that share the work. Each of the P processes calls this function with the same
                    model and calibration, runs every P-th item, and returns the statistics of all items, the
                    same bits as one process alone

    The defaults serve every request. `rana_kernels.allocation.methods.needs` has what one request needs.

    The model is unchanged afterwards, and other threads may run it meanwhile. Raises ValueError for an
    unknown architecture, an empty or ill-typed calibration, rows longer than the model's positions, a model
    that `model/admission.py` refuses, activations that are not finite (the message names the linear that
    reads them), or a group whose processes have different calibrations.
    """
    model = admit(model, changes=False)
    blocks = find_blocks(model)
    require_dense(model, blocks)
    return calibrate_blocks(
        model, blocks, calibration, sample_tokens=sample_tokens, seed=seed, inputs=inputs,
        gradients=gradients, group=group, progress=progress,
    )  # fmt: skip


def calibrate_blocks(
    model: nn.Module,
    blocks: list[Block],
    calibration: Iterable,
    *,
    sample_tokens: int = 4096,
    seed: int = 0,
    inputs: Iterable[str] = ALL_INPUTS,
    gradients: bool = True,
    group: dist.ProcessGroup | None = None,
    progress: bool = True,
) -> Stats:
    """Do what `calibrate` does, for a model that was admitted and whose blocks are known."""
    wanted = _wanted(inputs)
    if sample_tokens < 1:
        raise ValueError(f"calibrate: sample_tokens is {sample_tokens}, wanted at least 1")
    head = head_block(model) if "lm_head" in wanted else None
    stats, batch = Stats(model, blocks, seed=seed, head=head), _Batch()
    read = [*blocks, *([head] if head else [])]
    sampler, digest = Sampler(sample_tokens, seed), hashlib.sha256(f"{sample_tokens} {seed}".encode())
    decoder = model.get_submodule(decoder_name(model))
    device = next(decoder.parameters()).device
    sums, items = ProcessGroupSums(group, device), 0
    no_cache = {} if is_described(model) else {"use_cache": False}
    fisher = Derivatives(model, read, seed) if gradients else None
    with alone(model), _collecting(model, decoder, read, wanted, batch, stats), torch.no_grad():
        for items, kwargs in enumerate(_batches(model, calibration, progress and sums.rank == 0), 1):
            digest.update(_bytes(kwargs["input_ids"].flatten(), _unpadded(kwargs)))
            own = sums.owns(items - 1)
            kwargs = {key: v.to(device) if isinstance(v, Tensor) else v for key, v in kwargs.items()}
            for part in sequences(kwargs):
                batch.tokens = _unpadded(part)
                count = int(batch.tokens.sum())
                if own:
                    batch.take, batch.slots = sampler.select(count)
                else:
                    sampler.skip(count)
                sampled = (batch.take, batch.slots) if own else None
                if fisher and fisher.wants_more and fisher.add(part, batch.tokens, sampled):
                    continue  # the hooks have seen this pass
                if own:
                    if fisher:
                        fisher.importance.leave_out(batch.slots)
                    others = {key: value for key, value in part.items() if key != "input_ids"}
                    decoder(part["input_ids"], **others, **no_cache)
    if sampler.seen == 0:
        raise ValueError("calibrate: the calibration holds no tokens, wanted an iterable of input_ids")
    sums.require_same(digest.digest(), items)
    if fisher and fisher.tokens == 0:
        raise ValueError("calibrate: no row has two tokens, wanted longer rows: the loss needs a next token")
    for found in stats.inputs.values():
        sums.reduce(found.moment)
    sampler.merge([found.sample for found in stats.inputs.values()], sums)
    stats.tokens, stats.digest = sampler.seen, digest.hexdigest()
    if fisher:
        stats.gradients = fisher.finish(sums)
        stats.slopes, stats.paired = fisher.slopes, fisher.paired
        stats.importance, stats.weighed = fisher.importance.finish(sampler, fisher.tokens, sums)
    return stats


def _unpadded(kwargs: dict) -> Tensor:
    """Return which tokens of a batch are not padding, bool [batch · T] on the CPU."""
    ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
    return torch.ones(ids.numel(), dtype=torch.bool) if mask is None else mask.flatten().bool().cpu()


def _bytes(ids: Tensor, chosen: Tensor) -> bytes:
    return ids[chosen.to(ids.device)].to("cpu", torch.int64).numpy().tobytes()


def _wanted(inputs: Iterable[str]) -> tuple[str, ...]:
    wanted = tuple(inputs)
    unknown = [name for name in wanted if name not in ALL_INPUTS]
    if unknown or not wanted:
        known = ", ".join(ALL_INPUTS)
        raise ValueError(f"calibrate: inputs has {unknown or 'nothing'}, wanted some of {known}")
    return wanted


def _batches(model: nn.Module, calibration: Iterable, progress: bool) -> Iterator[dict]:
    if isinstance(calibration, Tensor | Mapping | str | PathLike):
        raise ValueError(
            f"calibrate: the calibration is one {type(calibration).__name__}, wanted an iterable of "
            "input_ids tensors or of dicts of model inputs: put it in a list"
        )
    if isinstance(calibration, Sequence):  # what can be read twice is checked before any of it is run
        for i, item in enumerate(calibration):
            _batch(model, item, i)
    for i, item in enumerate(track(calibration, "calibrating", progress)):
        yield _batch(model, item, i)


def _batch(model: nn.Module, item: object, i: int) -> dict:
    """Return one item of the calibration as keyword arguments of the decoder, its tensors [batch, T]."""
    kwargs: dict = dict(item) if isinstance(item, Mapping) else {"input_ids": item}
    kwargs.pop("labels", None)
    ids = kwargs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        has = f"dtype {ids.dtype}" if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
        raise ValueError(f"calibrate: input_ids of item {i} has {has}, wanted a tensor of integers")
    if ids.dim() not in (1, 2) or ids.shape[-1] == 0:
        raise ValueError(
            f"calibrate: input_ids of item {i} has shape {list(ids.shape)}, wanted [T] or [batch, T], T > 0"
        )
    require_rows(model, ids.shape[-1], f"calibrate: input_ids of item {i}")
    require_ids(model, ids, f"calibrate: input_ids of item {i}")
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(
            f"calibrate: attention_mask of item {i} has shape {list(mask.shape)}, wanted {list(ids.shape)}, "
            "that of input_ids"
        )
    batched = {key: v[None] if isinstance(v, Tensor) and v.dim() == 1 else v for key, v in kwargs.items()}
    return {**batched, "input_ids": batched["input_ids"].long()}


@contextmanager
def _collecting(
    model: nn.Module,
    decoder: nn.Module,
    blocks: list[Block],
    wanted: tuple[str, ...],
    batch: _Batch,
    stats: Stats,
):
    """Hold collecting hooks at the first reader of every wanted input, in eval mode."""
    handles, training = [], [module for module in model.modules() if module.training]
    try:
        for block in blocks:
            for name in (name for name in wanted if name in block.inputs):
                reader, *others = block.inputs[name]
                module = model.get_submodule(reader)
                narrows = not others and _narrows(module)
                collect = _hook((block.index, name), reader, module, narrows, batch, stats)
                if name == "lm_head" and decoder is not model:
                    # lm_head does not always run, and sees the output of the decoder in parts
                    handles.append(decoder.register_forward_hook(of_this_thread(_of_output(collect))))
                else:
                    handles.append(module.register_forward_pre_hook(of_this_thread(collect)))
        model.eval()
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True


def _of_output(collect: Callable[[Any, tuple[Tensor, ...]], None]):
    return lambda _decoder, _args, output: collect(None, (output.last_hidden_state,))


def _narrows(module: nn.Module) -> bool:
    """Say whether N < K. Then the moment of the outputs is smaller, and the decomposition needs no more."""
    return isinstance(module, nn.Linear) and module.out_features < module.in_features


def _hook(key: tuple[int, str], reader: str, module: Any, narrows: bool, batch: _Batch, stats: Stats):
    def collect(_module: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().reshape(-1, args[0].shape[-1])
        x = x if batch.tokens.all() else x[batch.tokens.to(x.device)]
        if key not in stats.inputs:
            size = min(module.weight.shape) if narrows else x.shape[1]
            moment = torch.zeros(size, size, dtype=torch.float64, device=x.device)
            stats.inputs[key] = InputStats(moment, x[:0])
        found = stats.inputs[key]
        # float32 products are summed in float64 without rounding, so the order of batches does not matter
        for chunk in x.float().split(2048):
            seen = F.linear(chunk, module.weight.float()) if narrows else chunk
            product = seen.T @ seen
            if not product.diagonal().isfinite().all():
                raise ValueError(
                    f"calibrate: the input of {reader} holds values that are not finite, or too large"
                )
            found.moment += exact(product)
        found.sample = placed(found.sample, batch.slots, x[batch.take.to(x.device)])

    return collect
