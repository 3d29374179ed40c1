"""The documents' links, commands, flags and Python, and flow_grpo.py alone in a folder."""

import inspect
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flow_grpo
from flow_grpo import Config, grpo_loss, load_reward, main, score_images, sde_step
from tests.processes import environment
from tests.small import HERE, PROMPTS, only_error, write

README = (HERE / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [HERE / "README.md", *sorted(HERE.glob("[!.]*/README.md"))]
TEXTS = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
PYTHON = re.findall(r"^```python\n(.*?)^```", TEXTS, re.MULTILINE | re.DOTALL)
SHELL = re.findall(r"^```(?:bash|sh)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def first_words(block):
    return " ".join(block.split()[:6])


# ---- Links.
LINK = re.compile(r"""!?\[[^\]]*\]\(([^)\s]+)\)|(?:src|href)="([^"]+)\"""")


def lines_of_the_functions():
    """Where the five functions are in flow_grpo.py, as GitHub links to lines."""
    _, first = inspect.getsourcelines(sde_step)
    last_lines, start = inspect.getsourcelines(grpo_loss)
    return f"L{first}-L{start + len(last_lines) - 1}"


def places_in(text):
    """A heading's place is its words, joined by hyphens."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    named = re.findall(r"""(?:id|name)="([^"]+)\"""", text)
    places = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
    return places | {*named, lines_of_the_functions()}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.parent.name)
def test_the_documents_links_lead_somewhere(document):
    for target in map("".join, LINK.findall(document.read_text(encoding="utf-8"))):
        if not target.startswith(("http", "mailto:")):
            path, _, place = target.partition("#")
            linked = document.parent / path if path else document
            assert linked.exists(), target
            assert not place or place in places_in(linked.read_text(encoding="utf-8")), target


# ---- Commands.
def flags_after(start, text):
    """The words of what begins like this, up to the command's end."""
    found = re.findall(start + r"([^`\n#|&]*)", text.replace("\\\n", " "))
    return [shlex.split(words) for words in found]


@pytest.mark.parametrize("folder", [".", "tiny-sd3"])  # bench/README.md has no such command.
def test_the_documents_flags_exist(folder):
    document = HERE / folder / "README.md"
    text = document.read_text(encoding="utf-8")
    given = flags_after(r"\bflow_grpo\.py(?= )", text)
    assert given
    if document == HERE / "README.md":
        given += flags_after("`(?=--)", text)  # flags by themselves
    known = {f"--{name.replace('_', '-')}" for name in vars(Config())}
    known |= {flag.replace("--", "--no-", 1) for flag in known} | {"--help"}
    for words in given:
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert flags <= known, words


@pytest.fixture(scope="module")
def quick_start(tmp_path_factory):
    """Here are links to the repository's files, and a run by the README's first command."""
    folder = tmp_path_factory.mktemp("clone")
    prompts = tmp_path_factory.mktemp("prompts") / "eval.txt"
    write(prompts, 'a sign that says "407"')
    for path in HERE.iterdir():
        if not (path.name == "runs" or path.suffix == ".png" or path.name.startswith(".")):
            (folder / path.name).symlink_to(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(flow_grpo, "DEVICE", "cpu")
        short = f"--epochs 1 --prompts-per-epoch 2 --group-size 2 --eval-prompt-file {prompts}"
        first_command = flags_after(r"\bpython flow_grpo\.py ", "\n".join(SHELL))[0]
        assert main(first_command + short.split()) == 0
        yield


def test_the_quick_start_trains_and_leaves_pictures(quick_start):
    (run,) = Path("runs").iterdir()
    assert len(list(run.glob("samples/*.png"))) == 2
    assert (run / "curve.png").exists()


def test_the_readmes_resume_goes_on(quick_start, tmp_path, capsys):
    (run,) = Path("runs").iterdir()
    shutil.copytree(run, tmp_path / "run")
    command = flags_after(r"\bpython flow_grpo\.py (?=--resume )", README)[0]
    command[1] = str(tmp_path / "run")
    assert main([*command, "--epochs=2"]) == 0
    assert "after 1 epoch" in capsys.readouterr().out


# ---- Python.
@pytest.mark.parametrize("block", PYTHON, ids=first_words)
def test_the_documents_python_runs(quick_start, block):
    torch.manual_seed(0)
    exec(block, {})
    for picture in re.findall(r"""save\("(.*?)"\)""", block):
        assert Path(picture).exists()


NUMBERS = re.compile(r"^def (\w+)\(images, prompts, records\)", re.MULTILINE)
REWARDS = [(block, name) for block in PYTHON for name in NUMBERS.findall(block)]


def ones(images, prompts, records):
    return torch.ones(len(images))


@pytest.mark.parametrize("block, name", REWARDS, ids=first_words)
def test_the_readmes_rewards_judge_images(tmp_path, monkeypatch, block, name):
    for downloaded in ("clipscore", "pickscore"):
        if downloaded in block:
            monkeypatch.setattr(f"rewards.{downloaded}.reward", ones)
    (tmp_path / "my.py").write_text(block)
    reward = load_reward(f"{tmp_path}/my.py:{name}")
    record = {"prompt": 'a sign that says "407"'}
    reward.check(record)
    assert score_images(reward, torch.rand(2, 3, 32, 64), [record] * 2)["reward"].shape == (2,)


# ---- The file alone.
SUM = """
import bright
import red

def reward(images, prompts, records):
    return 0.5 * bright.reward(images, prompts, records) + red.reward(images, prompts, records)
"""
BRIGHT = """
def reward(images, prompts, records):
    return images.mean((1, 2, 3))
"""
RED = """
def reward(images, prompts, records):
    return images[:, 0].mean((1, 2))
"""


@pytest.fixture
def alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(HERE / "flow_grpo.py", ".")
    write("prompts.txt", *PROMPTS)


def test_the_file_alone_trains_with_a_sum_of_rewards_of_ones_own(alone):
    """Without a stderr, too, and where Python prints in ASCII."""
    Path("sum.py").write_text(SUM)
    Path("bright.py").write_text(BRIGHT)
    Path("red.py").write_text(RED)
    flags = "--prompt-file prompts.txt --reward sum.py:reward --epochs 1 --batch-size 4 "
    flags += "--prompts-per-epoch 2 --group-size 2 --output-dir für_später --model"
    command = [sys.executable, "flow_grpo.py", *flags.split(), HERE / "tiny-sd3"]
    closed = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
    given = environment() | {"PYTHONPATH": "", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(closed, env=given, stdout=subprocess.PIPE, check=True, timeout=300)
    assert b"epoch 1: reward " in done.stdout
    assert Path("für_später/pytorch_lora_weights.safetensors").exists()


def test_the_file_alone_says_what_else_to_copy(alone, capsys):
    copied_main = runpy.run_path("flow_grpo.py")["main"]
    assert copied_main(["--prompt-file=prompts.txt", "--reward=geneval"]) == 2
    error = only_error(capsys.readouterr().err)
    assert re.search("geneval.* of rewards/", error)
