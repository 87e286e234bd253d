"""The tables in Markdown, made of nothing but the results."""

from collections.abc import Iterable
from math import log1p
from typing import Any

from bench.report.tables import table as markdown

TITLES = {
    "both": "All linears of the blocks",
    "mlp": "The MLPs alone (attention dense and not counted)",
    "attention": "Attention's linears alone (MLPs dense and not counted)",
    "bytes": "Bytes read of all linears and lm_head (those in 16 bits = 1)",
}
LABELS = {
    "static": "static low rank",
    "teal": "TEAL",
    "teal-greedy": "TEAL, greedy",
    "wina": "WINA",
    "cats": "CATS",
    "paper": "RaNA, paper",
    "unmasked": "global without masks",
    "global": "RaNA, global",
    "rotated": "RaNA, global, rotated",
    "rankadaptor": "RaNA, rankadaptor",
    "rounded": "rounded to 8, 4 or 3 bits",
    "teal-8": "TEAL x 8 bits",
    "teal-4": "TEAL x 4 bits",
    "wina-4": "WINA x 4 bits",
    "global-8": "RaNA, global x 8 bits",
    "global-4": "RaNA, global x 4 bits",
    "global-auto": "RaNA, global x any bits",
    "rotated-8": "RaNA, global, rotated x 8 bits",
}
LAYER_BUDGET = 0.56
FAITHFUL = (
    "KL divergence from the dense model's predictions, in nats a token. The share of tokens with the same "
    "first choice is in brackets."
)
KINDS = {"own": "its own kind of text", "prose": "prose"}


def page(data: dict[str, Any], name: str) -> str:
    """Return everything that was measured as one Markdown page."""
    rows = list(data["rows"].values())
    parts = [
        f"# {name}",
        "Written by `python -m bench.quality`; do not edit. On: " + "; ".join(data["conditions"]),
    ]
    for scope, title in TITLES.items():
        found = [row for row in rows if row["scope"] == scope]
        if found:
            parts += [f"## {title}", FAITHFUL, faithfulness(found)] if _compared(found) else [f"## {title}"]
            parts += [_dense(data["dense"][scope]), quality(found)]
            compared = {row["method"] for row in found} & {"paper", "static"}
            parts += [gaps(found)] if scope == "both" and compared else []
        if any(row["recovered"] and not row["failed"] for row in found):
            parts += ["Of the gap to dense in loss, recovery closes:", recovered(found)]
    for part in dict.fromkeys(part for row in rows for part in row["layers"]):
        parts += [f"## Energy lost of {part}'s output, layer by layer, at {LAYER_BUDGET}", layers(rows, part)]
    for key, found in data.get("spread", {}).items():
        parts += _spread(key, found)
    return "\n\n".join(parts) + "\n"


