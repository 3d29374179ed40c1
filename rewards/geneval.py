"""The GenEval reward of Flow-GRPO: are the prompt's objects, counts, colours and positions in the image?

A detector finds the objects, CLIP names their colours, and rules compare both with the prompt's record.
The file stands alone. Copy it, `pip install torch torchvision transformers scipy open_clip_torch`, and run:

    import geneval, torchvision
    image = torchvision.io.decode_image("benches.png", "RGB") / 255
    geneval.reward(image[None], ["two benches"], [{"include": [{"class": "bench", "count": 2}]}])

[G] Ghosh et al., GenEval, arXiv 2310.11513, and its code, djghosh13/geneval.
[P] Liu et al., Flow-GRPO, arXiv 2505.05470.
[C] The code of [P]'s authors, yifan123/flow_grpo and yifan123/reward-server.

`reward` returns two columns: `geneval`, the graded score of [P] to train on, and `geneval_correct`, the
benchmark's verdict, whose average is what papers report. The `exclude` clauses of a record enter the
benchmark's verdict alone, not the score.

The score differs from [C]'s training reward in three ways:
- A clause scores 0 at the least. In [C] it has no floor: ten objects where one was asked for score -8.
- A wrong position adds a 0, as in [P]. [C] adds the 0 too, but then still appends a 1 beside it.
- The detector gets RGB, as its weights expect. [C]'s server hands RGB to one that expects BGR.

The detector is the network of [G], Mask2Former with Swin-S for COCO, but with other weights: the hub's are
the network's authors' own, and [G] uses OpenMMLab's training. So scores don't match published ones to the
last image.
"""

import functools
import math
import warnings
from collections.abc import Callable, Sequence

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import masks_to_boxes
from torchvision.transforms import functional as transforms
from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
DETECTOR_SIZE = {"shortest_edge": 800, "longest_edge": 1333}  # pixels, as in [G]
MAX_OBJECTS = 16  # of a class, as in [G]
CLIP, CLIP_WEIGHTS = "ViT-L-14-quickgelu", "openai"  # OpenAI trained it with the QuickGELU activation.
DEVICE, CLIP_DTYPE = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)

# COCO's 80 classes in the detector's order, by [G]'s names. COCO's own name follows a slash where it differs.
COCO = (
    "person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant stop_sign "
    "parking_meter bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag "
    "tie suitcase frisbee skis snowboard sports_ball kite baseball_bat baseball_glove skateboard surfboard "
    "tennis_racket bottle wine_glass cup fork knife spoon bowl banana apple sandwich orange broccoli carrot "
    "hot_dog pizza donut cake chair couch potted_plant bed dining_table toilet tv laptop "
    "computer_mouse/mouse tv_remote/remote computer_keyboard/keyboard cell_phone microwave oven toaster "
    "sink refrigerator book clock vase scissors teddy_bear hair_drier toothbrush"
)
COCO = [names.replace("_", " ").split("/") for names in COCO.split()]
KNOWN = {name for names in COCO for name in names}
COLORS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
POSITIONS = ["left of", "right of", "above", "below"]
TAGS = ["single_object", "two_object", "counting", "colors", "position", "color_attr"]


# ---- The rules.


def check(record: dict) -> None:
    """Raises ValueError if `geneval_score` can't judge the record. Warns of a tag that [G] doesn't have."""
    include, exclude = record.get("include"), record.get("exclude", [])
    if not (isinstance(include, list) and include and isinstance(exclude, list)):
        hint = '[{"class": "bench", "count": 1}]'
        raise ValueError(f"GenEval needs a list `include`, such as {hint}, and maybe a list `exclude`")
    for i, clause in enumerate(include + exclude):
        name = clause.get("class") if isinstance(clause, dict) else clause
        if not isinstance(name, str) or name not in KNOWN:
            raise ValueError(f"the detector doesn't know the class {name!r}: use one of COCO's 80")
        count, color, position = (clause.get(key) for key in ("count", "color", "position"))
        if type(count) is not int or not 1 <= count <= MAX_OBJECTS:  # True is an instance of int.
            raise ValueError(f"the count of {name} is {count!r}: give a whole number from 1 to {MAX_OBJECTS}")
        if i >= len(include) and (color, position) != (None, None):
            raise ValueError(f"`exclude` can't judge a color or position: give {name} a count alone")
        if color not in [None, *COLORS]:
            raise ValueError(f"the color {color!r} can't be judged: use one of {', '.join(COLORS)}")
        # They are compared as text, because 0.0 and False equal 0 but aren't an index.
        if position is not None and repr(position) not in [repr([p, j]) for p in POSITIONS for j in range(i)]:
            hint = f"give one of {', '.join(POSITIONS)} and the index of an earlier clause"
            raise ValueError(f"the position {position!r} can't be judged: {hint}")
    if record.get("tag") not in [None, *TAGS]:
        problem = f"the tag {record['tag']!r} is none of GenEval's: {', '.join(TAGS)}"
        warnings.warn(problem, stacklevel=2)  # Python shows the same warning once.


