"""Tests of variants.py: each formula in float64 or by hand, and that flow_grpo.py runs with it."""

import math
from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import variants
from torch.distributions import Normal
from variants import NotedStep, cps_step, dppo_loss, guard_loss, tempflow_loss, velocity_kl

import flow_grpo
from flow_grpo import gaussian_kl, group_advantages, grpo_loss, rollout, sde_step
from tests.conftest import *  # noqa: F403 (fixtures)
from tests.small import WINDOW, arguments, close, metrics, normal, seeded

SIGMAS = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
STEPS = list(pairwise(SIGMAS))  # SD3's
STEP = (0.6, 0.5, 0.7)  # t, t_next and the noise level, where a test needs just one of each
SHAPES = [(2,), (5, 3), (4, 5, 6), (4, 3, 5, 6)]
of_any_shape = pytest.mark.parametrize("shape", SHAPES)


def per_image(values):
    return values.flatten(1).mean(1)


@pytest.fixture(autouse=True)
def paper(monkeypatch):
    for name in ("COMMAND", "Config", "TINY"):
        monkeypatch.setattr(flow_grpo, name, getattr(flow_grpo, name))  # and back at the end
    yield
    variants.put_in_place("paper")


# ---- The CPS step.
def cps_policy(v, x, t, t_next, level):
    """The paper's Gaussian of x_next, in float64: its mean and std."""
    v = v.double()
    x = x.double()
    s = t_next * math.sin(level * math.pi / 2)
    x_0 = x - t * v
    x_1 = x + (1 - t) * v
    return (1 - t_next) * x_0 + math.sqrt(t_next**2 - s**2) * x_1, s


@of_any_shape
@pytest.mark.parametrize("level", [0.3, 0.8, 1.0])
def test_a_cps_step_is_the_papers_from_the_first_step_to_the_last(shape, level):
    v, x, x_next = normal(3, 10, *shape)
    for t, t_next in STEPS:
        expected_mean, expected_std = cps_policy(v, x, t, t_next, level)
        given, log_prob, mean, std = cps_step(v, x, t, t_next, level, x_next)
        assert torch.equal(given, x_next)
        close(mean, expected_mean)
        close(std.expand_as(mean), torch.full_like(mean, expected_std))
        close(log_prob, -per_image((x_next - expected_mean) ** 2))


def test_a_cps_step_by_hand():
    """t = 1/2, t_next = 1/4, v = 2, x = 1, so x_0 = 1 - 1/2 * 2 = 0 and x_1 = 1 + 1/2 * 2 = 2.

    With the level 1/3, the sine is 1/2: std = 1/8, and mean = sqrt(1/16 - 1/64) * 2 = sqrt(3) / 4.
    """
    v = torch.tensor([[2.0]])
    x = torch.tensor([[1.0]])
    zero = torch.zeros(1, 1)
    _, log_prob, mean, std = cps_step(v, x, 0.5, 0.25, 1 / 3, x_next=zero)
    assert std.item() == pytest.approx(1 / 8)
    assert mean.item() == pytest.approx(math.sqrt(3) / 4)
    assert log_prob.item() == pytest.approx(-3 / 16)


def test_each_image_of_a_cps_step_may_have_times_of_its_own():
    v, x, x_next = normal(3, 10, 4, 5, 6)
    t, t_next = torch.tensor(STEPS).T
    together = cps_step(v, x, t, t_next, 0.8, x_next)
    for k, times in enumerate(STEPS):
        alone = cps_step(v, x, *times, 0.8, x_next)
        for got, expected in zip(together, alone):
            close(got[k], expected.expand_as(got)[k])


def test_a_cps_step_draws_its_noise_as_sde_step_does():
    v, x = normal(2, 10, 4, 5, 6)
    x_next, log_prob, mean, std = cps_step(v, x, *STEP, generator=seeded(1))
    noise = torch.randn(x.shape, generator=seeded(1))
    close(x_next, mean + std * noise)
    _, scored, _, _ = cps_step(v, x, *STEP, x_next)
    assert torch.equal(scored, log_prob)


def test_without_noise_a_cps_step_is_that_of_the_ode():
    v, x = normal(2, 10, 4, 5, 6)
    for t, t_next in STEPS:
        mean, _ = cps_policy(v, x, t, t_next, 0)
        x_next, log_prob, _, std = cps_step(v, x, t, t_next, 0)
        close(x_next, mean)
        assert torch.equal(x_next, sde_step(v, x, t, t_next, 0)[0])
        assert not log_prob.any()
        assert not std.any()


