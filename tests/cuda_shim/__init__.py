"""The CUDA kernels' own source, compiled for the CPU against a stand-in for CUDA (`cuda_runtime.h`)."""
