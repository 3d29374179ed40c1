"""What a user gives: settings, prompts, rewards and models, and what is said of those that fail."""

import json
import logging
import os
import pickle
import re
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import diffusers
import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import GatedRepoError
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import flow_grpo
from flow_grpo import TINY, Config, UserError, load_reward, main, read_prompts, score_images
from tests.small import PROMPTS, arguments, error_of, metrics, seeded, write

# ---- Settings.
PUBLISHED = {
    "epochs": 500,
    "prompts_per_epoch": 48,
    "group_size": 24,
    "updates_per_epoch": 2,
    "learning_rate": 3e-4,
    "beta": 0.04,
    "clip_range": 1e-4,
    "guidance_scale": 4.5,
    "noise_level": 0.7,
    "sde_steps": 9,
    "lora_rank": 32,
    "ema_interval": 8,
    "adam_epsilon": 1e-8,
    "height": 512,
    "width": 512,
    "max_sequence_length": 128,
}


@pytest.fixture
def settings(work, monkeypatch):
    """The settings with which a command line starts a run."""

    def settings(*args):
        start = Mock(side_effect=UserError("enough"))
        monkeypatch.setattr(flow_grpo, "start", start)
        assert main(args) == 2
        config, _ = start.call_args.args
        return vars(config)

    return settings


def test_by_default_the_settings_are_the_published_ones(settings):
    assert PUBLISHED.items() <= settings("--model=some/model").items()


def test_evaluations_take_40_steps_and_rollouts_10():
    assert (flow_grpo.EVAL_DENOISING_STEPS, flow_grpo.ROLLOUT_DENOISING_STEPS) == (40, 10)


@pytest.mark.parametrize("folder", ["mine", "~/mine"])
def test_a_models_folder_may_bring_settings_and_flags_come_before_them(
    settings, monkeypatch, folder
):
    monkeypatch.setenv("HOME", os.getcwd())
    Path("mine").mkdir()
    write("mine/flow_grpo.json", '{"epochs": 7, "beta": 0.5}')
    got = settings(f"--model={folder}", "--beta=2", "--output-dir=out")
    assert got == vars(Config(model=folder, epochs=7, beta=2, output_dir="out"))


@pytest.mark.parametrize("device, model", [("cpu", TINY.model), ("cuda", Config.model)])
def test_without_a_gpu_the_model_is_tiny_sd3(settings, monkeypatch, device, model):
    monkeypatch.setattr(flow_grpo, "DEVICE", device)
    assert settings()["model"] == model


def help_of(capsys):
    with pytest.raises(SystemExit) as ending:
        main(["--help"])
    assert ending.value.code == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_each_setting_has_a_whole_phrase_of_help(capsys):
    shown = help_of(capsys)
    for name in vars(Config()):
        flag = name.replace("_", "-")
        help_and_default = shown.partition(f" --{flag}")[2].partition("(default")[0]
        assert re.search(r"(\w+\W+){4}.*\. $", help_and_default), flag


@pytest.mark.parametrize("device, default", [("cpu", TINY), ("cuda", Config())])
def test_help_says_which_defaults_it_shows(capsys, monkeypatch, device, default):
    monkeypatch.setattr(flow_grpo, "DEVICE", device)
    shown = help_of(capsys)
    assert re.search("defaults are .*SD3.5 Medium.* Without a GPU, .* tiny-sd3 instead", shown)
    assert re.search(rf"--epochs .{{,80}}\(default: {default.epochs}\)", shown)


