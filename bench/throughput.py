"""How fast are flow_grpo.py's rollout and update, and how much of the GPU's memory do they take?

    python bench/throughput.py                     # SD3.5 Medium with random weights, on a GPU
    python bench/throughput.py --model tiny-sd3    # the embedded model, and whole epochs, on a CPU
    python bench/throughput.py --model small       # the GPU's path, at a size for a CPU
    python bench/throughput.py --processes 1 2     # the embedded model's epoch by 1 and 2 processes

It drives the functions that train, and `plain`, the loop of plain_loop.py. A row is of one recipe,
batch size and loop. It has the images per second of the rollout, of the update and of both, as the
median, the least and the most of the repetitions; the GPU's peak memory; TFLOP/s, by the work that
the algorithm needs, and their share of what a large matrix product sustains here; the
`ratio_deviation` of the first update; and the seconds that the model's default epoch would take at
this speed. On a GPU of less than 45 GB, each round of a few images moves the network out of the way
of text encoders and back, as a whole epoch does but once.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import plain_loop
import torch
from diffusers.utils import logging as diffusers_logging
from models import PROMPTS, RECIPES, SETTINGS, flow_grpo, make_run, needed_flops

CUDA = flow_grpo.DEVICE == "cuda"
BATCH_SIZES = {"sd3.5-medium": [1, 2, 4, 8], "small": [2], "tiny-sd3": [flow_grpo.TINY.batch_size]}
LOOPS = {
    "plain": {},
    "flow_grpo": {},
    "checkpointing": {"gradient_checkpointing": True},
    "compile": {"compile": True},
}
HEADER = """recipe, loop, batch, rollout (images/s), update (images/s), both (images/s), peak GB,
    TFLOP/s, share, ratio - 1, epoch (s)""".split(",")


def now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def print_row(cells: list) -> None:
    print("| " + " | ".join(str(cell).strip() for cell in cells) + " |", flush=True)


def print_header(names: list[str]) -> None:
    print_row(names)
    print("|---" * len(names) + "|", flush=True)


def matmul_rate() -> float:
    """FLOP/s that a large matrix product sustains: in bfloat16 on a GPU, in float32 on a CPU."""
    n = 8192 if CUDA else 2048
    times = 50 if CUDA else 3
    a = torch.randn(n, n, device="cuda" if CUDA else "cpu")
    if CUDA:
        a = a.bfloat16()
    seconds = []
    for _ in range(20):
        start = now()
        for _ in range(times):
            a @ a
        seconds.append((now() - start) / times)
    warm = seconds[10:]  # as it is in training
    return 2 * n**3 / statistics.median(warm)


def time_round(run: flow_grpo.Run, loop) -> tuple[float, float, dict]:
    """Seconds of a rollout and an update, and the update's statistics."""
    start = now()
    samples = loop.sample(run)
    middle = now()
    stats = loop.optimize(run, samples)
    end = now()
    return middle - start, end - middle, stats


def rate(images: int, seconds: list[float]) -> str:
    """Images per second: median (least-most)."""
    rates = sorted(images / s for s in seconds)
    return f"{statistics.median(rates):.3g} ({rates[0]:.3g}-{rates[-1]:.3g})"


def columns_of(run: flow_grpo.Run, loop, repetitions: int, matmul: float) -> list[str]:
    """The cells of a row, after a round that warms up, of one prompt and one trained step."""
    config = run.config
    run.config = replace(config, prompts_per_epoch=1, sde_steps=1)
    time_round(run, loop)
    run.config = config
    rollouts = []
    updates = []
    all_stats = []
    for run.epoch in range(1, repetitions + 1):
        rollout, update, stats = time_round(run, loop)
        rollouts.append(rollout)
        updates.append(update)
        all_stats.append(stats)
    both = [rollout + update for rollout, update in zip(rollouts, updates)]
    images = config.prompts_per_epoch * config.group_size
    images_per_second = images / statistics.median(both)
    flops_of_rollout, flops_of_update = needed_flops(run)
    trained = statistics.mean(stats["trained"] for stats in all_stats)
    flops = images_per_second * (flops_of_rollout + flops_of_update * trained)
    memory = torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0
    deviation = max(stats["ratio_deviation"] for stats in all_stats)
    default = flow_grpo.TINY if config.model == flow_grpo.TINY.model else flow_grpo.Config()
    epoch = default.prompts_per_epoch * default.group_size
    return [
        rate(images, rollouts),
        rate(images, updates),
        rate(images, both),
        f"{memory:.1f}" if CUDA else "-",
        f"{flops / 1e12:.3g}",
        f"{flops / matmul:.0%}",
        f"{deviation:.1e}",
        f"{epoch / images_per_second:.3g}",
    ]


