"""Weights of 16, 8 and 4 bits: a table for docs/performance.md and a plot, from one file of results each.

Every ratio is of contenders that took turns in one run.
"""

from collections.abc import Iterator

from matplotlib.axes import Axes

from bench.kernels.cases import BITS, QUANTIZED, QUANTIZED_COST_RATIO
from bench.kernels.layers import NeuronMlp
from bench.kernels.quantized import RIVALS
from bench.report.tables import table

LINEAR_TOKENS, MASKED_TOKENS = (1, 8, 256), (1, 8)  # shown here; the file of results has all
PROCESSORS = {"25-17-1": "Zen 4", "26-2-1": "Zen 5", "6-106-6": "Ice Lake"}  # by family, model and stepping
Row = dict[str, str]
CASES = {case.name: case for case in QUANTIZED}
WORDS = """## Weights of 16, 8 and 4 bits

Shapes of Llama-2-7B; masked ops at {cost_ratio} of the cost; most threads. In 16 bits, a cell has the µs of
ours. In 8 and 4 bits, it has × ours in 16 bits / × the fastest of torch's quantised products, which are dense
and have 8 or 4 bits. Weights are random, so several tokens together touch almost every row.
"""


def is_of_kernels(rows: list[Row]) -> bool:
    """Say whether rows are of ops with quantised weights."""
    return "bits" in rows[0] and "case" in rows[0]


def section(files: dict[str, tuple[str, list[Row]]]) -> Iterator[str]:
    """Yield the parts of the page: nothing without results."""
    if files:
        yield WORDS.format(cost_ratio=QUANTIZED_COST_RATIO)
        conditions = [f"- {stamp}. Plot: [{stem}.png]({stem}.png)" for stem, (stamp, _) in files.items()]
        yield "\n".join(conditions) + "\n"
        yield _table(files)


def _processor(stamp: str) -> str:
    name, _, model = stamp.partition(",")[0].rpartition(" ")
    return PROCESSORS.get(model, name or stamp)


def most_threads(rows: list[Row]) -> list[Row]:
    most = max(int(row["threads"]) for row in rows)
    return [row for row in rows if int(row["threads"]) == most and row["case"] in CASES]


def fastest(row: Row) -> float:
    """Return how many times as fast as the fastest rival ours is."""
    return min(float(row[f"x {name}"]) for name in RIVALS)


def _table(files: dict[str, tuple[str, list[Row]]]) -> str:
    found: dict[tuple[str, int], dict[tuple[str, int | None], str]] = {}
    for stem, (_, rows) in files.items():
        for row in most_threads(rows):
            case = CASES[row["case"]]
            masked = abs(float(row["cost_ratio"]) - QUANTIZED_COST_RATIO) < 0.01
            if case.M in (LINEAR_TOKENS if case.op == "linear" else MASKED_TOKENS if masked else ()):
                shape = case.name.partition(" live=")[0].partition(" R=")[0].partition(" M=")[0]
                found.setdefault((shape, case.M), {})[stem, case.bits] = _cell(row, case.bits)
    columns = [(stem, bits) for stem in files for bits in BITS]
    lines = [[*key, *(cells.get(column, "") for column in columns)] for key, cells in found.items()]
    return table(
        ["op", "tokens", *(f"{_processor(files[stem][0])}, {bits} bits" for stem, bits in columns)], lines
    )


def _cell(row: Row, bits: int | None) -> str:
    return row["us"] if bits == 16 else f"{float(row['x rana bf16']):.2f} / {fastest(row):.2f}"


def draw(axes: Axes, rows: list[Row]) -> None:
    """Draw the time of a neuron MLP for one token against its cost, beside torch's dense products."""
    one = [row for row in most_threads(rows) if _is_neuron_mlp(row)]
    for number, bits in enumerate(BITS):
        line = sorted((float(r["cost_ratio"]), float(r["us"])) for r in one if r["bits"] == str(bits))
        if line:
            axes.plot(*zip(*line, strict=True), "o-", color=f"C{number}", label=f"ours, {bits} bits")
    for number, name in enumerate(RIVALS if one else ()):
        us = sum(float(row["us"]) * float(row[f"x {name}"]) for row in one) / len(one)
        axes.axhline(us, ls="--", color=f"C{number + 3}", label=f"{name}, dense")
    axes.set(xlabel="cost, dense = 1", ylabel="µs", ylim=(0, None))
    axes.set_title("One token through the MLP of Llama-2-7B, masks on inputs", loc="left")


def _is_neuron_mlp(row: Row) -> bool:
    case = CASES[row["case"]]
    return isinstance(case, NeuronMlp) and case.M == 1