def test_the_gradient_of_a_cps_log_prob_is_2_std_squared_of_the_gaussians():
    """It goes through the mean alone: x_next is data."""
    v, x = normal(2, 10, 4, 5, 6)
    v.requires_grad_()
    x_next, log_prob, mean, std = cps_step(v, x, *STEP)
    assert not x_next.requires_grad
    (gradient,) = torch.autograd.grad(log_prob.sum(), v, retain_graph=True)
    gaussian = per_image(Normal(mean, std).log_prob(x_next))
    (expected,) = torch.autograd.grad(gaussian.sum(), v)
    close(gradient, 2 * std**2 * expected, atol=1e-7)


def noise_level_after(step, t, t_next):
    """The std of x_next's noise, if x is t eps around the data 0, so that the velocity is eps."""
    eps = torch.ones(1, 1)
    _, _, mean, std = step(eps, t * eps, t, t_next, 0.8)
    return math.hypot(mean, std)


def test_a_cps_step_has_the_noise_of_the_flow_and_the_sdes_has_more():
    for t, t_next in STEPS:
        assert noise_level_after(cps_step, t, t_next) == pytest.approx(t_next, abs=1e-6)
        assert noise_level_after(sde_step, t, t_next) > t_next + 1e-3


def test_a_rollout_of_cps_steps_has_the_noise_of_the_flow():
    variants.put_in_place("cps")
    noise = normal(100, 500)
    path, _ = rollout(lambda x, k: x / SIGMAS[k], noise, SIGMAS, 0.8, seeded(1))
    for k, t in enumerate(SIGMAS):
        std = path[:, k].std().item()
        assert std == pytest.approx(t, rel=0.02, abs=1e-6)


# ---- The losses.
CLIP = 0.01
BETA = 0.5
DT = -0.2


def policies(std, shift=0.1, count=6):
    """Samples of an old policy, and a policy whose means are `shift` off. All is in float64."""
    noise, old_mean, change = normal(3, count, 50).double()
    p = SimpleNamespace(noise=noise, change=shift * change)
    p.std = torch.full((count, 1), std, dtype=torch.float64)
    p.mean = (old_mean + p.change).requires_grad_()
    x_next = old_mean + p.std * noise
    p.log_prob = per_image(Normal(p.mean, p.std).log_prob(x_next))
    p.old_log_prob = per_image(Normal(old_mean, p.std).log_prob(x_next))
    p.advantages = torch.linspace(-2, 2, count).double()
    p.kl = torch.arange(count).double()
    p.scores = (p.log_prob, p.old_log_prob, p.advantages, p.kl)
    p.means = (p.mean, old_mean, p.std)
    return p


def surrogate(log_ratio, advantages):
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


def gradient(loss, p):
    (found,) = torch.autograd.grad(loss, p.mean, retain_graph=True)
    return found


@pytest.mark.parametrize("std", [0.1, 0.7])
def test_grpo_guards_loss_is_the_papers(std):
    """Its log-ratio is (mean - old_mean) noise, averaged over elements, whatever the std."""
    p = policies(std)
    log_ratio = per_image(p.change * p.noise)
    clipped = (log_ratio.exp() - 1).abs() > CLIP
    assert 0 < clipped.sum() < 6
    loss, stats = guard_loss(*p.scores, CLIP, BETA, *p.means, DT)
    close(loss, surrogate(log_ratio, p.advantages) / 0.2 + BETA * p.kl.mean())
    close(stats["ratio_mean"], log_ratio.exp().mean())
    close(stats["clipfrac"], clipped.double().mean())
    close(stats["kl"], p.kl.mean())


@pytest.mark.parametrize("std", [0.1, 0.7])
def test_grpo_guards_gradient_is_that_of_its_ratio(std):
    p = policies(std)
    loss, _ = guard_loss(*p.scores, CLIP, BETA, *p.means, DT)
    _, old_mean, _ = p.means
    log_ratio = per_image((p.mean - old_mean) * p.noise)
    expected = gradient(surrogate(log_ratio, p.advantages) / 0.2, p)
    assert expected.any()
    close(gradient(loss, p), expected, atol=1e-9)


