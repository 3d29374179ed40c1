"""Speed and memory of flow_grpo.py's own rollout and update. Nothing is downloaded.

    python bench/throughput.py                      SD3.5 Medium, real size, random weights, on a GPU
    python bench/throughput.py --model tiny-sd3     the embedded model and its whole epochs, on a CPU
    python bench/throughput.py --model small        the GPU's path in half precision, at a size for a CPU
    python bench/throughput.py --count              SD3.5 Medium's FLOP and memory, counted without a GPU

A row is a loop at a batch size: images/s of the rollout with its judging, of the update and of both, medians
with the least and the most; peak memory of the GPU; TFLOP/s, by the work that the algorithm needs, and their
share of what a large matrix product sustains in the same run; how far the first update's ratios are from 1;
the seconds that the model's default epoch would take. `plain` is plain_loop.py.
"""

import argparse
import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers import StableDiffusion3Pipeline as Pipeline
from diffusers.utils import logging as diffusers_logging
from rapidocr import RapidOCR
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import plain_loop

import flow_grpo as f

SD35 = dict(
    sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
    num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
    pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13)),
)  # fmt: skip
SMALL = dict(num_layers=2, num_attention_heads=2, caption_projection_dim=128, dual_attention_layers=(0,))
SCHEDULER = FlowMatchEulerDiscreteScheduler(shift=3.0)
CUDA = torch.cuda.is_available()
MODELS = {  # what its settings need, and the batch sizes to measure
    "sd3.5-medium": ({}, [1, 2, 4, 8]),
    "small": (dict(height=64, width=64, max_sequence_length=8), [2]),
    "tiny-sd3": (dict(model=str(f.HERE / "tiny-sd3")), [48]),
}
RECIPES = {  # what each changes in the published one, which is the default for SD3.5
    "published": {},
    "guidance-1": dict(guidance_scale=1.0),
    "window-3-of-5": dict(sde_steps=3, sde_range=5),
    "fast": dict(guidance_scale=1.0, sde_steps=3, sde_range=5, beta=0.0, clip_range=1e-5),
}
LOOPS = {
    "plain": {},
    "flow_grpo": {},
    "compile": dict(compile=True),
    "checkpointing": dict(compile=True, gradient_checkpointing=True),
}
HEADER = ("loop", "batch", "rollout, images/s", "update, images/s", "both, images/s", "peak GB", "TFLOP/s",
          "share", "ratio - 1", "epoch, s")  # fmt: skip
PROMPTS = str(f.HERE / "prompts.txt")
OCR_SIZED = {"Det.limit_type": "max", "Det.limit_side_len": 64}
RANDOM = [("random", 1.0, lambda images, prompts, metadata: torch.rand(len(images)), lambda record: None)]


class RandomPipeline(Pipeline):
    """SD3 with random weights. Its text encoders are one random text."""

    def __init__(self, shape: dict, vae_channels: tuple, length: int):
        torch.set_default_dtype(torch.float16)
        transformer = SD3Transformer2DModel(**shape)
        pooled = torch.randn(1, shape["pooled_projection_dim"])
        self.text = torch.randn(1, 77 + length, shape["joint_attention_dim"]), pooled
        torch.set_default_dtype(torch.float32)
        blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
        blocks |= dict(block_out_channels=vae_channels, layers_per_block=2, latent_channels=16)
        blocks |= dict(use_quant_conv=False, use_post_quant_conv=False)
        vae = AutoencoderKL(**blocks, scaling_factor=1.5305, shift_factor=0.0609)
        super().__init__(transformer, SCHEDULER, vae, *[None] * 6)

    def encode_prompt(self, prompts: list[str], *args, **kwargs):
        embeds, pooled = (e.expand(len(prompts), *e.shape[1:]) for e in self.text)
        return embeds, embeds, pooled, pooled


