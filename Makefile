# Everything runs inside virtual environments made here from the locks in constraints/.
# ENGINE chooses the engine series of a target: 3.26 (default, .venv), 3.25 or 3.23 (.venv-<series>).

PYTHON ?= python3
ENGINE ?= 3.26
SERIES := 3.23 3.25 3.26

ifeq ($(filter $(ENGINE),$(SERIES)),)
$(error ENGINE=$(ENGINE) is not known; choose one of: $(SERIES))
endif

venv_of = $(if $(filter 3.26,$(1)),.venv,.venv-$(1))
VENV := $(call venv_of,$(ENGINE))
STAMP := $(VENV)/.stamp
ALL_STAMPS := $(foreach s,$(SERIES),$(call venv_of,$(s))/.stamp)
PIP_FLAGS := --quiet --disable-pip-version-check --no-deps

# make demo: results go under build/; set these in the environment to have them elsewhere.
OQ_DATADIR ?= $(CURDIR)/build/oqdata
DEMO_JOB ?= examples/hazard_classical/job.ini

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-cluster demo-cluster-down test docs lint types unit local cluster attack coverage conformance resume reuse reports chaos bench bench-peers bench-noting bench-slow-disk simulate \
	provisioning molecule system-test wheelhouse clean venv .venv .venv-3.23 .venv-3.25 .venv-provision

help:
	@echo "make demo         a first job: $(DEMO_JOB), from clone to result"
	@echo "make demo-cluster a cluster of containers with a job and the WebUI, PORT=n; needs root;"
	@echo "                  make demo-cluster-down removes all of it"
	@echo "make docs         the documentation for a browser, in build/docs; it begins with docs/README.md"
	@echo "make venv         only the virtual environment (ENGINE=3.23|3.25|3.26)"
	@echo "make wheelhouse   packages of the engine for clusters without Internet, in build/"
	@echo "make clean        remove caches, and build/ but for the results in build/oqdata"
	@echo
	@echo "make test         all test lanes, a table at the end; SLOW=1: with the slow tests"
	@echo "make lint | types | unit | local | cluster | attack    one test lane"
	@echo "make provisioning checks of the playbooks and roles without hosts"
	@echo "make conformance  SAMPLE=n SEED=n, JOBS=\"path ...\", or ALL=1"
	@echo "make resume       SAMPLE=n SEED=n, JOBS=\"path ...\", or ALL=1: how far jobs replay;"
	@echo "                  RUNS=n SEED=n: kills of the master's processes, then --resume"
	@echo "make reuse        SAMPLE=n SEED=n CHANGES=n: jobs that begin with the results of another one"
	@echo "make reports      pages about twelve jobs of the corpus, held against the engine's exports"
	@echo "make chaos        RUNS=n SEED=n, CLUSTER=1: on the cluster of network namespaces"
	@echo "make bench        QUICK=1, ROUNDS=n, ROW=name,.. SYSTEM=name,.. BUSY=n (see docs/performance.md)"
	@echo "make bench-peers  NODES=\"n ...\": one broker and many nodes on real sockets"
	@echo "make bench-slow-disk  ROUNDS=n: what a journal costs on a slow disk"
	@echo "make bench-noting TASKS=n: what it costs to note what becomes of each task"
	@echo "make simulate     NODES=n SLOTS=n TASKS=n SEED=n, or SWEEP=1"
	@echo "make coverage     which lines and branches the lanes reach, in all their processes"
	@echo "make molecule     a cluster of containers, SCENARIO=default|home|lifecycle"
	@echo "make system-test  a cluster of real kernels, row by row (ROWS=expression: some of them)"

# $(1) = directory of the new virtual environment.
define MAKE_VENV
$(PYTHON) -m venv $(1) || { rm -rf $(1); \
  echo "'$(PYTHON) -m venv' failed. On Debian or Ubuntu: apt-get install python3-venv" >&2; \
  echo "or name another Python (3.11 or later): make PYTHON=/path/to/python3 ..." >&2; \
  exit 1; }
endef

# One rule per series: $(1) = series.
define VENV_RULE
$(call venv_of,$(1)): $(call venv_of,$(1))/.stamp

