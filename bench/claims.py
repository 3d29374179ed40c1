"""The paper's claims about Flow-GRPO, tried on the embedded model.

    python bench/claims.py NAME     gain, steps, kl, noise, group, baselines, all of these; or rates

trains each variant with `--seeds` seeds, and writes a table (mean, least and most) and a figure, NAME.md and
NAME.png in OUTPUT_DIR. Interrupted, the same command goes on. After a change of the code, take a new folder.

gain       reinforcement learning raises text accuracy
steps      rollouts of 10 steps do as well as those of 40, and are faster
kl         without a KL penalty the reward rises, and the images decay
noise      a moderate noise level explores best
group      small groups are unstable
baselines  online RL beats fine-tuning on the best images, reward-weighted regression and Flow-DPO
rates      what the learning rates of `baselines` were chosen by, on other prompts and another seed
"""

import io
import json
import platform
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from judge import HERE, flow_grpo, judge, make
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

GOAL = 0.85  # the accuracy that `minutes to` is about
REAL_UPDATE, REAL_LOG = flow_grpo.update, flow_grpo.log


# ---- The baselines' losses, on P groups with K images each. `error` is each image's flow-matching error, the
# mean of (velocity - (noise - image))^2 over its elements, `ref_error` that of the base model: both [P, K].
def sft_loss(error: Tensor, ref_error: Tensor | None, advantages: Tensor) -> Tensor:
    """Supervised fine-tuning on all that tie for a group's best image, as in the authors' code."""
    best = (advantages == advantages.amax(1, keepdim=True)).float()
    return (best * error).sum() / best.sum()


def rwr_loss(error: Tensor, ref_error: Tensor | None, advantages: Tensor) -> Tensor:
    """Reward-weighted regression: each image weighs exp(advantage), normalised over its group."""
    return (advantages.softmax(1) * error).sum(1).mean()


def dpo_loss(error: Tensor, ref_error: Tensor, advantages: Tensor, beta: float = 100) -> Tensor:
    """Flow-DPO (arXiv 2501.13918): a group's best image against its worst. Beta as in yifan123/flow_grpo."""
    gain = ref_error - error
    best, worst = (gain.gather(1, f(1, keepdim=True)) for f in (advantages.argmax, advantages.argmin))
    return -F.logsigmoid(beta / 2 * (best - worst)).mean()


def baseline(loss_of: Callable, ranks, run, samples, generator: torch.Generator) -> dict[str, float]:
    """In place of flow_grpo.update, on the images of these ranks in each group, the best being the first.
    It takes as many optimiser steps, and sees each of these images at 7 times."""
    config, network, stats = run.config, run.pipe.transformer, []
    on = {"generator": generator, "device": run.device}
    advantages = flow_grpo.group_advantages(samples.columns["reward"].view(-1, config.group_size))
    useful = advantages.any(1) | (loss_of is not dpo_loss)  # Among images that score alike, none is better.
    groups = useful.nonzero().flatten()[torch.randperm(int(useful.sum()), **on).cpu()]
    everything = samples.latents[:, -1].unflatten(0, advantages.shape)

    def error(x: Tensor, t: float, target: Tensor, text) -> Tensor:
        velocity = flow_grpo.velocity_along(run, [t], text)(x.flatten(0, 1), 0)
        return ((velocity - target.flatten(0, 1)) ** 2).mean((1, 2, 3)).view(x.shape[:2])

    for group in (g for g in groups.tensor_split(config.updates_per_epoch) if len(g)):
        pick = advantages[group].argsort(dim=1, descending=True, stable=True)[:, ranks]
        a, images = (s[group[:, None], pick].to(run.device) for s in (advantages, everything))
        text = flow_grpo.rows(samples.text, group.repeat_interleave(pick.shape[1]).tolist(), run.device)
        # SD3's times of training, logit-normal and shifted by 3, one from each of seven equal shares.
        shares = (torch.arange(7, device=run.device) + torch.rand(7, **on)) / 7
        for s in torch.special.ndtri(shares.clamp(1e-4, 1 - 1e-4)).sigmoid().tolist():
            t = 3 * s / (1 + 2 * s)
            noise = torch.randn(len(group), 1, *run.latent_shape, **on)  # a group's images share it
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


