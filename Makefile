# make demo    train a small model on the Python standard library, score it, show it filling in code,
#              beside random weights and the shipped model (models/python.ptz), if it is there
# make model   train models/python.ptz, two hours; stop it at any time, or by STAGE=1800 (seconds),
#              and rerun the command to resume: models/README.md
# make serve   serve MODEL=file.ptz on 127.0.0.1:8000 (default: models/python.ptz, else the newest
#              final_model.*.ptz of this folder); more options: SERVE="--port 8080 --slots 8"
# make check   lint, types and fast tests: about a minute on two cores
# make test    lint, types, all tests, a run on two processes, and a minute of campaigns
# PYTHON=python3.12 make ...   another interpreter (3.11 or newer)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/pytest -n auto --dist worksteal
DATA := data/stdlib
OUT := out/demo
ARTIFACT = $$(ls -t $(OUT)/final_model.*.ptz | head -n 1)
RECORD := logs/record_cpu
MODEL_OUT := out/model
MODEL_SECONDS := 7200
MODEL_BYTES := 6000000

.PHONY: venv demo model serve lint check test
.DELETE_ON_ERROR:

venv: $(VENV)/.requirements

$(VENV)/.requirements: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "PYTHON=$(PYTHON) must be 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements.txt
	@touch $@

$(VENV)/.requirements-serve: requirements-serve.txt $(VENV)/.requirements
	$(BIN)/pip install -q -r requirements-serve.txt
	@touch $@

$(VENV)/.requirements-dev: requirements-dev.txt requirements-serve.txt $(VENV)/.requirements
	$(BIN)/pip install -q -r requirements-dev.txt
	@touch $@

$(VENV)/.requirements-eval: requirements-eval.txt $(VENV)/.requirements-dev
	$(BIN)/pip install -q -r requirements-eval.txt
	@touch $@

demo: $(VENV)/.requirements
	$(BIN)/python scripts/prepare_data.py --out $(DATA)
	DATA_PATH=$(DATA) TOKENIZER_PATH=$(DATA)/tokenizer.model RUN_ID=demo OUT_DIR=$(OUT) \
	    NELBO_SEQUENCES=64 PARALLEL_EVAL_EXAMPLES=64 $(BIN)/python train_gpt.py
	$(BIN)/python scripts/chain.py $(ARTIFACT) --steps 150
	$(BIN)/python scripts/sample.py --artifact $(ARTIFACT) --demo $(DATA) --compare
	@echo "log       $(OUT)/logs/demo.txt and $(OUT)/logs/demo.jsonl"
	@echo "artifact  $(ARTIFACT)"

model: $(VENV)/.requirements
	$(BIN)/python scripts/prepare_data.py --out $(DATA)
	RECIPE=record PRESET=cpu RUN_ID=python RESUME=auto MAX_WALLCLOCK_SECONDS=$(MODEL_SECONDS) ITERATIONS=1000000 \
	    DATA_PATH=$(DATA) TOKENIZER_PATH=$(DATA)/tokenizer.model OUT_DIR=$(MODEL_OUT) \
	    $(if $(STAGE),timeout --foreground --signal=INT $(STAGE)) $(BIN)/python train_gpt.py
	$(BIN)/python scripts/chain.py $(MODEL_OUT)/final_model.int6.ptz --steps 1000
	test $$(cat $(MODEL_OUT)/final_model.int6.ptz $(MODEL_OUT)/final_model.int6.head | wc -c) -le $(MODEL_BYTES)
	cp $(DATA)/tokenizer.model models/python.model
	cp $(MODEL_OUT)/final_model.int6.ptz models/python.ptz
	cp $(MODEL_OUT)/final_model.int6.head models/python.head

serve: $(VENV)/.requirements-serve
	$(BIN)/python scripts/serve.py $(if $(MODEL),--artifact $(MODEL)) $(SERVE)

lint: $(VENV)/.requirements-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint
	$(PYTEST) -m "not slow and not gpu"

test: lint $(VENV)/.requirements-eval
	$(PYTEST)
	$(BIN)/python scripts/study/report.py --check
	$(BIN)/python scripts/study/report.py --check --logs $(RECORD)/logs --readme $(RECORD)/README.md \
	    --submission $(RECORD)/submission.json
	PYTHON=$(BIN)/python bash tests/smoke.sh
	$(BIN)/python -m tests.campaigns all --seconds 60 --seed 1
