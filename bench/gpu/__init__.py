"""`python -m bench.gpu`: everything that only a graphics card can show, the most important first.

stages     child processes with time limits: one that hangs or fails stops no other
limits     the limits of the card: gaps between kernels, barriers, reading (limits.cu)
tests      the tests that are run, and for which ops of which backend
ops        the ops at the sizes of models, against their baselines, inside CUDA graphs that take turns
peers      kernels that others published
"""
