"""Flow-GRPO in one file: online reinforcement learning for flow-matching image models.

It fine-tunes, with LoRA, Stable Diffusion 3.5 Medium or, without a GPU, the small tiny-sd3/:

    python flow_grpo.py --prompt-file prompts.txt
    torchrun --standalone --nproc-per-node 8 flow_grpo.py --prompt-file prompts.txt  # 8 GPUs
    python flow_grpo.py --resume runs/NAME  # Go on, with any number of GPUs.

[paper] is Liu et al., Flow-GRPO: Training Flow Matching Models via Online RL, arXiv 2505.05470.
[code] is its authors', yifan123/flow_grpo.

Notation. B images in a batch; T denoising steps, S of which are trained; P prompts in an epoch with
G images each (a group), from noise of their own, so N = P * G images. Latents are [B, C, H, W] with
E = C * H * W elements per image, but the method takes any [B, ...]. Time falls from t = 1, which is
noise, to t = 0, which is the image, with x_t = (1 - t) x_0 + t x_1, and velocity = x_1 - x_0.

An epoch of the published recipe draws 48 prompts x 24 images = 1,152 images in 10 steps each,
scores them, and trains on the first 9 of these steps in 2 updates, of up to 576 images each. With
guidance, a velocity takes two passes of the network, with the prompt and without. So an image takes
20 passes, and 80 in an evaluation, which has 40 steps. To train on it takes 36 forward (half of
them the reference's, for the KL) and 9 backward, as only the policy with the prompt has a gradient.
"""

import atexit
import json
import math
import os
import re
import signal
import sys
import time
import traceback
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from random import Random

import torch
import torch.distributed as dist
import tyro
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

# The other packages take 5 s to load, so each is imported by the function that needs it: --help
# and most mistakes are answered before.

HERE = Path(__file__).resolve().parent
ROLLOUT_DENOISING_STEPS = 10  # Denoising reduction [paper]: these are enough to learn from.
EVAL_DENOISING_STEPS = 40  # Evaluations take as many as users of the model do.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # With several GPUs: `join_processes`.
# torchrun tells each process how many there are, and its number. Some clusters set RANK for a
# process that is alone, too.
PROCESSES = int(os.environ.get("WORLD_SIZE") or 1)
RANK = int(os.environ.get("RANK") or 0) if PROCESSES > 1 else 0
bar = partial(tqdm, leave=False, disable=RANK > 0 or None)  # in process 0, on a terminal


class UserError(Exception):
    """What the user can mend. It is shown as one sentence without a traceback; exit code 2."""


class Diverged(UserError):
    """The weights are of no use any more, so the run can't go on."""


@contextmanager
def explain(what, next_step):
    """An error inside becomes a UserError, which says what failed, why, and what to do."""
    try:
        yield
    except (Exception, SystemExit) as e:  # Libraries and rewards raise many kinds.
        raise UserError(f"{what}: {why(e)}; {next_step}") from e


def why(e):
    """What went wrong, on one line."""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"


# ---- Settings.
@dataclass
class Config:
    """The settings of Flow-GRPO.

    The defaults are the recipe published for SD3.5 Medium. Without a GPU, --help shows those of
    tiny-sd3 instead, which learns in minutes.
    """

    prompt_file: str = ""  # The prompts: a .txt with one per line, or a .jsonl with records.
    eval_prompt_file: str = ""  # The prompts to evaluate on. Without it, up to half are held out.
    output_dir: str = ""  # The folder of the run. Without it, the run gets a new one in runs/.
    resume: str = ""  # The folder of a run that is to go on.
    model: str = "stabilityai/stable-diffusion-3.5-medium"  # A name on the hub, or a folder.
    reward: str = "ocr"  # ocr, geneval, pickscore or clipscore of rewards/, or file.py:function.
    epochs: int = 500  # How many times images are drawn and trained on.
    prompts_per_epoch: int = 48  # How many prompts an epoch has.
    group_size: int = 24  # How many images each prompt gets, to be compared with each other.
    updates_per_epoch: int = 2  # Optimiser steps in an epoch. All but the first are off-policy.
    batch_size: int = 4  # Images in one pass of the network. An update's size doesn't depend on it.
    learning_rate: float = 3e-4  # The learning rate of AdamW.
    adam_epsilon: float = 1e-8  # AdamW stalls if grad_norm / sqrt(number of weights) is below it.
    beta: float = 0.04  # The weight of the KL penalty, which holds the model near the base model.
    clip_range: float = 1e-4  # The ratio is clipped to 1 +- this. See `sde_step` on why it is tiny.
    guidance_scale: float = 4.5  # Classifier-free guidance in training and evaluation; 1 is none.
    noise_level: float = 0.7  # How much noise the SDE adds.
    sde_steps: int = 9  # How many denoising steps in a row have noise and are trained: the window.
    sde_last_step: int = 9  # The last step, counted from 1, that the window may reach.
    lora_rank: int = 32  # The rank of the adapter. Its alpha is twice that.
    ema_interval: int = 8  # Optimiser steps from one move of the adapter's average to the next.
    height: int = 512  # The height of the images in pixels.
    width: int = 512  # The width of the images in pixels.
    max_sequence_length: int = 128  # T5 tokens of a prompt. A model without T5 takes zeros instead.
    eval_every: int = 20  # Epochs from one evaluation to the next.
    gradient_checkpointing: bool = False  # Activations are computed twice, to save memory.
    compile: bool = False  # The network's blocks are compiled.
    seed: int = 0  # It decides on the adapter, noise, window, and order of prompts and images.


