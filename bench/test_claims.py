"""Tests of claims.py: no network, no GPU; half a minute on 2 cores."""

import json
import math
import sys

import claims
import pytest
import torch
from claims import dpo_loss, flow_grpo, rwr_loss, sft_loss

TINY = {"epochs": 2, "prompts_per_epoch": 2, "group_size": 4, "batch_size": 8, "eval_every": 1}


def test_losses_are_their_closed_forms():
    error, ref, a = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error.requires_grad_()
    rows = range(5)
    best, worst = ([f(range(4), key=a[p].__getitem__) for p in rows] for f in (max, min))
    e, r, total = error.tolist(), ref.tolist(), a.exp().sum(1).tolist()
    weights = [[math.exp(a[p][k]) / total[p] for k in range(4)] for p in rows]
    assert sft_loss(error, None, a).item() == pytest.approx(sum(e[p][best[p]] for p in rows) / 5)
    ties = torch.tensor([[1.0, -3, 1, 1], [0, 0, 0, 0], *[[5.0, 1, 1, 1]] * 3])
    chosen = [0, 2, 3], range(4), [0], [0], [0]
    expected = sum(e[p][k] for p in rows for k in chosen[p]) / 10
    assert sft_loss(error, None, ties).item() == pytest.approx(expected)
    expected = sum(weights[p][k] * e[p][k] for p in rows for k in range(4)) / 5
    assert rwr_loss(error, None, a).item() == pytest.approx(expected)
    won, lost = ([e[p][i[p]] - r[p][i[p]] for p in rows] for i in (best, worst))
    margins = [-3.0 / 2 * (won[p] - lost[p]) for p in rows]
    loss = dpo_loss(error, ref, a, beta=3.0)
    assert loss.item() == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in margins) / 5)
    (gradient,) = torch.autograd.grad(loss, error)
    slopes = [3.0 / 2 / (1 + math.exp(m)) / 5 for m in margins]  # towards the best, away from the worst
    expected = [[slopes[p] * ((k == best[p]) - (k == worst[p])) for k in range(4)] for p in rows]
    assert torch.allclose(gradient, torch.tensor(expected, dtype=torch.float64))


@pytest.fixture(scope="module")
def run():
    given = dict(model=str(claims.HERE / "tiny-sd3"), prompt_file="", **TINY, sde_steps=10, sde_range=10)
    config, pipe = flow_grpo.settings(**given), flow_grpo.load_pipeline(given["model"])
    records = [{"prompt": f'a sign that says "{n}"'} for n in (123, 456)]
    run = flow_grpo.prepare(config, pipe, flow_grpo.load_rewards("ocr"), records, records)
    for p in run.parameters:
        p.data.normal_(std=0.02)
    return run


@pytest.mark.parametrize("name", ["SFT", "RWR", "Flow-DPO"])
def test_a_baselines_gradient(run, monkeypatch, name):
    """Two groups, one update, against the loss restated image by image. DPO needs a difference in a group."""
    generator, net, gradients = torch.Generator().manual_seed(1), run.pipe.transformer, []
    samples = flow_grpo.collect(run, generator)
    rewards = torch.tensor([[0.1, 0.9, 0.4, 0.2], [0.5, 0.3, 0.2, 0.8]])
    run.config.updates_per_epoch = 1

    def step(run):
        gradients.append([p.grad.clone() for p in run.parameters])
        run.optimizer.zero_grad()
        return 1.0

    monkeypatch.setattr(flow_grpo, "optimizer_step", step)
    columns = {"reward": rewards.flatten()}
    claims.UPDATES[name](run, samples._replace(columns=columns), torch.Generator().manual_seed(2))
    generator.manual_seed(2)
    order, losses = torch.randperm(2, generator=generator).tolist(), []
    z = (torch.arange(7) + torch.rand(7, generator=generator)) / 7
    a = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(correction=0) + 1e-4)
    for u in z.tolist():
        s = 1 / (1 + math.exp(-torch.distributions.Normal(0, 1).icdf(torch.tensor(u)).item()))
        t, noise = 3 * s / (1 + 2 * s), torch.randn(2, 1, *run.latent_shape, generator=generator)
        for place, p in enumerate(order):
            x0 = samples.latents[4 * p : 4 * p + 4, -1]
            text = tuple(e[[p] * 4] for e in samples.text)
            x, time = (1 - t) * x0 + t * noise[place], torch.full((4,), 1000 * t)
            error = ((net(x, *text, time)[0] - (noise[place] - x0)) ** 2).mean((1, 2, 3))
            net.disable_adapters()
            ref = ((net(x, *text, time)[0] - (noise[place] - x0)) ** 2).mean((1, 2, 3)).detach()
            net.enable_adapters()
            best, worst = rewards[p].argmax(), rewards[p].argmin()
            margin = 50 * ((ref - error)[best] - (ref - error)[worst])
            values = {
                "SFT": error[best],
                "RWR": (a[p].softmax(0) * error).sum(),
                "Flow-DPO": (-margin).exp().log1p(),
            }
            losses.append(values[name] / 14)
    expected = torch.autograd.grad(sum(losses), run.parameters)
    got, expected = (torch.cat([g.flatten() for g in gradient]) for gradient in (gradients[0], expected))
    assert (got - expected).norm() < 1e-3 * expected.norm()
    columns = {"reward": torch.ones(8)}
    stats = claims.UPDATES[name](run, samples._replace(columns=columns), generator)
    assert (len(gradients) == 1 and stats == {}) if name == "Flow-DPO" else len(gradients) == 2


