"""Rows as they are written, and tables as they are shown."""

from rich.table import Table

from bench.decode.drafts import Drafting
from bench.decode.measure import Setting, Speed
from bench.decode.profile import Share
from bench.report import Row

BASELINE = "dense"


def rows(setting: Setting, speeds: dict[str, Speed]) -> list[Row]:
    """One for each contender: tokens a second of the whole batch, and how many times those of dense."""
    dense = speeds[BASELINE]
    found = []
    for name, speed in speeds.items():
        rate = {
            at: round(1e6 * setting.batch / getattr(speed.step, at), 2) for at in ("median", "p20", "p80")
        }
        found.append(
            {
                "prompt": setting.prompt,
                "batch": setting.batch,
                "threads": setting.threads,
                "contender": name,
                "first token ms": round(speed.first.median / 1e3, 1) if speed.first else "",
                "x dense, first": ratio(dense.first.median, speed.first.median) if speed.first else "",
                "tokens/s": rate["median"],
                "p20": rate["p80"],
                "p80": rate["p20"],
                "x dense": ratio(dense.step.median, speed.step.median),
            }
        )
    return found


def ratio(slow: float, fast: float) -> float:
    return round(slow / fast, 2)


def share_table(shares: dict[str, list[Share]], threads: int) -> Table:
    """What each contender's step takes, by what it does."""
    table = Table("", *shares, title=f"milliseconds of a step (calls), profiled, {threads} threads")
    found = {name: {share.what: share for share in part} for name, part in shares.items()}
    for what in dict.fromkeys(share.what for part in shares.values() for share in part):
        table.add_row(what, *(_cell(part.get(what)) for part in found.values()))
    return table


def _cell(share: Share | None) -> str:
    if share is None:
        return ""
    return f"{share.milliseconds:.2f} ({share.calls:.0f})" if share.calls else f"{share.milliseconds:.2f}"


def draft_table(found: list[Drafting], threads: int) -> Table:
    columns = ("drafted", "accepted", "same text", "tokens/s", "dense alone", "x dense")
    table = Table(*columns, title=f"RaNA drafts for the dense model, {threads} threads")
    for d in found:
        rates = (f"{r:.1f}" for r in (d.tokens_per_second, d.dense_tokens_per_second))
        table.add_row(str(d.drafted), f"{d.accepted:.2f}", f"{d.same:.0%}", *rates, f"{d.speedup:.2f}")
    return table
