"""The paper's claims about Flow-GRPO, tried on the embedded model.

    python bench/claims.py NAME     gain, steps, kl, noise, group, baselines; rates, or all but rates

trains every variant of a claim with `--seeds` seeds. It writes OUTPUT_DIR/NAME.md, a table with the mean,
least and most over the seeds, and OUTPUT_DIR/NAME.png. It drives the functions of flow_grpo.py. Interrupted,
the same command goes on. A variant that two claims share is trained once. Nothing is downloaded.

gain       reinforcement learning raises text accuracy
steps      rollouts of 10 steps do as well as those of 40, and are faster
kl         without a KL penalty the reward rises, and the images decay
noise      a moderate noise level explores best
group      small groups are unstable
baselines  online RL beats fine-tuning on the best images, reward-weighted regression and Flow-DPO
rates      what the baselines' learning rates were chosen by, on other prompts and another seed
"""

import argparse
import io
import json
import platform
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from judge import flow_grpo, judge, make
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

HERE = Path(__file__).resolve().parents[1]
GOAL = 0.85  # the accuracy that `minutes to` is about


# ---- The baselines' losses, on P groups with K images each. `error` is each image's flow-matching error, the
# mean of (velocity - (noise - image))^2 over its elements, `ref_error` that of the base model: both [P, K].
def sft_loss(error: Tensor, ref_error: Tensor | None, advantages: Tensor) -> Tensor:
    """Supervised fine-tuning on the best image of each group."""
    return error.gather(1, advantages.argmax(1, keepdim=True)).mean()


def rwr_loss(error: Tensor, ref_error: Tensor | None, advantages: Tensor) -> Tensor:
    """Reward-weighted regression: each image weighs exp(advantage), normalised over its group."""
    return (advantages.softmax(1) * error).sum(1).mean()


def dpo_loss(error: Tensor, ref_error: Tensor, advantages: Tensor, beta: float = 100) -> Tensor:
    """Flow-DPO (Liu et al., arXiv 2501.13918): a group's best image against its worst; beta as in [C]."""
    gain = ref_error - error
    best, worst = (gain.gather(1, f(1, keepdim=True)) for f in (advantages.argmax, advantages.argmin))
    return -F.logsigmoid(beta / 2 * (best - worst)).mean()


def baseline(loss_of: Callable, ranks, run, samples, generator: torch.Generator) -> dict[str, float]:
    """In place of flow_grpo.update, on the images of these ranks in each group, the best being the first.
    There are as many optimiser steps as there, and an image is seen at as many times."""
    config, network, stats = run.config, run.pipe.transformer, []
    on = {"generator": generator, "device": run.device}
    advantages = flow_grpo.group_advantages(samples.columns["reward"].view(-1, config.group_size))
    groups = advantages.any(1).nonzero().flatten()  # A group whose images score alike teaches nothing.
    groups = groups[torch.randperm(len(groups), **on).cpu()]
    everything = samples.latents[:, -1].unflatten(0, advantages.shape)

    def error(x: Tensor, t: float, target: Tensor, text) -> Tensor:
        known = x.flatten(0, 1), t, text, run.null_text, config.guidance_scale
        velocity = flow_grpo.predict_velocity(network, *known)
        return ((velocity - target.flatten(0, 1)) ** 2).mean((1, 2, 3)).view(x.shape[:2])

    for group in (g for g in groups.tensor_split(config.updates_per_epoch) if len(g)):
        pick = advantages[group].argsort(dim=1, descending=True, stable=True)[:, ranks]
        a, images = (s[group[:, None], pick].to(run.device) for s in (advantages, everything))
        text = flow_grpo.rows(samples.text, group.repeat_interleave(pick.shape[1]).tolist(), run.device)
        # SD3's times of training, logit-normal and shifted by 3, one from each of seven equal shares.
        shares = (torch.arange(7, device=run.device) + torch.rand(7, **on)) / 7
        for s in torch.special.ndtri(shares.clamp(1e-4, 1 - 1e-4)).sigmoid().tolist():
            t = 3 * s / (1 + 2 * s)
            noise = torch.randn(
                len(group), 1, *run.latent_shape, **on
            )  # a group's images share it, as in [C]
            known, ref_error = ((1 - t) * images + t * noise, t, noise - images, text), None
            if loss_of is dpo_loss:
                network.disable_adapters()
                with torch.no_grad():
                    ref_error = error(*known)
                network.enable_adapters()
            loss = loss_of(error(*known), ref_error, a)
            run.scaler.scale(loss / len(shares)).backward()
            stats.append({"loss": loss.item()})
        stats[-1]["grad_norm"] = flow_grpo.optimizer_step(run)
    return {name: mean(s[name] for s in stats if name in s) for name in stats[-1]} if stats else {}


