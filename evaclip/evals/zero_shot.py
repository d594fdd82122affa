"""Zero-shot classification (arXiv 2103.00020, section 3.1): a class is the mean of its prompts.

Each prompt's feature is normalised, the mean over a class's templates is normalised again, and an image belongs to
the class with the highest cosine. Features and logits are float32 whatever the towers compute in: in 16 bits, several
per cent of ImageNet's images have two best classes. A tie goes to the class that the card names first.
"""

import hashlib
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from scipy.stats import binomtest
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from evaclip.data.tokenizer import clip_tokenizer, cut_to_longest
from evaclip.data.transforms import evaluation_pixels, normalized
from evaclip.errors import InputError
from evaclip.evals.card import Card, load_card
from evaclip.evals.layouts import LabelledImages, find_images
from evaclip.log import progress

PREPROCESSING = "shortest side to {size} px, bicubic (PIL), centre crop, CLIP mean and deviation"
TIE_RULE = "a tie goes to the class that the card names first"
# Images whose thumbnails are kept for the report, spread evenly over the data set.
THUMBNAILS = 48


@runtime_checkable
class DualEncoder(Protocol):
    """What is evaluated: anything with two encoders into one space."""

    def encode_image(self, images: Any) -> Tensor:
        """Features of normalised images, not normalised."""
        ...

    def encode_text(self, tokens: Any) -> Tensor:
        """Features of token ids, not normalised."""
        ...


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


@dataclass(frozen=True)
class ZeroShotResult:
    """The outcome on one benchmark; arrays are in the order of the images."""

    card: Card
    images: LabelledImages
    predictions: np.ndarray
    """int64: the predicted class of each image."""
    ranks: np.ndarray
    """int64: how many classes come before the true one."""
    shown: np.ndarray
    """int64: the images whose thumbnails were kept."""
    thumbnails: np.ndarray
    """uint8 [shown, size, size, 3]: those images as the tower saw them."""
    seconds: float

    def accuracy(self, k: int) -> float:
        """Share of images whose true class is among the first k."""
        return float((self.ranks < k).mean())

    def metrics(self) -> dict[str, float]:
        """Top-1, and top-5 where there are more than five classes."""
        tops = [1, 5] if len(self.card.classes) > 5 else [1]
        return {f"top{k}": self.accuracy(k) for k in tops}

    def interval(self, k: int = 1) -> tuple[float, float]:
        """Wilson's 95 % interval of the top-k accuracy."""
        found = binomtest(int((self.ranks < k).sum()), len(self.ranks)).proportion_ci(0.95, method="wilson")
        return float(found.low), float(found.high)

    def per_class(self) -> dict[str, float]:
        """Top-1 accuracy of each class that has images."""
        correct, labels = self.ranks < 1, self.images.labels
        return {
            name: float(correct[labels == number].mean())
            for number, name in enumerate(self.card.classes)
            if (labels == number).any()
        }

    def record(self, model: dict[str, Any], size: int) -> dict[str, Any]:
        """Everything that is needed to trust the number, as JSON."""
        card = self.card
        prompts = "\n".join(prompt for name in card.classes for prompt in card.prompts(name))
        return {
            "dataset": card.name,
            "title": card.title,
            "model": model,
            "images": len(self.images),
            "partial": len(self.images) != card.count,
            "headline": card.headline,
            "metrics": self.metrics(),
            "interval95": {name: self.interval(int(name[3:])) for name in self.metrics()},
            "per_class": self.per_class(),
            "reference": [asdict(reference) for reference in card.reference],
            "protocol": {
                "preprocessing": PREPROCESSING.format(size=size),
                "logits": "float32",
                "ties": TIE_RULE,
                "templates": len(card.templates),
                "prompts_sha256": hashlib.sha256(prompts.encode()).hexdigest(),
            },
            "data": {"layout": self.images.layout, "sha256": self.images.fingerprint},
            "versions": {name: version(name) for name in ("evaclip", "torch", "timm", "pillow")}
            | {"python": platform.python_version()},
            "date": time.strftime("%Y-%m-%d"),
            "seconds": round(self.seconds, 2),
        }


