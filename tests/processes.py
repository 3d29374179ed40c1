"""Runs in processes of their own, which are forked from one that has loaded all packages."""

import importlib
import multiprocessing
import os
import runpy
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import flow_grpo
from tests.small import EVAL_STEPS, HERE, joined


def environment():
    """Of a process that computes as this one does."""
    threads = str(torch.get_num_threads())
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": threads, "PYTHONPATH": str(HERE)}
    return os.environ | hidden


LOADED = "tests.processes diffusers.training_utils matplotlib.figure peft torchvision.utils".split()


@contextmanager
def forked(function, *args):
    """A process that calls the function. It is forked from one that has loaded all packages.

    Its environment is that of the first call.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)  # which takes 7 s, once
    process = context.Process(target=function, args=args)
    with mock.patch.dict(os.environ, environment()):
        process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def exit_code(function, *args):
    """That of a process which calls the function, and is killed if it takes five minutes."""
    with forked(function, *args) as process:
        process.join(300)
    return process.exitcode


def redirect_output():
    """From now on, what this process prints is added to the files `stdout` and `stderr`."""
    for descriptor, name in enumerate(("stdout", "stderr"), 1):
        file = open(name, "a", buffering=1)  # noqa: SIM115
        os.dup2(file.fileno(), descriptor)
        setattr(sys, name, file)


def script(args, variables=()):
    """What `python flow_grpo.py ARGS` does, but for functions that `atexit` calls at its end.

    It adds to the files `stdout` and `stderr`.
    """
    os.environ.update(variables)
    redirect_output()
    sys.argv = ["flow_grpo.py", *args]
    runpy.run_path(str(HERE / "flow_grpo.py"), run_name="__main__")


def watched_runs(runs):
    """Each in turn, with the exit code of the last. It adds to the files `stdout` and `stderr`."""
    redirect_output()
    importlib.reload(flow_grpo)  # which reads from the environment which process this is
    for name, args in runs.items():
        code = watched_run(name, args)
    sys.exit(code)


def two_processes(function, given):
    """What `torchrun --standalone --nproc-per-node 2` does, for a function in place of a script."""
    size = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "max_restarts": 0}
    meeting = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "two"}
    elastic_launch(LaunchConfig(**size, **meeting, start_method="fork"), function)(given)


def wait_for(process, text, path):
    """Until the process has written the text into the file."""
    end = time.monotonic() + 300
    while not (path.exists() and text in path.read_text()):
        assert process.is_alive()
        assert time.monotonic() < end
        time.sleep(0.01)


def watched_run(name, args):
    """A run's exit code. NAME.RANK.pt tells what this process drew, differentiated, and wrote."""
    seen = {"samples": [], "gradients": [], "files": []}
    original = SimpleNamespace(**vars(flow_grpo))

    def sample(run):
        samples = original.sample(run)
        kept = {"latents": samples.latents, "log_probs": samples.log_probs}
        seen["samples"].append(kept | {"columns": samples.columns})
        return samples

    def optimizer_step(run):
        own = gradient_of(run)

        def before_the_step(*_):
            seen["gradients"].append({"own": own, "summed": gradient_of(run)})

        hook = run.optimizer.register_step_pre_hook(before_the_step)
        norm = original.optimizer_step(run)
        hook.remove()
        return norm

    def write_file(path, write):
        def write_and_tell(temporary):
            seen["files"].append(path.name)
            write(temporary)

        original.write_file(path, write_and_tell)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow_grpo, "EVAL_DENOISING_STEPS", EVAL_STEPS)
        for replacement in (sample, optimizer_step, write_file):
            patch.setattr(flow_grpo, replacement.__name__, replacement)
        code = flow_grpo.main(args)
    torch.save(seen, f"{name}.{flow_grpo.RANK}.pt")
    return code


def gradient_of(run):
    return joined(torch.zeros_like(p) if p.grad is None else p.grad for p in run.parameters)
