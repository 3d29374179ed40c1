"""The README's first picture: what training does to eight signs, with and without the KL penalty.

    python bench/first_picture.py RUN RUN_WITHOUT_KL

The command draws the first eight held-out prompts by the base model and by the two runs, from the
same noise, and writes assets/before_after_without_kl.png. The number asked for stands above each
sign, and a sign that PP-OCR doesn't read so has a red frame. Below each panel are the exact share
and the spread by judge.py.
"""

import argparse
import json
from pathlib import Path

import torch
from judge import draw_images, judge, ocr
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parents[1]
LEGEND = """red frame: OCR does not read exactly the number above the sign
right: the share of 512 such signs without a red frame; \
spread: how far two of them differ, {real_spread:.2f} in real signs"""


def draw(run: Path, base: bool) -> tuple[list[str], torch.Tensor]:
    """The words asked for, and the signs [8, 3, H, W] drawn from the seeds 0 to 7."""
    lines = (run / "eval_prompts.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines[:8]]
    words = [ocr.quoted_text(record) for record in records]
    prompts = [record["prompt"] for record in records]
    return words, draw_images(run, base, prompts, first_seed=0)


def show(axes, word: str, image: torch.Tensor) -> None:
    axes.imshow(image.permute(1, 2, 0), interpolation="nearest")
    axes.set_title(word, fontsize=15, pad=4)
    axes.set(xticks=[], yticks=[])
    is_right = ocr.read(image[None]) == [word]
    for spine in axes.spines.values():
        spine.set_visible(not is_right)
        spine.set(color="red", linewidth=4)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("run", type=Path)
    parser.add_argument("without_kl", type=Path)
    args = parser.parse_args()
    panels = {
        "before": (args.run, True),
        "after the default run": (args.run, False),
        "after the same without KL": (args.without_kl, False),
    }
    figure = Figure(figsize=(15, 7), layout="constrained")
    parts = figure.subfigures(1, 3, wspace=0.1)
    for part, (title, panel) in zip(parts, panels.items()):
        numbers = judge(*panel)
        exact, _ = numbers["exact"]
        spread, real_spread = numbers["spread"]
        part.suptitle(title, fontsize=20, weight="bold")
        part.supxlabel(f"{exact:.0%} right, spread {spread:.2f}", fontsize=17)
        words, images = draw(*panel)
        for axes, word, image in zip(part.subplots(4, 2).flat, words, images):
            show(axes, word, image)
    figure.supxlabel(LEGEND.format(real_spread=real_spread), fontsize=14)
    figure.savefig(HERE / "assets" / "before_after_without_kl.png", dpi=75)


if __name__ == "__main__":
    main()
