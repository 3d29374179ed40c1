"""Tests of flux.py with small random FLUX pipelines in the hub's format."""

import math
import re
from pathlib import Path

import flux
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel

import flow_grpo
from tests.conftest import hidden_gpu, unloaded_rewards  # noqa: F401
from tests.small import (
    clip_tokenizer,
    close,
    joined,
    random_autoencoder,
    random_clip,
    random_t5,
    seeded,
)

PROMPTS = ["a cat", "a dog", "red", "blue"]
REDNESS = """
def red(images, prompts, records):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
"""
SMALL = {
    "prompt_file": "prompts.txt",
    "output_dir": "out",
    "reward": "rewards.py:red",
    "epochs": 1,
    "prompts_per_epoch": 2,
    "group_size": 4,
    "batch_size": 3,
    "height": 8,
    "width": 12,
}


def save_random_pipeline(folder, guidance_embeds):
    """FLUX.1-dev if guidance is an input, else FLUX.1-schnell, which also has other times."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    clip = CLIPTextModel(random_clip(len(tokenizer), 16).config)
    torch.nn.init.normal_(clip.get_input_embeddings().weight)
    t5, t5_tokenizer = random_t5(width=32)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=guidance_embeds,
    )
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if guidance_embeds else {"shift": 1.0}
    scheduler = FlowMatchEulerDiscreteScheduler(**shift)
    vae = random_autoencoder(channels=4, blocks=2)
    pipe = FluxPipeline(scheduler, vae, clip, tokenizer, t5, t5_tokenizer, transformer)
    pipe.save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folders of both models."""
    folder = tmp_path_factory.mktemp("models")
    save_random_pipeline(folder / "dev", guidance_embeds=True)
    save_random_pipeline(folder / "schnell", guidance_embeds=False)
    return folder


@pytest.fixture(params=["dev", "schnell"])
def model(request, folders):
    return folders / request.param


@pytest.fixture
def dev(folders):
    return folders / "dev"


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """An empty folder with a reward and prompts, on a CPU, with fewer steps in evaluations."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flux, "DEVICE", "cpu")
    monkeypatch.setattr(flux, "EVAL_STEPS", 4)
    Path("rewards.py").write_text(REDNESS)
    Path("prompts.txt").write_text("\n".join(PROMPTS))


def small_run(model, **changes):
    return flux.prepare(flux.Config(model=str(model), **{**SMALL, **changes}))


def parameters(run):
    return [p for p in run.pipe.transformer.parameters() if p.requires_grad]


def perturb(run, scale=0.1):
    """Move the adapter, which begins as zero."""
    generator = seeded(1)
    for p in parameters(run):
        p.data += scale * torch.randn(p.shape, generator=generator)


def small_sample(run):
    """Times, and the batches of a rollout for two prompts."""
    times = flux.schedule(run, flux.ROLLOUT_STEPS)
    flux.encode(run, run.records)
    records = [record for record in run.records[:2] for _ in range(4)]
    return times, flux.sample(run, times, records, seeded())


def arguments(model, **changes):
    flags = {**SMALL, "model": model, **changes}
    return [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]


def stock_pipeline(model, lora=None):
    pipe = FluxPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    if lora:
        pipe.load_lora_weights(lora)
    return pipe


def stock_images(pipe):
    return pipe(
        PROMPTS,
        height=8,
        width=12,
        num_inference_steps=4,
        guidance_scale=3.5,
        max_sequence_length=flux.MAX_SEQUENCE_LENGTH,
        generator=[seeded(i) for i in range(len(PROMPTS))],
        output_type="pt",
    ).images


# ---- What is different from SD3.
def test_packed_latents_are_those_of_diffusers():
    latents = torch.randn(2, 4, 6, 10)
    packed = flux.pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 4, 6, 10))
    assert torch.equal(flux.unpack(packed, rows=3), latents)


@pytest.mark.parametrize("steps", [6, 28])
def test_times_are_those_of_diffusers(model, steps):
    run = small_run(model)
    times = flux.schedule(run, steps)
    pipe = stock_pipeline(model)
    pipe("", height=8, width=12, num_inference_steps=steps, output_type="latent")
    assert times == pytest.approx(pipe.scheduler.sigmas.tolist())


def test_published_times_at_512_pixels(dev):
    run = small_run(dev)
    run.grid = 32, 32
    # mu = .5 + (1024 - 256) / (4096 - 256) * (1.15 - .5) = .63; t = 1 / (1 + exp(-mu) (1 / s - 1))
    expected = [1 / (1 + math.exp(-0.63) * (6 / s - 1)) for s in (6, 5, 4, 3, 2, 1)] + [0]
    assert flux.schedule(run, 6) == pytest.approx(expected)


def test_evaluation_draws_what_the_stock_pipeline_draws(model):
    _, images = flux.evaluate(run := small_run(model), run.records)
    close(images, stock_images(stock_pipeline(model)))


def test_guidance_reaches_the_network(dev, monkeypatch):
    run = small_run(dev)
    _, images = flux.evaluate(run, run.records)
    monkeypatch.setattr(flux, "GUIDANCE_SCALE", 1.0)
    _, other_images = flux.evaluate(run, run.records)
    assert not torch.allclose(images, other_images, atol=1e-3)


def test_adapter_is_on_the_layers_of_the_published_code(dev):
    run = small_run(dev)
    modules = run.pipe.transformer.named_modules()
    adapted = {name.removesuffix(".lora_A") for name, _ in modules if name.endswith(".lora_A")}
    attention = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
    feed_forward = "ff.net.0.proj ff.net.2 ff_context.net.0.proj ff_context.net.2".split()
    double = {f"transformer_blocks.0.attn.{name}" for name in attention}
    double |= {f"transformer_blocks.0.{name}" for name in feed_forward}
    single = {f"single_transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")}
    assert adapted == double | single


def test_adapter_has_the_published_rank_and_alpha(dev):
    layer = small_run(dev).pipe.transformer.transformer_blocks[0].attn.to_q
    assert layer.lora_A["default"].out_features == 64
    assert layer.scaling["default"] == 128 / 64


# ---- The update.
def test_first_ratios_are_exactly_one(model):
    run = small_run(model)
    perturb(run)
    times, batches = small_sample(run)
    stats = flux.add_gradient(run, times, batches)
    assert stats["ratio_deviation"] == 0
    assert stats["ratio_mean"] == pytest.approx(1, abs=1e-12)


def test_gradient_checkpointing_gives_the_same_ratios_and_gradient(dev):
    gradients = []
    for checkpointing in (False, True):
        run = small_run(dev, gradient_checkpointing=checkpointing, beta=1.0)
        perturb(run)
        times, batches = small_sample(run)
        stats = flux.add_gradient(run, times, batches)
        assert stats["ratio_deviation"] == 0
        gradients.append(joined(p.grad for p in parameters(run)))
    close(*gradients)


def policy(velocity, x, t, t_next, sigma):
    """Mean and standard deviation of a step, from the paper's formula."""
    dt = t_next - t
    mean = x + (velocity + sigma**2 / (2 * t) * (x + (1 - t) * velocity)) * dt
    return mean, sigma * math.sqrt(-dt)


