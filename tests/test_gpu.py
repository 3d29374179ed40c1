"""A GPU's path on a pretended GPU; half precision, compiling and checkpoints; and a real GPU."""

import gc
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

import flow_grpo
from tests.pretended_gpu import REPLACED, PretendedTensor, pretended_gpu
from tests.small import (
    PROMPTS,
    REWARDS,
    arguments,
    close,
    joined,
    metrics,
    normal,
    save_random_pipeline,
    seeded,
    small_run,
    stock_images,
    write,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def is_on_gpu(tensor):
    return isinstance(tensor, PretendedTensor)


def record_sizes(network, sizes):
    """Each pass of the network adds to the list how many images it has."""
    network.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))


# ---- The pretended GPU.
@pytest.fixture
def gpu():
    with pretended_gpu():
        yield


REFUSED = {
    "sum": lambda x: x + torch.ones(3),
    "concatenation": lambda x: torch.cat([x, torch.ones(2, 3)]),
    "stack": lambda x: torch.stack([x.sum(), torch.ones(())]),
    "product": lambda x: torch.ones(2, 3) @ x.T,
    "change of the CPU's": lambda x: torch.ones(()).add_(x.sum()),
    "index of the CPU's": lambda x: torch.ones(3)[x[0].long()],
    "the CPU's generator": lambda x: torch.randn(3, generator=seeded(), device="cuda"),
    "the GPU's generator": lambda x: torch.randn(3, generator=torch.Generator("cuda")),
}


@pytest.mark.parametrize("mixture", REFUSED.values(), ids=REFUSED)
def test_the_pretended_gpu_refuses_what_a_gpu_refuses(gpu, mixture):
    x = torch.ones(2, 3, device="cuda")
    with pytest.raises(RuntimeError, match=r"^Expected a"):
        mixture(x)


def test_the_pretended_gpu_takes_what_a_gpu_takes(gpu):
    x = torch.ones(2, 3, device="cuda")
    generator = torch.Generator("cuda")
    assert torch.randn(3, generator=generator, device="cuda").is_cuda
    assert torch.as_tensor([1.0], device=x.device).is_cuda
    assert (x + torch.ones(())).is_cuda
    assert x[torch.tensor([0])].is_cuda
    assert x.to("cuda") is x
    x[:, 1:] += x.new_ones(2)
    x.view(-1)[0] = torch.tensor(4.0)
    assert x.tolist() == [[4, 2, 2], [1, 2, 2]]
    assert type(x.cpu()) is torch.Tensor
    assert x.cpu().sum().item() == 13


def test_the_pretended_gpu_leaves_nothing_behind(monkeypatch):
    monkeypatch.undo()  # what `hidden_gpu` has set
    replaced = [(owner, name) for owner, values in REPLACED.items() for name in values]
    before = [getattr(*place) for place in replaced]
    with pytest.raises(KeyError), pretended_gpu():
        raise KeyError
    assert [getattr(*place) for place in replaced] == before
    assert not torch.__future__.get_swap_module_params_on_conversion()
    assert not torch._C._only_lift_cpu_tensors()
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


# ---- The GPU's path, on the pretended one.
ON_GPU = """
def on_gpu(images, prompts, records):
    assert images.is_cuda and images.dtype == torch.float32
    return torch.as_tensor(red(images, prompts, records), device=images.device)
"""
RECIPES = {
    "published": ("with-T5", [], {}),
    "lean": ("without-T5", ["--gradient-checkpointing"], {"guidance_scale": 1.0, "beta": 0.0}),
}
WEIGHTS = "pytorch_lora_weights.safetensors"
LOSS_SCALE = 2.0**10  # in place of that which a run begins with


