"""Finished measurements on disk, in one JSON file that is both the result and where a run goes on from."""

import hashlib
import json
from pathlib import Path
from typing import Any

from bench.quality.subject import Subject
from bench.report import write
from rana_kernels.checkpoint.resume import fingerprint


class Store:
    """Sections of finished entries, by key. Written whole, and moved into place, after every entry.

    Raises ValueError if the file is of another model or other text.
    """

    def __init__(self, path: Path, subject: Subject, conditions: str) -> None:
        self.path = path
        texts = (subject.calibration, subject.evaluation)
        digests = [hashlib.sha256(rows.long().numpy().tobytes()).hexdigest() for rows in texts]
        made = fingerprint(subject.dense, subject.blocks, *digests)
        self.data: dict[str, Any] = {"fingerprint": made, "conditions": []}
        if path.exists():
            self.data = json.loads(path.read_text(encoding="utf-8"))
        if self.data["fingerprint"] != made:
            raise ValueError(
                f"{path} is of another model or other text: give another --output, or delete it first"
            )
        self.conditions = conditions

    def settle(self, name: str, value: Any) -> None:
        """Results of different settings are not to be compared: keep `value` beside them.

        Raises ValueError if they were made with another one.
        """
        kept = self.data.setdefault("settings", {}).setdefault(name, value)
        if kept != value:
            raise ValueError(
                f"{self.path} has results of {name} {kept}, asked for {value}: ask for the same, or give "
                "another --output"
            )

    def has(self, section: str, key: str) -> bool:
        return key in self.data.get(section, {})

    def section(self, name: str) -> dict[str, Any]:
        return self.data.get(name, {})

    def put(self, section: str, key: str, entry: dict[str, Any] | list[Any]) -> None:
        self.data.setdefault(section, {})[key] = entry
        if self.conditions not in self.data["conditions"]:
            self.data["conditions"].append(self.conditions)
        write(self.path, json.dumps(self.data, indent=1, allow_nan=False) + "\n")
