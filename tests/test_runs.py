"""A run: what it leaves, its folder, its interruption, its continuation, and what fails in it."""

import json
import math
import os
import re
import shutil
import weakref
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from filelock import FileLock
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InvalidCxxCompiler

import flow_grpo
from flow_grpo import Config, load_pipeline, load_reward, main, score_images, split_prompts
from tests.small import (
    HERE,
    SMALL,
    WINDOW,
    arguments,
    error_of,
    left_by,
    metrics,
    only_error,
    same_run,
    small_run,
    to_go_on,
    working_in,
)

# ---- What a run leaves.
FILES = """checkpoint.pt config.json curve.png eval_prompts.jsonl metrics.jsonl
    pytorch_lora_weights.safetensors samples/epoch_00000.png samples/epoch_00002.png
    samples/epoch_00003.png""".split()
FOR_THE_FILE = "ratio_mean clipfrac approx_kl policy_loss grad_norm ratio_deviation trained".split()


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """The folder of a run by `two` of rewards.py. The file `printed` beside it has what it said."""
    folder = model.with_name("finished")
    given = {"reward": "rewards.py:two", "seed": 3}
    args = arguments(model.with_name("without-T5"), folder, **given)
    printed = open(model.with_name("printed"), "w")  # noqa: SIM115
    with working_in(tmp_path_factory.mktemp("work")), printed, redirect_stdout(printed):
        assert main(args) == 0
    return folder


def test_a_run_leaves_these_files_and_no_lock(finished):
    files = [path for path in finished.rglob("*") if path.is_file()]
    assert {str(path.relative_to(finished)) for path in files} == set(FILES)


def test_a_run_measures_each_epoch_and_evaluates_before_on_the_way_and_after(finished):
    kinds = [(m["epoch"], "reward" in m, "eval_reward" in m) for m in metrics(finished)]
    evaluations = [(0, False, True), (2, False, True), (3, False, True)]
    epochs = [(1, True, False), (2, True, False), (3, True, False)]
    assert sorted(kinds) == sorted(evaluations + epochs)
    assert [epoch for epoch, _, _ in kinds] == [0, 1, 2, 2, 3, 3]


def test_an_epochs_metrics_have_the_rewards_columns_and_the_updates_statistics(finished):
    epochs = [line for line in metrics(finished) if "reward" in line]
    for line in epochs:
        assert line["first"] == line["reward"]
        assert line["second"] == 0.25
        for name in ("kl", "grad_norm", "seconds_rollout", "seconds_update"):
            assert line[name] > 0
        assert line["ratio_deviation"] < 1e-5
        assert line["trained"] == 1
        assert set(FOR_THE_FILE) < set(line)


def test_a_run_prints_what_matters_most(finished):
    """The column `first` is the reward, so it isn't printed again."""
    printed = finished.with_name("printed").read_text()
    for line in metrics(finished):
        names = "reward second kl seconds_rollout seconds_update".split()
        if "eval_reward" in line:
            names = ["eval_reward", "eval_second"]
        values = ".*".join(f" {name} {line[name]:.3g}" for name in names)
        (shown,) = re.findall(f"^epoch {line['epoch']}:{values}$", printed, re.MULTILINE)
        assert not any(name in shown for name in FOR_THE_FILE)


def test_an_epochs_printed_line_has_three_columns_of_the_reward_and_the_times(model, work, capsys):
    run = small_run(model, epochs=500)
    run.epoch = 500
    scores = {"reward": 0.123456} | {f"a_part_of_it_{i}": i / 7 for i in range(20)}
    flow_grpo.log(run, scores, kl=1e-5, seconds_rollout=123.456, seconds_update=6543.21)
    columns = "reward 0.123  a_part_of_it_0 0  a_part_of_it_1 0.143"
    rest = "kl 1e-05  seconds_rollout 123  seconds_update 6.54e+03"
    assert capsys.readouterr().out == f"epoch 500: {columns}  {rest}\n"


