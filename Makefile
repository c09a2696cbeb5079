# Each target sets up everything it needs: a virtual environment in .venv with pinned packages.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MODELS := $(VENV)/.models-installed
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all lint bench gpu clean
.DEFAULT_GOAL := test

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cli,test,lint]'
	touch $(STAMP)

demo: $(STAMP)  ## the main job: compile, train and check a tensor-parallel language model on 4 simulated ranks
	$(BIN)/localtensor check docs/examples/tp_transformer.py --nproc-per-node 4

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -q -m 'not slow and not gpu'

$(MODELS): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[models]'
	touch $(MODELS)

test-all: $(MODELS)  ## slow cases too, and models of the transformers package
	$(BIN)/python -m pytest -n 2 --dist loadgroup -q -m 'not gpu'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)  ## one script per claim; JAX_PYTHON=python with jax adds that comparison
	$(BIN)/python -m tests.benchmarks

gpu:  ## the core checks on CUDA, with the machine's own python3 and torch; skips cleanly without a GPU
	PYTHONPATH=src $(PYTHON) -m pytest -q -p no:cacheprovider -o filterwarnings=default -m gpu tests/gpu

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
