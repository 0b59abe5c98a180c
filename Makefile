# The two commands a newcomer needs: `make serve` and `make test`. Everything lives in .venv; nothing else is touched.
#   make serve [PORT=8123] [ARGS="--model ..."]   install if need be, start the server with the bundled demo model
#   make test  [ARGS="-k canvas"]                 the whole test suite
#   make test-clients                             other people's clients against the server; installs them first
#   make test-load                                guidellm and aiperf against it; installs seven gigabytes first
#   make test-kernels                             every GPU kernel compiled for every chip; make test takes a part of them
#   make test-image [ARGS="--target cuda"]        build the container image without Docker, and chat with it (as root)
#   make test-cluster                             two replicas on Ray Serve; installs Ray first
#   make bench-cluster                            what two replicas do in the time of one
#   make fuzz  [CASES=100000]                     the fuzz tests of the suite with so many cases
#   make check                                    ruff, ruff format, mypy --strict, import contracts, pip-audit where it can run
#   make bench [ARGS="--requests 5"]              speed of the bundled demo model on this machine
#   make schemas FILE=schemas.jsonl [ARGS=...]    JSON schemas against the demo model and untrained ones: who keeps to them
#   make web                                      build the page again from server/web (needs npm)
#   make kernels [ARGS="--chip 89"]               what every GPU kernel needs on every chip; takes no GPU

SHELL := /bin/bash
.DEFAULT_GOAL := help
PORT ?=
CASES ?= 100000
ARGS ?=
FILE ?=
BIN := .venv/bin
# A stamp per extra, so that a second start installs nothing until the pinned versions change.
STAMP := .venv/.installed
INPUTS := pyproject.toml constraints.txt
# What pip says goes to a log; when it fails, the end of the log is shown.
LOG := .venv/install.log
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-input --progress-bar off -c constraints.txt
FAILED := { grep -v '^WARNING' $(LOG) | tail -n 15 >&2; echo "The installation failed; all of it is in $(LOG)." >&2; exit 1; }

.NOTPARALLEL:
.PHONY: help serve test test-clients test-load test-kernels test-image test-cluster bench-cluster fuzz check audit bench \
	schemas web kernels clean

help:
	@sed -n '2,16s/^#   //p' Makefile

serve: $(STAMP)-run
	@exec $(BIN)/easel serve $(if $(PORT),--port $(PORT)) $(ARGS)

bench: $(STAMP)-run
	@$(BIN)/easel bench $(ARGS)

# FILE has a {"name": ..., "schema": ...} on each line.
schemas: $(STAMP)-test
	@test -n "$(FILE)" || { echo 'Say which schemas: make schemas FILE=schemas.jsonl' >&2; exit 2; }
	@PYTHONPATH=. $(BIN)/python tests/bench/schemas.py $(FILE) $(ARGS)

web:
	@command -v npm >/dev/null || { echo "make web needs npm (Debian, Ubuntu: apt install npm); easel itself does not." >&2; exit 2; }
	@cd server/web && npm ci --no-audit --no-fund --loglevel=error && npm run --silent build

kernels: $(STAMP)-run
	@$(BIN)/python -m engine.kernels.ahead_of_time $(ARGS)

# Other people's clients run beside the suite, which hardly takes longer for it; with ARGS the suite is alone. Without a
# network on the first run they cannot be installed: that is said, and is no fault of what is tested.
# The whole suite runs a file to a process, one thread each: two cores are then busy all the time.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile

test: $(STAMP)-test
	@$(if $(ARGS),,$(MAKE) -s --no-print-directory $(CLIENTS) || echo "Their tests are left out.")
	@if $(if $(ARGS),false,[ -e .venv-clients/.installed ] && [ -e .venv-clients-openai3/.installed ]); then \
	  { $(call TRY,.venv-clients) && $(call TRY,.venv-clients-openai3,$(OF_OPENAI3)); } >.venv-clients/test.log 2>&1 & clients=$$!; \
	fi; \
	$(if $(ARGS),,OMP_NUM_THREADS=1) $(BIN)/python -m pytest $(if $(ARGS),$(ARGS),$(PARALLEL)); status=$$?; \
	if [ -n "$$clients" ]; then \
	  if wait $$clients; then sed -n 's/^=* \(.* passed.*\) =*$$/clients: \1/p' .venv-clients/test.log; \
	  else cat .venv-clients/test.log; status=1; fi; \
	fi; \
	exit $$status

# The clients live in environments of their own: some want other versions than the server does, or than each other.
CLIENTS := .venv-clients/.installed .venv-clients-openai3/.installed
TRY = SERVER_PYTHON=$(abspath $(BIN)/python) $(1)/bin/python -m pytest -p no:cacheprovider \
	  -c tests/clients/pytest.ini --rootdir tests/clients $(or $(addprefix tests/clients/,$(2)),tests/clients)
OF_OPENAI3 := test_openai.py test_pydantic_ai.py
NONE_CHOSEN := [ $$? = 5 ]

test-clients: $(STAMP)-test $(CLIENTS) .venv-clients/.installed-node
	$(call TRY,.venv-clients) $(ARGS) || $(NONE_CHOSEN)
	$(call TRY,.venv-clients-openai3,$(OF_OPENAI3)) $(ARGS) || $(NONE_CHOSEN)

test-load: $(STAMP)-test .venv-load/.installed
	$(call TRY,.venv-load,test_load.py) $(ARGS)

