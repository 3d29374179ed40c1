"""The GenEval reward of Flow-GRPO asks whether the prompt's objects, counts, colours and positions
are in the image.

A detector finds the objects, CLIP names their colours, and rules compare both with the prompt's
record. The file stands alone. Copy it, `pip install torch torchvision transformers scipy
open_clip_torch`, and run:

    import geneval, torchvision
    image = torchvision.io.decode_image("benches.png", "RGB") / 255
    record = {"include": [{"class": "bench", "count": 2}]}
    geneval.reward(image[None], ["two benches"], [record])

[G] Ghosh et al., GenEval, arXiv 2310.11513, and its code, djghosh13/geneval.
[P] Liu et al., Flow-GRPO, arXiv 2505.05470.
[C] The code of [P]'s authors, yifan123/flow_grpo and yifan123/reward-server.

`reward` returns two columns. `geneval` is the graded score of [P], to train on. `geneval_correct`
is the benchmark's verdict, whose average is what papers report. The `exclude` clauses of a record
enter the benchmark's verdict alone, not the score.

The score differs from [C]'s training reward in three ways:
- A clause scores 0 at the least. In [C] it has no floor, and ten objects where one was asked for
  score -8.
- A wrong position adds a 0, as in [P]. [C] adds the 0 too, but then still appends a 1 beside it.
- The detector gets RGB, as its weights expect. [C]'s server hands RGB to one that expects BGR.

The detector is the network of [G], Mask2Former with Swin-S for COCO, but with other weights. The
hub's are the network's authors' own, and [G] uses OpenMMLab's training. So scores don't match
published ones to the last image.
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
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms
from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
DETECTOR_SIZE = {"shortest_edge": 800, "longest_edge": 1333}  # in pixels, as in [G]
MAX_OBJECTS = 16  # per class, as in [G]
CLIP = "ViT-L-14-quickgelu"  # OpenAI trained it with the QuickGELU activation.
CLIP_WEIGHTS = "openai"
# "cuda" is the GPU of this process, where it called torch.cuda.set_device, as under torchrun.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLIP_DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32

# COCO's 80 classes in the detector's order, by [G]'s names. COCO's own name follows a slash where
# it differs.
COCO = (
    "person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant "
    "stop_sign parking_meter bench bird cat dog horse sheep cow elephant bear zebra giraffe "
    "backpack umbrella handbag tie suitcase frisbee skis snowboard sports_ball kite "
    "baseball_bat baseball_glove skateboard surfboard tennis_racket bottle wine_glass cup fork "
    "knife spoon bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake "
    "chair couch potted_plant bed dining_table toilet tv laptop computer_mouse/mouse "
    "tv_remote/remote computer_keyboard/keyboard cell_phone microwave oven toaster sink "
    "refrigerator book clock vase scissors teddy_bear hair_drier toothbrush"
)
COCO = [names.replace("_", " ").split("/") for names in COCO.split()]
KNOWN = {name for names in COCO for name in names}
COLORS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
POSITIONS = ["left of", "right of", "above", "below"]
TAGS = ["single_object", "two_object", "counting", "colors", "position", "color_attr"]


# ---- The rules.


def check(record: dict) -> None:
    """Raises ValueError if `geneval_score` can't judge the record.

    A tag that [G] doesn't have is only warned of.
    """
    include = record.get("include")
    exclude = record.get("exclude", [])
    if not (isinstance(include, list) and include and isinstance(exclude, list)):
        hint = '[{"class": "bench", "count": 1}]'
        problem = f"GenEval needs a list `include`, such as {hint}, and maybe a list `exclude`"
        raise ValueError(problem)
    for i, clause in enumerate(include):
        check_count(clause)
        check_color(clause.get("color"))
        check_position(clause.get("position"), i)
    for clause in exclude:
        check_count(clause)
        if clause.get("color") is not None or clause.get("position") is not None:
            hint = f"give {clause['class']} a count alone"
            raise ValueError(f"`exclude` can't judge a color or position: {hint}")
    tag = record.get("tag")
    if tag is not None and tag not in TAGS:
        problem = f"the tag {tag!r} is none of GenEval's: {', '.join(TAGS)}"
        warnings.warn(problem, stacklevel=2)  # Python shows the same warning once.


def check_count(clause: dict) -> None:
    """Raises ValueError unless the clause has a class of COCO and a count of its objects."""
    name = clause.get("class") if isinstance(clause, dict) else clause
    if not isinstance(name, str) or name not in KNOWN:
        raise ValueError(f"the detector doesn't know the class {name!r}: use one of COCO's 80")
    if not isinstance(clause, dict):
        raise ValueError(f'{clause!r} needs a count, as in {{"class": {clause!r}, "count": 1}}')
    count = clause.get("count")
    if type(count) is not int or not 1 <= count <= MAX_OBJECTS:  # True is an instance of int.
        hint = f"give a whole number from 1 to {MAX_OBJECTS}"
        raise ValueError(f"the count of {name} is {count!r}: {hint}")


def check_color(color: str | None) -> None:
    """Raises ValueError if there is a colour that isn't one of GenEval's."""
    if color is not None and color not in COLORS:
        raise ValueError(f"the color {color!r} can't be judged: use one of {', '.join(COLORS)}")


def check_position(position: list | None, i: int) -> None:
    """Raises ValueError if the i-th clause has a position that isn't from an earlier clause."""
    possible = [[relation, j] for relation in POSITIONS for j in range(i)]
    # They are compared as text, because 0.0 and False equal 0 but aren't an index.
    if position is not None and repr(position) not in map(repr, possible):
        hint = f"give one of {', '.join(POSITIONS)} and the index of an earlier clause"
        raise ValueError(f"the position {position!r} can't be judged: {hint}")