def recipe(model):
    """The settings for a model: those that its folder brings in flow_grpo.json, or the defaults."""
    path = Path(model, "flow_grpo.json").expanduser()
    settings = json.loads(path.read_text()) if path.exists() else {}
    return Config(model=str(model), **settings)


TINY = recipe(HERE / "tiny-sd3")  # with which one trains without a GPU


# ---- The method. These five functions need `math` and `torch` alone: copy them as they stand.
def sde_step(velocity, x, t, t_next, noise_level, x_next=None, generator=None):
    """One denoising step as a Gaussian policy, by Euler-Maruyama on an SDE [paper].

    dx = [v + sigma_t^2 / (2t) (x + (1 - t) v)] dt + sigma_t dw,
    sigma_t = noise_level * sqrt(t / (1 - t)), but for t = 1 see below.
    At every t, it has the marginals of the flow dx = v dt. The estimated noise is x + (1 - t) v.

    Args:
        velocity: [B, ...], the network's output at (x, t). Gradients of mean and log_prob reach it.
        x: [B, ...], the latents at t.
        t, t_next: floats, or [B] on x's device, with 0 <= t_next < t <= 1.
        noise_level: `a` in the paper; 0 gives the Euler step of the ODE, which draws no noise.
        x_next: [B, ...], a sample to score. Without it one is drawn, by a generator on any device.
    Returns, in float32: x_next [B, ...]; log_prob [B], averaged over elements as in [code], or 0
        for the ODE, which has no density; mean [B, ...]; std, sigma_t * sqrt(|dt|), broadcastable.
    Raises ValueError for other t than these. Those in a tensor on a GPU are not checked, as the CPU
        would have to wait for them.
    """
    known = not torch.is_tensor(t) or t.is_cpu
    if known and not torch.as_tensor((t_next >= 0) & (t_next < t) & (t <= 1)).all():
        raise ValueError(f"t is {t} and t_next {t_next}, but 0 <= t_next < t <= 1 is needed")
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


def rollout(velocity, x, times, noise_level, generator=None):
    """Denoise by T steps of the policy [paper]. With noise level 0, it is the ODE's Euler sampler.

    Args:
        velocity: called as velocity(x, k) -> [B, ...], the network's output at x and times[k].
        x: [B, ...], noise at times[0].
        times: [T + 1], falling from 1 to 0.
        noise_level: one for all steps, or T of them.
    Returns latents [B, T + 1, ...], from the noise to the image, and the steps' log_probs [B, T].
        They are detached, so call it under no_grad to save memory.
    """
    levels = torch.as_tensor(noise_level, dtype=torch.float64).expand(len(times) - 1).tolist()
    x = x.float()
    latents = [x]
    log_probs = []
    for k, level in enumerate(levels):
        v = velocity(x, k).detach()
        x, log_prob, _, _ = sde_step(v, x, times[k], times[k + 1], level, generator=generator)
        latents.append(x)
        log_probs.append(log_prob)
    return torch.stack(latents, 1), torch.stack(log_probs, 1)


def group_advantages(rewards, global_std=True, eps=1e-4, clip=5):
    """Advantages within groups [paper]: (r - group mean) / (std + eps), clipped to +-clip [code].

    rewards: [P, G], G images of P prompts each. Returns float32 [P, G], 0 where a group is equal.
    global_std: divide by the std of all rewards, as in [code], or of the group, as in [paper].
    """
    r = rewards.double()  # in which the mean of equal float32 rewards is exact
    std = r.std(correction=0) if global_std else r.std(dim=1, correction=0, keepdim=True)
    advantages = (r - r.mean(dim=1, keepdim=True)) / (std + eps)
    return advantages.clamp(-clip, clip).float()


def gaussian_kl(mean, ref_mean, std):
    """KL of N(mean, std^2) to N(ref_mean, std^2) [paper], averaged over elements as in [code].

    mean, ref_mean: [B, ...]; std: broadcastable to them. Returns [B], the exact KL per element.
    The betas published for SD3 are for this KL times |dt|.
    """
    return ((mean - ref_mean) ** 2 / (2 * std**2)).flatten(1).mean(1)


def grpo_loss(log_prob, old_log_prob, advantages, kl, clip_range, beta):
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
            # At ratios so near to 1, the usual estimate, (ratio - 1) - log_ratio, cancels to 0. As
            # log_ratio is the true one / E, this is the KL to the old policy / E^2.
            "approx_kl": 0.5 * (log_ratio**2).mean(),
            "policy_loss": policy_loss.detach(),
            "kl": kl.detach().mean(),
        }
    return policy_loss + beta * kl.mean(), stats


