"""Tests of the rewards in this folder. They need no network and no GPU, and take half a minute."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from importlib import util
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights
from torchvision.transforms.functional import to_tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import clipscore
import geneval
import ocr
import pickscore

from tests.pretended_gpu import pretended_gpu

HERE = Path(__file__).resolve().parent
BENCH = {"class": "bench", "count": 1}
BOX = (0, 0, 9, 9)
RIGHT_BOX = (50, 0, 59, 9)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """The tests are the same wherever they run."""
    for module in (clipscore, geneval, pickscore):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(clipscore, "DTYPE", torch.float32)
    monkeypatch.setattr(pickscore, "DTYPE", torch.float32)
    monkeypatch.setattr(geneval, "CLIP_DTYPE", torch.float32)


# ---- Each file alone.

# What is run with each file in a folder of its own.
ALONE = {
    "ocr": "assert reward(torch.zeros(1, 3, 32, 64), ['a \"7\"'], [{}])['ocr'] == [0]",
    "geneval": "assert relative_positions((0, 0, 1, 1), (5, 0, 6, 1)) == ['left of']",
    "pickscore": "assert callable(reward)",
    "clipscore": "assert callable(reward)",
}
PACKAGES = {
    "open_clip": "open_clip_torch",
    "onnxruntime": "onnxruntime",
    "rapidfuzz": "rapidfuzz",
    "rapidocr": "rapidocr",
    "scipy": "scipy",
    "torchvision": "torchvision",
    "transformers": "transformers",
}


# The import of a module fails if it is None.
WITHOUT = """
for module in [*{0}, *sys.modules]:
    if module.partition(".")[0] in {0}:
        sys.modules[module] = None
"""


def script_alone(name):
    """It imports a reward's file from the working directory, with the packages that it names."""
    source = (HERE / f"{name}.py").read_text()
    installed = re.search(r"`pip install ([^`]*)`", source).group(1).split()
    missing = [module for module, package in PACKAGES.items() if package not in installed]
    return "\n".join([WITHOUT.format(missing), f"import torch; from {name} import *", ALONE[name]])


# What all of the files need is loaded once, in a process that is forked for each of them.
FORKS = """
import os
import sys
import torch, torchvision

children = {}
for name, script in zip(sys.argv[1::2], sys.argv[2::2]):
    child = os.fork()
    if not child:
        os.chdir(name)
        exec(script)
        sys.exit()
    children[child] = name
for _ in children:
    child, status = os.wait()
    assert status == 0, children[child]
"""


def test_each_file_works_alone_with_the_packages_that_it_names(tmp_path):
    scripts = []
    for name in ALONE:
        (tmp_path / name).mkdir()
        shutil.copy(HERE / f"{name}.py", tmp_path / name)
        scripts += [name, script_alone(name)]
    command = [sys.executable, "-c", FORKS, *scripts]
    given = os.environ | {"PYTHONPATH": ""}
    subprocess.run(command, cwd=tmp_path, env=given, check=True, timeout=300)


# ---- OCR.


def sign(text, width, height, font_size):
    """A picture [3, height, width] of a text."""
    image = Image.new("RGB", (width, height), "wheat")
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), font_size)
    ImageDraw.Draw(image).text((8, 8), text, "navy", font, spacing=font_size / 2)
    return to_tensor(image)


def small_signs(*texts):
    return torch.stack([sign(text, 64, 32, 16) for text in texts])


def large_signs():
    hotel = sign("Grand Hotel\nOPEN", 256, 192, 28)
    coffee = sign("coffee", 256, 192, 40)
    return torch.stack([hotel, coffee])


def test_small_signs_are_read():
    texts = ["407", "83", "651", "902"]
    assert ocr.read(small_signs(*texts)) == texts


def test_words_are_found_in_large_images():
    assert ocr.read(large_signs()) == ["GrandHotelOPEN", "coffee"]


def test_each_image_is_read_whatever_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    texts = [str(number) for number in range(120, 130)]
    assert ocr.read(small_signs(*texts)) == texts


THREADS = [  # torch's threads, cores, processes in all, those on this machine, images at once
    (4, 8, None, None, 4),
    (4, 8, "", "", 4),
    (4, 8, "1", "1", 4),
    (1, 8, "2", "2", 4),  # by torchrun
    (1, 8, "16", "3", 2),
    (1, 2, "8", "8", 1),
    (8, 8, "2", None, 4),  # without torchrun
]


@pytest.mark.parametrize("of_torch, cores, in_all, local, expected", THREADS)
def test_each_of_several_processes_has_its_part_of_the_cores(
    monkeypatch, of_torch, cores, in_all, local, expected
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: of_torch)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    for name, value in {"WORLD_SIZE": in_all, "LOCAL_WORLD_SIZE": local}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert ocr.threads() == expected


@pytest.mark.parametrize("height", [32, 192])
def test_nothing_is_read_in_an_empty_image(height):
    assert ocr.read(torch.full((1, 3, height, 64), 0.5)) == [""]


