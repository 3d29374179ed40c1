"""Flow-GRPO, formula by formula, and the proof that flow_grpo.py computes it.

Read it from top to bottom: the method, with hardly more than torch and a seeded generator; an epoch
of a small random model; last, that the reward rises. [paper] and [code] are as in flow_grpo.py. Its
other tests are in tests/.
"""

import inspect
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.distributions import Normal, kl_divergence

import flow_grpo
from flow_grpo import gaussian_kl, group_advantages, grpo_loss, rollout, schedule, sde_step
from tests import small
from tests.conftest import *  # noqa: F403 (fixtures)
from tests.small import close, copied, is_standard_normal, joined, normal, seeded, small_run

# ---- The method. Time falls from t = 1, which is noise, to t = 0, which is the image, with
# x_t = (1 - t) x_0 + t x_1 and velocity = x_1 - x_0. These are SD3's published ten steps:
SIGMAS = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
STEPS = list(pairwise(SIGMAS))
SHAPES = {"points": (2,), "tokens": (5, 3), "images": (4, 5, 6), "videos": (4, 3, 5, 6)}
of_any_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def test_the_schedule_is_the_published_one():
    times = schedule(FlowMatchEulerDiscreteScheduler(shift=3.0), 10)
    assert times == pytest.approx(SIGMAS, abs=5e-5)


def policy(velocity, x, t, t_next, a):
    """[paper]'s Gaussian of x_next, in float64: the Euler-Maruyama step of the SDE

    dx = [v + sigma_t^2 / (2t) (x + (1 - t) v)] dt + sigma_t dw,  sigma_t = a sqrt(t / (1 - t)).
    At t = 1, sigma_t has 1 - t_next in place of 1 - t, as in [code].
    """
    v = velocity.double()
    x = x.double()
    one_minus_t = 1 - t_next if t == 1 else 1 - t
    sigma = a * math.sqrt(t / one_minus_t)
    drift = v + sigma**2 / (2 * t) * (x + (1 - t) * v)
    mean = x + drift * (t_next - t)
    return Normal(mean, sigma * math.sqrt(t - t_next))


@of_any_shape
@pytest.mark.parametrize("level", [0.3, 0.7, 1.2])
def test_a_step_is_the_papers_gaussian(shape, level):
    v, x, x_next = normal(3, 10, *shape)
    for t, t_next in STEPS:
        pi = policy(v, x, t, t_next, level)
        _, log_prob, mean, std = sde_step(v, x, t, t_next, level, x_next)
        close(mean, pi.mean)
        close(std.expand_as(mean), pi.stddev)
        close(log_prob, mean_log_prob(pi, x_next))


def mean_log_prob(pi, x_next):
    """As in [code], it is a mean over an image's elements, not their sum."""
    return per_image(pi.log_prob(x_next.double()))


def per_image(values):
    return values.flatten(1).mean(1)


STEP = (0.6, 0.5, 0.7)  # t, t_next and the noise level, where a test needs just one of each


def one(value):
    """A batch of one image of one element."""
    return torch.tensor([[float(value)]])


def test_a_step_by_hand():
    """t = 1/2, dt = -1/4, a = 1: sigma = 1, and the drift is 2 + 1 (1 + 1/2 * 2) = 4."""
    _, log_prob, mean, std = sde_step(one(2), one(1), 0.5, 0.25, 1.0, x_next=one(0.5))
    assert mean == 1 - 4 / 4
    assert std == 1 / 2  # sigma sqrt(-dt)
    # x_next is one std above the mean: log N = -1/2 - log std - log(2 pi) / 2.
    assert log_prob.item() == pytest.approx(-0.5 + math.log(2) - 0.918939)


def test_the_first_step_by_hand():
    """t = 1, dt = -1/4, a = 1/2: sigma = 1/2 sqrt(1 / (1/4)) = 1; the drift is 2 + 1/2 * 4 = 4."""
    _, _, mean, std = sde_step(one(2), one(4), 1.0, 0.75, 0.5)
    assert mean == 4 - 4 / 4
    assert std == 0.5  # At t = 1, it is the noise level, whatever dt.


