"""Do the paper's claims about Flow-GRPO hold on the embedded model?

    python bench/claims.py NAME...

The command trains each variant of these claims with each seed, and adds a line for each run to
claims.jsonl in the output folder. From all lines there it makes claims.md, tables with the mean,
the least and the most over the seeds, and claims.png. Interrupted, the same command goes on. With
`--seeds 0` it only makes the tables and the figure. After a change of the code, take a new folder.

gain       Reinforcement learning raises text accuracy.
steps      Rollouts of 10 steps do as well as those of 40, over 4 times faster.
kl         Without a KL penalty, the reward is as high, but images decay.
noise      A moderate noise level explores best.
group      Small groups are unstable.
baselines  Flow-GRPO beats fine-tuning on the best images, reward-weighted regression, online DPO.
variants   Later papers' changes, of examples/variants.py, help.
all        All of these.
rates      By this the learning rates of `baselines` are chosen, on other prompts and seed 100.
"""

import json
import math
import platform
import re
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from datetime import date
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean

import baselines
import torch
from cycler import cycler
from judge import flow_grpo, judge, make
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.append(str(flow_grpo.HERE / "examples"))
from variants import put_in_place

GOAL = 0.85  # the accuracy that `minutes to accuracy` is about
CHANCE = 0.04  # a smaller difference of two exact shares may be chance
UPDATES = {
    "Flow-GRPO": flow_grpo.optimize,
    "SFT": partial(baselines.optimize, baselines.sft_loss),
    "RWR": partial(baselines.optimize, baselines.rwr_loss),
    "Flow-DPO": partial(baselines.optimize, baselines.dpo_loss),
}

# ---- The variants of each claim, by what differs from these settings.
DEFAULTS = {
    **vars(flow_grpo.TINY),
    "model": "tiny-sd3",
    "prompt_file": "prompts.txt",
    "steps": 10,  # flow_grpo.ROLLOUT_DENOISING_STEPS
    "update": "Flow-GRPO",
    "variant": "paper",  # of examples/variants.py
}
SHORT = {"epochs": 24, "eval_every": 8}
NO_KL = SHORT | {"beta": 0.0}
# The baselines learn from images, not from steps, and draw them by the ODE.
BASELINE = SHORT | {"noise_level": 0.0}
SFT = BASELINE | {"update": "SFT"}
RWR = BASELINE | {"update": "RWR"}
DPO = BASELINE | {"update": "Flow-DPO"}
SMALL_GROUPS = {"prompts_per_epoch": 48, "group_size": 4}
CLAIMS = {
    "gain": {"Flow-GRPO": {}},
    # The KL is divided by std^2 and multiplied by |dt|, so that one beta would be another penalty
    # in each variant of `steps` and `noise`. The noise of `steps` ends at t = .46 and .48.
    "steps": {
        "10 steps": NO_KL,
        "40 steps": NO_KL | {"steps": 40, "sde_steps": 30, "sde_last_step": 30},
    },
    "kl": {"beta 0": {"beta": 0.0}, "beta 0.4": {}},
    "noise": {
        "noise 0.1": NO_KL | {"noise_level": 0.1},
        "noise 0.7": NO_KL | {"noise_level": 0.7},
        "noise 1.0": NO_KL,
    },
    "group": {
        "groups of 4": SHORT | SMALL_GROUPS,
        "groups of 16": SHORT,
        "groups of 4, beta 0": NO_KL | SMALL_GROUPS,
        "groups of 16, beta 0": NO_KL,
    },
    # Each learning rate is chosen by `rates`: of those whose exact share is within CHANCE of the
    # highest, it is the one of the smallest Fréchet distance.
    "baselines": {
        "Flow-GRPO, beta 0": NO_KL,
        "Flow-GRPO": SHORT,
        "SFT": SFT | {"learning_rate": 1e-3},
        "RWR": RWR | {"learning_rate": 1e-3},
        "Flow-DPO": DPO,
    },
    # Flow-GRPO and GRPO-Guard clip about a fifth of the ratios in the first epoch here. Flow-DPPO's
    # threshold is its paper's. Averaged over the steps, the KL on velocities weighs as much as a
    # beta of 0.4 does.
    "variants": {
        "Flow-GRPO, beta 0": NO_KL,
        "CPS": NO_KL | {"variant": "cps", "noise_level": 0.8},
        "GRPO-Guard": NO_KL | {"variant": "guard", "clip_range": 5e-5},
        "Flow-DPPO": NO_KL | {"variant": "dppo", "clip_range": 1e-5},
        "TempFlow-GRPO's weights": NO_KL | {"variant": "tempflow"},
        "Flow-GRPO, beta 0.4": SHORT,
        "KL on velocities": SHORT | {"variant": "velocity-kl", "beta": 0.0013},
    },
    "rates": {},
}
TUNING = {"eval_prompt_file": "tuning.txt"}
for name, method in {"Flow-GRPO": SHORT, "SFT": SFT, "RWR": RWR, "Flow-DPO": DPO}.items():
    for rate in (3e-4, 1e-3, 3e-3, 1e-2):
        CLAIMS["rates"][f"{name}, {rate:g}"] = method | TUNING | {"learning_rate": rate}


