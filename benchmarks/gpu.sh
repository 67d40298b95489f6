#!/usr/bin/env bash
# What one GPU makes of it:    bash benchmarks/gpu.sh [FOLDER]
#
# A step against the baseline (GPT-2 small, batch 32, bf16; eager and compiled), generation, and 200 steps of real training
# on generated ProsQA with GPT-2's shape: tokens a second, utilisation, ratios, peak memory. Numbers go to FOLDER
# (default: results/gpu) as text and JSON. PYTHON names the interpreter (default: python3).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
out=${1:-results/gpu}
mkdir -p "$out"

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "error: torch sees no GPU here" >&2; exit 2; }
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$out/card.txt"

step() { "$PYTHON" benchmarks/step.py --size small --batch 32 --bf16 --repeats 20 "$@"; }
step --json "$out/step.json" | tee "$out/step.txt"
step --compile --sides coconut --json "$out/step_compiled.json" | tee "$out/step_compiled.txt"
step --c-thought 2 --stages 3 6 --sides coconut --json "$out/step_c2.json" | tee "$out/step_c2.txt"
for shape in llama qwen2; do
    step --shape $shape --stages 6 --sides coconut --json "$out/step_$shape.json" | tee "$out/step_$shape.txt"
done
"$PYTHON" benchmarks/generate.py --size small --json "$out/generate.json" | tee "$out/generate.txt"

data=$(mktemp -d)
trap 'rm -rf "$data"' EXIT
"$PYTHON" preprocessing/prosqa.py --out "$data" --train 6400 --valid 300 --test 100
"$PYTHON" preprocessing/tiny_model.py "$data/prosqa_train.json" --out "$data/model" --width 768 --layers 12 --heads 12
for compile in false true; do
    "$PYTHON" run.py args/prosqa_coconut.yaml model_id="$data/model" from_scratch=true curriculum=none num_epochs=1 \
        train_path="$data/prosqa_train.json" val_path="$data/prosqa_valid.json" save_path="$data/runs" \
        name="train-$compile" batch_size_training=32 global_batch_size=32 bf16=true wandb=disabled num_workers=4 \
        compile=$compile
    "$PYTHON" - "$data/runs/train-$compile/metrics.jsonl" <<'PY' | tee "$out/train_compile_$compile.txt"
import json, statistics, sys

records = [json.loads(line) for line in open(sys.argv[1])]
late = [r for r in records if r["event"] == "step" and r["step"] > 100]
for name in ("tokens_per_second", "mfu", "loader_wait"):
    values = [r[name] for r in late if name in r]
    print(f"{name}, median of steps 101 to 200: {statistics.median(values):.4g}" if values else f"{name}: not logged")
PY
done
