"""Flow-GRPO on FLUX.1 by the five functions of flow_grpo.py: what is different from SD3.

    python examples/flux.py --prompt-file prompts.txt --reward ocr

It trains FLUX.1-dev with LoRA, or FLUX.1-schnell by --model black-forest-labs/FLUX.1-schnell. The
defaults are the settings `pickscore_flux` of the authors' code, yifan123/flow_grpo, or [code]. The
last of the 6 steps is trained in neither. In [code] it has noise, and here it has none: from
t = 0.27 to 0, noise of standard deviation 0.29 would stay in the images that are judged.

Left out are resuming, several processes, compiling, held-out prompts, windows of noisy steps, a
file of metrics, dropping the images without advantage, and the average of the LoRA, with which
[code] evaluates. One GPU, or CPU, is used.

By count, at 512 x 512 pixels, 27 GB are always on the GPU, of which 24 are the frozen network in
bfloat16. In the update, each image of a batch adds 9.6 GB, or 0.6 with --gradient-checkpointing. So
the defaults take 56 GB. A card of 48 GB needs --batch-size 1 or --gradient-checkpointing, and 24 GB
are too few. While prompts are encoded, T5 and CLIP add 10 GB to the 27. Loading takes 34 GB of main
memory. An epoch of 1,152 images takes 12 minutes on an H100, at half of the 790 TFLOP/s that it can
sustain.
FLUX.1-schnell is trained and evaluated in as many steps as FLUX.1-dev, which nobody has tried.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import tyro
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from torchvision.utils import save_image

sys.path.append(sys.path[0] + "/..")  # flow_grpo.py is in the folder above this file's
import flow_grpo
from flow_grpo import gaussian_kl, group_advantages, grpo_loss, rollout, sde_step

DEVICE = flow_grpo.DEVICE
ROLLOUT_STEPS = 6
TRAINED_STEPS = 5  # the first ones
EVAL_STEPS = 28
NOISE_LEVELS = [0.9] * TRAINED_STEPS + [0.0]
GUIDANCE_SCALE = 3.5
CLIP_RANGE = 1e-4
UPDATES_PER_EPOCH = 2
MAX_SEQUENCE_LENGTH = 128  # T5 tokens of a prompt
WEIGHTS = "pytorch_lora_weights.safetensors"
# Attention and feed-forward of the double blocks. Of the single blocks, q, k and v match, too.
LAYERS = (
    "attn.to_q attn.to_k attn.to_v attn.to_out.0 attn.to_add_out attn.add_q_proj attn.add_k_proj "
    "attn.add_v_proj ff.net.0.proj ff.net.2 ff_context.net.0.proj ff_context.net.2"
)
LORA = LoraConfig(r=64, lora_alpha=128, init_lora_weights="gaussian", target_modules=LAYERS.split())


@dataclass
class Config:
    """The settings. They have the names and meanings that they have in flow_grpo.py."""

    prompt_file: str  # The prompts: a .txt with one per line, or a .jsonl with records.
    output_dir: str = "runs/flux"  # The folder of the run.
    model: str = "black-forest-labs/FLUX.1-dev"  # A name on the hub, or a folder.
    reward: str = "pickscore"  # ocr, geneval, pickscore or clipscore, or file.py:function.
    epochs: int = 500  # How many times images are drawn and trained on.
    prompts_per_epoch: int = 48  # How many prompts an epoch has.
    group_size: int = 24  # How many images each prompt gets, to be compared with each other.
    batch_size: int = 3  # Images in one pass of the network.
    learning_rate: float = 3e-4  # The learning rate of AdamW.
    beta: float = 0.0  # The weight of the KL penalty, which holds the model near the base model.
    height: int = 512  # The height of the images in pixels.
    width: int = 512  # The width of the images in pixels.
    eval_every: int = 30  # Epochs from one evaluation to the next.
    gradient_checkpointing: bool = False  # Activations are computed twice, to save memory.
    seed: int = 0  # It decides on the adapter, noise, and order of prompts.


@dataclass
class Run:
    """What `prepare` makes."""

    config: Config
    pipe: FluxPipeline  # of which the LoRA alone is trained
    reward: flow_grpo.Reward
    records: list  # dicts of the prompt file
    grid: tuple  # rows and columns of an image's L tokens
    guided: bool  # whether guidance is an input, as for FLUX.1-dev, but not for FLUX.1-schnell
    texts: dict = None  # what `encode` makes of prompts


@dataclass
class Batch:
    """B images. They are trained in the batch in which they were drawn, so first ratios are 1."""

    records: list
    latents: torch.Tensor  # [B, T + 1, L, C], from the noise to the image
    log_probs: torch.Tensor  # [B, T], under the policy that drew the images
    rewards: torch.Tensor  # [B]
    advantages: torch.Tensor = None  # [B]


# ---- What is different from SD3. An image of 512 x 512 pixels is L = 1,024 tokens of C = 64.
def pack(latents):
    """The autoencoder's [B, C / 4, 2 rows, 2 columns] to tokens [B, L, C], patches of 2 x 2."""
    return pixel_unshuffle(latents, 2).flatten(2).mT