# ---- Running. A record is a line of claims.jsonl.
def read_records(path: Path) -> list[dict]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def add_record(path: Path, record: dict) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def names_of(settings: dict) -> dict[str, str]:
    """The claims that a run with these settings belongs to, each with the variant's name."""
    names = {}
    for claim, variants in CLAIMS.items():
        for name, variant in variants.items():
            if DEFAULTS | variant | {"seed": settings["seed"]} == settings:
                names[claim] = name
    return names


def runs_left(claims: list[str], only: list[str], seeds: list[int], records: list) -> list[dict]:
    """The settings of the runs that are not in the records yet, each once."""
    left = []
    for seed in seeds:
        for claim in claims:
            for name, variant in CLAIMS[claim].items():
                settings = DEFAULTS | variant | {"seed": seed}
                known = [r for r in records if r["claims"].get(claim) == name]
                done = any(r.get("seed") == seed for r in known)
                wanted = not only or name in only
                if wanted and not done and settings not in left:
                    left.append(settings)
    return left


def start(settings: dict, folder: Path) -> flow_grpo.Run:
    """The run with these settings, as far as it has come in this folder."""
    given = dict(settings)
    flow_grpo.ROLLOUT_DENOISING_STEPS = given.pop("steps")
    del given["update"]
    del given["variant"]
    given["model"] = str(flow_grpo.HERE / given["model"])
    given["prompt_file"] = str(flow_grpo.HERE / given["prompt_file"])
    given["output_dir"] = str(folder)
    if given["eval_prompt_file"]:
        # Settings are chosen on numbers that are not in prompts.txt, two signs of each.
        tuning_numbers = make.split_numbers()[2]
        path = folder / given["eval_prompt_file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        prompts = [make.PROMPT.format(number) for number in tuning_numbers]
        path.write_text("\n".join(prompts * 2), encoding="utf-8")
        given["eval_prompt_file"] = str(path)
    state = None
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=flow_grpo.DEVICE, weights_only=True)
    return flow_grpo.start(flow_grpo.Config(**given), state)


def evaluations(metrics: list[dict]) -> list[dict]:
    """The evaluations among a run's metrics, with the minutes of rollout and update until then."""
    seconds = 0.0
    found = []
    for line in metrics:
        seconds += line.get("seconds_rollout", 0) + line.get("seconds_update", 0)
        if "eval_reward" in line:
            found.append(
                {
                    "epoch": line["epoch"],
                    "minutes": seconds / 60,
                    "accuracy": line["eval_ocr_accuracy"],
                    "reward": line["eval_reward"],
                }
            )
    return found


