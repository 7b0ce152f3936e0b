# make sweep: train the quick sweep and write its report. make test: all tests. Both set everything up.
PYTHON ?= python3
RUN := .venv/bin/python
WORKERS ?= 2

.PHONY: install sweep report test lint clean

install: .venv/.installed

.venv/.installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

sweep: install
	$(RUN) -m experiments.sweep quick --workers $(WORKERS); code=$$?; \
	  if [ $$code -gt 1 ]; then exit $$code; fi; \
	  $(RUN) -m analysis.report runs/quick && exit $$code

report: install
	$(RUN) -m analysis.report runs/quick

test: install
	$(RUN) -m pytest -n auto

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf .venv build *.egg-info