# ---- The variants of each claim: the settings that differ from the default run's. `epochs` is the length.
LONG, SHORT = {"epochs": 80}, {"epochs": 40}
# The baselines draw by the ODE, as their data are images, not trajectories: noise 0.001 is as good as none.
ODE = {"sde_steps": 10, "sde_range": 10, "noise_level": 0.001, **SHORT}
UPDATES = {
    "SFT": partial(baseline, sft_loss, [0]),
    "RWR": partial(baseline, rwr_loss, slice(None)),
    "Flow-DPO": partial(baseline, dpo_loss, [0, -1]),
}
RATES = {"SFT": 1e-3, "RWR": 1e-3, "Flow-DPO": 1e-3}  # by `rates`
CLAIMS = {
    "gain": {"Flow-GRPO": LONG},
    # As many of the steps have noise as end at the same time, about .46.
    "steps": {
        f"{n} steps": SHORT | ({"steps": n, "sde_steps": k, "sde_range": k} if n != 10 else {})
        for n, k in ((5, 3), (10, 7), (20, 15), (40, 30))
    },
    "kl": {f"beta {b:g}": LONG | ({"beta": b} if b != 0.4 else {}) for b in (0, 0.13, 0.4, 1.2)},
    "noise": {f"noise {a}": SHORT | ({"noise_level": a} if a != 1 else {}) for a in (0.1, 0.4, 0.7, 1.0)},
    "group": {
        f"{p} groups of {g}": SHORT | ({"group_size": g, "prompts_per_epoch": p} if g != 16 else {})
        for p, g in ((48, 4), (24, 8), (12, 16), (8, 24))
    },
    "baselines": {
        "Flow-GRPO": SHORT,
        **{name: ODE | {"update": name, "learning_rate": RATES[name]} for name in UPDATES},
    },
    "rates": {
        f"{name}, {rate:g}": ODE | {"epochs": 20, "update": name, "learning_rate": rate, "tuning": True}
        for name in UPDATES
        for rate in (3e-4, 1e-3, 3e-3)
    },
}


def folder_of(variant: dict, seed: int, out: Path) -> Path:
    return out / "_".join(f"{name}-{value}" for name, value in sorted(variant.items())) / f"seed-{seed}"


def epochs_done(variant: dict, seed: int, out: Path) -> int:
    folder = folder_of(variant, seed, out)
    if folder.with_suffix(".json").exists():
        return variant["epochs"]
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return json.loads(lines[-1])["epoch"] if lines else 0


