#!/usr/bin/env bash
# Remakes every table and figure of the README from nothing. Resumable: what is done is skipped.
# usage: bash data/results/make.sh      (about 35 minutes on 2 cores)
set -euo pipefail
cd "$(dirname "$0")/../.."
for seed in 0 1 2; do
  for objective in dqo grpo; do
    run=runs/compare/$objective-$seed
    [ -f "$run/eval.json" ] && continue
    python train.py --objective $objective --seed $seed --out "$run" --overwrite
    python eval.py "$run" --json "$run/eval.json" > /dev/null
  done
done
[ -f runs/compare/base.json ] || python eval.py data/tiny --json runs/compare/base.json > /dev/null
python data/results/tables.py