def measure(labels: list, make: Callable, repetitions: int, matmul: float) -> None:
    """Print a row of the table. A row that fails, as for want of memory, stops no other."""
    loop = plain_loop if labels[1].startswith("plain") else flow_grpo
    try:
        columns = columns_of(make(), loop, repetitions, matmul)
    except torch.OutOfMemoryError:
        columns = ["out of memory"]
    except Exception as e:
        traceback.print_exc()
        columns = [flow_grpo.why(e)]
    print_row([*labels, *columns])
    torch.compiler.reset()
    gc.collect()  # A compiled block refers to itself.
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def time_processes(number: int, threads: int, flags: list[str]) -> list[dict]:
    """The metrics of the second and third epoch of the embedded model's run by torchrun."""
    with TemporaryDirectory() as folder:
        one_prompt = Path(folder, "one_prompt.txt")  # An evaluation of it takes no time.
        one_prompt.write_text('a sign that says "407"')
        run = Path(folder, "run")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={number}", str(flow_grpo.HERE / "flow_grpo.py")]
        command += ["--model", flow_grpo.TINY.model, "--epochs", "3", "--output-dir", str(run)]
        command += ["--prompt-file", PROMPTS, "--eval-prompt-file", str(one_prompt), *flags]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"error: {' '.join(command)} failed:\n{result.stderr}")
        lines = (run / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    return [line for line in metrics if "seconds_update" in line][1:]


def compare_processes(numbers: list[int], flags: list[str]) -> None:
    """Print a table of how long an epoch takes with these numbers of processes."""
    threads = torch.get_num_threads()
    print_header(["processes", "threads each", "rollout (s)", "update (s)", "epoch (s)"])
    for number in dict.fromkeys(numbers):
        each = max(1, threads // number)
        metrics = time_processes(number, each, flags)
        rollout = statistics.mean(line["seconds_rollout"] for line in metrics)
        update = statistics.mean(line["seconds_update"] for line in metrics)
        seconds = [f"{s:.3g}" for s in (rollout, update, rollout + update)]
        print_row([number, each, *seconds])


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", choices=SETTINGS, default="sd3.5-medium")
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="by default the model's")
    parser.add_argument("--loops", choices=LOOPS, nargs="+", help="tiny-sd3: plain and flow_grpo")
    parser.add_argument("--recipes", choices=RECIPES, nargs="+", default=["published"])
    parser.add_argument("--images", help="prompts x images, as 48x24; by default two batches")
    parser.add_argument("--repetitions", type=int, default=3, help="after one that warms up")
    parser.add_argument("--processes", type=int, nargs="+", help="compare these numbers instead")
    args = parser.parse_args()
    diffusers_logging.set_verbosity_error()  # It warns at each change of precision.
    device = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    if args.processes:
        print(f"The embedded model's epoch on {device}, torch {torch.__version__}\n")
        flags = []
        if args.images:
            prompts, images = args.images.split("x")
            flags += ["--prompts-per-epoch", prompts, "--group-size", images]
        if args.batch_sizes:
            flags += ["--batch-size", str(args.batch_sizes[0])]
        return compare_processes(args.processes, flags)
    tiny = args.model == "tiny-sd3"
    if args.model == "sd3.5-medium" and not CUDA:
        sys.exit("error: SD3.5 Medium needs a CUDA GPU: give --model tiny-sd3 or --model small")
    matmul = matmul_rate()
    print(f"{args.model} on {device}, torch {torch.__version__}")
    print(f"A large matrix product sustains {matmul / 1e12:.3g} TFLOP/s.\n")
    print_header(HEADER)
    batch_sizes = args.batch_sizes or BATCH_SIZES[args.model]
    # On a CPU, compiling takes minutes, and checkpoints save no memory that is short.
    loops = args.loops or list(LOOPS)[: 2 if tiny else 4]
    for recipe, batch_size, loop in product(args.recipes, batch_sizes, loops):
        prompts, images = map(int, args.images.split("x")) if args.images else (1, 2 * batch_size)
        size = dict(prompts_per_epoch=prompts, group_size=images, batch_size=batch_size)
        make = partial(make_run, args.model, **size, **RECIPES[recipe], **LOOPS[loop])
        measure([recipe, loop, batch_size], make, args.repetitions, matmul)
    if tiny and not args.images:
        read_signs = flow_grpo.Reward("ocr", plain_loop.read_signs, lambda record: None)
        rewards = {"plain": read_signs, "flow_grpo": flow_grpo.load_reward("ocr")}
        for loop, reward in rewards.items():
            make = partial(make_run, args.model, reward, batch_size=batch_sizes[0])
            labels = ["published", f"{loop}, epoch with OCR", batch_sizes[0]]
            measure(labels, make, args.repetitions, matmul)
        print()
        compare_processes([1, 2], [])


if __name__ == "__main__":
    main()
