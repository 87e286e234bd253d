"""The namespace of the ops in torch's dispatcher.

The kernel for Hugging Face's `kernels` library (`hub_kernel/`) has this folder's other files too. There each
build has a namespace of its own, and a file that the builder writes takes the place of this one. Its name and
the names in it are therefore the builder's.
"""

import torch

ops = torch.ops.rana


def add_op_namespace_prefix(op_name: str) -> str:
    """Return the full name of an op, `namespace::op`."""
    return f"rana::{op_name}"
