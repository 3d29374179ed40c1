"""Tests of claims.py, baselines.py and judge.py. They need no network and no GPU."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, variance
from types import SimpleNamespace

import claims
import judge
import pytest
import torch
from baselines import dpo_loss, rwr_loss, sft_loss
from claims import flow_grpo

RESULTS = Path(__file__).resolve().parent / "results"
RECORDS = claims.read_records(RESULTS / "claims.jsonl")
QUICK = {"epochs": 2, "prompts_per_epoch": 2, "group_size": 4, "batch_size": 8, "eval_every": 1}


@pytest.fixture(scope="module", autouse=True)
def hidden_gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow_grpo, "DEVICE", "cpu")
        yield


# ---- The losses of the baselines, on five groups of four images.
def some(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(5, 4, generator=generator, dtype=torch.float64)


ERROR = some(0)
REF_ERROR = some(1)
ADVANTAGES = some(2)
BEST = ADVANTAGES.argmax(1).tolist()
WORST = ADVANTAGES.argmin(1).tolist()


def test_sft_is_the_mean_error_of_the_groups_best():
    expected = sum(ERROR[p, BEST[p]].item() for p in range(5)) / 5
    assert sft_loss(ERROR, None, ADVANTAGES).item() == pytest.approx(expected)


def test_sft_learns_from_all_that_tie_for_the_best():
    ties = torch.zeros(5, 4)
    ties[0] = torch.tensor([1.0, -3.0, 1.0, 1.0])
    ties[2:] = torch.tensor([5.0, 1.0, 1.0, 1.0])
    e = ERROR.tolist()
    chosen = [e[0][0], e[0][2], e[0][3], *e[1], e[2][0], e[3][0], e[4][0]]
    assert sft_loss(ERROR, None, ties).item() == pytest.approx(sum(chosen) / 10)


def test_rwr_weighs_by_the_exponential_of_the_advantage():
    total = 0.0
    for errors, advantages in zip(ERROR.tolist(), ADVANTAGES.tolist()):
        weights = [math.exp(a) for a in advantages]
        weighted = [w * error for w, error in zip(weights, errors)]
        total += sum(weighted) / sum(weights)
    assert rwr_loss(ERROR, None, ADVANTAGES).item() == pytest.approx(total / 5)


def dpo_margins(beta):
    """How much more the best has gained on the base model than the worst, by group."""
    gain = (REF_ERROR - ERROR).tolist()
    return [beta / 2 * (gain[p][BEST[p]] - gain[p][WORST[p]]) for p in range(5)]


def test_dpo_is_the_logistic_loss_of_the_margin():
    loss = dpo_loss(ERROR, REF_ERROR, ADVANTAGES, beta=3.0)
    expected = [math.log(1 + math.exp(-margin)) for margin in dpo_margins(3.0)]
    assert loss.item() == pytest.approx(sum(expected) / 5)


def test_dpo_pulls_to_the_best_and_away_from_the_worst():
    error = ERROR.clone().requires_grad_()
    dpo_loss(error, REF_ERROR, ADVANTAGES, beta=3.0).backward()
    expected = torch.zeros(5, 4, dtype=torch.float64)
    for p, margin in enumerate(dpo_margins(3.0)):
        slope = 3.0 / 2 / (1 + math.exp(margin)) / 5
        expected[p, BEST[p]] = slope
        expected[p, WORST[p]] = -slope
    assert torch.allclose(error.grad, expected)


# ---- The baselines' optimiser steps, on two groups of four images.
@pytest.fixture(scope="module")
def run():
    model = str(flow_grpo.HERE / "tiny-sd3")
    config = replace(flow_grpo.TINY, model=model, updates_per_epoch=1, **QUICK)
    records = [{"prompt": f'a sign that says "{n}"'} for n in (123, 456)]
    pipe = flow_grpo.load_pipeline(model)
    reward = flow_grpo.load_reward("ocr")
    run = flow_grpo.prepare(config, pipe, reward, records, records)
    for p in run.parameters:
        p.data.normal_(std=0.02)
    return run


@pytest.fixture(scope="module")
def samples(run):
    return flow_grpo.sample(run)


@pytest.fixture
def gradients(monkeypatch):
    """The gradients with which optimizer_step is called, which takes no step."""
    found = []

    def step(run):
        found.append(torch.cat([p.grad.flatten() for p in run.parameters]))
        run.optimizer.zero_grad()
        return 1.0

    monkeypatch.setattr(flow_grpo, "optimizer_step", step)
    return found


def scored(samples, rewards):
    return replace(samples, columns={"reward": torch.tensor(rewards)})


def random_numbers(run):
    """What a baseline draws: the order of the groups, then times, and noise at each time."""
    seed = flow_grpo.Random(f"{run.config.seed} {run.epoch}").getrandbits(63)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(2, generator=generator).tolist()
    shares = (torch.arange(7) + torch.rand(7, generator=generator)) / 7
    normal = torch.distributions.Normal(0, 1)
    times = []
    for share in shares:
        s = 1 / (1 + math.exp(-normal.icdf(share).item()))
        times.append(3 * s / (1 + 2 * s))
    noise = torch.randn(7, 2, *run.latent_shape, generator=generator)
    return order, times, noise


def flow_error(run, samples, group, t, noise):
    """The flow-matching error of a group's images, by the network alone."""
    x0 = samples.latents[4 * group : 4 * group + 4, -1]
    embeds, pooled = samples.texts[samples.records[4 * group]["prompt"]]
    text = embeds.expand(4, -1, -1), pooled.expand(4, -1)
    x = (1 - t) * x0 + t * noise
    velocity = run.pipe.transformer(x, *text, torch.full((4,), 1000 * t))[0]
    return ((velocity - (noise - x0)) ** 2).mean((1, 2, 3))