# ---- Sampling with SD3.
def velocity_along(run, times, texts, records):
    """The network's velocity(x, k) for B records' prompts at times[k], as `rollout` calls it.

    It takes x [B, C, H, W] and returns the same shape, in float32, with classifier-free guidance.
    As in [code] of July 2025, the unconditional velocity has no gradient, which is cheaper.
    """
    scale = run.config.guidance_scale
    # On a GPU, the last bits of an image depend on how many are in its pass. So each pass there has
    # batch_size images, filled up with repeats: thus rollout and training agree to the last bit. A
    # compiled network would be compiled anew for another size.
    size = run.config.batch_size if DEVICE == "cuda" or run.config.compile else len(records)
    rows = [i % len(records) for i in range(size)]

    def stacked(prompts):  # embeds [size, L, D] and pooled [size, D']
        return [torch.stack(part).to(DEVICE) for part in zip(*[texts[p] for p in prompts])]

    text = stacked([records[i]["prompt"] for i in rows])
    null_text = stacked([""] * size)

    def predict(x, k, embeds, pooled):
        timestep = torch.full((size,), 1000 * times[k], device=DEVICE)
        x = x[rows].to(embeds.dtype)
        v = run.pipe.transformer(x, embeds, pooled, timestep, return_dict=False)[0]
        return v[: len(records)].float()

    def velocity(x, k):
        conditional = predict(x, k, *text)
        if scale == 1:
            return conditional
        with torch.no_grad():
            unconditional = predict(x, k, *null_text)
        return unconditional + scale * (conditional - unconditional)

    return velocity


def schedule(scheduler, steps):
    """The scheduler's times [steps + 1]. SD3's 10 steps begin dense: 1, 0.96, 0.91 ... 0.009, 0."""
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.tolist()


@torch.no_grad()
def decode(vae, latents):
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
    function: object
    check: object  # Called as check(record), it raises ValueError for what can't be judged.


@dataclass
class Run:
    """All that a run has, the same in each process. `prepare` makes it, and `save` writes it."""

    config: Config
    pipe: object  # diffusers' StableDiffusion3Pipeline, of which the LoRA alone is trained
    reward: Reward
    train_records: list  # dicts of the prompt file; each has a `prompt`, GenEval's a `tag` (task)
    eval_records: list
    latent_shape: tuple  # C, H, W
    parameters: torch.nn.ParameterList  # the adapter, in float32, which draws the rollouts
    ema: object  # diffusers' EMAModel, the adapter's average, which evaluations and users draw with
    optimizer: object  # torch's AdamW
    scaler: object  # torch's GradScaler, off unless the network is in float16, as on a GPU
    metrics: list  # the lines of metrics.jsonl, as dicts
    epoch: int = 0  # how many epochs are done
    updates: int = 0  # how many optimiser steps are done


@dataclass
class Samples:
    """An epoch's N images, prompt by prompt. All tensors are on the CPU.

    Of latents and log_probs, a process sets the rows that it drew. The others are never read.
    """

    records: list  # [N], G equal ones in a row
    texts: dict  # prompt, or "" -> embeds [L, D] and pooled [D']
    times: list  # [T + 1]
    window: range  # the S steps that have noise and are trained
    latents: Tensor  # [N, T + 1, C, H, W], from the noise to the image
    log_probs: Tensor  # [N, T], under the policy that drew the images
    columns: dict  # name -> [N], of all processes: `reward`, and what it is made of


