"""The model card: a README.md, written from the facts that a compressed model carries in its config.

`compress` stores these facts in the config as `quantization_config["made"]`: base model, calibration, budget,
FLOPs, bytes, and perplexities if `note` was given some. They may come from an untrusted file, so the code
here relies on none of them.
"""

import re
from collections import Counter
from typing import Any

from torch import nn

from rana_kernels.checkpoint.attachment import attach_plan, attached_facts, attached_plan
from rana_kernels.model.plan import AdapterSpec, Plan
from rana_kernels.nn.format import Format

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def note(model: nn.Module, **facts: Any) -> None:
    """Add facts to the model card of a compressed model. Raise ValueError if `model` is not compressed.

    base_model    directory or hub name
    calibration   {"data": name of the text}
    perplexity    {"data": name of the text, "compressed": …, "dense": …, "unrecovered": …}
    recovery      {"steps": …, "tokens": …, "rank": of the LoRA, "data": …, "dense": the teacher, or None}
    """
    plan, made = attached_plan(model), attached_facts(model)
    if plan is None:
        raise ValueError(f"{type(model).__name__} is not compressed: there is no card to add to")
    for key, value in facts.items():
        made[key] = {**made.get(key, {}), **value} if isinstance(value, dict) else value
    attach_plan(model, plan, made)


def write_card(model: nn.Module) -> str:
    """Return the text of README.md for a compressed model."""
    made, plan = attached_facts(model), attached_plan(model)
    assert plan is not None, "only compressed models are saved"
    base = str(made.get("base_model", ""))
    name = base.rstrip("/").rpartition("/")[2] or "a model"
    lines = [*_front_matter(base), f"# {name}, compressed with RaNA", "", _HOW, ""]
    lines += ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in _facts(base, made))]
    lines.append(f"| method | {plan.method} |")
    lines.append(f"| bits of the weights | {describe_bits(plan)} |")
    lines += [f"| {name} | {saved} |" for name, saved in _savings(plan, made)]
    lines += ["", "Rows kept of rows stored, mean over the calibration's tokens:", ""]
    lines += ["| linears | kind | bits | kept / stored | of the dense cost |", f"|{' --- |' * 5}"]
    return "\n".join([*lines, *map(_adapter_row, plan.all_adapters), ""])


_HOW = """Linear layers of this model are replaced by adapters that skip, for each token, the work that adds
little to its result (*Adaptive Rank Allocation*, arXiv 2503.18216). It loads with `rana_kernels`:

```python
import rana_kernels
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this directory or repository")
```

Without that import transformers refuses to load it."""


def describe_bits(plan: Plan) -> str:
    """Return the bits of a plan's weights in a few words, with the linears of each width if they differ."""
    linears = Counter(adapter.format for adapter in plan.adapters for _ in adapter.names)
    if len(linears) == 1:
        blocks = _words(next(iter(linears)))
    else:
        ordered = sorted(linears.items(), key=lambda item: -item[0].bits)
        blocks = " and ".join(f"{_words(format)} ({count} linears)" for format, count in ordered)
    head = plan.lm_head
    kept = (
        "" if head is None or head.kind == "dense" else f", {head.kind}s, {head.live:.0f} of {head.rank} kept"
    )
    return f"{blocks}; lm_head {_words(plan.lm_head_format)}{kept}"


def _words(format: Format) -> str:
    if not format.quantized:
        return "16 or 32, as stored"
    return f"{format.bits}, a scale for {f'{format.group} columns' if format.group else 'every row'}"


def _front_matter(base: str) -> list[str]:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- rana_kernels"]
    if _HUB_ID.fullmatch(base):
        lines += [f"base_model: {base}", "base_model_relation: quantized"]
    return [*lines, "---", ""]


def _facts(base: str, made: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the lines of the table for the known facts. Unknown keys and wrong types are left out."""

    def part(key: str) -> dict[str, Any]:
        return made[key] if isinstance(made.get(key), dict) else {}

    lines = {
        "base model": [base] if base else [],
        "calibration": _calibration(part("calibration")),
        "perplexity": _perplexity(part("perplexity")) or ["not measured"],
        "recovered": _recovery(part("recovery")),
        "weights": _sizes(part("bytes")),
        "of the blocks' linears": _sizes(part("block_bytes")),
        "read for a token, in these and lm_head": _sizes(part("read_bytes")),
        "made with": [f"{name} {version}" for name, version in sorted(part("versions").items())],
    }
    return [(key, _plain(", ".join(values))) for key, values in lines.items() if values]


def _calibration(facts: dict[str, Any]) -> list[str]:
    words = [f"{facts['tokens']} tokens"] if "tokens" in facts else []
    words += [f"of {facts['data']}"] if "data" in facts else []
    return words + [f"{key} {facts[key]}" for key in ("seed", "sha256") if key in facts]


def _perplexity(facts: dict[str, Any]) -> list[str]:
    keys = ("compressed", "unrecovered", "dense")
    words = [f"{facts[key]:.4f} {key}" for key in keys if _is_number(facts, key)]
    return words + ([f"on {facts['data']}"] if "data" in facts else [])


def _recovery(facts: dict[str, Any]) -> list[str]:
    words = [f"{facts[key]} {key}" for key in ("steps", "tokens") if _is_number(facts, key)]
    words += [f"of {facts['data']}"] if "data" in facts else []
    words += [f"LoRA of rank {facts['rank']}, merged"] if _is_number(facts, "rank") else []
    return words + ([f"distilled from {facts['dense']}"] if facts.get("dense") else [])


def _savings(plan: Plan, made: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the lines of the table that compare the plan's savings with the request."""

    def asked(reduction: float | None) -> str:
        return "" if reduction is None else f" ({reduction:.1%} asked for)"

    whole, time = made.get("model_flops_reduction"), made.get("block_time_reduction")
    rows = [("FLOPs saved in the blocks' linears", f"{plan.reduction:.1%}{asked(plan.flops_reduction)}")]
    rows += [("FLOPs saved, lm_head included", f"{whole:.1%}")] if isinstance(whole, float) else []
    if isinstance(time, float):
        what = "time saved there for one token, expected from measured kernels"
        rows.append((what, f"{time:.1%}{asked(plan.time_reduction)}"))
    sizes = made.get("read_bytes")
    if plan.bytes_reduction is not None and isinstance(sizes, dict) and _is_number(sizes, "before"):
        saved = 1 - sizes["after"] / sizes["before"] if _is_number(sizes, "after") and sizes["before"] else 0
        rows.append(("bytes saved that a token reads", f"{saved:.1%}{asked(plan.bytes_reduction)}"))
    if plan.max_memory is not None:
        rows.append(("most that these linears may store", f"{plan.max_memory / 1e6:.1f} MB"))
    return rows


def _sizes(size: dict[str, Any]) -> list[str]:
    return [f"{size[key] / 1e6:.1f} MB {key}" for key in ("before", "after") if _is_number(size, key)]


def _is_number(facts: dict[str, Any], key: str) -> bool:
    return isinstance(facts.get(key), int | float)


def _plain(text: str) -> str:
    """Return the text on one line and without the separator of a table's cells."""
    return " ".join(text.replace("|", "/").split())


def _adapter_row(adapter: AdapterSpec) -> str:
    names = ", ".join(adapter.names)
    kept = "all" if adapter.kind == "dense" else f"{adapter.live:.0f} / {adapter.rank}"
    return f"| {names} | {adapter.kind} | {adapter.bits} | {kept} | {adapter.cost_ratio:.0%} |"
