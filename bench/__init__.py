"""The benchmarks. Each command is a module:

python -m bench           every op against its baselines on the processor
python -m bench.scale     how the time of an adapter grows with each of its sizes
python -m bench.cost      how long compressing a model takes
python -m bench.decode    whole models, token by token
python -m bench.gpu       tests and times on a graphics card
python -m bench.quality   perplexity of every method at equal cost
python -m bench.rounding  loss by rounding, with groups along the input and along the output
python -m bench.report    docs/performance.md, and the tables and plots of bench/results
"""
