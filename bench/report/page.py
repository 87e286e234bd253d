"""docs/performance.md: for each device the headline cases, and where ours is slower."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.kernels.cases import PUBLISHED, Lowrank, Mlp, Neurons
from bench.report import bits
from bench.report.results import ROOT, read_csv
from bench.report.tables import table

PAGE = ROOT / "docs" / "performance.md"
Row = dict[str, str]
DEVICES = {
    "amd-epyc": "AMD EPYC (Zen 5)",
    "intel-r-xeon-r-processor": "Intel Xeon (Emerald Rapids)",
    "nvidia-h100-80gb-hbm3": "NVIDIA H100",
}
UP, DOWN, MLP = "Llama-2-7B up", "Llama-2-7B down", "Llama-2-7B MLP"
HEADLINE = {
    **{Lowrank(4096, 11008, 2464, 1377, 1, d): f"{UP}, {d}" for d in ("bf16", "fp32")},
    Neurons(11008, 4096, 5504, 1, "bf16"): f"{DOWN}, half of the neurons, bf16",
    Mlp(4096, 11008, 2464, 1377, 6164, 1, "bf16"): f"{MLP}, bf16",
    Mlp(2048, 8192, 1152, 842, 4587, 1, "bf16"): "Llama-3.2-1B MLP, bf16",
    **{Lowrank(4096, 11008, 2464, 1377, M, "bf16"): f"{UP}, bf16" for M in (2, 4, 8, 64, 256)},
}
PLOTS = {"speed": "speed-up against cost", "roofline": "every case under the roofline"}
ON_CARD = {"masked_lowrank_linear": UP, "masked_linear": DOWN, "masked_mlp": MLP}
BASELINES = ("dense", "dense compiled", "dense packed", "static low rank", "static packed")
FIRST = "dense, first token"  # of whole models: from the prompt to the first token after it
# the baselines in the tables of headline cases
SHOWN = ("dense", "dense packed", "static low rank", "static packed")
SHOWN_OF_MODELS = ("dense", "static low rank", FIRST)
TOKENS = {"1 token": (1, 1), "2 to 8": (2, 8), "more than 8": (9, 10**6)}
INTRODUCTION = """# Performance

*Written by `python -m bench.report` from the files in `bench/results`. Every number is in one of them.*

- **× dense** and every other column with × is the time of that baseline divided by ours; below 1 ours is
  slower.
- **Dense** is torch's `F.linear`. **Packed** has its weights in oneDNN's own layout, which `torch.compile`
  makes of a model's weights with its option `freezing`. **Static low rank** is two dense products at the same
  cost as ours.
- **% of bandwidth** compares the weight bytes that ours must read, over its time, with the best streaming
  loop timed in the same rounds (on a card: with a copy). Each thread of the loop reads one fixed share. On
  two threads some of our kernels read faster than the loop, and are then above 100.
- The tables below show headline cases, at 0.56 of the dense multiply-adds if they do not say otherwise. The
  counts of losses are over all cases, also at other costs. Weights are random, live ranks lie in random
  places, and contenders take turns over copies of the weights that are larger than the cache. Times are
  medians.
- Whole models have random weights (but for the demo model), and static low rank runs through our ops. They
  decode after 32 tokens, and ours is given in tokens a second of all texts together. Compiled models have
  packed dense weights. **Measured with** names the revision, and whatever else differs from the conditions
  of the kernels, which stand below the device's name. A dirty revision had changes that were not committed.
- In the tables of every number, **masked in torch** is ours in torch's own operations, **parts** is an MLP in
  separate ops, and **error** is ‖y - exact‖ / ‖exact‖ against float64.
- The files of one processor's name may come from different machines, so compare ratios within a file. A
  hypervisor hid AMX from the Intel that ran the whole models, and so from torch too.

Quality at the same cost is in [quality](quality.md), and the reasons for the losses are in
[limits](limits.md).
"""
REPRODUCE = """## How to reproduce it

