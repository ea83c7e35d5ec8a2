"""Measure the built-in run, and the paper's figures in miniature, over many seeds.

    python tests/miniature.py learning     the built-in run with 1, 2 and 4 threads, and its control
    python tests/miniature.py figure5      RFT, Online RFT, GRPO, GRPO with process supervision
    python tests/miniature.py figure6      a learned reward model, renewed or not
    python tests/miniature.py figure7      maj@k and pass@k, before and after
    python tests/miniature.py trouble      what runs that go wrong look like in the log
    python tests/miniature.py exercises    the built-in run with one flag changed
    python tests/miniature.py memory       what GRPO keeps in memory, and what PPO would
    python tests/miniature.py all --seeds 10

Each command runs what is missing in runs/miniature, one process per core. Ctrl-C stops it, and the
same command goes on. At the end it writes its section of tests/RESULTS.md, and its picture in
.github if matplotlib is installed.

Rows are compared seed by seed, by an exact sign-flip test (see `paired_p`). With ten seeds its p
is at least 0.002. A difference is printed where p is below 0.01.
"""

import argparse
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from tqdm import tqdm

from eval import versions
from reward import accuracy_rewards

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tests" / "RESULTS.md"
RUNS = Path("runs/miniature")  # seen from ROOT, where all commands run
SPLITS = {"in": "in domain (4 or 5 terms)", "out": "out of domain (6 terms)"}

# Rows and their commands. S is the seed; where a run goes follows from the row's name.
BUILT_IN = "train.py --seed S --threads 1"
# Most other runs begin with the model after the warm-up of the same seed, and vary the RL alone.
AFTER_WARM_UP = (
    f"train.py --seed S --threads 1 --model {RUNS}/built-in-S/sft --problems arithmetic"
    " --questions 16 --max-new-tokens 40"
)
AS_BUILT_IN = f"{AFTER_WARM_UP} --lr 2e-4 --lr-end 0.1 --steps 60 --eval-every 20"
LEARNING = {
    "built-in": BUILT_IN,
    "2-threads": "train.py --seed S --threads 2",
    "4-threads": "train.py --seed S --threads 4",
    "shuffled": f"{AS_BUILT_IN} --reward tests/miniature.py:shuffled",
}
# The learning rate is half of the built-in run's, so that the curves reach the ceiling late.
SLOWLY = f"{AFTER_WARM_UP} --lr 1e-4 --steps 96 --eval-every 32 --eval-samples 4"
FIGURE5 = {
    "rft": f"{SLOWLY} --advantage indicator --kl-beta 0 --sample-from reference",
    "online-rft": f"{SLOWLY} --advantage indicator --kl-beta 0",
    "grpo": SLOWLY,
    "grpo-process": f"{SLOWLY} --supervision process",
    "online-rft-kl": f"{SLOWLY} --advantage indicator",
    "grpo-no-kl": f"{SLOWLY} --kl-beta 0",
}
MODEL = f"{AFTER_WARM_UP} --reward model --reward-lr 1e-3 --eval-every 20 --eval-samples 4"
FAST = f"{MODEL} --lr 3e-4 --iterations 1 --steps 60"
FIGURE6 = {
    "renewed": f"{MODEL} --lr 1e-4 --iterations 4 --steps 20",
    "once": f"{MODEL} --lr 1e-4 --iterations 1 --steps 80",
    "fast": FAST,
    "fast-kl": f"{FAST} --kl-beta 0.4",
    "fast-no-kl": f"{FAST} --kl-beta 0",
}
MANY_SAMPLES = (
    "eval.py --threads 1 --problems arithmetic --limit 200 --samples 32 --temperature 0.7"
    f" --max-new-tokens 40 --model {RUNS}/built-in-S"
)
FIGURE7 = {
    "before-in": f"{MANY_SAMPLES}/sft --split in",
    "after-in": f"{MANY_SAMPLES} --split in",
    "before-out": f"{MANY_SAMPLES}/sft --split out",
    "after-out": f"{MANY_SAMPLES} --split out",
}
TROUBLE = {
    "built-in": BUILT_IN,
    "lr-2e-3": AS_BUILT_IN.replace("--lr 2e-4", "--lr 2e-3"),
    "cut-off": AS_BUILT_IN.replace("--max-new-tokens 40", "--max-new-tokens 12"),
    "untaught": f"{BUILT_IN} --sft-steps 0",
}
TELLTALE = {"lr-2e-3": "kl", "cut-off": "truncated", "untaught": "entropy"}  # columns of the log
EXERCISES = {
    "built-in": BUILT_IN,
    "no-kl": f"{AS_BUILT_IN} --kl-beta 0",
    "no-std": f"{AS_BUILT_IN} --scale-rewards none",
    "mu-4": f"{AS_BUILT_IN} --mu 4",
    "groups-of-2": f"{AS_BUILT_IN} --questions 64 --group-size 2",
}
MEMORY = {"memory": "tests/bench.py --memory"}


