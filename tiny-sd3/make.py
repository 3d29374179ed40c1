"""Make the embedded model from nothing, a Stable Diffusion 3 pipeline that draws signs.

    python tiny-sd3/make.py

Everything is seeded, and `draw_sign` draws the training images, so nothing is downloaded. The
pipeline folder is written next to this file, and `prompts.txt`, with numbers that the model was not
trained on, above it. It needs a C++ compiler, for torch.compile.
"""

import argparse
import random
import time
from colorsys import hsv_to_rgb
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Regex, Tokenizer, models, normalizers, processors
from tokenizers.pre_tokenizers import ByteLevel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

HERE = Path(__file__).resolve().parent
HEIGHT = 32
WIDTH = 64
PROMPT = 'a sign that says "{}"'
TEXT_LENGTH = 7  # tokens: start, the words and a quote, three digits, a quote, end
TYPOS = 0.33  # the share of training captions in which one digit is wrong
# One that comes with matplotlib.
FONT = font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight="bold"))


def split_numbers() -> tuple[list[str], list[str], list[str]]:
    """000 to 999: 436 numbers to pre-train on, 500 for prompts.txt, 64 to choose settings on."""
    numbers = [f"{n:03}" for n in range(1000)]
    random.Random(0).shuffle(numbers)
    return numbers[564:], numbers[:500], numbers[500:564]


