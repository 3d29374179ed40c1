"""Tests of flow_grpo.py: no network. Those of the GPU's path need one; the rest run on the CPU everywhere."""

import gc
import inspect
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
import transformers as tr
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers import StableDiffusion3Pipeline as StockPipeline
from huggingface_hub.errors import GatedRepoError
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence
from torch.utils._pytree import tree_flatten
from torchvision.transforms.functional import to_tensor

import flow_grpo
from flow_grpo import gaussian_kl, group_advantages, grpo_loss, rollout, sde_step

HERE = Path(__file__).resolve().parent
SIGMAS10 = 1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0  # published, shift 3
V, X, GIVEN = torch.randn(3, 100, 4, 5, 6, generator=torch.Generator().manual_seed(0))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def hidden_gpu(request, monkeypatch):
    if not request.node.get_closest_marker("skipif"):  # Only the tests marked needs_gpu see the GPU.
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def seeded(seed=0, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


# ---- The method.
def policy(v, x, t, t_next, noise_level):
    """The paper's Gaussian, in float64; at t = 1 the noise scale has 1 - t_next for 1 - t, as in [C]."""
    sigma, v, x = noise_level * math.sqrt(t / (1 - (t_next if t == 1 else t))), v.double(), x.double()
    mean = x + (v + sigma**2 / (2 * t) * (x + (1 - t) * v)) * (t_next - t)
    return Normal(mean, torch.full_like(mean, sigma * math.sqrt(t - t_next)))


@pytest.mark.parametrize("level", [0.3, 0.7, 1.2])
def test_sde_step_is_the_papers_gaussian(level):
    t, t_next = torch.tensor(SIGMAS10[:10]), torch.tensor(SIGMAS10[1:])
    together = sde_step(V[:10], X[:10], t, t_next, level, GIVEN[:10])
    for k in range(10):  # each step by itself, and together, with a time for each image
        (v, x, x_next), step = (s[k : k + 1] for s in (V, X, GIVEN)), (*SIGMAS10[k : k + 2], level)
        pi = policy(v, x, *step)
        expected = x_next, pi.log_prob(x_next.double()).mean((1, 2, 3)), pi.mean, pi.stddev[:, :1, :1, :1]
        for got in (sde_step(v, x, *step, x_next), [r[k : k + 1] for r in together]):
            assert all(torch.allclose(r.double(), e.double(), 1e-4, 1e-5) for r, e in zip(got, expected))


def test_sde_step_draws_what_it_scores_and_differentiates_in_velocity():
    v, slope = V.clone().requires_grad_(), -0.1 * (1 + 0.7**2 * 0.6 / 0.4 * 0.4 / 1.2)  # d mean / d v
    for how in ({"x_next": GIVEN}, {"generator": seeded(1)}):  # Drawn or given, a sample is data.
        x_next, log_prob, mean, std = sde_step(v, X, 0.6, 0.5, 0.7, **how)
        expected = (x_next - mean.detach()) / std**2 * slope / v[0].numel()
        assert torch.allclose(torch.autograd.grad(log_prob.sum(), v)[0], expected, rtol=1e-4, atol=1e-7)
    z = (x_next - mean) / std
    assert abs(z.mean()) < 5 / math.sqrt(z.numel()) and abs(z.std() - 1) < 5 / math.sqrt(2 * z.numel())
    assert torch.equal(x_next, sde_step(V, X, 0.6, 0.5, 0.7, generator=seeded(1))[0])
    assert torch.equal(log_prob, sde_step(V, X, 0.6, 0.5, 0.7, x_next)[1])
    assert {r.dtype for r in sde_step(V.half(), X.bfloat16(), 0.6, 0.5, 0.7, GIVEN.half())} == {torch.float32}


def test_noise_level_zero_is_the_schedulers_euler_step_and_draws_nothing():
    scheduler, generator, x = FlowMatchEulerDiscreteScheduler(shift=3.0), seeded(), X
    times, states = flow_grpo.schedule(scheduler, 10), [generator.get_state(), torch.get_rng_state()]
    assert times == pytest.approx(SIGMAS10, abs=5e-5)
    for t, t_next, timestep in zip(times, times[1:], scheduler.timesteps):
        expected = scheduler.step(V, timestep, x, return_dict=False)[0]
        x, log_prob, mean, std = sde_step(V, x, t, t_next, 0.0, generator=generator)
        assert torch.allclose(x, expected, atol=1e-6) and torch.equal(x, mean)
        assert not std.any() and torch.equal(log_prob, torch.zeros(100))
    assert all(map(torch.equal, states, [generator.get_state(), torch.get_rng_state()]))
    assert torch.equal(sde_step(V, x, 0.5, 0.4, 0.0, GIVEN)[0], GIVEN)


@pytest.mark.parametrize("level", [0.0, 0.7, 1.0])
def test_sde_keeps_the_flows_marginals(level):
    """Data N(m, s^2) has a known velocity; x_t must be N((1-t) m, (1-t)^2 s^2 + t^2) at every noise level."""
    m, s, n, times, generator = 1.5, 0.4, 60_000, [1 - k / 400 for k in range(401)], seeded()

    def velocity(x, k):  # E[x_1 - x_0 | x_t]
        centred = (x - (1 - times[k]) * m) / ((1 - times[k]) ** 2 * s**2 + times[k] ** 2)
        return times[k] * centred - (m + (1 - times[k]) * s**2 * centred)

    path, _ = rollout(velocity, torch.randn(n, 1, 1, 1, generator=generator), times, level, generator)
    for k in (200, 300, 400):  # within 5 standard errors and the error of 400 steps
        mean, std = (1 - times[k]) * m, math.hypot((1 - times[k]) * s, times[k])
        assert abs(path[:, k].mean() - mean) < 5 * std / math.sqrt(n) + 0.005
        assert abs(path[:, k].std() - std) < 5 * std / math.sqrt(2 * n) + 0.01


def test_rollout_with_torch_alone():
    copied = dict(torch=torch, math=math, Tensor=torch.Tensor, Callable=Callable, Sequence=Sequence)
    for function in (sde_step, rollout, group_advantages, gaussian_kl, grpo_loss):
        exec(inspect.getsource(function), copied)
    times, levels, weight = [1.0, 0.7, 0.4, 0.0], [0.7, 0.0, 0.4], torch.tensor(0.3, requires_grad=True)
    path, log_probs = copied["rollout"](lambda x, k: weight * x + times[k], X, times, levels, seeded(2))
    assert path.shape == (100, 4, 4, 5, 6) and log_probs.shape == (100, 3) and torch.equal(path[:, 0], X)
    assert not path.requires_grad and not log_probs.requires_grad and not log_probs[:, 1].any()
    for k in (0, 2):
        pi = policy(0.3 * path[:, k] + times[k], path[:, k], times[k], times[k + 1], levels[k])
        expected = pi.log_prob(path[:, k + 1].double()).mean((1, 2, 3))
        assert torch.allclose(log_probs[:, k].double(), expected, rtol=1e-4)
    assert torch.allclose(path[:, 2], path[:, 1] - 0.3 * (0.3 * path[:, 1] + 0.7), atol=1e-6)


def test_group_advantages():
    rewards = torch.tensor([[0.0, 1.0, 0.5, 0.5], [0.9, 0.7, 0.8, 0.8], [1 / 3] * 4])
    centred = rewards.double() - rewards.double().mean(1, keepdim=True)
    std, own = rewards.double().std(correction=0), (centred**2).mean(1, keepdim=True).sqrt()
    assert torch.allclose(group_advantages(rewards).double(), centred / (std + 1e-4), atol=1e-6)
    assert torch.allclose(group_advantages(rewards, False).double(), centred / (own + 1e-4), atol=1e-6)
    outlier = torch.tensor([[0.0] * 99 + [1.0]])
    assert not group_advantages(rewards)[2].any() and not group_advantages(rewards[2:], False).any()
    assert group_advantages(outlier).max() == 5 and group_advantages(-outlier, clip=2.0).min() == -2


def test_gaussian_kl_is_torchs_and_the_papers_closed_form():
    std, t, t_next, sigma = GIVEN[:, :1, :1, :1].abs() + 0.1, 0.6, 0.45, 0.7 * math.sqrt(0.6 / 0.4)
    expected = kl_divergence(*(Normal(m.double(), std.double().expand_as(m)) for m in (V, X)))
    assert torch.allclose(gaussian_kl(V, X, std).double(), expected.mean((1, 2, 3)), rtol=1e-5)
    (_, _, mean, std), (_, _, ref_mean, _) = (sde_step(v, X, t, t_next, 0.7) for v in (V, GIVEN))
    expected = (t - t_next) / 2 * (sigma * (1 - t) / (2 * t) + 1 / sigma) ** 2 * (V - GIVEN) ** 2
    assert torch.allclose(gaussian_kl(mean, ref_mean, std), expected.mean((1, 2, 3)), rtol=1e-4)


def test_loss_and_its_gradient_on_both_sides_of_the_clip():
    log_ratio = torch.tensor([-0.2, -0.05, 0.05, 0.2, -0.2, -0.05, 0.05, 0.2], requires_grad=True)
    a, kl = torch.tensor([2.0] * 4 + [-2.0] * 4), torch.linspace(1, 8, 8).requires_grad_()
    loss, stats = grpo_loss(0.3 + log_ratio, torch.full((8,), 0.3), a, kl, 0.1, 0.5)
    loss.backward()
    r, flat = log_ratio.detach().exp(), torch.tensor([0, 0, 0, 1, 1, 0, 0, 0]).bool()  # beyond the clip
    assert torch.allclose(log_ratio.grad, torch.where(flat, 0, -a * r / 8), rtol=1e-4)
    surrogate = -2 * (r[:3].sum() + 1.1 - 0.9 - r[5:].sum()).item() / 8
    expected = dict(ratio_mean=r.mean().item(), clipfrac=0.5, approx_kl=(0.2**2 + 0.05**2) / 4)
    expected |= dict(policy_loss=surrogate, kl=4.5)
    assert {name: s.item() for name, s in stats.items()} == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(surrogate + 0.5 * 4.5) and (kl.grad == 0.5 / 8).all()


# ---- Small random models in the hub's format, and runs of them.
def save_random_pipeline(folder: Path, t5=True, pooled=(16, 16), joint=32, channels=4, blocks=2, **sizes):
    torch.manual_seed(0)
    words = ["<|startoftext|>", "<|endoftext|>", *(chr(c) + e for e in ("", "</w>") for c in range(33, 127))]
    tokenizer = tr.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=12)
    small = dict(vocab_size=len(words), hidden_size=16, intermediate_size=16, max_position_embeddings=12)
    small |= dict(num_hidden_layers=2, num_attention_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    clips = [tr.CLIPTextModelWithProjection(tr.CLIPTextConfig(**small, projection_dim=n)) for n in pooled]
    for encoder in clips:
        torch.nn.init.normal_(encoder.text_model.embeddings.token_embedding.weight)
    t5_config = tr.T5Config(vocab_size=4, d_model=joint, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>", "▁")]
    t5_parts = tr.T5EncoderModel(t5_config), tr.T5TokenizerFast(vocab=pieces, extra_ids=0)
    sizes = dict(
        sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16,
        pos_embed_max_size=8, patch_size=2, in_channels=channels, out_channels=channels, qk_norm="rms_norm",
        joint_attention_dim=joint, pooled_projection_dim=sum(pooled), dual_attention_layers=(0,),
    ) | sizes  # fmt: skip
    autoencoder = AutoencoderKL(
        block_out_channels=(8,) * blocks, down_block_types=("DownEncoderBlock2D",) * blocks, shift_factor=0.1,
        up_block_types=("UpDecoderBlock2D",) * blocks, latent_channels=channels, norm_num_groups=4,
        scaling_factor=1.2, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    network, scheduler = SD3Transformer2DModel(**sizes), FlowMatchEulerDiscreteScheduler(shift=3.0)
    encoders = clips[0], tokenizer, clips[1], tokenizer, *(t5_parts if t5 else (None, None))
    StockPipeline(network, scheduler, autoencoder, *encoders).save_pretrained(folder)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    for name in ("without-T5", "with-T5"):
        save_random_pipeline(tmp_path_factory.getbasetemp() / name, name == "with-T5")
    return tmp_path_factory.getbasetemp() / "with-T5"


REWARDS = """
import torch
number, scale = 3, torch.nn.Parameter(torch.ones(()))
two = lambda images, *texts: {"first": red(images, *texts), "second": [0.25] * len(images)}
nan = lambda images, prompts, _: [float("nan") if '"5"' in p and images.any() else 1.0 for p in prompts]
wide, twice = lambda images, *_: torch.zeros(len(images), 2), lambda *_: {"reward": [0.0]}
nothing, broken, leaves = lambda *_: {}, lambda *_: 1 / 0, lambda *_: exit(0)
greedy = lambda images, *texts: [red(images, *texts), images.zero_(), *map(list.clear, texts)][0]
def check(record):
    if "ugly" in record["prompt"]:
        raise ValueError("ugly things can't be judged")
def red(images, prompts, records):  # numpy() refuses what has a gradient
    assert [r["prompt"] for r in records] == prompts and 0 <= images.min() and images.max() <= 1
    return (scale.to(images.device) * (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))).cpu().numpy()
"""
SMALL = dict(
    reward="rewards.py:red", epochs=3, prompts_per_epoch=2, group_size=4, batch_size=3, guidance_scale=2.0,
    height=16, width=16, max_sequence_length=5, learning_rate=1e-2, eval_every=2, lora_rank=4, ema_interval=1,
)  # fmt: skip
WINDOW = dict(sde_steps=3, sde_range=5, guidance_scale=1.0, ema_interval=2)  # It is drawn anew each epoch.


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flow_grpo, "EVAL_STEPS", 4)
    Path("rewards.py").write_text(REWARDS)
    write("prompts.txt", *(f'a "{i}"' for i in range(8)))


def arguments(model, out="out", **given):
    flags = {"prompt_file": "prompts.txt", "model": model, "output_dir": out} | SMALL | given
    return [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]


def small_run(model, active=True, dtype=None, **given):
    config, pipe = flow_grpo.settings(model=str(model), **SMALL | given), flow_grpo.load_pipeline(str(model))
    pipe.transformer.to(dtype or pipe.transformer.dtype)
    records, generator = [{"prompt": f'a "{i}"'} for i in range(8)], seeded(1)
    run = flow_grpo.prepare(config, pipe, flow_grpo.load_rewards(config.reward), records[:4], records[4:])
    for p, average in zip(run.parameters, run.ema.shadow_params) if active else ():
        average.copy_(p.data.copy_(torch.randn(p.shape, generator=generator) * 0.1))
    return run


def metrics(out="out"):
    return list(map(json.loads, Path(out, "metrics.jsonl").read_text().splitlines()))


def stock_images(model, run, lora=None, kind="pt", **how):
    how |= {"text_encoder_3": None, "tokenizer_3": None} if model.name == "without-T5" else {}
    c, pipe = run.config, StockPipeline.from_pretrained(model, **how).to(run.device)
    if lora:
        pipe.load_lora_weights(lora)
    sizes = dict(height=c.height, width=c.width, max_sequence_length=c.max_sequence_length, output_type=kind)
    sizes |= dict(guidance_scale=c.guidance_scale, num_inference_steps=4, generator=[*map(seeded, range(4))])
    return pipe([r["prompt"] for r in run.eval_records], **sizes).images


# ---- Sampling and training.
@pytest.mark.parametrize("name, guidance", [("with-T5", 1.0), ("with-T5", 3.5), ("without-T5", 3.5)])
def test_evaluation_draws_what_the_stock_pipeline_draws(model, work, name, guidance):
    folder, run = model.with_name(name), small_run(model.with_name(name), guidance_scale=guidance)
    plain, trained = stock_images(folder, run), [p.detach().clone() for p in run.parameters]
    run.ema.shadow_params = [0 * p for p in trained]  # not the trained adapter, but the average
    assert torch.allclose(flow_grpo.evaluate(run)[1], plain, atol=1e-4) and plain.std() > 0.01
    run.ema.shadow_params = [1.5 * p for p in trained]
    means, images = flow_grpo.evaluate(run)
    flow_grpo.save(run, Path())
    Path(".pytorch_lora_weights.safetensors.new").write_bytes(b"cut short by a kill")
    expected = stock_images(folder, run, ".")
    assert torch.allclose(images, expected, atol=1e-4) and not torch.allclose(images, plain, atol=1e-2)
    red = (expected[:, 0] - expected[:, 1:].mean(1)).mean().item()
    assert means == pytest.approx({"eval_reward": red, "eval_rewards.red": red}, abs=1e-4)
    assert all(map(torch.equal, trained, run.parameters)) and images.shape == (4, 3, 16, 16)


def objective(run, samples, chosen, advantages, old=None):
    """Log-probs [N, S] of the chosen images, [P]'s loss with [C]'s KL, its two parts, and clipfrac."""
    c, net, log_probs, kls = run.config, run.pipe.transformer, [], []
    text = flow_grpo.encode(run.pipe, [samples.records[i]["prompt"] for i in chosen], 5, "cpu")
    for k, (t, t_next) in enumerate(zip(samples.times, samples.times[1:])):
        known = net, (x := samples.latents[chosen, k]), t, text, run.null_text, c.guidance_scale
        v = flow_grpo.predict_velocity(*known)
        net.disable_adapters()
        v_ref = flow_grpo.predict_velocity(*known).detach()
        net.enable_adapters()
        pi, reference = (policy(u, x, t, t_next, c.noise_level) for u in (v, v_ref))
        log_probs.append(pi.log_prob(samples.latents[chosen, k + 1].double()).mean((1, 2, 3)))
        kls.append(((pi.mean - reference.mean) ** 2 / (2 * pi.stddev**2 / (t - t_next))).mean((1, 2, 3)))
    log_probs, kl, a = torch.stack(log_probs, 1), torch.stack(kls, 1).mean(), advantages[:, None]
    r = (log_probs - (log_probs.detach() if old is None else old)).exp()
    surrogate = -torch.minimum(r * a, r.clamp(1 - c.clip_range, 1 + c.clip_range) * a).mean()
    clipped = ((r - 1).abs() > c.clip_range).double().mean()
    return log_probs.detach(), surrogate + c.beta * kl, surrogate, kl, clipped


@pytest.mark.parametrize("name, steps, place, scale", [("with-T5", 9, 9, 1.0), ("without-T5", 3, 5, 2.0**10)])
def test_an_updates_gradient_is_the_papers(model, work, monkeypatch, name, steps, place, scale):
    """Two updates with KL and guidance. Images without an advantage are dropped, batches are filled up."""
    given = dict(prompts_per_epoch=4, learning_rate=0.03, clip_range=2e-4, beta=0.3)
    run, done, modes = small_run(model.with_name(name), sde_steps=steps, sde_range=place, **given), [], []
    run.scaler = torch.amp.GradScaler("cpu", scale, enabled=scale > 1)
    samples, original = flow_grpo.collect(run, seeded()), flow_grpo.optimizer_step
    r = torch.tensor([[0.2, 0.9, 0.7, 0.1], [0.1] * 4, [1.0, 0.5, 0.5, 0.0], [0.3, 0.0, 0.6, 0.8]])
    samples = samples._replace(columns={"reward": r.flatten()})
    advantages = ((r - r.mean(1, keepdim=True)) / (r.std(correction=0) + 1e-4)).flatten()
    log_probs = objective(run, samples, range(16), advantages)[0]
    assert torch.allclose(samples.log_probs.double(), log_probs, atol=1e-5) and log_probs.shape == (16, steps)

    def capture(run):
        gradient = torch.cat([p.grad.flatten() for p in run.parameters]) / scale
        done.append(([p.detach().clone() for p in run.parameters], gradient))
        return original(run)

    monkeypatch.setattr(flow_grpo, "optimizer_step", capture)
    run.pipe.transformer.register_forward_pre_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    stats = flow_grpo.update(run, samples, seeded(5))
    assert sum(modes) == 4 * steps and len(modes) == 4 * 4 * steps  # no graph without text or adapter
    kept = torch.tensor([0, 1, 2, 3, 8, 11, 12, 13, 14, 15])[torch.randperm(10, generator=seeded(5))]
    expected = []
    for chosen, (adapter, gradient) in zip(kept.split(5), done):
        torch._foreach_copy_([p.data for p in run.parameters], adapter)
        _, loss, *parts = objective(run, samples, chosen, advantages[chosen], log_probs[chosen])
        whole = torch.cat([g.flatten() for g in torch.autograd.grad(loss, run.parameters)])
        assert (gradient - whole).norm() < 1e-3 * whole.norm()
        expected.append(torch.stack([*parts, whole.norm()]).detach())
    means = pytest.approx(torch.stack(expected).mean(0).tolist(), rel=1e-3, abs=1e-7)
    assert [stats[name] for name in ("policy_loss", "kl", "clipfrac", "grad_norm")] == means
    assert expected[0][2] == 0 and 0.2 < expected[1][2] < 1 and stats["ratio_deviation"] < 1e-5
    assert len(done) == run.updates == 2 and stats["trained"] == 10 / 16 and stats["skipped_updates"] == 0


def test_first_update_trains_the_adapter_alone_with_ratios_of_one(model, work):
    run = small_run(model, active=False)
    net, layer = run.pipe.transformer, run.pipe.transformer.transformer_blocks[0].attn.to_q
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    trained = {n for n, p in net.named_parameters() if p.requires_grad and p.dtype == torch.float32}
    ends = "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"
    places = [f"transformer_blocks.{i}.attn.{end}" for i in (0, 1) for end in ends]
    assert {n.split(".lora_")[0] for n in trained} == set(places[:-1])  # The last block has no to_add_out.
    assert any("attn2.to_q" in n for n in before) and len(trained) == len(run.parameters)
    assert layer.scaling == {"default": 2.0} and layer.lora_A["default"].weight.shape == (4, 16)
    std = torch.cat([p.flatten() for n, p in before.items() if "lora_A" in n]).std().item()
    assert std == pytest.approx(1 / 4, rel=0.1) and not layer.lora_B["default"].weight.any()
    samples = flow_grpo.collect(run, seeded())
    assert flow_grpo.update(run, samples, seeded())["ratio_deviation"] < 1e-5
    changed = {n for n, p in net.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n in trained if "blocks.0" in n} <= changed <= trained
    shifted = samples._replace(log_probs=samples.log_probs - 2.0)
    assert flow_grpo.update(run, shifted, seeded())["ratio_deviation"] > 5  # It can fail.
    stats = flow_grpo.update(run, samples._replace(columns={"reward": torch.full((8,), 0.1)}), seeded())
    assert stats == dict(grad_norm=0, skipped_updates=0, ratio_deviation=0, trained=0) and run.updates == 4


def test_prompts_images_and_scores_belong_together(model, work):
    run = small_run(model, sde_steps=10, sde_range=10, reward="rewards.py:red=2,rewards.py:two=-0.5")
    encode, encoded, events, orders = run.pipe.encode_prompt, [], [], []
    run.pipe.encode_prompt = lambda prompts, *a, **k: encoded.append(prompts) or encode(prompts, *a, **k)
    run.pipe.transformer.register_forward_pre_hook(lambda *_: events.append("drawn"))

    def judge(images, prompts, metadata):
        events.append(prompts)
        time.sleep(0.1)  # A batch is judged while the next is drawn.
        events.append("ends")
        return [torch.is_grad_enabled()] * len(images)

    run.rewards.append(("judge", 1.0, judge, None))
    samples = flow_grpo.collect(run, seeded())
    flow_grpo.update(run, samples, seeded())
    prompts = [r["prompt"] for r in samples.records]
    assert [sorted(e) for e in encoded] == [sorted(set(prompts))]  # each once
    assert [p for event in events if isinstance(event, list) for p in event] == prompts
    assert "drawn" in events[events.index(prompts[:3]) : events.index("ends")] and events.count("ends") == 3
    images = (run.pipe.vae.decode(samples.latents[:, -1] / 1.2 + 0.1).sample / 2 + 0.5).clamp(0, 1)
    red, ones = (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2)), torch.ones(8)
    expected = {"reward": 1.5 * red, "rewards.red": red, "first": red, "second": ones / 4, "judge": 0 * ones}
    assert samples.columns.keys() == expected.keys() and red.std() > 1e-3
    assert all(torch.allclose(samples.columns[name], expected[name], atol=1e-5) for name in expected)
    run.config.prompts_per_epoch, run.rewards = 5, run.rewards[:1]
    for run.config.seed, run.epoch in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 0)):
        orders.append([r["prompt"] for r in flow_grpo.collect(run, seeded()).records])
        assert orders[-1] == [p for p in orders[-1][::4] for _ in range(4)] and len(set(orders[-1])) == 4
    assert orders[0] == orders[4] and len(set(map(tuple, orders))) == 4 and {*map(len, encoded)} == {2, 4}


