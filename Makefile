# Everything here sets itself up: it needs Python 3.11+, make and a package index.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
READY_ONNX := .venv-onnx/.ready

.PHONY: bench demo test test-onnx test-triton test-all lint format setup tables clean

demo: $(READY)  ## embed the bundled pictures and draw demo/report.html
	$(BIN)/python -m clever_zoo.demo --out demo

test: $(READY)  ## the default tests: offline, a few minutes
	$(BIN)/python -m pytest -q

test-onnx: $(READY) $(READY_ONNX)  ## the ONNX runtime's tests in an environment without torch
	$(BIN)/python -m tests.onnx_models build/onnx-models
	CLEVER_ZOO_ONNX_MODELS=build/onnx-models \
		.venv-onnx/bin/python -m pytest -q -s tests/clever_zoo/test_onnx_encoder.py

test-all: $(READY)  ## adds the slow ones and those that read Fashion-MNIST
	$(BIN)/python -m pytest -q -m "not gpu and not network and not triton"

test-triton: $(READY)  ## needs a package index and Debian's python3-venv: a real Triton server
	$(BIN)/python -m pytest -q -m triton

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
	.venv-onnx/bin/pip install --quiet --editable ".[onnx]" pytest pytest-socket
	! .venv-onnx/bin/python -c "import torch" 2> /dev/null
	touch $@

clean:
	rm -rf .venv .venv-onnx build demo dist .pytest_cache .mypy_cache .ruff_cache
