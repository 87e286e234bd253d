"""Tensor parallelism with transformers: each process holds and computes one share of every adapter."""
