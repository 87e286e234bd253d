"""The tables, in Markdown, from the results alone."""

from collections.abc import Iterable
from math import log1p
from typing import Any

TITLES = {
    "both": "All linears of the blocks",
    "mlp": "The MLPs alone (attention dense and not counted)",
    "attention": "Attention's linears alone (MLPs dense and not counted)",
}
LABELS = {
    "static": "static low rank",
    "teal": "TEAL",
    "wina": "WINA",
    "cats": "CATS",
    "paper": "RaNA, paper",
    "unmasked": "global without masks",
    "global": "RaNA, global",
    "rankadaptor": "RaNA, rankadaptor",
}
LAYER_BUDGET = 0.56
KINDS = {"own": "its own kind of text", "prose": "prose"}


def page(data: dict[str, Any], name: str) -> str:
    """Everything that was measured, as one Markdown page."""
    rows = list(data["rows"].values())
    parts = [
        f"# {name}",
        "Written by `python -m bench.quality`; do not edit. On: " + "; ".join(data["conditions"]),
    ]
    for scope, title in TITLES.items():
        found = [row for row in rows if row["scope"] == scope]
        if found:
            parts += [f"## {title}", _dense(data["dense"][scope]), quality(found)]
            parts += [gaps(found)] if scope == "both" else []
        if any(row["recovered"] and not row["failed"] for row in found):
            parts += ["Of the gap to dense in loss, recovery closes:", recovered(found)]
    for part in dict.fromkeys(part for row in rows for part in row["layers"]):
        parts += [f"## Energy lost of {part}'s output, layer by layer, at {LAYER_BUDGET}", layers(rows, part)]
    for key, found in data.get("spread", {}).items():
        parts += _spread(key, found)
    return "\n\n".join(parts) + "\n"


def ordered(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Method by method, whatever the order in which they were measured."""
    return sorted(rows, key=lambda row: (list(LABELS).index(row["method"]), row["recovered"]))


def label(row: dict[str, Any]) -> str:
    return LABELS[row["method"]] + (" + recovery" if row["recovered"] else "")


def budgets(rows: Iterable[dict[str, Any]]) -> list[float]:
    return sorted({row["budget"] for row in rows}, reverse=True)


def quality(rows: list[dict[str, Any]]) -> str:
    """Perplexity over dense, and the cost that was measured, for each method at each budget."""
    columns = budgets(rows)
    cells: dict[str, dict[float, str]] = {}
    for row in ordered(rows):
        shown = "out of reach" if row["failed"] else f"{row['over_dense']:+.2%} ({row['keep']:.3f})"
        cells.setdefault(label(row), {})[row["budget"]] = shown
    table = [["Cost kept", *(f"{b:.2f}" for b in columns)]]
    table += [[name, *(found.get(b, "") for b in columns)] for name, found in cells.items()]
    return _table(table)


def _dense(found: dict[str, Any]) -> str:
    return (
        f"Perplexity above that of the dense model, {found['perplexity']:.3f} over {found['predictions']:,} "
        "predictions. In brackets the cost that was measured on them."
    )


def gaps(rows: list[dict[str, Any]]) -> str:
    """The gap of one budget to dense, as a share of the gap of the others."""
    over = {(label(row), row["budget"]): row["over_dense"] for row in rows if not row["failed"]}
    columns = budgets(rows)
    table = [["Gap to dense of RaNA, global ÷ that of", *(f"{b:.2f}" for b in columns)]]
    for name in ("RaNA, paper", "static low rank"):
        shares = (_ratio(over.get(("RaNA, global", b)), over.get((name, b))) for b in columns)
        table.append([name, *shares])
    return _table(table)


def _ratio(gap: float | None, other: float | None) -> str:
    return "" if gap is None or not other else f"{gap / other:.2f}"


def recovered(rows: list[dict[str, Any]]) -> str:
    """Of what a method loses, in nats, the share that its training wins back."""
    loss = {(row["method"], row["budget"], row["recovered"]): log1p(row["over_dense"])
            for row in rows if not row["failed"]}  # fmt: skip
    columns = budgets(rows)
    table = [["Cost kept", *(f"{b:.2f}" for b in columns)]]
    for method in LABELS:
        cells = [
            f"{1 - loss[method, b, True] / loss[method, b, False]:.0%}" if (method, b, True) in loss else ""
            for b in columns
        ]
        table += [[LABELS[method], *cells]] if any(cells) else []
    return _table(table)


def layers(rows: list[dict[str, Any]], part: str) -> str:
    """The share of the energy of `part`'s output that each layer loses, where all linears are compressed."""
    at = [row for row in ordered(rows) if row["scope"] == "both" and row["budget"] == LAYER_BUDGET]
    at = [row for row in at if row["layers"] and not row["recovered"]]
    if not at:
        return "Not measured."
    table = [["Layer", *map(str, range(len(at[0]["layers"][part]))), "mean"]]
    for row in at:
        lost = [1 - share for share in row["layers"][part]]
        table.append([label(row), *(f"{x:.2%}" for x in (*lost, sum(lost) / len(lost)))])
    return _table(table)


def texts(found: dict[str, Any]) -> str:
    """One model's adapters read with its own kind of text and the other, and the other way round."""
    table = [["Calibrated on", "read", "over dense", "planned", "cost", "rows kept, against the plan",
              "cost of a token: p5", "median", "p95", "max", "loss added: median", "p95", "max"]]  # fmt: skip
    for entry in found["texts"]:
        numbers = (entry["planned"], entry["keep"])
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
        "Rows that a token keeps:", _table(rows),
        "Predictions that lose most:", _spots(found["lose_most"]),
        "Tokens that cost most:", _spots(found["keep_most"]),
    ]  # fmt: skip


def _spots(spots: list[dict[str, Any]]) -> str:
    table = [["after", "next", "loss", "dense", "cost"]]
    for spot in spots:
        numbers = (spot["loss"], spot["dense_loss"], spot["cost_ratio"])
        table.append([_code(spot["text"]), _code(spot["next"]), *(f"{x:.2f}" for x in numbers)])
    return _table(table)


def _code(text: str) -> str:
    return f"`` {text!r} ``".replace("|", "\\|")


def _table(rows: list[list[str]]) -> str:
    head, *body = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])
