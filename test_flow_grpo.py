"""Tests of flow_grpo.py: no network, no GPU; a few minutes on 2 cores."""

import functools
import importlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests wherever they run; before torch looks for a GPU

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from huggingface_hub.errors import GatedRepoError
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from torch.distributions import Normal, kl_divergence
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

import flow_grpo
from flow_grpo import gaussian_kl, group_advantages, grpo_loss, sde_step

HERE = Path(__file__).resolve().parent
SIGMAS10 = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]  # published, shift 3


# ---------------------------------------------------------------------------------------------------------------------
# The SDE step.
# ---------------------------------------------------------------------------------------------------------------------


def latents(seed: int, batch: int = 3):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, 4, 5, 6, generator=g) for _ in range(3))


@pytest.mark.parametrize("step", range(10))
@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.2])
def test_sde_step_is_the_papers_gaussian(step, noise_level):
    v, x, x_next = latents(step)
    t, t_next = SIGMAS10[step], SIGMAS10[step + 1]
    sigma = noise_level * math.sqrt(t / (1 - (t if t < 1 else t_next)))
    v64, x64 = v.double(), x.double()
    mean = x64 + (v64 + sigma**2 / (2 * t) * (x64 + (1 - t) * v64)) * (t_next - t)
    policy = Normal(mean, torch.full_like(mean, sigma * math.sqrt(t - t_next)))
    got_next, log_prob, got_mean, std = sde_step(v, x, t, t_next, noise_level, x_next)
    assert torch.equal(got_next, x_next)
    assert torch.allclose(got_mean.double(), mean, rtol=1e-5, atol=1e-5)
    assert torch.allclose(std.double().expand_as(mean), policy.stddev, rtol=1e-5)
    assert torch.allclose(log_prob.double(), policy.log_prob(x_next.double()).mean((1, 2, 3)), rtol=1e-4)


def test_sde_step_takes_a_time_for_each_image():
    v, x, x_next = latents(0)
    t, t_next = torch.tensor([1.0, 0.6, 0.3]), torch.tensor([0.9, 0.5, 0.0])
    together = sde_step(v, x, t, t_next, 0.7, x_next)
    for i in range(3):
        alone = sde_step(v[i : i + 1], x[i : i + 1], t[i].item(), t_next[i].item(), 0.7, x_next[i : i + 1])
        for a, b in zip(together, alone):
            assert torch.allclose(a[i : i + 1], b, rtol=1e-5, atol=1e-6)


def test_sde_step_draws_what_it_scores():
    v, x, _ = latents(0, batch=400)
    x_next, log_prob, mean, std = sde_step(v, x, 0.6, 0.5, 0.7, generator=torch.Generator().manual_seed(1))
    again = sde_step(v, x, 0.6, 0.5, 0.7, generator=torch.Generator().manual_seed(1))[0]
    assert torch.equal(x_next, again)
    z = (x_next - mean) / std
    assert abs(z.mean()) < 5 / math.sqrt(z.numel()) and abs(z.std() - 1) < 5 / math.sqrt(2 * z.numel())
    assert torch.equal(log_prob, sde_step(v, x, 0.6, 0.5, 0.7, x_next)[1])


def test_sde_step_computes_in_float32_and_differentiates_in_velocity():
    v, x, x_next = latents(0)
    for result in sde_step(v.half(), x.bfloat16(), 0.6, 0.5, 0.7, x_next.half()):
        assert result.dtype == torch.float32
    v.requires_grad_()
    _, log_prob, mean, std = sde_step(v, x, 0.6, 0.5, 0.7, x_next)
    log_prob.sum().backward()
    sigma = 0.7 * math.sqrt(0.6 / 0.4)  # d mean / d v = dt (1 + sigma^2 (1 - t) / 2t)
    slope = -0.1 * (1 + sigma**2 * 0.4 / 1.2)
    expected = (x_next - mean.detach()) / std**2 * slope / v[0].numel()
    assert torch.allclose(v.grad, expected, rtol=1e-4, atol=1e-7)
    v.grad = None
    sde_step(v, x, 0.6, 0.5, 0.7, generator=torch.Generator().manual_seed(0))[1].sum().backward()
    assert v.grad.abs().sum() > 0  # the drawn sample is data: the score function is not cancelled by it


def test_noise_level_zero_is_the_schedulers_euler_step():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    times = flow_grpo.schedule(scheduler, 10)
    assert times == pytest.approx(SIGMAS10, abs=5e-5)
    v, x, x_given = latents(0)
    for t, t_next, timestep in zip(times, times[1:], scheduler.timesteps):
        expected = scheduler.step(v, timestep, x, return_dict=False)[0]
        x_next, log_prob, mean, std = sde_step(v, x, t, t_next, 0.0)
        assert torch.allclose(x_next, expected, atol=1e-6) and torch.equal(x_next, mean)
        assert not std.any() and log_prob.shape == (3,) and log_prob.isfinite().all()
        x = x_next
    assert sde_step(v, x, 0.5, 0.4, 0.0, x_given)[1].isfinite().all()


@pytest.mark.parametrize("noise_level", [0.0, 0.3, 0.7, 1.0])
def test_sde_keeps_the_flows_marginals(noise_level):
    """Data N(m, s^2) has a known velocity; x_t must be N((1-t) m, (1-t)^2 s^2 + t^2) whatever the noise."""
    m, s, steps, n = 1.5, 0.4, 400, 60_000
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 1, 1, generator=g)
    for k in range(steps):
        t, t_next = 1 - k / steps, 1 - (k + 1) / steps
        variance = (1 - t) ** 2 * s**2 + t**2
        centred = x - (1 - t) * m
        v = t / variance * centred - (m + (1 - t) * s**2 / variance * centred)  # E[x_1 - x_0 | x_t]
        x = sde_step(v, x, t, t_next, noise_level, generator=g)[0]
        if k + 1 in (steps // 2, steps * 3 // 4, steps):
            mean, std = (1 - t_next) * m, math.sqrt((1 - t_next) ** 2 * s**2 + t_next**2)
            # 5 standard errors, and the discretisation error of 400 steps
            assert abs(x.mean() - mean) < 5 * std / math.sqrt(n) + 0.005
            assert abs(x.std() - std) < 5 * std / math.sqrt(2 * n) + 0.01


# ---------------------------------------------------------------------------------------------------------------------
# Advantages, KL, loss.
# ---------------------------------------------------------------------------------------------------------------------


def test_group_advantages():
    rewards = torch.tensor([[0.0, 1.0, 0.5, 0.5], [0.9, 0.7, 0.8, 0.8], [1 / 3] * 4])
    r = rewards.double()
    centred = r - r.mean(1, keepdim=True)
    assert torch.allclose(group_advantages(rewards).double(), centred / (r.std(correction=0) + 1e-4), atol=1e-6)
    own = centred / (r.std(1, correction=0, keepdim=True) + 1e-4)
    assert torch.allclose(group_advantages(rewards, global_std=False).double(), own, atol=1e-6)
    assert torch.equal(group_advantages(rewards)[2], torch.zeros(4))
    assert torch.equal(group_advantages(torch.full((5, 7), 0.1), global_std=False), torch.zeros(5, 7))
    outlier = torch.tensor([[0.0] * 99 + [1.0]])
    assert group_advantages(outlier, clip=5.0).max() == 5 and group_advantages(-outlier, clip=2.0).min() == -2


def test_gaussian_kl():
    mean, ref_mean, _ = latents(0)
    std = torch.tensor([0.1, 0.5, 2.0]).view(3, 1, 1, 1)
    p, q = (Normal(m.double(), std.double().expand_as(m)) for m in (mean, ref_mean))
    assert torch.allclose(gaussian_kl(mean, ref_mean, std).double(), kl_divergence(p, q).mean((1, 2, 3)), rtol=1e-5)


def test_gaussian_kl_of_two_steps_is_the_papers_closed_form():
    v, x, v_ref = latents(0)
    t, t_next, a = 0.6, 0.45, 0.7
    _, _, mean, std = sde_step(v, x, t, t_next, a)
    _, _, ref_mean, _ = sde_step(v_ref, x, t, t_next, a)
    sigma = a * math.sqrt(t / (1 - t))
    paper = (t - t_next) / 2 * (sigma * (1 - t) / (2 * t) + 1 / sigma) ** 2 * ((v - v_ref) ** 2).mean((1, 2, 3))
    assert torch.allclose(gaussian_kl(mean, ref_mean, std), paper, rtol=1e-4)


@pytest.mark.parametrize("log_ratio", [-0.2, -0.05, 0.05, 0.2])
@pytest.mark.parametrize("advantage", [-2.0, 2.0])
def test_gradient_of_the_loss_on_both_sides_of_the_clip(log_ratio, advantage):
    old = torch.tensor([0.3])
    log_prob = (old + log_ratio).requires_grad_()
    loss, stats = grpo_loss(log_prob, old, torch.tensor([advantage]), torch.zeros(1), 0.1, 0.0)
    loss.backward()
    ratio = math.exp(log_ratio)
    improved = (log_ratio > 0) == (advantage > 0)  # the ratio has moved the way the advantage asks
    clipped = improved and abs(ratio - 1) > 0.1
    assert log_prob.grad.item() == pytest.approx(0.0 if clipped else -advantage * ratio, rel=1e-5)
    expected = -advantage * (min(max(ratio, 0.9), 1.1) if clipped else ratio)
    assert loss.item() == pytest.approx(expected, rel=1e-5) and stats["policy_loss"].item() == loss.item()


def test_loss_averages_and_reports():
    log_prob, old = torch.tensor([0.0, 0.3, -0.3]), torch.zeros(3)
    kl = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    loss, stats = grpo_loss(log_prob, old, torch.tensor([1.0, 1.0, -1.0]), kl, 0.2, 0.5)
    ratios = log_prob.exp()
    policy = (-1 - 1.2 + 0.8) / 3
    assert loss.item() == pytest.approx(policy + 0.5 * 3)
    assert stats["ratio_mean"].item() == pytest.approx(ratios.mean().item())
    assert stats["clipfrac"].item() == pytest.approx(2 / 3)
    assert stats["approx_kl"].item() == pytest.approx(0.5 * 0.18 / 3)
    assert stats["policy_loss"].item() == pytest.approx(policy) and stats["kl"].item() == 3
    loss.backward()
    assert torch.allclose(kl.grad, torch.full((3,), 0.5 / 3)) and not any(s.requires_grad for s in stats.values())


# ---------------------------------------------------------------------------------------------------------------------
# Models: small random ones in the hub's format, with and without T5.
# ---------------------------------------------------------------------------------------------------------------------


def save_random_pipeline(folder: Path, t5: bool) -> None:
    torch.manual_seed(0)
    words = ["<|startoftext|>", "<|endoftext|>", *map(chr, range(33, 127)), *(chr(c) + "</w>" for c in range(33, 127))]
    tokenizer = CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=12)
    clip = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, projection_dim=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    encoders = [CLIPTextModelWithProjection(clip).eval() for _ in range(2)]
    for encoder in encoders:
        torch.nn.init.normal_(encoder.text_model.embeddings.token_embedding.weight)
    encoder_3 = tokenizer_3 = None
    if t5:
        tokenizer_3 = T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)], extra_ids=0)
        encoder_3 = T5EncoderModel(
            T5Config(vocab_size=4, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ).eval()
    pipe = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
            pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,),
        ),
        vae=AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=4, latent_channels=4,
            shift_factor=0.1, scaling_factor=1.2, use_quant_conv=False, use_post_quant_conv=False,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=encoders[0], tokenizer=tokenizer, text_encoder_2=encoders[1], tokenizer_2=tokenizer,
        text_encoder_3=encoder_3, tokenizer_3=tokenizer_3,
    )  # fmt: skip
    pipe.save_pretrained(folder)