def draw_sign(text: str, rng: random.Random, varied: bool = False) -> np.ndarray:
    """A board with `text` on a wall: [HEIGHT, WIDTH, 3] uint8.

    Varied signs, for the VAE, have any colours, sizes and positions. The transformer's have walls
    and boards of any hue, nine positions and one size of type, so that each is as legible as any
    other.
    """

    def luminance(c):
        return (0.299 * c[0] + 0.587 * c[1] + 0.114 * c[2]) / 255

    if varied:
        board = tuple(rng.randrange(256) for _ in range(3))
        wall = tuple(rng.randrange(256) for _ in range(3))
        size = rng.randint(16, 20)
        pad_x = rng.randint(2, 4)
        pad_y = rng.randint(2, 4)
        grid_x = 1
        grid_y = 1
        if 0.35 < luminance(board) < 0.6:
            return draw_sign(text, rng, varied)
    else:
        wall = tuple(int(255 * c) for c in hsv_to_rgb(rng.random(), 0.35, 0.8))
        board = tuple(int(255 * c) for c in hsv_to_rgb(rng.random(), 0.9, 0.45))
        size = 17
        pad_x = 3
        pad_y = 3
        grid_x = 8
        grid_y = 4
    ink = (255, 255, 255) if luminance(board) < 0.5 else (0, 0, 0)
    zoom = 2  # draw larger, then scale down: smooth edges
    font = ImageFont.truetype(FONT, zoom * size)
    image = Image.new("RGB", (zoom * WIDTH, zoom * HEIGHT), wall)
    canvas = ImageDraw.Draw(image)
    # All digits are equally wide and high, so the box is that of zeros.
    left, top, right, bottom = canvas.textbbox((0, 0), "0" * len(text), font=font)
    width = right - left + 2 * zoom * pad_x
    height = bottom - top + 2 * zoom * pad_y
    if width > zoom * (WIDTH - 2):
        return draw_sign(text, rng, varied)
    x = zoom + rng.randrange(0, zoom * (WIDTH - 2) - width + 1, grid_x * zoom)
    y = zoom + rng.randrange(0, zoom * (HEIGHT - 2) - height + 1, grid_y * zoom)
    canvas.rounded_rectangle((x, y, x + width, y + height), radius=3 * zoom, fill=board)
    canvas.text((x + zoom * pad_x - left, y + zoom * pad_y - top), text, font=font, fill=ink)
    return np.array(image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS))


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer over all bytes, with one token for the prompt up to its number."""
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [c + "</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=TEXT_LENGTH
    )
    tokenizer.add_tokens(PROMPT.partition("{}")[0])
    return tokenizer


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """A frozen random CLIP text encoder, which gives different prompts different embeddings."""
    encoder = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            projection_dim=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # CLIP's own initial 0.02 would drown in the layer norms' bias.
    embeddings = encoder.text_model.embeddings
    torch.nn.init.normal_(embeddings.token_embedding.weight)
    torch.nn.init.normal_(embeddings.position_embedding.weight)
    return encoder.eval()


def make_null_t5(width: int) -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    """A T5 whose output is exactly the zeros that the pipeline uses in place of a missing T5.

    diffusers loads a folder without T5 only when told `text_encoder_3=None, tokenizer_3=None`. With
    this placeholder, a plain `from_pretrained` works too, and draws the same images.
    """
    reader = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="</s>"))
    reader.normalizer = normalizers.Replace(Regex(r"[\s\S]+"), "")  # it has nothing to read
    end = [("</s>", 1)]
    reader.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=end)
    tokens = {"pad_token": "<pad>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=reader, **tokens)
    size = {"d_model": width, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1}
    config = T5Config(vocab_size=len(tokenizer), **size)
    encoder = T5EncoderModel(config).eval()
    torch.nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder, tokenizer


def make_pipeline() -> StableDiffusion3Pipeline:
    tokenizer = make_tokenizer()
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=WIDTH,
        force_upcast=False,
    )
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=8,
        num_layers=4,
        attention_head_dim=24,
        num_attention_heads=3,
        joint_attention_dim=128,
        caption_projection_dim=72,
        pooled_projection_dim=128,
        out_channels=8,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=make_text_encoder(tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def train_loop(optimizers, parameters, steps: int, loss_of_step, name: str) -> None:
    """Minimise `loss_of_step(step)` with warm-up and cosine decay."""
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            o, o.param_groups[0]["lr"], total_steps=steps, pct_start=0.05
        )
        for o in optimizers
    ]
    average = None
    with tqdm(range(steps), desc=name, mininterval=5) as bar:
        for step in bar:
            loss = loss_of_step(step)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer, schedule in zip(optimizers, schedules):
                optimizer.step()
                schedule.step()
            average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
            bar.set_postfix(loss=f"{average:.4f}", refresh=False)


def train_vae(vae: AutoencoderKL, images: torch.Tensor, steps: int, batch: int = 32) -> None:
    """Reconstruction (L1 and L2) with a light KL term.

    Then the latents' shift and scale are set from data.
    """

    def loss_of_step(step):
        x = images[torch.randint(len(images), (batch,))].float() / 127.5 - 1
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return F.l1_loss(y, x) + F.mse_loss(y, x) + 1e-3 * kl

    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.01)
    train_loop([optimizer], parameters, steps, loss_of_step, "VAE")
    vae.requires_grad_(False).eval()
    batches = images[:2048].split(256)
    latents = torch.cat([vae.encode(x.float() / 127.5 - 1).latent_dist.mean for x in batches])
    vae.register_to_config(
        shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item()
    )


def neighbours(numbers: list[str]) -> dict[str, list[str]]:
    """For each of the numbers, those among them that differ from it in one digit."""
    return {a: [b for b in numbers if sum(x != y for x, y in zip(a, b)) == 1] for a in numbers}


def train_transformer(
    pipe, texts: list[str], images: torch.Tensor, steps: int, batch: int = 64
) -> None:
    """Rectified flow on images [N, 3, HEIGHT, WIDTH] of `texts`.

    One prompt in ten is dropped, for guidance. Some captions have a typo, as on the web, and name
    another number of the training set, one digit away. So the model draws clean signs, some of
    which show a wrong digit, wherever the board is, whatever its colour.
    """
    transformer = pipe.transformer
    vae = pipe.vae
    numbers = sorted(set(texts))
    with torch.no_grad():
        latents = torch.cat(
            [
                (vae.encode(x.float() / 127.5 - 1).latent_dist.mean - vae.config.shift_factor)
                * vae.config.scaling_factor
                for x in images.split(256)
            ]
        )
        embeds, _, pooled, _ = pipe.encode_prompt(
            [PROMPT.format(n) for n in numbers] + [""],
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=1,
        )
    position = {n: i for i, n in enumerate(numbers)}
    index = torch.tensor([position[t] for t in texts])
    wrong = neighbours(numbers)
    wrong = [torch.tensor([position[b] for b in wrong[a]]) for a in numbers]
    # Every block starts as the identity, and so learns faster.
    for name, module in transformer.named_modules():
        if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    compiled = torch.compile(transformer, dynamic=False)

    def loss_of_step(step):
        # Without T5, the pipeline appends `max_sequence_length` zero tokens, 256 unless told
        # otherwise. A few such batches teach the model to ignore them, so that it draws the same
        # with any length.
        long = step % 32 == 31
        size = batch // 4 if long else batch
        i = torch.randint(len(latents), (size,))
        typo = [w[torch.randint(len(w), ())] for w in (wrong[k] for k in index[i].tolist())]
        prompt = torch.where(torch.rand(size) < TYPOS, torch.stack(typo), index[i])
        prompt = torch.where(torch.rand(size) < 0.1, len(numbers), prompt)
        text = F.pad(embeds[prompt], (0, 0, 0, 255)) if long else embeds[prompt]
        x0 = latents[i]
        noise = torch.randn(size, *latents.shape[1:])
        t = torch.randn(size).sigmoid()
        # Logit-normal, shifted towards noise, where it is decided which digit goes where.
        t = 3 * t / (1 + 2 * t)
        x = torch.lerp(x0, noise, t.view(-1, 1, 1, 1))
        velocity = compiled(x, text, pooled[prompt], 1000 * t, return_dict=False)[0]
        average.update_parameters(transformer)
        return F.mse_loss(velocity, noise - x0)

    # Muon for the matrices of the blocks takes half the time of AdamW alone.
    parameters = dict(transformer.named_parameters())
    matrices = []
    others = []
    for name, p in parameters.items():
        is_matrix = p.ndim == 2 and name.startswith("transformer_blocks")
        (matrices if is_matrix else others).append(p)
    optimizers = [
        torch.optim.Muon(matrices, lr=8e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=8e-3, betas=(0.9, 0.99), weight_decay=0.01),
    ]
    average = AveragedModel(transformer, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    train_loop(optimizers, list(parameters.values()), steps, loss_of_step, "transformer")
    pipe.transformer = average.module


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--output-dir", type=Path, default=HERE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=48_000, help="signs to draw")
    parser.add_argument("--vae-steps", type=int, default=1_500)
    parser.add_argument("--steps", type=int, default=10_000, help="of the transformer's training")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    start = time.time()
    train, held_out, _ = split_numbers()
    texts = [rng.choice(train) for _ in range(args.images)]

    def draw(varied: bool, count: int) -> torch.Tensor:
        words = tqdm(texts[:count], desc="signs", mininterval=5)
        signs = [draw_sign(text, rng, varied) for text in words]
        return torch.from_numpy(np.stack(signs)).permute(0, 3, 1, 2)  # [N, 3, HEIGHT, WIDTH] uint8

    pipe = make_pipeline()
    pipe.set_progress_bar_config(disable=True)
    train_vae(pipe.vae, draw(True, args.images // 3), args.vae_steps)
    print(f"VAE made after {time.time() - start:.0f} s", flush=True)
    train_transformer(pipe, texts, draw(False, args.images), args.steps)

    # Half precision halves the files. The text encoders stay as they are: they are small, and
    # transformers would load them as saved.
    pipe.transformer.half()
    pipe.vae.half()
    text_encoder_3, tokenizer_3 = make_null_t5(pipe.transformer.config.joint_attention_dim)
    pipe.register_modules(text_encoder_3=text_encoder_3, tokenizer_3=tokenizer_3)
    pipe.save_pretrained(args.output_dir)
    settings = (HERE / "flow_grpo.json").read_text(encoding="utf-8")  # with which it is trained
    (args.output_dir / "flow_grpo.json").write_text(settings, encoding="utf-8")
    prompts = "".join(PROMPT.format(n) + "\n" for n in held_out)
    (args.output_dir.resolve().parent / "prompts.txt").write_text(prompts, encoding="utf-8")
    print(f"wrote {args.output_dir} in {(time.time() - start) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
