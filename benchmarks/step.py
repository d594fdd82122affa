"""A whole training step, beside open_clip with the same model, batch, masking, captions and precision.

On a GPU: B/16 and L/14 in bfloat16. On a CPU: B/16 in float32 with a small batch. Both see half of the patches, drawn
anew each step, and captions of 20 tokens on average; ours packs them and updates with LAMB, open_clip pads them to 77
and updates with AdamW, as each does by default.
"""

import time
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
from measure import best_seconds, write_result
from text import captions

from evaclip.data.pipeline import Batch
from evaclip.data.shards import DataConfig
from evaclip.data.tokenizer import cut_to_longest
from evaclip.data.transforms import normalized
from evaclip.engine import EngineConfig, build_engine
from evaclip.models.shapes import shape_named
from evaclip.objectives.clip import ClipConfig
from evaclip.optim import OptimConfig
from evaclip.plan import PlanCommand, plan
from evaclip.recipes import recipe_named

ON_GPU = torch.cuda.is_available()
# Model, images of a step.
SIZES = [("EVA02-B-16", 1024), ("EVA02-L-14", 512)] if ON_GPU else [("EVA02-B-16", 16)]
PRECISION = "bf16" if ON_GPU else "fp32"
PEAK_TFLOPS = 989.0  # of an H200, dense bfloat16


def ours(name: str, batch: int, tokens: torch.Tensor) -> Callable[[], object]:
    """A step of evaclip."""
    objective = ClipConfig(mask_ratio=0.5).build(shape_named(name), seed=0)
    engine = build_engine(EngineConfig(precision=PRECISION), objective, OptimConfig())
    size = shape_named(name).vision.image_size
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    given = Batch(images, cut_to_longest(tokens), torch.arange(batch)).to(engine.device)

    def step() -> None:
        engine.forward_backward(given)
        engine.step()

    return step


def theirs(name: str, batch: int, tokens: torch.Tensor) -> Callable[[], object]:
    """A step of open_clip's training loop, data loading left out."""
    device = torch.device("cuda" if ON_GPU else "cpu")
    model = open_clip.create_model(name, force_patch_dropout=0.5, device=device).train()
    loss = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    size = shape_named(name).vision.image_size
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8).to(device)
    given = tokens.to(device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=ON_GPU):
            found = model(normalized(images), given)
            total = loss(found[0], found[1], found[2])
        total.backward()
        optimizer.step()

    return step


def measured(build: Callable[[str, int, torch.Tensor], Callable[[], object]], name: str, batch: int) -> list[float]:
    """Images per second, and peak memory in GB (0 on a CPU)."""
    torch.manual_seed(0)
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    step = build(name, batch, captions(20, batch))

    def finished() -> None:
        step()
        if ON_GPU:
            torch.cuda.synchronize()

    rate = batch / best_seconds(finished, repeats=5 if ON_GPU else 3, clock=time.perf_counter)
    return [rate, torch.cuda.max_memory_allocated() / 1e9 if ON_GPU else 0.0]


def flops_an_image(name: str, batch: int) -> float:
    """Forward and backward, with half of the patches and captions of 20 tokens."""
    config = recipe_named("eva02_clip_b16")()
    small = type(config)(
        name=name, run_dir=Path("runs/none"), steps=1, batch_size=batch, model=shape_named(name),
        data=DataConfig(sources=()), objective=ClipConfig(mask_ratio=0.5),
    )  # fmt: skip
    found = plan(small, PlanCommand(gpus=1, caption_tokens=20))
    return (found.tower_flops + found.loss_flops) / batch


def main() -> None:
    """Both, one after the other in this process."""
    rows = []
    for name, batch in SIZES:
        peer = measured(theirs, name, batch)
        own = measured(ours, name, batch)
        flops = flops_an_image(name, batch)
        utilisation = f"{own[0] * flops / PEAK_TFLOPS / 1e12:.1%}" if ON_GPU else "not measured"
        memory = [f"{peer[1]:.1f}", f"{own[1]:.1f}"] if ON_GPU else ["not measured"] * 2
        rows.append(
            [name, PRECISION, str(batch), f"{peer[0]:,.2f}", f"{own[0]:,.2f}", f"**{own[0] / peer[0]:.2f}x**",
             f"{own[0] * flops / 1e12:.2f}", utilisation, *memory]
        )  # fmt: skip
    write_result(
        "step", "A training step: images per second",
        ["model", "precision", "batch", "open_clip", "evaclip", "evaclip over open_clip", "TFLOP/s (ours)",
         "share of 989 TFLOP/s", "peak GB, open_clip", "peak GB, evaclip"], rows,
        "Half of the patches masked in both; captions of 20 tokens on average, gamma-distributed.",
    )  # fmt: skip


if __name__ == "__main__":
    main()