def unpack(latents, rows):
    """The reverse of `pack`."""
    return pixel_shuffle(latents.mT.unflatten(2, (rows, -1)), 2)


def schedule(run, steps):
    """The times [steps + 1]. FLUX.1-dev's 6 steps have 1, .90, .79, .65, .48, .27, 0 at 512 x 512.

    The larger the image is, the nearer to 1 they are. FLUX.1-schnell's don't depend on it.
    """
    scheduler = run.pipe.scheduler
    rows, columns = run.grid
    mu = calculate_shift(rows * columns)
    scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)], mu=mu)
    return scheduler.sigmas.tolist()


def velocity_along(run, times, records):
    """velocity(x, k) at times[k], as `rollout` calls it: [B, L, C] to the same, in float32."""
    transformer = run.pipe.transformer
    texts = [run.texts[record["prompt"]] for record in records]
    embeds, pooled = [torch.stack(part).to(DEVICE) for part in zip(*texts)]
    # An image token's position is (0, row, column), and each text token's is (0, 0, 0).
    img_ids = torch.cartesian_prod(*[torch.arange(n, device=DEVICE) for n in (1, *run.grid)])
    txt_ids = torch.zeros(embeds.shape[1], 3, device=DEVICE)
    # Guidance is an input, not a second pass without the prompt.
    guidance = None
    if run.guided:
        guidance = torch.full([len(records)], GUIDANCE_SCALE, device=DEVICE)

    def velocity(x, k):
        # The timestep is t, not 1000 t as for SD3. FluxPipeline rounds 1000 t to bfloat16 first.
        timestep = torch.full([len(x)], 1000 * times[k], dtype=embeds.dtype, device=DEVICE) / 1000
        inputs = (x.to(embeds.dtype), embeds, pooled, timestep, img_ids, txt_ids, guidance)
        return transformer(*inputs, return_dict=False)[0].float()

    return velocity


@torch.no_grad()
def encode(run, records):
    """Set run.texts: prompt -> (T5's embeds [tokens, D], CLIP's pooled [D']), on the CPU."""
    run.texts = {}
    encoders = torch.nn.ModuleList([run.pipe.text_encoder, run.pipe.text_encoder_2])
    encoders.to(DEVICE)
    for prompt in {record["prompt"] for record in records}:
        embeds, pooled, _ = run.pipe.encode_prompt(
            prompt, device=DEVICE, max_sequence_length=MAX_SEQUENCE_LENGTH
        )
        run.texts[prompt] = embeds[0].cpu(), pooled[0].cpu()
    encoders.to("cpu")  # The update needs T5's 10 GB.


# ---- What is as with SD3.
@torch.no_grad()
def draw(run, times, records, noise, noise_level, generator=None):
    """Images [B, 3, H, W] from the noise [B, L, C], and their batch."""
    velocity = velocity_along(run, times, records)
    trajectory, log_probs = rollout(velocity, noise.to(DEVICE), times, noise_level, generator)
    images = flow_grpo.decode(run.pipe.vae, unpack(trajectory[:, -1], run.grid[0]))
    columns = flow_grpo.score_images(run.reward, images, records)
    return images, Batch(records, trajectory.cpu(), log_probs.cpu(), columns["reward"])


