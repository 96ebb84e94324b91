# make demo    every stage of the method, for real, on two CPU cores; ends by naming a report to open
# make tables  every baseline and ablation on six seeds, 1 h 10 min; writes docs/tables.md, .json and .png
# make bench   what a pair costs and what it teaches, half an hour; writes docs/performance.md, .json and .png
# make torture kills, damage, NaN and hostile files against the commands, ten minutes; writes docs/reliability.md
# make test    the tests
# make lint    ruff
# make clean   removes what demo, tables and bench made in out/; a folder of your own stays
#
# make demo SEED=1 draws everything anew; out/demo always points at the newest demo. Each stage is a target of its own, e.g.
# make out/seed-0/pairs/MANIFEST.json. Interrupted, the same command goes on; finished, it does nothing.

SEED   ?= 0
PYTHON ?= python3
VENV   ?= .venv
OUT    := out/seed-$(SEED)
PY     := $(VENV)/bin/python
MADE   := MANIFEST.json

# The demo's models are so small that more threads make them slower: much so, where others use the cores.
export OMP_NUM_THREADS ?= 1

.PHONY: demo tables bench torture test lint clean
demo: $(OUT)/report.html
	@ln -sfn seed-$(SEED) out/demo
	@echo "demo: open out/demo/report.html"

$(OUT)/clips/$(MADE): | $(VENV)/runtime
	$(PY) -m tiny.balls --out $(OUT)/clips --seed $(SEED)
$(OUT)/shards/$(MADE): $(OUT)/clips/$(MADE)
	$(PY) prepare.py --videos $(OUT)/clips --out $(OUT)/shards
$(OUT)/base/$(MADE): $(OUT)/shards/$(MADE)
	$(PY) sft.py --data $(OUT)/shards --split train --out $(OUT)/base --seed $(SEED)
$(OUT)/sft/$(MADE): $(OUT)/base/$(MADE)
	$(PY) sft.py --data $(OUT)/shards --split align --base $(OUT)/base --out $(OUT)/sft --seed $(SEED)
# as many steps as cost the operations of sft, continuation, pairs and asymdpo together
$(OUT)/sft_longer/$(MADE): $(OUT)/base/$(MADE)
	$(PY) sft.py --data $(OUT)/shards --split align --base $(OUT)/base --out $(OUT)/sft_longer --steps 2470 --seed $(SEED)
$(OUT)/continuation/$(MADE): $(OUT)/base/$(MADE)
	$(PY) continuation.py --base $(OUT)/base --data $(OUT)/shards --out $(OUT)/continuation --seed $(SEED)
$(OUT)/pairs/$(MADE): $(OUT)/continuation/$(MADE)
	$(PY) make_pairs.py --base $(OUT)/base --continuation $(OUT)/continuation --data $(OUT)/shards --out $(OUT)/pairs --seed $(SEED)
$(OUT)/asymdpo/$(MADE): $(OUT)/pairs/$(MADE) $(OUT)/sft/$(MADE)
	$(PY) asymdpo.py --base $(OUT)/base --sft $(OUT)/sft --pairs $(OUT)/pairs --out $(OUT)/asymdpo --seed $(SEED)
$(OUT)/eval/$(MADE): $(OUT)/asymdpo/$(MADE) $(OUT)/sft_longer/$(MADE)
	$(PY) -m experiments.evaluate --base $(OUT)/base --sft $(OUT)/sft --sft_longer $(OUT)/sft_longer --asymdpo $(OUT)/asymdpo \
		--continuation $(OUT)/continuation --pairs $(OUT)/pairs --data $(OUT)/shards --out $(OUT)/eval --seed $(SEED)
$(OUT)/report.html: $(OUT)/eval/$(MADE)
	$(PY) -m experiments.page --demo $(OUT)

tables: | $(VENV)/runtime
	$(PY) -m experiments.tables

bench: | $(VENV)/runtime
	$(PY) -m bench.pairs

torture: $(VENV)/development
	$(PY) -m bench.torture

test: $(VENV)/development
	$(PY) -m pytest -q tests

lint: $(VENV)/development
	$(PY) -m ruff check . && $(PY) -m ruff format --check .

# out/demo is a link that make demo sets; a folder of that name is somebody's own
clean:
	rm -rf out/seed-[0-9]* out/tables out/bench
	@[ ! -L out/demo ] || rm out/demo

# Requirements are installed once, and again when their file changes. pip says what it loads, and how large that is:
# PyTorch's CUDA build, which Linux gets, takes minutes.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
$(VENV)/runtime: requirements.txt | $(VENV)/bin/python
	$(PY) -m pip install --disable-pip-version-check -r requirements.txt && touch $@
$(VENV)/development: requirements-dev.txt $(VENV)/runtime
	$(PY) -m pip install --disable-pip-version-check -r requirements-dev.txt && touch $@
