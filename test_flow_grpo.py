"""Tests of flow_grpo.py. They need no network, and on the CPU they run everywhere.

Those marked `needs_gpu` need a GPU. From the others, it is hidden.
"""

import gc
import inspect
import json
import logging
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest import mock
from unittest.mock import Mock
from weakref import WeakValueDictionary

import huggingface_hub
import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate.state import PartialState
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers import StableDiffusion3Pipeline as StockPipeline
from filelock import FileLock
from huggingface_hub.errors import GatedRepoError
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import flow_grpo
from flow_grpo import (
    TINY,
    Config,
    UserError,
    configure,
    gaussian_kl,
    group_advantages,
    grpo_loss,
    load_pipeline,
    load_reward,
    main,
    prepare,
    read_prompts,
    rollout,
    schedule,
    score_images,
    sde_step,
    split_prompts,
)

HERE = Path(__file__).resolve().parent
EVAL_STEPS = 4  # in place of 40
PROMPTS = [f'a "{i}"' for i in range(8)]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def hidden_gpu(request, monkeypatch):
    """Only tests that are marked `needs_gpu`, or have a fixture `gpu`, see a GPU."""
    marked = request.node.get_closest_marker("skipif")
    if not marked and "gpu" not in request.fixturenames:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(flow_grpo, "DEVICE", "cpu")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def write(path, *lines):
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


# ---- Small random models in the hub's format.
def random_clip(words, projection):
    config = transformers.CLIPTextConfig(
        vocab_size=words,
        hidden_size=16,
        intermediate_size=16,
        max_position_embeddings=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        projection_dim=projection,
    )
    encoder = transformers.CLIPTextModelWithProjection(config)
    # By default, all texts would be nearly the same to it.
    torch.nn.init.normal_(encoder.text_model.embeddings.token_embedding.weight)
    return encoder


def random_t5(width):
    pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>", "▁")]
    tokenizer = transformers.T5TokenizerFast(vocab=pieces, extra_ids=0)
    config = transformers.T5Config(
        vocab_size=4, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    return transformers.T5EncoderModel(config), tokenizer


def random_autoencoder(channels, blocks):
    return AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=channels,
        norm_num_groups=4,
        scaling_factor=1.2,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


SMALL_NETWORK = {
    "sample_size": 8,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
    "joint_attention_dim": 32,
    "pos_embed_max_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "qk_norm": "rms_norm",
    "dual_attention_layers": (0,),
}


def save_random_pipeline(folder, t5=True, pooled=(16, 16), blocks=2, **network):
    torch.manual_seed(0)
    sizes = SMALL_NETWORK | network
    channels = sizes["in_channels"]
    characters = [chr(c) for c in range(33, 127)]
    ends = [c + "</w>" for c in characters]
    words = ["<|startoftext|>", "<|endoftext|>", *characters, *ends]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=12)
    first_clip = random_clip(len(words), pooled[0])
    second_clip = random_clip(len(words), pooled[1])
    t5_parts = random_t5(sizes["joint_attention_dim"])
    autoencoder = random_autoencoder(channels, blocks)
    transformer = SD3Transformer2DModel(
        out_channels=channels, pooled_projection_dim=sum(pooled), **sizes
    )
    pipe = StockPipeline(
        transformer,
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        autoencoder,
        first_clip,
        tokenizer,
        second_clip,
        tokenizer,
        *(t5_parts if t5 else (None, None)),
    )
    pipe.save_pretrained(folder)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a model with T5. Its sibling is one without."""
    folder = tmp_path_factory.getbasetemp()
    save_random_pipeline(folder / "with-T5")
    save_random_pipeline(folder / "without-T5", t5=False)
    return folder / "with-T5"


# ---- Small runs of them.
REWARDS = """
import torch

number = 3
scale = torch.nn.Parameter(torch.ones(()))


def red(images, prompts, records):
    assert [record["prompt"] for record in records] == prompts
    assert 0 <= images.min() and images.max() <= 1
    redness = images[:, 0] - images[:, 1:].mean(1)
    scores = scale.to(images.device) * redness.mean((1, 2))
    return scores.cpu().numpy()  # numpy() refuses what has a gradient


def two(images, prompts, records):
    return {"first": red(images, prompts, records), "second": [0.25] * len(images)}


def named(images, prompts, records):
    return {"first": [0.25] * len(images), "reward": red(images, prompts, records)}


def uneven(images, prompts, records):
    scores = {"first": [1.0] * len(images)}
    return {**scores, "second": [1.0] * len(images)} if 'a "5"' in prompts else scores


def nan(images, prompts, records):  # but not of the blank image that all runs begin with
    bad = float("nan") if images.any() else 1.0
    return [bad if '"5"' in prompt else 1.0 for prompt in prompts]


def wide(images, prompts, records):
    return torch.zeros(len(images), 2)


def nothing(images, prompts, records):
    return {}


def broken(images, prompts, records):
    return 1 / 0


def leaves(images, prompts, records):
    exit(0)


def greedy(images, prompts, records):  # changes what it is given
    scores = red(images, prompts, records)
    images.zero_()
    prompts.clear()
    for record in records:
        del record["prompt"]
    records.clear()
    return scores


def check(record):
    if "ugly" in record["prompt"]:
        raise ValueError("ugly things can't be judged")
"""
SMALL = {
    "reward": "rewards.py:red",
    "epochs": 3,
    "prompts_per_epoch": 2,
    "group_size": 4,
    "batch_size": 3,
    "guidance_scale": 2.0,
    "height": 16,
    "width": 16,
    "max_sequence_length": 5,
    "learning_rate": 1e-2,
    "eval_every": 2,
    "lora_rank": 4,
    "ema_interval": 1,
}
# Its place is drawn anew in each epoch.
WINDOW = {"sde_steps": 3, "sde_range": 5, "guidance_scale": 1.0, "ema_interval": 2}


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty folder with rewards and prompts, in which a test runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flow_grpo, "EVAL_STEPS", EVAL_STEPS)
    Path("rewards.py").write_text(REWARDS)
    write("prompts.txt", *PROMPTS)


def arguments(model, out="out", **given):
    """The command line of a small run."""
    flags = {"prompt_file": "prompts.txt", "model": model, "output_dir": out, **SMALL, **given}
    return [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]


def small_run(model, active=True, half=False, **given):
    """A small run as `prepare` makes it. If it is active, the adapter changes the images.

    Half: as on a GPU, all but the autoencoder is in float16.
    """
    config = Config(model=str(model), output_dir="out", **SMALL | given)
    pipe = load_pipeline(config.model)
    if half:
        pipe.to(torch.float16)
        pipe.vae.to(torch.float32)
    records = [{"prompt": prompt} for prompt in PROMPTS]
    run = prepare(config, pipe, load_reward(config.reward), records[:4], records[4:])
    if active:
        generator = seeded(1)
        for p, average in zip(run.parameters, run.ema.shadow_params):
            p.data = torch.randn(p.shape, generator=generator).to(p.device) * 0.1
            average.copy_(p)
    return run


def cut(path):
    path.write_bytes(b"half a file")
    raise KeyboardInterrupt


def metrics(out="out"):
    lines = Path(out, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def stock_images(model, run, lora=None, output_type="pt", **options):
    """What diffusers' pipeline draws for a run's evaluation prompts, with the weights in `lora`."""
    if model.name == "without-T5":
        options |= {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StockPipeline.from_pretrained(model, **options).to(flow_grpo.DEVICE)
    if lora:
        pipe.load_lora_weights(lora)
    config = run.config
    prompts = [record["prompt"] for record in run.eval_records]
    output = pipe(
        prompts,
        height=config.height,
        width=config.width,
        num_inference_steps=EVAL_STEPS,
        guidance_scale=config.guidance_scale,
        generator=[seeded(i) for i in range(len(prompts))],
        output_type=output_type,
        max_sequence_length=config.max_sequence_length,
    )
    return output.images


# ---- The method, against float64.
SIGMAS = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]  # published
STEPS = list(pairwise(SIGMAS))
SHAPES = {"points": (2,), "tokens": (5, 3), "images": (4, 5, 6), "videos": (4, 3, 5, 6)}
of_any_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
at_noise_levels = pytest.mark.parametrize("level", [0.3, 0.7, 1.2])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


def close(got, expected, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, check_dtype=False)


def per_image(values):
    return values.flatten(1).mean(1)


def policy(velocity, x, t, t_next, noise_level):
    """The paper's Gaussian. At t = 1, sigma has 1 - t_next in place of 1 - t, as in [code]."""
    v = velocity.double()
    x = x.double()
    remaining = 1 - t_next if t == 1 else 1 - t
    sigma = noise_level * math.sqrt(t / remaining)
    drift = v + sigma**2 / (2 * t) * (x + (1 - t) * v)
    return Normal(x + drift * (t_next - t), sigma * math.sqrt(t - t_next))


def mean_log_prob(pi, x_next):
    return per_image(pi.log_prob(x_next.double()))


def test_the_schedule_is_the_published_one():
    times = schedule(FlowMatchEulerDiscreteScheduler(shift=3.0), 10)
    assert times == pytest.approx(SIGMAS, abs=5e-5)


@of_any_shape
@at_noise_levels
def test_a_step_is_the_papers_gaussian(shape, level):
    v, x, x_next = normal(3, 10, *shape)
    for t, t_next in STEPS:
        pi = policy(v, x, t, t_next, level)
        _, log_prob, mean, std = sde_step(v, x, t, t_next, level, x_next)
        close(log_prob, mean_log_prob(pi, x_next))
        close(mean, pi.mean)
        close(std.expand_as(mean), pi.stddev)


@of_any_shape
@at_noise_levels
def test_each_image_may_have_times_of_its_own(shape, level):
    v, x, x_next = normal(3, 10, *shape)
    together = sde_step(v, x, torch.tensor(SIGMAS[:10]), torch.tensor(SIGMAS[1:]), level, x_next)
    for k, (t, t_next) in enumerate(STEPS):
        one = slice(k, k + 1)
        alone = sde_step(v[one], x[one], t, t_next, level, x_next[one])
        for got, expected in zip(together, alone):
            close(got[one], expected)


@at_noise_levels
def test_the_std_of_the_first_step_is_the_noise_level(level):
    v, x = normal(2, 10, 4, 5, 6)
    std = sde_step(v, x, 1.0, 0.96, level)[3]
    close(std.flatten(), torch.full((10,), level))


@of_any_shape
def test_a_step_has_the_same_log_prob_drawn_and_scored(shape):
    v, x = normal(2, 10, *shape)
    x_next, drawn, _, _ = sde_step(v, x, 0.6, 0.5, 0.7, generator=seeded(1))
    given, scored, _, _ = sde_step(v, x, 0.6, 0.5, 0.7, x_next)
    assert torch.equal(given, x_next)
    assert torch.equal(scored, drawn)


def test_the_noise_of_a_step_is_standard_normal():
    v, x = normal(2, 100, 4, 5, 6)
    x_next, _, mean, std = sde_step(v, x, 0.6, 0.5, 0.7, generator=seeded(1))
    noise = (x_next - mean) / std
    count = noise.numel()
    assert abs(noise.mean()) < 5 / math.sqrt(count)
    assert abs(noise.std() - 1) < 5 / math.sqrt(2 * count)


