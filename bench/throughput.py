"""Speed and memory of flow_grpo.py's own rollout and update. Nothing is downloaded: the weights are random.

    python bench/throughput.py                          SD3.5 Medium at its real size, 512x512, on a GPU
    python bench/throughput.py --model tiny-sd3         the embedded model on the CPU, beside a plain loop

For each batch size: images/s of the rollout, of the update and of both, as medians with the least and the most; peak
memory; TFLOP/s, counted from the work that the algorithm needs, and their share of what a large matrix product sustains
on the same device in the same run; and the time of an epoch of the run's own size.
"""

import argparse
import dataclasses
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import flow_grpo as f  # noqa: E402

SD35_TRANSFORMER = dict(
    sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
    num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
    pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13)),
)  # fmt: skip
SMALL_TRANSFORMER = SD35_TRANSFORMER | dict(
    num_layers=2, num_attention_heads=2, caption_projection_dim=128, joint_attention_dim=64, pooled_projection_dim=64,
    dual_attention_layers=(0,),
)  # fmt: skip


def random_pipeline(transformer: dict) -> StableDiffusion3Pipeline:
    """An SD3.5 pipeline without text encoders, made on the device, in the precision that training keeps it in."""
    device, dtype = f.device_and_dtype()
    torch.manual_seed(0)
    with torch.device(device):
        default, _ = torch.get_default_dtype(), torch.set_default_dtype(dtype)
        try:
            pipe = StableDiffusion3Pipeline(
                transformer=SD3Transformer2DModel(**transformer),
                vae=AutoencoderKL(
                    block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
                    up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=16,
                    scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
                ),
                scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), text_encoder=None, tokenizer=None,
                text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
            )  # fmt: skip
        finally:
            torch.set_default_dtype(default)
    for module in (pipe.transformer, pipe.vae):
        module.requires_grad_(False).eval()
    return pipe


def random_reward(images, prompts, metadata):
    return torch.rand(len(images))


def random_run(transformer: dict, config: f.Config) -> f.Run:
    pipe = random_pipeline(transformer)
    sizes = pipe.transformer.config
    tokens = 77 + config.max_sequence_length
    text = f.Text(torch.randn(tokens, sizes.joint_attention_dim), torch.randn(sizes.pooled_projection_dim))
    text = f.Text(*(e.to(pipe.transformer.dtype) for e in text))
    records = [{"prompt": "p"}]
    return f.assemble(config, pipe, [f.Part("random", 1.0, random_reward)], records, records, {"p": text, "": text})


def matmul_rate(device: str) -> float:
    """FLOP/s of a large matrix product: bfloat16 on a GPU, float32 on a CPU, which trains in float32."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(12):
        synchronize()
        start = time.perf_counter()
        a @ b
        synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds[2:])


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def forward_flops(run: f.Run) -> int:
    """FLOP of one forward pass of the network for one image."""
    x, text = torch.randn(1, *run.latent_shape, device=run.pipe.device), run.null_text
    with torch.no_grad(), f.reference(run.pipe.transformer), FlopCounterMode(display=False) as counter:
        f.velocity(run.pipe.transformer, x, 0.5, text, text, 1.0)
    return counter.get_total_flops()


def needed_flops(run: f.Run) -> tuple[int, int]:
    """FLOP per image of the rollout and of the update. A backward pass costs a forward: the weights need no gradient."""
    one, guided = forward_flops(run), 2 if run.config.guidance_scale != 1 else 1
    trained = run.config.trained_steps
    return one * f.TRAIN_STEPS * guided, one * trained * (guided + 1 + (guided if run.config.beta > 0 else 0))


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> float:
    """GB: of the GPU since `reset_peak`, or of the process since it began."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform != "darwin" else 1e9)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def measure(run: f.Run, batch_size: int, repetitions: int, peak_rate: float) -> None:
    """One line of the table: `repetitions` rollouts and updates of two micro-batches, after one to warm up."""
    images = 2 * batch_size
    config = dataclasses.replace(
        run.config, batch_size=batch_size, prompts_per_epoch=1, group_size=images, updates_per_epoch=1
    )
    run = dataclasses.replace(run, config=config)
    rollouts, updates = [], []
    reset_peak()
    for i in range(repetitions + 1):
        generator = torch.Generator().manual_seed(i)
        synchronize()
        start = time.perf_counter()
        samples, _ = f.collect(run, generator)
        synchronize()
        middle = time.perf_counter()
        f.update(run, samples, generator)
        synchronize()
        rollouts.append(middle - start)
        updates.append(time.perf_counter() - middle)
    rollouts, updates = rollouts[1:], updates[1:]
    both = [a + b for a, b in zip(rollouts, updates)]
    rate = images * sum(needed_flops(run)) / statistics.median(both)
    epoch = statistics.median(both) / images * 48 * 24
    per_second = (spread([images / s for s in seconds]) for seconds in (rollouts, updates, both))
    print(
        f"{batch_size:5} | " + " | ".join(f"{p:21}" for p in per_second)
        + f" | {peak_memory():6.1f} | {rate / 1e12:7.3g} | {rate / peak_rate:5.0%} | {epoch / 60:8.1f}", flush=True
    )  # fmt: skip


