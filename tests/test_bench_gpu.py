"""The script that measures on a card, here on tiny problems in Triton's interpreter, with made-up times."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rana_kernels.backends import triton

pytestmark = pytest.mark.skipif(not triton.available(), reason="the triton package is not installed")
ROOT = Path(__file__).parent.parent

SCRIPT = """
import sys
from pathlib import Path
from bench import gpu
from bench.models import Model

gpu.DEVICE, gpu.DTYPES["bf16"] = "cpu", gpu.torch.float32
gpu.MODELS = {"tiny": Model(hidden=32, queries=32, keys=32, neurons=64, blocks=1)}
gpu.DENSITIES, gpu.TOKENS = (1.0, 0.5), (1, 5, 80)
gpu.cache_bytes = lambda: 1
gpu.card = lambda: "no-card"
def calls_all(contenders, rounds=15):
    results = {name: [call() for call in calls] for name, calls in contenders.items()}
    shapes = {y.shape for ys in results.values() for y in ys}
    assert len(shapes) == 1, shapes
    assert all(len(ys) > 1 for ys in results.values()), "weights are not rotated"
    close = [n for n in results if n != "dense" and n != "static"]
    for name in close[1:]:
        gpu.torch.testing.assert_close(results[name][0], results[close[0]][0], rtol=1e-4, atol=1e-4)
    return {name: [1.0 + i for i in range(rounds)] for name in contenders}
gpu.microseconds = calls_all
gpu.bandwidths, gpu.peak = lambda: (100.0, 90.0), lambda dtype: 1000.0
rows = gpu.measure(["tiny"], "bf16", None, 1e9)
gpu.show(rows)
gpu.write_csv(Path(sys.argv[1]), gpu.conditions(), rows)
"""


def test_the_script_measures_every_problem(tmp_path):
    path = tmp_path / "no-card.csv"
    child = subprocess.run(
        [sys.executable, "-c", SCRIPT, path],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-3000:]
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# no-card, served by")
    rows = list(csv.DictReader(lines[1:]))
    assert len(rows) == 3 * 2 * 3, "three ops, two densities, three numbers of tokens"
    for row in rows:
        assert float(row["rana triton us"]) == float(row["dense us"]) == 8.0
        assert float(row["rana triton x dense"]) == 1.0
        # MB in 8 µs, in percent of 100 GB/s
        assert float(row["rana triton % of copy"]) == pytest.approx(125 * float(row["MB"]), abs=0.2), row
