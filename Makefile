# The only entry for people and for CI. Needs Python 3.11 or newer and make; `make PY=python3.12 ...` names the Python.
# pip's own environment variables (PIP_INDEX_URL, PIP_FIND_LINKS, ...) choose where packages come from.
PY ?= python3
BIN := .venv/bin
# No .pyc before the first import: most modules are never imported, and compiling all of them takes a minute. So the
# first import has to keep its own, or every process compiles torch anew, whatever the environment says.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/pip -qq --disable-pip-version-check install --no-compile --constraint constraints.txt
# so many processes of pytest, one thread each, and of mypy; 0: none but the one that was called
JOBS ?= 2
# make gpu
PYTHON ?= python3
OUT ?= benchmarks/results
PART ?= all
DATA ?=
# mkdocs has a newer release announced at every start.
SITE := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test pytest floors lint type bench docs gpu digits tables wheel clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1	\2/p' Makefile

setup: .venv/.stamp  ## make .venv with the pinned versions of constraints.txt

# torch goes first and alone: of its many builds, the one that the machine's pip settings offer for the pinned version.
.venv/.stamp: pyproject.toml constraints.txt
	@$(PY) -c 'import sys; sys.exit("Python is %d.%d; 3.11 or newer is needed: make PY=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/pip || $(PY) -m venv .venv
	@echo "installing the pinned packages into .venv (some minutes, without further words)"
	$(PIP) torch hatchling setuptools
	$(PIP) --no-build-isolation --editable '.[all,dev]'
	touch $@

demo: setup  ## the main job on the built-in digits, into demo/
	$(BIN)/mmd-export demo --out demo --overwrite

test: lint pytest  ## everything that CI checks

pytest: setup  ## the tests alone; ARGS="-k plan" chooses, JOBS=0 runs them in one process
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

# Not the whole suite: kits, pages and benchmarks are tested with the pinned versions only. Python 3.11, for which the
# oldest packages have wheels.
floors:  ## the tests with the lowest versions that pyproject.toml allows, in .venv-floors; ARGS= as for pytest
	test -x .venv-floors/bin/pip || $(PY) -m venv .venv-floors
	.venv-floors/bin/pip -qq --disable-pip-version-check install packaging
	.venv-floors/bin/python tests/project/floors.py > .venv-floors/floors.txt
	.venv-floors/bin/pip -qq --disable-pip-version-check install --no-compile --constraint .venv-floors/floors.txt \
		--editable '.[tune,finetune,onnx,openvino,coreml,report]' hypothesis jsonschema pytest pytest-timeout pytest-xdist \
		pyyaml scipy torchmetrics
	MMD_EXPORT_REQUIRED_TARGETS="coreml onnx openvino torch" \
		MMD_EXPORT_REQUIRED_RUNTIMES="aotinductor coreml-reference onnxruntime openvino torch" \
		OMP_NUM_THREADS=1 .venv-floors/bin/python -m pytest -n $(JOBS) --dist loadfile \
		tests/contract tests/core tests/cli tests/export tests/runtime tests/finetune tests/coreml tests/report $(ARGS)

lint: setup  ## style, types, import contracts, wheel, start-up time, tables, site
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers $(JOBS)
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tests/project/checks.py
	$(BIN)/python -m benchmarks.tables --check
	$(SITE)

type: setup  ## mypy --strict
	$(BIN)/mypy --num-workers $(JOBS)

bench: setup  ## measure everything that the README states, into benchmarks/results/
	$(BIN)/python -m benchmarks.run_all

docs: tables  ## the tables, the page of all commands, and the site of it all, into site/
	$(SITE)

gpu:  ## measure on an NVIDIA GPU; PYTHON=, OUT=, PART=, DATA= choose; needs no .venv
	$(PYTHON) benchmarks/gpu.py --out $(OUT) --part $(PART) $(if $(DATA),--data $(DATA))

digits: setup  ## train the built-in model and its encoders again
	$(BIN)/python finetune/recipes/train_digits.py

tables: setup  ## write the tables of the README from benchmarks/results/
	$(BIN)/python -m benchmarks.tables

wheel: setup  ## source archive and wheel, into dist/
	$(BIN)/python -m build --no-isolation

clean:  ## remove what can be made again, but not .venv
	rm -rf demo dist site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find benchmarks finetune mmd_export runtimes tests -name __pycache__ -type d -prune -exec rm -rf {} +