def sft(error, ref_error, rewards, std):
    return error[rewards.argmax()]


def rwr(error, ref_error, rewards, std):
    weights = ((rewards - rewards.mean()) / std).softmax(0)
    return (weights * error).sum()


def dpo(error, ref_error, rewards, std):
    gain = ref_error - error
    margin = 50 * (gain[rewards.argmax()] - gain[rewards.argmin()])
    return (-margin).exp().log1p()


@pytest.mark.parametrize("name, loss_of", [("SFT", sft), ("RWR", rwr), ("Flow-DPO", dpo)])
def test_a_baselines_gradient_is_that_of_its_loss_image_by_image(
    run, samples, gradients, name, loss_of
):
    rewards = torch.tensor([[0.1, 0.9, 0.4, 0.2], [0.5, 0.3, 0.2, 0.8]])
    claims.UPDATES[name](run, scored(samples, rewards.flatten().tolist()))
    order, times, noise = random_numbers(run)
    network = run.pipe.transformer
    std = rewards.std(correction=0) + 1e-4
    total = 0.0
    for t, noise_of_groups in zip(times, noise):
        for group, noise_of_group in zip(order, noise_of_groups):
            known = (run, samples, group, t, noise_of_group)
            network.disable_adapters()
            with torch.no_grad():
                ref_error = flow_error(*known)
            network.enable_adapters()
            error = flow_error(*known)
            total += loss_of(error, ref_error, rewards[group], std) / 14
    expected = torch.autograd.grad(total, list(run.parameters))
    expected = torch.cat([g.flatten() for g in expected])
    assert (gradients[0] - expected).norm() < 1e-3 * expected.norm()


def test_dpo_learns_nothing_from_groups_that_score_alike(run, samples, gradients):
    assert claims.UPDATES["Flow-DPO"](run, scored(samples, [1.0] * 8)) == {}
    assert gradients == []


@pytest.mark.parametrize("name", ["SFT", "RWR"])
def test_the_others_learn_from_them(run, samples, gradients, name):
    claims.UPDATES[name](run, scored(samples, [1.0] * 8))
    assert len(gradients) == 1


