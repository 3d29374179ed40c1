"""Tests of the rewards in this folder: no network, no GPU; under a minute on 2 cores."""

import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests wherever they run; before torch looks for a GPU
sys.path.insert(0, str(Path(__file__).resolve().parent))

import clipscore
import geneval
import numpy as np
import open_clip
import pickscore
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

BENCH = {"class": "bench", "count": 1}
ALONE = """
import importlib.util, sys
for name in ("pickscore", "clipscore", "geneval"):
    sys.path.insert(0, "only_" + name)
    module = __import__(name)
    assert callable(module.reward) and importlib.util.find_spec("flow_grpo") is None
    assert name != "pickscore" or "open_clip" not in sys.modules
    del sys.path[0], sys.modules[name]
assert module.geneval_score({"include": [{"class": "dog", "count": 2}]}, {"dog": [(0, 0, 9, 9)]})[0] == 0.5
"""


def test_each_file_works_alone(tmp_path):
    for module in (pickscore, clipscore, geneval):
        (tmp_path / f"only_{module.__name__}").mkdir()
        shutil.copy(module.__file__, tmp_path / f"only_{module.__name__}")
    environment = os.environ | {"PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, env=environment, check=True)


def stands(relation, a, b):
    (a0, a1), (b0, b1) = np.array(a, dtype=float).reshape(2, 2), np.array(b, dtype=float).reshape(2, 2)
    offset = (a0 + a1 - b0 - b1) / 2
    rest = np.sign(offset) * np.clip(np.abs(offset) - 0.1 * (a1 - a0 + b1 - b0), 0, None)
    axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[relation]
    return rest.any() and sign * rest[axis] / np.linalg.norm(offset) > 0.5


def restated(record, boxes, color_of, exact):
    """GenEval's rules without a look at ours. Exact counts give the paper's score, else the benchmark's."""
    parts, groups = [], []
    for clause in record["include"]:
        found, count = boxes.get(clause["class"], []), clause["count"]
        good = len(found) == count if exact else len(found) >= count
        parts.append(max(0, (count - abs(len(found) - count)) / count))
        if "color" in clause:
            colors = [color_of(clause["class"], k) for k in range(count)] if good else []
            parts.append(colors.count(clause["color"]) / count)
            good = set(colors) == {clause["color"]}
        if "position" in clause:
            relation, target = clause["position"]
            good = good and groups[target] is not None
            good = good and all(stands(relation, a, b) for a in found[:count] for b in groups[target])
            parts.append(1 if good else 0)
        groups.append(found[:count] if good else None)
    excluded = [c for c in record["exclude"] if len(boxes.get(c["class"], [])) >= c["count"]]
    return np.mean(parts), None not in groups and not excluded


def random_scene(rng):
    names = rng.sample([names[0] for names in geneval.COCO], 4)
    include = [{"class": name, "count": rng.choice([1, 1, 1, 2, 3])} for name in names[: rng.randint(1, 3)]]
    for i, clause in enumerate(include):
        if rng.random() < 0.4:
            clause["color"] = rng.choice(geneval.COLORS[:2])
        if i and rng.random() < 0.6:
            clause["position"] = [rng.choice(geneval.POSITIONS), rng.randrange(i)]
    exclude = [{"class": name, "count": rng.randint(1, 5)} for name in names if rng.random() < 0.2]
    boxes = {}
    for name in names:
        for _ in range(rng.choice([0, 1, 1, 1, 2, 2, 3, 5])):
            x, y = (rng.randint(0, 20) * 20 for _ in "xy")  # on a grid, so that there are ties
            w, h = (rng.randint(1, 8) * 20 for _ in "wh")
            boxes.setdefault(name, []).append((x, y, x + w, y + h))
    judged = [(c["class"], k) for c in include if "color" in c for k in range(c["count"])]
    colors = {key: rng.choice(geneval.COLORS[:2]) for key in judged}
    return {"include": include, "exclude": exclude}, boxes, lambda *key: colors[key]


def test_geneval_score_on_random_scenes():
    rng, verdicts = random.Random(0), Counter()
    for _ in range(10_000):
        scene = random_scene(rng)
        score, correct = geneval.geneval_score(*scene)
        assert score == pytest.approx(restated(*scene, exact=True)[0]), scene
        assert correct == restated(*scene, exact=False)[1], scene
        verdicts[score == 1, correct] += 1
    assert len(verdicts) == 4 and min(verdicts.values()) > 100, verdicts


def test_geneval_score_by_hand():
    where, judge, two = geneval.relative_positions, geneval.geneval_score, [(0, 0, 9, 9), (50, 0, 59, 9)]
    assert where([-50, 50, -41, 59], two[0]) == ["left of", "below"] and where(two[0], two[0]) == []
    assert where([0.0009, 0] * 2, [0] * 4) == [] and where([0.0011, 0] * 2, [0] * 4) == ["right of"]
    assert judge({"include": [BENCH | {"color": None, "position": None}]}, {"bench": two[:1]}) == (1, True)
    beside = {"include": [BENCH, {"class": "cat", "count": 1, "position": ["right of", 0]}]}
    assert judge(beside, {"bench": two[1:], "cat": two[:1]}) == (2 / 3, False)  # on the wrong side: 1, 1, 0
    red = {"include": [{"class": "car", "count": 2, "color": "red"}]}
    assert judge(red, {"car": two[:1]}) == (0.25, False)  # too few: no colour is asked for
    with pytest.raises(ValueError, match="color_of"):
        judge(red, {"car": two})


def test_records_that_can_and_cannot_be_judged(recwarn):
    def refused(words, *include, **rest):
        with pytest.raises(ValueError, match=words):
            geneval.check({"include": [*include], **rest})

    for include, exclude in ((None, []), ([], []), (BENCH, []), ([BENCH], None)):
        refused("list", include=include, exclude=exclude)
    wrong = [(c, "class .*COCO") for c in (7, BENCH | {"class": "unicorn"}, BENCH | {"class": ["bench"]})]
    wrong += [(BENCH | {"count": n}, f"count of bench is {n}:.* 1 to 16") for n in (None, 0, True, 2.0, 17)]
    for clause, words in wrong:
        refused(words, BENCH, clause)
        refused(words, BENCH, exclude=[clause])
    refused("'mauve'.*orange", BENCH | {"color": "mauve"})
    for position in (["near", 0], ["above", 1], ["above", -1], ["above", 0.0]):
        refused("left of.*earlier clause", BENCH, BENCH | {"position": position})
    for extra in ({"color": "red"}, {"position": ["above", 0]}):
        refused("exclude.*bench", BENCH, exclude=[BENCH | extra])
    good = {"include": [BENCH | {"color": "red"}, BENCH | {"count": 16, "position": ["above", 0]}]}
    for extra in ({}, *({"tag": tag, "exclude": [BENCH | {"color": None}]} for tag in geneval.TAGS)):
        geneval.check(good | extra)
    assert not recwarn.list
    for tag in ("count", 7, ["counting"]):
        with pytest.warns(UserWarning, match="color_attr"):
            geneval.check(good | {"tag": tag})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Gives the rewards models of random weights, in the hub's formats."""
    for module in (geneval, clipscore):  # OpenAI trained CLIP with this activation.
        assert open_clip.get_model_config(module.CLIP)["quick_gelu"]
        assert open_clip.get_pretrained_cfg(module.CLIP, module.CLIP_WEIGHTS)
    torch.manual_seed(0)
    folder, stages = tmp_path_factory.mktemp("models"), [f"stage{i}" for i in range(1, 5)]
    swin = {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 4, "out_features": stages}
    widths = "feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim", "dim_feedforward"
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(**swin), **dict.fromkeys(widths, 32), encoder_layers=1,
        decoder_layers=2, num_attention_heads=2, num_queries=30, num_labels=80,
    )  # fmt: skip
    detector = transformers.Mask2FormerForUniversalSegmentation(config)
    # It is sure of itself, with several objects of a class, above and below each threshold.
    detector.class_predictor.weight.data *= 150
    decoder = detector.model.transformer_module.decoder
    decoder.mask_predictor.mask_embedder.get_parameter("2.0.weight").data *= 100
    detector.half().save_pretrained(folder / "detector")
    transformers.Mask2FormerImageProcessor().save_pretrained(folder / "detector")
    characters = [chr(c) + end for end in ("", "</w>") for c in range(33, 127)]
    words = {word: i for i, word in enumerate(["<|startoftext|>", "<|endoftext|>", *characters])}
    tokenizer = transformers.CLIPTokenizer(words, merges=[], model_max_length=77)
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **layers}
    parts = {"text_config": text, "vision_config": {"image_size": 32, "patch_size": 8, **layers}}
    clip = transformers.CLIPModel(transformers.CLIPConfig(**parts, projection_dim=16))
    clip.save_pretrained(folder / "pickscore")
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    transformers.CLIPProcessor(processor, tokenizer).save_pretrained(folder / "pickscore")

    vision = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    model = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (folder / "tiny-clip.json").write_text(json.dumps(model))
    open_clip.add_model_config(folder)
    torch.save(open_clip.model.CLIP(**model).state_dict(), folder / "clip.pt")
    geneval.DETECTOR = str(folder / "detector")
    geneval.DETECTOR_SIZE = {"shortest_edge": 64, "longest_edge": 128}
    geneval.CLIP = clipscore.CLIP = "tiny-clip"
    geneval.CLIP_WEIGHTS = clipscore.CLIP_WEIGHTS = str(folder / "clip.pt")
    pickscore.PICKSCORE = pickscore.PICKSCORE_PROCESSOR = str(folder / "pickscore")
    return folder