def relative_positions(box: Sequence[float], other: Sequence[float]) -> list[str]:
    """Where `box` stands from `other` in [G], in up to two ways, or nowhere if it is too near.

    Boxes are (x0, y0, x1, y1) with y downwards.
    """
    ax0, ay0, ax1, ay1 = box
    bx0, by0, bx1, by1 = other
    # The larger the boxes, the more their centres may differ on an axis before it counts.
    dx = (ax0 + ax1 - bx0 - bx1) / 2
    dy = (ay0 + ay1 - by0 - by1) / 2
    free_x = 0.1 * (abs(ax1 - ax0) + abs(bx1 - bx0))
    free_y = 0.1 * (abs(ay1 - ay0) + abs(by1 - by0))
    rest_x = math.copysign(max(abs(dx) - free_x, 0), dx)
    rest_y = math.copysign(max(abs(dy) - free_y, 0), dy)
    if max(abs(rest_x), abs(rest_y)) < 1e-3:
        return []
    distance = math.hypot(dx, dy)
    x = rest_x / distance
    y = rest_y / distance
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return [relation for relation in holds if holds[relation]]


def geneval_score(
    record: dict,
    boxes: dict[str, Sequence[Sequence[float]]],
    color_of: Callable[[str, int], str] | None = None,
) -> tuple[float, bool]:
    """Judge an image by the objects in it, with the score of [P] and the verdict of [G]'s
    evaluate_images.py.

    Args:
        record: a line of a GenEval prompt file. `include` lists clauses with `class`, `count` and
            maybe `color` or `position` (a relation and the index of an earlier clause). `exclude`
            lists classes with a count that must not be reached.
        boxes: class -> its boxes (x0, y0, x1, y1), most confident first.
        color_of: (class, index of a box) -> colour. It is asked only about boxes that a colour
            clause judges.
    Returns:
        score: the training reward, which is the mean over all clauses' parts. Each clause has the
            part 1 - |found - count| / count, 0 at the least. A colour or a position adds a part,
            which is 0 unless the count is exactly right. That of a colour is the fraction of
            objects in it. That of a position is 1 if all objects stand as asked to all those of
            the other clause, and both clauses hold with exact counts, and else 0.
        correct: the benchmark's verdict, which is whether each clause holds for the `count` most
            confident objects, and no `exclude` count is reached.
    Raises ValueError if a colour is to be judged without `color_of`.

    The two differ on purpose. The score is graded, so that the images of a group differ before any
    is right. It also takes surplus objects off, which the benchmark lets pass unless a clause
    excludes them. A policy trained on the benchmark's verdict would fill its images with objects.
    """
    parts = []
    judged = []  # by clause, its `count` most confident boxes
    exact = []  # by clause, whether it holds with the exact count
    correct = True
    for clause in record["include"]:
        name = clause["class"]
        count = clause["count"]
        found = boxes.get(name, [])
        judged.append(found[:count])
        is_exact = len(found) == count
        is_enough = len(found) >= count
        parts.append(max(0.0, 1 - abs(len(found) - count) / count))
        if clause.get("color"):
            right = 0
            if is_enough:
                right = count_of_color(clause, color_of)
            parts.append(right / count if is_exact else 0.0)
            is_exact = is_exact and right == count
            is_enough = is_enough and right == count
        if clause.get("position"):
            relation, target = clause["position"]
            stands = all_stand(relation, judged[-1], judged[target])
            is_exact = is_exact and exact[target] and stands
            is_enough = is_enough and stands
            parts.append(float(is_exact))
        exact.append(is_exact)
        correct = correct and is_enough
    for clause in record.get("exclude", []):
        found = boxes.get(clause["class"], [])
        correct = correct and len(found) < clause["count"]
    return sum(parts) / len(parts), correct