@pytest.fixture(scope="session", params=[True, False], ids=["with-T5", "without-T5"])
def any_model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_random_pipeline(folder, request.param)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_random_pipeline(folder, True)
    return folder


REWARDS = """
import torch

def red(images, prompts, metadata):
    assert images.shape[1:] == (3, 16, 16) and len(images) == len(prompts) == len(metadata)
    assert 0 <= images.min() and images.max() <= 1 and all(m["prompt"] == p for m, p in zip(metadata, prompts))
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))

def constant(images, prompts, metadata):
    return [0.5] * len(prompts)

def nan(images, prompts, metadata):
    return torch.tensor([1.0] * (len(prompts) - 1) + [float("nan")])

def short(images, prompts, metadata):
    return torch.zeros(len(prompts) - 1)

def broken(images, prompts, metadata):
    raise RuntimeError("the judge is ill")

def leaves(images, prompts, metadata):
    raise SystemExit(0)

def greedy(images, prompts, metadata):
    rewards = red(images, prompts, metadata)
    for record in metadata:
        record["seen"] = True
    images.zero_()
    prompts.clear()
    return rewards

number = 3
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with prompts and rewards, as the current one; evaluations of 4 steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flow_grpo, "EVAL_STEPS", 4)
    Path("rewards.py").write_text(REWARDS)
    Path("prompts.txt").write_text("".join(f'a "{i}"\n' for i in range(8)))
    return tmp_path


def arguments(model, out="out", reward="rewards.py:red", compile=False, gradient_checkpointing=False, **flags):
    flags = {
        "prompt-file": "prompts.txt", "model": model, "reward": reward, "output-dir": out, "epochs": 3,
        "prompts-per-epoch": 2, "group-size": 4, "batch-size": 3, "guidance-scale": 2, "height": 16, "width": 16,
        "max-sequence-length": 5, "learning-rate": 1e-2, "eval-every": 2, "lora-rank": 4, "ema-interval": 1,
    } | {name.replace("_", "-"): value for name, value in flags.items()}  # fmt: skip
    given = [str(part) for name, value in flags.items() if value is not None for part in (f"--{name}", value)]
    switches = {"compile": compile, "gradient-checkpointing": gradient_checkpointing}
    return given + [f"--{name}" if on else f"--no-{name}" for name, on in switches.items()]


def prepare(args):
    return flow_grpo.prepare(flow_grpo.configure(args)[0])


def active_run(model, **settings):
    """A run whose adapter does something: at first it is zero."""
    run = prepare(arguments(model, **settings))
    for p in run.parameters:
        p.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return run


def metrics(out="out"):
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def stock(model, **kwargs):
    """The stock pipeline, as a user of the library loads it."""
    if json.loads((Path(model) / "model_index.json").read_text())["text_encoder_3"] == [None, None]:
        kwargs |= {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(model, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_images(pipe, run, prompts, steps, guidance):
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    c = run.config
    return pipe(
        prompts, height=c.height, width=c.width, num_inference_steps=steps, guidance_scale=guidance,
        max_sequence_length=c.max_sequence_length, generator=generators, output_type="pt",
    ).images  # fmt: skip


@pytest.mark.parametrize("guidance", [1, 3.5])
def test_evaluation_draws_what_the_stock_pipeline_draws(any_model, work, guidance):
    run = prepare(arguments(any_model, guidance_scale=guidance))
    prompts = [r["prompt"] for r in run.eval_records]
    _, images = flow_grpo.evaluate(run)
    expected = stock_images(stock(any_model), run, prompts, 4, guidance)
    assert torch.allclose(images, expected, atol=1e-4) and images.std() > 0.01
    assert run.pipe.text_encoder is run.pipe.text_encoder_3 is None  # freed


def test_unconditional_velocity_is_a_constant_without_a_graph(model, work):
    run = prepare(arguments(model))
    transformer = run.pipe.transformer
    torch.manual_seed(0)
    for p in run.parameters:
        p.data.normal_(std=0.1)
    modes = []
    transformer.register_forward_pre_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    x, text = torch.randn(2, *run.latent_shape), run.text(run.eval_records[:2])
    guided = flow_grpo.predict_velocity(transformer, x, 0.6, text, run.null_text, 3.0)
    got = torch.autograd.grad((guided**2).sum(), run.parameters)
    assert modes == [True, False]
    plain = flow_grpo.predict_velocity(transformer, x, 0.6, text, run.null_text, 1)
    expected = torch.autograd.grad((plain * 3 * 2 * guided.detach()).sum(), run.parameters)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(got, expected))
    assert modes == [True, False, True] and guided.dtype == torch.float32


def test_first_update_has_ratios_of_one_and_trains_the_adapter_alone(any_model, work):
    run = prepare(arguments(any_model, beta=0.1, batch_size=4))
    transformer = run.pipe.transformer
    base = {n: p.clone() for n, p in transformer.named_parameters() if "lora" not in n}
    adapter = [p.detach().clone() for p in run.parameters]
    assert {n for n, p in transformer.named_parameters() if p.requires_grad}.isdisjoint(base)
    projections = [n for n, p in transformer.named_parameters() if "lora_A" in n]
    assert len(projections) == 8 + 7 + 4  # the last block has no to_add_out; the first has a second attention
    generator = torch.Generator().manual_seed(0)
    samples, _ = flow_grpo.collect(run, generator)
    assert samples.latents.shape == (8, 11, 4, 8, 8) and samples.log_probs.shape == (8, 10)
    stats = flow_grpo.update(run, samples, generator)
    assert stats["ratio_deviation"] < 1e-5 and stats["trained"] == 1
    assert stats["kl"] > 0  # from the second update on, the policy has left the reference
    assert any(not torch.equal(a, p) for a, p in zip(adapter, run.parameters))
    assert all(torch.equal(base[n], p) for n, p in transformer.named_parameters() if n in base)
    assert flow_grpo.update(run, samples, torch.Generator())["ratio_deviation"] > 1e-4  # by now off-policy: it can fail
    assert run.updates == 4


def test_reference_is_the_base_model(model, work):
    run = prepare(arguments(model))
    text, x = run.text(run.eval_records[:2]), torch.randn(2, *run.latent_shape)

    def v():
        with torch.no_grad():
            return flow_grpo.predict_velocity(run.pipe.transformer, x, 0.5, text, run.null_text, 2.0)

    before = v()
    for p in run.parameters:
        p.data += 0.1
    assert not torch.allclose(v(), before, atol=1e-3)
    with flow_grpo.reference(run.pipe.transformer):
        assert torch.equal(v(), before)
    assert not torch.allclose(v(), before, atol=1e-3)


def test_kl_is_to_the_base_models_step_at_each_latent(model, work):
    """The update's, against a loop that takes each step by itself."""
    run = active_run(model, batch_size=8, updates_per_epoch=1)
    transformer, times = run.pipe.transformer, flow_grpo.schedule(run.pipe.scheduler, 10)
    samples, _ = flow_grpo.collect(run, torch.Generator().manual_seed(0))
    text, expected = run.text(samples.records), []
    with torch.no_grad():
        for k in range(9):
            x = samples.latents[:, k]
            step = x, times[k], times[k + 1], 0.7
            v = flow_grpo.predict_velocity(transformer, x, times[k], text, run.null_text, 2.0)
            with flow_grpo.reference(transformer):
                v_ref = flow_grpo.predict_velocity(transformer, x, times[k], text, run.null_text, 2.0)
            (_, _, mean, std), (_, _, ref_mean, _) = sde_step(v, *step), sde_step(v_ref, *step)
            expected.append(gaussian_kl(mean, ref_mean, std).mean().item() * (times[k] - times[k + 1]))
    kl = flow_grpo.update(run, samples, torch.Generator())["kl"]
    assert kl == pytest.approx(sum(expected) / 9, rel=1e-3) and min(expected) > 0


@pytest.mark.parametrize("balance", [1, 2])
def test_step_weights_take_the_steps_own_scale_out_of_the_gradient(balance):
    times = flow_grpo.schedule(FlowMatchEulerDiscreteScheduler(shift=3.0), 10)
    assert flow_grpo.step_weights(times, flow_grpo.Config()) == [1] * 9
    weights = flow_grpo.step_weights(times, flow_grpo.Config(noise_level=1.0, trained_steps=7, step_balance=float(balance)))
    assert len(weights) == 7 and sum(weights) == pytest.approx(7)
    scales = []
    for k in range(7):
        v, x, noise = latents(0)
        v.requires_grad_()
        _, _, mean, std = sde_step(v, x, times[k], times[k + 1], 1.0)
        log_prob = sde_step(v, x, times[k], times[k + 1], 1.0, (mean + std * noise).detach())[1]
        scales.append(torch.autograd.grad(log_prob.sum(), v)[0].norm().item())
    balanced = [weight * scale**balance for weight, scale in zip(weights, scales)]
    assert balanced[1:] == pytest.approx([balanced[1]] * 6, rel=1e-3)  # at t = 1 the drift has no second term
    assert balanced[0] == pytest.approx(balanced[1] / 1.5**balance, rel=1e-3)
    assert scales[6] / scales[0] == pytest.approx(11.3, rel=0.02)  # as the README has it


