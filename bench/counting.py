"""SD3.5 Medium's FLOP and memory by recipe, counted on tensors without data: `throughput.py --count`.

Time follows from FLOP at a stated rate. Memory is what the operations of a step of the update, or of
decoding, hold at a time. CUDA itself, cuDNN's workspaces, fragments and a reward's models come on top.
"""

import weakref
from collections.abc import Callable
from unittest import mock

import throughput
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import T5Config, T5EncoderModel

import flow_grpo as f

RATES = {"H100": 0.5 * 790e12, "RTX 4090": 0.5 * 165e12}  # FLOP/s: half of what a matrix product sustains
T5_XXL = dict(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")


class Allocations(TorchDispatchMode):
    """`now` and `peak`: bytes of the storages that operations make, while they live."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.live = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for storage in [t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]:
            if storage._cdata not in self.live:
                self.live.add(storage._cdata)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return out

    def add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def free(self, key: int, size: int) -> None:
        self.live.discard(key)
        self.now -= size

    def peak_of(self, work: Callable, *args) -> float:
        """GB at the peak of this work, with all that was there before."""
        self.peak = self.now
        work(*args)
        return self.peak / 1e9


def update_step(run, batch_size: int) -> None:
    """What flow_grpo.update does at one denoising step, then the decoding of as many images."""
    x, text = torch.randn(batch_size, *run.latent_shape), f.rows(run.null_text, [0] * batch_size, "cpu")
    velocity, step, ref_mean = f.velocity_along(run, [0.5], text), (x, 0.5, 0.4, 0.7, x), x
    if run.config.beta > 0:
        with torch.no_grad():
            _, _, ref_mean, _ = f.sde_step(velocity(x, 0), *step)
    _, log_prob, mean, std = f.sde_step(velocity(x, 0), *step)
    loss, _ = f.grpo_loss(
        log_prob, log_prob.detach(), log_prob.detach(), f.gaussian_kl(mean, ref_mean, std), 1, 1
    )
    loss.backward()
    del log_prob, mean, loss
    f.decode(run.pipe.vae, x)


def encode(memory: Allocations) -> float:
    """GB of the largest text encoder at work, 64 prompts at a time. By its own rule, `wo` is in float32."""
    torch.set_default_dtype(torch.float16)
    t5 = T5EncoderModel(T5Config(**T5_XXL)).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    for block in t5.encoder.block:
        wo = block.layer[1].DenseReluDense.wo
        wo.weight = torch.nn.Parameter(wo.weight.float(), requires_grad=False)
    with torch.no_grad():
        return memory.peak_of(t5, torch.zeros(64, 128, dtype=torch.long))


def print_count(batch_sizes: list[int]) -> None:
    fake, recipes, memory = FakeTensorMode(), throughput.RECIPES, {n: [] for n in batch_sizes}
    stay = mock.patch.object(torch.nn.Module, "to", lambda self, *args, **kwargs: self)
    for checkpointing in (False, True):
        with (
            fake,
            stay,
            mock.patch("torch.cuda.is_available", return_value=False),
            Allocations() as allocations,
        ):
            run = throughput.make_run("sd3.5-medium", gradient_checkpointing=checkpointing)
            moments = [torch.zeros_like(p) for p in run.parameters * 2]
            for p in run.parameters:
                p.grad = torch.zeros_like(p)  # It stays from one step to the next.
            always = allocations.now / 1e9
            for recipe in ("published", "fast"):
                run.config = f.settings(**recipes[recipe])
                for n in batch_sizes:
                    memory[n].append(allocations.peak_of(update_step, run, n))
    del moments
    with fake, Allocations() as allocations:
        encoding = always + encode(allocations)
    heads = [f"{card} {what}" for card in RATES for what in ("min an epoch", "epochs an hour")]
    print("SD3.5 Medium at 512x512: counts, not measurements. An epoch has 48 x 24 images.")
    print("Rates: " + ", ".join(f"{card} {rate / 1e12:.3g} TFLOP/s" for card, rate in RATES.items()) + ".\n")
    print(
        "| recipe | TFLOP an image: rollout + update | " + " | ".join(heads) + " |\n|---|---|---|---|---|---|"
    )
    for recipe, changes in recipes.items():
        flops = throughput.needed_flops(run, f.settings(**changes))
        minutes = [sum(flops) * 48 * 24 / rate / 60 for rate in RATES.values()]
        times = " | ".join(f"{m:.3g} | {60 / m:.3g}" for m in minutes)
        tflops = "{:.3g} + {:.3g} = {:.3g}".format(*(n / 1e12 for n in (*flops, sum(flops))))
        print(f"| {recipe} | {tflops} | {times} |")
    print(f"\nGB at the peak, {always:.3g} of them always there; {encoding:.3g} while prompts are encoded.\n")
    print(
        "| batch | published | fast | published, checkpointing | fast, checkpointing |\n|---|---|---|---|---|"
    )
    for n in batch_sizes:
        print(f"| {n} | " + " | ".join(f"{gb:.1f}" for gb in memory[n]) + " |")