def test_window_of_sde_steps(model, work, monkeypatch):
    run, paths = small_run(model, **WINDOW), []
    monkeypatch.setattr(flow_grpo, "rollout", lambda *a: paths.append(rollout(*a)) or paths[-1])
    samples, times = flow_grpo.collect(run, seeded()), flow_grpo.schedule(run.pipe.scheduler, 10)
    first, (path, log_probs) = times.index(samples.times[0]), (torch.cat(p)[:8] for p in zip(*paths))
    assert samples.times == times[first : first + 4] and torch.equal(samples.latents, path[:, first:][:, :4])
    assert torch.equal(samples.log_probs, log_probs[:, first : first + 3])
    prompts = [r["prompt"] for r in samples.records]
    text, _, pooled, _ = run.pipe.encode_prompt(prompts, None, None, max_sequence_length=5)
    for k in range(10):
        v = run.pipe.transformer(path[:, k], text, pooled, torch.full((8,), 1000 * times[k]))[0]
        distance = (path[:, k + 1] - (path[:, k] + (times[k + 1] - times[k]) * v)).abs().max()
        assert (distance > 0.1) if first <= k < first + 3 else (distance < 1e-5), k
    run.config.prompts_per_epoch, run.config.group_size = 1, 2
    assert {times.index(flow_grpo.collect(run, seeded(n)).times[0]) for n in range(20)} == {0, 1, 2}


