"""What do throughput.py and counting.py run? These models, with these settings. Nothing is loaded.

SD3.5 Medium has its real size, and random weights. What the network has to compute is counted here.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flow_grpo

MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}
SMALL = MEDIUM | {
    "num_layers": 2,
    "num_attention_heads": 2,
    "caption_projection_dim": 128,
    "dual_attention_layers": (0,),
}
SETTINGS = {
    "sd3.5-medium": flow_grpo.Config(),
    "small": flow_grpo.Config(height=64, width=64, max_sequence_length=8),
    "tiny-sd3": flow_grpo.TINY,
}
# What each recipe changes in the published one, whose settings are the defaults for SD3.5.
RECIPES = {
    "published": {},
    "guidance-1": {"guidance_scale": 1.0},
    "window-3-of-5": {"sde_steps": 3, "sde_last_step": 5},
    "fast": {
        "guidance_scale": 1.0,
        "sde_steps": 3,
        "sde_last_step": 5,
        "beta": 0.0,
        "clip_range": 1e-5,
    },
}
SCHEDULER = FlowMatchEulerDiscreteScheduler(shift=3.0)  # It needs data, which counting has none of.
PROMPTS = str(flow_grpo.HERE / "prompts.txt")
FREE_REWARD = flow_grpo.Reward(
    "random",
    function=lambda images, prompts, records: torch.rand(len(images)),
    check=lambda record: None,
)


class RandomPipeline(StableDiffusion3Pipeline):
    """SD3 with random weights, in half precision. One random text stands for the encoders."""

    def __init__(self, shape: dict, vae_channels: tuple, length: int):
        torch.set_default_dtype(torch.float16)
        transformer = SD3Transformer2DModel(**shape)
        self.embeds = torch.randn(1, 77 + length, shape["joint_attention_dim"])
        self.pooled = torch.randn(1, shape["pooled_projection_dim"])
        torch.set_default_dtype(torch.float32)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=vae_channels,
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.5305,
            shift_factor=0.0609,
        )
        super().__init__(transformer, SCHEDULER, vae, *[None] * 6)

    def encode_prompt(self, prompts: list[str], *args, **kwargs):
        embeds = self.embeds.expand(len(prompts), -1, -1)
        pooled = self.pooled.expand(len(prompts), -1)
        return embeds, embeds, pooled, pooled


def make_run(model: str, reward: flow_grpo.Reward = FREE_REWARD, **changes) -> flow_grpo.Run:
    """A run of this model, with these changes of its default settings."""
    config = replace(SETTINGS[model], **changes)
    records = flow_grpo.read_prompts(PROMPTS, reward)
    if model == "tiny-sd3":
        pipe = flow_grpo.load_pipeline(config.model)
    else:
        shape = SMALL if model == "small" else MEDIUM
        vae_channels = (32, 32, 32, 32) if model == "small" else (128, 256, 512, 512)
        torch.manual_seed(0)
        with torch.device(flow_grpo.DEVICE):
            pipe = RandomPipeline(shape, vae_channels, config.max_sequence_length)
    return flow_grpo.prepare(config, pipe, reward, records, records[:1])


def needed_flops(run: flow_grpo.Run) -> tuple[int, int]:
    """FLOP per image that the rollout and the update need: matrix products and attention.

    A backward pass counts as a forward one, which is the least, as frozen weights need no gradient.
    """
    config = run.config
    texts = flow_grpo.encode(run, [])
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(run.pipe.transformer.config)
        x = torch.randn(1, *run.latent_shape)
        text = [torch.randn(1, *part.shape) for part in texts[""]]
        timestep = torch.zeros(1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        transformer(x, *text, timestep)
    forward = counter.get_total_flops()
    passes = 2 if config.guidance_scale > 1 else 1
    reference = passes if config.beta > 0 else 0
    backward = 1
    trained = config.sde_steps * (passes + reference + backward)
    return forward * passes * flow_grpo.ROLLOUT_DENOISING_STEPS, forward * trained
