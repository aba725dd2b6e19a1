# Everything here sets itself up: it needs Python 3.11+, make and a package index.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-all test-triton lint format setup tables clean

demo: $(READY)  ## embed the bundled pictures and draw demo/report.html
	$(BIN)/python -m clever_zoo.demo --out demo

test: $(READY)  ## the default tests: offline, a few minutes
	$(BIN)/python -m pytest -q

test-all: $(READY)  ## adds the slow ones and those that read Fashion-MNIST
	$(BIN)/python -m pytest -q -m "not gpu and not network and not triton"

test-triton: $(READY)  ## needs a package index and Debian's python3-venv: a real Triton server
	$(BIN)/python -m pytest -q -m triton

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

clean:
	rm -rf .venv demo dist build .pytest_cache .mypy_cache .ruff_cache
