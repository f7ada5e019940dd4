# Everything runs in .venv, which the first target that needs it creates. PYTHON chooses the interpreter it is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UNFINISHED := $(VENV)/.installing
EVERYTHING := $(VENV)/.everything

# The tests run in two processes; more threads inside each only get in each other's way.
test: export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint docs clean

help:
	@echo 'make demo    train K-2:4 QMIX on simple_spread for a few minutes, evaluate, export, show the result'
	@echo 'make venv    create .venv and install k24 with everything the tests need'
	@echo 'make test    run the fast tests'
	@echo 'make lint    ruff (rules and format) and mypy'
	@echo 'make docs    the documentation site, in build/site'
	@echo 'make clean   remove .venv, caches and build products; results/ stays'
	@echo 'PYTHON=...   the Python (3.11 to 3.13) to create .venv from; now: $(PYTHON)'

venv: $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP) $(EVERYTHING)
	$(BIN)/python -m pytest -q -n 2 tests

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

# A message of the docstrings' reader is no warning to the builder, and must not pass either.
docs: $(STAMP)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt 'k24[docs]'
	$(BIN)/python docs/_site.py build/docs
	$(BIN)/zensical build --clean --strict -f mkdocs.yml > build/site.log 2>&1 || { cat build/site.log >&2; exit 1; }
	@if grep griffe build/site.log >&2; then exit 1; fi
	@echo 'written to build/site: open index.html, or $(BIN)/zensical serve'

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis k24/kernels/_cpu*.so
	find . -path ./results -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# What only the tests need all of: every suite of environments (0.8 GB, most of it JAX and MuJoCo), Triton, whose interpreter runs the GPU
# kernels on a CPU (0.7 GB), and Ray for sweeps (0.3 GB).
$(EVERYTHING): $(STAMP)
	@echo 'installing every suite of environments, Triton and Ray: 1.8 GB more'
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt 'k24[envs,sweep]' "triton; sys_platform == 'linux'"
	touch $@

# UNFINISHED holds the process that installs and becomes STAMP as the last step. Whoever finds one left behind by a dead process starts
# from nothing, because pip takes a half-written package for an installed one.
# torch goes first: while it is missing, any package that asks for it could bring a newer build with several GB of CUDA packages.
# The C++ kernels are built along with k24, so their sources count.
$(STAMP): pyproject.toml constraints.txt setup.py $(filter-out csrc/kernels_test.cpp,$(wildcard csrc/*))
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || \
	    { echo 'k24 needs Python 3.11 to 3.13, and $(PYTHON) is: '"$$($(PYTHON) --version 2>&1)"'; try make PYTHON=python3.11' >&2; exit 1; }
	@set -e; \
	if [ -e $(UNFINISHED) ]; then \
	    pid=$$(cat $(UNFINISHED)); \
	    if [ -n "$$pid" ] && kill -0 "$$pid" 2>/dev/null; then \
	        echo "process $$pid is installing into $(VENV): wait for it (if it does something else, make clean)" >&2; exit 1; \
	    fi; \
	    echo 'the last installation did not finish: starting afresh'; \
	    rm -rf $(VENV); \
	fi; \
	echo 'installing into $(VENV): 1.5 GB, a few minutes'; \
	mkdir -p $(VENV); \
	echo $$$$ > $(UNFINISHED); \
	rm -f $(STAMP); \
	[ -x $(BIN)/pip ] || $(PYTHON) -m venv $(VENV); \
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch; \
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'; \
	[ -e k24/kernels/_cpu.so ] || \
	    echo 'the C++ kernels were not built, policies run dense: install g++, then $(BIN)/pip install -v -e . says what is wrong'; \
	touch $(UNFINISHED); \
	mv $(UNFINISHED) $(STAMP)
