"""How would one write Flow-GRPO at first? throughput.py compares flow_grpo.py with this.

It takes only the mathematics of flow_grpo.py. It encodes text for each batch, judges images one by
one, builds a graph for the unconditional velocity, and trains on all samples in one update.
"""

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from rapidocr import RapidOCR
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flow_grpo
from flow_grpo import DEVICE, gaussian_kl, group_advantages, grpo_loss, sde_step


@dataclass
class Batch:
    prompts: list[str]  # B
    times: list[float]  # T + 1
    latents: list[Tensor]  # T + 1, each [B, C, H, W]
    log_probs: list[Tensor]  # T, each [B]
    rewards: Tensor  # [B]


@cache
def ocr_engine(longest_side: int) -> RapidOCR:
    """The library's defaults, but for the detector, which would enlarge images to 736 pixels."""
    size = {"Det.limit_type": "max", "Det.limit_side_len": longest_side}
    return RapidOCR(params={"Global.log_level": "error", **size})


def read_signs(images: Tensor, prompts: list[str], records: list[dict]) -> list[float]:
    """A reward, 1 where an image's text is the one that its prompt quotes, and else 0."""
    engine = ocr_engine(max(images.shape[2:]))
    scores = []
    for image, prompt in zip(images, prompts):
        pixels = (image * 255).byte().permute(1, 2, 0).flip(-1)
        texts = engine(pixels.cpu().numpy()).txts or ()
        reading = "".join(texts)
        scores.append(float(f'"{reading}"' in prompt))
    return scores


@torch.no_grad()
def encode(run, prompts: list[str]) -> list[Tensor]:
    """The prompts' embeds and pooled embeds; with guidance, followed by those of no prompt."""
    guided = run.config.guidance_scale > 1
    embeds, null_embeds, pooled, null_pooled = run.pipe.encode_prompt(
        prompts,
        None,
        None,
        device=DEVICE,
        do_classifier_free_guidance=guided,
        max_sequence_length=run.config.max_sequence_length,
    )
    if guided:
        embeds = torch.cat([embeds, null_embeds])
        pooled = torch.cat([pooled, null_pooled])
    dtype = run.pipe.transformer.dtype
    return [embeds.to(DEVICE, dtype), pooled.to(DEVICE, dtype)]


def predict_velocity(run, x: Tensor, t: float, text: list[Tensor]) -> Tensor:
    """Conditional and unconditional velocity in one batch, both with a graph if there is one."""
    guided = run.config.guidance_scale > 1
    if guided:
        x = torch.cat([x, x])
    timestep = torch.full((len(x),), 1000 * t, device=x.device)
    x = x.to(text[0].dtype)
    velocity = run.pipe.transformer(x, *text, timestep, return_dict=False)[0].float()
    if not guided:
        return velocity
    conditional, unconditional = velocity.chunk(2)
    unconditional = unconditional.detach()
    return unconditional + run.config.guidance_scale * (conditional - unconditional)


def decode(vae, latents: Tensor) -> Tensor:
    z = latents / vae.config.scaling_factor + vae.config.shift_factor
    images = vae.decode(z.to(vae.dtype), return_dict=False)[0].float()
    return (images / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def sample(run) -> list[Batch]:
    """Draw an epoch's images, with noise in the first `sde_steps` steps, and score them."""
    config = run.config
    run.pipe.scheduler.set_timesteps(flow_grpo.ROLLOUT_DENOISING_STEPS)
    times = run.pipe.scheduler.sigmas.tolist()
    generator = torch.Generator(DEVICE).manual_seed(run.epoch)
    prompts = []
    for record in run.train_records[: config.prompts_per_epoch]:
        prompts += [record["prompt"]] * config.group_size
    batches = []
    for first in range(0, len(prompts), config.batch_size):
        batch = prompts[first : first + config.batch_size]
        text = encode(run, batch)
        shape = [len(batch), *run.latent_shape]
        latents = [torch.randn(shape, generator=generator, device=DEVICE)]
        log_probs = []
        for k in range(flow_grpo.ROLLOUT_DENOISING_STEPS):
            x = latents[k]
            v = predict_velocity(run, x, times[k], text)
            noise_level = config.noise_level if k < config.sde_steps else 0.0
            step = sde_step(v, x, times[k], times[k + 1], noise_level, generator=generator)
            latents.append(step[0])
            log_probs.append(step[1])
        scores = []
        for image, prompt in zip(decode(run.pipe.vae, latents[-1]), batch):
            scores.append(run.reward.function(image[None], [prompt], [{}])[0])
        batches.append(Batch(batch, times, latents, log_probs, torch.tensor(scores)))
    return batches


def optimize(run, batches: list[Batch]) -> dict[str, float]:
    """One optimiser step on all of the samples."""
    config = run.config
    transformer = run.pipe.transformer
    rewards = torch.cat([batch.rewards for batch in batches])
    advantages = group_advantages(rewards.view(-1, config.group_size)).flatten()
    parts = advantages.to(DEVICE).split(config.batch_size)
    deviation = 0.0
    for batch, advantage in zip(batches, parts):
        text = encode(run, batch.prompts)
        for k in range(config.sde_steps):
            x = batch.latents[k]
            t = batch.times[k]
            t_next = batch.times[k + 1]
            step = dict(noise_level=config.noise_level, x_next=batch.latents[k + 1])
            v = predict_velocity(run, x, t, text)
            _, log_prob, mean, std = sde_step(v, x, t, t_next, **step)
            kl = torch.zeros_like(log_prob)
            if config.beta > 0:
                transformer.disable_adapters()
                with torch.no_grad():
                    ref_v = predict_velocity(run, x, t, text)
                    _, _, ref_mean, _ = sde_step(ref_v, x, t, t_next, **step)
                transformer.enable_adapters()
                kl = gaussian_kl(mean, ref_mean, std) * (t - t_next)
            old = batch.log_probs[k]
            loss, _ = grpo_loss(log_prob, old, advantage, kl, config.clip_range, config.beta)
            loss = loss / config.sde_steps / len(batches)
            run.scaler.scale(loss).backward()
            ratio = (log_prob.detach() - old).exp()
            deviation = max(deviation, (ratio - 1).abs().max().item())
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    return {"ratio_deviation": deviation, "trained": 1.0}