@of_any_shape
def test_each_image_may_have_times_of_its_own(shape):
    v, x, x_next = normal(3, len(STEPS), *shape)
    t, t_next = torch.tensor(STEPS).T
    together = sde_step(v, x, t, t_next, 0.7, x_next)
    for k, times in enumerate(STEPS):
        alone = sde_step(v, x, *times, 0.7, x_next)
        for got, expected in zip(together, alone):
            close(got[k], expected.expand_as(got)[k])


WRONG = [(900.0, 800.0), (1.1, 0.9), (0.5, 0.5), (0.4, 0.5), (0.5, -0.1), (math.nan, 0)]


@pytest.mark.parametrize(("t", "t_next"), WRONG)
def test_a_step_refuses_times_that_do_not_fall_within_0_and_1(t, t_next):
    """FLUX trainers have t = 900 of 1,000, say, which would be NaN without a word."""
    of_two_images = torch.tensor([0.9, t]), torch.tensor([0.8, t_next])
    for times in ((t, t_next), (torch.tensor(t), t_next), of_two_images):
        with pytest.raises(ValueError, match="0 <= t_next < t <= 1 is needed"):
            sde_step(one(2), one(1), *times, 0.7)


def test_a_step_draws_standard_normal_noise_from_its_generator():
    """x_next = mean + std * noise."""
    v, x = normal(2, 100, 4, 5, 6)

    def noise(seed):
        x_next, _, mean, std = sde_step(v, x, *STEP, generator=seeded(seed))
        return (x_next - mean) / std

    is_standard_normal(noise(1))
    is_standard_normal((noise(1) - noise(2)) / math.sqrt(2))
    assert torch.equal(noise(1), noise(1))


def test_a_step_has_the_same_log_prob_drawn_and_scored():
    v, x = normal(2, 10, 4, 5, 6)
    x_next, drawn, _, _ = sde_step(v, x, *STEP, generator=seeded(1))
    given, scored, _, _ = sde_step(v, x, *STEP, x_next)
    assert torch.equal(given, x_next)
    assert torch.equal(scored, drawn)


@of_any_shape
@pytest.mark.parametrize("given", [True, False])
def test_the_gradient_of_a_log_prob_is_the_closed_form(shape, given):
    """d log_prob / d v = (x_next - mean) / std^2 * dt (1 + sigma^2 / (2t) (1 - t)) / elements.

    It goes through the mean alone: x_next is data.
    """
    v, x, data = normal(3, 10, *shape)
    v.requires_grad_()
    data.requires_grad_()
    x_next, log_prob, mean, std = sde_step(v, x, *STEP, data if given else None, seeded(1))
    log_prob.sum().backward()
    t, t_next, level = STEP
    sigma = level * math.sqrt(t / (1 - t))
    slope = (t_next - t) * (1 + sigma**2 / (2 * t) * (1 - t))
    close(v.grad, (x_next - mean) / std**2 * slope / v[0].numel(), atol=1e-7)
    assert data.grad is None
    assert not x_next.requires_grad


@pytest.mark.parametrize("level", [0.0, 0.7])
def test_a_step_is_computed_in_float32(level):
    v, x, x_next = normal(3, 10, 4, 5, 6).half()
    x = x.bfloat16()
    in_half = sde_step(v, x, 0.6, 0.5, level, x_next)
    in_full = sde_step(v.float(), x.float(), 0.6, 0.5, level, x_next.float())
    for got, expected in zip(in_half, in_full):
        assert got.dtype == torch.float32
        assert torch.equal(got, expected)


