"""Flow-GRPO in one file: online reinforcement learning for flow-matching image models.

It fine-tunes Stable Diffusion 3.5 Medium with LoRA or, where there is no GPU, the small SD3 in tiny-sd3/:

    python flow_grpo.py --prompt-file prompts.txt

[P] Liu et al., Flow-GRPO: Training Flow Matching Models via Online RL, arXiv 2505.05470, and
[C] the authors' code, yifan123/flow_grpo, are named where the code follows them.

Shapes: B images in a batch, each latent [C, H, W]; T denoising steps; P prompts with G images each (a group).
Times: t = 1 is noise and t = 0 the image, x_t = (1 - t) x_0 + t x_1, and velocity = x_1 - x_0.
"""

import argparse
import copy
import json
import math
import os
import re
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from random import Random
from runpy import run_path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import cpu_offload_with_hook
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import EMAModel, cast_training_params
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model_state_dict
from rapidfuzz.distance import Levenshtein
from rapidocr import RapidOCR
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import save_image
from tqdm import tqdm

TRAIN_STEPS, EVAL_STEPS = 10, 40  # denoising reduction [P]: few steps to learn from, many to judge by
HERE, SD35 = Path(__file__).resolve().parent, "stabilityai/stable-diffusion-3.5-medium"
DIVERGED = "training diverged, so start a new run with a lower --learning-rate"
OUT_OF_MEMORY = "out of memory: give --gradient-checkpointing or a lower --batch-size"
Text = tuple[Tensor, Tensor]  # N encoded prompts in the network's dtype: embeds [N, L, D], pooled [N, D']
bar = partial(tqdm, unit="image", disable=None, leave=False)