@pytest.mark.parametrize("name", ["SFT", "RWR", "Flow-DPO"])
def test_a_baseline_takes_as_many_optimiser_steps(run, samples, gradients, monkeypatch, name):
    monkeypatch.setattr(run.config, "updates_per_epoch", 2)
    claims.UPDATES[name](run, scored(samples, [0.1, 0.9, 0.4, 0.2] * 2))
    assert len(gradients) == 2


# ---- The variants of examples/variants.py.
def test_each_run_trains_with_its_variants_functions(monkeypatch, tmp_path):
    trained = []
    names = ("optimize", "sde_step", "gaussian_kl", "grpo_loss")
    for name in names:
        monkeypatch.setattr(flow_grpo, name, getattr(flow_grpo, name))  # and back at the end

    def train(run):
        trained.append([getattr(flow_grpo, name) for name in names])

    monkeypatch.setattr(claims, "start", lambda *_: SimpleNamespace(metrics=[]))
    monkeypatch.setattr(claims, "judge", lambda *_, **how: {})
    monkeypatch.setattr(flow_grpo, "train", train)
    path = tmp_path / "claims.jsonl"
    for variant in claims.CLAIMS["variants"].values():
        claims.measure(claims.DEFAULTS | variant | {"seed": 5}, path)
    claims.measure(claims.DEFAULTS | {"seed": 5}, path)
    changed = []
    for functions in trained:
        pairs = zip(names, functions, trained[-1])
        changed.append([name for name, function, own in pairs if function is not own])
    loss = ["sde_step", "grpo_loss"]
    kl = ["sde_step", "gaussian_kl"]
    assert changed == [[], ["sde_step"], loss, loss, loss, [], kl, []]
    records = [r for r in claims.read_records(path) if "seed" in r]
    settings = [record["settings"]["variant"] for record in records]
    expected = ["paper", "cps", "guard", "dppo", "tempflow", "paper", "velocity-kl", "paper"]
    assert settings == expected
    assert records[4]["claims"] == {"variants": "TempFlow-GRPO's weights"}


# ---- What is measured of a run.
def test_minutes_are_of_rollouts_and_updates():
    evaluation = {"eval_reward": 0.1, "eval_ocr_accuracy": 0.2}
    epoch = {"epoch": 1, "seconds_rollout": 60, "seconds_update": 120}
    lines = [{"epoch": 0, **evaluation}, epoch, {"epoch": 1, **evaluation}]
    assert [point["minutes"] for point in claims.evaluations(lines)] == [0, 3]


def test_each_judged_image_has_noise_of_its_own(tmp_path, monkeypatch):
    seeds = []

    class Pipe:
        def set_progress_bar_config(self, disable):
            pass

        def __call__(self, prompts, generator, **how):
            seeds.extend(g.initial_seed() for g in generator)
            return SimpleNamespace(images=torch.zeros(len(prompts), 3, 4, 4))

    monkeypatch.setattr(judge.StableDiffusion3Pipeline, "from_pretrained", lambda _: Pipe())
    (tmp_path / "config.json").write_text(json.dumps(vars(flow_grpo.TINY)))
    judge.draw_images(tmp_path, base=True, prompts=["a"] * 130, first_seed=7)
    assert seeds == list(range(7, 137))


# ---- The tables.
def accuracies(*points):
    names = ("minutes", "accuracy")
    return {"evaluations": [dict(zip(names, point)) for point in points]}


def test_the_goal_is_crossed_between_two_evaluations():
    assert claims.minutes_to_goal(accuracies((0, 0.6), (2, 0.8), (4, 0.9))) == pytest.approx(3)


def test_the_goal_is_reached_from_the_start():
    assert claims.minutes_to_goal(accuracies((0, 0.9), (2, 0.86))) == 0


def test_the_goal_is_never_reached():
    assert claims.minutes_to_goal(accuracies((0, 0.5), (1, 0.8))) == math.inf