def sample(run, times, records, generator):
    """The rollout, with advantages. Records: N of them, G equal ones in a row."""
    rows, columns = run.grid
    channels = run.pipe.transformer.config.in_channels
    size = run.config.batch_size
    batches = []
    for start in flow_grpo.bar(range(0, len(records), size), "rollout"):
        drawn = records[start : start + size]
        shape = len(drawn), rows * columns, channels
        noise = torch.randn(shape, generator=generator, device=DEVICE)
        _, batch = draw(run, times, drawn, noise, NOISE_LEVELS, generator)
        batches.append(batch)
    rewards = torch.cat([batch.rewards for batch in batches])
    advantages = group_advantages(rewards.view(-1, run.config.group_size)).flatten()
    for batch, part in zip(batches, advantages.split(size)):
        batch.advantages = part
    return batches


def add_gradient(run, times, batches):
    """Add the gradient of the batches' mean loss to the adapter's. Returns mean statistics."""
    beta = run.config.beta
    transformer = run.pipe.transformer
    images = sum(len(batch.records) for batch in batches)
    parts = []
    for batch in flow_grpo.bar(batches, "updates"):
        velocity = velocity_along(run, times, batch.records)
        latents = batch.latents.to(DEVICE)
        old_log_probs = batch.log_probs.to(DEVICE)
        advantages = batch.advantages.to(DEVICE)
        weight = len(batch.records) / images / TRAINED_STEPS
        for k in range(TRAINED_STEPS):
            x = latents[:, k]
            step = (x, times[k], times[k + 1], NOISE_LEVELS[k], latents[:, k + 1])
            _, log_prob, mean, std = sde_step(velocity(x, k), *step)
            kl = torch.zeros_like(log_prob)
            if beta > 0:
                transformer.disable_adapters()  # The reference is the base model.
                with torch.no_grad():
                    _, _, ref_mean, _ = sde_step(velocity(x, k), *step)
                transformer.enable_adapters()
                # The factor |dt| is as in flow_grpo.py and [code].
                kl = gaussian_kl(mean, ref_mean, std) * (times[k] - times[k + 1])
            old = old_log_probs[:, k]
            loss, stats = grpo_loss(log_prob, old, advantages, kl, CLIP_RANGE, beta)
            (loss * weight).backward()
            # Before the first update, it is 0 if rollout and training agree to the last bit.
            stats["ratio_deviation"] = (log_prob.detach() - old).expm1().abs().max()
            parts.append({name: float(value) * weight for name, value in stats.items()})
    return flow_grpo.add_up(parts)


def evaluate(run, records):
    """Draw as a user does. Returns the mean reward, and the images [N, 3, H, W].

    Record n, from 0, has the noise that FluxPipeline draws with a CPU generator of seed n.
    """
    encode(run, records)
    times = schedule(run, EVAL_STEPS)
    rows, columns = run.grid
    shape = 1, run.pipe.vae.config.latent_channels, 2 * rows, 2 * columns
    dtype = run.pipe.text_encoder_2.dtype  # in which FluxPipeline draws noise
    generators = [torch.Generator().manual_seed(n) for n in range(len(records))]
    noise = [torch.randn(shape, generator=generator, dtype=dtype) for generator in generators]
    images, batch = draw(run, times, records, pack(torch.cat(noise)), noise_level=0.0)
    return batch.rewards.mean(), images


def save(run, epoch, images):
    """Write the images, and the adapter for FluxPipeline.load_lora_weights."""
    out = Path(run.config.output_dir)
    flow_grpo.write_file(
        out / f"samples/epoch_{epoch:05}.png",
        lambda path: save_image(images, path, nrow=4, format="png"),
    )
    layers = get_peft_model_state_dict(run.pipe.transformer)
    for name, layer in layers.items():
        # Many programs leave out alpha / rank = 2, so the weights of lora_B take it in.
        layers[name] = layer * (2 if "lora_B" in name else 1)
    flow_grpo.write_file(
        out / WEIGHTS, lambda path: run.pipe.save_lora_weights(out, layers, weight_name=path.name)
    )


