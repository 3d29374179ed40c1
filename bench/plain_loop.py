"""Flow-GRPO as one would write it first: what throughput.py compares flow_grpo.py with.

It encodes text for each batch, judges images one by one, builds a graph for the unconditional velocity,
trains on every sample in one update, and compiles nothing. It takes only the mathematics of flow_grpo.py.
"""

from itertools import pairwise

import torch
from torch import Tensor

from flow_grpo import gaussian_kl, group_advantages, grpo_loss, sde_step


def encode(run, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """The prompts' text and, with guidance, the empty prompt's as often."""
    guided, length = run.config.guidance_scale > 1, run.config.max_sequence_length
    with torch.no_grad():
        encoded = run.pipe.encode_prompt(
            prompts, None, None, run.device, 1, guided, max_sequence_length=length
        )
    embeds, pooled = (torch.cat(pair) if guided else pair[0] for pair in (encoded[:2], encoded[2:]))
    return embeds.to(run.pipe.transformer.dtype), pooled.to(run.pipe.transformer.dtype)


def predict_velocity(run, x: Tensor, t: float, text: tuple[Tensor, Tensor]) -> Tensor:
    """Conditional and unconditional velocity in one batch, both with a graph if there is one."""
    guided, dtype = run.config.guidance_scale > 1, text[0].dtype
    x = torch.cat([x, x]) if guided else x
    timestep = torch.full((len(x),), 1000 * t, device=x.device)
    v = run.pipe.transformer(x.to(dtype), *text, timestep, return_dict=False)[0].float()
    if not guided:
        return v
    conditional, unconditional = v.chunk(2)
    return unconditional.detach() + run.config.guidance_scale * (conditional - unconditional.detach())


@torch.no_grad()
def collect(run, generator: torch.Generator) -> list[tuple]:
    """Batches of prompts, times, latents, log-probs and rewards. Noise is in the first `sde_steps` steps."""
    config, vae, batches = run.config, run.pipe.vae, []
    run.pipe.scheduler.set_timesteps(10)
    times = run.pipe.scheduler.sigmas.tolist()
    prompts = [r["prompt"] for r in run.train_records[: config.prompts_per_epoch]]
    prompts = [prompt for prompt in prompts for _ in range(config.group_size)]
    for i in range(0, len(prompts), config.batch_size):
        batch = prompts[i : i + config.batch_size]
        text, log_probs = encode(run, batch), []
        path = [torch.randn(len(batch), *run.latent_shape, generator=generator, device=run.device)]
        for k, (t, t_next) in enumerate(pairwise(times)):
            v, level = predict_velocity(run, path[-1], t, text), config.noise_level * (k < config.sde_steps)
            x, log_prob, _, _ = sde_step(v, path[-1], t, t_next, level, generator=generator)
            path.append(x)
            log_probs.append(log_prob)
        z = path[-1] / vae.config.scaling_factor + vae.config.shift_factor
        images = (vae.decode(z.to(vae.dtype), return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)
        judge = run.rewards[0][2]
        rewards = [judge(image[None], [prompt], [{}])[0] for image, prompt in zip(images, batch)]
        batches.append((batch, times, path, log_probs, torch.tensor(rewards)))
    return batches


def update(run, batches: list[tuple], generator: torch.Generator) -> dict[str, float]:
    """One optimiser step on all of the samples."""
    config, transformer, deviation = run.config, run.pipe.transformer, 0.0
    rewards = torch.cat([batch[-1] for batch in batches]).view(-1, config.group_size)
    advantages = group_advantages(rewards).flatten().to(run.device).split(config.batch_size)
    for (batch, times, path, log_probs, _), advantage in zip(batches, advantages):
        text = encode(run, batch)
        for k in range(config.sde_steps):
            step = path[k], times[k], times[k + 1], config.noise_level, path[k + 1]
            _, log_prob, mean, std = sde_step(predict_velocity(run, path[k], times[k], text), *step)
            kl = torch.zeros_like(log_prob)
            if config.beta > 0:
                transformer.disable_adapters()
                with torch.no_grad():
                    _, _, ref_mean, _ = sde_step(predict_velocity(run, path[k], times[k], text), *step)
                transformer.enable_adapters()
                kl = gaussian_kl(mean, ref_mean, std)
            loss, _ = grpo_loss(log_prob, log_probs[k], advantage, kl, config.clip_range, config.beta)
            run.scaler.scale(loss / config.sde_steps / len(batches)).backward()
            deviation = max(deviation, (log_prob.detach() - log_probs[k]).expm1().abs().max().item())
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    return {"ratio_deviation": deviation, "trained": 1.0}
