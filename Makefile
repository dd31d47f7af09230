# make study   a strength sweep on the bundled model, its table and figures (sets everything up)
# make test    checks and the fast test suite (sets everything up)

PYTHON ?= python3
BIN := .venv/bin
STUDY := runs/strength_sweep
FIGURES := figures/strength_sweep

.PHONY: study test test-slow test-browser lint style clean

study: .venv/run-ready
	$(BIN)/python -m experiments.converge -m experiment=strength_sweep
	$(BIN)/python -m analysis figures $(STUDY) --out $(FIGURES)
	$(BIN)/python -m analysis table $(STUDY)
	$(BIN)/python -m analysis page $(STUDY) --out $(FIGURES)/study.html
	@echo "Figures are in $(FIGURES): begin with headline.png, explained in README.md."
	@echo "Open $(FIGURES)/study.html in a browser: the study pass by pass, token by token."

# the types are checked while the tests run, on whichever core is idle
test: style
	@$(BIN)/mypy & types=$$!; \
		$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu and not browser"; \
		tests=$$?; wait $$types || { echo "mypy has found mistakes, see above" >&2; exit 1; }; \
		exit $$tests

test-slow: .venv/slow-ready
	$(BIN)/python -m pytest -m slow

# needs Debian's packages chromium and chromium-driver
test-browser: .venv/browser-ready
	$(BIN)/python -m pytest -m browser tests/browser

lint: style
	$(BIN)/mypy

style: .venv/test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# pip comes last: where ensurepip is missing, venv leaves a python without one
.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/run-ready: .venv/bin/pip pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/test-ready: .venv/bin/pip pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ .venv/run-ready

.venv/slow-ready: .venv/test-ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,ray]'
	@touch $@

.venv/browser-ready: .venv/test-ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,browser]'
	@touch $@

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
