"""Tests of the embedded model, and of what makes it: no network, no GPU; under a minute on 2 cores."""

import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from judge import flow_grpo, make, readings

HERE = Path(__file__).resolve().parent
PROMPTS = (HERE.parent / "prompts.txt").read_text().splitlines()


def test_signs_are_legible_wherever_they_are():
    rng, numbers = random.Random(0), [f"{n:03}" for n in range(0, 1000, 9)]
    signs = [make.draw_sign(number, rng) for number in numbers]
    assert {sign.shape for sign in signs} == {(make.HEIGHT, make.WIDTH, 3)}
    images = torch.from_numpy(np.stack(signs)).permute(0, 3, 1, 2) / 255
    assert sum(a == b for a, b in zip(readings(images), numbers)) >= 0.97 * len(numbers)
    assert (signs[0] == make.draw_sign(numbers[0], random.Random(0))).all()


def test_numbers_are_trained_on_or_held_out_or_tuned_on():
    trained, held_out, tuning = make.split_numbers()
    assert sorted(trained + held_out + tuning) == [f"{n:03}" for n in range(1000)]
    assert [make.PROMPT.format(n) for n in held_out] == PROMPTS
    near = make.neighbours(trained)  # A typo must not show a held-out caption beside an image.
    assert set(near) == set(trained) and {b for wrong in near.values() for b in wrong} <= set(trained)
    assert all(sum(x != y for x, y in zip(a, b)) == 1 for a, wrong in near.items() for b in wrong)
    assert min(map(len, near.values())) > 0


def test_a_null_t5_gives_the_pipelines_zeros():
    encoder, tokenizer = make.make_null_t5(32)
    tokens = tokenizer("a sign", padding="max_length", max_length=7, truncation=True, return_tensors="pt")
    assert tokens.input_ids.shape == (1, 7) and not encoder(tokens.input_ids)[0].any()


@pytest.fixture(scope="module")
def images():
    pipe = StableDiffusion3Pipeline.from_pretrained(HERE)
    size = dict(height=32, width=64, num_inference_steps=40, guidance_scale=1.0, max_sequence_length=1)
    seeds = [torch.Generator().manual_seed(n) for n in range(48)]
    return pipe(PROMPTS[:48], **size, generator=seeds, output_type="pt").images


def test_it_draws_clean_signs_often_with_a_wrong_digit(images):
    assert sum(p.stat().st_size for p in HERE.rglob("*") if p.is_file()) < 8e6
    texts = readings(images)
    assert 0.4 < sum(f'"{text}"' in prompt for text, prompt in zip(texts, PROMPTS)) / 48 < 0.8
    assert sum(bool(re.fullmatch(r"\d\d\d", text)) for text in texts) >= 0.93 * 48


def test_a_short_run_learns(tmp_path, monkeypatch, capsys):
    """Through the command line, with the real reward, on four prompts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(flow_grpo, "EVAL_STEPS", 4)
    Path("train.txt").write_text("\n".join(PROMPTS[:4]))
    flags = "--prompt-file train.txt --eval-prompt-file train.txt --output-dir out --epochs 8 --eval-every 8"
    flags += " --prompts-per-epoch 4 --batch-size 32 --learning-rate 5e-3"
    assert flow_grpo.main(flags.split()) == 0
    out = capsys.readouterr().out
    assert "tiny-sd3, as there is no CUDA GPU." in out
    rewards = [float(text) for text in re.findall(r"^epoch \d+: reward (\S+)", out, re.MULTILINE)]
    assert len(rewards) == 8 and sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.03, rewards