def origin() -> dict[str, str]:
    """What made a record: the commit, the machine, the date."""
    command = ["git", "-C", str(flow_grpo.HERE), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    cpus = Path("/proc/cpuinfo")
    text = cpus.read_text() if cpus.exists() else ""
    cpu = re.search("model name.*: (.*)", text)
    name = cpu[1] if cpu else platform.machine()
    machine = f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return {"commit": commit, "machine": machine, "date": date.today().isoformat()}


def measure(settings: dict, path: Path) -> None:
    """Train one variant with one seed, judge it, and add its record to the file."""
    claims = names_of(settings)
    claim, name = next(iter(claims.items()))
    folder = path.parent / claim / name / f"seed-{settings['seed']}"
    print(folder, flush=True)
    run = start(settings, folder)
    flow_grpo.optimize = UPDATES[settings["update"]]
    put_in_place(settings["variant"])
    diverged = False
    try:
        flow_grpo.train(run)
    except flow_grpo.Diverged as e:
        diverged = True
        print(e)
    if not any(record["claims"].get(claim) == "base model" for record in read_records(path)):
        same_prompts = [c for c in CLAIMS if (c == "rates") == (claim == "rates")]
        numbers = judge(folder, base=True)
        for place, label in enumerate(["base model", "real signs"]):
            record = {"claims": dict.fromkeys(same_prompts, label), **origin()}
            record["judgement"] = {name: pair[place] for name, pair in numbers.items()}
            add_record(path, record)
    judgement = {name: value for name, (value, of_signs) in judge(folder).items()}
    record = {
        "claims": claims,
        "seed": settings["seed"],
        "settings": settings,
        **origin(),
        "evaluations": evaluations(run.metrics),
        "judgement": judgement,
        "diverged": diverged,
    }
    add_record(path, record)


# ---- Tables.
def judgements(claim: str, records: list[dict]) -> dict[str, dict]:
    """The judgements of the base model and of real signs."""
    found = {}
    for name in ("base model", "real signs"):
        for record in records:
            if record["claims"].get(claim) == name:
                found[name] = record["judgement"]
    return found


def runs_of(claim: str, records: list[dict]) -> dict[str, list[dict]]:
    """Each variant's records by seed. Of two with the same seed, the last counts."""
    runs = {}
    for name in CLAIMS[claim]:
        known = [record for record in records if record["claims"].get(claim) == name]
        by_seed = {record["seed"]: record for record in known}
        if by_seed:
            runs[name] = [by_seed[seed] for seed in sorted(by_seed)]
    return runs


def minutes_to_goal(record: dict) -> float:
    """When the accuracy crossed GOAL, by straight lines; infinite if it never did."""
    points = record["evaluations"]
    for before, after in pairwise(points):
        low = before["accuracy"]
        high = after["accuracy"]
        if low >= GOAL:
            return before["minutes"]
        if high >= GOAL:
            share = (GOAL - low) / (high - low)
            return before["minutes"] + (after["minutes"] - before["minutes"]) * share
    return math.inf


COLUMNS = {
    "accuracy": lambda record: record["evaluations"][-1]["accuracy"],
    "reward": lambda record: record["evaluations"][-1]["reward"],
    "exact share": lambda record: record["judgement"]["exact"],
    "clean": lambda record: record["judgement"]["clean"],
    "spread": lambda record: record["judgement"]["spread"],
    "Fréchet distance": lambda record: record["judgement"]["frechet"],
    "minutes": lambda record: record["evaluations"][-1]["minutes"],
    f"minutes to accuracy {GOAL}": minutes_to_goal,
}


def cell(values: list[float]) -> str:
    """Mean (least to most) of the finite values, and how many these are if not all."""
    finite = [value for value in values if value < math.inf]
    if not finite:
        return "never"
    middle = f"{mean(finite):.3g}"
    low = f"{min(finite):.3g}"
    high = f"{max(finite):.3g}"
    if len(finite) < len(values):
        return f"{middle} ({low} to {high}, {len(finite)} of {len(values)})"
    return f"{middle} ({low} to {high})" if low != high else middle


def row(cells: list[str]) -> str:
    return "|" + "".join(f" {text} |" if text else " |" for text in cells)


def table(claim: str, records: list[dict]) -> str:
    runs = runs_of(claim, records)
    every_run = [record for known in runs.values() for record in known]
    first = every_run[0]["evaluations"][0]
    known = {"base model": [f"{first[key]:.3g}" for key in ("accuracy", "reward")]}
    seeds = sorted({record["seed"] for record in every_run})
    lines = [f"## {claim}", "", row([claim, "epochs", *COLUMNS])]
    lines.append(row(["---"] * (len(COLUMNS) + 2)))
    for name, judgement in judgements(claim, records).items():
        judged = [f"{judgement[key]:.3g}" for key in ("exact", "clean", "spread", "frechet")]
        cells = [*known.get(name, ["", ""]), *judged, "", ""]
        lines.append(row([name, "", *cells]))
    for name, known in runs.items():
        label = name
        if any(record["diverged"] for record in known):
            label += " (one or more diverged)"
        if len(known) < len(seeds):
            label += f" (seeds {', '.join(str(record['seed']) for record in known)})"
        cells = [cell([column(record) for record in known]) for column in COLUMNS.values()]
        lines.append(row([label, str(known[0]["settings"]["epochs"]), *cells]))
    machines = "; ".join(sorted({record["machine"] for record in every_run}))
    over = f"Mean (least to most) over seeds {', '.join(map(str, seeds))}."
    lines += ["", f"{over} Minutes are of rollout and update: {machines}.", ""]
    return "\n".join(lines)


def measured(records: list[dict]) -> list[str]:
    """The claims of which there are runs."""
    return [claim for claim in CLAIMS if runs_of(claim, records)]


def tables(records: list[dict]) -> str:
    parts = ["# The claims\n"]
    parts.append("The columns are explained in [bench/README.md](../README.md#metrics).\n")
    parts += [table(claim, records) for claim in measured(records)]
    return "\n".join(parts)


# ---- The figure.
STYLES = cycler(linestyle=["-", "--", ":", "-.", (0, (6, 2, 1, 2, 1, 2))])
STYLES += cycler(marker=["o", "s", "^", "D", "v"])
STYLES += cycler(markersize=[4] * 5)
STYLES += cycler(color=["tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple"])


def draw_kl(axes, runs: dict, judged: dict) -> None:
    """The exact share by the Fréchet distance, a point for each run."""
    axes.set_prop_cycle(STYLES)
    for name, known in runs.items():
        x = [record["judgement"]["frechet"] for record in known]
        y = [record["judgement"]["exact"] for record in known]
        axes.plot(x, y, linestyle="none", label=name)
    for name, marker in zip(judged, "*P"):
        judgement = judged[name]
        axes.plot([judgement["frechet"]], [judgement["exact"]], f"k{marker}", ms=9, label=name)
    axes.set(xlabel="Fréchet distance to real signs", ylabel="exact share", xscale="log")
    axes.set_xticks([0.03, 0.1, 0.3, 1])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")


def draw_accuracy(axes, claim: str, runs: dict) -> None:
    """The accuracy, its mean between least and most, by epoch; by time where that is the claim."""
    axes.set_prop_cycle(STYLES)
    across = "minutes" if claim == "steps" else "epoch"
    for name, known in runs.items():
        # The n-th evaluation of each run that didn't diverge.
        points = list(zip(*[r["evaluations"] for r in known if not r["diverged"]]))
        x = [mean(point[across] for point in same) for same in points]
        y = [[point["accuracy"] for point in same] for same in points]
        means = [mean(values) for values in y]
        low = [min(values) for values in y]
        high = [max(values) for values in y]
        (line,) = axes.plot(x, means, label=name)
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15)
    label = "minutes of rollout and update" if claim == "steps" else "epoch"
    axes.set(xlabel=label, ylabel="accuracy")


