# Everything a user or contributor types. Each target sets up what it needs.
PYTHON ?= python3
VENV ?= .venv
TORCH_VERSION ?=
CONSTRAINTS ?= constraints.txt
STARTED := $(shell date +%s.%N)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)
# Tests are many and small: a worker for each of two cores, one thread each.
WORKERS ?= 2
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup
SRC := src tests bench tools claims examples

.PHONY: install demo test test-slow test-gpu test-floors check docs bench format new-method clean

install: $(STAMP)

# PyTorch first and by its exact version: the CPU build is chosen by pip's own configuration
# (index, find-links), which `make install` leaves untouched. The other pins say nothing of it, or
# they would put the pinned one in the place of TORCH_VERSION. A module is compiled when it is first
# imported: most of them never are, and compiling all took longer than unpacking them. Where the
# environment forbids to keep what was compiled, as in many containers, each start would do it anew.
unexport PYTHONDONTWRITEBYTECODE
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	  "$(PYTHON) is older than Python 3.11: make PYTHON=python3.12, or wherever a newer one is"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --upgrade-strategy only-if-needed \
	  torch==$(or $(TORCH_VERSION),$$(sed -n 's/^torch==//p' $(CONSTRAINTS)))
	grep -v '^torch==' $(CONSTRAINTS) > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --no-compile -c $(VENV)/constraints.txt -e '.[dev]'
	touch $@

demo: install
	@TRUING_STARTED=$(STARTED) $(RUN)/truing run recipes/quickstart.yaml

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

test: install
	$(TESTS) -m "not slow" $(TESTED)

# The same under the oldest versions that pyproject.toml allows, in an environment beside the other.
# TORCH_VERSION=2.13.0 and the like for another PyTorch than the oldest.
FLOORS ?= .venv-floors
test-floors:
	$(MAKE) test VENV=$(FLOORS) CONSTRAINTS=constraints-floors.txt \
	  TESTED="tests/unit tests/contract tests/golden tests/e2e/test_serve*.py"

# Hours in all; a part of it: make test-slow SLOW="-k kill"
test-slow: install
	rm -f build/slow.xml # that of the run before says nothing of this one
	-$(RUN)/python -m pytest -m "slow" --timeout 3600 --junitxml build/slow.xml $(SLOW)
	$(RUN)/python tools/slow.py build/slow.xml # writes tests/slow.json, fails as the tests did

# What `make test` pretends to have, on a GPU that is there.
test-gpu: install
	TRUING_TEST_GPU=1 $(RUN)/python -m pytest -m gpu tests/contract

docs: install
	$(RUN)/python tools/docs.py

bench: install
	$(RUN)/python -m bench.all

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# make new-method train/preference my_loss
new-method: install
	$(BIN)/python tools/new_method.py $(filter-out $@,$(MAKECMDGOALS))

clean:
	rm -rf build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis

ifneq (,$(filter new-method,$(MAKECMDGOALS)))
%:
	@:
endif
