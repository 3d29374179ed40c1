"""Flow-GRPO in one file: online reinforcement learning for flow-matching image models.

It fine-tunes, with LoRA, Stable Diffusion 3.5 Medium or, without a GPU, the small tiny-sd3/:

    python flow_grpo.py --prompt-file prompts.txt
    torchrun --standalone --nproc-per-node 8 flow_grpo.py --prompt-file prompts.txt  # 8 GPUs
    python flow_grpo.py --resume runs/NAME  # Go on, with any number of GPUs.

[paper] is Liu et al., Flow-GRPO: Training Flow Matching Models via Online RL, arXiv 2505.05470.
[code] is its authors', yifan123/flow_grpo.

Notation. B images in a batch; T denoising steps, S of which are trained; P prompts in an epoch with
G images each (a group), from noise of their own, so N = P * G images. Latents are [B, C, H, W], but
the method takes any [B, ...]. Time falls from t = 1, which is noise, to t = 0, which is the image,
with x_t = (1 - t) x_0 + t x_1, and velocity = x_1 - x_0.

An epoch of the published recipe draws 48 prompts x 24 images = 1,152 images in 10 steps each,
scores them, and trains on the first 9 of the steps in 2 optimiser steps of up to 576 images. With
guidance, a velocity takes two passes of the network, with the prompt and without. So an image takes
20 passes, and 80 in an evaluation, which has 40 steps. To train on it takes 36 forward (half of
them the reference's, for the KL) and 9 backward, as only the policy with the prompt has a gradient.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while the packages load (10 s) ends without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import atexit
import copy
import json
import math
import os
import re
import shutil
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from random import Random
from runpy import run_path

import torch
import torch.distributed as dist
import tyro
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import EMAModel, cast_training_params
from diffusers.utils import logging
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import save_image
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
TRAIN_STEPS = 10  # Denoising reduction [paper]: a rollout's few steps are enough to learn from.
EVAL_STEPS = 40  # An evaluation has as many as one would use the model with.
RANK = int(os.environ.get("RANK", 0))  # torchrun tells each process its number,
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))  # and how many there are.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of several GPUs, the process's own
bar = partial(tqdm, leave=False, disable=RANK > 0 or None)  # in process 0, on a terminal


# ---- Settings.
@dataclass
class Config:
    """The settings. The defaults are the recipe published for SD3.5 Medium [paper, code]."""

    prompt_file: str = ""  # Prompts: .txt with one per line, or .jsonl with a record per line.
    eval_prompt_file: str = ""  # Prompts to evaluate on. Without it, some prompts are held out.
    output_dir: str = ""  # Folder of the run. Without it, a new one in runs/.
    resume: str = ""  # Folder of a run to go on with.
    model: str = "stabilityai/stable-diffusion-3.5-medium"  # Name on the hub, or folder.
    reward: str = "ocr"  # ocr, geneval, pickscore or clipscore of rewards/, or file.py:function.
    epochs: int = 500  # Rounds of rollout and update.
    prompts_per_epoch: int = 48  # Prompts in an epoch.
    group_size: int = 24  # Images for each prompt, which are compared with each other.
    updates_per_epoch: int = 2  # Optimiser steps in an epoch. All but the first are off-policy.
    batch_size: int = 4  # Images in one pass. Fewer need less memory, and have other noise.
    learning_rate: float = 3e-4  # Of AdamW.
    beta: float = 0.04  # Weight of the KL penalty, which holds the model near the base model.
    clip_range: float = 1e-4  # Of the ratio. It is tiny because log-probs are means over elements.
    guidance_scale: float = 4.5  # Classifier-free guidance in training and evaluation; 1 for none.
    noise_level: float = 0.7  # Of the SDE.
    sde_steps: int = 9  # The window: steps in a row with noise, which are trained. Fewer save time.
    sde_range: int = 9  # The window lies in the first so many steps, at a place drawn each epoch.
    lora_rank: int = 32  # Of the adapter. Its alpha is twice that.
    ema_interval: int = 8  # Optimiser steps from one move of the adapter's average to the next.
    height: int = 512  # Of the images, in pixels.
    width: int = 512  # Of the images, in pixels.
    max_sequence_length: int = 128  # T5 tokens of a prompt. A model without T5 takes zeros instead.
    eval_every: int = 20  # Epochs between two evaluations.
    gradient_checkpointing: bool = False  # Compute activations twice to save memory.
    compile: bool = False  # Compile the network's blocks.
    seed: int = 0  # Of the adapter, the prompts' order, the window's place, noise and shuffling.


TINY = Config(  # For tiny-sd3, the default without a GPU. It learns in minutes on two cores.
    model=str(HERE / "tiny-sd3"), epochs=60, prompts_per_epoch=12, group_size=16, batch_size=96,
    learning_rate=3e-3, beta=0.4, guidance_scale=1.0, noise_level=1.0, sde_steps=7, sde_range=7,
    lora_rank=16, ema_interval=4, height=32, width=64, max_sequence_length=1, eval_every=60,
)  # fmt: skip


# ---- The method. These five functions need torch and Python alone: copy them with their imports.
def sde_step(
    velocity: Tensor,
    x: Tensor,
    t: float | Tensor,
    t_next: float | Tensor,
    noise_level: float,
    x_next: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, ...]:
    """One denoising step as a Gaussian policy, by Euler-Maruyama on an SDE [paper].

    dx = [v + sigma_t^2 / (2t) (x + (1 - t) v)] dt + sigma_t dw,
    sigma_t = noise_level * sqrt(t / (1 - t)), but for t = 1 see below.
    At every t, it has the marginals of the flow dx = v dt. x + (1 - t) v is the estimated noise.

    Args:
        velocity: [B, ...], the network's output at (x, t). Gradients of mean and log_prob reach it.
        x: [B, ...], the latents at t.
        t, t_next: floats, or [B] on x's device, with 0 <= t_next < t <= 1.
        noise_level: `a` in the paper; 0 gives the Euler step of the ODE, which draws no noise.
        x_next: [B, ...], a sample to score. Without it one is drawn, by a generator on any device.
    Returns, in float32: x_next [B, ...]; log_prob [B], averaged over elements as in [code], or 0
        for the ODE, which has no density; mean [B, ...]; std, sigma_t * sqrt(|dt|), broadcastable.
    """
    velocity = velocity.float()
    x = x.float()
    per_image = [-1] + [1] * (x.ndim - 1)
    t = (x.new_zeros(len(x)) + t).float().view(per_image)
    t_next = (x.new_zeros(len(x)) + t_next).float().view(per_image)
    dt = t_next - t
    # At t = 1, 1 - t would divide by zero: [code] takes 1 - t_next in its place, for sigma alone.
    sigma = noise_level * torch.sqrt(t / (1 - torch.where(t == 1, t_next, t)))
    mean = x + (velocity + sigma**2 / (2 * t) * (x + (1 - t) * velocity)) * dt
    std = sigma * torch.sqrt(-dt)
    if x_next is None:
        x_next = mean
        if noise_level > 0:
            device = generator.device if generator else x.device
            noise = torch.randn(x.shape, generator=generator, device=device)
            x_next = mean + std * noise.to(x.device)
    # A sample is data: log_prob's gradient goes through the mean alone.
    x_next = x_next.detach().float()
    if noise_level == 0:
        return x_next, x.new_zeros(len(x)), mean, std
    log_prob = -((x_next - mean) ** 2) / (2 * std**2) - std.log() - math.log(2 * math.pi) / 2
    # With the mean over E elements, not their sum, a ratio is the true one to the power 1 / E. At
    # 512 x 512 pixels, E is 65,536. So ratios stay near to 1, and the clip range is tiny.
    return x_next, log_prob.flatten(1).mean(1), mean, std


def rollout(
    velocity: Callable,
    x: Tensor,
    times: Sequence[float],
    noise_level: float | Sequence[float],
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Denoise by T steps of the policy [paper]. With noise level 0, it is the ODE's Euler sampler.

    Args:
        velocity: called as velocity(x, k) -> [B, ...], the network's output at x and times[k].
        x: [B, ...], noise at times[0].
        times: [T + 1], falling from 1 to 0.
        noise_level: one for all steps, or T of them.
    Returns latents [B, T + 1, ...], from the noise to the image, and the steps' log_probs [B, T].
    """
    levels = noise_level if isinstance(noise_level, Sequence) else [noise_level] * (len(times) - 1)
    x = x.float()
    latents = [x]
    log_probs = []
    for k, level in enumerate(levels):
        v = velocity(x, k).detach()  # Call rollout under no_grad to save memory.
        x, log_prob, _, _ = sde_step(v, x, times[k], times[k + 1], level, generator=generator)
        latents.append(x)
        log_probs.append(log_prob)
    return torch.stack(latents, 1), torch.stack(log_probs, 1)