$(call venv_of,$(1))/.stamp: constraints/engine-$(1).txt constraints/webui.txt constraints/dev.txt \
		runtime/pyproject.toml
	@echo "making $(call venv_of,$(1)) with engine $(1)"
	@rm -rf $(call venv_of,$(1))
	@$(call MAKE_VENV,$(call venv_of,$(1)))
	@$(call venv_of,$(1))/bin/python -m pip install $(PIP_FLAGS) \
	  -r constraints/engine-$(1).txt -r constraints/webui.txt -r constraints/dev.txt
	@$(call venv_of,$(1))/bin/python -m pip install $(PIP_FLAGS) --no-build-isolation -e runtime
	@# numba compiles the engine on its first import, for about a minute: not in the middle of a job
	@$(if $(filter 3.26,$(1)),CI=true $(call venv_of,$(1))/bin/python -c "import openquake.engine.engine")
	@touch $$@
endef
$(foreach s,$(SERIES),$(eval $(call VENV_RULE,$(s))))

venv: $(STAMP)

.venv-provision: .venv-provision/.stamp

.venv-provision/.stamp: constraints/provision.txt
	@echo "making .venv-provision with Ansible"
	@rm -rf .venv-provision
	@$(call MAKE_VENV,.venv-provision)
	@.venv-provision/bin/python -m pip install $(PIP_FLAGS) -r constraints/provision.txt
	@touch $@

.venv-docs/.stamp: constraints/docs.txt
	@echo "making .venv-docs with Sphinx"
	@rm -rf .venv-docs
	@$(call MAKE_VENV,.venv-docs)
	@.venv-docs/bin/python -m pip install $(PIP_FLAGS) -r constraints/docs.txt
	@touch $@

# The packages of an engine series, for clusters without Internet; FOR_PYTHON=3.12 where their
# Python is another one than here.
wheelhouse: build/wheelhouse/$(ENGINE)/.stamp

build/wheelhouse/%/.stamp: constraints/engine-%.txt constraints/webui.txt
	@echo "downloading the packages of engine $* to $(@D)"
	@mkdir -p $(@D)
	@$(PYTHON) -m pip download $(PIP_FLAGS) --only-binary :all: --dest $(@D) \
	  $(if $(FOR_PYTHON),--python-version $(FOR_PYTHON)) \
	  -r constraints/engine-$*.txt -r constraints/webui.txt
	@touch $@

demo: $(STAMP)
	@mkdir -p "$(OQ_DATADIR)"
	OQ_DATADIR="$(OQ_DATADIR)" $(VENV)/bin/oq-run $(DEMO_JOB)

# The contract lane also runs under the two older engine series.
test:
	@$(MAKE) --no-print-directory --jobs=4 $(ALL_STAMPS) .venv-provision/.stamp .venv-docs/.stamp
	@.venv/bin/python tests/lanes.py

docs: .venv-docs/.stamp
	@.venv-docs/bin/python -m sphinx -q -W --keep-going docs build/docs
	@echo "build/docs/README.html"

lint: $(STAMP)
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .

types: $(STAMP)
	$(VENV)/bin/python -m mypy

unit: $(STAMP)
	$(VENV)/bin/python -m pytest tests/unit

local: $(STAMP)
	$(VENV)/bin/python -m pytest tests/local

cluster: $(STAMP)
	$(VENV)/bin/python -m pytest -rs tests/cluster

attack: $(STAMP)
	$(VENV)/bin/python -m pytest -rs -m attack tests/local tests/cluster

# Slower than the lanes by half; a test that fails by time does not end it.
coverage: $(STAMP)
	@rm -rf build/coverage && mkdir -p build && mkdir -m 1777 build/coverage  # also of other users
	-$(VENV)/bin/python -m coverage run -m pytest -q \
	  tests/unit tests/contract tests/local tests/cluster
	@$(VENV)/bin/python -m coverage combine --quiet
	$(VENV)/bin/python -m coverage report
	$(VENV)/bin/python -m coverage report --include "*/oq_runtime/core/*" --fail-under 100

