"""An installed wheel from end to end: it is run by `make test-wheel`, outside of the checkout."""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

import rana_kernels as rana
from rana_kernels import backends

MODEL = Path(__file__).resolve().parent.parent / "examples" / "demo_model"


def run(*arguments: object) -> str:
    """Run the command `rana` of this environment, and return what it prints."""
    done = subprocess.run(["rana", *map(str, arguments)], check=True, capture_output=True, text=True)
    return done.stdout


def main() -> None:
    checkout = MODEL.parent.parent
    assert checkout / "rana_kernels" not in Path(rana.__file__).parents, "the checkout is imported"
    assert shutil.which("c++") is None, "there is a compiler on the path"
    served = {op: by_device["cpu"] for op, by_device in backends.serving().items()}
    assert set(served.values()) == {"cpu"}, served
    x, rows = torch.randn(3, 64), torch.randn(64, 96)
    norms, threshold = torch.rand(64), torch.tensor(0.3)
    found = torch.ops.rana.masked_linear(x, rows, threshold, norms)
    torch.testing.assert_close(found, torch.where(x.abs() * norms >= threshold, x, 0) @ rows)
    with tempfile.TemporaryDirectory() as folder:
        text = MODEL / "calibration.safetensors"
        output = Path(folder) / "compressed"
        run("compress", MODEL, "--calibration", text, "--tokens", 4096, "--bits", 4, "-o", output)
        written = run("generate", output, "--prompt", "def main():", "--max-new-tokens", 8)
        facts = json.loads(run("info", "--json"))
    assert "def main():" in written, written
    assert facts["instruction_set"], facts
    print(f"torch {torch.__version__}: {facts['instruction_set']}, compressed and generated")


if __name__ == "__main__":
    main()