def group_advantages(
    rewards: Tensor, global_std: bool = True, eps: float = 1e-4, clip: float = 5
) -> Tensor:
    """Advantages within groups [paper]: (r - group mean) / (std + eps), clipped to +-clip [code].

    rewards: [P, G], G images of each of P prompts. Returns [P, G], 0 in a group of equal rewards.
    global_std: divide by the std of all rewards, as in [code], or of the group, as in [paper].
    """
    r = rewards.double()  # in which the mean of equal float32 rewards is exact
    std = r.std(correction=0) if global_std else r.std(dim=1, correction=0, keepdim=True)
    advantages = (r - r.mean(dim=1, keepdim=True)) / (std + eps)
    return advantages.clamp(-clip, clip).to(rewards.dtype)


def gaussian_kl(mean: Tensor, ref_mean: Tensor, std: Tensor) -> Tensor:
    """KL of N(mean, std^2) to N(ref_mean, std^2) [paper], averaged over elements as in [code].

    mean, ref_mean: [B, ...]; std: broadcastable to them. Returns [B], the exact KL per element.
    For `grpo_loss`, multiply it by |dt|, as the published betas need that: see `add_gradient`.
    """
    return ((mean - ref_mean) ** 2 / (2 * std**2)).flatten(1).mean(1)


def grpo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    kl: Tensor,
    clip_range: float,
    beta: float,
) -> tuple[Tensor, dict]:
    """The clipped surrogate with a KL penalty [paper], for one denoising step of B images.

    Tensors are [B]; `old_log_prob` is that of the policy which drew the images. Returns the scalar
    loss and, as means over B, ratio_mean, clipfrac, approx_kl (to that policy), policy_loss and kl.
    """
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    policy_loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
    with torch.no_grad():
        stats = {
            "ratio_mean": ratio.mean(),
            "clipfrac": ((ratio - 1).abs() > clip_range).float().mean(),
            # The usual estimate, (ratio - 1) - log_ratio, would cancel to 0 at ratios so near to 1.
            # It is 1 / E^2 of the KL summed over elements, so it can't be compared with `kl`.
            "approx_kl": 0.5 * (log_ratio**2).mean(),
            "policy_loss": policy_loss.detach(),
            "kl": kl.detach().mean(),
        }
    return policy_loss + beta * kl.mean(), stats


