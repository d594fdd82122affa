"""Gradients of the contrastive loss over several processes, ours and open_clip's three ways, against float64."""

import sys
import time
from pathlib import Path

import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from measure import write_result

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' ranks

from evaclip.objectives.columns import Exchange
from evaclip.objectives.contrastive import contrastive_loss
from tests.ranks import in_ranks

BATCH, DIM, SCALE = 2048, 256, 30.0
FLAGS = {
    "open_clip": {},
    "open_clip --local-loss": {"local_loss": True},
    "open_clip --local-loss --gather-with-grad": {"local_loss": True, "gather_with_grad": True},
}


def problem() -> list[torch.Tensor]:
    """Inputs of two linear towers, the towers, and the logit scale, in float64."""
    generator = torch.Generator().manual_seed(0)
    image, noise = (torch.randn(BATCH, DIM, generator=generator).double() for _ in range(2))
    towers = [torch.eye(DIM).double() + 0.03 * torch.randn(DIM, DIM, generator=generator).double() for _ in range(2)]
    return [image, 0.4 * image + noise, *towers, torch.tensor([SCALE]).double()]


def exact() -> list[torch.Tensor]:
    """Gradients of towers and scale in one process with the whole batch."""
    image, text, *parameters = problem()
    parameters = [p.requires_grad_() for p in parameters]
    features = [F.normalize(x @ w, dim=1) for x, w in zip((image, text), parameters, strict=False)]
    open_clip.ClipLoss()(*features, parameters[2]).backward()
    return [p.grad for p in parameters if p.grad is not None]


def averaged(whose: str) -> tuple[list[torch.Tensor], float]:
    """The same gradients, averaged over the ranks as data-parallel training does, and the loss's seconds."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    image, text, *parameters = (t.float() for t in problem())
    own = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    parameters = [p.requires_grad_() for p in parameters]
    best = float("inf")
    for _ in range(4):
        for p in parameters:
            p.grad = None
        features = [F.normalize(x[own] @ w, dim=1) for x, w in zip((image, text), parameters, strict=False)]
        dist.barrier()
        start = time.perf_counter()
        if whose == "evaclip":
            loss = contrastive_loss(*features, parameters[2], exchange=Exchange(group=dist.group.WORLD))[0]
        else:
            loss = open_clip.ClipLoss(rank=rank, world_size=ranks, **FLAGS[whose])(*features, parameters[2])
        loss.backward()
        best = min(best, time.perf_counter() - start)
    for p in parameters:
        dist.all_reduce(p.grad)
    return [p.grad / ranks for p in parameters], best


def main() -> None:
    """By number of processes."""
    right, rows = exact(), []
    for world in (1, 2, 4):
        for whose in ("evaclip", *FLAGS):
            found, seconds = in_ranks(world, averaged, whose)[0]
            ratios = [((f.double() * r).sum() / (r * r).sum()).item() for f, r in zip(found, right, strict=True)]
            errors = [((f.double() - q * r).norm() / r.norm()).item()
                      for f, r, q in zip(found, right, ratios, strict=True)]  # fmt: skip
            rows.append(
                [
                    str(world),
                    whose,
                    *(f"{ratio:.4f}" for ratio in ratios),
                    f"{max(errors[:2]):.0e}",
                    f"{1000 * seconds:.0f}",
                ]
            )
    write_result(
        "loss_ranks", "Gradients averaged over processes, as a ratio to those of one process in float64",
        ["processes", "loss", "image tower", "text tower", "logit scale", "error of direction", "ms"], rows,
        f"B = {BATCH:,}, D = {DIM}, scale {SCALE:g}, gloo; features of evaclip's loss in float16, of open_clip's in "
        "float32. 1.0000 is right. The processes share two cores, so time says little beyond two.",
    )  # fmt: skip


if __name__ == "__main__":
    main()
