"""Fixtures of all tests in this folder.

They load packages where they need them. So the process that starts the others, for `-n`, and reads
this file as well, loads none.
"""

import os
import sys
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def hidden_gpu(request, monkeypatch):
    """Only tests that are skipped without a GPU, or have a fixture `gpu`, see one."""
    import torch

    import flow_grpo

    marked = request.node.get_closest_marker("skipif")
    if not marked and "gpu" not in request.fixturenames:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(flow_grpo, "DEVICE", "cpu")


@pytest.fixture(autouse=True)
def unloaded_rewards(tmp_path_factory, monkeypatch):
    """No test sees the reward's files that others have loaded."""
    folder = f"{tmp_path_factory.getbasetemp()}{os.sep}"
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not path.startswith(folder)])
    yield
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(folder):
            del sys.modules[name]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a model with T5. Its sibling is one without."""
    from tests.small import save_random_pipeline

    folder = tmp_path_factory.getbasetemp()
    if not (folder / "with-T5").exists():  # Files that import this fixture have one of their own.
        save_random_pipeline(folder / "with-T5")
        save_random_pipeline(folder / "without-T5", t5=False)
    return folder / "with-T5"


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty folder with rewards and prompts, in which a test runs."""
    import flow_grpo
    from tests.small import EVAL_STEPS, PROMPTS, REWARDS, write

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flow_grpo, "EVAL_DENOISING_STEPS", EVAL_STEPS)
    Path("rewards.py").write_text(REWARDS)
    write("prompts.txt", *PROMPTS)


@pytest.fixture
def whole(model, work):
    """The folder of a run that nothing interrupted. The first test that asks for it makes it."""
    from flow_grpo import main
    from tests.small import WINDOW, arguments

    folder = model.with_name("whole")
    if not (folder / "samples/epoch_00003.png").exists():  # the last thing that it leaves
        assert main(arguments(model, folder, **WINDOW)) == 0
    return folder