@pytest.mark.parametrize("level", [0.0, 0.7, 1.0])
def test_the_sde_keeps_the_flows_marginals(level):
    """Data of N(m, s^2) have a known velocity, and x_t is N((1 - t) m, (1 - t)^2 s^2 + t^2)."""
    m = 1.5
    s = 0.4
    count = 60_000
    times = [1 - k / 200 for k in range(201)]

    def marginal(t):
        return (1 - t) * m, math.hypot((1 - t) * s, t)

    def velocity(x, k):
        t = times[k]
        mean, std = marginal(t)
        centred = (x - mean) / std**2
        noise = t * centred  # E[x_1 | x_t]
        data = m + (1 - t) * s**2 * centred  # E[x_0 | x_t]
        return noise - data

    path, _ = rollout(velocity, normal(count, 1), times, level, seeded(1))
    for k in (100, 150, 200):
        mean, std = marginal(times[k])
        # Within 5 standard errors, and the error of 200 steps.
        assert abs(path[:, k].mean() - mean) < 5 * std / math.sqrt(count) + 0.005
        assert abs(path[:, k].std() - std) < 5 * std / math.sqrt(2 * count) + 0.01


@of_any_shape
def test_without_noise_a_step_is_the_schedulers_euler_step(shape):
    """x_next = x + v dt."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    times = schedule(scheduler, 10)  # This sets the scheduler's timesteps, too.
    v, x = normal(2, 10, *shape)
    for k, timestep in enumerate(scheduler.timesteps):
        expected = scheduler.step(v, timestep, x, return_dict=False)[0]
        x = sde_step(v, x, times[k], times[k + 1], 0.0)[0]
        close(x, expected, rtol=0, atol=1e-6)
    assert sde_step(one(2), one(1), 0.5, 0.25, 0.0)[0] == 1 - 2 / 4


def test_without_noise_a_step_draws_nothing_and_has_no_density():
    v, x, x_next = normal(3, 10, 2)
    generator = seeded(1)
    drawn = sde_step(v, x, 1.0, 0.5, 0.0, generator=generator)
    assert torch.equal(generator.get_state(), seeded(1).get_state())
    scored = sde_step(v, x, 1.0, 0.5, 0.0, x_next)
    assert torch.equal(scored[0], x_next)
    for _, log_prob, _, std in (drawn, scored):
        assert torch.equal(log_prob, torch.zeros(10))
        assert not std.any()


TIMES = [1.0, 0.7, 0.4, 0.0]
LEVELS = [0.7, 0.0, 0.4]


@of_any_shape
def test_a_rollout_takes_step_after_step_each_with_its_noise_level(shape):
    weight = torch.tensor(0.3, requires_grad=True)
    noise = normal(10, *shape)
    path, log_probs = rollout(lambda x, k: weight * x + k, noise, TIMES, LEVELS, seeded(1))
    assert path.shape == (10, 4, *shape)
    assert torch.equal(path[:, 0], noise)
    generator = seeded(1)
    for k, level in enumerate(LEVELS):
        x = path[:, k]
        v = 0.3 * x + k
        x_next, log_prob, _, _ = sde_step(v, x, TIMES[k], TIMES[k + 1], level, generator=generator)
        close(path[:, k + 1], x_next)
        close(log_probs[:, k], log_prob)
    assert not path.requires_grad
    assert not log_probs.requires_grad


def test_a_rollout_of_half_noise_is_computed_in_float32():
    dtypes = set()

    def velocity(x, k):
        dtypes.add(x.dtype)
        return x

    rollout(velocity, normal(10, 2).half(), TIMES, LEVELS, seeded())
    assert dtypes == {torch.float32}


def test_advantages_by_hand():
    """A = (r - mean of the group) / (std + 1e-4), with the std of all rewards or of the group.

    Two groups have the means 3e-4 and 11e-4. All four rewards have the std 5e-4, each group 3e-4.
    """
    rewards = torch.tensor([[0.0, 6e-4], [8e-4, 14e-4]])
    centred = torch.tensor([[-3.0, 3.0], [-3.0, 3.0]])
    close(group_advantages(rewards), centred / (5 + 1))  # [code]
    close(group_advantages(rewards, global_std=False), centred / (3 + 1))  # [paper]
    close(group_advantages(rewards, eps=0), centred / 5)
    assert group_advantages(torch.tensor([[0, 1]]), eps=0).tolist() == [[-1, 1]]
    assert group_advantages(torch.tensor([[0, 1, 2]])).dtype == torch.float32


@pytest.mark.parametrize("global_std", [True, False])
def test_equal_rewards_have_no_advantage_at_all(global_std):
    """Their mean is exact, so that no rounding error is taken for an advantage."""
    equal = torch.linspace(0, 1, 50)[:, None].expand(50, 24)
    assert not group_advantages(equal, global_std).any()
    assert not group_advantages(equal[7:8], global_std).any()


def test_advantages_are_clipped():
    outlier = torch.tensor([[0.0] * 99 + [1.0]])  # It is 0.99 / sqrt(0.99 * 0.01) = 9.9 stds off.
    assert group_advantages(outlier).max() == 5
    assert group_advantages(-outlier).min() == -5
    assert group_advantages(-outlier, clip=2.0).min() == -2


@of_any_shape
def test_the_kl_is_that_of_two_gaussians_of_equal_std(shape):
    """KL = (mean - ref_mean)^2 / (2 std^2), averaged over an image's elements."""
    mean, ref_mean, values = normal(3, 10, *shape)
    std = values.abs() + 0.1
    pi = Normal(mean.double(), std.double())
    reference = Normal(ref_mean.double(), std.double())
    close(gaussian_kl(mean, ref_mean, std), per_image(kl_divergence(pi, reference)), atol=1e-8)
    two_elements = torch.tensor([[1.0, 0.0]])  # 1^2 / (2 * 0.5^2) = 2, and 0
    assert gaussian_kl(two_elements, torch.zeros(1, 2), torch.tensor(0.5)) == 1


