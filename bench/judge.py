"""Judge a run on the embedded model: how accurate, how varied, and how much like real signs its images are.

    python bench/judge.py runs/<time>            the trained LoRA
    python bench/judge.py runs/<time> --base     the base model, on the same prompts

Draws the run's held-out prompts with the stock diffusers pipeline, by 40 ODE steps, from other seeds than the
run's evaluations. Prints four numbers, with those of real signs (`draw_sign` of make.py) in brackets:
exact: the share that PP-OCR reads exactly as asked.
clean: the share that it reads as three digits, right or wrong.
spread: the mean distance between two images, whose pixels are averaged 4 x 4.
frechet: the Frechet distance of 8 x 4 thumbnails to those of four times as many real signs.
"""

import argparse
import json
import logging
import random
import re
import sys
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from torch import Tensor
from tqdm import tqdm

HERE = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HERE), str(HERE / "tiny-sd3")]
make, flow_grpo = import_module("make"), import_module("flow_grpo")


def readings(images: Tensor) -> list[str]:
    """What PP-OCR reads in images [N, 3, H, W] in 0..1, without spaces."""
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).flip(-1).numpy()
    engine = flow_grpo.ocr_engine(*pixels.shape[1:3])
    return ["".join(engine(image).txts or ()).replace(" ", "") for image in pixels]


def spread(images: Tensor) -> float:
    x = F.avg_pool2d(images, 4).flatten(1)
    return torch.cdist(x, x).sum().item() / (len(x) * (len(x) - 1))


def frechet(images: Tensor, others: Tensor) -> float:
    a, b = (F.adaptive_avg_pool2d(x, (4, 8)).flatten(1).double() for x in (images, others))
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root).item()


@torch.no_grad()
def judge(
    run: Path, base: bool = False, count: int = 512, seed: int = 1_000_000
) -> dict[str, tuple[float, float]]:
    """The four numbers of a run's folder, each with that of real signs. `base`: without the run's LoRA."""
    config = json.loads((run / "config.json").read_text())
    records = [json.loads(line) for line in (run / "eval_prompts.jsonl").read_text().splitlines()]
    records = [records[i % len(records)] for i in range(count)]
    words = [flow_grpo.quoted_text(record) for record in records]
    logging.disable(logging.WARNING)  # that the LoRA has no text encoders
    pipe = StableDiffusion3Pipeline.from_pretrained(config["model"])
    pipe.set_progress_bar_config(disable=True)
    if not base:
        pipe.load_lora_weights(run)
    size = {name: config[name] for name in ("height", "width", "guidance_scale", "max_sequence_length")}
    drawn = []
    for i in tqdm(range(0, len(records), 64), desc="drawing", unit="batch"):
        prompts = [record["prompt"] for record in records[i : i + 64]]
        seeds = [torch.Generator().manual_seed(seed + i + j) for j in range(len(prompts))]
        drawn.append(
            pipe(
                prompts, num_inference_steps=flow_grpo.EVAL_STEPS, generator=seeds, output_type="pt", **size
            ).images
        )
    images, rng = torch.cat(drawn), random.Random(seed)
    signs = [torch.from_numpy(make.draw_sign(word, rng)).permute(2, 0, 1) / 255 for word in words * 5]
    real, others = torch.stack(signs[: len(words)]), torch.stack(signs[len(words) :])
    read, read_real = readings(images), readings(real)

    def share(holds) -> tuple[float, float]:
        return tuple(sum(map(holds, texts, words)) / len(words) for texts in (read, read_real))

    return {
        "exact": share(lambda text, word: text == word),
        "clean": share(lambda text, word: bool(re.fullmatch("[0-9]{3}", text))),
        "spread": (spread(images), spread(real)),
        "frechet": (frechet(images, others), frechet(real, others)),
    }


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("run", type=Path, help="folder of a run on the embedded model")
    parser.add_argument("--base", action="store_true", help="without the run's LoRA")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--seed", type=int, default=1_000_000)
    args = parser.parse_args()
    for name, (value, of_real) in judge(args.run, args.base, args.images, args.seed).items():
        print(f"{name} {value:.3f} ({of_real:.3f})")


if __name__ == "__main__":
    main()