def batches(run, records, indices, description):
    """Yields this process's part of the indices, in batches, each with the records of its images.

    In rollouts and in training, image i belongs to process (i // batch_size) % PROCESSES.
    """
    size = run.config.batch_size
    own = [i for i in indices if i // size % PROCESSES == RANK]
    for start in bar(range(0, len(own), size), description):
        batch = own[start : start + size]
        yield batch, [records[i] for i in batch]


def sample(run):
    """Draw G images for each of the epoch's P prompts, and score them."""
    config = run.config
    # All that is random depends on seed, epoch and batch, so a resumed run draws the same.
    epoch_seed = f"{config.seed} {run.epoch}"
    records = list(run.train_records)
    Random(epoch_seed).shuffle(records)
    # A line comes twice in an epoch only if the file has too few of them: then as another group.
    chosen = (records * config.prompts_per_epoch)[: config.prompts_per_epoch]
    records = [record for record in chosen for _ in range(config.group_size)]
    times = schedule(run.pipe.scheduler, ROLLOUT_DENOISING_STEPS)
    # The steps of the window have noise and are trained; the others are the ODE's. By default, the
    # window is the first 9. The 10th, from t = 0.009, is never in it: rounding would dominate its
    # ratio. [code] doesn't train that step either, but gives it noise, of std 0.006.
    first = Random(epoch_seed).randint(0, config.sde_last_step - config.sde_steps)
    window = range(first, first + config.sde_steps)
    levels = [config.noise_level if k in window else 0.0 for k in range(ROLLOUT_DENOISING_STEPS)]
    latents = torch.empty(len(records), len(times), *run.latent_shape)
    log_probs = torch.empty(len(records), len(levels))
    texts = encode(run, records)
    by_batch = {}
    for indices, drawn in batches(run, records, range(len(records)), "rollout"):
        # Each batch has its own generator. So images depend on batch_size, but not on PROCESSES.
        seed = Random(f"{epoch_seed} {indices[0]}").getrandbits(63)
        generator = torch.Generator(DEVICE).manual_seed(seed)
        x = torch.randn(len(drawn), *run.latent_shape, generator=generator, device=DEVICE)
        velocity = velocity_along(run, times, texts, drawn)
        # A compiled network has other kernels without autograd. Training needs autograd, so the
        # rollout has it on, too. What it returns is detached.
        with torch.set_grad_enabled(config.compile):
            trajectory, step_log_probs = rollout(velocity, x, times, levels, generator)
        latents[indices] = trajectory.cpu()
        log_probs[indices] = step_log_probs.cpu()
        images = decode(run.pipe.vae, trajectory[:, -1])
        by_batch[indices[0]] = score_images(run.reward, images, drawn)
    return Samples(records, texts, times, window, latents, log_probs, join_batches(by_batch))


def optimize(run, samples):
    """The epoch's optimiser steps. Returns means of their statistics, and the share trained on."""
    config = run.config
    transformer = run.pipe.transformer
    times = samples.times
    advantages = group_advantages(samples.columns["reward"].view(-1, config.group_size)).flatten()
    # As in [code], images whose advantage is 0 are dropped, and means are over those kept. So the
    # policy's term is N / kept times as large as in [paper], and the KL is of the kept images.
    # ([code] puts some back, so that its batches come out even.)
    kept = advantages.nonzero().flatten().tolist()
    # Shuffled within each batch of the rollout (as the sort is stable), they are dealt to the
    # optimiser steps in turn. So each step has an about equal, random part of each batch, hence of
    # each process's images.
    Random(f"{config.seed} {run.epoch}").shuffle(kept)
    kept.sort(key=lambda i: i // config.batch_size)
    updates = min(config.updates_per_epoch, len(kept))
    totals = []
    norm = 0.0
    for update in range(updates):
        chunk = kept[update::updates]
        for indices, records in batches(run, samples.records, chunk, "updates"):
            velocity = velocity_along(run, times, samples.texts, records)
            latents = samples.latents[indices].to(DEVICE)
            old_log_probs = samples.log_probs[indices].to(DEVICE)
            advantage = advantages[indices].to(DEVICE)
            # The loss is the mean over all processes' images of the chunk, and over S steps.
            weight = len(indices) / len(chunk) / len(samples.window)
            ref_velocities = {}
            if config.beta > 0:
                # The reference, which is the base model, is the same network with its adapter off.
                # It is switched once for all steps, as that takes milliseconds.
                transformer.disable_adapters()
                with torch.no_grad():
                    ref_velocities = {k: velocity(latents[:, k], k) for k in samples.window}
                transformer.enable_adapters()
            parts = []
            for k in samples.window:
                x = latents[:, k]
                # x, t, t_next, noise_level and x_next of `sde_step`
                step = (x, times[k], times[k + 1], config.noise_level, latents[:, k + 1])
                _, log_prob, mean, std = sde_step(velocity(x, k), *step)
                kl = torch.zeros_like(log_prob)
                if config.beta > 0:
                    _, _, ref_mean, _ = sde_step(ref_velocities[k], *step)
                    # [paper] has no factor |dt|. [code] has it in effect, as its variance in the
                    # KL is sigma_t^2, without |dt|, and the published betas are tuned to that.
                    # The exact KL (per element) is 25 times (first step) to 4 times (ninth) as
                    # large. To use that one, divide beta by about 10.
                    kl = gaussian_kl(mean, ref_mean, std) * (times[k] - times[k + 1])
                old = old_log_probs[:, k]
                loss, stats = grpo_loss(
                    log_prob, old, advantage, kl, config.clip_range, config.beta
                )
                run.scaler.scale(loss * weight).backward()
                # In the first update, the policy is still the one that drew the images. A ratio
                # other than 1 means that the kernels of rollout and training disagree. Logged is
                # the largest |ratio - 1| of a batch, as a mean over batches and steps. Only this
                # update has it, so `* updates` cancels the division below.
                if update == 0:
                    largest = (log_prob.detach() - old).expm1().abs().max()
                    stats["ratio_deviation"] = largest * updates
                parts.append({name: value * weight for name, value in stats.items()})
            totals.append(add_up(parts))
        norm += optimizer_step(run)
    # Each process has its part of the means over all images.
    means = add_up(gather({name: float(n) / updates for name, n in add_up(totals).items()}))
    means["grad_norm"] = norm / max(1, updates)
    means["trained"] = len(kept) / len(advantages)
    return means


def add_up(parts):
    """Sums, by name, of dicts of numbers."""
    sums = {}
    for part in parts:
        for name, number in part.items():
            sums[name] = sums.get(name, 0) + number
    return sums


def optimizer_step(run):
    """Clip the gradient's norm to 1, step, and move the average when due.

    Returns the norm before clipping. If it is not finite in float16, the loss scale was too large:
    the scaler lowers it and skips the step, which `run.updates` doesn't count, and 0 is returned.
    Raises Diverged if the scale is 1 already, as it always is where the scaler is off.
    """
    # GradScaler makes its scale in the first call of `scale`, which a process without images lacks.
    run.scaler.scale(run.parameters[0])
    # Each process gets the sum of all gradients. One without images adds zeros.
    for p in run.parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if PROCESSES > 1:
            with explain(*PEER_LOST):
                dist.all_reduce(p.grad)
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.parameters, 1.0).item()
    finite = math.isfinite(norm)
    if not finite and run.scaler.get_scale() <= 1:
        raise Diverged("the gradient is not finite")
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    if finite:
        run.updates += 1
        if run.updates % run.config.ema_interval == 0:
            # As in [code], the decay's warm-up counts optimiser steps, not the average's moves.
            run.ema.optimization_step = run.updates
            run.ema.step(list(run.parameters))
    return norm if finite else 0.0


@contextmanager
def averaged(run):
    """Within it, the adapter has its averaged weights."""
    run.ema.store(run.parameters)
    run.ema.copy_to(run.parameters)
    yield
    run.ema.restore(run.parameters)


@torch.no_grad()
def evaluate(run, records):
    """Draw as a user does, by 40 ODE steps with the averaged adapter.

    Record n, from 0, has the noise that a stock pipeline draws with a CPU generator of seed n. So
    with the same steps, guidance, size and max_sequence_length, the images are that pipeline's up
    to rounding: latents stay in float32 here, and batches differ. Returns the reward's columns, as
    means over the records (GenEval's over the means of its tags), and the first 16 images.
    """
    times = schedule(run.pipe.scheduler, EVAL_DENOISING_STEPS)
    texts = encode(run, records)
    by_batch = {}
    with averaged(run):
        for indices, drawn in batches(run, records, range(len(records)), "evaluation"):
            velocity = velocity_along(run, times, texts, drawn)
            noise = [
                torch.randn(
                    run.latent_shape,
                    generator=torch.Generator().manual_seed(i),
                    dtype=run.pipe.transformer.dtype,  # in which the pipeline draws, too
                )
                for i in indices
            ]
            x = torch.stack(noise).to(DEVICE)
            trajectory, _ = rollout(velocity, x, times, noise_level=0.0)
            images = decode(run.pipe.vae, trajectory[:, -1])
            columns = score_images(run.reward, images, drawn)
            # `join_batches` brings them together, too.
            columns["the first images"] = images.cpu()[torch.tensor(indices) < 16]
            by_batch[indices[0]] = columns
    columns = join_batches(by_batch)
    images = columns.pop("the first images")
    return averages(columns, records, "eval_"), images


def train(run):
    """Epochs of rollout and training, with an evaluation or some pictures now and then.

    In the lines of epoch n, `reward` is from before its training, and `eval_reward` from after it.
    """
    config = run.config
    for epoch in bar(range(run.epoch, config.epochs + 1), "epochs"):
        if run.metrics and "eval_reward" in run.metrics[-1]:
            pass  # The run was interrupted after this evaluation, or has been extended.
        elif epoch % config.eval_every == 0 or epoch == config.epochs:
            log(run, *evaluate(run, run.eval_records))
        elif epoch % 20 == 0:  # pictures alone
            write_pictures(run, evaluate(run, run.eval_records[:16])[1])
        if epoch < config.epochs:
            start = time.perf_counter()
            samples = sample(run)
            middle = time.perf_counter()
            stats = optimize(run, samples)
            stats["seconds_rollout"] = middle - start
            stats["seconds_update"] = time.perf_counter() - middle
            scores = averages(samples.columns, samples.records)
            del samples  # They are large, and would last through the next rollout.
            run.epoch += 1
            log(run, scores, **stats)  # Each `log` saves checkpoint and LoRA.


# ---- Several processes: torchrun starts equal copies of this script, which divide the batches.
PEER_LOST = "another process has ended, or can't be reached", "see what it printed"
store = None  # torchrun's, which all processes share


def join_processes():
    """Join the other processes, if there are any. Only process 0 prints, except for errors."""
    global store
    if PROCESSES == 1 or store:
        return
    print(f"process {RANK} waits for the others of WORLD_SIZE={PROCESSES}", file=sys.stderr)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python would hear Ctrl-C only after the wait.
    if DEVICE == "cuda":
        # From here on, "cuda" is this GPU, for rewards as well. Processes may have to share one.
        torch.cuda.set_device(RANK % torch.cuda.device_count())
    with explain("can't join the other processes", "for a run of one process, unset WORLD_SIZE"):
        store = next(dist.rendezvous("env://"))[0]
        # Gloo serves GPUs, too. It fails at once when a process dies, and an optimiser step of
        # SD3.5 has no more than 75 MB to sum.
        dist.init_process_group("gloo", store=store, rank=RANK, world_size=PROCESSES)
    atexit.register(dist.destroy_process_group)  # Gloo's threads might abort Python as it ends.


def gather(value):
    """The values that all processes give, in the processes' order."""
    values = [value] * PROCESSES
    if PROCESSES > 1:
        with explain(*PEER_LOST):
            dist.all_gather_object(values, value)
    return values


def join_batches(by_batch):
    """The columns of all processes' batches, each joined in the order of the images.

    by_batch: a batch's first image -> the batch's columns. Raises UserError if these differ.
    """
    merged = {}
    for part in gather(by_batch):
        merged |= part
    ordered = [merged[first] for first in sorted(merged)]
    if len({tuple(columns) for columns in ordered}) > 1:
        raise UserError("the reward has other columns, or another order of them, in some batches")
    return {name: torch.cat([columns[name] for columns in ordered]) for name in ordered[0]}


# ---- The model: a diffusers pipeline whose transformer carries a LoRA adapter.
def load_pipeline(model):
    """diffusers' StableDiffusion3Pipeline, still on the CPU. Raises UserError if there is none.

    For a GPU, it is in half precision, except for the autoencoder, which could overflow.
    """
    import diffusers
    import transformers

    model = os.path.expanduser(model)
    for library in (diffusers, transformers):
        if RANK > 0 or not sys.stderr.isatty():
            library.utils.logging.disable_progress_bar()
    # In the sentence, this leads over to the library's own reason.
    place = "" if os.path.isdir(model) else ": there is no such folder, and from the hub"
    with explain(
        f"the model {model} can't be loaded{place}",
        "give a folder saved without `variant`, or a name on the hub, which can be reached; "
        "for a gated model, accept its licence on huggingface.co, and run `hf auth login`",
    ):
        parts = diffusers.StableDiffusion3Pipeline.load_config(model)
        # A pipeline may have been saved without T5.
        options = {name: None for name, part in parts.items() if part == [None, None]}
        dtype = torch.float16 if DEVICE == "cuda" else torch.float32
        options["dtype"] = {"default": dtype, "vae": torch.float32}
        pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(model, **options)
    for name in ("transformer", "vae"):
        with explain(f"the {name} of {model} lacks weights", "fuse its LoRA before saving"):
            # With an adapter in it, a model is saved under other names of weights. So those that
            # are needed stay on `meta`, from where they can't be moved.
            getattr(pipe, name).to("cpu")
    # They would warn of each batch in which CLIP cuts a prompt, where `start` does it once.
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
    return pipe


def prepare(config, pipe, reward, train_records, eval_records):
    """Add the adapter, and make the run. Raises UserError if the image size doesn't fit."""
    from diffusers.training_utils import EMAModel, cast_training_params
    from peft import LoraConfig

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
        lora_alpha=2 * config.lora_rank,  # as in [code]
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
        # Each kind of block is compiled with the adapter on and off, with autograd and without.
        torch._dynamo.config.recompile_limit = 64
        # Autograd's own threads, in which checkpoints recompute, would not know of this limit.
        torch.autograd.set_multithreading_enabled(False)
        for block in transformer.transformer_blocks:
            block.compile(dynamic=False)
    transformer.to(DEVICE)
    pipe.vae.to(DEVICE, memory_format=torch.channels_last)  # faster convolutions
    set_switches()
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
        optimizer=torch.optim.AdamW(
            parameters, config.learning_rate, eps=config.adam_epsilon, weight_decay=1e-4
        ),
        # A log_prob is a mean over 65,536 elements, and the loss one over many images. So it has
        # gradients that underflow in half precision, some even at the usual scale of 2^16.
        scaler=torch.amp.GradScaler(DEVICE, 2.0**20, enabled=transformer.dtype == torch.float16),
        metrics=[],
    )


