#!/usr/bin/env bash
# What does this machine's GPU do? In 5 minutes, the most valuable first:
#
#     bench/gpu.sh FOLDER [PART...]
#
# tests           the tests that need a GPU, but for those that compile
# speed           rollout and update of SD3.5 Medium, with random weights, by the published recipe
# variants        the same in large batches, by the fast recipe, and with --gradient-checkpointing
# compile         the same with --compile
# run             the embedded model's default run, as far as it comes
# processes       three epochs of that run by torchrun, with two processes
# compiled-tests  the other tests that need a GPU
#
# Without PART, it runs all of these. Each part writes to FOLDER/PART.txt as it goes, and one that
# fails stops no other. A part is stopped (exit status 124) at its second, counted from the start of
# this script. So the next part has what time is left over. With SMALL=1, all run from end to end at
# a size for a CPU, and have 20 times as long. PYTHON names the interpreter.
set -uo pipefail
all="tests speed variants compile run processes compiled-tests"
mkdir -p "${1:?give a folder for the results}" && folder=$(cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
shift
parts=" ${*:-$all} "
for name in $parts; do
    [[ " $all " == *" $name "* ]] || { echo "error: $name is none of $all" >&2; exit 2; }
done
python=${PYTHON:-python}
small=${SMALL:-}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONUNBUFFERED=1

{
    echo "commit $(git describe --always --dirty 2>/dev/null)${small:+, small sizes}"
    command -v nvidia-smi >/dev/null &&
        nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit --format=csv,noheader
    "$python" - <<'PYTHON'
import os, platform
from importlib.metadata import version
print(os.cpu_count(), "cores, Python", platform.python_version())
for name in "torch diffusers transformers peft accelerate rapidocr onnxruntime".split():
    print(name, version(name))
PYTHON
} 2>&1 | tee "$folder/summary.txt"

part() {  # NAME SECOND COMMAND...
    local name=$1 start=$SECONDS
    local limit=$(($2 * (${#small} ? 20 : 1) - start))
    shift 2
    [[ $parts == *" $name "* ]] || return
    echo "$*" >"$folder/$name.txt"
    timeout -k 5 "$limit" "$@" >>"$folder/$name.txt" 2>&1
    echo "exit status $? after $((SECONDS - start)) s" >>"$folder/$name.txt"
    cat "$folder/$name.txt"
    echo "$name: $(tail -n 1 "$folder/$name.txt")" >>"$folder/summary.txt"
}

head -n 1 prompts.txt >"$scratch/one.txt"  # An evaluation of it takes no time.
many=16
tests=("$python" -m pytest -v -rs -m skipif tests/test_gpu.py -k)
throughput=("$python" bench/throughput.py)
default=(flow_grpo.py --model tiny-sd3 --prompt-file prompts.txt)
run=("$python" "${default[@]}" --output-dir "$scratch/run")
processes=("$python" -m torch.distributed.run --standalone --nproc-per-node 2 "${default[@]}"
    --output-dir "$scratch/processes" --eval-prompt-file "$scratch/one.txt" --epochs 3)
if [ "$small" ]; then
    many=2
    throughput+=(--model small)
    run+=(--epochs 1 --eval-prompt-file "$scratch/one.txt")
    processes+=(--prompts-per-epoch 2 --group-size 4 --batch-size 4)
fi
large=("${throughput[@]}" --recipes fast published --batch-sizes "$many" --repetitions 1)
part tests 60 "${tests[@]}" "False]"
part speed 100 "${throughput[@]}" --batch-sizes 4 --repetitions 2 --loops flow_grpo
part variants 170 "${large[@]}" --loops flow_grpo checkpointing
part compile 205 "${large[@]}" --loops compile
part run 250 "${run[@]}"
[ ! -e "$scratch/run" ] || cat "$scratch/run/metrics.jsonl" >>"$folder/run.txt"
part processes 283 "${processes[@]}"
part compiled-tests 294 "${tests[@]}" "True]"
cat "$folder/summary.txt"