def test_the_update_weighs_each_steps_loss(model, work, monkeypatch):
    def grad_norm(trained_steps):
        run = prepare(arguments(model, updates_per_epoch=1, guidance_scale=1, trained_steps=trained_steps))
        samples, _ = flow_grpo.collect(run, torch.Generator().manual_seed(0))
        return flow_grpo.update(run, samples, torch.Generator().manual_seed(0))["grad_norm"]

    first, all_nine = grad_norm(1), grad_norm(9)
    assert first != pytest.approx(all_nine, rel=0.01)
    monkeypatch.setattr(flow_grpo, "step_weights", lambda times, config: [9] + [0] * 8)
    assert grad_norm(9) == pytest.approx(first, rel=1e-4)


def test_update_moves_log_probs_with_the_advantages(model, work):
    """One step raises the likelihood of what was better than its group and lowers that of what was worse."""
    run = prepare(arguments(model, updates_per_epoch=1, learning_rate=1e-4, guidance_scale=1, clip_range=1))
    samples, _ = flow_grpo.collect(run, torch.Generator().manual_seed(0))
    flow_grpo.update(run, samples, torch.Generator().manual_seed(0))
    advantages = group_advantages(samples.scores["reward"].view(2, 4)).flatten()
    times, gain = flow_grpo.schedule(run.pipe.scheduler, 10), 0.0
    with torch.no_grad():
        for k in range(9):
            x, x_next = samples.latents[:, k], samples.latents[:, k + 1]
            v = flow_grpo.predict_velocity(run.pipe.transformer, x, times[k], run.text(samples.records), run.null_text, 1)
            log_prob = sde_step(v, x, times[k], times[k + 1], 0.7, x_next)[1]
            gain += (advantages * (log_prob - samples.log_probs[:, k])).sum().item()
    assert gain > 0


def test_samples_without_advantage_are_not_updated(model, work):
    run = prepare(arguments(model, reward="rewards.py:constant", beta=0))
    samples, _ = flow_grpo.collect(run, torch.Generator().manual_seed(0))
    calls = []
    run.pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    assert flow_grpo.update(run, samples, torch.Generator())["trained"] == 0
    assert not calls and run.updates == 0
    samples.scores["reward"][:3] = torch.tensor([0.1, 0.2, 0.3])  # one group of two now differs
    stats = flow_grpo.update(run, samples, torch.Generator())
    assert stats["trained"] == 0.5 and len(calls) == 2 * 9 * 2  # micro-batches of 2, 9 steps, with and without text


def test_half_precision_base_keeps_the_adapter_in_float32(model, work):
    run = prepare(arguments(model))
    config, pipe = run.config, flow_grpo.load_pipeline(run.config, torch.float16)
    parameters = flow_grpo.add_adapter(pipe.transformer, config)
    assert {p.dtype for p in parameters} == {torch.float32}
    assert {p.dtype for n, p in pipe.transformer.named_parameters() if "lora" not in n} == {torch.float16}
    text = flow_grpo.Text(*(e.half() for e in run.text(run.eval_records[:2])))
    v = flow_grpo.predict_velocity(pipe.transformer, torch.randn(2, *run.latent_shape), 0.5, text, text, 1)
    v.sum().backward()
    assert v.dtype == torch.float32 and parameters[1].grad.dtype == torch.float32 and parameters[1].grad.abs().sum() > 0


def test_loss_scaling_changes_nothing_but_the_range(model, work):
    """Half precision on a GPU scales the loss; the scaler itself runs on the CPU, too."""
    results = []
    for scaler in (torch.amp.GradScaler("cpu", enabled=False), torch.amp.GradScaler("cpu")):
        run = prepare(arguments(model))
        run.scaler = scaler
        samples, _ = flow_grpo.collect(run, torch.Generator().manual_seed(0))
        flow_grpo.update(run, samples, torch.Generator().manual_seed(0))
        results.append([p.detach().clone() for p in run.parameters])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results))
    Path("scaled").mkdir()
    scaler._scale.fill_(8.0)
    flow_grpo.save(run, Path("scaled"))
    fresh = prepare(arguments(model))
    fresh.scaler = torch.amp.GradScaler("cpu")
    flow_grpo.restore(fresh, Path("scaled/checkpoint.safetensors"))
    assert fresh.scaler.state_dict()["scale"] == 8.0 and fresh.updates == run.updates == 2
    samples.scores["reward"][:] = torch.arange(8.0)
    before = [p.detach().clone() for p in run.parameters]
    samples.log_probs[:] = float("nan")  # the gradients overflow: both steps are skipped, and the scale halved
    assert flow_grpo.update(run, samples, torch.Generator())["grad_norm"] == 0
    assert scaler.get_scale() == 2.0 and all(torch.equal(a, b) for a, b in zip(before, run.parameters))


def epoch(run):
    """One epoch: its samples, the first micro-batch's loss and gradient at a step, and the update's statistics."""
    generator = torch.Generator().manual_seed(0)
    samples, _ = flow_grpo.collect(run, generator)
    times, x = flow_grpo.schedule(run.pipe.scheduler, 10), samples.latents[: run.config.batch_size]
    text = run.text(samples.records[: len(x)])
    v_refs = flow_grpo.reference_velocities(run, x, times[:4], text, run.null_text)
    log_prob, kl = flow_grpo.score_step(run, x[:, 3], x[:, 4], times[3], times[4], text, run.null_text, v_refs[3])
    advantages = torch.linspace(-1, 1, len(x))
    loss, _ = grpo_loss(log_prob, samples.log_probs[: len(x), 3], advantages, kl, 0.1, 0.04)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, run.parameters)])
    return samples, loss.detach(), gradient, flow_grpo.update(run, samples, generator)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_blocks_give_the_same_numbers(any_model, work, checkpointed):
    """In float32: log-probs and loss to 1e-4, the gradient to 1e-3 of its norm."""
    samples, loss, gradient, stats = epoch(active_run(any_model, batch_size=4))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    run = active_run(any_model, batch_size=4, compile=True, gradient_checkpointing=checkpointed)
    compiled_samples, compiled_loss, compiled_gradient, compiled = epoch(run)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert torch.allclose(samples.log_probs, compiled_samples.log_probs, atol=1e-4)
    assert torch.allclose(samples.latents, compiled_samples.latents, atol=1e-3)
    assert run.pipe.transformer.is_gradient_checkpointing == checkpointed
    assert torch.allclose(loss, compiled_loss, atol=1e-4)
    assert gradient.norm() > 0 and (gradient - compiled_gradient).norm() < 1e-3 * gradient.norm()
    assert compiled["ratio_deviation"] < 1e-5 and compiled["kl"] == pytest.approx(stats["kl"], rel=1e-2)


def test_gradient_checkpointing_gives_the_same_numbers_and_keeps_less(any_model, work):
    results, kept = [], []

    def keep(tensor):
        kept[-1] += tensor.nbytes
        return tensor

    for checkpointed in (False, True):
        run = active_run(any_model, batch_size=4, gradient_checkpointing=checkpointed)
        text, x = run.text(run.eval_records[:2]), torch.randn(2, *run.latent_shape)
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            flow_grpo.predict_velocity(run.pipe.transformer, x, 0.5, text, run.null_text, 2.0)
        decoded = []
        run.pipe.vae.decoder.register_forward_pre_hook(lambda _, args: decoded.append(len(args[0])))
        results.append(epoch(run))
        assert set(decoded) == ({1} if checkpointed else {4})  # images a decoding
    (samples, loss, gradient, stats), (same_samples, same_loss, same_gradient, same_stats) = results
    assert torch.equal(samples.latents, same_samples.latents) and torch.equal(samples.log_probs, same_samples.log_probs)
    assert torch.equal(loss, same_loss) and torch.equal(gradient, same_gradient) and gradient.norm() > 0
    assert stats == pytest.approx(same_stats, rel=1e-3) and kept[1] < 0.2 * kept[0]


@pytest.mark.parametrize("switches", [{}, {"compile": True}, {"compile": True, "gradient_checkpointing": True}])
def test_ratios_are_one_in_half_precision(model, work, monkeypatch, switches):
    """By the same shapes and the same kernels: 256 elements a latent average no rounding away."""
    monkeypatch.setattr(flow_grpo, "device_and_dtype", lambda: ("cpu", torch.float16))
    run = active_run(model, batch_size=3, beta=0.1, **switches)  # batches of 3, 3, 2; then 3, 1, 3, 1
    shapes = set()
    run.pipe.transformer.register_forward_pre_hook(lambda _, args: shapes.add(tuple(args[0].shape)))
    samples, _ = flow_grpo.collect(run, torch.Generator().manual_seed(0))
    stats = flow_grpo.update(run, samples, torch.Generator().manual_seed(0))
    flow_grpo.evaluate(run)
    assert stats["ratio_deviation"] < 1e-5 and stats["trained"] == 1 and shapes == {(3, 4, 8, 8)}