test-kernels: $(STAMP)-test
	ALL_KERNELS=1 $(BIN)/python -m pytest tests/engine/test_kernels_ahead_of_time.py $(ARGS)

# Takes buildah and debootstrap; what they make stays in build/image.
test-image: | $(BIN)/python
	@$(BIN)/python tests/image/try_image.py $(ARGS)

# Ray stays out of .venv for its size. Some of it listens on every address, so it gets a network where there is only
# loopback; and its processes go with the one that started it.
ALONE := unshare --user --map-root-user --net --pid --fork --kill-child --mount-proc \
	  bash -c 'ip link set lo up && "$$@"; exit $$?' --

test-cluster: .venv-cluster/.installed
	$(ALONE) .venv-cluster/bin/python -m pytest -p no:cacheprovider -c tests/cluster/pytest.ini --rootdir tests/cluster \
	  tests/cluster $(ARGS)

bench-cluster: .venv-cluster/.installed
	@PYTHONPATH=. $(ALONE) .venv-cluster/bin/python tests/bench/cluster.py $(ARGS)

fuzz: $(STAMP)-test
	FUZZ_CASES=$(CASES) $(BIN)/python -m pytest --timeout 0 $(addprefix tests/server/test_,fuzz.py own_openapi.py tool_calls.py \
	  output_parser.py) $(ARGS)

check: $(STAMP)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@$(MAKE) -s --no-print-directory audit

# Known holes in what we stand on. Where their list cannot be had, that is said and is no fault of ours.
audit: .venv-audit/.installed
	@if [ ! -s $< ]; then echo "audit: left out, pip-audit could not be installed"; exit 0; fi; \
	.venv-audit/bin/pip-audit -r constraints.txt --no-deps --disable-pip --timeout 10 >.venv-audit/audit.log 2>&1; \
	if grep -qE 'Found [0-9]+ known vulnerabilit' .venv-audit/audit.log; then cat .venv-audit/audit.log; exit 1; \
	elif grep -qE 'could not be audited|Traceback|ERROR' .venv-audit/audit.log; then \
	  echo "audit: left out, nobody here knows of holes ($$(grep -c 'could not be audited' .venv-audit/audit.log) packages)"; \
	else tail -n 1 .venv-audit/audit.log; fi

.venv-audit/.installed: | $(BIN)/python
	@$(BIN)/python -m venv .venv-audit
	@if .venv-audit/bin/python -m pip install --disable-pip-version-check --no-input --progress-bar off \
	  'pip-audit>=2.7,<3' >.venv-audit/install.log 2>&1; then echo installed >$@; else : >$@; fi

clean:
	rm -rf .venv .venv-clients .venv-clients-openai3 .venv-load .venv-cluster .venv-audit tests/clients/node/node_modules server/web/node_modules build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(STAMP)-run: $(INPUTS) | $(BIN)/python
	@echo "Installing easel into .venv (the first time takes a few minutes) ..."
	@$(PIP) -e . >$(LOG) 2>&1 || $(FAILED)
	@touch $@

$(STAMP)-test $(STAMP)-dev: $(STAMP)-%: $(INPUTS) | $(BIN)/python
	@echo "Installing easel[$*] into .venv (the first time takes a few minutes) ..."
	@$(PIP) -e '.[$*]' >$(LOG) 2>&1 || $(FAILED)
	@touch $@

.venv-cluster/.installed: $(INPUTS) | $(BIN)/python
	@echo "Installing easel[cluster] into .venv-cluster (the first time takes a few minutes) ..."
	@$(BIN)/python -m venv .venv-cluster
	@.venv-cluster/bin/python -m pip install --disable-pip-version-check --no-input --progress-bar off -c constraints.txt \
	  -e '.[cluster]' pytest pytest-timeout >.venv-cluster/install.log 2>&1 || { tail -n 15 .venv-cluster/install.log >&2; exit 1; }
	@touch $@

.venv-clients/.installed: tests/clients/requirements.txt
.venv-clients-openai3/.installed: tests/clients/requirements-openai3.txt
.venv-load/.installed: tests/clients/requirements-load.txt
$(CLIENTS) .venv-load/.installed: | $(BIN)/python
	@echo "Installing $(notdir $<) of the clients into $(@D) (the first time takes a few minutes) ..."
	@$(BIN)/python -m venv $(@D)
	@$(@D)/bin/python -m pip install --disable-pip-version-check --no-input --progress-bar off \
	  -r $< >$(@D)/install.log 2>&1 || { tail -n 15 $(@D)/install.log >&2; exit 1; }
	@touch $@

# Without npm the clients of Node are left out, and the tests say so.
.venv-clients/.installed-node: tests/clients/node/package.json .venv-clients/.installed
	@if command -v npm >/dev/null; then \
	  cd $(<D) && npm install --no-audit --no-fund --no-package-lock --loglevel=error >/dev/null; fi
	@touch $@

# Any Python from 3.11 on that can make a virtual environment; `make PYTHON=/path/to/python3 serve` names one.
$(BIN)/python:
	@for candidate in $(PYTHON) python3 python3.13 python3.12 python3.11 python; do \
	  if "$$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    "$$candidate" -m venv .venv && exit 0; \
	    rm -rf .venv; exit 1; \
	  fi; \
	done; \
	echo "easel needs Python 3.11 or newer with its venv module, and found none." >&2; \
	echo "Install one (Debian, Ubuntu: apt install python3-venv) or name it: make PYTHON=/path/to/python3 serve" >&2; \
	exit 1
