"""Every number of each file in bench/results, as tables in a Markdown page beside that file."""

from pathlib import Path

from bench.kernels.baselines import DTYPES
from bench.kernels.cases import COST_RATIO, DECODE, DENSITY, MODELS, PREFILL, PUBLISHED, Lowrank, cases
from bench.report.growth import compression, scaling
from bench.report.results import read_csv
from bench.report.tables import table

Row = dict[str, str]
# (title of a column, column of the results)
COLUMNS = (
    ("threads", "threads"),
    ("µs", "us"),
    ("p20–p80", "p20"),
    ("GB/s", "GB/s"),
    ("% of stream", "% of stream"),
    ("× dense", "x dense"),
    ("× dense compiled", "x dense compiled"),
    ("× dense packed", "x dense packed"),
    ("× static low rank", "x static low rank"),
    ("× static packed", "x static packed"),
    ("× masked in torch", "x masked in torch"),
    ("error", "error"),
)
BASELINES = ("x dense", "x dense compiled", "x dense packed", "x static low rank", "x static packed")
STATIC = ("x static low rank", "x static packed")
BASE = next(case for case in PUBLISHED if isinstance(case, Lowrank) and case.M > 1)
MOST = 16  # tokens of a decode step; more are a prompt
WRITTEN = "*Written by `python -m bench.report`. How to read it: [performance](../../docs/performance.md).*\n"
LINEAR = """## Several tokens at once: {K} → {N}, cost {cost_ratio:.2f}

A row is read if any of the tokens keeps it. Masks save half of the rows for one token, and hardly any for
four. *Rows* are those that at least one token keeps, of {R} stored, with the kept ranks in random places.
Static low rank of the same cost stores fewer rows, and reads the same for any number of tokens. {lost}
"""
TEXTS = """## Several texts at once: RaNA against static low rank of the same cost

Both run through our ops. {lost}
"""


def pages(results: Path) -> dict[Path, str]:
    """Return the text of each page by its path."""
    found = {path.with_suffix(".md"): _page(path) for path in sorted(results.glob("*.csv"))}
    for pattern, show in (("scale-*.json", scaling), ("cost-*.json", compression)):
        found |= {path.with_suffix(".md"): show(path) for path in sorted(results.glob(pattern))}
    return {path: _with_origin(text) for path, text in found.items()}


def _with_origin(text: str) -> str:
    title, _, rest = text.partition("\n")
    return f"{title}\n\n{WRITTEN}{rest}"


def _page(path: Path) -> str:
    stamp, rows = read_csv(path)
    parts = [f"# {path.stem}\n\n{stamp}.\n"]
    if "MB" in rows[0]:
        parts += ["Times inside CUDA graphs.\n", card(rows)]
    elif "case" in rows[0]:
        parts += processor(rows)
    else:
        parts.append(plain(rows, list(rows[0])))
        parts += [texts(rows)] if "contender" in rows[0] else []
    return "\n".join(parts)


def processor(rows: list[Row]) -> list[str]:
    parts = []
    for title, chosen in (
        ("One layer of Llama-2-7B, one to eight tokens", DECODE),
        ("The same layer at other densities", DENSITY),
        ("Many tokens", PREFILL),
    ):
        names = [case.name for case in chosen]
        parts.append(f"## {title}\n\n{timings([(r['case'], r) for r in rows if r['case'] in names])}")
    named = [
        (f"{model}: {linear}", row)
        for model, shape in MODELS.items()
        for linear, case in cases(shape).items()
        for row in rows
        if row["case"] == case.name
    ]
    title = f"One token through the linears of known models, cost about {COST_RATIO}, bfloat16"
    return [*parts, f"## {title}\n\n{timings(named)}", several_tokens(rows), losses(rows)]


def losses(rows: list[Row]) -> str:
    """List every case where a baseline is faster, the worst first."""
    lost = [(row, name) for row in rows for name in BASELINES if row.get(name) and float(row[name]) < 1]
    if not lost:
        return "## Where a baseline is faster\n\nIn none of these cases.\n"
    lost.sort(key=lambda entry: float(entry[0][entry[1]]))
    several = len({(row["case"], row["threads"]) for row, _ in lost})
    count = f"In {several} of {len(rows)} measurements some baseline is faster."
    found = [[row["case"], row["threads"], name.removeprefix("x "), row[name]] for row, name in lost]
    titles = ["case", "threads", "faster is", "ours is × as fast"]
    return f"## Where a baseline is faster\n\n{count}\n\n{table(titles, found)}"