@of_any_shape
def test_the_kl_of_a_step_is_the_papers_closed_form(shape):
    """KL = |dt| / 2 (sigma (1 - t) / (2t) + 1 / sigma)^2 (v - ref_v)^2."""
    v, ref_v, x = normal(3, 10, *shape)
    t, t_next, level = STEP
    sigma = level * math.sqrt(t / (1 - t))
    factor = (t - t_next) / 2 * (sigma * (1 - t) / (2 * t) + 1 / sigma) ** 2
    _, _, mean, std = sde_step(v, x, *STEP)
    _, _, ref_mean, _ = sde_step(ref_v, x, *STEP)
    close(gaussian_kl(mean, ref_mean, std), factor * per_image((v - ref_v) ** 2), atol=1e-8)


# Ratio, advantage A, the surrogate -min(ratio A, clip(ratio, 0.8, 1.2) A), and its gradient by the
# log-prob: -ratio A, or 0 where the clip holds.
CLIPPED = [
    (1.7, 2.0, -2.4, 0.0),
    (1.1, 2.0, -2.2, -2.2),
    (0.9, 2.0, -1.8, -1.8),
    (0.5, 2.0, -1.0, -1.0),
    (1.5, -2.0, 3.0, 3.0),
    (1.1, -2.0, 2.2, 2.2),
    (0.9, -2.0, 1.8, 1.8),
    (0.5, -2.0, 1.6, 0.0),
]
RATIO, ADVANTAGE, SURROGATE, GRADIENT = torch.tensor(CLIPPED).T
KL = torch.arange(1.0, 9.0)  # Its mean is 4.5.


def test_the_loss_is_the_clipped_surrogate_with_a_kl_penalty():
    """loss = mean of surrogate + beta KL over images, here with beta = 1/2."""
    old_log_prob = normal(8)
    log_prob = (old_log_prob + RATIO.log()).requires_grad_()
    kl = KL.clone().requires_grad_()
    loss, _ = grpo_loss(log_prob, old_log_prob, ADVANTAGE, kl, clip_range=0.2, beta=0.5)
    loss.backward()
    close(loss, SURROGATE.mean() + 4.5 / 2)
    close(log_prob.grad, GRADIENT / 8)
    close(kl.grad, torch.full((8,), 1 / 2 / 8))