# ---- Bad input.
FILES = {
    "empty.txt": " \n\n",
    "ugly.txt": "a\nugly",
    "broken.jsonl": '{"prompt": "a"}\n{"p": ',
    "surrogate.jsonl": '{"prompt": "a \\ud800"}',
    "deep.JSONL": "[" * 100_000,
    "nameless.jsonl": '{"text": "a"}',
    "leaves.py": "exit(0)",
    "picky.py": "def reward(images, *_): return [0.5] * len(images)\ndef check(_): exit('no')",
}
BAD = [
    ("prompt-file", "none.txt", "none.txt.*No such file.*--prompt-file"),
    ("prompt-file", "", "no prompts.*--prompt-file"),
    ("prompt-file", "empty.txt", "empty.txt.* empty"),
    ("prompt-file", "ugly.txt", "line 2 of ugly.txt: .*ugly things can't be judged"),
    ("prompt-file", "broken.jsonl", "line 2 of broken.jsonl: "),
    ("prompt-file", "surrogate.jsonl", "line 1 of surrogate.jsonl: "),
    ("prompt-file", "deep.JSONL", "line 1 of deep.JSONL: "),
    ("prompt-file", "nameless.jsonl", "line 1 of nameless.jsonl: .*`prompt`"),
    ("eval-prompt-file", "ugly.txt", "line 2 of ugly.txt: "),
    ("reward", "ocr", "line 1 of words.txt: .*in double quotes"),
    ("reward", "beauty", "beauty.* can't be loaded: .*file.py:function, or ocr, .* of rewards/"),
    ("reward", "rewards.py:none", "can't be loaded: .*none"),
    ("reward", "leaves.py:f", "can't be loaded: SystemExit"),
    ("reward", "picky.py:reward", "line 1 of words.txt: .*no; "),
    ("reward", "rewards.py:broken", "rewards failed .*'a palace of memory'.*ZeroDivisionError"),
    ("reward", "rewards.py:leaves", "rewards failed .*SystemExit"),
    ("model", ".", "model . can't be loaded: .*give a folder"),
    ("height", "18", "--height and --width need to be multiples of 4, at most 32"),
    ("width", "64", "--height and --width need to be multiples of 4, at most 32"),
    ("epochs", "0", "--epochs can't be 0"),
    ("group-size", "1", "--group-size can't be 1"),
    ("learning-rate", "nan", "--learning-rate can't be nan"),
    ("guidance-scale", "0.5", "--guidance-scale can't be 0.5"),
    ("noise-level", "0", "--noise-level can't be 0"),
    ("beta", "-1", "--beta can't be -1"),
    ("seed", "-1", "--seed can't be -1"),
    ("sde-steps", "10", "--sde-steps up to --sde-last-step"),
    ("sde-last-step", "10", "--sde-last-step, and that up to 9"),
]


@pytest.mark.parametrize("flag, value, sentence", BAD)
def test_bad_input_is_one_sentence(model, work, capsys, flag, value, sentence):
    for name, content in FILES.items():
        Path(name).write_text(content)
    write("words.txt", "a palace of memory")
    args = arguments(model, prompt_file="words.txt")
    error = error_of([*args, f"--{flag}={value}"], capsys)
    assert re.search(sentence, error)
    assert "to go on" not in error
    assert not Path("out").exists()


@pytest.mark.parametrize("args", [["--output-dir=where"], ["--resume=none"]])
def test_what_does_not_start_leaves_no_folder(work, capsys, args):
    before = os.listdir()
    error_of([*args, "--prompt-file=none.txt"], capsys)
    assert os.listdir() == before


def test_a_tilde_is_the_home_folder_in_each_path(model, work, monkeypatch):
    home = Path("home").absolute()
    monkeypatch.setenv("HOME", str(home))
    shutil.copytree(model, "home/model")
    write("home/prompts.txt", "a", "b")
    shutil.copy("home/prompts.txt", "home/eval.txt")
    shutil.copy("rewards.py", "home")
    paths = {"prompt_file": "~/prompts.txt", "eval_prompt_file": "~/eval.txt"}
    paths |= {"model": "~/model", "out": "~/run", "reward": "~/rewards.py:red", "epochs": 1}
    assert main(arguments(**paths)) == 0
    assert main(["--resume=~/run"]) == 0
    assert metrics("home/run")[-1]["epoch"] == 1
    assert not Path("~").exists()


# ---- Prompts.
def split(*lines, name="some.txt", **given):
    """The prompts of training and of evaluation."""
    write(name, *lines)
    config = Config(prompt_file=name, **given)
    records = flow_grpo.split_prompts(config, load_reward("rewards.py:red"))
    return [[record["prompt"] for record in part] for part in records]


MANY = [f'a "{i}"' for i in range(600)]


def test_half_the_prompts_are_held_out(work):
    prompts, eval_prompts = split(*PROMPTS)
    assert len(prompts) == len(eval_prompts) == 4
    assert sorted(prompts + eval_prompts) == PROMPTS


def test_at_most_256_prompts_are_held_out(work):
    prompts, eval_prompts = split(*MANY)
    assert len(eval_prompts) == 256
    assert sorted(prompts + eval_prompts) == sorted(MANY)


