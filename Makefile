# make demo   environment + the main job: debias a small vision-language model on real images
# make test   environment + tests, in minutes: one of each kind
# make test-all  environment + all tests, those marked slow too
# make mutants  environment + mutation testing of all the library, a night or two; MUTANTS="--sample 100 --tests quick"
# make lint   environment + ruff, pyright
# make fuzz   environment + 20,000 random cases of the public functions against float64 formulas, into docs/fuzz.md
# make bench  environment + the benchmarks of this machine
# make test-trainers  every recipe of docs/trainers.md in its trainer, in environments of their own under .venvs/; the table
#   of what ran. TRAINERS="trl-0.24 lightning" for some of them, TRAINERS=--newest for the newest releases
# make docs   environment + the documentation, in site/
# make release-check  environment + wheel and sdist, built, checked, installed alone and tested
#
# Each installs what it needs into .venv, from pyproject.toml with the versions tested in constraints.txt. To use an
# environment that you have (CUDA torch, say), name its interpreter: make test PYTHON=$(which python) VENV=
VENV := .venv
BASE_PYTHON := python3
PYTHON := $(if $(VENV),$(VENV)/bin/python,$(BASE_PYTHON))

.PHONY: demo test test-all test-trainers lint fuzz mutants bench docs release-check
demo: $(if $(VENV),$(VENV)/.demo)
	$(PYTHON) -m examples.demo

test test-all: export OMP_NUM_THREADS := 1
test: $(if $(VENV),$(VENV)/.test)
	$(PYTHON) -m pytest -n auto --dist loadgroup -m "not slow"

test-all: $(if $(VENV),$(VENV)/.test)
	$(PYTHON) -m pytest -n auto --dist loadgroup

mutants: $(if $(VENV),$(VENV)/.test)
	$(PYTHON) tests/mutation $(MUTANTS)

test-trainers: $(if $(VENV),$(VENV)/.test)
	$(PYTHON) -m tests.trainer_recipes $(TRAINERS)

lint: $(if $(VENV),$(VENV)/.dev)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright --pythonpath $(PYTHON)

fuzz: $(if $(VENV),$(VENV)/.test)
	$(PYTHON) -m tests.fuzz --cases 20000 --report docs/fuzz.md

bench: $(if $(VENV),$(VENV)/.bench)
	$(PYTHON) -m benchmarks

docs: $(if $(VENV),$(VENV)/.docs)
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

release-check: $(if $(VENV),$(VENV)/.dev)
	.ci/release-check $(PYTHON)

$(VENV)/bin/python:
	$(BASE_PYTHON) -m venv $(VENV)
	$@ -m pip install --quiet --upgrade pip

# One stamp per extra, so that `make demo` does not install the test tools.
$(VENV)/.%: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@
