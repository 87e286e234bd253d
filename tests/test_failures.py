"""Failures of input, of disks and of commands: found before any work, and answered with one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

import rana_kernels as rana
from rana_kernels.allocation.search import Search
from rana_kernels.checkpoint.replacement import check_target
from rana_kernels.cli import compress as command
from rana_kernels.cli import main, originals
from rana_kernels.system.files import check_writable, write_json
from tests.test_checkpoint import small_disk
from tests.test_cli import compressed, compression, folder, run  # noqa: F401 - fixtures
from tests.test_compress import make_model, tokens


def the_line(err: str) -> str:
    (line,) = [line for line in err.splitlines() if line.startswith("rana: ")]
    assert "Traceback" not in err
    return line


# models that cannot be opened


@pytest.fixture
def original(folder, tmp_path) -> Path:  # noqa: F811
    return Path(shutil.copytree(folder, tmp_path / "original"))


def edit_config(place: Path, **fields) -> None:
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | fields))


def without_weights(place: Path) -> None:
    (place / "model.safetensors").unlink()


def as_pickle(place: Path) -> None:
    without_weights(place)
    (place / "pytorch_model.bin").write_bytes(b"")


def truncated(place: Path) -> None:
    whole = (place / "model.safetensors").read_bytes()
    (place / "model.safetensors").write_bytes(whole[:-100])


def as_t5(place: Path) -> None:
    transformers.T5Config(vocab_size=300, architectures=["T5ForConditionalGeneration"]).save_pretrained(place)


UNREADABLE = {
    "truncated": (truncated, "model.safetensors is truncated or damaged (", "copy or download it again"),
    "pickle": (as_pickle, "weights in pytorch_model.bin alone, a pickle", "write it with save_pretrained"),
    "no weights": (without_weights, "has no weights, wanted model.safetensors", ""),
    "T5": (as_t5, "is of model type 't5' (T5ForConditionalGeneration), wanted a causal language model", ""),
    "own code": (
        lambda place: edit_config(place, model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
        "(model type 'mine') has code of its own, which is not run here", "`patterns`",
    ),
    "newer": (
        lambda place: edit_config(place, model_type="llama9"),
        "has model type 'llama9', which transformers", "pip install --upgrade",
    ),
    "other": (lambda place: edit_config(place, model_type="bloom"), "model_type is 'bloom'", "wanted one of"),
    "no config": (lambda place: (place / "config.json").unlink(), "has no config.json", ""),
    "no JSON": (lambda place: (place / "config.json").write_text("{"), "config.json cannot be read", ""),
}  # fmt: skip


@pytest.mark.parametrize(("change", "what", "remedy"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_models_that_cannot_be_opened(change, what, remedy, original, tmp_path, run, monkeypatch):  # noqa: F811
    change(original)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    code, _, err = run(*compression(original, tmp_path / "out"))
    line = the_line(err)
    assert code == 1 and str(original) in line and what in line and remedy in line and len(line) < 500


@pytest.mark.parametrize("name", ["modles/llama", "llama", "a/b/c"])
def test_a_mistyped_path_is_called_so(name, tmp_path, run, monkeypatch):  # noqa: F811
    def unreachable(self, *_: object, **__: object) -> None:
        raise OSError("We couldn't connect to the hub. Check your internet connection or see how to …")

    monkeypatch.setattr(originals.transformers.PretrainedConfig, "get_config_dict", unreachable)
    code, _, err = run("compress", name, "--calibration", "x", "-o", tmp_path / "out")
    assert code == 1
    assert f"{name}: there is no such directory, and the hub gives no such model (We couldn't" in the_line(
        err
    )


def test_a_repository_without_safetensors_is_named(folder, tmp_path, run, monkeypatch):  # noqa: F811
    def without(**_: object) -> None:
        raise OSError("me/model does not appear to have a file named model.safetensors. Checkout …")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", without)
    code, _, err = run(*compression(folder, tmp_path / "out"))
    wanted = f"{folder}: the weights cannot be read (me/model does not appear to have a file named"
    assert code == 1 and wanted in the_line(err) and "wanted whole safetensors files" in err


# what no one expects


@pytest.mark.parametrize("error", [IndexError("index out of range in self"), KeyError("x"), MemoryError()])
def test_errors_of_every_kind_are_one_line(error, folder, tmp_path, run, monkeypatch):  # noqa: F811
    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(command, "calibrate", failing)
    code, out, err = run(*compression(folder, tmp_path / "out"))
    line = the_line(err)
    assert code == 1 and out == "" and line.startswith(f"rana: {type(error).__name__}: {error}")
    assert "`rana --debug COMMAND …` shows where" in line
    with pytest.raises(type(error)):
        main(["--debug", *map(str, compression(folder, tmp_path / "out"))])


def test_debug_changes_nothing_else(run):  # noqa: F811
    assert run("--debug", "info", "--json")[0] == 0
    assert "--debug" in run("--help")[1]


# disks


@pytest.mark.parametrize("size", [4_000, 100_000], ids=["unfinished work", "weights"])
def test_a_full_disk_is_one_line_and_loses_nothing(size, folder, compressed, tmp_path, run):  # noqa: F811
    output = shutil.copytree(compressed, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with small_disk(size):
        code, _, err = run(*compression(folder, output), "--flops-reduction", 0.3)
    failure = [line for line in err.splitlines() if line.startswith("rana: ")]
    assert code == 1 and "ile too large" in failure[-1] and "Traceback" not in err
    assert "keeps what is done. The same command goes on" in failure[0] and len(failure) == 2
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    code, _, err = run(*compression(folder, output), "--flops-reduction", 0.3)
    assert code == 0, err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def occupied(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("")
    return tmp_path / "file"


@pytest.mark.parametrize("option", ["output", "resume", "history", "times"])
def test_places_that_cannot_be_written_are_found_first(option, folder, tmp_path, run, monkeypatch):  # noqa: F811
    """A file is where a directory has to be."""
    file, output, more = occupied(tmp_path), tmp_path / "out", []
    if option == "output":
        output = file / "out"
    elif option == "resume":
        (tmp_path / "out.resume").write_text("")
        file = tmp_path / "out.resume"
    elif option == "history":
        more = ["--method", "rankadaptor", "--history", file / "history"]
    else:
        more = ["--time-reduction", 0.3, "--times", file / "times.json"]
    monkeypatch.setattr(command, "calibrate", None)
    monkeypatch.setattr(command, "measure_latency", None)
    code, _, err = run(*compression(folder, output), *more)
    assert code == 1 and f"{file} is no directory, wanted one to write to" in the_line(err)


def test_a_place_that_refuses_is_found_first(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("rana_kernels.system.files.TemporaryDirectory", refuse)
    for check in (check_writable, check_target, lambda place: Search(tokens(2), history=place)):
        with pytest.raises(
            PermissionError, match=r"cannot be written to \(Permission denied\): give another"
        ):
            check(tmp_path / "new" / "place")
    model = make_model()
    with pytest.raises(PermissionError, match="cannot be written to"):
        rana.compress(model, [tokens()], flops_reduction=0.3, resume_dir=tmp_path / "resume", progress=False)
    assert torch.is_tensor(model.model.layers[0].mlp.up_proj.weight)


def test_a_mount_point_cannot_be_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda self: self == tmp_path)
    with pytest.raises(OSError, match="is a mount point, which cannot be replaced: give a new directory"):
        check_target(tmp_path)
    check_target(tmp_path / "out")


def test_a_damaged_record_of_a_search_is_found_first(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="a.json is no record of a search"):
        Search(tokens(2), history=tmp_path)


def test_a_request_out_of_reach_is_found_before_calibration(folder, tmp_path, run, monkeypatch):  # noqa: F811
    monkeypatch.setattr(command, "calibrate", None)
    more = ["--method", "paper", "--flops-reduction", 0.99]
    code, _, err = run(*compression(folder, tmp_path / "out"), *more)
    assert code == 1 and "wanted more than 0 and at most 0." in the_line(err)


def test_tuning_finds_its_files_first(folder, compressed, tmp_path, run):  # noqa: F811
    command = ["tune", compressed, "--text"]
    code, _, err = run(*command, tmp_path / "none.txt")
    assert code == 1 and "none.txt: there is no such file" in the_line(err)
    code, _, err = run(*command, folder / "text.txt", "-o", occupied(tmp_path) / "table.json")
    assert code == 1 and "file is no directory, wanted one to write to" in the_line(err)


def test_a_file_that_is_not_written_whole_leaves_no_part(tmp_path):
    write_json(tmp_path / "a.json", [1])
    with small_disk(10), pytest.raises(OSError, match="too large"):
        write_json(tmp_path / "a.json", "long" * 5000)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "[1]"