def test_the_statistics_of_the_loss_are_means_without_a_graph():
    log_prob = RATIO.log().requires_grad_()
    kl = KL.clone().requires_grad_()
    _, stats = grpo_loss(log_prob, torch.zeros(8), ADVANTAGE, kl, clip_range=0.2, beta=0.5)
    expected = {
        "ratio_mean": torch.tensor(8.2 / 8),
        "clipfrac": torch.tensor(4 / 8),  # a clip that holds, or would with the other sign
        "approx_kl": (RATIO.log() ** 2).mean() / 2,
        "policy_loss": SURROGATE.mean(),
        "kl": torch.tensor(4.5),
    }
    assert stats.keys() == expected.keys()
    for name, value in stats.items():
        close(value, expected[name])
        assert not value.requires_grad


def test_copied_as_it_stands_the_method_passes_these_tests(monkeypatch):
    names = {"torch": torch, "math": math}
    for function in (sde_step, rollout, group_advantages, gaussian_kl, grpo_loss):
        exec(inspect.getsource(function), names)
        monkeypatch.setitem(globals(), function.__name__, names[function.__name__])
    test_a_step_is_the_papers_gaussian((2,), 0.7)
    test_a_rollout_takes_step_after_step_each_with_its_noise_level((2,))
    test_advantages_by_hand()
    test_the_kl_is_that_of_two_gaussians_of_equal_std((2,))
    test_the_loss_is_the_clipped_surrogate_with_a_kl_penalty()


# ---- The rollout of an epoch.
def network(run, x, t, prompts):
    with torch.no_grad():
        embeds, _, pooled, _ = run.pipe.encode_prompt(
            prompts,
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=run.config.max_sequence_length,
        )
    timestep = torch.full((len(x),), 1000 * t)
    return run.pipe.transformer(x, embeds, pooled, timestep).sample


def guided(run, x, t, records):
    """v = v_null + scale (v_prompt - v_null), of which v_null has no gradient, as in [code]."""
    v = network(run, x, t, [record["prompt"] for record in records])
    v_null = network(run, x, t, [""] * len(records)).detach()
    return v_null + run.config.guidance_scale * (v - v_null)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_images_are_drawn_by_the_policy_in_the_window_and_by_the_ode_elsewhere(model, work, scale):
    run = small_run(model, sde_steps=3, sde_last_step=5, guidance_scale=scale)
    samples = flow_grpo.sample(run)
    assert samples.times == pytest.approx(SIGMAS, abs=5e-5)
    for k, (t, t_next) in enumerate(pairwise(samples.times)):
        x, x_next = samples.latents[:, k : k + 2].unbind(1)
        v = guided(run, x, t, samples.records).detach()
        if k in samples.window:
            pi = policy(v, x, t, t_next, run.config.noise_level)
            noise = (x_next - pi.mean) / pi.stddev
            is_standard_normal(noise)
            is_standard_normal((noise[:3] - noise[3:6]) / math.sqrt(2))  # of two batches
            close(samples.log_probs[:, k], mean_log_prob(pi, x_next))
        else:
            close(x_next, x + v * (t_next - t))
            assert not samples.log_probs[:, k].any()


def test_the_window_has_every_place_up_to_its_last_step(model, work):
    run = small_run(model, sde_steps=3, sde_last_step=5, prompts_per_epoch=1, guidance_scale=1.0)
    windows = set()
    for run.epoch in range(10):  # It sets the run's epoch.
        windows.add(flow_grpo.sample(run).window)
    assert windows == {range(3), range(1, 4), range(2, 5)}
    windows = set()
    for run.config.seed in range(10):
        windows.add(flow_grpo.sample(run).window)
    assert len(windows) > 1


# ---- The update. Of the second and fifth prompt's images, none has an advantage; of the third's,
# two have none.
EPOCH_REWARDS = torch.tensor(
    [
        [0.2, 0.9, 0.7, 0.1],
        [0.1, 0.1, 0.1, 0.1],
        [1.0, 0.5, 0.5, 0.0],
        [0.3, 0.0, 0.6, 0.8],
        [0.4, 0.4, 0.4, 0.4],
    ]
)
KEPT = [0, 1, 2, 3, 8, 11, 12, 13, 14, 15]
SETTINGS = {"prompts_per_epoch": 5, "learning_rate": 0.03, "clip_range": 5e-5, "beta": 0.3}
# The model, its window, the loss scale, and whether passes are filled up with repeats.
EPOCHS = {
    "all steps": ("with-T5", (9, 9), 1, False),
    "a window and a loss scale": ("without-T5", (3, 5), 1024, False),
    "passes filled up": ("with-T5", (2, 2), 1, True),
}