# ---- The variants of each claim: the settings in which they differ. `steps` is flow_grpo.TRAIN_STEPS.
LONG, SHORT = {"epochs": 60, "eval_every": 10}, {"epochs": 25, "eval_every": 5}
# The baselines draw by the ODE, as their data are images, not trajectories: noise 0.001 is as good as none.
ODE = {"sde_steps": 10, "sde_range": 10, "noise_level": 0.001}
UPDATES = {
    "Flow-GRPO": REAL_UPDATE,
    "SFT": partial(baseline, sft_loss, slice(None)),
    "RWR": partial(baseline, rwr_loss, slice(None)),
    "Flow-DPO": partial(baseline, dpo_loss, [0, -1]),
}
METHODS = {name: {} if name == "Flow-GRPO" else ODE | {"update": name} for name in UPDATES}
RATES = {"Flow-GRPO": 1e-2, "SFT": 1e-2, "RWR": 3e-3, "Flow-DPO": 3e-3}  # the highest exact share in `rates`
CLAIMS = {
    "gain": {"Flow-GRPO": LONG},
    # In all of `steps`, the noise ends at t = .45 to .50. Beta is 0 there and in `noise`, because the KL
    # is divided by std^2 and multiplied by |dt|: one beta would be another penalty in each variant.
    "steps": {
        f"{n} steps": SHORT | {"beta": 0, "steps": n, "sde_steps": k, "sde_range": k}
        for n, k in ((5, 3), (10, 7), (20, 15), (40, 30))
    },
    "kl": {f"beta {b:g}": LONG | {"beta": b} for b in (0, 0.13, 0.4, 1.2)},
    "noise": {f"noise {a}": SHORT | {"beta": 0, "noise_level": a} for a in (0.1, 0.4, 0.7, 1.0)},
    "group": {
        f"{p} groups of {g}": SHORT | {"group_size": g, "prompts_per_epoch": p}
        for p, g in ((48, 4), (24, 8), (12, 16), (8, 24))
    },
    "baselines": {
        **{f"{m}, {rate:g}": METHODS[m] | SHORT | {"learning_rate": rate} for m, rate in RATES.items()},
        "Flow-GRPO, 0.003 (the default)": SHORT,
        "Flow-GRPO, 0.003, beta 0": SHORT | {"beta": 0},
    },
    "rates": {
        f"{name}, {rate:g}": settings | SHORT | {"epochs": 20, "learning_rate": rate, "tuning": True}
        for name, settings in METHODS.items()
        for rate in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    },
}


def folder_of(variant: dict, seed: int, out: Path) -> Path:
    """Named by what tells runs apart: the length, and what isn't the embedded model's default."""
    defaults = {name: row[1] for name, row in flow_grpo.SETTINGS.items() if name != "epochs"} | {"steps": 10}
    changed = sorted(name for name in variant.keys() - {"eval_every"} if variant[name] != defaults.get(name))
    return out / "_".join(f"{name}-{variant[name]}" for name in changed) / f"seed-{seed}"


