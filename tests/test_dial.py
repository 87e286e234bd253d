"""The dial: masks for several budgets over the weights of one plan."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import rana_kernels as rana
from bench.quality import unions
from bench.quality.neurons import without_ranks
from rana_kernels.allocation.curves import BlockOffers
from rana_kernels.checkpoint.attachment import attached_plan
from rana_kernels.evaluation.density import costs_of
from rana_kernels.evaluation.divergence import divergence
from rana_kernels.evaluation.live import count_live
from rana_kernels.integrations.decoding import quicken
from rana_kernels.model.dial import cost_ratios
from rana_kernels.model.plan import AdapterSpec, Plan, Setting
from rana_kernels.nn.base import AdapterModule
from tests.architectures import MODELS
from tests.test_cli import folder, run  # noqa: F401 - fixtures
from tests.test_compress import logits, make_model, tokens


@pytest.fixture
def neurons_alone(monkeypatch):
    """Plans of neuron adapters and dense linears, as those of real models nearly are."""
    monkeypatch.setattr(BlockOffers, "ranks", lambda self, names: ())


def compressed(ids: torch.Tensor | None = None, **asked) -> nn.Module:
    model = make_model()
    rana.compress(model, [tokens(8, 64) if ids is None else ids], progress=False, **asked)
    return model


def thresholds(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if name.endswith("threshold")}


def test_each_budget_costs_what_it_says(neurons_alone):
    ids = tokens(8, 64)
    model = compressed(ids, flops_reduction=0.3)
    for asked in (0.45, 0.5, 0.63, 0.7, 0.88, 0.97):
        assert rana.set_budget(model, asked) == pytest.approx(asked, abs=1e-3)
        plan = attached_plan(model)
        assert 1 - plan.reduction == pytest.approx(asked, abs=1e-3)
        with count_live(model) as counts, torch.no_grad():
            model(ids)
        # the calibration saw inputs of the dense model, and thresholds between two budgets are interpolated
        assert costs_of(plan).cost_ratio(counts) == pytest.approx(asked, abs=0.03)


def test_a_lower_budget_loses_more(neurons_alone):
    ids, dense = tokens(8, 64), make_model()
    model = compressed(ids, flops_reduction=0.3)
    losses = []
    for asked in (1.0, 0.9, 0.7, 0.5):
        rana.set_budget(model, asked)
        losses.append(divergence(model, dense, ids).kl)
    assert losses == sorted(losses) and losses[0] < 1e-8 < losses[1]


@pytest.mark.parametrize("architecture", sorted(MODELS))
def test_the_whole_budget_is_the_dense_model(neurons_alone, architecture):
    torch.manual_seed(0)
    model = MODELS[architecture].build().eval()
    ids = tokens(4, 32)
    with torch.no_grad():
        before = model(ids).logits
        rana.compress(model, [ids], flops_reduction=0.3, progress=False)
        assert rana.set_budget(model, 1.0) == 1.0
        torch.testing.assert_close(model(ids).logits, before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("asked", [{"flops_reduction": 0.3}, {"bytes_reduction": 0.8, "bits": 8}])
def test_the_planned_budget_comes_back_and_is_saved(neurons_alone, asked, tmp_path):
    model = compressed(**asked)
    planned, before = 1 - attached_plan(model).reduction, thresholds(model)
    rana.set_budget(model, 0.5)
    changed = thresholds(model)
    assert any(not torch.equal(changed[name], before[name]) for name in before)
    rana.save(model, tmp_path / "half")
    again = rana.load(tmp_path / "half")
    assert torch.equal(logits(again), logits(model))
    rana.set_budget(again, planned)
    for name, threshold in thresholds(again).items():
        torch.testing.assert_close(threshold, before[name], atol=0, rtol=1e-6)


def test_settings_are_for_the_planned_ratio_and_those_around_it(neurons_alone):
    plan = attached_plan(compressed(flops_reduction=0.35))
    ratios = cost_ratios(plan)
    assert ratios == sorted(ratios) and ratios[-1] == 1.0
    for wanted in (0.45, 0.56, 0.65, 0.7, 0.8, 0.9):
        assert min(abs(ratio - wanted) for ratio in ratios) < 0.01, wanted
    assert Plan.from_json(plan.to_json()) == plan
    for adapter in plan.adapters:
        assert len(adapter.settings) == len(ratios)
        assert adapter.settings[-1] == Setting(adapter.in_features, 0.0)


def test_plans_with_ranks_say_what_they_can_serve():
    model = compressed(flops_reduction=0.4)
    plan = attached_plan(model)
    assert {adapter.kind for adapter in plan.adapters} >= {"rank", "neuron"}
    lowest, highest = cost_ratios(plan)[0], cost_ratios(plan)[-1]
    assert highest < 1.0
    with pytest.raises(ValueError, match=f"cost_ratio is 1.0, wanted {lowest:.3f} to {highest:.3f}"):
        rana.set_budget(model, 1.0)
    ranks = {name: t for name, t in thresholds(model).items()}
    rana.set_budget(model, lowest)
    for adapter in plan.adapters:
        if adapter.kind == "rank" and f"{adapter.names[0]}.threshold" in ranks:
            name = f"{adapter.names[0]}.threshold"
            assert torch.equal(model.state_dict()[name], ranks[name])


@pytest.mark.parametrize("bits", [16, 4])
def test_a_draft_has_the_weights_of_its_model(neurons_alone, bits):
    """All tensors but the thresholds are the same memory, and the model's masks stay as they are."""
    ids = tokens(8, 64)
    model = compressed(ids, flops_reduction=0.2, bits=bits)
    before = thresholds(model)
    draft = rana.make_draft(model, 0.5)
    own = {
        name for name, t in draft.state_dict().items() if t.data_ptr() != model.state_dict()[name].data_ptr()
    }
    assert own == set(before) - {n for n, t in before.items() if t.numel() == 0}
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())
    assert 1 - attached_plan(draft).reduction == pytest.approx(0.5, abs=1e-3)
    assert 1 - attached_plan(model).reduction == pytest.approx(0.8, abs=1e-2)
    other = copy.deepcopy(model)
    rana.set_budget(other, 0.5)
    assert torch.equal(logits(draft), logits(other))


