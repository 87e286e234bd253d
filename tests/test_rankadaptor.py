"""RankAdaptor: what the performance model learns, how the search goes, and what its plans are worth."""

import json

import pytest
import torch

import rana_kernels as rana
from rana_kernels.allocation import rankadaptor
from rana_kernels.allocation.loss_model import InputShare, LossModel, features
from rana_kernels.allocation.methods import plan
from rana_kernels.allocation.search import Search, best_allocation
from rana_kernels.checkpoint.resume import ResumeDir
from rana_kernels.evaluation.metrics import perplexity
from rana_kernels.statistics.calibration import INPUTS, calibrate
from tests.test_cli import compression, folder, run  # noqa: F401 - fixtures
from tests.test_compress import logits, make_model, tokens

WANTED = {"qkv": 0.8, "o": -0.5, "mlp": -0.3, "down": 0.4}


def some_sites(layers: int) -> list[InputShare]:
    return [InputShare(r, i / (layers - 1), 1 / (4 * layers)) for i in range(layers) for r in INPUTS]


def loss_of(sites: list[InputShare]):
    """Least where each role has its own weight and later blocks have more; 3.0 of a dense 2.0 at zero."""
    best = torch.tensor([WANTED[s.role] + 0.6 * (s.depth - 0.5) for s in sites], dtype=torch.float64)

    def loss(allocation: torch.Tensor) -> float:
        away = allocation - allocation.mean() - (best - best.mean())
        return float(3 + away.square().mean() - (best - best.mean()).square().mean())

    return loss


def a_search(evaluations: int, **options) -> Search:
    return Search(tokens(), evaluations, baseline_loss=2.0, **options)


# the performance model


def test_a_number_added_to_all_sites_changes_nothing():
    a = torch.randn(3, 12, dtype=torch.float64)
    torch.testing.assert_close(features(some_sites(3), a + 5), features(some_sites(3), a))
    assert not features(some_sites(3), torch.full((1, 12), 2.0)).abs().gt(1e-12).any()


def test_what_was_learnt_on_four_layers_holds_for_nine():
    model, (short, long) = LossModel(), (some_sites(4), some_sites(9))
    seen, asked = torch.randn(60, 16, dtype=torch.float64), 0.5 * torch.randn(20, 36, dtype=torch.float64)
    wanted = torch.tensor([loss_of(long)(a) - 3 for a in asked])
    unsure = model.predict(features(long, asked))[1]
    model.learn(features(short, seen), torch.tensor([loss_of(short)(a) - 3 for a in seen]))
    mean, spread = model.predict(features(long, asked))
    assert torch.corrcoef(torch.stack([mean, wanted]))[0, 1] > 0.95
    assert (spread < 0.3 * unsure).all()


# the search


def test_the_reference_is_first_and_the_best_is_far_better():
    sites = some_sites(6)
    search = a_search(30)
    best = best_allocation("keep", sites, loss_of(sites), search, progress=False)
    assert search.losses[0] == pytest.approx(3) and len(search.losses) == 30
    least = loss_of(sites)(torch.tensor([WANTED[s.role] + 0.6 * (s.depth - 0.5) for s in sites]).double())
    assert loss_of(sites)(best) == min(search.losses) < 3 + 0.6 * (least - 3)


def test_earlier_runs_on_other_models_make_it_faster(tmp_path):
    best_allocation(
        "keep", some_sites(6), loss_of(some_sites(6)), a_search(30, history=tmp_path), progress=False
    )
    assert len(list(tmp_path.iterdir())) == 1
    sites = some_sites(10)
    alone, taught, other = a_search(5), a_search(5, history=tmp_path), a_search(5, history=tmp_path)
    best_allocation("keep", sites, loss_of(sites), alone, progress=False)
    best_allocation("keep", sites, loss_of(sites), taught, progress=False)
    assert min(taught.losses) - 3 < 2 * (min(alone.losses) - 3) < 0
    best_allocation(
        "lora", sites, loss_of(sites), other, progress=False
    )  # another kind learns nothing from it
    assert other.losses == alone.losses


