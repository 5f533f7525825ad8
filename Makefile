# The first run of any command makes .venv and installs into it; later runs start at once.
# Give a command further arguments with ARGS, for instance: make test ARGS="-k beam"

PYTHON = .venv/bin/python
READY = @sh .ci/bootstrap
PYTEST = $(PYTHON) -m pytest --timeout 300 --tidy -n auto --maxprocesses 4 --dist worksteal

# Torch's threads soon sleep while they wait instead of spinning: on a busy machine ten times faster.
export GOMP_SPINCOUNT ?= 3000

.PHONY: help demo test test-all benchmark lint format

help:
	@echo "make demo        learns to caption drawn pictures in under three minutes and writes runs/demo/index.html"
	@echo "make test        the tests, without the slow ones"
	@echo "make test-all    every test"
	@echo "make benchmark   every script in benchmarks/, one after the other"
	@echo "make lint        ruff: rules and formatting, changing nothing"
	@echo "make format      ruff: formats, and mends what it can"

demo:
	$(READY)
	@$(PYTHON) -m showtell demo $(ARGS)

test:
	$(READY)
	@$(PYTEST) -m "not slow" $(ARGS)

test-all:
	$(READY)
	@$(PYTEST) $(ARGS)

benchmark:
	$(READY)
	@for script in benchmarks/*.py; do echo "== $$script"; $(PYTHON) "$$script" $(ARGS) || exit 1; done

lint:
	$(READY)
	@$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check .

format:
	$(READY)
	@$(PYTHON) -m ruff check --fix . ; $(PYTHON) -m ruff format .
