"""A part of docs/performance.md: several tokens at once, where masks meet plain low rank of the same cost."""

from bench.baselines import DTYPES
from bench.kernels import PUBLISHED, Lowrank
from bench.tables import table

Row = dict[str, str]
BASE = next(case for case in PUBLISHED if isinstance(case, Lowrank) and case.M > 1)
MOST = 16  # tokens that are decoded; more are a prompt
STATIC = ("x static low rank", "x static packed")
SHOWN = ("x dense", "x dense packed", *STATIC)
LINEAR = """### Several tokens at once: {K} → {N}, keep {keep:.2f}

A row is read if any of the tokens wants it: masks save half of the rows for one token, and hardly any for
four. *Rows* are those that some token wants of {R} stored, with kept ranks in random places. Static low rank
of the same cost stores fewer rows, and reads the same for any number of tokens. {lost}
"""
MODELS = """### Several texts at once, RaNA against static low rank of the same cost

Both run through our ops. {lost}
"""


def linear(rows: list[Row]) -> str:
    """One linear with more and more tokens; "" where the results do not have it."""
    cases = {case.name: case for case in PUBLISHED if _is_base(case)}
    found = [(cases[row["case"]], row) for row in rows if row["case"] in cases]
    # an earlier form of results counted other bytes
    if not any(case.M > 1 for case, _ in found) or "peak GFLOP/s" not in rows[0]:
        return ""
    found.sort(key=lambda entry: (entry[0].dtype, int(entry[1]["threads"]), entry[0].M))
    ratios = [name for name in SHOWN if any(row.get(name) for _, row in found)]
    titles = ["dtype", "threads", "tokens", "rows", "µs", *(name.replace("x ", "× ", 1) for name in ratios)]
    lines = [
        [c.dtype, r["threads"], c.M, _rows_read(c, r), r["us"], *(r.get(n) or "" for n in ratios)]
        for c, r in found
    ]
    lost = _lost([(f"{c.dtype}, {_on(r['threads'])}", c.M, _against_static(r)) for c, r in found], "token")
    title = LINEAR.format(K=BASE.K, N=BASE.N, R=BASE.R, keep=BASE.keep, lost=lost)
    return f"{title}\n{table(titles, lines)}"


def _is_base(case: object) -> bool:
    """The same linear for a few tokens, in a dtype in which there are results of several."""
    return (
        isinstance(case, Lowrank)
        and (case.K, case.N, case.R, case.live) == (BASE.K, BASE.N, BASE.R, BASE.live)
        and case.M <= MOST
        and case.dtype in ("bf16", "fp32")
    )


def _rows_read(case: Lowrank, row: Row) -> int:
    """From the bytes that the speed counts."""
    weights = 1e3 * float(row["GB/s"]) * float(row["us"]) / DTYPES[case.dtype].itemsize
    return round((weights - case.R * case.K) / case.N)


def _against_static(row: Row) -> float:
    return min(float(row[name]) for name in STATIC if row.get(name))


def models(rows: list[Row]) -> str:
    """Tokens a second of a whole model, for every prompt, batch and number of threads."""
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
    return f"{MODELS.format(lost=_lost(found, 'text'))}\n{table(titles, lines)}"


def _on(threads: str) -> str:
    return "one thread" if threads == "1" else f"{threads} threads"


def _lost(found: list[tuple[str, int, float]], what: str) -> str:
    """In words where ours is slower; `found`: (setting, tokens, how many times as fast as static ours is)."""
    settings: dict[str, list[str]] = {}
    for setting, count, ratio in found:
        if ratio < 1:
            settings.setdefault(setting, []).append(f"{ratio:.2f} with {count} {what}{'s' * (count > 1)}")
    if not settings:
        return "Ours is nowhere slower than it in these results."
    parts = "; ".join(f"{', '.join(ratios)} ({setting})" for setting, ratios in settings.items())
    return f"Ours is slower than it, with this part of its speed: {parts}."