@pytest.mark.parametrize(
    "values, text",
    [
        ([0.5, 0.25], "0.375 (0.25 to 0.5)"),
        ([0.5], "0.5"),
        ([1.0, 3.0, math.inf], "2 (1 to 3, 2 of 3)"),
        ([math.inf], "never"),
    ],
)
def test_a_cell_has_mean_least_and_most(values, text):
    assert claims.cell(values) == text


def test_the_tables_in_results_are_those_of_the_records():
    assert claims.tables(RECORDS) == (RESULTS / "claims.md").read_text(encoding="utf-8")


def test_the_default_run_has_the_settings_of_the_recorded_ones():
    for record in claims.runs_of("gain", RECORDS)["Flow-GRPO"]:
        assert record["settings"] == claims.DEFAULTS | {"seed": record["seed"]}


def test_the_baselines_have_the_learning_rates_that_are_best_in_rates():
    runs = claims.runs_of("rates", RECORDS)
    for method in claims.UPDATES:
        judged = {}
        for name, (record,) in runs.items():
            if name.startswith(f"{method}, "):
                judged[record["settings"]["learning_rate"]] = record["judgement"]
        highest = max(judgement["exact"] for judgement in judged.values())
        as_good = {}
        for rate, judgement in judged.items():
            if judgement["exact"] > highest - claims.CHANCE:
                as_good[rate] = judgement["frechet"]
        settings = claims.DEFAULTS | claims.CLAIMS["baselines"][method]
        assert settings["learning_rate"] == min(as_good, key=as_good.get)


def test_of_two_records_with_the_same_seed_the_last_counts():
    records = [{"claims": {"gain": "Flow-GRPO"}, "seed": 0, "commit": commit} for commit in "ab"]
    assert claims.runs_of("gain", records) == {"Flow-GRPO": records[1:]}


def test_claims_share_the_runs_with_equal_settings():
    settings = claims.DEFAULTS | claims.SHORT | {"seed": 5}
    assert claims.names_of(settings) == {
        "group": "groups of 16",
        "baselines": "Flow-GRPO",
        "variants": "Flow-GRPO, beta 0.4",
    }


def test_rates_are_chosen_on_numbers_that_are_not_in_the_prompt_file(tmp_path):
    settings = claims.DEFAULTS | claims.CLAIMS["rates"]["SFT, 0.01"] | {"seed": 100}
    run = claims.start(settings, tmp_path)
    trained = {record["prompt"] for record in run.train_records}
    evaluated = {record["prompt"] for record in run.eval_records}
    assert len(run.eval_records) == 128
    assert len(trained) == 500
    assert len(evaluated) == 64
    assert not trained & evaluated


# ---- The documents' numbers.
HERE = RESULTS.parents[1]


def words_of(document):
    return " ".join((HERE / document).read_text(encoding="utf-8").split())


