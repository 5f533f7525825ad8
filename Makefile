# The first run of any target creates .venv and installs into it; later runs start at once.
# Pass arguments with ARGS: make test ARGS="-k beam"

PYTHON = .venv/bin/python
READY = @sh .ci/bootstrap
PYTEST = $(PYTHON) -m pytest --timeout 300 --tidy -n auto --maxprocesses 4 --dist worksteal

# Waiting torch threads sleep instead of spinning: ten times faster on a busy machine.
export GOMP_SPINCOUNT ?= 3000

.PHONY: help demo test test-all docs benchmark lint format

help:
	@echo "make demo        trains a captioner on drawn shapes in under three minutes and writes runs/demo/index.html"
	@echo "make test        all tests except the slow ones"
	@echo "make test-all    all tests"
	@echo "make docs        the documentation as a site in build/docs; a warning is an error"
	@echo "make benchmark   every stage beside another way of doing it and its limit"
	@echo "make lint        rules, formatting and package layers: reports, changes nothing"
	@echo "make format      formats the code and fixes what ruff can fix"

demo:
	$(READY)
	@$(PYTHON) -m showtell demo $(ARGS)

test:
	$(READY)
	@$(PYTEST) -m "not slow" $(ARGS)

test-all:
	$(READY)
	@$(PYTEST) $(ARGS)

docs:
	$(READY)
	@NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet $(ARGS)
	@echo "build/docs/index.html"

benchmark:
	$(READY)
	@$(PYTHON) benchmarks/performance.py $(ARGS)

lint:
	$(READY)
	@$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check . && .venv/bin/lint-imports --no-cache

format:
	$(READY)
	@$(PYTHON) -m ruff check --fix . ; $(PYTHON) -m ruff format .
