"""Compression: replace the linears of a model by adapters, and report the result."""