def count_of_color(clause: dict, color_of: Callable[[str, int], str] | None) -> int:
    """How many of the `count` most confident objects have the clause's colour."""
    if color_of is None:
        raise ValueError("a clause with a color needs color_of")
    colors = [color_of(clause["class"], i) for i in range(clause["count"])]
    return colors.count(clause["color"])


def all_stand(relation: str, boxes: Sequence, others: Sequence) -> bool:
    """Whether each of the boxes stands in the relation to each of the others."""
    for box in boxes:
        for other in others:
            if relation not in relative_positions(box, other):
                return False
    return True


# ---- The detector.


@functools.cache
def detector():
    """Mask2Former and its image processor, in float32 on GPUs too, as in [G].

    In a run of flow_grpo.py on a GPU, its matrix products are in TF32 all the same, because that
    file's torch.set_float32_matmul_precision("high") is global.
    """
    model = Mask2FormerForUniversalSegmentation.from_pretrained(DETECTOR, dtype=torch.float32)
    processor = AutoImageProcessor.from_pretrained(DETECTOR, size=DETECTOR_SIZE)
    return model.to(DEVICE).eval(), processor


def detect(images: Tensor, records: list[dict]) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """Finds the objects in each of the images [B, 3, H, W] in 0..1.

    Returns for each image a dict of class -> boxes [N, 4] and masks [N, H, W] of up to 16 objects,
    surest first. An object counts above a confidence of 0.3, or of 0.9 if the record's tag is
    `counting`, as in [G].
    """
    model, processor = detector()
    inputs = processor(list(images), do_rescale=False, return_tensors="pt")
    output = model(inputs["pixel_values"].to(DEVICE))
    all_logits = output.class_queries_logits  # [B, Q, 81], for Q queries
    all_masks = output.masks_queries_logits  # [B, Q, h, w]
    found = []
    for logits, masks, record in zip(all_logits, all_masks, records):
        threshold = 0.9 if record.get("tag") == "counting" else 0.3
        found.append(objects_above(threshold, logits, masks, images.shape[-2:]))
    return found


