"""What later papers change in Flow-GRPO, each as a function in place of one of flow_grpo.py's five.

    python examples/variants.py cps --prompt-file prompts.txt --noise-level 0.8 --beta 0

This is `python flow_grpo.py --prompt-file prompts.txt ...` with the CPS step. The names are

cps          the step of Flow-CPS, arXiv 2509.05952
guard        the loss of GRPO-Guard, arXiv 2510.22319
dppo         the mask of Flow-DPPO, arXiv 2606.11025, in place of the clip
tempflow     the weights of the steps in TempFlow-GRPO, arXiv 2508.04324
velocity-kl  the KL penalty on velocities, which Flow-GRPO's authors prefer in their issue 198
paper        none: what flow_grpo.py does by itself

A run goes on by `python examples/variants.py NAME --resume FOLDER`, with the NAME of its variant.
In a loop of your own, call the functions: each takes the arguments of the one that it replaces, and
then what else it needs. But velocity_kl takes the two velocities alone. The losses are for the
log-probs of `sde_step`, as those of `cps_step` have no variance.
"""

import math
import sys
from dataclasses import dataclass

import torch

sys.path.append(sys.path[0] + "/..")  # flow_grpo.py is in the folder above this file's
import flow_grpo
from flow_grpo import gaussian_kl, grpo_loss, sde_step


# ---- The variants. The notation is that of flow_grpo.py, whose docstrings hold here, too.
def cps_step(velocity, x, t, t_next, noise_level, x_next=None, generator=None):
    """In place of sde_step: coefficients-preserving sampling (Flow-CPS, arXiv 2509.05952).

    x_next = (1 - t_next) x_0 + sqrt(t_next^2 - std^2) x_1 + std eps,
    std = t_next sin(noise_level pi / 2),  x_0 = x - t v,  x_1 = x + (1 - t) v.
    Its noises have the variance t_next^2 together, which is just what the flow has at t_next. The
    SDE's steps have more, which stays visible in the images.

    Take beta 0: in late steps std is so small that gaussian_kl, which divides by its square, would
    drown the reward.

    noise_level: from 0 to 1. The log_prob is -(x_next - mean)^2, averaged over elements: as in the
    paper's code, it lacks the variance, so its ratios can't be compared with those of sde_step.
    """
    if not 0 <= noise_level <= 1:
        raise ValueError(f"the noise level of CPS is within 0..1, but {noise_level} was given")
    if noise_level == 0:  # Both are the ODE's Euler step then.
        return sde_step(velocity, x, t, t_next, noise_level, x_next)
    velocity = velocity.float()
    x = x.float()
    per_image = [-1] + [1] * (x.ndim - 1)
    t = (x.new_zeros(len(x)) + t).float().view(per_image)
    t_next = (x.new_zeros(len(x)) + t_next).float().view(per_image)
    x_0 = x - t * velocity
    x_1 = x + (1 - t) * velocity
    angle = noise_level * math.pi / 2
    std = t_next * math.sin(angle)
    # sqrt(t_next^2 - std^2) is t_next cos(angle).
    mean = (1 - t_next) * x_0 + t_next * math.cos(angle) * x_1
    if x_next is None:
        device = generator.device if generator else x.device
        noise = torch.randn(x.shape, generator=generator, device=device)
        x_next = mean + std * noise.to(x.device)
    x_next = x_next.detach().float()
    log_prob = -((x_next - mean) ** 2)
    return x_next, log_prob.flatten(1).mean(1), mean, std


def guard_loss(log_prob, old_log_prob, advantages, kl, clip_range, beta, mean, old_mean, std, dt):
    """In place of grpo_loss: GRPO-Guard (arXiv 2510.22319), which balances the steps.

    ratio = exp((log_prob - old_log_prob + b) std),  b = (mean - old_mean)^2 / (2 std^2),
    loss = (the clipped surrogate) / |dt| + beta kl.

    With noise eps = (x_next - old_mean) / std, the log-ratio is (mean - old_mean) eps: without b,
    it would be negative on average, so that ratios above 1 were hardly ever clipped.

    mean, old_mean: [B, ...], of the policy and of that which drew x_next; std: of both, from
    sde_step; dt: t_next - t, a float or [B]. Ratios are nearer to 1 than those of grpo_loss: with
    images of 512 x 512 pixels, verl-omni takes a clip range of 2e-6.
    """
    bias = gaussian_kl(mean, old_mean, std)
    log_ratio = (log_prob - old_log_prob + bias) * std.flatten()
    old_log_ratio = torch.zeros_like(log_ratio)
    # A factor of an advantage is one of its term in the loss.
    return grpo_loss(log_ratio, old_log_ratio, advantages / abs(dt), kl, clip_range, beta)


def dppo_loss(log_prob, old_log_prob, advantages, kl, clip_range, beta, mean, old_mean, std):
    """In place of grpo_loss: Flow-DPPO (arXiv 2606.11025), which masks instead of clipping.

    policy_loss = -ratio advantage, but 0 where the ratio moves further away from 1, and
    (mean - old_mean)^2 / (2 std^2), averaged over elements, has reached the threshold.
    This is the policy's exact KL to the one that drew x_next. A ratio is but a noisy sample of it.

    clip_range: the threshold. It is 1e-5 in the paper's code. `clipfrac` is the share of the
    masked images. mean, old_mean, std: as in guard_loss.
    """
    divergence = gaussian_kl(mean, old_mean, std)
    outward = (log_prob - old_log_prob) * advantages > 0
    masked = outward & (divergence >= clip_range)
    kept = advantages.masked_fill(masked, 0)
    loss, stats = grpo_loss(log_prob, old_log_prob, kept, kl, math.inf, beta)
    return loss, stats | {"clipfrac": masked.float().mean()}


