"""Tests that need packages of other people: `make test-stacks` has them, `make test` not."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.stacks)
