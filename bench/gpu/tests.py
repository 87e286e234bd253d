"""The tests that run on a card, as commands of pytest."""

import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import typer

from bench.gpu.stages import Stages, done_before
from bench.report.results import ROOT, conditions
from rana_kernels import backends, ops

GATES = 120.0  # seconds, at most, for the tests that must pass before anything is timed
GATES_STAGE = "the ops, exact and close"
RECORD = ROOT / "build" / "gpu" / "done.json"  # of the stages of `python -m bench.gpu`
# the backends' names in tests/conftest.py
IMPLEMENTATIONS = {"cuda": "registered_cuda", "triton": "triton_cuda"}
# words that select about a third of the tests each, by the op or form in their names
THIRDS = {"MLPs": "mlp", "ranks": "lowrank", "the rest": "not mlp and not lowrank"}


def served() -> list[str]:
    """Return the backends that are installed."""
    return [backend for backend in IMPLEMENTATIONS if backends.installed(backend)]


def gates() -> dict[str, list[str]]:
    """Return {"cuda:masked_mlp": command}: exact and close tests on some cases. What fails is not timed."""
    chosen = "{}-{}-M and (exact or close)"
    return {
        f"{backend}:{op}": _pytest(
            "-m", "gpu and isa", "-k", chosen.format(IMPLEMENTATIONS[backend], op), "tests/test_ops.py"
        )
        for backend in served()
        for op in ops.SCHEMAS
    }


def require_green_gates() -> None:
    """Raise typer.Exit if a test of an op fails. What has passed in this run of stages is not repeated."""
    if done_before(RECORD, conditions("cuda")).get(GATES_STAGE) == []:
        return
    stages = Stages(Path(os.devnull), time.monotonic() + GATES)
    stages.run(GATES_STAGE, gates(), GATES)
    if stages.red:
        stages.say("the tests of the ops fail: no numbers")
        raise typer.Exit(1)


def everything() -> dict[str, list[str]]:
    """Return the tests that fit into minutes: of Triton, which compiles for every shape, only some."""
    commands = {}
    if "cuda" in served():
        commands["cuda on the card"] = _on_the_card("[cuda")
        commands["cuda, the ops"] = _pytest(
            "-m", "gpu and not slow", "-k", IMPLEMENTATIONS["cuda"], "tests/test_ops.py"
        )
    if "triton" in served():
        for third, chosen in THIRDS.items():
            commands[f"triton on the card, {third}"] = _on_the_card(f"[triton and {chosen}")
            commands[f"triton, the ops, {third}"] = _pytest(
                "-m", "gpu and isa", "-k", f"{IMPLEMENTATIONS['triton']} and {chosen}", "tests/test_ops.py"
            )
    if find_spec("vllm"):
        commands["vllm"] = _pytest("-m", "gpu", "tests/stacks/test_vllm_engine.py")
    return commands


def _on_the_card(chosen: str) -> list[str]:
    return _pytest("-m", "gpu and not slow", "-k", f"{chosen} and not sanitizer", "tests/test_gpu.py")


def sanitizer() -> dict[str, list[str]]:
    """Return the runs of compute-sanitizer, which finds memory errors and races. Each takes over a minute."""
    tools = ("memcheck", "racecheck", "synccheck")
    return {
        f"{backend}, {tool}": _pytest("-m", "gpu", "-k", f"sanitizer[{backend}-{tool}]", "tests/test_gpu.py")
        for backend in served()
        for tool in tools
    }


def interpreted() -> dict[str, list[str]]:
    """Return the tests of Triton that need no card."""
    return {"interpreter": _pytest("-m", "not slow", "tests/test_triton.py", "tests/test_triton_tune.py")}


def _pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