def relative_positions(box: Sequence[float], other: Sequence[float]) -> list[str]:
    """Where `box` stands from `other` in [G]: nowhere if they are nearly concentric, or in up to two ways.

    Boxes are (x0, y0, x1, y1) with y downwards.
    """
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
    """Judge an image by the objects found in it: the score of [P] and the verdict of [G], evaluate_images.py.

    Args:
        record: a line of a GenEval prompt file. `include` lists clauses with `class`, `count` and maybe
            `color` or `position` (a relation and the index of an earlier clause). `exclude` lists classes
            with a count that must not be reached.
        boxes: class -> its boxes (x0, y0, x1, y1), most confident first.
        color_of: (class, index of a box) -> colour. It is asked only about boxes that a colour clause judges.
    Returns:
        score, the training reward: each clause gives 1 - |found - count| / count, 0 at the least. A colour
            or a position gives a second part, which is 0 unless the count is exactly right: the fraction of
            objects in the colour, or 1 if all objects stand as asked to those of a clause that holds as
            exactly. The score is the mean over the parts.
        correct, the benchmark's verdict: each clause holds for the `count` most confident objects, and no
            `exclude` count is reached.
    Raises ValueError if a colour is to be judged without `color_of`.

    The two differ on purpose. The score is graded, so that the images of a group differ before any is right.
    It also takes surplus objects off, which the benchmark lets pass unless a clause excludes them: a policy
    trained on the benchmark's verdict would fill its images with objects.
    """
    parts, judged, exact, correct = [], [], [], True  # exact: does each clause hold with the exact count?
    for clause in record["include"]:
        name, count = clause["class"], clause["count"]
        found = boxes.get(name, [])
        judged.append(found[:count])
        is_exact, is_enough = len(found) == count, len(found) >= count
        parts.append(max(0.0, 1 - abs(len(found) - count) / count))
        if clause.get("color"):
            if is_enough and color_of is None:
                raise ValueError("a clause with a color needs color_of")
            right = sum(color_of(name, i) == clause["color"] for i in range(count)) if is_enough else 0
            parts.append(right / count if is_exact else 0.0)
            is_exact, is_enough = is_exact and right == count, is_enough and right == count
        if clause.get("position"):
            relation, target = clause["position"]
            stands = all(relation in relative_positions(a, b) for a in judged[-1] for b in judged[target])
            is_exact, is_enough = is_exact and exact[target] and stands, is_enough and stands
            parts.append(float(is_exact))
        exact.append(is_exact)
        correct = correct and is_enough
    excluded = any(len(boxes.get(c["class"], [])) >= c["count"] for c in record.get("exclude", []))
    return sum(parts) / len(parts), correct and not excluded


# ---- The detector.


@functools.cache
def detector():
    """Mask2Former and its image processor. It runs in float32 on GPUs too, as in [G]."""
    model = Mask2FormerForUniversalSegmentation.from_pretrained(DETECTOR, dtype=torch.float32)
    return model.to(DEVICE).eval(), AutoImageProcessor.from_pretrained(DETECTOR, size=DETECTOR_SIZE)