class ZeroShot:
    """An evaluator beside the training: calling it with a model yields `(name, value)` and leaves files behind."""

    def __init__(self, config: ZeroShotConfig) -> None:
        """Reads the card and finds the images, so that a wrong path is known before the first step."""
        self.config = config
        self.card = load_card(config.card)
        self.images = find_images(self.card, config.data)
        check_count(self.card, self.images)

    def __call__(self, model: "ShapedEncoder", device: torch.device, folder: Path) -> Iterator[tuple[str, float]]:
        """Score the model; `folder` receives the JSON and the arrays for the report."""
        result = zero_shot(model, self.card, self.images, device, self.config.batch, self.config.workers)
        save_result(result, result.record({"name": model.shape.name}, model.shape.vision.image_size), folder)
        for name, value in result.metrics().items():
            yield f"zero_shot/{self.card.name}/{name}", value


@runtime_checkable
class ShapedEncoder(DualEncoder, Protocol):
    """A dual encoder that knows its shape."""

    shape: Any


def check_count(card: Card, images: LabelledImages, allow_partial: bool = False) -> None:
    """Refuse a data set that is not whole."""
    if len(images) != card.count and not allow_partial:
        raise InputError(
            f"{card.title} has {card.count:,} test images, {len(images):,} were found in layout {images.layout}; "
            "--allow-partial scores what is there"
        )


@torch.inference_mode()
def zero_shot(
    model: ShapedEncoder, card: Card, images: LabelledImages, device: torch.device, batch: int = 256, workers: int = 0
) -> ZeroShotResult:
    """Score a model on the images of a benchmark."""
    start = time.perf_counter()
    size = model.shape.vision.image_size
    weights = class_embeddings(model, card, device, model.shape.text.context)
    pixels = _Pixels(images, size)
    loader = DataLoader(
        pixels, batch_size=batch, num_workers=workers, multiprocessing_context="fork" if workers else None
    )
    predictions, ranks, thumbnails = [], [], []
    shown = np.unique(np.linspace(0, len(images) - 1, THUMBNAILS).astype(np.int64))
    done = 0
    for block in progress(loader, len(loader), f"scoring {card.title}"):
        features = F.normalize(model.encode_image(normalized(block.to(device))).float(), dim=1)
        labels = torch.from_numpy(images.labels[done : done + len(block)]).to(device)
        best, rank = ranked(features @ weights.T, labels)
        predictions.append(best.cpu())
        ranks.append(rank.cpu())
        inside = shown[(shown >= done) & (shown < done + len(block))] - done
        thumbnails.append(block[inside].permute(0, 2, 3, 1))
        done += len(block)
    return ZeroShotResult(
        card,
        images,
        torch.cat(predictions).numpy(),
        torch.cat(ranks).numpy(),
        shown,
        torch.cat(thumbnails).numpy(),
        time.perf_counter() - start,
    )


@torch.inference_mode()
def class_embeddings(
    model: DualEncoder, card: Card, device: torch.device, context: int = 77, batch: int = 1024
) -> Float[Tensor, "classes dim"]:
    """One unit row per class."""
    tokens = clip_tokenizer(context)([prompt for name in card.classes for prompt in card.prompts(name)])
    parts = [model.encode_text(cut_to_longest(part).to(device)).float() for part in tokens.split(batch)]
    features = F.normalize(torch.cat(parts), dim=1)
    return F.normalize(features.view(len(card.classes), len(card.templates), -1).mean(1), dim=1)


def ranked(
    logits: Float[Tensor, "batch classes"], labels: Int64[Tensor, " batch"]
) -> tuple[Int64[Tensor, " batch"], Int64[Tensor, " batch"]]:
    """The predicted class, and how many classes come before the true one; equal logits count in class order."""
    order = torch.arange(logits.shape[1], device=logits.device)
    best = torch.where(logits == logits.amax(1, keepdim=True), order, logits.shape[1]).amin(1)
    own = logits.gather(1, labels[:, None])
    before = (logits > own) | ((logits == own) & (order < labels[:, None]))
    return best, before.sum(1)


def save_result(result: ZeroShotResult, record: dict[str, Any], folder: Path) -> Path:
    """`<benchmark>.json`, and beside it `.npz` with predictions, labels and thumbnails for the report."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.card.name}.json"
    np.savez_compressed(
        path.with_suffix(".npz"),
        predictions=result.predictions,
        labels=result.images.labels,
        shown=result.shown,
        thumbnails=result.thumbnails,
        classes=np.array(result.card.classes),
    )
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


class _Pixels(Dataset[Tensor]):
    """Decoded images; a file that cannot be read is an error that names it."""

    def __init__(self, images: LabelledImages, size: int) -> None:
        self.images, self.size = images, size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> Tensor:
        try:
            return evaluation_pixels(self.images.open(number), self.size)
        except (OSError, ValueError, SyntaxError) as error:
            raise InputError(f"the image {self.images.keys[number]} cannot be read: {error}") from None