def plain_epoch(run: f.Run, encoders: StableDiffusion3Pipeline, epoch: int) -> dict[str, float]:
    """An epoch as one would write it first: text encoded for each batch, images judged one by one, every sample trained on,
    and the unconditional velocity, if there is guidance, computed with its graph. Returns the seconds of each part."""
    from rapidocr import RapidOCR

    config, pipe = run.config, run.pipe
    engine = RapidOCR(params={"Global.log_level": "error", "Det.limit_type": "max", "Det.limit_side_len": config.width})
    prompts = [r["prompt"] for r in f.epoch_prompts(run.train_records, config, epoch) for _ in range(config.group_size)]
    times, seconds = f.sigmas(pipe.scheduler, f.TRAIN_STEPS), {"rollout": 0.0, "scoring": 0.0, "update": 0.0}

    @torch.no_grad()
    def encode(batch: list[str]) -> f.Text:
        embeds, _, pooled, _ = encoders.encode_prompt(
            batch, None, None, do_classifier_free_guidance=False, max_sequence_length=config.max_sequence_length
        )
        return f.Text(embeds, pooled)

    def guided_velocity(x, t, text):
        v = f.velocity(pipe.transformer, x, t, text, text, 1.0)
        if config.guidance_scale == 1:
            return v
        empty = f.velocity(pipe.transformer, x, t, encode([""] * len(x)), text, 1.0)
        return empty + config.guidance_scale * (v - empty)

    batches = []
    for i in range(0, len(prompts), config.batch_size):
        start, batch = time.perf_counter(), prompts[i : i + config.batch_size]
        text = encode(batch)
        path, log_probs = [torch.randn(len(batch), *run.latent_shape)], []
        with torch.no_grad():
            for t, t_next in zip(times, times[1:]):
                v = guided_velocity(path[-1], t, text)
                x, log_prob, _, _ = f.sde_step(v, path[-1], t, t_next, config.noise_level)
                path.append(x)
                log_probs.append(log_prob)
            images = f.decode(pipe.vae, path[-1])
        middle = time.perf_counter()
        rewards = []
        for image, prompt in zip(images, batch):
            pixels = (image * 255).byte().permute(1, 2, 0).flip(-1).numpy()
            rewards.append(float("".join(engine(pixels).txts or ()) == f.quoted_text(prompt)))
        seconds["rollout"] += middle - start
        seconds["scoring"] += time.perf_counter() - middle
        batches.append((batch, path, log_probs, torch.tensor(rewards)))
    start = time.perf_counter()
    advantages = f.group_advantages(torch.cat([b[3] for b in batches]).view(-1, config.group_size)).flatten()
    for (batch, path, log_probs, _), advantage in zip(batches, advantages.split(config.batch_size)):
        text = encode(batch)
        for k in range(config.trained_steps):
            v = guided_velocity(path[k], times[k], text)
            _, log_prob, _, _ = f.sde_step(v, path[k], times[k], times[k + 1], config.noise_level, path[k + 1])
            kl = torch.zeros(len(batch))
            f.grpo_loss(log_prob, log_probs[k], advantage, kl, config.clip_range, 0.0)[0].backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    seconds["update"] = time.perf_counter() - start
    return seconds


