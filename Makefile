# The pipeline: each artifact is a target with its prerequisites, so only what is stale reruns. A stage that was stopped continues from its checkpoint.
#   make install what `06_deploy.py suggest` and the pipeline need
#   make run     every stage at the `small` preset (or PRESET=hour), then the tables   (about half an hour on 2 idle CPU cores, installation included)
#   make smoke   the same in minutes, for CI          make hour / make paper   the same code, larger
#   make test    the tests                            make check               style, types and tests
PYTHON ?= python3
PRESET ?= small
RUN := .venv/bin/python

.PHONY: install run smoke hour paper test check clean
.SECONDARY:

install: .venv/runtime
run: artifacts/$(PRESET)/results/metrics.json
smoke: artifacts/smoke/results/metrics.json
# Compiling is most of so short a run.
smoke: export JAX_DISABLE_MOST_OPTIMIZATIONS := 1
hour: artifacts/hour/results/metrics.json
paper: artifacts/paper/results/metrics.json

# Two stages at once where they do not need each other: the warm start and its cold twin.
MAKEFLAGS += -j2
export JAX_COMPILATION_CACHE_DIR := $(CURDIR)/artifacts/cache

# What each stage computes with, beside its own script (where its settings are).
COMMON := lib/settings.py lib/artifacts.py lib/training.py lib/scm.py lib/synthetic.py lib/graphs.py lib/scm_prior.py lib/buffer.py
DATA := $(COMMON) lib/problems.py lib/posterior.py lib/linalg.py lib/regression.py
EXPERT := $(DATA) lib/campaign.py $(wildcard lib/expert*.py) lib/improvement.py lib/trajectories.py
NETWORK := $(DATA) lib/surrogate.py lib/statistics.py lib/pairs.py lib/sums.py
POLICY := $(NETWORK) lib/campaign.py lib/policy.py lib/improvement.py lib/rewards.py lib/grpo.py lib/imitation.py
TABLES := lib/methods.py lib/metrics.py lib/accuracy.py lib/baselines.py lib/literature.py

artifacts/%/demos.npz: 01_extract_demos.py $(EXPERT) | .venv/runtime
	$(RUN) $< $*
artifacts/%/surrogate.eqx: 02_train_surrogate.py artifacts/%/demos.npz $(NETWORK) | .venv/runtime
	$(RUN) $< $*
artifacts/%/policy.eqx: 03_warmstart_acquisition.py artifacts/%/surrogate.eqx artifacts/%/demos.npz $(POLICY) | .venv/runtime
	$(RUN) $< $*
artifacts/%/cold/policy.eqx: 03_warmstart_acquisition.py artifacts/%/surrogate.eqx $(POLICY) | .venv/runtime
	mkdir -p $(@D) && cp artifacts/$*/surrogate.eqx $(@D)
	$(RUN) $< $* --folder $(@D) --imitation.no-use-behavioral-cloning
artifacts/%/acbo.eqx: 04_train_e2e.py artifacts/%/policy.eqx artifacts/%/surrogate.eqx $(POLICY) lib/system.py lib/check.py | .venv/runtime
	$(RUN) $< $*
artifacts/%/results/metrics.json: 05_evaluate.py artifacts/%/acbo.eqx $(EXPERT) $(POLICY) $(TABLES) lib/system.py lib/check.py | .venv/runtime
	$(RUN) $< $*
# The ratio of the warm to the cold start needs both; `hour` does without.
WITH_TWIN := $(foreach preset,smoke small paper,artifacts/$(preset)/results/metrics.json)
$(WITH_TWIN): artifacts/%/results/metrics.json: artifacts/%/cold/policy.eqx

# One thread of linear algebra where several processes share the cores: more wait for one another.
smoke test check: export OPENBLAS_NUM_THREADS := 1

# Both cores; a file's tests stay together, for they share what they compile. The order is conftest's.
TESTS := -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: .venv/development
	$(RUN) $(TESTS)

check: .venv/development
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright
	$(RUN) $(TESTS)

clean:
	rm -rf artifacts

.venv/bin/python:
	$(PYTHON) -m venv .venv
.venv/runtime: requirements.txt | .venv/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
.venv/development: requirements-dev.txt .venv/runtime
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
