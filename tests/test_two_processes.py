"""Tensor parallelism, DTensor and calibration in two processes (`two_processes.py`)."""

import os
import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from transformers import AutoModelForCausalLM

import rana_kernels as rana
from rana_kernels.checkpoint.attachment import attached_plan
from rana_kernels.integrations.tensor_parallel import modules, shares
from rana_kernels.model.plan import AdapterSpec, Plan
from rana_kernels.nn.adapters import RanaLinear, RanaNeuronLinear, joint_linears
from rana_kernels.nn.base import fill_module
from rana_kernels.nn.dense import QuantizedLinear
from rana_kernels.nn.format import Format
from rana_kernels.nn.mlp import RanaMLP
from rana_kernels.quantization import quantize
from rana_kernels.statistics import fisher
from tests import two_processes
from tests.cases import scale_of
from tests.test_compress import hand_plan, make_model, quantised_head, tokens

pytest.importorskip("accelerate", reason="transformers shares models among devices with accelerate")
pytestmark = pytest.mark.two_processes
PLACE = Path(os.environ.get("RANA_TEST_MODELS", ""))
MODELS = ("GPTNeoX-global", "GPTNeoX-paper", "Llama-global", "Llama-neurons", "Llama-paper", "Llama-ranks")
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
QUANTIZED = (
    "Llama-neurons-4", "Llama-neurons-8", "Llama-ranks-4", "Llama-ranks-8", "Phi3-packed-4", "Phi3-packed-8",
    "Qwen2-mixed-4", "Qwen2-row-4", "Qwen2-row-8",
)  # fmt: skip
every_model = pytest.mark.parametrize("name", MODELS)


def prepare(folder: Path) -> dict[str, str]:
    """Save the models that both processes load."""
    place = folder / "models"
    for name in MODELS:
        architecture, method = name.split("-")
        plan_of = PLANS.get(method)
        tied = {} if plan_of else {"tie_word_embeddings": architecture == "Llama"}
        model = make_model(architecture, **tied)
        asked = {"plan": plan_of(model)} if plan_of else {"flops_reduction": 0.3, "method": method}
        rana.compress(model, [tokens()], progress=False, **asked)
        rana.save(model, place / name)
    for name in QUANTIZED:
        rana.save(quantised(*name.split("-")), place / name)
    return {"RANA_TEST_MODELS": str(place)}


def ranks_only(model: nn.Module) -> Plan:
    """32 ranks everywhere but in down, half of them live: q, k and v together, o, up and gate together."""
    adapters = [
        replace(a, rank=32, live=16.0, threshold=None) if a.kind == "rank" else a
        for a in hand_plan(model, joint=True, o="rank").adapters
    ]
    return Plan(tuple(adapters))


def neurons_only(model: nn.Module) -> Plan:
    """Neurons everywhere, half of them live: q, k and v together, up and gate together."""
    made = hand_plan(model, joint=True, o="neuron", first="neuron")
    return Plan(tuple(replace(a, live=a.rank / 2, threshold=None) for a in made.adapters))


def half_live(adapters: list[AdapterSpec]) -> Plan:
    return Plan(tuple(replace(a, live=a.rank / 2, threshold=None) if a.rank else a for a in adapters))


def packed(model: nn.Module) -> Plan:
    """Ranks for q, k and v, and for gate and up; neurons for down; o stays dense."""
    return half_live(hand_plan(model).adapters)


def mixed(model: nn.Module) -> Plan:
    """Dense linears stand where the other layer has adapters, and down is one of ranks in a layer."""
    first = hand_plan(model, o="dense", down="rank").adapters
    second = hand_plan(model, joint=True, o="neuron", down="dense", first="neuron").adapters
    layers = [[a for a in first if ".layers.0." in a.names[0]], [a for a in second if ".1." in a.names[0]]]
    return half_live([*layers[0], *layers[1]])


PLANS = {"ranks": ranks_only, "neurons": neurons_only, "row": ranks_only, "packed": packed, "mixed": mixed}
ROOMY = {"num_key_value_heads": 4, "intermediate_size": 192}  # half of every width is a multiple of 32


IN_RANKS = ("Llama-ranks-4", "Phi3-packed-4", "Qwen2-mixed-4", "Qwen2-row-4")


