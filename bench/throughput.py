"""Speed and memory of flow_grpo.py's own rollout and update. Nothing is downloaded: the weights are random.

    python bench/throughput.py                          SD3.5 Medium at its real size, 512x512, on a GPU
    python bench/throughput.py --model tiny-sd3         the embedded model on the CPU, beside a plain loop
    python bench/throughput.py --count                  SD3.5 Medium's memory and FLOP, counted without a GPU

For a plain loop, for flow_grpo.py without and with compiled blocks, then with gradient checkpointing, and for each batch size:
images/s of the rollout, of the update and of both, as medians with the least and the most; peak memory; TFLOP/s, counted from
the work that the algorithm needs, and their share of what a large matrix product sustains on the same device in the same run;
how far the first update's ratios are from 1; and the time of an epoch of 48 x 24 images, rewards not included.
"""

import argparse
import dataclasses
import functools
import gc
import math
import statistics
import sys
import time
import weakref
from pathlib import Path
from typing import Callable, Sequence
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.utils import logging as diffusers_logging
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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


def random_pipeline(transformer: dict, device: str, dtype: torch.dtype) -> StableDiffusion3Pipeline:
    """An SD3.5 pipeline without text encoders, made on the device."""
    torch.manual_seed(0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with torch.device(device):
        default, _ = torch.get_default_dtype(), torch.set_default_dtype(dtype)
        try:
            pipe = StableDiffusion3Pipeline(
                transformer=SD3Transformer2DModel(**transformer),
                vae=AutoencoderKL(
                    block_out_channels=(128, 256, 512, 512) if transformer == SD35_TRANSFORMER else (32,) * 4,
                    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                    layers_per_block=2, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609,
                    use_quant_conv=False, use_post_quant_conv=False,
                ),
                scheduler=scheduler, text_encoder=None, tokenizer=None,
                text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
            )  # fmt: skip
        finally:
            torch.set_default_dtype(default)
    for module in (pipe.transformer, pipe.vae):
        module.to(dtype).requires_grad_(False).eval()
    return pipe


def random_reward(images, prompts, metadata):
    return torch.rand(len(images))


def random_text(transformer, config: f.Config) -> f.Text:
    """The encoding of a prompt: embeds [77 + L, D], pooled [D']."""
    sizes = transformer.config
    shapes = (77 + config.max_sequence_length, sizes.joint_attention_dim), (sizes.pooled_projection_dim,)
    return f.Text(*(torch.randn(shape, dtype=transformer.dtype) for shape in shapes))


def random_run(transformer: dict, config: f.Config) -> f.Run:
    pipe = random_pipeline(transformer, *f.device_and_dtype())
    text, records = random_text(pipe.transformer, config), [{"prompt": "p"}]
    return f.assemble(config, pipe, [f.Part("random", 1.0, random_reward)], records, records, {"p": text, "": text})


def matmul_rate(device: str) -> float:
    """FLOP/s that a large matrix product sustains: bfloat16 on a GPU, float32 on a CPU, which trains in float32."""
    n, dtype, times = (8192, torch.bfloat16, 50) if device == "cuda" else (2048, torch.float32, 3)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(20):  # two seconds or so: the last half is as warm as in training
        start = now()
        for _ in range(times):
            a @ b
        seconds.append((now() - start) / times)
    return 2 * n**3 / statistics.median(seconds[10:])


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def needed_flops(run: f.Run) -> tuple[int, int]:
    """FLOP per image of the rollout and of the update. A backward pass takes a forward's at least: the weights need no
    gradient."""
    config, trained = run.config, run.config.trained_steps
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(run.pipe.transformer.config)
        x, text = torch.randn(1, *run.latent_shape), f.Text(*(torch.randn(e.shape) for e in run.null_text))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        f.predict_velocity(transformer, x, 0.5, text, text, 1.0)
    one, guided = counter.get_total_flops(), 2 if config.guidance_scale != 1 else 1
    return one * f.TRAIN_STEPS * guided, one * trained * (guided + 1 + (guided if config.beta > 0 else 0))


class Allocations(TorchDispatchMode):
    """The bytes of the storages that operations make, as long as they live; `peak` is the most at a time. The tensors that
    were there before don't count."""

    def __init__(self, before: Sequence[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.live = {t.untyped_storage()._cdata: 0 for t in before}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in (t for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata)
        return out

    def free(self, key: int) -> None:
        self.now -= self.live.pop(key)


def tensors_of(module: torch.nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def flash_attention(q, k, v, *args, **kwargs):
    """On meta tensors torch would take the formula that keeps a matrix of weights; on a GPU it takes this kind."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


def bare_run(pipe: StableDiffusion3Pipeline, config: f.Config) -> f.Run:
    """What the steps of an update need, and no more."""
    with torch.device(pipe.device):
        parameters = f.add_adapter(pipe.transformer, config)
    texts = {"": random_text(pipe.transformer, config)}
    return f.Run(config, pipe, [], [], [], texts, parameters, ema=[], optimizer=None, scaler=None)


def weightless_run(checkpointing: bool) -> f.Run:
    """SD3.5 Medium on tensors without data."""
    run = bare_run(random_pipeline(SD35_TRANSFORMER, "meta", torch.float16), f.Config())
    if checkpointing:
        f.save_memory(run.pipe)
    for p in run.parameters:
        p.grad = torch.zeros_like(p)  # it stays from one step to the next
    return run


def count_memory(run: f.Run, batch_size: int) -> tuple[float, float, float]:
    """GB that are always there, and GB more at the peak of a step's update and at that of decoding, without compiled blocks:
    what the operations of a `weightless_run` make."""
    pipe, x = run.pipe, torch.randn(batch_size, *run.latent_shape, device="meta")
    text, null_text = run.text([{"prompt": ""}] * batch_size), run.null_text
    weights = tensors_of(pipe.transformer) + tensors_of(pipe.vae)
    # Beside each number of the adapter there are its gradient, its average and two moments.
    always = sum(t.nbytes for t in weights) + 4 * sum(p.nbytes for p in run.parameters)
    with mock.patch.object(F, "scaled_dot_product_attention", flash_attention):
        with Allocations(weights + [p.grad for p in run.parameters]) as update:
            v_ref, *_ = f.reference_velocities(run, x[:, None], [0.5], text, null_text)
            log_prob, kl = f.score_step(run, x, x, 0.5, 0.4, text, null_text, v_ref)
            (log_prob + kl).sum().backward()
        with Allocations(weights) as decoding:
            f.decode(pipe.vae, x)
    return always / 1e9, update.peak / 1e9, decoding.peak / 1e9


def share_kept_when_compiled() -> float:
    """What autograd keeps of three of SD3.5's blocks for the backward pass if they are compiled, as a share of what it keeps
    if they are not; run on the CPU, in its own 16-bit format."""
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in known:
            known.add(tensor.untyped_storage()._cdata)
            kept[-1] += tensor.untyped_storage().nbytes()
        return tensor

    pipe = random_pipeline(SD35_TRANSFORMER | dict(num_layers=3, dual_attention_layers=(0,)), "cpu", torch.bfloat16)
    run = bare_run(pipe, f.Config())
    x, text = torch.randn(1, *run.latent_shape), run.null_text
    for compiled in (False, True):
        if compiled:
            for block in pipe.transformer.transformer_blocks:
                block.compile(dynamic=False)
        known = {t.untyped_storage()._cdata for t in tensors_of(pipe.transformer)}
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            f.predict_velocity(pipe.transformer, x, 0.5, text, text, 1.0)
    return kept[1] / kept[0]


def print_count(batch_sizes: list[int]) -> None:
    runs = [weightless_run(checkpointing) for checkpointing in (False, True)]
    flops, share = needed_flops(runs[0]), share_kept_when_compiled()
    print(f"SD3.5 Medium, 512x512. Needed per image: {flops[0] / 1e12:.3g} + {flops[1] / 1e12:.3g} TFLOP (rollout + update)")
    print(f"GB at the peak, counted on tensors without data. Compiled blocks keep {share:.0%} as much for the backward pass.")
    print("batch | as it is | compiled | with gradient checkpointing, not compiled")
    for n in batch_sizes:
        (always, update, decoding), (_, low_update, low_decoding) = (count_memory(run, n) for run in runs)
        peaks = max(update, decoding), max(share * update, decoding), max(low_update, low_decoding)
        print(f"{n:5} | " + " | ".join(f"{always + peak:8.1f}" for peak in peaks), flush=True)


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> float:
    """GB of the GPU since `reset_peak`; not a number on a CPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else math.nan


def now() -> float:
    synchronize()
    return time.perf_counter()


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def plain_velocity(transformer, x, t: float, text: f.Text, null_text: f.Text, guidance_scale: float):
    """As one would write it first: conditional and unconditional in one batch, both with a graph if there is one."""
    if guidance_scale == 1:
        return f.predict_velocity(transformer, x, t, text, null_text, 1.0)
    both = f.Text(*(torch.cat([e, n.expand_as(e)]) for e, n in zip(text, null_text)))
    conditional, unconditional = f.predict_velocity(transformer, x.repeat(2, 1, 1, 1), t, both, null_text, 1.0).chunk(2)
    return unconditional.detach() + guidance_scale * (conditional - unconditional.detach())


class PlainLoop:
    """Rollout and update as one would write them first. The `changes` that flow_grpo.py makes can be added one by one.

    Text is encoded for each batch (where there are encoders), images are judged one by one, the unconditional velocity has
    a graph, every sample is trained on, and nothing is compiled.
    """

    def __init__(self, run: f.Run, encoders: StableDiffusion3Pipeline | None, changes: Sequence[str] = ()):
        from rapidocr import RapidOCR

        self.run, self.encoders, self.changes, self.engine = run, encoders, changes, None
        if encoders is not None and "lines in parallel" not in changes:
            sized = {"Det.limit_type": "max", "Det.limit_side_len": run.config.width}
            self.engine = RapidOCR(params={"Global.log_level": "error"} | (sized if "detector sized" in changes else {}))

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> f.Text:
        config = self.run.config
        if self.encoders is None or "text once" in self.changes:
            return self.run.text([{"prompt": p} for p in prompts])
        embeds, _, pooled, _ = self.encoders.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=config.max_sequence_length
        )
        return f.Text(embeds, pooled)

    def judge(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        if self.engine is None:
            return f.score_images(self.run.reward, images, [{"prompt": p} for p in prompts])["reward"]
        rewards = []
        for image, prompt in zip(images, prompts):
            pixels = (image * 255).byte().permute(1, 2, 0).flip(-1).cpu().numpy()
            rewards.append(float("".join(self.engine(pixels).txts or ()) == f.quoted_text(prompt)))
        return torch.tensor(rewards)

    def epoch(self, number: int) -> dict[str, float]:
        """The seconds of each part."""
        run, config, device = self.run, self.run.config, self.run.pipe.device
        drawn = f.epoch_prompts(run.train_records, config, number)
        prompts = [r["prompt"] for r in drawn for _ in range(config.group_size)]
        times, seconds = f.schedule(run.pipe.scheduler, f.TRAIN_STEPS), {"rollout": 0.0, "scoring": 0.0, "update": 0.0}
        batches = []
        for i in range(0, len(prompts), config.batch_size):
            start, batch = now(), prompts[i : i + config.batch_size]
            text, empty = self.encode(batch), self.encode([""])
            path, log_probs = [torch.randn(len(batch), *run.latent_shape, device=device)], []
            with torch.no_grad():
                for t, t_next in zip(times, times[1:]):
                    v = plain_velocity(run.pipe.transformer, path[-1], t, text, empty, config.guidance_scale)
                    x, log_prob, _, _ = f.sde_step(v, path[-1], t, t_next, config.noise_level)
                    path.append(x)
                    log_probs.append(log_prob)
                images = f.decode(run.pipe.vae, path[-1])
            middle = now()
            batches.append((batch, path, log_probs, self.judge(images, batch)))
            seconds["rollout"] += middle - start
            seconds["scoring"] += now() - middle
        start = now()
        advantages = f.group_advantages(torch.cat([b[3] for b in batches]).view(-1, config.group_size)).flatten()
        for (batch, path, log_probs, _), advantage in zip(batches, advantages.to(device).split(config.batch_size)):
            text, empty = self.encode(batch), self.encode([""])
            for k in range(config.trained_steps):
                step = path[k], times[k], text, empty, config.guidance_scale
                kl = torch.zeros(len(batch), device=device)
                v = plain_velocity(run.pipe.transformer, *step)
                _, log_prob, mean, std = f.sde_step(v, path[k], times[k], times[k + 1], config.noise_level, path[k + 1])
                if config.beta > 0:
                    with torch.no_grad(), f.reference(run.pipe.transformer):
                        v_ref = plain_velocity(run.pipe.transformer, *step)
                    ref_mean = f.sde_step(v_ref, path[k], times[k], times[k + 1], config.noise_level, path[k + 1])[2]
                    kl = f.gaussian_kl(mean, ref_mean, std)
                loss, _ = f.grpo_loss(log_prob, log_probs[k], advantage, kl, config.clip_range, config.beta)
                run.scaler.scale(loss).backward()
        run.scaler.unscale_(run.optimizer)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad()
        seconds["update"] = now() - start
        return seconds | {"epoch": sum(seconds.values())}


def our_epoch(run: f.Run, number: int) -> dict[str, float]:
    """An epoch of flow_grpo.py: the seconds of each part, and how far the first update's ratios are from 1."""
    run.epoch, generator, start = number, torch.Generator(run.pipe.device).manual_seed(number), now()
    samples, seconds = f.collect(run, generator)
    middle = now()
    stats = f.update(run, samples, generator)
    end = now()
    scoring = seconds["seconds_scoring"]
    return {"rollout": middle - start - scoring, "scoring": scoring, "update": end - middle, "epoch": end - start,
            "deviation": stats["ratio_deviation"]}  # fmt: skip


def measure(loop: Callable[[int], dict], run: f.Run, repetitions: int, needed: int, peak_rate: float) -> str:
    """The columns of the table: two micro-batches of rollout and update, after one repetition to warm up."""
    reset_peak()
    epochs = [loop(i) for i in range(repetitions + 1)][1:]
    images = run.config.group_size
    seconds = statistics.median(e["epoch"] for e in epochs)
    rate = images * needed / seconds
    columns = [spread([images / e[part] for e in epochs]) for part in ("rollout", "update", "epoch")]
    deviation = max(e.get("deviation", math.nan) for e in epochs)
    return " | ".join(f"{c:21}" for c in columns) + (
        f" | {peak_memory():7.1f} | {rate / 1e12:7.3g} | {rate / peak_rate:5.0%} | {deviation:9.1e}"
        f" | {seconds / images * 48 * 24 / 60:8.1f}"
    )


def table(make_run: Callable[..., f.Run], batch_sizes: list[int], repetitions: int, peak_rate: float) -> None:
    """A line for each loop and batch size."""
    print(f"{'loop':26} | batch | rollout images/s      | update images/s       | both images/s         | peak GB | TFLOP/s | "
          "share | ratio - 1 | minutes for 48 x 24")  # fmt: skip
    rows = {
        "plain": {},
        "flow_grpo": {},
        "flow_grpo, compiled": {"compile": True},
        "compiled, checkpointing": {"compile": True, "gradient_checkpointing": True},
    }
    needed = None
    for batch_size in batch_sizes:
        for name, switches in rows.items():
            try:
                run = make_run(batch_size, **switches)
                needed = needed or needed_flops(run)
                loop = PlainLoop(run, None).epoch if name == "plain" else functools.partial(our_epoch, run)
                columns = measure(loop, run, repetitions, sum(needed), peak_rate)
            except Exception as e:
                if not f.out_of_memory(e):
                    raise
                columns = "out of memory"
            print(f"{name:26} | {batch_size:5} | {columns}", flush=True)
            run = loop = None
            torch.compiler.reset()
            torch.compiler.set_stance("default")  # else one failure to compile would last
            gc.collect()  # a compiled block refers to itself
            torch.cuda.empty_cache()
    if needed:
        print(f"needed per image: {' + '.join(f'{n / 1e12:.3g}' for n in needed)} TFLOP (rollout + update)")


def compare_with_plain_loop(repetitions: int) -> None:
    """Epochs of the embedded model's default run as a plain loop, with the changes that lead from it to flow_grpo.py."""
    config = embedded_config()
    device, dtype = f.device_and_dtype()
    run, encoders = f.prepare(config), f.load_pipeline(config, dtype).to(device)
    compiled = f.prepare(dataclasses.replace(config, compile=True))
    loops = {
        "plain loop": PlainLoop(run, encoders).epoch,
        "+ text detector sized to the signs": PlainLoop(run, encoders, ["detector sized"]).epoch,
        "+ text encoded once": PlainLoop(run, encoders, ["detector sized", "text once"]).epoch,
        "+ signs read as lines, in parallel": PlainLoop(run, encoders, ["text once", "lines in parallel"]).epoch,
        "flow_grpo: judged meanwhile": functools.partial(our_epoch, run),
        "flow_grpo --compile": functools.partial(our_epoch, compiled),
    }
    epochs = [{name: loop(i) for name, loop in loops.items()} for i in range(repetitions + 1)][1:]  # in turn: all drift alike
    print(f"\nSeconds an epoch of {config.prompts_per_epoch} x {config.group_size} images, medians of {repetitions}:")
    parts = "rollout", "scoring", "update", "epoch"
    print(f"{'':36}" + "".join(f"{name:>22}" for name in parts))
    for name in loops:
        print(f"{name:36}" + "".join(f"{spread([e[name][part] for e in epochs]):>22}" for part in parts))


def profile(run: f.Run) -> None:
    """Where the time of one rollout and update goes."""
    our_epoch(run, 0)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        our_epoch(run, 1)
    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=60))


def embedded_config() -> f.Config:
    return f.Config(prompt_file=str(f.TINY.parent / "prompts.txt"), model=str(f.TINY), reward="ocr", **f.LAPTOP)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["sd3.5-medium", "small", "tiny-sd3"], default="sd3.5-medium",
                        help="`small` takes a GPU's path, in half precision, at a size that a CPU can run: a check of it")  # fmt: skip
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="default: 1 2 4 8; 48 96 192 for tiny-sd3")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="show where the time goes instead, by kernel")
    parser.add_argument("--count", action="store_true", help="count SD3.5 Medium's memory instead, without a GPU")
    args = parser.parse_args()
    diffusers_logging.set_verbosity_error()  # it warns at each change of precision
    if args.count:
        return print_count(args.batch_sizes or [1, 2, 4, 8, 16])
    if args.model == "sd3.5-medium" and not torch.cuda.is_available():
        sys.exit("error: no CUDA GPU was found, which SD3.5 Medium needs: use --model tiny-sd3, --model small or --count")
    device, dtype = f.device_and_dtype()
    if args.model == "small":
        dtype = torch.float16
        f.device_and_dtype = lambda: (device, dtype)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    peak_rate = matmul_rate(device)
    print(f"{args.model} in {dtype} on {name}, torch {torch.__version__}; matrix product: {peak_rate / 1e12:.3g} TFLOP/s")
    if args.model == "tiny-sd3":
        config, shape = embedded_config(), None
    else:
        small = args.model == "small"
        shape = SMALL_TRANSFORMER if small else SD35_TRANSFORMER
        config = dataclasses.replace(f.Config(), **(dict(height=64, width=64, max_sequence_length=8) if small else {}))

    def make_run(batch_size: int, **switches: bool) -> f.Run:
        ours = dataclasses.replace(
            config, batch_size=batch_size, prompts_per_epoch=1, group_size=2 * batch_size, updates_per_epoch=1,
            **{"compile": False} | switches,
        )  # fmt: skip
        run = f.prepare(ours) if shape is None else random_run(shape, ours)
        run.reward = [f.Part("random", 1.0, random_reward)]
        return run

    if args.profile:
        return profile(make_run((args.batch_sizes or [config.batch_size])[0], compile=device == "cuda"))
    batch_sizes = args.batch_sizes or ([48, 96, 192] if args.model == "tiny-sd3" else [1, 2, 4, 8])
    table(make_run, batch_sizes, args.repetitions, peak_rate)
    if args.model == "tiny-sd3":
        compare_with_plain_loop(args.repetitions)


if __name__ == "__main__":
    main()