def timings(entries: list[tuple[str, Row]]) -> str:
    """Show those of COLUMNS that these results have."""
    if not entries:
        return "Not measured.\n"
    columns = [(title, name) for title, name in COLUMNS if any(row.get(name) for _, row in entries)]
    return table(
        ["", *(title for title, _ in columns)],
        [[label, *(_cell(row, name) for _, name in columns)] for label, row in entries],
    )


def _cell(row: Row, name: str) -> str:
    return f"{row['p20']}–{row['p80']}" if name == "p20" else row.get(name) or ""


def card(rows: list[Row]) -> str:
    """Show one line a problem of a graphics card, with ours by backend."""
    backends = [name.removesuffix(" x dense") for name in rows[0] if name.endswith(" x dense")]
    fields = ["op", "model", "density", "M", "dtype", "dense us", "static us", "masked in torch us"]
    return plain(rows, fields + [f"{b} {what}" for b in backends for what in ("us", "% of copy", "x dense")])


def plain(rows: list[Row], fields: list[str]) -> str:
    """Show columns as they are in the file."""
    return table(fields, [[row.get(f) or "" for f in fields] for row in rows])


def several_tokens(rows: list[Row]) -> str:
    """Show one linear with more and more tokens; "" where the results do not have it."""
    known = {case.name: case for case in PUBLISHED if _is_base(case)}
    found = [(known[row["case"]], row) for row in rows if row["case"] in known]
    # an earlier form of results counted other bytes
    if not any(case.M > 1 for case, _ in found) or "peak GFLOP/s" not in rows[0]:
        return ""
    found.sort(key=lambda entry: (entry[0].dtype, int(entry[1]["threads"]), entry[0].M))
    ratios = [n for n in ("x dense", "x dense packed", *STATIC) if any(row.get(n) for _, row in found)]
    titles = ["dtype", "threads", "tokens", "rows", "µs", *(name.replace("x ", "× ", 1) for name in ratios)]
    lines = [
        [c.dtype, r["threads"], c.M, _rows_read(c, r), r["us"], *(r.get(n) or "" for n in ratios)]
        for c, r in found
    ]
    lost = _lost([(f"{c.dtype}, {_on(r['threads'])}", c.M, _against_static(r)) for c, r in found], "token")
    title = LINEAR.format(K=BASE.K, N=BASE.N, R=BASE.R, cost_ratio=BASE.cost_ratio, lost=lost)
    return f"{title}\n{table(titles, lines)}"


def _is_base(case: object) -> bool:
    """Say whether a case is the same linear for a few tokens, in a dtype with results for several tokens."""
    return (
        isinstance(case, Lowrank)
        and (case.K, case.N, case.R, case.live) == (BASE.K, BASE.N, BASE.R, BASE.live)
        and case.M <= MOST
        and case.dtype in ("bf16", "fp32")
    )


def _rows_read(case: Lowrank, row: Row) -> int:
    """Return the rows read, from the bytes that GB/s counts."""
    weights = 1e3 * float(row["GB/s"]) * float(row["us"]) / DTYPES[case.dtype].itemsize
    return round((weights - case.R * case.K) / case.N)


def _against_static(row: Row) -> float:
    return min(float(row[name]) for name in STATIC if row.get(name))


def texts(rows: list[Row]) -> str:
    """Show the tokens a second of a whole model, for every prompt, batch and number of threads."""
    speeds: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        setting = (row["prompt"], row["threads"], row["batch"])
        speeds.setdefault(setting, {})[row["contender"]] = float(row["tokens/s"])
    lines, found = [], []
    for (prompt, threads, batch), speed in speeds.items():
        ratio = speed["rana"] / speed["static"]
        found.append((f"prompt of {prompt}, {_on(threads)}", int(batch), ratio))
        lines.append([prompt, threads, batch, speed["static"], speed["rana"], f"{ratio:.2f}"])
    titles = ["prompt", "threads", "texts", "static tokens/s", "RaNA tokens/s", "RaNA / static"]
    return f"{TEXTS.format(lost=_lost(found, 'text'))}\n{table(titles, lines)}"


def _on(threads: str) -> str:
    return "one thread" if threads == "1" else f"{threads} threads"


def _lost(found: list[tuple[str, int, float]], what: str) -> str:
    """Say where ours is slower. `found`: (setting, tokens, how many times as fast as static ours is)."""
    settings: dict[str, list[str]] = {}
    for setting, count, ratio in found:
        if ratio < 1:
            settings.setdefault(setting, []).append(f"{ratio:.2f} with {count} {what}{'s' * (count > 1)}")
    if not settings:
        return "Ours is nowhere slower than static low rank in these results."
    parts = "; ".join(f"{', '.join(ratios)} ({setting})" for setting, ratios in settings.items())
    return f"Ours is slower, at these fractions of its speed: {parts}."
