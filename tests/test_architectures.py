"""Every architecture of docs/models.md, and models of somebody's own."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Conv1D

import rana_kernels as rana
from rana_kernels.allocation.methods import METHODS
from rana_kernels.allocation.search import Search
from rana_kernels.model.architectures import ARCHITECTURES, describe, find_blocks
from rana_kernels.model.install import install
from rana_kernels.nn.adapters import RanaLinear, RanaReceiver
from rana_kernels.nn.mlp import RanaMLP
from tests.architectures import MODELS, table
from tests.subprocesses import python
from tests.test_compress import assert_equal_states, hand_plan, logits, make_model, tokens

every_model = pytest.mark.parametrize("name", MODELS)


def written(model: nn.Module) -> list[int]:
    return model.generate(tokens(1, 8).clamp_min(3), max_new_tokens=8, do_sample=False)[0].tolist()


def test_the_page_of_models_has_the_table():
    assert table() in (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    assert {make_model(name).config.model_type for name in MODELS} == set(ARCHITECTURES)


@every_model
def test_full_ranks_are_the_dense_model(name):
    model = make_model(name)
    dense = logits(model)
    rana.compress(model, [tokens(2)], plan=hand_plan(model), progress=False)
    torch.testing.assert_close(logits(model), dense, rtol=1e-5, atol=1e-5)
    mlps = [block.mlp for block in find_blocks_of(name) if block.mlp]
    assert all(isinstance(model.get_submodule(mlp), RanaMLP) for mlp in mlps)


@every_model
@pytest.mark.parametrize("method", METHODS)
def test_compressed_saved_loaded_and_generating(name, method, tmp_path):
    model = make_model(name)
    search = Search(tokens(2), evaluations=2) if method == "rankadaptor" else None
    report = rana.compress(
        model, [tokens()], flops_reduction=0.2, method=method, search=search, progress=False
    )
    head = model.get_output_embeddings()
    dense = [p for p in model.modules() if isinstance(p, nn.Linear | Conv1D) and p is not head]
    if method in ("paper", "static"):  # the others decide by themselves what stays dense
        assert len(dense) == len(find_blocks_of(name)), "all linears but o are adapted"
    assert 0.15 < report.block_flops_reduction < 0.3
    rana.save(model, tmp_path / "out")
    loaded = rana.load(tmp_path / "out")
    assert_equal_states(model, loaded)
    assert torch.equal(logits(model), logits(loaded)) and written(model) == written(loaded)
    rana.save(loaded, tmp_path / "again")
    files = [(tmp_path / place / "model.safetensors").read_bytes() for place in ("out", "again")]
    assert files[0] == files[1]


def test_none_of_them_loads_without_the_package(tmp_path):
    """Every architecture stops at the empty `weight` of its adapted linears, and invents no weights."""
    for name in MODELS:
        model = make_model(name)
        rana.compress(model, [tokens(2)], flops_reduction=0.2, method="paper", progress=False)
        model.save_pretrained(tmp_path / name)
    code = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        "for place in sys.argv[1:]:\n"
        "    try: AutoModelForCausalLM.from_pretrained(place)\n"
        "    except RuntimeError as error: assert 'mismatch' in str(error)\n"
        "    else: sys.exit(f'{place} was loaded')"
    )
    places = [str(tmp_path / name) for name in MODELS]
    done = python("-c", code, *places)
    assert done.returncode == 0, done.stderr[-2000:]


def find_blocks_of(name: str):
    return find_blocks(make_model(name))


@pytest.mark.parametrize("name", ["Phi3", "GPTNeoX", "GPT2"])
def test_layouts_compile_whole(name):
    model = make_model(name)
    rana.compress(model, [tokens()], flops_reduction=0.2, progress=False)
    torch._dynamo.reset()
    decoder = model.base_model
    with torch.no_grad():
        wanted = decoder(tokens(), use_cache=False).last_hidden_state
        compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens(), use_cache=False).last_hidden_state, wanted)


def test_experts_stay_dense_and_count():
    model = make_model("Mixtral")
    experts = copy.deepcopy(model.model.layers[0].mlp.state_dict())
    report = rana.compress(model, [tokens()], flops_reduction=0.3, progress=False)
    assert all(torch.equal(t, experts[n]) for n, t in model.model.layers[0].mlp.state_dict().items())
    attention = report.plan.dense_flops
    mixture = 2 * 2 * 3 * 64 * 176 * 2  # two layers, two experts of three matrices each
    head = 2 * 128 * 64
    saved = report.block_flops_reduction * attention
    assert report.model_flops_reduction == pytest.approx(saved / (attention + mixture + head))


# models of somebody's own


class OwnLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.ff = nn.Sequential(nn.Linear(width, 3 * width), nn.ReLU(), nn.Linear(3 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        q, k, v = self.q(y), self.k(y), self.v(y)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.ff(x)


class Own(nn.Module):
    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.table = nn.Embedding(128, width)
        self.blocks = nn.ModuleList(OwnLayer(width) for _ in range(2))
        self.head = nn.Linear(width, 128)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


PATTERNS = {
    "layers": "blocks", "qkv": ["q", "k", "v"], "o": "out",
    "mlp": "ff", "up": "ff.0", "down": "ff.2", "activation": "relu",
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("method", ["paper", "global"])
@pytest.mark.parametrize("whole", [True, False], ids=["mlp in one op", "one by one"])
def test_an_own_model_by_patterns(whole, method):
    torch.manual_seed(0)
    model = Own().eval()
    patterns = {key: value for key, value in PATTERNS.items() if whole or key != "mlp"}
    dense, before = model(tokens()), copy.deepcopy(model)
    report = rana.compress(
        model, [tokens()], method=method, flops_reduction=0.05, patterns=patterns, progress=False
    )
    if method == "paper":  # the other decides by itself what becomes what
        kinds = (type(model.blocks[0].q), type(model.blocks[0].v))
        assert kinds == (RanaLinear, RanaReceiver) and isinstance(model.blocks[0].ff, RanaMLP) == whole
    error = (model(tokens()) - dense).norm() / dense.norm()
    # "global" finds that skipping the zeros of a ReLU is free
    assert (0 if method == "paper" else -1) < error < 0.3 and report.block_flops_reduction > 0.04
    # and again from the plan and the tensors, without calibration
    describe(before, patterns)
    install(before, rana.Plan.from_json(report.plan.to_json()))
    before.load_state_dict(model.state_dict())
    assert torch.equal(before(tokens()), model(tokens()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": "block"}, "patterns do not fit Own: .*block"),
        ({"up": "ff.9"}, "patterns do not fit Own: .*9"),
        ({"down": ""}, "up and down come together"),
        ({"activation": "tanh"}, "activation is 'tanh', wanted one of silu"),
        ({"queries": "q"}, "patterns has .*'queries'.*, wanted `layers` and any of act, "),
        ({"out": "table"}, "wanted `layers`"),
        ({"o": "norm"}, "blocks.0.norm is a LayerNorm, wanted torch.nn.Linear"),
    ],
)
def test_patterns_that_do_not_fit(change, message):
    model = Own()
    with pytest.raises(ValueError, match=message):
        patterns = {**PATTERNS, **change}
        rana.compress(
            model, [tokens()], method="paper", flops_reduction=0.05, patterns=patterns, progress=False
        )
    assert type(model.blocks[0].q) is nn.Linear


def test_what_is_not_known_is_told_about_patterns():
    with pytest.raises(ValueError, match="For a model of your own say with `patterns`"):
        rana.compress(Own(), [tokens()], flops_reduction=0.05, progress=False)