def log_density(x, mean, std):
    """The mean over an image's elements of the log-density of N(mean, std^2)."""
    return torch.distributions.Normal(mean, std).log_prob(x).mean((1, 2))


def objective(run, base, times, batches, beta):
    """What the update maximises, written out in float64 for a network `base` without LoRA."""
    total = 0
    images = 0
    steps = range(5)
    for batch in batches:
        latents = batch.latents.double()
        velocity = flux.velocity_along(run, times, batch.records)
        reference = flux.velocity_along(base, times, batch.records)
        images += len(batch.records)
        for k in steps:
            t, t_next = times[k], times[k + 1]
            sigma = 0.9 * math.sqrt(t / (1 - (times[1] if k == 0 else t)))
            x = latents[:, k]
            v = velocity(batch.latents[:, k], k).double()
            v_base = reference(batch.latents[:, k], k).detach().double()
            mean, std = policy(v, x, t, t_next, sigma)
            mean_base, _ = policy(v_base, x, t, t_next, sigma)
            log_prob = log_density(latents[:, k + 1], mean, std)
            ratio = (log_prob - batch.log_probs[:, k].double()).exp()
            clipped = ratio.clamp(1 - 1e-4, 1 + 1e-4)
            gain = torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
            kl = ((mean - mean_base) ** 2).mean((1, 2)) / (2 * sigma**2)
            total = total + (gain - beta * kl).sum()
    return total / images / len(steps)


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_gradient_is_that_of_the_objective(dev, beta, off_policy):
    base = small_run(dev)  # Its adapter is zero, so it is the base model.
    flux.encode(base, base.records)
    run = small_run(dev, beta=beta)
    perturb(run)
    times, batches = small_sample(run)
    if off_policy:
        perturb(run, scale=1e-3)
    stats = flux.add_gradient(run, times, batches)
    gradient = joined(p.grad for p in parameters(run))
    run.pipe.transformer.zero_grad()
    objective(run, base, times, batches, beta).backward()
    expected = -joined(p.grad for p in parameters(run))
    assert (stats["clipfrac"] > 0) == off_policy
    assert expected.norm() > 0
    assert (gradient - expected).norm() < 1e-4 * expected.norm()


def test_advantages_compare_the_images_of_a_prompt(dev):
    run = small_run(dev)
    _, batches = small_sample(run)
    rewards = torch.cat([batch.rewards for batch in batches]).view(2, 4)
    advantages = torch.cat([batch.advantages for batch in batches]).view(2, 4)
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    close(advantages, centred / (rewards.std(correction=0) + 1e-4))


def test_last_step_of_a_rollout_has_no_noise(dev):
    run = small_run(dev)
    times, batches = small_sample(run)
    batch = batches[0]
    velocity = flux.velocity_along(run, times, batch.records)
    with torch.no_grad():
        end = batch.latents[:, 5] - times[5] * velocity(batch.latents[:, 5], 5)
    close(batch.latents[:, 6], end)


