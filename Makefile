# make demo                    a fresh machine to nearest sentences: makes .venv, installs, runs `s2sent demo`
# make test                    makes .venv, installs what the tests need, runs them
# make test PYTHON=/a/python   the same in an environment that exists; installs nothing but this package
# make changed                 the tests that what has changed since the last such call needs, engines left out; pytest-testmon
# make bench                   measures what this machine can (without a GPU under ten minutes): bench/results, bench/REPORT.md
# make accuracy                errors against float64, beside eager PyTorch's: bench/results/accuracy, bench/ACCURACY.md
# make compare BASE=main       this package and a git revision in alternation: did my change help? Options: bench/compare.py
# make hub                    build/hub: what the library kernels loads from a hub, in pure Python and Triton
# make matrix                 the wheel beside other Pythons, torches and libraries: docs/compatibility.md; gigabytes, needs nox
# make aarch64                 the compiled backend's CPU tests on an emulated aarch64: docs/compatibility.md; needs Debian and 6 GB
# make sweep                   every text encoder of transformers, made tiny, against docs/encoders.md: tests marked "slow"
# make fuzz SECONDS=3600       drawn calls against the float64 reference, other ones each time; S2SENT_TEST_BACKEND names the backend
# make wheel                   builds dist/*.whl, audits its ABI, and loads it in a fresh environment with torch alone beside it
# make sanitize                the compiled backend's CPU tests under AddressSanitizer and UBSan; needs GCC, minutes
# make sanitize-threads        its CPU part's threads, and several Python threads over one module, under ThreadSanitizer
# make lint                    ruff, mypy and the import contract; PYTHON= as above
# make clean                   removes .venv and what builds and tests left behind
#
# BENCH_OPTIONS are those of bench/suite.py or bench/compare.py: make bench BENCH_OPTIONS="--cases A,C --competitors eager".
# BOOTSTRAP is the Python (3.10 or newer) that makes .venv. Where no NVIDIA GPU is, TORCH pins one release; to be sure of its
# small CPU build, say make demo TORCH="torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu".

SHELL := /bin/bash
.SHELLFLAGS := -eo pipefail -c
.PHONY: help demo test sweep fuzz bench accuracy compare release hub matrix changed aarch64 sanitize sanitize-threads lint clean package

BOOTSTRAP ?= python3
WORKERS ?= 2
SECONDS ?= 60
BENCH_OPTIONS ?=
NOX_OPTIONS ?=
BASE ?= main
GPU := $(shell nvidia-smi >/dev/null 2>&1 && echo yes)
ifeq ($(GPU),yes)
TORCH ?= torch
TRITON ?=
else
TORCH ?= torch==2.13.0
TRITON ?= $(if $(filter Linux,$(shell uname -s)),triton==3.7.1)
endif

CSRC := $(shell find csrc -type f)

ifdef PYTHON
PY := $(PYTHON)
DEMO_READY := package
DEV_READY := package
BENCH_READY := package
RELEASE_READY :=
else
PY := .venv/bin/python
DEMO_READY := .venv/demo.installed
DEV_READY := .venv/dev.installed
BENCH_READY := .venv/bench.installed
RELEASE_READY := .venv/release.installed
endif

help:
	@sed -n 's/^# \(make \)/\1/p' Makefile

.venv/created:
	@$(BOOTSTRAP) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: BOOTSTRAP=python3.x")'
	$(BOOTSTRAP) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	.venv/bin/python -m pip install $(TORCH)
	@touch $@

.venv/demo.installed: .venv/created pyproject.toml setup.py $(CSRC)
	.venv/bin/python -m pip install --no-build-isolation -e ".[demo]"
	@touch $@

.venv/dev.installed: .venv/created pyproject.toml setup.py $(CSRC)
	.venv/bin/python -m pip install --no-build-isolation -e ".[test,lint]" $(TRITON)
	@touch $@

.venv/bench.installed: .venv/created pyproject.toml setup.py $(CSRC)
	.venv/bin/python -m pip install --no-build-isolation -e ".[bench]" $(TRITON)
	@touch $@

.venv/release.installed: .venv/created
	.venv/bin/python -m pip install --quiet abi3audit build nox twine
	@touch $@

package:
	$(PY) -m pip install --quiet --no-deps --no-build-isolation -e .

demo: $(DEMO_READY)
	$(PY) -m s2sent_kernels.cli demo

