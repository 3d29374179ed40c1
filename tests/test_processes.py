"""Several processes, as torchrun starts them, against one; and what a run prints to."""

import io
import os
import re
import runpy
import shutil
import signal
import socket
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

import flow_grpo
from flow_grpo import UserError, main
from tests.processes import (
    exit_code,
    forked,
    script,
    two_processes,
    wait_for,
    watched_run,
    watched_runs,
)
from tests.small import (
    HERE,
    REWARDS,
    WINDOW,
    arguments,
    error_of,
    joined,
    metrics,
    only_error,
    same_run,
    small_run,
    to_go_on,
    working_in,
)

# ---- Two processes against one.
LATE = """
import itertools
import os
import signal

calls = itertools.count(1)


def due():  # in process 1 alone, after the blank image, the first evaluation and the first epoch
    return os.environ.get("RANK") == "1" and next(calls) == 4


def late_nan(images, prompts, records):
    scores = red(images, prompts, records)
    if due():
        scores[0] = float("nan")
    return scores


def late_kill(images, prompts, records):
    if due():
        os.kill(os.getpid(), signal.SIGKILL)
    return red(images, prompts, records)
"""


@pytest.fixture(scope="module")
def teams(model, tmp_path_factory):
    """Here are runs on one process and on two, what these saw, and what was printed.

    begun: an epoch on one process; one, two: one more on one process, and on two;
    lone, idle: an epoch of batches as large as it is, on one process, and on two;
    nan: on two processes, of which one fails.
    """
    with working_in(tmp_path_factory.mktemp("teams")):
        Path("late.py").write_text(REWARDS + LATE)
        assert main(arguments(model, "begun", epochs=1)) == 0
        shutil.copytree("begun", "one")
        shutil.copytree("begun", "two")
        assert watched_run("one", ["--resume=one", "--epochs=2"]) == 0
        large = {"epochs": 1, "batch_size": 8}
        assert watched_run("lone", arguments(model, "lone", **large)) == 0
        runs = {
            "two": ["--resume=two", "--epochs=2"],
            "idle": arguments(model, "idle", **large),
            "nan": arguments(model, "nan", reward="late.py:late_nan"),
        }
        assert exit_code(two_processes, watched_runs, runs) > 0
        yield


def seen(run, rank):
    return torch.load(f"{run}.{rank}.pt", weights_only=True)


