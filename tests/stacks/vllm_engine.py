"""vLLM's whole engine on a checkpoint: `python -m tests.stacks.vllm_engine DIR '{"option": value}'`.

Prints, as JSON, the greedy continuations of the prompts. Each engine has a process of its own: it decides the
threads and processes of all that follow it.
"""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parent.parent.parent
COUNT = 12  # tokens written


def prompts() -> Tensor:
    text = load_file(ROOT / "examples/demo_model/calibration.safetensors")["input_ids"]
    return text[-4:, :16].long()


def can_run() -> bool:
    """Whether there is a vLLM, and a card or kernels for the CPU, which the published wheel does not have."""
    if not find_spec("vllm"):
        return False
    if torch.cuda.is_available():
        return True
    os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")  # before vLLM is imported: it looks for a card
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    return hasattr(torch.ops._C, "cpu_attention_with_kv_cache")


def main(place: str, options: dict) -> list[list[int]]:
    from vllm import LLM, SamplingParams

    from rana_kernels.integrations.vllm import register

    register()  # the package may be built in place, where vLLM finds no entry points
    engine = LLM(model=place, dtype="float32", max_model_len=256, skip_tokenizer_init=True, **options)
    sampling = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": row.tolist()} for row in prompts()]
    return [list(answer.outputs[0].token_ids) for answer in engine.generate(asked, sampling)]


if __name__ == "__main__":
    print("\n" + json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))))
