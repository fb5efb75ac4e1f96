#!/usr/bin/env bash
# Remakes the tables and figures of the README from nothing, two runs at a time, one thread each.
# Resumable: what is done is skipped. usage: bash data/results/make.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1

one() {  # one OBJECTIVE SEED
  local run=runs/compare/$1-$2
  [ -f "$run/eval.json" ] && return
  python train.py --objective "$1" --seed "$2" --out "$run" --overwrite > "runs/compare/$1-$2.log" 2>&1
  python eval.py "$run" --json "$run/eval.json" > /dev/null
}
export -f one

mkdir -p runs/compare
[ -f runs/compare/base.json ] || python eval.py data/tiny --json runs/compare/base.json > /dev/null
for seed in 0 1 2; do echo "dqo $seed"; echo "grpo $seed"; done | xargs -P 2 -L 1 bash -c 'one $0 $1'
python data/results/tables.py