@pytest.mark.parametrize("std", [0.1, 0.7])
def test_without_grpo_guard_the_log_ratio_is_negative_on_average(std):
    """It is -b, which is (mean - old_mean)^2 / (2 std^2). With GRPO-Guard, it is 0."""
    p = policies(std, shift=0.1, count=4000)
    log_ratio = p.log_prob - p.old_log_prob
    error = log_ratio.std() / math.sqrt(4000)
    b = 0.1**2 / (2 * std**2)
    assert abs(log_ratio.mean() + b) < 4 * error
    assert b > 5 * error
    _, stats = guard_loss(*p.scores, CLIP, BETA, *p.means, DT)
    assert abs(stats["ratio_mean"] - 1) < 4 * error * std


def test_with_grpo_guard_ratios_are_of_one_size_whatever_the_std():
    sizes = []
    for std in (0.1, 0.7):
        p = policies(std)
        _, stats = guard_loss(*p.scores, CLIP, BETA, *p.means, DT)
        sizes.append(stats["approx_kl"])
    close(*sizes)


def test_each_image_of_grpo_guards_loss_may_have_a_dt_of_its_own():
    p = policies(0.7)
    dt = -torch.linspace(0.1, 0.6, 6).double()
    together, _ = guard_loss(*p.scores, CLIP, 0, *p.means, dt)
    alone = []
    for i in range(6):
        scores = [part[i : i + 1] for part in p.scores]
        means = [part[i : i + 1] for part in p.means]
        loss, _ = guard_loss(*scores, CLIP, 0, *means, dt[i])
        alone.append(loss)
    close(together, sum(alone) / 6)


def test_on_policy_grpo_guards_gradient_is_flow_grpos_times_std_by_dt():
    """b has no gradient where the policy is the old one."""
    p = policies(0.7, shift=0)
    loss, _ = guard_loss(*p.scores, CLIP, BETA, *p.means, DT)
    plain, _ = grpo_loss(*p.scores, CLIP, BETA)
    expected = gradient(plain, p) * 0.7 / 0.2
    assert expected.any()
    close(gradient(loss, p), expected, atol=1e-9)


# Ratio, advantage, divergence, and the gradient by the log-prob: -ratio times advantage, or 0 where
# the mask of the threshold 0.1 holds.
MASKED = [
    (1.5, 2.0, 0.09, -3.0),
    (1.5, 2.0, 0.11, 0.0),
    (0.5, 2.0, 0.09, -1.0),
    (0.5, 2.0, 0.11, -1.0),
    (1.5, -2.0, 0.09, 3.0),
    (1.5, -2.0, 0.11, 3.0),
    (0.5, -2.0, 0.09, 1.0),
    (0.5, -2.0, 0.11, 0.0),
]


def test_flow_dppo_masks_what_moves_further_away_beyond_the_threshold():
    """With std 1/2, the divergence is 2 mean^2. Two of the eight images are masked."""
    ratio, advantages, divergence, expected = torch.tensor(MASKED).T
    log_prob = ratio.log().requires_grad_()
    old = torch.zeros(8)
    kl = torch.arange(1.0, 9.0)
    mean = (divergence / 2).sqrt()[:, None]
    old_mean = torch.zeros(8, 1)
    std = torch.full((8, 1), 0.5)
    loss, stats = dppo_loss(log_prob, old, advantages, kl, 0.1, BETA, mean, old_mean, std)
    loss.backward()
    close(loss, expected.mean() + BETA * kl.mean())
    close(log_prob.grad, expected / 8)
    assert stats["clipfrac"] == 2 / 8


def test_flow_dppos_threshold_is_for_a_mean_over_elements():
    p = policies(0.5, count=40)
    divergence = per_image(p.change**2 / (2 * 0.5**2))
    threshold = divergence.mean().item()
    outward = (p.log_prob > p.old_log_prob) == (p.advantages > 0)
    masked = outward & (divergence > threshold)
    assert 0 < masked.sum() < outward.sum()
    _, stats = dppo_loss(*p.scores, threshold, BETA, *p.means)
    close(stats["clipfrac"], masked.float().mean())


def test_tempflow_weighs_the_surrogate_by_std_and_leaves_the_kl():
    p = policies(0.4)
    loss, stats = tempflow_loss(*p.scores, CLIP, BETA, p.std)
    plain = surrogate(p.log_prob - p.old_log_prob, p.advantages)
    close(loss, 2.25 * 0.4 * plain + BETA * p.kl.mean())
    close(stats["kl"], p.kl.mean())