# ---- Sampling with SD3.
def predict_velocity(transformer, x: Tensor, t: float, text, null_text, guidance_scale) -> Tensor:
    """The velocity [B, C, H, W] at x and time t, with classifier-free guidance, in float32.

    text, null_text: B prompts and B empty ones, encoded as embeds [B, L, D] and pooled [B, D'].
    As in [code], the gradient leaves the unconditional velocity out, which saves a backward pass.
    """

    def predict(embeds, pooled):
        timestep = torch.full((len(x),), 1000 * t, device=x.device)
        v = transformer(x.to(embeds.dtype), embeds, pooled, timestep, return_dict=False)[0]
        return v.float()

    conditional = predict(*text)
    if guidance_scale == 1:
        return conditional
    with torch.no_grad():
        unconditional = predict(*null_text)
    return unconditional + guidance_scale * (conditional - unconditional)


def schedule(scheduler, steps: int) -> list[float]:
    """The scheduler's times [steps + 1]. SD3's 10 steps begin dense: 1, 0.96, 0.91 ... 0.009, 0."""
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.tolist()


@torch.no_grad()
def decode(vae, latents: Tensor) -> Tensor:
    """Latents [B, C, H, W] to images [B, 3, H', W'] in 0..1, by an autoencoder in float32."""
    z = latents / vae.config.scaling_factor + vae.config.shift_factor
    images = vae.decode(z, return_dict=False)[0].contiguous()
    return (images / 2 + 0.5).clamp(0, 1)


# ---- Training.
@dataclass
class Reward:
    """What --reward names: a function of images.

    It is called as function(images, prompts, records) under no_grad, with float32 images
    [B, 3, H, W] in 0..1 on the run's device, B strings, and B dicts of the prompt file. It returns
    B finite numbers, or a dict of columns of them: `reward`, or else the first, is trained on.
    """

    name: str
    function: Callable
    check: Callable  # Called as check(record), it raises ValueError for what can't be judged.


@dataclass
class Run:
    """All that a run has, the same in each process. `prepare` makes it, and `log` saves it."""

    config: Config
    pipe: StableDiffusion3Pipeline  # frozen but for its LoRA; float16 on a GPU but for VAE and LoRA
    reward: Reward
    train_records: list  # dicts of the prompt file; each has a `prompt`, GenEval's a `tag` (task)
    eval_records: list
    latent_shape: tuple  # C, H, W
    parameters: torch.nn.ParameterList  # the adapter, in float32, which draws the rollouts
    ema: EMAModel  # its moving average (decay up to 0.9), which draws evaluations and is the result
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # off, unless the network is in float16, as on a GPU
    epoch: int = 0  # how many epochs are done,
    updates: int = 0  # and how many optimiser steps
    metrics: list = field(default_factory=list)  # the lines of metrics.jsonl, as dicts


@dataclass
class Samples:
    """An epoch's N images, prompt by prompt. All tensors are on the CPU.

    Of latents and log_probs, a process sets the rows that it drew. The others are never read.
    """

    records: list  # [N], G equal ones in a row
    texts: dict  # prompt, or "" -> embeds [L, D] and pooled [D']
    times: list[float]  # [T + 1]
    trained: range  # the S steps that have noise and are trained
    latents: Tensor  # [N, T + 1, C, H, W], from the noise to the image
    log_probs: Tensor  # [N, T], under the policy that drew the images
    columns: dict[str, Tensor]  # [N] each, of all processes: `reward`, and what it is made of


