# make setup       .venv with the pinned packages and the dlm command
# make quickstart  the whole way, from text to samples, on this machine
# make test        what CI runs; for others: make test PYTEST_ARGS='-m slow'
# make test-slurm  the templates on a real Slurm of 16 nodes on this machine; needs root, installs Slurm by apt-get
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
PIP := $(BIN)/python -m pip install --no-input --constraint .ci/constraints.txt
PYTEST_ARGS ?=

.PHONY: setup quickstart test test-slurm clean
.DELETE_ON_ERROR:

setup: $(STAMP)

# DeepSpeed comes after torch: its build reads torch's version, and compiles nothing with DS_BUILD_OPS=0.
$(STAMP): setup.py pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "setup needs Python 3.10 or newer: make setup PYTHON=/path/to/python3"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	    { echo "$(PYTHON) lacks venv: install it (Debian, Ubuntu: apt install python3-venv)"; exit 2; }
	@echo "[1/4] virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "[2/4] torch (the largest part)"
	@$(PIP) torch numpy setuptools wheel packaging
	@echo "[3/4] deepspeed"
	@DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	@echo "[4/4] dlm_scale and the rest"
	@$(PIP) --no-build-isolation --editable '.[test]'
	@touch $@
	@echo "ready: $(BIN)/dlm --help"

quickstart: setup
	@$(BIN)/python -m dlm_scale.quickstart

test: setup
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

# Whatever becomes of the tests, what they started is stopped.
test-slurm: setup
	@tests/slurm/cluster.sh install
	@export DLM_TEST_CLUSTER=$$(mktemp -d /tmp/dlm_slurm_XXXXXX); \
	    trap 'tests/slurm/cluster.sh down' EXIT; \
	    $(BIN)/python -m pytest tests/slurm -m 'slurm or not slurm' $(PYTEST_ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .hypothesis