def test_pp_ocr_sees_pixels_of_8_bits_in_bgr(monkeypatch):
    engine = Mock(return_value=SimpleNamespace(txts=None))
    monkeypatch.setattr(ocr, "ocr_engine", lambda height, width: engine)
    images, (pil,) = pictures(1, 32, 64)
    ocr.read(images - 0.4 / 255)  # The nearest value counts.
    (array,) = engine.call_args.args
    assert np.array_equal(array[:, :, ::-1], np.array(pil))


@pytest.mark.parametrize("height, finds_lines", [(64, False), (65, True)])
def test_only_images_higher_than_64_pixels_are_searched_for_lines(height, finds_lines):
    assert ocr.ocr_engine(height, 128).use_det == finds_lines


def seen_by(part, monkeypatch):
    """Records what a network of PP-OCR is given from now on."""
    session = Mock(wraps=part.session)
    monkeypatch.setattr(part, "session", session)
    return session


def test_pp_ocr_neither_enlarges_nor_shrinks_a_large_image(monkeypatch):
    ocr.read(large_signs())  # which loads the networks
    session = seen_by(ocr.ocr_engine(192, 256).text_det, monkeypatch)
    ocr.read(large_signs()[:1])
    (pixels,) = session.call_args.args
    assert pixels.shape == (1, 3, 192, 256)


def test_pp_ocr_reads_a_short_line_without_padding_on_one_thread(monkeypatch):
    ocr.read(small_signs("407"))
    reader = ocr.ocr_engine(32, 64).text_rec
    options = reader.session.session.get_session_options()
    assert options.intra_op_num_threads == 1
    session = seen_by(reader, monkeypatch)
    ocr.read(small_signs("407"))
    (pixels,) = session.call_args.args
    assert pixels.shape == (1, 3, 48, 96)


def test_images_that_are_wider_than_high_are_set_up_as_such(monkeypatch):
    engine = Mock(return_value=SimpleNamespace(txts=None))
    load = Mock(return_value=engine)
    monkeypatch.setattr(ocr, "ocr_engine", load)
    ocr.read(torch.zeros(1, 3, 32, 128))
    load.assert_called_once_with(32, 128)


def test_signs_are_scored():
    prompts = ['a "417"', 'a "7"', "a “65”", 'a " " "902"']
    columns = ocr.reward(small_signs("407", "83", "651", "902"), prompts, [{}] * 4)
    assert columns["ocr"] == pytest.approx([2 / 3, 0, 1, 1])
    assert columns["ocr_accuracy"] == [0, 0, 1, 1]


def test_the_score_comes_first_and_an_empty_image_scores_0():
    columns = ocr.reward(torch.full((1, 3, 32, 64), 0.5), ['a "407"'], [{}])
    assert list(columns.items()) == [("ocr", [0]), ("ocr_accuracy", [0])]


@pytest.mark.parametrize(
    "quoted, read, score",
    [
        ("407", "407", 1),
        ("407", "417", 2 / 3),  # one of three digits is wrong,
        ("407", "47", 2 / 3),  # or missing
        ("407", "", 0),
        ("7", "83", 0),  # The distance is larger than the text.
        ("407", "14072", 1),  # within a longer text
        ("grand hotel", "GrandHotelOPEN", 1),  # whatever its spaces and case
        ("Grand\u2003HOTEL", "grandhotel", 1),
        ("COFFEES", "coffee", 1 - 1 / 7),
        ("CAFÉ", "CAFE\u0301", 1),  # Unicode's NFC and NFD
        ("cafe\xad\u0301", "café", 1),
        ("co\u200bop\ufeff", "co\xadop", 1),  # what can't be seen
        ("don’t", "don't", 1),
        ("don´t", "don‘t", 1),
        ("ＡＢ１", "ab1", 1),  # full width
        ("№ 1™", "no1tm", 1),
        ("1990–95", "1990-95", 1),
        ("a—b", "a−b", 1),
        ("❤\ufe0f", "❤", 1),
        ("CAFÉ", "CAFE", 3 / 4),  # which looks different
        ("a-b", "ab", 2 / 3),
        ("grand\thotel\n", "grandhotel", 1),
        ("STRASSE", "Straße", 1),
        ("5″ pipe", '5" pipe', 1),
        ("a―b", "a-b", 1),
        ("0123456789abcdefghij", "0123456789abcdefghi!", 1 - 1 / 20),
    ],
)
def test_ocr_score_is_the_papers(quoted, read, score, monkeypatch):
    monkeypatch.setattr(ocr, "read", lambda images: [read])
    columns = ocr.reward(torch.zeros(1, 3, 32, 64), [f'a sign "{quoted}"'], [{}])
    assert columns["ocr"] == pytest.approx([score])
    assert columns["ocr_accuracy"] == [score == 1]


def test_large_signs_are_scored():
    columns = ocr.reward(large_signs(), ['a "grand hotel"', 'a "COFFEES"'], [{}] * 2)
    assert columns["ocr"] == [1, 1 - 1 / 7]


