"""How much time and memory would SD3.5 Medium take on a GPU? It counts, on tensors without data.

    python bench/counting.py

Time follows from the FLOP of an epoch at a stated rate. Memory is what the operations of one step
of the update, of decoding, or of the text encoders hold at a time, in GB, not compiled. CUDA
itself, cuDNN's workspaces, fragments and a reward's models come on top.
"""

import argparse
import weakref
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import torch
from models import RECIPES, flow_grpo, make_run, needed_flops
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

# FLOP/s: half of what a large matrix product sustains in half precision.
RATES = {"H100": 0.5 * 790e12, "RTX 4090": 0.5 * 165e12}
CLIP_L = CLIPTextConfig(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    projection_dim=768,
)
CLIP_G = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    projection_dim=1280,
)
T5_XXL = T5Config(
    d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
)
# Tensors without data can't be asked. So all images have an advantage, and statistics are 0.
ANSWERS = {
    "nonzero": lambda advantages: advantages,
    "tolist": lambda advantages: list(range(len(advantages))),
    "__float__": lambda statistic: 0.0,
}


class Allocations(TorchDispatchMode):
    """`now` and `peak` are the bytes of the storages that operations make, while they live."""

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.live = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf.untyped_storage())
        return out

    def add(self, storage) -> None:
        key = storage._cdata
        if key not in self.live:
            self.live.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, key, storage.nbytes())

    def free(self, key: int, size: int) -> None:
        self.live.discard(key)
        self.now -= size

    def peak_of(self, work: Callable, *args) -> float:
        """GB at the peak of this work, with all that was there before."""
        self.peak = self.now
        work(*args)
        return self.peak / 1e9


def update_step(run: flow_grpo.Run, batch_size: int) -> None:
    """One denoising step of the training on a batch, then the decoding of as many images."""
    prompt = run.train_records[0]
    samples = flow_grpo.Samples(
        records=[prompt] * batch_size,
        texts=flow_grpo.encode(run, [prompt]),
        times=[0.5, 0.4],
        window=range(1),
        latents=torch.randn(batch_size, 2, *run.latent_shape),
        log_probs=torch.randn(batch_size, 1),
        columns={"reward": torch.randn(batch_size)},
    )
    with (
        mock.patch.object(flow_grpo, "optimizer_step", lambda run: 0.0),
        mock.patch.multiple(FakeTensor, **ANSWERS),
    ):
        flow_grpo.optimize(run, samples)
    flow_grpo.decode(run.pipe.vae, samples.latents[:, -1])


def text_encoders() -> list[torch.nn.Module]:
    """SD3.5's, in half precision, but for T5's `wo`, which transformers keeps in float32."""
    torch.set_default_dtype(torch.float16)
    encoders = [
        CLIPTextModelWithProjection(CLIP_L),
        CLIPTextModelWithProjection(CLIP_G),
        T5EncoderModel(T5_XXL),
    ]
    torch.set_default_dtype(torch.float32)
    for block in encoders[-1].encoder.block:
        wo = block.layer[1].DenseReluDense.wo
        wo.weight = torch.nn.Parameter(wo.weight.float())
    return encoders


@torch.no_grad()
def encode(encoders: list) -> None:
    """64 prompts at a time, as flow_grpo.encode does it."""
    clip_l, clip_g, t5 = encoders
    clip_tokens = torch.zeros(64, 77, dtype=torch.long)
    clip_l(clip_tokens, output_hidden_states=True)
    clip_g(clip_tokens, output_hidden_states=True)
    t5(torch.zeros(64, 128, dtype=torch.long))


def count_memory(batch_sizes: list[int], checkpointing: bool) -> tuple[float, dict, flow_grpo.Run]:
    """GB that are always there, GB at the peak by batch size, and the run."""
    with Allocations() as allocations:
        run = make_run("sd3.5-medium", gradient_checkpointing=checkpointing)
        # The optimiser's moments and the gradient stay from one step to the next.
        moments = [torch.zeros_like(p) for p in [*run.parameters, *run.parameters]]
        for p in run.parameters:
            p.grad = torch.zeros_like(p)
        always = allocations.now / 1e9
        peaks = {}
        for batch_size in batch_sizes:
            size = {"batch_size": batch_size, "group_size": batch_size}
            run.config = replace(flow_grpo.Config(), updates_per_epoch=1, **size)
            peaks[batch_size] = allocations.peak_of(update_step, run, batch_size)
    del moments
    return always, peaks, run


def print_times(run: flow_grpo.Run) -> None:
    heads = [f"{card}: minutes per epoch" for card in RATES]
    print("| recipe | TFLOP per image: rollout + update | " + " | ".join(heads) + " |")
    print("|---|---|---|---|")
    for recipe, changes in RECIPES.items():
        run.config = replace(flow_grpo.Config(), **changes)
        rollout, update = needed_flops(run)
        flops = rollout + update
        cells = [f"{rollout / 1e12:.3g} + {update / 1e12:.3g} = {flops / 1e12:.3g}"]
        for rate in RATES.values():
            cells.append(f"{flops * 48 * 24 / rate / 60:.3g}")
        print(f"| {recipe} | " + " | ".join(cells) + " |")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    batch_sizes = parser.parse_args().batch_sizes
    with (
        FakeTensorMode(),
        # A model without data can't be moved.
        mock.patch.object(torch.nn.Module, "to", lambda self, *args, **kwargs: self),
        mock.patch.object(flow_grpo, "DEVICE", "cpu"),
    ):
        always, peaks, run = count_memory(batch_sizes, checkpointing=False)
        _, checkpointed, _ = count_memory(batch_sizes, checkpointing=True)
        with Allocations() as allocations:
            encoders = text_encoders()
            weights = allocations.now / 1e9
            encoding = always + allocations.peak_of(encode, encoders)
            network = sum(p.nbytes for p in run.pipe.transformer.parameters()) / 1e9
        print("SD3.5 Medium at 512x512: counts, not measurements. An epoch has 48 x 24 images.")
        for card, rate in RATES.items():
            print(f"{card}: {rate / 1e12:.3g} TFLOP/s")
        print()
        print_times(run)
    print(f"\nGB at the peak. {always:.3g} of them are always there.")
    print(f"While prompts are encoded, the peak is {encoding:.3g}, but {encoding - network:.3g} on")
    print("a card of less than 45 GB, where the network makes room for the text encoders.")
    print(f"The text encoders' weights, which stay on a larger one, have {weights:.3g}.\n")
    print("| batch size | GB | GB with gradient checkpointing |")
    print("|---|---|---|")
    for batch_size in batch_sizes:
        print(f"| {batch_size} | {peaks[batch_size]:.1f} | {checkpointed[batch_size]:.1f} |")


if __name__ == "__main__":
    main()