def test_what_a_draft_proposes_is_checked(neurons_alone):
    """The greedy text with a draft is that of the model without masks."""
    model = compressed(flops_reduction=0.3)
    rana.set_budget(model, 1.0)
    quicken(model)
    draft, prompt = rana.make_draft(model, 0.5), tokens(1, 9)
    asked = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 60, "eos_token_id": None}
    alone = model.generate(prompt, do_sample=False, **asked)
    assert torch.equal(model.generate(prompt, do_sample=False, assistant_model=draft, **asked), alone)


def test_a_compiled_model_needs_no_new_graph(neurons_alone):
    model = compressed(flops_reduction=0.3)
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    fast = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for asked in (0.7, 0.5, 0.9):
            rana.set_budget(fast, asked)
            torch.testing.assert_close(fast(tokens(1, 8)).logits, model(tokens(1, 8)).logits)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    "asked", [{"bytes_reduction": 0.8, "bits": 8}, {"flops_reduction": 0.3, "max_memory": 10**6}]
)
def test_where_bytes_count_dense_linears_store_no_masks(neurons_alone, asked):
    model = compressed(**asked)
    plan = attached_plan(model)
    assert {len(a.settings) for a in plan.adapters if a.kind == "neuron"} == {len(cost_ratios(plan))}
    assert rana.set_budget(model, cost_ratios(plan)[-1]) == 1.0


def test_other_methods_have_no_dial():
    model = compressed(method="paper", flops_reduction=0.3)
    with pytest.raises(ValueError, match="no other masks, wanted one made by method 'global'"):
        rana.set_budget(model, 0.8)


def test_a_dense_model_is_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM is not compressed"):
        rana.set_budget(make_model(), 0.8)


