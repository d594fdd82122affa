"""The tiled contrastive loss beside open_clip's, forward and backward, on this machine's CPU."""

import open_clip
import torch
import torch.nn.functional as F
from measure import best_seconds, extra_peak_megabytes, write_result

from evaclip.objectives.contrastive import contrastive_loss

SETUP = """
import torch, torch.nn.functional as F, open_clip
from evaclip.objectives.contrastive import contrastive_loss
generator = torch.Generator().manual_seed(0)
image, text = (F.normalize(torch.randn({batch}, {dim}, generator=generator), dim=1) for _ in range(2))
inputs = [t.requires_grad_() for t in (image, text, torch.tensor([50.0]))]
small = [t[:8].detach().requires_grad_() for t in inputs]
(contrastive_loss(*small)[0] + open_clip.ClipLoss()(*small)).backward()
"""
RUN = {
    "ours": "def run(): contrastive_loss(*inputs)[0].backward()",
    "open_clip": "def run(): open_clip.ClipLoss()(*inputs).backward()",
}


def gradient_error(loss, batch: int, dim: int) -> float:
    """Relative error of the image gradient against float64."""
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(batch, dim, generator=generator), dim=1) for _ in range(2))
    text = F.normalize(0.2 * image + text, dim=1)  # half-trained: some pairs found, some not
    inputs = (image, text, torch.tensor([100.0]))
    single, double = (
        [t.detach().clone().to(kind).requires_grad_() for t in inputs] for kind in (torch.float32, torch.float64)
    )
    loss(*single).backward()
    open_clip.ClipLoss()(*double).backward()
    return ((single[0].grad.double() - double[0].grad).norm() / double[0].grad.norm()).item()


def main() -> None:
    """Time, memory and accuracy by batch size."""
    rows = []
    for batch, dim in ((1024, 512), (4096, 512), (8192, 512), (8192, 768)):
        names: dict = {}
        exec(SETUP.format(batch=batch, dim=dim), names)
        seconds, memory = {}, {}
        for whose, run in RUN.items():
            exec(run, names)
            seconds[whose] = best_seconds(names["run"], repeats=4)
            memory[whose] = extra_peak_megabytes(SETUP.format(batch=batch, dim=dim) + run)
        errors = [
            gradient_error(lambda *t: contrastive_loss(*t)[0], min(batch, 4096), dim),
            gradient_error(open_clip.ClipLoss(), min(batch, 4096), dim),
        ]
        rows.append(
            [f"{batch:,}", str(dim)]
            + [f"{seconds[w]:.3f}" for w in RUN]
            + [f"**{seconds['open_clip'] / seconds['ours']:.2f}x**"]
            + [f"{memory[w]:,.0f}" for w in RUN]
            + [f"{error:.1e}" for error in errors]
        )
    write_result(
        "loss",
        "Contrastive loss in one process, forward and backward, on the CPU",
        ["batch", "dim", "ours, s", "open_clip, s", "speed", "ours, MB extra", "open_clip, MB extra",
         "ours, gradient error", "open_clip, gradient error"],
        rows,
        "Ours rounds features to float16, open_clip's are float32; sums are float32 in both. Extra memory is the "
        "growth of the process's peak, gradients of the features included. The gradient error is that of the image "
        "features against float64 at logit scale 100, at a batch of at most 4,096.",
    )  # fmt: skip


if __name__ == "__main__":
    main()
