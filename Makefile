# The commands of embedmesh. They need sh, make, git and Python 3.11 or newer, nothing else: the rest
# is installed into .venv from the locks in requirements/ when a target first needs it.
#   make PYTHON=/path/to/python3   to choose the Python
#   make test ARGS="-k batcher -x" to pass arguments on

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo up test check check-style check-types check-imports check-contract check-package proto \
        starter starter-figures export-table test-torch test-node test-triton test-hosts check-deploy soak \
        bench bench-peers bench-gpu lock clean

PY := .venv/bin/python
ARGS ?=
export PYTHON
# onnxruntime >= 1.29 reports to its maker unless told not to.
export ORT_DISABLE_TELEMETRY := 1

# An environment does not survive a move of its folder: forget it then, install.sh makes it anew.
ifneq ($(shell cat .venv/home 2>/dev/null),$(shell pwd -P))
$(shell rm -f .venv/serve.stamp .venv/dev.stamp .venv-deploy/deploy.stamp .venv-gpu/*.stamp .venv-torch/*.stamp .venv-triton/triton.stamp)
endif

help: ## Print this help
	@awk 'BEGIN { FS = ":.*## "; print "embedmesh: type one of\n" } \
	      /^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

demo: .venv/serve.stamp ## Start a whole mesh: words, sounds and pictures find each other; ends by itself
	@$(PY) -m embedmesh_cli demo $(ARGS)

up: .venv/serve.stamp ## Run the mesh on this machine until Ctrl-C (ARGS="--help" shows every option)
	@$(PY) -m embedmesh_cli up $(ARGS)

test: .venv/dev.stamp ## Run the tests, real processes included
	$(PY) -m pytest -m "not torch and not node and not triton and not deploy and not hosts" $(ARGS)

check: check-style check-types check-imports check-contract check-package ## Lint, types, imports, contract, packaging
	@echo "check: all good"

check-style: .venv/dev.stamp
	$(PY) -m ruff check --quiet .
	$(PY) -m ruff format --check --quiet .

check-types: .venv/dev.stamp
	$(PY) -m mypy --no-error-summary

check-imports: .venv/dev.stamp
	.venv/bin/python .venv/bin/lint-imports

# buf reads the contract as a descriptor set, so that it needs no network for what is imported.
check-contract: .venv/dev.stamp
	$(PY) protos/generate.py --check
	@mkdir -p build
	$(PY) protos/generate.py --descriptor-set build/contract.binpb
	.venv/bin/buf lint build/contract.binpb --config protos/buf.yaml --path embedmesh
	.venv/bin/buf breaking build/contract.binpb --against protos/v1.binpb --config protos/buf.yaml --path embedmesh

# The wheel, in an environment of its own with the dependencies of the light client and no more.
check-package: .venv/dev.stamp
	$(PY) requirements/check_package.py

proto: .venv/dev.stamp ## Generate the stubs from protos/embedmesh/v1/*.proto
	$(PY) protos/generate.py

test-torch: .venv-torch/dev.stamp ## Compare with the reference library (installs torch into .venv-torch)
	.venv-torch/bin/python -m pytest -m torch $(ARGS)

export-table: .venv-torch/dev.stamp ## Export small models of every family, compare, write the tables of services/embedmesh_cli/README.md
	WRITE_EXPORT_TABLE=1 .venv-torch/bin/python -m pytest -m torch tests/mesh/test_exported.py tests/mesh/test_exported_kinds.py $(ARGS)

starter: .venv-torch/starter.stamp ## Make the starter image and audio models anew: material, training, figures (two hours)
	PYTHONPATH=services OMP_NUM_THREADS=1 .venv-torch/bin/python -m starter $(ARGS)

starter-figures: .venv-torch/starter.stamp ## Examine the starter models that are there, against gates and baselines
	PYTHONPATH=services .venv-torch/bin/python -m starter evaluate

test-node: .venv/dev.stamp ## Call the gateway from JavaScript (needs node and npm)
	@command -v node >/dev/null && command -v npm >/dev/null || \
	  { echo "embedmesh: make test-node needs node and npm on PATH (Debian, Ubuntu: apt install nodejs npm)." >&2; exit 1; }
	$(PY) -m pytest -m node $(ARGS)

test-triton: .venv/dev.stamp .venv-triton/triton.stamp ## Run a model in a real Triton server (installs it into .venv-triton)
	$(PY) -m pytest -m triton $(ARGS)

test-hosts: .venv/dev.stamp ## Break a mesh of several hosts (network namespaces; root) and Debian's redis-server
	$(PY) -m pytest -m hosts $(ARGS)

check-deploy: .venv/dev.stamp .venv-deploy/deploy.stamp ## Check chart, images, rules, dashboard, load tests (tools in .venv-deploy)
	$(PY) deploy/generate.py --check
	$(PY) -m pytest tests/deploy $(ARGS)

soak: .venv/dev.stamp .venv-deploy/deploy.stamp ## Load a mesh for 20 minutes: no call may fail, no process grow (ARGS="--minutes 120")
	$(PY) deploy/loadtest/soak.py $(ARGS)

bench: .venv/dev.stamp ## Measure it all into build/bench (ARGS="text cached --rounds 3", ARGS=--list)
	@$(PY) -m embedmesh_cli bench --output build/bench $(ARGS)

bench-peers: .venv/dev.stamp ## Measure other servers beside it, in environments of their own (4 GB, once)
	@$(PY) -m embedmesh_cli bench peers --peers tests/bench/peers --output build/bench-peers $(ARGS)

bench-gpu: .venv-gpu/dev.stamp ## Measure on an NVIDIA GPU: onnxruntime's CUDA against transformers in float16 (8 GB, once)
	@.venv-gpu/bin/python -m embedmesh_cli bench library --output build/bench-gpu $(ARGS)

lock: .venv/serve.stamp ## Lock the newest versions that pyproject.toml allows
	$(PY) -m pip install --quiet --disable-pip-version-check --target .venv/uv --upgrade uv==0.13.9
	sh requirements/lock.sh .venv/uv/bin/uv

clean: ## Remove everything that make made here (not the models in your cache folder)
	rm -rf .venv .venv-deploy .venv-gpu .venv-torch .venv-triton .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage dist build
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

.venv/serve.stamp: requirements/serve.txt requirements/install.sh pyproject.toml
	@sh requirements/install.sh serve
	@touch $@

# The development set holds all that serving needs.
.venv/dev.stamp: requirements/dev.txt requirements/sdist.txt requirements/install.sh pyproject.toml
	@sh requirements/install.sh dev
	@touch .venv/serve.stamp $@

.venv-triton/triton.stamp: requirements/triton.txt requirements/install.sh
	@VENV=.venv-triton sh requirements/install.sh triton
	@touch $@

.venv-deploy/deploy.stamp: requirements/deploy.txt requirements/install.sh deploy/tools.sh
	@VENV=.venv-deploy sh requirements/install.sh deploy
	@sh deploy/tools.sh .venv-deploy/bin
	@touch $@

.venv-torch/dev.stamp: requirements/dev.txt requirements/sdist.txt requirements/install.sh pyproject.toml
	@VENV=.venv-torch sh requirements/install.sh dev torch
	@touch $@

.venv-gpu/dev.stamp: requirements/dev.txt requirements/sdist.txt requirements/gpu.txt requirements/install.sh pyproject.toml
	@VENV=.venv-gpu sh requirements/install.sh dev gpu
	@touch $@

.venv-torch/starter.stamp: .venv-torch/dev.stamp requirements/starter.txt
	@VENV=.venv-torch sh requirements/install.sh starter
	@touch $@
