# make demo and make test are all that a new checkout needs: Python from 3.10, pip, make and g++.
# They set up a virtual environment in .venv, once; it is updated when pyproject.toml changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := cpu,rtx,models,plots,sign,dev
DSC := $(BIN)/dsc-split
DEMO := demo

.PHONY: help setup demo test check fuzz gpu lint format clean

help:
	@echo "make demo     export efficientnet_b0, benchmark it, print its split lookup table, draw the pictures"
	@echo "make test     all checks and all tests"
	@echo "make check    the fast part, for people at work"
	@echo "make fuzz     fuzz the C++ table loader for ten minutes; FUZZ_S=60 for one"
	@echo "make gpu      the tests that need a GPU, and a comparison with trtexec; see docs/gpu.md"
	@echo "make lint     ruff and mypy alone"
	@echo "make format   let ruff format the code"
	@echo "make clean    remove what was generated, but not $(VENV)"

setup: $(VENV)/.complete

# The stamp is written last, so that a set-up that was interrupted is done again; a broken environment is made anew.
$(VENV)/.complete: pyproject.toml
	rm -f $@
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV): about 6 GB, PyTorch most of it, a few minutes"
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@

# The device is this machine with one thread, six times slower than it is; the server is this machine with all of them.
demo: setup
	mkdir -p $(DEMO)
	$(DSC) export torchvision:efficientnet_b0 --output $(DEMO)/bundle \
	    --device onnxruntime:cpu,threads=1,slowdown=6 --server onnxruntime:cpu
	$(DSC) bench $(DEMO)/bundle --batches 1,2,8 --precision-goal 0.05 --time-limit 2
	rm -rf $(DEMO)/plots
	$(DSC) table $(DEMO)/bundle --plots $(DEMO)/plots
	$(DSC) pick $(DEMO)/bundle --batch 2 --rate 4

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# mypy runs beside the tests, for it has one process and they seldom keep two cores busy; it prints after them.
check: MARKS := -m "not slow and not gpu"
check test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@printed=$$(mktemp) && { $(BIN)/mypy >"$$printed" 2>&1 & mypy=$$!; \
	$(BIN)/python -m pytest -n 2 $(MARKS); tests=$$?; \
	wait $$mypy; types=$$?; cat "$$printed"; rm -f "$$printed"; exit $$((tests | types)); }

# Needs clang++ with libFuzzer; without it, it says so and ends well.
fuzz: setup
	DSC_SPLIT_FUZZ_S=$(or $(FUZZ_S),600) $(BIN)/python -m pytest -n 0 -ra tests/cpp/test_fuzz_load.py

# Without a GPU, both say why and end well.
gpu: setup
	$(BIN)/python -m pytest -m gpu -n 0 -ra
	$(BIN)/python examples/benchmark_gpu/run.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(DEMO) build dist .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
