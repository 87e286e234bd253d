"""The command line, on a tiny model and tokenizer: compress, eval, generate, info, and its failures."""

import json
import math
import re
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rana_kernels as rana
from rana_kernels import cli
from rana_kernels.cli.options import quicken_or_say
from rana_kernels.cli.tokens import read_token_ids
from rana_kernels.evaluation.density import MARGIN
from rana_kernels.evaluation.metrics import count_live_rows, decode_speed, perplexity
from rana_kernels.integrations import programs

VOCABULARY = 300
TEXT = (
    Path(rana.__file__).parent / "nn" / "adapters.py"
).read_text() * 3  # text of about the right length, and at hand


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with its tokenizer, and text.txt."""
    place = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(place)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=176, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place)
    (place / "text.txt").write_text(TEXT)
    return place


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command line; gives its exit code, stdout and stderr."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def command(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(exit.value.code or 0), out, err

    return command


def compression(folder: Path, output: Path) -> list[object]:
    text = folder / "text.txt"
    return [
        "compress",
        folder,
        "--calibration",
        text,
        "-o",
        output,
        "--tokens",
        1024,
        "--sequence-length",
        64,
    ]


@pytest.fixture(scope="module")
def compressed(folder, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("compressed") / "out"
    with pytest.raises(SystemExit) as exit:
        cli.main([str(argument) for argument in compression(folder, place)])
    assert not exit.value.code
    return place


# what works


def test_compress_shows_ranks_and_leaves_nothing_else(folder, tmp_path, run):
    code, out, err = run(*compression(folder, tmp_path / "out"), "--method", "static")
    assert code == 0, err
    assert "q k v" in out and "dense" in out and "fewer FLOPs" in out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert rana.load(tmp_path / "out").config.vocab_size == VOCABULARY


def test_compress_in_json_and_from_tokens(folder, tmp_path, run):
    tokens = tmp_path / "tokens.safetensors"
    save_file({"input_ids": torch.randint(0, VOCABULARY, (8, 48), dtype=torch.int32)}, tokens)
    code, out, err = run(
        "compress", folder, "--calibration", tokens, "--output", tmp_path / "out",
        "--flops-reduction", 0.3, "--dtype", "bfloat16", "--json",
    )  # fmt: skip
    found = json.loads(out)
    assert code == 0 and err.startswith(
        "384 tokens calibrate 2 blocks, whose linears have 0.2 of the model's 0."
    )
    assert len(err.splitlines()) == 1
    assert found["tokens"] == 8 * 48
    assert found["block_flops_reduction"] == pytest.approx(0.3, abs=0.01)
    assert rana.load(tmp_path / "out").dtype == torch.bfloat16


def test_bits_from_compress_to_eval_and_info(folder, tmp_path, run):
    output, text = tmp_path / "out", folder / "text.txt"
    options = ("--method", "paper", "--bits", 4, "--group", 64, "--lm-head-bits", 8)
    code, out, err = run(*compression(folder, output), *options)
    assert code == 0, err
    words = "4, a scale for 64 columns; lm_head 8, a scale for 64 columns"
    assert words in " ".join(out.split()) and "A token reads" in out
    code, out, err = run("eval", output, "--text", text, "--sequence-length", 64, "--tokens", 128, "--json")
    found = json.loads(out)
    assert code == 0 and (found["bits"], found["lm_head_bits"]) == ([4], 8), err
    assert 0 < found["read_bytes"] < found["stored_bytes"]
    code, out, _ = run("info", output, "--json")
    facts = json.loads(out)
    assert code == 0 and facts["bits"] == words
    assert 0 < facts["block_read_bytes"] < facts["block_stored_bytes"] < facts["stored_bytes"]
    code, out, _ = run("info", output)
    assert code == 0 and "method: paper" in out
    code, _, err = run("compress", folder, "--calibration", text, "-o", tmp_path / "other", "--bits", 5)
    assert code == 2 and "'5' is not one of" in err


def test_the_card_says_what_was_measured(folder, tmp_path, run):
    code, _, err = run(*compression(folder, tmp_path / "out"), "--evaluation", folder / "text.txt")
    assert code == 0, err
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "transformers" and card.data.base_model is None
    for words in (
        f"| base model | {folder} |", "| calibration | 1024 tokens, of text.txt, seed 0, sha256 ",
        " compressed, ", " dense, on text.txt |", " MB before, ", "torch 2.", "asked for)",
        "mlp.down_proj | neuron | ",
    ):  # fmt: skip
        assert words in card.text, words
    found = [float(x) for x in re.search(r"perplexity \| ([\d.]+) compressed, ([\d.]+)", card.text).groups()]
    assert found[0] == pytest.approx(found[1], rel=0.1) and found[0] != found[1]


def test_the_same_command_goes_on_after_an_interruption(folder, compressed, tmp_path, run, monkeypatch):
    command, done = compression(folder, tmp_path / "out"), []
    run_of_compress = vars(import_module("rana_kernels.compression.run"))
    measure = run_of_compress["measure"]

    def interrupted(layer, adapter):
        if layer.block.index == 1:
            raise KeyboardInterrupt
        return measure(layer, adapter)

    with monkeypatch.context() as patch:
        patch.setitem(run_of_compress, "measure", interrupted)
        code, _, err = run(*command)
    assert code == 130 and "The same command goes on" in err
    assert [path.name for path in tmp_path.iterdir()] == ["out.resume"]
    count = lambda layer, adapter: done.append(layer.block.index) or measure(layer, adapter)  # noqa: E731
    monkeypatch.setitem(run_of_compress, "measure", count)
    assert run(*command)[0] == 0
    assert set(done) == {1} and [path.name for path in tmp_path.iterdir()] == ["out"]
    weights = [(place / "model.safetensors").read_bytes() for place in (tmp_path / "out", compressed)]
    assert weights[0] == weights[1]


def test_a_rotated_model_is_compressed(folder, tmp_path, run):
    code, _, err = run(*compression(folder, tmp_path / "out"), "--rotate")
    assert code == 0, err
    text = ["--text", folder / "text.txt", "--tokens", 256, "--sequence-length", 64]
    code, out, _ = run("eval", tmp_path / "out", *text, "--against", folder, "--json")
    assert code == 0 and json.loads(out)["divergence"]["kl"] < 0.1


def test_eval_against_the_dense_model(folder, compressed, run):
    command = ["eval", compressed, "--text", folder / "text.txt", "--tokens", 512, "--sequence-length", 64]
    code, out, _ = run(*command, "--against", folder, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["model"]["predictions"] == found["dense"]["predictions"] == 8 * 63
    assert found["model"]["perplexity"] == pytest.approx(found["dense"]["perplexity"], rel=0.1)
    assert {a["kind"] for a in found["adapters"]} == {"rank", "neuron"}
    for adapter in found["adapters"]:
        assert adapter["live"] == pytest.approx(adapter["planned"], rel=0.3)
        assert adapter["p5"] <= adapter["median"] <= adapter["p95"] <= adapter["max"] <= adapter["rank"]
        assert adapter["p5"] < adapter["max"]
    assert 0 < found["divergence"]["kl"] < 0.1 and 0.5 < found["divergence"]["agreed"] < 1
    density = found["density"]
    assert density["planned"] == pytest.approx(0.56, abs=0.01)
    assert density["measured"] == pytest.approx(density["planned"], abs=0.02)
    assert density["tokens"]["p5"] < density["measured"] < density["tokens"]["max"]
    losses = [example["loss"] - example["dense_loss"] for example in found["lose_most"]]
    assert losses == sorted(losses, reverse=True) and losses[0] > 0
    costs = [example["cost_ratio"] for example in found["cost_most"]]
    assert len(costs) == 5 and costs[0] == pytest.approx(density["tokens"]["max"], abs=0.05)
    words = [example["text"] + example["next"] for example in found["lose_most"]]
    assert all(text.strip("\ufffd") in TEXT for text in words), words
    code, out, _ = run(*command)
    assert code == 0 and "perplexity" in out and "down" in out
    assert "p95" in out and "Tokens that keep most" in out
    assert "lose most" not in out and "first choice" not in out


def test_eval_warns_of_text_that_is_not_like_the_calibration(folder, compressed, run, monkeypatch):
    command = ["eval", compressed, "--text", folder / "text.txt", "--tokens", 512, "--sequence-length", 64]
    _, out, err = run(*command, "--json")
    drift = json.loads(out)["density"]["drift"]
    assert 0 < abs(drift) < MARGIN and "warning" not in err
    monkeypatch.setattr(cli.evaluate, "MARGIN", abs(drift) / 2)
    code, out, err = run(*command, "--json")
    assert code == 0 and json.loads(out)["density"]["drift"] == drift
    assert f"{abs(drift):.1%} {'more' if drift > 0 else 'fewer'} rows than planned" in err


def test_generate(compressed, run):
    command = ["generate", compressed, "--prompt", "def main(", "--max-new-tokens", 5]
    code, out, err = run(*command)
    assert code == 0 and out.startswith("def main(") and not err, err
    code, plain, _ = run(*command, "--json")
    assert code == 0 and "def main(" + json.loads(plain)["text"] == out.removesuffix("\n")
    code, sampled, _ = run(*command, "--temperature", 1.5, "--json")
    assert code == 0 and json.loads(sampled)["tokens"] <= 5


def test_info(run):
    code, out, _ = run("info", "--json")
    found = json.loads(out)
    assert code == 0 and set(found["serving"]) == set(rana.ops.SCHEMAS)
    code, out, _ = run("info")
    assert code == 0 and "masked_mlp" in out and torch.__version__ in out
    assert str(rana.report()) == repr(rana.report()) == out.removesuffix("\n")


@pytest.mark.parametrize(
    ("command", "program", "arguments"), [("serve", "transformers", ["serve"]), ("lm-eval", "lm-eval", [])]
)
def test_other_programs_get_their_arguments_unchanged(command, program, arguments, run, monkeypatch):
    asked = ["--help", "dir", "--port", "1", "-x", "--y=2"]
    seen: list[list[str]] = []
    loaded: list[object] = []
    monkeypatch.setattr(cli.programs, "after_loading", loaded)
    script = SimpleNamespace(load=lambda: lambda: seen.append(sys.argv))
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(programs, "entry_points", lambda group, name: [script] if name == program else [])
    assert run(command, *asked)[0] == 0
    assert seen == [[program, *arguments, *asked]]
    assert loaded == [quicken_or_say] * (command == "serve")
    monkeypatch.setattr(programs, "entry_points", lambda group, name: [])
    code, _, err = run(command)
    assert code == 1 and f"rana: {program} is not installed: pip install" in err


@pytest.mark.parametrize("command", ["compress", "eval", "generate"])
def test_help_teaches_by_example(command, run):
    code, out, _ = run(command, "--help")
    assert code == 0 and f"rana {command} " in out.split("Example")[1]


# what fails

FAILURES = {
    "no checkpoint": (["eval", "{tmp}/none", "--text", "{model}/text.txt"], "there is no such directory"),
    "not a checkpoint": (["generate", "{model}", "--prompt", "x"], "has no rana.json"),
    "no text": (["eval", "{out}", "--text", "{tmp}/none.txt"], "there is no such file"),
    "short text": (["eval", "{out}", "--text", "{tmp}/short.txt"], "wanted at least one sequence of 512"),
    "no model": (["compress", "{tmp}/none", "--calibration", "x", "-o", "{tmp}/o"], "no such directory"),
    "twice": (["compress", "{out}", "--calibration", "x", "-o", "{tmp}/o"], "compressed already"),
    "no file": (["compress", "{model}", "--calibration", "{tmp}/none.txt", "-o", "{tmp}/o"], "no such file"),
    "occupied": (["compress", "{model}", "--calibration", "x", "-o", "{tmp}"], "it is not overwritten"),
    "no prompt": (["generate", "{out}", "--prompt", ""], "the prompt is empty"),
    "out of reach": (
        ["compress", "{model}", "--calibration", "{model}/text.txt", "-o", "{tmp}/o", "--flops-reduction",
         "0.99", "--sequence-length", "64", "--tokens", "64"],
        "wanted more than 0 and at most 0.",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("command", "message"), FAILURES.values(), ids=FAILURES.keys())
def test_failures_are_one_clear_line(command, message, folder, compressed, tmp_path, run):
    (tmp_path / "short.txt").write_text("too short")
    code, out, err = run(*(a.format(tmp=tmp_path, model=folder, out=compressed) for a in command))
    assert code == 1 and out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("rana: ")]
    assert message in line and "Traceback" not in err


@pytest.mark.parametrize(
    "command",
    [
        ["compress", "m"],
        ["comprez"],
        ["info", "--color"],
        ["generate", "d", "--prompt", "x", "--temperature=-1"],
    ],
)
def test_commands_that_are_not_understood(command, run):
    code, out, err = run(*command)
    assert code == 2 and out == "" and "Usage: rana" in err


# evaluation and tokens


def test_perplexity_is_that_of_the_rows_one_by_one(compressed):
    model = rana.load(compressed)
    rows = torch.randint(0, VOCABULARY, (5, 20))
    found = perplexity(model, rows, batch=2, progress=False)
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in rows]
    assert found.nll == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.nll)) and found.predictions == 5 * 19
    assert found.tokens_per_second > 0 and decode_speed(model, rows[:1], 4) > 0
    counts = count_live_rows(model, rows, progress=False)
    assert all(count.tokens == 100 and 0 < count.mean <= count.rows for count in counts.values())


def test_perplexity_errors(compressed):
    model = rana.load(compressed)
    with pytest.raises(ValueError, match=r"input_ids has shape \[5\], wanted \[n, T\]"):
        perplexity(model, torch.zeros(5, dtype=torch.int64), progress=False)
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="the mean loss is nan"):
        perplexity(model, torch.zeros(1, 5, dtype=torch.int64), progress=False)


def test_rows_are_the_text(folder, tmp_path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    rows = read_token_ids(folder / "text.txt", tokenizer, VOCABULARY, length=32, tokens=100)
    assert rows.shape == (3, 32) and TEXT.startswith(tokenizer.decode(rows.flatten()))


def test_a_token_that_begins_every_text_begins_every_row(folder):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, bos_token="<end>")
    plain = type(tokenizer).__call__
    with pytest.MonkeyPatch.context() as patch:
        begin = lambda self, text, **options: plain(self, text if options else "<end>" + text, **options)  # noqa: E731
        patch.setattr(type(tokenizer), "__call__", begin)
        rows = read_token_ids(folder / "text.txt", tokenizer, VOCABULARY, length=32)
    assert (rows[:, 0] == 0).all() and TEXT.startswith(tokenizer.decode(rows[:, 1:].flatten()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"ids": torch.zeros(2, 4, dtype=torch.int64)}, "input_ids has nothing"),
        ({"input_ids": torch.zeros(2, 4)}, "wanted integers"),
        ({"input_ids": torch.zeros(8, dtype=torch.int64)}, r"\[n, T\]"),
        ({"input_ids": torch.full((2, 4), VOCABULARY)}, "was it made with another tokenizer"),
        (b"garbage", "is no safetensors file"),
    ],
)
def test_token_files_that_are_none(content, message, tmp_path):
    path = tmp_path / "tokens.safetensors"
    path.write_bytes(content) if isinstance(content, bytes) else save_file(content, path)
    with pytest.raises(ValueError, match=message):
        read_token_ids(path, None, VOCABULARY, length=4)


def test_text_needs_a_tokenizer_and_utf8(folder, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="the model has no tokenizer"):
        read_token_ids(path, None, VOCABULARY, length=4)
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_token_ids(path, PreTrainedTokenizerFast.from_pretrained(folder), VOCABULARY, length=4)
