"""Draw learning.png, the picture of the README, from the logs of runs (pip install matplotlib).

for S in 0 1 2; do python train.py --seed $S --eval-every 4 --out runs/picture-$S; done
python .github/picture.py runs/picture-0 runs/picture-1 runs/picture-2
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

GREY = "#808790"  # readable on white and on black: the picture has no background of its own
plt.rcParams.update(
    {
        "text.color": GREY,
        "axes.labelcolor": GREY,
        "axes.edgecolor": GREY,
        "xtick.color": GREY,
        "ytick.color": GREY,
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)
figure, panels = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
for seed, folder in enumerate(sys.argv[1:]):
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    panels[0].plot(
        [row["step"] for row in rows[1:]],
        [row["reward"] for row in rows[1:]],
        color="#3b82f6",
        alpha=0.85,
        linewidth=1.3,
        label="" if seed else "a line for each seed",
    )
    for split, colour, label in (
        ("in", "#e8590c", "as long as in training"),
        ("out", "#2f9e44", "longer than in training"),
    ):
        points = [(row["step"], row["eval"][split]["sampled"]) for row in rows if "eval" in row]
        panels[1].plot(
            *zip(*points, strict=True),
            color=colour,
            alpha=0.85,
            linewidth=1.5,
            label="" if seed else label,
        )
panels[0].set(
    title="reward of the training samples",
    xlabel="step",
    ylim=(0, 1.02),
    ylabel="share of right answers",
)
panels[1].set(title="held-out problems, sampled", xlabel="step")
for panel in panels:
    panel.grid(color=GREY, alpha=0.25)
    panel.legend(frameon=False, loc="lower right")
figure.savefig(Path(__file__).with_name("learning.png"), dpi=110, transparent=True)
