"""Flow-GRPO in one file: online reinforcement learning for flow-matching image models.

Fine-tunes Stable Diffusion 3.5 Medium with LoRA, or the small SD3 embedded in tiny-sd3/ where there is no GPU:

    python flow_grpo.py --prompt-file prompts.txt

[P] Liu et al., Flow-GRPO: Training Flow Matching Models via Online RL, arXiv 2505.05470.
[C] The authors' code, yifan123/flow_grpo.
[G] Ghosh et al., GenEval, arXiv 2310.11513, and its code, djghosh13/geneval.

To learn the method, read "The method", "Sampling" and "Training" (search for "# ----"): a quarter of the file. The rest is
rewards, settings, the model's set-up, files and the command line.

Shapes: B images in a batch, [C, H, W] a latent, T denoising steps, P prompts with G images each (the group).
Times: t = 1 is noise and t = 0 the image, x_t = (1 - t) x_0 + t x_1, velocity = x_1 - x_0.
"""

import argparse
import copy
import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterable, NamedTuple, Sequence

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model_state_dict
from rapidfuzz.distance import Levenshtein
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.ops import masks_to_boxes
from torchvision.transforms import functional as transforms
from torchvision.utils import save_image
from tqdm import tqdm

TRAIN_STEPS, EVAL_STEPS = 10, 40  # denoising reduction: few steps to learn from, many to judge by [P]
SD35 = "stabilityai/stable-diffusion-3.5-medium"
TINY = Path(__file__).resolve().parent / "tiny-sd3"


# ---- The method. These functions need torch alone: copy them.