@pytest.fixture(scope="module", params=RECIPES)
def gpu_run(request, model, tmp_path_factory):
    """What was seen of a run of two epochs, and of a copy of it that was resumed after one.

    An epoch draws 3 images and 1, and has two optimiser steps of 2.
    """
    folder, switches, given = RECIPES[request.param]
    given = {"reward": "rewards.py:on_gpu", "epochs": 2, "group_size": 2} | given
    given |= {"sde_steps": 2, "sde_last_step": 3}
    command = [*arguments(model.with_name(folder), "whole", **given), *switches]
    seen = SimpleNamespace(runs=[], samples=[], velocities=set(), sizes=[])

    def see_run(run):
        seen.runs.append(run)
        record_sizes(run.pipe.transformer, seen.sizes)

    def see_velocity(velocity):
        def seen_velocity(x, k):
            v = velocity(x, k)
            seen.velocities.add((is_on_gpu(v), v.dtype))
            return v

        return seen_velocity

    def set_loss_scale(_):
        seen.runs[-1].scaler.update(LOSS_SCALE)

    def copy(_):
        if seen.runs[-1].epoch == 1 and not Path("cut").exists():
            shutil.copytree("whole", "cut")

    after = {
        "prepare": see_run,
        "sample": seen.samples.append,
        "velocity_along": see_velocity,
        "optimize": set_loss_scale,
        "save": copy,
    }
    with pytest.MonkeyPatch.context() as patch, pretended_gpu():
        for name, see in after.items():
            patch.setattr(flow_grpo, name, followed(getattr(flow_grpo, name), see))
        patch.setattr(flow_grpo, "ROLLOUT_DENOISING_STEPS", 4)
        patch.setattr(flow_grpo, "EVAL_DENOISING_STEPS", 2)
        patch.chdir(tmp_path_factory.mktemp("gpu"))
        Path("rewards.py").write_text(REWARDS + ON_GPU)
        write("prompts.txt", *PROMPTS)
        assert flow_grpo.main(command) == 0
        assert flow_grpo.main(["--resume", "cut"]) == 0
        seen.metrics = metrics("cut")
        seen.adapters = [load_file(f"{out}/{WEIGHTS}") for out in ("whole", "cut")]
    return seen


def followed(function, see):
    """The function. What it returns is seen, and replaced by what `see` returns, if anything."""

    def call(*given):
        result = function(*given)
        return see(result) or result

    return call


def test_on_a_gpu_a_resumed_run_equals_the_continued_one(gpu_run):
    whole, cut = gpu_run.adapters
    assert whole.keys() == cut.keys()
    assert any(layer.any() for name, layer in whole.items() if "lora_B" in name)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert [run.scaler.get_scale() for run in gpu_run.runs] == [LOSS_SCALE] * 2


def test_on_a_gpu_passes_have_one_size_and_first_ratios_are_one(gpu_run):
    assert set(gpu_run.sizes) == {3}
    epochs = [line for line in gpu_run.metrics if "trained" in line]
    assert len(epochs) == 2
    for line in epochs:
        assert line["ratio_deviation"] < 1e-5
        assert 0 < line["grad_norm"] < math.inf


def test_on_a_gpu_network_and_text_encoders_are_in_half_precision(gpu_run):
    assert gpu_run.velocities == {(True, torch.float32)}
    for run in gpu_run.runs:
        assert {p.dtype for p in run.pipe.vae.parameters()} == {torch.float32}
        assert {p.dtype for p in run.pipe.text_encoder.parameters()} == {torch.float16}
        for p in run.pipe.transformer.parameters():
            assert p.dtype == (torch.float32 if p.requires_grad else torch.float16)


def test_all_that_trains_is_on_the_gpu(gpu_run):
    for run in gpu_run.runs:
        transformer = run.pipe.transformer
        network = [*transformer.parameters(), *transformer.buffers(), *run.pipe.vae.parameters()]
        states = run.optimizer.state.values()
        moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
        assert len(moments) == 2 * len(run.parameters)
        assert all(map(is_on_gpu, [*network, *run.parameters, *run.ema.shadow_params, *moments]))
        adapter = [p for p in transformer.parameters() if p.requires_grad]
        assert all(p is trained for p, trained in zip(adapter, run.parameters))


def test_on_a_gpu_samples_are_kept_on_the_cpu(gpu_run):
    for samples in gpu_run.samples:
        stored = [leaf for leaf in tree_leaves(vars(samples)) if isinstance(leaf, torch.Tensor)]
        assert len(stored) >= 6
        assert not any(map(is_on_gpu, stored))