def test_a_step_draws_from_its_generator():
    v, x = normal(2, 10, 2)
    drawn = [sde_step(v, x, 0.6, 0.5, 0.7, generator=seeded(seed))[0] for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@of_any_shape
@pytest.mark.parametrize("how", ["drawn", "scored"])
def test_the_gradient_of_a_log_prob_is_the_closed_form(shape, how):
    v, x, given = normal(3, 10, *shape)
    v.requires_grad_()
    sample = {"x_next": given} if how == "scored" else {"generator": seeded(1)}
    x_next, log_prob, mean, std = sde_step(v, x, 0.6, 0.5, 0.7, **sample)
    sigma = 0.7 * math.sqrt(0.6 / 0.4)
    slope = (0.5 - 0.6) * (1 + sigma**2 / (2 * 0.6) * (1 - 0.6))  # d mean / d velocity
    expected = (x_next - mean.detach()) / std**2 * slope / v[0].numel()
    close(torch.autograd.grad(log_prob.sum(), v)[0], expected, atol=1e-7)


def test_no_gradient_flows_into_a_sample():
    v, x, x_next = normal(3, 10, 2)
    v.requires_grad_()
    x_next.requires_grad_()
    assert not sde_step(v, x, 0.6, 0.5, 0.7)[0].requires_grad
    assert not sde_step(v, x, 0.6, 0.5, 0.0)[0].requires_grad
    sde_step(v, x, 0.6, 0.5, 0.7, x_next)[1].sum().backward()
    assert x_next.grad is None


@pytest.mark.parametrize("level", [0.0, 0.7])
def test_a_step_is_computed_in_float32(level):
    v, x, x_next = normal(3, 10, 4, 5, 6)
    in_half = sde_step(v.half(), x.bfloat16(), 0.6, 0.5, level, x_next.half())
    in_full = sde_step(v.half().float(), x.bfloat16().float(), 0.6, 0.5, level, x_next.half())
    for got, expected in zip(in_half, in_full):
        assert got.dtype == torch.float32
        assert torch.equal(got, expected)


@of_any_shape
def test_without_noise_a_step_is_the_schedulers_euler_step(shape):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    times = schedule(scheduler, 10)
    v, x = normal(2, 10, *shape)
    for k, timestep in enumerate(scheduler.timesteps):
        expected = scheduler.step(v, timestep, x, return_dict=False)[0]
        x = sde_step(v, x, times[k], times[k + 1], 0.0)[0]
        close(x, expected, rtol=0, atol=1e-6)


def test_without_noise_nothing_is_drawn():
    v, x = normal(2, 10, 2)
    generator = seeded()
    before = [generator.get_state(), torch.get_rng_state()]
    sde_step(v, x, 0.6, 0.5, 0.0, generator=generator)
    after = [generator.get_state(), torch.get_rng_state()]
    assert all(map(torch.equal, before, after))


@of_any_shape
@pytest.mark.parametrize("how", ["drawn", "scored"])
def test_without_noise_a_step_has_no_density(shape, how):
    v, x, given = normal(3, 10, *shape)
    x_next, log_prob, mean, std = sde_step(v, x, 1.0, 0.5, 0.0, given if how == "scored" else None)
    assert torch.equal(x_next, given if how == "scored" else mean)
    assert torch.equal(log_prob, torch.zeros(10))
    assert not std.any()


@pytest.mark.parametrize("level", [0.0, 0.7, 1.0])
def test_the_sde_keeps_the_flows_marginals(level):
    """Data of N(m, s^2) have a known velocity, and x_t is N((1 - t) m, (1 - t)^2 s^2 + t^2)."""
    m = 1.5
    s = 0.4
    count = 60_000
    times = [1 - k / 400 for k in range(401)]

    def marginal(t):
        return (1 - t) * m, math.hypot((1 - t) * s, t)

    def velocity(x, k):
        t = times[k]
        mean, std = marginal(t)
        centred = (x - mean) / std**2
        noise = t * centred  # E[x_1 | x_t]
        data = m + (1 - t) * s**2 * centred  # E[x_0 | x_t]
        return noise - data

    generator = seeded()
    noise = torch.randn(count, 1, generator=generator)
    path, _ = rollout(velocity, noise, times, level, generator)
    for k in (200, 300, 400):
        mean, std = marginal(times[k])
        # Within 5 standard errors, and the error of 400 steps.
        assert abs(path[:, k].mean() - mean) < 5 * std / math.sqrt(count) + 0.005
        assert abs(path[:, k].std() - std) < 5 * std / math.sqrt(2 * count) + 0.01


TIMES = [1.0, 0.7, 0.4, 0.0]
LEVELS = [0.7, 0.0, 0.4]


def small_rollout(shape, levels=LEVELS):
    """A path from noise, its log-probs, and its noise; velocity(x, k) is 0.3 x + times[k]."""
    weight = torch.tensor(0.3, requires_grad=True)
    noise = normal(10, *shape)
    return *rollout(lambda x, k: weight * x + TIMES[k], noise, TIMES, levels, seeded(2)), noise


@of_any_shape
def test_a_rollout_begins_with_the_noise(shape):
    path, log_probs, noise = small_rollout(shape)
    assert path.shape == (10, 4, *shape)
    assert log_probs.shape == (10, 3)
    assert torch.equal(path[:, 0], noise)


@of_any_shape
def test_a_rollout_scores_its_steps_by_their_noise_levels(shape):
    path, log_probs, _ = small_rollout(shape)
    for k in (0, 2):
        velocity = 0.3 * path[:, k] + TIMES[k]
        pi = policy(velocity, path[:, k], TIMES[k], TIMES[k + 1], LEVELS[k])
        close(log_probs[:, k], mean_log_prob(pi, path[:, k + 1]), atol=1e-8)
    assert not log_probs[:, 1].any()


@of_any_shape
@pytest.mark.parametrize("levels, steps", [(LEVELS, [1]), (0.0, [0, 1, 2]), (0, [0, 1, 2])])
def test_a_rollouts_steps_without_noise_are_the_odes(shape, levels, steps):
    path, _, _ = small_rollout(shape, levels)
    for k in steps:
        velocity = 0.3 * path[:, k] + TIMES[k]
        euler = path[:, k] + (TIMES[k + 1] - TIMES[k]) * velocity
        close(path[:, k + 1], euler, rtol=1e-5, atol=1e-6)


def test_one_noise_level_serves_all_steps():
    one, _, _ = small_rollout((2,), 0.7)
    each, _, _ = small_rollout((2,), [0.7, 0.7, 0.7])
    assert torch.equal(one, each)


def test_a_rollout_has_no_graph():
    path, log_probs, _ = small_rollout((2,))
    assert not path.requires_grad
    assert not log_probs.requires_grad


def test_the_method_needs_torch_alone():
    names = {"torch": torch, "math": math, "Tensor": torch.Tensor}
    names |= {"Callable": Callable, "Sequence": Sequence}
    for function in (sde_step, rollout, group_advantages, gaussian_kl, grpo_loss):
        exec(inspect.getsource(function), names)
    path, log_probs = names["rollout"](lambda x, k: x, normal(10, 2), TIMES, 0.7)
    advantages = names["group_advantages"](path[:, -1, 0].view(2, 5)).flatten()
    _, log_prob, mean, std = names["sde_step"](path[:, 1], path[:, 1], 0.7, 0.4, 0.7, path[:, 2])
    kl = names["gaussian_kl"](mean, mean + std, std)
    loss, _ = names["grpo_loss"](log_prob, log_probs[:, 1], advantages, kl, 1e-4, 0.04)
    close(loss, torch.tensor(0.04 / 2))  # Ratios are 1, and advantages sum to 0.


REWARDED = torch.tensor([[0.0, 1.0, 0.5, 0.5], [0.9, 0.7, 0.8, 0.8], [1 / 3] * 4])  # [P, G]


@pytest.mark.parametrize("global_std", [True, False])
def test_advantages_are_relative_to_the_group(global_std):
    r = REWARDED.double()
    centred = r - r.mean(1, keepdim=True)
    variance = (r - r.mean()).square().mean() if global_std else centred.square().mean(1, True)
    expected = centred / (variance.sqrt() + 1e-4)
    close(group_advantages(REWARDED, global_std), expected, rtol=0, atol=1e-6)


def test_advantages_are_by_the_std_of_all_rewards_unless_told():
    assert torch.equal(group_advantages(REWARDED), group_advantages(REWARDED, global_std=True))


@pytest.mark.parametrize("global_std", [True, False])
def test_equal_rewards_have_no_advantage(global_std):
    assert not group_advantages(REWARDED, global_std)[2].any()
    assert not group_advantages(REWARDED[2:], global_std).any()


def test_the_mean_of_equal_rewards_is_exact():
    equal = torch.linspace(0, 1, 50)[:, None].expand(50, 24)
    assert not group_advantages(equal).any()


def test_advantages_have_the_rewards_type():
    assert group_advantages(REWARDED).dtype == torch.float32


def test_advantages_are_clipped():
    outlier = torch.tensor([[0.0] * 99 + [1.0]])
    assert group_advantages(outlier).max() == 5
    assert group_advantages(-outlier).min() == -5
    assert group_advantages(-outlier, clip=2.0).min() == -2


@of_any_shape
def test_the_kl_is_torchs(shape):
    mean, ref_mean, values = normal(3, 10, *shape)
    std = values.abs() + 0.1
    pi = Normal(mean.double(), std.double())
    reference = Normal(ref_mean.double(), std.double())
    expected = per_image(kl_divergence(pi, reference))
    close(gaussian_kl(mean, ref_mean, std), expected, rtol=1e-5, atol=1e-8)


@of_any_shape
def test_the_kl_of_a_step_is_the_papers_closed_form(shape):
    v, ref_v, x = normal(3, 10, *shape)
    t = 0.6
    dt = 0.15
    sigma = 0.7 * math.sqrt(t / (1 - t))
    _, _, mean, std = sde_step(v, x, t, t - dt, 0.7)
    _, _, ref_mean, _ = sde_step(ref_v, x, t, t - dt, 0.7)
    factor = dt / 2 * (sigma * (1 - t) / (2 * t) + 1 / sigma) ** 2
    expected = factor * per_image((v - ref_v) ** 2)
    close(gaussian_kl(mean, ref_mean, std), expected, atol=1e-8)


# Both signs of the advantage, on both sides of the clip range of 0.1, within it and beyond.
LOG_RATIOS = [-0.2, -0.05, 0.05, 0.2, -0.2, -0.05, 0.05, 0.2]
ADVANTAGES = torch.tensor([2.0, 2.0, 2.0, 2.0, -2.0, -2.0, -2.0, -2.0])
FLAT = torch.tensor([0, 0, 0, 1, 1, 0, 0, 0]).bool()  # where the clip takes the gradient away


@pytest.fixture
def clipped():
    log_ratio = torch.tensor(LOG_RATIOS, requires_grad=True)
    kl = torch.linspace(1, 8, 8).requires_grad_()
    old = torch.full((8,), 0.3)
    loss, stats = grpo_loss(old + log_ratio, old, ADVANTAGES, kl, clip_range=0.1, beta=0.5)
    loss.backward()
    ratio = log_ratio.detach().exp()
    surrogate = torch.where(FLAT, ratio.clamp(0.9, 1.1), ratio) * ADVANTAGES
    return SimpleNamespace(
        log_ratio=log_ratio,
        ratio=ratio,
        kl=kl,
        loss=loss,
        stats=stats,
        policy_loss=-surrogate.mean().item(),
    )


def test_the_loss_is_the_clipped_surrogate_with_a_kl_penalty(clipped):
    assert clipped.loss.item() == pytest.approx(clipped.policy_loss + 0.5 * 4.5)


def test_the_gradient_of_the_loss_is_flat_beyond_the_clip(clipped):
    expected = torch.where(FLAT, 0, -ADVANTAGES * clipped.ratio / 8)
    close(clipped.log_ratio.grad, expected, atol=1e-8)


def test_the_kl_has_the_gradient_beta(clipped):
    assert torch.equal(clipped.kl.grad, torch.full((8,), 0.5 / 8))


def test_the_statistics_of_the_loss(clipped):
    expected = {
        "ratio_mean": clipped.ratio.mean().item(),
        "clipfrac": 4 / 8,
        "approx_kl": (0.2**2 + 0.05**2) / 4,
        "policy_loss": clipped.policy_loss,
        "kl": 4.5,
    }
    stats = {name: value.item() for name, value in clipped.stats.items()}
    assert stats == pytest.approx(expected, rel=1e-4)


def test_the_statistics_of_the_loss_have_no_graph(clipped):
    assert not any(value.requires_grad for value in clipped.stats.values())


# ---- Evaluation.
MODELS = {
    "with T5": ("with-T5", 3.5),
    "without T5": ("without-T5", 3.5),
    "without guidance": ("with-T5", 1.0),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def evaluated(request, model, work):
    """A run whose adapter, its average, and the base model draw three different images."""
    name, guidance_scale = request.param
    folder = model.with_name(name)
    run = small_run(folder, guidance_scale=guidance_scale)
    for average in run.ema.shadow_params:
        average.mul_(1.5)
    base = stock_images(folder, run)
    return SimpleNamespace(run=run, folder=folder, base=base)


def redness(images):
    return (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))


def test_with_an_average_of_zero_evaluation_draws_the_stock_models_images(evaluated):
    run = evaluated.run
    for average in run.ema.shadow_params:
        average.zero_()
    _, images = flow_grpo.evaluate(run)
    close(images, evaluated.base, rtol=0, atol=1e-4)
    assert images.std() > 0.01


def test_the_stock_pipeline_draws_an_evaluations_images_with_the_saved_weights(evaluated):
    run = evaluated.run
    _, images = flow_grpo.evaluate(run)
    flow_grpo.save(run)
    with pytest.raises(KeyboardInterrupt):
        flow_grpo.atomic(Path("out/pytorch_lora_weights.safetensors"), cut)
    close(images, stock_images(evaluated.folder, run, lora="out"), rtol=0, atol=1e-4)
    assert not torch.allclose(images, evaluated.base, atol=1e-2)


def test_the_saved_weights_need_no_scale(model, work):
    run = small_run(model)
    flow_grpo.save(run)
    saved = load_file("out/pytorch_lora_weights.safetensors")
    names = [n for n, p in run.pipe.transformer.named_parameters() if p.requires_grad]
    averages = dict(zip(names, run.ema.shadow_params))
    assert len(saved) == len(averages)
    for name in [name for name in names if "lora_B" in name]:
        down = averages[name.replace("lora_B", "lora_A")]
        key = "transformer." + name.replace(".default", "")
        product = saved[key] @ saved[key.replace("lora_B", "lora_A")]
        close(product, 2 * averages[name] @ down)  # alpha / rank = 2


def test_evaluation_leaves_the_adapter_as_it_was(model, work):
    run = small_run(model)
    for average in run.ema.shadow_params:
        average.zero_()
    before = copied(run.parameters)
    flow_grpo.evaluate(run)
    assert all(map(torch.equal, run.parameters, before))


def test_evaluation_scores_its_images(model, work):
    run = small_run(model)
    function = run.reward.function
    seen = []

    def reward(images, prompts, records):
        seen.extend(records)
        return function(images, prompts, records)

    run.reward.function = reward
    means, images = flow_grpo.evaluate(run)
    red = redness(images).mean().item()
    assert means == pytest.approx({"eval_reward": red, "eval_rewards": red})
    assert seen == run.eval_records


def test_images_have_the_height_and_width_that_were_asked_for(model, work):
    _, images = flow_grpo.evaluate(small_run(model, height=12, width=20))
    assert images.shape == (4, 3, 12, 20)


def test_evaluation_returns_the_first_16_images_whatever_the_batch_size(model, work):
    run = small_run(model, batch_size=12)
    run.eval_records = run.eval_records * 9
    means, images = flow_grpo.evaluate(run)
    run.config.batch_size = 36
    means_at_once, images_at_once = flow_grpo.evaluate(run)
    assert images.shape == (16, 3, 16, 16)
    close(images, images_at_once, rtol=0, atol=1e-4)
    assert means == pytest.approx(means_at_once, abs=1e-5)


# ---- Rollouts.
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


def guided(run, x, t, prompts):
    conditional = network(run, x, t, prompts)
    unconditional = network(run, x, t, [""] * len(prompts)).detach()
    return unconditional + run.config.guidance_scale * (conditional - unconditional)


def decoded(run, samples):
    vae = run.pipe.vae
    latents = samples.latents[:, -1] / vae.config.scaling_factor + vae.config.shift_factor
    with torch.no_grad():
        return (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


def prompts_of(samples):
    return [record["prompt"] for record in samples.records]


def drawn_at_once(velocity, x, times, levels, generator):
    """In place of `rollout`: latents that stay noise."""
    return torch.stack([x] * len(times), 1), torch.zeros(len(x), len(levels))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(flow_grpo, "rollout", drawn_at_once)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_images_are_drawn_from_their_prompts_with_noise_in_the_window_alone(
    model, work, guidance_scale
):
    run = small_run(model, **WINDOW | {"guidance_scale": guidance_scale})
    samples = flow_grpo.collect(run)
    assert len(samples.trained) == 3
    for k, (t, t_next) in enumerate(pairwise(samples.times)):
        x = samples.latents[:, k]
        euler = x + (t_next - t) * guided(run, x, t, prompts_of(samples))
        distance = (samples.latents[:, k + 1] - euler).abs().max()
        assert distance > 0.1 if k in samples.trained else distance < 1e-5, k


def test_all_steps_may_have_noise(model, work):
    run = small_run(model, sde_steps=10, sde_range=10)
    samples = flow_grpo.collect(run)
    assert samples.trained == range(10)
    assert samples.log_probs.all()
    assert flow_grpo.update(run, samples)["ratio_deviation"] < 1e-4


def test_the_window_has_every_place_in_its_range(model, work, quick):
    run = small_run(model, **WINDOW)
    places = set()
    for run.epoch in range(20):
        places.add(flow_grpo.collect(run).trained)
    assert places == {range(3), range(1, 4), range(2, 5)}


def test_a_rollouts_times_are_the_schedules(model, work, quick):
    samples = flow_grpo.collect(small_run(model))
    assert samples.times == pytest.approx(SIGMAS, abs=5e-5)


def test_all_images_of_all_epochs_and_seeds_begin_with_noise_of_their_own(model, work, quick):
    run = small_run(model)
    noise = []
    for run.config.seed, run.epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        noise.append(flow_grpo.collect(run).latents[:, 0].flatten(1))
    similar = torch.corrcoef(torch.cat(noise)) > 0.5
    assert torch.equal(similar, torch.eye(4 * 8).bool())


def test_a_reward_sees_each_image_with_its_prompt(model, work):
    run = small_run(model)
    seen = []

    def reward(images, prompts, records):
        seen.extend(zip(images, prompts, records))
        return [0.0] * len(images)

    run.reward.function = reward
    samples = flow_grpo.collect(run)
    images, prompts, records = zip(*seen)
    close(torch.stack(images), decoded(run, samples))
    assert list(prompts) == prompts_of(samples)
    assert list(records) == samples.records


def test_a_reward_runs_without_autograd(model, work):
    run = small_run(model)
    seen = []

    def reward(images, prompts, records):
        seen.append(torch.is_grad_enabled())
        return [1, 0, 0][: len(images)]

    run.reward.function = reward
    flow_grpo.collect(run)
    assert seen == [False] * 3


def test_rewards_may_be_whole_numbers(model, work):
    run = small_run(model)
    run.reward.function = lambda images, *_: [1, 0, 0][: len(images)]
    rewards = flow_grpo.collect(run).columns["reward"]
    assert rewards.tolist() == [1, 0, 0, 1, 0, 0, 1, 0]
    assert rewards.dtype == torch.float32


@pytest.mark.parametrize("compiled", [False, True])
def test_a_rollout_has_autograd_on_if_it_is_compiled(model, work, compiled):
    run = small_run(model)
    run.config.compile = compiled
    modes = set()

    def add_mode(*_):
        modes.add(torch.is_grad_enabled())

    run.pipe.transformer.norm_out.register_forward_pre_hook(add_mode)
    samples = flow_grpo.collect(run)
    assert modes == {compiled, False}  # With guidance, the empty prompt never has a graph.
    assert not samples.latents.requires_grad


@pytest.mark.parametrize("reward, names", [("red", ["rewards"]), ("two", ["first", "second"])])
def test_scores_are_columns_of_which_the_first_is_the_reward(model, work, reward, names):
    run = small_run(model, reward=f"rewards.py:{reward}")
    samples = flow_grpo.collect(run)
    red = redness(decoded(run, samples))
    assert samples.columns.keys() == {"reward", *names}
    assert red.std() > 1e-3
    close(samples.columns["reward"], red)
    close(samples.columns[names[0]], red)
    if reward == "two":
        close(samples.columns["second"], torch.full((8,), 0.25))


def test_decoding_has_no_graph(model, work):
    run = small_run(model)
    assert not flow_grpo.decode(run.pipe.vae, normal(1, *run.latent_shape)).requires_grad


def test_a_reward_may_view_images_as_rows(model, work):
    """In memory, the autoencoder's channels come last."""
    run = small_run(model)
    images = flow_grpo.decode(run.pipe.vae, normal(2, *run.latent_shape))
    assert images.view(2, -1).shape == (2, images[0].numel())


def test_images_are_in_0_to_1(model, work):
    vae = small_run(model).pipe.vae
    images = flow_grpo.decode(vae, 100 * normal(2, 4, 8, 8))
    assert images.min() == 0
    assert images.max() == 1


def test_an_epoch_encodes_each_text_once(model, work):
    run = small_run(model)
    run.pipe.encode_prompt = Mock(side_effect=run.pipe.encode_prompt)
    samples = flow_grpo.collect(run)
    flow_grpo.update(run, samples)
    encoded = [text for call in run.pipe.encode_prompt.mock_calls for text in call.args[0]]
    assert sorted(encoded) == ["", *sorted(set(prompts_of(samples)))]


def test_no_batch_has_a_warning_that_clip_cuts_a_prompt(model, work, monkeypatch, caplog):
    run = small_run(model)
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    flow_grpo.encode(run, [{"prompt": "a long prompt " * 100}])
    loggers = {record.name.split(".")[0] for record in caplog.records}
    assert "diffusers" not in loggers


def test_each_of_many_prompts_has_its_own_text(model, work):
    run = small_run(model)
    prompts = [f'a "{i}"' for i in range(150)]
    texts = flow_grpo.encode(run, [{"prompt": prompt} for prompt in prompts])
    assert texts.keys() == {"", *prompts}
    for prompt in ("", *prompts[::10]):
        alone = flow_grpo.encode(run, [{"prompt": prompt}])[prompt]
        torch.testing.assert_close(texts[prompt], alone, rtol=1e-4, atol=1e-5)
    different = torch.stack([pooled for _, pooled in texts.values()]).unique(dim=0)
    assert len(different) == 151


ORDERS = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0)]  # seed, epoch