def test_masks_of_lm_head_stay_until_all_is_live():
    model = compressed(bytes_reduction=0.75, bits=4, group=32)
    plan = attached_plan(model)
    head = plan.lm_head
    if head.kind == "neuron":
        assert head.settings[-1].live == head.in_features
        assert {setting.live for setting in head.settings[:-1]} == {head.live}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((Setting(65.0, 0.1),), "live of a setting"),
        ((Setting(float("nan"), 0.1),), "live of a setting"),
        ((Setting(1.0, -0.1),), "threshold of a setting"),
    ],
)
def test_settings_of_a_file_are_checked(settings, message):
    fine = AdapterSpec("neuron", ("a",), 64, (96,), rank=64, live=4, threshold=0.0)
    with pytest.raises(ValueError, match=message):
        replace(fine, settings=settings)
    with pytest.raises(ValueError, match="it has no neurons"):
        replace(fine, kind="rank", rank=16, settings=(Setting(1.0, 0.1),))
    with pytest.raises(ValueError, match="equally many"):
        Plan(
            tuple(
                replace(fine, names=(name,), settings=(Setting(1.0),) * n) for name, n in (("a", 1), ("b", 2))
            )
        )
    data = json.loads(Plan((fine,)).to_json())
    data["adapters"][0]["settings"] = [[1.0]]
    with pytest.raises(ValueError, match="a list of pairs"):
        Plan.from_json(json.dumps(data))


def test_budgets_on_the_command_line(neurons_alone, folder, tmp_path, run, monkeypatch):  # noqa: F811
    out = tmp_path / "out"
    text = ("--calibration", folder / "text.txt", "--sequence-length", 32)
    assert run("compress", folder, *text, "--flops-reduction", 0.3, "-o", out)[0] == 0
    facts = json.loads(run("info", out, "--json")[1])
    assert facts["budgets"][-1] == 1.0
    code, text_out, _ = run("generate", out, "--prompt", "a", "--max-new-tokens", 3, "--budget", 0.5)
    assert code == 0 and text_out
    code, _, error = run("generate", out, "--prompt", "a", "--budget", 0.1)
    assert code == 1 and "cost_ratio is 0.1, wanted 0.45" in error
    monkeypatch.setenv("RANA_BUDGET", "0.5")
    model = rana.load(out)
    assert 1 - attached_plan(model).reduction == pytest.approx(0.5)
    like = rana.load(out)
    rana.set_budget(like, 0.5)
    assert all(
        torch.equal(a.threshold, b.threshold)
        for a, b in zip(model.modules(), like.modules(), strict=True)
        if isinstance(a, AdapterModule) and "threshold" in a._buffers
    )
    monkeypatch.setenv("RANA_BUDGET", "half")
    with pytest.raises(ValueError, match="RANA_BUDGET is 'half', wanted a number"):
        rana.load(out)


def test_rows_that_several_tokens_read_together(neurons_alone):
    """Equal texts read what one of them reads; tokens of a text read no less, and no more than all."""
    ids = tokens(1, unions.LENGTH).expand(unions.TEXTS, -1)
    found = unions.measure_unions(compressed(flops_reduction=0.4), ids, 0.6)
    assert [row["tokens"] for row in found] == list(unions.TOKENS)
    one_text = [row["one text"] for row in found]
    assert one_text == sorted(one_text) and 0 < one_text[0] < one_text[-1] <= 1
    assert {row["several texts"] for row in found} == {one_text[0]}
    assert found[0]["random"] == one_text[0] and found[-1]["random"] > one_text[0]


def test_a_plan_without_ranks_ends_without_masks():
    ids, model = tokens(8, 64), make_model()
    stats = rana.calibrate(model, [ids], progress=False)
    plan = rana.plan(stats, flops_reduction=0.4, progress=False)
    assert "rank" in {adapter.kind for adapter in plan.adapters}
    rana.compress(model, stats=stats, plan=without_ranks(plan), progress=False)
    rana.set_budget(model, 1.0)
    torch.testing.assert_close(logits(model), logits(make_model()))
