# Two commands: `make demo` and `make test`. Both set up all they need in .venv, and nothing outside the checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint coverage clean

demo: $(VENV)/.installed
	$(BIN)/jaxsparse demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# Lines covered by tests, per file; fails if a public function is not covered at all.
coverage: $(VENV)/.installed-test
	$(BIN)/python -m tests.coverage_report

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jaxsparse needs Python 3.11 or newer; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[test,torch,tensorboard,third-party]'
	$(BIN)/python -m pip install --quiet --no-deps gemma-llm==1.0.0
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