@pytest.fixture
def orders(model, work, quick):
    """The prompts of the 20 images of epochs of 5 prompts, where the file has 4."""
    run = small_run(model, prompts_per_epoch=5)
    prompts = []
    for run.config.seed, run.epoch in ORDERS:
        prompts.append(prompts_of(flow_grpo.collect(run)))
    assert [record["prompt"] for record in run.train_records] == PROMPTS[:4]
    return prompts


def test_a_groups_images_have_one_prompt_and_lie_in_a_row(orders):
    for prompts in orders:
        assert prompts == [prompt for prompt in prompts[::4] for _ in range(4)]


def test_all_prompts_are_taken_before_one_comes_again(orders):
    for prompts in orders:
        assert sorted(prompts[:16:4]) == PROMPTS[:4]


def test_the_prompts_order_depends_on_seed_and_epoch(orders):
    assert orders[0] == orders[4]
    assert len({tuple(prompts) for prompts in orders}) == 4


# ---- An update.
def copied(tensors):
    return [t.detach().clone() for t in tensors]


def joined(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def scored(run, samples, images):
    """Log-probs [n, S] of images, and the KL to the base model [n, S] with the factor of [code]."""
    level = run.config.noise_level
    prompts = [samples.records[i]["prompt"] for i in images]
    log_probs = []
    kls = []
    for k in samples.trained:
        t = samples.times[k]
        t_next = samples.times[k + 1]
        x = samples.latents[images, k]
        pi = policy(guided(run, x, t, prompts), x, t, t_next, level)
        run.pipe.transformer.disable_adapters()
        reference = policy(guided(run, x, t, prompts).detach(), x, t, t_next, level)
        run.pipe.transformer.enable_adapters()
        log_probs.append(mean_log_prob(pi, samples.latents[images, k + 1]))
        kls.append(per_image(kl_divergence(pi, reference)) * (t - t_next))
    return torch.stack(log_probs, 1), torch.stack(kls, 1)


def objective(run, samples, images, old_log_probs, advantages):
    """[P]'s loss, and the statistics of an update."""
    config = run.config
    log_probs, kls = scored(run, samples, images)
    log_ratio = log_probs - old_log_probs[images]
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
    a = advantages[images, None]
    policy_loss = -torch.minimum(ratio * a, clipped * a).mean()
    loss = policy_loss + config.beta * kls.mean()
    stats = {
        "policy_loss": policy_loss,
        "kl": kls.mean(),
        "clipfrac": (ratio != clipped).double().mean(),
        "ratio_mean": ratio.mean(),
        "approx_kl": (log_ratio**2).mean() / 2,
    }
    return loss, {name: value.item() for name, value in stats.items()}


# Of the second and fifth prompt's images, none has an advantage; of the third's, two have none.
UPDATE_REWARDS = torch.tensor(
    [
        [0.2, 0.9, 0.7, 0.1],
        [0.1, 0.1, 0.1, 0.1],
        [1.0, 0.5, 0.5, 0.0],
        [0.3, 0.0, 0.6, 0.8],
        [0.4, 0.4, 0.4, 0.4],
    ]
)
UPDATE_KEPT = [0, 1, 2, 3, 8, 11, 12, 13, 14, 15]
UPDATES = {
    "all steps": ("with-T5", {"sde_steps": 9, "sde_range": 9}, 1.0),
    "a window and a loss scale": ("without-T5", {"sde_steps": 3, "sde_range": 5}, 2.0**10),
}


@dataclass
class Recorded:
    """One of the optimiser steps of an `update`."""

    adapter: list  # before the step
    images: list  # the images whose gradients were added
    gradient: torch.Tensor
    stats: dict  # as `objective` has them
    expected_gradient: torch.Tensor


class Updated:
    """An `update` of two optimiser steps with KL and guidance, and what it should have done.

    Each step has 5 images in batches of 3, so the second batch is filled up.
    """

    def __init__(self, model, patch, given, scale):
        run = small_run(
            model, prompts_per_epoch=5, learning_rate=0.03, clip_range=2e-4, beta=0.3, **given
        )
        run.scaler = torch.amp.GradScaler("cpu", scale, enabled=scale > 1)
        samples = flow_grpo.collect(run)
        samples.columns = {"reward": UPDATE_REWARDS.flatten()}
        self.run = run
        self.samples = samples
        self.log_probs = scored(run, samples, list(range(20)))[0].detach()
        self.scale = scale
        self.steps = []
        self.images = []
        self.modes = []  # of the passes of the network: with a graph or without
        self.add_gradient = flow_grpo.add_gradient
        self.optimizer_step = flow_grpo.optimizer_step
        patch.setattr(flow_grpo, "add_gradient", self.recorded_add_gradient)
        patch.setattr(flow_grpo, "optimizer_step", self.recorded_optimizer_step)
        hook = run.pipe.transformer.register_forward_pre_hook(self.count_pass)
        self.stats = flow_grpo.update(run, samples)
        hook.remove()
        self.compute_expected()

    def count_pass(self, *_):
        self.modes.append(torch.is_grad_enabled())

    def recorded_add_gradient(self, run, samples, images, *rest):
        self.images += images
        return self.add_gradient(run, samples, images, *rest)

    def recorded_optimizer_step(self, run):
        gradient = joined(p.grad for p in run.parameters) / self.scale
        self.steps.append(Recorded(copied(run.parameters), self.images, gradient, {}, None))
        self.images = []
        return self.optimizer_step(run)

    def compute_expected(self):
        centred = UPDATE_REWARDS - UPDATE_REWARDS.mean(1, keepdim=True)
        std = UPDATE_REWARDS.std(correction=0)
        advantages = (centred / (std + 1e-4)).flatten()
        for step in self.steps:
            for p, before in zip(self.run.parameters, step.adapter):
                p.data.copy_(before)
            loss, step.stats = objective(
                self.run, self.samples, step.images, self.log_probs, advantages
            )
            step.expected_gradient = joined(torch.autograd.grad(loss, self.run.parameters))
            step.stats["grad_norm"] = step.expected_gradient.norm().item()


@pytest.fixture(scope="module", params=UPDATES.values(), ids=UPDATES)
def updated(request, model, tmp_path_factory):
    name, given, scale = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow_grpo, "DEVICE", "cpu")
        patch.chdir(tmp_path_factory.mktemp("updated"))
        Path("rewards.py").write_text(REWARDS)
        return Updated(model.with_name(name), patch, given, scale)


def test_rollouts_scores_are_the_policys(updated):
    drawn = updated.samples.log_probs[:, list(updated.samples.trained)]
    close(drawn, updated.log_probs, rtol=0, atol=1e-5)


def test_an_updates_gradient_is_the_papers(updated):
    assert len(updated.steps) == 2
    for step in updated.steps:
        error = (step.gradient - step.expected_gradient).norm()
        assert error < 1e-3 * step.expected_gradient.norm()


def test_an_updates_statistics_are_means_over_its_optimiser_steps(updated):
    first, second = (step.stats for step in updated.steps)
    for name in first:
        expected = (first[name] + second[name]) / 2
        assert updated.stats[name] == pytest.approx(expected, rel=1e-3, abs=1e-7), name


def test_only_the_second_optimiser_step_is_off_policy(updated):
    first, second = (step.stats for step in updated.steps)
    assert first["clipfrac"] == 0
    assert 0.1 < second["clipfrac"] < 1
    assert updated.stats["ratio_deviation"] < 1e-5


def test_an_update_trains_once_on_each_image_that_has_an_advantage(updated):
    first, second = (step.images for step in updated.steps)
    assert len(first) == len(second) == 5
    assert sorted(first + second) == UPDATE_KEPT
    assert updated.stats["trained"] == 10 / 20


def test_an_update_is_of_two_optimiser_steps(updated):
    assert updated.run.updates == 2


def test_an_update_has_no_graph_without_text_or_without_adapter(updated):
    batches = 4
    steps = len(updated.samples.trained)
    assert sum(updated.modes) == batches * steps
    assert len(updated.modes) == 4 * batches * steps


@pytest.mark.parametrize(
    "guidance_scale, beta, drawn, trained",
    [
        (1.0, 0.0, 1, 1),
        (1.0, 0.1, 1, 2),
        (2.0, 0.0, 2, 2),
        (2.0, 0.1, 2, 4),
    ],
)  # fmt: skip
def test_passes_of_the_network(model, work, guidance_scale, beta, drawn, trained):
    """For each batch and step: of rollout, without a graph, and of update, of which one has one."""
    run = small_run(
        model, guidance_scale=guidance_scale, beta=beta, batch_size=8, updates_per_epoch=1
    )
    modes = []
    run.pipe.transformer.register_forward_pre_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    samples = flow_grpo.collect(run)
    assert modes == [False] * 10 * drawn
    modes.clear()
    flow_grpo.update(run, samples)
    assert len(modes) == 9 * trained
    assert sum(modes) == 9


def test_images_are_shuffled_anew_in_each_epoch(model, work, quick, monkeypatch):
    run = small_run(model, batch_size=8)
    samples = flow_grpo.collect(run)
    samples.columns["reward"] = torch.arange(8.0)
    chunks = []

    def add_gradient(run, samples, images, advantages, chunk_size):
        chunks.append(tuple(sorted(images)))
        return {}

    monkeypatch.setattr(flow_grpo, "add_gradient", add_gradient)
    for run.config.seed, run.epoch in ORDERS:
        flow_grpo.update(run, samples)
    assert chunks[:2] == chunks[-2:]
    assert len(set(chunks)) == 8