conformance: $(STAMP)
	$(VENV)/bin/python -m tests.conformance $(if $(SAMPLE),--sample $(SAMPLE)) \
	  $(if $(SEED),--seed $(SEED)) $(if $(JOBS),--jobs "$(JOBS)") $(if $(ALL),--all)

resume: $(STAMP)
	$(VENV)/bin/python -m $(if $(RUNS),tests.kills --runs $(RUNS),tests.resume) \
	  $(if $(SAMPLE),--sample $(SAMPLE)) $(if $(SEED),--seed $(SEED)) \
	  $(if $(JOBS),--jobs "$(JOBS)") $(if $(ALL),--all)

reuse: $(STAMP)
	$(VENV)/bin/python -m tests.reuse $(if $(CHANGES),--changes $(CHANGES)) \
	  $(if $(SAMPLE),--sample $(SAMPLE)) $(if $(SEED),--seed $(SEED)) \
	  $(if $(JOBS),--jobs "$(JOBS)") $(if $(ALL),--all)

reports: $(STAMP)
	$(VENV)/bin/python -m tests.reports

chaos: $(STAMP)
	$(VENV)/bin/python -m $(if $(CLUSTER),tests.cluster.chaos,tests.chaos) \
	  $(if $(RUNS),--runs $(RUNS)) $(if $(SEED),--seed $(SEED))

# The systems that the runtime is compared with have a virtual environment of their own.
PEERS := .venv-bench

$(PEERS)/.stamp: constraints/bench.txt
	@echo "making $(PEERS)"
	@rm -rf $(PEERS)
	@$(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install $(PIP_FLAGS) -r constraints/bench.txt
	@touch $@

bench: $(STAMP) $(PEERS)/.stamp
	$(VENV)/bin/python -m benchmarks $(if $(QUICK),--quick) $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(BUSY),--busy $(BUSY)) \
	  $(if $(ROW),--row $(ROW)) $(if $(SYSTEM),--system $(SYSTEM)) $(if $(PLOTS),--plots $(PLOTS))

# One broker and many nodes: NODES="20 200 2000".
bench-peers: $(STAMP)
	$(VENV)/bin/python -m benchmarks.peers $(NODES)

# What it costs to note what becomes of each task.
bench-noting: $(STAMP)
	$(VENV)/bin/python -m benchmarks.noting $(TASKS)

# What a journal costs where the data directory is on a slow disk.
bench-slow-disk: $(STAMP)
	$(VENV)/bin/python -m benchmarks.slow_disk $(if $(ROUNDS),--rounds $(ROUNDS))

simulate: $(STAMP)
	$(VENV)/bin/python -m benchmarks.simulation $(if $(SWEEP),--sweep) \
	  $(if $(NODES),--nodes $(NODES)) $(if $(SLOTS),--slots $(SLOTS)) \
	  $(if $(TASKS),--tasks $(TASKS)) $(if $(SEED),--seed $(SEED))

provisioning: .venv-provision/.stamp
	.venv-provision/bin/python -m pytest tests/provisioning

# Clusters of containers, provisioned as an administrator would: SCENARIO=default|home|lifecycle.
SCENARIO ?= default

# The first of them to look at, with the WebUI on PORT of this machine.
demo-cluster: .venv-provision/.stamp
	@PORT="$(PORT)" molecule/demo $@

demo-cluster-down:
	@molecule/demo $@

molecule: .venv-provision/.stamp
	@molecule/run test --scenario-name $(SCENARIO)

# Hosts with kernels of their own: NFS, swap, nftables, power cuts; see tests/system/README.md.
# ROWS chooses rows as pytest's -k does; KEEP names a directory whose disks are used and stay.
system-test: $(STAMP) .venv-provision/.stamp
	$(if $(KEEP),OQ_SYSTEM_KEEP="$(KEEP)") $(if $(SUITE),OQ_SYSTEM_SUITE="$(SUITE)") $(VENV)/bin/python -m tests.system \
	  $(if $(ROWS),-k "$(ROWS)")

# Results of make demo stay, and virtual environments.
clean:
	[ ! -d build ] || find build -mindepth 1 -maxdepth 1 ! -name oqdata -exec rm -rf {} +
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find runtime tests -name __pycache__ -type d -prune -exec rm -rf {} +
