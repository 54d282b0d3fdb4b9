# Every command sets up what it needs: only python3 (3.11 to 3.13) and make are taken for granted.
# On a CPU-only Linux machine, PyTorch's CPU builds save 2.5 GB of downloads:
#   make run TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
ARGS ?=
# Files of tests that run at the same time; each has its share of the cores, and up to 3 GB.
WORKERS ?= 2

PY := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)/python
# In a terminal pip shows how far its downloads are.
QUIET := $(if $(shell test -t 2 && echo yes),,--quiet)
PIP := $(PY) -m pip install $(QUIET) --no-compile --disable-pip-version-check -c constraints.txt
# What pip does with one core, a file after the other, in half a minute less; nothing is lost where it fails.
COMPILE := -$(PY) -c 'import compileall, sysconfig; compileall.compile_dir(sysconfig.get_path("purelib"), quiet=2, workers=0)'
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
PYTEST := $(PY) -m pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder
MODELS := $(foreach name,smollm2-135m-instruct minilm-l6-v2,output/models/$(name)/config.json)
REWARD_MODEL := output/reward_model_pairwise/config.json

.PHONY: help run test test-fast test-all lint format lab site check constraints notebooks address clean

help:
	@echo "make run       PPO on the CPU profile: models, reward model, training, result"
	@echo "make lab       JupyterLab on the notebooks"
	@echo "make site      the course as web pages, to be read without running it: build/site/index.html"
	@echo "make test      all tests that a user needs, notebooks included; at its end, where the time went"
	@echo "make test-fast everything but the notebooks and the browser"
	@echo "make test-all  the slow ones too"
	@echo "make lint      ruff: check and format (make format repairs)"
	@echo "make check     what will work on this machine"
	@echo "make address   URL=https://github.com/me/my-fork: your copy's address, wherever it stands"

run: $(VENV)/.core
	$(PY) -m rlhf_helpers $(ARGS)

check: $(VENV)/.core
	$(PY) -m rlhf_helpers --check

lab: $(VENV)/.lab
	$(PY) -m jupyterlab notebooks

site: $(VENV)/.site
	$(PY) -m tools.make_site $(ARGS)

test: lint $(MODELS) $(REWARD_MODEL)
	$(PYTEST) --durations=15 $(ARGS)

test-fast: $(VENV)/.test
	$(PYTEST) tests -m "not slow and not browser" $(ARGS)

test-all: lint $(VENV)/.all $(MODELS) $(REWARD_MODEL)
	$(PYTEST) -m "slow or not slow" $(ARGS)

lint: $(VENV)/.test
	$(PY) -m ruff check
	$(PY) -m ruff format --check

format: $(VENV)/.test
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

# Once, before tests that run at the same time want them.
output/models/%/config.json: | $(VENV)/.core
	$(PY) -c 'from rlhf_helpers.assets import ensure_model; ensure_model("$*")'

$(REWARD_MODEL): | $(MODELS)
	$(PY) -c 'from rlhf_helpers.reward import ensure_reward_model; ensure_reward_model()'

# ---- set-up: a stamp for each group of packages, made again when the lists change

$(VENV)/.venv:
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and "$(PYTHON) is Python %d.%d; expected 3.11 to 3.13 (make PYTHON=python3.11 ...)" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.core: $(VENV)/.venv pyproject.toml constraints.txt
	@echo "setting up: torch, transformers, peft, bitsandbytes, accelerate (about a minute)"
ifneq ($(TORCH_INDEX),)
	$(PY) -m pip install --quiet --no-compile --disable-pip-version-check --index-url $(TORCH_INDEX) $(TORCH)
endif
	$(PIP) -e .
	$(COMPILE)
	touch $@

$(VENV)/.lab $(VENV)/.test: $(VENV)/.%: $(VENV)/.core Makefile
	@echo "setting up: packages for $*"
	$(PIP) -e ".[lab,test,trl]"
	$(COMPILE)
	touch $@

$(VENV)/.all: $(VENV)/.test
	@echo "setting up: trackers, linters of workflows, a resolver"
	$(PIP) -e ".[tracking,authors]"
	touch $@

# A reader's machine needs no PyTorch: the extra's own list, without the package.
$(VENV)/.site: $(VENV)/.venv pyproject.toml constraints.txt
	@echo "setting up: nbconvert"
	$(PIP) $$($(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["site"])')
	touch $@

# ---- for authors

constraints:
	$(PIP) uv
	echo "$(TORCH)" > .torch-pin.txt
	( echo "# Generated from pyproject.toml by \`make constraints\`; do not edit. The versions that were tested."; \
	  $(PY) -m uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 -c .torch-pin.txt \
	  --no-annotate --no-header -q | grep -vE '^(nvidia-|cuda-|triton)' ) > constraints.new && mv constraints.new constraints.txt
	rm -f .torch-pin.txt

notebooks: $(VENV)/.test
	$(PY) tools/run_notebooks.py $(ARGS)

address:
	$(PYTHON) tools/address.py $(URL)

clean:
	rm -rf build *.egg-info .pytest_cache
