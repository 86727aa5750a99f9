# `make demo` is every stage on a synthetic catalogue, `make test` what CI runs, `make test-full` every check that there is, `make audit` a list
# of what is installed (.venv/sbom.json, CycloneDX) and the advisories on it.
# Each begins by setting up .venv, which needs nothing but Python 3.11 or 3.12 with its venv module; another interpreter: make PYTHON=python3.12 test
PYTHON ?= python3
RUN := .venv/bin/python -m
INSTALLED := .venv/installed
SPARK := .venv/spark
PIP := $(RUN) pip install -qq --disable-pip-version-check

# Tests start many ranks on few cores: threads of their own would only fight for them. Files run side by side on WORKERS processes, in the
# order of their names: by their number of tests, files of few long tests would come last, and leave a worker idle.
export OMP_NUM_THREADS := 1
WORKERS ?= 2
PYTEST := pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-full lint audit .venv

demo: $(INSTALLED)
	@.venv/bin/python jobs/demo.py

test: lint
	$(RUN) $(PYTEST) -m "not full"

test-full: lint $(SPARK)
	$(RUN) $(PYTEST)

lint: $(INSTALLED)
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy

audit: $(INSTALLED)
	@$(PYTHON) -m venv .venv/audit
	@.venv/audit/bin/pip install -qq --disable-pip-version-check pip-audit==2.10.1 cyclonedx-bom==7.5.0
	@.venv/audit/bin/cyclonedx-py environment .venv/bin/python -o .venv/sbom.json
	@.venv/audit/bin/pip-audit --no-deps --disable-pip --progress-spinner off -r requirements.lock

.venv: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || { \
		echo "error: Shelfmark needs Python 3.11 or 3.12. Name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(RUN) pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv || { rm -rf .venv; \
		echo "error: $(PYTHON) cannot make a virtual environment. Install its venv module" \
			"(on Debian and Ubuntu the package python3-venv) and call make again" >&2; exit 1; }
	@echo "Installing the packages of requirements.lock into .venv, their checksums compared (some minutes, once)"
	@$(PIP) --require-hashes --only-binary :all: --no-deps -r requirements.lock
	@$(PIP) -c constraints.txt torch==2.13.0
	@$(PIP) --no-build-isolation --no-deps -e .
	@$(RUN) pip check >/dev/null || { $(RUN) pip check; exit 1; }
	@touch $@

$(SPARK): $(INSTALLED) requirements-spark.lock
	@echo "Building PySpark for the tests of govern --engine spark, which want Java 17 too (some minutes, once)"
	@$(PIP) --require-hashes --no-build-isolation --no-deps --no-binary pyspark -r requirements-spark.lock
	@touch $@