# ---- The method. These five functions need torch alone: copy them.
def sde_step(
    velocity: Tensor, x: Tensor, t: float | Tensor, t_next: float | Tensor, noise_level: float,
    x_next: Tensor | None = None, generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """One denoising step as a Gaussian policy: Euler-Maruyama on the SDE with the flow's marginals [P].

    dx = [v + sigma_t^2 / (2t) (x + (1 - t) v)] dt + sigma_t dw,   sigma_t = noise_level * sqrt(t / (1 - t))

    Args:
        velocity, x: [B, C, H, W], the network's output at (x, t), and x. Gradients flow to `velocity`.
        t, t_next: floats or [B], 0 <= t_next < t <= 1.
        noise_level: `a` in the paper; 0 gives the Euler step of the ODE, which draws no noise.
        x_next: [B, C, H, W], a sample to score. Without it one is drawn, on the generator's device.
    Returns, in float32: x_next [B, C, H, W]; log_prob [B], averaged over elements as in [C], or 0 for the
        ODE, which has no density; mean [B, C, H, W]; std, broadcastable to x, sigma_t * sqrt(|dt|).
    """
    velocity, x = velocity.float(), x.float()
    t, t_next = (torch.as_tensor(s, dtype=x.dtype, device=x.device).view(-1, 1, 1, 1) for s in (t, t_next))
    dt = t_next - t
    # t = 1 would divide by zero: [C] takes 1 - t_next in place of 1 - t there, for the noise scale alone.
    sigma = noise_level * torch.sqrt(t / (1 - torch.where(t == 1, t_next, t)))
    mean = x + (velocity + sigma**2 / (2 * t) * (x + (1 - t) * velocity)) * dt
    std = sigma * torch.sqrt(-dt)
    if noise_level == 0:
        return (mean if x_next is None else x_next).detach().float(), x.new_zeros(len(x)), mean, std
    if x_next is None:
        device = x.device if generator is None else generator.device
        x_next = mean + std * torch.randn(x.shape, generator=generator, device=device).to(x.device)
    x_next = x_next.detach().float()  # A sample is data: log_prob's gradient goes through the mean alone.
    log_prob = -((x_next - mean) ** 2) / (2 * std**2) - std.log() - math.log(2 * math.pi) / 2
    return x_next, log_prob.mean(dim=(1, 2, 3)), mean, std


def rollout(
    velocity: Callable[[Tensor, int], Tensor], x: Tensor, times: Sequence[float],
    noise_level: float | Sequence[float], generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Denoise by T steps of the policy [P]. With noise level 0 this is the plain Euler sampler of the ODE.

    Args:
        velocity: called as velocity(x, k) -> [B, C, H, W], the network's output at the latent x and times[k].
        x: [B, C, H, W], noise at times[0].
        times: [T + 1], falling from 1 to 0.
        noise_level: of every step, or T of them, one for each.
    Returns latents [B, T + 1, C, H, W], from the noise to the image, and the steps' log_probs [B, T].
    """
    levels = noise_level if isinstance(noise_level, Sequence) else [noise_level] * (len(times) - 1)
    latents, log_probs = [x.float()], []
    for k, (t, t_next, level) in enumerate(zip(times[:-1], times[1:], levels, strict=True)):
        v = velocity(latents[-1], k).detach()
        x, log_prob, _, _ = sde_step(v, latents[-1], t, t_next, level, generator=generator)
        latents.append(x)
        log_probs.append(log_prob)
    return torch.stack(latents, 1), torch.stack(log_probs, 1)


def group_advantages(rewards: Tensor, global_std: bool = True, eps: float = 1e-4, clip: float = 5) -> Tensor:
    """Advantages relative to the group [P]: (r - mean of its group) / (std + eps), clipped to +-clip [C].

    rewards: [P, G], G images of each of P prompts. Returns [P, G]; a group of equal rewards gets exact zeros.
    global_std: divide by the std of all rewards, as [C] does, or by the group's own, as [P] writes.
    """
    r = rewards.double()  # in which the mean of equal rewards is exact
    std = r.std(correction=0) if global_std else r.std(dim=1, correction=0, keepdim=True)
    return ((r - r.mean(dim=1, keepdim=True)) / (std + eps)).clamp(-clip, clip).to(rewards.dtype)


def gaussian_kl(mean: Tensor, ref_mean: Tensor, std: Tensor) -> Tensor:
    """KL between N(mean, std^2) and N(ref_mean, std^2) [P], averaged over the elements as in [C].

    mean, ref_mean: [B, C, H, W]; std: broadcastable to them. Returns [B].
    """
    return ((mean - ref_mean) ** 2 / (2 * std**2)).mean(dim=(1, 2, 3))


def grpo_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, kl: Tensor, clip_range: float, beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate with a KL penalty [P], for one denoising step of B images.

    Tensors are [B]; `old_log_prob` is the sampling policy's. Returns the scalar loss and, as means over B,
    ratio_mean, clipfrac, approx_kl (to the sampling policy), policy_loss, kl.
    """
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    policy_loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
    with torch.no_grad():
        stats = {
            "ratio_mean": ratio.mean(),
            "clipfrac": ((ratio - 1).abs() > clip_range).float().mean(),
            # The low-variance estimate (ratio - 1) - log_ratio would cancel to 0 at ratios this near to 1.
            "approx_kl": 0.5 * (log_ratio**2).mean(),
            "policy_loss": policy_loss.detach(),
            "kl": kl.detach().mean(),
        }
    return policy_loss + beta * kl.mean(), stats


# ---- Sampling with SD3. Rollout and update share `predict_velocity`: so the first update's ratios are 1.
def rows(text: Text, indices: Sequence[int], device) -> Text:
    return tuple(e[list(indices)].to(device) for e in text)


def predict_velocity(transformer, x: Tensor, t: float, text: Text, null_text: Text, guidance_scale: float):
    """The network's velocity [B, C, H, W] at x and time t with classifier-free guidance, in float32.

    The unconditional velocity is a constant to the gradient, as in [C], so it needs no graph.
    """

    def predict(embeds: Tensor, pooled: Tensor) -> Tensor:
        timestep = torch.full((len(x),), 1000 * t, device=x.device)
        return transformer(x.to(embeds.dtype), embeds, pooled, timestep, return_dict=False)[0].float()

    conditional = predict(*text)
    if guidance_scale == 1:
        return conditional
    with torch.no_grad():
        unconditional = predict(*(e.expand(len(x), *e.shape[1:]) for e in null_text))
    return unconditional + guidance_scale * (conditional - unconditional)


def schedule(scheduler, steps: int) -> list[float]:
    """The scheduler's times [steps + 1], from 1 to 0."""
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.tolist()


@torch.no_grad()
def decode(vae, latents: Tensor) -> Tensor:
    """Latents [B, C, H, W] to images [B, 3, H', W'] in 0..1, float32."""
    z = (latents / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)
    return (vae.decode(z, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)


# ---- Training. An epoch is `collect` and `update`; the `run` that all functions share is made by `prepare`.
class Samples(NamedTuple):
    """An epoch's N = P * G images, prompt by prompt; S of their T steps had noise. On the CPU."""

    records: list[dict]  # [N], the prompts' records
    text: Text  # [P]
    times: list[float]  # [S + 1]
    latents: Tensor  # [N, S + 1, C, H, W]
    log_probs: Tensor  # [N, S], under the policy that drew them
    columns: dict[str, Tensor]  # [N] each: `reward`, and what it is made of


def velocity_along(run, times: list[float], text: Text) -> Callable[[Tensor, int], Tensor]:
    transformer, null_text, guidance_scale = run.pipe.transformer, run.null_text, run.config.guidance_scale
    return lambda x, k: predict_velocity(transformer, x, times[k], text, null_text, guidance_scale)


def full(batch: Sequence[int], size: int) -> list[int]:
    """A batch repeated or cut to `size`. Repeats don't count, but keep the size, for equal rounding."""
    return [batch[i % len(batch)] for i in range(size)]


def collect(run, generator: torch.Generator) -> Samples:
    """Draw G images for each prompt of the epoch and score them, judging a batch while the next is drawn."""
    config, device = run.config, run.device
    shuffled = Random(f"{config.seed} {run.epoch}").sample(run.train_records, len(run.train_records))
    prompts = full(shuffled, config.prompts_per_epoch)
    records = [r for r in prompts for _ in range(config.group_size)]
    text = encode(run.pipe, [r["prompt"] for r in prompts], config.max_sequence_length, device)
    times, latents, log_probs, scores = schedule(run.pipe.scheduler, TRAIN_STEPS), [], [], []
    # `sde_steps` steps in a row, of the first `sde_range`, have noise and are trained; others are the ODE's.
    # By default, the last step is left out, as in [C]: rounding would dominate so narrow a policy's ratio.
    places = config.sde_range - config.sde_steps + 1
    first = int(torch.randint(places, (1,), generator=generator, device=device))
    last = first + config.sde_steps
    levels = [config.noise_level if first <= k < last else 0.0 for k in range(TRAIN_STEPS)]
    with ThreadPoolExecutor(1) as judge, bar(total=len(records), desc="rollout") as progress:
        for i in range(0, len(records), config.batch_size):
            batch = range(len(records))[i : i + config.batch_size]
            shown = rows(text, [j // config.group_size for j in full(batch, config.batch_size)], device)
            noise = torch.randn(config.batch_size, *run.latent_shape, generator=generator, device=device)
            # Compiled, the network has other kernels without a graph: for the update's, build and drop one.
            with torch.set_grad_enabled(config.compile):
                velocity = velocity_along(run, times, shown)
                path, log_prob = rollout(velocity, noise, times, levels, generator)
            images = decode(run.pipe.vae, path[: len(batch), -1])
            latents.append(path[: len(batch), first : last + 1].cpu())
            log_probs.append(log_prob[: len(batch), first:last].cpu())
            for score in scores[-1:]:
                score.result()  # So at most one batch waits. This raises what its judge raised.
            scores.append(judge.submit(score_images, run.rewards, images, [records[j] for j in batch]))
            progress.update(len(batch))
        columns = concatenated([score.result() for score in scores])
    return Samples(records, text, times[first : last + 1], torch.cat(latents), torch.cat(log_probs), columns)


def update(run, samples: Samples, generator: torch.Generator) -> dict[str, float]:
    """The epoch's optimiser steps, all but the first off-policy. Returns the mean statistics of the loss."""
    config, times, device, transformer = run.config, samples.times, run.device, run.pipe.transformer
    advantages = group_advantages(samples.columns["reward"].view(-1, config.group_size)).flatten()
    # As in [C], samples without an advantage are dropped one by one, and the means below are over those that
    # are left. So the policy's term is N / kept times as large as in [P], and a mastered prompt feels no KL.
    kept = advantages.nonzero().flatten()
    kept = kept[torch.randperm(len(kept), generator=generator, device=device).cpu()]  # the generator's device
    chunks = [chunk for chunk in kept.tensor_split(config.updates_per_epoch) if len(chunk)]
    steps, totals, norms, deviations = range(len(times) - 1), {}, [], []
    with bar(total=len(kept), desc="update") as progress:
        for chunk in chunks:
            for micro_batch in chunk.split(config.batch_size):
                n, batch = len(micro_batch), full(micro_batch.tolist(), config.batch_size)
                text = rows(samples.text, [j // config.group_size for j in batch], device)
                latents, old_log_probs = (s[batch].to(device) for s in (samples.latents, samples.log_probs))
                advantage = advantages[micro_batch].to(device)
                velocity = velocity_along(run, times, text)
                if config.beta > 0:  # The reference is the base model: the same network with its adapter off.
                    transformer.disable_adapters()
                    with torch.no_grad():
                        ref_velocities = [velocity(latents[:, k], k) for k in steps]
                    transformer.enable_adapters()
                for k in steps:
                    transition = latents[:, k], times[k], times[k + 1], config.noise_level, latents[:, k + 1]
                    _, log_prob, mean, std = sde_step(velocity(latents[:, k], k), *transition)
                    log_prob, old = log_prob[:n], old_log_probs[:n, k]
                    kl = torch.zeros_like(log_prob)
                    if config.beta > 0:
                        _, _, ref_mean, _ = sde_step(ref_velocities[k], *transition)
                        # The factor |dt| is not in [P]. [C] leaves |dt| out of the variance, and published
                        # betas are for that: late steps, with little noise, count more, so images stay good.
                        # Without it, the KL is 25 (first step) to 4 times as large: take a tenth of beta.
                        kl = gaussian_kl(mean, ref_mean, std)[:n] * (times[k] - times[k + 1])
                    loss, stats = grpo_loss(log_prob, old, advantage, kl, config.clip_range, config.beta)
                    weight = n / len(chunk) / len(steps)  # `loss` is a mean over n, the objective over all
                    run.scaler.scale(loss * weight).backward()
                    for name, value in stats.items():
                        totals[name] = totals.get(name, 0) + value * weight / len(chunks)
                    if not norms:  # Before the first optimiser step, a ratio other than 1 is numerical error.
                        deviations.append((log_prob.detach() - old).expm1().abs().max())
                progress.update(n)
            norms.append(optimizer_step(run))
    finite = [norm for norm in norms if math.isfinite(norm)]
    totals |= {"grad_norm": sum(finite) / max(1, len(finite)), "skipped_updates": len(norms) - len(finite)}
    totals |= {"ratio_deviation": max(deviations, default=0), "trained": len(kept) / len(advantages)}
    return {name: float(value) for name, value in totals.items()}


def optimizer_step(run) -> float:
    """Step along the gradient; average the adapter when due. Returns the gradient's norm. If it is infinite,
    the loss scale was too large: the scaler skips the step, which is no update. UserError at scale 1."""
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.parameters, 1.0).item()
    if not math.isfinite(norm) and run.scaler.get_scale() <= 1:
        raise UserError(f"the gradient is not finite: {DIVERGED}")
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    if math.isfinite(norm):
        run.updates += 1
        if run.updates % run.config.ema_interval == 0:
            run.ema.optimization_step = run.updates  # The decay warms up by optimiser steps, as in [C].
            run.ema.step(run.parameters)
    return norm


@torch.no_grad()
def evaluate(run) -> tuple[dict[str, float], Tensor]:
    """Draw as one deploys: 40 ODE steps, the averaged adapter. Returns metrics and the first 16 images."""
    size, times, scores, shown = run.config.batch_size, schedule(run.pipe.scheduler, EVAL_STEPS), [], []
    run.ema.store(run.parameters)
    run.ema.copy_to(run.parameters)
    with bar(total=len(run.eval_records), desc="evaluation") as progress:
        for i in range(0, len(run.eval_records), size):
            records = run.eval_records[i : i + size]
            batch = full(range(i, i + len(records)), size)
            text = rows(run.eval_text, batch, run.device)
            # The n-th prompt has seed n. Its noise is what the stock pipeline draws from such a generator.
            seeds = [torch.Generator().manual_seed(n) for n in batch]
            noise = [torch.randn(1, *run.latent_shape, generator=g, dtype=text[0].dtype) for g in seeds]
            velocity = velocity_along(run, times, text)
            latents, _ = rollout(velocity, torch.cat(noise).to(run.device), times, 0.0)
            images = decode(run.pipe.vae, latents[: len(records), -1])
            scores.append(score_images(run.rewards, images, records))
            shown.append(images[: max(0, 16 - i)].cpu())
            progress.update(len(records))
    run.ema.restore(run.parameters)
    means = averages(concatenated(scores), run.eval_records)
    return {f"eval_{name}": mean for name, mean in means.items()}, torch.cat(shown)


def train(run, out: Path) -> None:
    """Epochs of rollout, scoring and update, with evaluations before, on the way and at the end."""
    config, writer = run.config, SummaryWriter(out / "tensorboard", purge_step=run.epoch + 1)
    epochs = tqdm(total=config.epochs, initial=run.epoch, desc="epochs", unit="epoch", disable=None)
    with epochs as progress, writer as tensorboard:
        while True:
            due = run.epoch % config.eval_every == 0 or run.epoch >= config.epochs
            if due and not any(m["epoch"] == run.epoch and "eval_reward" in m for m in run.metrics):
                metrics, images = evaluate(run)
                images = F.interpolate(images, scale_factor=max(1, 128 // images.shape[-1]))
                grid = partial(save_image, images, format="png", nrow=4, padding=0)
                atomic(out / "samples" / f"epoch_{run.epoch:05}.png", grid)
                log(run, metrics, out, tensorboard)
            if run.epoch >= config.epochs:
                break
            # Each epoch has a generator of its own, so a checkpoint holds nothing about randomness.
            generator = torch.Generator(run.device).manual_seed(config.seed * 1_000_003 + run.epoch)
            start = time.perf_counter()
            samples = collect(run, generator)
            middle = time.perf_counter()
            stats = update(run, samples, generator) | {"reward_std": samples.columns["reward"].std().item()}
            stats |= {"seconds_rollout": middle - start, "seconds_update": time.perf_counter() - middle}
            run.epoch += 1
            log(run, averages(samples.columns, samples.records) | stats, out, tensorboard)
            progress.update()


# ---- The model: a diffusers pipeline whose transformer carries a LoRA adapter.
def load_pipeline(model: str) -> StableDiffusion3Pipeline:
    """The pipeline on the CPU; for a GPU in half precision, but for the autoencoder, which could overflow."""
    dtypes = {"default": torch.float16 if torch.cuda.is_available() else torch.float32, "vae": torch.float32}
    try:
        parts = StableDiffusion3Pipeline.load_config(model)
        absent = {name: None for name, part in parts.items() if part == [None, None]}  # T5, as a rule
        return StableDiffusion3Pipeline.from_pretrained(model, dtype=dtypes, **absent)
    except Exception as e:  # The libraries raise many kinds.
        raise UserError(f"the model {model} can't be loaded: {why(e)}; check --model") from e


def prepare(config, pipe, rewards: list[tuple], train: list[dict], held_out: list[dict], state=None):
    """Add the adapter. Returns the `run` of the functions above, or a checkpoint's. UserError if unfit."""
    transformer, scale = pipe.transformer, pipe.vae_scale_factor
    unit, most = scale * pipe.patch_size, scale * pipe.patch_size * transformer.config.pos_embed_max_size
    if any(size % unit or size > most for size in (config.height, config.width)):
        raise UserError(f"{config.model} needs --height and --width in multiples of {unit}, at most {most}")
    encoders = list(filter(None, (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)))
    for module in (transformer, pipe.vae, *encoders):
        module.requires_grad_(False).eval()
    torch.manual_seed(config.seed)
    # As in [C], the second attention of some of SD3.5's blocks (`attn2`) stays without an adapter.
    names = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    lora = dict(r=config.lora_rank, lora_alpha=2 * config.lora_rank, init_lora_weights="gaussian")
    transformer.add_adapter(LoraConfig(**lora, target_modules=[f"attn.{name}" for name in names]))
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    cast_training_params(transformer, torch.float32)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
        pipe.vae.enable_slicing()  # Decoding would need the most memory otherwise.
    if config.compile:
        torch.compiler.config.recompile_limit = 64  # kinds of blocks; adapter on or off; a graph or none
        torch.autograd.set_multithreading_enabled(False)  # The limit is this thread's alone.
        for block in transformer.transformer_blocks:
            block.compile(dynamic=False)
    device, hook = torch.device("cuda" if torch.cuda.is_available() else "cpu"), None
    transformer.to(device)
    pipe.vae.to(device)
    torch.set_float32_matmul_precision("high")  # for the adapter: TF32 has as many digits as float16
    for encoder in encoders if device.type == "cuda" else ():  # They visit the GPU one at a time.
        _, hook = cpu_offload_with_hook(encoder, device, hook)
    # A log_prob is a mean over 65,536 elements, and a micro-batch is one of many: so small, gradients would
    # underflow in half precision, those of the first steps even at the usual scale of 2^16.
    scaler = torch.amp.GradScaler(device.type, 2.0**20, enabled=transformer.dtype == torch.float16)
    optimizer = torch.optim.AdamW(parameters, config.learning_rate, weight_decay=1e-4)
    null_text = rows(encode(pipe, [""], config.max_sequence_length, device), [0], device)
    eval_text = encode(pipe, [r["prompt"] for r in held_out], config.max_sequence_length, device)
    shape = transformer.config.in_channels, config.height // scale, config.width // scale
    run = SimpleNamespace(
        config=config, pipe=pipe, rewards=rewards, train_records=train, eval_records=held_out, device=device,
        latent_shape=shape, null_text=null_text, eval_text=eval_text, epoch=0, updates=0, metrics=[],
        parameters=parameters, ema=EMAModel(parameters, decay=0.9), optimizer=optimizer, scaler=scaler,
    )  # fmt: skip
    if state:
        if [p.shape for p in parameters] != [p.shape for p in state["parameters"]]:
            raise UserError(f"the checkpoint doesn't fit {config.model}: give the run's own model by --model")
        run.epoch, run.updates, run.metrics = state["epoch"], state["updates"], state["metrics"]
        for p, saved in zip(parameters, state["parameters"]):
            p.data.copy_(saved)
        for name in ("ema", "optimizer", "scaler"):
            getattr(run, name).load_state_dict(state[name] or getattr(run, name).state_dict())
        run.ema.to(device)
    return run


@torch.no_grad()
def encode(pipe, prompts: list[str], max_sequence_length: int, device) -> Text:
    """Encode N prompts on the device, each different one once. Returns Text [N] on the CPU."""
    unique, encoded = list(dict.fromkeys(prompts)), []
    for i in range(0, len(unique), 64):
        batch = unique[i : i + 64], None, None, device, 1, False  # one image a prompt, no negative prompt
        embeds, _, pooled, _ = pipe.encode_prompt(*batch, max_sequence_length=max_sequence_length)
        encoded.append([e.to("cpu", pipe.transformer.dtype) for e in (embeds, pooled)])
    for encoder in filter(None, (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)):
        encoder.to("cpu")
    place = {prompt: i for i, prompt in enumerate(unique)}
    return rows(tuple(map(torch.cat, zip(*encoded))), [place[p] for p in prompts], "cpu")


# ---- Rewards: functions of images [B, 3, H, W] in 0..1, prompts and their records. They return B numbers, or
# named columns of them, the first of which is the reward. OCR is here; the folder rewards/ has more.
def quoted_text(record: dict) -> str:
    """The first double-quoted text in a record's prompt, ignoring blank ones. ValueError if there is none."""
    texts = [text for text in re.findall(r'["“]([^"“”]*)["”]', record["prompt"]) if text.strip()]
    if not texts:
        raise ValueError(f'ocr needs a text in double quotes, as in: a sign "407"; got: {record["prompt"]}')
    return texts[0]


@cache
def ocr_engine(height: int, width: int) -> RapidOCR:
    """PP-OCR on onnxruntime, set up for images of this size. The models are in rapidocr's wheel."""
    params = {"Global.log_level": "error", "EngineConfig.onnxruntime.intra_op_num_threads": 1}
    # A small image is read as one line. By default, PP-OCR would enlarge images to 736 pixels to find text.
    params |= {"Global.use_det": height > 64, "Global.use_cls": False, "Rec.rec_img_shape": [3, 48, 48]}
    return RapidOCR(params=params | {"Det.limit_type": "max", "Det.limit_side_len": max(height, width)})


def ocr_reward(images: Tensor, prompts: list[str], metadata: list[dict]) -> dict[str, list[float]]:
    """Text rendering [P]: `ocr`, 1 - edit distance / length of the quoted text, without spaces and case, at
    least 0; and `ocr_accuracy`, 1 where the text is read exactly, or within a longer one."""
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).flip(-1).cpu().numpy()  # BGR, as in OpenCV
    engine, scores = ocr_engine(*pixels.shape[1:3]), []
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # onnxruntime releases the GIL
        readings = ["".join(result.txts or ()) for result in pool.map(engine, pixels)]
    for prompt, reading in zip(prompts, readings):
        target, text = ("".join(s.split()).lower() for s in (quoted_text({"prompt": prompt}), reading))
        distance = 0 if target in text else Levenshtein.distance(text, target)
        scores.append(1 - min(distance, len(target)) / len(target))
    return {"ocr": scores, "ocr_accuracy": [float(score == 1) for score in scores]}


def load_rewards(text: str) -> list[tuple[str, float, Callable, Callable]]:
    """The parts of --reward: name, weight, function, and check, which raises ValueError for a record that the
    function can't judge. A name alone is short for rewards/NAME.py:reward, but `ocr` is in this file."""
    rewards = []
    for part in text.split(","):
        source, _, weight = part.strip().partition("=")
        path, _, function = source.rpartition(":") if ":" in source else (f"{source}.py", "", "reward")
        name = f"{Path(path).stem}.{function}" if ":" in source else source
        try:
            if name in [reward[0] for reward in rewards] or not math.isfinite(float(weight or 1)):
                raise ValueError("write each reward once, with a finite weight, as in geneval=0.7,ocr=0.3")
            functions = ocr_reward, quoted_text
            if source != "ocr":
                module = run_path(path if ":" in source else HERE / "rewards" / path, run_name=name)
                functions = module[function], module.get("check", lambda record: None)
        except (Exception, SystemExit) as e:
            known = "give ocr, path/to/file.py:function, or geneval, pickscore or clipscore of rewards/"
            raise UserError(f"the reward '{part.strip()}' can't be loaded: {why(e)}; {known}") from e
        rewards.append((name, float(weight or 1), *functions))
    return rewards


@torch.no_grad()
def score_images(rewards: list[tuple], images: Tensor, records: list[dict]) -> dict[str, Tensor]:
    """Columns [B] on the CPU: `reward`, the weighted sum, and its parts'. UserError if any isn't finite."""
    if not images.isfinite().all():
        raise UserError(f"an image is not finite: {DIVERGED}")
    prompts, columns = [r["prompt"] for r in records], {"reward": torch.zeros(len(records))}
    for name, weight, function, _ in rewards:
        try:  # with copies, which the function may change as it likes
            result = function(images.clone(), list(prompts), copy.deepcopy(records))
            result = result if isinstance(result, dict) and result else {name: result}
            result = {key: torch.as_tensor(value).detach().float().cpu() for key, value in result.items()}
        except (Exception, SystemExit) as e:
            raise UserError(f"the reward {name} failed at the prompt '{prompts[0]}': {why(e)}") from e
        for key, value in result.items():
            bad = [prompt for prompt, v in zip(prompts, value.flatten()) if not v.isfinite()]
            if bad or value.shape != (len(records),) or key in columns:
                got = f"the reward {name} returned {key} {value.tolist()!s:.99} for '{(bad or prompts)[0]}'"
                raise UserError(f"{got}: mend it to return {len(records)} finite numbers, named apart")
        columns = columns | result | {"reward": columns["reward"] + weight * next(iter(result.values()))}
    return columns


def concatenated(scores: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([score[name] for score in scores]) for name in scores[0]}


def averages(columns: dict[str, Tensor], records: list[dict]) -> dict[str, float]:
    """Each column's mean; if the records have tags, also by tag, and the mean over tags as NAME/overall."""
    means = {name: column.mean().item() for name, column in columns.items()}
    tags = [str(r["tag"]) for r in records if "tag" in r]
    for name, column in columns.items() if len(tags) == len(records) else ():
        by_tag = {tag: column[[t == tag for t in tags]].mean().item() for tag in dict.fromkeys(tags)}
        means |= {f"{name}/{tag}": mean for tag, mean in by_tag.items()}
        means[f"{name}/overall"] = sum(by_tag.values()) / len(by_tag)
    return means


# ---- Settings and prompts.
SETTINGS = {  # the default, which is the published recipe for SD3.5; tiny-sd3's; the least value; what it is
    "prompt_file": ("", "", None, "prompts: .txt, one a line, or .jsonl, a record with `prompt` a line"),
    "eval_prompt_file": ("", "", None, "prompts to evaluate on; without it, some of the others are held out"),
    "output_dir": ("", "", None, "folder of the run; without it, a new one in runs/"),
    "model": ("", "", None, "hub name or folder; without it, SD3.5 Medium with a GPU, else tiny-sd3"),
    "reward": ("ocr", "ocr", None, "or geneval, pickscore, clipscore, file.py:function, geneval=0.7,ocr=0.3"),
    "epochs": (500, 60, 1, "rounds of rollout and update"),
    "prompts_per_epoch": (48, 12, 1, "prompts in an epoch"),
    "group_size": (24, 16, 2, "images for each prompt, compared with each other"),
    "updates_per_epoch": (2, 2, 1, "optimiser steps an epoch; all but the first are off-policy"),
    "batch_size": (4, 48, 1, "images in one forward pass: the fewer, the less memory"),
    "learning_rate": (3e-4, 3e-3, 1e-12, "of AdamW"),
    "beta": (0.04, 0.4, 0.0, "weight of the KL penalty"),
    "clip_range": (1e-4, 1e-4, 1e-12, "of the ratio; small, as log-probs are means over the elements"),
    "guidance_scale": (4.5, 1.0, 1.0, "classifier-free guidance in training and evaluation; 1 for none"),
    "noise_level": (0.7, 1.0, 1e-3, "of the SDE"),
    "sde_steps": (9, 7, 1, "how many consecutive steps have noise and are trained"),
    "sde_range": (9, 7, 1, "these lie within the first so many, at a place drawn anew each epoch"),
    "lora_rank": (32, 16, 1, "of the adapter; its alpha is twice that"),
    "ema_interval": (8, 4, 1, "updates between two steps of the adapter's moving average, which is saved"),
    "height": (512, 32, 1, "pixels"),
    "width": (512, 64, 1, "pixels"),
    "max_sequence_length": (128, 1, 1, "T5 tokens (without T5, zeros that stand for them)"),
    "eval_every": (20, 20, 1, "epochs between evaluations"),
    "compile": (False, False, None, "compile the network's blocks"),
    "gradient_checkpointing": (False, False, None, "compute blocks again to save memory"),
    "seed": (0, 0, 0, "of the adapter, the prompts' order and the noise"),
}
MAY_CHANGE = "output_dir", "model", "epochs", "batch_size", "eval_every", "compile", "gradient_checkpointing"


def settings(**given) -> SimpleNamespace:
    """All settings: those given, and the model's defaults. Raises UserError for one out of range."""
    tiny = Path(given.get("model", "")).name == "tiny-sd3"
    config = SimpleNamespace(**{name: row[tiny] for name, row in SETTINGS.items()} | given)
    most = dict(sde_steps=config.sde_range, sde_range=TRAIN_STEPS, max_sequence_length=512)
    for name, (_, _, least, _) in SETTINGS.items():
        value, limit = getattr(config, name), most.get(name, 10**9)
        if least is not None and not least <= value <= limit:
            raise UserError(f"--{name.replace('_', '-')} is {value}: give a number from {least} to {limit}")
    return config


def read_prompts(path: str, rewards: list[tuple]) -> list[dict]:
    """A prompt file's records, which the rewards can judge. Raises UserError naming the file and the line."""
    place, records = path, []
    try:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").split("\n"), 1):
            if line.strip() and (place := f"{path}, line {number}"):
                record = json.loads(line) if path.lower().endswith(".jsonl") else {"prompt": line.strip()}
                prompt = record.get("prompt") if isinstance(record, dict) else None
                if not isinstance(prompt, str) or b"\0" in prompt.encode():
                    raise ValueError("a record needs a `prompt` of Unicode text")
                for *_, check in rewards:
                    check(record)
                records.append(record)
        if not records:
            raise ValueError("it has no prompts")
    except Exception as e:  # A reward's check may raise any.
        raise UserError(f"can't use the prompt file {place}: {e}; mend it, or give another") from e
    return records


def split_prompts(config, rewards: list[tuple]) -> tuple[list[dict], list[dict]]:
    """Training and evaluation records. Without an evaluation file, half the prompts are held out, or 256."""
    train = read_prompts(config.prompt_file, rewards)
    if config.eval_prompt_file:
        return train, read_prompts(config.eval_prompt_file, rewards)
    unique = {r["prompt"]: r for r in train}
    held_out = Random(0).sample(list(unique), min(256, (len(unique) + 1) // 2))  # the same for all seeds
    return [r for r in train if r["prompt"] not in set(held_out)] or train, [unique[p] for p in held_out]


# ---- Files. The checkpoint holds all that a run needs to go on; the other files are for people.
def atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Write under another name, then rename, so that `path` is always the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.new")  # load_lora_weights must not take it
    write(temporary)
    with open(temporary, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(temporary, path)


def save(run, out: Path) -> None:
    """Write the checkpoint; settings, prompts and metrics to read; the averaged adapter, for diffusers."""
    names = "train_records", "eval_records", "parameters", "epoch", "updates", "metrics"
    state = {name: getattr(run, name) for name in names} | {"config": vars(run.config)}
    state |= {name: getattr(run, name).state_dict() for name in ("ema", "optimizer", "scaler")}
    atomic(out / "checkpoint.pt", partial(torch.save, state))
    files = {"eval_prompts.jsonl": run.eval_records, "metrics.jsonl": run.metrics}
    texts = {name: "".join(json.dumps(r) + "\n" for r in records) for name, records in files.items()}
    for name, text in (texts | {"config.json": json.dumps(vars(run.config), indent=2) + "\n"}).items():
        atomic(out / name, lambda path: path.write_text(text, encoding="utf-8"))
    transformer = run.pipe.transformer
    names = [name for name, p in transformer.named_parameters() if p.requires_grad]
    layers = get_peft_model_state_dict(transformer, dict(zip(names, run.ema.shadow_params)))
    extra = {"transformer_lora_adapter_metadata": transformer.peft_config["default"].to_dict()}
    write = partial(run.pipe.save_lora_weights, out, layers, **extra)
    atomic(out / "pytorch_lora_weights.safetensors", lambda path: write(weight_name=path.name))


def log(run, metrics: dict[str, float], out: Path, tensorboard: SummaryWriter) -> None:
    """Print metrics, add them to the run's, and save the run; at evaluations, draw the rewards' curve."""
    run.metrics.append({"epoch": run.epoch, **metrics})
    save(run, out)
    for name, value in metrics.items():
        tensorboard.add_scalar(name, value, run.epoch)
    line = "  ".join(f"{name} {value:.3g}" for name, value in metrics.items() if "/" not in name)
    tqdm.write(f"epoch {run.epoch}: {line}")
    sys.stdout.flush()
    if "eval_reward" in metrics:
        axes = Figure(figsize=(6, 4), layout="constrained").subplots()
        for name in ("reward", "eval_reward", "eval_ocr_accuracy", "eval_geneval_correct/overall"):
            points = [(m["epoch"], m[name]) for m in run.metrics if name in m]
            axes.plot(*zip(*points), "-" if name == "reward" else "o-", label=name) if points else None
        axes.set(xlabel="epoch", title="reward: rollouts, 10 SDE steps; eval: held out, 40 ODE steps")
        axes.legend()
        atomic(out / "curve.png", partial(axes.figure.savefig, format="png", dpi=120))


# ---- Command line.
class UserError(Exception):
    """Something that the user can mend: shown as one sentence, without a traceback, with exit code 2."""


def why(e: BaseException | None) -> str:
    """What went wrong. The libraries bury what the hub said in a chain of exceptions."""
    summary, chain = f"{type(e).__name__} ({' '.join(str(e).split())[:300]})", ""
    while e is not None:
        chain, e = f"{chain} {type(e).__mro__}", e.__cause__ or e.__context__
    if "GatedRepo" in chain:
        return "it is gated: accept its licence on its page at huggingface.co, and run `hf auth login`"
    if re.search("LocalEntryNotFound|Connect|Offline|Timeout", chain):
        return "what it needs is out of reach: check name and network"
    return OUT_OF_MEMORY if re.search("of memory|te memory|MemoryError|ALLOC_FAILED", summary) else summary


def configure(argv: list[str] | None) -> tuple[SimpleNamespace, dict | None]:
    """The settings (flags over a resumed run's over the defaults), and the resumed run's checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    parser.add_argument("--resume", metavar="DIR", help="go on with the run in this folder")
    for name, (default, tiny, _, text) in SETTINGS.items():
        how = {"action": argparse.BooleanOptionalAction} if default is False else {"type": type(default)}
        values = f" (default {default}; {tiny} with tiny-sd3)" if default != "" else ""
        parser.add_argument(f"--{name.replace('_', '-')}", help=text + values, **how)
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume", "")
    out = Path(resume or given.get("output_dir") or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    given["output_dir"], checkpoint = str(out), out / "checkpoint.pt"
    if checkpoint.exists():
        if not resume:
            raise UserError(f"{out} holds another run: give another --output-dir, or go on by --resume {out}")
        try:
            if zipfile.ZipFile(checkpoint).testzip():
                raise ValueError("a checksum is wrong")
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)  # runs no pickled code
            before = state["config"]
        except Exception as e:  # torch raises many kinds.
            raise UserError(f"{checkpoint} is damaged: {why(e)}; put back a copy, or start a new run") from e
        for n in [n for n in given if n not in MAY_CHANGE and given[n] != before.get(n)]:
            raise UserError(f"--{n.replace('_', '-')} was {before.get(n)} in {out}: omit it, or start anew")
        print(f"Resuming the run in {out}: {state['epoch']} epochs are done.")
        return settings(**before | given), state
    if resume or not given.get("prompt_file"):
        none = "there are no prompts: give a file, as in --prompt-file prompts.txt"
        raise UserError(f"there is no run in {out}: check the path" if resume else none)
    if not given.get("model"):
        given["model"] = SD35 if torch.cuda.is_available() else str(HERE / "tiny-sd3")
        print(f"Training {given['model']}" + ", as there is no CUDA GPU." * (given["model"] != SD35))
    return settings(**given), None


def main(argv: list[str] | None = None) -> int:
    hint = ""
    try:
        config, state = configure(argv)
        out, rewards = Path(config.output_dir), load_rewards(config.reward)
        records = (state["train_records"], state["eval_records"]) if state else split_prompts(config, rewards)
        # A blank image loads the rewards' models, and finds what fails, before the large model is loaded.
        score_images(rewards, torch.zeros(1, 3, config.height, config.width), records[0][:1])
        run = prepare(config, load_pipeline(config.model), rewards, *records, state)
        print("\n".join(f"  {name:22} {value}" for name, value in vars(config).items()), flush=True)
        (out / "samples").mkdir(parents=True, exist_ok=True)
        save(run, out)
        hint = f"; to go on: python flow_grpo.py --resume {out}"
        train(run, out)
        first, *_, last = [m for m in run.metrics if "eval_reward" in m]
        for name in [name for name in last if name in first and name != "epoch" and "/" not in name]:
            print(f"held-out {name.removeprefix('eval_')}: {first[name]:.3f} before, {last[name]:.3f} after")
        print(f"({len(run.eval_records)} prompts, {EVAL_STEPS} ODE steps.) Weights and images are in {out}")
        return 0
    except KeyboardInterrupt:
        error, code = "interrupted" + (", finished epochs are kept" if hint else ""), 130
    except (UserError, OSError, RuntimeError, MemoryError) as e:
        error, code = str(e) if isinstance(e, UserError) else why(e), 2
        if not isinstance(e, (UserError, OSError)) and error != OUT_OF_MEMORY:
            raise
    print(f"error: {error}{hint * (DIVERGED not in error)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
