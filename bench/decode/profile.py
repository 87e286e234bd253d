"""What the time of a token goes to: our ops, torch's, and what is outside of both."""

import time
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile

from bench.decode.steps import Decoder

MOST = 6  # ops of torch's that are listed by name


@dataclass(frozen=True)
class Share:
    """`milliseconds` of a step that `what` takes, over `calls` calls. The profiler slows short ops down."""

    what: str
    milliseconds: float
    calls: float


def where_time_goes(decoder: Decoder, tokens: int = 8) -> list[Share]:
    """Of one step, on the processor that runs Python; kernels of a card run beside it and are not seen.

    Loops that torch.compile writes are no ops, and count as outside of them.
    """
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        begin = time.perf_counter()
        decoder.decode(tokens)
        whole = 1e3 * (time.perf_counter() - begin) / tokens  # as the profiler counts
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