def batches(run: Run, indices, description):
    """Yields this process's part of the indices, in batches.

    Process n % PROCESSES draws the images i of batch n = i // batch_size, and trains on them.
    """
    size = run.config.batch_size
    own = [i for i in indices if i // size % PROCESSES == RANK]
    for start in bar(range(0, len(own), size), description):
        yield own[start : start + size]


def padded(indices, size):
    """A batch filled up with repeats, which don't count.

    A GPU's last bits depend on the batch size. With one, the first optimiser step's ratios are 1.
    """
    return (indices * size)[:size]


def velocity_along(run: Run, times, texts, prompts):
    """The network's velocity(x, k) for these prompts at times[k], as `rollout` calls it."""

    def stacked(prompts):
        parts = zip(*[texts[prompt] for prompt in prompts])
        return [torch.stack(part).to(DEVICE) for part in parts]

    text = stacked(prompts)
    null_text = stacked([""] * len(prompts))
    scale = run.config.guidance_scale
    return lambda x, k: predict_velocity(run.pipe.transformer, x, times[k], text, null_text, scale)


def collect(run: Run) -> Samples:
    """Draw G images for each of the epoch's P prompts, and score them."""
    config = run.config
    epoch_seed = f"{config.seed} {run.epoch}"
    records = list(run.train_records)
    Random(epoch_seed).shuffle(records)
    # Each epoch draws anew. No prompt comes twice, unless the file has too few: then as new groups.
    chosen = (records * config.prompts_per_epoch)[: config.prompts_per_epoch]
    records = [record for record in chosen for _ in range(config.group_size)]
    times = schedule(run.pipe.scheduler, TRAIN_STEPS)
    # A window of steps has noise and is trained; the others are the ODE's. By default, it is the
    # first 9. As in [code], the 10th, from t = 0.009, is not: rounding would dominate its ratio.
    first = Random(epoch_seed).randint(0, config.sde_range - config.sde_steps)
    trained = range(first, first + config.sde_steps)
    levels = [config.noise_level if k in trained else 0.0 for k in range(TRAIN_STEPS)]
    latents = torch.empty(len(records), TRAIN_STEPS + 1, *run.latent_shape)
    log_probs = torch.empty(len(records), TRAIN_STEPS)
    texts = encode(run, records)
    by_batch = {}
    for indices in batches(run, range(len(records)), "rollout"):
        prompts = [records[i]["prompt"] for i in padded(indices, config.batch_size)]
        velocity = velocity_along(run, times, texts, prompts)
        # Each batch has its own generator, so images don't depend on the number of processes.
        seed = Random(f"{epoch_seed} {indices[0]}").getrandbits(63)
        generator = torch.Generator(DEVICE).manual_seed(seed)
        x = torch.randn(config.batch_size, *run.latent_shape, generator=generator, device=DEVICE)
        # A compiled network has other kernels without autograd. The update needs autograd, so the
        # rollout has it on, too. What it returns is detached.
        with torch.set_grad_enabled(config.compile):
            path, step_log_probs = rollout(velocity, x, times, levels, generator)
        count = len(indices)
        latents[indices] = path[:count].cpu()
        log_probs[indices] = step_log_probs[:count].cpu()
        images = decode(run.pipe.vae, path[:count, -1])
        drawn = [records[i] for i in indices]
        by_batch[indices[0]] = score_images(run.reward, images, drawn)
    return Samples(records, texts, times, trained, latents, log_probs, gathered(by_batch))


def update(run: Run, samples: Samples) -> dict:
    """The epoch's optimiser steps. Returns means of their statistics, and the share kept."""
    config = run.config
    advantages = group_advantages(samples.columns["reward"].view(-1, config.group_size)).flatten()
    # As in [code], images whose advantage is 0 are dropped, and means are over those kept. So the
    # policy's term is N / kept times as large as in [paper], and the KL is of the kept images.
    kept = advantages.nonzero().flatten().tolist()
    # Shuffled, then sorted by batch, they are dealt to the optimiser steps in turn. So each has an
    # about equal, random part of each batch of the rollout, hence of each process's images.
    Random(f"{config.seed} {run.epoch}").shuffle(kept)
    kept.sort(key=lambda i: i // config.batch_size)
    totals = Counter()  # Counter.update adds.
    ratio_deviation = 0.0
    norms = []
    for step in range(min(config.updates_per_epoch, len(kept))):
        chunk = kept[step :: config.updates_per_epoch]
        for indices in batches(run, chunk, "update"):
            totals.update(add_gradient(run, samples, indices, advantages, len(chunk)))
        # In the first optimiser step, the policy is the one that drew the images. A ratio other
        # than 1 there means that the kernels of rollout and update disagree numerically. This is
        # the largest |ratio - 1| of a batch, as a mean over batches and denoising steps.
        if step == 0:
            ratio_deviation = float(totals["ratio_deviation"])
        norms.append(optimizer_step(run))
    means = Counter()
    for part in gather({name: float(total) / len(norms) for name, total in totals.items()}):
        means.update(part)  # Like gradients, means are sums of parts, one for each process.
    return {
        **means,
        "grad_norm": sum(norms) / max(1, len(norms)),
        "ratio_deviation": sum(gather(ratio_deviation)),  # the first step's, in place of all
        "trained": len(kept) / len(advantages),
    }


def add_gradient(run: Run, samples: Samples, indices, advantages, chunk_size):
    """Add the gradient of a batch's part of the loss, the mean over chunk_size images and S steps.

    Returns its part of the means of `grpo_loss`'s statistics, and of the largest |ratio - 1|.
    """
    config = run.config
    transformer = run.pipe.transformer
    times = samples.times
    count = len(indices)
    padding = DEVICE == "cuda" or config.compile  # Elsewhere, it would only take time.
    filled = padded(indices, config.batch_size) if padding else indices
    prompts = [samples.records[i]["prompt"] for i in filled]
    velocity = velocity_along(run, times, samples.texts, prompts)
    latents = samples.latents[filled].to(DEVICE)
    old_log_probs = samples.log_probs[indices].to(DEVICE)
    advantage = advantages[indices].to(DEVICE)
    weight = count / chunk_size / len(samples.trained)
    totals = Counter()

    def sde_step_at(k):
        x = latents[:, k]
        v = velocity(x, k)
        return sde_step(v, x, times[k], times[k + 1], config.noise_level, x_next=latents[:, k + 1])

    ref_means = {}
    if config.beta > 0:
        # The reference, which is the base model, is the same network with its adapter off. All
        # steps come before the policy's, because switching a large adapter takes milliseconds.
        transformer.disable_adapters()
        with torch.no_grad():
            for k in samples.trained:
                _, _, ref_means[k], _ = sde_step_at(k)
        transformer.enable_adapters()
    for k in samples.trained:
        _, log_prob, mean, std = sde_step_at(k)
        log_prob = log_prob[:count]
        kl = torch.zeros_like(log_prob)
        if config.beta > 0:
            # The factor |dt| is not in [paper]. [code] leaves |dt| out of the variance, which is
            # the same, and the published betas are for that. The exact KL (per element) is 25
            # times (first step) to 4 times (ninth) as large: with it, divide beta by about 10.
            kl = gaussian_kl(mean, ref_means[k], std)[:count] * (times[k] - times[k + 1])
        old = old_log_probs[:, k]
        loss, stats = grpo_loss(log_prob, old, advantage, kl, config.clip_range, config.beta)
        stats["ratio_deviation"] = (log_prob.detach() - old).expm1().abs().max()
        run.scaler.scale(loss * weight).backward()
        totals.update({name: value * weight for name, value in stats.items()})
    return totals


def optimizer_step(run: Run):
    """Clip the gradient's norm to 1, step, and update the average when due.

    Returns the norm before clipping. If it is not finite in float16, the loss scale was too large:
    the scaler lowers it and skips the step, which isn't counted in `updates`. Raises UserError if
    the scale is 1 already, as it always is where the scaler is off.
    """
    run.scaler.scale(run.parameters[0])  # This makes the scale, if a process has had no images.
    sum_gradients(run.parameters)
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.parameters, 1.0).item()
    finite = math.isfinite(norm)
    if not finite and run.scaler.get_scale() <= 1:
        raise UserError(f"the gradient is not finite: {DIVERGED}")
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    if finite:
        run.updates += 1
        if run.updates % run.config.ema_interval == 0:
            # As in [code], the decay's warm-up counts optimiser steps.
            run.ema.optimization_step = run.updates
            run.ema.step(list(run.parameters))
    return norm


@torch.no_grad()
def evaluate(run: Run):
    """Draw as a user does, by 40 ODE steps with the averaged adapter.

    Prompt n, from 0, has the noise that a stock pipeline draws with a CPU generator of seed n. So
    with the same steps, guidance, size and max_sequence_length, the images are that pipeline's up
    to rounding: latents stay in float32 here, and batches differ. Returns the reward's columns, as
    means over the prompts (GenEval's over the means of its tags), and the first 16 images.
    """
    times = schedule(run.pipe.scheduler, EVAL_STEPS)
    texts = encode(run, run.eval_records)
    by_batch = {}
    run.ema.store(run.parameters)
    run.ema.copy_to(run.parameters)
    for indices in batches(run, range(len(run.eval_records)), "evaluation"):
        records = [run.eval_records[i] for i in indices]
        velocity = velocity_along(run, times, texts, [record["prompt"] for record in records])
        noise = [
            torch.randn(run.latent_shape, generator=torch.Generator().manual_seed(i))
            for i in indices
        ]
        path, _ = rollout(velocity, torch.stack(noise).to(DEVICE), times, noise_level=0.0)
        images = decode(run.pipe.vae, path[:, -1])
        scores = score_images(run.reward, images, records)
        by_batch[indices[0]] = {**scores, "images": images[: max(0, 16 - indices[0])].cpu()}
    run.ema.restore(run.parameters)
    columns = gathered(by_batch)
    images = columns.pop("images")
    return averages(columns, run.eval_records, "eval_"), images


def train(run: Run, update: Callable = update):
    """Epochs of rollout and update, and evaluations. bench/ gives the updates of other methods."""
    config = run.config
    evaluated = [line["epoch"] for line in run.metrics if "eval_reward" in line]
    for epoch in bar(range(run.epoch, config.epochs + 1), "epochs"):
        due = epoch % config.eval_every == 0 or epoch == config.epochs
        if due and epoch not in evaluated:
            log(run, *evaluate(run))
        if epoch < config.epochs:
            start = time.perf_counter()
            samples = collect(run)
            middle = time.perf_counter()
            metrics = averages(samples.columns, samples.records) | update(run, samples)
            metrics["seconds_rollout"] = middle - start
            metrics["seconds_update"] = time.perf_counter() - middle
            del samples  # They are large, and would last through the next rollout.
            run.epoch += 1
            log(run, metrics)  # Each `log` saves checkpoint and LoRA.


# ---- Several processes: torchrun starts equal copies of this script, which divide the batches.
def join_processes():
    """Join the other processes. Only process 0 prints, except for errors."""
    if DEVICE == "cuda":
        # From here on this is "cuda", to rewards as well. More processes than GPUs share these.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # Gloo serves GPUs, too. It fails at once when a process dies, and an optimiser step of SD3.5
    # has no more than 75 MB to sum.
    dist.init_process_group("gloo")
    atexit.register(dist.destroy_process_group)  # Else its threads may abort a process that ends.
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def first_to_fail():
    """Whether this process is the first to fail, and so says why. What ends one ends all."""
    if not dist.is_initialized():
        return True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # by which torchrun ends the others
    # This is torchrun's own store, which outlives the processes.
    return dist.distributed_c10d._get_default_store().add("failed", 1) == 1


def gather(value):
    """The values that all processes give, in their order."""
    values = [value] * PROCESSES
    if PROCESSES > 1:
        dist.all_gather_object(values, value)
    return values


def gathered(columns):
    """All processes' columns, joined in order. A batch has the number of its first image as key."""
    merged = {}
    for part in gather(columns):
        merged |= part
    ordered = [merged[first] for first in sorted(merged)]
    if len({tuple(part) for part in ordered}) > 1:
        raise UserError("the reward has other columns, or another order of them, in some batches")
    return {name: torch.cat([part[name] for part in ordered]) for name in ordered[0]}


def sum_gradients(parameters):
    """Give each process the sum of all processes' gradients; one that had no images adds zeros."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if PROCESSES > 1:
            dist.all_reduce(p.grad)


# ---- The model: a diffusers pipeline whose transformer carries a LoRA adapter.
LORA_SCALE = 2  # alpha / rank [code]


def load_pipeline(model) -> StableDiffusion3Pipeline:
    """The pipeline, still on the CPU. Raises UserError if there is none.

    For a GPU, it is in half precision, except for the autoencoder, which could overflow.
    """
    dtype = torch.float16 if DEVICE == "cuda" else torch.float32
    logging.set_verbosity_error()  # It would warn of each batch in which CLIP cuts a prompt.
    try:
        parts = StableDiffusion3Pipeline.load_config(model)
        # A pipeline may have been saved without T5.
        options = {name: None for name, part in parts.items() if part == [None, None]}
        options["dtype"] = {"default": dtype, "vae": torch.float32}
        return StableDiffusion3Pipeline.from_pretrained(model, **options)
    except Exception as e:  # The libraries raise many kinds.
        raise UserError(f"the model {model} can't be loaded: {why(e)}; check --model") from e


def prepare(config: Config, pipe, reward: Reward, train_records, eval_records) -> Run:
    """Add the adapter, and make the run. Raises UserError if the image size doesn't fit."""
    transformer = pipe.transformer
    factor = pipe.vae_scale_factor
    unit = factor * pipe.patch_size
    most = unit * transformer.config.pos_embed_max_size
    for size in (config.height, config.width):
        if size % unit or size > most:
            raise UserError(f"--height and --width need to be multiples of {unit}, at most {most}")
    torch.manual_seed(config.seed)
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=LORA_SCALE * config.lora_rank,
        init_lora_weights="gaussian",
        # As in [code], the second attention of some of SD3.5's blocks, `attn2`, has no adapter.
        target_modules=r".*\.attn\.(to_(q|k|v|out\.0|add_out)|add_(q|k|v)_proj)",
    )
    transformer.add_adapter(lora)  # It freezes all else.
    cast_training_params(transformer, torch.float32)
    parameters = torch.nn.ParameterList(p for p in transformer.parameters() if p.requires_grad)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
        pipe.vae.enable_slicing()  # Decoding would need the most memory otherwise.
    if config.compile:
        # There are several kinds of blocks, with the adapter on or off, with a graph or without.
        torch.compiler.config.recompile_limit = 64
        torch.autograd.set_multithreading_enabled(False)  # The limit is this thread's alone.
        for block in transformer.transformer_blocks:
            block.compile(dynamic=False)
    transformer.to(DEVICE)
    pipe.vae.to(DEVICE, memory_format=torch.channels_last)  # faster convolutions
    # For the adapter. TF32 has as many digits as float16.
    torch.set_float32_matmul_precision("high")
    # cuDNN's attention, which torch prefers on the newest GPUs, has other kernels with a graph.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return Run(
        config,
        pipe,
        reward,
        train_records,
        eval_records,
        latent_shape=(
            transformer.config.in_channels,
            config.height // factor,
            config.width // factor,
        ),
        parameters=parameters,
        ema=EMAModel(list(parameters), decay=0.9),
        optimizer=torch.optim.AdamW(parameters, config.learning_rate, weight_decay=1e-4),
        # A log_prob is a mean over 65,536 elements, and a batch one of many. So small a loss has
        # gradients that underflow in half precision, some of them even at the usual scale of 2^16.
        scaler=torch.amp.GradScaler(DEVICE, 2.0**20, enabled=transformer.dtype == torch.float16),
    )


