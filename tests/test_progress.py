"""Progress of long work: a bar on a terminal, lines in a log, and what is said before the work."""

import io
import itertools
import re

import pytest
import rich
import torch
from rich.console import Console

from rana_kernels.allocation.search import Search
from rana_kernels.cli import forecast as forecasts
from rana_kernels.cli.forecast import forecast
from rana_kernels.model.architectures import find_blocks
from rana_kernels.statistics.calibration import calibrate
from rana_kernels.system import progress
from rana_kernels.system.progress import duration, meter, track
from tests.test_cli import compression, folder, run  # noqa: F401 - fixtures
from tests.test_compress import make_model, tokens


@pytest.fixture
def four_seconds(monkeypatch):
    """A clock that is four seconds later at every look."""
    clock = itertools.count(0, 4)
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))


def test_a_log_gets_a_line_every_ten_seconds(four_seconds, capsys):
    assert list(track(range(9), "working", True)) == list(range(9))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "working: 3 of 9, about 24 s left",
        "working: 6 of 9, about 12 s left",
        "working: 9 of 9, about 0 s left",
    ]


def test_work_that_goes_on_counts_only_its_own_time(four_seconds, capsys):
    with meter("training", 100, True, done=94) as advance:
        for step in range(3):
            advance(f"training, loss {step}")
    assert capsys.readouterr().err == "training, loss 2: 97 of 100, about 12 s left\n"


def test_work_of_unknown_length_says_how_much_is_done(four_seconds, capsys):
    list(track(iter(range(3)), "reading", True))
    assert capsys.readouterr().err == "reading: 3 in 12 s\n"


def test_quick_work_and_hidden_work_say_nothing(capsys, four_seconds):
    list(track(range(2), "quick", True))
    list(track(range(50), "hidden", False))
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_with_the_time_left(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(rich, "get_console", lambda: Console(file=screen, force_terminal=True, width=80))
    monkeypatch.setattr("rich.progress.get_console", rich.get_console)
    list(track(range(4), "working", True))
    assert re.search(r"working .*100%.*0:00:00", screen.getvalue())


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (99, "99 s"), (150, "2 min"), (5900, "98 min"), (12_000, "3 h 20 min")],
)
def test_times_in_words(seconds, words):
    assert duration(seconds) == words


def test_the_calibration_tells_where_it_is(four_seconds, capsys):
    calibrate(make_model(), [tokens(1)] * 4, gradients=False)
    assert "calibrating: 3 of 4, about 4 s left" in capsys.readouterr().err


def test_a_compression_says_beforehand_what_it_will_do(monkeypatch):
    """The times are those of a trial: a tenth of a second a token with gradients, a fortieth without."""
    model, seen = make_model(), []

    def trial(_model, ids, needs):
        seen.append(ids.shape)
        return 0.1 if needs["gradients"] else 0.025

    monkeypatch.setattr(forecasts, "_seconds", trial)
    text = torch.zeros(100, 512, dtype=torch.int64)
    with_gradients = {"inputs": ("mlp",), "gradients": True}
    found = forecast(model, find_blocks(model), text, with_gradients, Search(tokens(4), 30))
    assert "51,200 tokens calibrate 2 blocks, whose linears have 0.4 of the model's 0.4 MB." in found
    # 32,768 tokens of 0.1 s and 18,432 of 0.025 s
    assert "the calibration takes about 62 min." in found and "in at most 4 s." in found
    plain = forecast(model, find_blocks(model), text, {**with_gradients, "gradients": False}, None)
    assert "the calibration takes about 21 min." in plain and "allocations" not in plain
    assert "trial" not in forecast(model, find_blocks(model), tokens(4), with_gradients, None)


def test_the_command_says_it(folder, tmp_path, run):  # noqa: F811
    code, _, err = run(*compression(folder, tmp_path / "out"))
    assert code == 0 and re.search(r"^1,024 tokens calibrate 2 blocks.* By a trial, .* about \d+ s\.", err)
