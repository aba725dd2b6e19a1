# Everything here sets itself up: it needs Python 3.11+, make and a package index.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
READY_ONNX := .venv-onnx/.ready
MODELS := $(CURDIR)/build/onnx-models
# One thread each: idle ones of several processes would wait for each other.
TESTS := OMP_NUM_THREADS=1 CLEVER_ZOO_ONNX_MODELS=$(MODELS) $(BIN)/python -m pytest -q

.PHONY: bench demo test test-onnx test-triton test-all lint format setup tables clean

demo: $(READY)  ## embed the bundled pictures and draw demo/report.html
	$(BIN)/python -m clever_zoo.demo --out demo

test: $(READY) $(MODELS)/.ready  ## the default tests: offline, some minutes
	$(TESTS) -n 2 --dist loadfile

test-onnx: $(READY_ONNX) $(MODELS)/.ready  ## the ONNX tests in an environment without torch
	CLEVER_ZOO_ONNX_MODELS=$(MODELS) \
		.venv-onnx/bin/python -m pytest -q -s tests/clever_zoo/test_onnx_encoder.py

test-all: $(READY) $(MODELS)/.ready  ## adds the slow ones and those that read Fashion-MNIST
	$(TESTS) -n 2 --dist loadfile -m "not gpu and not network and not triton"

test-triton: $(READY) $(MODELS)/.ready  ## needs a package index and Debian's python3-venv: a real Triton server
	$(TESTS) -m triton

bench: $(READY)  ## speed beside peers, half an hour on a quiet machine; writes bench/results.json
	$(BIN)/python -m bench

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(READY)  ## the environment with all extras

tables: $(READY)  ## write cards, figures, READMEs' tables and the comparison from the records
	$(BIN)/python -m training.evaluate.report

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable ".[all]"
	touch $@

$(READY_ONNX): pyproject.toml
	$(PYTHON) -m venv .venv-onnx
	.venv-onnx/bin/pip install --quiet --upgrade pip
	.venv-onnx/bin/pip install --quiet --editable ".[onnx]" pytest pytest-socket pytest-timeout
	! .venv-onnx/bin/python -c "import torch" 2> /dev/null
	touch $@

$(MODELS)/.ready: $(READY) tests/onnx_models.py $(shell find clever_zoo -name '*.py') \
		$(wildcard model_cards/*/config.json)
	$(BIN)/python -m tests.onnx_models $(MODELS)
	touch $@

clean:
	rm -rf .venv .venv-onnx build demo dist .pytest_cache .mypy_cache .ruff_cache
