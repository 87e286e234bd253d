"""llama.cpp in a process of its own, from the wheel `xllamacpp`.

    python -m bench.decode.llama_cpp FILE THREADS

loads a GGUF file. For each line {"prompt": [ids], "tokens": n} it writes a line {"first": s, "each": s}: the
seconds to the first token, and those of every further one, by llama.cpp's own clock.
"""

import json
import subprocess
import sys
from pathlib import Path

from bench.report.results import ROOT

LENGTH = 2048  # tokens of a text


class LlamaCpp:
    """A process that writes texts. It has a file and a number of threads."""

    def __init__(self, path: Path, threads: int) -> None:
        command = [sys.executable, "-m", "bench.decode.llama_cpp", str(path), str(threads)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)  # type: ignore[call-overload]

    def write(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        """Return the seconds to the first token and of each further one. Raise RuntimeError if it ended."""
        self.process.stdin.write(json.dumps({"prompt": prompt, "tokens": tokens}) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith('{"first"'):
                found = json.loads(line)
                return found["first"], found["each"]
        raise RuntimeError(f"llama.cpp ended with {self.process.wait()}, wanted times: is the file whole?")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main(path: str, threads: str) -> None:
    import xllamacpp

    given = xllamacpp.CommonParams()
    given.model.path = path
    given.cpuparams.n_threads = given.cpuparams_batch.n_threads = int(threads)
    given.n_ctx, given.n_parallel, given.verbosity = LENGTH, 1, 0
    server = xllamacpp.Server(given)
    for line in sys.stdin:
        asked = json.loads(line)
        request = {"prompt": asked["prompt"], "n_predict": asked["tokens"], "temperature": 0.0}
        answer = server.handle_completions(request | {"ignore_eos": True, "cache_prompt": False})
        times = answer["timings"]
        # its clock for new tokens starts when the first one is there
        each = times["predicted_ms"] / (times["predicted_n"] - 1)
        print(json.dumps({"first": times["prompt_ms"] / 1e3, "each": each / 1e3}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