def test_an_interrupted_search_measures_nothing_twice(tmp_path):
    sites, count = some_sites(4), 0

    def measure(allocation: torch.Tensor) -> float:
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt
        return loss_of(sites)(allocation)

    with pytest.raises(KeyboardInterrupt):
        best_allocation(
            "keep", sites, measure, a_search(10), ResumeDir(tmp_path, {"of": "it"}), progress=False
        )
    again, whole = a_search(10), a_search(10)
    best = best_allocation("keep", sites, measure, again, ResumeDir(tmp_path, {"of": "it"}), progress=False)
    assert count == 6 + 5
    assert torch.equal(best, best_allocation("keep", sites, loss_of(sites), whole, progress=False))
    assert again.losses == whole.losses


@pytest.mark.parametrize(
    "text", ["{", "{}", '{"format": 2}', '{"format": 1, "kind": "keep", "sites": [], "measured": []}']
)
def test_a_bad_record_is_an_error(text, tmp_path):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json is no record of a search .* delete it"):
        best_allocation("keep", some_sites(2), lambda a: 3.0, a_search(2, history=tmp_path), progress=False)


# plans


@pytest.fixture(scope="module")
def stats():
    return calibrate(make_model(), [tokens()], progress=False)


def test_a_plan_measured_is_the_plan_that_is_made(stats):
    search = Search(tokens(3), 6)
    dense = logits(stats.model)
    made = plan(stats, flops_reduction=0.5, method="rankadaptor", search=search, progress=False)
    assert torch.equal(logits(stats.model), dense)  # the linears are back
    assert made.method == "rankadaptor" and made.reduction == pytest.approx(0.5, abs=0.002)
    assert search.baseline_loss == perplexity(stats.model, tokens(3), progress=False).nll
    for reference, found in (("global", search.losses[0]), (made, min(search.losses))):
        model, how = make_model(), {}
        how = {"flops_reduction": 0.5} if reference == "global" else {"plan": made}
        rana.compress(model, [tokens()], progress=False, **how)
        assert perplexity(model, tokens(3), progress=False).nll == pytest.approx(found, rel=1e-6)


def test_shares_of_the_sites_are_those_of_the_errors(stats):
    seen = []
    original = rankadaptor.best_allocation
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rankadaptor, "best_allocation", lambda *a: seen.append(a[1]) or original(*a))
        plan(stats, flops_reduction=0.5, method="rankadaptor", search=Search(tokens(), 1), progress=False)
    (sites,) = seen
    assert [s.role for s in sites] == [*INPUTS, *INPUTS] and [s.depth for s in sites] == [0.0] * 4 + [1.0] * 4
    assert sum(s.share for s in sites) == pytest.approx(1) and all(s.share > 0 for s in sites)


def test_requests_that_do_not_fit(stats):
    with pytest.raises(ValueError, match="wanted a rana_kernels.allocation.search.Search with method"):
        rana.compress(stats.model, stats=stats, flops_reduction=0.5, method="rankadaptor", progress=False)
    with pytest.raises(ValueError, match="and only there"):
        plan(stats, flops_reduction=0.5, method="global", search=Search(tokens()), progress=False)
    with pytest.raises(ValueError, match="evaluations is 0, wanted at least 1"):
        Search(tokens(), 0)


def test_the_command_line(folder, tmp_path, run, monkeypatch):  # noqa: F811
    asked = [*compression(folder, tmp_path / "out"), "--method", "rankadaptor", "--evaluations", 4]
    asked += ["--history", tmp_path / "history", "--json"]
    measure, count = rankadaptor._loss, 0

    def interrupted(model, search):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return measure(model, search)

    monkeypatch.setattr(rankadaptor, "_loss", interrupted)
    assert run(*asked)[0] == 130
    code, out, err = run(*asked)
    found = json.loads(out)
    assert code == 0, err
    assert (
        count == 4 + 1 + 2 and len(found["search"]["losses"]) == 4
    )  # the dense model's again, then the rest
    assert found["plan"]["method"] == "rankadaptor" and sorted(tmp_path.iterdir()) == [
        tmp_path / "history",
        tmp_path / "out",
    ]
    record = json.loads(next((tmp_path / "history").iterdir()).read_text())
    assert [m["loss"] for m in record["measured"]] == found["search"]["losses"]
    code, _, err = run(*asked, "--tokens", 64)
    assert code == 1 and "wanted at least 8" in err