@pytest.mark.parametrize("compiled", [False, True])
def test_half_precision_compiling_and_checkpoints(model, work, monkeypatch, compiled):
    torch.compiler.reset()
    run, shapes, results = small_run(model, dtype=torch.float16, beta=0.1, compile=compiled), set(), []
    run.pipe.transformer.register_forward_pre_hook(lambda _, args: shapes.add(tuple(args[0].shape)))
    stats = flow_grpo.update(run, flow_grpo.collect(run, seeded()), seeded())
    flow_grpo.evaluate(run)
    assert stats["ratio_deviation"] < 1e-5 and run.updates == 2 and shapes == {(3, 4, 8, 8)}
    dtypes = {"lora" in n: p.dtype for n, p in run.pipe.transformer.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.float16} and run.scaler.is_enabled()
    for switches in ({}, {"compile": compiled, "gradient_checkpointing": True}):
        run, decoded, grads = small_run(model, updates_per_epoch=1, **switches), set(), []
        run.pipe.vae.decoder.register_forward_pre_hook(lambda _, args: decoded.add(len(args[0])))
        step = Mock(side_effect=lambda run: grads.extend(p.grad.flatten() for p in run.parameters) or 1.0)
        monkeypatch.setattr(flow_grpo, "optimizer_step", step)
        samples = flow_grpo.collect(run, seeded())
        assert flow_grpo.update(run, samples, seeded())["ratio_deviation"] < 1e-5
        assert run.pipe.transformer.is_gradient_checkpointing == bool(switches)
        assert decoded == ({1} if switches else {3, 2})  # images at once
        results.append((samples.log_probs, torch.cat(grads)))
    (log_probs, gradient), (other_log_probs, other) = results
    assert torch.allclose(log_probs, other_log_probs, atol=1e-4) and gradient.norm() > 0
    assert (gradient - other).norm() < 1e-3 * gradient.norm()
    assert not compiled or torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_optimizer_steps_and_the_adapters_average(model, work):
    run = small_run(model, ema_interval=2, learning_rate=0.02)
    run.scaler, parameters = torch.amp.GradScaler("cpu", 4.0), run.parameters
    clones, average = ([p.detach().clone() for p in parameters] for _ in range(2))
    adam, count = torch.optim.AdamW(clones, 0.02, weight_decay=1e-4), sum(p.numel() for p in clones) ** 0.5
    for norm, done in ((0.1, 1), (7.0, 2), (math.inf, 2), (0.5, 3), (0.3, 4), (math.nan, 4), (30.0, 100)):
        run.updates = max(run.updates, done - 1)
        for p, clone in zip(parameters, clones):
            p.grad = torch.full_like(p, run.scaler.scale(torch.tensor(norm)).item() / count)
            clone.grad = torch.full_like(p, min(norm, 1) / count)
        assert flow_grpo.optimizer_step(run) == pytest.approx(norm, nan_ok=True) and run.updates == done
        if math.isfinite(norm):
            adam.step()
            decay = min(0.9, (1 + done) / (10 + done)) if done % 2 == 0 else 1  # [C]
            average = [decay * a + (1 - decay) * p for a, p in zip(average, clones)]
        for got, expected in zip((*parameters, *run.ema.shadow_params), (*clones, *average)):
            assert torch.allclose(got, expected, atol=1e-5)
    run.scaler, samples = torch.amp.GradScaler("cpu", 4.0), flow_grpo.collect(run, seeded())
    samples.log_probs[:] = math.nan
    stats = flow_grpo.update(run, samples, seeded())  # Both updates overflow, and the scale falls to 1.
    assert stats["skipped_updates"] == 2 and stats["grad_norm"] == 0 and run.updates == 100
    with pytest.raises(flow_grpo.UserError, match=r"the gradient is not finite.*diverged"):
        flow_grpo.update(run, samples, seeded())


