"""`python -m bench.gpu`: everything that only a card can show, in the order of its worth.

stages     children with time limits: what hangs or fails takes nothing else with it
limits     what the card does at best: gaps between kernels, barriers, reading (limits.cu)
tests      which tests are run, and for which ops of which backend
problems   the ops at the sizes of models, against their baselines
ops        times those problems, inside CUDA graphs
peers      kernels that others published
"""
