"""The README's first picture: what training does to eight signs, with and without the KL penalty.

    python bench/first_picture.py RUN LONG_RUN_WITHOUT_KL

draws the first eight held-out prompts by the base model and by the two runs, from the same noise,
and writes assets/before_after_without_kl.png. The number asked for stands above each sign, and a
sign that PP-OCR doesn't read so has a red frame. Below each panel are numbers of judge.py.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from judge import judge, ocr
from matplotlib.figure import Figure
from tqdm import tqdm

HERE = Path(__file__).resolve().parents[1]
COUNT = 8


def draw(run: Path, with_lora: bool) -> tuple[list[str], torch.Tensor]:
    """The words asked for, and the signs [8, 3, H, W] in 0..1 that the stock pipeline draws."""
    config = json.loads((run / "config.json").read_text())
    lines = (run / "eval_prompts.jsonl").read_text().splitlines()[:COUNT]
    records = [json.loads(line) for line in lines]
    pipe = StableDiffusion3Pipeline.from_pretrained(config["model"])
    pipe.set_progress_bar_config(disable=True)
    if with_lora:
        pipe.load_lora_weights(run)
    names = ["height", "width", "guidance_scale", "max_sequence_length"]
    output = pipe(
        [record["prompt"] for record in records],
        num_inference_steps=40,
        generator=[torch.Generator().manual_seed(i) for i in range(COUNT)],
        output_type="pt",
        **{name: config[name] for name in names},
    )
    return [ocr.quoted_text(record) for record in records], output.images


def show(axes, word: str, image: torch.Tensor) -> None:
    axes.imshow(image.permute(1, 2, 0), interpolation="nearest")
    axes.set_title(word, fontsize=15, pad=4)
    axes.set(xticks=[], yticks=[])
    is_right = ocr.read(image[None]) == [word]
    for spine in axes.spines.values():
        spine.set_visible(not is_right)
        spine.set(color="red", linewidth=4)


def summary(run: Path, with_lora: bool) -> str:
    numbers = judge(run, base=not with_lora)
    exact, _ = numbers["exact"]
    spread, _ = numbers["spread"]
    return f"{exact:.0%} of 512 signs are right, their spread is {spread:.2f}"


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("run", type=Path)
    parser.add_argument("without_kl", type=Path)
    args = parser.parse_args()
    epochs = json.loads((args.without_kl / "config.json").read_text())["epochs"]
    panels = {
        "before": (args.run, False),
        "after the default run": (args.run, True),
        f"after {epochs} epochs without KL": (args.without_kl, True),
    }
    figure = Figure(figsize=(15, 6.2), layout="constrained")
    parts = figure.subfigures(1, 3, wspace=0.06)
    for part, (title, panel) in zip(parts, tqdm(panels.items(), unit="panel")):
        part.suptitle(title, fontsize=20, weight="bold")
        part.supxlabel(summary(*panel), fontsize=15)
        words, images = draw(*panel)
        for axes, word, image in zip(part.subplots(4, 2).flat, words, images):
            show(axes, word, image)
    figure.savefig(HERE / "assets" / "before_after_without_kl.png", dpi=75)


if __name__ == "__main__":
    main()