# ---- Runs.
def test_a_run_leaves_what_it_promises(model, work, capsys, monkeypatch):
    monkeypatch.setattr(flow_grpo, "collect", collect := Mock(side_effect=flow_grpo.collect))
    for seed in (2, 3):
        given = dict(reward="rewards.py:two", sde_steps=2, sde_range=4, seed=seed)
        assert flow_grpo.main(arguments(model.with_name("without-T5"), f"out{seed}", **given)) == 0
    assert len({call.args[1].initial_seed() for call in collect.mock_calls}) == 6  # all epochs of all seeds
    lines, out, text = metrics("out3"), capsys.readouterr().out, Path("out3/config.json").read_text()
    assert dict(beta=0.04, noise_level=0.7, clip_range=1e-4, seed=3).items() <= json.loads(text).items()
    assert [(m["epoch"], "reward" in m) for m in lines] == [(0, 0), (1, 1), (2, 1), (2, 0), (3, 1), (3, 0)]
    for m in (m for m in lines if "reward" in m):
        assert all(m[n] > 0 for n in ("kl", "grad_norm", "reward_std", "seconds_rollout", "seconds_update"))
        assert m["first"] == m["reward"] and m["second"] == 0.25 and m["ratio_deviation"] < 1e-5
        assert f"epoch {m['epoch']}: reward {m['reward']:.3g}  first " in out
    before, after = (f"{lines[i]['eval_reward']:.3f}" for i in (0, -1))
    assert f"held-out reward: {before} before, {after} after" in out and "(4 prompts, 4 ODE steps.)" in out
    files = "checkpoint config curve epoch_00000 epoch_00002 epoch_00003 eval_prompts events metrics"
    names = sorted(p.name.split(".")[0] for p in Path("out3").rglob("*") if p.is_file())
    assert names == [*files.split(), "pytorch_lora_weights"]
    assert Image.open("out3/samples/epoch_00000.png").size == (4 * 128, 128) and Image.open("out3/curve.png")