def shuffled(prompts, completions, answer):
    """Give each completion the accuracy of another of its group of 8: there is nothing to learn."""
    rewards = accuracy_rewards(prompts, completions, answer)
    groups = [rewards[i : i + 8] for i in range(0, len(rewards), 8)]
    return [reward for group in groups for reward in random.sample(group, len(group))]


# --- Running what is missing --------------------------------------------------------------------


class Job(NamedTuple):
    words: tuple[str, ...]  # of the command, after "python"
    out: Path  # a run's folder, the results of eval.py, or the text that a command prints
    threads: int

    def is_done(self):
        """Tell whether the command has ended well."""
        return (self.out / "summary.json" if self.words[0] == "train.py" else self.out).exists()


def make_job(row, command, seed):
    """Return the Job of one row with one seed."""
    words = tuple(re.sub(r"\bS\b", str(seed), command).split())
    out = RUNS / (f"{row}-{seed}" if re.search(r"\bS\b", command) else row)
    if words[0] not in ("train.py", "eval.py"):  # it prints its results, and runs alone
        return Job(words, ROOT / out.with_suffix(".txt"), os.cpu_count())
    if words[0] == "eval.py":
        out = out.with_suffix(".json")
    threads = int(words[words.index("--threads") + 1])
    return Job((*words, "--out", str(out)), ROOT / out, threads)


def perform(job):
    """Run a job to its end, from where it was stopped. Raises RuntimeError if it fails."""
    words = job.words
    if (job.out / "run.json").exists():
        words = ("train.py", "--resume", words[-1])
    text = job.out.with_suffix(".log")
    with text.open("w") as log:
        code = subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            env=os.environ | {"TQDM_DISABLE": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        ).returncode
    if code:
        raise RuntimeError(f"python {' '.join(words)} ended with status {code}: see {text}")
    if job.out.suffix == ".txt":
        text.rename(job.out)