@torch.no_grad()
def encode(run, records):
    """Encode each different prompt, and the empty one, once.

    Returns prompt -> (embeds [L, D], pooled [D']) on the CPU.
    """
    pipe = run.pipe
    encoders = [pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3]
    # On a card of less than 45 GB, the text encoders (13 GB) and the network (5 GB) take turns, for
    # which they need some seconds.
    take_turns = DEVICE == "cuda" and torch.cuda.mem_get_info()[1] < 45e9
    if take_turns:
        pipe.transformer.to("cpu")
    encoders = torch.nn.ModuleList(filter(None, encoders)).to(DEVICE)
    prompts = sorted({"", *[record["prompt"] for record in records]})
    texts = {}
    for i in range(0, len(prompts), 64):
        batch = prompts[i : i + 64]
        embeds, _, pooled, _ = pipe.encode_prompt(
            batch,
            None,  # prompt_2 and prompt_3 are the same.
            None,
            device=DEVICE,
            do_classifier_free_guidance=False,
            max_sequence_length=run.config.max_sequence_length,
        )
        texts.update(zip(batch, zip(embeds.cpu(), pooled.cpu())))
    if take_turns:
        encoders.to("cpu")
        pipe.transformer.to(DEVICE)
    return texts


# ---- Rewards.
def set_switches():
    """Set torch's global switches as the run needs them, whatever a reward has set."""
    torch.set_default_dtype(torch.float32)
    if torch.get_default_device().type != "cpu":
        torch.set_default_device("cpu")
    # The adapter's float32 products are in TF32, which has as many digits as float16.
    torch.set_float32_matmul_precision("high")
    # cuDNN's attention, which torch prefers on the newest GPUs, has other kernels with autograd.
    torch.backends.cuda.enable_cudnn_sdp(False)


