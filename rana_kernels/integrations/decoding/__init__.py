"""Faster generation on the CPU: a step of our own in place of that of transformers. Programs call `quicken`.

step     the step of one token: when it is taken, and what it computes
blocks   one token through the blocks of a Llama and its relatives
recipe   the blocks as a list of ops, which one call runs
cache    keys and values that grow without being copied
"""

from rana_kernels.integrations.decoding.step import quicken

__all__ = ["quicken"]