@pytest.mark.parametrize(
    "prompt, text",
    [
        ('a sign "407"', "407"),
        ("a sign “Grand Hotel”", "Grand Hotel"),
        ('a “b" and "c”', "b"),
        ('a " " and "902"', "902"),  # A blank text doesn't count.
        ('first "b", then "c"', "b"),
        ("a „b“ and „c“", "b"),
        ("a ”b” and ”c”", "b"),
        ("a «b» and «c»", "b"),
        ("a »b« and »c«", "b"),
        ("a 「b」 and 「c」", "b"),
        ("a 『b』 and 『c』", "b"),
        ("a ＂b＂ and ＂c＂", "b"),
        ('a 24" screen that shows "HELLO"', "HELLO"),  # inches
        ('"LOVE" on a 7" record', "LOVE"),
        ("a 24” screen that shows “HELLO”", "HELLO"),
        ("a 24“ screen that shows „HELLO“", "HELLO"),
        ("a 24＂ screen that shows 「HELLO」", "HELLO"),
        ('写着"你好"的招牌', "你好"),
        ("写着“你好”的招牌", "你好"),
        ("第3「他说“你好”」", "他说“你好”"),
        ('"\u200b\xad" and "902"', "902"),
    ],
)
def test_quoted_text_is_the_first_that_is_not_blank(prompt, text):
    assert ocr.quoted_text({"prompt": prompt}) == text
    ocr.check({"prompt": prompt})


@pytest.mark.parametrize(
    "prompt",
    ["a sign '407'", 'a sign "407', 'a sign " "', 'a sign "\u200b"', 'a 7" or 24" screen', ""],
)
def test_a_prompt_without_a_quoted_text_is_refused(prompt):
    sentence = f'ocr needs a text in double quotes, such as a sign "407", but got {prompt}'
    with pytest.raises(ValueError) as error:
        ocr.check({"prompt": prompt})
    assert str(error.value) == sentence


# ---- GenEval's rules.


AXES = {"left of": 0, "right of": 0, "above": 1, "below": 1}
SIGNS = {"left of": -1, "right of": 1, "above": -1, "below": 1}


def stands(relation, box, other):
    box = np.array(box, dtype=float).reshape(2, 2)
    other = np.array(other, dtype=float).reshape(2, 2)
    offset = box.mean(0) - other.mean(0)
    size = np.ptp(box, axis=0) + np.ptp(other, axis=0)
    rest = np.sign(offset) * np.clip(np.abs(offset) - 0.1 * size, 0, None)
    if not rest.any():
        return False
    direction = rest / np.linalg.norm(offset)
    return SIGNS[relation] * direction[AXES[relation]] > 0.5


def restated(record, boxes, color_of, exact):
    """GenEval's rules, without a look at ours.

    Exact counts give the paper's score, and others the benchmark's verdict.
    """
    parts = []
    matched = []  # for each clause its judged objects, or None
    for clause in record["include"]:
        name = clause["class"]
        count = clause["count"]
        found = boxes.get(name, [])
        objects = found[:count]
        good = len(found) == count if exact else len(found) >= count
        missed = abs(len(found) - count)
        parts.append(max(0, count - missed) / count)
        if "color" in clause:
            colors = [color_of(name, i) for i in range(count)] if good else []
            parts.append(colors.count(clause["color"]) / count)
            good = set(colors) == {clause["color"]}
        if "position" in clause:
            relation, index = clause["position"]
            others = matched[index]
            if others is None:
                good = False
            else:
                pairs = [(a, b) for a in objects for b in others]
                good = good and all(stands(relation, a, b) for a, b in pairs)
            parts.append(int(good))
        matched.append(objects if good else None)
    correct = None not in matched
    for clause in record["exclude"]:
        if len(boxes.get(clause["class"], [])) >= clause["count"]:
            correct = False
    return np.mean(parts), correct


def random_box(rng):
    """A box on a grid, so that there are ties."""
    x = rng.randint(0, 20) * 20
    y = rng.randint(0, 20) * 20
    width = rng.randint(1, 8) * 20
    height = rng.randint(1, 8) * 20
    return x, y, x + width, y + height


def random_record(rng, names):
    include = []
    for i, name in enumerate(names[: rng.randint(1, 3)]):
        clause = {"class": name, "count": rng.choice([1, 1, 1, 2, 3])}
        if rng.random() < 0.4:
            clause["color"] = rng.choice(["red", "orange"])
        if i > 0 and rng.random() < 0.6:
            clause["position"] = [rng.choice(geneval.POSITIONS), rng.randrange(i)]
        include.append(clause)
    excluded = [name for name in names if rng.random() < 0.2]
    exclude = [{"class": name, "count": rng.randint(1, 5)} for name in excluded]
    return {"include": include, "exclude": exclude}


def random_scene(rng):
    """A record, the boxes in an image, and the colours of those that it judges by colour."""
    names = rng.sample(["bench", "cat", "traffic light", "computer mouse", "person"], 4)
    record = random_record(rng, names)
    boxes = {}
    for name in names:
        number = rng.choice([0, 1, 1, 1, 2, 2, 3, 5])
        if number:
            boxes[name] = [random_box(rng) for _ in range(number)]
    colors = {}
    for clause in record["include"]:
        if "color" in clause:
            for i in range(clause["count"]):
                colors[clause["class"], i] = rng.choice(["red", "orange"])
    return record, boxes, lambda name, i: colors[name, i]


