# make demo | test | check | bench | readme | peers DIFFUSERS=<checkout>; every one builds the virtual environment it needs.
VENV   ?= .venv
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
            $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
JOBS   ?= 2
CLIP   ?= demo/clip.mp4
PROMPT ?= a red circle moving right on a gray background

.DELETE_ON_ERROR:
.PHONY: demo test check bench readme peers checkout clean

demo: $(VENV)/.base
	@mkdir -p $(dir $(CLIP))
	$(BIN)/stg-engine generate --compare --force --out $(CLIP) --prompt "$(PROMPT)"

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Freed memory stays with the process: see benchmarks/ops.py.
bench: export MALLOC_TRIM_THRESHOLD_ = 4000000000
bench: export MALLOC_MMAP_THRESHOLD_ = 1000000000
bench: $(VENV)/.bench
	$(BIN)/python -m pytest benchmarks --benchmark-autosave $(ARGS)
	$(BIN)/stg-engine bench --device cpu --case cpu --csv benchmarks/results/steps.csv
	$(BIN)/python -m benchmarks.plots
	$(BIN)/python -m benchmarks.readme

readme: $(VENV)/.bench
	$(BIN)/python -m benchmarks.plots
	$(BIN)/python -m benchmarks.readme

peers: checkout $(VENV)/.peers
	$(BIN)/python tests/peers/community.py "$(DIFFUSERS)"
	$(BIN)/python tests/peers/run.py "$(DIFFUSERS)" --on models $(ARGS)
	$(BIN)/python tests/peers/run.py "$(DIFFUSERS)" --on pipelines $(ARGS)

checkout:
	@test -d "$(DIFFUSERS)/tests/pipelines/ltx" || { echo "make peers DIFFUSERS=<a checkout of diffusers>" >&2; exit 2; }

clean:
	rm -rf $(VENV) build demo *.egg-info

# A changed pin or dependency, or a virtual environment that no longer starts, builds a new one.
ifneq ($(shell { $(BIN)/python -c 'print("starts")'; } 2>/dev/null),starts)
$(shell rm -f $(VENV)/.base)
endif

# csrc compiles against the torch that is installed, so torch comes first and the build sees it.
$(VENV)/.base: constraints.txt pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)
	@test -n "$(PYTHON)" || { echo "stg_engine needs Python 3.11 or newer" >&2; exit 2; }
	@echo "installing into $(VENV) (minutes the first time)"
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) setuptools torch
	$(PIP) --no-build-isolation -e .
	@touch $@

$(VENV)/.test $(VENV)/.bench $(VENV)/.dev $(VENV)/.peers: $(VENV)/.%: $(VENV)/.base
	$(PIP) --no-build-isolation -e '.[$*]'
	@touch $@