BASE = {  # as a record of a run
    "evaluations": claims.runs_of("gain", RECORDS)["Flow-GRPO"][0]["evaluations"][:1],
    "judgement": claims.judgements("gain", RECORDS)["base model"],
}
DIGITS = {"spread": 2, "minutes": 1, "minutes to accuracy 0.85": 1}
TOLD = {  # what the documents say of each claim, with [variant: column] for the mean over seeds
    ("README.md", "gain"): (
        "The exact share of 512 signs rises from [base model: exact share] to [Flow-GRPO: exact "
        "share]. By the paper's measure (`eval_reward`), it rises from [base model: reward] to "
        "[Flow-GRPO: reward], in the paper from .59 to .92."
    ),
    ("README.md", "steps"): (
        "An accuracy of .85 takes [10 steps: minutes to accuracy 0.85] minutes with 10 steps, and "
        "[40 steps: minutes to accuracy 0.85] with 40."
    ),
    ("README.md", "kl"): (
        "The reward is [beta 0: reward] without the penalty and [beta 0.4: reward] with it, but "
        "the Fréchet distance to real signs is [beta 0: Fréchet distance] and [beta 0.4: Fréchet "
        "distance] (base model: [base model: Fréchet distance])."
    ),
    ("README.md", "noise"): (
        "The exact share is [noise 0.1: exact share] at a noise level of 0.1, [noise 0.7: exact "
        "share] at 0.7, and [noise 1.0: exact share] at 1.0."
    ),
    ("README.md", "group"): (
        "The exact share is [groups of 4: exact share] with groups of 4 and [groups of 16: exact "
        "share] with groups of 16, and without the penalty [groups of 4, beta 0: exact share] and "
        "[groups of 16, beta 0: exact share]."
    ),
    ("README.md", "baselines"): (
        "The exact share is [Flow-GRPO: exact share] by Flow-GRPO with the penalty, [SFT: exact "
        "share] by SFT, [RWR: exact share] by RWR, and [Flow-DPO: exact share] by Flow-DPO."
    ),
    ("bench/README.md", "gain"): (
        "The exact share rises from [base model: exact share] to [Flow-GRPO: exact share], and "
        "the reward from [base model: reward] to [Flow-GRPO: reward]. The spread falls from [base "
        "model: spread] to [Flow-GRPO: spread], and the Fréchet distance rises from [base model: "
        "Fréchet distance] to [Flow-GRPO: Fréchet distance]."
    ),
    ("bench/README.md", "steps"): (
        "A run takes [10 steps: minutes] minutes with 10 steps and [40 steps: minutes] with 40, "
        "and reaches an exact share of [10 steps: exact share] and [40 steps: exact share]. "
        "Accuracy .85 comes after [10 steps: minutes to accuracy 0.85] and [40 steps: minutes to "
        "accuracy 0.85] minutes."
    ),
    ("bench/README.md", "kl"): (
        "Without the penalty, the reward is [beta 0: reward] in place of [beta 0.4: reward], but "
        "the spread [beta 0: spread] in place of [beta 0.4: spread], and the Fréchet distance "
        "[beta 0: Fréchet distance] in place of [beta 0.4: Fréchet distance]."
    ),
    ("bench/README.md", "noise"): (
        "The exact share is [noise 0.1: exact share] at noise level 0.1, where the base model has "
        "[base model: exact share], and [noise 0.7: exact share] at 0.7 and [noise 1.0: exact "
        "share] at 1.0."
    ),
    ("bench/README.md", "group"): (
        "The exact share is [groups of 4: exact share] with groups of 4 and [groups of 16: exact "
        "share] with groups of 16, and without the penalty [groups of 4, beta 0: exact share] and "
        "[groups of 16, beta 0: exact share]. The accuracy with the penalty is [groups of 4: "
        "accuracy] and [groups of 16: accuracy]."
    ),
    ("bench/README.md", "baselines"): (
        "The exact share is [Flow-GRPO: exact share] by Flow-GRPO ([Flow-GRPO, beta 0: exact "
        "share] without a penalty), [SFT: exact share] by SFT, [RWR: exact share] by RWR, and "
        "[Flow-DPO: exact share] by Flow-DPO. The spread is [Flow-GRPO: spread], [SFT: spread], "
        "[RWR: spread] and [Flow-DPO: spread]."
    ),
    ("bench/README.md", "variants"): (
        "Without a penalty, the exact share is [Flow-GRPO, beta 0: exact share] by Flow-GRPO, "
        "[CPS: exact share] by CPS, [GRPO-Guard: exact share] by GRPO-Guard, [Flow-DPPO: exact "
        "share] by Flow-DPPO, and [TempFlow-GRPO's weights: exact share] by TempFlow-GRPO's "
        "weights. With one, it is [Flow-GRPO, beta 0.4: exact share] by Flow-GRPO, and [KL on "
        "velocities: exact share] by the KL on velocities."
    ),
}
HEADINGS = {
    "README.md": "## Does it reproduce the paper?",
    "bench/README.md": "## The paper's claims",
}


