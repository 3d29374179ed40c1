"""Fixtures of the tests in this folder, of the specification, and of examples/.

They load packages where they need them. So the process that starts the others, for `-n`, and reads
this file as well, loads none.
"""

import os
import signal
import sys

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
def switches():
    """Those of torch and of Python, which a run sets, are as before after each test."""
    import torch

    precision = torch.get_float32_matmul_precision()
    attention = torch.backends.cuda.cudnn_sdp_enabled()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    torch.set_grad_enabled(True)
    torch.autograd.set_multithreading_enabled(True)
    torch.set_default_dtype(torch.float32)
    # A default device, even if it is the CPU, costs time in each of torch's functions.
    torch.set_default_device(None)
    vars(torch._GLOBAL_DEVICE_CONTEXT).clear()  # torch 2.7 would take None for a device.
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.enable_cudnn_sdp(attention)
    for number, handler in handlers.items():
        signal.signal(number, handler)


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
    if not (folder / "with-T5").exists():  # A file that imports this fixture has a second one.
        save_random_pipeline(folder / "with-T5")
        save_random_pipeline(folder / "without-T5", t5=False)
    return folder / "with-T5"


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty folder with rewards and prompts, in which a test runs."""
    from tests.small import set_up

    set_up(tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def whole(model, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    from flow_grpo import main
    from tests.small import WINDOW, arguments, working_in

    folder = model.with_name("whole")
    with working_in(tmp_path_factory.mktemp("work")):
        assert main(arguments(model, folder, **WINDOW)) == 0
    return folder