def test_rollout_and_update_are_timed_apart(model, work, monkeypatch):
    clock = iter([0.0, 5.0, 7.0])
    monkeypatch.setattr(flow_grpo, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    run = small_run(model, epochs=1)
    flow_grpo.train(run)
    (line,) = [line for line in run.metrics if "seconds_update" in line]
    assert (line["seconds_rollout"], line["seconds_update"]) == (5, 2)


def test_an_epochs_samples_do_not_last_through_the_next_rollout(model, work, monkeypatch):
    original = flow_grpo.sample
    earlier = []

    def sample(run):
        assert not any(samples() for samples in earlier)
        samples = original(run)
        earlier.append(weakref.ref(samples))
        return samples

    monkeypatch.setattr(flow_grpo, "sample", sample)
    flow_grpo.train(small_run(model))
    assert len(earlier) == 3


def test_the_norm_of_a_skipped_step_is_logged_as_0(model, work):
    """JSON has neither infinity nor NaN."""
    run = small_run(model)
    run.scaler = torch.amp.GradScaler("cpu", 1024.0)
    samples = flow_grpo.sample(run)
    assert flow_grpo.optimize(run, samples)["grad_norm"] > 0
    run.parameters[0].register_hook(lambda gradient: gradient * math.inf)
    assert flow_grpo.optimize(run, samples)["grad_norm"] == 0
    assert run.scaler.get_scale() == 1024 / 2**run.config.updates_per_epoch


def test_a_rewards_only_column_may_be_named_reward(model, work):
    shutil.copy("rewards.py", "reward.py")
    assert main(arguments(model, reward="reward.py:red", epochs=1)) == 0


def test_the_config_file_has_all_settings(finished):
    saved = json.loads((finished / "config.json").read_text())
    model = str(finished.with_name("without-T5"))
    given = {"reward": "rewards.py:two", "seed": 3, "model": model, "prompt_file": "prompts.txt"}
    assert saved == vars(Config(output_dir=str(finished), **SMALL | given))


def test_the_prompts_of_evaluations_are_saved(finished, work):
    lines = (finished / "eval_prompts.jsonl").read_text().splitlines()
    _, eval_records = split_prompts(Config("prompts.txt"), load_reward("rewards.py:red"))
    assert [json.loads(line) for line in lines] == eval_records


def test_between_evaluations_there_are_pictures_each_20_epochs(model, work, monkeypatch):
    run = small_run(model, epochs=65, eval_every=30)
    run.eval_records *= 10
    samples = SimpleNamespace(records=run.eval_records, columns={})
    scores = {"eval_reward": 1.0, "eval_red": 1.0}
    evaluate = Mock(return_value=(scores, torch.rand(1, 3, 16, 16)))
    monkeypatch.setattr(flow_grpo, "evaluate", evaluate)
    monkeypatch.setattr(flow_grpo, "sample", lambda run: samples)
    monkeypatch.setattr(flow_grpo, "optimize", lambda run, samples: {"kl": 0.0})
    monkeypatch.setattr(flow_grpo, "save", lambda run: None)
    flow_grpo.train(run)
    drawn = sorted(int(path.stem[-5:]) for path in Path("out/samples").iterdir())
    assert drawn == [0, 20, 30, 40, 60, 65]
    assert [len(call.args[1]) for call in evaluate.call_args_list] == [40, 16, 40, 16, 40, 40]
    evaluations = [line["epoch"] for line in run.metrics if "eval_reward" in line]
    assert evaluations == [0, 30, 60, 65]


def test_the_curve_shows_the_reward_of_epochs_and_of_evaluations(model, work):
    run = small_run(model)
    pictures = set()
    for reward, eval_reward in [(0.1, 0.1), (0.3, 0.1), (0.1, 0.3)]:
        run.metrics = [{"epoch": 0, "eval_reward": 0.1}, {"epoch": 0, "reward": 0.1}]
        run.metrics += [{"epoch": 1, "reward": reward}, {"epoch": 1, "eval_reward": eval_reward}]
        flow_grpo.write_pictures(run, torch.rand(1, 3, 16, 16))
        pictures.add(Path("out/curve.png").read_bytes())
    assert len(pictures) == 3


# ---- A run has its folder alone.
@pytest.mark.parametrize("instant", ["load_pipeline", "train"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_in_a_folder_is_refused(model, work, capsys, monkeypatch, instant, resume):
    """At the instant, the first run calls the function below."""
    second = []
    monkeypatch.setattr(flow_grpo, "train", lambda run: None)
    first_goes_on = getattr(flow_grpo, instant)

    def start_a_second_run(*args):
        with monkeypatch.context() as patch:
            patch.setattr(flow_grpo, "load_pipeline", Mock(side_effect=AssertionError))
            second.append(error_of(["--resume=out"] if resume else arguments(model), capsys))
        return first_goes_on(*args)

    monkeypatch.setattr(flow_grpo, instant, start_a_second_run)
    assert main(arguments(model)) == 0
    assert re.search(" out: .*a run is in it", second[0])


def test_a_folder_is_free_again_after_a_run(work, monkeypatch):
    locks = []

    def kept_lock(*args, **kwargs):
        locks.append(FileLock(*args, **kwargs))
        return locks[-1]

    monkeypatch.setattr(flow_grpo, "FileLock", kept_lock)
    with flow_grpo.own_folder("out"):
        assert locks[0].is_locked
    assert not locks[0].is_locked


def test_a_file_is_on_the_disk_before_it_takes_the_name_of_the_old_one(work, monkeypatch):
    sizes = []

    def fsync(descriptor):
        assert not Path("a.txt").exists()
        sizes.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    flow_grpo.write_file(Path("a.txt"), lambda path: path.write_text("text"))
    assert sizes == [4]
    assert Path("a.txt").read_text() == "text"


# ---- Interrupted equals uninterrupted, bit for bit.
# The first is in the third epoch, the others are in the second and in the evaluation after it.
INSTANTS = [
    ("rollout", 12),
    ("score_images", 8),
    ("optimizer_step", 4),
    ("evaluate", 2),
    ("epoch_00002.png", 1),
    ("checkpoint.pt", 4),
    ("pytorch_lora_weights.safetensors", 4),
]


def half_written(path):
    path.write_bytes(b"half a file")
    raise KeyboardInterrupt


@pytest.mark.parametrize("name, call", INSTANTS)
def test_interrupted_equals_uninterrupted(whole, model, work, monkeypatch, capsys, name, call):
    """The call of a function, or the writing of a file, is the one that Ctrl-C interrupts."""
    calls = Counter()
    replaced = "write_file" if "." in name else name
    original = getattr(flow_grpo, replaced)

    def write_file(path, write):
        calls[path.name] += 1
        interrupted = path.name == name and calls[name] == call
        original(path, half_written if interrupted else write)

    def function(*args, **kwargs):
        calls[name] += 1
        if calls[name] == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(flow_grpo, replaced, write_file if "." in name else function)
    assert main(arguments(model, "cut", **WINDOW)) == 130
    assert capsys.readouterr().err.endswith(f"error: interrupted by a signal{to_go_on('cut')}\n")
    assert [line["epoch"] for line in metrics("cut")][-1] in (1, 2)
    monkeypatch.setattr(flow_grpo, replaced, original)
    assert main(["--resume=cut"]) == 0
    assert same_run("cut", whole)


# ---- Resumed runs.
def snapshot(folder):
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files if path.suffix != ".pyc"}


@pytest.fixture
def resumable(whole, work):
    """A copy of a finished run, in ./out."""
    shutil.copytree(whole, "out")


def test_a_run_can_be_prolonged(whole, model, work, capsys):
    assert main(arguments(model, "out", **WINDOW | {"epochs": 2})) == 0
    capsys.readouterr()
    assert main(["--resume=out", "--epochs=3"]) == 0
    first_line = capsys.readouterr().out.splitlines()[0]
    assert re.match(f"Training {model} .*, after 2 epochs", first_line)
    assert same_run("out", whole)


def test_a_run_can_not_be_shortened(resumable, capsys):
    before = snapshot("out")
    assert "--epochs can't be 1" in error_of(["--resume=out", "--epochs=1"], capsys)
    assert snapshot("out") == before


def test_a_run_that_was_moved_goes_on_where_it_is(resumable, whole):
    before = snapshot(whole)
    assert main(["--resume=out", "--epochs=4"]) == 0
    assert metrics("out")[-1]["epoch"] == 4
    assert snapshot(whole) == before


def test_a_run_goes_on_with_a_model_and_a_reward_that_were_moved(resumable, model, capsys):
    shutil.copytree(model, "moved")
    Path("elsewhere").mkdir()
    Path("rewards.py").rename("elsewhere/moved.py")
    error = error_of(["--resume=out", "--epochs=4"], capsys)
    assert re.search("the reward 'rewards.py:red' can't be loaded", error)
    moved = ["--model=moved", "--reward=elsewhere/moved.py:red"]
    assert main(["--resume=out", "--epochs=4", *moved]) == 0
    assert "Training moved on the cpu by elsewhere/moved.py:red" in capsys.readouterr().out
    assert metrics("out")[-1]["epoch"] == 4
    assert main(["--resume=out"]) == 0


def test_a_run_goes_on_without_its_prompt_file(resumable):
    before = left_by(Path("out"))["train_records"]
    Path("prompts.txt").unlink()
    assert main(["--resume=out", "--epochs=4"]) == 0
    assert left_by(Path("out"))["train_records"] == before


def test_a_finished_run_has_nothing_to_do(resumable, whole):
    assert main(["--resume=out"]) == 0
    assert same_run("out", whole)


def resumed_in_half(monkeypatch):
    """The run in ./out, with its network in float16, as on a GPU."""

    def load_in_half(model):
        pipe = load_pipeline(model)
        pipe.to(torch.float16)
        pipe.vae.to(torch.float32)
        return pipe

    runs = []
    monkeypatch.setattr(flow_grpo, "load_pipeline", load_in_half)
    monkeypatch.setattr(flow_grpo, "train", runs.append)
    assert main(["--resume=out"]) == 0
    return runs[0]


def test_a_resumed_run_has_its_loss_scale(model, work, monkeypatch):
    run = small_run(model, half=True)
    run.scaler.scale(torch.ones(()))
    run.scaler.update(2.0**10)
    flow_grpo.save(run)
    assert resumed_in_half(monkeypatch).scaler.get_scale() == 2**10


def test_a_run_in_single_precision_goes_on_in_half(model, work, monkeypatch):
    run = small_run(model)
    flow_grpo.save(run)
    resumed = resumed_in_half(monkeypatch)
    assert resumed.scaler.is_enabled()
    assert all(map(torch.equal, resumed.parameters, run.parameters))


UNCHANGEABLE = [
    ("--learning-rate=3", "--learning-rate was 0.01 in out"),
    ("--output-dir=other", "--output-dir was out in out: omit it"),
    (f"--model={HERE / 'tiny-sd3'}", "doesn't fit .*tiny-sd3.*--model"),
]


@pytest.mark.parametrize("flag, sentence", UNCHANGEABLE)
def test_resume_can_not_change_a_run(resumable, capsys, flag, sentence):
    before = snapshot(".")
    assert re.search(sentence, error_of(["--resume=out", flag], capsys))
    assert snapshot(".") == before


def cut_short(data):
    return data[: len(data) // 2]


def emptied(data):
    return b""


@pytest.mark.parametrize("damage", [cut_short, emptied])
def test_a_damaged_checkpoint_is_said_and_left_as_it_is(resumable, capsys, damage):
    checkpoint = Path("out/checkpoint.pt")
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    before = snapshot("out")
    error = error_of(["--resume=out", "--epochs=5"], capsys)
    assert re.match("error: out/checkpoint.pt can't be resumed: .*put back a copy", error)
    assert snapshot("out") == before


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_no_code_in_a_checkpoint_is_run(work, capsys):
    Path("out").mkdir()
    torch.save(Harmful(), "out/checkpoint.pt")
    assert "out/checkpoint.pt can't be resumed: " in error_of(["--resume=out"], capsys)
    assert not Path("harm").exists()


def test_a_folder_without_a_run_can_not_be_resumed(work, capsys):
    error = error_of(["--resume=nowhere"], capsys)
    assert re.search("nowhere/checkpoint.pt can't be resumed: .*No such file", error)
    assert not Path("nowhere").exists()


def test_a_new_run_does_not_overwrite_another(resumable, model, capsys):
    before = snapshot("out")
    error = error_of(arguments(model), capsys)
    assert re.search("out holds a run: .*--resume.*--output-dir", error)
    assert snapshot("out") == before


# ---- What fails in the middle of a run.
def test_a_reward_that_fails_on_the_way_keeps_the_run(model, work, capsys):
    error = error_of(arguments(model, reward="rewards.py:nan"), capsys)
    assert re.search("""the reward rewards failed .*'a "5"'.*not finite""", error)
    assert error.endswith(to_go_on("out"))
    assert main(["--resume=out", "--reward=rewards.py:nan"]) == 2


def test_a_reward_has_the_same_columns_in_each_batch(model, work, capsys):
    error = error_of(arguments(model, reward="rewards.py:uneven"), capsys)
    assert re.search("the reward has other columns", error)
    assert error.endswith(to_go_on("out"))


def test_a_run_that_diverged_is_not_to_go_on(model, work, capsys):
    error = error_of(arguments(model, learning_rate=1e9), capsys)
    assert re.search("not finite: .*--learning-rate was too high$", error)


def test_an_image_that_is_not_finite_is_a_sign_of_divergence():
    with pytest.raises(flow_grpo.Diverged, match="an image is not finite"):
        score_images(None, torch.full((1, 3, 16, 16), math.nan), [{"prompt": "a"}])


@pytest.mark.parametrize("error", [OSError("No space left"), RuntimeError("write failed")])
def test_a_full_disk_is_said_and_loses_nothing(resumable, capsys, monkeypatch, error):
    before = snapshot("out")
    monkeypatch.setattr(torch, "save", Mock(side_effect=error))
    sentence = error_of(["--resume=out"], capsys)
    assert re.search(f"can't write out/checkpoint.pt: .*{error}; check the disk", sentence)
    assert snapshot("out") == before


@pytest.mark.parametrize("folder", ["a_file", "a_file/out"])
def test_a_folder_that_can_not_be_written_is_said(model, work, capsys, folder):
    Path("a_file").write_text("text")
    error = error_of(arguments(model, folder), capsys)
    assert re.search(f"{folder}.*; .* --output-dir", error)
    assert Path("a_file").read_text() == "text"


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("Tried to allocate 2 GiB."),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    RuntimeError("GET was unable to find an engine to execute this computation"),  # cuDNN's
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2 bytes."),
    RuntimeError("CUDA error: out of memory"),
    MemoryError(),
]


@pytest.fixture
def fails(work, monkeypatch, capsys):
    """How a run ends that an error of its training ends: the exit code and stderr."""

    def fails(error):
        monkeypatch.setattr(flow_grpo, "start", Mock())
        monkeypatch.setattr(flow_grpo, "train", Mock(side_effect=error))
        code = main(["--output-dir=out"])
        return code, capsys.readouterr().err

    return fails


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
def test_out_of_memory_is_said_with_what_helps(fails, error):
    code, stderr = fails(error)
    assert code == 2
    assert re.search("out of memory: .*--gradient-checkpointing.*--batch-size", stderr)
    assert stderr == f"{only_error(stderr)}\n"
    assert only_error(stderr).endswith(to_go_on("out"))


COMPILE_ERRORS = [InvalidCxxCompiler(), TorchDynamoException("odd")]


@pytest.mark.parametrize("error", COMPILE_ERRORS, ids=lambda error: type(error).__name__)
def test_a_failure_to_compile_ends_with_what_helps(fails, error):
    code, stderr = fails(error)
    assert code > 0
    sentence = only_error(stderr)
    assert stderr.endswith(f"{sentence}\n")
    assert re.search(f"{type(error).__name__}: .*--no-compile", sentence)
    assert sentence.endswith(to_go_on("out"))


def test_after_an_error_a_run_goes_on_with_what_helps(resumable, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(flow_grpo, "optimize", Mock(side_effect=MemoryError()))
        error_of(["--resume=out", "--epochs=4"], capsys)
    assert main(["--resume=out", "--gradient-checkpointing", "--batch-size=2"]) == 0
    assert metrics("out")[-1]["epoch"] == 4


def test_a_resumed_run_may_be_compiled_or_not(resumable, monkeypatch):
    runs = []
    monkeypatch.setattr(flow_grpo, "train", runs.append)
    assert main(["--resume=out", "--compile"]) == 0
    assert main(["--resume=out", "--no-compile"]) == 0
    assert [run.config.compile for run in runs] == [True, False]


def test_a_defect_shows_its_traceback_and_how_to_go_on(resumable, capsys, monkeypatch):
    monkeypatch.setattr(flow_grpo, "sample", Mock(side_effect=RuntimeError("shapes differ")))
    assert main(["--resume=out", "--epochs=4"]) == 1
    stderr = capsys.readouterr().err
    assert "Traceback" in stderr
    assert re.match("error: RuntimeError: shapes differ; ", stderr.splitlines()[-1])
    assert stderr.endswith(f"{to_go_on('out')}\n")
