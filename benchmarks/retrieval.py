"""Recall at 1, 5 and 10 both ways at the sizes of Flickr30K and COCO: ranks counted in rows, and the whole matrix."""

import torch
import torch.nn.functional as F
from measure import best_seconds, extra_peak_megabytes, write_result
from torch import Tensor

from evaclip.evals.retrieval import image_to_text_ranks, text_to_image_ranks

SIZES = {"Flickr30K": (1000, 5000), "COCO": (5000, 25_010)}
DIM = 512
RECALLS = (1, 5, 10)


def made(images: int, captions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows of images and captions that are near their image, and the owners."""
    torch.manual_seed(0)
    owners = torch.arange(captions) % images
    owners = owners.sort().values
    image = F.normalize(torch.randn(images, DIM), dim=1)
    text = F.normalize(image[owners] + 4 * F.normalize(torch.randn(captions, DIM), dim=1), dim=1)
    return image, text, owners


def counted(image: Tensor, text: Tensor, owners: Tensor) -> list[float]:
    """Ours."""
    ranks = (image_to_text_ranks(image, text, owners), text_to_image_ranks(image, text, owners))
    return [float((rank < k).double().mean()) for rank in ranks for k in RECALLS]


def best_ten(image: Tensor, text: Tensor, owners: Tensor) -> list[float]:
    """One matrix of all scores, and the ten best of each row and column."""
    scores = image @ text.T
    found = (
        owners[scores.topk(10, dim=1).indices] == torch.arange(len(image))[:, None],
        (scores.topk(10, dim=0).indices == owners).T,
    )
    return [float(hits[:, :k].any(1).double().mean()) for hits in found for k in RECALLS]


def memory(way: str, images: int, captions: int) -> float:
    """Megabytes that a way needs beyond the features."""
    return extra_peak_megabytes(
        "import sys; sys.path.insert(0, 'benchmarks')\n"
        f"import torch; torch.set_num_threads({torch.get_num_threads()})\n"
        f"from retrieval import made, {way}\n"
        f"{way}(*made(50, 250)); data = made({images}, {captions})\n"
        f"def run(): {way}(*data)"
    )


def main() -> None:
    """All ways on the same features; the recalls must be the same."""
    rows = []
    for name, (images, captions) in SIZES.items():
        data = made(images, captions)
        recalls = counted(*data)
        for way in (best_ten, counted):
            assert way(*data) == recalls
            seconds = best_seconds(lambda way=way, data=data: way(*data), repeats=3)
            rows.append(
                [name, way.__name__.replace("_", " "), f"{seconds:.2f}", f"{memory(way.__name__, *SIZES[name]):,.0f}"]
            )
    write_result(
        "retrieval", "Seconds and extra megabytes of recall at 1, 5, 10 both ways, on the CPU",
        ["size", "way", "seconds", "extra MB"], rows,
        f"Features of {DIM} numbers, float32. All ways find the same recalls in this run, or it stops.",
    )  # fmt: skip


if __name__ == "__main__":
    main()