@torch.no_grad()
def encode(run, records):
    """Encode each different prompt, and the empty one, once.

    Returns prompt -> (embeds [L, D], pooled [D']) on the CPU.
    """
    pipe = run.pipe
    encoders = filter(None, [pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3])
    encoders = torch.nn.ModuleList(encoders).to(DEVICE)
    prompts = sorted({"", *[record["prompt"] for record in records]})
    texts = {}
    for i in range(0, len(prompts), 64):
        batch = prompts[i : i + 64]
        embeds, _, pooled, _ = pipe.encode_prompt(
            batch, None, None, DEVICE, 1, False, max_sequence_length=run.config.max_sequence_length
        )
        texts |= zip(batch, zip(embeds.cpu(), pooled.cpu()))
    # T5 has 11 GB, and would take some 7 s to the GPU and back. On a large card, it stays there.
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[1] < 45e9:
        encoders.to("cpu")
    return texts


# ---- Rewards.
def load_reward(source) -> Reward:
    """What --reward names. NAME is short for rewards/NAME.py:reward. Raises UserError.

    If the file has a function `check`, that is called with each record of the prompt file.
    """
    path, _, function = source.rpartition(":")
    if not path:
        path, function = HERE / "rewards" / f"{source}.py", "reward"
    try:
        module = run_path(str(path))
        return Reward(Path(path).stem, module[function], module.get("check", lambda record: None))
    except (Exception, SystemExit) as e:
        hint = "give file.py:function, or ocr, geneval, pickscore or clipscore of rewards/"
        raise UserError(f"the reward '{source}' can't be loaded: {why(e)}; {hint}") from e


