# make demo   environment + the main job: debias a small vision-language model on real images
# make test   environment + tests, in minutes: one of each kind
# make test-all  environment + all tests, those marked slow too
# make lint   environment + ruff, pyright
# make bench  environment + the benchmarks of this machine
# make docs   environment + the documentation, in site/
#
# Each installs what it needs into .venv, from pyproject.toml with the versions tested in constraints.txt. To use an
# environment that you have (CUDA torch, say), name its interpreter: make test PYTHON=$(which python) VENV=
VENV := .venv
BASE_PYTHON := python3
PYTHON := $(if $(VENV),$(VENV)/bin/python,$(BASE_PYTHON))

.PHONY: demo test test-all lint bench docs
demo: $(if $(VENV),$(VENV)/.demo)
	$(PYTHON) -m examples.demo

test test-all: export OMP_NUM_THREADS := 1
test: $(if $(VENV),$(VENV)/.test)
	$(PYTHON) -m pytest -n auto --dist loadgroup -m "not slow"

test-all: $(if $(VENV),$(VENV)/.test)
	$(PYTHON) -m pytest -n auto --dist loadgroup

lint: $(if $(VENV),$(VENV)/.dev)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright --pythonpath $(PYTHON)

bench: $(if $(VENV),$(VENV)/.bench)
	$(PYTHON) -m benchmarks

docs: $(if $(VENV),$(VENV)/.docs)
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

$(VENV)/bin/python:
	$(BASE_PYTHON) -m venv $(VENV)
	$@ -m pip install --quiet --upgrade pip

# One stamp per extra, so that `make demo` does not install the test tools.
$(VENV)/.%: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@
