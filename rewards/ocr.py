"""The OCR reward of Flow-GRPO asks whether the image shows the text that its prompt quotes.

The file stands alone. Copy it, `pip install torch torchvision rapidocr onnxruntime rapidfuzz`, and
run:

    import ocr, torchvision
    image = torchvision.io.decode_image("sign.png", "RGB") / 255
    ocr.reward(image[None], ['a sign that says "407"'], [{}])

`reward` returns two columns, for which spaces, case, and spellings that look the same don't count.
`ocr`, to train on, is 1 - edit distance / length of the quoted text, 0 at the least, and 1 where
the text is read within a longer one. `ocr_accuracy` is 1 where `ocr` is 1, and else 0.

The reward is that of Liu et al., Flow-GRPO, arXiv 2505.05470, whose code, yifan123/flow_grpo, reads
with PaddleOCR. Here, PaddleOCR's models, named PP-OCR, run on onnxruntime. They are in rapidocr's
wheel, so that nothing is downloaded.
"""

import functools
import os
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import torch
from rapidfuzz.distance import Levenshtein
from rapidocr import RapidOCR
from torch import Tensor

# Right after a digit, a double quote is an inch mark, as in a 24" screen, and opens no text.
QUOTED = r'(?<!\d)["“”„‟＂][^"“”„‟＂]*["“”„‟＂]|[«»][^«»]*[«»]|「[^」]*」|『[^』]*』'
# What looks like '"- counts as that. Variation selectors, which can't be seen, go.
LOOKALIKES = str.maketrans("‘’‛ʼ′´“”„‟″‐‑‒–—―−", "'" * 6 + '"' * 5 + "-" * 7, "\ufe0e\ufe0f")


def quoted_text(record: dict) -> str:
    """The first text in double quotes, of any script, that isn't blank in a record's prompt.

    Raises ValueError if there is none.
    """
    for quoted in re.findall(QUOTED, record["prompt"]):
        text = quoted[1:-1]
        if plain(text):
            return text
    hint = 'ocr needs a text in double quotes, such as a sign "407"'
    raise ValueError(f"{hint}, but got {record['prompt']}")


def check(record: dict) -> None:
    """Raises ValueError if the record's prompt has no text in double quotes."""
    quoted_text(record)


@functools.cache
def ocr_engine(height: int, width: int) -> RapidOCR:
    """PP-OCR, set up for images of this size, on one thread of onnxruntime."""
    params = {
        "Global.log_level": "error",
        "Global.use_cls": False,
        # A small image is read as one line. In a large one, lines are looked for first.
        "Global.use_det": height > 64,
        # By default, PP-OCR would enlarge images to 736 pixels to find text.
        "Det.limit_type": "max",
        "Det.limit_side_len": max(height, width),
        # By default, a short line would be padded to 48 x 320 pixels before it is read.
        "Rec.rec_img_shape": [3, 48, 48],
        "EngineConfig.onnxruntime.intra_op_num_threads": 1,
    }
    return RapidOCR(params=params)


def threads() -> int:
    """How many images are read at once.

    That is torch's number of threads. But of several processes, torchrun sets it to 1, and without
    torchrun each would take all cores. So there it is the number of cores for each process.
    """
    # Only torchrun tells how many there are on this machine. Without it, all might be.
    processes = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1
    if int(processes) > 1:
        return max(1, os.cpu_count() // int(processes))
    return torch.get_num_threads()


def without_spaces(text: str) -> str:
    return "".join(text.split())


def plain(text: str) -> str:
    """The text without spaces and case, in one of the spellings that look the same."""
    visible = [c for c in text if unicodedata.category(c) != "Cf"]  # no soft hyphens and the like
    text = "".join(visible).translate(LOOKALIKES)
    return without_spaces(unicodedata.normalize("NFKC", text).casefold())


def read(images: Tensor) -> list[str]:
    """The text, without spaces, that PP-OCR reads in each of the images [B, 3, H, W] in 0..1."""
    pixels = (images * 255).round().byte()
    pixels = pixels.permute(0, 2, 3, 1).flip(-1)  # [B, H, W, 3] in BGR, as in OpenCV
    arrays = pixels.cpu().numpy()
    height, width = arrays.shape[1:3]
    engine = ocr_engine(height, width)
    with ThreadPoolExecutor(threads()) as pool:  # onnxruntime releases the GIL.
        results = list(pool.map(engine, arrays))
    return [without_spaces("".join(result.txts or ())) for result in results]


def reward(images: Tensor, prompts: list[str], metadata: list[dict]) -> dict[str, list[float]]:
    """Scores [B] and accuracies [B] of images [B, 3, H, W] in 0..1, by their prompts' quoted texts.

    Raises ValueError if a prompt has no text in double quotes.
    """
    scores = []
    for prompt, reading in zip(prompts, read(images)):
        target = plain(quoted_text({"prompt": prompt}))
        text = plain(reading)
        distance = 0 if target in text else Levenshtein.distance(text, target)
        scores.append(1 - min(distance, len(target)) / len(target))
    accuracies = [float(score == 1) for score in scores]
    return {"ocr": scores, "ocr_accuracy": accuracies}