@torch.no_grad()
def score_images(reward: Reward, images: Tensor, records: list) -> dict:
    """Columns [B] on the CPU: `reward`, and what it is made of. Raises UserError."""
    if not images.isfinite().all():
        raise UserError(f"an image is not finite: {DIVERGED}")
    prompts = [record["prompt"] for record in records]
    copies = [copy.deepcopy(record) for record in records]
    try:  # with copies, which the function may change as it likes
        result = reward.function(images.clone(), list(prompts), copies)
        named = result if isinstance(result, dict) else {reward.name: result}
        columns = {name: torch.as_tensor(column).float().cpu() for name, column in named.items()}
        for name, column in columns.items():
            for prompt, value in zip(prompts, column.tolist(), strict=True):
                if not math.isfinite(value):
                    raise ValueError(f"{name} is {value} for '{prompt}'")
        return {"reward": next(iter(columns.values())), **columns}
    except (Exception, SystemExit) as e:
        raise UserError(
            f"the reward {reward.name} failed at '{prompts[0]}': {why(e)}; "
            "a reward gives one finite number for each image"
        ) from e


def averages(columns, records, prefix=""):
    """Each column's mean. If records have tags, it is that of the tags' means, as in GenEval."""
    tags = [str(record.get("tag")) for record in records]
    sizes = Counter(tags)
    weights = torch.tensor([1 / sizes[tag] / len(sizes) for tag in tags])
    return {f"{prefix}{name}": float(column @ weights) for name, column in columns.items()}


