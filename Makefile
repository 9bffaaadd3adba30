# make demo: set-up, then the whole flow on a miniature (CPU, offline). make test: set-up, then the tests.
PYTHON ?= python3
# Asked for first and exactly, so that no later dependency pulls another build. On machines without a GPU, PyTorch's own
# index has a smaller CPU build: make setup TORCH_PIP_ARGS="--index-url <PyTorch's CPU wheel index>".
TORCH ?= torch==2.13.0
TORCH_PIP_ARGS ?=
BIN := .venv/bin

.PHONY: setup demo test test-all check bench gpu-check wheel clean

setup: .venv/.setup-done

.venv/.setup-done: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; install it, or give make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "error: $(PYTHON) has no venv; on Debian or Ubuntu: apt-get install python3-venv"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH_PIP_ARGS) "$(TORCH)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/python -m launch.demo $(if $(FRESH),--fresh) $(if $(BASELINE),--baseline) $(if $(SEED),--seed $(SEED))

# Files side by side on two cores; what shares a fixture stays together.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-all: setup
	$(BIN)/python -m pytest -m "not gpu"

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: setup
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.search --targets 512 --seeds 0

# What only a GPU can show, on one GPU in ten minutes: gpu_check.json.
gpu-check: setup
	$(BIN)/python -m benchmarks.gpu.check

# dist/*.whl: the commands with conf/ and models/, for any folder.
wheel: setup
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf .venv .pytest_cache .ruff_cache build dist *.egg-info
