# One plain command each; nothing is hidden behind them.
PYTHON ?= python

.PHONY: help build test quick asan bench fmt check ci clean

help:           ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/: *##/	/'

build:          ## compile the extension in place
	$(PYTHON) setup.py build_ext --inplace

test:           ## all tests
	$(PYTHON) -m pytest

quick:          ## without the slow ones
	$(PYTHON) -m pytest -q -m "not slow"

asan:           ## op and replay tests under AddressSanitizer
	tests/asan.sh

bench:          ## all benchmarks
	$(PYTHON) -m fastwm.bench

fmt:            ## format Python and C++
	$(PYTHON) -m ruff format .
	clang-format -i $$(git ls-files 'csrc/*')

check:          ## lint
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

ci:             ## what continuous integration runs
	.ci/run

clean:          ## remove what was built
	rm -rf build *.egg-info fastwm/*.so
