"""How accurate and how varied are a run's images, and how much like real signs?

    python bench/judge.py runs/<time>            # the trained LoRA of a run on the embedded model
    python bench/judge.py runs/<time> --base     # the base model, on the same prompts

It draws the run's held-out prompts by the stock diffusers pipeline, in 40 steps of the ODE, from
other seeds than the run's evaluations. It prints four numbers, and those of as many real signs, by
`draw_sign` of make.py, in brackets:

exact    share of images in which PP-OCR reads just what was asked for
clean    share of images in which PP-OCR reads three digits, right or wrong
spread   mean distance between two images, each averaged over cells of 4 x 4 pixels
frechet  Fréchet distance between thumbnails of 8 x 4 pixels of these images and of four times as
         many other real signs; it is not FID, which compares the features of an Inception network
"""

import argparse
import json
import logging
import random
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tiny-sd3"))
sys.path.insert(2, str(Path(__file__).resolve().parents[1] / "rewards"))

import make
import ocr

import flow_grpo


def spread(images: Tensor) -> float:
    cells = F.avg_pool2d(images, 4).flatten(1)
    distances = torch.cdist(cells, cells)
    pairs = len(images) * (len(images) - 1)
    return distances.sum().item() / pairs


def frechet(images: Tensor, others: Tensor) -> float:
    """|mean - mean'|^2 + trace(cov + cov' - 2 (cov cov')^(1/2)) of the thumbnails' pixels."""
    a = F.adaptive_avg_pool2d(images, (4, 8)).flatten(1).double()
    b = F.adaptive_avg_pool2d(others, (4, 8)).flatten(1).double()
    cov_a = torch.cov(a.T)
    cov_b = torch.cov(b.T)
    squares = torch.linalg.eigvals(cov_a @ cov_b).real
    root = squares.clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    distance = means + cov_a.trace() + cov_b.trace() - 2 * root
    return distance.item()


def measure(images: Tensor, words: list[str], others: Tensor) -> dict[str, float]:
    """The four numbers of images [N, 3, H, W] that should show these words; others: real signs."""
    exact = 0
    clean = 0
    texts = ocr.read(images)
    for text, word in zip(texts, words):
        exact += text == word
        clean += re.fullmatch("[0-9]{3}", text) is not None
    return {
        "exact": exact / len(words),
        "clean": clean / len(words),
        "spread": spread(images),
        "frechet": frechet(images, others),
    }


def draw_signs(words: list[str], rng: random.Random) -> Tensor:
    signs = [torch.from_numpy(make.draw_sign(word, rng)) for word in words]
    return torch.stack(signs).permute(0, 3, 1, 2) / 255


@torch.no_grad()
def draw_images(folder: Path, base: bool, prompts: list[str], first_seed: int) -> Tensor:
    """One image for each prompt, [N, 3, H, W]. base: without the LoRA of the run in this folder."""
    config = json.loads((folder / "config.json").read_text())
    logging.disable(logging.WARNING)  # that the LoRA has no text encoders
    pipe = StableDiffusion3Pipeline.from_pretrained(config["model"])
    pipe.set_progress_bar_config(disable=True)
    if not base:
        pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    how = {"num_inference_steps": flow_grpo.EVAL_DENOISING_STEPS, "output_type": "pt"}
    for name in ("height", "width", "guidance_scale", "max_sequence_length"):
        how[name] = config[name]
    drawn = []
    for first in flow_grpo.bar(range(0, len(prompts), 64), "judging"):
        batch = prompts[first : first + 64]
        seeds = range(first_seed + first, first_seed + first + len(batch))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        drawn.append(pipe(batch, generator=generators, **how).images)
    return torch.cat(drawn)


def judge(
    folder: Path, base: bool = False, count: int = 512, seed: int = 1_000_000
) -> dict[str, tuple[float, float]]:
    """The four numbers of a run's images, each with that of as many real signs."""
    lines = (folder / "eval_prompts.jsonl").read_text().splitlines()
    held_out = [json.loads(line) for line in lines]
    records = [held_out[i % len(held_out)] for i in range(count)]
    words = [ocr.quoted_text(record) for record in records]
    prompts = [record["prompt"] for record in records]
    images = draw_images(folder, base, prompts, seed)
    rng = random.Random(seed)
    signs = draw_signs(words, rng)
    others = draw_signs(words * 4, rng)
    of_images = measure(images, words, others)
    of_signs = measure(signs, words, others)
    return {name: (of_images[name], of_signs[name]) for name in of_images}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("run", type=Path, help="folder of a run on the embedded model")
    parser.add_argument("--base", action="store_true", help="without the run's LoRA")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--seed", type=int, default=1_000_000)
    args = parser.parse_args()
    numbers = judge(args.run, args.base, args.images, args.seed)
    for name, (value, of_signs) in numbers.items():
        print(f"{name} {value:.3f} ({of_signs:.3f})")


if __name__ == "__main__":
    main()
