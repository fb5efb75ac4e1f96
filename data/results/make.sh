#!/usr/bin/env bash
# Remakes the tables and figures of the README from nothing, two runs at a time, one thread each:
# 73 runs and 8 short ones, two hours on 2 cores where a run with its measuring takes 190 s.
# Resumable: a run that is there is not made again, one that was cut goes on.
#
#     bash data/results/make.sh
#     MORE="--steps 4 --limit 4" bash data/results/make.sh    # in a copy: does all of it run?
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1 RUNS=runs/compare MORE=${MORE:-}

trained() {  # trained NAME FLAGS...: RUNS/NAME
  local run=$RUNS/$1
  [ ! -f "$run/model.safetensors" ] || return 0
  if compgen -G "$run/step-*" > /dev/null
  then python train.py --resume "$run" >> "$run.log" 2>&1
  else rm -rf "$run" && python train.py --out "$run" "${@:2}" $MORE > "$run.log" 2>&1
  fi
}
measured() {  # measured NAME FLAGS...: the same, with RUNS/NAME/measured.json
  trained "$@"
  python data/results/measure.py "$1" >> "$RUNS/$1.log" 2>&1
  rm -rf "$RUNS/$1"/step-*  # needed to resume only
}
export -f trained measured
two_at_a_time() { xargs -P 2 -L 1 bash -c 'set -e; "$@"' bash "$1"; }

mkdir -p $RUNS
# The base, sampled three times, and from its states a second encoder, which is $RUNS/base-encoder.
python data/results/measure.py base

jobs() {  # jobs SEED: grpo, and the objectives and strengths on standard input
  echo "grpo-s$1 --objective grpo --seed $1"
  while read -r objective alpha; do
    echo "$objective-$alpha-s$1 --objective $objective --alpha $alpha --seed $1"
  done
}

# 1. Every objective at three strengths, seed 0. The strength is chosen on the training prompts.
python data/results/tables.py --tried | jobs 0 | two_at_a_time measured

# 2. The chosen ones, and dqo at every strength, at two more seeds.
{ python data/results/tables.py --chosen; python data/results/tables.py --tried | grep "^dqo "; } |
  sort -u > $RUNS/chosen
for seed in 1 2; do jobs $seed < $RUNS/chosen; done | two_at_a_time measured

# 3. Reward hacking: rewards that can be bought with what follows a right start, and a strength that
# is too large.
two_at_a_time trained <<'JOBS'
lax-grpo --data instruct,reason --steps 320 --reward data/results/lax.py:right_start --objective grpo
lax-dqo --data instruct,reason --steps 320 --reward data/results/lax.py:right_start
lax-quality --data instruct,reason --steps 320 --reward data/results/lax.py:right_start --objective dqo_quality
lax-beta --data instruct,reason --steps 320 --reward data/results/lax.py:right_start --beta 0.1
lax-strict --data instruct,reason --steps 320
large-dqo --data instruct,reason --steps 320 --alpha 5
large-quality --data instruct,reason --steps 320 --alpha 5 --objective dqo_quality
large-beta --data instruct,reason --steps 320 --alpha 5 --beta 0.1
JOBS

# 4. One thing changed, three seeds.
for seed in 0 1 2; do
  echo "grpo_std-s$seed --objective grpo --baseline std --seed $seed"
  echo "dqo_std-s$seed --baseline std --seed $seed"
done | two_at_a_time measured

python data/results/cities.py
python data/results/tables.py
