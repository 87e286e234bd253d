"""`python -m bench`: every op against its baselines on this machine's processor.

cases        shapes of known models, and the published cases
case         what every layer has, and its contenders
layers       a dense linear, a rank adapter, a neuron adapter and whole MLPs
baselines    the dense and static low-rank layers that ours is compared with
quantized    weights in 8 and 4 bits, and torch's own products with them
weights      random weights in rotated copies, and thresholds
stream       memory bandwidth of this machine (stream.cpp)
timing       interleaved rounds, and the row of results that they give
check        this revision against the stored results
compare      this revision against another one, in two processes
"""
