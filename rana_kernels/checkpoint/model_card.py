"""The model card: a README.md, written from what a compressed model knows of how it was made.

`made` is noted by `compress` in the model's config, under `quantization_config`, and goes with it from
then on: base model, calibration, budget, FLOPs, bytes, and perplexities if `note` was given some. It may
have come from a file, so nothing here relies on what is in it.
"""

import re
from typing import Any

from torch import nn

from rana_kernels.checkpoint.attachment import attach_plan, attached_facts, attached_plan
from rana_kernels.model.plan import AdapterSpec, Plan

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def note(model: nn.Module, **facts: Any) -> None:
    """Add to what the card of a compressed model will say.

    base_model    directory or hub name
    calibration   {"data": what it was}
    perplexity    {"data": what it was measured on, "compressed": …, "dense": …, "unrecovered": …}
    recovery      {"steps": …, "tokens": …, "rank": of LoRA, "data": …, "dense": learnt from, or None}
    """
    plan, made = attached_plan(model), attached_facts(model)
    if plan is None:
        raise ValueError(f"{type(model).__name__} is not compressed: there is no card to add to")
    for key, value in facts.items():
        made[key] = {**made.get(key, {}), **value} if isinstance(value, dict) else value
    attach_plan(model, plan, made)


def write_card(model: nn.Module) -> str:
    """README.md of a compressed model, for a directory or the hub."""
    made, plan = attached_facts(model), attached_plan(model)
    assert plan is not None, "only compressed models are saved"
    base = str(made.get("base_model", ""))
    name = base.rstrip("/").rpartition("/")[2] or "a model"
    lines = [*_front_matter(base), f"# {name}, compressed with RaNA", "", _HOW, ""]
    lines += ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in _facts(base, made))]
    lines.append(f"| method | {plan.method} |")
    lines += [f"| {name} | {saved} |" for name, saved in _savings(plan, made)]
    lines += ["", "Rows kept of rows stored, mean over the calibration's tokens:", ""]
    lines += ["| linears | kind | kept / stored | of the dense cost |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *map(_row, plan.adapters), ""])


_HOW = """Linear layers of this model are replaced by adapters that skip, for each token, the work that adds
little to its result (*Adaptive Rank Allocation*, arXiv 2503.18216). It loads with `rana_kernels`:

```python
import rana_kernels
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this directory or repository")
```

Without that import transformers refuses to load it."""


def _front_matter(base: str) -> list[str]:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- rana_kernels"]
    if _HUB_ID.fullmatch(base):
        lines += [f"base_model: {base}", "base_model_relation: quantized"]
    return [*lines, "---", ""]


def _facts(base: str, made: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines of the table, of what is known; other keys and other types are left out."""

    def part(key: str) -> dict[str, Any]:
        return made[key] if isinstance(made.get(key), dict) else {}

    calibration, perplexity = part("calibration"), part("perplexity")
    words = [f"{calibration[key]} {word}" for key, word in (("tokens", "tokens"),) if key in calibration]
    words += [f"of {calibration['data']}"] if "data" in calibration else []
    words += [f"{key} {calibration[key]}" for key in ("seed", "sha256") if key in calibration]
    measured = [
        f"{perplexity[key]:.4f} {key}"
        for key in ("compressed", "unrecovered", "dense")
        if _number(perplexity, key)
    ]
    measured += [f"on {perplexity['data']}"] if "data" in perplexity else []
    kept, inside = _sizes(part("bytes")), _sizes(part("block_bytes"))
    recovery = part("recovery")
    trained = [f"{recovery[key]} {key}" for key in ("steps", "tokens") if _number(recovery, key)]
    trained += [f"of {recovery['data']}"] if "data" in recovery else []
    trained += [f"LoRA of rank {recovery['rank']}, merged"] if _number(recovery, "rank") else []
    trained += [f"distilled from {recovery['dense']}"] if recovery.get("dense") else []
    made_with = [f"{name} {version}" for name, version in sorted(part("versions").items())]
    rows = {
        "base model": [base] if base else [],
        "calibration": words,
        "perplexity": measured or ["not measured"],
        "recovered": trained,
        "weights": kept,
        "of the blocks' linears": inside,
        "made with": made_with,
    }
    return [(key, _plain(", ".join(values))) for key, values in rows.items() if values]


def _savings(plan: Plan, made: dict[str, Any]) -> list[tuple[str, str]]:
    """What the plan saves, and what was asked for."""

    def asked(reduction: float | None) -> str:
        return "" if reduction is None else f" ({reduction:.1%} asked for)"

    whole, time = made.get("model_flops_reduction"), made.get("block_time_reduction")
    rows = [("FLOPs saved in the blocks' linears", f"{plan.reduction:.1%}{asked(plan.flops_reduction)}")]
    rows += [("FLOPs saved, lm_head included", f"{whole:.1%}")] if isinstance(whole, float) else []
    if isinstance(time, float):
        what = "time saved there for one token, expected from measured kernels"
        rows.append((what, f"{time:.1%}{asked(plan.time_reduction)}"))
    if plan.max_memory is not None:
        rows.append(("most that these linears may store", f"{plan.max_memory / 1e6:.1f} MB"))
    return rows


def _sizes(size: dict[str, Any]) -> list[str]:
    return [f"{size[key] / 1e6:.1f} MB {key}" for key in ("before", "after") if _number(size, key)]


def _number(facts: dict[str, Any], key: str) -> bool:
    return isinstance(facts.get(key), int | float)


def _plain(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def _row(adapter: AdapterSpec) -> str:
    names = ", ".join(adapter.names)
    kept = "all" if adapter.kind == "dense" else f"{adapter.live:.0f} / {adapter.rank}"
    return f"| {names} | {adapter.kind} | {kept} | {adapter.cost_ratio:.0%} |"