```sh
python -m bench                        # a processor: the tests of the ops, then every case
python -m bench --quantized            # weights of 16, 8 and 4 bits, beside torch's quantised products
python -m bench.decode Llama-3.2-1B    # whole models; --compile, --prompt, --batch, --threads
python -m bench.gpu                    # a card: tests first, then times
python -m bench.scale                  # how times grow with sizes
python -m bench.cost                   # how long compressing takes
python -m bench.report                 # this page, the tables below and the plots
```

`python -m bench --check` fails if a kernel is slower than in the stored results of the same machine, and
`python -m bench --base REV` compares with another revision.
"""


@dataclass(frozen=True)
class Entry:
    """One measurement of ours.

    ratios     how many times as fast as each baseline it is
    measured   of a whole model: its revision, and the conditions that differ from those of the kernels
    """

    case: str
    tokens: int
    threads: str
    ours: str
    bandwidth: str
    ratios: dict[str, float]
    measured: str = ""


WHOLE = ("decode-", "rivals-", "drafts-", "unions-")  # the results of whole models


def page(results: Path) -> str:
    files = {path.stem: read_csv(path) for path in sorted(results.glob("*.csv"))}
    in_bits = {s: found for s, found in files.items() if bits.is_of_kernels(found[1])}
    # an earlier form of results has no peak, and its machine has newer ones
    devices = [s for s, (_, rows) in files.items() if "peak GFLOP/s" in rows[0] and s not in in_bits]
    parts = [*(_device(stem, files) for stem in devices), *bits.section(in_bits)]
    return "\n".join([INTRODUCTION, *parts, REPRODUCE, _links(results)])


def _device(stem: str, files: dict[str, tuple[str, list[Row]]]) -> str:
    stamp, rows = files[stem]
    on_card = "MB" in rows[0]
    kernels = _card(rows) if on_card else _processor(rows)
    chosen = _card(_headline_problems(rows)) if on_card else _processor(_headline_cases(rows))
    decoded = [
        entry
        for name, (own, part) in files.items()
        if name.startswith("decode-") and name.endswith(f"-{stem}")
        for entry in _models(part, _measured(own, stamp))
    ]
    plots = " ".join(
        f"![{words}]({kind}-{stem}.png)"
        for kind, words in PLOTS.items()
        if (ROOT / "docs" / f"{kind}-{stem}.png").exists()
    )
    parts = [
        f"## {DEVICES.get(stem, stem)}\n\n{stamp}.\n",
        *([f"{plots}\n"] if plots else []),
        _kernel_table(chosen),
        *([_model_table(decoded)] if decoded else []),
    ]
    return "\n".join([*parts, _losses(kernels, decoded)])


def _measured(own: str, kernels: str) -> str:
    """Return the revision of a stamp, and the other parts that the stamp of the kernels does not have."""
    known = [part for part in kernels.split(", ") if not part.startswith("revision")]
    return ", ".join(part for part in own.split(", ") if part not in known)


def _kernel_table(entries: list[Entry]) -> str:
    shown = [name for name in SHOWN if any(name in e.ratios for e in entries)]
    titles = ["case", "tokens", "threads", "ours, µs", "% of bandwidth", *(f"× {name}" for name in shown)]
    lines = [[e.case, e.tokens, e.threads, e.ours, e.bandwidth, *_cells(e, shown)] for e in entries]
    return table(titles, lines)


def _model_table(entries: list[Entry]) -> str:
    ratios = [f"× {name}" for name in SHOWN_OF_MODELS]
    titles = ["whole model", "threads", "ours, tokens/s", *ratios, "measured with"]
    chosen = [e for e in entries if "after 32" in e.case and e.tokens in (1, 8)]
    lines = [[e.case, e.threads, e.ours, *_cells(e, SHOWN_OF_MODELS), e.measured] for e in chosen]
    return table(titles, lines)


def _cells(entry: Entry, shown: Iterable[str]) -> list[str]:
    return [f"{entry.ratios[name]:.2f}" if name in entry.ratios else "" for name in shown]


def _headline_cases(rows: list[Row]) -> list[Row]:
    return [row | {"label": HEADLINE[c]} for c in HEADLINE for row in rows if row["case"] == c.name]


def _processor(rows: Iterable[Row]) -> list[Entry]:
    tokens = {case.name: case.M for case in PUBLISHED}
    return [
        Entry(
            row.get("label", row["case"]), tokens[row["case"]], row["threads"], row["us"],
            row.get("% of stream") or "",
            {name: float(row[f"x {name}"]) for name in BASELINES if row.get(f"x {name}")},
        )
        for row in rows
        if row["case"] in tokens
    ]  # fmt: skip


def _headline_problems(rows: list[Row]) -> list[Row]:
    chosen = [row for row in rows if row["density"] == "0.56" and row["model"] == rows[0]["model"]]
    return sorted(chosen, key=lambda row: (list(ON_CARD).index(row["op"]), int(row["M"])))


def _card(rows: Iterable[Row]) -> list[Entry]:
    """Return the entries of our CUDA kernels."""
    ours = "rana cuda"
    found = []
    for row in rows:
        if not row.get(f"{ours} us"):
            continue
        us = float(row[f"{ours} us"])
        known = (("dense", "dense us"), ("static low rank", "static us"))
        ratios = {name: float(row[column]) / us for name, column in known if row.get(column)}
        label = f"{ON_CARD[row['op']]}, {row['dtype']}"
        found.append(
            Entry(label, int(row["M"]), "", row[f"{ours} us"], row.get(f"{ours} % of copy", ""), ratios)
        )
    return found


def _models(rows: list[Row], measured: str) -> list[Entry]:
    """Return an entry for each setting of whole models: ours against dense and static low rank."""
    settings: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        setting = tuple(row.get(f, "") for f in ("model", "mode", "prompt", "batch", "threads"))
        settings.setdefault(setting, {})[row["contender"]] = row
    found = []
    for (model, mode, prompt, batch, threads), part in settings.items():
        speed = {name: float(row["tokens/s"]) for name, row in part.items()}
        ours = next(name for name in part if name == "rana" or name.startswith("masked"))
        others = {"dense": "dense", "static low rank": "static"}
        ratios = {title: speed[ours] / speed[name] for title, name in others.items() if name in speed}
        if part[ours].get("x dense, first"):
            ratios[FIRST] = float(part[ours]["x dense, first"])
        width = ours.removeprefix("rana").removeprefix("masked")
        case = f"{model}{width}, {mode}, {batch} text{'s' * (batch != '1')} after {prompt}"
        found.append(Entry(case, int(batch), threads, f"{speed[ours]:.1f}", "", ratios, measured))
    return found


def _losses(kernels: list[Entry], decoded: list[Entry]) -> str:
    """Count the measurements where a baseline is faster, by number of tokens, with the worst one."""
    lines = []
    for what, entries in (("", kernels), ("whole models, ", decoded)):
        for name in (*BASELINES, FIRST):
            groups = ([e for e in entries if low <= e.tokens <= high] for low, high in TOKENS.values())
            cells = [_lost(group, name) for group in groups]
            if any(cells):
                lines.append([f"{what}{name}", *cells])
    words = "How many of all measurements the baseline wins, and the lowest speed of ours, baseline = 1.\n"
    return f"### Where ours is slower\n\n{words}\n{table(['baseline', *TOKENS], lines)}"


def _lost(entries: list[Entry], name: str) -> str:
    ratios = [entry.ratios[name] for entry in entries if name in entry.ratios]
    lost = [ratio for ratio in ratios if ratio < 1]
    if not lost:
        return f"0 of {len(ratios)}" if ratios else ""
    return f"{len(lost)} of {len(ratios)}, {min(lost):.2f}"


def _links(results: Path) -> str:
    """Link the pages with every number."""
    measured = sorted(path.stem for path in results.glob("*.csv"))
    others = sorted(path.stem for kind in ("scale", "cost") for path in results.glob(f"{kind}-*.json"))
    groups = {
        "Kernels": [stem for stem in measured if not stem.startswith(WHOLE)],
        "Whole models": [stem for stem in measured if stem.startswith(WHOLE)],
        "Growth and cost": others,
    }
    lines = [
        f"- {name}: " + ", ".join(f"[{stem}](../bench/results/{stem}.md)" for stem in stems)
        for name, stems in groups.items()
    ]
    return "\n".join(["## All tables\n", *lines]) + "\n"
