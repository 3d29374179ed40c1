"""What is Flow-GRPO compared with? Three other ways to learn from the same images, online.

Supervised fine-tuning (SFT), reward-weighted regression (RWR) and Flow-DPO each take the place of
`flow_grpo.optimize`. They take as many optimiser steps as that, and see each image that they use at
seven times.

Notation. P groups with K images each. `error` [P, K] is each image's flow-matching error, the mean
of (velocity - (noise - image))^2 over the elements, and `ref_error` that of the base model.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flow_grpo


def sft_loss(error: Tensor, ref_error: Tensor | None, advantages: Tensor) -> Tensor:
    """Supervised fine-tuning on all that tie for a group's best, as in the authors' code."""
    best = advantages == advantages.amax(1, keepdim=True)
    return error[best].mean()


def rwr_loss(error: Tensor, ref_error: Tensor | None, advantages: Tensor) -> Tensor:
    """Reward-weighted regression: an image weighs exp(advantage), normalised over its group."""
    return (advantages.softmax(1) * error).sum(1).mean()


def dpo_loss(error: Tensor, ref_error: Tensor, advantages: Tensor, beta: float = 100) -> Tensor:
    """Flow-DPO (arXiv 2501.13918) on a group's best and worst. Beta is the authors'."""
    gain = ref_error - error
    best = gain.gather(1, advantages.argmax(1, keepdim=True))
    worst = gain.gather(1, advantages.argmin(1, keepdim=True))
    return -F.logsigmoid(beta / 2 * (best - worst)).mean()


def train_times(generator: torch.Generator) -> list[float]:
    """SD3's times of training, logit-normal and shifted by 3, one of each of 7 equal shares."""
    shares = (torch.arange(7) + torch.rand(7, generator=generator)) / 7
    shares = shares.clamp(1e-4, 1 - 1e-4)
    s = torch.special.ndtri(shares).sigmoid()
    shifted = 3 * s / (1 + 2 * s)
    return shifted.tolist()


def add_gradient(run, loss_of, texts, records, images, advantages, generator) -> float:
    """Add the gradient of the loss's mean over the times. Returns that mean.

    images: [P, K, C, H, W]; records: P * K; advantages: [P, K].
    """
    transformer = run.pipe.transformer
    noise_shape = [len(images), 1, *run.latent_shape]  # A group's images share the noise.
    times = train_times(generator)
    total = 0.0
    for t in times:
        noise = torch.randn(noise_shape, generator=generator).to(flow_grpo.DEVICE)
        x = (1 - t) * images + t * noise
        target = noise - images
        velocity = flow_grpo.velocity_along(run, [t], texts, records)

        def error():
            difference = velocity(x.flatten(0, 1), 0) - target.flatten(0, 1)
            squares = difference.square().flatten(1)
            return squares.mean(1).view(advantages.shape)

        ref_error = None
        if loss_of is dpo_loss:
            transformer.disable_adapters()
            with torch.no_grad():
                ref_error = error()
            transformer.enable_adapters()
        loss = loss_of(error(), ref_error, advantages) / len(times)
        run.scaler.scale(loss).backward()
        total += loss.item()
    return total


def optimize(loss_of: Callable, run, samples) -> dict[str, float]:
    """The epoch's optimiser steps by one of the three losses, in place of flow_grpo.optimize."""
    config = run.config
    seed = Random(f"{config.seed} {run.epoch}").getrandbits(63)
    generator = torch.Generator().manual_seed(seed)
    rewards = samples.columns["reward"].view(-1, config.group_size)
    advantages = flow_grpo.group_advantages(rewards)
    images = samples.latents[:, -1].unflatten(0, rewards.shape)
    groups = torch.randperm(len(rewards), generator=generator)
    if loss_of is dpo_loss:
        # It takes a group's best image and its worst, if one is better.
        groups = groups[advantages[groups].any(1)]
        order = advantages.argsort(dim=1, descending=True, stable=True)
        pair = order[:, [0, -1]]
        advantages = advantages.gather(1, pair)
        images = images[torch.arange(len(pair))[:, None], pair]
    per_group = images.shape[1]
    losses = []
    norms = []
    for chunk in groups.tensor_split(config.updates_per_epoch):
        if len(chunk) == 0:
            continue
        records = []
        for group in chunk.tolist():
            first = group * config.group_size
            records += samples.records[first : first + per_group]
        loss = add_gradient(
            run,
            loss_of,
            samples.texts,
            records,
            images[chunk].to(flow_grpo.DEVICE),
            advantages[chunk].to(flow_grpo.DEVICE),
            generator,
        )
        losses.append(loss)
        norms.append(flow_grpo.optimizer_step(run))
    if not losses:
        return {}
    return {"loss": mean(losses), "grad_norm": mean(norms)}