def sde_step(
    velocity: Tensor,
    x: Tensor,
    t: float | Tensor,
    t_next: float | Tensor,
    noise_level: float,
    x_next: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One denoising step as a Gaussian policy: Euler-Maruyama on the SDE that has the flow's own marginals ([P]).

    dx = [v + sigma_t^2 / (2t) (x + (1 - t) v)] dt + sigma_t dw,   sigma_t = noise_level * sqrt(t / (1 - t))

    Args:
        velocity, x: [B, C, H, W], the network's output at (x, t), and x itself. Gradients flow to `velocity`.
        t, t_next: floats or [B], 0 <= t_next < t <= 1.
        noise_level: `a` in the paper; 0 gives the Euler step of the ODE.
        x_next: [B, C, H, W], a sample to score. Without it one is drawn, on the generator's device.
    Returns, in float32:
        x_next [B, C, H, W]; log_prob [B], averaged over the elements as in [C] (0 for the ODE, which has no density);
        mean [B, C, H, W]; std, broadcastable to x, sigma_t * sqrt(|dt|).
    """
    velocity, x = velocity.float(), x.float()
    t, t_next = ((s.to(x) if torch.is_tensor(s) else x.new_full((1,), s)).view(-1, 1, 1, 1) for s in (t, t_next))
    dt = t_next - t
    # t = 1 would divide by zero: [C] takes 1 - t_next there, for the noise scale alone.
    sigma = noise_level * torch.sqrt(t / (1 - torch.where(t == 1, t_next, t)))
    mean = x + (velocity + sigma**2 / (2 * t) * (x + (1 - t) * velocity)) * dt
    std = sigma * torch.sqrt(-dt)
    if x_next is None:
        device = generator.device if generator is not None else x.device
        x_next = mean + std * torch.randn(x.shape, generator=generator, device=device).to(x.device)
    x_next = x_next.detach().float()  # a sample is data: the gradient of its log_prob goes through the mean
    if noise_level == 0:
        return x_next, x.new_zeros(len(x)), mean, std
    log_prob = -((x_next - mean) ** 2) / (2 * std**2) - std.log() - math.log(2 * math.pi) / 2
    return x_next, log_prob.mean(dim=(1, 2, 3)), mean, std


def group_advantages(rewards: Tensor, global_std: bool = True, eps: float = 1e-4, clip: float = 5.0) -> Tensor:
    """Advantages relative to the group ([P]): (r - mean of its group) / (std + eps), clipped to +-clip ([C]).

    Args:
        rewards: [P, G], G images of each of P prompts.
        global_std: divide by the std of all rewards, as [C] does; otherwise by the group's own, as [P] writes.
    Returns [P, G]. A group with equal rewards gets exact zeros: float64 makes its mean exact.
    """
    r = rewards.double()
    std = r.std(correction=0) if global_std else r.std(dim=1, correction=0, keepdim=True)
    return ((r - r.mean(dim=1, keepdim=True)) / (std + eps)).clamp(-clip, clip).to(rewards.dtype)


def gaussian_kl(mean: Tensor, ref_mean: Tensor, std: Tensor) -> Tensor:
    """KL between N(mean, std^2) and N(ref_mean, std^2): [P]'s closed form, averaged over the elements as in [C].

    mean, ref_mean: [B, C, H, W]; std: broadcastable to them. Returns [B].
    """
    return ((mean - ref_mean) ** 2 / (2 * std**2)).mean(dim=(1, 2, 3))


def grpo_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, kl: Tensor, clip_range: float, beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate with a KL penalty ([P]), for one denoising step of B images.

    Args: all [B] but the last two, which are floats.
    Returns the scalar loss and, as means over B, ratio_mean, clipfrac, approx_kl (to the sampling policy), policy_loss, kl.
    """
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    policy_loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
    with torch.no_grad():
        stats = {
            "ratio_mean": ratio.mean(),
            "clipfrac": ((ratio - 1).abs() > clip_range).float().mean(),
            # The low-variance estimate (ratio - 1) - log_ratio cancels to nothing in float32 at ratios this near to 1.
            "approx_kl": 0.5 * (log_ratio**2).mean(),
            "policy_loss": policy_loss.detach(),
            "kl": kl.detach().mean(),
        }
    return policy_loss + beta * kl.mean(), stats


# ---- Sampling. Rollouts and updates share `predict_velocity`: this is why the first update's ratios are 1.


class Text(NamedTuple):
    """Encoded prompts: embeds [B, L, D] and pooled [B, D'], in the network's dtype."""

    embeds: Tensor
    pooled: Tensor


def predict_velocity(transformer, x: Tensor, t: float, text: Text, null_text: Text, guidance_scale: float) -> Tensor:
    """The network's velocity at x [B, C, H, W] with classifier-free guidance, in float32.

    The unconditional velocity is a constant to the gradient, as in [C], so it is computed without a graph.
    """

    def predict(embeds: Tensor, pooled: Tensor) -> Tensor:
        timestep = torch.full((len(x),), 1000 * t, device=x.device)
        return transformer(x.to(embeds.dtype), embeds, pooled, timestep, return_dict=False)[0].float()

    conditional = predict(*text)
    if guidance_scale == 1:
        return conditional
    with torch.no_grad():
        unconditional = predict(*(e.expand(len(x), *e.shape[1:]) for e in null_text))
    return unconditional + guidance_scale * (conditional - unconditional)


def schedule(scheduler, steps: int) -> list[float]:
    """The scheduler's times [steps + 1], from 1 to 0."""
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.tolist()


@torch.no_grad()
def rollout(
    transformer,
    x: Tensor,
    text: Text,
    null_text: Text,
    times: list[float],
    noise_level: float,
    guidance_scale: float,
    generator: torch.Generator | None = None,
    graph: bool = False,
) -> tuple[Tensor, Tensor]:
    """Denoise x [B, C, H, W] along `times` [T + 1]: latents [B, T + 1, C, H, W] and their log_probs [B, T].

    `graph` builds the graph that an update would, and drops it: see `Run.one_form`.
    """
    latents, log_probs = [x], []
    for t, t_next in zip(times[:-1], times[1:]):
        with torch.set_grad_enabled(graph):
            v = predict_velocity(transformer, latents[-1], t, text, null_text, guidance_scale).detach()
        x, log_prob, _, _ = sde_step(v, latents[-1], t, t_next, noise_level, generator=generator)
        latents.append(x)
        log_probs.append(log_prob)
    return torch.stack(latents, 1), torch.stack(log_probs, 1)


@torch.no_grad()
def decode(vae, latents: Tensor) -> Tensor:
    """Latents [B, C, H, W] to images [B, 3, H', W'] in 0..1, float32."""
    z = (latents / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)
    return (vae.decode(z, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)


# ---- Rewards: plain functions (images [B, 3, H, W] in 0..1, prompts [B], metadata [B] dicts) -> rewards [B].

# Loaded once, if a reward needs them, in half precision on a GPU.
DETECTOR = "facebook/mask2former-swin-small-coco-instance"
DETECTOR_SIZE = {"shortest_edge": 800, "longest_edge": 1333}  # as in [G]
CLIP, CLIP_WEIGHTS = "ViT-L-14-quickgelu", "openai"  # the activation that it was trained with
PICKSCORE, PICKSCORE_PROCESSOR = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class UserError(Exception):
    """Something the user can mend: shown as one sentence, without a traceback, with exit code 2."""


class Diverged(UserError):
    """Training has broken down: to go on would break down again."""


def one_line(e: BaseException) -> str:
    return " ".join(str(e).split())[:300]


def device_and_dtype() -> tuple[str, torch.dtype]:
    return ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)


def quoted_texts(prompt: str) -> list[str]:
    """What stands between double quotes in a prompt, blanks left out."""
    return [text for text in re.findall(r'["“]([^"“”]*)["”]', prompt) if text.strip()]


def quoted_text(prompt: str) -> str:
    """The text that a prompt asks for: the first that it quotes. Raises UserError without one."""
    texts = quoted_texts(prompt)
    if not texts:
        raise UserError(f'the ocr reward needs a text in double quotes, as in: a sign that says "407"; got: {prompt}')
    return texts[0]


@functools.cache
def ocr_engine(height: int, width: int):
    """RapidOCR (PP-OCR on onnxruntime; the models are in its wheel) sized to the images, one thread a call."""
    from rapidocr import RapidOCR

    return RapidOCR(
        params={
            "Global.log_level": "error",
            "Global.use_cls": False,  # no upside-down text
            # Up to 64 pixels it is read as one line of text. The detector is for larger ones; by default it would
            # enlarge each to a 736-pixel side.
            "Global.use_det": height > 64,
            "Det.limit_type": "max",
            "Det.limit_side_len": max(height, width),
            "Rec.rec_img_shape": [3, 48, 48],  # the least width a line is padded to; 320 by default
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
        }
    )


def ocr_reward(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """Text rendering [P]: 1 - edit distance / length of the quoted text, without spaces and case; 0 at the least."""
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).flip(-1).cpu().numpy()  # BGR, as OpenCV has it
    engine = ocr_engine(*pixels.shape[1:3])
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # onnxruntime releases the GIL
        readings = [result.txts or () for result in pool.map(engine, pixels)]

    def score(prompt: str, lines: tuple[str, ...]) -> float:
        target, text = ("".join(s.split()).lower() for s in (quoted_text(prompt), "".join(lines)))
        distance = 0 if target in text else Levenshtein.distance(text, target)
        return 1 - min(distance, len(target)) / len(target)

    return torch.tensor([score(prompt, lines) for prompt, lines in zip(prompts, readings)])


def from_hub(model: str, load: Callable, flag: str = "--reward"):
    """Call `load`; if it fails, say why in one sentence, with the next step."""
    try:
        return load()
    except Exception as error:  # the libraries raise many kinds
        if out_of_memory(error):
            raise
        e, causes = error, set()
        while e is not None:
            causes |= {c.__name__ for c in type(e).__mro__}
            e = e.__cause__ or e.__context__
        summary = one_line(error)
    if "GatedRepoError" in causes:
        why = f"is gated: accept its licence at https://huggingface.co/{model}, then run `hf auth login` and start again"
    elif "RepositoryNotFoundError" in causes:
        why = f"is neither a folder nor on the hub: check {flag}, and run `hf auth login` if it is private"
    elif re.search("LocalEntryNotFound|Connect|Offline|Timeout", " ".join(causes)):
        why = f"is not on this machine, and the hub can't be reached: check {flag} and the network"
    else:
        why = f"can't be loaded ({summary}): check {flag}"
    raise UserError(f"the model {model} {why}")


@functools.cache
def pickscore_model():
    from transformers import CLIPModel, CLIPProcessor

    device, dtype = device_and_dtype()
    model = from_hub(PICKSCORE, lambda: CLIPModel.from_pretrained(PICKSCORE, dtype=dtype))
    processor = from_hub(PICKSCORE_PROCESSOR, lambda: CLIPProcessor.from_pretrained(PICKSCORE_PROCESSOR))
    return model.to(device).eval(), processor


@torch.no_grad()
def pickscore_reward(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """Human preference: logit_scale * cos(text, image) of PickScore's CLIP, over 26 as in [C], to be near 0..1."""
    model, processor = pickscore_model()
    inputs = processor(
        text=list(prompts), images=list(images), do_rescale=False,  # they are in 0..1 already
        padding="max_length", truncation=True, max_length=77, return_tensors="pt",
    ).to(model.device)  # fmt: skip
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    out = model(**inputs)
    return model.logit_scale.float().exp() * (out.text_embeds.float() * out.image_embeds.float()).sum(1) / 26


@functools.cache
def clip_model():
    import open_clip

    device, dtype = device_and_dtype()
    model = from_hub(f"{CLIP} ({CLIP_WEIGHTS})", lambda: open_clip.create_model(CLIP, CLIP_WEIGHTS, device=device))
    return model.to(dtype).eval(), open_clip.get_tokenizer(CLIP)


def clip_text(texts: list[str]) -> Tensor:
    """Unit embeddings [N, D] of open_clip's text encoder."""
    model, tokenizer = clip_model()
    return F.normalize(model.encode_text(tokenizer(texts).to(device_and_dtype()[0])).float(), dim=1)


def clip_images(images: Iterable[Tensor]) -> Tensor:
    """Unit embeddings [N, D] of images [3, H, W] of any sizes: shorter side to the model's, centre crop, normalised."""
    model, _ = clip_model()
    settings = model.visual.preprocess_cfg
    size = model.visual.image_size[0]

    def fit(image: Tensor) -> Tensor:
        image = transforms.resize(image, [size], transforms.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        return transforms.normalize(transforms.center_crop(image, [size]), settings["mean"], settings["std"])

    pixels = torch.stack([fit(image) for image in images]).to(*device_and_dtype())
    return F.normalize(model.encode_image(pixels).float(), dim=1)


@torch.no_grad()
def clipscore_reward(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """The cosine of CLIP's image and text embeddings (ViT-L-14 by OpenAI)."""
    return (clip_images(images) * clip_text(list(prompts))).sum(1)


# COCO's 80 classes in the detector's order, by GenEval's names; after a slash, COCO's own where it differs.
COCO = (
    "person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant stop_sign parking_meter bench "
    "bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase frisbee skis snowboard "
    "sports_ball kite baseball_bat baseball_glove skateboard surfboard tennis_racket bottle wine_glass cup fork knife spoon "
    "bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake chair couch potted_plant bed dining_table "
    "toilet tv laptop computer_mouse/mouse tv_remote/remote computer_keyboard/keyboard cell_phone microwave oven toaster "
    "sink refrigerator book clock vase scissors teddy_bear hair_drier toothbrush"
)
COCO = [names.replace("_", " ").split("/") for names in COCO.split()]
KNOWN = {name for names in COCO for name in names}
COLORS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
POSITIONS = ["left of", "right of", "above", "below"]


def check_geneval(record: dict) -> None:
    """Raises UserError if the record isn't one that `geneval_score` can judge."""
    include, exclude = record.get("include"), record.get("exclude", [])
    if not (isinstance(include, list) and include and isinstance(exclude, list)):
        raise UserError('the geneval reward needs `include`, a list such as [{"class": "bench", "count": 1}]')
    for i, clause in enumerate(include + exclude):
        name = clause.get("class") if isinstance(clause, dict) else clause
        if not isinstance(name, str) or name not in KNOWN:
            raise UserError(f"the detector doesn't know the class {name!r}: use one of COCO's 80")
        count, position = clause.get("count"), clause.get("position")
        if not isinstance(count, int) or count < 1:
            raise UserError(f"the count of {name} is {count!r}: give a whole number above 0")
        if clause.get("color") not in [None, *COLORS]:
            raise UserError(f"the color {clause['color']!r} can't be judged: use one of {', '.join(COLORS)}")
        if position is not None and repr(position) not in {repr([p, j]) for p in POSITIONS for j in range(i)}:
            raise UserError(f"the position {position} can't be judged: give one of {POSITIONS} and an earlier clause")


def relative_positions(box: Sequence[float], other: Sequence[float]) -> list[str]:
    """Where `box` stands from `other` ([G]); boxes are (x0, y0, x1, y1), y downwards. Nearly concentric: nowhere."""
    offset = [(box[a] + box[a + 2] - other[a] - other[a + 2]) / 2 for a in (0, 1)]
    size = [abs(box[a + 2] - box[a]) + abs(other[a + 2] - other[a]) for a in (0, 1)]
    rest = [math.copysign(max(abs(o) - 0.1 * s, 0), o) for o, s in zip(offset, size)]
    if max(map(abs, rest)) < 1e-3:
        return []
    x, y = (r / math.hypot(*offset) for r in rest)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return [name for name in holds if holds[name]]


def geneval_score(
    record: dict,
    boxes: dict[str, Sequence[Sequence[float]]],
    color_of: Callable[[str, int], str] | None = None,
) -> tuple[float, bool]:
    """Judge an image by the objects found in it: GenEval's clauses ([G], evaluate_images.py), for training and for the record.

    Args:
        record: a line of a GenEval prompt file. `include` lists clauses with `class`, `count` and maybe `color` or
            `position` (a relation and the index of an earlier clause); `exclude` lists classes with a count not to reach.
        boxes: class -> its boxes (x0, y0, x1, y1), most confident first.
        color_of: (class, index of a box) -> colour; asked only about the boxes that a colour clause judges.
    Returns:
        score, the training reward of [P]: each clause gives 1 - |found - count| / count, 0 at the least, and for a colour or
            position a second part, which is 0 unless the count is exactly right: the fraction of objects in the colour, or
            1 if all stand as asked to those of a clause that holds as exactly. The mean over the parts.
        correct, the verdict of the benchmark: each clause holds for the `count` most confident objects, and no `exclude`
            count is reached.
    Raises ValueError if a colour is to be judged without `color_of`.

    They differ on purpose. The score is graded, so that a group of images differs before any is right, and it counts
    objects too many, which the benchmark lets pass unless a clause excludes them: a policy would fill its images with them.
    """
    parts, correct = [], True
    exact, enough = [], []  # for each clause, the objects that hold by the score's rule and by the benchmark's, or nothing
    for clause in record.get("include", []):
        name, count = clause["class"], clause["count"]
        found = boxes.get(name, [])
        judged = [tuple(box) for box in found[:count]]
        holds, is_exact = len(found) >= count, len(found) == count
        parts.append(max(0.0, 1 - abs(len(found) - count) / count))
        right = count
        if clause.get("color"):
            if holds and color_of is None:
                raise ValueError("a clause with a color needs color_of")
            right = sum(color_of(name, i) == clause["color"] for i in range(count)) if holds else 0
            parts.append(right / count if is_exact else 0.0)
        exact.append(judged if is_exact and right == count else None)
        enough.append(judged if holds and right == count else None)
        if clause.get("position"):
            relation, target = clause["position"]
            for groups in (exact, enough):
                others = groups[target]
                stands = groups[-1] and others and all(
                    relation in relative_positions(a, b) for a in groups[-1] for b in others
                )  # fmt: skip
                groups[-1] = groups[-1] if stands else None
            parts.append(float(exact[-1] is not None))
        correct = correct and enough[-1] is not None
    excluded = any(len(boxes.get(c["class"], [])) >= c["count"] for c in record.get("exclude", []))
    return sum(parts) / max(len(parts), 1), correct and not excluded


@functools.cache
def detector():
    from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

    device, dtype = device_and_dtype()
    model = from_hub(DETECTOR, lambda: Mask2FormerForUniversalSegmentation.from_pretrained(DETECTOR, dtype=dtype))
    processor = from_hub(DETECTOR, lambda: AutoImageProcessor.from_pretrained(DETECTOR, size=DETECTOR_SIZE))
    return model.to(device).eval(), processor


def detect(images: Tensor, records: list[dict]) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """Per image: class -> boxes [N, 4] and masks [N, H, W] of at most 16 objects, most confident first, as in [G].

    Scores, masks and boxes are worked out from the network's output as mmdet does; the processor of transformers would
    round the masks to a grid of 384 pixels.
    """
    model, processor = detector()
    pixels = processor(list(images), do_rescale=False, return_tensors="pt")["pixel_values"]
    out = model(pixels.to(model.device, model.dtype))
    result = []
    for logits, masks, record in zip(out.class_queries_logits.float(), out.masks_queries_logits, records):
        threshold = 0.9 if record.get("tag") == "counting" else 0.3
        scores, index = logits.softmax(1)[:, :-1].flatten().topk(len(logits))
        n = max(1, int((scores > threshold).sum()))  # weighing by the mask can only lower a score
        scores, query, label = scores[:n], index[:n] // len(COCO), index[:n] % len(COCO)
        masks = F.interpolate(masks[None, query].float(), images.shape[-2:], mode="bilinear")[0]
        inside = masks > 0
        scores = scores * (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
        order = scores.argsort(descending=True, stable=True)
        order, found = order[scores[order] > threshold], {}
        for i in label[order].unique().tolist():
            kept = inside[order[label[order] == i][:16]]
            boxes = masks_to_boxes(kept) + torch.tensor([0, 0, 1, 1], device=kept.device)  # up to the pixels' far edges
            found |= {name: (boxes, kept) for name in COCO[i]}
        result.append(found)
    return result


@functools.cache
def color_texts(name: str) -> Tensor:
    """The zero-shot classifier of an object's colour [10, D]: for each, the mean over [G]'s three templates."""
    templates = "a photo of a {c} {name}", "a photo of a {c}-colored {name}", "a photo of a {c} object"
    texts = clip_text([t.format(c=c, name=name) for c in COLORS for t in templates])
    return F.normalize(texts.view(len(COLORS), len(templates), -1).mean(1), dim=1)


@torch.no_grad()
def geneval_verdicts(images: Tensor, records: list[dict]) -> tuple[Tensor, Tensor]:
    """`geneval_score` of each image: scores [B], correct [B]. The colours in question are named in one batch."""
    images = images.to(device_and_dtype()[0])
    found = detect(images, records)
    asked, crops = [], []
    for i, record in enumerate(records):
        for clause in record["include"]:
            boxes, masks = found[i].get(clause["class"], ([], []))
            if clause.get("color") and len(boxes) >= clause["count"]:
                for j in range(clause["count"]):
                    x0, y0, x1, y1 = boxes[j].int().tolist()
                    asked.append((i, clause["class"], j))
                    crops.append(torch.where(masks[j], images[i], 0.6)[:, y0:y1, x0:x1])  # #999 around it, as in [G]
    embeddings = clip_images(crops) if crops else []
    colors = {key: COLORS[int((color_texts(key[1]) @ e).argmax())] for key, e in zip(asked, embeddings)}
    verdicts = [
        geneval_score(
            record,
            {name: boxes.tolist() for name, (boxes, _) in found[i].items()},
            lambda name, j: colors[i, name, j],
        )
        for i, record in enumerate(records)
    ]
    scores, correct = zip(*verdicts)
    return torch.tensor(scores), torch.tensor(correct)


def geneval_reward(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """Compositional generation: the score of `geneval_score`."""
    return geneval_verdicts(images, metadata)[0]


class Builtin(NamedTuple):
    function: Callable
    load: Sequence[Callable] = ()  # what loads its models
    check: Callable[[dict], object] = lambda record: None  # raises UserError for a record that it can't judge


REWARDS = {
    "geneval": Builtin(geneval_reward, [detector, clip_model], check_geneval),
    "ocr": Builtin(ocr_reward, check=lambda record: quoted_text(record["prompt"])),
    "pickscore": Builtin(pickscore_reward, [pickscore_model]),
    "clipscore": Builtin(clipscore_reward, [clip_model]),
}


def part_name(source: str) -> str:
    """The name that a reward is logged by: path/to/file.py:function is `file.function`."""
    path, _, function = source.rpartition(":")
    return f"{Path(path).stem}.{function}" if path else source


def parse_rewards(text: str) -> dict[str, float]:
    """The rewards in --reward with their weights: {"geneval": 0.7, "pickscore": 0.3} for "geneval=0.7,pickscore=0.3"."""
    weights = {}
    for part in text.split(","):
        source, weight = re.fullmatch(r"(.*?)(?:=([^=:/]*))?", part.strip(), re.DOTALL).groups()
        try:
            value = float(weight or 1)
        except ValueError:
            value = math.nan
        if not source or part_name(source) in map(part_name, weights) or not math.isfinite(value):
            raise UserError(f"--reward can't be {text!r}: give each name once, as in geneval=0.7,pickscore=0.3")
        if source not in REWARDS and not source.rpartition(":")[0].endswith(".py"):
            raise UserError(f"unknown reward '{source}': choose {', '.join(REWARDS)}, or path/to/file.py:function")
        weights[source] = value
    return weights


def load_reward(source: str) -> Callable:
    """A built-in reward, with its models, by name; or the user's own as path/to/file.py:function."""
    if source in REWARDS:
        for load in REWARDS[source].load:
            load()
        return REWARDS[source].function
    path, _, function = source.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"the reward file {path} does not exist: check the path before the colon in --reward")
    spec = importlib.util.spec_from_file_location(f"reward {path}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        raise UserError(f"the reward file {path} fails on import ({type(e).__name__}: {e}): mend it and run again")
    if not callable(getattr(module, function, None)):
        raise UserError(f"{path} has no function '{function}': name one that it defines after the colon in --reward")
    return getattr(module, function)


class Part(NamedTuple):
    """A reward of the weighted sum."""

    name: str
    weight: float
    function: Callable


def score_images(parts: list[Part], images: Tensor, records: list[dict]) -> dict[str, Tensor]:
    """The rewards [B] on the CPU: each part under its name, their weighted sum as `reward`, and stricter verdicts: OCR's
    exact readings, and GenEval's benchmark. Raises UserError if a part fails, or returns anything but B finite numbers."""
    prompts, columns = [r["prompt"] for r in records], {"reward": torch.zeros(len(records))}
    for name, weight, function in parts:
        try:
            if function is geneval_reward:
                rewards, columns["geneval_correct"] = geneval_verdicts(images, records)
            else:
                rewards = function(images.clone(), list(prompts), copy.deepcopy(records))  # its own, to do with as it likes
            rewards = torch.as_tensor(rewards, dtype=torch.float32).detach().cpu()
        except (Exception, SystemExit) as e:
            if out_of_memory(e):
                raise
            problem = f"raised {type(e).__name__} ({one_line(e)}) in a batch that begins with the prompt '{prompts[0]}'"
            raise UserError(f"the reward {name} {problem}: mend it")
        if rewards.shape != (len(prompts),):
            problem = f"returned shape {list(rewards.shape)}, not one number for each of {len(prompts)} images"
            raise UserError(f"the reward {name} {problem}, the first for the prompt '{prompts[0]}': mend it")
        for prompt, reward in zip(prompts, rewards.tolist()):
            if not math.isfinite(reward):
                raise UserError(f"the reward {name} returned {reward} for the prompt '{prompt}': mend it")
        if function is ocr_reward:
            columns["ocr_accuracy"] = rewards == 1
        columns[name] = rewards
        columns["reward"] = columns["reward"] + weight * rewards
    return {name: column.float() for name, column in columns.items()}


def averages(columns: dict[str, Tensor], records: list[dict]) -> dict[str, float]:
    """Their means; GenEval's by tag as well, and over the tags, as the benchmark's summary has them."""
    means = {name: column.mean().item() for name, column in columns.items()}
    if "geneval_correct" in columns:
        tags = {}
        for i, record in enumerate(records):
            tags.setdefault(str(record.get("tag")), []).append(i)
        for name in ("geneval", "geneval_correct"):
            means |= {f"{name}/{tag}": columns[name][i].mean().item() for tag, i in tags.items()}
        means["geneval_overall"] = sum(means[f"geneval_correct/{tag}"] for tag in tags) / len(tags)
    return means


def out_of_memory(e: BaseException) -> bool:
    """Whether it says so, under any of the names that it has on GPUs and CPUs."""
    names = "out of memory|allocate memory|ALLOC_FAILED|ALLOCATION_FAILED|CUBLAS_STATUS_NOT_INITIALIZED"
    return isinstance(e, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(e, RuntimeError) and re.search(names, str(e)) is not None
    )


# ---- Settings and prompts.


def setting(default, text: str):
    return dataclasses.field(default=default, metadata={"help": text})


def kind(field: dataclasses.Field) -> type:
    """The type of a setting; those without a default are strings."""
    return str if field.default is None else type(field.default)


@dataclasses.dataclass
class Config:
    """A run's settings. The defaults are the published recipe for SD3.5-M."""

    prompt_file: str | None = setting(None, "prompts to train on: .txt, one a line, or .jsonl, a record with `prompt`")
    eval_prompt_file: str | None = setting(None, "prompts to evaluate on (default: some held out of the prompt file)")
    output_dir: str | None = setting(None, "folder of the run (default: a new one in runs/)")
    model: str | None = setting(None, f"hub name or folder (default: {SD35} with a GPU, else tiny-sd3)")
    reward: str | None = setting(
        None,
        f"{', '.join(REWARDS)}, path/to/file.py:function, or a sum: geneval=0.7,pickscore=0.3 "
        "(default: ocr if every prompt quotes a text, else pickscore)",
    )
    epochs: int = setting(500, "rounds of rollout and update")
    prompts_per_epoch: int = setting(48, "prompts in an epoch")
    group_size: int = setting(24, "images for each prompt, compared with each other")
    updates_per_epoch: int = setting(2, "optimiser steps an epoch; all but the first are off-policy")
    batch_size: int = setting(4, "images in one forward pass: the fewer, the less memory")
    learning_rate: float = setting(3e-4, "of AdamW")
    decay_after: int = setting(0, "epochs at the full learning rate, which then falls as 1 / epoch; 0 if it never falls")
    max_grad_norm: float = setting(1.0, "a longer gradient is scaled down to this")
    beta: float = setting(0.04, "weight of the KL penalty")
    clip_range: float = setting(1e-4, "of the ratio; small, because log-probs are averaged over the latent's elements")
    guidance_scale: float = setting(4.5, "classifier-free guidance in training and evaluation; 1 for none")
    noise_level: float = setting(0.7, "of the SDE")
    trained_steps: int = setting(TRAIN_STEPS - 1, "denoising steps that are trained, from the first")
    step_balance: float = setting(0.0, "weighs each step's loss by (std / |dt|) to this power; 0 as published")
    lora_rank: int = setting(32, "of the adapter; its alpha is twice that")
    ema_interval: int = setting(8, "updates between two steps of the adapter's moving average")
    height: int = setting(512, "pixels")
    width: int = setting(512, "pixels")
    max_sequence_length: int = setting(128, "T5 tokens (without T5, zeros that stand for them)")
    eval_every: int = setting(20, "epochs between evaluations")
    # On a CPU it gains a tenth, which the laptop run hardly earns back.
    compile: bool = setting(torch.cuda.is_available(), "compile the network's blocks, once; by default with a GPU")
    gradient_checkpointing: bool = setting(False, "keep little for the backward pass and compute it again: less memory, slower")
    seed: int = setting(0, "of the adapter, the prompts' order and the noise")


# The embedded model's own defaults, for 2 CPU cores. What it gets wrong is mostly decided early: hence the balance. As
# failures become rare, their advantages and with them the gradient grow fivefold: hence its bound and the decay.
LAPTOP = dict(
    epochs=120, prompts_per_epoch=12, group_size=16, batch_size=96, learning_rate=1.5e-3, decay_after=60,
    max_grad_norm=5e-4, beta=0.0, clip_range=1e-3, guidance_scale=1.0, noise_level=1.0, trained_steps=7, step_balance=1.0,
    lora_rank=16, ema_interval=4, height=32, width=64, max_sequence_length=1, eval_every=40, compile=False,
)  # fmt: skip


# What --resume lets one change: the rest, and the prompts themselves, must be as they were.
MAY_CHANGE = {
    "prompt_file", "eval_prompt_file", "output_dir", "epochs", "batch_size", "eval_every", "compile", "gradient_checkpointing",
}  # fmt: skip


def check(config: Config) -> None:
    """Refuse settings that can't work: those below their least, or not above 0 if they have none, and those too large."""
    least = {"group_size": 2, "guidance_scale": 1, "beta": 0, "seed": 0, "step_balance": 0, "decay_after": 0}
    most = {"trained_steps": TRAIN_STEPS, "max_sequence_length": 512, "seed": 10**9}  # 512: SD3's own limit
    for name, value in dataclasses.asdict(config).items():
        low, high = least.get(name, math.ulp(0.0)), most.get(name, sys.float_info.max)
        if type(value) in (int, float) and not low <= value <= high:
            wanted = f"{high} at most" if value > high else f"{low} or more" if name in least else "a number above 0"
            raise UserError(f"--{name.replace('_', '-')} is {value}: give {wanted}")


def read_prompts(path: str, checks: Iterable[Callable[[dict], object]] = ()) -> list[dict]:
    """A prompt file's records, each with its `prompt` and passing the checks. Raises UserError naming the file and line."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise ValueError
    except OSError as e:
        raise UserError(f"can't read the prompt file {path} ({e.strerror}): check the path, or give --prompt-file")
    except ValueError:
        raise UserError(f"the prompt file {path} is not UTF-8 text: give a file with one prompt a line")
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line) if path.lower().endswith(".jsonl") else {"prompt": line.strip()}
            if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
                raise UserError("a record needs a `prompt` string")
            record["prompt"].encode()  # a lone surrogate can't be
            for check_record in checks:
                check_record(record)
        except (UserError, ValueError, RecursionError) as e:
            raise UserError(f"{path}, line {number}: {e}")
        records.append(record)
    if not records:
        raise UserError(f"the prompt file {path} has no prompts: write one a line")
    return records


def split_prompts(config: Config) -> tuple[list[dict], list[dict]]:
    """Training and evaluation records; without an evaluation file, half the prompts but at most 256 are held out."""
    checks = [REWARDS[source].check for source in parse_rewards(config.reward) if source in REWARDS]
    train = read_prompts(config.prompt_file, checks)
    if config.eval_prompt_file:
        return train, read_prompts(config.eval_prompt_file, checks)
    unique = {r["prompt"]: r for r in train}
    count = min(256, len(unique) // 2)
    if count == 0:
        print("Only one prompt: it is evaluated on as well as trained on. Give more, or --eval-prompt-file.")
        return train, train
    order = np.random.default_rng(0).permutation(len(unique))  # the same for every seed: runs can be compared
    names = list(unique)
    held_out = {names[i]: unique[names[i]] for i in order[:count]}
    return [r for r in train if r["prompt"] not in held_out], list(held_out.values())


def epoch_prompts(records: list[dict], config: Config, epoch: int) -> list[dict]:
    """The prompts of an epoch: each is drawn once before any is drawn again."""
    first, n = epoch * config.prompts_per_epoch, config.prompts_per_epoch
    laps = range(first // len(records), (first + n - 1) // len(records) + 1)
    order = np.concatenate([np.random.default_rng([config.seed, lap]).permutation(len(records)) for lap in laps])
    return [records[i] for i in order[first % len(records) :][:n]]


# ---- The model: a diffusers pipeline whose transformer carries a LoRA adapter.


def load_pipeline(config: Config, dtype: torch.dtype) -> StableDiffusion3Pipeline:
    """Load the pipeline in `dtype` on the CPU, frozen, and check that the image size fits it."""

    def load():
        parts = StableDiffusion3Pipeline.load_config(config.model)
        absent = {name: None for name, part in parts.items() if part == [None, None]}  # T5, as a rule
        return StableDiffusion3Pipeline.from_pretrained(config.model, dtype=dtype, **absent)

    if Path(config.model).is_absolute() and not Path(config.model).is_dir():
        raise UserError(f"there is no folder {config.model}: check --model")
    pipe = from_hub(config.model, load, "--model")
    factor = pipe.vae_scale_factor * pipe.patch_size
    largest = pipe.transformer.config.pos_embed_max_size * factor
    for name in ("height", "width"):
        size = getattr(config, name)
        if size % factor or size > largest:
            raise UserError(f"--{name} is {size}: {config.model} needs a multiple of {factor}, at most {largest}")
    for module in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
        if module is not None:
            module.requires_grad_(False).eval()
    return pipe


@torch.no_grad()
def encode_prompts(pipe, prompts: list[str], config: Config, device: str) -> dict[str, Text]:
    """Encode each prompt once, the empty one too, then free the text encoders. The result is kept on the CPU. Raises
    UserError if it won't fit there."""
    encoders = [pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3]
    for encoder in encoders:
        if encoder is not None:
            encoder.to(device)
    unique, texts = ["", *dict.fromkeys(prompts)], {}
    for i in tqdm(range(0, len(unique), 16), desc="encoding prompts", unit="batch", disable=None, leave=False):
        batch = unique[i : i + 16]
        embeds, _, pooled, _ = pipe.encode_prompt(
            batch, None, None, device=device, do_classifier_free_guidance=False,
            max_sequence_length=config.max_sequence_length,
        )  # fmt: skip
        embeds, pooled = (e.to("cpu", pipe.transformer.dtype) for e in (embeds, pooled))
        texts.update((prompt, Text(*pair)) for prompt, *pair in zip(batch, embeds, pooled))
        needed = (len(unique) - len(texts)) * (embeds[0].nbytes + pooled[0].nbytes)
        available = psutil.virtual_memory().available
        if needed > available:  # before the system ends the run without a word
            raise UserError(
                f"the {len(unique)} prompts to encode need {needed / 1e9:.1f} GB more of main memory, and {available / 1e9:.1f} "
                "are free: lower --epochs or --prompts-per-epoch"
            )
    pipe.text_encoder = pipe.text_encoder_2 = pipe.text_encoder_3 = None
    return texts


@dataclasses.dataclass
class Run:
    """What a run works with, and from `parameters` on all that training changes, which is what a checkpoint holds."""

    config: Config
    pipe: StableDiffusion3Pipeline
    reward: list[Part]
    train_records: list[dict]
    eval_records: list[dict]
    texts: dict[str, Text]
    parameters: list[torch.nn.Parameter]  # the adapter's, float32
    ema: list[Tensor]  # their moving average
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    epoch: int = 0  # done
    updates: int = 0  # done

    def text(self, records: list[dict]) -> Text:
        """The encoded prompts of some records, on the device."""
        texts = [self.texts[r["prompt"]] for r in records]
        return Text(*(torch.stack(e).to(self.pipe.device) for e in zip(*texts)))

    @property
    def one_form(self) -> bool:
        """Whether rollouts and updates must run the network in one form: full batches, and a graph. Compiled blocks are
        made for a shape; and in half precision another form takes other kernels, whose rounding the ratio would show."""
        return self.config.compile or self.pipe.transformer.dtype != torch.float32

    def pad(self, batch: list) -> list:
        """A batch, filled up by repeats if need be."""
        return [batch[i % len(batch)] for i in range(self.config.batch_size)] if self.one_form else batch

    @property
    def null_text(self) -> Text:
        return self.text([{"prompt": ""}])

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        factor = self.pipe.vae_scale_factor
        return self.pipe.transformer.config.in_channels, self.config.height // factor, self.config.width // factor


def prepare(config: Config) -> Run:
    """Check all that can be checked, load the model, encode the prompts, and add the adapter. Writes nothing."""
    check(config)
    train_records, eval_records = split_prompts(config)
    weights = parse_rewards(config.reward)
    reward = [Part(part_name(source), weight, load_reward(source)) for source, weight in weights.items()]
    device, dtype = device_and_dtype()
    pipe = load_pipeline(config, dtype)
    drawn = [r for epoch in range(config.epochs) for r in epoch_prompts(train_records, config, epoch)]
    texts = encode_prompts(pipe, [r["prompt"] for r in eval_records + drawn], config, device)
    torch.cuda.empty_cache()
    return assemble(config, pipe, reward, train_records, eval_records, texts)


def assemble(config: Config, pipe, reward: list[Part], train_records, eval_records, texts: dict[str, Text]) -> Run:
    """Add the adapter and its optimiser, and move the model to the device."""
    device, dtype = device_and_dtype()
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # for the adapter: TF32 has as many digits as the base's fp16
    parameters = add_adapter(pipe.transformer, config)
    if config.gradient_checkpointing:
        save_memory(pipe)
    pipe.to(device)
    run = Run(
        config, pipe, reward, train_records, eval_records, texts, parameters,
        ema=[p.detach().clone() for p in parameters],
        optimizer=torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=1e-4),
        # A log_prob is a mean over some 65,536 elements, and a micro-batch one of many: in half precision, gradients that
        # small would underflow, the first steps' even at the usual scale of 2^16.
        scaler=torch.amp.GradScaler(device, 2.0**20, growth_interval=100, enabled=dtype == torch.float16),
    )  # fmt: skip
    if config.compile:
        compile_blocks(run)
    return run


def save_memory(pipe) -> None:
    """Keep each block's input alone for the backward pass, which computes the rest again, and decode images one by one."""
    pipe.transformer.enable_gradient_checkpointing()
    pipe.vae.enable_slicing()  # else decoding would need the most


def compile_blocks(run: Run) -> None:
    """Compile the transformer's blocks and try each form that a run needs; if that fails, say so and go on without."""
    config, transformer = run.config, run.pipe.transformer
    print("Compiling the network's blocks, which can take minutes.", flush=True)
    # A form of a block for each kind of block, with a graph and without, with the adapter and without: more than the 8
    # at which torch would silently give up.
    torch.compiler.config.recompile_limit = 256
    # That holds for this thread. A backward pass runs in another, on a GPU, and with checkpointing it runs the blocks again.
    torch.autograd.set_multithreading_enabled(False)
    for block in transformer.transformer_blocks:
        block.compile(dynamic=False)
    text = run.text([{"prompt": ""}] * config.batch_size)
    x = torch.zeros(config.batch_size, *run.latent_shape, device=run.pipe.device)
    try:
        v_ref, *_ = reference_velocities(run, x[:, None], [1.0], text, run.null_text)
        log_prob, kl = score_step(run, x, x, 1.0, 0.5, text, run.null_text, v_ref)
        (log_prob + kl).sum().backward()
        with torch.no_grad():
            predict_velocity(transformer, x, 1.0, text, run.null_text, 1)
    except Exception as e:  # no compiler, or one that fails: there are many ways
        if out_of_memory(e):
            raise
        torch.compiler.set_stance("force_eager")
        print(f"torch.compile does not work here, so this goes on without it, slower ({one_line(e)[:150]}).", flush=True)
    run.optimizer.zero_grad(set_to_none=True)


def add_adapter(transformer, config: Config) -> list[torch.nn.Parameter]:
    """Put a float32 LoRA adapter on every attention projection; the base stays frozen. Returns the new parameters."""
    torch.manual_seed(config.seed)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    rank = config.lora_rank
    transformer.add_adapter(
        LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights="gaussian", target_modules=targets)
    )
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    for p in parameters:
        p.data = p.data.float()
    return parameters


@contextmanager
def reference(transformer):
    """The frozen base model, for the KL: the same network with its adapter off."""
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()


@contextmanager
def averaged(run: Run):
    """The adapter's moving average in place of the adapter, for evaluation and for the saved weights."""

    def swap():
        for p, average in zip(run.parameters, run.ema):
            p.data, average.data = average.data, p.data

    swap()
    try:
        yield
    finally:
        swap()


# ---- Training.


class Samples(NamedTuple):
    """An epoch's rollouts, N = P * G images, prompt by prompt, on the CPU."""

    records: list[dict]  # [N]
    latents: Tensor  # [N, T + 1, C, H, W]
    log_probs: Tensor  # [N, T], under the policy that drew them
    scores: dict[str, Tensor]  # [N] each: the `reward`, and what it is made of


def bar(total: int, name: str):
    return tqdm(total=total, desc=name, unit="image", disable=None, leave=False)


def concatenated(scores: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([batch[name] for batch in scores]) for name in scores[0]}


def collect(run: Run, generator: torch.Generator) -> tuple[Samples, dict[str, float]]:
    """Roll out G images for each of the epoch's prompts with the SDE, and score them. Returns the seconds taken, too."""
    config, device, null_text = run.config, run.pipe.device, run.null_text
    prompts = epoch_prompts(run.train_records, config, run.epoch)
    records = [r for r in prompts for _ in range(config.group_size)]
    times = schedule(run.pipe.scheduler, TRAIN_STEPS)
    latents, log_probs, scores = [], [], []
    seconds = {"seconds_rollout": 0.0, "seconds_scoring": 0.0}

    def wait_for_judge() -> None:
        start = time.perf_counter()
        for last in scores[-1:]:
            last.result()  # raises what the reward raised
        seconds["seconds_scoring"] += time.perf_counter() - start

    # A batch is judged while the next one is drawn.
    with (
        bar(len(records), "rollout") as rolling, bar(len(records), "scoring") as scoring, ThreadPoolExecutor(1) as judge
    ):  # fmt: skip
        for i in range(0, len(records), config.batch_size):
            batch, start = records[i : i + config.batch_size], time.perf_counter()
            text = run.text(run.pad(batch))
            noise = torch.randn(len(text.embeds), *run.latent_shape, generator=generator, device=device)
            path, log_prob = rollout(
                run.pipe.transformer, noise, text, null_text, times, config.noise_level, config.guidance_scale,
                generator, graph=run.one_form,
            )  # fmt: skip
            path, log_prob = path[: len(batch)], log_prob[: len(batch)]
            images = decode(run.pipe.vae, path[:, -1])
            latents.append(path.cpu())
            log_probs.append(log_prob.cpu())
            if not (log_probs[-1].isfinite().all() and images.isfinite().all()):
                raise Diverged("the model's samples are not finite: start a new run with a lower --learning-rate")
            rolling.update(len(batch))
            seconds["seconds_rollout"] += time.perf_counter() - start
            wait_for_judge()
            scores.append(judge.submit(score_images, run.reward, images, batch))
            scores[-1].add_done_callback(lambda _, n=len(batch): scoring.update(n))
        wait_for_judge()
    scores = concatenated([future.result() for future in scores])
    return Samples(records, torch.cat(latents), torch.cat(log_probs), scores), seconds


@torch.no_grad()
def reference_velocities(run: Run, latents: Tensor, times: list[float], text: Text, null_text: Text) -> list[Tensor | None]:
    """The base model's velocity at each of the times, of latents [B, T, C, H, W]; None for each where no KL asks for it."""
    if run.config.beta == 0:
        return [None] * len(times)
    transformer, guidance_scale = run.pipe.transformer, run.config.guidance_scale
    with reference(transformer):  # switching walks through the whole network: once for all times
        return [predict_velocity(transformer, latents[:, k], t, text, null_text, guidance_scale) for k, t in enumerate(times)]


def score_step(
    run: Run, x: Tensor, x_next: Tensor, t: float, t_next: float, text: Text, null_text: Text, v_ref: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The log_prob [B] of a rollout's step under the adapter as it is now, and its KL [B] to the base model, which has the
    velocity v_ref."""
    noise_level = run.config.noise_level
    v = predict_velocity(run.pipe.transformer, x, t, text, null_text, run.config.guidance_scale)
    _, log_prob, mean, std = sde_step(v, x, t, t_next, noise_level, x_next)
    if v_ref is None:
        return log_prob, torch.zeros_like(log_prob)
    _, _, ref_mean, _ = sde_step(v_ref, x, t, t_next, noise_level, x_next)
    # The published betas weigh [C]'s KL, which leaves |dt| out of the variance: the late, low-noise steps count more, and
    # image quality holds. The exact KL of [P], gaussian_kl(mean, ref_mean, std), is 1 / |dt| times larger (25 at the first
    # step, 4 at the ninth) and would take a beta about ten times smaller.
    return log_prob, gaussian_kl(mean, ref_mean, std / math.sqrt(t - t_next))


def step_weights(times: list[float], config: Config) -> list[float]:
    """The weight of each trained step's loss, 1 on average.

    By default the last step is not trained: at t = .0089 the policy is so narrow that rounding would dominate the ratio [C].
    The gradient of log_prob by the velocity is |dt| / std, times 1 + noise_level^2 / 2 but for the first step: by the
    published settings 26 times as large at the last trained step as at the first. Published runs leave it so. `step_balance`
    takes |dt| / std out: with 1 the steps' gradients are about alike; with 2 each velocity moves about as by the natural
    gradient, by more where it has more to choose from, which is early.
    """
    x, ratios = torch.zeros(1, 1, 1, 1), []
    for t, t_next in list(zip(times, times[1:]))[: config.trained_steps]:
        std = sde_step(x, x, t, t_next, config.noise_level)[3].item()
        ratios.append((std / (t - t_next)) ** config.step_balance)
    return [ratio * len(ratios) / sum(ratios) for ratio in ratios]


def optimizer_step(run: Run) -> Tensor:
    """Step along the accumulated gradient, and average the adapter when it is time to. Returns the gradient's norm."""
    config = run.config
    for group in run.optimizer.param_groups:
        # By the epochs done, not those to come: a prolonged run is the same as one that was long from the start.
        group["lr"] = config.learning_rate * (min(1, config.decay_after / (run.epoch + 1)) if config.decay_after else 1)
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.parameters, config.max_grad_norm)
    if not norm.isfinite() and run.scaler.get_scale() <= 1:  # at a larger scale, the scaler skips and halves
        raise Diverged("the gradient is not finite: start a new run with a lower --learning-rate")
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.updates += 1
    if run.updates % config.ema_interval == 0:
        decay = min(0.9, (1 + run.updates) / (10 + run.updates))  # shorter while there is little to average [C]
        for average, p in zip(run.ema, run.parameters):
            average.lerp_(p.detach(), 1 - decay)
    return norm.nan_to_num(0, 0)


def update(run: Run, samples: Samples, generator: torch.Generator) -> dict[str, float]:
    """The epoch's optimiser steps, on the samples that have an advantage. Returns the mean statistics."""
    config, device, null_text = run.config, run.pipe.device, run.null_text
    times = schedule(run.pipe.scheduler, TRAIN_STEPS)
    weights = step_weights(times, config)
    advantages = group_advantages(samples.scores["reward"].view(-1, config.group_size)).flatten()
    kept = advantages.nonzero().flatten()  # a group of equal rewards teaches nothing: drop it before the work
    kept = kept[torch.randperm(len(kept), generator=generator, device=device).cpu()]
    chunks = [chunk for chunk in kept.tensor_split(config.updates_per_epoch) if len(chunk)]
    totals, deviation = {"grad_norm": 0.0}, torch.zeros((), device=device)
    with bar(len(kept), "update") as progress:
        for chunk in chunks:
            for i in chunk.split(config.batch_size):
                padded = run.pad(i.tolist())
                text, latents = run.text([samples.records[j] for j in padded]), samples.latents[padded].to(device)
                old_log_probs, advantage = samples.log_probs[i].to(device), advantages[i].to(device)
                v_refs = reference_velocities(run, latents, times[: len(weights)], text, null_text)
                for k, step_weight in enumerate(weights):
                    step = latents[:, k], latents[:, k + 1], times[k], times[k + 1]
                    log_prob, kl = (s[: len(i)] for s in score_step(run, *step, text, null_text, v_refs[k]))
                    old = old_log_probs[:, k]
                    loss, stats = grpo_loss(log_prob, old, advantage, kl, config.clip_range, config.beta)
                    weight = len(i) / len(chunk) / len(weights)
                    run.scaler.scale(loss * step_weight * weight).backward()
                    if chunk is chunks[0]:  # nothing has changed since the rollout: not 1 means numerical error
                        deviation = torch.maximum(deviation, (log_prob.detach() - old).expm1().abs().max())
                    for name, value in stats.items():
                        totals[name] = totals.get(name, 0.0) + value * weight / len(chunks)
                progress.update(len(i))
            totals["grad_norm"] += optimizer_step(run) / len(chunks)
    stats = {"trained": len(kept) / len(advantages), "ratio_deviation": deviation, **totals}
    return {name: float(value) for name, value in stats.items()}


def evaluate(run: Run) -> tuple[dict[str, float], Tensor]:
    """Draw as one deploys, with the averaged adapter and 40 ODE steps. Returns the metrics and the first 16 images."""
    config, null_text, times = run.config, run.null_text, schedule(run.pipe.scheduler, EVAL_STEPS)
    scores, shown = [], []
    with averaged(run), bar(len(run.eval_records), "evaluation") as progress:
        for i in range(0, len(run.eval_records), config.batch_size):
            batch = run.eval_records[i : i + config.batch_size]
            text = run.text(run.pad(batch))
            noise = [  # the n-th prompt has seed n; drawn as StableDiffusion3Pipeline draws it from such generators
                torch.randn(1, *run.latent_shape, generator=torch.Generator().manual_seed(n), dtype=text.embeds.dtype)
                for n in range(i, i + len(text.embeds))
            ]
            x = torch.cat(noise).float().to(run.pipe.device)
            latents, _ = rollout(run.pipe.transformer, x, text, null_text, times, 0.0, config.guidance_scale)
            images = decode(run.pipe.vae, latents[: len(batch), -1])
            scores.append(score_images(run.reward, images, batch))
            shown.append(images[: max(0, 16 - i)].cpu())
            progress.update(len(batch))
    metrics = averages(concatenated(scores), run.eval_records)
    return {f"eval_{name}": value for name, value in metrics.items()}, torch.cat(shown)


def train(run: Run, out: Path) -> None:
    """First evaluation; epochs of rollout, scoring and update; last evaluation. Each epoch ends with a checkpoint."""
    config = run.config
    (out / "samples").mkdir(parents=True, exist_ok=True)
    write_text(out / "config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    write_text(out / "eval_prompts.jsonl", "".join(json.dumps(r) + "\n" for r in run.eval_records))
    metrics = read_metrics(out / "metrics.jsonl", run.epoch) if run.epoch else []
    write_text(out / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in metrics))
    writer = SummaryWriter(out / "tensorboard", purge_step=run.epoch + 1 if metrics else None)

    def log(record: dict) -> None:
        metrics.append(record)
        with open(out / "metrics.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")
            f.flush()
            os.fsync(f.fileno())
        for name, value in record.items():
            writer.add_scalar(name, value, record["epoch"])
        writer.flush()
        hidden = {"epoch", "ratio_mean", "policy_loss"}
        shown = "  ".join(f"{n} {v:.3g}" for n, v in record.items() if n not in hidden and "/" not in n)
        tqdm.write(f"epoch {record['epoch']}: {shown}")
        sys.stdout.flush()

    with tqdm(total=config.epochs, initial=run.epoch, desc="epochs", unit="epoch", disable=None) as progress:
        while True:
            due = run.epoch % config.eval_every == 0 or run.epoch >= config.epochs
            if due and not any(m["epoch"] == run.epoch and "eval_reward" in m for m in metrics):
                tqdm.write(f"epoch {run.epoch}: evaluating on {len(run.eval_records)} prompts")
                sys.stdout.flush()
                result, images = evaluate(run)
                write_grid(images, out / "samples" / f"epoch_{run.epoch:05}.png")
                log({"epoch": run.epoch, **result})
            if due:
                write_curve(metrics, out / "curve.png")
            if run.epoch >= config.epochs:
                break
            # A generator of its own for each epoch: nothing about randomness needs to be in the checkpoint. On the device:
            # to copy its noise there would keep the device waiting at each step.
            generator = torch.Generator(run.pipe.device).manual_seed(config.seed * 1_000_003 + run.epoch)
            samples, seconds = collect(run, generator)
            start = time.perf_counter()
            stats = update(run, samples, generator)
            run.epoch += 1
            rewards = averages(samples.scores, samples.records) | {"reward_std": samples.scores["reward"].std().item()}
            seconds["seconds_update"] = time.perf_counter() - start
            del samples  # gigabytes, at SD3.5's size
            log({"epoch": run.epoch, **rewards, **stats, **seconds})
            save(run, out)
            progress.update()
    writer.close()
    evaluations = [m for m in metrics if "eval_reward" in m]
    before, after = evaluations[0], evaluations[-1]
    for name in [name for name in after if name != "epoch" and "/" not in name]:
        print(f"held-out {name.removeprefix('eval_')}: {before[name]:.3f} before, {after[name]:.3f} after")
    print(f"({len(run.eval_records)} prompts, {EVAL_STEPS} ODE steps.) The weights, images and curve are in {out}")


# ---- Files.


@contextmanager
def atomic(path: Path):
    """Write under another name, then rename: whenever the power goes, `path` is the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.new")  # no name that load_lora_weights would take for the weights
    yield temporary
    with open(temporary, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def identity(run: Run) -> dict:
    """What must be the same for a checkpoint to be this run's: the settings but for MAY_CHANGE, and the prompts."""
    settings = {n: v for n, v in dataclasses.asdict(run.config).items() if n not in MAY_CHANGE}
    prompts = hashlib.sha256(json.dumps([run.train_records, run.eval_records]).encode()).hexdigest()
    # A model's folder may have moved.
    return settings | {"model": Path(run.config.model).name, "prompts": prompts, "device": run.pipe.device.type}


def digest(state: str, tensors: dict[str, Tensor]) -> str:
    h = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        h.update(tensors[name].numpy().tobytes())
    return h.hexdigest()


def save(run: Run, out: Path) -> None:
    """Write the checkpoint to go on from, and the averaged adapter in the format of diffusers."""
    tensors = {}
    for i, (p, average) in enumerate(zip(run.parameters, run.ema)):
        for name, value in {"adapter": p.detach(), "ema": average, **run.optimizer.state[p]}.items():
            tensors[f"{i}.{name}"] = value.cpu().contiguous()
    state = json.dumps(
        {"epoch": run.epoch, "updates": run.updates, "scaler": run.scaler.state_dict(), "settings": identity(run)}
    )
    with atomic(out / "checkpoint.safetensors") as path:
        save_file(tensors, path, {"state": state, "sha256": digest(state, tensors)})
    with averaged(run), atomic(out / "pytorch_lora_weights.safetensors") as path:
        transformer = run.pipe.transformer
        run.pipe.save_lora_weights(
            path.parent,
            weight_name=path.name,
            transformer_lora_layers=get_peft_model_state_dict(transformer),
            transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
        )


def restore(run: Run, path: Path) -> None:
    """Load a checkpoint written by `save`; no pickled code is involved. Raises UserError if it is not this run's."""
    try:
        with safe_open(path, "pt") as f:
            metadata, tensors = f.metadata(), {name: f.get_tensor(name) for name in f.keys()}
        state = json.loads(metadata["state"])
        if digest(metadata["state"], tensors) != metadata["sha256"]:
            raise ValueError("its checksum is wrong")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"the checkpoint {path} is damaged ({e}): put back a copy of it, or start a new run")
    for name, value in identity(run).items():
        before = state["settings"].get(name)
        if before != value:
            difference = "other prompts" if name == "prompts" else f"other settings ({name} was {before}, now {value})"
            raise UserError(
                f"the checkpoint {path} was made with {difference}: resume with the same ones, or start a new run with "
                "another --output-dir"
            )
    for i, (p, average) in enumerate(zip(run.parameters, run.ema)):
        own = {name.split(".", 1)[1]: t.to(p.device) for name, t in tensors.items() if name.startswith(f"{i}.")}
        p.data.copy_(own.pop("adapter"))
        average.copy_(own.pop("ema"))
        if own:  # the optimiser has begun
            run.optimizer.state[p] = {name: t.cpu() if name == "step" else t for name, t in own.items()}
    run.scaler.load_state_dict(state["scaler"])
    run.epoch, run.updates = state["epoch"], state["updates"]


def read_metrics(path: Path, epoch: int) -> list[dict]:
    """The lines up to a checkpoint's epoch; a last line cut short is dropped. Raises UserError if another is damaged."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    metrics = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if record["epoch"] <= epoch:
                metrics.append(record)
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                raise UserError(f"{path}, line {number} is damaged: put back a copy, or delete that line")
    return metrics


def write_grid(images: Tensor, path: Path) -> None:
    """Images [B, 3, H, W] as a PNG, four in a row, small ones enlarged."""
    zoom = max(1, 128 // images.shape[-1])
    with atomic(path) as temporary:
        save_image(F.interpolate(images, scale_factor=zoom), temporary, format="png", nrow=4, padding=0)


def write_curve(metrics: list[dict], path: Path) -> None:
    """The rewards of the rollouts and of the evaluations, by epoch."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, label, style in [
        ("reward", "rollouts: reward (10 SDE steps)", "-"),
        ("eval_reward", "held out: reward (40 ODE steps)", "o-"),
        ("eval_ocr_accuracy", "held out: OCR accuracy (40 ODE steps)", "s-"),
        ("eval_geneval_overall", "held out: GenEval overall (40 ODE steps)", "s-"),
    ]:
        points = [(m["epoch"], m[name]) for m in metrics if name in m]
        if points:
            axes.plot(*zip(*points), style, label=label)
    axes.set(xlabel="epoch")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


# ---- Command line.


def configure(argv: list[str] | None) -> tuple[Config, Path, bool]:
    """The settings (flags over a resumed run's config.json over the defaults), the run's folder, and whether to resume."""
    parser = argparse.ArgumentParser(
        description="Fine-tune Stable Diffusion 3.5 Medium by online reinforcement learning (Flow-GRPO).",
        argument_default=argparse.SUPPRESS,
    )
    for field in dataclasses.fields(Config):
        text = field.metadata["help"]
        if field.default is not None:
            laptop = f"; {LAPTOP[field.name]} with tiny-sd3" if field.name in LAPTOP else ""
            text += f" (default {field.default}{laptop})"
        how = {"action": argparse.BooleanOptionalAction} if kind(field) is bool else {"type": kind(field)}
        parser.add_argument(f"--{field.name.replace('_', '-')}", help=text, **how)
    parser.add_argument("--resume", nargs="?", const="", metavar="DIR", help="go on with the run in DIR or --output-dir")
    given = vars(parser.parse_args(argv))

    resume = "resume" in given
    folder = given.pop("resume", "") or given.get("output_dir")
    if resume and not folder:
        raise UserError("--resume needs the folder of a run, as in --resume runs/20260101-120000")
    out = Path(folder or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    given["output_dir"] = str(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, not a folder: give another --output-dir")

    if resume and (out / "config.json").exists():
        try:
            stored = dict(json.loads((out / "config.json").read_text(encoding="utf-8")))
            for field in dataclasses.fields(Config):
                value = stored.setdefault(field.name, field.default)  # the run may be older than a setting
                fits = type(value) is kind(field) or (kind(field), type(value)) == (float, int)
                if not fits and (field.name, value) != ("eval_prompt_file", None):
                    raise TypeError(f"{field.name} is {value!r}")
            stored = dataclasses.asdict(Config(**stored))
        except (ValueError, TypeError, KeyError) as e:
            raise UserError(f"{out / 'config.json'} is damaged ({e}): put back a copy of it, or start a new run")
        print(f"Resuming the run in {out}.", flush=True)
        return Config(**stored | given), out, True
    if resume and (out / "checkpoint.safetensors").exists():
        raise UserError(f"{out / 'config.json'} is missing: put back a copy of it, or start a new run")
    if not resume and any((out / name).exists() for name in ("config.json", "checkpoint.safetensors", "metrics.jsonl")):
        raise UserError(f"{out} holds another run: give another --output-dir, or go on with it by --resume {out}")
    if "prompt_file" not in given:
        example = "no prompts: give a file with --prompt-file, for example prompts.txt"
        raise UserError(f"{out} holds no run to resume: check the path" if resume else example)
    if resume:
        print(f"{out} holds no run yet: this starts one.", flush=True)
    if "model" not in given and torch.cuda.is_available():
        given["model"] = SD35
        print(f"Training {SD35} on {torch.cuda.get_device_name()}.", flush=True)
    elif "model" not in given:
        given["model"] = str(TINY)
        print("No CUDA GPU was found, so this trains the embedded tiny-sd3, not Stable Diffusion 3.5 Medium.", flush=True)
    if "reward" not in given:
        files = [given[name] for name in ("prompt_file", "eval_prompt_file") if given.get(name)]
        prompts = [r["prompt"] for path in files for r in read_prompts(path)]
        without = next((p for p in prompts if not quoted_texts(p)), None)
        given["reward"] = "ocr" if without is None else "pickscore"
        why = "every prompt quotes a text" if without is None else f"not every prompt quotes a text ({without[:60]})"
        print(f"The reward is {given['reward']}, because {why}; --reward chooses another.", flush=True)
    embedded = Path(given["model"]).resolve() == TINY
    return Config(**(LAPTOP if embedded else {}) | given), out, resume


def main(argv: list[str] | None = None) -> int:
    config, hint = Config(), ""
    try:
        config, out, resume = configure(argv)
        run = prepare(config)
        if resume and (out / "checkpoint.safetensors").exists():
            restore(run, out / "checkpoint.safetensors")
            save(run, out)  # the weights may be an epoch behind the checkpoint
            print(f"{run.epoch} epochs are done, of {config.epochs}.", flush=True)
        print("\n".join(f"  {name:22} {value}" for name, value in dataclasses.asdict(config).items()), flush=True)
        hint = f" (to go on: python flow_grpo.py --resume {out})"
        train(run, out)
        return 0
    except KeyboardInterrupt:
        error, code = "interrupted" + (", finished epochs are kept" if hint else ""), 130
    except UserError as e:
        error, code = str(e), 2
        hint = "" if isinstance(e, Diverged) else hint
    except (OSError, SafetensorError) as e:
        error, code = f"can't read or write a file ({e}): see to the disk and the permissions", 2
    except (RuntimeError, MemoryError) as e:
        if not out_of_memory(e):
            raise
        switch = "" if config.gradient_checkpointing else "--gradient-checkpointing or "
        error, code = f"out of memory: give {switch}a lower --batch-size (now {config.batch_size})", 2
        hint = hint or "; smaller images take less, too. If none of it helps, the model alone needs more than there is"
    print(f"error: {error}{hint}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