def test_latents_and_log_probs_are_in_float32_when_the_network_is_in_bfloat16(dev):
    run = small_run(dev)
    for part in (run.pipe.transformer, run.pipe.text_encoder, run.pipe.text_encoder_2):
        part.to(torch.bfloat16)
    flux.cast_training_params(run.pipe.transformer, torch.float32)
    perturb(run)
    times, batches = small_sample(run)
    assert batches[0].latents.dtype == batches[0].log_probs.dtype == torch.float32
    assert flux.add_gradient(run, times, batches)["ratio_deviation"] == 0
    assert all(p.grad.dtype == torch.float32 for p in parameters(run))
    rounded = batches[0].latents.bfloat16()
    assert not torch.equal(rounded.float(), batches[0].latents)


# ---- Whole runs.
def test_stock_pipeline_draws_the_evaluation_with_the_trained_adapter(model):
    run = small_run(model, learning_rate=1e-2)
    flux.train(run)
    _, images = flux.evaluate(run, run.records)
    stock = stock_images(stock_pipeline(model, lora="out"))
    close(stock, images)
    assert not torch.allclose(stock, stock_images(stock_pipeline(model)), atol=1e-2)


def test_reward_rises(dev, capsys, monkeypatch):
    monkeypatch.setattr(flux, "UPDATES_PER_EPOCH", 1)
    epochs = {"epochs": 4, "prompts_per_epoch": 2, "group_size": 16, "eval_every": 2}
    size = {"batch_size": 16, "height": 16, "width": 16}
    flux.main(arguments(dev, **epochs, **size, learning_rate=1e-2))
    rewards = re.findall(r"eval_reward (\S+)", capsys.readouterr().out)
    first, middle, last = map(float, rewards)
    assert first < middle < last
    assert last > 1.1 * first


def test_updates_share_the_images_of_an_epoch(dev, monkeypatch):
    parts = []
    original = flux.add_gradient

    def add_gradient(run, times, batches):
        assert all(p.grad is None for p in parameters(run))
        parts.append([id(batch) for batch in batches])
        records.extend(record["prompt"] for batch in batches for record in batch.records)
        return original(run, times, batches)

    records = []
    monkeypatch.setattr(flux, "add_gradient", add_gradient)
    flux.train(small_run(dev))
    first, second = parts
    assert len(first) == 2
    assert len(second) == 1
    assert not set(first) & set(second)
    assert sorted(records.count(prompt) for prompt in set(records)) == [4, 4]


def test_run_leaves_pictures_and_the_adapter(dev):
    flux.main(arguments(dev))
    left = {str(path.relative_to("out")) for path in Path("out").rglob("*.*")}
    pictures = {"samples/epoch_00000.png", "samples/epoch_00001.png"}
    assert left == pictures | {"pytorch_lora_weights.safetensors"}


def test_runs_of_one_seed_are_equal(dev, capsys):
    printed = []
    for folder in ("one", "two"):
        flux.main(arguments(dev, output_dir=folder))
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt_file": "none.txt"}, "there are no prompts in 'none.txt'"),
        ({"reward": "rewards.py:blue"}, "the reward 'rewards.py:blue' can't be loaded"),
        ({"model": "none"}, "the model none can't be loaded"),
        ({"height": 18}, "--height and --width need to be multiples of 4"),
        ({"output_dir": "old"}, "old holds a run: give another --output-dir"),
        ({"model": flow_grpo.HERE / "tiny-sd3"}, "the model .*tiny-sd3 can't be loaded"),
        ({"group_size": 1}, "group_size can't be 1"),
        ({"batch_size": 0}, "batch_size can't be 0"),
        ({"beta": -1}, "beta can't be -1"),
        ({"learning_rate": math.nan}, "learning_rate can't be nan"),
    ],
)
def test_bad_input_ends_in_one_sentence(dev, capsys, changes, sentence):
    Path("old").mkdir()
    Path("old/pytorch_lora_weights.safetensors").touch()
    assert flux.main(arguments(**{"model": dev, **changes})) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(f"error: {sentence}", error)


def test_settings_are_some_of_flow_grpos():
    shared = vars(flow_grpo.Config())
    assert set(vars(flux.Config(prompt_file=""))) <= set(shared)


def test_defaults_are_the_published_ones():
    config = flux.Config(prompt_file="")
    assert (config.learning_rate, config.beta, config.batch_size) == (3e-4, 0, 3)


def test_gradient_is_clipped_to_1(dev, monkeypatch):
    norms = []

    def large_gradient(run, times, batches):
        for p in parameters(run):
            p.grad = torch.ones_like(p)
        return {}

    def step(optimizer):
        (group,) = optimizer.param_groups
        norms.append(joined(p.grad for p in group["params"]).norm().item())

    monkeypatch.setattr(flux, "add_gradient", large_gradient)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    flux.train(small_run(dev))
    assert norms == pytest.approx([1, 1], rel=1e-3)


def test_a_single_batch_is_trained_in_a_single_update(dev, capsys):
    assert flux.main(arguments(model=dev, batch_size=8)) == 0
    output = capsys.readouterr().out
    assert "update 1" in output
    assert "update 2" not in output