def make_run(model: str, rewards: list[tuple] = RANDOM, **given):
    config, records = f.settings(**MODELS[model][0] | given), f.read_prompts(PROMPTS, rewards)
    if model == "tiny-sd3":
        pipe = f.load_pipeline(config.model)
    else:
        torch.manual_seed(0)
        shape = SD35 | (SMALL if model == "small" else {})
        channels = (32,) * 4 if model == "small" else (128, 256, 512, 512)
        with torch.device("cuda" if CUDA else "cpu"):
            pipe = RandomPipeline(shape, channels, config.max_sequence_length)
    return f.prepare(config, pipe, rewards, records, records[:1])


# ---- Measuring.
def now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def matmul_rate() -> float:
    """FLOP/s that a large matrix product sustains: in bfloat16 on a GPU, in float32 on a CPU."""
    n, times, dtype, device = (8192, 50, torch.bfloat16, "cuda") if CUDA else (2048, 3, torch.float32, "cpu")
    a, b, seconds = *torch.randn(2, n, n, device=device).to(dtype), []
    for _ in range(20):  # The last half is as warm as in training.
        start = now()
        for _ in range(times):
            a @ b
        seconds.append((now() - start) / times)
    return 2 * n**3 / statistics.median(seconds[10:])


def needed_flops(run, config) -> tuple[int, int]:
    """FLOP an image of the rollout and of the update: matrix products and attention. A backward pass counts
    as a forward one, which is the least, as frozen weights need no gradient."""
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(run.pipe.transformer.config)
        x, text = torch.randn(1, *run.latent_shape), [torch.randn(e.shape) for e in run.null_text]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        f.predict_velocity(transformer, x, 0.5, text, text, 1.0)
    forward, passes = counter.get_total_flops(), 1 + (config.guidance_scale > 1)
    trained = config.sde_steps * (passes + 1 + passes * (config.beta > 0))
    return forward * passes * f.TRAIN_STEPS, forward * trained


def time_rounds(run, module, repetitions: int) -> tuple[list[tuple], list[dict]]:
    """Seconds of rollout, update and both, and the update's statistics. The first round warms up."""
    config, seconds, stats, prompts = run.config, [], [], run.config.prompts_per_epoch
    for run.epoch in range(repetitions + 1):
        config.prompts_per_epoch = prompts if run.epoch else 1
        generator, start = torch.Generator(run.device).manual_seed(run.epoch), now()
        samples = module.collect(run, generator)
        middle = now()
        stats.append(module.update(run, samples, generator))
        seconds.append((middle - start, now() - middle, now() - start))
    return seconds[1:], stats[1:]


def measure(name: str, make: Callable, repetitions: int, matmul: float) -> None:
    """Print a row of the table."""
    try:
        run = make()
        seconds, stats = time_rounds(run, plain_loop if name.startswith("plain") else f, repetitions)
        config, epoch = run.config, f.settings(model=run.config.model)
        rates = [
            sorted(config.prompts_per_epoch * config.group_size / s for s in part) for part in zip(*seconds)
        ]
        columns = [f"{statistics.median(r):.3g} ({r[0]:.3g}-{r[-1]:.3g})" for r in rates]
        rate, (rollout, update) = statistics.median(rates[2]), needed_flops(run, config)
        flops = rate * (rollout + update * statistics.mean(s["trained"] for s in stats))
        columns += [f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if CUDA else "-", f"{flops / 1e12:.3g}"]
        columns += [f"{flops / matmul:.0%}", f"{max(s['ratio_deviation'] for s in stats):.1e}"]
        columns += [f"{epoch.prompts_per_epoch * epoch.group_size / rate:.3g}"]
    except Exception as e:  # The other rows are still worth having.
        if f.why(e) != f.OUT_OF_MEMORY:
            traceback.print_exc()
        columns = [f.why(e)]
    print(f"| {name} | " + " | ".join(columns) + " |", flush=True)
    run = None
    torch.compiler.reset()
    gc.collect()  # A compiled block refers to itself.
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def profile(run) -> None:
    """Print where the time of a rollout and update goes."""
    time_rounds(run, f, 1)
    with torch.profiler.profile() as profiler:
        time_rounds(run, f, 0)
    key = f"self_{'device' if CUDA else 'cpu'}_time_total"
    print(profiler.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=60))