def scored(run, samples, images):
    """Log-probs [n, S] of images, and the KL to the base model [n, S], times |dt| as in [code]."""
    records = [samples.records[i] for i in images]
    log_probs = []
    kls = []
    for k in samples.window:
        t, t_next = samples.times[k : k + 2]
        x, x_next = samples.latents[images, k : k + 2].unbind(1)
        pi = policy(guided(run, x, t, records), x, t, t_next, run.config.noise_level)
        run.pipe.transformer.disable_adapters()
        ref_v = guided(run, x, t, records).detach()
        run.pipe.transformer.enable_adapters()
        reference = policy(ref_v, x, t, t_next, run.config.noise_level)
        log_probs.append(mean_log_prob(pi, x_next))
        kls.append(per_image(kl_divergence(pi, reference)) * (t - t_next))
    return torch.stack(log_probs, 1), torch.stack(kls, 1)


def objective(run, samples, images, old_log_probs):
    """[paper]'s loss, a mean over images and steps, and its statistics."""
    clip_range = run.config.clip_range
    log_probs, kls = scored(run, samples, images)
    log_ratio = log_probs - old_log_probs[images]
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    a = group_advantages(EPOCH_REWARDS).flatten()[images, None]
    policy_loss = -torch.minimum(ratio * a, clipped * a).mean()
    stats = {
        "policy_loss": policy_loss,
        "kl": kls.mean(),
        "clipfrac": (ratio != clipped).double().mean(),
        "ratio_mean": ratio.mean(),
        "approx_kl": (log_ratio**2).mean() / 2,
    }
    return policy_loss + run.config.beta * kls.mean(), stats


def recorded_chunks(patch):
    """A list that grows by the images of each update."""
    batches = flow_grpo.batches
    chunks = []

    def recorded_batches(run, records, images, description):
        if description == "updates":
            chunks.append(images)
        return batches(run, records, images, description)

    patch.setattr(flow_grpo, "batches", recorded_batches)
    return chunks


@pytest.fixture(scope="module", params=EPOCHS.values(), ids=EPOCHS)
def epoch(request, model, tmp_path_factory):
    """An epoch of two updates, of 5 images each, in batches of 3 and 2."""
    name, (steps, last), scale, fill = request.param
    with small.working_in(tmp_path_factory.mktemp("epoch")) as patch:
        run = small_run(model.with_name(name), sde_steps=steps, sde_last_step=last, **SETTINGS)
        run.scaler = torch.amp.GradScaler("cpu", scale, enabled=scale > 1)
        # `velocity_along` fills passes up if this is set. After `prepare`, nothing is compiled.
        run.config.compile = fill
        samples = flow_grpo.sample(run)
        samples.columns["reward"] = EPOCH_REWARDS.flatten()
        old_log_probs, _ = scored(run, samples, range(20))
        old_log_probs = old_log_probs.detach()
        chunks = recorded_chunks(patch)
        updates = []
        optimizer_step = flow_grpo.optimizer_step

        def recorded_step(run):
            update = SimpleNamespace(images=chunks[-1])
            loss, update.expected_stats = objective(run, samples, update.images, old_log_probs)
            expected = torch.autograd.grad(loss, list(run.parameters))
            update.expected_gradient = joined(expected)
            update.expected_stats["grad_norm"] = update.expected_gradient.norm()
            update.gradient = joined(p.grad for p in run.parameters) / scale
            updates.append(update)
            return optimizer_step(run)

        patch.setattr(flow_grpo, "optimizer_step", recorded_step)
        stats = flow_grpo.optimize(run, samples)
    return SimpleNamespace(run=run, updates=updates, stats=stats)


