"""Rows and continuations that are longer than the model's positions: refused before any work."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import rana_kernels as rana
from rana_kernels.evaluation.divergence import divergence
from rana_kernels.evaluation.metrics import count_live_rows, decode_speed, perplexity
from rana_kernels.model.positions import positions_of
from rana_kernels.recovery.training import Training, train
from tests.test_cli import VOCABULARY, folder, run  # noqa: F401 - fixtures
from tests.test_compress import make_model, tokens

QUIET = {"progress": False}
LIMIT = 64


@pytest.mark.parametrize("name", ["GPT2", "OPT", "Llama"])
def test_long_rows_are_refused_before_any_row_is_run(name):
    model = make_model(name, max_position_embeddings=32)
    ran = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    model.get_input_embeddings().register_forward_pre_hook(lambda *_: ran.append(1))
    rows = [tokens(2, 32), tokens(2, 33)]
    message = r"of item 1 has rows of 33 tokens, wanted at most 32, the positions of \w+: cut them"
    calls = [
        lambda: rana.calibrate(model, rows, **QUIET),
        lambda: rana.compress(model, rows, flops_reduction=0.3, **QUIET),
        lambda: rana.compress(model, [r[0] for r in rows], flops_reduction=0.3, **QUIET),
        lambda: rana.rotate(model, rows, steps=0, **QUIET),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
    measured = {
        "perplexity: input_ids": lambda: perplexity(model, rows[1], **QUIET),
        "count_live_rows: input_ids": lambda: count_live_rows(model, rows[1], **QUIET),
        "divergence: input_ids": lambda: divergence(model, model, rows[1], **QUIET),
        "decode_speed: the prompt with its new tokens": lambda: decode_speed(model, rows[0][:1], 1),
        "train: the text": lambda: train(model, rows[1], Training(1, 1), **QUIET),
    }
    for what, call in measured.items():
        with pytest.raises(ValueError, match=f"{what} has rows of 33 tokens, wanted at most 32"):
            call()
    assert not ran
    with pytest.raises(ValueError, match=message):  # what is read once is refused when it comes
        rana.calibrate(model, iter(rows), **QUIET)
    assert rana.compress(model, rows[:1], flops_reduction=0.3, method="paper", **QUIET).plan.reduction > 0


def test_scaled_rotary_positions_reach_further():
    def limit(**rope) -> int | None:
        config = SimpleNamespace(max_position_embeddings=32, rope_parameters=rope)
        return positions_of(SimpleNamespace(config=config))  # type: ignore[arg-type]

    assert limit() == limit(rope_type="default", rope_theta=1e4) == 32
    assert limit(rope_type="yarn", factor=4.0) == 128
    assert limit(full_attention={"factor": 8.0}, sliding_attention={"rope_type": "default"}) == 256
    assert positions_of(torch.nn.Linear(1, 1)) is None


@pytest.fixture(scope="module")
def short(folder, tmp_path_factory) -> Path:  # noqa: F811
    """A GPT-2 of few positions, with the tokenizer and the text of `folder`."""
    place = tmp_path_factory.mktemp("short") / "model"
    sizes = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": LIMIT,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    make_model("GPT2", **sizes).save_pretrained(place)
    for name in ("tokenizer.json", "tokenizer_config.json", "text.txt"):
        shutil.copy(folder / name, place)
    return place


def test_commands_lower_their_defaults_and_say_so(short, tmp_path, run):  # noqa: F811
    text, out_dir = short / "text.txt", tmp_path / "out"
    asked = ["compress", short, "--calibration", text, "-o", out_dir, "--tokens", 512, "--method", "paper"]
    lowered = f"rana: --sequence-length is {LIMIT} instead of 512: the {LIMIT} positions of GPT2LMHeadModel"
    code, _, err = run(*asked)
    assert code == 0 and lowered in err, err
    code, _, err = run("eval", out_dir, "--text", text, "--tokens", 512, "--json")
    assert code == 0 and lowered in err, err
    code, out, err = run("generate", out_dir, "--prompt", "import", "--json")
    new = json.loads(out)["tokens"]
    prompt = LIMIT - new
    assert code == 0 and 0 < prompt < 7
    assert f"--max-new-tokens is {new} instead of 100: the {LIMIT} positions of GPT2LMHeadModel after" in err
    code, out, err = run("generate", out_dir, "--prompt", "import", "--max-new-tokens", 90)
    assert code == 1 and out == "" and f"--max-new-tokens is 90, wanted at most {new}: the {LIMIT}" in err
    code, out, err = run("generate", out_dir, "--prompt", "import " * 40)
    assert code == 1 and out == "" and f"wanted fewer than {LIMIT}, the positions of GPT2LMHeadModel" in err


def test_commands_refuse_what_was_asked_beyond_the_positions(short, tmp_path, run):  # noqa: F811
    long = tmp_path / "long.safetensors"
    save_file({"input_ids": torch.zeros(4, LIMIT + 1, dtype=torch.int64)}, long)
    asked = ["compress", short, "-o", tmp_path / "out"]
    code, _, err = run(*asked, "--calibration", short / "text.txt", "--sequence-length", 100)
    assert code == 1 and f"--sequence-length is 100, wanted at most {LIMIT}: the {LIMIT} positions" in err
    code, _, err = run(*asked, "--calibration", long)
    assert code == 1 and f"{long} has rows of {LIMIT + 1} tokens, wanted at most {LIMIT}" in err
    assert [path.name for path in tmp_path.iterdir()] == [long.name]
