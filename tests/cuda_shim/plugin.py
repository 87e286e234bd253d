"""A pytest plugin: in this process, the CUDA kernels serve the CPU, run by the shim."""

import os
from pathlib import Path

import rana_kernels  # noqa: F401 - loads the CPU library that is replaced here
from tests.cuda_shim import build

build.load(Path(os.environ["RANA_SHIM_LIBRARY"]))