def test_each_optimiser_step_has_an_equal_part_of_each_batch(model, work, quick, monkeypatch):
    run = small_run(model, batch_size=4)
    samples = flow_grpo.collect(run)
    samples.columns["reward"] = torch.arange(8.0)
    chunks = [[], []]

    def add_gradient(run, samples, images, advantages, chunk_size):
        chunks[run.updates] += images
        return {}

    def optimizer_step(run):
        run.updates += 1
        return 1.0

    monkeypatch.setattr(flow_grpo, "add_gradient", add_gradient)
    monkeypatch.setattr(flow_grpo, "optimizer_step", optimizer_step)
    flow_grpo.update(run, samples)
    for chunk in chunks:
        assert sorted(i // 4 for i in chunk) == [0, 0, 1, 1]


# ---- The adapter.
ENDS = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
PLACES = [f"transformer_blocks.{i}.attn.{end}" for i in (0, 1) for end in ENDS]


@pytest.fixture
def fresh(model, work):
    """A run whose adapter has done nothing yet, in a small window."""
    return small_run(model, active=False, sde_steps=2, sde_range=2)


def test_the_adapter_is_where_the_authors_have_it(fresh):
    named = fresh.pipe.transformer.named_parameters()
    trained = {name.split(".lora_")[0] for name, p in named if p.requires_grad}
    assert trained == set(PLACES[:-1])  # The last block has no to_add_out.
    assert fresh.pipe.transformer.transformer_blocks[0].attn2 is not None


def test_the_runs_parameters_are_all_that_is_trained(fresh):
    trained = [p for p in fresh.pipe.transformer.parameters() if p.requires_grad]
    assert len(trained) == 2 * 15
    assert list(map(id, fresh.parameters)) == list(map(id, trained))
    assert {p.dtype for p in trained} == {torch.float32}


def test_the_adapters_alpha_is_twice_its_rank(fresh):
    layer = fresh.pipe.transformer.transformer_blocks[0].attn.to_q
    assert layer.lora_A["default"].weight.shape == (4, 16)
    assert layer.scaling == {"default": 2.0}


def test_the_adapter_begins_gaussian_and_without_effect(fresh):
    named = list(fresh.pipe.transformer.named_parameters())
    std = joined(p for name, p in named if "lora_A" in name).std().item()
    assert std == pytest.approx(1 / 4, rel=0.1)
    assert not joined(p for name, p in named if "lora_B" in name).any()


def test_the_adapter_depends_on_the_seed(model, work):
    adapters = []
    for seed in (0, 0, 1):
        adapters.append(joined(small_run(model, active=False, seed=seed).parameters))
    assert torch.equal(adapters[0], adapters[1])
    assert not torch.equal(adapters[0], adapters[2])


def test_an_update_changes_the_adapter_alone(fresh):
    named = dict(fresh.pipe.transformer.named_parameters())
    before = dict(zip(named, copied(named.values())))
    flow_grpo.update(fresh, flow_grpo.collect(fresh))
    changed = {name for name, p in named.items() if not torch.equal(p, before[name])}
    trained = {name for name, p in named.items() if p.requires_grad}
    assert {name for name in trained if "blocks.0" in name} <= changed <= trained


def test_before_the_first_optimiser_step_ratios_are_one(fresh):
    assert flow_grpo.update(fresh, flow_grpo.collect(fresh))["ratio_deviation"] < 1e-5


def test_ratio_deviation_is_the_mean_of_the_largest_of_a_batch_at_a_step(fresh):
    fresh.config.batch_size = 8
    fresh.config.updates_per_epoch = 1
    samples = flow_grpo.collect(fresh)
    shift = normal(8, 10)
    samples.log_probs -= shift
    expected = shift[:, :2].expm1().abs().amax(0).mean().item()
    assert flow_grpo.update(fresh, samples)["ratio_deviation"] == pytest.approx(expected, rel=1e-4)


def test_ratio_deviation_is_of_the_first_optimiser_step_alone(fresh):
    samples = flow_grpo.collect(fresh)
    samples.log_probs += 2.0
    stats = flow_grpo.update(fresh, samples)
    assert stats["ratio_deviation"] == pytest.approx(-math.expm1(-2), rel=1e-4)


def test_ratio_deviation_is_the_sum_of_the_processes_parts(fresh, monkeypatch):
    monkeypatch.setattr(flow_grpo, "gather", lambda part: [part, part])
    samples = flow_grpo.collect(fresh)
    samples.log_probs += 2.0
    stats = flow_grpo.update(fresh, samples)
    assert stats["ratio_deviation"] == pytest.approx(-2 * math.expm1(-2), rel=1e-4)


def test_equal_rewards_teach_nothing(fresh):
    samples = flow_grpo.collect(fresh)
    samples.columns["reward"] = torch.full((8,), 0.1)
    stats = flow_grpo.update(fresh, samples)
    assert stats == {"grad_norm": 0, "ratio_deviation": 0, "trained": 0}
    assert fresh.updates == 0


# ---- Optimiser steps.
def set_gradient(parameters, norm, scale=1.0):
    """A gradient of this norm, and all its elements equal."""
    count = sum(p.numel() for p in parameters)
    for p in parameters:
        p.grad = torch.full_like(p, norm * scale / math.sqrt(count))


# The gradient's norm, and how many updates are done after the step.
NORMS = [(0.1, 1), (7.0, 2), (math.inf, 2), (0.5, 3), (0.3, 4), (math.nan, 4), (30.0, 100)]


def test_optimiser_steps_and_the_adapters_average(model, work):
    """As AdamW and [C] do it; a step whose gradient overflowed does not count."""
    run = small_run(model, ema_interval=2, learning_rate=0.02)
    run.scaler = torch.amp.GradScaler("cpu", 4.0)
    clones = copied(run.parameters)
    average = copied(run.parameters)
    adam = torch.optim.AdamW(clones, 0.02, weight_decay=1e-4)
    for norm, updates in NORMS:
        run.updates = max(run.updates, updates - 1)
        scale = run.scaler.scale(torch.ones(())).item()
        set_gradient(run.parameters, norm, scale)
        assert flow_grpo.optimizer_step(run) == pytest.approx(norm, nan_ok=True)
        assert run.updates == updates
        if math.isfinite(norm):
            set_gradient(clones, min(norm, 1.0))
            adam.step()
            if updates % 2 == 0:
                decay = min(0.9, (1 + updates) / (10 + updates))
                average = [decay * a + (1 - decay) * p for a, p in zip(average, clones)]
        close(joined(run.parameters), joined(clones), atol=1e-5)
        close(joined(run.ema.shadow_params), joined(average), atol=1e-5)


def test_the_optimisers_settings_are_the_authors(model, work):
    options = small_run(model).optimizer.defaults
    expected = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4}
    assert {name: options[name] for name in expected} == expected


def test_an_optimiser_step_leaves_no_gradient(model, work):
    run = small_run(model)
    set_gradient(run.parameters, 1.0)
    flow_grpo.optimizer_step(run)
    assert not any(p.grad is not None and p.grad.any() for p in run.parameters)


def test_a_process_without_images_takes_the_optimiser_step_too(model, work):
    run = small_run(model, half=True)
    assert flow_grpo.optimizer_step(run) == 0
    assert run.updates == 1


def test_an_update_without_finite_gradients_lowers_the_loss_scale_and_ends_at_1(model, work):
    run = small_run(model)
    run.scaler = torch.amp.GradScaler("cpu", 4.0)
    before = copied(run.parameters)
    samples = flow_grpo.collect(run)
    samples.log_probs[:] = math.nan
    flow_grpo.update(run, samples)
    assert run.scaler.get_scale() == 1
    assert run.updates == 0
    assert all(map(torch.equal, run.parameters, before))
    with pytest.raises(UserError, match=r"the gradient is not finite.*diverged"):
        flow_grpo.update(run, samples)


def test_without_a_loss_scale_a_gradient_that_is_not_finite_is_said_at_once(model, work):
    run = small_run(model)
    set_gradient(run.parameters, math.inf)
    with pytest.raises(UserError, match=r"the gradient is not finite.*diverged"):
        flow_grpo.optimizer_step(run)


# ---- Averages.
@pytest.mark.parametrize(
    "tags, expected",
    [
        ([None, None, None], 0.5),
        (["position", "position", "position"], 0.5),
        (["counting", "position", "counting"], (0.75 + 0) / 2),
        (["counting", "position", None], (1 + 0 + 0.5) / 3),
    ],
)
def test_averages_are_means_of_the_tags_means(tags, expected):
    columns = {"score": torch.tensor([1.0, 0.0, 0.5])}
    records = [{"prompt": "a", "tag": tag} if tag else {"prompt": "a"} for tag in tags]
    assert flow_grpo.averages(columns, records, "eval_") == {"eval_score": pytest.approx(expected)}


# ---- Half precision, compiling, checkpoints.
@pytest.fixture(scope="session")
def one_block(model):
    """The folder of a model with a single block, which compiles sooner."""
    folder = model.with_name("one-block")
    save_random_pipeline(folder, num_layers=1)
    return folder


def sizes_of_passes(network):
    """A set to which each pass of the network adds how many images it has."""
    sizes = set()
    network.register_forward_pre_hook(lambda _, args: sizes.add(len(args[0])))
    return sizes


def an_epoch_has_batches_of_one_size_and_ratios_of_one(run):
    sizes = sizes_of_passes(run.pipe.transformer)
    stats = flow_grpo.update(run, flow_grpo.collect(run))
    assert run.updates == 2
    assert sizes == {3}
    assert stats["ratio_deviation"] < 1e-5


def test_a_compiled_epoch_in_half_precision_has_batches_of_one_size_and_ratios_of_one(
    one_block, work
):
    torch.compiler.reset()
    run = small_run(one_block, half=True, beta=0.1, compile=True)
    an_epoch_has_batches_of_one_size_and_ratios_of_one(run)


def test_on_the_cpu_an_update_has_passes_for_its_own_images_alone(model, work):
    run = small_run(model, beta=0.1)
    samples = flow_grpo.collect(run)
    sizes = sizes_of_passes(run.pipe.transformer)
    flow_grpo.add_gradient(run, samples, [0, 1], torch.ones(8), 2)
    assert sizes == {2}


def test_in_half_precision_the_adapter_is_in_float32_and_there_is_a_loss_scale(model, work):
    run = small_run(model, half=True, active=False)
    named = run.pipe.transformer.named_parameters()
    dtypes = {("lora" in name, p.dtype) for name, p in named}
    assert dtypes == {(True, torch.float32), (False, torch.float16)}
    assert run.scaler.get_scale() == 2**20
    assert not small_run(model).scaler.is_enabled()


def test_evaluation_in_half_precision_draws_the_stock_pipelines_images(model, work):
    run = small_run(model, half=True)
    _, images = flow_grpo.evaluate(run)
    flow_grpo.save(run)
    theirs = stock_images(model, run, lora="out", dtype=torch.float16)
    assert images.dtype == torch.float32
    assert (images - theirs).abs().max() < 0.02


def epoch_gradient(model, monkeypatch, **switches):
    """The log-probs, gradient and statistics of an epoch with one optimiser step."""
    run = small_run(model, updates_per_epoch=1, **switches)
    gradients = []

    def optimizer_step(run):
        gradients.extend(copied(p.grad for p in run.parameters))
        return 1.0

    monkeypatch.setattr(flow_grpo, "optimizer_step", optimizer_step)
    samples = flow_grpo.collect(run)
    stats = flow_grpo.update(run, samples)
    return samples.log_probs, joined(gradients), stats


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpoints_and_compiling_change_no_gradient(one_block, work, monkeypatch, compiled):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    how = {"guidance_scale": 1.0}  # With guidance, more would have to be compiled.
    plain_log_probs, plain, _ = epoch_gradient(one_block, monkeypatch, **how)
    how |= {"gradient_checkpointing": True, "compile": compiled}
    log_probs, gradient, stats = epoch_gradient(one_block, monkeypatch, **how)
    close(log_probs, plain_log_probs, rtol=0, atol=1e-4)
    assert plain.norm() > 0
    assert (gradient - plain).norm() < 1e-3 * plain.norm()
    assert stats["ratio_deviation"] < 1e-5
    assert compiled == (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0)


def test_compiling_is_not_given_up_for_the_kinds_of_blocks_nor_in_a_backward_pass(model, work):
    torch.compiler.config.recompile_limit = 8  # torch's default
    small_run(model, compile=True)
    # SD3.5 has three kinds of blocks, each with the adapter on or off, and with a graph or without.
    assert torch.compiler.config.recompile_limit >= 3 * 2 * 2
    # A backward pass that recomputes in another thread would have the default limit.
    assert not torch.autograd.is_multithreading_enabled()


@pytest.mark.parametrize("checkpointed, at_once", [(False, {3, 2}), (True, {1})])
def test_checkpoints_save_memory_of_network_and_autoencoder(model, work, checkpointed, at_once):
    run = small_run(model, gradient_checkpointing=checkpointed)
    sizes = sizes_of_passes(run.pipe.vae.decoder)
    flow_grpo.collect(run)
    assert run.pipe.transformer.is_gradient_checkpointing == checkpointed
    assert sizes == at_once


# ---- On a GPU, with one layer of SD3.5 Medium's size, its autoencoder's factor, small encoders.
REAL_NETWORK = {
    "sample_size": 128,
    "num_layers": 1,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "in_channels": 16,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pos_embed_max_size": 384,
}
REAL_IMAGES = {"height": 512, "width": 512, "max_sequence_length": 128}


@pytest.fixture(scope="session")
def real(model):
    folder = model.with_name("real")
    save_random_pipeline(folder, pooled=(768, 1280), blocks=4, **REAL_NETWORK)
    return folder


@pytest.fixture(params=["small", "real"])
def on_a_gpu(request, model):
    """A model's folder, and the settings for its images."""
    if request.param == "small":
        return model, {}
    return request.getfixturevalue("real"), REAL_IMAGES


def memory_of(run):
    """Bytes of weights, gradient, the optimiser's two moments, and average."""
    modules = [run.pipe.transformer, run.pipe.vae]
    weights = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return sum(t.nbytes for t in weights) + 4 * sum(p.nbytes for p in run.parameters)


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_an_epoch_on_a_gpu_has_ratios_of_one_and_memory_for_its_batch(
    on_a_gpu, work, compiled, checkpointed
):
    torch.compiler.reset()
    folder, given = on_a_gpu
    switches = {"compile": compiled, "gradient_checkpointing": checkpointed}
    peaks = []
    for batch_size in (4, 8):
        run = None
        gc.collect()
        torch.cuda.empty_cache()
        run = small_run(folder, batch_size=batch_size, **given, **switches)
        torch.cuda.reset_peak_memory_stats()
        stats = flow_grpo.update(run, flow_grpo.collect(run))
        peaks.append(torch.cuda.max_memory_allocated())
        assert stats["ratio_deviation"] < 1e-5
        assert stats["trained"] == 1
        assert run.updates == 2
    if given:
        fixed = memory_of(run)
        assert peaks[1] == pytest.approx(fixed + 2 * (peaks[0] - fixed), rel=0.2)


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_an_evaluation_on_a_gpu_draws_the_stock_pipelines_images(on_a_gpu, work, compiled):
    torch.compiler.reset()
    folder, given = on_a_gpu
    run = small_run(folder, compile=compiled, **given)
    _, images = flow_grpo.evaluate(run)
    flow_grpo.save(run)
    theirs = []
    for lora in (None, "out"):
        latents = stock_images(folder, run, lora, "latent", dtype=torch.float16)
        theirs.append(flow_grpo.decode(run.pipe.vae, latents.float()).cpu())
    base, adapted = theirs
    assert (images - adapted).abs().mean() < 0.2 * (images - base).abs().mean()


# ---- A run, and what it leaves.
FILES = """checkpoint.pt config.json curve.png eval_prompts.jsonl metrics.jsonl
    pytorch_lora_weights.safetensors samples/epoch_00000.png samples/epoch_00002.png
    samples/epoch_00003.png""".split()


@pytest.fixture
def finished(model, work):
    """The folder of a run by `two` of rewards.py. The file `printed` beside it has what it said.

    The first test that asks for it makes it, and the others share it.
    """
    folder = model.with_name("finished")
    printed = model.with_name("printed")
    if not printed.exists():
        with open("stdout", "w") as stdout, redirect_stdout(stdout):
            given = {"reward": "rewards.py:two", "seed": 3}
            assert main(arguments(model.with_name("without-T5"), folder, **given)) == 0
        Path("stdout").rename(printed)
    return folder


def test_a_run_leaves_these_files(finished):
    files = [path for path in finished.rglob("*") if path.is_file()]
    names = {str(path.relative_to(finished)) for path in files if "tensorboard" not in path.parts}
    assert names == set(FILES)


def test_all_files_may_be_read_by_whom_new_files_may(finished, tmp_path):
    tmp_path.joinpath("new").touch()
    modes = {Path(finished, name).stat().st_mode for name in FILES}
    assert modes == {tmp_path.joinpath("new").stat().st_mode}


def test_a_run_leaves_tensorboards_events(finished):
    events = EventAccumulator(str(finished / "tensorboard")).Reload()
    rewards = [(event.step, event.value) for event in events.Scalars("reward")]
    lines = metrics(finished)
    assert rewards == [(m["epoch"], pytest.approx(m["reward"])) for m in lines if "reward" in m]


def test_a_run_measures_each_epoch_and_evaluates_before_on_the_way_and_after(finished):
    kinds = [(m["epoch"], "reward" in m, "eval_reward" in m) for m in metrics(finished)]
    evaluations = [(0, False, True), (2, False, True), (3, False, True)]
    epochs = [(1, True, False), (2, True, False), (3, True, False)]
    assert sorted(kinds) == sorted(evaluations + epochs)
    assert [epoch for epoch, _, _ in kinds] == [0, 1, 2, 2, 3, 3]


