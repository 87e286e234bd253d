"""LoRA on compressed models: trained, saved, loaded and merged, each the same function as the last."""

import copy
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch import nn

import rana_kernels as rana
from rana_kernels.checkpoint.attachment import attached_plan
from rana_kernels.model.plan import Plan
from rana_kernels.nn.adapters import RanaLinear
from rana_kernels.nn.dense import QuantizedLinear
from rana_kernels.nn.format import Format
from rana_kernels.nn.mlp import RanaMLP
from rana_kernels.nn.split_mlp import join_mlp, split_mlp
from rana_kernels.ops.quantized import dequantize
from tests.test_compress import assert_equal_states, hand_plan, logits, make_model, quantised_head, tokens

peft = pytest.importorskip("peft")
lora = import_module("rana_kernels.integrations.peft")

TARGETS = {
    "Llama": ["q_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"],
    "Phi3": ["qkv_proj", "gate_up_proj", "down_proj"],
    "GPTNeoX": ["query_key_value", "dense_h_to_4h", "dense_4h_to_h"],
    "OPT": ["q_proj", "k_proj", "v_proj", "fc1", "fc2"],
}
every_model = pytest.mark.parametrize("name", TARGETS)


def compressed(name: str, joint: bool = False, first: str = "rank") -> nn.Module:
    """Few ranks, masks that matter, and room for more ranks."""
    model = make_model(name)
    asked = hand_plan(model, joint, o="neuron" if name == "Llama" else "dense", first=first).adapters
    fewer = []
    for adapter in asked:
        rank = 32 if adapter.kind == "rank" else adapter.rank
        change = {"rank": rank, "live": 0.6 * rank, "threshold": None} if adapter.kind != "dense" else {}
        fewer.append(type(adapter)(**{**vars(adapter), **change}))
    rana.compress(model, [tokens()], plan=Plan(tuple(fewer)), progress=False)
    return model


