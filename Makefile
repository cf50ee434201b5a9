# make run    train and evaluate configs/tiny.py into runs/tiny, and print a summary
# make test   run the tests; ARGS="-k mesh" picks some
# make lint   check style and format
# make clean  remove the environment and what tools left behind

VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/installed
TESTABLE := $(VENV)/testable

.PHONY: run test lint clean

run: $(INSTALLED)
	$(PYTHON) -m bsa.main --config=configs/tiny.py --workdir=runs/tiny

# A worker a core, at most eight; on a GPU they share its memory.
test: $(TESTABLE)
	XLA_PYTHON_CLIENT_PREALLOCATE=false $(PYTHON) -m pytest \
		--numprocesses=auto --maxprocesses=8 --dist=worksteal $(ARGS)

lint: $(TESTABLE)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

clean:
	rm -rf .venv .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): requirements.txt pyproject.toml .ci/make-venv
	.ci/make-venv $(VENV) .
	touch $@

$(TESTABLE): $(INSTALLED) tests/requirements.txt
	.ci/make-venv $(VENV) .[test]
	touch $@
