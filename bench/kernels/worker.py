"""`python -m bench.kernels.worker`: answer requests to time our op, one line of JSON each, for `compare`.

{"package": null}              the folder that rana_kernels was imported from
{"case": {...}, "threads": n}  true, once the weights are made
{"time": null}                 the seconds of one call
"""

import json
import sys
from collections.abc import Callable

import torch

import rana_kernels
from bench.kernels.linears import Lowrank, Neurons
from bench.kernels.mlp import Mlp
from bench.kernels.timing import once, repeats

CASES = {kind.__name__: kind for kind in (Lowrank, Neurons, Mlp)}


def main() -> None:
    time: Callable[[], float] | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if "package" in request:
            answer: object = rana_kernels.__path__[0]
        elif "case" in request:
            time, answer = prepared(*next(iter(request["case"].items())), request["threads"]), True
        else:
            assert time is not None, "a case comes first"
            answer = time()
        print(json.dumps(answer), flush=True)


def prepared(kind: str, fields: dict, threads: int) -> Callable[[], float]:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    run = CASES[kind](**fields).contenders().calls["rana"]
    calls = repeats(run)
    return lambda: once(run, threads, calls)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
