"""RankAdaptor's search (arXiv 2406.15734): measure, learn from it, measure what promises most, keep the best.

The performance model starts from what earlier runs measured, on whatever models (the offline phase), and
learns from each measurement of this one (the online phase). The reference allocation is measured first, so
what is returned is never worse than it on what was measured.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from rana_kernels.allocation.loss_model import EARLIER, InputShare, LossModel, features
from rana_kernels.checkpoint.resume import ResumeDir
from rana_kernels.system.files import write_json

FORMAT = 2
CANDIDATES = 512  # of which the most promising is measured
EXPLORED = 4  # one in so many measurements is a random one, at the start, where no earlier run says more
JOURNAL = "search"


@dataclass
class Search:
    """What to measure with, and what was measured.

    held_out      rows of tokens [n, T] that neither the calibration nor the training has
    evaluations   how many allocations are measured, the reference included
    seed          of the allocations that are tried
    history       a directory of earlier runs, to learn from and to add this one to; None: neither.
                  `own_history()` is the user's
    losses        filled in: nats a token of each measured allocation, the reference first
    baseline_loss   filled in: the loss that the reference is compared with (of the dense model)
    """

    held_out: Tensor
    evaluations: int = 30
    seed: int = 0
    history: Path | None = None
    losses: list[float] = field(default_factory=list)
    baseline_loss: float = float("nan")

    def __post_init__(self) -> None:
        if self.evaluations < 1:
            raise ValueError(f"Search: evaluations is {self.evaluations}, wanted at least 1")

    def summary(self, reference: str, baseline: str) -> str:
        """What measuring gained, in a line."""
        return (
            f"{len(self.losses)} allocations measured: the loss of the best is {min(self.losses):.4f}, "
            f"{reference} {self.losses[0]:.4f}, {baseline} {self.baseline_loss:.4f}"
        )

    @property
    def digest(self) -> str:
        ids = self.held_out.to("cpu", torch.int64).contiguous().numpy().tobytes()
        return hashlib.sha256(ids + str(self.seed).encode()).hexdigest()


def own_history() -> Path:
    """Where the user's runs are kept."""
    home = Path(os.environ.get("XDG_DATA_HOME", Path.home() / ".local" / "share"))
    return home / "rana_kernels" / "searches"


def best_allocation(
    kind: str,
    inputs: list[InputShare],
    measure: Callable[[Tensor], float],
    search: Search,
    store: ResumeDir | None = None,
    progress: bool = True,
) -> Tensor:
    """The allocation [inputs] of least measured loss; `search` has the losses then.

    kind       of budget: runs learn from earlier ones of their kind
    measure    the loss of an allocation, in nats a token
    store      measured ones are kept here, and are not measured again
    """
    search.losses.clear()
    journal = (store.load_json(JOURNAL) if store else None) or []
    tried = torch.zeros(0, len(inputs), dtype=torch.float64)
    earlier = _earlier(kind, search.history)
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("searching", total=search.evaluations)
        for i in range(search.evaluations):
            if i == len(journal):
                allocation = _propose(inputs, tried, search, earlier)
                journal.append({"allocation": allocation.tolist(), "loss": measure(allocation)})
                if store:
                    store.save_json(JOURNAL, journal)
            tried = torch.cat([tried, torch.tensor(journal[i]["allocation"], dtype=torch.float64)[None]])
            search.losses.append(journal[i]["loss"])
            bar.update(task, advance=1, description=f"searching, {_gain(search)}")
    if search.history is not None:
        _keep(kind, inputs, tried, search)
    return tried[search.losses.index(min(search.losses))]


def _gain(search: Search) -> str:
    return f"{min(search.losses):.4f} from {search.losses[0]:.4f}"


def _outcomes(losses: list[float], baseline_loss: float) -> Tensor:
    """The losses over that of the reference, in units of the reference's distance from the baseline_loss."""
    found = torch.tensor(losses, dtype=torch.float64)
    return (found - found[0]) / (found[0] - baseline_loss).abs().clamp_min(1e-9)


def _propose(inputs: list[InputShare], tried: Tensor, search: Search, earlier: list[dict]) -> Tensor:
    """The reference first, then some random ones, then what the model expects most of."""
    if len(tried) == 0:
        return torch.zeros(len(inputs), dtype=torch.float64)
    generator = torch.Generator().manual_seed(search.seed * 10_007 + len(tried))
    best = tried[search.losses.index(min(search.losses))]
    candidates = _candidates(inputs, best, generator)
    if not earlier and len(tried) <= search.evaluations // EXPLORED:
        return candidates[-1]
    model = LossModel()
    for run in earlier:
        past = torch.tensor([entry["allocation"] for entry in run["measured"]], dtype=torch.float64)
        losses = [entry["loss"] for entry in run["measured"]]
        its_inputs = [InputShare(**own) for own in run["inputs"]]
        model.learn(features(its_inputs, past), _outcomes(losses, run["baseline_loss"]), EARLIER)
    model.learn(features(inputs, tried), _outcomes(search.losses, search.baseline_loss))
    mean, spread = model.predict(features(inputs, candidates))
    return candidates[int((mean - spread).argmin())]


def _candidates(inputs: list[InputShare], best: Tensor, generator: torch.Generator) -> Tensor:
    """Steps [n, inputs] from the best one known (the first half) and from the reference: smooth ones, by
    kind of input and depth, and a little of each input's own."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    names = sorted({own.input for own in inputs})
    of_input = torch.tensor([names.index(own.input) for own in inputs])
    depth = 2 * torch.tensor([own.depth for own in inputs], dtype=torch.float64) - 1
    smooth = normal(CANDIDATES, len(names))[:, of_input] + normal(CANDIDATES, len(names))[:, of_input] * depth
    smooth += normal(CANDIDATES, 1) * depth
    step = 0.3 * smooth + 0.15 * normal(CANDIDATES, len(inputs))
    step *= torch.exp2(-2 * torch.rand(CANDIDATES, 1, generator=generator, dtype=torch.float64))
    step[: CANDIDATES // 2] += best
    return step


# earlier runs


def _earlier(kind: str, history: Path | None) -> list[dict]:
    if history is None or not history.is_dir():
        return []
    runs = [_read(path) for path in sorted(history.glob("*.json"))]
    return [run for run in runs if run["kind"] == kind]


def _read(path: Path) -> dict:
    try:
        run = json.loads(path.read_text())
        if run["format"] != FORMAT:
            raise ValueError(f"its format is {run['format']!r}, wanted {FORMAT}")
        inputs = [InputShare(**own) for own in run["inputs"]]
        past = torch.tensor([entry["allocation"] for entry in run["measured"]])
        losses = [entry["loss"] for entry in run["measured"]]
        known = features(inputs, past), _outcomes(losses, run["baseline_loss"])
        if not isinstance(run["kind"], str) or not all(t.isfinite().all() for t in known):
            raise ValueError("it holds values that are not finite")
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{path} is no record of a search ({error!r}): delete it, or give another history"
        ) from None
    return run


def _keep(kind: str, inputs: list[InputShare], tried: Tensor, search: Search) -> None:
    assert search.history is not None
    pairs = zip(tried.tolist(), search.losses, strict=True)
    run = {
        "format": FORMAT,
        "kind": kind,
        "baseline_loss": search.baseline_loss,
        "inputs": [asdict(own) for own in inputs],
        "measured": [{"allocation": allocation, "loss": loss} for allocation, loss in pairs],
    }
    name = hashlib.sha256(json.dumps(run).encode()).hexdigest()[:16]
    search.history.mkdir(parents=True, exist_ok=True)
    write_json(search.history / f"{name}.json", run)
