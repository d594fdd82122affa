"""How long a checkpoint stops the training: the copy that is staged, against all of the writing."""

import tempfile
import time
from pathlib import Path

import torch
from measure import write_result

from evaclip.checkpoint import Writer
from evaclip.models.clip import Clip
from evaclip.models.shapes import shape_named
from evaclip.plan import PlanCommand, plan
from evaclip.recipes import recipe_named

RECIPES = ("eva02_clip_b16", "eva02_clip_l14")
GPUS = 64


def state(name: str) -> dict[str, dict[str, torch.Tensor]]:
    """Weights and both moments of a published shape, in float32."""
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in Clip(shape_named(name)).named_parameters()}
    weights = {n: torch.randn(shape) for n, shape in shapes.items()}
    moments = {f"{n}/{key}": torch.randn(s) for n, s in shapes.items() for key in ("exp_avg", "exp_avg_sq")}
    return {"model": weights, "optimizer": moments}


def seconds(work: object) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - start


def main() -> None:
    """Three checkpoints of each shape; the first one also makes the staging memory and is not counted."""
    rows = []
    for recipe in RECIPES:
        config = recipe_named(recipe)()
        tensors = state(config.model.name)
        flat = [t for named in tensors.values() for t in named.values()]
        size = sum(t.nbytes for t in flat)
        into = [torch.empty_like(t) for t in flat]
        for _ in range(2):
            copy = seconds(lambda into=into, flat=flat: [a.copy_(b) for a, b in zip(into, flat, strict=True)])
        del into
        with tempfile.TemporaryDirectory() as folder:
            writer = Writer(Path(folder), keep=2)
            stalls, behind = [], []
            for step in range(1, 4):
                stalls.append(seconds(lambda w=writer, step=step, given=tensors: w.write(step, given, {})))
                behind.append(seconds(writer.finish))
        stall = min(stalls[1:])
        step = plan(config, PlanCommand(gpus=GPUS)).step_seconds
        rows.append(
            [config.model.name, f"{size / 1e9:.2f}", f"{copy:.2f}", f"{stall:.2f}", f"**{stall / copy:.2f}x**",
             f"{min(behind):.1f}", f"{stall / (config.checkpoint.every * step):.3%}"]
        )  # fmt: skip
    write_result(
        "checkpoint", "A checkpoint beside the training",
        ["model", "GB", "plain copy, s", "training stops, s", "stop over copy", "written behind it, s",
         f"share of the training's time ({GPUS} GPUs, predicted step)"], rows,
        "Hashing and writing go on in a thread while the next steps run. The last column sets the measured stop "
        "against 500 steps as `evaclip plan` predicts them; no GPU was there to measure.",
    )  # fmt: skip


if __name__ == "__main__":
    main()
