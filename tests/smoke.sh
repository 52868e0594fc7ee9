#!/usr/bin/env bash
# The whole path on two processes and tiny data: prepare, train, export, reload, score, decode, report.
#     PYTHON=.venv/bin/python bash tests/smoke.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(command -v "${PYTHON:-python3}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Documents are the top-level definitions of this repository: several hundred, so that both splits are never empty.
"$python" - "$work/docs.jsonl" ./*.md ./*.py scripts/{,*/}*.py tests/{,*/}*.py <<'EOF'
import json, pathlib, sys

with open(sys.argv[1], "w", encoding="utf-8") as out:
    for name in filter(pathlib.Path.is_file, map(pathlib.Path, sys.argv[2:])):
        for text in name.read_text(encoding="utf-8").split("\n\n\n"):
            out.write(json.dumps({"text": text}) + "\n")
EOF
"$python" scripts/prepare_data.py --source files "$work/docs.jsonl" --out "$work/data" --vocab-size 512 --val-percent 20

export DATA_PATH="$work/data" TOKENIZER_PATH="$work/data/tokenizer.model" OUT_DIR="$work/out" RUN_ID=smoke
export PRESET=cpu DEVICE=cpu OMP_NUM_THREADS=1 VOCAB_SIZE=512
export NUM_LAYERS=2 MODEL_DIM=32 NUM_HEADS=2 NUM_KV_HEADS=1
export TRAIN_SEQ_LEN=64 TRAIN_BATCH_TOKENS=512 MICRO_BATCHES=4 ITERATIONS=4 MAX_WALLCLOCK_SECONDS=0
export VAL_BATCH_SIZE=1024 DIFFUSION_WINDOWS=8:1,T:1 NELBO_WINDOWS=1,8 NELBO_SEQUENCES=8
export PARALLEL_EVAL_PREFIX_LEN=16 PARALLEL_EVAL_SPAN_LEN=8 PARALLEL_EVAL_SUFFIX_LEN=8 PARALLEL_EVAL_EXAMPLES=4
export COMPILE=0  # no compiler is needed, and four steps are over sooner
"$python" -m torch.distributed.run --standalone --nproc_per_node=2 train_gpt.py

grep -Eq '^final_int6_lzma_roundtrip_exact val_loss:[0-9.]+ val_bpb:[0-9.]+$' "$work/out/logs/smoke.txt"
grep -q '"event": "done"' "$work/out/logs/smoke.jsonl"

sample=("$python" scripts/sample.py --artifact "$work/out/final_model.int6.ptz" --device cpu)
"$python" scripts/chain.py "$work/out/final_model.int6.ptz" --steps 2 --device cpu
"${sample[@]}" --demo "$work/data"
"${sample[@]}" --prompt 'def area(' --suffix ' return' --tokens 8 --steps 2 --temperature 1
"${sample[@]}" --tokens 8 --mode block --window 4 </dev/null
"$python" scripts/study/report.py --logs "$work/out/logs"

unset ITERATIONS MAX_WALLCLOCK_SECONDS RUN_ID OUT_DIR PRESET  # the protocol's to set
"$python" scripts/study/record.py 8xh100 --rehearse --baselines "" --seeds 1,2 --out "$work/record" --package "$work/packages"
grep -q '"measured_here": {' "$work/record/logs/results.json"
grep -q '"val_bpb": null' "$work/record/submission.json"
grep -q '2 ranks' "$work/record/README.md"
grep -q '"scheme": "int6+lzma"' "$work/record/export.json"
ls "$work"/packages/*/train_gpt.py "$work"/packages/*/submission.json
echo "smoke: ok"
