"""Helpers for results that are written as JSON."""

from collections.abc import Iterator


def numbers_in(data) -> Iterator[float]:
    """Yield the numbers in nested dicts and lists."""
    if isinstance(data, dict | list):
        for value in data.values() if isinstance(data, dict) else data:
            yield from numbers_in(value)
    elif isinstance(data, int | float):
        yield data
