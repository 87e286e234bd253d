"""Stages of a long run: commands side by side in child processes, with time limits and a log."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from rich.console import Console

from bench.report.results import ROOT, write

console = Console(width=None if sys.stdout.isatty() else 160)
SHORTEST = 5  # seconds: a stage with less time left is not begun
LAST_WORDS = 5  # seconds that an interrupted child has to say how far it came
# paths of this machine, which the log leaves out
PLACES = (str(ROOT), sysconfig.get_path("purelib"))


@dataclass
class Stages:
    """A run in stages, which a later call can go on with.

    log       file that gets everything that is printed
    ends      the time.monotonic() at which everything ends
    record    file that says which stages are done; None: nothing is recorded
    stamp     the machine, versions and revision. A record with another one is of another run
    red       stages and commands that failed
    done      the commands that failed in each stage that is done
    missing   stages that are not done: left out, or out of time
    """

    log: Path
    ends: float
    record: Path | None = None
    stamp: str = ""
    red: list[str] = field(default_factory=list)
    done: dict[str, list[str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.done = dict(done_before(self.record, self.stamp))

    def say(self, text: str) -> None:
        text = text.rstrip("\n")
        for place in PLACES:
            text = text.replace(f"{place}/", "")
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def run(self, stage: str, commands: dict[str, list[str]], limit: float) -> list[str]:
        """Run the commands side by side, `limit` seconds at most. Return the names of those that failed.

        A stage that an earlier call has done is not run again.
        """
        if stage in self.done:
            self.say(f"=== {stage}: done by an earlier call")
            return self._failed(stage, self.done[stage])
        begin = time.monotonic()
        limit = min(limit, self.ends - begin)
        if limit < SHORTEST:
            self.say(f"=== {stage}: left out, the time is used up")
            self.red.append(stage)
            self.missing.append(stage)
            return list(commands)
        self.say(f"=== {stage}: {limit:.0f} s at most")
        children = {name: _start(command) for name, command in commands.items()}
        late = _finish([child for child, _ in children.values()], limit)
        failed = []
        for name, (child, printed) in children.items():
            verdict = _verdict(child, late)
            printed.seek(0)
            self.say(f"--- {name}: {verdict}\n{printed.read()}")
            printed.close()
            if verdict != "done":
                failed.append(name)
        self.say(f"=== {stage}: {time.monotonic() - begin:.0f} s")
        if late:
            self.missing.append(stage)
        else:
            self._remember(stage, failed)
        return self._failed(stage, failed)

    def _failed(self, stage: str, names: list[str]) -> list[str]:
        self.red += [f"{stage}, {name}" for name in names]
        return names

    def _remember(self, stage: str, failed: list[str]) -> None:
        self.done[stage] = failed
        if self.record is not None:
            write(self.record, json.dumps({"stamp": self.stamp, "done": self.done}, indent=1))

    def end(self) -> None:
        """Say what failed. If every stage is done, the next call begins anew."""
        self.say("red: " + ("; ".join(self.red) or "nothing"))
        if self.missing:
            self.say(f"not done: {', '.join(self.missing)}. Run the same command again to go on")
        elif self.record is not None:
            self.record.unlink(missing_ok=True)


def done_before(record: Path | None, stamp: str) -> dict[str, list[str]]:
    """Return what an earlier call has done under this stamp: the commands that failed, by stage."""
    if record is None or not record.exists():
        return {}
    found = json.loads(record.read_text())
    return found["done"] if found["stamp"] == stamp else {}


def _start(command: list[str]) -> tuple[subprocess.Popen, IO[str]]:
    """Start a command in its own process group. It prints to a file, so that killing it loses nothing."""

    def listen() -> None:  # a shell's background job ignores interrupts, and its children inherit that
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    printed = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
    child = subprocess.Popen(
        command, cwd=ROOT, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"}, preexec_fn=listen,
    )  # fmt: skip
    return child, printed


def _finish(children: list[subprocess.Popen], seconds: float) -> set[int]:
    """Wait for all, and return the ids of the late ones.

    Late ones are interrupted, so that pytest says what passed, and then killed. A process that a hung kernel
    holds is left behind.
    """
    try:
        _wait(children, seconds)
    finally:  # also if this process is interrupted
        late = {child.pid for child in children if child.poll() is None}
        for sent in (signal.SIGINT, signal.SIGKILL):
            for child in children:
                if child.poll() is None:
                    os.killpg(child.pid, sent)
            _wait(children, LAST_WORDS)
    return late


def _wait(children: list[subprocess.Popen], seconds: float) -> None:
    until = time.monotonic() + seconds
    for child in children:
        with suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, until - time.monotonic()))


def _verdict(child: subprocess.Popen, late: set[int]) -> str:
    if child.pid in late:
        return "FAILED: out of time"
    return f"FAILED with {child.returncode}" if child.returncode else "done"
