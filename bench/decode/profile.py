"""How the time of a token is divided between our ops, torch's ops, and everything outside of ops."""

import time
from dataclasses import dataclass

from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from bench.decode.steps import Decoder
from bench.report.tables import terminal_table

MOST = 6  # torch's ops that are listed by name


@dataclass(frozen=True)
class Share:
    """`milliseconds` of a step that `what` takes, over `calls` calls. The profiler slows short ops down."""

    what: str
    milliseconds: float
    calls: float

    def __str__(self) -> str:
        return f"{self.milliseconds:.2f} ({self.calls:.0f})" if self.calls else f"{self.milliseconds:.2f}"


def where_time_goes(decoder: Decoder, tokens: int = 8) -> list[Share]:
    """Return the shares of one step on the processor that runs Python. A card's kernels are not seen.

    Loops that torch.compile writes are no ops, and count as outside of ops.
    """
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        begin = time.perf_counter()
        decoder.decode(tokens)
        whole = 1e3 * (time.perf_counter() - begin) / tokens  # by the clock of the profiler
    ours, others = {}, {}
    for event in profiler.key_averages():
        if event.key.startswith("rana::"):
            ours[event.key] = (event.cpu_time_total, event.count)
        elif event.key.startswith(("aten::", "mkldnn::")):
            others[event.key] = (event.self_cpu_time_total, event.count)
    listed = sorted(others, key=lambda name: -others[name][0])
    parts = {name: [ours[name]] for name in ours} | {name: [others[name]] for name in listed[:MOST]}
    parts["other ops of torch's"] = [others[name] for name in listed[MOST:]]
    shares = [
        Share(what, sum(time for time, _ in part) / 1e3 / tokens, sum(count for _, count in part) / tokens)
        for what, part in parts.items()
    ]
    return [*shares, Share("outside of ops", whole - sum(s.milliseconds for s in shares), 0)]


def share_table(shares: dict[str, list[Share]], threads: int) -> Table:
    found = {name: {share.what: share for share in part} for name, part in shares.items()}
    rows = [
        [what, *(str(part.get(what, "")) for part in found.values())]
        for what in dict.fromkeys(share.what for part in shares.values() for share in part)
    ]
    title = f"milliseconds of a step (calls), profiled, {threads} threads"
    return terminal_table(title, ["", *shares], rows)