def test_an_epochs_line_has_the_rewards_columns_and_the_updates_statistics(finished):
    for line in metrics(finished):
        if "reward" in line:
            assert line["first"] == line["reward"]
            assert line["second"] == 0.25
            for name in ("kl", "grad_norm", "seconds_rollout", "seconds_update"):
                assert line[name] > 0
            assert line["ratio_deviation"] < 1e-5
            assert line["trained"] == 1


def test_a_run_prints_each_line_of_its_metrics(finished):
    printed = finished.with_name("printed").read_text().splitlines()
    for line in metrics(finished):
        epoch = line.pop("epoch")
        values = "  ".join(f"{name} {value:.3g}" for name, value in line.items())
        assert f"epoch {epoch}: {values}" in printed


def test_a_run_ends_by_saying_what_it_has_reached_and_where_it_is(monkeypatch, capsys):
    rewards = [0.1, 0.4, 0.25]
    lines = [{"epoch": epoch, "eval_reward": reward} for epoch, reward in enumerate(rewards)]
    run = SimpleNamespace(config=Config(output_dir="out"), metrics=[*lines, {"reward": 0.5}])
    monkeypatch.setattr(flow_grpo, "start", lambda _: run)
    monkeypatch.setattr(flow_grpo, "train", lambda _: None)
    assert main([]) == 0
    said, where = capsys.readouterr().out.splitlines()
    assert "was 0.100, and is 0.250" in said
    assert where.endswith(" out")


def test_an_epochs_times_are_those_of_its_parts(model, work, monkeypatch):
    clock = SimpleNamespace(now=0.0)

    def collect(run):
        clock.now += 3
        return original(run)

    def update(run, samples):
        clock.now += 5
        return {}

    original = flow_grpo.collect
    monkeypatch.setattr(flow_grpo.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(flow_grpo, "collect", collect)
    flow_grpo.train(small_run(model, epochs=1), update)
    _, epoch, _ = metrics("out")
    assert (epoch["seconds_rollout"], epoch["seconds_update"]) == (3, 5)


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, lambda *_, name=name: done.append(name))
    flow_grpo.atomic(tmp_path / "file", Path.touch)
    assert done == ["fsync", "replace"]


def test_the_config_file_has_all_settings(finished):
    saved = json.loads((finished / "config.json").read_text())
    model = str(finished.with_name("without-T5"))
    given = {"reward": "rewards.py:two", "seed": 3, "model": model, "prompt_file": "prompts.txt"}
    assert saved == vars(Config(output_dir=str(finished), **SMALL | given))


def test_the_grid_has_four_pictures_in_a_row(model, work):
    flow_grpo.log(small_run(model), {}, torch.rand(6, 3, 16, 16))
    width, height = Image.open("out/samples/epoch_00000.png").size
    assert (width, height) == (4 * (16 + 2) + 2, 2 * (16 + 2) + 2)


def test_the_curve_is_a_picture(finished):
    assert Image.open(finished / "curve.png").size == (640, 480)


def test_the_curve_has_the_rewards_of_epochs_and_of_evaluations(model, work, monkeypatch):
    run = small_run(model)
    run.metrics = [{"epoch": 0, "eval_reward": 0.1}, {"epoch": 1, "reward": 0.2}]
    run.epoch = 1
    lines = {}

    def savefig(figure, path, format):
        for line in figure.axes[0].lines:
            lines[line.get_label()] = line.get_xydata().tolist()
        Path(path).touch()

    monkeypatch.setattr(flow_grpo.Figure, "savefig", savefig)
    flow_grpo.log(run, {"eval_reward": 0.3}, torch.rand(1, 3, 16, 16))
    assert lines == {"reward": [[1, 0.2]], "eval_reward": [[0, 0.1], [1, 0.3]]}


def test_the_prompts_of_evaluations_are_saved(finished):
    lines = (finished / "eval_prompts.jsonl").read_text().splitlines()
    _, eval_records = split_prompts(Config("prompts.txt"), load_reward("rewards.py:red"))
    assert [json.loads(line) for line in lines] == eval_records


# ---- Settings.
PUBLISHED = {
    "epochs": 500,
    "prompts_per_epoch": 48,
    "group_size": 24,
    "updates_per_epoch": 2,
    "learning_rate": 3e-4,
    "beta": 0.04,
    "clip_range": 1e-4,
    "guidance_scale": 4.5,
    "noise_level": 0.7,
    "sde_steps": 9,
    "lora_rank": 32,
    "ema_interval": 8,
    "height": 512,
    "width": 512,
    "max_sequence_length": 128,
}


def settings(*args):
    return vars(configure(args)[0])


def test_by_default_the_settings_are_the_published_ones(work):
    assert PUBLISHED.items() <= settings("--model=some/model").items()


def test_tiny_sd3_has_defaults_of_its_own(work):
    expected = vars(TINY) | {"output_dir": "out", "model": "moved/tiny-sd3"}
    assert settings("--model=moved/tiny-sd3", "--output-dir=out") == expected


@pytest.mark.parametrize("device, model", [("cpu", TINY.model), ("cuda", Config.model)])
def test_without_a_gpu_the_model_is_tiny_sd3(work, monkeypatch, device, model):
    monkeypatch.setattr(flow_grpo, "DEVICE", device)
    assert settings()["model"] == model


def test_flags_come_before_defaults(work):
    assert settings(f"--model={TINY.model}", "--beta=7")["beta"] == 7


def test_a_run_has_a_folder_of_its_own_even_if_two_start_at_once(work):
    expected = rf"runs/\d{{8}}-\d{{6}}-{os.getpid()}"
    assert re.fullmatch(expected, settings()["output_dir"])


def test_process_0_alone_prints_help(capsys, monkeypatch):
    monkeypatch.setattr(flow_grpo, "RANK", 1)
    with pytest.raises(SystemExit):
        main(["--help"])
    assert capsys.readouterr().out == ""


def test_each_setting_has_a_line_of_help(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name in vars(Config()):
        flag = name.replace("_", "-")
        help_and_default = shown.partition(f" --{flag}")[2].partition("(default")[0]
        assert help_and_default.endswith(". "), flag


# ---- Interrupted equals uninterrupted, bit for bit.
def left_by(folder):
    """All that a run leaves that doesn't tell when and where it was."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    for name in ("output_dir", "model", "resume"):
        state["config"].pop(name)
    assert state["metrics"] == metrics(folder)
    for line in state["metrics"]:
        line.pop("seconds_rollout", None)
        line.pop("seconds_update", None)
    state["adapter"] = load_file(folder / "pytorch_lora_weights.safetensors")
    pictures = sorted(folder.glob("samples/*.png"))
    state["pictures"] = {path.name: path.read_bytes() for path in pictures}
    return state


def same_run(one, other):
    leaves, names = tree_flatten(left_by(Path(one)))
    other_leaves, other_names = tree_flatten(left_by(Path(other)))
    assert names == other_names
    for leaf, other_leaf in zip(leaves, other_leaves):
        if isinstance(leaf, torch.Tensor):
            assert torch.equal(leaf, other_leaf)
        else:
            assert leaf == other_leaf
    return True


@pytest.fixture
def whole(model, work):
    """The folder of a run that nothing interrupted, which tests share."""
    folder = model.with_name("whole")
    if not folder.exists():
        assert main(arguments(model, folder, **WINDOW)) == 0
    return folder


INSTANTS = [
    ("collect", 1),
    ("score_images", 6),
    ("add_gradient", 5),
    ("optimizer_step", 4),
    ("evaluate", 2),
    ("log", 3),
    ("checkpoint.pt", 4),
    ("metrics.jsonl", 3),
    ("pytorch_lora_weights.safetensors", 4),
    ("epoch_00002.png", 1),
]


@pytest.mark.parametrize("name, call", INSTANTS)
def test_interrupted_equals_uninterrupted(whole, model, monkeypatch, capsys, name, call):
    """The call of a function, or the writing of a file, is the one that Ctrl-C interrupts."""
    calls = Counter()

    def atomic(path, write):
        calls[path.name] += 1
        original(path, cut if path.name == name and calls[name] == call else write)

    def function(*args):
        calls[name] += 1
        if calls[name] == call:
            raise KeyboardInterrupt
        return original(*args)

    replaced = "atomic" if "." in name else name
    original = getattr(flow_grpo, replaced)
    monkeypatch.setattr(flow_grpo, replaced, atomic if "." in name else function)
    assert main(arguments(model, "cut", **WINDOW)) == 130
    assert capsys.readouterr().err.endswith(f"\nerror: interrupted by a signal{to_go_on('cut')}\n")
    monkeypatch.setattr(flow_grpo, replaced, original)
    assert main(["--resume=cut"]) == 0
    assert same_run("cut", whole)


# A process of its own, or one of several, that runs as here.
WORKER = """
import json
import sys

import test_flow_grpo

for name, args in json.loads(sys.argv[1]).items():
    code = test_flow_grpo.watched_run(name, args)
sys.exit(code)
"""


def watched_run(name, args):
    """A run's exit code. NAME.RANK.pt tells what this process drew, differentiated, and wrote."""
    seen = {"samples": [], "gradients": [], "files": []}
    original = SimpleNamespace(**vars(flow_grpo))

    def join_processes():  # once for all runs of this process
        if not dist.is_initialized():
            original.join_processes()

    def collect(run):
        samples = original.collect(run)
        kept = {"latents": samples.latents, "log_probs": samples.log_probs}
        seen["samples"].append(kept | {"columns": samples.columns})
        return samples

    def sum_gradients(parameters):
        own = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        original.sum_gradients(parameters)
        summed = [p.grad.clone() for p in parameters]
        seen["gradients"].append({"own": flat(own), "summed": flat(summed)})

    def atomic(path, write):
        seen["files"].append(path.name)
        original.atomic(path, write)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow_grpo, "EVAL_STEPS", EVAL_STEPS)
        for replacement in (join_processes, collect, sum_gradients, atomic):
            patch.setattr(flow_grpo, replacement.__name__, replacement)
        code = main(args)
    torch.save(seen, f"{name}.{flow_grpo.RANK}.pt")
    return code


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def environment():
    """Of a process that computes as this one does."""
    threads = str(torch.get_num_threads())
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": threads, "PYTHONPATH": str(HERE)}
    return os.environ | hidden


def start(*command):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command], env=environment(), **pipes)


def wait_for(process, text, path):
    while process.poll() is None and not (path.exists() and text in path.read_text()):
        time.sleep(0.01)


