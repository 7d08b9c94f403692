# What one can do here; each line after a target's name says what it is.
# Everything needs Debian 12; `make setup` installs the rest.

.DEFAULT_GOAL := help
.PHONY: help setup build demo demo-park test lint format types unit native conformance \
	integration park test-hosts fuzz soak bench bench-park clean install uninstall

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 20

setup: ## install packages, .venv, postcopyd in it, two QEMUs, a Linux guest
	@.ci/setup

build: setup ## the same: builds again what has changed

demo: setup ## move a running guest on this machine, and look at its memory
	@PYTHONPATH=tests .venv/bin/python docs/examples/live_move.py

demo-park: setup ## park a Linux guest of QEMU, and run it again from there
	@PYTHONPATH=tests .venv/bin/python docs/examples/park.py

test: ## set up, and run every test; under 20 minutes
	@.ci/stages

lint: ## ruff and clang-format
	@.ci/stages lint

format: setup ## let ruff and clang-format write
	@.venv/bin/ruff check --quiet --fix
	@.venv/bin/ruff format --quiet
	@find bench common docs tests -name '*.[ch]' | xargs clang-format -i

types: ## mypy, strict
	@.ci/stages types

unit: ## tests of single modules
	@.ci/stages unit

native: ## C tests: plain, address and undefined, thread sanitizer
	@.ci/stages native

conformance: ## against QEMU and others' QMP clients
	@.ci/stages conformance

integration: ## two daemons and a guest, whose memory is checked
	@.ci/stages integration

park: ## a Linux guest in QEMU is parked and served again
	@.ci/stages park

test-hosts: ## two hosts with systemd, and networks that break (root)
	@.ci/stages hosts

fuzz: ## malformed input; SECONDS=6 for each target
	@SECONDS=$(SECONDS) .ci/stages fuzz

soak: ## many migrations in a row; SEEDS=20 of each kind
	@SEEDS=$(SEEDS) .ci/stages soak

bench: ## measure against QEMU and the kernel; BENCH="--runs 1 --only preempt"
	@.ci/setup bench
	@PYTHONPATH=tests .venv/bin/python bench/run.py $(BENCH)

bench-park: ## how soon a parked VM runs again; BENCH="--runs 1 --only 256MiB"
	@.ci/setup bench
	@PYTHONPATH=tests .venv/bin/python bench/park.py $(BENCH)

install: ## daemons, units, documents; DESTDIR= PREFIX=/usr/lib/postcopyd
	@DESTDIR="$(DESTDIR)" PREFIX="$(PREFIX)" systemd/install

uninstall: ## remove what `make install` put there; the same variables
	@DESTDIR="$(DESTDIR)" PREFIX="$(PREFIX)" systemd/install -r

clean: ## remove .venv and everything built
	rm -rf --one-file-system .venv build .mypy_cache .pytest_cache .ruff_cache .hypothesis
