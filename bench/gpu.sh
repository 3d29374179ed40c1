#!/usr/bin/env bash
# What does this machine's GPU do? In 30 minutes, the most valuable first:
#
#     bench/gpu.sh [FOLDER [PART...]]
#
# tests      the tests that need a GPU
# speed      rollout and update of SD3.5 Medium, with random weights, in small batches
# run        the embedded model's default run
# processes  the first epochs of that run by torchrun, with one process and with one for each GPU;
#            where there is one GPU, two processes share it
# large      SD3.5 Medium in large batches
# epoch      a whole epoch of SD3.5 Medium by the fast recipe
#
# Without PART, it runs all of these. Each has a time limit, and writes to FOLDER/PART.txt as it
# goes. A part that fails stops no other. Without a GPU, or with SMALL=1, the same parts run from
# end to end at a size for a CPU. FOLDER is runs/DEVICE-DATE by default, and PYTHON names the
# interpreter.
set -uo pipefail
mkdir -p "${1:-bench}" && folder=$(cd "${1:-bench}" && pwd)
given=$#
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python}
device=$("$python" -c 'from torch.cuda import *; print(get_device_name() if is_available() else "CPU")')
[ -n "$device" ] || { echo "error: $python can't import torch: name another by PYTHON=" >&2; exit 2; }
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
[ "$device" = CPU ] && SMALL=1
small=${SMALL:-}
if [ "$given" -gt 0 ]; then
    shift
else
    folder=$PWD/runs/${device// /-}${small:+-small}-$(date +%Y%m%d-%H%M%S)
fi
mkdir -p "$folder"
parts=("${@:-all}")

{
    echo "device: $gpus x $device${small:+, small sizes}"
    echo "commit: $(git describe --always --dirty 2>/dev/null)"
    command -v nvidia-smi >/dev/null &&
        nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit --format=csv
    "$python" - <<'PYTHON'
import os, platform
from importlib.metadata import version
import torch
print("cores:", os.cpu_count(), " python", platform.python_version(), " CUDA", torch.version.cuda)
for name in "torch diffusers transformers peft accelerate rapidocr onnxruntime".split():
    print(name, version(name))
PYTHON
} 2>&1 | tee "$folder/machine.txt"

part() {  # NAME SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    [[ " ${parts[*]} " = *" $name "* || ${parts[0]} = all ]] || return 0
    echo "== $name, at most $limit s: ${*/#$python/python}" | tee "$folder/$name.txt"
    timeout -k 10 "$limit" "$@" 2>&1 | tee -a "$folder/$name.txt"
    code=${PIPESTATUS[0]}
    echo "$name: exit status $code after $((SECONDS - start)) s" | tee -a "$folder/summary.txt"
}

speed=("$python" bench/throughput.py)
run=("$python" flow_grpo.py --model tiny-sd3 --output-dir "$folder/run")
processes=("${speed[@]}" --processes 1 "$((gpus > 1 ? gpus : 2))")
export PYTHONUNBUFFERED=1
part tests 300 "$python" -m pytest -v -rs test_flow_grpo.py -k gpu
if [ -n "$small" ]; then
    head -n 8 prompts.txt >"$folder/prompts.txt"
    part speed 600 "${speed[@]}" --model small --batch-sizes 1 --repetitions 1
    part run 300 "${run[@]}" --prompt-file "$folder/prompts.txt" --epochs 1 --prompts-per-epoch 2 \
        --group-size 4 --batch-size 4
    part processes 300 "${processes[@]}" --images 2x4 --batch-sizes 4
    part large 300 "${speed[@]}" --model small --batch-sizes 2 --repetitions 1 --loops flow_grpo
    part epoch 300 "${speed[@]}" --model small --batch-sizes 2 --repetitions 1 --loops flow_grpo \
        --recipe fast --images 2x3
else
    part speed 420 "${speed[@]}" --batch-sizes 1 4 --repetitions 2
    part run 300 "${run[@]}" --prompt-file prompts.txt
    part processes 120 "${processes[@]}"
    part large 300 "${speed[@]}" --batch-sizes 8 16 --repetitions 1
    part epoch 360 "${speed[@]}" --batch-sizes 8 --repetitions 1 --loops flow_grpo --recipe fast \
        --images 48x24
fi
cat "$folder/summary.txt"