def epochs_done(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return max((json.loads(line)["epoch"] for line in metrics.open()), default=0) if metrics.exists() else 0


def measure(variant: dict, seed: int, out: Path, progress: tqdm) -> dict:
    """Train one variant with one seed, or go on with it, and judge it. Returns what its .json file holds."""
    folder, flags = folder_of(variant, seed, out), dict(variant)
    if (record := folder.with_suffix(".json")).exists():
        return json.loads(record.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    progress.set_postfix_str(f"{folder.parent.name}, {folder.name}")
    done = epochs_done(folder)

    def log(run, *rest):
        nonlocal done
        REAL_LOG(run, *rest)
        progress.update(variant.get("steps", 10) * (run.epoch - done))
        done = run.epoch

    flow_grpo.TRAIN_STEPS = flags.pop("steps", 10)
    flow_grpo.update, flow_grpo.log = UPDATES[flags.pop("update", "Flow-GRPO")], log
    if flags.pop("tuning", False):  # Settings are chosen on numbers that are not in prompts.txt.
        flags["eval_prompt_file"] = out / "tuning.txt"
        tuning = (make.PROMPT.format(n) + "\n" for n in make.split_numbers()[2] * 2)
        flags["eval_prompt_file"].write_text("".join(tuning), encoding="utf-8")
    flags |= dict(model=HERE / "tiny-sd3", prompt_file=HERE / "prompts.txt", output_dir=folder, seed=seed)
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    if (folder / "checkpoint.pt").exists():
        argv = ["--resume", str(folder)]
    with open(folder / "log.txt", "a") as text, redirect_stdout(text), redirect_stderr(text):
        code = flow_grpo.main(argv)
    if code == 130:
        raise KeyboardInterrupt
    if code:  # flow_grpo.py alone can't go on with the run as it is here.
        error = (folder / "log.txt").read_text().splitlines()[-1].split("; to go on")[0]
        if flow_grpo.DIVERGED not in error:
            sys.exit(f"{error}; the same command goes on")
        progress.write(f"{folder}: {error}")
    seconds, points = 0.0, []
    for m in map(json.loads, (folder / "metrics.jsonl").open()):
        seconds += m.get("seconds_rollout", 0) + m.get("seconds_update", 0)
        if "eval_reward" in m:
            points.append([m["epoch"], seconds / 60, m["eval_ocr_accuracy"], m["eval_reward"]])
    text = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    name = (re.findall("model name.*: (.*)", text) or [platform.machine()])[0]
    machine = f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    result = {"settings": variant | {"seed": seed}, "machine": machine, "points": points, "diverged": code}
    with redirect_stderr(io.StringIO()):
        result |= {name: value for name, (value, _) in judge(folder).items()}
    flow_grpo.atomic(record, lambda path: path.write_text(json.dumps(result, indent=1) + "\n"))
    return result


# ---- Tables and figures.
def minutes_to_goal(result: dict) -> float:
    """When the accuracy crossed GOAL, between evaluations by a straight line; infinite if it never did."""
    for (_, m0, a0, _), (_, m1, a1, _) in zip(result["points"], result["points"][1:]):
        if a1 >= GOAL:
            return m0 + (m1 - m0) * max(0.0, (GOAL - a0) / (a1 - a0)) if a0 < GOAL else m0
    return float("inf")


COLUMNS = {
    "accuracy": lambda r: r["points"][-1][2],
    "reward": lambda r: r["points"][-1][3],
    "exact": lambda r: r["exact"],
    "spread": lambda r: r["spread"],
    "Fréchet distance": lambda r: r["frechet"],
    "minutes": lambda r: r["points"][-1][1],
    f"minutes to accuracy {GOAL}": minutes_to_goal,
}


def cell(values: list[float]) -> str:
    """Mean (least to most) of the finite values in three digits, and how many these are if not all."""
    finite = [v for v in values if v < float("inf")]
    low, middle, high = (f"{f(finite):.3g}" if finite else "never" for f in (min, mean, max))
    share = f", {len(finite)} of {len(values)}" if 0 < len(finite) < len(values) else ""
    return f"{middle} ({low} to {high}{share})" if low != high or share else middle


def table(name: str, results: dict[str, list[dict]], base: dict) -> str:
    lines = [f"| {name} | epochs | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    _, _, *start = next(iter(results.values()))[0]["points"][0]
    for row, (label, known) in enumerate({"base model": start, "real signs": ["", ""]}.items()):
        cells = [*known, *(base[key][row] for key in ("exact", "spread", "frechet")), "", ""]
        lines.append(f"| {label} | | " + " | ".join("" if c == "" else f"{c:.3g}" for c in cells) + " |")
    for label, runs in results.items():
        cells = [cell([column(r) for r in runs]) for column in COLUMNS.values()]
        label += " (one or more diverged)" if any(r["diverged"] for r in runs) else ""
        lines.append(f"| {label} | {runs[0]['settings']['epochs']} | " + " | ".join(cells) + " |")
    seeds = ", ".join(str(r["settings"]["seed"]) for r in next(iter(results.values())))
    machines = "; ".join(sorted({r["machine"] for runs in results.values() for r in runs}))
    note = f"Mean (least to most) over seeds {seeds}. Minutes are of rollout and update: {machines}."
    return "\n".join([*lines, "", note, ""])


def draw(name: str, results: dict[str, list[dict]], base: dict, axes, second: bool) -> None:
    """Accuracy by epoch (second: time), the mean between least and most; without runs that diverged. For
    `kl`, exact (second: spread) against the Fréchet distance, one point a run."""
    across, up = "minutes of rollout and update" if second else "epoch", "accuracy"
    if name == "kl":
        across, up = "Fréchet distance to real signs", "spread" if second else "exact"
        axes.plot([base["frechet"]], [base[up]], "*", label=["base model", "real signs"])
    for label, runs in results.items():
        if name == "kl":
            axes.plot([r["frechet"] for r in runs], [r[up] for r in runs], "o", label=label)
            continue
        points = list(zip(*(r["points"] for r in runs if not r["diverged"])))  # evaluation by evaluation
        x, y = [mean(p[second] for p in ps) for ps in points], [[p[2] for p in ps] for ps in points]
        (line,) = axes.plot(x, list(map(mean, y)), "o-", markersize=3, label=label)
        axes.fill_between(x, list(map(min, y)), list(map(max, y)), color=line.get_color(), alpha=0.15)
    axes.set(title=name, xlabel=across, ylabel=up)
    axes.legend(fontsize=8)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*CLAIMS, "all"])
    parser.add_argument("--seeds", type=int, default=3, help="how many (rates: 1, from seed 100)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/claims"), help="default: %(default)s")
    args = parser.parse_args()
    names = [n for n in CLAIMS if n != "rates"] if args.name == "all" else [args.name]
    seeds = range(args.first_seed, args.first_seed + max(1, args.seeds)) if args.name != "rates" else [100]
    (out := args.output_dir).mkdir(parents=True, exist_ok=True)
    todo = [(v, seed) for seed in seeds for name in names for v in CLAIMS[name].values()]
    todo = list({folder_of(*run, out): run for run in todo}.values())  # each once
    left = [run for run in todo if not folder_of(*run, out).with_suffix(".json").exists()]
    total = sum(v["epochs"] * v.get("steps", 10) for v, _ in left)
    done = sum(epochs_done(folder_of(v, seed, out)) * v.get("steps", 10) for v, seed in left)
    base = out / ("base-rates.json" if args.name == "rates" else "base.json")
    try:
        with tqdm(total=total, initial=done, unit="step", desc=args.name, smoothing=0) as progress:
            for run in left:
                measure(*run, out, progress)
        if not base.exists():
            judged = judge(folder_of(*todo[0], out), base=True)
            flow_grpo.atomic(base, lambda path: path.write_text(json.dumps(judged)))
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on")
    judged, whole = json.loads(base.read_text()), Figure(figsize=(15, 8), layout="constrained")
    for name, axes in zip(names, whole.subplots(2, 3, sharey=True).flat):
        results = {label: [measure(v, s, out, None) for s in seeds] for label, v in CLAIMS[name].items()}
        (out / f"{name}.md").write_text(table(name, results, judged), encoding="utf-8")
        print(table(name, results, judged))
        one = Figure(figsize=(11, 4), layout="constrained")
        for second, place in enumerate(one.subplots(1, 2)):
            draw(name, results, judged, place, bool(second))
        one.savefig(out / f"{name}.png", dpi=120)
        draw(name, results, judged, axes, name == "steps")
    if args.name == "all":
        whole.savefig(out / "claims.png", dpi=100)
    print(f"Tables and figures are in {out}")


if __name__ == "__main__":
    main()