def test_the_gradient_of_an_update_is_that_of_the_papers_objective(epoch):
    assert len(epoch.updates) == epoch.run.updates == 2
    for update in epoch.updates:
        error = (update.gradient - update.expected_gradient).norm()
        assert error < 1e-5 * update.expected_gradient.norm()


def test_statistics_are_means_over_the_updates(epoch):
    first, second = (update.expected_stats for update in epoch.updates)
    for name in first:
        expected = (first[name] + second[name]).item() / 2
        got = epoch.stats[name]
        if name == "ratio_mean":  # It is so near to 1 that only the difference tells.
            expected -= 1
            got -= 1
        # The terms of a loss nearly cancel, and a ratio is rounded.
        rounding = 1e-7 if name in ("policy_loss", "ratio_mean") else 0
        assert got == pytest.approx(expected, rel=2e-3, abs=rounding), name


def test_only_the_second_update_is_off_policy(epoch):
    """The mean of their `clipfrac` is what the test above compares."""
    first, second = (update.expected_stats for update in epoch.updates)
    assert first["clipfrac"] == 0
    assert 0.1 < second["clipfrac"] < 1
    assert epoch.stats["ratio_deviation"] < 1e-5


def test_images_without_advantage_are_dropped_and_all_others_are_trained_on_once(epoch):
    first, second = (update.images for update in epoch.updates)
    assert len(first) == len(second) == 5
    assert sorted(first + second) == KEPT
    assert epoch.stats["trained"] == 10 / 20


def test_ratio_deviation_is_the_mean_over_steps_of_the_largest_of_a_batch(model, work, monkeypatch):
    """It is that of the first update alone, whose four images are in batches of 3 and 1."""
    run = small_run(model, sde_steps=2, sde_last_step=2)
    samples = flow_grpo.sample(run)
    log_ratio = normal(8, 10)
    samples.log_probs -= log_ratio
    chunks = recorded_chunks(monkeypatch)
    stats = flow_grpo.optimize(run, samples)
    deviation = log_ratio[chunks[0], :2].expm1().abs()
    of_three = deviation[:3].amax(0).mean()
    of_one = deviation[3:].mean()
    expected = (3 * of_three + 1 * of_one) / 4
    assert stats["ratio_deviation"] == pytest.approx(expected.item(), rel=1e-4)


def test_equal_rewards_teach_nothing_and_no_update_is_without_images(model, work):
    run = small_run(model, sde_steps=2, sde_last_step=2, updates_per_epoch=9)
    samples = flow_grpo.sample(run)
    samples.columns["reward"] = torch.full((8,), 0.1)
    stats = flow_grpo.optimize(run, samples)
    assert stats["trained"] == run.updates == 0
    samples.columns["reward"][7] = 0.2  # so that the second of two groups has advantages
    stats = flow_grpo.optimize(run, samples)
    assert stats["trained"] == 4 / 8
    assert run.updates == 4