def test_random_scenes_are_scored_by_the_restated_rules():
    rng = random.Random(0)
    verdicts = Counter()
    for _ in range(10_000):
        scene = random_scene(rng)
        score, correct = geneval.geneval_score(*scene)
        expected_score, _ = restated(*scene, exact=True)
        _, expected_verdict = restated(*scene, exact=False)
        assert score == pytest.approx(expected_score), scene
        assert correct == expected_verdict, scene
        verdicts[score == 1, correct] += 1
    assert len(verdicts) == 4, verdicts
    assert min(verdicts.values()) > 100, verdicts


@pytest.mark.parametrize(
    "box, relations",
    [
        ([-50, 50, -41, 59], ["left of", "below"]),  # both hold on the diagonal
        ([50, -50, 59, -41], ["right of", "above"]),
        ([50, 0, 59, 9], ["right of"]),
        (BOX, []),  # concentric
    ],
)
def test_positions_of_a_box(box, relations):
    assert geneval.relative_positions(box, BOX) == relations


@pytest.mark.parametrize("relation", geneval.POSITIONS)
@pytest.mark.parametrize("distance, holds", [(4, False), (4.1, True)])
def test_a_position_holds_beyond_a_fifth_of_the_sum_of_sizes(relation, distance, holds):
    shift = np.zeros(2)
    shift[AXES[relation]] = SIGNS[relation] * distance
    other = np.array([0, 0, 10, 10])
    box = other + np.tile(shift, 2)
    assert geneval.relative_positions(box, other) == ([relation] if holds else [])


@pytest.mark.parametrize("x, relations", [(0.0009, []), (0.0011, ["right of"])])
def test_boxes_nearer_than_a_thousandth_are_concentric(x, relations):
    assert geneval.relative_positions([x, 0, x, 0], [0, 0, 0, 0]) == relations


def test_a_clause_may_leave_color_and_position_empty():
    record = {"include": [BENCH | {"color": None, "position": None}]}
    assert geneval.geneval_score(record, {"bench": [BOX]}) == (1, True)


def test_a_wrong_position_adds_a_0():
    cat = {"class": "cat", "count": 1, "position": ["right of", 0]}
    boxes = {"bench": [RIGHT_BOX], "cat": [BOX]}
    score = (1 + 1 + 0) / 3
    assert geneval.geneval_score({"include": [BENCH, cat]}, boxes) == (score, False)


def test_surplus_objects_lower_the_score_alone_and_not_below_0():
    many = {"bench": [BOX] * 10}
    assert geneval.geneval_score({"include": [BENCH]}, many) == (0, True)


def test_colors_are_asked_for_only_where_there_are_enough_objects():
    record = {"include": [{"class": "car", "count": 2, "color": "red"}]}
    assert geneval.geneval_score(record, {"car": [BOX]}) == (0.25, False)
    with pytest.raises(ValueError, match="color_of"):
        geneval.geneval_score(record, {"car": [BOX, RIGHT_BOX]})


# ---- GenEval's records.


def refuses(words, include, **rest):
    with pytest.raises(ValueError, match=words):
        geneval.check({"include": include, **rest})


def test_include_is_a_list_of_clauses_and_exclude_a_list():
    with pytest.raises(ValueError, match="list `include`"):
        geneval.check({"prompt": "a bench"})
    refuses("list `include`", None)
    refuses("list `include`", [])
    refuses("list `include`", BENCH)
    refuses("list `exclude`", [BENCH], exclude=None)
    refuses("list `exclude`", [BENCH], exclude=BENCH)


@pytest.mark.parametrize(
    "clause, words",
    [
        (7, "class 7.*COCO"),
        ("bench", "bench.*count"),
        ({"count": 1}, "class None.*COCO"),
        ({"class": "unicorn", "count": 1}, "class 'unicorn'.*COCO"),
        ({"class": ["bench"], "count": 1}, "class .*COCO"),
        ({"class": "bench"}, "count of bench is None:.* 1 to 16"),
        ({"class": "bench", "count": 0}, "count of bench is 0:.* 1 to 16"),
        ({"class": "bench", "count": 17}, "count of bench is 17:.* 1 to 16"),
        ({"class": "bench", "count": 2.0}, "count of bench is 2.0:.* 1 to 16"),
        ({"class": "bench", "count": True}, "count of bench is True:.* 1 to 16"),
    ],
)
def test_a_clause_has_a_class_of_coco_and_a_count(clause, words):
    refuses(words, [BENCH, clause])
    refuses(words, [BENCH], exclude=[clause])


def test_classes_are_cocos_80_in_its_order():
    """torchvision's list has places without a class, too."""
    places = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    classes = [name for name in places if name not in ("__background__", "N/A")]
    assert [names[-1] for names in geneval.COCO] == classes
    for name in classes:
        geneval.check({"include": [{"class": name, "count": 1}]})


COLORS = "red orange yellow green blue purple pink brown black white".split()


