"""`rana tune`, on a small model in Triton's interpreter, with a clock that prefers what the test says."""

import json

import pytest
import torch

from rana_kernels import ops
from rana_kernels.backends import triton
from tests.subprocesses import python

pytestmark = pytest.mark.skipif(not triton.available(), reason="the triton package is not installed")

SCRIPT = """
import json, sys
from pathlib import Path
import torch, transformers
import rana_kernels as rana
from rana_kernels.backends.triton import configurations
from rana_kernels.backends.triton.configurations import Decode, Prefill
from rana_kernels.backends.triton.tune import microseconds, record, tune, write
from triton.runtime.errors import OutOfResources

torch.manual_seed(0)
config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                  num_attention_heads=2, num_key_value_heads=1)
model = transformers.LlamaForCausalLM(config).eval()
ids = torch.randint(64, (4, 80))
rana.compress(model, [ids], flops_reduction=0.4, method="paper")

calls = record(model, ids[:1, :5])
by_op = {op: group for group in calls.values() for op, _ in group}
assert set(by_op) == {"masked_lowrank_linear", "masked_mlp", "linear"}
assert len(by_op["masked_mlp"]) == 2, "the two layers are two copies of a problem"

tried = set()
def clock(group):
    (op, args), *_ = group
    M = args[0].numel() // args[0].shape[-1]
    config = (configurations.decode if configurations.decodes(M, args[0].dtype) else configurations.prefill)(
        op, args[0].reshape(M, -1), *(t for t in args[1:] if torch.is_tensor(t) and t.dim() == 2))
    tried.add(config)
    if isinstance(config, Decode) and config.warps == 8 and config.residents == 2:
        raise RuntimeError("no room for so many") if config.columns > 128 else OutOfResources(2, 1, "memory")
    wanted = Decode(8, 1, 64, 256), Prefill(64, 64, 64, 4, 3, False)
    return 1.0 if config in wanted else 2.0

before = configurations.table(model.device)
choices = tune(model, ids[:1], (1, 80), time=clock, progress=False)
assert configurations.table(model.device) == before, "what was tried is forgotten"
assert len(tried) > 40
write(Path(sys.argv[1]), "no-card", choices)
write(Path(sys.argv[1]), "no-card", {})  # adds nothing, loses nothing
print(json.dumps({key: list(c)[1:] for key, c in choices.items()}))
"""


def test_the_fastest_configuration_is_written(tmp_path):
    path = tmp_path / "no-card.json"
    child = python("-c", SCRIPT, path, TRITON_INTERPRET="1")
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-3000:]
    table = json.loads(path.read_text())
    assert table["card"] == "no-card" and table["triton"] and table["torch"]
    found = table["configurations"]
    assert len(found) == 8, "three ops, linear for o and for lm_head, one token and eighty"
    for key, fields in found.items():
        one = " M1 " in key
        wanted = {"warps": 8, "residents": 1, "in_flight": 64, "columns": 256} if one else {"block_m": 64}
        assert wanted.items() <= fields.items(), key
    assert json.loads(child.stdout.splitlines()[-1]) == dict.fromkeys(found, [1.0, 2.0])


class TwoLinears(torch.nn.Module):
    """A float weight and a quantised one."""

    def forward(self, input_ids, use_cache):
        x, scale = torch.ones(input_ids.shape[1], 4), torch.ones(3, 1, dtype=torch.float16)
        weight = torch.ones(3, 4)
        return ops.linear(x, weight), ops.linear(x, weight.to(torch.int8), None, scale)


def test_quantized_weights_are_tuned_where_kernels_read_them():
    """With more tokens they are dequantised first."""
    from rana_kernels.backends.triton.tune import record

    for tokens, keys in ((5, ["bytes4", "bytes4 int8"]), (17, ["bytes4"])):
        calls = record(TwoLinears(), torch.zeros(1, tokens, dtype=torch.long))
        assert [len(group) for group in calls.values()] == [1] * len(keys)
        assert all(found.endswith(wanted) for found, wanted in zip(calls, keys, strict=True))
