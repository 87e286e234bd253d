"""The search of RankAdaptor (arXiv 2406.15734): measure an allocation, learn from it, choose the next one.

The loss model first learns from the measurements of earlier runs, on any models (the offline phase), and then
from each measurement of this run (the online phase). The reference allocation is measured first, and the
allocation of least measured loss is returned, so it is never worse than the reference on the held-out text.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from rana_kernels.allocation.loss_model import EARLIER, InputShare, LossModel, features
from rana_kernels.checkpoint.resume import ResumeDir
from rana_kernels.system.files import check_writable, write_json
from rana_kernels.system.progress import meter

FORMAT = 2
CANDIDATES = 512  # for each measurement; the most promising one is measured
EXPLORED = 4  # without earlier runs, the first 1 / EXPLORED of the measurements are of random allocations
JOURNAL = "search"


@dataclass
class Search:
    """The settings of a search, and its results.

    held_out        token ids [n, T] that are in neither the calibration nor the training
    evaluations     how many allocations are measured, the reference included
    seed            the seed of the random allocations
    history         a directory of records of earlier runs: the search learns from them and adds its own.
                    None: no records. `own_history()` is the user's directory
    losses          result: nats a token of each measured allocation, the reference first
    baseline_loss   result: the loss that the reference is compared with, such as that of the dense model

    Raises OSError for a history that cannot be written, and ValueError for one with a damaged record.
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
        if self.history is not None:
            check_writable(self.history)
            _records(self.history)

    def summary(self, reference: str, baseline: str) -> str:
        """Return one line that compares the best allocation with the reference and the baseline."""
        return (
            f"{len(self.losses)} allocations measured: the loss of the best is {min(self.losses):.4f}, "
            f"{reference} {self.losses[0]:.4f}, {baseline} {self.baseline_loss:.4f}"
        )

    @property
    def digest(self) -> str:
        ids = self.held_out.to("cpu", torch.int64).contiguous().numpy().tobytes()
        return hashlib.sha256(ids + str(self.seed).encode()).hexdigest()


def own_history() -> Path:
    """Return the directory that keeps the records of the user's searches."""
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
    """Return the allocation [inputs] of least measured loss, and fill in `search.losses`.

    kind       the kind of budget: a run learns only from earlier runs of its kind
    measure    returns the loss of an allocation, in nats a token
    store      keeps the measurements, so that a repeated call does not measure them again
    """
    search.losses.clear()
    journal = (store.load_json(JOURNAL) if store else None) or []
    tried = torch.zeros(0, len(inputs), dtype=torch.float64)
    earlier = [run for run in _records(search.history) if run["kind"] == kind]
    with meter("searching", search.evaluations, progress) as advance:
        for i in range(search.evaluations):
            if i == len(journal):
                allocation = _propose(inputs, tried, search, earlier)
                journal.append({"allocation": allocation.tolist(), "loss": measure(allocation)})
                if store:
                    store.save_json(JOURNAL, journal)
            tried = torch.cat([tried, torch.tensor(journal[i]["allocation"], dtype=torch.float64)[None]])
            search.losses.append(journal[i]["loss"])
            advance(f"searching, {_gain(search)}")
    if search.history is not None:
        _record(kind, inputs, tried, search)
    return tried[search.losses.index(min(search.losses))]


def _gain(search: Search) -> str:
    return f"{min(search.losses):.4f} from {search.losses[0]:.4f}"


def _outcomes(losses: list[float], baseline_loss: float) -> Tensor:
    """Return losses minus that of the reference, in units of |reference - baseline|."""
    found = torch.tensor(losses, dtype=torch.float64)
    return (found - found[0]) / (found[0] - baseline_loss).abs().clamp_min(1e-9)


def _propose(inputs: list[InputShare], tried: Tensor, search: Search, earlier: list[dict]) -> Tensor:
    """Return the next allocation: the reference, then random ones, then the most promising candidate."""
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
    """Return random allocations [CANDIDATES, inputs]: half of them around `best`, half around the reference.

    A step is smooth in the kind of input and in the depth, plus a smaller independent part for each input.
    """

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


# records of earlier runs


def _records(history: Path | None) -> list[dict]:
    if history is None or not history.is_dir():
        return []
    return [_read(path) for path in sorted(history.glob("*.json"))]


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


def _record(kind: str, inputs: list[InputShare], tried: Tensor, search: Search) -> None:
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
