#!/usr/bin/env bash
# Remakes the tables and figures of the README from nothing, two runs at a time, one thread each.
# Resumable: a run that is there is not made again. usage: bash data/results/make.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1 RUNS=runs/compare

one() {  # one NAME FLAGS...: train and measure RUNS/NAME
  local run=$RUNS/$1
  [ -f "$run/model.safetensors" ] || python train.py --out "$run" --overwrite "${@:2}" > "$run.log" 2>&1
  [ -f "$run/measured.json" ] || python data/results/measure.py "$run" >> "$run.log" 2>&1
}
export -f one
two_at_a_time() { xargs -P 2 -L 1 bash -c 'one "$@"' one; }

mkdir -p $RUNS
# The base, sampled three times, and from its states a second encoder, which is $RUNS/base-encoder.
python data/results/measure.py data/tiny

jobs() {  # jobs SEED: grpo with and without std, and the objectives and strengths on standard input
  echo "grpo-s$1 --objective grpo --seed $1"
  echo "grpo_std-s$1 --objective grpo --baseline std --seed $1"
  while read -r objective alpha; do
    flags=${objective/dqo_quality/dqo --kernel quality}
    echo "$objective-$alpha-s$1 --objective $flags --alpha $alpha --seed $1"
  done
}

# 1. Every objective at three strengths, seed 0. The strength is chosen on the training prompts.
python data/results/tables.py --tried | jobs 0 | two_at_a_time

# 2. The chosen ones, and dqo at every strength, at two more seeds.
{ python data/results/tables.py --chosen; python data/results/tables.py --tried | grep "^dqo "; } |
  sort -u > $RUNS/chosen
for seed in 1 2; do jobs $seed < $RUNS/chosen; done | two_at_a_time

# 3. Reward hacking: rewards that can be bought with what follows a right start, and a strength that is too large.
two_at_a_time <<'JOBS'
lax-grpo --data instruct,reason --steps 320 --reward data/results/lax.py:right_start --objective grpo
lax-dqo --data instruct,reason --steps 320 --reward data/results/lax.py:right_start
lax-kernel --data instruct,reason --steps 320 --reward data/results/lax.py:right_start --kernel quality
lax-beta --data instruct,reason --steps 320 --reward data/results/lax.py:right_start --beta 0.1
lax-strict --data instruct,reason --steps 320
large-dqo --data instruct,reason --steps 320 --alpha 5
large-kernel --data instruct,reason --steps 320 --alpha 5 --kernel quality
large-beta --data instruct,reason --steps 320 --alpha 5 --beta 0.1
JOBS

# 4. Ablations of dqo, alpha = 1, at seed 0.
two_at_a_time <<JOBS
encoder_base-s0 --encoder $RUNS/base-encoder
k4-s0 --k 4 --prompts 16
baseline_none-s0 --baseline none
baseline_std-s0 --baseline std
JOBS

python data/results/cities.py
python data/results/tables.py