def test_a_prompt_that_is_held_out_is_nowhere_in_training(work):
    prompts, eval_prompts = split(*MANY, *MANY)
    assert not set(prompts) & set(eval_prompts)
    assert len(set(eval_prompts)) == len(eval_prompts)
    assert len(prompts) == 2 * (600 - 256)


def test_a_record_with_a_prompt_that_is_held_out_is_not_in_training_either(work):
    one = [json.dumps({"prompt": prompt, "tag": "one"}) for prompt in PROMPTS]
    other = [json.dumps({"prompt": prompt, "tag": "other"}) for prompt in PROMPTS]
    prompts, eval_prompts = split(*one, *other, name="some.jsonl")
    assert not set(prompts) & set(eval_prompts)


def test_the_prompts_that_are_held_out_are_the_same_for_all_seeds(work):
    assert split(*PROMPTS, seed=1) == split(*PROMPTS, seed=2)


def test_one_prompt_is_for_training_and_evaluation(work):
    assert split("a") == [["a"], ["a"]]


def test_prompts_of_an_evaluation_file_leave_the_others_to_training(work):
    assert split("a", "b", "a", eval_prompt_file="prompts.txt") == [["a", "b", "a"], PROMPTS]


def read(name, *lines):
    write(name, *lines)
    return read_prompts(name, load_reward("rewards.py:red"))


def test_lines_of_text_are_prompts(work):
    records = read("a.txt", "\ufeffa cat ", "", "  a\u2028dog\r")
    assert records == [{"prompt": "a cat"}, {"prompt": "a\u2028dog"}]


def test_lines_of_jsonl_are_records(work):
    records = read("a.jsonl", '\ufeff{"prompt": "b \\"\u2028\\"", "tag": 1}\r', "\r", "")
    assert records == [{"prompt": 'b "\u2028"', "tag": 1}]


SIGNS = [{"prompt": 'a sign "310"', "tag": "a"}, {"prompt": 'a sign "311"', "tag": "b"}]
LINES = "\n".join(map(json.dumps, SIGNS))
NO_PROMPTS = {
    "lines.json": LINES,
    "lines.txt": LINES,
    "indented.txt": "\n  " + LINES,
    "headed.txt": 'signs\n{"prompt": "a sign"}',
    "list.txt": json.dumps(SIGNS),
    "lists.txt": '["a", "b"]\n["c", "d"]',
    "pretty.txt": json.dumps(SIGNS, indent=2),
    "pretty_dict.txt": json.dumps(SIGNS[0], indent=2),
    "strings.txt": "\n".join(json.dumps(record["prompt"]) for record in SIGNS),
    "table.csv": 'prompt,category\n"a sign ""310""",signs',
    "prompts": "a sign",
}


@pytest.mark.parametrize("name", NO_PROMPTS)
def test_what_is_neither_text_nor_jsonl_is_refused(work, name):
    with pytest.raises(UserError, match=rf"{name}.*\.txt of prompts, or a \.jsonl of records"):
        read(name, NO_PROMPTS[name])


def test_prompts_may_have_brackets_and_quotation_marks(work):
    lines = ["[photo] a cat", "{red|blue} car", '"A" on a sign', "a \\ b", '(a "b":1.2), c']
    assert [record["prompt"] for record in read("a.txt", *lines)] == lines


IN_OTHER_ENCODINGS = [
    'a sign "310"'.encode("utf-16"),
    'a sign "310"'.encode("utf-16-le"),  # without a byte order mark
    'a sign "310"'.encode("utf-16-be"),
    "a café".encode("latin-1"),
]


@pytest.mark.parametrize("content", IN_OTHER_ENCODINGS)
def test_prompts_are_in_utf_8(work, content):
    Path("a.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.txt.*UTF-8"):
        read_prompts("a.txt", load_reward("rewards.py:red"))


def warnings_of(monkeypatch, library):
    """What a library warns of from now on."""
    handler = Mock(level=logging.WARNING)
    logger = logging.getLogger(library.__name__)
    monkeypatch.setattr(logger, "handlers", [handler])
    library.utils.logging.set_verbosity_warning()
    return handler.handle


def test_prompts_that_clip_cuts_are_said_once(model, work, monkeypatch, capsys):
    warnings = [warnings_of(monkeypatch, library) for library in (diffusers, transformers)]
    write("long.txt", "short", "tenletters", *[f"very long prompt {i}" for i in range(3)])
    assert main(arguments(model, prompt_file="long.txt", epochs=1, group_size=2)) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "CLIP" in line]
    assert len(said) == 1
    assert re.search(r"\b12 tokens.*\b3 of", said[0])
    assert not any(warning.called for warning in warnings)


