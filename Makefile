# Two commands: `make demo` and `make test`. Both set up all they need in .venv, and nothing outside the checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# JAX's compilers for NVIDIA GPUs, without NVIDIA's libraries but for the assembler, which tells what kernels take, and
# for TPUs. They lie apart: JAX complains where it finds one and no device.
PLUGINS := $(VENV)/cuda $(VENV)/tpu
NOTHING :=
WITH_PLUGINS := JAX_PLATFORMS=cpu PYTHONPATH=$(subst $(NOTHING) ,:,$(abspath $(PLUGINS)))

.PHONY: demo test lint coverage memory clean

demo: $(VENV)/.installed
	$(BIN)/jaxsparse demo

test: $(VENV)/.installed-test
	$(WITH_PLUGINS) $(BIN)/python -m pytest -n 2 --dist worksteal

# Peak memory of training LLaMA-2-7B on an H100, compiled for one that need not be here.
memory: $(VENV)/.installed-test
	$(WITH_PLUGINS) $(BIN)/python -m experiments.memory --model llama2-7b --device h100

lint: $(VENV)/.installed-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# Lines covered by tests, per file; fails if a public function is not covered at all.
coverage: $(VENV)/.installed-test
	$(WITH_PLUGINS) $(BIN)/python -m tests.coverage_report

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jaxsparse needs Python 3.11 or newer; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[test,torch,tensorboard,third-party,notebook]'
	$(BIN)/python -m pip install --quiet --no-deps gemma-llm==1.0.0
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/cuda \
	    $$($(BIN)/python -c 'from jax import __version__ as v; print(f"jax-cuda13-plugin=={v} jax-cuda13-pjrt=={v}")') \
	    'nvidia-cuda-nvcc>=13.0,<13.1'
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/tpu \
	    "$$($(BIN)/python -c 'from importlib.metadata import requires as r; print(*[l.split(";")[0] for l in r("jax") if l.startswith("libtpu")])')"
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
