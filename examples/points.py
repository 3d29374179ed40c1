"""Flow-GRPO on points in the plane: the method in half a minute and in one picture, points.png.

    python examples/points.py

The published loop teaches a flow model of eight clouds to draw points further to the right, with
three weights of the KL. Guidance, LoRA, gradient clipping and averaged weights are left out.
"""

import copy
import sys

import torch
from matplotlib.figure import Figure
from torch.nn import Linear, Sequential, SiLU
from torch.nn.functional import mse_loss, pad
from torch.optim import AdamW
from tqdm import trange

sys.path.append(sys.path[0] + "/..")  # flow_grpo.py is in the folder above this file's
from flow_grpo import gaussian_kl, group_advantages, grpo_loss, rollout, sde_step

NOISE_LEVEL = 0.7  # `a` in the paper
CLIP_RANGE = 0.2  # wide, as a log-prob is a mean over 2 numbers here, and over 65,536 for an image
POINTS = 512  # in a batch of the flow's training, and in an epoch of Flow-GRPO
CENTRES = torch.view_as_real(3 * torch.exp(2j * torch.pi / 8 * torch.arange(8)))  # of the clouds
TITLES = (
    "The ODE takes points from\nnoise (black dots) to the data",
    "The SDE, from the same noise,\nadds noise in every step",
    "Seen from below, both agree\nat t = 0.9, 0.7, 0.5 and 0",
    "beta 1: on the ring as before\n(grey), but more on the right",
    "beta 0.3: the points crowd\ninto the clouds on the right",
    "Without KL (beta 0):\nthe points leave the data",
    "Mean reward by epoch, of\nrollouts (lines), evaluations (dots)",
)


def train_flow(steps):
    """An MLP from x and t [B, 3] to the velocity [B, 2] at x = (1 - t) data + t noise."""
    model = Sequential(
        Linear(3, 128), SiLU(), Linear(128, 128), SiLU(), Linear(128, 128), SiLU(), Linear(128, 2)
    )
    optimizer = AdamW(model.parameters())
    for _ in trange(steps, desc="train the flow"):
        cloud = torch.randint(8, [POINTS])
        data = CENTRES[cloud] + 0.3 * torch.randn(POINTS, 2)
        noise = torch.randn_like(data)
        t = torch.rand(POINTS, 1)
        x = (1 - t) * data + t * noise
        velocity = model(torch.cat([x, t], dim=1))
        loss = mse_loss(velocity, noise - data)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def schedule(steps):
    s = torch.linspace(1, 0.003, steps)
    times = 3 * s / (1 + 2 * s)  # SD3's shift, by which more of the steps are spent on the noise
    return times.tolist() + [0.0]


@torch.no_grad()
def sample(model, noise, steps, noise_level):
    """Paths [B, steps + 1, 2] from the noise [B, 2] to data, and the log-probs [B, steps]."""
    times = schedule(steps)
    return rollout(lambda x, k: model(pad(x, (0, 1), value=times[k])), noise, times, noise_level)


def reward(paths):
    return paths[:, -1, 0]  # how far to the right each path ends


def fine_tune(base, beta, epochs):
    """Flow-GRPO. Returns the model, and the mean rewards of each epoch's rollout and evaluation."""
    model = copy.deepcopy(base)
    optimizer = AdamW(model.parameters(), lr=3e-4)
    times = schedule(10)
    rollouts = []
    evaluations = []
    for _ in trange(epochs, desc=f"fine-tune, beta {beta}"):
        noise = torch.randn(POINTS, 2)
        evaluation, _ = sample(model, noise, 40, 0)  # judged by many steps, trained by few
        evaluations.append(reward(evaluation).mean())
        paths, old_log_probs = sample(model, noise, 10, NOISE_LEVEL)
        rewards = reward(paths)
        rollouts.append(rewards.mean())
        # A group shares a prompt. Points have none, so the whole epoch is one group.
        advantages = group_advantages(rewards[None])[0]
        for chosen in torch.randperm(POINTS).chunk(2):  # The second update is off-policy.
            for k in range(9):  # The tenth step has so little noise that its ratios are rounding.
                x = paths[chosen, k]
                x_next = paths[chosen, k + 1]
                t = times[k]
                inputs = pad(x, (0, 1), value=t)
                step = x, t, times[k + 1], NOISE_LEVEL, x_next
                _, log_prob, mean, std = sde_step(model(inputs), *step)
                with torch.no_grad():
                    _, _, ref_mean, _ = sde_step(base(inputs), *step)
                # This is the paper's KL. flow_grpo.py multiplies by |dt|, so its betas differ.
                kl = gaussian_kl(mean, ref_mean, std)
                old = old_log_probs[chosen, k]
                loss, _ = grpo_loss(log_prob, old, advantages[chosen], kl, CLIP_RANGE, beta)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, rollouts, evaluations


def main(flow_steps=4000, epochs=60):
    """Train, draw and print. Returns the paths of 4,000 points by name."""
    torch.manual_seed(0)
    base = train_flow(flow_steps)
    noise = torch.randn(4000, 2)
    ode, _ = sample(base, noise, 40, 0)
    sde, _ = sample(base, noise, 40, NOISE_LEVEL)
    results = {"ODE": ode, "SDE": sde}
    axes = Figure((13, 6.3), layout="constrained").subplot_mosaic("ABCG;DEFG")
    for name, title in zip("ABCDEFG", TITLES):
        axes[name].set_title(title)
    axes["C"].set_yticks([])
    for k in 10, 20, 30, 40:
        x = [ode[:, k, 0], sde[:, k, 0]]
        axes["C"].hist(x, 60, bottom=-40 * k, histtype="step", color=["C0", "C1"])
    for beta, color in (1, "C2"), (0.3, "C4"), (0, "C3"):
        model, rollouts, evaluations = fine_tune(base, beta, epochs)
        results[f"beta {beta}"], _ = sample(model, noise, 40, 0)
        axes["G"].plot(rollouts, "-", evaluations, ".", color=color)
    print("        reward  spread  clouds visited")
    for name, color, (label, paths) in zip(
        "ABDEF", ["C0", "C1", "C2", "C4", "C3"], results.items()
    ):
        panel = axes[name]
        points = paths[:, -1]
        panel.plot(*ode[:, -1].T, ".", ms=0.6, color="silver")
        panel.plot(*points.T, ".", ms=0.6, color=color)
        for path in paths[:5]:
            panel.plot(*path.T, "k.-", lw=0.5, markevery=50)
        panel.axis("equal")
        spread = points.std(dim=0).norm()
        visited = (torch.cdist(points, CENTRES) < 1).sum(dim=0) > 40
        print(f"{label:8} {reward(paths).mean():5.2f} {spread:7.2f} {visited.sum():12} of 8")
    panel.figure.savefig("points.png", dpi=140)
    print("The picture is in points.png.")
    return results


if __name__ == "__main__":
    main()
