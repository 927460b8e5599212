# Everything that is done with a checkout. `make demo` and `make test` need nothing to be set up
# before: they begin with tools/bootstrap.sh, which is quick when there is nothing to do.

SHELL := /bin/bash
PY := .venv/bin/python
# make test ARGS="-k sync": arguments for pytest; make bench ARGS=...: for the benchmarks.
ARGS ?=
# make test WITH=--newest: options of tools/run_tests.py.
WITH ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-python test-unprivileged test-old-kernel test-c kernels newest \
	bench lint calls map asan clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|' 2>/dev/null || \
	    sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1: \2/p' Makefile

setup: ## system packages, virtual environments and the native module, for every Python found
	@tools/bootstrap.sh test lint

demo: ## a model's weights over HTTP, used before they are there
	@ONLY_DEFAULT=1 tools/bootstrap.sh demo
	@$(PY) examples/lazy_weights.py $(ARGS)

test: ## all tests: each Python, also without privileges and as on an old kernel, and the C tests with sanitizers
	@tools/bootstrap.sh test
	@$(PY) tools/run_tests.py $(WITH) -- $(ARGS)

test-python: ## pytest on each Python
	@tools/bootstrap.sh test
	@$(PY) tools/run_tests.py --only python -- $(ARGS)

test-unprivileged: ## pytest on each Python as a user without rights (from root)
	@tools/bootstrap.sh test
	@$(PY) tools/run_tests.py --only unprivileged -- $(ARGS)

test-old-kernel: ## some tests as on a kernel older than Linux 6.6
	@ONLY_DEFAULT=1 tools/bootstrap.sh test
	@$(PY) tools/run_tests.py --only before-6.6 -- $(ARGS)

test-c: ## the C tests, plain and with sanitizers
	@ONLY_DEFAULT=1 tools/bootstrap.sh test
	@$(PY) tools/run_tests.py --only c

kernels: ## boot other kernels under QEMU and try what works on each; ARGS="6.1 -k close"
	@ONLY_DEFAULT=1 KERNELS=1 tools/bootstrap.sh test
	@$(PY) tools/kernels $(ARGS)

newest: ## quick tests on the newest Pythons, beside the newest servers and tools (root, Debian)
	@tools/newest.sh

asan: ## the C tests under AddressSanitizer and ThreadSanitizer
	$(MAKE) -C native/tests asan tsan

bench: ## compare with plain C, downloads and FUSE; ARGS=--write puts the table into docs/performance.md
	@ONLY_DEFAULT=1 tools/bootstrap.sh bench
	@$(PY) -m benchmarks $(ARGS)

lint: ## ruff and mypy
	@ONLY_DEFAULT=1 tools/bootstrap.sh test lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy --strict aiouffd

calls: ## make the types of the native module's calls from its headers
	@.venv/bin/python tools/calls.py --write

map: ## draw the layers of the package into CONTRIBUTING.md
	@python3 tools/layers.py --write

clean: ## remove what was built; the virtual environments stay
	rm -rf build dist *.egg-info aiouffd/_native*.so aiouffd/_native.c
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -not -path './.newest/*' -prune -exec rm -rf {} +
	@[ ! -e native/tests/Makefile ] || $(MAKE) --no-print-directory -C native/tests clean

distclean: clean ## clean, and remove the virtual environments
	rm -rf --one-file-system .venv .venv-* .newest