def test_tempflows_weights_are_1_on_average():
    x = torch.zeros(1, 1)
    weights = []
    for t, t_next in STEPS[:9]:
        _, _, _, std = sde_step(x, x, t, t_next, 0.7)
        weights.append(2.25 * std.item())
    assert sum(weights) / 9 == pytest.approx(1, abs=0.002)


def test_with_tempflow_the_gradient_by_the_mean_is_of_one_size_whatever_the_std():
    gradients = []
    for std in (0.1, 0.7):
        p = policies(std, shift=0)
        loss, _ = tempflow_loss(*p.scores, CLIP, BETA, p.std)
        gradients.append(gradient(loss, p))
    close(*gradients, atol=1e-9)


def test_the_kl_on_velocities_by_hand():
    velocity = torch.tensor([[1.0, 5.0], [2.0, 2.0]])
    ref_velocity = torch.tensor([[0.0, 2.0], [2.0, 2.0]])
    assert velocity_kl(velocity, ref_velocity).tolist() == [5, 0]


def test_the_kl_on_velocities_is_the_steps_but_for_a_factor():
    v, ref_v, x = normal(3, 10, 4, 5, 6)
    t, t_next, level = STEP
    sigma = level * math.sqrt(t / (1 - t))
    root = sigma * (1 - t) / (2 * t) + 1 / sigma
    factor = (t - t_next) / 2 * root**2
    _, _, mean, std = sde_step(v, x, *STEP)
    _, _, ref_mean, _ = sde_step(ref_v, x, *STEP)
    kl = gaussian_kl(mean, ref_mean, std)
    close(kl, factor * velocity_kl(v, ref_v), atol=1e-8)


# ---- In a loop of one's own, and in flow_grpo.py.
def guarded(scores, means, dt):
    return guard_loss(*scores, 0.2, 0, *means, dt)


def masked(scores, means, dt):
    return dppo_loss(*scores, 0.02, 0, *means)


def weighted(scores, means, dt):
    return tempflow_loss(*scores, 0.2, 0, means[2])


TIMES = [1.0, 0.9, 0.7, 0.4, 0.0]


@pytest.mark.parametrize("loss_of", [guarded, masked, weighted])
def test_in_a_loop_of_ones_own_the_reward_rises(loss_of):
    """Ten epochs of four optimiser steps each. The reward is how far to the right points are."""
    torch.manual_seed(0)
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
    rewards = []
    for _ in range(10):
        with torch.no_grad():
            noise = torch.randn(96, 2)
            path, _ = rollout(lambda x, k: net(x), noise, TIMES, 0.7)
            # The old policy's log-probs and means, before it changes.
            old = [scored(net, path, k) for k in range(3)]
        reward = path[:, -1, 0]
        rewards.append(reward.mean().item())
        advantages = group_advantages(reward.view(4, 24)).flatten()
        for _ in range(4):
            for k in range(3):
                old_log_prob, old_mean, _ = old[k]
                log_prob, mean, std = scored(net, path, k)
                scores = (log_prob, old_log_prob, advantages, torch.zeros(96))
                loss, _ = loss_of(scores, (mean, old_mean, std), TIMES[k + 1] - TIMES[k])
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert rewards[-1] > rewards[0] + 0.5


def scored(net, path, k):
    x = path[:, k]
    step = (x, TIMES[k], TIMES[k + 1], 0.7, path[:, k + 1])
    _, log_prob, mean, std = sde_step(net(x), *step)
    return log_prob, mean, std


def test_a_noted_step_finds_the_means_that_samples_were_drawn_from():
    """Six images are drawn in batches of 4 and 2, and three of them are trained on."""
    step = NotedStep()
    x, v, new_v, ref_v = normal(4, 6, 4, 5, 6)
    first = step(v[:4], x[:4], *STEP)
    second = step(v[4:], x[4:], *STEP)
    x_next, _, old_mean, _ = [torch.cat(parts) for parts in zip(first, second)]
    chosen = [5, 0, 3]
    v = new_v[chosen].requires_grad_()
    given = (x[chosen], *STEP, x_next[chosen])
    got = step(v, *given)
    step(ref_v[chosen], *given)
    expected = sde_step(v, *given)
    for part, expected_part in zip(got, expected):
        assert torch.equal(part, expected_part)
    _, _, mean, std = expected
    assert torch.equal(step.old_mean, old_mean[chosen])
    assert torch.equal(step.mean, mean)
    assert torch.equal(step.std, std)
    assert torch.equal(step.velocity, v)
    assert torch.equal(step.ref_velocity, ref_v[chosen])
    assert step.dt == pytest.approx(-0.1)