def plain_ocr(
    engine: RapidOCR, images: torch.Tensor, prompts: list[str], metadata: list[dict]
) -> list[float]:
    pixels = (images * 255).byte().permute(0, 2, 3, 1).flip(-1).cpu().numpy()
    readings = ["".join(engine(image).txts or ()) for image in pixels]
    return [float(f'"{reading}"' in prompt) for reading, prompt in zip(readings, prompts)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="sd3.5-medium")
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", help="by default 1 2 4 8, small: 2, tiny-sd3: 48"
    )
    parser.add_argument(
        "--loops", choices=LOOPS, nargs="+", help="by default all (tiny-sd3: the first three)"
    )
    parser.add_argument("--recipe", choices=RECIPES, default="published")
    parser.add_argument("--images", help="prompts x images each, as in 48x24; by default two batches")
    parser.add_argument("--repetitions", type=int, default=3, help="after one round that warms up")
    parser.add_argument("--profile", action="store_true", help="show instead where the time goes, by kernel")
    parser.add_argument("--count", action="store_true", help="count instead, by counting.py")
    args = parser.parse_args()
    diffusers_logging.set_verbosity_error()  # It warns at each change of precision.
    if args.count:
        from counting import print_count

        return print_count(args.batch_sizes or [1, 2, 4, 8, 16])
    tiny = args.model == "tiny-sd3"
    if args.model == "sd3.5-medium" and not CUDA:
        sys.exit("error: SD3.5 Medium needs a CUDA GPU: give --model tiny-sd3, --model small or --count")

    def make(batch_size: int, loop: str):
        prompts, images = map(int, args.images.split("x")) if args.images else (1, 2 * batch_size)
        given = dict(batch_size=batch_size, prompts_per_epoch=prompts, group_size=images)
        return make_run(args.model, **given, **RECIPES[args.recipe], **LOOPS[loop])

    # On a CPU, checkpoints save no memory that is short.
    loops, batch_sizes = (
        args.loops or list(LOOPS)[: 3 if tiny else 4],
        args.batch_sizes or MODELS[args.model][1],
    )
    if args.profile:
        return profile(make(batch_sizes[0], loops[-1]))
    device = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    matmul, recipe = matmul_rate(), f"{args.model}, {args.recipe} recipe"
    print(f"{recipe}, on {device}, torch {torch.__version__}; matrix product {matmul / 1e12:.3g} TFLOP/s\n")
    print("| " + " | ".join(HEADER) + " |\n" + "|---" * len(HEADER) + "|", flush=True)
    for n in batch_sizes:
        for loop in loops:
            measure(f"{loop} | {n}", partial(make, n, loop), args.repetitions, matmul)
    if tiny and not args.images:
        # Whole epochs of the default run, with real rewards.
        for name, options in {"as its library sets it": {}, "sized to the images": OCR_SIZED}.items():
            engine = RapidOCR(params={"Global.log_level": "error"} | options)
            rewards = [("ocr", 1.0, partial(plain_ocr, engine), f.quoted_text)]
            given = {} if options else {"prompts_per_epoch": 1}  # It takes ten times as long.
            make = partial(make_run, args.model, rewards, **given)
            measure(f"plain, epoch, OCR {name} | 48", make, args.repetitions if options else 1, matmul)
        for loop in loops[1:3]:
            make = partial(make_run, args.model, f.load_rewards("ocr"), **LOOPS[loop])
            measure(f"{loop}, epoch, OCR | 48", make, args.repetitions, matmul)


if __name__ == "__main__":
    main()