def test_images_are_dealt_to_updates_evenly_and_shuffled_anew(model, work, monkeypatch):
    """Each update has an equal, random part of each batch of the rollout."""
    run = small_run(model, group_size=8, batch_size=4, sde_steps=1, guidance_scale=1.0)
    samples = flow_grpo.sample(run)
    samples.columns["reward"] = torch.arange(16.0)
    chunks = recorded_chunks(monkeypatch)
    firsts = []
    for run.config.seed, run.epoch in [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0)]:
        flow_grpo.optimize(run, samples)
        first, second = chunks[-2:]
        assert sorted(first + second) == list(range(16))
        assert sorted(i // 4 for i in first) == [0, 0, 1, 1, 2, 2, 3, 3]
        firsts.append(set(first))
    assert firsts[4] == firsts[0]
    for first in firsts[:4]:
        assert firsts[:4].count(first) == 1


# ---- The optimiser step, and the adapter's average.
def set_gradient(parameters, norm):
    """A gradient of this norm, whose elements are all equal."""
    count = joined(parameters).numel()
    for p in parameters:
        p.grad = torch.full_like(p, norm / math.sqrt(count))


# The gradient's norm, and how many updates are done after the step. Before the last one, the
# number is raised to that of a long run, where d is 0.9.
NORMS = [(0.1, 1), (7.0, 2), (math.inf, 2), (0.5, 3), (0.3, 4), (math.nan, 4), (30.0, 100)]


def test_an_optimiser_step_is_adamws_by_a_gradient_clipped_to_1_and_moves_the_average(model, work):
    """After n updates, average = d average + (1 - d) adapter, d = min(0.9, (1 + n) / (10 + n)).

    As its loss scale was too large, a step with a gradient that is not finite is skipped, and 0 is
    returned for its norm.
    """
    run = small_run(model, ema_interval=2, learning_rate=0.5, adam_epsilon=1e-3)
    run.scaler = torch.amp.GradScaler("cpu", 4.0)
    clones = copied(run.parameters)
    average = joined(clones)
    adam = torch.optim.AdamW(clones, 0.5, betas=(0.9, 0.999), eps=1e-3, weight_decay=1e-4)
    for norm, updates in NORMS:
        run.updates = max(run.updates, updates - 1)
        set_gradient(run.parameters, norm * run.scaler.get_scale())
        returned = flow_grpo.optimizer_step(run)
        assert returned == pytest.approx(norm if math.isfinite(norm) else 0)
        assert run.updates == updates
        assert all(p.grad is None for p in run.parameters)
        if math.isfinite(norm):
            set_gradient(clones, min(norm, 1.0))
            adam.step()
            if updates % 2 == 0:
                d = min(0.9, (1 + updates) / (10 + updates))
                average = d * average + (1 - d) * joined(clones)
        close(joined(run.parameters), joined(clones), rtol=1e-5)
        close(joined(run.ema.shadow_params), average, rtol=1e-5)
    assert run.scaler.get_scale() == 1  # It was lowered twice.


@pytest.mark.parametrize("epsilon, norm", [(1e-8, 1e-3), (1e-8, 1e-9), (1e-15, 1e-9)])
def test_adams_epsilon_shortens_a_first_step(model, work, epsilon, norm):
    """It is learning_rate * g / (|g| + epsilon), for a gradient g."""
    run = small_run(model, active=False, adam_epsilon=epsilon)
    before = joined(run.parameters)
    g = norm / math.sqrt(before.numel())
    set_gradient(run.parameters, norm)
    flow_grpo.optimizer_step(run)
    moved = (before - joined(run.parameters)) / run.config.learning_rate
    close(moved, torch.full_like(moved, g / (g + epsilon)), rtol=0, atol=1e-3)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_gradient_that_is_not_finite_at_a_loss_scale_of_1_ends_training(model, work, enabled):
    run = small_run(model)
    run.scaler = torch.amp.GradScaler("cpu", 1.0, enabled=enabled)
    before = joined(run.parameters)
    set_gradient(run.parameters, math.inf)
    with pytest.raises(flow_grpo.Diverged):
        flow_grpo.optimizer_step(run)
    assert run.updates == 0
    assert torch.equal(joined(run.parameters), before)


# ---- It learns.
FAST = {
    "prompts_per_epoch": 1,
    "group_size": 64,
    "batch_size": 64,
    "guidance_scale": 1.0,
    "sde_steps": 3,
    "sde_last_step": 3,
    "noise_level": 1.0,
    "learning_rate": 0.1,
    "clip_range": 0.01,
    "epochs": 10,
    "eval_every": 10,
}


def test_training_raises_the_reward(model, work):
    """How red images are rises by more than one of their stds, in rollouts and evaluations."""
    run = small_run(model, active=False, **FAST)
    std = flow_grpo.sample(run).columns["reward"].std()
    flow_grpo.train(run)
    rewards = [line["reward"] for line in run.metrics if "reward" in line]
    evaluated = [line["eval_reward"] for line in run.metrics if "eval_reward" in line]
    assert len(rewards) == 10
    assert rewards[8] + rewards[9] > rewards[0] + rewards[1] + 2 * std
    assert evaluated[1] > evaluated[0] + std