def load_reward(source):
    """What --reward names. NAME is short for rewards/NAME.py:reward. Raises UserError.

    If the file has a function `check`, that is called with each record of the prompt file.
    """
    if ":" not in source:
        source = f"{HERE}/rewards/{source}.py:reward"
    path, _, name = source.rpartition(":")
    path = Path(path).expanduser().absolute()
    sys.path.insert(0, str(path.parent))  # for what lies beside it, and for processes it starts
    # It must not take the place of a module that is loaded already.
    module_name = f"reward_{path.stem}" if path.stem in sys.modules else path.stem
    hint = "give file.py:function, or ocr, geneval, pickscore or clipscore of rewards/"
    # Code that switches autograd off when it is loaded does so only in here.
    with torch.enable_grad(), explain(f"the reward '{source}' can't be loaded", hint):
        spec = spec_from_file_location(module_name, path)
        # Pickle finds it there, as if it had been imported.
        module = sys.modules[module_name] = module_from_spec(spec)
        spec.loader.exec_module(module)
        set_switches()
        check = getattr(module, "check", lambda record: None)
        return Reward(path.stem, getattr(module, name), check)


def score_images(reward, images, records):
    """Columns [B] on the CPU: `reward`, and what it is made of. Raises UserError."""
    if not images.isfinite().all():
        raise Diverged("an image is not finite")
    prompts = [record["prompt"] for record in records]
    what = f"the reward {reward.name} failed for images from '{prompts[0]}' on"
    wanted = "a reward returns one finite number for each image, or a dict of columns of them"
    with torch.no_grad(), explain(what, wanted):
        # It gets copies, as it may change what it is given.
        result = reward.function(images.clone(), prompts, json.loads(json.dumps(records)))
    set_switches()
    columns = dict(result) if isinstance(result, dict) else {reward.name: result}
    with explain(f"{what}, where it returned {str(result)[:200]}", wanted):
        for name, column in columns.items():
            column = torch.as_tensor(column).detach().float().cpu().view(len(records))
            if not column.isfinite().all():
                raise ValueError(f"{name} is not finite")
            columns[name] = column
        return {"reward": next(iter(columns.values())), **columns}