def detect(images: Tensor, records: list[dict]) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """Per image: class -> boxes [N, 4], masks [N, H, W] of up to 16 objects, surest first.

    An object counts above a confidence of 0.3, or of 0.9 if the record's tag is `counting`, as in [G].
    Scores, masks and boxes are worked out from the network's output as mmdet does. The processor of
    transformers would round the masks to a grid of 384 pixels.
    """
    model, processor = detector()
    pixels = processor(list(images), do_rescale=False, return_tensors="pt")["pixel_values"]
    out = model(pixels.to(DEVICE))  # for Q queries: logits [B, Q, 81] and masks [B, Q, h, w]
    result = []
    for logits, masks, record in zip(out.class_queries_logits, out.masks_queries_logits, records):
        threshold = 0.9 if record.get("tag") == "counting" else 0.3
        # The Q most probable pairs of a query and a class are the candidates. The last class is "no object".
        scores, index = logits.softmax(1)[:, :-1].flatten().topk(len(logits))
        query, label = index // len(COCO), index % len(COCO)
        masks = F.interpolate(masks[None, query], images.shape[-2:], mode="bilinear")[0]
        inside = masks > 0
        scores = scores * (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
        order = scores.argsort(descending=True, stable=True)
        order, found = order[scores[order] > threshold], {}
        for i in label[order].unique().tolist():
            kept = inside[order[label[order] == i][:MAX_OBJECTS]]
            boxes = masks_to_boxes(kept)
            boxes[:, 2:] += 1  # up to the far edge of the last pixel
            found |= dict.fromkeys(COCO[i], (boxes, kept))
        result.append(found)
    return result


# ---- The colours.


@functools.cache
def clip_model():
    """CLIP, in half precision on a GPU, and its tokenizer."""
    model = open_clip.create_model(CLIP, CLIP_WEIGHTS, device=DEVICE)
    return model.to(CLIP_DTYPE).eval(), open_clip.get_tokenizer(CLIP)


def clip_image(image: Tensor) -> Tensor:
    """Unit embedding [D] of an image [3, H, W] of any size, of which CLIP sees the central square."""
    model, _ = clip_model()
    size, settings = model.visual.image_size[0], model.visual.preprocess_cfg
    image = transforms.resize(image, [size], transforms.InterpolationMode.BICUBIC, antialias=True)
    image = transforms.center_crop(image.clamp(0, 1), [size])
    image = transforms.normalize(image, settings["mean"], settings["std"])
    return F.normalize(model.encode_image(image[None].to(DEVICE, CLIP_DTYPE))[0].float(), dim=0)


@functools.cache
def color_texts(name: str) -> Tensor:
    """Zero-shot classifier of an object's colour [10, D]: for each, the mean over [G]'s three templates."""
    model, tokenizer = clip_model()
    templates = "a photo of a {c} {name}", "a photo of a {c}-colored {name}", "a photo of a {c} object"
    texts = [t.format(c=c, name=name) for c in COLORS for t in templates]
    embeddings = F.normalize(model.encode_text(tokenizer(texts).to(DEVICE)).float(), dim=1)
    return F.normalize(embeddings.view(len(COLORS), len(templates), -1).mean(1), dim=1)


def object_color(image: Tensor, objects: dict[str, tuple[Tensor, Tensor]], name: str, i: int) -> str:
    """The colour that CLIP sees in the crop of a class's i-th object, #999 around its mask, as in [G]."""
    boxes, masks = objects[name]
    x0, y0, x1, y1 = boxes[i].int().tolist()
    crop = torch.where(masks[i], image, 0.6)[:, y0:y1, x0:x1]
    return COLORS[int((color_texts(name) @ clip_image(crop)).argmax())]


@torch.no_grad()
def reward(images: Tensor, prompts: list[str], metadata: list[dict]) -> dict[str, Tensor]:
    """Scores [B] and the benchmark's verdicts [B] of images [B, 3, H, W] in 0..1, by the prompts' records."""
    clip_model()  # The first call loads both models, whatever it asks: one out of reach shows at once.
    images, verdicts = images.to(DEVICE), []
    for image, record, objects in zip(images, metadata, detect(images, metadata)):
        boxes = {name: boxes.tolist() for name, (boxes, _) in objects.items()}
        verdicts.append(geneval_score(record, boxes, functools.partial(object_color, image, objects)))
    scores, correct = zip(*verdicts)
    return {"geneval": torch.tensor(scores), "geneval_correct": torch.tensor(correct).float()}
