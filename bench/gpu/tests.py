"""What is tested on a card, as commands of pytest."""

import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import typer

from bench.gpu.stages import Stages
from rana_kernels import backends, ops

GATES = 120.0  # seconds, at most, for the tests that times wait for
# the names that tests/conftest.py has for the backends
IMPLEMENTATIONS = {"cuda": "registered_cuda", "triton": "triton_cuda"}
# of tests with an op or a form in their names, about a third each; and those without
THIRDS = {"MLPs": "mlp", "ranks": "lowrank", "the rest": "not mlp and not lowrank"}


def served() -> list[str]:
    """The backends that are here."""
    return [backend for backend in IMPLEMENTATIONS if backends.installed(backend)]


def gates() -> dict[str, list[str]]:
    """{"cuda:masked_mlp": command}: exact and close, on a part of the cases. What fails is not timed."""
    chosen = "{}-{}-M and (exact or close)"
    return {
        f"{backend}:{op}": _pytest(
            "-m", "gpu and isa", "-k", chosen.format(IMPLEMENTATIONS[backend], op), "tests/test_ops.py"
        )
        for backend in served()
        for op in ops.SCHEMAS
    }


def require_green_gates() -> None:
    """Raises typer.Exit if an op of a backend that is here fails."""
    stages = Stages(Path(os.devnull), time.monotonic() + GATES)
    stages.run("the ops, exact and close", gates(), GATES)
    if stages.red:
        stages.say("the tests of the ops fail: no numbers")
        raise typer.Exit(1)


def everything() -> dict[str, list[str]]:
    """All that can be shown in minutes. Triton compiles for every shape: a sample must do, in parts."""
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
    """Memory errors and races, looked for by compute-sanitizer: a minute and more for each tool."""
    tools = ("memcheck", "racecheck", "synccheck")
    return {
        f"{backend}, {tool}": _pytest("-m", "gpu", "-k", f"sanitizer[{backend}-{tool}]", "tests/test_gpu.py")
        for backend in served()
        for tool in tools
    }


def interpreted() -> dict[str, list[str]]:
    """What can be tested of Triton without a card."""
    return {"interpreter": _pytest("-m", "not slow", "tests/test_triton.py", "tests/test_triton_tune.py")}


def _pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