def quantised(architecture: str, plan: str, bits: str) -> nn.Module:
    """Every weight in so many bits, lm_head too."""
    model, group = make_model(architecture, **ROOMY), None if plan == "row" else 32
    made = PLANS[plan](model)
    formatted = tuple(adapter.with_format(Format(int(bits), group)) for adapter in made.adapters)
    whole = replace(made, adapters=formatted, lm_head=quantised_head(model, int(bits), group))
    rana.compress(model, [tokens()], plan=whole, progress=False)
    return model


@pytest.fixture(scope="session", autouse=True)
def group():
    if not two_processes.inside():
        yield None
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(os.environ[two_processes.STORE], size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    yield dist.group.WORLD
    dist.destroy_process_group()


def load(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(PLACE / name, tp_plan="auto", dtype=dtype)


@pytest.mark.parametrize("name", ["Llama-global", "Llama-paper"])
def test_layers_dealt_out_to_processes_give_the_same_tokens(name):
    pytest.importorskip("transformers.distributed.pipeline_parallel", reason="added after transformers 5.0")
    from transformers.distributed import DistributedConfig

    part = AutoModelForCausalLM.from_pretrained(PLACE / name, distributed_config=DistributedConfig(pp_size=2))
    whole, ids = rana.load(PLACE / name), tokens(2, 8)
    assert torch.equal(part.generate(ids, **GREEDY), whole.generate(ids, **GREEDY))
    assert held(part.base_model) < 0.6 * held(whole.base_model)


def held(model: nn.Module) -> int:
    """Values of the adapters, and of the dense linears among them."""
    kinds = (modules.Piece, RanaLinear, RanaNeuronLinear, RanaMLP, QuantizedLinear, nn.Linear)
    tensors = {t for m in model.modules() if isinstance(m, kinds) for t in [*m.parameters(), *m.buffers()]}
    return sum(t.numel() for t in tensors)


@every_model
def test_the_tokens_are_those_of_one_process(name):
    whole, share, ids = rana.load(PLACE / name, dtype=torch.float32), load(name), tokens(2, 8)
    assert torch.equal(share.generate(ids, **GREEDY), whole.generate(ids, **GREEDY))
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(share.generate(ids, **GREEDY, **static), whole.generate(ids, **GREEDY))
    with torch.no_grad():
        torch.testing.assert_close(share(ids).logits, whole(ids).logits, rtol=1e-5, atol=1e-5)
    assert share.tp_plan and held(share.base_model) < 0.6 * held(whole.base_model)


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantised_models_are_shared_and_stay_packed(name):
    """Kernels round the sums of 4-bit rows by the tokens of a call, so logits differ a little."""
    whole, share, ids = rana.load(PLACE / name), load(name), tokens(2, 8)
    assert torch.equal(share.generate(ids, **GREEDY), whole.generate(ids, **GREEDY))
    with torch.no_grad():
        wanted, found = whole(ids).logits, share(ids).logits
    assert (found - wanted).norm() < 1e-3 * wanted.norm()
    assert held(share.base_model) < 0.6 * held(whole.base_model) and held(share) < 0.6 * held(whole)
    rows = {torch.int8} if name in IN_RANKS or name.endswith("8") else set()  # of ranks they stay in 8 bits
    kinds = rows | ({torch.uint8} if name.endswith("4") else set())
    pieces = [m for m in share.modules() if isinstance(m, modules.Piece) and m.matrices]
    matrices = [tensor for m in pieces for n, tensor in m.named_buffers() if n in m.matrices]
    assert len(matrices) >= 2 * 3 and {tensor.dtype for tensor in matrices} == kinds
    share.to(torch.bfloat16)
    assert {m.get_buffer(f"{n}_scale").dtype for m in pieces for n in m.matrices} == {torch.float16}


@pytest.mark.parametrize("name", ["Llama-ranks", "Llama-neurons", "GPTNeoX-paper"])
def test_bfloat16_is_as_close_to_float32_as_in_one_process(name):
    ids = tokens(2, 40)
    with torch.no_grad():
        wanted = rana.load(PLACE / name, dtype=torch.float32)(ids).logits
        alone = rana.load(PLACE / name, dtype=torch.bfloat16)(ids).logits.float() - wanted
        shared = load(name, torch.bfloat16)(ids).logits.float() - wanted
    assert 0 < shared.norm() < 1.5 * alone.norm()


@contextmanager
def counted():
    """The bytes that each process sends in a ring, by collective."""
    sent, size = Counter(), dist.get_world_size()
    real = modules._all_gather, modules._reduce_scatter, modules._all_reduce

    def gather(whole, share, group):
        sent["gather"] += share.nbytes * (size - 1)
        real[0](whole, share, group=group)

    def scatter(share, whole, group):
        sent["scatter"] += share.nbytes * (size - 1)
        real[1](share, whole, group=group)

    def total(tensor, group):
        sent["sum"] += 2 * tensor.nbytes * (size - 1) // size
        real[2](tensor, group=group)

    with mock.patch.multiple(modules, _all_gather=gather, _reduce_scatter=scatter, _all_reduce=total):
        yield sent


def place(adapter: AdapterSpec) -> str:
    """The linear, of any layer: transformers shares those that are dense in every layer by itself."""
    return re.sub(r"\d+", "*", adapter.names[0])


@every_model
def test_what_is_sent_is_what_the_page_says(name, group):
    model = load(name, torch.bfloat16)
    with counted() as sent, torch.no_grad():
        model(tokens(3, 5))
    share, wanted = (group.size() - 1) / group.size(), Counter()
    adapters = attached_plan(model).adapters
    ours = {place(adapter) for adapter in adapters if adapter.kind != "dense"}
    for adapter in (adapter for adapter in adapters if place(adapter) in ours):
        row = adapter.names[0].endswith(("o_proj", "down_proj", "attention.dense", "dense_4h_to_h"))
        if adapter.kind == "rank":
            wanted["scatter" if row else "gather"] += share * adapter.rank * (4 if row else 2)
        if row:
            wanted["sum"] += 2 * share * adapter.width * 4
    assert wanted["sum"] and (name != "Llama-ranks" or wanted["gather"] and wanted["scatter"])
    assert sent == {way: 15 * count for way, count in wanted.items()}


# each module by itself


def filled(module: nn.Module) -> nn.Module:
    """Random weights, and thresholds that half of the rows pass."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name.endswith("threshold"):
            tensor.data.fill_(0.7)
        elif name.endswith("norms"):
            tensor.data.uniform_(0.5, 1)
        else:
            tensor.data.normal_()
            tensor.data.div_(tensor.shape[-1] ** 0.5 if tensor.ndim > 1 else 1)
    return module.requires_grad_(False)


def shared(module: nn.Module, style: str) -> nn.Module:
    state = module.state_dict(prefix="m.")
    return shares.form(style, shares.Shares("m", module, state.__getitem__, dist.group.WORLD))


def mine(x: torch.Tensor) -> torch.Tensor:
    return x.chunk(dist.get_world_size(), -1)[dist.get_rank()]


KINDS = {
    "rank": lambda: RanaLinear(24, 32, 16, bias=True),
    "neuron": lambda: RanaNeuronLinear(24, 32, bias=True),
    "dense": lambda: nn.Linear(24, 32),
}


@pytest.mark.parametrize("style", ["colwise", "colwise_rep", "rowwise", "rowwise_rep"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_in_every_style(kind, style):
    module, x = filled(KINDS[kind]()), torch.randn(2, 3, 24)
    wanted, part = module(x), shared(module, style)
    y = part(mine(x) if style == "rowwise" else x)
    torch.testing.assert_close(y, mine(wanted) if style == "colwise" else wanted)


@pytest.mark.parametrize("style", ["colwise", "colwise_rep"])
@pytest.mark.parametrize("rank", [16, None], ids=["ranks", "neurons"])
def test_every_part_of_a_joint_linear_is_cut(style, rank):
    module, x = filled(joint_linears(24, (16, 8, 8), rank, True)[0]), torch.randn(5, 24)
    parts = [module(x), module.handoff.take(x, 0), module.handoff.take(x, 1)]
    own = shared(module, style)(x)
    for y, wanted in zip([own, module.handoff.take(x, 0), module.handoff.take(x, 1)], parts, strict=True):
        torch.testing.assert_close(y, mine(wanted) if style == "colwise" else wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"gate_rank": 32},
        {"gate_rank": 16, "joint": True},
        {"gate_rank": 16, "joint": True, "names": ("both", "both", "down")},
        {"gate_rank": None},
        {"up_rank": 24, "gate_rank": 24, "joint": True, "kind": "neuron"},
        {"up_rank": 24, "gate_rank": None, "kind": "neuron"},
    ],
    ids=["separate", "joint", "packed", "ungated", "neurons", "neurons ungated"],
)
def test_a_whole_mlp(options):
    sizes = {"up_rank": 16, **options}
    mlp = filled(RanaMLP(24, 48, 24, activation="silu", bias=(True, True, True), **sizes))
    x = torch.randn(2, 3, 24)
    torch.testing.assert_close(shared(mlp, "colwise")(x), mlp(x))


@pytest.mark.parametrize("style", ["colwise_rep", "rowwise_rep"])
def test_the_mask_is_decided_on_complete_rank_values_in_float32(style):
    module, x = filled(RanaLinear(24, 32, 16)).bfloat16(), torch.randint(1, 65, (1, 24)).bfloat16()
    module.B.copy_(torch.randint(-8, 9, module.B.shape))
    h = (x.float() @ module.B.float().T).abs()[0]  # whole numbers, that bfloat16 has to round
    assert not torch.equal(h, h.bfloat16().float())
    passes = torch.arange(16) % 2 == 0
    module.set_threshold(torch.where(passes, h - 0.5, h + 0.5).clamp_min(0))
    ranks = shared(module, style).inner[0]
    z = ranks(x if style == "colwise_rep" else mine(x))
    kept = passes & (h > 0)
    assert torch.equal(z[0] != 0, kept if style == "colwise_rep" else mine(kept))


# what is refused


def test_gradients_are_refused():
    part = shared(filled(KINDS["rank"]()), "colwise")
    with pytest.raises(RuntimeError, match="for inference"):
        part(torch.randn(2, 24, requires_grad=True))
    with pytest.raises(RuntimeError, match="does not require grad"):
        load("Llama-global")(input_ids=tokens(1, 8), labels=tokens(1, 8)).loss.backward()


def test_a_share_of_a_model_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="load it without tp_plan"):
        load("Llama-paper").save_pretrained(tmp_path)


@pytest.mark.parametrize("dimension", ["ranks", "outputs"])
def test_what_the_processes_cannot_share_is_refused(dimension):
    module = RanaLinear(24, 32, 15) if dimension == "ranks" else RanaLinear(24, 31, 16)
    with pytest.raises(ValueError, match="m: (15|31) rows or columns are to be shared among 2 processes"):
        shared(module, "colwise")
    with pytest.raises(ValueError, match="style in the plan is 'packed_colwise', wanted one of colwise"):
        shared(module, "packed_colwise")


@pytest.mark.parametrize(
    ("format", "width", "wanted"),
    [(Format(8, 32), 48, 32), (Format(4, 32), 48, 32), (Format(4, None), 48, 32), (Format(8, 128), 192, 128)],
)
def test_a_group_of_columns_is_not_divided(format, width, wanted):
    module = RanaNeuronLinear(24, 2 * width, format=format)
    message = rf"m: rows is divided into {width} columns a process, wanted a multiple of {wanted}"
    for style in ("colwise", "colwise_rep"):
        with pytest.raises(ValueError, match=message):
            shared(module, style)
    with pytest.raises(ValueError, match="m: qweight is divided into 48 columns a process, wanted a mult"):
        shared(QuantizedLinear(96, 32, False, Format(8, 32)), "rowwise")


def test_a_row_with_one_step_is_divided_anywhere_in_eight_bits():
    module, x = RanaNeuronLinear(24, 36, format=Format(8, None)), torch.randn(3, 24)
    rows, scale = quantize(torch.randn(24, 36), 8, None)
    fill_module(module, rows=rows, rows_scale=scale, threshold=torch.full((24,), 0.7), norms=torch.ones(24))
    torch.testing.assert_close(shared(module, "colwise_rep")(x), module(x))


def test_heads_that_the_processes_cannot_share_are_refused():
    with (
        mock.patch.object(shares, "processes", lambda model: 3),
        pytest.raises(ValueError, match="3 processes"),
    ):
        load("Llama-paper")


def test_a_plan_of_ones_own_is_refused():
    with pytest.raises(ValueError, match="wanted 'auto'"):
        AutoModelForCausalLM.from_pretrained(
            PLACE / "Llama-paper", tp_plan={"model.layers.*.mlp.up_proj": "colwise"}
        )


# DTensor

CASES = {
    "masked_linear": [(2, 4, 16), (16, 12), 16, 16, 12],
    "masked_lowrank_linear": [(2, 4, 8), (16, 8), (16, 12), 16, 12],
    "masked_mlp": [(2, 4, 8), (16, 8), (8, 12), (8, 12), 16, None, 12, 12, (12, 8), 12, 12, 8],
    "linear": [(2, 4, 8), (6, 8), 6],
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("op", CASES)
def test_an_op_on_dtensors_is_right_whatever_is_cut(op, bits, bias):
    mesh, call = init_device_mesh("cpu", (dist.get_world_size(),)), getattr(torch.ops.rana, op)
    names = [argument.name for argument in call.default._schema.arguments]
    given = {
        name: None if shape is None or ("bias" in name and not bias) else drawn(name, shape)
        for name, shape in zip(names, CASES[op], strict=False)
    }
    if bits < 16:
        for name in [name for name in given if name in ("B", "weight") or name.endswith("rows")]:
            given[name], given[scale_of(name)] = quantize(given[name], bits, 32)
    arguments = [given.get(name, "silu" if name == "activation" else None) for name in names]
    wanted = call(*arguments)
    for i, cut in enumerate(arguments):
        for dimension in range(cut.ndim if isinstance(cut, torch.Tensor) else 0):
            places = [[Shard(dimension) if j == i else Replicate()] for j in range(len(arguments))]
            placed = [
                distribute_tensor(a, mesh, p) if isinstance(a, torch.Tensor) else a
                for a, p in zip(arguments, places, strict=True)
            ]
            torch.testing.assert_close(call(*placed).full_tensor(), wanted)


def drawn(name: str, shape: int | tuple[int, ...]) -> torch.Tensor:
    return torch.rand(shape) - (0.5 if "threshold" not in name else 0)


def test_ranks_are_cut_without_being_brought_together():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    h, rows, threshold = torch.randn(3, 16), torch.randn(16, 8), torch.full((16,), 0.5)
    placed = [distribute_tensor(t, mesh, [Shard(t.ndim - 1 if t is h else 0)]) for t in (h, rows, threshold)]
    assert torch.ops.rana.masked_linear(*placed).placements == (Partial(),)


# calibration


@pytest.mark.parametrize("name", ["Llama", "GPTNeoX"])
def test_calibration_by_all_is_that_of_one_bit_for_bit(name, group):
    model, items = make_model(name), list(tokens(10, 40).split([1, 2, 3, 1, 3]))
    mask = torch.ones_like(items[2])
    mask[0, 25:] = 0
    items[2] = {"input_ids": items[2], "attention_mask": mask}
    options = {"sample_tokens": 100, "progress": False}
    alone, together = (
        rana.calibrate(model, items, **options),
        rana.calibrate(model, items, **options, group=group),
    )
    assert (alone.tokens, alone.digest) == (together.tokens, together.digest)
    assert (
        alone.inputs.keys() == together.inputs.keys() and alone.gradients.keys() == together.gradients.keys()
    )
    for key, found in alone.inputs.items():
        assert torch.equal(found.moment, together.inputs[key].moment), key
        assert torch.equal(found.sample, together.inputs[key].sample), key
    for key, gradient in alone.gradients.items():
        assert torch.equal(gradient, together.gradients[key]), key
    assert alone.slopes.keys() == together.slopes.keys() and alone.paired.keys() == together.paired.keys()
    for key, slopes in alone.slopes.items():
        assert torch.equal(slopes, together.slopes[key]), key
    for place, x in alone.paired.items():
        assert torch.equal(x, together.paired[place]), place
    assert alone.weighed.keys() == together.weighed.keys() == alone.paired.keys()
    for place, weights in alone.importance.items():
        assert torch.equal(weights, together.importance[place]), place
    for place, moment in alone.weighed.items():
        assert torch.equal(moment, together.weighed[place]), place
    plans = [rana.plan(stats, flops_reduction=0.4, progress=False) for stats in (alone, together)]
    assert plans[0].to_json() == plans[1].to_json()


def test_only_the_first_tokens_are_differentiated_whoever_has_them(group):
    model, options = make_model("Llama"), {"inputs": ["qkv"], "progress": False}
    with mock.patch.object(fisher, "TOKENS", 10):  # all of them in the first row, of the first process
        together = rana.calibrate(model, tokens(4, 12).split(1), **options, group=group)
    first = rana.calibrate(model, tokens(4, 12)[:1].split(1), **options)
    assert together.gradients.keys() == first.gradients.keys()
    assert all(torch.equal(gradient, first.gradients[key]) for key, gradient in together.gradients.items())


def test_calibrations_that_differ_are_refused(group):
    model = make_model("Llama")
    with pytest.raises(ValueError, match="different calibrations"):
        rana.calibrate(model, [tokens(2 + dist.get_rank())] * 2, group=group, progress=False)
    with pytest.raises(ValueError, match="1 items for 2 processes"):
        rana.calibrate(model, [tokens(2)], group=group, progress=False)