def number(value, digits=3):
    """As .926, without a zero before the point."""
    return f"{value:.{digits}f}".removeprefix("0")


def sentences(document, claim):
    """What TOLD says, with the numbers of the records."""
    known = claims.runs_of(claim, RECORDS) | {"base model": [BASE] * 3}

    def average(place):
        variant, column = place.groups()
        runs = known[variant]
        assert len(runs) == 3
        values = [claims.COLUMNS[column](run) for run in runs]
        return number(mean(values), DIGITS.get(column, 3))

    return re.sub(r"\[(.+?): (.+?)\]", average, TOLD[document, claim])


def section_of(document):
    return words_of(document).partition(HEADINGS[document])[2].partition(" ## ")[0]


@pytest.mark.parametrize("document, claim", TOLD)
def test_the_documents_say_of_a_claim_what_the_records_say(document, claim):
    section = section_of(document)
    assert f"`{claim}`" in section
    assert sentences(document, claim) in section


def test_the_seeds_scatter_as_the_document_says():
    seeds = set()
    for claim in claims.measured(RECORDS):
        for runs in claims.runs_of(claim, RECORDS).values():
            if len(runs) == 3:
                seeds.add(tuple(run["judgement"]["exact"] for run in runs))
    one = math.sqrt(mean(variance(exact) for exact in seeds))
    difference = one * math.sqrt(2 / 3)  # of two means over three seeds
    told = f"a standard deviation of {number(one, 2)}, so that the difference of two means has one"
    assert f"{told} of {number(difference)}." in words_of("bench/README.md")
    assert 2 * difference < claims.CHANCE


def test_the_readme_has_no_other_number_on_the_claims():
    section = section_of("README.md").replace(f"less than {number(claims.CHANCE, 2)}", "")
    for document, claim in TOLD:
        section = section.replace(sentences(document, claim), "")
    assert not re.findall(r"\d*\.\d+", section)


def test_the_readme_ends_its_run_as_the_first_recorded_one():
    last = claims.runs_of("gain", RECORDS)["Flow-GRPO"][0]["evaluations"][-1]
    line = f"epoch 80: eval_reward {last['reward']:.3g} eval_ocr_accuracy {last['accuracy']:.3g}"
    assert line in words_of("README.md")
    reward = number(BASE["evaluations"][0]["reward"])
    assert f"The reward is {reward} at the start" in words_of("README.md")


def test_the_embedded_models_table_is_that_of_the_records():
    judged = claims.judgements("gain", RECORDS)
    for run in claims.runs_of("gain", RECORDS)["Flow-GRPO"]:
        judged[f"seed {run['seed']}"] = run["judgement"]
    table = words_of("tiny-sd3/README.md")
    for name, judgement in judged.items():
        cells = [number(judgement[key]) for key in ("exact", "clean")]
        cells += [f"{judgement['spread']:.2f}", number(judgement["frechet"])]
        assert claims.row([name, *cells]) in table


# ---- A claim from end to end.
def prompts(numbers):
    return [{"prompt": f'a sign that says "{n}"'} for n in numbers]


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """A claim that is interrupted in its first rollout and while it is judged, and goes on."""
    out = tmp_path_factory.mktemp("claims")
    variants = {
        "SFT": claims.SFT | QUICK,
        "A": QUICK,
        "5 steps": QUICK | {"steps": 5, "sde_steps": 3, "sde_last_step": 3},
        "far": QUICK | {"learning_rate": 1e9},
    }
    sample = flow_grpo.sample
    judge = claims.judge
    drawn = []  # the number of steps of each rollout
    judged = []

    def sample_or_stop(run):
        drawn.append(flow_grpo.ROLLOUT_DENOISING_STEPS)
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return sample(run)

    def judge_or_stop(folder, **how):
        judged.append(folder)
        if len(judged) == 3:
            raise KeyboardInterrupt
        return judge(folder, count=8, **how)

    def command(*flags):
        argv = ["claims.py", "steps", "--output-dir", str(out), *flags]
        patch.setattr(sys, "argv", argv)
        claims.main()

    with pytest.MonkeyPatch.context() as patch:
        split = prompts(range(120, 128)), prompts(range(340, 348))
        patch.setattr(flow_grpo, "split_prompts", lambda *_: split)
        patch.setattr(flow_grpo, "EVAL_DENOISING_STEPS", 2)
        patch.setattr(flow_grpo, "ROLLOUT_DENOISING_STEPS", 10)
        patch.setattr(flow_grpo, "optimize", flow_grpo.optimize)  # Both are changed, then put back.
        patch.setattr(flow_grpo, "sample", sample_or_stop)
        patch.setattr(claims, "judge", judge_or_stop)
        patch.setattr(claims, "CLAIMS", {"steps": variants})
        stops = []
        for _ in range(2):
            with pytest.raises(SystemExit) as stop:
                command("--seeds", "1")
            stops.append(str(stop.value))
        command("--seeds", "1")
        yield SimpleNamespace(out=out, command=command, drawn=drawn, judged=judged, stops=stops)