@pytest.mark.parametrize("total, stay", [(42e9, False), (80e9, True)])
def test_on_a_small_gpu_network_and_text_encoders_take_turns(
    model, work, monkeypatch, gpu, total, stay
):
    run = small_run(model)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10e9, total))
    network = run.pipe.transformer
    before = [id(p) for p in network.parameters()]
    encoders = [run.pipe.text_encoder, run.pipe.text_encoder_2, run.pipe.text_encoder_3]
    places = []

    def note_places(*_):
        places.append({is_on_gpu(p) for p in network.parameters()})

    for encoder in encoders:
        encoder.register_forward_hook(note_places)
    flow_grpo.encode(run, [{"prompt": "a"}])
    assert places == [{stay}] * 3
    assert {is_on_gpu(p) for encoder in encoders for p in encoder.parameters()} == {stay}
    assert {is_on_gpu(p) for p in network.parameters()} == {True}
    assert [id(p) for p in network.parameters()] == before  # which the optimiser has


@pytest.mark.parametrize("rank, gpus, chosen", [(1, 4, 1), (3, 2, 1)])
def test_a_process_has_a_gpu_of_its_own_as_long_as_they_last(monkeypatch, rank, gpus, chosen):
    set_device = Mock()
    processes = {"DEVICE": "cuda", "PROCESSES": 4, "RANK": rank, "store": None}
    for name, value in processes.items():
        monkeypatch.setattr(flow_grpo, name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(dist, "rendezvous", lambda _: iter([(Mock(), rank, 4)]))
    monkeypatch.setattr(dist, "init_process_group", Mock())
    register = Mock()
    monkeypatch.setattr("atexit.register", register)
    monkeypatch.setattr("signal.signal", Mock())
    flow_grpo.join_processes()
    set_device.assert_called_once_with(chosen)
    register.assert_called_once_with(dist.destroy_process_group)


def test_a_step_does_not_wait_for_a_gpus_times_to_refuse_them(gpu):
    v, x = normal(2, 3, 4).to("cuda")
    t = torch.full((3,), 900.0).to("cuda")
    _, log_prob, _, _ = flow_grpo.sde_step(v, x, t, 0.5, 0.7)
    assert log_prob.isnan().all()


def test_a_step_on_a_gpu_may_draw_by_a_generator_of_the_cpu(gpu):
    v, x = normal(2, 3, 4)
    on_cpu = flow_grpo.sde_step(v, x, 0.6, 0.5, 0.7, generator=seeded())
    v, x = v.to("cuda"), x.to("cuda")
    on_gpu = flow_grpo.sde_step(v, x, 0.6, 0.5, 0.7, generator=seeded())
    for got, expected in zip(on_gpu, on_cpu):
        close(got.cpu(), expected)


# ---- Half precision, checkpoints, compiling.
def test_a_pass_is_filled_up_if_compiled_and_has_the_same_velocities(model, work):
    run = small_run(model)
    records = run.train_records[:2]
    texts = flow_grpo.encode(run, records)
    x = normal(2, *run.latent_shape)
    sizes = []
    record_sizes(run.pipe.transformer, sizes)
    velocities = []
    for run.config.compile in (False, True):
        velocities.append(flow_grpo.velocity_along(run, [0.5], texts, records)(x, 0))
    assert sizes == [2, 2, 3, 3]
    close(*velocities)
    assert velocities[0].std() > 0.1


def test_evaluation_in_half_precision_draws_the_stock_pipelines_images(model, work):
    run = small_run(model, half=True)
    for average in run.ema.shadow_params:
        average.mul_(1.5)
    _, images = flow_grpo.evaluate(run, run.eval_records)
    flow_grpo.save(run)
    base, adapted = half_precision_images(model, run)
    close(images, adapted, rtol=0, atol=2e-3)
    assert (images - base).abs().max() > 0.02


def half_precision_images(folder, run):
    """What the stock pipeline draws without and with the saved weights."""
    drawn = []
    for lora in (None, "out"):
        latents = stock_images(folder, run, lora, "latent", dtype=torch.float16)
        drawn.append(flow_grpo.decode(run.pipe.vae, latents.float()).cpu())
    return drawn


def epoch(folder, monkeypatch, **given):
    """An epoch's log-probs, gradient and statistics, and how often it computes the first block."""
    run = small_run(folder, updates_per_epoch=1, guidance_scale=1.0, beta=0.0, **given)
    seen = SimpleNamespace(gradient=None, passes=0)

    def optimizer_step(run):
        seen.gradient = joined(p.grad for p in run.parameters)
        return 1.0

    def count(*_):
        seen.passes += 1

    monkeypatch.setattr(flow_grpo, "optimizer_step", optimizer_step)
    samples = flow_grpo.sample(run)
    run.pipe.transformer.transformer_blocks[0].register_forward_pre_hook(count)
    seen.stats = flow_grpo.optimize(run, samples)
    seen.log_probs = samples.log_probs
    return seen


def same_epoch(one, other):
    close(one.log_probs, other.log_probs, rtol=0, atol=1e-4)
    assert other.gradient.norm() > 0
    assert (one.gradient - other.gradient).norm() < 1e-3 * other.gradient.norm()
    assert one.stats["ratio_deviation"] < 1e-5


@pytest.fixture
def warnings_again():
    """Without it, torch would warn only once in a process."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


def test_the_loss_scale_begins_at_2_to_the_20(model, work):
    run = small_run(model, half=True)
    run.scaler.scale(torch.ones(()))
    assert run.scaler.get_scale() == 2**20


@pytest.mark.usefixtures("warnings_again")
@pytest.mark.filterwarnings("error:Converting a tensor with requires_grad")
def test_only_the_policy_with_the_prompt_has_a_graph(model, work):
    """Each step of a batch takes four passes: with and without the prompt and the adapter.

    A statistic with a graph would keep it in memory.
    """
    run = small_run(model, sde_steps=2, sde_last_step=2)
    samples = flow_grpo.sample(run)
    graphs = []

    def record_graph(*_):
        graphs.append(torch.is_grad_enabled())

    run.pipe.transformer.register_forward_pre_hook(record_graph)
    flow_grpo.optimize(run, samples)
    steps = 2 * 2 * 2  # Each of two updates has two batches, and these have two steps.
    assert len(graphs) == 4 * steps
    assert sum(graphs) == steps


def test_a_process_without_images_takes_the_optimiser_step_too(model, work):
    run = small_run(model, half=True)
    assert flow_grpo.optimizer_step(run) == 0
    assert run.updates == 1


def test_checkpoints_change_no_gradient_and_compute_activations_twice(model, work, monkeypatch):
    plain = epoch(model, monkeypatch)
    checkpointed = epoch(model, monkeypatch, gradient_checkpointing=True)
    same_epoch(checkpointed, plain)
    assert checkpointed.passes == 2 * plain.passes


def test_with_checkpoints_images_are_decoded_one_by_one(model, work):
    run = small_run(model, gradient_checkpointing=True)
    sizes = []
    record_sizes(run.pipe.vae.decoder, sizes)
    flow_grpo.decode(run.pipe.vae, torch.zeros(2, *run.latent_shape))
    assert sizes == [1, 1]


def test_compiling_changes_no_gradient(model, work, monkeypatch):
    folder = model.with_name("one-block")
    save_random_pipeline(folder, num_layers=1, dual_attention_layers=(), qk_norm=None)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    # Beyond the limit, blocks would be left as they are, without a word.
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    plain = epoch(folder, monkeypatch)
    compiled = epoch(folder, monkeypatch, compile=True)
    same_epoch(compiled, plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


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
        stats = flow_grpo.optimize(run, flow_grpo.sample(run))
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
    for average in run.ema.shadow_params:
        average.mul_(1.5)
    _, images = flow_grpo.evaluate(run, run.eval_records)
    flow_grpo.save(run)
    base, adapted = half_precision_images(folder, run)
    assert (images - adapted).abs().mean() < 0.2 * (images - base).abs().mean()