def train(run):
    """Epochs of rollout and training, with evaluations of the file's first 16 prompts."""
    config = run.config
    parameters = [p for p in run.pipe.transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, config.learning_rate, weight_decay=1e-4)
    order = Random(config.seed)
    generator = torch.Generator(DEVICE).manual_seed(config.seed)
    times = schedule(run, ROLLOUT_STEPS)
    for epoch in range(config.epochs + 1):
        if epoch % config.eval_every == 0 or epoch == config.epochs:
            reward, images = evaluate(run, run.records[:16])
            save(run, epoch, images)
            print(f"epoch {epoch}: eval_reward {reward:.4g}")
        if epoch == config.epochs:
            return
        shuffled = order.sample(run.records, len(run.records))
        chosen = (shuffled * config.prompts_per_epoch)[: config.prompts_per_epoch]
        encode(run, chosen)
        records = [record for record in chosen for _ in range(config.group_size)]
        batches = sample(run, times, records, generator)
        reward = torch.cat([batch.rewards for batch in batches]).mean()
        print(f"epoch {epoch}: reward {reward:.4g}")
        updates = min(UPDATES_PER_EPOCH, len(batches))
        for update in range(updates):
            stats = add_gradient(run, times, batches[update::updates])
            stats["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            print(f"  update {update + 1}:", *[f"{name} {n:.3g}" for name, n in stats.items()])


def prepare(config):
    """All that comes before training: what is cheap to check first, the large model last."""
    if Path(config.output_dir, WEIGHTS).exists():
        raise flow_grpo.UserError(f"{config.output_dir} holds a run: give another --output-dir")
    least = {"group_size": 2, "beta": 0, "learning_rate": 1e-20, "seed": 0}
    for name, value in vars(config).items():
        if not isinstance(value, str | bool) and not value >= least.get(name, 1):
            raise flow_grpo.UserError(f"{name} can't be {value}, which is too small")
    reward = flow_grpo.load_reward(config.reward)
    records = flow_grpo.read_prompts(config.prompt_file, reward)
    # Blank images load the reward's models and find what fails.
    blank = torch.zeros(2, 3, config.height, config.width, device=DEVICE)
    flow_grpo.score_images(reward, blank, records[:1] * 2)
    # bfloat16 reaches as far as float32, so the loss needs no scaling.
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    dtypes = {"default": dtype, "vae": torch.float32}
    hint = "give a folder, or a name on the hub, whose licence you have accepted there"
    with flow_grpo.explain(f"the model {config.model} can't be loaded", hint):
        pipe = FluxPipeline.from_pretrained(config.model, dtype=dtypes)
        guided = pipe.transformer.config.guidance_embeds  # Other models than FLUX don't say.
    unit = 2 * pipe.vae_scale_factor
    if config.height % unit or config.width % unit:
        raise flow_grpo.UserError(f"--height and --width need to be multiples of {unit}")
    transformer = pipe.transformer
    torch.manual_seed(config.seed)
    transformer.add_adapter(LORA)  # It freezes all else.
    cast_training_params(transformer, torch.float32)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.to(DEVICE)
    pipe.vae.to(DEVICE)
    pipe.vae.enable_slicing()  # It decodes one image at a time.
    grid = config.height // unit, config.width // unit
    return Run(config, pipe, reward, records, grid, guided)


def main(argv=None):
    """Train. Returns the exit code: 0, or 2 for what the user can mend."""
    try:
        train(prepare(tyro.cli(Config, args=argv)))
        return 0
    except flow_grpo.UserError as e:
        return flow_grpo.report(2, e)
    except torch.OutOfMemoryError:
        hint = "give --gradient-checkpointing or a lower --batch-size"
        return flow_grpo.report(2, f"out of memory: {hint}")


if __name__ == "__main__":
    sys.exit(main())