def test_filled_up_batches_count_once(model, work, monkeypatch):
    """The repeats that make the last batch whole change neither the samples' number nor the gradient."""
    norms = []
    for whole in (False, True):
        run = prepare(arguments(model, batch_size=3, updates_per_epoch=1, guidance_scale=1))
        samples, _ = flow_grpo.collect(run, torch.Generator().manual_seed(0))
        if whole:
            monkeypatch.setattr(flow_grpo.Run, "pad", lambda _, batch: [batch[i % len(batch)] for i in range(3)])
            assert len(flow_grpo.collect(run, torch.Generator().manual_seed(0))[0].log_probs) == 8
            assert len(flow_grpo.evaluate(run)[1]) == len(run.eval_records) == 4
        norms.append(flow_grpo.update(run, samples, torch.Generator().manual_seed(0))["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 0


def test_without_a_compiler_training_goes_on(model, work, monkeypatch, capsys):
    torch.compiler.reset()
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/no/such/compiler",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    try:
        assert flow_grpo.main(arguments(model, compile=True, epochs=1)) == 0
    finally:
        torch.compiler.set_stance("default")
    assert "torch.compile does not work here" in capsys.readouterr().out


@pytest.mark.parametrize("decay_after, shares", [(0, (1, 1, 1, 1)), (4, (1, 1, 0.8, 0.4))])
def test_steps_are_as_long_as_the_settings_say(model, work, decay_after, shares):
    """The gradient is cut to max_grad_norm, and the learning rate falls as 1 / epoch from decay_after on."""
    run = prepare(arguments(model, learning_rate=0.1, decay_after=decay_after, max_grad_norm=0.5))
    run.optimizer = torch.optim.SGD(run.parameters, lr=123.0)
    for run.epoch, share in zip((0, 3, 4, 9), shares):
        for length in (0.1, 7.0):
            before = torch.cat([p.detach().flatten() for p in run.parameters])
            for p in run.parameters:
                p.grad = torch.full_like(p, length / math.sqrt(len(before)))
            assert float(flow_grpo.optimizer_step(run)) == pytest.approx(length, rel=1e-3)
            moved = torch.cat([p.detach().flatten() for p in run.parameters]) - before
            assert float(moved.norm()) == pytest.approx(0.1 * share * min(length, 0.5), rel=1e-2)


def test_average_of_the_adapter(model, work):
    run = prepare(arguments(model, ema_interval=2, updates_per_epoch=2))
    start = [p.detach().clone() for p in run.parameters]
    samples, _ = flow_grpo.collect(run, torch.Generator().manual_seed(0))
    flow_grpo.update(run, samples, torch.Generator())
    decay = 3 / 12  # min(.9, (1 + n) / (10 + n)) after n = 2 updates
    for s, p, average in zip(start, run.parameters, run.ema):
        assert torch.allclose(average, decay * s + (1 - decay) * p, atol=1e-6)
    live = [p.detach().clone() for p in run.parameters]
    with flow_grpo.averaged(run):
        assert any(not torch.equal(p, s) for p, s in zip(run.parameters, live))
    assert all(torch.equal(p, s) for p, s in zip(run.parameters, live))


# ---------------------------------------------------------------------------------------------------------------------
# Runs.
# ---------------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_promises(any_model, work, capsys):
    assert flow_grpo.main(arguments(any_model)) == 0
    config = json.loads(Path("out/config.json").read_text())
    assert config["group_size"] == 4 and config["beta"] == 0.04 and config["noise_level"] == 0.7
    assert config["seed"] == 0 and config["prompt_file"] == "prompts.txt" and config["epochs"] == 3
    lines = metrics()
    assert [m["epoch"] for m in lines if "eval_reward" in m] == [0, 2, 3]
    assert [m["epoch"] for m in lines if "reward" in m] == [1, 2, 3]
    assert all(m["ratio_deviation"] < 1e-5 and m["kl"] > 0 and m["grad_norm"] > 0 for m in lines if "reward" in m)
    printed = capsys.readouterr().out
    first, last = lines[0]["eval_reward"], lines[-1]["eval_reward"]
    assert f"{first:.3f} before, {last:.3f} after" in printed and "group_size" in printed
    assert sorted(p.name for p in Path("out/samples").iterdir()) == [f"epoch_0000{i}.png" for i in (0, 2, 3)]
    Image.open("out/curve.png").verify()
    assert any("tfevents" in p.name for p in Path("out/tensorboard").iterdir())
    assert not [p for p in Path("out").rglob("*") if p.name.startswith(".")]


def test_lora_file_in_a_stock_pipeline_gives_the_runs_own_images(any_model, work):
    assert flow_grpo.main(arguments(any_model, epochs=2)) == 0
    Path("out/.pytorch_lora_weights.safetensors.new").write_bytes(b"cut short by a kill")
    run = prepare(arguments(any_model, out="unused"))
    pipe = stock(any_model)
    prompts = [json.loads(line)["prompt"] for line in Path("out/eval_prompts.jsonl").read_text().splitlines()]
    before = stock_images(pipe, run, prompts, 4, 2.0)
    pipe.load_lora_weights("out")
    after = stock_images(pipe, run, prompts, 4, 2.0)
    assert not torch.allclose(before, after, atol=1e-2)
    reward = (after[:, 0].mean((1, 2)) - after[:, 1:].mean((1, 2, 3))).mean().item()
    assert reward == pytest.approx(metrics()[-1]["eval_reward"], abs=1e-4)
    flow_grpo.write_grid(after, Path("stock.png"))
    own, theirs = (torch.frombuffer(bytearray(Image.open(p).tobytes()), dtype=torch.uint8).float()
                   for p in ("out/samples/epoch_00002.png", "stock.png"))  # fmt: skip
    assert (own - theirs).abs().max() <= 1  # of 255


def same_run(a, b):
    for name in ("checkpoint.safetensors", "pytorch_lora_weights.safetensors"):
        x, y = load_file(Path(a, name)), load_file(Path(b, name))
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    strip = [[{k: v for k, v in m.items() if "seconds" not in k} for m in metrics(out)] for out in (a, b)]
    assert strip[0] == strip[1]


@pytest.mark.parametrize("where", ["collect", "update", "save_file", "evaluate", "write_curve"])
@pytest.mark.parametrize("call", [1, 2])
def test_interrupted_equals_uninterrupted(model, work, monkeypatch, capsys, where, call):
    assert flow_grpo.main(arguments(model)) == 0
    original, calls = getattr(flow_grpo, where), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(flow_grpo, where, interrupted)
    assert flow_grpo.main(arguments(model, out="cut")) == 130
    assert "interrupted" in capsys.readouterr().err.strip().splitlines()[-1]
    monkeypatch.setattr(flow_grpo, where, original)
    assert flow_grpo.main(["--resume", "cut"]) == 0
    same_run("out", "cut")


def test_interrupted_equals_uninterrupted_when_compiled(model, work):
    for out, epochs in (("out", 2), ("cut", 1)):
        assert flow_grpo.main(arguments(model, out=out, epochs=epochs, eval_every=1, compile=True)) == 0
    assert flow_grpo.main(["--resume", "cut", "--epochs", "2"]) == 0
    same_run("out", "cut")


def test_killed_and_resumed_again_and_again(model, work):
    """SIGKILL at random moments: the next --resume goes on, to the same weights."""
    flags = arguments(model, epochs=6, eval_every=6)
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(HERE)!r}); import flow_grpo as f; "
               "f.EVAL_STEPS = 4; sys.exit(f.main(sys.argv[1:]))"]  # fmt: skip
    assert flow_grpo.main(flags) == 0
    resumed, rng = arguments(model, out="cut", epochs=6, eval_every=6) + ["--resume"], random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(command + resumed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.time() + 120
        progress = Path("cut/metrics.jsonl")
        lines = len(progress.read_text().splitlines()) if progress.exists() else 0
        while time.time() < deadline and process.poll() is None:
            if progress.exists() and len(progress.read_text().splitlines()) > lines:
                break
            time.sleep(0.01)
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert subprocess.run(command + resumed, stdout=subprocess.DEVNULL).returncode == 0
    same_run("out", "cut")


def test_resume_can_prolong_a_run_but_not_change_it(model, work, capsys):
    assert flow_grpo.main(arguments(model, epochs=2)) == 0
    shutil.copytree(model, model.name)  # the same folder elsewhere is the same model
    assert flow_grpo.main(["--resume", "out", "--epochs", "3", "--batch-size", "2", "--model", model.name]) == 0
    assert "2 epochs are done, of 3" in capsys.readouterr().out
    assert [m["epoch"] for m in metrics() if "reward" in m] == [1, 2, 3]
    assert json.loads(Path("out/config.json").read_text())["epochs"] == 3


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one sentence, exit code 2, nothing lost.
# ---------------------------------------------------------------------------------------------------------------------


def fails(args, capsys, *words):
    capsys.readouterr()
    assert flow_grpo.main([str(a) for a in args]) == 2
    stderr = capsys.readouterr().err
    error = stderr.strip().splitlines()[-1]
    assert error.startswith("error: ") and all(word in error for word in words), error
    assert stderr.count("error: ") == 1 and "Traceback" not in stderr


BAD_FLAGS = [
    ({"prompt_file": "none.txt"}, ["none.txt", "check the path"]),
    ({"prompt_file": "empty.txt"}, ["empty.txt", "no prompts"]),
    ({"prompt_file": "binary.txt"}, ["binary.txt", "not UTF-8 text"]),
    ({"prompt_file": "zeros.txt"}, ["zeros.txt", "not UTF-8 text"]),
    ({"prompt_file": "surrogate.jsonl"}, ["surrogate.jsonl, line 1"]),
    ({"prompt_file": "deep.JSONL"}, ["deep.JSONL, line 1"]),
    ({"prompt_file": "."}, ["prompt file .", "check the path"]),
    ({"prompt_file": "unquoted.txt", "reward": "ocr"}, ["unquoted.txt, line 3", "double quotes"]),
    ({"prompt_file": "broken.jsonl"}, ["broken.jsonl, line 2"]),
    ({"prompt_file": None}, ["--prompt-file"]),
    ({"reward": "beauty"}, ["unknown reward 'beauty'", "ocr", ".py:function"]),
    ({"reward": "none.py:f"}, ["none.py", "does not exist"]),
    ({"reward": "rewards.py:none"}, ["no function 'none'"]),
    ({"reward": "rewards.py:number"}, ["no function 'number'"]),
    ({"reward": "syntax.py:f"}, ["syntax.py", "SyntaxError"]),
    ({"reward": "leaves.py:f"}, ["leaves.py", "SystemExit"]),
    ({"reward": "rewards.py:leaves"}, ["leaves", "SystemExit"]),
    ({"reward": "rewards.py:nan"}, ["nan", 'a "', "--resume out"]),
    ({"reward": "rewards.py:short"}, ["short", "one number for each of 3 images", "--resume out"]),
    ({"reward": "rewards.py:broken"}, ["broken", "RuntimeError (the judge is ill)", "--resume out"]),
    ({"model": "no/folder"}, ["no/folder", "network"]),
    ({"model": "/no/such/folder"}, ["/no/such/folder", "--model"]),
    ({"model": "."}, ["the model .", "--model"]),
    ({"height": 18}, ["--height is 18", "multiple of 4"]),
    ({"width": 64}, ["--width is 64", "at most 32"]),
    ({"group_size": 1}, ["--group-size is 1", "2 or more"]),
    ({"epochs": 0}, ["--epochs is 0"]),
    ({"learning_rate": "nan"}, ["--learning-rate is nan"]),
    ({"noise_level": 0}, ["--noise-level is 0"]),
    ({"guidance_scale": 0.5}, ["--guidance-scale is 0.5"]),
    ({"trained_steps": 11}, ["--trained-steps is 11", "10 at most"]),
    ({"step_balance": -1}, ["--step-balance is -1"]),
    ({"max_sequence_length": 600}, ["--max-sequence-length is 600", "512"]),
    ({"seed": 10**16}, ["--seed is 10000000000000000", "1000000000 at most"]),
    ({"learning_rate": "inf"}, ["--learning-rate is inf"]),
    ({"learning_rate": 1e30}, ["not finite", "--learning-rate"]),
    ({"output-dir": "empty.txt"}, ["empty.txt is a file", "--output-dir"]),
]


@pytest.mark.parametrize("flags, words", BAD_FLAGS, ids=[str(flags) for flags, _ in BAD_FLAGS])
def test_bad_input_is_one_sentence(model, work, capsys, monkeypatch, flags, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("empty.txt").write_text(" \n\n")
    Path("binary.txt").write_bytes(bytes(range(128, 256)))
    Path("zeros.txt").write_bytes(b"a\0b\n")
    Path("unquoted.txt").write_text('a "1"\n\na sign\n')
    Path("broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    Path("surrogate.jsonl").write_text('{"prompt": "a \\ud800"}\n')
    Path("deep.JSONL").write_text("[" * 100_000 + "\n")
    Path("syntax.py").write_text("def f(:\n")
    Path("leaves.py").write_text("import sys\nsys.exit(0)\n")
    fails(arguments(**{"model": model, **flags}), capsys, *words)


def test_a_run_that_has_diverged_is_not_to_be_resumed(model, work, capsys):
    assert flow_grpo.main(arguments(model, learning_rate=1e30)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "not finite" in error and "--resume" not in error


def test_gated_model(model, work, capsys, monkeypatch):
    def gated(*args, **kwargs):
        try:
            raise GatedRepoError("gated", response=Mock())
        except GatedRepoError:
            raise OSError("no access")  # as diffusers does

    monkeypatch.setattr(StableDiffusion3Pipeline, "load_config", gated)
    fails(arguments(flow_grpo.SD35), capsys, "gated", flow_grpo.SD35, "licence", "hf auth login")


def test_out_of_memory(model, work, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(flow_grpo, "collect", full)
    fails(arguments(model), capsys, "out of memory", "--gradient-checkpointing", "--batch-size (now 3)", "--resume out")
    monkeypatch.setattr(flow_grpo, "compile_blocks", full)  # its trial is the first to draw a whole batch
    fails(arguments(model, out="new", compile=True), capsys, "--gradient-checkpointing", "--batch-size (now 3)", "alone")
    monkeypatch.setattr(flow_grpo, "configure", full)
    fails(arguments(model), capsys, "out of memory")


def test_too_little_main_memory_for_the_prompts(model, work, capsys, monkeypatch):
    prompts = [f'a sign that says "{i}"' for i in range(40)]
    Path("prompts.txt").write_text("\n".join(prompts))
    texts = prepare(arguments(model, epochs=10)).texts
    assert len(texts) == 41
    free = 25 * sum(e.nbytes for e in texts[""])  # for all but the first batch of 16
    monkeypatch.setattr(flow_grpo.psutil, "virtual_memory", lambda: Mock(available=free))
    prepare(arguments(model, epochs=10))
    free -= 1
    fails(arguments(model, epochs=10), capsys, "41 prompts", "main memory", "--prompts-per-epoch")
    assert not Path("out").exists()


def test_other_run_in_the_folder_and_nothing_lost(model, work, capsys):
    assert flow_grpo.main(arguments(model, epochs=1)) == 0
    before = {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()}
    fails(arguments(model), capsys, "out holds another run", "--output-dir", "--resume out")
    fails(["--resume", "out", "--learning-rate", "3"], capsys, "other settings", "learning_rate", "0.01", "3.0")
    Path("other.txt").write_text('a "9"\na "8"\n')
    fails(["--resume", "out", "--prompt-file", "other.txt"], capsys, "other prompts")
    fails(["--resume", "nowhere"], capsys, "nowhere holds no run")
    config = json.loads(Path("out/config.json").read_text())
    damaged = ["{", '{"x": 1}', "7", json.dumps(config | {"epochs": "three"}), json.dumps(config | {"reward": None})]
    for text, word in [(json.dumps(config | {"seed": 5}), "seed"), *((text, "config.json is damaged") for text in damaged)]:
        Path("out/config.json").write_text(text)
        fails(["--resume", "out"], capsys, word)
    Path("out/config.json").unlink()
    fails(["--resume", "out"], capsys, "config.json is missing")
    Path("out/config.json").write_text(json.dumps(config, indent=2) + "\n")
    assert before == {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()}
    lines = Path("out/metrics.jsonl").read_bytes()
    for bad in (b"5", b"\xff\xfe", b"garbage"):
        Path("out/metrics.jsonl").write_bytes(bad + b"\n" + lines)
        fails(["--resume", "out"], capsys, "metrics.jsonl, line 1 is damaged")
        assert Path("out/metrics.jsonl").read_bytes() == bad + b"\n" + lines


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_damaged_checkpoint(model, work, capsys, damage):
    assert flow_grpo.main(arguments(model, epochs=1)) == 0
    path = Path("out/checkpoint.safetensors")
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes({"cut": data[: len(data) // 2], "flip": data, "empty": b""}[damage])
    fails(["--resume", "out", "--epochs", "2"], capsys, "checkpoint.safetensors is damaged")
    assert metrics()[-1]["epoch"] == 1


def test_a_reward_may_spoil_what_it_is_given(model, work):
    assert flow_grpo.main(arguments(model, epochs=1)) == 0
    assert flow_grpo.main(arguments(model, out="own", reward="rewards.py:greedy", epochs=1)) == 0
    assert metrics()[-1]["eval_reward"] == metrics("own")[-1]["eval_reward"]
    assert flow_grpo.main(["--resume", "own", "--epochs", "2"]) == 0


def test_a_failing_reward_can_be_mended_and_resumed(model, work, capsys):
    assert flow_grpo.main(arguments(model)) == 0
    Path("own.py").write_text(REWARDS.replace("return images[:, 0]", "1 / 0; return images[:, 0]"))
    fails(arguments(model, out="own", reward="own.py:red"), capsys, "ZeroDivisionError", "--resume own")
    Path("own.py").write_text(REWARDS)
    assert flow_grpo.main(["--resume", "own"]) == 0
    x, y = (load_file(f"{out}/pytorch_lora_weights.safetensors") for out in ("out", "own"))
    assert all(torch.equal(x[k], y[k]) for k in x)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and the OCR reward.
# ---------------------------------------------------------------------------------------------------------------------


def test_prompts_are_split_and_drawn(work):
    config = flow_grpo.Config(prompt_file="prompts.txt", reward="ocr", prompts_per_epoch=3)
    train, held_out = flow_grpo.split_prompts(config)
    names = [r["prompt"] for r in train + held_out]
    assert len(train) == len(held_out) == 4 and sorted(names) == [f'a "{i}"' for i in range(8)]
    drawn = [r["prompt"] for epoch in range(4) for r in flow_grpo.epoch_prompts(train, config, epoch)]
    assert all(drawn.count(r["prompt"]) == 3 for r in train)  # 12 draws of 4 prompts, evenly
    Path("eval.jsonl").write_text('\ufeff{"prompt": "b \\"x\\"", "tag": "t"}\r\n\r\n', encoding="utf-8")
    config.eval_prompt_file = "eval.jsonl"
    train, held_out = flow_grpo.split_prompts(config)
    assert len(train) == 8 and held_out == [{"prompt": 'b "x"', "tag": "t"}]


def test_what_a_prompt_asks_for():
    for prompt in ('a "x y"', 'a “x y” and "z"', 'a "" then "x y"', 'a " " b "x y"'):
        assert flow_grpo.quoted_text(prompt) == "x y"
    for prompt in ("a sign", 'a "', 'a ""', 'a " "', 'say ""HELLO""'):
        with pytest.raises(flow_grpo.UserError, match="double quotes"):
            flow_grpo.quoted_text(prompt)


def write(lines, size, height):
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), height)
    image = Image.new("RGB", size, (240, 230, 200))
    for i, line in enumerate(lines):
        ImageDraw.Draw(image).text((8, 8 + i * 1.6 * height), line, font=font, fill=(20, 20, 90))
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(size[1], size[0], 3).permute(2, 0, 1).float() / 255


def test_ocr_reward_reads_small_signs():
    numbers = ["407", "83", "651", "902"]
    images = torch.stack([write([n], (64, 32), 16) for n in numbers])
    prompts = [f'a sign that says "{n}"' for n in numbers]
    assert flow_grpo.ocr_reward(images, prompts, [{}] * 4).tolist() == [1, 1, 1, 1]
    wrong = ['a "417"', 'a "7"', 'a “65”', 'a "118"']  # one of three; nothing alike; inside; nothing alike
    assert flow_grpo.ocr_reward(images, wrong, [{}] * 4).tolist() == pytest.approx([2 / 3, 0, 1, 0])
    assert flow_grpo.ocr_reward(torch.full((2, 3, 32, 64), 0.5), prompts[:2], [{}] * 2).tolist() == [0, 0]


def test_ocr_reward_finds_words_in_large_images():
    images = torch.stack([
        write(["Grand Hotel", "OPEN"], (256, 192), 28), write(["coffee"], (256, 192), 40), torch.rand(3, 192, 256),
    ])  # fmt: skip
    prompts = ['a "grand hotel"', 'a cup with "COFFEES"', 'a "word"']
    rewards = flow_grpo.ocr_reward(images, prompts, [{}] * 3)
    assert rewards.tolist() == pytest.approx([1, 1 - 1 / 7, 0])
    alone = [flow_grpo.ocr_reward(images[i : i + 1], prompts[i : i + 1], [{}]).item() for i in range(3)]
    assert alone == rewards.tolist()

# ---------------------------------------------------------------------------------------------------------------------
# GenEval, PickScore, CLIPScore: real models of random weights, in the hub's format.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def reward_folders(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("rewards")
    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    detector = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(
            backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
            dim_feedforward=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=30, num_labels=80,
        )
    )  # fmt: skip
    with torch.no_grad():  # sure of itself, with several objects a class: some above each threshold, some below
        detector.class_predictor.weight.mul_(150)
        detector.get_parameter("model.transformer_module.decoder.mask_predictor.mask_embedder.2.0.weight").mul_(100)
    detector.save_pretrained(folder / "detector")
    Mask2FormerImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "detector")

    words = ["<|startoftext|>", "<|endoftext|>", *map(chr, range(33, 127)), *(chr(c) + "</w>" for c in range(33, 127))]
    tokenizer = CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77)
    clip = CLIPConfig(
        text_config=dict(
            vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            bos_token_id=0, eos_token_id=1, pad_token_id=1,
        ),
        vision_config=dict(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
        ),
        projection_dim=16, logit_scale_init_value=3.0,
    )  # fmt: skip
    CLIPModel(clip).save_pretrained(folder / "pickscore")
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder / "pickscore")

    settings = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    preprocess = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "clip").mkdir()
    (folder / "clip" / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": settings, "preprocess_cfg": preprocess})
    )
    save_file(open_clip.model.CLIP(**settings).state_dict(), folder / "clip" / "open_clip_model.safetensors")
    return folder


@pytest.fixture
def reward_models(reward_folders, monkeypatch):
    monkeypatch.setattr(flow_grpo, "DETECTOR", str(reward_folders / "detector"))
    monkeypatch.setattr(flow_grpo, "DETECTOR_SIZE", {"shortest_edge": 64, "longest_edge": 128})
    monkeypatch.setattr(flow_grpo, "CLIP", f"local-dir:{reward_folders / 'clip'}")
    monkeypatch.setattr(flow_grpo, "CLIP_WEIGHTS", None)
    monkeypatch.setattr(flow_grpo, "PICKSCORE", str(reward_folders / "pickscore"))
    monkeypatch.setattr(flow_grpo, "PICKSCORE_PROCESSOR", str(reward_folders / "pickscore"))
    caches = flow_grpo.detector, flow_grpo.clip_model, flow_grpo.pickscore_model, flow_grpo.color_texts
    for cache in caches:
        cache.cache_clear()
    yield reward_folders
    for cache in caches:
        cache.cache_clear()


def pictures(n, height=40, width=48):
    """Images of 8-bit values, so that the same ones exist as PIL images."""
    g = torch.Generator().manual_seed(0)
    small = torch.rand(n, 3, height // 8, width // 8, generator=g)
    images = (torch.nn.functional.interpolate(small, size=(height, width), mode="bicubic").clamp(0, 1) * 255).round() / 255
    pils = [Image.fromarray((i.permute(1, 2, 0) * 255).round().byte().numpy()) for i in images]
    return images, pils


def test_pickscore_is_the_formula(reward_models):
    images, pils = pictures(3)
    prompts = ["a cat", "a very long prompt " * 30, ""]
    rewards = flow_grpo.pickscore_reward(images, prompts, [{}] * 3)
    model, processor = CLIPModel.from_pretrained(reward_models / "pickscore"), CLIPProcessor.from_pretrained(reward_models / "pickscore")
    with torch.no_grad():
        for reward, prompt, pil in zip(rewards, prompts, pils):
            pixels = processor.image_processor(pil, return_tensors="pt")["pixel_values"]
            tokens = processor.tokenizer(prompt, truncation=True, max_length=77, return_tensors="pt")
            image = model.visual_projection(model.vision_model(pixels).pooler_output)[0]
            text = model.text_projection(model.text_model(**tokens).pooler_output)[0]
            cosine = (image @ text / image.norm() / text.norm()).item()
            assert reward.item() == pytest.approx(math.exp(3) * cosine / 26, abs=2e-3)
    alone = torch.cat([flow_grpo.pickscore_reward(images[i : i + 1], prompts[i : i + 1], [{}]) for i in range(3)])
    assert torch.allclose(alone, rewards, atol=1e-5)


def test_clipscore_is_the_cosine(reward_models):
    images, pils = pictures(3)
    prompts = ["a cat", "two dogs", 'a sign that says "7"']
    rewards = flow_grpo.clipscore_reward(images, prompts, [{}] * 3)
    name = flow_grpo.CLIP
    model, _, transform = open_clip.create_model_and_transforms(name)
    with torch.no_grad():
        image = model.eval().encode_image(torch.stack([transform(p) for p in pils]))
        text = model.encode_text(open_clip.get_tokenizer(name)(prompts))
    expected = torch.nn.functional.cosine_similarity(image, text)
    assert expected.std() > 1e-3 and torch.allclose(rewards, expected, atol=2e-3)
    alone = torch.cat([flow_grpo.clipscore_reward(images[i : i + 1], prompts[i : i + 1], [{}]) for i in range(3)])
    assert torch.allclose(alone, rewards, atol=1e-5)


def test_clip_is_built_with_the_activation_that_openai_trained_it_with():
    from open_clip.transformer import QuickGELU

    model = open_clip.create_model(flow_grpo.CLIP, load_weights=False, device="meta")
    assert any(isinstance(m, QuickGELU) for m in model.modules())
    assert flow_grpo.CLIP_WEIGHTS in open_clip.list_pretrained_tags_by_model(flow_grpo.CLIP)


def test_detections_follow_the_benchmarks_rules(reward_models):
    images, pils = pictures(4)
    records = [{"tag": "counting"}, {"tag": "colors"}, {"tag": "counting"}, {}]
    found = flow_grpo.detect(images, records)
    for i in range(4):
        alone = flow_grpo.detect(images[i : i + 1], records[i : i + 1])[0]
        assert alone.keys() == found[i].keys() and all(torch.equal(a[0], b[0]) for a, b in zip(alone.values(), found[i].values()))
    model = Mask2FormerForUniversalSegmentation.from_pretrained(reward_models / "detector").eval()
    processor = Mask2FormerImageProcessor(size=flow_grpo.DETECTOR_SIZE)
    seen = {True: 0, False: 0}
    for record, image, pil, objects in zip(records, images, pils, found):
        pixels = processor(image, do_rescale=False, return_tensors="pt")["pixel_values"]
        assert torch.allclose(pixels, processor(pil, return_tensors="pt")["pixel_values"], atol=0.02)
        with torch.no_grad():
            out = model(pixels)
        probabilities = out.class_queries_logits[0].softmax(1)[:, :80]
        masks = torch.nn.functional.interpolate(out.masks_queries_logits, (40, 48), mode="bilinear")[0].numpy()
        pairs = sorted(((p.item(), q, c) for q, row in enumerate(probabilities) for c, p in enumerate(row)), reverse=True)[:30]
        threshold, expected = 0.9 if record.get("tag") == "counting" else 0.3, {}
        for probability, q, c in pairs:
            mask = masks[q] > 0
            if mask.any():
                score = probability * (1 / (1 + np.exp(-masks[q][mask]))).mean()
                ys, xs = np.nonzero(mask)
                if score > threshold:
                    expected.setdefault(c, []).append((score, (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)))
        assert {name for c in expected for name in flow_grpo.COCO[c]} == set(objects)
        for c, items in expected.items():
            boxes = [list(map(float, box)) for _, box in sorted(items, key=lambda item: -item[0])[:16]]
            got = objects[flow_grpo.COCO[c][0]][0].tolist()
            assert len(got) == len(boxes) and np.abs(np.array(got) - np.array(boxes)).max() <= 1
            seen[record.get("tag") == "counting"] += len(boxes)
    assert seen[True] and seen[False]


def test_an_object_of_each_class_at_most_sixteen(reward_models, monkeypatch):
    """Twenty sure objects of one class: the sixteen surest count."""

    class Sure(torch.nn.Module):
        device, dtype = torch.device("cpu"), torch.float32

        def forward(self, pixels):
            logits, masks = torch.zeros(1, 20, 81), torch.full((1, 20, 16, 16), -9.0)
            for q in range(20):
                logits[0, q, 3] = 9 + q / 10
                masks[0, q, :, q % 16] = 9
            return Mock(class_queries_logits=logits, masks_queries_logits=masks)

    _, processor = flow_grpo.detector()
    monkeypatch.setattr(flow_grpo, "detector", lambda: (Sure(), processor))
    boxes, masks = flow_grpo.detect(torch.zeros(1, 3, 16, 16), [{}])[0]["motorcycle"]
    assert boxes.shape == (16, 4) and masks.shape == (16, 16, 16)
    assert boxes[0].tolist() == [3, 0, 4, 16]  # query 19


def test_colors_are_named_by_clip_on_each_objects_crop(reward_models, monkeypatch):
    images, pils = pictures(2, 64, 64)
    masks = torch.zeros(2, 2, 64, 64, dtype=torch.bool)
    masks[0, 0, 5:40, 10:30] = masks[0, 1, 20:60, 33:60] = masks[1, 0, 0:30, 0:64] = True
    masks[0, 0, 5:10, 10:15] = False  # no rectangle: the background shows
    boxes = torch.tensor([[[10, 5, 30, 40], [33, 20, 60, 60]], [[0, 0, 64, 30], [0, 0, 1, 1]]]).float()
    found = [{"bench": (boxes[0], masks[0])}, {"bench": (boxes[1, :1], masks[1, :1])}]
    monkeypatch.setattr(flow_grpo, "detect", lambda images, records: found)

    seen, embed = [], flow_grpo.clip_images
    monkeypatch.setattr(flow_grpo, "clip_images", lambda crops: (seen.extend(crops), embed(crops))[1])

    model, _, transform = open_clip.create_model_and_transforms(flow_grpo.CLIP)
    tokenizer = open_clip.get_tokenizer(flow_grpo.CLIP)
    names, pixels = [], []
    for i, j in [(0, 0), (0, 1), (1, 0)]:
        grey = Image.new("RGB", (64, 64), "#999")
        crop = Image.composite(pils[i], grey, Image.fromarray(masks[i, j].numpy())).crop(boxes[i, j].tolist())
        pixels.append(torch.frombuffer(bytearray(crop.tobytes()), dtype=torch.uint8).view(crop.height, crop.width, 3) / 255)
        with torch.no_grad():
            image = model.eval().encode_image(transform(crop)[None])
            scores = []
            for color in flow_grpo.COLORS:
                texts = [f"a photo of a {color} bench", f"a photo of a {color}-colored bench", f"a photo of a {color} object"]
                embeddings = torch.nn.functional.normalize(model.encode_text(tokenizer(texts)), dim=1)
                scores.append(torch.nn.functional.cosine_similarity(image, embeddings.mean(0, keepdim=True)).item())
        names.append(flow_grpo.COLORS[int(np.argmax(scores))])

    def record(count, color):
        return {"tag": "colors", "include": [{"class": "bench", "count": count, "color": color}]}

    other = next(c for c in flow_grpo.COLORS if c not in names)
    for first, second in [(names[0], names[2]), (other, other)]:
        scores, correct = flow_grpo.geneval_verdicts(images, [record(2, first), record(1, second)])
        share = sum(n == first for n in names[:2]) / 2
        assert scores.tolist() == pytest.approx([(1 + share) / 2, (1 + (second == names[2])) / 2])
        assert correct.tolist() == [share == 1, second == names[2]]
    for crop, expected in zip(seen[:3], pixels):
        assert torch.allclose(crop, expected.permute(2, 0, 1), atol=1e-6)
    none = [record(3, names[0]), record(2, names[2])]  # too few objects: no colour is asked for
    monkeypatch.setattr(flow_grpo, "clip_images", None)
    assert flow_grpo.geneval_verdicts(images, none)[0].tolist() == pytest.approx([(2 / 3) / 2, 0.5 / 2])


def benchmark(record, boxes, color_of):
    """GenEval's verdict, restated from its paper and code without a look at ours."""
    groups = []
    for clause in record.get("include", []):
        chosen = list(boxes.get(clause["class"], []))[: clause["count"]]
        good = len(chosen) == clause["count"]
        if good and "color" in clause:
            good = [color_of(clause["class"], k) for k in range(len(chosen))].count(clause["color"]) >= clause["count"]
        if good and "position" in clause:
            relation, target = clause["position"]
            good = groups[target] is not None
            for a in chosen if good else []:
                for b in groups[target]:
                    a_box, b_box = np.array(a, dtype=float).reshape(2, 2), np.array(b, dtype=float).reshape(2, 2)
                    offset = a_box.mean(0) - b_box.mean(0)
                    margin = 0.1 * (np.ptp(a_box, axis=0) + np.ptp(b_box, axis=0))
                    rest = np.sign(offset) * np.clip(np.abs(offset) - margin, 0, None)
                    unit = rest / np.linalg.norm(offset) if rest.any() else rest
                    axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[relation]
                    good = good and unit[axis] * sign > 0.5
        groups.append(chosen if good else None)
    return all(g is not None for g in groups) and not any(
        len(boxes.get(c["class"], [])) >= c["count"] for c in record.get("exclude", [])
    )


def reward_of_the_paper(record, boxes, color_of):
    """The mean over parts, restated; positions by the benchmark's own verdict on exact counts."""
    parts, exact = [], []
    for i, clause in enumerate(record["include"]):
        found = len(boxes.get(clause["class"], []))
        parts.append(max(0, 1 - abs(found - clause["count"]) / clause["count"]))
        exact.append(found == clause["count"])
        if "color" in clause:
            hits = sum(color_of(clause["class"], k) == clause["color"] for k in range(found)) if exact[-1] else 0
            parts.append(hits / clause["count"])
        if "position" in clause:
            pair = {"include": [record["include"][clause["position"][1]], clause]}
            parts.append(float(all(exact) and benchmark(pair, boxes, color_of)))
    return sum(parts) / len(parts)


def random_scene(rng, tag):
    classes = rng.sample([names[0] for names in flow_grpo.COCO], 3)
    count = rng.randint(1, 4) if tag == "counting" else rng.choice([1, 1, 1, 2])
    include = [{"class": classes[0], "count": count}]
    if tag in ("two_object", "position", "color_attr"):
        include.append({"class": classes[1], "count": rng.choice([1, 1, 1, 2])})
    if tag in ("colors", "color_attr"):
        for clause in include:
            clause["color"] = rng.choice(flow_grpo.COLORS[:3])
    if tag == "position":
        include[1]["position"] = [rng.choice(flow_grpo.POSITIONS), 0]
    record = {"tag": tag, "include": include, "prompt": "p"}
    if tag == "counting":
        record["exclude"] = [{"class": classes[0], "count": count + 1}]
    boxes = {}
    for name in classes:
        for _ in range(rng.choice([0, 1, 1, 1, 2, 2, 3, 5])):
            x, y = rng.randint(0, 20) * 20, rng.randint(0, 20) * 20  # a grid: ties and zero offsets occur
            boxes.setdefault(name, []).append((x, y, x + rng.randint(1, 8) * 20, y + rng.randint(1, 8) * 20))
    colors = {(n, k): rng.choice(flow_grpo.COLORS[:3]) for n in classes for k in range(5)}
    return record, boxes, colors


@pytest.mark.parametrize("tag", ["single_object", "two_object", "counting", "colors", "position", "color_attr"])
def test_geneval_score_on_random_scenes(tag):
    rng, verdicts = random.Random(tag), set()
    for _ in range(1000):
        record, boxes, colors = random_scene(rng, tag)
        asked = []

        def color_of(name, k):
            asked.append((name, k))
            return colors[name, k]

        score, correct = flow_grpo.geneval_score(record, boxes, color_of)
        questions = asked.copy()
        judged = {c["class"]: c["count"] for c in record["include"] if "color" in c}
        assert len(set(questions)) == len(questions) and all(k < judged[name] for name, k in questions)
        assert correct == benchmark(record, boxes, lambda name, k: colors[name, k]), record
        assert score == pytest.approx(reward_of_the_paper(record, boxes, lambda name, k: colors[name, k])), record
        verdicts.add((correct, score == 1))
    assert (True, True) in verdicts and (False, False) in verdicts
    assert (tag == "counting") == ((True, False) not in verdicts)  # too many objects: right for the benchmark alone


def test_positions_at_the_thresholds():
    box = (100, 100, 200, 200)

    def where(dx, dy, size=100):
        return flow_grpo.relative_positions((100 + dx, 100 + dy, 100 + size + dx, 100 + size + dy), box)

    assert where(-300, 0) == ["left of"] and where(300, 0) == ["right of"]
    assert where(0, -300) == ["above"] and where(0, 300) == ["below"]
    assert where(0, 0) == where(20, -20) == where(20.0009, 0) == []  # 0.1 * (100 + 100) is taken off
    assert where(21, 0) == [] and where(40, 0) == [] and where(40.1, 0) == ["right of"]  # (40 - 20) / 40 is not > 0.5
    assert where(-300, 300) == ["left of", "below"]  # (300 - 20) / 424 = 0.66 on both
    assert where(300, 180) == ["right of"]  # 160 / 350 = 0.46


def test_geneval_score_by_hand():
    judge = flow_grpo.geneval_score
    one, two = [(0, 0, 9, 9)], [(0, 0, 9, 9), (50, 0, 59, 9)]
    clock = {"include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}]}
    for n, expected in [(0, (0, False)), (1, (0.5, False)), (2, (1, True)), (3, (0.5, False)), (4, (0, False)), (9, (0, False))]:
        assert judge(clock, {"clock": one * n}) == expected
    assert judge({"include": clock["include"]}, {"clock": one * 3}) == (0.5, True)  # the benchmark lets more pass
    red = {"include": [{"class": "car", "count": 2, "color": "red"}]}
    assert judge(red, {"car": two}, lambda name, i: ["red", "blue"][i]) == (0.75, False)
    assert judge(red, {"car": two}, lambda name, i: "red") == (1, True)
    assert judge(red, {"car": two + one}, lambda name, i: ["red", "red", "no"][i]) == (0.25, True)
    assert judge(red, {"car": one}, None) == (0.25, False)  # too few: no colour is asked for
    with pytest.raises(ValueError, match="color_of"):
        judge(red, {"car": two})
    nulls = {"include": [{"class": "car", "count": 1, "color": None, "position": None}]}
    assert judge(nulls, {"car": one}) == (1, True)
    beside = {"include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["right of", 0]}]}
    assert judge(beside, {"dog": two[:1], "cat": two[1:]}) == (1, True)
    assert judge(beside, {"dog": two[1:], "cat": two[:1]}) == (2 / 3, False)
    assert judge(beside, {"cat": two[:1]}) == (pytest.approx(1 / 3), False)
    assert judge(beside, {"dog": [two[0]] * 2, "cat": two[1:]}) == (pytest.approx(1 / 3), True)


GENEVAL = """\
{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
{"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}], "prompt": "a photo of two clocks"}
{"tag": "colors", "include": [{"class": "computer mouse", "count": 1, "color": "red"}], "prompt": "a photo of a red computer mouse"}
{"tag": "position", "include": [{"class": "banana", "count": 1}, {"class": "suitcase", "count": 1, "position": ["left of", 0]}], "prompt": "a photo of a suitcase left of a banana"}
"""


def test_two_epochs_with_a_weighted_sum(model, work, reward_models, capsys):
    Path("geneval.jsonl").write_text(GENEVAL)
    reward = "geneval=0.7, pickscore=0.3,clipscore=-1,rewards.py:red=2"
    flags = arguments(model, reward=reward, prompt_file="geneval.jsonl", eval_prompt_file="geneval.jsonl", epochs=2,
                      prompts_per_epoch=4)  # fmt: skip
    assert flow_grpo.main(flags) == 0
    lines = metrics()
    for line, prefix in [(lines[0], "eval_"), (lines[1], ""), (lines[-1], "eval_")]:
        parts = [line[prefix + name] for name in ("geneval", "pickscore", "clipscore", "rewards.red")]
        assert line[prefix + "reward"] == pytest.approx(np.dot(parts, [0.7, 0.3, -1, 2]), abs=1e-5)
        tags = ("single_object", "counting", "colors", "position")
        assert line[prefix + "geneval"] == pytest.approx(np.mean([line[f"{prefix}geneval/{t}"] for t in tags]))
        overall = np.mean([line[f"{prefix}geneval_correct/{t}"] for t in tags])
        assert line[prefix + "geneval_overall"] == pytest.approx(overall)
    output = capsys.readouterr().out
    assert "held-out geneval_correct:" in output and "held-out pickscore:" in output
    assert json.loads(Path("out/config.json").read_text())["reward"] == reward


def test_the_default_reward_follows_the_prompts(model, work, reward_models, capsys):
    def chosen(*args):
        capsys.readouterr()
        config = flow_grpo.configure(["--model", str(model), *args])[0]
        return config.reward, capsys.readouterr().out

    reward, said = chosen("--prompt-file", "prompts.txt")
    assert reward == "ocr" and "every prompt quotes a text" in said
    Path("mixed.txt").write_text('a "1"\na cat\n')
    for args in (["--prompt-file", "mixed.txt"], ["--prompt-file", "prompts.txt", "--eval-prompt-file", "mixed.txt"]):
        reward, said = chosen(*args)
        assert reward == "pickscore" and "a cat" in said


@pytest.mark.parametrize("clause, words", [
    ('{"class": "unicorn", "count": 1}', ["'unicorn'", "COCO"]),
    ('{"class": "bench"}', ["count of bench is None"]),
    ('{"class": "bench", "count": 0}', ["count of bench is 0"]),
    ('{"class": "bench", "count": 1, "color": "mauve"}', ["'mauve'", "orange"]),
    ('{"class": "bench", "count": 1, "position": ["near", 0]}', ["near", "left of"]),
    ('{"class": "bench", "count": 1, "position": ["above", 1]}', ["earlier clause"]),
    ('{"class": "bench", "count": 1, "position": ["above", 0.0]}', ["earlier clause"]),
    ('{"class": ["bench"], "count": 1}', ["['bench']", "COCO"]),
    ("7", ["7", "COCO"]),
])  # fmt: skip
def test_a_record_that_geneval_cannot_judge_is_named(model, work, reward_models, capsys, clause, words):
    Path("bad.jsonl").write_text('\n{"include": [{"class": "bench", "count": 1}, %s], "prompt": "p"}\n' % clause)
    fails(arguments(model, reward="geneval", prompt_file="bad.jsonl"), capsys, "bad.jsonl, line 2", *words)
    fails(arguments(model, reward="geneval"), capsys, "prompts.txt, line 1", "include")


@pytest.mark.parametrize("reward, name", [("geneval", "mask2former"), ("pickscore", "PickScore_v1"), ("clipscore", "ViT-L-14")])
def test_a_reward_out_of_reach_ends_before_the_model_is_loaded(work, capsys, monkeypatch, tmp_path_factory, reward, name):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
    monkeypatch.setattr(flow_grpo, "load_pipeline", None)
    Path("geneval.jsonl").write_text(GENEVAL)
    fails(arguments("unused", reward=reward, prompt_file="geneval.jsonl"), capsys, name, "--reward", "network")


@pytest.mark.parametrize("reward", ["ocr=x", "ocr=nan", "ocr,ocr=2", "ocr,", "a/b.py:f,c/b.py:f", "=1"])
def test_bad_sums_of_rewards(model, work, capsys, reward):
    fails(arguments(model, reward=reward), capsys, "--reward", "geneval=0.7,pickscore=0.3")


def test_large_and_foreign_prompt_files(work):
    lines = [f'A street, "sign {i}"' for i in range(100_000)]
    Path("large.txt").write_bytes(("\ufeff" + "\r\n\r\n".join(lines)).encode())
    start = time.time()
    assert [r["prompt"] for r in flow_grpo.read_prompts("large.txt")] == lines
    Path("large.jsonl").write_bytes("\r\n".join(GENEVAL.splitlines() * 25_000).encode())
    records = flow_grpo.read_prompts("large.jsonl", [flow_grpo.check_geneval])
    assert len(records) == 100_000 and records[3]["include"][1]["position"] == ["left of", 0]
    assert time.time() - start < 20
    Path("separators.txt").write_text('a\u2028b "1"\n')  # a line ends at \\n alone
    assert len(flow_grpo.read_prompts("separators.txt")) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The bench.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(HERE / "bench")
    return importlib.import_module("throughput")


def test_bench_builds_sd35_medium_at_its_real_size(bench):
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**bench.SD35_TRANSFORMER)
        x, text = torch.empty(1, 16, 64, 64), flow_grpo.Text(torch.empty(1, 205, 4096), torch.empty(1, 2048))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            flow_grpo.predict_velocity(transformer, x, 0.5, text, text, 1.0)
    assert sum(p.numel() for p in transformer.parameters()) == pytest.approx(2.243e9, rel=1e-3)
    assert counter.get_total_flops() == pytest.approx(2.22e12, rel=0.01)


def test_bench_measures_both_loops(bench, capsys):
    sizes = dict(height=64, width=64, max_sequence_length=8, batch_size=2, prompts_per_epoch=1, group_size=4)

    def make_run(batch_size, compile=False, **switches):
        return bench.random_run(bench.SMALL_TRANSFORMER, flow_grpo.Config(compile=False, updates_per_epoch=1, **sizes, **switches))

    run = make_run(2)
    rollout, update = bench.needed_flops(run)
    assert rollout * (9 * 5) == update * (10 * 2)  # 2 passes a step drawn; 2 of the policy, a backward, 2 of the reference
    for loop in (bench.PlainLoop(run, None).epoch, functools.partial(bench.our_epoch, run)):
        seconds = loop(0)
        assert seconds["epoch"] == pytest.approx(sum(seconds[part] for part in ("rollout", "scoring", "update")), rel=0.01)
        assert seconds["rollout"] > 0 and seconds.get("deviation", 0) < 1e-5
    bench.table(make_run, [2], 1, 1e12)
    lines = capsys.readouterr().out.splitlines()
    loops = ["plain", "flow_grpo", "flow_grpo, compiled", "compiled, checkpointing"]
    assert [line.split("|")[0].strip() for line in lines[1:-1]] == loops


def test_bench_counts_memory(bench):
    with bench.Allocations([]) as counted:
        kept = torch.empty(1000, device="meta")
        view = (kept + 1).view(10, 100)
        assert counted.now == 8000
        del view
        kept = kept + 1
    assert counted.now == 4000 and counted.peak == 8000
    always, update, decoding = bench.count_memory(bench.weightless_run(checkpointing=False), 2)
    _, small_update, small_decoding = bench.count_memory(bench.weightless_run(checkpointing=True), 2)
    table = 384**2 * 1536  # of positions, beside the parameters
    assert always == pytest.approx(2 * (2.243 + table / 1e9 + 0.084) + 4 * 4 * 0.030, rel=0.002)  # GB; weights, adapter
    assert 0 < small_update < decoding < update and small_decoding == pytest.approx(decoding / 2, rel=0.1)
    assert update - small_update > 0.9 * 2 * 24 * 20 * 1229 * 1536 * 2 / 1e9  # at the least 20 activations a block, of 24


# ---------------------------------------------------------------------------------------------------------------------
# The embedded model, and a real run of it.
# ---------------------------------------------------------------------------------------------------------------------


def test_embedded_model_loads_plainly_and_draws_signs():
    folder = HERE / "tiny-sd3"
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 8e6
    pipe = stock(folder)
    bare = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    bare.set_progress_bar_config(disable=True)
    prompts = (HERE / "prompts.txt").read_text().splitlines()[:64]

    def draw(p, n, **kwargs):
        return p(
            prompts[:n], height=32, width=64, num_inference_steps=40, guidance_scale=1.0, output_type="pt",
            generator=[torch.Generator().manual_seed(i) for i in range(n)], **kwargs,
        ).images  # fmt: skip

    images = draw(pipe, 64, max_sequence_length=1)
    right = (flow_grpo.ocr_reward(images, prompts, [{}] * 64) == 1).float().mean()
    assert 0.4 < right < 0.8  # about six in ten
    assert torch.equal(images[:4], draw(bare, 64, max_sequence_length=1)[:4])


def test_default_run_is_the_embedded_model_and_learns(tmp_path, monkeypatch, capsys):
    """A short real run, through the command line, with the real reward: the held-out reward rises."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(HERE / "prompts.txt", tmp_path)
    Path("eval.txt").write_text("".join((tmp_path / "prompts.txt").read_text().splitlines(True)[:128]))
    Path("train.txt").write_text("".join((tmp_path / "prompts.txt").read_text().splitlines(True)[128:]))
    flags = ["--prompt-file", "train.txt", "--eval-prompt-file", "eval.txt", "--output-dir", "out"]
    flags += ["--epochs", "12", "--eval-every", "12", "--ema-interval", "1"]
    assert flow_grpo.main(flags + ["--learning-rate", "1e-3"]) == 0  # the default dips in the first epochs
    first_lines = capsys.readouterr().out.splitlines()
    assert "No CUDA GPU" in first_lines[0] and "tiny-sd3" in first_lines[0]
    assert "reward is ocr" in first_lines[1]
    before, after = metrics()[0], metrics()[-1]
    assert after["epoch"] == 12 and after["eval_reward"] > before["eval_reward"] + 0.02
    assert after["eval_ocr_accuracy"] > before["eval_ocr_accuracy"]