def compare_with_plain_loop(repetitions: int) -> None:
    """Epochs of the embedded model's default run, by flow_grpo.py and by a plain loop, in turn, on the same prompts."""
    config = f.Config(prompt_file=str(f.TINY.parent / "prompts.txt"), model=str(f.TINY), reward="ocr", **f.LAPTOP)
    run, encoders = f.prepare(config), f.load_pipeline(config, torch.float32)
    ours, plain = [], []
    for epoch in range(repetitions + 1):
        run.epoch = epoch
        start = time.perf_counter()
        samples, seconds = f.collect(run, torch.Generator().manual_seed(epoch))
        middle = time.perf_counter()
        f.update(run, samples, torch.Generator().manual_seed(epoch))
        update = time.perf_counter() - middle
        ours.append({"rollout": seconds["seconds_rollout"], "scoring": seconds["seconds_scoring"], "update": update}
                    | {"epoch": time.perf_counter() - start})  # fmt: skip
        parts = plain_epoch(run, encoders, epoch)
        plain.append(parts | {"epoch": sum(parts.values())})
    print(f"\nSeconds an epoch of {config.prompts_per_epoch} x {config.group_size} images, medians of {repetitions}:")
    print(f"{'':12}" + "".join(f"{name:>22}" for name in ours[0]))
    for name, rows in (("flow_grpo", ours[1:]), ("plain loop", plain[1:])):
        print(f"{name:12}" + "".join(f"{spread([r[part] for r in rows]):>22}" for part in rows[0]))
    ratio = statistics.median(r["epoch"] for r in plain[1:]) / statistics.median(r["epoch"] for r in ours[1:])
    print(f"{ratio:.1f} times as fast as the plain loop")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["sd3.5-medium", "small", "tiny-sd3"], default="sd3.5-medium",
                        help="`small` has the same parts at a size that a CPU can run: a check of the bench itself")  # fmt: skip
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="default: 1 2 4 8 16; 48 96 192 for tiny-sd3")
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    if args.model == "sd3.5-medium" and not torch.cuda.is_available():
        sys.exit("error: no CUDA GPU was found, which SD3.5 Medium needs: use --model tiny-sd3 or --model small")
    device, dtype = f.device_and_dtype()
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    peak_rate = matmul_rate(device)
    print(f"{args.model} in {dtype} on {name}, torch {torch.__version__}; matrix product: {peak_rate / 1e12:.3g} TFLOP/s")
    if args.model == "tiny-sd3":
        config = f.Config(prompt_file=str(f.TINY.parent / "prompts.txt"), model=str(f.TINY), reward="ocr", **f.LAPTOP)
        run = f.prepare(config)
        run.reward = [f.Part("random", 1.0, random_reward)]
    else:
        small = args.model == "small"
        config = dataclasses.replace(f.Config(), **(dict(height=64, width=64, max_sequence_length=8) if small else {}))
        run = random_run(SMALL_TRANSFORMER if small else SD35_TRANSFORMER, config)
    print(f"needed per image: {' + '.join(f'{n / 1e12:.3g}' for n in needed_flops(run))} TFLOP (rollout + update)\n")
    print("batch | rollout images/s      | update images/s       | both images/s         | peak GB | TFLOP/s | share | "
          "minutes for 48 x 24")  # fmt: skip
    for batch_size in args.batch_sizes or ([48, 96, 192] if args.model == "tiny-sd3" else [1, 2, 4, 8, 16]):
        try:
            measure(run, batch_size, args.repetitions, peak_rate)
        except torch.OutOfMemoryError:
            print(f"{batch_size:5} | out of memory")
            torch.cuda.empty_cache()
    if args.model == "tiny-sd3":
        compare_with_plain_loop(args.repetitions)


if __name__ == "__main__":
    main()
