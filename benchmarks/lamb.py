"""LAMB: the cost of a step beside timm's, and what becomes of a plain LAMB under DeepSpeed's ZeRO-1.

The second part feeds the same gradients to a float64 LAMB, to ours and to timm's Lamb, both under ZeRO-1, for 20 steps,
and draws how far each tensor's weights are from the first.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from measure import best_seconds, write_result
from timm.optim import Lamb as TimmLamb

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' reference LAMB and ranks

from evaclip.engine import EngineConfig
from evaclip.engine.zero import ZeroEngine
from evaclip.models.clip import Clip
from evaclip.models.shapes import shape_named
from evaclip.optim import Lamb
from tests.ranks import in_ranks
from tests.test_engine_ranks import Given, advance, lamb_in_float64, optim_config

STEPS, DECAY = 20, 0.05


class PlainLamb:
    """timm's Lamb in the place of ours: parameter groups as usual, trust ratios over whatever it is handed."""

    clip_norm = 2.0

    def build(self, student, layers, *, flat):
        groups = optim_config(DECAY).build(student, layers).param_groups
        groups = [{k: g[k] for k in ("params", "lr", "peak_lr", "weight_decay", "names")} for g in groups]
        return TimmLamb(groups, betas=(0.9, 0.98), eps=1e-6, max_grad_norm=None)

    def spread(self, *_):
        pass


def distances(whose: str, right: dict) -> dict[str, float]:
    """Relative distance of each matrix of weights to the float64 LAMB's, after 20 steps."""
    optim = PlainLamb() if whose == "timm" else optim_config(DECAY)
    engine = ZeroEngine(EngineConfig(device="cpu", precision="fp32", kind="zero1"), Given(), optim)
    advance(engine, 0, STEPS)
    weights = engine.state_dict()["model"]
    moved = {n: (right[n] - p.detach().double()).norm() for n, p in Given().student.named_parameters()}
    return {n: ((weights[n].double() - w).norm() / moved[n]).item() for n, w in right.items() if w.ndim > 1}


def step_cost() -> list[list[str]]:
    """A step over B/16's parameters."""
    rows, seconds = [], {}
    for whose in ("ours", "timm"):
        parameters = list(Clip(shape_named("EVA02-B-16")).parameters())
        for p in parameters:
            p.grad = torch.randn_like(p)
        if whose == "ours":
            optimizer: torch.optim.Optimizer = Lamb(parameters, weight_decay=0.05)
        else:
            optimizer = TimmLamb(parameters, weight_decay=0.05, max_grad_norm=None)
        seconds[whose] = best_seconds(optimizer.step, repeats=3)
    count = sum(p.numel() for p in parameters)
    one, other = torch.zeros(count), torch.ones(count)
    copied = best_seconds(lambda: one.copy_(other))
    least = 7 * 4 * count / 1e9  # read x, g, m, v; write x, m, v
    for whose in seconds:
        rows.append([f"step of EVA02-B-16 on one process, {whose}", f"{seconds[whose]:.2f} s",
                     f"{least / seconds[whose]:.1f} GB/s of the {least:.1f} GB that must move"])  # fmt: skip
    rows.append(["copying as many numbers once", f"{copied:.2f} s", f"{8 * count / 1e9 / copied:.1f} GB/s"])
    return rows


def draw(found: dict[str, dict[int, list[float]]]) -> None:
    """The distances as a picture for the README."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for offset, (whose, color) in enumerate((("ours", "#1f77b4"), ("timm", "#d62728"))):
        for world, values in found[whose].items():
            x = world + (offset - 0.5) * 0.3 + np.linspace(-0.1, 0.1, len(values))
            label = {"ours": "evaclip's LAMB", "timm": "a LAMB that knows nothing of ZeRO"}[whose]
            axes.plot(x, values, ".", color=color, markersize=4, label=label if world == 1 else None)
    axes.set(yscale="log", xlabel="processes under DeepSpeed ZeRO-1", xticks=[1, 2, 4], ylabel="distance / way gone")
    axes.set_title("Weights after 20 steps, against float64 LAMB (a dot is a tensor)")
    axes.grid(alpha=0.3)
    axes.legend(loc="center right", frameon=False)
    figure.savefig(Path(__file__).parents[1] / "docs" / "lamb_under_zero.png", dpi=110)


def main() -> None:
    """Both parts."""
    rows = step_cost()
    right = lamb_in_float64(DECAY, STEPS)
    found: dict[str, dict[int, list[float]]] = {"ours": {}, "timm": {}}
    for whose, by_world in found.items():
        for world in (1, 2, 4):
            by_world[world] = sorted(in_ranks(world, distances, whose, right)[0].values())
            middle, worst = by_world[world][len(by_world[world]) // 2], by_world[world][-1]
            name = "evaclip's LAMB" if whose == "ours" else "timm's Lamb"
            rows.append([f"{name} under ZeRO-1, {world} processes, 20 steps", f"{middle:.1e}", f"worst {worst:.1e}"])
    draw(found)
    write_result(
        "lamb", "LAMB: cost of a step, and distance from float64 LAMB under DeepSpeed ZeRO-1",
        ["what", "result", "remark"], rows,
        "Distances: of a matrix's weights to those of a float64 LAMB fed the same gradients, over the way that these "
        "have gone; the median over the matrices of a small dual tower with layer decay, and the worst.",
    )  # fmt: skip


if __name__ == "__main__":
    main()
