"""`push_to_hub` of compressed models: our model card and manifest are uploaded with the weights.

transformers writes its own model card (from a template, or the repository's) right before the upload. Ours
therefore replaces that card in the method that uploads. In every version of transformers, both
`model.push_to_hub(…)` and `save_pretrained(…, push_to_hub=True)` call this method.
"""

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import ModelCard
from transformers.utils.hub import PushToHubMixin

from rana_kernels.checkpoint.attachment import attached_plan
from rana_kernels.checkpoint.manifest import CARD, write_manifest
from rana_kernels.checkpoint.model_card import write_card


def _describing(upload: Callable[..., Any]) -> Callable[..., Any]:
    """Return `upload`, preceded by the writing of our card and manifest if `self` is a compressed model."""

    @wraps(upload)
    def describe_then_upload(
        self, working_dir: str | os.PathLike, repo_id: str, files_timestamps: dict[str, float], **options
    ):
        # the same method uploads tokenizers, and LoRAs that have the config of a compressed model
        plan = attached_plan(self) if isinstance(self, transformers.PreTrainedModel) else None
        if plan is not None:
            place = Path(working_dir)
            theirs = ModelCard((place / CARD).read_text(encoding="utf-8"))
            (place / CARD).write_text(_merged(theirs, write_card(self)), encoding="utf-8")
            write_manifest(place, self, plan)
        return upload(self, working_dir, repo_id, files_timestamps, **options)

    return describe_then_upload


def _merged(theirs: ModelCard, text: str) -> str:
    """Return our card with the tags of both cards, and with metadata that only theirs has (a license)."""
    ours = ModelCard(text)
    ours.data["tags"] = list(dict.fromkeys([*ours.data["tags"], *theirs.data.get("tags", [])]))
    for key, value in theirs.data.to_dict().items():
        if ours.data.get(key) is None:
            ours.data[key] = value
    return str(ours)


PushToHubMixin._upload_modified_files = _describing(  # type: ignore[method-assign]
    PushToHubMixin._upload_modified_files
)
