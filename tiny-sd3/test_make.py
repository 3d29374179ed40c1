"""Tests of the embedded model, and of what makes it. They need no network and no GPU."""

import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from transformers import CLIPTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "rewards"))

import make
import ocr

import flow_grpo

HERE = Path(__file__).resolve().parent
PROMPTS = (HERE.parent / "prompts.txt").read_text().splitlines()
NUMBERS = [f"{n:03}" for n in range(1000)]


# ---- The signs.
@pytest.fixture(scope="module")
def signs():
    """One for each ninth number."""
    rng = random.Random(0)
    return [make.draw_sign(number, rng) for number in NUMBERS[::9]]


def test_signs_have_the_embedded_models_size(signs):
    assert {sign.shape for sign in signs} == {(make.HEIGHT, make.WIDTH, 3)}


def test_signs_are_legible_wherever_they_are(signs):
    images = torch.from_numpy(np.stack(signs)).permute(0, 3, 1, 2) / 255
    right = [text == number for text, number in zip(ocr.read(images), NUMBERS[::9])]
    assert sum(right) >= 0.97 * len(right)


def test_a_seed_draws_the_same_sign_again(signs):
    again = make.draw_sign("000", random.Random(0))
    assert (signs[0] == again).all()


# ---- The numbers.
def test_each_number_is_trained_on_or_held_out_or_tuned_on():
    trained, held_out, tuning = make.split_numbers()
    assert sorted(trained + held_out + tuning) == NUMBERS


def test_the_prompts_ask_for_the_held_out_numbers():
    _, held_out, _ = make.split_numbers()
    assert [make.PROMPT.format(number) for number in held_out] == PROMPTS


@pytest.fixture(scope="module")
def neighbours():
    trained, _, _ = make.split_numbers()
    return make.neighbours(trained)


def test_each_trained_number_can_have_a_typo(neighbours):
    trained, _, _ = make.split_numbers()
    assert sorted(neighbours) == sorted(trained)
    assert all(neighbours.values())


def test_a_typo_shows_no_held_out_number(neighbours):
    trained, _, _ = make.split_numbers()
    for typos in neighbours.values():
        assert set(typos) <= set(trained)


def test_a_typo_is_one_digit_away(neighbours):
    for number, typos in neighbours.items():
        for typo in typos:
            assert sum(a != b for a, b in zip(number, typo)) == 1


# ---- The model.
@pytest.mark.parametrize("digits", ["407", "1234"])
def test_no_digit_of_a_prompt_is_cut(digits):
    tokenizer = CLIPTokenizer.from_pretrained(HERE / "tokenizer")
    ids = tokenizer(make.PROMPT.format(digits), truncation=True).input_ids
    read = "".join(tokenizer.convert_ids_to_tokens(ids)).replace("</w>", "")
    assert len(ids) == make.TEXT_LENGTH
    assert read.startswith(f'<|startoftext|>a sign that says "{digits}')


def test_a_null_t5_gives_the_pipelines_zeros():
    encoder, tokenizer = make.make_null_t5(32)
    how = dict(padding="max_length", max_length=7, truncation=True, return_tensors="pt")
    tokens = tokenizer("a sign", **how).input_ids
    assert tokens.shape == (1, 7)
    assert not encoder(tokens)[0].any()


def test_it_is_small():
    files = [path for path in HERE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8e6


@pytest.fixture(scope="module")
def texts():
    """What is read in 48 signs of the base model."""
    pipe = StableDiffusion3Pipeline.from_pretrained(HERE)
    seeds = [torch.Generator().manual_seed(n) for n in range(48)]
    images = pipe(
        PROMPTS[:48],
        height=32,
        width=64,
        num_inference_steps=40,
        guidance_scale=1.0,
        max_sequence_length=1,
        generator=seeds,
        output_type="pt",
    ).images
    return ocr.read(images)


def test_it_draws_clean_signs(texts):
    clean = [re.fullmatch(r"\d\d\d", text) for text in texts]
    assert sum(map(bool, clean)) >= 0.93 * 48


def test_it_often_draws_a_wrong_digit(texts):
    right = [f'"{text}"' in prompt for text, prompt in zip(texts, PROMPTS)]
    assert 0.4 < sum(right) / 48 < 0.8


# ---- Training.
def test_a_short_run_learns(tmp_path, monkeypatch):
    """By the command line, with the real reward, on a number that is often drawn wrong."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flow_grpo, "DEVICE", "cpu")
    monkeypatch.setattr(flow_grpo, "EVAL_DENOISING_STEPS", 4)
    Path("train.txt").write_text(PROMPTS[9])
    flags = """
        --prompt-file train.txt --eval-prompt-file train.txt --output-dir out --epochs 6 --seed 1
        --eval-every 6 --prompts-per-epoch 1 --group-size 32 --batch-size 32 --learning-rate 1e-2
    """
    assert flow_grpo.main(flags.split()) == 0
    lines = Path("out/metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    rewards = [line["reward"] for line in metrics if "reward" in line]
    assert len(rewards) == 6
    first = sum(rewards[:3]) / 3
    last = sum(rewards[-3:]) / 3
    assert last > first + 0.03, rewards
