"""The kernel repository for Hugging Face's `kernels` library, made from this repository's sources.

    python -m hub_kernel build/hub-kernel            # the tree that kernel-builder compiles
    python -m hub_kernel build/hub-kernel --build    # and the CPU variant of this machine in its build/

`shipped/` holds what only that tree has. `tree.py` writes the tree, and `variant.py` compiles a part of it.
"""