def lines_of(tried):
    records = claims.read_records(tried.out / "claims.jsonl")
    return [record for record in records if "seed" in record]


def test_an_interruption_says_how_to_go_on(tried):
    assert tried.stops == ["interrupted: the same command goes on"] * 2


def test_each_run_has_one_record(tried):
    names = [record["claims"]["steps"] for record in lines_of(tried)]
    assert sorted(names) == ["5 steps", "A", "SFT", "far"]


def test_no_epoch_is_drawn_twice_but_the_interrupted_one(tried):
    assert tried.drawn[:6] == [10] * 4 + [10, 5]


def test_a_run_that_diverges_stops_no_other(tried):
    diverged = [record["claims"]["steps"] for record in lines_of(tried) if record["diverged"]]
    assert diverged == ["far"]


@pytest.mark.parametrize("name, loss", [("SFT", "loss"), ("A", "policy_loss")])
def test_each_method_trains_its_own_run(tried, name, loss):
    text = (tried.out / "steps" / name / "seed-0" / "metrics.jsonl").read_text()
    metrics = [json.loads(line) for line in text.splitlines()]
    epochs = [line for line in metrics if "reward" in line]
    assert len(epochs) == 2
    assert all(loss in line for line in epochs)


def test_a_record_has_all_settings(tried):
    for record in lines_of(tried):
        assert set(record["settings"]) == {*vars(flow_grpo.TINY), "steps", "update", "variant"}


def test_a_record_has_each_evaluation(tried):
    for record in lines_of(tried):
        epochs = [point["epoch"] for point in record["evaluations"]]
        assert epochs == [0, 1, 2] or record["diverged"]


def test_the_table_is_the_records(tried):
    text = (tried.out / "claims.md").read_text(encoding="utf-8")
    for record in lines_of(tried):
        judgement = record["judgement"]
        assert f" {judgement['spread']:.3g} | {judgement['frechet']:.3g} |" in text
    assert "| far (one or more diverged) |" in text


def test_the_base_model_and_real_signs_are_judged_once(tried):
    text = (tried.out / "claims.jsonl").read_text(encoding="utf-8")
    names = [json.loads(line)["claims"]["steps"] for line in text.splitlines()]
    assert names[:2] == ["base model", "real signs"]
    assert names.count("base model") == 1


def test_there_is_a_figure(tried):
    assert (tried.out / "claims.png").stat().st_size > 5000


def test_what_is_done_is_not_done_again(tried):
    before = list(tried.drawn), list(tried.judged)
    tried.command("--seeds", "1")
    assert before == (tried.drawn, tried.judged)


def test_another_seed_adds_to_the_table(tried):
    tried.command("--seeds", "1", "--first-seed", "7", "--variants", "A")
    text = (tried.out / "claims.md").read_text(encoding="utf-8")
    assert "over seeds 0, 7." in text
    assert "| SFT (seeds 0) |" in text
    assert "| A |" in text
