"""The benchmark of whole models, on a model that is small enough to run in seconds."""

import gc

import pytest
import torch
import typer
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig

from bench.decode import __main__ as command
from bench.decode import measure, steps
from bench.decode.measure import Setting, measure_drafts, share_rows, take_turns, where_time_goes
from bench.decode.models import NAMES, SHAPES, from_random, random_model
from bench.decode.steps import Decoder, compiled
from bench.kernels.baselines import can_pack
from bench.report import page
from bench.report.results import read_csv
from rana_kernels.evaluation.metrics import count_live_rows
from rana_kernels.nn.adapters import RanaLinear
from rana_kernels.nn.dense import DenseLinear
from rana_kernels.nn.mlp import RanaMLP

COST_RATIO = 0.56
TINY = LlamaConfig(
    vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def models():
    return from_random(random_model(TINY, torch.float32, "cpu"), COST_RATIO)


def test_contenders_share_what_they_do_not_replace(models):
    assert tuple(models) == NAMES
    embeddings = {model.get_input_embeddings().weight.data_ptr() for model in models.values()}
    assert len(embeddings) == 1
    for name, model in models.items():
        head = model.get_output_embeddings()
        assert head.weight is model.get_input_embeddings().weight
        assert isinstance(head, DenseLinear) == (name != "dense")
    ids = torch.arange(40)[None]
    torch.testing.assert_close(models["dense, ours"](ids).logits, models["dense"](ids).logits)


def test_random_models_cost_what_was_asked_for(models):
    """The cost is counted on other tokens than those that set the thresholds."""
    dense = sum(p.numel() for n, p in models["dense"].named_parameters() if "proj" in n)
    o = sum(p.numel() for n, p in models["dense"].named_parameters() if "o_proj" in n)
    ids = torch.randint(TINY.vocab_size, (2, 100))
    counts = count_live_rows(models["rana"], ids, progress=False)
    for name in ("rana", "static"):
        cost = o
        for place, module in models[name].named_modules():
            if isinstance(module, RanaLinear):
                live = counts[place].mean if name == "rana" else module.rows.shape[0]
                cost += module.B.numel() + live * module.rows.shape[1]
            if isinstance(module, RanaMLP):
                cost += module.B.numel()
                for child in module.names:
                    rows = getattr(module, child).rows
                    cost += counts[f"{place}.{child}"].mean * rows.shape[1]
        # ranks are multiples of 16, which is coarse for a model of this size
        assert cost / dense == pytest.approx(COST_RATIO, rel=0.1), name


@pytest.mark.parametrize("read", [True, False])
def test_rows_of_a_setting(models, read):
    contenders = {name: (model, model.forward) for name, model in models.items()}
    setting = Setting(prompt=24, batch=2, threads=1, read=read)
    found = take_turns(contenders, setting, rounds=3, turn=2)
    assert [row["contender"] for row in found] == list(NAMES)
    assert found[0]["x dense"] == 1 and all(0 < row["p20"] <= row["tokens/s"] <= row["p80"] for row in found)
    assert all((row["first token ms"] != "") == read for row in found)


@torch.inference_mode()
def test_a_decoder_writes_what_generate_writes(models):
    prompt = torch.randint(TINY.vocab_size, (2, 12))
    for model in models.values():
        wanted = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
        decoder, written = Decoder(model, 2, 20), [prompt]
        decoder.read(prompt)
        written.append(decoder.last.clone())
        for _ in range(4):
            decoder.decode(1)
            written.append(decoder.last.clone())
        assert torch.equal(torch.cat(written, 1), wanted)


class Recorded(TorchDispatchMode):
    """Records calls of torch's ops and repeats them on the same memory, like a CUDA graph on a card."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value goes to the host"
        self.calls.append((func, args, kwargs or {}, func(*args, **(kwargs or {}))))
        return self.calls[-1][3]

    def replay(self) -> None:
        for func, args, kwargs, results in self.calls:
            for result, again in zip(tree_leaves(results), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(result, torch.Tensor) and result.data_ptr() != again.data_ptr():
                    result.copy_(again)


@torch.inference_mode()
def test_replayed_steps_write_the_same(models, monkeypatch):
    """A captured step continues the last one, and also another prompt."""
    recorded = []

    def captured(run):
        state = [decoder.last, *(t for layer in decoder.cache.layers for t in vars(layer).values())]
        tensors = [t for t in state if isinstance(t, torch.Tensor)]
        before = [t.clone() for t in tensors]
        with Recorded() as record:
            run()
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)  # capturing must compute nothing
        recorded.append(record)
        return record.replay

    monkeypatch.setattr(steps, "captured", captured)
    for model in models.values():
        written: dict[bool, list] = {}
        for graphs in (False, True):
            decoder = Decoder(model, 2, 24)
            decoder.graphs = graphs
            for prompt in (torch.arange(24).view(2, 12), torch.arange(16).view(2, 8)):
                decoder.read(prompt)
                for _ in range(5):
                    decoder.decode(2)
                    written.setdefault(graphs, []).append(decoder.last.clone())
        assert torch.equal(*map(torch.cat, written.values()))
    assert len(recorded) == len(models), "captured again, or never"


@pytest.fixture
def may_freeze():
    """Restore the torch setting that `compiled` changes for the whole process."""
    steps.forget_compiled()
    with steps.inductor.patch(freezing=False):
        yield


def test_a_compiled_model_is_timed(may_freeze):
    """Every dense linear of one block in 16 bits is compiled with its weight packed, where torch can pack."""
    config = LlamaConfig(**{**TINY.to_dict(), "num_hidden_layers": 1})
    model = random_model(config, torch.bfloat16, "cpu")
    torch._dynamo.utils.counters.clear()
    contenders = {"dense": (model, compiled(model))}
    setting = Setting(prompt=8, batch=2, threads=1, read=True)
    found = take_turns(contenders, setting, rounds=3, turn=2)
    assert found[0]["p20"] <= found[0]["tokens/s"] <= found[0]["p80"]
    counts = torch._dynamo.utils.counters
    assert counts["stats"]["unique_graphs"] == 1, "compiled again, or not at all"
    linears = 8 if can_pack(torch.bfloat16) else 0
    assert counts["inductor"]["mkldnn_linear_weight_pack_matcher_count"] == linears
    assert _packed() == linears
    del contenders
    steps.forget_compiled()
    assert _packed() == 0, "every compiled model would keep its own copy of the weights"


def _packed() -> int:
    return sum(type(found) is torch.Tensor and found.is_mkldnn for found in gc.get_objects())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_compiled_steps_write_the_same(models, name, may_freeze):
    prompt, written = torch.randint(TINY.vocab_size, (1, 12)), []
    for step in (None, compiled(models[name])):
        decoder = Decoder(models[name], 1, 20, step)
        decoder.read(prompt)
        tokens = [decoder.last.clone()]
        for _ in range(3):
            decoder.decode(1)
            tokens.append(decoder.last.clone())
        written.append(torch.cat(tokens))
    assert torch.equal(*written)


def test_long_prompts_are_read_less_often(models, monkeypatch):
    monkeypatch.setattr(measure, "READ_TOKENS", 40)
    for rows, readings in ((1, 3), (2, 2), (3, 1), (9, 1)):
        read = measure._read_prompts(
            {"dense": Decoder(models["dense"], rows, 20)},
            Setting(prompt=10, batch=rows, threads=1, read=True),
        )
        assert len(read["dense"]) == readings


@torch.inference_mode()
def test_where_time_goes_adds_up(models):
    decoder = Decoder(models["rana"], 1, 40)
    decoder.read(torch.zeros(1, 8, dtype=torch.long))
    shares = where_time_goes(decoder, tokens=4)
    layers = TINY.num_hidden_layers
    assert shares["rana::masked_mlp"][1] == layers and shares["rana::linear"][1] == layers + 1
    assert shares["outside of ops"][0] > 0
    assert [row[""] for row in share_rows({"rana": shares})] == list(shares)


def test_drafts_do_not_change_the_text(models):
    prompts = torch.randint(TINY.vocab_size, (2, 10))
    own = measure_drafts(models["dense"], models["dense, ours"], prompts, tokens=12, rounds=1)
    assert all(float(row["accepted"]) > 0.6 * row["drafted"] for row in own), "it drafts for itself"
    other = measure_drafts(models["dense"], models["rana"], prompts, tokens=12, rounds=1)
    for found, mine in zip(other, own, strict=True):
        assert 0 <= float(found["accepted"]) < float(mine["accepted"])
        assert found["same text"] == mine["same text"] == "100%" and found["gap"] == "0.00"


@torch.inference_mode()
def test_texts_that_part_are_judged_by_the_two_tokens(models):
    text = torch.randint(TINY.vocab_size, (1, 8))
    other = text.clone()
    other[0, 5] = (text[0, 5] + 1) % TINY.vocab_size
    logits = models["dense"](text[:, :5]).logits[0, -1]
    wanted = float((logits[text[0, 5]] - logits[other[0, 5]]).abs())
    assert measure._gap(models["dense"], text, other) == wanted > 0


def test_shapes_have_the_weights_of_their_names():
    for name, billions in (("Llama-3.2-1B", 1.24), ("Llama-2-7B", 6.74)):
        model = random_model(SHAPES[name], torch.bfloat16, "meta")
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


def test_the_command_in_4_bits(tmp_path, capsys, monkeypatch):
    """Three models take turns, and their rows have a place on the page."""
    config = LlamaConfig(**{**TINY.to_dict(), "hidden_size": 256})
    monkeypatch.setitem(SHAPES, "tiny", config)
    monkeypatch.setattr(command, "require_green_tests", lambda: None)
    command.main(
        "tiny", prompt=[32], batch=[1], threads=[1], cost_ratio=0.7, dtype="bf16", bits=4, device="cpu",
        compile=False, rounds=3, turn=2, read=2048, output=tmp_path / "rows.csv",
    )  # fmt: skip
    assert "rana::masked_mlp" in capsys.readouterr().out
    _, rows = read_csv(tmp_path / "rows.csv")
    assert [row["contender"] for row in rows] == ["dense", "dense, 4 bits", "masked, 4 bits"]
    entry = page._models(rows, "")[0]
    assert entry.case == "tiny, 4 bits, eager, 1 text after 32" and set(entry.ratios) >= {"dense"}
    with pytest.raises(typer.BadParameter, match="--bits takes 8 or 4"):
        command.main("tiny", bits=3)


def test_the_command_on_a_directory(tmp_path, capsys, monkeypatch):
    """A directory is compressed on its own tokens. Without the tests of the ops nothing is written."""
    random_model(TINY, torch.float32, "cpu").save_pretrained(tmp_path)
    tokens = torch.arange(8 * 96).reshape(8, 96).int() * 37 % TINY.vocab_size
    for name in ("calibration", "evaluation"):
        save_file({"input_ids": tokens}, tmp_path / f"{name}.safetensors")
    monkeypatch.setattr(command, "DRAFT_PROMPTS", 2)
    monkeypatch.setattr(command, "DRAFT_TOKENS", 8)
    command.main(
        str(tmp_path), prompt=[8, 999], batch=[1], threads=[1], cost_ratio=COST_RATIO, dtype="fp32",
        device="cpu", compile=False, rounds=3, turn=1, read=2048, tokens=999, tests=False,
        output=tmp_path / "rows.csv",
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "rana::linear" in printed and "RaNA drafts" in printed
    assert not (tmp_path / "rows.csv").exists()
