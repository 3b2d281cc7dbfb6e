# make demo    install into .venv and run the main job        make demo ARGS="--seconds 30"
# make test    install the test tools and run all tests       make test ARGS="-k gru"
#              with another Python, torch, or both            make test PYTHON=python3.12 TORCH=2.14.0
# make check   the tests that run kernels again, with guard pages and canaries round all memory that one may touch
# make integrations   install what else is tried with fusecell into .venv-integrations, and run the tests that need it
# make test-pages     build the documentation, and open its pages, those of tapes and those of exports in a browser
# make lint    format check, lint, types, import directions
# make docs    write the API reference, the gallery and the page of cells to play with, and build the site into site/        make docs-serve shows it while you write
# make bench   install the peers, judge what is promised of time and memory, run the benchmarks
# make clean   remove what the tools leave behind;  make distclean: .venv and demo-output too

PYTHON ?= python3
ARGS ?=
# The CPU builds of torch. On Linux the package index's own build carries CUDA, gigabytes of it.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# Another version of torch than that of constraints.txt, in an environment of its own.
TORCH ?=

VENV := $(if $(TORCH),.venv-torch-$(TORCH),.venv)
CONSTRAINTS := $(if $(TORCH),$(VENV)/constraints.txt,constraints.txt)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-pages check integrations lint docs docs-serve bench clean distclean

demo: $(VENV)/.installed-demo
	$(BIN)/fusecell demo $(ARGS)

# One thread in each of two test processes is faster than two threads in one.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

check: export FUSECELL_CHECK := 1
check: test

test-pages: $(VENV)/.installed-test $(VENV)/.installed-docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m pages $(ARGS)

integrations: $(VENV)-integrations/.installed
	OMP_NUM_THREADS=1 $(VENV)-integrations/bin/python -m pytest -n 2 --dist worksteal -m "packages or long" $(ARGS) \
		tests/integrations tests/other_libraries tests/onnx/test_load.py tests/documentation/test_examples.py \
		tests/reliability

lint: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed-docs
	$(BIN)/python scripts/api_reference.py docs/api
	$(BIN)/python scripts/gallery.py docs/gallery
	$(BIN)/python -m fusecell.play docs/play.html
	$(BIN)/zensical build --strict

docs-serve: $(VENV)/.installed-docs
	$(BIN)/python scripts/api_reference.py docs/api
	$(BIN)/python scripts/gallery.py docs/gallery
	$(BIN)/python -m fusecell.play docs/play.html
	$(BIN)/zensical serve

bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.checks || echo 'make bench: a figure above is too much; a busy machine does that'
	$(BIN)/python -m benchmarks.run $(ARGS)

clean:
	rm -rf build dist site docs/api docs/gallery .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-integrations .venv-torch-* demo-output

# .installed-X is the stamp of the extra X: installed once, again when its inputs change.
# torch comes first and alone, so that no other package is looked up in torch's index.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/pyvenv.cfg
	$(if $(TORCH),sed 's/^torch==.*/torch==$(TORCH)/' constraints.txt > $(CONSTRAINTS))
	$(PIP) install --no-deps --constraint $(CONSTRAINTS) --extra-index-url $(TORCH_INDEX) torch
	$(PIP) install --constraint $(CONSTRAINTS) --editable '.[$*]'
	@touch $@

$(VENV)-integrations/.installed: tests/integrations/environment.py $(wildcard tests/integrations/*.txt) $(VENV)/.installed-test $(VENV)/.installed-peers
	$(BIN)/python -m tests.integrations.environment $(VENV)-integrations
	@touch $@

# Debian splits ensurepip from Python; there the outer pip installs the inner one.
$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("fusecell needs Python 3.10 or newer and $(PYTHON) is %d.%d: make PYTHON=python3.11 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV) && $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; } || { rm -rf $(VENV); exit 1; }
