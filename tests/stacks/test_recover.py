"""Recovery with LoRA of PEFT: it lowers the loss, costs nothing, and goes on after an interruption."""

import json
import re
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch import nn

import rana_kernels as rana
from rana_kernels.allocation.search import Search
from rana_kernels.checkpoint.attachment import attached_plan
from rana_kernels.evaluation.live import count_live
from rana_kernels.evaluation.metrics import perplexity
from rana_kernels.nn.factored import factored, to_linears
from rana_kernels.recovery import training as training
from rana_kernels.recovery.training import Training
from tests.test_cli import compressed, folder, run  # noqa: F401 - fixtures
from tests.test_compress import assert_equal_states, logits, make_model, tokens

pytest.importorskip("peft")
recovery = import_module("rana_kernels.recovery.run")

HOW, LORA = Training(steps=12, batch=2, learning_rate=5e-3), recovery.Lora(rank=4, search_steps=3)
MODELS = ("Llama", "Phi3", "GPTNeoX", "OPT", "GPT2")


def adapted(name: str = "Llama", dtype: torch.dtype = torch.float32, method: str = "paper") -> nn.Module:
    model = make_model(name).to(dtype)
    rana.compress(model, [tokens()], flops_reduction=0.4, method=method, progress=False)
    return model


def sizes(model: nn.Module) -> dict[str, tuple]:
    return {name: (t.shape, t.dtype) for name, t in model.state_dict().items()}


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_falls_and_nothing_else_changes(name, tmp_path):
    model = adapted(name)
    plan, shapes, before = attached_plan(model), sizes(model), perplexity(model, tokens(), progress=False).nll
    recovery.recover(model, tokens(), HOW, LORA, progress=False)
    assert perplexity(model, tokens(), progress=False).nll < before - 0.05
    assert sizes(model) == shapes
    # the exact zeros of ReLU cost nothing: OPT may end a little below
    assert plan.reduction - 1e-3 < attached_plan(model).reduction < plan.reduction + 0.02
    with count_live(model) as counts, torch.no_grad():
        model(input_ids=tokens())
    for adapter in attached_plan(model).adapters:
        if adapter.kind != "dense":
            assert counts[adapter.names[0]].mean == pytest.approx(adapter.live, rel=0.01, abs=0.05)
    rana.save(model, tmp_path / "out")
    loaded = rana.load(tmp_path / "out")
    assert_equal_states(model, loaded)
    assert torch.equal(logits(loaded), logits(model))


def test_what_a_model_is_wrapped_in_and_inference_mode_change_nothing():
    plain, model = adapted(), adapted()
    recovery.recover(plain, tokens(), HOW, LORA, progress=False)
    with torch.inference_mode():
        recovery.recover(torch.compile(model, backend="eager"), tokens(), HOW, LORA, progress=False)
    assert_equal_states(plain, model)
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match="is on the meta device"):
        recovery.recover(model, tokens(), HOW, LORA, progress=False)


@pytest.mark.parametrize(
    ("method", "bits", "group"), [("global", 8, None), ("paper", 4, 32)], ids=["int8", "int4"]
)
@pytest.mark.parametrize("name", MODELS)
def test_a_quantised_model_is_trained_in_floats_and_rounded(name, method, bits, group, tmp_path):
    """Weights, formats, plan and live rows stay; what is saved is what was trained."""
    model = make_model(name)
    how = {"flops_reduction": 0.3, "method": method, "bits": bits, "group": group, "lm_head_bits": 8}
    rana.compress(model, [tokens()], progress=False, **how)
    plan, shapes, before = attached_plan(model), sizes(model), perplexity(model, tokens(), progress=False).nll
    head = {name: t.clone() for name, t in model.get_output_embeddings().state_dict().items()}
    recovery.recover(model, tokens(), HOW, LORA, progress=False)
    assert perplexity(model, tokens(), progress=False).nll < before - 0.05
    assert sizes(model) == shapes
    assert all(torch.equal(t, head[name]) for name, t in model.get_output_embeddings().state_dict().items())
    after = attached_plan(model)
    assert plan.reduction - 0.002 < after.reduction < plan.reduction + 0.05  # the zeros of ReLU cost nothing
    assert after == plan.with_adapters(
        tuple(
            replace(old, threshold=new.threshold, live=new.live)
            for old, new in zip(plan.adapters, after.adapters, strict=True)
        )
    )
    with count_live(model) as counts, torch.no_grad():
        model(input_ids=tokens())
    for adapter in after.adapters:
        if adapter.kind != "dense":
            assert counts[adapter.names[0]].mean == pytest.approx(adapter.live, rel=0.02, abs=0.1)
    rana.save(model, tmp_path / "out")
    loaded = rana.load(tmp_path / "out")
    assert_equal_states(model, loaded)
    assert torch.equal(logits(loaded), logits(model))


def test_what_is_trained_is_what_is_merged():
    """The model with its LoRA, and without it but merged, before thresholds are fitted."""
    model = adapted()
    to_linears(model)
    pattern = recovery._ranks(model, tokens(), HOW, LORA, None, None, None, False)
    assert set(pattern) == {
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers" in name
    }
    tuned = recovery._with_lora(model, pattern, 0)
    training.train(tuned, tokens(), HOW, progress=False)
    wanted, thresholds = logits(tuned), [module.threshold.clone() for _, module in factored(model)]
    merged = tuned.merge_and_unload()
    assert all(torch.equal(m.threshold, t) for (_, m), t in zip(factored(merged), thresholds, strict=True))
    away = (logits(merged) - wanted).abs().flatten(0, 1).amax(1)
    assert away.median() < 1e-4 and (away < 1e-3).float().mean() > 0.9  # a rounding may turn a mask over