def run_missing(jobs):
    """Run the jobs that are not done, those with fewer threads first. Returns how many."""
    (ROOT / RUNS).mkdir(parents=True, exist_ok=True)
    missing = [job for job in jobs if not job.is_done()]
    for threads in sorted({job.threads for job in missing}):
        group = [job for job in missing if job.threads == threads]
        with ThreadPoolExecutor(max(1, os.cpu_count() // threads)) as pool:
            try:
                list(tqdm(pool.map(perform, group), total=len(group), desc="runs"))
            except BaseException:
                pool.shutdown(cancel_futures=True)  # waits for those that have begun
                raise
    return len(missing)


# --- Reading what they wrote --------------------------------------------------------------------


def read_log(row, seed):
    """Return the log of a run, {step: its columns}; where a step was evaluated, with "eval"."""
    steps = {}
    for line in (ROOT / RUNS / f"{row}-{seed}" / "metrics.jsonl").read_text().splitlines():
        logged = json.loads(line)
        steps.setdefault(logged["step"], {}).update(logged)
    return steps


def read_column(row, column, steps, seeds):
    """Return a column of the log at some steps, (seeds, steps)."""
    logs = [read_log(row, seed) for seed in seeds]
    return np.array([[log[step][column] for step in steps] for log in logs])


def read_accuracy(row, split, steps, seeds, measure="sampled"):
    """Return a measure of the evaluations at some steps, (seeds, steps)."""
    evals = read_column(row, "eval", steps, seeds)
    return np.array([[scores[split][measure] for scores in run] for run in evals])


def read_scores(row, measures, seeds):
    """Return some measures, such as maj@8, from the results of eval.py, (seeds, measures)."""
    paths = [ROOT / RUNS / f"{row}-{seed}.json" for seed in seeds]
    results = [json.loads(path.read_text())["scores"] for path in paths]
    return np.array([[scores[measure] for measure in measures] for scores in results])


# --- Tables -------------------------------------------------------------------------------------


def paired_p(a, b):
    """Return the p-value of an exact sign-flip test of two rows of values, one per seed.

    If the rows did not differ, each seed's difference would have either sign with equal chance. p
    is the share of all 2^n choices of signs whose sum is at least as far from 0 as the one found.
    """
    differences = np.subtract(a, b)
    signs = np.array(list(itertools.product([1, -1], repeat=len(differences))))
    return float(np.mean(abs(signs @ differences) >= abs(differences.sum()) - 1e-9))


def table(title, rows, against):
    """Format {row: values, one per seed}. against: {row: the row that it is compared with}."""
    seeds = len(next(iter(rows.values())))
    lines = [["", "mean", "sd", *map(str, range(seeds)), "compared seed by seed"]]
    lines.append(["---"] * len(lines[0]))
    for row, values in rows.items():
        cells = [row, f"{np.mean(values):.3f}", f"{np.std(values, ddof=1):.3f}"]
        cells += [f"{value:.3f}" for value in values]
        cells.append(compare(rows, row, against[row]) if row in against else "")
        lines.append(cells)
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"\n### {title}\n\n{text}\n"


def compare(rows, row, other):
    """Say by how much a row exceeds another, or that the seeds do not tell."""
    p = paired_p(rows[row], rows[other])
    difference = np.mean(np.subtract(rows[row], rows[other]))
    return f"{difference:+.3f} against {other}, p = {p:.2g}" + ": not told apart" * bool(p >= 0.01)


def tabulate_learning(seeds):
    """Compare before and after, as table 5 of the paper does, and the threads."""
    text = ""
    for split, measure in itertools.product(SPLITS, ("sampled", "greedy", "maj@8", "pass@8")):
        rows = {}
        for row in LEARNING:
            before, after = read_accuracy(row, split, (0, 60), seeds, measure).T
            rows |= {f"{row}, before": before, f"{row}, after": after}
        against = {f"{row}, after": f"{row}, before" for row in LEARNING}
        text += table(f"{measure}, {SPLITS[split]}", rows, against)
    return text


def tabulate_figure5(seeds):
    """Compare the methods after a third and all of the completions, 128 per step."""
    against = {"rft": "online-rft", "online-rft": "grpo", "grpo-process": "grpo"}
    against |= {"online-rft-kl": "grpo", "grpo-no-kl": "online-rft", "grpo": "grpo-no-kl"}
    text = ""
    for step, split in ((32, "in"), (96, "in"), (32, "out"), (96, "out")):
        rows = {row: read_accuracy(row, split, [step], seeds)[:, 0] for row in FIGURE5}
        text += table(f"{128 * step:,} completions, {SPLITS[split]}", rows, against)
    return text


def tabulate_figure6(seeds):
    """Compare a renewed reward model with one that stays, and the reward with the truth."""
    text = ""
    for step in (20, 40, 60, 80):
        rows = {row: read_accuracy(row, "in", [step], seeds)[:, 0] for row in ("renewed", "once")}
        text += table(f"Step {step}, sampled, {SPLITS['in']}", rows, {"renewed": "once"})
    for step in (1, 20, 40, 60):
        columns = ("reward", "right", "agree")
        rows = {column: read_column("fast", column, [step], seeds)[:, 0] for column in columns}
        text += table(f"fast, training samples of step {step}", rows, {"reward": "right"})
    against = {"fast-kl": "fast", "fast-no-kl": "fast"}
    fast = ("fast", *against)
    rows = {row: read_column(row, "right", [60], seeds)[:, 0] for row in fast}
    text += table("right, training samples of step 60, and the KL term", rows, against)
    for split in SPLITS:
        rows = {row: read_accuracy(row, split, [60], seeds)[:, 0] for row in fast}
        text += table(f"The KL term, step 60, sampled, {SPLITS[split]}", rows, against)
    return text


def tabulate_figure7(seeds):
    """Compare maj@k and pass@k before and after."""
    text = ""
    for split, kind, k in itertools.product(SPLITS, ("maj", "pass"), (1, 8, 32)):
        whens = ("before", "after")
        measure = f"{kind}@{k}"
        rows = {when: read_scores(f"{when}-{split}", [measure], seeds)[:, 0] for when in whens}
        text += table(f"{measure}, {SPLITS[split]}", rows, {"after": "before"})
    return text


def tabulate_trouble(seeds):
    """Compare the column of the log that tells, and the accuracy, with the built-in run."""
    text = ""
    for row, column in TELLTALE.items():
        rows = {name: read_column(name, column, [20], seeds)[:, 0] for name in ("built-in", row)}
        text += table(f"{column}, step 20", rows, {row: "built-in"})
    for split in SPLITS:
        rows = {row: read_accuracy(row, split, [60], seeds)[:, 0] for row in TROUBLE}
        text += table(f"sampled, {SPLITS[split]}", rows, dict.fromkeys(TELLTALE, "built-in"))
    return text


def tabulate_exercises(seeds):
    """Compare each flag with the run as it is."""
    against = dict.fromkeys(list(EXERCISES)[1:], "built-in")
    text = ""
    for split in SPLITS:
        rows = {row: read_accuracy(row, split, [60], seeds)[:, 0] for row in EXERCISES}
        text += table(f"sampled, {SPLITS[split]}", rows, against)
    return text


def tabulate_memory(seeds):
    """Return what bench.py has printed."""
    return f"\n```\n{(ROOT / RUNS / 'memory.txt').read_text()}```\n"


# --- Pictures -----------------------------------------------------------------------------------

BLUE, ORANGE, GREEN, RED, VIOLET = "#3b82f6", "#e8590c", "#2f9e44", "#c2255c", "#7048e8"
GREY = "#808790"  # readable on white and on black: the pictures have no background of their own


def draw(panel, x, rows, colour, label, style="-", band=True):
    """Draw the mean of rows (seeds, len(x)), and a band from the lowest to the highest."""
    if band:
        panel.fill_between(x, rows.min(axis=0), rows.max(axis=0), color=colour, alpha=0.15)
    panel.plot(x, rows.mean(axis=0), style, color=colour, label=label, linewidth=1.6)


def draw_learning(panels, seeds):
    """Draw the reward in training, and the held-out accuracy."""
    steps = range(1, 61)
    for row, colour, label in (("built-in", BLUE, "GRPO"), ("shuffled", GREY, "rewards shuffled")):
        draw(panels[0], steps, read_column(row, "reward", steps, seeds), colour, label)
    panels[0].set(title="reward of the training samples", xlabel="step", ylabel="share right")
    steps = (0, 20, 40, 60)
    labels = {"in": "in: 4 or 5 terms", "out": "out: 6 terms"}
    for split, colour in (("in", ORANGE), ("out", GREEN)):
        accuracy = read_accuracy("built-in", split, steps, seeds)
        draw(panels[1], steps, accuracy, colour, labels[split])
    panels[1].set(title="held-out problems, sampled", xlabel="step")


def draw_figure5(panels, seeds):
    """Draw the accuracy of each method against the completions sampled."""
    steps = (0, 32, 64, 96)
    colours = (GREY, BLUE, ORANGE, GREEN, VIOLET, RED)
    for panel, split in zip(panels, SPLITS, strict=True):
        for row, colour in zip(FIGURE5, colours, strict=True):
            accuracy = read_accuracy(row, split, steps, seeds)
            draw(panel, [128 * step for step in steps], accuracy, colour, row, band=False)
        panel.set(title=SPLITS[split], xlabel="completions", ylabel="sampled accuracy")


def draw_figure6(panels, seeds):
    """Draw the accuracy under a learned reward, and how a policy deceives it."""
    steps = (0, 20, 40, 60, 80)
    for row, colour in (("renewed", BLUE), ("once", ORANGE)):
        draw(panels[0], steps, read_accuracy(row, "in", steps, seeds), colour, row)
    panels[0].set(title="held-out problems, sampled", xlabel="step", ylabel="share right")
    steps = range(1, 61)
    for row, column, colour, label in (
        ("fast", "reward", RED, "by the reward model"),
        ("fast", "right", GREEN, "by the rule"),
        ("fast-kl", "right", BLUE, "by the rule, --kl-beta 0.4"),
    ):
        draw(panels[1], steps, read_column(row, column, steps, seeds), colour, label)
    panels[1].set(title="fast: training samples, --lr 3e-4", xlabel="step")


def draw_figure7(panels, seeds):
    """Draw maj@k and pass@k against k."""
    ks = (1, 2, 4, 8, 16, 32)
    for panel, split in zip(panels, SPLITS, strict=True):
        for kind, colour in (("pass", BLUE), ("maj", ORANGE)):
            for when, style in (("before", "--"), ("after", "-")):
                shares = read_scores(f"{when}-{split}", [f"{kind}@{k}" for k in ks], seeds)
                draw(panel, ks, shares, colour, f"{kind}@k {when}", style)
        panel.set_xscale("log", base=2)
        panel.set(title=SPLITS[split], xlabel="k", xticks=ks, xticklabels=ks)


def draw_trouble(panels, seeds):
    """Draw the column of the log that tells, for each kind of trouble."""
    steps = range(1, 61)
    units = {
        "kl": "kl, nats per token",
        "truncated": "truncated, share",
        "entropy": "entropy, nats",
    }
    for panel, (row, column) in zip(panels, TELLTALE.items(), strict=True):
        draw(panel, steps, read_column("built-in", column, steps, seeds), GREY, "built-in")
        draw(panel, steps, read_column(row, column, steps, seeds), RED, row)
        panel.set(title=units[column], xlabel="step")


def save_picture(path, part, seeds):
    """Draw the panels of a part, to be read on white and on black."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print(f"no {path.name}: pip install matplotlib")
        return
    grey = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    plt.rcParams.update(dict.fromkeys(grey, GREY) | {"font.size": 11})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(1, part.panels, figsize=(9, 3.2), layout="constrained")
    part.draw(panels, seeds)
    for panel in panels:
        if panel.get_autoscaley_on():  # it has no limits of its own
            panel.set_ylim(0, max(1.02, panel.get_ylim()[1]))
        panel.grid(color=GREY, alpha=0.25)
        panel.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110, transparent=True)
    plt.close(figure)


# --- The command line ---------------------------------------------------------------------------


class Part(NamedTuple):
    title: str
    commands: dict[str, str]
    tabulate: Callable
    draw: Callable | None = None
    panels: int = 2


PARTS = {
    "learning": Part("The built-in run", LEARNING, tabulate_learning, draw_learning),
    "figure5": Part("Figure 5: four methods", FIGURE5, tabulate_figure5, draw_figure5),
    "figure6": Part("Figure 6: a learned reward", FIGURE6, tabulate_figure6, draw_figure6),
    "figure7": Part("Figure 7: maj@k and pass@k", FIGURE7, tabulate_figure7, draw_figure7),
    "trouble": Part("What trouble looks like", TROUBLE, tabulate_trouble, draw_trouble, 3),
    "exercises": Part("Exercises: one flag changed", EXERCISES, tabulate_exercises),
    "memory": Part("Memory", MEMORY, tabulate_memory),
}


def write_section(part, seeds):
    """Put the section of a part into RESULTS.md, and leave the others as they are."""
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else ""
    sections = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", text, re.M))
    jobs = [make_job(row, command, "S") for row, command in part.commands.items()]
    commands = "\n".join(f"python {' '.join(job.words)}" for job in jobs)
    known = ", ".join(f"{name} {version.split()[0]}" for name, version in versions().items())
    seeded = re.search(r"\bS\b", commands)
    where = f"Seeds S from {seeds[0]} to {seeds[-1]}, on" if seeded else "On"
    sections[part.title] = (
        f"{where} {os.cpu_count()} CPU cores. {known}.\n\n"
        f"```\n{commands}\n```\n{part.tabulate(seeds)}"
    )
    lines = [
        "# Results",
        "",
        "Written by `python tests/miniature.py`, which says how rows are compared, and by",
        "`python tests/smollm2.py`.",
    ]
    for title in dict.fromkeys([*(known.title for known in PARTS.values()), *sections]):
        if title in sections:
            lines += ["", f"## {title}", "", sections[title].strip()]
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main():
    """Run what is missing of one part or of all, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--seeds", type=int, default=10, help="how many, from 0 on")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("--seeds must be at least 2: a spread needs two")
    for name in PARTS if args.part == "all" else [args.part]:
        run_part(name, PARTS[name], range(args.seeds))


def run_part(name, part, seeds):
    """Run what is missing of a part, and write its section and its picture."""
    if any("built-in-S" in command for command in part.commands.values()):
        # These runs begin with models that have to be there before the first of them.
        run_missing([make_job("built-in", BUILT_IN, seed) for seed in seeds])
    rows = itertools.product(part.commands.items(), seeds)
    jobs = dict.fromkeys(make_job(*row, seed) for row, seed in rows)  # each of them once
    print(f"{name}: {run_missing(jobs)} of {len(jobs)} were missing")
    write_section(part, seeds)
    if part.draw:
        save_picture(ROOT / ".github" / f"{name}.png", part, seeds)


def run_or_stop(main):
    """Run a main function; Ctrl-C and a job that failed end it with one line."""
    try:
        main()
    except (KeyboardInterrupt, RuntimeError) as error:
        sys.exit(f"{error or 'stopped'}; the same command goes on")


if __name__ == "__main__":
    run_or_stop(main)