def averages(columns, records, prefix=""):
    """Each column's mean; if records have tags, the mean of the tags' means, as in GenEval."""
    tags = [str(record.get("tag")) for record in records]
    weights = torch.tensor([1 / tags.count(tag) / len(set(tags)) for tag in tags])
    return {f"{prefix}{name}": float(column @ weights) for name, column in columns.items()}


# ---- Prompts.
def read_prompts(path, reward):
    """A prompt file's records. Raises UserError with file and line of what can't be used."""
    hint = "--prompt-file takes a .txt of prompts, or a .jsonl of records with a `prompt`, in UTF-8"
    with explain(f"there are no prompts in '{path}'", hint):
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
        kind = Path(path).suffix.lower()
        # A line of JSON begins like this, or has a backslash before a quotation mark.
        json_line = re.search(r'^\s*[\[{]\s*(["\[{]|$)|\\"', text, re.MULTILINE)
        if (
            kind not in (".txt", ".jsonl")
            or (kind == ".txt" and json_line)
            or "\0" in text
            or not text.strip()
        ):
            raise ValueError("the file is empty, or of another kind")
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        with explain(f"can't use line {number} of {path}", hint):
            if line.strip():
                record = json.loads(line) if kind == ".jsonl" else {"prompt": line.strip()}
                record["prompt"].encode()  # It raises for what isn't Unicode text.
                reward.check(record)
                records.append(record)
    return records


