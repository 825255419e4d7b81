# make quickstart   real text -> tokenizer -> indexed data -> a MoR and a vanilla model -> a table (runs/quickstart)
# make test         lint, format check and every test that is not slow
# make setup        only the environment, in .venv; every other target first does this once
#
# CPU builds of torch are the default. On GPU machines: make setup TORCH_BACKEND=auto (or cu128, ...), before anything
# else; remove .venv to change it later. requirements-gpu.txt lists further packages for GPU nodes.

PYTHON ?= python3
TORCH_BACKEND ?= cpu

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
UV := $(VENV)/bin/uv pip install -q --python $(PY)
# uv takes a third of pip's time. It does not read pip's settings: of the environment it is told, and where only pip's
# files name an index, pip goes on instead.
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
# Modules are compiled when they are imported, also where an image forbids it: otherwise every process would compile them
# again, which takes six seconds. Most are never imported.
export PYTHONDONTWRITEBYTECODE :=
STAMP := $(VENV)/.installed
REQUIREMENTS := requirements.txt requirements-dev.txt requirements-eval.txt requirements-serve.txt
TORCH := $(shell sed -n 's/^torch==//p' requirements.txt)

.PHONY: quickstart test lint format setup clean

quickstart: $(STAMP)
	$(PY) examples/quickstart.py

# Two processes, a directory each (tests/conftest.py): many tests wait for ranks more than they compute.
test: lint
	$(PY) -m pytest -m "not slow" -n 2 --dist loadscope --no-loadscope-reorder --durations=10

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

setup: $(STAMP)

clean:
	rm -rf $(VENV) build runs *.egg-info .pytest_cache .ruff_cache .hypothesis

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "$(PYTHON) is missing or older than 3.10: name another one with make PYTHON=python3.11"; exit 1; }
	@# Debian splits ensurepip from Python; pip can then fill the environment from outside.
	@$(PYTHON) -m venv $(VENV) > /dev/null 2>&1 \
		|| { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip -q --python $(PY) install pip; } \
		|| { rm -rf $(VENV); echo "$(PYTHON) can neither make a virtual environment with pip nor put pip into one:" \
			"install python3-venv (or python3-pip 22.3 or newer)"; exit 1; }

# torch goes first and alone: as a dependency of another package it would be the CUDA build, several GB.
# The CPU build may lie among the wheels named above; otherwise uv knows where PyTorch keeps each build.
$(STAMP): $(REQUIREMENTS) | $(PY)
	@echo "Setting up $(VENV) (once, a few minutes)"
	$(PIP) install -q uv
	@{ test $(TORCH_BACKEND) = cpu && $(UV) torch==$(TORCH)+cpu 2> /dev/null; } \
		|| { test $(TORCH_BACKEND) = cpu && $(PIP) install -q --no-compile torch==$(TORCH)+cpu 2> /dev/null; } \
		|| $(UV) --torch-backend=$(TORCH_BACKEND) torch==$(TORCH) \
		|| { echo "No $(TORCH_BACKEND) build of torch was found: installing pip's own"; \
			$(PIP) install --no-compile torch==$(TORCH); }
	$(UV) $(REQUIREMENTS:%=-r %) || $(PIP) install -q --no-compile $(REQUIREMENTS:%=-r %)
	$(UV) --no-deps -e . || $(PIP) install -q --no-deps -e .
	$(PY) -c 'import mor_megatron.pretraining.pretrain' > /dev/null
	@touch $@
