"""Stages of a long run: commands side by side in children, with time limits, and a log of what they print."""

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

from bench.report import ROOT

console = Console(width=None if sys.stdout.isatty() else 160)
SHORTEST = 5  # seconds: nothing is begun for less
LAST_WORDS = 5  # seconds that an interrupted child has to say how far it came
# of this machine alone: what is written names files from there on
PLACES = (str(ROOT), sysconfig.get_path("purelib"))


@dataclass
class Stages:
    """log    file that what is printed is added to, stage by stage
    ends   the time.monotonic() that nothing outlasts
    red    stages and commands that failed
    """

    log: Path
    ends: float
    red: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        text = text.rstrip("\n")
        for place in PLACES:
            text = text.replace(f"{place}/", "")
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def run(self, stage: str, commands: dict[str, list[str]], limit: float) -> list[str]:
        """Run the commands side by side, `limit` seconds at most; the names of those that failed."""
        begin = time.monotonic()
        limit = min(limit, self.ends - begin)
        if limit < SHORTEST:
            self.say(f"=== {stage}: left out, the time is used up")
            self.red.append(stage)
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
        self.red += [f"{stage}, {name}" for name in failed]
        self.say(f"=== {stage}: {time.monotonic() - begin:.0f} s")
        return failed


def _start(command: list[str]) -> tuple[subprocess.Popen, IO[str]]:
    """In a group of processes of its own, and printing to a file, so that killing it loses nothing."""

    def listen() -> None:  # in the background of a shell interrupts are ignored, and children inherit that
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    printed = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
    child = subprocess.Popen(
        command, cwd=ROOT, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"}, preexec_fn=listen,
    )  # fmt: skip
    return child, printed


def _finish(children: list[subprocess.Popen], seconds: float) -> set[int]:
    """Wait for all. The late ones, whose ids this gives, are interrupted, so that pytest says what passed,
    then killed; one that a hung kernel holds is left behind."""
    try:
        _wait(children, seconds)
    finally:  # also when we are interrupted ourselves
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
