"""The ops of rana_kernels: linears and MLPs that skip the rows of weights a token does not need.

`functions.py` documents the ops, and `layers.py` has layers that call them.
"""

from . import layers
from .functions import linear, masked_linear, masked_lowrank_linear, masked_mlp

__all__ = ["layers", "linear", "masked_linear", "masked_lowrank_linear", "masked_mlp"]
