"""The quality benchmark with its training: PEFT on adapters, and on weights behind masks."""

import copy
import json

import pytest
import torch

pytest.importorskip("matplotlib", reason="the plots need the extra `plots`")
pytest.importorskip("peft")

from bench.quality import recovery
from bench.quality.contenders import CONTENDERS
from bench.quality.measure import measured_cost
from tests.test_quality import command, folder, subject  # noqa: F401 - fixtures

STEPS = 8


@pytest.mark.parametrize("method", ["static", "teal", "wina", "cats", "paper", "global"])
def test_a_training_follows_the_dense_model_at_the_same_cost(method, subject, monkeypatch):  # noqa: F811
    monkeypatch.setattr(recovery, "LEARNING_RATE", 3e-4)
    candidate = CONTENDERS[method](subject, "both", 0.6 if method == "cats" else 0.4)
    shapes = {name: p.shape for name, p in candidate.model.named_parameters()}
    before = copy.deepcopy(candidate)
    recovery.recover(candidate, subject, STEPS)
    assert {name: p.shape for name, p in candidate.model.named_parameters()} == shapes
    cost = measured_cost(before, subject.calibration)
    assert measured_cost(candidate, subject.calibration) == pytest.approx(cost, abs=0.01)
    assert away(candidate.model, subject) < 0.9 * away(before.model, subject)


def away(model, subject) -> float:  # noqa: F811
    """Return the divergence from the dense model's predictions on the calibration text."""
    with torch.no_grad():
        ours, theirs = (
            m(input_ids=subject.calibration).logits.log_softmax(-1) for m in (model, subject.dense)
        )
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def test_the_command_trains_everything_once(folder, tmp_path):  # noqa: F811
    output = tmp_path / "quality-tiny.json"
    more = ("--budget", 0.5, "--method", "paper", "--recovery-steps")
    done = command(folder, output, *more, STEPS)
    assert done.exit_code == 0, done.output
    data = json.loads(output.read_text())
    for key in ("both teal 0.56", "both global 0.40", "both paper 0.50"):
        plain, trained = data["rows"][key], data["rows"][f"{key} recovered"]
        assert trained["recovered"] and trained["asked"] == plain["asked"]
        assert trained["perplexity"] != plain["perplexity"]
        assert trained["cost_ratio"] == pytest.approx(plain["cost_ratio"], abs=0.03)
    assert "CATS leaves" in data["rows"]["both cats 0.40 recovered"]["failed"]
    assert data["settings"]["recovery"]["steps"] == STEPS and "mlp teal 0.56 recovered" not in data["rows"]
    assert "| RaNA, global + recovery |" in output.with_suffix(".md").read_text()
    before = output.read_text()
    again = command(folder, output, *more, STEPS)
    assert again.exit_code == 0 and output.read_text() == before
    other = command(folder, output, *more, STEPS + 1)
    assert other.exit_code == 1 and "results of recovery {'steps': 8" in " ".join(other.output.split())