def test_half_precision_is_trained_in_float32():
    model = adapted(dtype=torch.bfloat16)
    before = perplexity(model, tokens(), progress=False).nll
    kinds, train = [], recovery.train
    with pytest.MonkeyPatch.context() as patch:

        def spy(tuned, *args, **options):
            kinds.extend(p.dtype for p in tuned.parameters() if p.requires_grad)
            return train(tuned, *args, **options)

        patch.setattr(recovery, "train", spy)
        recovery.recover(model, tokens(), HOW, LORA, progress=False)
    assert set(kinds) == {torch.float32} and model.dtype == torch.bfloat16
    assert perplexity(model, tokens(), progress=False).nll < before - 0.05


def test_distilling_from_the_dense_model():
    dense = make_model()

    def away(model: nn.Module) -> float:
        ours, theirs = logits(model).log_softmax(-1), logits(dense).log_softmax(-1)
        return float((theirs.exp() * (theirs - ours)).sum())

    model = adapted()
    before = away(model)
    slow = Training(steps=20, batch=2, learning_rate=5e-4)
    recovery.recover(model, tokens(), slow, LORA, dense=dense, progress=False)
    assert away(model) < 0.8 * before


def test_ranks_are_searched_and_an_interruption_costs_little(tmp_path, monkeypatch):
    def recovered(**how) -> tuple[nn.Module, Search]:
        model, search = adapted(), Search(tokens(3), 4)
        recovery.recover(model, tokens(), HOW, LORA, search=search, progress=False, **how)
        return model, search

    whole, wanted = recovered()
    assert len(wanted.losses) == 4 and min(wanted.losses) < wanted.baseline_loss
    monkeypatch.setattr(training, "SAVED_EVERY", 4)
    step, count = training._step, 0

    def interrupted(*args):
        nonlocal count
        count += 1
        if count in (
            8,
            8 + 2 * LORA.search_steps + 10,
        ):  # in the third evaluation, in step 10 of the training
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(training, "_step", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            recovered(resume_dir=tmp_path)
    count = 10**6
    again, search = recovered(resume_dir=tmp_path)
    assert search.losses == wanted.losses and count - 10**6 == HOW.steps - 8
    assert_equal_states(whole, again)
    faster, larger = replace(HOW, learning_rate=0.01), recovery.Lora(rank=8, search_steps=3)
    for wanted, rows, how, lora, more in [
        ("another text", tokens(5), HOW, LORA, {}),
        ("learning rate 0.005, asked for 0.01; rank 4, asked for 8", tokens(), faster, larger, {}),
        ("another dense model", tokens(), HOW, LORA, {"dense": make_model()}),
        ("evaluations 4, asked for 5", tokens(), HOW, LORA, {"search": Search(tokens(3), 5)}),
    ]:
        more = {"search": Search(tokens(3), 4), **more}
        with pytest.raises(ValueError, match=rf"unfinished work on something else \({wanted}\)"):
            recovery.recover(adapted(), rows, how, lora, resume_dir=tmp_path, progress=False, **more)


def test_the_command_line(folder, compressed, tmp_path, run):  # noqa: F811
    asked = ["recover", compressed, "--text", folder / "text.txt", "--sequence-length", 64, "--steps", 4]
    asked += ["--rank", 2, "--learning-rate", 0.003, "--dense", folder]
    asked += ["--history", tmp_path / "history", "--evaluations", 2, "--search-steps", 1]
    code, out, err = run(*asked, "-o", tmp_path / "out", "--json")
    found = json.loads(out)
    assert code == 0, err
    assert found["perplexity"]["compressed"] != found["perplexity"]["unrecovered"]
    assert len(found["search"]["losses"]) == 2 and found["tokens"] == 4 * 4 * 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["history", "out"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| recovered | 4 steps, 1024 tokens, of text.txt, LoRA of rank 2, merged, distilled from" in card
    assert " unrecovered, on sequences held out of text.txt |" in card
    plain = asked[: asked.index("--dense")]
    code, out, _ = run(*plain, "-o", tmp_path / "out", "--evaluation", folder / "text.txt")
    before, after = re.search(r"perplexity ([\d.]+) became ([\d.]+)", out).groups()
    assert code == 0 and float(after) < float(before)
    code, _, err = run(*asked, "-o", compressed)
    assert code == 1 and "wanted another directory to write" in err


def test_the_command_line_with_weights_in_four_bits(folder, tmp_path, run):  # noqa: F811
    text, sizes = ["--text", folder / "text.txt"], ["--sequence-length", 64]
    asked = ["compress", folder, "--calibration", text[1], "-o", tmp_path / "four", "--tokens", 1024, *sizes]
    code, _, err = run(*asked, "--method", "paper", "--bits", 4)
    assert code == 0, err
    rest = ["--steps", 4, "--rank", 2, "--learning-rate", 0.003, "-o", tmp_path / "out", "--json"]
    code, out, err = run("recover", tmp_path / "four", *text, *sizes, *rest)
    found = json.loads(out)["perplexity"]
    assert code == 0 and found["compressed"] < found["unrecovered"], err
    assert attached_plan(rana.load(tmp_path / "out")).bits == (4,)