def measure(variant: dict, seed: int, out: Path, progress: tqdm) -> dict:
    """Train one variant with one seed, or go on with it, and judge it. Returns what its .json file holds."""
    folder, flags = folder_of(variant, seed, out), dict(variant)
    if (record := folder.with_suffix(".json")).exists():
        return json.loads(record.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    done, cost = epochs_done(variant, seed, out), variant.get("steps", 10) / 10

    def log(run, *rest):
        nonlocal done
        original_log(run, *rest)
        progress.update(cost * (run.epoch - done))
        done = run.epoch

    flow_grpo.TRAIN_STEPS = flags.pop("steps", 10)
    flow_grpo.update, flow_grpo.log = UPDATES.get(flags.pop("update", None), original_update), log
    if flags.pop("tuning", False):  # Settings are chosen on numbers that are not in prompts.txt.
        flags["eval_prompt_file"] = out / "tuning.txt"
        tuning = (make.PROMPT.format(n) + "\n" for n in make.split_numbers()[2] * 2)
        flags["eval_prompt_file"].write_text("".join(tuning), encoding="utf-8")
    flags |= dict(model=HERE / "tiny-sd3", prompt_file=HERE / "prompts.txt", output_dir=folder, seed=seed)
    flags["eval_every"] = max(1, flags["epochs"] // 4)
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    if (folder / "checkpoint.pt").exists():
        argv = ["--resume", str(folder)]
    with open(folder / "log.txt", "a") as text, redirect_stdout(text), redirect_stderr(text):
        code = flow_grpo.main(argv)
    if code == 130:
        raise KeyboardInterrupt
    if code:
        sys.exit((folder / "log.txt").read_text().splitlines()[-1])
    lines, seconds, points = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()), 0.0, []
    for m in lines:
        seconds += m.get("seconds_rollout", 0) + m.get("seconds_update", 0)
        if "eval_reward" in m:
            points.append([m["epoch"], seconds / 60, m["eval_ocr_accuracy"], m["eval_reward"]])
    with redirect_stderr(io.StringIO()):
        judged = {name: value for name, (value, _) in judge(folder).items()}
    result = {"settings": {**variant, "seed": seed}, "machine": machine(), "points": points, **judged}
    record.write_text(json.dumps(result, indent=1) + "\n")
    return result


def machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    name = lines[0].split(": ")[1] if lines else platform.processor()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


# ---- Tables and figures.
def minutes_to_goal(result: dict) -> float:
    """When the accuracy crossed GOAL, between evaluations by a straight line; infinite if it never did."""
    for (_, m0, a0, _), (_, m1, a1, _) in zip(result["points"], result["points"][1:]):
        if a1 >= GOAL:
            return m0 + (m1 - m0) * max(0.0, (GOAL - a0) / (a1 - a0))
    return float("inf")


COLUMNS = {
    "exact": lambda r: r["exact"],
    "reward": lambda r: r["points"][-1][3],
    "spread": lambda r: r["spread"],
    "Fréchet distance": lambda r: r["frechet"],
    "minutes": lambda r: r["points"][-1][1],
    f"minutes to {GOAL}": minutes_to_goal,
}


def cell(values: list[float]) -> str:
    """Mean (least to most) in three digits."""
    low, middle, high = (
        f"{v:.3g}" if v < float("inf") else "never" for v in (min(values), mean(values), max(values))
    )
    return middle if low == high else f"{middle} ({low} to {high})"


def table(name: str, results: dict[str, list[dict]], base: dict) -> str:
    lines = [f"| {name} | epochs | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    reward = next(iter(results.values()))[0]["points"][0][3]
    numbers = " | ".join(f"{x:.3g}" for x in (base["exact"], reward, base["spread"], base["frechet"]))
    lines.append(f"| base model | 0 | {numbers} | | |")
    for label, runs in results.items():
        cells = [cell([column(r) for r in runs]) for column in COLUMNS.values()]
        lines.append(f"| {label} | {runs[0]['settings']['epochs']} | " + " | ".join(cells) + " |")
    seeds = ", ".join(str(r["settings"]["seed"]) for r in next(iter(results.values())))
    machines = "; ".join(sorted({r["machine"] for runs in results.values() for r in runs}))
    return "\n".join([*lines, "", f"Mean (least to most) over the seeds {seeds}. {machines}.", ""])


def draw(name: str, results: dict[str, list[dict]], base: dict, axes) -> None:
    """Accuracy by epoch, or by time for `steps`; for `kl`, against the distance to real signs."""
    for label, runs in results.items():
        if name == "kl":
            axes.plot([r["frechet"] for r in runs], [r["exact"] for r in runs], "o", label=label)
            continue
        x = [mean(r["points"][i][name == "steps"] for r in runs) for i in range(len(runs[0]["points"]))]
        y = [[r["points"][i][2] for r in runs] for i in range(len(x))]
        (line,) = axes.plot(x, list(map(mean, y)), "o-", markersize=3, label=label)
        axes.fill_between(x, list(map(min, y)), list(map(max, y)), color=line.get_color(), alpha=0.15)
    if name == "kl":
        axes.plot(base["frechet"], base["exact"], "k*", label="base model")
        axes.set_xscale("log")
    x = {"kl": "Fréchet distance to real signs", "steps": "minutes of rollout and update"}.get(name, "epoch")
    axes.set(title=name, xlabel=x, ylabel="exact" if name == "kl" else "held-out accuracy")
    axes.legend(fontsize=8)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("name", choices=[*CLAIMS, "all"])
    parser.add_argument("--seeds", type=int, default=3, help="how many (rates: 1, from seed 100)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/claims"))
    args = parser.parse_args()
    names = [n for n in CLAIMS if n != "rates"] if args.name == "all" else [args.name]
    seeds = range(args.first_seed, args.first_seed + args.seeds) if args.name != "rates" else [100]
    out = args.output_dir
    out.mkdir(parents=True, exist_ok=True)
    variants = [v for name in names for v in CLAIMS[name].values()]
    todo = {folder_of(v, s, out): (v, s) for s in seeds for v in variants}  # each once
    costs = [v["epochs"] * v.get("steps", 10) / 10 for v, _ in todo.values()]
    done = sum(epochs_done(v, s, out) * v.get("steps", 10) / 10 for v, s in todo.values())
    try:
        with tqdm(total=sum(costs), initial=done, unit="epoch", desc=args.name) as progress:
            for variant, seed in todo.values():
                measure(variant, seed, out, progress)
        if not (base := out / "base.json").exists():
            folder = folder_of(*next(iter(todo.values())), out)
            base.write_text(
                json.dumps({name: value for name, (value, _) in judge(folder, base=True).items()})
            )
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on")
    base, whole = json.loads(base.read_text()), Figure(figsize=(15, 8), layout="constrained")
    for name, axes in zip(names, whole.subplots(2, 3).flat):
        results = {label: [measure(v, s, out, None) for s in seeds] for label, v in CLAIMS[name].items()}
        (out / f"{name}.md").write_text(table(name, results, base), encoding="utf-8")
        print(table(name, results, base))
        one = Figure(figsize=(6, 4), layout="constrained")
        for place in (axes, one.subplots()):
            draw(name, results, base, place)
        one.savefig(out / f"{name}.png", dpi=120)
    if args.name == "all":
        whole.savefig(out / "claims.png", dpi=100)
    print(f"Tables and figures are in {out}")


original_log, original_update = flow_grpo.log, flow_grpo.update

if __name__ == "__main__":
    main()