def tempflow_loss(log_prob, old_log_prob, advantages, kl, clip_range, beta, std):
    """In place of grpo_loss: TempFlow-GRPO's weights of the steps (arXiv 2508.04324).

    loss = (the clipped surrogate) 2.25 std + beta kl. The paper's trees of images are left out.

    A log-prob's gradient by the step's mean grows as 1 / std, so that it is largest in late steps,
    which decide on little. With std, it is of one size in all. 2.25, as in the paper's code, makes
    the weights 1 on average over the first 9 of SD3's 10 steps, at noise level 0.7.
    """
    weight = 2.25 * std.flatten()
    return grpo_loss(log_prob, old_log_prob, advantages * weight, kl, clip_range, beta)


def velocity_kl(velocity, ref_velocity):
    """In place of gaussian_kl, with velocities for means: (v - v_ref)^2, averaged over elements.

    Flow-GRPO's authors prefer it (issue 198 of yifan123/flow_grpo). No |dt| belongs to it. It
    weighs all steps alike, where |dt| times the KL is this times
    dt^2 / 2 (sigma_t (1 - t) / (2t) + 1 / sigma_t)^2, which is 1 / 23 on average over SD3's trained
    steps. So beta / 23 weighs as much. Users take beta / 100 (issue 204).

    velocity, ref_velocity: [B, ...]. Returns [B].
    """
    return ((velocity - ref_velocity) ** 2).flatten(1).mean(1)


# ---- In flow_grpo.py. It passes no more to a function than the paper's needs.
class NotedStep:
    """sde_step, which also notes what a variant needs of the step that `optimize` is at.

    That is velocity, ref_velocity (if beta > 0), mean, old_mean, std, and dt as a float. A rollout
    gives no x_next, the update gives one, and there only the policy's velocity has a gradient.
    `optimize` shuffles the images, so each sample's old mean is found by the sample's bytes. The
    old means of an epoch take as much main memory as its latents.
    """

    def __init__(self):
        self.scored = False
        self.old_means = {}  # a sample that a rollout has drawn -> the mean that it was drawn from

    def __call__(self, velocity, x, t, t_next, noise_level, x_next=None, generator=None):
        drawn = x_next is None
        x_next, log_prob, mean, std = sde_step(
            velocity, x, t, t_next, noise_level, x_next, generator
        )
        if drawn and noise_level > 0:
            if self.scored:  # A new epoch begins.
                self.old_means.clear()
                self.scored = False
            for sample, old_mean in zip(x_next, mean):
                self.old_means[self.key(sample)] = old_mean.cpu()
        elif not drawn and velocity.requires_grad:
            old_means = [self.old_means[self.key(sample)] for sample in x_next]
            self.velocity = velocity
            self.mean = mean
            self.old_mean = torch.stack(old_means).to(mean.device)
            self.std = std
            self.dt = t_next - t
            self.scored = True
        elif not drawn:
            self.ref_velocity = velocity
        return x_next, log_prob, mean, std

    def key(self, sample):
        return hash(sample.cpu().numpy().tobytes())


now = NotedStep()
PAPER = {"sde_step": sde_step, "gaussian_kl": gaussian_kl, "grpo_loss": grpo_loss}
VARIANTS = {  # what is put in place of flow_grpo.py's functions
    "paper": {},
    "cps": {"sde_step": cps_step},
    "guard": {
        "sde_step": now,
        "grpo_loss": lambda *args: guard_loss(*args, now.mean, now.old_mean, now.std, now.dt),
    },
    "dppo": {
        "sde_step": now,
        "grpo_loss": lambda *args: dppo_loss(*args, now.mean, now.old_mean, now.std),
    },
    "tempflow": {"sde_step": now, "grpo_loss": lambda *args: tempflow_loss(*args, now.std)},
    "velocity-kl": {
        "sde_step": now,
        # `optimize` multiplies by |dt|.
        "gaussian_kl": lambda *_: velocity_kl(now.velocity, now.ref_velocity) / abs(now.dt),
    },
}


@dataclass
class Config(flow_grpo.Config):
    """That of a run by a variant: neither another nor flow_grpo.py alone goes on with it."""

    variant: str = "paper"  # The command's first word gives it.


def put_in_place(name):
    """From here on, flow_grpo.py works by this variant."""
    for function_name, function in (PAPER | VARIANTS[name]).items():
        setattr(flow_grpo, function_name, function)


def main(argv):
    """Train by the variant argv[0], with the flags of flow_grpo.py. Returns the exit code."""
    if argv in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if not argv or argv[0] not in VARIANTS:
        return flow_grpo.report(2, f"give one of {', '.join(VARIANTS)}, then flow_grpo.py's flags")
    put_in_place(argv[0])
    flow_grpo.COMMAND = f"examples/variants.py {argv[0]}"
    flow_grpo.Config = Config
    flow_grpo.TINY = Config(**vars(flow_grpo.TINY))
    return flow_grpo.main([*argv[1:], "--variant", argv[0]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