def pictures(n, height, width):  # of 8 bits, so that the same ones exist as PIL images
    small = torch.rand(n, 3, height // 4, width // 4, generator=torch.Generator().manual_seed(0))
    images = (F.interpolate(small, size=(height, width), mode="bicubic").clamp(0, 1) * 255).round() / 255
    return images, [Image.fromarray((i.permute(1, 2, 0) * 255).round().byte().numpy()) for i in images]


def test_pickscore_is_the_formula(models):
    images, pils = pictures(3, 128, 160)
    prompts = ["a cat", "a very long prompt " * 30, ""]
    rewards = pickscore.reward(images, prompts, [{}] * 3)
    model = transformers.CLIPModel.from_pretrained(models / "pickscore")
    processor = transformers.CLIPProcessor.from_pretrained(models / "pickscore")
    for reward, prompt, pil in zip(rewards.numpy(), prompts, pils):  # `numpy` refuses a tensor with a graph.
        inputs = processor(text=prompt, images=pil, truncation=True, max_length=77, return_tensors="pt")
        out = model(**inputs)
        cosine = F.cosine_similarity(out.text_embeds, out.image_embeds).item()
        assert reward == pytest.approx(math.exp(2.6592) * cosine / 26, abs=2e-3) and abs(cosine) > 0.05


def test_clipscore_is_the_cosine(models):
    images, pils = pictures(3, 128, 160)
    prompts = ["a cat", "two dogs", 'a sign that says "7"']
    rewards = clipscore.reward(images, prompts, [{}] * 3)
    model, _, transform = open_clip.create_model_and_transforms(clipscore.CLIP, clipscore.CLIP_WEIGHTS)
    image = model.eval().encode_image(torch.stack([transform(pil) for pil in pils]))
    expected = F.cosine_similarity(image, model.encode_text(open_clip.get_tokenizer(clipscore.CLIP)(prompts)))
    assert torch.allclose(rewards, expected, atol=2e-3) and expected.std() > 0.05
    assert not rewards.requires_grad


def test_detections_of_a_model_of_the_hub(models):
    images, pils = pictures(4, 40, 48)
    records = [{"tag": "counting"}, {"tag": "colors"}, {"tag": "counting"}, {}]
    found = geneval.detect(images, records)
    model = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(models / "detector").float()
    process = transformers.Mask2FormerImageProcessor(size=geneval.DETECTOR_SIZE, return_tensors="pt")
    pixels = process(list(images), do_rescale=False)["pixel_values"]
    assert torch.allclose(pixels, process(pils)["pixel_values"], atol=0.02)
    out = model.eval()(pixels)
    p = out.class_queries_logits.softmax(2)[..., :80]
    p[p < p.flatten(1).sort().values[:, -30, None, None]] = 0
    masks = F.interpolate(out.masks_queries_logits, images.shape[2:], mode="bilinear")
    inside = masks > 0
    scores = p * ((masks.sigmoid() * inside).sum((2, 3)) / inside.sum((2, 3)).clamp(1))[..., None]
    for i, c in itertools.product(range(4), range(80)):
        threshold = 0.9 if records[i].get("tag") == "counting" else 0.3
        order = scores[i, :, c].argsort(descending=True)
        kept = order[scores[i, order, c] > threshold][:16]
        for name in geneval.COCO[c]:
            assert torch.equal(found[i][name][1], inside[i, kept]) if len(kept) else name not in found[i]
    geneval.clip_model.cache_clear()  # The first call loads it again, though no colour is asked for.
    out = geneval.reward(images, ["p"] * 4, [r | {"include": [BENCH]} for r in records])
    assert list(out) == ["geneval", "geneval_correct"] and geneval.clip_model.cache_info().currsize == 1


def test_detections_at_the_thresholds(monkeypatch):
    def detect(record, *objects):
        """Objects are (class, probability, x, mask logit): bars of height 3 in masks that are 0 elsewhere."""
        logits, masks = torch.full((1, len(objects), 81), -99.0), torch.zeros(1, len(objects), 24, 24)
        for q, (label, p, x, value) in enumerate(objects):
            logits[0, q, label], logits[0, q, 80] = math.log(p), math.log(1 - p)
            masks[0, q, 5:8, x] = value
        out = SimpleNamespace(class_queries_logits=logits, masks_queries_logits=masks)
        parts = lambda pixels: out, lambda images, **_: {"pixel_values": images[0]}
        monkeypatch.setattr(geneval, "detector", lambda: parts)
        (found,) = geneval.detect(torch.zeros(1, 3, 24, 24), [record])
        assert all(box == [box[0], 5, box[0] + 1, 8] for boxes, _ in found.values() for box in boxes.tolist())
        return {name: boxes[:, 0].tolist() for name, (boxes, _) in found.items()}

    cars = [(2, p, x, 30) for x, p in enumerate([0.31, 0.91, 0.29, 0.89])]
    dogs = (16, 0.91, 9, 0.1), (16, 0.54, 8, 30)  # The mask's mean, sigmoid(0.1) = 0.525, weighs the score.
    assert detect({}, *cars, *dogs) == {"car": [1, 3, 0], "dog": [8, 9]}
    assert detect({"tag": "counting"}, *cars, *dogs) == {"car": [1]}
    assert detect({}, (64, 0.54, 3, 0.1)) == {}
    mice = detect({}, *((64, 0.5 + x / 99, x, 30) for x in range(20)))
    assert mice == {name: list(range(19, 3, -1)) for name in ("computer mouse", "mouse")}


def test_colors_are_named_by_clip_on_each_objects_crop(models, monkeypatch):
    (images, pils), masks = pictures(2, 128, 128), torch.zeros(2, 128, 128, dtype=torch.bool)
    masks[0, 5:40, 10:30] = masks[1, 20:120, 33:128] = True
    masks[0, 5:10, 10:15] = False  # no rectangle: the background shows
    boxes = torch.tensor([[10.0, 5, 30, 40], [33, 20, 128, 120]])
    monkeypatch.setattr(geneval, "detect", lambda images, records: [{"bench": (boxes, masks)}] * 2)
    seen, embed = [], geneval.clip_image
    monkeypatch.setattr(geneval, "clip_image", lambda crop: seen.append((crop, embed(crop))) or seen[-1][1])

    model, _, transform = open_clip.create_model_and_transforms(geneval.CLIP, geneval.CLIP_WEIGHTS)
    texts = "a photo of a {} bench", "a photo of a {}-colored bench", "a photo of a {} object"
    tokens = open_clip.get_tokenizer(geneval.CLIP)([t.format(c) for c in geneval.COLORS for t in texts])
    classes = F.normalize(model.eval().encode_text(tokens), dim=1).unflatten(0, (10, 3)).mean(1)
    assert torch.allclose(geneval.color_texts("bench"), F.normalize(classes, dim=1), atol=1e-5)
    crops, names = [], [[], []]
    for i, j in itertools.product(range(2), range(2)):
        grey = Image.new("RGB", (128, 128), "#999")
        crop = Image.composite(pils[i], grey, Image.fromarray(masks[j].numpy())).crop(boxes[j].tolist())
        image = F.normalize(model.encode_image(transform(crop)[None])[0], dim=0)
        crops.append((torch.from_numpy(np.array(crop)).permute(2, 0, 1) / 255, image))
        names[i].append(geneval.COLORS[F.cosine_similarity(image, classes).argmax()])
    for color in geneval.COLORS:
        record = {"include": [{"class": "bench", "count": 2, "color": color}]}
        out = geneval.reward(images, ["p"] * 2, [record] * 2)
        assert out["geneval"].tolist() == [(1 + n.count(color) / 2) / 2 for n in names]
        assert out["geneval_correct"].tolist() == [n == [color] * 2 for n in names]
    for (crop, embedding), (expected, image) in zip(seen, crops):
        assert torch.allclose(crop, expected, atol=1e-6) and torch.allclose(embedding, image, atol=2e-3)
        assert not embedding.requires_grad
