"""Climbs the ladder on CIFAR-10 with three seeds: CLIP -> EVA -> CLIP -> EVA -> CLIP, and a longer run from random.

Every rung is one `evaclip train` command, printed before it runs. What is done stays done: after a stop, it goes
on where it was. Needs CIFAR-10: see the README.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from measure import write_result

from evaclip.recipes import RECIPES

SEEDS = (0, 1, 2)
RUNS = Path("runs/ladder")
PICTURE = Path("docs/ladder.png")
CLIP, MIM = RECIPES["ladder_clip"](), RECIPES["ladder_mim"]()
# Rung -> its command. A name in braces is the folder of another rung of the same seed.
COMMANDS = {
    "clip_0": ["ladder_clip"],
    "mim_1": ["ladder_mim", "--objective.teacher", "{clip_0}"],
    "clip_1": ["ladder_clip", "--vision-init", "{mim_1}"],
    "mim_2": ["ladder_mim", "--objective.teacher", "{clip_1}"],
    "clip_2": ["ladder_clip", "--vision-init", "{mim_2}"],
    "clip_0_long": ["ladder_clip", "--steps", str(2 * CLIP.steps), "--evals.every", str(2 * CLIP.evals.every)],
}
TITLES = {
    "clip_0": "from random",
    "clip_1": "from the EVA that it taught",
    "clip_2": "from the EVA that the second taught",
    "clip_0_long": "from random, twice as long",
}
COLORS = {"clip_0": "#7a7f87", "clip_1": "#2a7f4f", "clip_2": "#1f5fa8", "clip_0_long": "#c9a227"}


def climb(seed: int) -> None:
    """All rungs of a seed; those that are done take a few seconds."""
    folders = {name: str(RUNS / f"seed{seed}" / name) for name in COMMANDS}
    for name, words in COMMANDS.items():
        command = ["train", *(word.format(**folders) for word in words)]
        command += ["--seed", str(seed), "--run-dir", folders[name], "--resume", "auto"]
        print("evaclip", *command, flush=True)
        status = subprocess.run([sys.executable, "-m", "evaclip", *command]).returncode
        if status:  # what was wrong has been said; a stop is no error of the script's either
            sys.exit(status)


def scores(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Pairs seen [points], and zero-shot accuracy in percent [seeds, points]."""
    found = []
    for seed in SEEDS:
        lines = map(json.loads, (RUNS / f"seed{seed}" / name / "log.jsonl").read_text().splitlines())
        found.append(
            {line["step"]: line["zero_shot/cifar10/top1"] for line in lines if "zero_shot/cifar10/top1" in line}
        )
    steps = sorted(set.intersection(*(set(one) for one in found)))
    return CLIP.batch_size * np.array(steps), 100 * np.array([[one[step] for step in steps] for one in found])


def draw(curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """The mean of the seeds as a line, the span from the worst to the best of them as a band."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, (pairs, values) in curves.items():
        axes.plot(pairs / 1000, values.mean(0), "o-", markersize=3, color=COLORS[name], label=TITLES[name])
        axes.fill_between(pairs / 1000, values.min(0), values.max(0), color=COLORS[name], alpha=0.2, linewidth=0)
    axes.set_title(f"CIFAR-10, zero-shot, {len(SEEDS)} seeds", loc="left", fontsize=10)
    axes.set_xlabel("image-text pairs seen, thousands")
    axes.set_ylabel("top-1, %")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(PICTURE, dpi=150)


def pairs_needed(curve: tuple[np.ndarray, np.ndarray], goal: float) -> str:
    """Pairs after which the mean over the seeds reaches a score, between two points by a straight line."""
    pairs, values = curve[0], curve[1].mean(0)
    above = np.flatnonzero(values >= goal)
    if not len(above):
        return "not reached"
    if not above[0]:
        return f"at most {pairs[0]:,}"
    last = above[0]
    share = (goal - values[last - 1]) / (values[last] - values[last - 1])
    return f"{pairs[last - 1] + share * (pairs[last] - pairs[last - 1]):,.0f}"


def row(name: str, curve: tuple[np.ndarray, np.ndarray], goal: float) -> Sequence[str]:
    """A line of the table."""
    pairs, values = curve
    ends = ", ".join(f"{value:.2f}" for value in values[:, -1])
    before = {"clip_1": 1, "clip_2": 2}.get(name, 0) * MIM.steps * MIM.batch_size
    return (
        TITLES[name],
        f"{pairs[-1]:,}",
        f"{before:,}",
        ends,
        f"**{values[:, -1].mean():.2f}**",
        pairs_needed(curve, goal),
    )


def main() -> None:
    """Climb, draw, and write the result."""
    for seed in SEEDS:
        climb(seed)
    curves = {name: scores(name) for name in TITLES}
    draw(curves)
    goal = curves["clip_0"][1][:, -1].mean()
    write_result(
        "ladder",
        "The ladder: CLIP teaches EVA, EVA starts CLIP",
        ["the CLIP run starts", "pairs", "images of masked modelling before it", "top-1 of the seeds, %", "mean",
         "pairs until it scores as the run from random at its end"],
        [row(name, curve, goal) for name, curve in curves.items()],
        "CIFAR-10's 10,000 test images, zero-shot; training images re-encoded as JPEG. Tower: EVA-02, "
        f"{CLIP.model.vision.depth} blocks of width {CLIP.model.vision.width}, "
        f"{CLIP.objective.seen(CLIP.model.vision.patches)}; batch {CLIP.batch_size}. A rung of masked modelling: "
        f"{MIM.steps} steps of {MIM.batch_size} images, captions unused; the teacher's own pairs are not counted. The "
        "same recipe, rates included, for every CLIP run.",
    )  # fmt: skip


if __name__ == "__main__":
    main()