def test_killed_equals_uninterrupted(whole, model):
    Path("worker.py").write_text(WORKER)
    runs = {"killed": arguments(model, "cut", **WINDOW)}
    process = start("worker.py", json.dumps(runs))
    wait_for(process, '"kl"', Path("cut/metrics.jsonl"))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert main(["--resume=cut"]) == 0
    assert same_run("cut", whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_one_sentence(model, work, number):
    process = start(HERE / "flow_grpo.py", *arguments(model, "cut", epochs=1000))
    wait_for(process, '"kl"', Path("cut/metrics.jsonl"))
    process.send_signal(number)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert stderr.endswith(f"\nerror: interrupted by a signal{to_go_on('cut')}\n")
    assert "Traceback" not in stderr


def test_ctrl_c_while_processes_join_ends_with_one_sentence(work, capsys, monkeypatch):
    monkeypatch.setattr(flow_grpo, "PROCESSES", 2)
    monkeypatch.setattr(flow_grpo, "join_processes", Mock(side_effect=KeyboardInterrupt))
    assert main([]) == 130
    assert capsys.readouterr().err == "error: interrupted by a signal\n"


def test_ctrl_c_while_the_packages_load_ends_without_a_traceback():
    process = start(HERE / "flow_grpo.py")
    time.sleep(1)  # of some 5 that they take
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == -signal.SIGINT
    assert stderr == ""


# ---- Resumed runs.
def snapshot(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture
def resumable(whole):
    """A copy of a finished run, in ./out."""
    shutil.copytree(whole, "out")


def test_a_run_can_be_prolonged(whole, model, capsys):
    assert main(arguments(model, "out", **WINDOW | {"epochs": 2})) == 0
    capsys.readouterr()
    assert main(["--resume=out", "--epochs=3"]) == 0
    assert capsys.readouterr().out.startswith(f"Training {model} on the cpu, after 2 epochs.\n")
    assert same_run("out", whole)


def test_a_run_can_not_be_shortened(resumable, capsys):
    before = snapshot("out")
    assert "--epochs is 1: give 3 to" in error_of(["--resume=out", "--epochs=1"], capsys)
    assert snapshot("out") == before


def test_a_run_that_was_moved_goes_on_where_it_is(resumable, whole):
    before = snapshot(whole)
    assert main(["--resume=out", "--epochs=4"]) == 0
    assert metrics("out")[-1]["epoch"] == 4
    assert snapshot(whole) == before


def test_a_run_goes_on_with_a_model_that_was_moved(resumable, model, capsys):
    shutil.copytree(model, "moved")
    assert main(["--resume=out", "--epochs=4", "--model=moved"]) == 0
    assert capsys.readouterr().out.startswith("Training moved on the cpu, after 3 epochs.\n")


def test_a_run_goes_on_in_half_precision(model, work):
    run = small_run(model)
    flow_grpo.save(run)
    in_half = small_run(model, half=True, active=False)
    flow_grpo.restore(in_half, torch.load("out/checkpoint.pt", weights_only=True))
    assert all(map(torch.equal, in_half.parameters, run.parameters))
    assert in_half.scaler.get_scale() == 2**20


def test_a_run_goes_on_without_its_prompt_file(resumable):
    before = left_by(Path("out"))
    Path("prompts.txt").unlink()
    assert main(["--resume=out"]) == 0
    assert left_by(Path("out"))["train_records"] == before["train_records"]


def test_a_finished_run_has_nothing_to_do(resumable):
    before = left_by(Path("out"))["metrics"]
    assert main(["--resume=out"]) == 0
    assert left_by(Path("out"))["metrics"] == before


UNCHANGEABLE = [
    ("--learning-rate=3", "--learning-rate was 0.01 in out"),
    ("--prompt-file=other.txt", "--prompt-file was prompts.txt in out"),
    ("--output-dir=other", "--output-dir was out in out: omit it"),
    ("--reward=rewards.py:two", "--reward was rewards.py:red in out"),
    ("--seed=1", "--seed was 0 in out"),
    (f"--model={HERE / 'tiny-sd3'}", "doesn't fit .*tiny-sd3.*--model"),
]


@pytest.mark.parametrize("flag, sentence", UNCHANGEABLE)
def test_resume_can_not_change_a_run(resumable, capsys, flag, sentence):
    before = snapshot(".")
    assert re.search(sentence, error_of(["--resume=out", flag], capsys))
    assert snapshot(".") == before


def cut_short(data):
    return data[: len(data) // 2]


def with_one_bit_flipped(data):
    weights = torch.load(BytesIO(data), weights_only=True)["parameters"]["0"]
    damaged = bytearray(data)
    damaged[data.index(weights.numpy().tobytes())] ^= 1
    return bytes(damaged)


def emptied(data):
    return b""


@pytest.mark.parametrize("damage", [cut_short, with_one_bit_flipped, emptied])
def test_a_damaged_checkpoint_is_said_and_left_as_it_is(resumable, capsys, damage):
    checkpoint = Path("out/checkpoint.pt")
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    before = snapshot("out")
    error = error_of(["--resume=out", "--epochs=5"], capsys)
    assert re.match("error: out/checkpoint.pt can't be resumed: .*put back a copy", error)
    assert snapshot("out") == before


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_no_code_in_a_checkpoint_is_run(work, capsys):
    Path("out").mkdir()
    torch.save(Harmful(), "out/checkpoint.pt")
    assert "out/checkpoint.pt can't be resumed: " in error_of(["--resume=out"], capsys)
    assert not Path("harm").exists()


def test_a_folder_without_a_run_can_not_be_resumed(work, capsys):
    error = error_of(["--resume=nowhere"], capsys)
    assert re.search("nowhere/checkpoint.pt can't be resumed: .*No such file", error)
    assert not Path("nowhere").exists()


def test_a_new_run_does_not_overwrite_another(resumable, model, capsys):
    before = snapshot("out")
    error = error_of(arguments(model), capsys)
    assert re.search("out holds a run: .*--resume.*--output-dir", error)
    assert snapshot("out") == before


# ---- Bad input.
def to_go_on(folder):
    return f"; to go on: python flow_grpo.py --resume '{folder}'"


def only_error(stderr):
    """The one sentence in it."""
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    return errors[0]


def error_of(args, capsys):
    """The one sentence by which a run ends that its user can mend."""
    capsys.readouterr()
    assert main(args) == 2
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    assert stderr.endswith(f"{only_error(stderr)}\n")
    return only_error(stderr)


BAD_FILES = {
    "empty.txt": b" \n\n",
    "binary.txt": b"\x80",
    "zeros.txt": b"a\0b",
    "ugly.txt": b"a\nugly",
    "broken.jsonl": b'{"prompt": "a"}\n{"p": ',
    "surrogate.jsonl": b'{"prompt": "a \\ud800"}',
    "deep.JSONL": b"[" * 100_000,
    "list.jsonl": b"[1]",
    "number.jsonl": b'{"prompt": 5}',
    "syntax.py": b"def f(:",
    "leaves.py": b"exit(0)",
    "picky.py": b"def reward(images, *_): return [0.5] * len(images)\ndef check(_): exit('no')",
    "few.py": b"def reward(images, *_): return [0.5] * (len(images) + 1)",
    "nan.py": b"def reward(images, *_): return [float('nan')] * len(images)",
    "high.py": b"def reward(images, *_): return [float('inf')] * len(images)",
}
BAD = [
    ("prompt-file", "none.txt", "none.txt: .*No such file"),
    ("prompt-file", "", "no prompts.*--prompt-file"),
    ("prompt-file", ".", "prompt file .: .*directory"),
    ("prompt-file", "empty.txt", "empty.txt: it has no prompts"),
    ("prompt-file", "binary.txt", "binary.txt: .*can't decode"),
    ("prompt-file", "zeros.txt", "zeros.txt, line 1: .*Unicode"),
    ("prompt-file", "ugly.txt", "ugly.txt, line 2: ugly things can't be judged"),
    ("prompt-file", "broken.jsonl", "broken.jsonl, line 2: "),
    ("prompt-file", "surrogate.jsonl", "surrogate.jsonl, line 1: "),
    ("prompt-file", "deep.JSONL", "deep.JSONL, line 1: "),
    ("prompt-file", "list.jsonl", "list.jsonl, line 1: .*`prompt`"),
    ("prompt-file", "number.jsonl", "number.jsonl, line 1: .*`prompt`"),
    ("eval-prompt-file", "none.txt", "none.txt: .*No such file"),
    ("eval-prompt-file", "ugly.txt", "ugly.txt, line 2: "),
    ("reward", "beauty", "'beauty' can't be loaded: .*file.py:function, or ocr, .* of rewards/"),
    ("reward", "none.py:f", "'none.py:f' can't be loaded: .*No such file.*file.py:function"),
    ("reward", "rewards.py:none", "can't be loaded: KeyError .*none"),
    ("reward", "syntax.py:f", "can't be loaded: SyntaxError"),
    ("reward", "leaves.py:f", "can't be loaded: SystemExit"),
    ("reward", "picky.py:reward", "prompt file prompts.txt, line 1: no; "),
    ("reward", "rewards.py:number", "rewards failed .*not callable"),
    ("reward", "rewards.py:broken", "rewards failed .*ZeroDivisionError"),
    ("reward", "rewards.py:wide", "rewards failed .*one finite number for each image"),
    ("reward", "few.py:reward", "few failed .*one finite number for each image"),
    ("reward", "nan.py:reward", r"nan failed at 'a \"\d\"'.*nan is nan for 'a \"\d\"'"),
    ("reward", "high.py:reward", "high failed .*high is inf for "),
    ("reward", "rewards.py:nothing", "rewards failed .*one finite number for each image"),
    ("reward", "rewards.py:leaves", "rewards failed .*SystemExit"),
    ("model", "/no/such", "/no/such can't be loaded: .*--model"),
    ("model", ".", "model . can't be loaded: .*--model"),
    ("height", "18", "--height and --width need to be multiples of 4, at most 32"),
    ("width", "64", "--height and --width need to be multiples of 4, at most 32"),
    ("epochs", "0", "--epochs is 0: give 1 to"),
    ("group-size", "1", "--group-size is 1: give 2 to"),
    ("learning-rate", "nan", "--learning-rate is nan"),
    ("learning-rate", "inf", "--learning-rate is inf"),
    ("learning-rate", "1e30", r"--learning-rate is 1e\+30"),
    ("guidance-scale", "0.5", "--guidance-scale is 0.5: give 1 to"),
    ("max-sequence-length", "600", "--max-sequence-length is 600: give 1 to 512"),
    ("noise-level", "0", "--noise-level is 0.0"),
    ("beta", "-1", "--beta is -1.0: give 0 to"),
    ("seed", "-1", "--seed is -1: give 0 to"),
    ("sde-steps", "10", "--sde-steps is 10: give 1 to 9"),
    ("sde-range", "11", "--sde-range is 11: give 1 to 10"),
]


@pytest.mark.parametrize("flag, value, sentence", BAD)
def test_bad_input_is_one_sentence(model, work, capsys, flag, value, sentence):
    for name, content in BAD_FILES.items():
        Path(name).write_bytes(content)
    error = error_of([*arguments(model), f"--{flag}={value}"], capsys)
    assert re.search(sentence, error)
    assert "to go on" not in error
    assert not Path("out").exists()


def test_ocr_needs_a_text_in_double_quotes(model, work, capsys):
    write("unquoted.txt", 'a sign "1"', "", "a sign")
    args = arguments(model, reward="ocr", prompt_file="unquoted.txt")
    assert re.search("unquoted.txt, line 3: .*in double quotes", error_of(args, capsys))


@pytest.mark.parametrize("flag", ["--epochs=many", "--nonsense=3", "--compile=maybe"])
def test_what_is_no_setting_is_said_by_the_parser(work, capsys, flag):
    with pytest.raises(SystemExit) as caught:
        main([flag])
    assert caught.value.code == 2
    assert flag.partition("=")[0].strip("-") in capsys.readouterr().err.replace("maybe", "compile")


# ---- What fails in the middle of a run.
def test_a_reward_that_fails_on_the_way_keeps_the_run(model, work, capsys):
    error = error_of(arguments(model, reward="rewards.py:nan"), capsys)
    assert re.search("""rewards failed at .*rewards is nan for 'a "5"'""", error)
    assert error.endswith(to_go_on("out"))


def test_a_reward_has_the_same_columns_in_each_batch(model, work, capsys):
    error = error_of(arguments(model, reward="rewards.py:uneven"), capsys)
    assert re.search("the reward has other columns, .* in some batches", error)
    assert error.endswith(to_go_on("out"))


def test_a_run_that_diverged_is_not_to_go_on(model, work, capsys):
    error = error_of(arguments(model, learning_rate=1e9), capsys)
    assert re.search("not finite: .*lower --learning-rate$", error)


def test_an_image_that_is_not_finite_is_a_sign_of_divergence():
    with pytest.raises(UserError, match="an image is not finite: training diverged"):
        score_images(None, torch.full((1, 3, 16, 16), math.nan), [{"prompt": "a"}])


@pytest.mark.parametrize("error", [OSError("No space left"), RuntimeError("write failed")])
def test_a_full_disk_is_said_and_loses_nothing(resumable, capsys, monkeypatch, error):
    before = snapshot("out")
    monkeypatch.setattr(torch, "save", Mock(side_effect=error))
    sentence = error_of(["--resume=out"], capsys)
    assert re.search(f"can't write out/checkpoint.pt: .*{error}.*; check the disk", sentence)
    assert snapshot("out") == before


@pytest.mark.parametrize("folder", ["a_file", "a_file/out"])
def test_a_folder_that_can_not_be_written_is_said(model, work, capsys, folder):
    Path("a_file").write_text("text")
    error = error_of(arguments(model, folder), capsys)
    assert re.search(f"can't write {folder}/checkpoint.pt: .*; check .* --output-dir", error)
    assert Path("a_file").read_text() == "text"


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    RuntimeError("GET was unable to find an engine to execute this computation"),  # cuDNN's
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2 bytes."),
    RuntimeError("CUDA error: out of memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory_is_said_with_what_helps(resumable, capsys, monkeypatch, error):
    monkeypatch.setattr(flow_grpo, "collect", Mock(side_effect=error))
    sentence = error_of(["--resume=out", "--epochs=4"], capsys)
    assert re.search("out of memory: .*--gradient-checkpointing.*--batch-size", sentence)
    assert sentence.endswith(to_go_on("out"))


def test_after_an_error_a_run_goes_on_with_what_helps(resumable, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(flow_grpo, "add_gradient", Mock(side_effect=MemoryError()))
        error_of(["--resume=out", "--epochs=4"], capsys)
    assert main(["--resume=out", "--gradient-checkpointing", "--batch-size=2"]) == 0
    assert metrics("out")[-1]["epoch"] == 4


def test_a_defect_shows_its_traceback(model, work, monkeypatch):
    monkeypatch.setattr(flow_grpo, "collect", Mock(side_effect=RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        main(arguments(model))


def test_without_a_network_a_model_is_out_of_reach(work, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert re.search("no/model can't be loaded: .*network", error_of(arguments("no/model"), capsys))


@pytest.mark.parametrize(
    "name", ["LocalEntryNotFoundError", "ConnectError", "OfflineModeIsEnabled", "ReadTimeout"]
)
def test_what_the_libraries_say_of_a_network_is_out_of_reach(name):
    error = OSError("can't load")
    error.__cause__ = type(name, (Exception,), {})()
    assert "out of reach" in flow_grpo.why(error)


def test_a_model_that_the_libraries_could_not_connect_to_is_out_of_reach():
    assert "out of reach" in flow_grpo.why(OSError("We couldn't connect to 'https://hub'"))


def test_a_gated_model_needs_a_licence_and_a_login(work, capsys, monkeypatch):
    error = OSError("no access")
    error.__context__ = GatedRepoError("gated", response=Mock())  # as diffusers raises it
    monkeypatch.setattr(StockPipeline, "load_config", Mock(side_effect=error))
    sentence = error_of(arguments(Config.model), capsys)
    assert re.search(f"{Config.model} can't be loaded: it is gated: .*licence.*login", sentence)


# ---- Prompts.
def split(*lines, name="some.txt", **given):
    """The prompts of training and of evaluation."""
    write(name, *lines)
    config = Config(prompt_file=name, **given)
    reward = load_reward("rewards.py:red")
    train_records, eval_records = split_prompts(config, reward)
    prompts = [record["prompt"] for record in train_records]
    eval_prompts = [record["prompt"] for record in eval_records]
    return prompts, eval_prompts


MANY = [f'a "{i}"' for i in range(600)]


def test_half_the_prompts_are_held_out(work):
    prompts, eval_prompts = split(*PROMPTS)
    assert len(prompts) == len(eval_prompts) == 4
    assert sorted(prompts + eval_prompts) == PROMPTS


def test_at_most_256_prompts_are_held_out(work):
    prompts, eval_prompts = split(*MANY)
    assert len(eval_prompts) == 256
    assert sorted(prompts + eval_prompts) == sorted(MANY)


def test_a_prompt_that_is_held_out_is_nowhere_in_training(work):
    prompts, eval_prompts = split(*MANY, *MANY)
    assert not set(prompts) & set(eval_prompts)
    assert len(set(eval_prompts)) == len(eval_prompts)
    assert len(prompts) == 2 * (600 - 256)


def test_a_record_with_a_prompt_that_is_held_out_is_not_in_training_either(work):
    one = [json.dumps({"prompt": prompt, "tag": "one"}) for prompt in PROMPTS]
    other = [json.dumps({"prompt": prompt, "tag": "other"}) for prompt in PROMPTS]
    prompts, eval_prompts = split(*one, *other, name="some.jsonl")
    assert not set(prompts) & set(eval_prompts)


def test_the_prompts_that_are_held_out_are_the_same_for_all_seeds(work):
    assert split(*PROMPTS, seed=1) == split(*PROMPTS, seed=2)


def test_one_prompt_is_for_training_and_evaluation(work):
    assert split("a") == (["a"], ["a"])


def test_prompts_of_an_evaluation_file_leave_the_others_to_training(work):
    assert split("a", "b", "a", eval_prompt_file="prompts.txt") == (["a", "b", "a"], PROMPTS)


def read(name, *lines):
    write(name, *lines)
    return read_prompts(name, load_reward("rewards.py:red"))


def test_lines_of_text_are_prompts(work):
    records = read("a.txt", "\ufeffa cat ", "", "  a\u2028dog\r")
    assert records == [{"prompt": "a cat"}, {"prompt": "a\u2028dog"}]


def test_lines_of_jsonl_are_records(work):
    records = read("a.jsonl", '\ufeff{"prompt": "b \\"\u2028\\"", "tag": 1}\r', "\r", "")
    assert records == [{"prompt": 'b "\u2028"', "tag": 1}]


SCENES = [
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
    {
        "tag": "position",
        "include": [
            {"class": "cat", "count": 1},
            {"class": "bench", "count": 1, "position": ["left of", 0]},
        ],
        "prompt": "a photo of a bench left of a cat",
    },
]


def test_the_authors_scenes_fit_geneval(work):
    write("train_metadata.jsonl", *map(json.dumps, SCENES))
    assert read_prompts("train_metadata.jsonl", load_reward("geneval")) == SCENES


@pytest.mark.parametrize(
    "reward, text", [("ocr", 'neon "Hello World"'), ("pickscore", "a cat by “Rembrandt”, 8k")]
)
def test_the_authors_prompts_fit_their_rewards(work, reward, text):
    write("train.txt", text, text)
    assert read_prompts("train.txt", load_reward(reward)) == [{"prompt": text}] * 2


# ---- Rewards of one's own.
IMAGES = torch.rand(2, 3, 4, 4, generator=seeded())
RECORDS = [{"prompt": "a"}, {"prompt": "b"}]


def scores(source):
    return score_images(load_reward(source), IMAGES.clone(), RECORDS)


def test_a_rewards_numbers_have_its_files_name(work):
    redness = IMAGES[:, 0] - IMAGES[:, 1:].mean(1)
    expected = {"reward": redness.mean((1, 2)), "rewards": redness.mean((1, 2))}
    torch.testing.assert_close(scores("rewards.py:red"), expected)


def test_a_rewards_columns_have_names_of_their_own(work):
    red = scores("rewards.py:red")["reward"]
    expected = {"reward": red, "first": red, "second": torch.tensor([0.25, 0.25])}
    torch.testing.assert_close(scores("rewards.py:two"), expected)


def test_a_column_that_is_called_reward_is_the_reward(work):
    red = scores("rewards.py:red")["reward"]
    expected = {"reward": red, "first": torch.tensor([0.25, 0.25])}
    torch.testing.assert_close(scores("rewards.py:named"), expected)


def test_a_reward_of_rewards_has_its_name(work):
    assert load_reward("ocr").name == "ocr"


def test_a_reward_may_change_what_it_is_given(work):
    images = IMAGES.clone()
    records = [{"prompt": "a"}] * 2  # the same one, as in a group
    greedy = score_images(load_reward("rewards.py:greedy"), images, records)
    torch.testing.assert_close(greedy, scores("rewards.py:red"))
    assert torch.equal(images, IMAGES)
    assert records == [{"prompt": "a"}] * 2


def test_a_reward_may_say_which_records_it_can_judge(work):
    check = load_reward("rewards.py:red").check
    check({"prompt": "a rose"})
    with pytest.raises(ValueError, match="ugly things can't be judged"):
        check({"prompt": "an ugly thing"})


# ---- The file alone.
SUM = """
import bright
import red

def reward(images, prompts, records):
    return 0.5 * bright.reward(images, prompts, records) + red.reward(images, prompts, records)
"""
BRIGHT = """
def reward(images, prompts, records):
    return images.mean((1, 2, 3))
"""
RED = """
def reward(images, prompts, records):
    return images[:, 0].mean((1, 2))
"""


@pytest.fixture
def alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(HERE / "flow_grpo.py", ".")
    write("prompts.txt", *PROMPTS)


def test_the_file_alone_trains_with_a_sum_of_rewards_of_ones_own(alone):
    Path("sum.py").write_text(SUM)
    Path("bright.py").write_text(BRIGHT)
    Path("red.py").write_text(RED)
    flags = "--prompt-file prompts.txt --reward sum.py:reward --epochs 1 --batch-size 4 "
    flags += "--prompts-per-epoch 2 --group-size 2 --output-dir out --model"
    process = start("-E", "flow_grpo.py", *flags.split(), HERE / "tiny-sd3")
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert "The reward on evaluation prompts was " in stdout
    assert Path("out/pytorch_lora_weights.safetensors").exists()


def test_the_file_alone_says_what_else_to_copy(alone, capsys):
    copied_main = runpy.run_path("flow_grpo.py")["main"]
    assert copied_main(["--prompt-file=prompts.txt", "--reward=geneval"]) == 2
    error = only_error(capsys.readouterr().err)
    assert re.search("'geneval' can't be loaded: .*geneval.* of rewards/", error)


# ---- Several processes.
LATE = """
import itertools
import os
import signal

calls = itertools.count(1)


def due():  # in process 1 alone, after the blank image, the first evaluation and the first epoch
    return os.environ.get("RANK") == "1" and next(calls) == 4


def late_nan(images, prompts, records):
    scores = red(images, prompts, records)
    if due():
        scores[0] = float("nan")
    return scores


def late_kill(images, prompts, records):
    if due():
        os.kill(os.getpid(), signal.SIGKILL)
    return red(images, prompts, records)
"""


def start_two(*command):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return start(*launcher, *command)


@pytest.fixture
def late(work):
    Path("late.py").write_text(REWARDS + LATE)


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder that all of pytest's workers have."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def made_once(folder, make, *given):
    """The folder, which the first of pytest's workers makes. The others wait for it."""
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            make(folder, *given)
    return folder


def make_teams(folder, model, monkeypatch):
    shutil.copytree(".", folder)
    monkeypatch.chdir(folder)
    assert main(arguments(model, "begun", epochs=1)) == 0
    shutil.copytree("begun", "one")
    shutil.copytree("begun", "two")
    assert watched_run("one", ["--resume=one", "--epochs=2"]) == 0
    large = {"epochs": 1, "batch_size": 8}
    assert watched_run("lone", arguments(model, "lone", **large)) == 0
    runs = {
        "two": ["--resume=two", "--epochs=2"],
        "idle": arguments(model, "idle", **large),
        "nan": arguments(model, "nan", reward="late.py:late_nan"),
    }
    Path("worker.py").write_text(WORKER)
    process = start_two("worker.py", json.dumps(runs))
    stdout, stderr = process.communicate()
    assert process.returncode != 0
    Path("stdout").write_text(stdout)
    Path("stderr").write_text(stderr)


@pytest.fixture
def teams(model, shared, late, monkeypatch):
    """A folder of runs on one process and on two, with what these saw, and what was printed.

    begun: an epoch on one process; one, two: one more on one process, and on two;
    lone, idle: an epoch of batches as large as it is, on one process, and on two;
    nan: on two processes, of which one fails.
    """
    folder = made_once(shared / "teams", make_teams, model, monkeypatch)
    monkeypatch.chdir(folder)
    return folder


def seen(run, rank):
    return torch.load(f"{run}.{rank}.pt", weights_only=True)


def parameters(run):
    state = torch.load(f"{run}/checkpoint.pt", weights_only=True)
    return flat(state["parameters"].values())


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_two_processes_draw_the_images_of_one(teams):
    (one,) = seen("one", 0)["samples"]
    for image in range(8):
        rank = image // 3 % 2  # 3 images in a batch
        (drawn,) = seen("two", rank)["samples"]
        for name in ("latents", "log_probs"):
            assert torch.equal(drawn[name][image], one[name][image])


def test_each_process_has_all_rewards(teams):
    (one,) = seen("one", 0)["samples"]
    for rank in range(2):
        (drawn,) = seen("two", rank)["samples"]
        assert drawn["columns"].keys() == one["columns"].keys()
        for name, column in one["columns"].items():
            assert torch.equal(drawn["columns"][name], column)


def test_gradients_are_summed_over_the_processes(teams):
    both = zip(seen("two", 0)["gradients"], seen("two", 1)["gradients"])
    for first, second in both:
        assert torch.equal(first["summed"], first["own"] + second["own"])
        assert torch.equal(first["summed"], second["summed"])
        assert first["own"].norm() > 0
        assert second["own"].norm() > 0


def test_two_processes_have_the_gradients_of_one(teams):
    one = seen("one", 0)["gradients"]
    two = seen("two", 0)["gradients"]
    assert len(one) == len(two) == 2
    for expected, got in zip(one, two):
        assert distance(got["summed"], expected["summed"]) < 1e-4


def test_two_processes_change_the_weights_as_one_does(teams):
    begun = parameters("begun")
    assert distance(parameters("two") - begun, parameters("one") - begun) < 1e-3
    assert distance(parameters("two"), parameters("one")) < 1e-4


# Where a mean is much smaller than its terms, or counts those beyond a limit.
ROUNDING = {"policy_loss": 1e-7, "clipfrac": 0.02, "ratio_deviation": 1e-5}


def test_two_processes_have_the_metrics_of_one(teams):
    for one, two in zip(metrics("one"), metrics("two"), strict=True):
        assert one.keys() == two.keys()
        for name in one:
            if "seconds" not in name:
                rounding = ROUNDING.get(name)
                assert two[name] == pytest.approx(one[name], rel=1e-3, abs=rounding), name


def test_two_processes_evaluate_like_one(teams):
    assert metrics("nan")[0]["eval_reward"] == metrics("begun")[0]["eval_reward"]
    picture = "samples/epoch_00000.png"
    assert Path("nan", picture).read_bytes() == Path("begun", picture).read_bytes()


def test_a_process_without_a_batch_changes_nothing(teams):
    assert not any(gradient["own"].any() for gradient in seen("idle", 1)["gradients"])
    assert same_run("idle", "lone")


def test_a_run_of_two_processes_goes_on_with_one(teams, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(name, tmp_path / name)
        assert main([f"--resume={tmp_path / name}", "--epochs=3"]) == 0
    assert distance(parameters(tmp_path / "two"), parameters(tmp_path / "one")) < 1e-4


def test_all_processes_have_the_folder_of_process_0(model, work, monkeypatch):
    monkeypatch.setattr(flow_grpo, "gather", lambda folder: ["runs/0", folder])
    run = flow_grpo.start(arguments(model, "runs/1"))
    assert run.config.output_dir == "runs/0"


def test_process_0_alone_writes(teams):
    for run in ("two", "idle"):
        assert "checkpoint.pt" in seen(run, 0)["files"]
        assert not seen(run, 1)["files"]


def test_process_0_alone_prints(teams):
    printed = Path("stdout").read_text()
    assert printed.count("Training ") == 3
    assert len(re.findall("^epoch 2: .* kl ", printed, re.MULTILINE)) == 1
    assert printed.count("Weights and images are in two") == 1


def test_a_nan_in_one_process_ends_both_with_one_sentence(teams):
    stderr = Path("stderr").read_text()
    assert re.search("late failed at .*late is nan for", only_error(stderr))
    assert only_error(stderr).endswith(to_go_on("nan"))
    assert 'flow_grpo.py", line' not in stderr


def test_a_run_goes_on_after_a_nan_in_one_process(teams, tmp_path):
    shutil.copytree("nan", tmp_path / "nan")
    assert main([f"--resume={tmp_path / 'nan'}"]) == 0
    assert metrics(tmp_path / "nan")[-1]["epoch"] == 3


def test_a_process_that_is_killed_ends_both_with_one_sentence(model, late):
    args = arguments(model, reward="late.py:late_kill")
    process = start_two(HERE / "flow_grpo.py", *args)
    _, stderr = process.communicate()
    assert process.returncode != 0
    assert only_error(stderr).endswith(to_go_on("out"))
    assert 'flow_grpo.py", line' not in stderr
    assert main(["--resume=out"]) == 0
    assert metrics("out")[-1]["epoch"] == 3


def test_bad_input_is_said_by_one_process(model, work):
    process = start_two(HERE / "flow_grpo.py", *arguments(model, prompt_file="none.txt"))
    _, stderr = process.communicate()
    assert process.returncode != 0
    assert re.search("none.txt: .*No such file", only_error(stderr))
    assert 'flow_grpo.py", line' not in stderr


# ---- A pretended GPU: tensors that behave as if they were on "cuda", on a machine without one.
#
# Inside `with pretended_gpu():` each tensor made on "cuda" or moved there is a `PretendedTensor`.
# It tells Python that it is on cuda:0, but its numbers lie on the CPU and are computed by the CPU.
# As on a real GPU, a computation that mixes it with a tensor of the CPU fails, and so does a
# generator of the other device. This finds what was left on the wrong device, and lost dtypes. It
# doesn't find what CUDA's own kernels do: their rounding, speed, memory and streams. Autocast casts
# nothing.
#
# C++ is told that the tensor is on META, as meta tensors are those without memory of their own. It
# can't be told "cuda": it would call the driver, for its streams and its thread for backward.
CPU = torch.device("cpu")
CUDA = torch.device("cuda:0")
# C++ makes new tensors on the device that it was told. By the index, these requests differ from
# those for the true meta device, on which libraries build models before they load their weights.
META = torch.device("meta:7")

aten = torch.ops.aten
COPIES = {aten.copy_, aten._to_copy, aten._foreach_copy_}  # They go between any devices.
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
FILLING = {aten.fill, aten.fill_, aten.masked_fill, aten.masked_fill_}

# The generators on "cuda", by their addresses in C++: an operation is given the generator as
# another Python object, which has lost its class.
GPU_GENERATORS = WeakValueDictionary()


class PretendedTensor(torch.Tensor):
    """The tensor `content` of the CPU, as one of the GPU. `content` itself never has a graph."""

    @staticmethod
    def __new__(cls, content: Tensor) -> "PretendedTensor":
        layout = {
            "strides": content.stride(),
            "storage_offset": content.storage_offset(),
            "dtype": content.dtype,
            "device": META,
        }
        self = torch.Tensor._make_wrapper_subclass(cls, content.shape, **layout)
        self.content = content
        return self

    # Operations come to `__torch_dispatch__`, behind autograd. To come here too would cost time.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})

    # What Python is told. C++ would answer for META.
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def __repr__(self) -> str:
        return f"PretendedTensor({self.content})"

    # What is moved to the device where it is stays the same object. For that, C++ compares devices.
    def to(self, *args, **kwargs) -> Tensor:
        args = [as_told_to_cpp(value) for value in args]
        kwargs = {name: as_told_to_cpp(value) for name, value in kwargs.items()}
        return super().to(*args, **kwargs)

    # C++ replaces the shape and dtype when `data` is set, but it doesn't know of the content.
    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, PretendedTensor):
            raise RuntimeError("the data of a tensor on cuda:0 can't become that of one on the CPU")
        torch._C.TensorBase.data.__set__(self, value)
        self.content = value.content

    # torch formats the numbers of its own class alone.
    def __format__(self, specification: str) -> str:
        return format(self.content, specification)

    # These read the memory, of which C++ has none.
    def tolist(self) -> object:
        return self.content.tolist()

    def numpy(self, *args, **kwargs) -> None:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    # A checkpoint holds the content. So it is read on the CPU, with or without `map_location`.
    def __reduce_ex__(self, protocol: int) -> tuple:
        saved = self.content.detach()
        if isinstance(self, torch.nn.Parameter):
            saved = torch.nn.Parameter(saved, self.requires_grad)
        return saved.__reduce_ex__(protocol)


class PretendedGenerator(torch.Generator):
    """A generator that says where it is. In C++, which would ask CUDA, it is the CPU's."""

    def __new__(cls, device: object = "cpu") -> "PretendedGenerator":
        self = super().__new__(cls, "cpu")
        if torch.device(device).type == "cuda":
            GPU_GENERATORS[self._cdata] = self
        return self

    @property
    def device(self) -> torch.device:
        return CUDA if self._cdata in GPU_GENERATORS else CPU


class PretendedDevice(TorchDispatchMode):
    """Brings also those operations to `compute` that are given no pretended tensor yet."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def as_told_to_cpp(value: object) -> object:
    """META if `value` names the pretended device, else the value itself."""
    is_device = isinstance(value, (str, torch.device))
    return META if is_device and torch.device(value).type == "cuda" else value


def each(function: Callable[[Tensor], object], value: object) -> object:
    """Apply the function to each tensor of nested lists and tuples."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)([each(function, item) for item in value])
    return value


def compute(operation, args: tuple, kwargs: dict) -> object:
    """Carry out an operation on the contents, after the checks that a real GPU would make."""
    pretended = []
    plain = []  # tensors of the CPU

    def content_of(tensor: Tensor) -> Tensor:
        if isinstance(tensor, PretendedTensor):
            pretended.append(tensor)
            return tensor.content
        plain.append(tensor)
        return tensor

    contents = each(content_of, args)
    options = {name: each(content_of, value) for name, value in kwargs.items()}
    if pretended and plain:
        refuse_a_mixture(operation, args, plain)

    # The result is on the device that was asked for, or else where the arguments are.
    on_gpu = bool(pretended)
    if options.get("device") is not None:
        device = torch.device(options["device"])
        on_gpu = device.type == "cuda" or device == META
        options["device"] = CPU if on_gpu else device

    generator = options.get("generator")
    if generator is not None and (generator._cdata in GPU_GENERATORS) != on_gpu:
        devices = "'cuda' device type for generator but found 'cpu'"
        if not on_gpu:
            devices = "'cpu' device type for generator but found 'cuda'"
        raise RuntimeError(f"Expected a {devices}")

    # If it works in place, C++ returns the argument itself and drops this result.
    result = operation(*contents, **options)
    return each(PretendedTensor, result) if on_gpu else result


def refuse_a_mixture(operation, args: tuple, plain: list[Tensor]) -> None:
    """Raises RuntimeError if a GPU would not combine its tensors with these of the CPU."""
    family = operation.overloadpacket
    if family in COPIES:
        return
    if family in INDEXING and isinstance(args[0], PretendedTensor):
        indices = {id(index) for index in args[1]}  # The GPU moves them to itself.
        plain = [tensor for tensor in plain if id(tensor) not in indices]
    # A single number of the CPU may be a factor or a summand, but the GPU can't change it.
    numbers_alone = all(tensor.dim() == 0 for tensor in plain)
    takes_numbers = torch.Tag.pointwise in operation.tags or family in INDEXING | FILLING
    changes_the_cpu = operation._schema.is_mutable and not isinstance(args[0], PretendedTensor)
    if plain and (not numbers_alone or not takes_numbers or changes_the_cpu):
        found = f"found at least two devices, cuda:0 and cpu! (in {operation})"
        raise RuntimeError(f"Expected all tensors to be on the same device, but {found}")


ORIGINAL_RUN = threading.Thread.run


def run_with_pretended_device(self: threading.Thread) -> None:
    """`Thread.run`. A mode belongs to the thread that has entered it, so each thread enters one."""
    with PretendedDevice():
        ORIGINAL_RUN(self)


REPLACED = {
    torch: {"Generator": PretendedGenerator},
    flow_grpo: {"DEVICE": "cuda"},
    threading.Thread: {"run": run_with_pretended_device},
    torch.cuda: {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "mem_get_info": lambda: (20e9, 24e9),  # free and total
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        # C++ calls it as soon as Python names the device, and it would look for a driver.
        "_lazy_init": lambda: None,
    },
}


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Inside, torch has one GPU, a pretended one. In the end, all is as it was."""
    # C++ calls `_lazy_init` only once. A real GPU, if there is one, must not have missed it.
    if torch.cuda.is_available():
        torch.cuda.init()
    # To complete "cuda" to "cuda:0", C++ asks this for the current device. It would ask the driver.
    torch._C._ensureCUDADeviceGuardSet()
    lift_only_cpu = torch._C._only_lift_cpu_tensors()
    swap = torch.__future__.get_swap_module_params_on_conversion()
    with ExitStack() as stack:
        for owner, values in REPLACED.items():
            stack.enter_context(mock.patch.multiple(owner, **values))
        # accelerate remembers here, for the whole process, which device there is.
        stack.enter_context(mock.patch.dict(PartialState._shared_state, clear=True))
        # By default, `as_tensor(numbers, device="cuda")` makes its tensor unseen by the mode.
        stack.callback(torch._C._set_only_lift_cpu_tensors, lift_only_cpu)
        torch._C._set_only_lift_cpu_tensors(True)
        # By default, `module.to("cuda")` makes new parameters if their class changes, as here.
        # On a real GPU they stay the same objects, which were perhaps given to an optimizer before.
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swap)
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.enter_context(PretendedDevice())
        yield


def mix_in_sum(x):
    return x + torch.ones(3)


def mix_in_cat(x):
    return torch.cat([x, torch.ones(2, 3)])


def mix_in_stack(x):
    return torch.stack([x.sum(), torch.ones(())])


def mix_in_product(x):
    return torch.ones(2, 3) @ x.T


def change_the_cpu(x):
    return torch.ones(()).add_(x.sum())


def index_the_cpu(x):
    return torch.ones(3)[x[0].long()]


def draw_on_gpu_from_the_cpu(x):
    return torch.randn(3, generator=torch.Generator(), device="cuda")


def draw_on_cpu_from_the_gpu(x):
    return torch.randn(3, generator=torch.Generator("cuda"))


REFUSED = [
    mix_in_sum,
    mix_in_cat,
    mix_in_stack,
    mix_in_product,
    change_the_cpu,
    index_the_cpu,
    draw_on_gpu_from_the_cpu,
    draw_on_cpu_from_the_gpu,
]


@pytest.fixture
def gpu():
    with pretended_gpu():
        yield


@pytest.mark.parametrize("mixture", REFUSED)
def test_the_pretended_gpu_refuses_what_a_gpu_refuses(gpu, mixture):
    x = torch.ones(2, 3, device="cuda")
    with pytest.raises(RuntimeError, match=r"^Expected a"):
        mixture(x)


def test_the_pretended_gpu_takes_what_a_gpu_takes(gpu):
    x = torch.ones(2, 3, device="cuda")
    generator = torch.Generator("cuda")
    assert torch.randn(3, generator=generator, device="cuda").is_cuda
    assert (x + torch.ones(())).is_cuda
    assert x[torch.tensor([0])].is_cuda
    assert x.to("cuda") is x
    x[:, 1:] += x.new_ones(2)
    x.view(-1)[0] = torch.tensor(4.0)
    assert x.tolist() == [[4, 2, 2], [1, 2, 2]]
    assert type(x.cpu()) is torch.Tensor
    assert x.cpu().sum().item() == 13


def test_the_pretended_gpu_leaves_nothing_behind(monkeypatch):
    monkeypatch.undo()
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack
    before = [torch.cuda.is_available, torch.Generator, threading.Thread.run]
    with pytest.raises(KeyError), pretended_gpu():
        raise KeyError
    assert [torch.cuda.is_available, torch.Generator, threading.Thread.run] == before
    assert not torch.__future__.get_swap_module_params_on_conversion()
    assert not torch._C._only_lift_cpu_tensors()
    assert not modes()
    assert seeded().device.type == "cpu"


# ---- The GPU's path, on the pretended one.
ON_GPU = """
def on_gpu(images, prompts, records):
    assert images.is_cuda and images.dtype == torch.float32
    scores = red(images, prompts, records)
    return torch.as_tensor(scores).to(images.device)
"""
RECIPES = {
    "published": ("with-T5", {}),
    "checkpointed": ("without-T5", {"gradient_checkpointing": True}),
    "fast": ("with-T5", {"guidance_scale": 1.0, "sde_steps": 3, "beta": 0.0}),
}


def gpu_arguments(model, recipe):
    folder, given = RECIPES[recipe]
    given = {"reward": "rewards.py:on_gpu", "epochs": 2, "group_size": 2} | given
    given = {"sde_steps": 5, "sde_range": 5} | given
    checkpointed = given.pop("gradient_checkpointing", False)
    flags = arguments(model.with_name(folder), "whole", **given)
    return flags + ["--gradient-checkpointing"] * checkpointed


def is_on_gpu(tensor):
    return isinstance(tensor, PretendedTensor)


def tensors_in(value):
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]


def adapter_of(out):
    return load_file(Path(out) / "pytorch_lora_weights.safetensors")


@pytest.fixture(params=RECIPES)
def gpu_run(request, model, work, monkeypatch, gpu):
    """A finished run on the pretended GPU, its samples and velocities, and a resumed copy of it."""
    Path("rewards.py").write_text(REWARDS + ON_GPU)
    monkeypatch.setattr(flow_grpo, "TRAIN_STEPS", 6)
    monkeypatch.setattr(flow_grpo, "EVAL_STEPS", 3)
    watched = SimpleNamespace(runs=[], samples=[], velocities=[])
    collect = flow_grpo.collect
    save = flow_grpo.save
    predict_velocity = flow_grpo.predict_velocity

    def watched_collect(run):
        watched.samples.append(collect(run))
        return watched.samples[-1]

    def watched_predict(*given):
        velocity = predict_velocity(*given)
        watched.velocities.append((is_on_gpu(velocity), velocity.dtype))
        return velocity

    def watched_save(run):
        save(run)
        watched.runs.append(run)
        if run.epoch == 1 and not Path("cut").exists():
            shutil.copytree("whole", "cut")

    monkeypatch.setattr(flow_grpo, "collect", watched_collect)
    monkeypatch.setattr(flow_grpo, "predict_velocity", watched_predict)
    monkeypatch.setattr(flow_grpo, "save", watched_save)
    assert flow_grpo.main(gpu_arguments(model, request.param)) == 0
    watched.trained = watched.runs[-1]
    assert flow_grpo.main(["--resume", "cut"]) == 0
    return watched


def test_a_run_on_the_gpu_is_where_and_what_it_should_be(gpu_run):
    the_resumed_run_equals_the_continued_one()
    samples_are_kept_on_the_cpu(gpu_run.samples)
    assert set(gpu_run.velocities) == {(True, torch.float32)}
    for run in (gpu_run.trained, gpu_run.runs[-1]):
        the_network_is_in_half_precision_but_its_adapter(run)
        all_that_trains_is_on_the_gpu(run)
        the_text_encoders_have_left_the_gpu(run)
        assert run.scaler.is_enabled()
        assert run.scaler.get_scale() > 1
    for line in metrics("cut"):
        assert line.get("ratio_deviation", 0) < 1e-6
        assert math.isfinite(line.get("grad_norm", 0))


def test_an_epoch_on_the_gpu_has_batches_of_one_size_and_ratios_of_one(one_block, work, gpu):
    an_epoch_has_batches_of_one_size_and_ratios_of_one(small_run(one_block, beta=0.1))


def the_resumed_run_equals_the_continued_one():
    whole = adapter_of("whole")
    cut = adapter_of("cut")
    assert whole.keys() == cut.keys()
    trained = [layer for name, layer in whole.items() if "lora_B" in name and layer.any()]
    assert trained
    for name in whole:
        assert torch.equal(whole[name], cut[name])


def samples_are_kept_on_the_cpu(epochs):
    for samples in epochs:
        stored = tensors_in([samples.latents, samples.log_probs, samples.columns, samples.texts])
        assert len(stored) >= 6
        assert not any(is_on_gpu(tensor) for tensor in stored)


def the_network_is_in_half_precision_but_its_adapter(run):
    assert {p.dtype for p in run.pipe.vae.parameters()} == {torch.float32}
    for name, parameter in run.pipe.transformer.named_parameters():
        trained = "lora_" in name
        assert parameter.requires_grad == trained
        assert parameter.dtype == (torch.float32 if trained else torch.float16)


def all_that_trains_is_on_the_gpu(run):
    transformer = run.pipe.transformer
    network = [*transformer.parameters(), *transformer.buffers(), *run.pipe.vae.parameters()]
    moments = []
    for state in run.optimizer.state.values():
        moments += [state["exp_avg"], state["exp_avg_sq"]]
    assert moments
    for tensor in [*network, *run.parameters, *run.ema.shadow_params, *moments]:
        assert is_on_gpu(tensor)
    adapter = [p for p in transformer.parameters() if p.requires_grad]
    assert [id(p) for p in adapter] == [id(p) for p in run.parameters]


def encoder_parameters(run):
    encoders = [run.pipe.text_encoder, run.pipe.text_encoder_2, run.pipe.text_encoder_3]
    return [p for encoder in encoders if encoder for p in encoder.parameters()]


def the_text_encoders_have_left_the_gpu(run):
    parameters = encoder_parameters(run)
    assert torch.float16 in {p.dtype for p in parameters}
    assert not any(is_on_gpu(p) for p in parameters)


def test_on_a_gpu_products_are_in_tf32_and_attention_is_not_cudnns(model, work):
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.enable_cudnn_sdp(True)
    small_run(model)
    assert torch.get_float32_matmul_precision() == "high"
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("total, stay", [(42e9, False), (80e9, True)])
def test_text_encoders_stay_on_a_gpu_of_more_than_40_gb(model, work, monkeypatch, gpu, total, stay):
    run = small_run(model)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10e9, total))
    flow_grpo.encode(run, [{"prompt": "a"}])
    assert {is_on_gpu(p) for p in encoder_parameters(run)} == {stay}


# ---- README.md: its Python, its commands, its links.
README = (HERE / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
DOCUMENTS = ["README.md", "bench/README.md", "tiny-sd3/README.md"]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def block_with(word, language="python"):
    (block,) = [block for block in blocks(language) if word in block]
    return block


def anchor(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors_of(text):
    return {anchor(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_documents_links_lead_somewhere(name):
    document = HERE / name
    targets = LINK.findall(document.read_text(encoding="utf-8"))
    for target in targets:
        if not target.startswith("http"):
            path, _, place = target.partition("#")
            linked = document.parent / path if path else document
            assert linked.exists(), target
            assert not place or place in anchors_of(linked.read_text(encoding="utf-8")), target


def test_the_functions_are_used_as_the_readme_says():
    names = {}
    torch.manual_seed(0)
    exec(block_with("group_advantages"), names)
    assert names["loss"].isfinite()
    assert names["net"].weight.grad.any()


def test_the_readmes_rewards_work(tmp_path, monkeypatch):
    (tmp_path / "my.py").write_text(block_with("def redness"))
    monkeypatch.setattr("rewards.clipscore.reward", lambda images, *_: torch.ones(len(images)))
    monkeypatch.setattr("rewards.ocr.reward", lambda images, *_: {"ocr": [0.5] * len(images)})
    images = torch.zeros(2, 3, 32, 64)
    images[0, 0] = 1
    records = [{"prompt": "a red sign"}] * 2
    redness = load_reward(f"{tmp_path}/my.py:redness")
    both = load_reward(f"{tmp_path}/my.py:both")
    assert flow_grpo.score_images(redness, images, records)["reward"].tolist() == [1, 0]
    scores = flow_grpo.score_images(both, images, records)["reward"]
    assert scores.tolist() == pytest.approx([0.65, 0.65])
    with pytest.raises(ValueError, match="longer than 200 characters"):
        redness.check({"prompt": "a" * 201})


def make_quick_start(folder):
    folder.mkdir()
    for name in ("flow_grpo.py", "prompts.txt", "rewards", "tiny-sd3"):
        copy = shutil.copytree if (HERE / name).is_dir() else shutil.copy
        copy(HERE / name, folder / name)
    (folder / "eval.txt").write_text('a sign that says "407"')
    short = "--epochs 1 --prompts-per-epoch 2 --group-size 2 --eval-prompt-file eval.txt"
    (command,) = re.findall("^python (flow_grpo.py .*tiny-sd3.*)$", README, re.MULTILINE)
    run_python(folder, f"{command} {short}")


@pytest.fixture(scope="session")
def quick_start(shared):
    """A copy of the repository in which the README's first command was run, shortened."""
    return made_once(shared / "clone", make_quick_start)


def run_python(folder, command):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, *command.split()]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_quick_start_trains_and_leaves_pictures(quick_start):
    assert list((quick_start / "runs/signs/samples").glob("*.png"))
    assert (quick_start / "runs/signs/curve.png").exists()


def test_the_readmes_lora_draws_a_sign(quick_start, monkeypatch):
    monkeypatch.chdir(quick_start)
    exec(block_with("load_lora_weights"), {})
    assert Image.open("sign.png").size == (512, 256)


def test_the_readmes_resume_goes_on(quick_start):
    (command,) = re.findall("`python (flow_grpo.py --resume .*?)`", README)
    assert "after 1 epochs" in run_python(quick_start, command)


def test_all_flags_in_the_readme_exist():
    flags = set(re.findall(r"--([a-z][a-z-]+)", README))
    others = {"nproc-per-node", "standalone", "depth", "check"}
    known = {name.replace("_", "-") for name in vars(Config())}
    assert flags - others <= known