def objects_above(
    threshold: float, logits: Tensor, masks: Tensor, size: Sequence[int]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The objects in an image of this size, from Q queries' logits [Q, 81] and masks [Q, h, w].

    Returns class -> boxes and masks, as `detect` does. Scores, masks and boxes are worked out as
    mmdet does. The processor of transformers would round the masks to a grid of 384 pixels.
    """
    # The Q most probable pairs of a query and a class are the candidates. The last class is
    # "no object".
    probabilities = logits.softmax(1)[:, :-1].flatten()
    scores, index = probabilities.topk(len(logits))
    query = index // len(COCO)
    label = index % len(COCO)
    masks = F.interpolate(masks[None, query], size, mode="bilinear")[0]
    inside = masks > 0
    # The mean probability inside the mask weighs the score.
    total = (masks.sigmoid() * inside).sum((1, 2))
    area = inside.sum((1, 2))
    scores = scores * total / (area + 1e-6)
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] > threshold]
    objects = {}
    for i in label[order].unique().tolist():
        of_class = order[label[order] == i]
        kept = inside[of_class[:MAX_OBJECTS]]
        boxes = masks_to_boxes(kept)
        boxes[:, 2:] += 1  # up to the far edge of the last pixel
        for name in COCO[i]:
            objects[name] = boxes, kept
    return objects


# ---- The colours.


@functools.cache
def clip_model():
    """CLIP, in half precision on a GPU, and its tokenizer."""
    model = open_clip.create_model(CLIP, CLIP_WEIGHTS, device=DEVICE)
    tokenizer = open_clip.get_tokenizer(CLIP)
    return model.to(CLIP_DTYPE).eval(), tokenizer


def clip_image(image: Tensor) -> Tensor:
    """Unit embedding [D] of an image [3, H, W] of any size. CLIP sees its central square."""
    model, _ = clip_model()
    size = model.visual.image_size[0]
    settings = model.visual.preprocess_cfg
    image = transforms.resize(image, [size], InterpolationMode.BICUBIC, antialias=True)
    image = transforms.center_crop(image.clamp(0, 1), [size])
    image = transforms.normalize(image, settings["mean"], settings["std"])
    pixels = image[None].to(DEVICE, CLIP_DTYPE)
    embedding = model.encode_image(pixels)[0]
    return F.normalize(embedding.float(), dim=0)


@functools.cache
def color_texts(name: str) -> Tensor:
    """Zero-shot classifier [10, D] of an object's colour, which averages [G]'s three templates."""
    model, tokenizer = clip_model()
    texts = []
    for color in COLORS:
        texts.append(f"a photo of a {color} {name}")
        texts.append(f"a photo of a {color}-colored {name}")
        texts.append(f"a photo of a {color} object")
    tokens = tokenizer(texts).to(DEVICE)
    embeddings = F.normalize(model.encode_text(tokens).float(), dim=1)
    means = embeddings.view(len(COLORS), 3, -1).mean(1)
    return F.normalize(means, dim=1)


def object_color(
    image: Tensor, objects: dict[str, tuple[Tensor, Tensor]], name: str, i: int
) -> str:
    """The colour that CLIP sees in the crop of a class's i-th object.

    The crop is #999 outside the object's mask, as in [G].
    """
    boxes, masks = objects[name]
    x0, y0, x1, y1 = boxes[i].int().tolist()
    crop = torch.where(masks[i], image, 0.6)[:, y0:y1, x0:x1]
    similarities = color_texts(name) @ clip_image(crop)
    return COLORS[int(similarities.argmax())]


@torch.no_grad()
def reward(images: Tensor, prompts: list[str], metadata: list[dict]) -> dict[str, Tensor]:
    """Scores [B] and verdicts [B] of images [B, 3, H, W] in 0..1, by their prompts' records."""
    clip_model()  # The first call loads both models, to show at once if one is out of reach.
    images = images.to(DEVICE)
    scores = []
    verdicts = []
    for image, record, objects in zip(images, metadata, detect(images, metadata)):
        boxes = {}
        for name, (class_boxes, _) in objects.items():
            boxes[name] = class_boxes.tolist()
        color_of = functools.partial(object_color, image, objects)
        score, correct = geneval_score(record, boxes, color_of)
        scores.append(score)
        verdicts.append(float(correct))
    return {"geneval": torch.tensor(scores), "geneval_correct": torch.tensor(verdicts)}
