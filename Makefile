# Every target sets up what it needs: Python 3.10 or newer, make and a C++ compiler are enough.
# On a machine without a GPU the CPU build of torch is a tenth of the download:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CSRC := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu)

.PHONY: demo test bench lint build clean

demo: $(VENV)/kernels.stamp
	$(BIN)/python -m fastmt adapt --out runs/demo --overwrite

# Python is let keep compiled modules: else each of the many processes compiles torch's anew.
test: $(VENV)/kernels.stamp
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest tests --numprocesses auto --dist loadfile --no-loadscope-reorder

bench: $(VENV)/kernels.stamp
	$(BIN)/python -m pytest benchmarks --benchmark-enable

lint: $(BIN)/ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

build: $(VENV)/kernels.stamp
	rm -rf build dist
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist runs/demo *.egg-info fastmt/*.so fastmt/_build_info.json
	rm -rf .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("fastmt needs Python 3.10 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(BIN)/ruff: | $(BIN)/python
	$(PIP) install --quiet --constraint $(CONSTRAINTS) ruff

# The kernels come in the next step, where torch's headers are installed and the compiler is heard.
$(VENV)/packages.stamp: pyproject.toml $(CONSTRAINTS) setup.py | $(BIN)/python
	FASTMT_BUILD_CPP=0 FASTMT_BUILD_CUDA=0 $(PIP) install --quiet --no-compile --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@

$(VENV)/kernels.stamp: $(VENV)/packages.stamp $(CSRC)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@