# ---- Rewards of one's own.
IMAGES = torch.rand(2, 3, 4, 4, generator=seeded())
RECORDS = [{"prompt": "a"}, {"prompt": "b"}]


def scores(source):
    return score_images(load_reward(source), IMAGES.clone(), RECORDS)


def test_a_rewards_numbers_have_its_files_name(work):
    redness = IMAGES[:, 0] - IMAGES[:, 1:].mean(1)
    expected = {"reward": redness.mean((1, 2)), "rewards": redness.mean((1, 2))}
    torch.testing.assert_close(scores("rewards.py:red"), expected)


def test_a_rewards_columns_have_names_of_their_own(work):
    red = scores("rewards.py:red")["reward"]
    expected = {"reward": red, "first": red, "second": torch.tensor([0.25, 0.25])}
    torch.testing.assert_close(scores("rewards.py:two"), expected)


def test_a_column_that_is_called_reward_is_the_reward(work):
    red = scores("rewards.py:red")["reward"]
    expected = {"reward": red, "first": torch.tensor([0.25, 0.25])}
    torch.testing.assert_close(scores("rewards.py:named"), expected)


def test_a_name_alone_is_that_of_a_file_in_rewards():
    reward = load_reward("ocr")
    assert reward.name == "ocr"
    with pytest.raises(ValueError, match="double quotes"):
        reward.check({"prompt": "a sign"})


def test_a_reward_may_change_what_it_is_given(work):
    images = IMAGES.clone()
    records = [{"prompt": "a"}] * 2  # the same one, as in a group
    greedy = score_images(load_reward("rewards.py:greedy"), images, records)
    torch.testing.assert_close(greedy, scores("rewards.py:red"))
    assert torch.equal(images, IMAGES)
    assert records == [{"prompt": "a"}] * 2


GRAPHS = """
import torch

scale = torch.nn.Parameter(torch.ones(()))


@torch.enable_grad()
def tensor(images, prompts, records):
    return images.mean((1, 2, 3)) * scale


def numbers(images, prompts, records):
    return list(tensor(images, prompts, records))


def columns(images, prompts, records):
    return {"bright": numbers(images, prompts, records)}
"""


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize("name", ["tensor", "numbers", "columns"])
def test_a_rewards_numbers_may_have_a_graph(work, name):
    Path("graphs.py").write_text(GRAPHS)
    reward = scores(f"graphs.py:{name}")["reward"]
    torch.testing.assert_close(reward, IMAGES.mean((1, 2, 3)))
    assert not reward.requires_grad


RETURNED = {
    "a_tuple": ("([0.5] * len(images), {'a': 1})", r"\(\[0.5, 0.5\], \{'a': 1\}\)"),
    "nothing": ("None", "None"),
    "words": ("['good', 'bad']", r"\['good', 'bad'\]"),
    "few": ("[0.25]", r"\[0.25\]"),
    "nan": ("[0.5, float('nan')]", r"\[0.5, nan\]"),
    "inf": ("{'a': [0.5, 1.5], 'b': [0.5, float('inf')]}", r"inf\]\}.*b is not finite"),
    "no_columns": ("{}", r"\{\}"),
    "a_coroutine": ("later()", "coroutine"),
}


@pytest.mark.filterwarnings("ignore:coroutine")
@pytest.mark.parametrize("name", RETURNED)
def test_what_a_reward_returned_is_said_if_it_is_no_numbers(model, work, capsys, name):
    expression, shown = RETURNED[name]
    function = f"def {name}(images, prompts, records): return {expression}"
    write("odd.py", "async def later(): return [0.5]", function)
    error = error_of(arguments(model, reward=f"odd.py:{name}"), capsys)
    assert re.search(f"odd failed .*returned .*{shown}", error)
    assert "a reward returns one finite number for each image" in error


