# make sweep: train the quick sweep and write its report. make test: all tests but the
# slowest, which make test-all has too. make docs: the manual as a site.
# Each sets everything up.
# PYTHON=python3.13 works beside the default, in .venv-3.13; where only pyenv has it, pyenv's is taken.
# make install EXTRA=cuda13,cloud: for an NVIDIA GPU (cuda12, rocm, tpu) and workdirs in gs:// and s3://.
PYTHON ?= python3
PYENV := $(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/$(PYTHON:python%=%).*/bin/python)
FOUND := $(firstword $(foreach python,$(PYTHON) $(PYENV),$(shell $(python) -c 'print("$(python)")' 2>&-)))
VERSION := $(if $(FOUND),$(shell $(FOUND) -c 'import sys; print("%d.%d" % sys.version_info[:2])'))
VENV ?= .venv$(if $(filter-out python3,$(PYTHON)),-$(VERSION))
RUN := $(VENV)/bin/python
PINS := requirements/$(VERSION).txt
PINNED := $(patsubst requirements/%.txt,%,$(wildcard requirements/3.*.txt))
EXTRAS := cuda12 cuda13 gpu-compiler rocm tpu cloud text wandb store-tests ray docs dev
INSTALLED := $(VENV)/.installed$(EXTRA:%=-%)
WORKERS ?= 2

# UV= installs by pip. A uv that pip puts into the environment is found there.
UV ?= uv
export PATH := $(PATH):$(abspath $(VENV))/bin
# uv leaves bytecode to the first import, which must be free to write it: without it each start takes seconds more.
export PYTHONDONTWRITEBYTECODE :=
PIP := $(RUN) -m pip --disable-pip-version-check
WHAT := -r $(PINS) -e '.$(EXTRA:%=[%])'
COMPILE := $(UV) pip compile --quiet --python-platform x86_64-manylinux_2_31 pyproject.toml

.PHONY: install sweep report test test-all campaign docs lint pins check-pins python clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py $(wildcard $(PINS))
	@[ -f $(PINS) ] || { echo 'error: $(PYTHON) is $(or $(VERSION),missing), set PYTHON= to one of $(PINNED:%=python%)'; exit 1; }
	$(FOUND) -m venv $(VENV)
	{ [ "$(UV)" ] && { $(UV) --version || $(PIP) install --quiet uv; } 2>/dev/null && \
	  $(UV) pip install --quiet --python $(RUN) $(WHAT); } || $(PIP) install --quiet $(WHAT)
	touch $@

sweep: install
	$(VENV)/bin/mhc sweep quick --workers $(WORKERS); code=$$?; \
	  if [ $$code -gt 1 ]; then exit $$code; fi; \
	  $(VENV)/bin/mhc report runs/quick && exit $$code

report: install
	$(RUN) -m analysis.report runs/quick

test: install
	$(RUN) -m pytest -n auto -m "not slow"

test-all: install
	$(RUN) -m pytest -n auto

# Everything that may happen to a run, at random: see docs/reliability.md. A second call does what is missing.
campaign: install
	$(RUN) -m tests.campaign

# The manual, in build/site; a missing page, link or docstring is an error. Nothing is fetched.
docs: install
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	@$(RUN) .ci/sizes.py

# The pins again from pyproject.toml, unchanged where they still fit; an emptied file gets the newest.
pins: install
	set -e; for version in $(PINNED); do $(COMPILE) --python-version $$version --extra dev --extra docs \
	  -c requirements/constraints.txt --no-annotate --custom-compile-command 'make pins' \
	  -o requirements/$$version.txt > /dev/null; done

# Each extra resolves with the pins of each Python; nothing is installed.
check-pins: install
	set -e; for version in $(PINNED); do for extra in $(EXTRAS); do $(COMPILE) --python-version $$version \
	  --extra $$extra -c requirements/$$version.txt > /dev/null; echo "$$version $$extra"; done; done

# The interpreter that PYTHON= means; nothing where there is none.
python:
	@echo $(FOUND)

clean:
	rm -rf .venv .venv-* build *.egg-info