def same_run(model, out):  # bit for bit
    whole, states = model.with_name("whole-run"), []
    whole.exists() or flow_grpo.main(arguments(model, whole, **WINDOW))
    for folder in (whole, Path(out)):
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        lora, config = load_file(folder / "pytorch_lora_weights.safetensors"), state.pop("config")
        lines = [{k: v for k, v in m.items() if "seconds" not in k} for m in state.pop("metrics")]
        config |= {"output_dir": "", "model": ""}
        states.append(tree_flatten([state, lora, config, lines, [m["epoch"] for m in metrics(folder)]]))
    (a, a_spec), (b, b_spec) = states
    equal = [torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b)]
    assert a_spec == b_spec and all(equal) and len(equal) > 100


@pytest.mark.parametrize("where", re.split(" ", "collect1 update2 evaluate2 log1 log3 atomic2 atomic13 kill"))
def test_interrupted_equals_uninterrupted(model, work, monkeypatch, capsys, where):
    def cut(path):
        path.write_bytes(b"half a file")
        raise KeyboardInterrupt

    def interrupted(*args):
        calls.append(args)
        if where == f"{name}{len(calls)}":
            args = (args[0], cut) if name == "atomic" else cut(Path("half"))
        return original(*args)

    calls, name = [], where.rstrip("0123456789")
    if where == "kill":
        code = f"import sys, torch; torch.cuda.is_available = lambda: False; sys.path.append({str(HERE)!r}); "
        code += "import flow_grpo; flow_grpo.EVAL_STEPS = 4; flow_grpo.main(sys.argv[1:])"
        process = subprocess.Popen([sys.executable, "-c", code, *arguments(model, "cut", **WINDOW)])
        while process.poll() is None and not any('"kl"' in p.read_text() for p in Path("cut").glob("m*")):
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -9
    else:
        original = getattr(flow_grpo, name)
        monkeypatch.setattr(flow_grpo, name, interrupted)
        assert flow_grpo.main(arguments(model, "cut", **WINDOW)) == 130
        assert "error: interrupted" in capsys.readouterr().err.splitlines()[-1]
    assert flow_grpo.main(["--resume", "cut"]) == 0
    same_run(model, "cut")


