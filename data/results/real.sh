#!/usr/bin/env bash
# Trains and measures the real chat model of the evidence, two runs at a time, one thread each.
# Resumable: a run whose numbers are in real.csv is not made again, one that was cut goes on. It
# needs data/smollm2 (python data/smollm2.py), pip install simplemma==2.0.0, 12 GB, and 8 hours.
#
#     bash data/results/real.sh [FILE]    # FILE: open prompts, as NoveltyBench's curated ones
set -euo pipefail
FILE=${1:+$(realpath "$1")}
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1 RUNS=runs/real CSV=data/results/real.csv

one() {  # one NAME: train and measure it
  grep -qs "^$1," $CSV || python data/results/real.py "$1" >> "$RUNS/$1.log" 2>&1
}
export -f one
two_at_a_time() { xargs -P 2 -I {} bash -c 'one {}'; }
seeds() { while read -r name; do for seed in "$@"; do echo "$name-s$seed"; done; done; }

[ -f $RUNS/sentences.jsonl ] || python data/results/real.py --prompts
printf '%s\n' categories-base sentences-base | two_at_a_time

# One-word answers; the first seed of all, then the others.
for seed in 0 1 2; do
  printf 'categories-%s\n' grpo dqo_quality-3 dqo-1 dqo_quality-1 dqo_quality-5 likelihood-0.5 \
    darling-0.8 setpo-5 passk-4 | seeds $seed
done | two_at_a_time

# Sentences: strengths chosen at seed 0, on training prompts.
printf 'sentences-%s\n' grpo dqo-0.5 dqo-1 dqo-2 dqo_quality-1 dqo_quality-3 dqo_quality-5 |
  seeds 0 | two_at_a_time
{ echo grpo; python data/results/real.py --chosen sentences; } | sed 's/^/sentences-/' |
  seeds 1 2 | two_at_a_time

# What training on one kind of prompt did to open ones.
if [ -n "$FILE" ]; then
  for name in base categories-{grpo,dqo-1,dqo_quality-3}-s{0,1,2}; do
    grep -qs "^$name," data/results/real_novelty.csv ||
      OMP_NUM_THREADS=2 python data/results/real.py --novelty "$FILE" "$name"
  done
fi
python data/results/real.py --show
