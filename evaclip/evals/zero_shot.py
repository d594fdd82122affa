"""Zero-shot classification (arXiv 2103.00020, section 3.1): an image belongs to the class with the highest cosine.

Features and logits are float32 whatever the towers compute in: in 16 bits, several per cent of ImageNet's images have
two best classes. A tie goes to the class that the card names first, which also decides between ImageNet's two classes
called "missile" and its two called "sunglasses".
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from evaclip.distributed import gathered
from evaclip.encoder import Encoder, encoder_of
from evaclip.errors import InputError
from evaclip.evals.blocks import ALONE, Share
from evaclip.evals.card import Card, load_card
from evaclip.evals.classifier import class_embeddings
from evaclip.evals.features import BAD_SHARE, FeatureSource, Setting, diverged, none_readable, refuse_too_many_bad
from evaclip.evals.layouts import LabelledImages, find_images
from evaclip.evals.protocol import View, view_of
from evaclip.evals.scores import ZeroShotResult, save_result
from evaclip.models.clip import Clip

# Images whose thumbnails are kept for the report, spread evenly over the data set.
THUMBNAILS = 48
# A list of videos may be longer than the card's copy of it by this factor.
MOST_VIDEOS = 1.1


@dataclass(frozen=True, kw_only=True)
class ZeroShotConfig:
    """One benchmark, and where its images lie."""

    card: str
    """Name of a benchmark, or path of a card."""
    data: Path
    """Folder of the images."""
    batch: int = 256
    """Images that pass through the tower at a time."""
    workers: int = 0
    """Processes that decode; 0 decodes in the main process."""


class ZeroShot:
    """An evaluator beside the training: calling it with a model yields `(name, value)` and leaves files behind."""

    def __init__(self, config: ZeroShotConfig) -> None:
        """Reads the card and finds the images, so that a wrong path is known before the first step."""
        self.config = config
        self.card = load_card(config.card)
        self.images = find_images(self.card, config.data)
        check_count(self.card, self.images)

    def __call__(
        self, model: Clip, device: torch.device, folder: Path, share: Share = ALONE
    ) -> Iterator[tuple[str, float]]:
        """Score the model on its device; `folder` receives the JSON and the arrays for the report.

        `share`: this process's number, and how many score together; all get the numbers, the first writes.
        """
        setting = Setting(batch=self.config.batch, workers=self.config.workers, share=share)
        result = zero_shot(encoder_of(model.to(device), {"name": model.shape.name}), self.card, self.images, setting)
        if share[0] == 0:
            save_result(result, result.record({"name": model.shape.name}), folder)
        for name, value in result.metrics().items():
            yield f"zero_shot/{self.card.name}/{name}", value


def check_count(card: Card, images: LabelledImages, allow_partial: bool = False, expected: int | None = None) -> None:
    """Refuse a data set that is not whole: InputError says what is missing."""
    count, expected = len(images), expected or card.count
    if not count:
        raise InputError(f"{card.title}: layout {images.layout} was found, but none of its {expected:,} files")
    if allow_partial:
        return
    if card.coverage < 1:
        listed = int(images.listed.sum()) if images.listed is not None else expected
        if card.coverage * listed <= count <= MOST_VIDEOS * expected and listed >= card.coverage * expected:
            return
        short = f"{count:,} of {listed:,} listed test videos"
    elif count == expected:
        sizes = np.bincount(images.labels, minlength=len(card.classes))
        if card.per_class and (sizes != card.per_class).any():
            worst = int(np.abs(sizes - card.per_class).argmax())
            raise InputError(
                f"{card.title} has {card.per_class} test images of each class, but {sizes[worst]} of "
                f"{card.classes[worst]!r} were found in layout {images.layout}: the labels are wrong"
            )
        return
    else:
        short = f"{count:,}"
    what = "videos" if card.media == "video" else "images"
    raise InputError(
        f"{card.title} has {expected:,} test {what}, {short} were found in layout {images.layout}; "
        "--allow-partial scores what is there"
    )


@torch.inference_mode()
def zero_shot(
    encoder: Encoder, card: Card, images: LabelledImages, setting: Setting | None = None, expected: int | None = None
) -> ZeroShotResult:
    """Score a model on the images of a benchmark; of processes that share the work, each gets the whole result.

    `expected`: how many images there should be, by default what the card says.
    """
    setting = setting or Setting()
    start = time.perf_counter()
    view = view_of(setting.protocol, card, encoder.preprocessing)
    _check_frames(images, view)
    weights = class_embeddings(encoder, card, setting.cache, setting.share)
    source = FeatureSource(encoder=encoder, images=images, view=view, setting=setting)
    own = _Ranked()
    for block in source.blocks(f"scoring {card.title}"):
        own.bad |= block.bad
        own.finite = bool(block.features.isfinite().all())
        if not own.finite:
            break
        if len(block.numbers):
            labels = torch.from_numpy(images.labels[block.numbers]).to(encoder.device)
            best, rank = ranked(block.features.to(encoder.device) @ weights.T, labels)
            own.parts.append(np.stack([block.numbers, best.cpu().numpy(), rank.cpu().numpy()]))
    everyone = gathered(own) if setting.share[1] > 1 else [own]
    if not all(part.finite for part in everyone):  # raised by all of them, so that none waits for one that is gone
        raise diverged(encoder)
    bad = {number: reason for part in everyone for number, reason in part.bad.items()}
    if not setting.allow_partial:
        # Of videos the card's coverage decides how many may be missing.
        refuse_too_many_bad(bad, images, max(BAD_SHARE, 1 - card.coverage), card.title)
    parts = [array for part in everyone for array in part.parts]
    if not parts:
        raise none_readable(bad, images, card.title)
    table = np.concatenate(parts, 1)
    scored, predictions, ranks = table[:, table[0].argsort(kind="stable")]
    shown = np.unique(np.linspace(0, len(scored) - 1, THUMBNAILS).astype(np.int64))
    return ZeroShotResult(
        card, images, view, scored, predictions, ranks, bad, expected or card.count,
        shown, _thumbnails(images, view, scored[shown]), time.perf_counter() - start,
        source.times.of_all(setting.share),
    )  # fmt: skip


def ranked(
    logits: Float[Tensor, "batch classes"], labels: Int64[Tensor, " batch"]
) -> tuple[Int64[Tensor, " batch"], Int64[Tensor, " batch"]]:
    """The predicted class, and how many classes come before the true one; equal logits count in class order."""
    order = torch.arange(logits.shape[1], device=logits.device)
    best = torch.where(logits == logits.amax(1, keepdim=True), order, logits.shape[1]).amin(1)
    own = logits.gather(1, labels[:, None])
    before = (logits > own) | ((logits == own) & (order < labels[:, None]))
    return best, before.sum(1)


@dataclass
class _Ranked:
    """What one process found."""

    parts: list[np.ndarray] = field(default_factory=list)
    """int64 [3, images] each: number, predicted class, classes before the true one."""
    bad: dict[int, str] = field(default_factory=dict)
    finite: bool = True
    """Whether all features were numbers."""


def _thumbnails(images: LabelledImages, view: View, numbers: np.ndarray) -> np.ndarray:
    """uint8 [images, size, size, 3]: the middle frame of each as the tower sees it."""
    found = []
    for number in numbers.tolist():
        pictures = images.pictures(number, view.frames, view.sampling)
        found.append(view.pixels(pictures[len(pictures) // 2]).permute(1, 2, 0).numpy())
    return np.stack(found)


def _check_frames(images: LabelledImages, view: View) -> None:
    """Frames that were taken by another rule than the protocol's are not silently scored."""
    if images.frames is not None and images.frames != (view.frames, view.sampling):
        raise InputError(
            f"the data holds {images.frames[0]} frames a video taken by {images.frames[1]!r}; the protocol "
            f"{view.protocol} wants {view.frames} by {view.sampling!r}. Take them with `evaclip frames --protocol "
            f"{view.protocol}`, or choose another --protocol"
        )