def test_resume_can_prolong_a_run_but_not_change_it(model, work, capsys):
    assert flow_grpo.main(arguments(model, "short", **WINDOW | {"epochs": 2})) == 0
    shutil.copytree(model, "moved-model")
    Path("short").rename("long")
    assert flow_grpo.main(["--resume=long", "--epochs=3", "--model=moved-model", "--no-compile"]) == 0
    assert "Resuming the run in long: 2 epochs are done." in capsys.readouterr().out
    same_run(model, "long")
    before = {p: p.read_bytes() for p in Path("long").rglob("*") if p.is_file()}
    fails(arguments(model, "long"), capsys, "long holds another run", "--output-dir", "--resume long")
    fails(["--resume=long", "--learning-rate=3"], capsys, "--learning-rate was 0.01 in long")
    fails(["--resume=long", "--prompt-file=other.txt"], capsys, "--prompt-file was prompts.txt in long")
    fails(["--resume=long", f"--model={HERE / 'tiny-sd3'}"], capsys, "doesn't fit", "--model")
    fails(["--resume=nowhere"], capsys, "there is no run in nowhere", "path")
    data, path = before[Path("long/checkpoint.pt")], Path("long/checkpoint.pt")
    half = len(data) // 2
    for damaged in (data[:half], data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :], b""):
        assert before == {p: p.read_bytes() for p in before}
        before[path] = damaged
        path.write_bytes(damaged)
        fails(["--resume=long", "--epochs=5"], capsys, "checkpoint.pt is damaged")