def parameters(run):
    state = torch.load(f"{run}/checkpoint.pt", weights_only=True)
    return joined(state["parameters"].values())


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_two_processes_draw_the_images_of_one_and_have_all_rewards(teams):
    (one,) = seen("one", 0)["samples"]
    for rank in range(2):
        (drawn,) = seen("two", rank)["samples"]
        own = [i for i in range(8) if i // 3 % 2 == rank]  # 3 images in a batch
        for name in ("latents", "log_probs"):
            assert torch.equal(drawn[name][own], one[name][own])
        assert drawn["columns"].keys() == one["columns"].keys()
        assert all(map(torch.equal, drawn["columns"].values(), one["columns"].values()))


def test_gradients_are_summed_over_the_processes(teams):
    both = [seen("two", rank)["gradients"] for rank in range(2)]
    for first, second in zip(*both, strict=True):
        assert torch.equal(first["summed"], first["own"] + second["own"])
        assert torch.equal(first["summed"], second["summed"])
        assert first["own"].norm() > 0
        assert second["own"].norm() > 0


def test_two_processes_have_the_gradients_of_one(teams):
    one = seen("one", 0)["gradients"]
    two = seen("two", 0)["gradients"]
    assert len(one) == 2  # optimiser steps
    for expected, got in zip(one, two, strict=True):
        assert distance(got["summed"], expected["summed"]) < 1e-4


# Where a mean is much smaller than its terms, or counts those beyond a limit.
ROUNDING = {"policy_loss": 1e-7, "clipfrac": 0.02, "ratio_deviation": 1e-5}


def test_two_processes_have_the_metrics_of_one(teams):
    for one, two in zip(metrics("one"), metrics("two"), strict=True):
        assert one.keys() == two.keys()
        for name in one:
            if "seconds" not in name:
                rounding = ROUNDING.get(name)
                assert two[name] == pytest.approx(one[name], rel=1e-3, abs=rounding), name


def test_two_processes_evaluate_like_one(teams):
    """`nan` has done that much. `two` has it from `begun`, and `idle` has other batches."""
    assert metrics("nan")[0]["eval_reward"] == metrics("begun")[0]["eval_reward"]
    picture = "samples/epoch_00000.png"
    assert Path("nan", picture).read_bytes() == Path("begun", picture).read_bytes()


def test_a_process_without_a_batch_changes_nothing(teams):
    assert not any(gradient["own"].any() for gradient in seen("idle", 1)["gradients"])
    assert same_run("idle", "lone")


def test_a_run_of_two_processes_goes_on_with_one(teams, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(name, tmp_path / name)
        assert main([f"--resume={tmp_path / name}", "--epochs=3"]) == 0
    assert distance(parameters(tmp_path / "two"), parameters(tmp_path / "one")) < 1e-4


def test_process_0_alone_writes_and_prints(teams):
    for run in ("two", "idle"):
        assert "checkpoint.pt" in seen(run, 0)["files"]
        assert not seen(run, 1)["files"]
        assert not list(Path(run).glob(".*"))
    printed = Path("stdout").read_text()
    assert len(re.findall("^epoch 2: .* kl ", printed, re.MULTILINE)) == 1


# ---- What ends one ends all.
def one_error(stderr):
    """The one sentence of two processes. torchrun adds a report of its own."""
    assert 'flow_grpo.py", line' not in stderr
    return only_error(stderr)


def test_a_nan_in_one_process_ends_both_with_one_sentence(teams):
    error = one_error(Path("stderr").read_text())
    assert re.search("the reward late failed .*not finite", error)
    assert error.endswith(to_go_on("nan"))


def test_a_run_goes_on_after_a_nan_in_one_process(teams, tmp_path):
    shutil.copytree("nan", tmp_path / "nan")
    assert main([f"--resume={tmp_path / 'nan'}"]) == 0
    assert metrics(tmp_path / "nan")[-1]["epoch"] == 3


def test_a_process_that_is_killed_ends_both_with_one_sentence(model, work):
    """Without --output-dir, too, both are in one folder."""
    Path("late.py").write_text(REWARDS + LATE)
    args = arguments(model, "", reward="late.py:late_kill")
    assert exit_code(two_processes, script, args) > 0
    (folder,) = Path("runs").iterdir()
    assert one_error(Path("stderr").read_text()).endswith(to_go_on(folder))
    assert main([f"--resume={folder}"]) == 0
    assert metrics(folder)[-1]["epoch"] == 3


def test_bad_input_is_said_by_one_process(model, work):
    assert exit_code(two_processes, script, arguments(model, prompt_file="none.txt")) > 0
    assert "none.txt" in one_error(Path("stderr").read_text())
    assert not Path("out").exists()


def test_a_process_that_is_lost_in_an_update_is_said(model, work, monkeypatch):
    run = small_run(model)
    samples = flow_grpo.sample(run)
    monkeypatch.setattr(flow_grpo, "PROCESSES", 2)
    monkeypatch.setattr(dist, "all_reduce", Mock(side_effect=RuntimeError("closed")))
    with pytest.raises(UserError, match="another process has ended"):
        flow_grpo.optimize(run, samples)


# ---- Processes that torchrun hasn't started.
def test_an_error_is_said_though_the_store_has_ended_with_process_0(monkeypatch, capsys):
    store = Mock()
    store.add.side_effect = RuntimeError("connection closed")
    monkeypatch.setattr(flow_grpo, "store", store)
    monkeypatch.setattr(signal, "signal", Mock())
    assert flow_grpo.report(2, "no") == 2
    assert capsys.readouterr().err == "error: no\n"


ALONE = [{"RANK": "1"}, {"WORLD_SIZE": "", "RANK": ""}, {"LOCAL_RANK": "1", "WORLD_SIZE": "1"}]


@pytest.mark.parametrize("variables", ALONE, ids=str)
def test_a_process_alone_trains_alone(model, work, capsys, monkeypatch, variables):
    """Whatever a cluster's manager has set."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    fresh_main = runpy.run_path(str(HERE / "flow_grpo.py"))["main"]
    assert fresh_main(arguments(model, **WINDOW | {"epochs": 1})) == 0
    assert metrics()[-1]["epoch"] == 1
    assert "epoch 1: reward " in capsys.readouterr().out


def test_a_process_that_can_not_find_the_others_says_so(work, model, capsys, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setattr(flow_grpo, "PROCESSES", 2)
    monkeypatch.setattr(signal, "signal", Mock())
    error = error_of(arguments(model), capsys)
    assert re.search("join the other processes: .*unset WORLD_SIZE", error)


# ---- Signals.
def test_killed_equals_uninterrupted(whole, model, work, capsys):
    """`watched_run` has evaluations as short as those of `whole`."""
    with forked(watched_run, "killed", arguments(model, "cut", **WINDOW)) as process:
        wait_for(process, '"kl"', Path("cut/metrics.jsonl"))
        os.kill(process.pid, signal.SIGSTOP)
        assert "a run is in it" in error_of(["--resume=cut"], capsys)
    assert process.exitcode == -signal.SIGKILL
    assert main(["--resume=cut"]) == 0
    assert same_run("cut", whole)
    assert not list(Path("cut").glob(".*lock*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_one_sentence(model, work, number):
    with forked(script, arguments(model, "cut", **WINDOW | {"epochs": 1000})) as process:
        wait_for(process, '"kl"', Path("cut/metrics.jsonl"))
        os.kill(process.pid, number)
        process.join(timeout=300)
    assert process.exitcode == 130
    assert Path("stderr").read_text() == f"error: interrupted by a signal{to_go_on('cut')}\n"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_says_that_it_waits_for_others_and_a_signal_ends_it(work, number):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with forked(script, [], {"WORLD_SIZE": "2", "RANK": "0", **address}) as process:
        wait_for(process, "waits for the others", Path("stderr"))
        os.kill(process.pid, number)
        process.join(timeout=10)
        # The sentence is printed before a signal ends the process at once.
        assert process.exitcode in (-number, 130)


# ---- Where a run's output goes.
def test_a_run_goes_on_without_a_stdout(model, work, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it after `>&-`
    assert main(arguments(model, **WINDOW | {"epochs": 1})) == 0


def test_a_run_goes_on_with_a_stdout_in_ascii(model, work, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(arguments(model, "für_später", **WINDOW | {"epochs": 1})) == 0
    assert b"epoch 1: reward " in stdout.buffer.getvalue()