def test_a_noted_step_keeps_the_means_of_one_epoch():
    step = NotedStep()
    x, v = normal(2, 6, 2)
    policy_v = v.clone().requires_grad_()
    for _ in range(2):
        x_next, _, _, _ = step(v, x, *STEP)
        step(v, x, 0.6, 0.5, 0)  # The ODE's steps are no part of it.
        assert len(step.old_means) == 6
        step(policy_v, x, *STEP, x_next)


def test_in_flow_grpo_each_gets_what_it_needs():
    x, v, new_v, ref_v = normal(4, 6, 4, 5, 6)
    new_v.requires_grad_()
    variants.put_in_place("guard")
    x_next, old_log_prob, old_mean, _ = flow_grpo.sde_step(v, x, *STEP)
    _, log_prob, mean, std = flow_grpo.sde_step(new_v, x, *STEP, x_next)
    _, _, ref_mean, _ = flow_grpo.sde_step(ref_v, x, *STEP, x_next)
    scores = (log_prob, old_log_prob, torch.linspace(-2, 2, 6), torch.ones(6), CLIP, BETA)
    expected = {
        "guard": guard_loss(*scores, mean, old_mean, std, -0.1),
        "dppo": dppo_loss(*scores, mean, old_mean, std),
        "tempflow": tempflow_loss(*scores, std),
        "paper": grpo_loss(*scores),
    }
    for name, (loss, _) in expected.items():
        variants.put_in_place(name)
        got, _ = flow_grpo.grpo_loss(*scores)
        close(got, loss)
    variants.put_in_place("velocity-kl")
    kl = flow_grpo.gaussian_kl(mean, ref_mean, std)
    close(kl * 0.1, velocity_kl(new_v, ref_v))  # `optimize` multiplies it by |dt|.


def test_an_interrupted_run_goes_on_by_its_variant(work, model, capsys, monkeypatch):
    monkeypatch.setattr(flow_grpo, "train", Mock(side_effect=KeyboardInterrupt))
    assert variants.main(["cps", *arguments(model)]) == 130
    command = "to go on: python examples/variants.py cps --resume 'out'"
    assert command in capsys.readouterr().err


def test_a_run_goes_on_by_its_own_variant_alone(work, model, capsys, monkeypatch):
    own_config = flow_grpo.Config
    assert variants.main(["cps", *arguments(model, epochs=1)]) == 0
    assert variants.main(["guard", "--resume=out", "--epochs=2"]) == 2
    assert "--variant was cps in out" in capsys.readouterr().err
    monkeypatch.setattr(flow_grpo, "Config", own_config)
    assert flow_grpo.main(["--resume=out", "--epochs=2"]) == 2
    assert "unexpected keyword argument 'variant'" in capsys.readouterr().err
    assert variants.main(["cps", "--resume=out", "--epochs=2"]) == 0
    assert len(metrics("out")) == 5


def test_the_script_trains_with_each(work, model):
    given = {"epochs": 1, "eval_every": 1, "beta": 1.0, "noise_level": 0.8} | WINDOW
    logged = {}
    for name in variants.VARIANTS:
        assert variants.main([name, *arguments(model, out=name, **given)]) == 0
        logged[name] = metrics(name)
    base, epoch, _ = logged.pop("paper")
    assert epoch["ratio_deviation"] < 1e-6
    for name, (own_base, own_epoch, evaluation) in logged.items():
        assert own_base == base  # An evaluation has no noise.
        assert own_epoch["ratio_deviation"] < 1e-6
        assert own_epoch["grad_norm"] != epoch["grad_norm"]
        assert (own_epoch["reward"] == epoch["reward"]) == (name != "cps")
        assert math.isfinite(evaluation["eval_reward"])


def test_the_papers_functions_can_be_put_back():
    variants.put_in_place("velocity-kl")
    variants.put_in_place("paper")
    assert flow_grpo.sde_step is sde_step
    assert flow_grpo.gaussian_kl is gaussian_kl
    assert flow_grpo.grpo_loss is grpo_loss


@pytest.mark.parametrize("argv", [[], ["--epochs=1"], ["cqs"]])
def test_the_script_names_the_variants(argv, capsys):
    assert variants.main(argv) == 2
    assert "give one of paper, cps, guard" in capsys.readouterr().err