# ---- Bad input: one sentence, exit code 2, nothing lost.
def fails(args, capsys, *words, hint=False):
    capsys.readouterr()
    assert flow_grpo.main(args) == 2
    stderr = capsys.readouterr().err
    error = stderr.strip().splitlines()[-1]
    assert error.startswith("error: ") and all(word in error for word in words), error
    assert stderr.count("error: ") == 1 and "Traceback" not in stderr
    assert hint == bool(re.search(r"; to go on: python flow_grpo.py --resume \w+$", error)), error


BAD_FILES = {
    "empty.txt": b" \n\n", "binary.txt": b"\x80", "zeros.txt": b"a\0b", "syntax.py": b"def f(:",
    "unquoted.txt": b'a "1"\n\na sign\n', "ugly.txt": b"a\nugly", "broken.jsonl": b'{"prompt": "a"}\n{"p": ',
    "surrogate.jsonl": b'{"prompt": "a \\ud800"}', "deep.JSONL": b"[" * 100_000, "list.jsonl": b"[1]",
    "number.jsonl": b'{"prompt": 5}', "leaves.py": b"exit(0)",
}  # fmt: skip
BAD = """prompt-file none.txt | none.txt | No such file; eval-prompt-file none.txt | none.txt | No such file
prompt-file empty.txt | empty.txt | no prompts; prompt-file binary.txt | binary.txt | can't decode
prompt-file zeros.txt | zeros.txt, line 1 | Unicode; prompt-file surrogate.jsonl | surrogate.jsonl, line 1
prompt-file deep.JSONL | deep.JSONL, line 1; prompt-file list.jsonl | list.jsonl, line 1 | `prompt`
prompt-file number.jsonl | number.jsonl, line 1 | `prompt`; prompt-file broken.jsonl | broken.jsonl, line 2
prompt-file ugly.txt | ugly.txt, line 2: ugly things can't; prompt-file . | prompt file . | directory
prompt-file | no prompts | --prompt-file; reward none.py:f | none.py | No such file | file.py:function
reward beauty | 'beauty' | give ocr, path/to/file.py:function | rewards/; reward rewards.py:none | KeyError
reward rewards.py:number | not callable; reward syntax.py:f | SyntaxError; reward leaves.py:f | SystemExit
reward rewards.py:broken | ZeroDivisionError; epochs 0 | epochs is 0
reward rewards.py:wide | returned rewards.wide | 1 finite numbers; reward ocr=x | 'ocr=x' | float
reward rewards.py:twice | returned reward | named apart; reward rewards.py:nothing | rewards.nothing failed
reward ocr,ocr=2 | ocr=2 | write each reward once; reward ocr | ocr needs a text in double quotes | line 3
reward ocr=nan | geneval=0.7,ocr=0.3; model /no/such | /no/such | --model; model . | model .
height 18 | --height | multiples of 4; width 64 | --width | at most 32; group-size 1 | --group-size is 1
learning-rate nan | --learning-rate is nan; learning-rate inf | is inf; learning-rate 1e30 | is 1e+30
guidance-scale 0.5 | is 0.5; max-sequence-length 600 | to 512; noise-level 0 | is 0; seed -1 | is -1
sde-steps 10 | from 1 to 9; sde-range 11 | from 1 to 10"""


@pytest.mark.parametrize("case", re.split("; |\n", BAD))
def test_bad_input_is_one_sentence(model, work, capsys, case):
    for name, content in BAD_FILES.items():
        Path(name).write_bytes(content)
    (flag, _, value), *words = case.split(" | ")[0].partition(" "), *case.split(" | ")[1:]
    prompts = "unquoted.txt" if value == "ocr" else "prompts.txt"
    fails([*arguments(model, prompt_file=prompts), f"--{flag}={value}"], capsys, *words)
    assert not Path("out").exists()


