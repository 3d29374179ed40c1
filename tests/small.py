"""What the tests share: small random models in the hub's format, and small runs of them."""

import json
import math
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers import StableDiffusion3Pipeline as StockPipeline
from safetensors.torch import load_file
from torch.utils._pytree import tree_flatten

import flow_grpo
from flow_grpo import Config, load_pipeline, load_reward, main, prepare

HERE = Path(flow_grpo.__file__).parent
EVAL_STEPS = 4  # in place of 40
PROMPTS = [f'a "{i}"' for i in range(8)]


def write(path, *lines):
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


# ---- Tensors.
def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def copied(tensors):
    return [t.detach().clone() for t in tensors]


def joined(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def normal(*shape, seed=0):
    """Standard normal numbers."""
    return torch.randn(shape, generator=seeded(seed))


def close(got, expected, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, check_dtype=False)


def is_standard_normal(noise):
    """Its mean and std are within 5 standard errors of 0 and 1."""
    count = noise.numel()
    assert abs(noise.mean()) < 5 / math.sqrt(count)
    assert abs(noise.std() - 1) < 5 / math.sqrt(2 * count)


# ---- Small random models in the hub's format.
def clip_tokenizer():
    characters = [chr(c) for c in range(33, 127)]
    ends = [c + "</w>" for c in characters]
    words = ["<|startoftext|>", "<|endoftext|>", *characters, *ends]
    vocabulary = {word: i for i, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=12)


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
    tokenizer = clip_tokenizer()
    first_clip = random_clip(len(tokenizer), pooled[0])
    second_clip = random_clip(len(tokenizer), pooled[1])
    t5_parts = random_t5(sizes["joint_attention_dim"])
    torch.manual_seed(0)  # Versions of transformers differ in how much they draw.
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


# ---- Small runs of them.
REWARDS = """
import torch

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
WINDOW = {"sde_steps": 3, "sde_last_step": 5, "guidance_scale": 1.0, "ema_interval": 2}


def set_up(folder, patch):
    """Work in this folder, which gets rewards and prompts. Evaluations have few steps."""
    patch.chdir(folder)
    patch.setattr(flow_grpo, "EVAL_DENOISING_STEPS", EVAL_STEPS)
    Path("rewards.py").write_text(REWARDS)
    write("prompts.txt", *PROMPTS)


@contextmanager
def working_in(folder):
    """`set_up` on the CPU, for a fixture that tests share. It gives what else may be patched by."""
    with pytest.MonkeyPatch.context() as patch:
        set_up(folder, patch)
        patch.setattr(flow_grpo, "DEVICE", "cpu")
        yield patch


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
    """Whether two runs have left the same, to the last bit."""
    leaves, names = tree_flatten(left_by(Path(one)))
    other_leaves, other_names = tree_flatten(left_by(Path(other)))
    assert names == other_names
    for leaf, other_leaf in zip(leaves, other_leaves):
        if isinstance(leaf, torch.Tensor):
            assert torch.equal(leaf, other_leaf)
        else:
            assert leaf == other_leaf
    return True
