# Everything starts from `build`: a virtual environment in .venv with the package importable in it, compiled.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py $(wildcard csrc/*.* csrc/cpu/*.*)

.PHONY: help build demo test test-slow lint format bench sanitize clean

help:
	@echo "make demo      compress the checked-in model, generate from it, time it, write build/demo/report.html"
	@echo "make test      the test-suite           make test-slow  large shapes too"
	@echo "make bench     kernel benchmarks        make sanitize   the tests of the ops under ASan and UBSan"
	@echo "make lint      ruff, clang-format, mypy make format     apply the formatters"
	@echo "make build     .venv with the package compiled in it (what the others start from)"

# torch comes first and alone: the machine's default source may be the CPU build, and nothing later
# may trade it for another one
$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -U pip "setuptools>=77" wheel
	$(BIN)/pip install -q "torch==2.13.0"
	$(BIN)/pip install -q ninja pybind11 numpy rich safetensors typer transformers matplotlib \
	    hypothesis pytest pytest-benchmark
	touch $@

$(VENV)/built: $(VENV)/ready $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/lint: $(VENV)/ready
	$(BIN)/pip install -q ruff mypy "clang-format==23.1.5"
	touch $@

build: $(VENV)/built

demo: build
	$(BIN)/python -m examples.demo --output build/demo

test: build
	$(BIN)/python -m pytest -q -m "not slow and not gpu"

test-slow: build
	$(BIN)/python -m pytest -q -m "not gpu"

bench: build
	$(BIN)/python -m bench

sanitize: build
	$(BIN)/python -m tests.sanitize

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* bench/*.cpp)
	$(BIN)/mypy

format: $(VENV)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* bench/*.cpp)

clean:
	rm -rf build dist *.egg-info rana_kernels/*.so .pytest_cache .hypothesis .mypy_cache .ruff_cache $(VENV)