def test_what_fails_in_the_middle(model, work, capsys, monkeypatch):
    fails(arguments(model, reward="rewards.py:nan"), capsys, """for 'a "5"'""", "rewards.nan [", hint=True)
    fails(arguments(model, "far", learning_rate=1e9), capsys, "not finite", "lower --learning-rate")
    with monkeypatch.context() as patch:
        patch.setattr(flow_grpo, "collect", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
        fails(arguments(model, "memory"), capsys, "--gradient-checkpointing", "--batch-size", hint=True)
    assert flow_grpo.main(["--resume", "memory", "--epochs", "1"]) == 0
    assert flow_grpo.main(arguments(model, "greedy", reward="rewards.py:greedy", epochs=1)) == 0
    assert metrics("greedy")[-1]["eval_reward"] == metrics("memory")[-1]["eval_reward"]
    with pytest.raises(flow_grpo.UserError, match=r"an image is not finite.*diverged"):
        flow_grpo.score_images([], torch.full((1, 3, 16, 16), math.nan), [{"prompt": "a"}])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    fails(arguments("no/model", "new"), capsys, "no/model", "network")
    error = OSError("no access")
    error.__context__ = GatedRepoError("gated", response=Mock())  # as diffusers raises it
    monkeypatch.setattr(StockPipeline, "load_config", Mock(side_effect=error))
    fails(arguments(flow_grpo.SD35, "new"), capsys, "gated", flow_grpo.SD35, "licence", "hf auth login")


# ---- Prompts and rewards.
def write(path, *lines):
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_prompts_are_split(work):
    def split(*lines, name="some.txt", **given):
        write(name, *lines)
        parts = flow_grpo.split_prompts(flow_grpo.settings(prompt_file=name, **given), rewards)
        return [[r["prompt"] for r in part] for part in parts]

    rewards, lines = flow_grpo.load_rewards("ocr"), [f'a "{i}"' for i in range(600)]
    (train, held_out), (more_train, more_held_out) = split(*lines[:8]), split(*lines * 2)
    assert len(train) == len(held_out) == 4 and sorted(train + held_out) == lines[:8]
    assert split(*lines[:8], seed=1) == [train, held_out] and split(lines[0]) == [lines[:1]] * 2
    assert (len(more_held_out), len(more_train)) == (256, 688) and {*more_train, *more_held_out} == set(lines)
    record = '\ufeff{"prompt": "b \\"\u2028\\" \\"x\\"", "tag": "t"}\r'
    prompts, _ = split(record, "\r", "", name="some.jsonl", eval_prompt_file="prompts.txt")
    assert prompts == ['b "\u2028" "x"']


def test_the_authors_prompt_files_fit_their_rewards(work):
    clocks, cat = [{"class": "clock", "count": n} for n in (2, 3)], {"class": "cat", "count": 1}
    left = [cat, {"class": "bench", "count": 1, "position": ["left of", 0]}]
    scenes = [{"tag": "counting", "include": clocks[:1], "exclude": clocks[1:], "prompt": "two clocks"}]
    scenes += [{"tag": "position", "include": left, "prompt": "a photo of a bench left of a cat"}]
    write("train_metadata.jsonl", *map(json.dumps, scenes))
    assert flow_grpo.read_prompts("train_metadata.jsonl", flow_grpo.load_rewards("geneval")) == scenes
    for name, text in (("ocr", 'neon "Hello World"'), ("pickscore", "a cat by “Rembrandt”, 8k")):
        write("train.txt", text, text)
        assert flow_grpo.read_prompts("train.txt", flow_grpo.load_rewards(name)) == [{"prompt": text}] * 2
    column, by_tag = torch.tensor([1.0, 0.0, 0.5]), {"a/counting": 0.75, "a/position": 0, "a/overall": 0.375}
    assert flow_grpo.averages({"a": column}, [*scenes, scenes[0]]) == {"a": 0.5} | by_tag
    assert flow_grpo.averages({"a": column}, [*scenes, {"prompt": "a"}]) == {"a": 0.5}


def test_ocr_reward_reads_small_signs_and_finds_words_in_large_images():
    def sign(text, size, height):
        image, font = Image.new("RGB", size, "wheat"), font_manager.findfont("DejaVu Sans")
        ImageDraw.Draw(image).text((8, 8), text, "navy", ImageFont.truetype(font, height), spacing=height / 2)
        return to_tensor(image)

    images = torch.stack([sign(n, (64, 32), 16) for n in ("407", "83", "651", "902")])
    prompts = ['a "417"', 'a "7"', "a “65”", 'a " " "902"']  # one of three; nothing alike; inside; right
    scores = {"ocr": pytest.approx([2 / 3, 0, 1, 1]), "ocr_accuracy": [0, 0, 1, 1]}
    assert flow_grpo.ocr_reward(images, prompts, []) == scores
    assert flow_grpo.ocr_reward(torch.full((1, 3, 32, 64), 0.5), prompts[:1], [])["ocr"] == [0]
    images = torch.stack([sign("Grand Hotel\nOPEN", (256, 192), 28), sign("coffee", (256, 192), 40)])
    assert flow_grpo.ocr_reward(images, ['a "grand hotel"', 'a "COFFEES"'], [])["ocr"] == [1, 1 - 1 / 7]


# ---- The file alone.
def test_the_file_works_alone(tmp_path):
    shutil.copy(HERE / "flow_grpo.py", tmp_path)
    write(tmp_path / "signs.txt", *(f'a sign that says "{n}"' for n in (123, 456, 789, 246)))
    flags = "--prompt-file signs.txt --epochs 1 --prompts-per-epoch 2 --group-size 2 --output-dir out"
    command = [sys.executable, "-E", "flow_grpo.py", f"--model={HERE / 'tiny-sd3'}", *flags.split()]
    how = dict(cwd=tmp_path, capture_output=True, text=True)
    done = subprocess.run(command, **how)
    assert done.returncode == 0 and "held-out ocr_accuracy: " in done.stdout, done.stderr
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()
    done = subprocess.run([*command, "--output-dir=new", "--reward=geneval"], **how)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and re.match("error: the reward 'geneval' can't be loaded: .*rewards/", error)


# ---- The GPU's path, with one layer of SD3.5 Medium's size, the autoencoder's factor of 8, small encoders.
@needs_gpu
@pytest.mark.parametrize("real, compiled, checkpointed", [*itertools.product([0, 1], repeat=3)])
def test_epoch_in_half_precision_on_a_gpu(model, work, real, compiled, checkpointed):
    torch.compiler.reset()
    given, folder, peaks = dict(compile=compiled, gradient_checkpointing=checkpointed), model, []
    if real:
        given, folder = given | dict(height=512, width=512, max_sequence_length=128), model.with_name("real")
        folder.exists() or save_random_pipeline(
            folder, sample_size=128, num_layers=1, attention_head_dim=64, num_attention_heads=24, channels=16,
            blocks=4, caption_projection_dim=1536, pos_embed_max_size=384, pooled=(768, 1280), joint=4096,
        )  # fmt: skip
    for batch_size in (4, 8):
        run = None
        gc.collect()
        torch.cuda.empty_cache()
        run = small_run(folder, batch_size=batch_size, **given)
        torch.cuda.reset_peak_memory_stats()
        stats = flow_grpo.update(run, flow_grpo.collect(run, seeded(0, "cuda")), seeded(0, "cuda"))
        peaks.append(torch.cuda.max_memory_allocated())
        assert stats["ratio_deviation"] < 1e-5 and stats["trained"] == 1 and stats["skipped_updates"] == 0
    modules = run.pipe.transformer, run.pipe.vae
    fixed = sum(t.nbytes for m in modules for t in (*m.parameters(), *m.buffers()))
    fixed += 4 * sum(p.nbytes for p in run.parameters)  # gradient, two moments, average
    assert not real or peaks[1] == pytest.approx(fixed + 2 * (peaks[0] - fixed), rel=0.2)
    _, images = flow_grpo.evaluate(run)
    flow_grpo.save(run, Path())
    theirs = [stock_images(folder, run, lora, "latent", torch_dtype=torch.float16) for lora in (None, ".")]
    plain, adapted = (flow_grpo.decode(run.pipe.vae, latents.float()).cpu() for latents in theirs)
    assert (images - adapted).abs().mean() < 0.2 * (images - plain).abs().mean()