# Several processes, because Triton decides when a kernel is decorated whether it is compiled or interpreted:
# 1. all tests but those of tests/engines; where nvcc is installed they also compile every CUDA source (tests/project);
# 2. tests/engines on Triton: on the GPU, without one in the interpreter;
# 3. tests/engines on every other backend: the native one, where it is built, on a GPU with its CUDA part, else its CPU part;
# 4. with a GPU, tests/engines on the native backend's CPU part.
# The closing line of each is repeated at the end. The interpreter's products are OpenBLAS's: OPENBLAS_CORETYPE pins one of its
# kernels, so that rounding, and with it the outcome, is the same on every CPU.
test: $(DEV_READY)
	@logs=$$(mktemp -d); trap 'rm -rf "$$logs"' EXIT; interpret= workers= gpu=yes failed=0; \
	if ! $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		interpret=TRITON_INTERPRET=1 gpu=; \
		if grep -qw avx2 /proc/cpuinfo 2>/dev/null; then interpret="$$interpret OPENBLAS_CORETYPE=Haswell"; fi; \
		if $(PY) -c 'import xdist' 2>/dev/null; then workers="-n $(WORKERS) --dist worksteal"; export OMP_NUM_THREADS=1; fi; \
	fi; \
	env -u TRITON_INTERPRET $(PY) -m pytest tests --ignore=tests/engines $$workers 2>&1 | tee "$$logs/1" || failed=1; \
	env -u TRITON_INTERPRET $$interpret $(PY) -m pytest tests/engines $$workers 2>&1 | tee "$$logs/2" || failed=1; \
	others=$$($(PY) -c 'from s2sent_kernels.engines.choice import BACKENDS; print(*BACKENDS)' \
		| sed 's/reference//; s/triton//') || failed=1; \
	for backend in $$others; do \
		env -u TRITON_INTERPRET S2SENT_TEST_BACKEND=$$backend $(PY) -m pytest tests/engines $$workers 2>&1 \
			| tee "$$logs/3-$$backend" || failed=1; \
	done; \
	if [ "$$gpu" ]; then \
		env -u TRITON_INTERPRET S2SENT_TEST_BACKEND=native S2SENT_TEST_DEVICE=cpu $(PY) -m pytest tests/engines 2>&1 \
			| tee "$$logs/4" || failed=1; \
	fi; \
	echo "tests:                  $$(tail -n 1 "$$logs/1")"; \
	echo "tests/engines:          $$(tail -n 1 "$$logs/2")"; \
	for backend in $$others; do echo "tests/engines ($$backend): $$(tail -n 1 "$$logs/3-$$backend")"; done; \
	if [ "$$gpu" ]; then echo "tests/engines (native, CPU): $$(tail -n 1 "$$logs/4")"; fi; \
	exit $$failed

# Exit code 1 means that a contestant failed: the report is rebuilt from all other rows, and the command fails.
bench: $(BENCH_READY)
	@failed=0; \
	env -u TRITON_INTERPRET $(PY) bench/suite.py $(BENCH_OPTIONS) || failed=$$?; \
	if [ $$failed -lt 2 ]; then $(PY) bench/report.py --readme README.md; fi; \
	exit $$failed

accuracy: $(BENCH_READY)
	env -u TRITON_INTERPRET $(PY) bench/accuracy.py
	$(PY) bench/report_accuracy.py

compare: $(BENCH_READY)
	env -u TRITON_INTERPRET $(PY) bench/compare.py --base $(BASE) $(BENCH_OPTIONS)

# The sdist, and from what it holds the wheel. Each is installed where nothing but torch and what builds an extension is; smoke.py is
# copied, because beside the checkout Python would import that.
release: $(RELEASE_READY)
	rm -rf dist build
	$(PY) -m build --no-isolation --outdir dist .
	$(PY) -m twine check --strict dist/*
	$(PY) -m abi3audit --strict dist/*.whl
	@cp tests/smoke.py dist/; cd dist; version=$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' ../s2sent_kernels/__init__.py); \
	for file in *.whl *.tar.gz; do \
		echo "$$file"; rm -rf venv; \
		$(BOOTSTRAP) -m venv venv; \
		venv/bin/python -m pip install --quiet "setuptools>=77" $(TORCH); \
		venv/bin/python -m pip install --quiet --no-deps --no-build-isolation "$$file"; \
		venv/bin/python -W error::RuntimeWarning smoke.py "$$version"; \
	done; \
	rm -rf venv smoke.py

hub:
	$(BOOTSTRAP) hub/layout.py

# One wheel for every combination, and nox, which is in no extra. NOX_OPTIONS are those of nox: --envdir, --session "matrix(oldest)".
matrix: $(RELEASE_READY)
	rm -rf build
	S2SENT_BUILD=cpu $(PY) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/matrix .
	$(PY) -m nox $(NOX_OPTIONS)

# What was run last is kept in .testmondata, by pytest-testmon, which is in no extra. The first call runs all tests.
changed: $(DEV_READY)
	@$(PY) -c 'import testmon' 2>/dev/null || $(PY) -m pip install --quiet pytest-testmon
	env -u TRITON_INTERPRET OMP_NUM_THREADS=1 $(PY) -m pytest --testmon --testmon-forceselect tests --ignore=tests/engines -n $(WORKERS) --dist worksteal

aarch64:
	$(BOOTSTRAP) tests/aarch64.py

sweep: $(DEV_READY)
	env -u TRITON_INTERPRET HF_HUB_OFFLINE=1 $(PY) -m pytest -m slow tests/encoders

fuzz: $(DEV_READY)
	$(PY) tests/fuzz/run.py --seconds $(SECONDS)

sanitize: $(DEV_READY)
	tests/sanitize.sh $(PY)

sanitize-threads: $(DEV_READY)
	tests/sanitize_threads.sh $(PY)

lint: $(DEV_READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -c 'from importlinter.cli import lint_imports_command as main; main()'

clean:
	rm -rf .venv build dist s2sent_kernels/*.so *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