@pytest.mark.parametrize("color", COLORS)
def test_genevals_colors_can_be_judged(color):
    geneval.check({"include": [BENCH | {"color": color}]})


def test_the_detectors_image_size_is_genevals():
    size = run_path(geneval.__file__)["DETECTOR_SIZE"]
    assert size == {"shortest_edge": 800, "longest_edge": 1333}


def test_a_color_is_one_of_ten():
    refuses("'mauve'.*orange", [BENCH | {"color": "mauve"}])


@pytest.mark.parametrize(
    "position",
    [
        ["near", 0],
        ["above", 1],  # the clause itself
        ["above", -1],
        ["above", 0.0],
        ["above", False],
        "above",
    ],
)
def test_a_position_is_from_an_earlier_clause(position):
    refuses("left of.*earlier clause", [BENCH, BENCH | {"position": position}])


@pytest.mark.parametrize("extra", [{"color": "red"}, {"position": ["above", 0]}])
def test_an_excluded_clause_has_a_count_alone(extra):
    refuses("exclude.*bench", [BENCH], exclude=[BENCH | extra])


def good_record():
    red = BENCH | {"color": "red"}
    many = {"class": "bench", "count": 16, "position": ["above", 0]}
    return {"include": [red, many]}


def test_good_records_pass_in_silence(recwarn):
    geneval.check(good_record())
    for tag in geneval.TAGS:
        exclude = [BENCH | {"color": None}]
        geneval.check(good_record() | {"tag": tag, "exclude": exclude})
    assert not recwarn.list


@pytest.mark.parametrize("tag", ["count", 7, ["counting"]])
def test_an_unknown_tag_is_warned_of(tag):
    with pytest.warns(UserWarning, match="color_attr"):
        geneval.check(good_record() | {"tag": tag})


# ---- Small models of random weights, in the hub's formats.


def save_random_models(folder):
    """Writes a detector, a PickScore and a CLIP into the folder, for `use_models`.

    Each sets the seed, as how much randomness one takes depends on the release of transformers.
    """
    save_random_detector(folder / "detector")
    save_random_pickscore(folder / "pickscore")
    save_random_clip(folder)


def use_models(folder):
    """Points the rewards at the models that `save_random_models` wrote into the folder."""
    open_clip.add_model_config(folder)
    geneval.DETECTOR = str(folder / "detector")
    geneval.DETECTOR_SIZE = {"shortest_edge": 64, "longest_edge": 128}
    pickscore.PICKSCORE = str(folder / "pickscore")
    pickscore.PICKSCORE_PROCESSOR = str(folder / "pickscore")
    for module in (geneval, clipscore):
        module.CLIP = "tiny-clip"
        module.CLIP_WEIGHTS = str(folder / "clip.pt")
    forget_models()


def forget_models():
    geneval.detector.cache_clear()
    geneval.clip_model.cache_clear()
    geneval.color_texts.cache_clear()
    clipscore.clip_model.cache_clear()
    pickscore.pickscore_model.cache_clear()


def save_random_detector(folder):
    torch.manual_seed(0)
    backbone = transformers.SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=30,
        num_labels=80,
    )
    detector = transformers.Mask2FormerForUniversalSegmentation(config)
    # It is sure of itself, with several objects per class, above and below each threshold.
    detector.class_predictor.weight.data *= 150
    decoder = detector.model.transformer_module.decoder
    decoder.mask_predictor.mask_embedder.get_parameter("2.0.weight").data *= 100
    detector.half().save_pretrained(folder)
    transformers.Mask2FormerImageProcessor().save_pretrained(folder)


def save_random_pickscore(folder):
    torch.manual_seed(0)
    words = ["<|startoftext|>", "<|endoftext|>"]
    for end in ("", "</w>"):
        words += [chr(c) + end for c in range(33, 127)]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = transformers.CLIPTokenizer(vocabulary, merges=[], model_max_length=77)
    layers = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    tokens = dict(vocab_size=len(words), bos_token_id=0, eos_token_id=1, pad_token_id=1)
    config = transformers.CLIPConfig(
        text_config=tokens | layers,
        vision_config={"image_size": 32, "patch_size": 8} | layers,
        projection_dim=16,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)


def save_random_clip(folder):
    torch.manual_seed(0)
    vision = dict(image_size=32, layers=2, width=16, head_width=8, patch_size=8)
    text = dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=2)
    config = dict(embed_dim=16, vision_cfg=vision, text_cfg=text)
    (folder / "tiny-clip.json").write_text(json.dumps(config))
    weights = open_clip.model.CLIP(**config).state_dict()
    torch.save(weights, folder / "clip.pt")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_random_models(folder)
    use_models(folder)
    return folder


