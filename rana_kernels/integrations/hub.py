"""`push_to_hub` of compressed models: our model card and manifest go with the weights.

transformers makes a card of a template, or takes the repository's, and writes it right before it uploads: so
it is at the upload that ours takes its place. Both `model.push_to_hub(…)` and `save_pretrained(…,
push_to_hub=True)` come by there, in every version.
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
    @wraps(upload)
    def describe_then_upload(
        self, working_dir: str | os.PathLike, repo_id: str, files_timestamps: dict[str, float], **options
    ):
        # tokenizers and LoRAs, which know of a compressed model's plan, are uploaded by the same method
        plan = attached_plan(self) if isinstance(self, transformers.PreTrainedModel) else None
        if plan is not None:
            place = Path(working_dir)
            theirs = ModelCard((place / CARD).read_text(encoding="utf-8"))
            (place / CARD).write_text(_merged(theirs, write_card(self)), encoding="utf-8")
            write_manifest(place, self, plan, _changed(place, files_timestamps))
        return upload(self, working_dir, repo_id, files_timestamps, **options)

    return describe_then_upload


def _merged(theirs: ModelCard, text: str) -> str:
    """Our card, with the metadata that theirs has and ours lacks (a license), and the tags of both."""
    ours = ModelCard(text)
    ours.data["tags"] = list(dict.fromkeys([*ours.data["tags"], *theirs.data.get("tags", [])]))
    for key, value in theirs.data.to_dict().items():
        if ours.data.get(key) is None:
            ours.data[key] = value
    return str(ours)


def _changed(place: Path, before: dict[str, float]) -> list[Path]:
    """The files that the upload takes; others in a directory of the user's may be in no repository."""
    return [path for path in place.iterdir() if path.stat().st_mtime > before.get(path.name, 0)]


PushToHubMixin._upload_modified_files = _describing(  # type: ignore[method-assign]
    PushToHubMixin._upload_modified_files
)
