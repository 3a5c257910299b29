# make demo   sets everything up and converts the example model
# make test   sets everything up, the real server included, and runs all tests
# make browser  installs what reports are looked at with in tests: Chromium, on Debian
# Each environment is made once, and again when what it is made from changes.

PYTHON ?= python3
# Processes that run tests: each takes one core and up to 3 GB.
WORKERS ?= 2
BIN := .venv/bin
SERVER := .venv-vllm/bin
PIP_FLAGS := --quiet --disable-pip-version-check
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
APT := $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120 -o Acquire::Retries=3

.PHONY: demo test lint format docs browser clean

demo: .venv/installed
	rm -rf out/demo
	$(BIN)/ckptq convert --recipe demo.yaml
	$(BIN)/ckptq validate out/demo --source examples/tiny-qwen2.5-vl

# One thread each, which vLLM would bind to the first core, whichever process it is.
test: export OMP_NUM_THREADS = 1
test: export VLLM_CPU_OMP_THREADS_BIND = nobind
test: .venv/installed .venv-vllm/installed
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --no-loadscope-reorder

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt torch==2.13.0
	$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt -e ".[dev]"
	touch $@

# The list of findings, from the validators' source.
docs: .venv/installed
	$(BIN)/python -m ckptq.reports.catalog docs/findings.md

# The server has an environment of its own: it wants other versions of the same packages. The server of pipelines has a folder in
# it, for it registers itself with every vLLM that sees it.
.venv-vllm/installed: constraints-vllm.txt constraints-omni.txt tests/server/shim/sitecustomize.py
	$(PYTHON) -m venv .venv-vllm
	$(SERVER)/pip install $(PIP_FLAGS) torch==2.13.0
	$(SERVER)/pip install $(PIP_FLAGS) -r constraints-vllm.txt
	$(SERVER)/pip install $(PIP_FLAGS) --upgrade --no-deps --no-compile --target .venv-vllm/omni -r constraints-omni.txt
	cp tests/server/shim/sitecustomize.py "$$($(SERVER)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	touch $@

browser:
	command -v chromium || command -v google-chrome || \
		{ $(APT) update && $(APT) install --no-install-recommends chromium fonts-dejavu-core; }

clean:
	rm -rf .venv .venv-vllm out build dist *.egg-info