def tuned(name: str, joint: bool = False, first: str = "rank", **options):
    """A LoRA with weights that do something."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS[name], **options)
    model = lora.add(compressed(name, joint, first), config)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


@every_model
def test_a_fresh_lora_changes_nothing_but_rounding(name):
    model = compressed(name)
    wanted = logits(model)
    config = peft.LoraConfig(r=4, target_modules=TARGETS[name])
    torch.testing.assert_close(logits(lora.add(model, config).eval()), wanted, rtol=1e-5, atol=1e-5)


@every_model
def test_all_linears_are_those_of_the_dense_model(name):
    model, dense = compressed(name), make_model(name)
    dense_names = {n for n, m in dense.named_modules() if isinstance(m, nn.Linear) and m is not dense.lm_head}
    found = lora.add(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    adapted = {n.removeprefix("base_model.model.") for n, m in found.named_modules() if hasattr(m, "lora_A")}
    assert {n for n in adapted if n} == dense_names


@pytest.mark.parametrize("joint", [False, True], ids=["separate", "joint"])
@every_model
def test_saved_loaded_and_merged_it_stays_the_same(name, joint, tmp_path):
    model = tuned(name, joint)
    wanted, plain = logits(model), logits(compressed(name, joint))
    assert (wanted - plain).norm() > 0.01 * plain.norm()
    model.save_pretrained(tmp_path / "lora")
    again = lora.load(compressed(name, joint), tmp_path / "lora").eval()
    assert torch.equal(logits(again), wanted)
    merged = lora.merge(again)
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-4)
    assert any(isinstance(m, RanaMLP) for m in merged.modules()) == (name != "OPT")
    rana.save(merged, tmp_path / "merged")
    loaded = rana.load(tmp_path / "merged")
    assert_equal_states(merged, loaded)
    ranks = {a.names[0]: a.rank for a in attached_plan(loaded).adapters if a.kind == "rank"}
    assert max(ranks.values()) > 32 and torch.equal(logits(loaded), logits(merged))
    assert loaded.generate(tokens(1, 8), max_new_tokens=4, do_sample=False).shape[1] > 8


def test_on_joint_neurons_it_stays_the_same_and_appends_nothing(tmp_path):
    model = tuned("Llama", joint=True, first="neuron")
    wanted, plain = logits(model), logits(compressed("Llama", joint=True, first="neuron"))
    assert (wanted - plain).norm() > 0.01 * plain.norm()
    model.save_pretrained(tmp_path / "lora")
    again = lora.load(compressed("Llama", joint=True, first="neuron"), tmp_path / "lora").eval()
    assert torch.equal(logits(again), wanted)
    merged = lora.merge(again)
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-4)
    assert merged.model.layers[0].mlp.B is None
    rana.save(merged, tmp_path / "merged")
    loaded = rana.load(tmp_path / "merged")
    assert_equal_states(merged, loaded)
    assert attached_plan(loaded).stored_bytes(4) == attached_plan(merged).stored_bytes(4)


def test_gradients_are_those_of_dense_lora_where_the_adapters_are_exact():
    def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
        for name, parameter in model.named_parameters():
            if "lora" in name:
                generator = torch.Generator().manual_seed(len(name))
                parameter.data = torch.randn(parameter.shape, generator=generator) / 10
        ids = tokens(2, 12)
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if "lora" in n}

    config = peft.LoraConfig(r=4, target_modules=TARGETS["Llama"])
    dense = gradients(peft.get_peft_model(make_model("Llama"), copy.deepcopy(config)))
    model = make_model("Llama")
    rana.compress(model, [tokens()], plan=hand_plan(model), progress=False)
    ours = gradients(lora.add(model, config))
    assert dense.keys() == ours.keys() and len(dense) == 2 * 6 * 2
    for name, gradient in dense.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6)


def test_training_lowers_the_loss_and_leaves_the_base_alone():
    model = tuned("Llama").train()
    before = {n: p.clone() for n, p in model.named_parameters() if "lora" not in n}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(12):
        losses.append(model(input_ids=tokens(), labels=tokens()).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.95 * losses[0]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_rslora_scales_by_the_root_of_the_rank(tmp_path):
    plain, root = tuned("Llama"), tuned("Llama", use_rslora=True)
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:  # without the change a score lies at its threshold, where rounding decides
            parameter.data.neg_()
    root.load_state_dict(plain.state_dict())
    layer = root.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling == {"default": 6 / 4**0.5}
    wanted = logits(root)
    assert not torch.allclose(wanted, logits(plain), atol=1e-3)
    root.save_pretrained(tmp_path)
    merged = lora.merge(lora.load(compressed("Llama"), tmp_path).eval())
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-4)


def test_appended_ranks_are_always_on():
    merged = lora.merge(tuned("Llama"))
    owner = merged.model.layers[0].self_attn.q_proj
    assert isinstance(owner, RanaLinear) and owner.B.shape[0] == 32 + 4 + 4  # q's and v's
    assert (owner.threshold[:32] > 0).all() and (owner.threshold[32:] == 0).all()


def test_what_cannot_be_merged_says_so():
    model = make_model("Llama")
    rana.compress(model, [tokens()], plan=hand_plan(model), progress=False)
    full = lora.add(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merging needs 68 ranks of a layer that has at most 64"):
        lora.merge(full)
    with pytest.raises(ValueError, match="unsupported variant"):
        tuned("Llama", use_dora=True)
    with pytest.raises(ValueError, match="wanted peft.LoraConfig"):
        lora.add(compressed("Llama"), peft.IA3Config())


@pytest.mark.parametrize("joint", [False, True], ids=["separate", "joint"])
@pytest.mark.parametrize("name", ["Llama", "Phi3", "GPTNeoX"])
def test_an_mlp_taken_apart_and_put_together_is_the_same(name, joint):
    mlp = next(m for m in compressed(name, joint).modules() if isinstance(m, RanaMLP))
    again = join_mlp(split_mlp(mlp))
    assert_equal_states(mlp, again)
    x = torch.randn(3, 64)
    torch.testing.assert_close(split_mlp(mlp)(x), mlp(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(again(x), mlp(x))


# weights in 8 and 4 bits


def in_bits(name: str, bits: int, joint: bool = False, first: str = "rank", o: str = "dense") -> nn.Module:
    """Everything quantised, lm_head too; the masks of `compressed`."""
    model = make_model(name)
    adapters = []
    for adapter in hand_plan(model, joint, o=o, first=first).adapters:
        rank = 32 if adapter.kind == "rank" else adapter.rank
        change = {"rank": rank, "live": 0.6 * rank, "threshold": None} if adapter.kind != "dense" else {}
        adapters.append(replace(adapter, **change).with_format(Format(bits, 32)))
    plan = Plan(tuple(adapters), lm_head=quantised_head(model, bits, 32))
    rana.compress(model, [tokens()], plan=plan, progress=False)
    return model


QUANTIZED = [
    ("Llama", 8, False, "rank"), ("Llama", 4, True, "rank"), ("Llama", 4, True, "neuron"),
    ("Phi3", 4, False, "rank"), ("OPT", 8, False, "rank"), ("GPTNeoX", 4, False, "neuron"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "bits", "joint", "first"), QUANTIZED)
def test_beside_quantised_adapters_it_is_trained_saved_and_loaded(name, bits, joint, first, tmp_path):
    plain = in_bits(name, bits, joint, first)
    before, targets = logits(plain), [*TARGETS[name], *({"Llama": ["o_proj"]}.get(name, []))]
    config = peft.LoraConfig(r=4, target_modules=sorted({*targets}))
    model = lora.add(in_bits(name, bits, joint, first), config)
    # A threshold is a score of one of these tokens, and the sums of an MLP taken apart have another order.
    assert (logits(model.eval()) - before).norm() < 1e-3 * before.norm()
    packed = {n: b.clone() for n, b in model.named_buffers() if b.dtype in (torch.int8, torch.uint8)}
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=2e-2), []
    for _ in range(12):
        losses.append(model(input_ids=tokens(), labels=tokens()).loss)
        losses[-1].backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    assert packed and all(torch.equal(b, packed[n]) for n, b in model.named_buffers() if n in packed)
    wanted = logits(model.eval())
    assert (wanted - before).norm() > 0.01 * before.norm()
    model.save_pretrained(tmp_path)
    again = lora.load(in_bits(name, bits, joint, first), tmp_path).eval()
    assert torch.equal(logits(again), wanted)
    with pytest.raises(ValueError, match="merging wants floats, and this Rana.* is quantised: .*unmerged"):
        lora.merge(again)
    with pytest.raises(ValueError, match="merging wants floats"):
        again.merge_adapter()
    assert torch.equal(logits(again), wanted)


def test_lora_on_a_quantised_dense_linear_is_that_on_its_floats():
    model, config = in_bits("Llama", 4), peft.LoraConfig(r=4, target_modules=["o_proj"])
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, QuantizedLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight.data = dequantize(module.qweight, module.qweight_scale, module.in_features)
            twin.set_submodule(name, linear)
    models = [lora.add(each, copy.deepcopy(config)).eval() for each in (model, twin)]
    for each in models:
        for name, parameter in each.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    torch.testing.assert_close(logits(models[0]), logits(models[1]), rtol=1e-3, atol=2e-3)


def test_where_floats_are_beside_quantised_adapters_those_are_merged():
    """Attention in floats with a LoRA, and a quantised MLP without one."""
    made = hand_plan(make_model("Llama"), joint=True)
    fewer = [replace(a, rank=32, live=20.0, threshold=None) if a.kind == "rank" else a for a in made.adapters]
    mixed = [a.with_format(Format(4, 32)) if ".mlp." in a.names[0] else a for a in fewer]
    model = make_model("Llama")
    rana.compress(model, [tokens()], plan=Plan(tuple(mixed)), progress=False)
    state = {n: t.clone() for n, t in model.state_dict().items() if ".mlp." in n}
    tuned = lora.add(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    wanted = logits(tuned)
    merged = lora.merge(tuned)
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-3, atol=1e-3)
    now = merged.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in state.items())


def test_a_lora_is_merged_before_a_model_is_compressed(tmp_path):
    """PEFT wraps the model, or puts its layers into it, and leaves no trace of them after merging."""
    config = peft.LoraConfig(r=4, target_modules=["up_proj"])
    wrapped = peft.get_peft_model(make_model("Llama"), config)
    how = {"flops_reduction": 0.3, "method": "paper", "progress": False}
    for given in (wrapped, wrapped.get_base_model()):
        with pytest.raises(ValueError, match=r"layers of PEFT \(.*up_proj\).* model\.merge_and_unload\(\)$"):
            rana.compress(given, [tokens()], **how)
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="a wrapper of PEFT"):
        rana.calibrate(peft.get_peft_model(make_model("Llama"), prompts), [tokens()], progress=False)
    model = wrapped.merge_and_unload()
    rana.compress(model, [tokens()], **how)
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="eager")):
        tuned = lora.add(wrap(model), config)
        with pytest.raises(ValueError, match=r"model = rana_kernels\.integrations\.peft\.merge\(model\)$"):
            rana.save(tuned, tmp_path / "out")
        model = lora.merge(tuned)
    rana.save(model, tmp_path / "out")
    assert torch.equal(logits(rana.load(tmp_path / "out")), logits(model))