def draw(claims: list[str], records: list[dict], path: Path) -> None:
    """A panel for each claim, which can be read when the figure is 800 pixels wide."""
    columns = min(3, len(claims))
    rows = math.ceil(len(claims) / columns)
    figure = Figure(figsize=(3.7 * columns, 3.3 * rows), layout="constrained")
    places = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for claim, axes in zip(claims, places.flat):
        runs = runs_of(claim, records)
        if claim == "kl":
            draw_kl(axes, runs, judgements(claim, records))
        else:
            draw_accuracy(axes, claim, runs)
        axes.set_title(claim, weight="bold")
        axes.set_ylim(0.3, 1.03)  # This leaves room for the legend.
        axes.tick_params(labelleft=True)
        axes.legend(fontsize=9, loc="lower right")
    for axes in places.flat[len(claims) :]:
        axes.remove()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=[*CLAIMS, "all"], metavar="NAME")
    parser.add_argument("--variants", nargs="+", default=[], help="these alone, as the tables say")
    parser.add_argument("--seeds", type=int, default=3, help="how many (rates: 1 at the most)")
    parser.add_argument("--first-seed", type=int, default=0, help="rates: always 100")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/claims"))
    args = parser.parse_args()
    names = args.names
    if "all" in names:
        names = [name for name in CLAIMS if name != "rates"]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "claims.jsonl"
    records = read_records(path)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    left = runs_left([n for n in names if n != "rates"], args.variants, seeds, records)
    if "rates" in names:
        left += runs_left(["rates"], args.variants, [100][: args.seeds], records)
    try:
        for settings in tqdm(left, desc="runs", disable=None):
            measure(settings, path)
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on")
    records = read_records(path)
    text = tables(records)
    (args.output_dir / "claims.md").write_text(text, encoding="utf-8")
    print(text)
    drawn = [claim for claim in measured(records) if claim not in ("variants", "rates")]
    if drawn:
        draw(drawn, records, args.output_dir / "claims.png")
    print(f"The tables and the figure are in {args.output_dir}")


if __name__ == "__main__":
    main()