def ordered(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort by method, whatever the order of the measurements."""
    return sorted(rows, key=lambda row: (list(LABELS).index(row["method"]), row["recovered"]))


def layer_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows whose layers are shown: all linears compressed to one budget, not recovered."""
    at = [row for row in ordered(rows) if row["scope"] == "both" and row["budget"] == LAYER_BUDGET]
    return [row for row in at if row["layers"] and not row["recovered"]]


def label(row: dict[str, Any]) -> str:
    return LABELS[row["method"]] + (" + recovery" if row["recovered"] else "")


def quality(rows: list[dict[str, Any]]) -> str:
    """Show perplexity over dense, and the measured cost, for each method at each budget."""
    cells: dict[str, dict[float, str]] = {}
    for row in ordered(rows):
        shown = "out of reach" if row["failed"] else f"{row['over_dense']:+.2%} ({row['cost_ratio']:.3f})"
        cells.setdefault(label(row), {})[row["budget"]] = shown
    return _by_budget("Cost", rows, cells)


def faithfulness(rows: list[dict[str, Any]]) -> str:
    """Show the divergence from the dense model's predictions, for each method at each budget."""
    cells: dict[str, dict[float, str]] = {}
    for row in ordered(_compared(rows)):
        shown = "out of reach" if row["failed"] else f"{row['kl']:.4f} ({row['agreed']:.1%})"
        cells.setdefault(label(row), {})[row["budget"]] = shown
    return _by_budget("Cost", rows, cells)


def _compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows that were compared with the dense model, or none if nothing was."""
    return [row for row in rows if row["failed"] or "kl" in row] if any("kl" in row for row in rows) else []


def _by_budget(title: str, rows: list[dict[str, Any]], cells: dict[str, dict[float, str]]) -> str:
    """Show the cells {line: {budget: words}}, with a column for each budget of `rows`."""
    columns = sorted({row["budget"] for row in rows}, reverse=True)
    lines = [[name, *(found.get(b, "") for b in columns)] for name, found in cells.items()]
    return _table([[title, *(f"{b:.2f}" for b in columns)], *lines])


def _dense(found: dict[str, Any]) -> str:
    return (
        f"Perplexity above that of the dense model, {found['perplexity']:.3f} over {found['predictions']:,} "
        "predictions. The measured cost is in brackets."
    )


def gaps(rows: list[dict[str, Any]]) -> str:
    """Show the gap of `global` to dense, as a share of the gap of other methods."""
    over: dict[str, dict[float, float]] = {}
    for row in rows:
        if not row["failed"]:
            over.setdefault(label(row), {})[row["budget"]] = row["over_dense"]
    ours = over.get("RaNA, global", {})
    cells = {
        name: {b: f"{ours[b] / gap:.2f}" for b, gap in over.get(name, {}).items() if gap and b in ours}
        for name in ("RaNA, paper", "static low rank")
    }
    return _by_budget("Gap to dense of RaNA, global ÷ that of", rows, cells)


def recovered(rows: list[dict[str, Any]]) -> str:
    """Show the share of each method's loss, in nats, that training recovers."""
    loss = {(row["method"], row["budget"], row["recovered"]): log1p(row["over_dense"])
            for row in ordered(rows) if not row["failed"]}  # fmt: skip
    cells: dict[str, dict[float, str]] = {}
    for (method, budget, trained), left in loss.items():
        if trained:
            share = 1 - left / loss[method, budget, False]
            cells.setdefault(LABELS[method], {})[budget] = f"{share:.0%}"
    return _by_budget("Cost", rows, cells)


def layers(rows: list[dict[str, Any]], part: str) -> str:
    """Show the share of its output's energy that `part` of each layer loses, with all linears compressed."""
    at = layer_rows(rows)
    if not at:
        return "Not measured."
    table = [["Layer", *map(str, range(len(at[0]["layers"][part]))), "mean"]]
    for row in at:
        lost = [1 - share for share in row["layers"][part]]
        table.append([label(row), *(f"{x:.2%}" for x in (*lost, sum(lost) / len(lost)))])
    return _table(table)


def texts(found: dict[str, Any]) -> str:
    """Show models calibrated on either kind of text, reading either kind."""
    table = [["Calibrated on", "read", "over dense", "planned", "cost", "live rows, against the plan",
              "cost of a token: p5", "median", "p95", "max", "loss added: median", "p95", "max"]]  # fmt: skip
    for entry in found["texts"]:
        numbers = (entry["planned"], entry["cost_ratio"])
        tokens = (entry["tokens"][q] for q in ("p5", "median", "p95", "max"))
        more = (entry["more_loss"][q] for q in ("median", "p95", "max"))
        table.append([
            KINDS[entry["calibrated"]], KINDS[entry["read"]], f"{entry['over_dense']:+.2%}",
            *(f"{x:.3f}" for x in numbers), f"{entry['drift']:+.1%}",
            *(f"{x:.3f}" for x in tokens), *(f"{x:.2f}" for x in more),
        ])  # fmt: skip
    return _table(table)


def _spread(key: str, found: dict[str, Any]) -> list[str]:
    rows = [["Adapter", "stored", "planned", "p5", "median", "p95", "max"]]
    for adapter in found["adapters"]:
        columns = ("rank", "planned", "p5", "median", "p95", "max")
        rows.append([f"`{' '.join(adapter['names'])}`", *(f"{adapter[c]:.0f}" for c in columns)])
    return [
        f"## {key}: over tokens, and text of another kind", texts(found),
        "Live rows of a token:", _table(rows),
        "Predictions that lose most:", _examples(found["lose_most"]),
        "Tokens that cost most:", _examples(found["cost_most"]),
    ]  # fmt: skip


def _examples(examples: list[dict[str, Any]]) -> str:
    table = [["after", "next", "loss", "dense", "cost"]]
    for entry in examples:
        numbers = (entry["loss"], entry["dense_loss"], entry["cost_ratio"])
        table.append([_code(entry["text"]), _code(entry["next"]), *(f"{x:.2f}" for x in numbers)])
    return _table(table)


def _code(text: str) -> str:
    return f"`` {text!r} ``".replace("|", "\\|")


def _table(rows: list[list[str]]) -> str:
    return markdown(rows[0], rows[1:]).rstrip("\n")