# ---- Prompts.
def read_prompts(path, reward):
    """A prompt file's records. Raises UserError with file and line of what can't be used."""
    if not path:
        raise UserError("there are no prompts: give a file, as in --prompt-file prompts.txt")
    place = path
    records = []
    try:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").split("\n"), 1):
            if line.strip():
                place = f"{path}, line {number}"
                record = {"prompt": line.strip()}
                if path.lower().endswith(".jsonl"):
                    record = json.loads(line)
                prompt = record.get("prompt") if isinstance(record, dict) else None
                if not isinstance(prompt, str) or b"\0" in prompt.encode():
                    raise ValueError("a record needs a `prompt` of Unicode text")
                reward.check(record)
                records.append(record)
        if not records:
            raise ValueError("it has no prompts")
    except (Exception, SystemExit) as e:  # A reward's check may raise any.
        raise UserError(f"can't use the prompt file {place}: {e}; mend it, or give another") from e
    return records


def split_prompts(config, reward):
    """Training and evaluation records.

    Without an evaluation file, half the prompts (at most 256) are held out, the same for all seeds.
    """
    records = read_prompts(config.prompt_file, reward)
    if config.eval_prompt_file:
        return records, read_prompts(config.eval_prompt_file, reward)
    unique = {record["prompt"]: record for record in records}
    held_out = Random(0).sample(list(unique), min(256, (len(unique) + 1) // 2))
    rest = [record for record in records if record["prompt"] not in held_out]
    return rest or records, [unique[prompt] for prompt in held_out]


# ---- Files. The checkpoint holds all that a run needs to go on; the other files are for people.
PLAIN = "train_records eval_records epoch updates metrics".split()
STATEFUL = "parameters ema optimizer scaler".split()
MAY_CHANGE = """resume model epochs eval_every batch_size compile
    gradient_checkpointing""".split()


def atomic(path: Path, write: Callable):
    """Write under another name, then rename. So `path` is the old file or the new one."""
    temporary = path.with_name(f".{path.name}.new")  # load_lora_weights must not take it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
    except Exception as e:  # torch and safetensors raise others than OSError.
        raise UserError(f"can't write {path}: {why(e)}; check the disk, and --output-dir") from e
    with open(temporary, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(temporary, path)


def save(run):
    """Write the checkpoint, files to read, and the averaged adapter for diffusers."""
    out = Path(run.config.output_dir)
    state = {name: getattr(run, name) for name in PLAIN}
    state["config"] = vars(run.config)
    state |= {name: getattr(run, name).state_dict() for name in STATEFUL}
    atomic(out / "checkpoint.pt", partial(torch.save, state))
    texts = {"config.json": json.dumps(vars(run.config), indent=2)}
    for name, lines in {"eval_prompts": run.eval_records, "metrics": run.metrics}.items():
        texts[f"{name}.jsonl"] = "".join(json.dumps(line) + "\n" for line in lines)
    for name, text in texts.items():
        atomic(out / name, lambda path: path.write_text(text))
    transformer = run.pipe.transformer
    names = [name for name, p in transformer.named_parameters() if p.requires_grad]
    layers = get_peft_model_state_dict(transformer, dict(zip(names, run.ema.shadow_params)))
    for name in layers:
        if "lora_B" in name:  # It takes in the scale, which many programs leave out.
            layers[name] = LORA_SCALE * layers[name]
    weights = out / "pytorch_lora_weights.safetensors"
    atomic(weights, lambda path: run.pipe.save_lora_weights(out, layers, weight_name=path.name))
    with suppress(OSError):  # Else only the owner might read it. Some file systems refuse.
        shutil.copymode(out / "checkpoint.pt", weights)


def restore(run, state):
    """Put a checkpoint's state into the run. Raises UserError if it is of another model."""
    for name in PLAIN:
        setattr(run, name, state[name])
    try:
        for name in STATEFUL:
            if state[name]:  # A scaler that is off has no state.
                getattr(run, name).load_state_dict(state[name])
    except RuntimeError as e:
        raise UserError(f"the run doesn't fit {run.config.model}: give its model by --model") from e
    run.ema.to(DEVICE)


@cache
def tensorboard(out):
    return SummaryWriter(out / "tensorboard", flush_secs=1)


def log(run, metrics, images=None):
    """Add metrics to the run's, save it, and print them. With images, draw these and the curve."""
    run.metrics.append({"epoch": run.epoch, **metrics})
    if RANK > 0:
        return
    out = Path(run.config.output_dir).absolute()
    if images is not None:
        write_grid = partial(save_image, images, nrow=4, format="png")
        atomic(out / "samples" / f"epoch_{run.epoch:05}.png", write_grid)
        axes = Figure(layout="constrained").subplots()
        for name in ("reward", "eval_reward"):
            curve = {line["epoch"]: line[name] for line in run.metrics if name in line}
            axes.plot(list(curve), list(curve.values()), "o-", label=name)
        axes.set_xlabel("epoch")
        axes.legend()
        atomic(out / "curve.png", partial(axes.figure.savefig, format="png"))
    save(run)
    for name, value in metrics.items():
        tensorboard(out).add_scalar(name, value, run.epoch)
    tqdm.write(
        f"epoch {run.epoch}: " + "  ".join(f"{name} {metrics[name]:.3g}" for name in metrics)
    )
    sys.stdout.flush()


# ---- Command line.
DIVERGED = "training diverged, so start a new run with a lower --learning-rate"
OUT_OF_MEMORY = "out of memory: give --gradient-checkpointing or a lower --batch-size"
LEFT_ALONE = "another process of this run has ended, or can't be reached"


class UserError(Exception):
    """What the user can mend. It is shown as one sentence without a traceback; exit code 2."""


def why(e):
    """What went wrong. The libraries bury what the hub said in a chain of exceptions."""
    summary = f"{type(e).__name__} ({' '.join(str(e).split())[:300]})"
    chain = summary
    while e is not None:
        chain += f" {type(e).__mro__}"
        e = e.__cause__ or e.__context__
    if "GatedRepo" in chain:
        return "it is gated: accept its licence on huggingface.co, and run `hf auth login`"
    if re.search("LocalEntry|ConnectError|requests.*Conn|Offline|Timeout|connect to", chain):
        return "what it needs is out of reach: check name and network"
    # cuDNN finds no engine when memory is short.
    if re.search("of memory|te memory|MemoryError|ALLOC_FAILED|unable to find an engine", summary):
        return OUT_OF_MEMORY
    if "gloo/" in summary:
        return LEFT_ALONE
    return summary


def configure(argv):
    """The settings, and a resumed run's checkpoint or None. Raises UserError.

    Flags come before the settings of a resumed run, and else before the defaults of the model.
    """
    parse = partial(tyro.cli, Config, args=argv, console_outputs=RANK == 0)
    config = parse(default=Config() if DEVICE == "cuda" else TINY)
    new = time.strftime(f"runs/%Y%m%d-%H%M%S-{os.getpid()}")
    folder = config.resume or config.output_dir or new
    checkpoint = Path(folder, "checkpoint.pt")
    state = None
    if config.resume:
        try:
            if zipfile.ZipFile(checkpoint).testzip():
                raise ValueError("a checksum is wrong")
            # weights_only: no pickled code is run.
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            saved = Config(**state["config"] | {"output_dir": folder})
        except Exception as e:  # torch raises many kinds.
            hint = "give the folder of a run, or put back a copy"
            raise UserError(f"{checkpoint} can't be resumed: {why(e)}; {hint}") from e
        config = parse(default=saved)
        for name, value in vars(config).items():
            before = vars(saved)[name]
            if name not in MAY_CHANGE and value != before:
                raise UserError(
                    f"--{name.replace('_', '-')} was {before} in {folder}: omit it, or start anew"
                )
    elif checkpoint.exists():
        raise UserError(f"{folder} holds a run: go on by --resume, or give another --output-dir")
    else:
        config = parse(default=TINY if Path(config.model).name == "tiny-sd3" else Config())
    config.output_dir = folder
    least = {"group_size": 2, "guidance_scale": 1, "beta": 0, "seed": 0}
    least["epochs"] = state["epoch"] if state else 1
    most = {"sde_steps": config.sde_range, "sde_range": TRAIN_STEPS, "max_sequence_length": 512}
    for name, value in vars(config).items():
        low = least.get(name, 1 if isinstance(value, int) else 1e-12)
        high = most.get(name, 1_000_000_000)
        if not isinstance(value, str | bool) and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} is {value}: give {low} to {high}")
    return config, state


def start(argv):
    """All that comes before training: what is cheap to check first, the large model last."""
    if PROCESSES > 1:
        join_processes()
    config, state = configure(argv)
    config.output_dir = gather(config.output_dir)[0]  # It may be made of process 0's time.
    reward = load_reward(config.reward)
    if state:
        records = state["train_records"], state["eval_records"]
    else:
        records = split_prompts(config, reward)
    # A blank image loads the reward's models and finds what fails.
    blank = torch.zeros(1, 3, config.height, config.width, device=DEVICE)
    score_images(reward, blank, records[0][:1])
    run = prepare(config, load_pipeline(config.model), reward, *records)
    if state:
        restore(run, state)
    if RANK == 0:
        save(run)
    print(f"Training {config.model} on the {DEVICE}, after {run.epoch} epochs.")
    return run


def main(argv=None):
    """Train. Returns the exit code: 0, 2 for what the user can mend, 130 if interrupted."""
    hint = ""
    code = 2
    try:
        run = start(argv)
        hint = f"; to go on: python flow_grpo.py --resume {run.config.output_dir!r}"
        train(run)
        rewards = [line["eval_reward"] for line in run.metrics if "eval_reward" in line]
        print(f"The reward on evaluation prompts was {rewards[0]:.3f}, and is {rewards[-1]:.3f}.")
        print(f"Weights and images are in {run.config.output_dir}")
        gather(None)  # A process that left now would abort one that is still waiting for it.
        return 0
    except KeyboardInterrupt:
        error = "interrupted by a signal"
        code = 130
    except UserError as e:
        error = str(e)
    except (OSError, RuntimeError, MemoryError) as e:
        error = why(e)
        if isinstance(e, RuntimeError) and error not in (OUT_OF_MEMORY, LEFT_ALONE):
            raise
    if first_to_fail():
        print(f"error: {error}{hint if DIVERGED not in error else ''}", file=sys.stderr)
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # by which torchrun ends the others
    sys.exit(main())
