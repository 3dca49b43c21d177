# Two commands do all the set-up, in .venv and nowhere else: make demo, make test.
# They need Python (>= 3.10, with venv) and git. Another Python: make test PYTHON=python3.12

.DEFAULT_GOAL := help
.PHONY: help install demo check test test-all docs clean

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# Nothing here downloads from a hub; an attempt to is an error at once, not a time-out.
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# A stamp without an interpreter that runs (its Python was removed, the folder was half deleted) says nothing.
ifneq ($(wildcard $(STAMP)),)
ifneq ($(shell $(RUN) -c 'print("runs")' 2>/dev/null),runs)
$(shell rm -f $(STAMP))
endif
endif

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 18

# Without a stamp the last set-up did not finish: start over. torch stands in the same pip command as the rest and
# is pinned to 2.13.0, so a CPU build that pip can see (2.13.0+cpu) is preferred to the CUDA one.
$(STAMP): pyproject.toml constraints.txt
	@test -f $@ || $(PYTHON) -m venv --clear $(VENV)
	@rm -f $@
	$(RUN) -m pip install --constraint constraints.txt --editable '.[demo,dev]'
	@touch $@

install: $(STAMP)  ## make .venv and install everything into it

demo: $(STAMP)  ## compress all-MiniLM-L6-v2, save, reload, compare with the original
	$(RUN) recipes/demo.py

check: $(STAMP)  ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

test: check  ## check, then all tests but the slow ones
	$(RUN) -m pytest

test-all: check  ## check, then all tests
	$(RUN) -m pytest -m ''

docs: $(STAMP)  ## the reference, from docstrings, in build/docs
	$(RUN) docs/build.py

clean:  ## remove .venv, caches and what the demo wrote
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