def test_minutes_and_cells():
    result = {"points": [[0, 0.0, 0.6, 0.8], [10, 2.0, 0.8, 0.9], [20, 4.0, 0.9, 0.95]]}
    assert claims.minutes_to_goal(result) == pytest.approx(3)
    result["points"][0][2], result["points"][1][2] = 0.9, 0.86
    assert claims.minutes_to_goal(result) == 0
    assert claims.minutes_to_goal({"points": [[0, 0, 0.5, 0.5], [1, 1, 0.8, 0.8]]}) == math.inf
    assert claims.cell([1.0, 3.0, math.inf]) == "2 (1 to 3, 2 of 3)" and claims.cell([math.inf]) == "never"
    assert claims.cell([0.5, 0.25]) == "0.375 (0.25 to 0.5)" and claims.cell([0.5]) == "0.5"


def test_a_claim_from_end_to_end(tmp_path, monkeypatch, capsys):
    """Interrupted while drawing or judging, it goes on; called once more, it trains nothing; a run that
    diverges stops no other; the table is the records'."""
    variants = {
        "SFT": claims.ODE | TINY | {"update": "SFT"},
        "A": TINY,
        "5 steps": TINY | {"steps": 5, "sde_steps": 3, "sde_range": 3},
        "far": TINY | {"learning_rate": 1e9},
    }
    original, judge, collected, judged = flow_grpo.collect, claims.judge, [], []

    def collect(run, *args):
        collected.append(run.config.output_dir)
        if len(collected) == 4:
            raise KeyboardInterrupt
        return original(run, *args)

    def quick_judge(folder, **how):
        judged.append(folder)
        if len(judged) == 1:
            raise KeyboardInterrupt
        return judge(folder, count=8, **how)

    for name in ("TRAIN_STEPS", "update", "log"):  # The command sets them.
        monkeypatch.setattr(flow_grpo, name, getattr(flow_grpo, name))
    train, held_out = ([{"prompt": f'a sign that says "{n}{k}"'} for k in range(8)] for n in (12, 34))
    monkeypatch.setattr(flow_grpo, "split_prompts", lambda *_: (train, held_out))
    monkeypatch.setattr(flow_grpo, "EVAL_STEPS", 2)
    monkeypatch.setattr(flow_grpo, "collect", collect)
    monkeypatch.setattr(claims, "judge", quick_judge)
    monkeypatch.setattr(claims, "CLAIMS", {"steps": variants})
    monkeypatch.setattr(sys, "argv", ["claims.py", "steps", "--seeds", "1", "--output-dir", str(tmp_path)])
    for _ in range(2):
        with pytest.raises(SystemExit, match="the same command goes on"):
            claims.main()
    claims.main()
    counts = len(collected), len(judged)
    claims.main()
    assert counts == (len(collected), len(judged)) and (tmp_path / "steps.png").stat().st_size > 5000
    text = (tmp_path / "steps.md").read_text()
    assert text in capsys.readouterr().out and "| far (one or more diverged) |" in text
    records = [json.loads(path.read_text()) for path in tmp_path.glob("*/seed-0.json")]
    assert len(records) == 4 and sorted(r["diverged"] for r in records) == [0, 0, 0, 2]
    for r in (r for r in records if not r["diverged"]):
        assert [point[0] for point in r["points"]] == [0, 1, 2]
        assert f" {r['spread']:.3g} | {r['frechet']:.3g} |" in text
    assert list(json.loads((tmp_path / "base.json").read_text())) == ["exact", "clean", "spread", "frechet"]