def split_prompts(config, reward):
    """Training and evaluation records.

    Without an evaluation file, half the prompts (at most 256) are held out, the same for all seeds.
    A single prompt serves for both.
    """
    records = read_prompts(config.prompt_file, reward)
    if config.eval_prompt_file:
        return records, read_prompts(config.eval_prompt_file, reward)
    unique = {record["prompt"]: record for record in records}
    held_out = Random(0).sample(list(unique), min(256, (len(unique) + 1) // 2))
    rest = [record for record in records if record["prompt"] not in held_out]
    return rest or records, [unique[prompt] for prompt in held_out]


# ---- Files. The checkpoint holds all that a run needs to go on; the other files are for people.
SAVED_VALUES = "train_records eval_records epoch updates metrics".split()
SAVED_STATE_DICTS = "parameters ema optimizer scaler".split()


@contextmanager
def own_folder(folder):
    """Makes the folder, and keeps other runs out. Raises UserError if a run is in it."""
    lock = FileLock(Path(folder, f".lock{RANK}"))  # one for each process, as all are in the folder
    with explain(f"can't lock {folder}", "wait if a run is in it, or give another --output-dir"):
        lock.acquire(blocking=False)  # This makes the folder, too.
    try:
        yield
    finally:
        with suppress(OSError):  # A folder that holds anything stays.
            os.remove(lock.lock_file)
            os.rmdir(folder)
        lock.release()


def write_file(path, write):
    """Process 0 writes under another name, then renames. So `path` is the old file or the new."""
    if RANK > 0:
        return
    temporary = path.with_name(f".{path.name}.new")  # load_lora_weights must not take it
    with explain(f"can't write {path}", "check the disk, and --output-dir"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)


def save(run):
    """Write the checkpoint, files to read, and the averaged adapter for diffusers."""
    from peft import get_peft_model_state_dict

    out = Path(run.config.output_dir)
    state = {name: getattr(run, name) for name in SAVED_VALUES}
    state["config"] = vars(run.config)
    state |= {name: getattr(run, name).state_dict() for name in SAVED_STATE_DICTS}
    write_file(out / "checkpoint.pt", partial(torch.save, state))
    files = {
        "config.json": [state["config"]],
        "eval_prompts.jsonl": run.eval_records,
        "metrics.jsonl": run.metrics,
    }
    for name, records in files.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        write_file(out / name, lambda path: path.write_text(lines))
    with averaged(run):
        layers = get_peft_model_state_dict(run.pipe.transformer)
        for name, layer in layers.items():
            # Many programs leave out alpha / rank = 2, so the weights of lora_B take it in. The
            # products, those by 1 too, are copies, which outlast the averaged weights.
            layers[name] = layer * (2 if "lora_B" in name else 1)
    write_file(
        out / "pytorch_lora_weights.safetensors",
        lambda path: run.pipe.save_lora_weights(out, layers, weight_name=path.name),
    )


def log(run, scores, images=None, **stats):
    """Add them to the run's metrics, save it, and print what matters most. Draw images, if any."""
    metrics = {"epoch": run.epoch} | scores | stats
    run.metrics.append(metrics)
    if images is not None:
        write_pictures(run, images)
    save(run)
    shown = [*scores][:3] + ["kl", "seconds_rollout", "seconds_update"]
    # `reward` is most often a copy of the next column, which then needn't be shown.
    if len({metrics.get(name) for name in shown[:2]}) == 1:
        del shown[1]
    line = "  ".join(f"{name} {metrics[name]:.3g}" for name in shown if name in metrics)
    tqdm.write(f"epoch {run.epoch}: {line}")


def write_pictures(run, images):
    """Write a grid of the images, and the curve of the rewards, in process 0."""
    from matplotlib.figure import Figure
    from torchvision.utils import save_image

    out = Path(run.config.output_dir)
    write_file(
        out / f"samples/epoch_{run.epoch:05}.png", partial(save_image, images, nrow=4, format="png")
    )
    axes = Figure().gca()
    for name in ("reward", "eval_reward"):
        curve = {line["epoch"]: line[name] for line in run.metrics if name in line}
        axes.plot(list(curve), list(curve.values()), "o-", label=name)
    axes.legend()
    write_file(out / "curve.png", partial(axes.figure.savefig, format="png"))


# ---- Command line.
COMMAND = "flow_grpo.py"  # by which a run goes on
# The model and the reward may have been moved; which ones a run takes, it prints.
MAY_CHANGE = (
    "resume model reward epochs eval_every batch_size compile gradient_checkpointing".split()
)


def configure(parse, flags, folder):
    """The settings, and a resumed run's checkpoint or None. Raises UserError.

    A flag has precedence over a resumed run's setting, and over the default for the model.
    """
    state = None
    path = Path(folder, "checkpoint.pt")
    default = recipe(flags.model)
    if flags.resume:
        with explain(f"{path} can't be resumed", "give the folder of a run, or put back a copy"):
            # With weights_only, no pickled code is run.
            state = torch.load(path, map_location=DEVICE, weights_only=True)
            default = Config(**state["config"] | {"output_dir": folder})
    elif path.exists():
        raise UserError(f"{folder} holds a run: go on by --resume, or give another --output-dir")
    config = parse(default=default)
    least = {"group_size": 2, "guidance_scale": 1, "beta": 0, "seed": 0}
    least["epochs"] = state["epoch"] if state else 1
    for name, value in vars(config).items():
        flag = f"--{name.replace('_', '-')}"
        if state and value != vars(default)[name] and name not in MAY_CHANGE:
            raise UserError(f"{flag} was {vars(default)[name]} in {folder}: omit it, or start anew")
        if not isinstance(value, str | bool) and not value >= least.get(name, 1e-20):
            raise UserError(f"{flag} can't be {value}, which is too small, or no number")
    if not config.sde_steps <= config.sde_last_step < ROLLOUT_DENOISING_STEPS:
        raise UserError("give --sde-steps up to --sde-last-step, and that up to 9")
    config.output_dir = folder
    return config, state


def start(config, state):
    """All that comes before training: what is cheap to check first, the large model last."""
    reward = load_reward(config.reward)
    saved = state and [state["train_records"], state["eval_records"]]
    records = saved or split_prompts(config, reward)
    # Blank images load the reward's models and find what fails.
    blank = torch.zeros(2, 3, config.height, config.width, device=DEVICE)
    score_images(reward, blank, records[0][:1] * 2)
    pipe = load_pipeline(config.model)
    prompts = [record["prompt"] for record in records[0] + records[1]]
    clip = pipe.tokenizer
    cut = sum(len(tokens) > clip.model_max_length for tokens in clip(prompts).input_ids)
    if cut:
        print(f"CLIP reads only {clip.model_max_length} tokens, which cuts {cut} of the prompts.")
    run = prepare(config, pipe, reward, *records)
    if state:
        with explain(f"the run doesn't fit {config.model}", "give its model by --model"):
            for name in SAVED_STATE_DICTS:
                if state[name]:  # A scaler that is off has no state.
                    getattr(run, name).load_state_dict(state[name])
        for name in SAVED_VALUES:
            setattr(run, name, state[name])
    save(run)
    print(f"Training {config.model} on the {DEVICE} by {config.reward}, after {run.epoch} epochs.")
    return run


def main(argv=None):
    """Train. Returns the exit code: 0; 2 for what the user can mend; 130 if interrupted; else 1."""
    to_go_on = ""
    try:
        if RANK > 0 or not sys.stdout:  # Process 0 prints, unless its stdout is closed.
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        # It may be in ASCII, and a log should show each line at once.
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
        join_processes()
        for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C, and how torchrun ends processes
            signal.signal(number, signal.default_int_handler)
        parse = partial(tyro.cli, Config, args=argv, console_outputs=RANK == 0)
        flags = parse(default=Config() if DEVICE == "cuda" else TINY)
        new = time.strftime(f"runs/%Y%m%d-%H%M%S-{os.getpid()}")
        folder = gather(os.path.expanduser(flags.resume or flags.output_dir or new))[0]
        with own_folder(folder):
            run = start(*configure(parse, flags, folder))
            to_go_on = f"; to go on: python {COMMAND} --resume {folder!r}"
            train(run)
            print(f"Weights and images are in {folder}")
            gather(None)  # All leave together: to leave early would abort those still at work.
        return 0
    except KeyboardInterrupt:
        return report(130, f"interrupted by a signal{to_go_on}")
    except Diverged as e:
        return report(2, f"{e}: the model is broken, or the --learning-rate was too high")
    except UserError as e:
        return report(2, f"{e}{to_go_on}")
    except Exception as e:
        # cuDNN finds no engine when memory is short.
        if re.search("of memory|allocate memory|MemoryError|ALLOC_FAILED|find an engine", why(e)):
            hint = "give --gradient-checkpointing or a lower --batch-size"
            return report(2, f"out of memory: {hint}{to_go_on}")
        traceback.print_exc()
        return report(1, f"{why(e)}; see above, and if it is of compiling: --no-compile{to_go_on}")


def report(code, sentence):
    """Print why the run ends, but only in the first process that fails. Returns the code."""
    first = True
    if store:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends the other processes by it.
        with suppress(RuntimeError):  # Without torchrun, the store has ended with process 0.
            first = store.add("reports", 1) == 1
    if first:
        print(f"error: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