WORKERS = """
import multiprocessing
import pickle

from the_neighbour import twice


def mean_twice(image):
    return twice(sum(image) / len(image))


def reward(images, prompts, records):
    assert pickle.loads(pickle.dumps(reward)) is reward
    with multiprocessing.get_context(METHOD).Pool(1) as pool:
        return pool.map(mean_twice, images.flatten(1).tolist())
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_rewards_file_may_have_neighbours_and_processes(work, method):
    Path("mine").mkdir()
    write("mine/the_neighbour.py", "def twice(x): return 2 * x")
    Path(f"mine/by_{method}.py").write_text(WORKERS.replace("METHOD", repr(method)))
    expected = 2 * IMAGES.mean((1, 2, 3))
    torch.testing.assert_close(scores(f"mine/by_{method}.py:reward")["reward"], expected)


def test_a_reward_may_be_called_like_a_module_that_is_loaded(work):
    rewards = []
    for number in (1, 2):
        Path(f"{number}").mkdir()
        write(f"{number}/json.py", f"def reward(images, *_): return [{number}] * len(images)")
        rewards.append(load_reward(f"{number}/json.py:reward"))
    for number, reward in enumerate(rewards, 1):
        assert score_images(reward, IMAGES, RECORDS)["reward"].tolist() == [number, number]
    assert rewards[1].name == "json"
    assert pickle.loads(pickle.dumps(rewards[1].function)) is rewards[1].function
    assert sys.modules["json"] is json
    assert json.loads("[1]") == [1]


SWITCHES = """
import torch


def switch():
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_float32_matmul_precision("medium")
    torch.backends.cuda.enable_cudnn_sdp(True)


def quiet(images, prompts, records):
    assert images.dtype == torch.float32
    return images[:, 0].mean((1, 2))


def switching(images, prompts, records):
    scores = quiet(images, prompts, records)
    switch()
    return scores
"""


@pytest.mark.parametrize("when", ["loaded", "called"])
def test_a_run_has_its_own_switches_whatever_a_reward_sets(model, work, when):
    Path("calm.py").write_text(SWITCHES)
    Path("loads.py").write_text(SWITCHES + "\n\nswitch()\n")
    source = "loads.py:quiet" if when == "loaded" else "calm.py:switching"
    assert main(arguments(model, reward="calm.py:quiet", epochs=1)) == 0
    assert main(arguments(model, "other", reward=source, epochs=1)) == 0
    for line, other in zip(metrics("out"), metrics("other"), strict=True):
        names = [name for name in line if not re.search("seconds|calm", name)]
        assert {name: other[name] for name in names} == {name: line[name] for name in names}
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_default_device() == torch.device("cpu")
    assert torch.get_float32_matmul_precision() == "high"  # TF32, on a GPU
    assert not torch.backends.cuda.cudnn_sdp_enabled()


# ---- The model.
@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("name", ["/data/none", "./models/none", "no/model"])
def test_a_model_that_is_not_there_is_said(work, offline, capsys, name):
    error = error_of(arguments(name), capsys)
    assert re.search(f"model {name} can't be loaded.* no such folder", error)
    assert "a name on the hub, which can be reached" in error
    assert not Path("out").exists()


def test_a_gated_model_needs_a_licence_and_a_login(work, capsys, monkeypatch):
    error = OSError("no access")
    error.__context__ = GatedRepoError("gated", response=Mock())  # as diffusers raises it
    load = Mock(side_effect=error)
    monkeypatch.setattr(diffusers.StableDiffusion3Pipeline, "load_config", load)
    sentence = error_of(arguments(Config.model), capsys)
    assert re.search(f"{Config.model} can't be loaded.*licence.*login", sentence)


def test_a_model_that_lacks_weights_is_said_with_the_part(model, work, capsys):
    shutil.copytree(model, "unfused")
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(model)
    pipe.transformer.add_adapter(LoraConfig(target_modules=["to_q"]))
    pipe.transformer.save_pretrained("unfused/transformer")
    error = error_of(arguments("unfused"), capsys)
    assert re.search("transformer of unfused lacks weights: .*; fuse its LoRA", error)
    assert not Path("out").exists()


def test_a_model_whose_autoencoder_lacks_weights_is_said(model, work, capsys):
    shutil.copytree(model, "cut")
    (path,) = Path("cut/vae").glob("*.safetensors")
    weights = load_file(path)
    del weights["decoder.conv_out.weight"]
    save_file(weights, path, {"format": "pt"})
    assert re.search("(vae|autoencoder) .*lacks weights", error_of(arguments("cut"), capsys))


def test_a_model_of_which_there_is_a_variant_alone_is_said(model, work, capsys):
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(model)
    pipe.save_pretrained("half", variant="fp16")
    error = error_of(arguments("half"), capsys)
    assert re.search("model half can't be loaded: .*no file named.* saved without `variant`", error)
