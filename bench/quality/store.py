"""Finished measurements in one JSON file: it is the result, and an interrupted run goes on from it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from bench.quality.subject import Subject
from bench.report.results import write
from rana_kernels.checkpoint.resume import fingerprint


class Store:
    """Sections of finished entries, by key. The file is written whole after every entry.

    Raise ValueError if the file is of another model or other text.
    """

    def __init__(self, path: Path, subject: Subject, conditions: str) -> None:
        self.path = path
        texts = (subject.calibration, subject.evaluation)
        digests = [hashlib.sha256(text.long().numpy().tobytes()).hexdigest() for text in texts]
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
        """Store a setting beside the results. Raise ValueError if they were made with another value."""
        stored = self.data.setdefault("settings", {}).setdefault(name, value)
        if stored != value:
            raise ValueError(
                f"{self.path} has results of {name} {stored}, asked for {value}: ask for the same, or give "
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
