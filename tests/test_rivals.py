"""The table of whole programs: files for llama.cpp hold our model, and every contender writes its text."""

import csv
from contextlib import contextmanager

import pytest
import torch
import typer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from bench.decode import __main__ as command
from bench.decode import rivals, widths
from bench.decode.gguf_files import matrix_bytes, round_like, write_gguf
from bench.decode.models import random_model
from bench.report.results import RESULTS
from rana_kernels.evaluation.metrics import count_live_rows

TINY = LlamaConfig(
    vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=256, tie_word_embeddings=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_model(TINY, torch.bfloat16, "cpu")


@pytest.mark.parametrize("kind", rivals.WIDTHS.values())
@torch.no_grad()
def test_a_file_holds_the_model(kind, model, tmp_path):
    """transformers reads the file back: the same names, the same order of rows, rounded as we say."""
    write_gguf(model, tmp_path / "model.gguf", kind)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    wanted = random_model(TINY, torch.float32, "cpu")
    wanted.load_state_dict(model.state_dict())
    round_like(wanted, kind)
    ids = torch.arange(20)[None]
    assert torch.allclose(found(ids).logits, wanted(ids).logits, atol=1e-5)
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert matrix_bytes(tmp_path / "model.gguf") == weights * {"BF16": 16, "Q8_0": 8.5, "Q4_0": 4.5}[kind] / 8


@pytest.mark.parametrize("bits", rivals.WIDTHS)
def test_ours_keep_what_they_say(bits, model):
    """A random model keeps the share of its inputs that it is named for, and reads fewer bytes with it."""
    dense = widths.dense(model, bits, None)
    found = widths.masked(model, bits, (0.8, 0.5), None)
    assert dense.read == dense.stored > found[0].read > found[1].read
    ids = torch.randint(TINY.vocab_size, (1, 64), generator=torch.Generator().manual_seed(1))
    for ours in found:
        ours.prepare()
        kept = [
            count.mean / count.rows for count in count_live_rows(ours.model, ids, progress=False).values()
        ]
        assert len(kept) == 5 * TINY.num_hidden_layers  # q, k and v are one adapter
        assert sum(kept) / len(kept) == pytest.approx(ours.cost_ratio, abs=0.06)


@pytest.fixture
def asked(monkeypatch, tmp_path) -> list[tuple[int, int]]:
    """What other programs are asked to write. None of them runs."""
    seen: list[tuple[int, int]] = []

    @contextmanager
    def fake(*_):
        yield lambda prompt, tokens: seen.append((len(prompt), tokens)) or (0.25, 0.5)

    monkeypatch.setattr(rivals, "_llama_cpp", fake)
    monkeypatch.setattr(rivals, "_compiled", fake)
    monkeypatch.setattr(rivals, "find_spec", lambda name: True)
    monkeypatch.setattr(command, "version", lambda name: "1")
    monkeypatch.setitem(command.SHAPES, "tiny", TINY)
    return seen


@pytest.mark.parametrize("trained", [False, True], ids=["random weights", "a directory"])
def test_the_command_writes_a_table(trained, model, asked, tmp_path):
    if trained:
        model.save_pretrained(tmp_path / "model")
        for name in ("calibration", "evaluation"):
            ids = torch.randint(TINY.vocab_size, (8, 32), dtype=torch.int32)
            save_file({"input_ids": ids}, tmp_path / "model" / f"{name}.safetensors")
    given = {"prompt": [8, 12], "threads": [1], "rounds": 3, "turn": 4, "rivals": ["llama.cpp"]}
    name, path = str(tmp_path / "model") if trained else "tiny", tmp_path / "rows.csv"
    command.main(name, tests=False, output=path, **given)
    first, *lines = path.read_text().splitlines()
    rows = list(csv.DictReader(lines))
    assert first.endswith(", untested") and set(asked) == {(8, 4), (12, 4)}
    names = [(row["contender"], int(row["bits"]), float(row["cost_ratio"])) for row in rows]
    ours = [("ours, dense", 1.0), *(("ours, masked", ratio) for ratio in rivals.RATIOS)]
    assert [n for n in names if n[0].startswith("ours")] == [
        (n, b, c) for b in (16, 8, 4) for _ in given["prompt"] for n, c in ours
    ]
    assert {row["prompt"] for row in rows} == {"8", "12"}
    assert ("llama.cpp Q8_0", 8, 1.0) in names and ("transformers, compiled", 16, 1.0) in names
    rival = [row for row in rows if row["contender"] == "llama.cpp Q4_0"]
    assert [(row["tokens_per_s"], row["first_token_ms"]) for row in rival] == 2 * [("2.0", "250.0")]
    assert all(float(row["tokens_per_s"]) > 0 for row in rows)
    assert {row["perplexity"] == "random weights" for row in rows} == {not trained}


def test_what_the_command_refuses(tmp_path):
    with pytest.raises(ValueError, match="--rivals has 'vllm', wanted one of llama.cpp, torchao"):
        command.main("Llama-3.2-1B", rivals=["vllm"])
    with pytest.raises(typer.BadParameter, match="--no-tests needs an --output outside of"):
        command._check_output(False, RESULTS / "rows.csv")