def pictures(number, height, width):
    """Images [number, 3, height, width] of 8 bits, and the same as a list of PIL images."""
    noise = torch.rand(number, 3, height // 4, width // 4, generator=torch.manual_seed(0))
    smooth = F.interpolate(noise, size=(height, width), mode="bicubic")
    pixels = (smooth.clamp(0, 1) * 255).round()
    arrays = pixels.byte().permute(0, 2, 3, 1).numpy()
    return pixels / 255, [Image.fromarray(array) for array in arrays]


def hard_edges():
    """An image [3, 24, 24] and the same of PIL: enlarged, it leaves the range 0..1 at its edges."""
    image = (torch.arange(24) // 4 % 2).float().expand(3, 24, 24)
    return image, Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy())


def open_clip_model():
    """CLIP, its transform of PIL images and its tokenizer, as open_clip gives them."""
    name = clipscore.CLIP
    parts = open_clip.create_model_and_transforms(name, clipscore.CLIP_WEIGHTS)
    model, _, transform = parts
    return model.eval(), transform, open_clip.get_tokenizer(name)


@pytest.mark.parametrize("module", [clipscore, geneval])
def test_clip_is_openais_with_its_activation(module):
    published = run_path(module.__file__)
    assert open_clip.get_model_config(published["CLIP"])["quick_gelu"]
    assert open_clip.get_pretrained_cfg(published["CLIP"], published["CLIP_WEIGHTS"])


# ---- PickScore and CLIPScore.


def test_pickscores_processor_is_that_of_the_model_it_was_made_from(monkeypatch):
    """The repository of its weights has none that fits."""
    processor = Mock()
    monkeypatch.setattr(pickscore, "CLIPModel", Mock())
    monkeypatch.setattr(pickscore, "CLIPProcessor", processor)
    pickscore.pickscore_model.__wrapped__()
    processor.from_pretrained.assert_called_once_with(pickscore.PICKSCORE_PROCESSOR)


def test_pickscore_is_the_formula(models):
    images, pils = pictures(3, 128, 160)
    prompts = ["a cat", "a very long prompt " * 30, ""]
    rewards = pickscore.reward(images, prompts, [{}] * 3)
    model = transformers.CLIPModel.from_pretrained(models / "pickscore")
    processor = transformers.CLIPProcessor.from_pretrained(models / "pickscore")
    prepare = partial(processor, truncation=True, max_length=77, return_tensors="pt")
    for reward, prompt, pil in zip(rewards, prompts, pils):
        output = model(**prepare(text=prompt, images=pil))
        cosine = F.cosine_similarity(output.text_embeds, output.image_embeds).item()
        assert abs(cosine) > 0.05
        assert reward.item() == pytest.approx(math.exp(2.6592) * cosine / 26, abs=1e-5)


def test_clipscore_is_the_cosine(models):
    images, pils = pictures(3, 128, 160)
    prompts = ["a cat", "two dogs", 'a sign that says "7"']
    rewards = clipscore.reward(images, prompts, [{}] * 3)
    model, transform, tokenizer = open_clip_model()
    pixels = torch.stack([transform(pil) for pil in pils])
    image = model.encode_image(pixels)
    text = model.encode_text(tokenizer(prompts))
    expected = F.cosine_similarity(image, text)
    assert torch.allclose(rewards, expected, atol=2e-3)
    assert expected.std() > 0.05


def test_an_enlarged_image_stays_in_0_to_1_as_a_file_does(models):
    image, pil = hard_edges()
    _, transform, _ = open_clip_model()
    expected = transform(pil)
    pixels = clipscore.clip_pixels(image[None])[0]
    assert torch.allclose(pixels, expected, atol=0.03)


@pytest.mark.parametrize("module", [clipscore, pickscore])
def test_rewards_have_no_gradient(module, models):
    images, _ = pictures(1, 32, 32)
    assert not module.reward(images, ["a cat"], [{}]).requires_grad


# ---- The detector.


RECORDS = [{"tag": "counting"}, {"tag": "colors"}, {"tag": "counting"}, {}]


def detector_of_the_hub(models):
    """The network and its processor, as transformers gives them."""
    folder = models / "detector"
    network = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(folder)
    processor = transformers.Mask2FormerImageProcessor(size=geneval.DETECTOR_SIZE)
    return network.float().eval(), partial(processor, return_tensors="pt")


def test_the_detector_sees_images_as_it_would_see_files(models):
    images, pils = pictures(4, 40, 48)
    _, process = detector_of_the_hub(models)
    pixels = process(list(images), do_rescale=False)["pixel_values"]
    pixels_of_files = process(pils)["pixel_values"]
    assert torch.allclose(pixels, pixels_of_files, atol=0.02)


def scored_masks(models, images):
    """The scores [B, 80, Q] and the masks [B, Q, H, W] of Q queries.

    Scores that aren't among the Q highest are 0.
    """
    network, process = detector_of_the_hub(models)
    output = network(process(list(images), do_rescale=False)["pixel_values"])
    probabilities = output.class_queries_logits.softmax(2)[..., :80]
    lowest = probabilities.flatten(1).sort().values[:, -30, None, None]
    probabilities = probabilities * (probabilities >= lowest)
    masks = F.interpolate(output.masks_queries_logits, images.shape[2:], mode="bilinear")
    inside = masks > 0
    total = (masks.sigmoid() * inside).sum((2, 3))
    certainty = total / inside.sum((2, 3)).clamp(min=1)
    return (probabilities * certainty[..., None]).transpose(1, 2), inside


def test_detections_of_a_model_of_the_hub(models):
    images, _ = pictures(4, 40, 48)
    detections = geneval.detect(images, RECORDS)
    scores, inside = scored_masks(models, images)
    for i, record in enumerate(RECORDS):
        threshold = 0.9 if record.get("tag") == "counting" else 0.3
        for label, names in enumerate(geneval.COCO):
            of_class = scores[i, label]
            order = of_class.argsort(descending=True)
            kept = order[of_class[order] > threshold][:16]
            for name in names:
                if len(kept) == 0:
                    assert name not in detections[i]
                else:
                    _, masks = detections[i][name]
                    assert torch.equal(masks, inside[i, kept])


def test_the_first_reward_loads_clip_though_no_color_is_asked_for(models):
    forget_models()
    images, _ = pictures(1, 40, 48)
    geneval.reward(images, ["a bench"], [{"include": [BENCH]}])
    assert geneval.clip_model.cache_info().currsize == 1


def test_the_graded_score_is_the_first_column(models):
    images, _ = pictures(1, 40, 48)
    columns = geneval.reward(images, ["a bench"], [{"include": [BENCH]}])
    assert list(columns) == ["geneval", "geneval_correct"]


@pytest.fixture
def columns_found(monkeypatch):
    """A function that detects bars and tells for each class at which x, surest first.

    A bar is (class, probability, x, mask logit), of height 3, in a mask that is 0 elsewhere.
    """

    def columns_found(record, *bars):
        output = output_of_bars(bars)
        processor = Mock(return_value={"pixel_values": torch.zeros(1, 3, 24, 24)})
        monkeypatch.setattr(geneval, "detector", lambda: (lambda pixels: output, processor))
        (objects,) = geneval.detect(torch.zeros(1, 3, 24, 24), [record])
        columns = {}
        for name, (boxes, _) in objects.items():
            columns[name] = boxes[:, 0].tolist()
            for x, *rest in boxes.tolist():
                assert rest == [5, x + 1, 8]  # up to the far edge of the last pixel
        return columns

    return columns_found


def output_of_bars(bars):
    logits = torch.full((1, len(bars), 81), -99.0)
    masks = torch.zeros(1, len(bars), 24, 24)
    for query, (label, probability, x, value) in enumerate(bars):
        logits[0, query, label] = math.log(probability)
        logits[0, query, 80] = math.log(1 - probability)
        masks[0, query, 5:8, x] = value
    return SimpleNamespace(class_queries_logits=logits, masks_queries_logits=masks)


CARS = [(2, 0.31, 0, 30), (2, 0.91, 1, 30), (2, 0.29, 2, 30), (2, 0.89, 3, 30)]
# The mask's mean, sigmoid(0.1) = 0.525, weighs the first dog's probability.
DOGS = [(16, 0.91, 9, 0.1), (16, 0.54, 8, 30)]


def test_objects_count_above_a_confidence_of_03(columns_found):
    assert columns_found({}, *CARS) == {"car": [1, 3, 0]}


def test_objects_to_be_counted_do_so_above_09(columns_found):
    assert columns_found({"tag": "counting"}, *CARS, *DOGS) == {"car": [1]}


def test_the_masks_certainty_weighs_the_confidence(columns_found):
    assert columns_found({}, *DOGS) == {"dog": [8, 9]}
    assert columns_found({}, (64, 0.54, 3, 0.1), *DOGS[1:]) == {"dog": [8]}


def test_the_16_surest_objects_count_under_both_names_of_a_class(columns_found):
    bars = [(64, 0.5 + x / 99, x, 30) for x in range(20)]
    surest = list(range(19, 3, -1))
    assert columns_found({}, *bars) == {"computer mouse": surest, "mouse": surest}


# ---- The colours.


TEMPLATES = ["a photo of a {} bench", "a photo of a {}-colored bench", "a photo of a {} object"]


def two_benches():
    """The masks [2, 128, 128] and the boxes [2, 4] of two benches."""
    masks = torch.zeros(2, 128, 128, dtype=torch.bool)
    masks[0, 5:40, 10:30] = True
    masks[0, 5:10, 10:15] = False  # It is no rectangle, so that the background shows.
    masks[1, 20:120, 33:128] = True
    boxes = torch.tensor([[10.0, 5, 30, 40], [33, 20, 128, 120]])
    return boxes, masks


def crops_of_benches(pil):
    """The two benches in a PIL image, on the grey background that GenEval takes."""
    boxes, masks = two_benches()
    grey = Image.new("RGB", (128, 128), "#999")
    crops = []
    for box, mask in zip(boxes.tolist(), masks.numpy()):
        alone = Image.composite(pil, grey, Image.fromarray(mask))
        crops.append(alone.crop(box))
    return crops


def color_classifier(model, tokenizer):
    """Embeddings [10, D] of the colours of benches."""
    embeddings = []
    for color in geneval.COLORS:
        texts = [template.format(color) for template in TEMPLATES]
        units = F.normalize(model.encode_text(tokenizer(texts)), dim=1)
        embeddings.append(units.mean(0))
    return F.normalize(torch.stack(embeddings), dim=1)


def test_colors_are_classified_by_genevals_templates(models):
    model, _, tokenizer = open_clip_model()
    expected = color_classifier(model, tokenizer)
    assert torch.allclose(geneval.color_texts("bench"), expected, atol=1e-5)


def test_clip_sees_a_crop_as_it_would_see_a_file(models):
    model, transform, _ = open_clip_model()
    _, pils = pictures(2, 128, 128)
    for pil in pils:
        for crop in crops_of_benches(pil):
            embedding = model.encode_image(transform(crop)[None])[0]
            expected = F.normalize(embedding, dim=0)
            assert torch.allclose(geneval.clip_image(to_tensor(crop)), expected, atol=2e-3)


def test_a_small_crop_stays_in_0_to_1_as_a_file_does(models):
    image, pil = hard_edges()
    model, transform, _ = open_clip_model()
    expected = F.normalize(model.encode_image(transform(pil)[None])[0], dim=0)
    assert torch.allclose(geneval.clip_image(image), expected, atol=2e-3)


@pytest.fixture
def finds_two_benches(models, monkeypatch):
    """The detector finds the same two benches in each image."""
    objects = {"bench": two_benches()}
    monkeypatch.setattr(geneval, "detect", lambda images, records: [objects] * len(images))


def judge_color(images, color):
    record = {"include": [{"class": "bench", "count": 2, "color": color}]}
    prompt = f"two {color} benches"
    return geneval.reward(images, [prompt] * len(images), [record] * len(images))


@pytest.fixture
def seen(monkeypatch):
    """The crops that CLIP is shown, each with its embedding."""
    pairs = []
    embed = geneval.clip_image

    def clip_image(crop):
        embedding = embed(crop)
        pairs.append((crop, embedding))
        return embedding

    monkeypatch.setattr(geneval, "clip_image", clip_image)
    return pairs


def test_each_object_is_cut_out_on_grey(finds_two_benches, seen):
    images, pils = pictures(2, 128, 128)
    judge_color(images, "red")
    expected = crops_of_benches(pils[0]) + crops_of_benches(pils[1])
    for (crop, _), pil in zip(seen, expected, strict=True):
        assert torch.allclose(crop, to_tensor(pil), atol=1e-6)


def test_the_reward_of_colors_has_no_gradient(finds_two_benches, seen):
    images, _ = pictures(1, 128, 128)
    judge_color(images, "red")
    for _, embedding in seen:
        assert not embedding.requires_grad
    assert len(seen) == 2


def colors_of_benches(pil):
    """The colours that open_clip's own model sees in the two benches."""
    model, transform, tokenizer = open_clip_model()
    classes = color_classifier(model, tokenizer)
    colors = []
    for crop in crops_of_benches(pil):
        embedding = model.encode_image(transform(crop)[None])
        best = F.cosine_similarity(embedding, classes).argmax()
        colors.append(geneval.COLORS[best])
    return colors


def test_the_reward_judges_the_colors_that_clip_sees(finds_two_benches):
    images, pils = pictures(2, 128, 128)
    colors = [colors_of_benches(pil) for pil in pils]
    for color in geneval.COLORS:
        right = torch.tensor([names.count(color) for names in colors])
        columns = judge_color(images, color)
        assert torch.equal(columns["geneval"], (1 + right / 2) / 2)
        assert torch.equal(columns["geneval_correct"], (right == 2).float())


# ---- On a GPU, which is a pretended one.


def imported_anew(module):
    """The module as it decides to be on this device when imported, with the same models."""
    spec = util.spec_from_file_location(f"{module.__name__}_anew", module.__file__)
    new = util.module_from_spec(spec)
    spec.loader.exec_module(new)
    for name in vars(new):
        if name.startswith(("DETECTOR", "CLIP", "PICKSCORE")) and name != "CLIP_DTYPE":
            setattr(new, name, getattr(module, name))
    return new


def columns_of(module, images):
    record = {"prompt": 'a "cat"', "include": [BENCH | {"color": "red"}]}
    prompts = [record["prompt"]] * len(images)
    result = module.reward(images, prompts, [record] * len(images))
    columns = result if isinstance(result, dict) else {"reward": result}
    return {name: torch.as_tensor(column).float().cpu() for name, column in columns.items()}


@pytest.mark.parametrize("module", [ocr, clipscore, pickscore, geneval])
@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_a_gpu_gives_the_same_scores_wherever_the_images_are(models, module, place):
    images, _ = pictures(3, 64, 96)
    expected = columns_of(module, images)
    with pretended_gpu():
        columns = columns_of(imported_anew(module), images.to(place))
    assert columns.keys() == expected.keys()
    for name, column in columns.items():
        assert torch.allclose(column, expected[name], atol=5e-3)


@pytest.mark.parametrize("module", [clipscore, pickscore, geneval])
def test_clip_is_in_half_precision_on_a_gpu(models, module):
    with pretended_gpu():
        new = imported_anew(module)
        load = new.pickscore_model if module is pickscore else new.clip_model
        model, _ = load()
    parameters = list(model.parameters())
    assert {p.dtype for p in parameters} == {torch.float16}
    assert all(p.is_cuda for p in parameters)
