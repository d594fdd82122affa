"""Image-text retrieval (Karpathy's protocol): find an image's caption among all captions, a caption's image among all.

Recall@k counts a caption whose image is among the k nearest, and an image of which any caption is. Scores are float32
and a tie counts against the model. Only the number of better candidates is needed, so the matrix of all scores, 500 MB
for COCO, is never there: it is counted in rows.
"""

import hashlib
import time
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from evaclip.encoder import Encoder, encoder_of
from evaclip.errors import InputError, did_you_mean, near_path
from evaclip.evals.captioned import READERS, CaptionedImages, find_captioned
from evaclip.evals.encoded import finite, image_features
from evaclip.models.clip import Clip
from evaclip.records import structured
from evaclip.report.results import wilson, write_result
from evaclip.shipped import shipped

RECALLS = (1, 5, 10)
WAYS = ("image_to_text", "text_to_image")
# Rows of the matrix of scores that are there at a time.
ROWS = 256


@dataclass(frozen=True, kw_only=True)
class PublishedRecall:
    """Published recalls at 1, 5 and 10, per cent."""

    model: str
    source: str
    image_to_text: tuple[float, float, float]
    text_to_image: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class RetrievalCard:
    """A retrieval benchmark: one TOML file in `retrieval/`."""

    name: str
    title: str
    images: int
    captions: int
    source: str
    licence: str
    terms: str
    """How and under which conditions the data is had."""
    reference: tuple[PublishedRecall, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """One benchmark, and where its images and captions lie."""

    card: str
    """flickr30k, coco, or the path of a card."""
    data: Path
    """Folder of the images and of their list."""
    batch: int = 256
    """Images that pass through the tower at a time."""
    workers: int = 0
    """Processes that decode; 0 decodes in the main process."""


@dataclass(frozen=True)
class RetrievalResult:
    """The outcome; a rank is the number of wrong candidates that come before, or tie with, the first right one."""

    card: RetrievalCard
    data: CaptionedImages
    ranks: dict[str, np.ndarray]
    """By way: int64, of each image and of each caption."""
    seconds: float

    def metrics(self) -> dict[str, float]:
        """Recall@1, 5 and 10 both ways, and the mean of the six."""
        recalls = {f"{way}/recall@{k}": float((self.ranks[way] < k).mean()) for way in WAYS for k in RECALLS}
        return {"mean_recall": sum(recalls.values()) / len(recalls)} | recalls

    def record(self, encoder: Encoder) -> dict[str, Any]:
        """Everything that is needed to trust the numbers, as JSON."""
        card, data = self.card, self.data
        return {
            "dataset": card.name,
            "title": card.title,
            "model": {"name": encoder.name} | encoder.origin,
            "images": len(data),
            "captions": len(data.captions),
            "partial": (len(data), len(data.captions)) != (card.images, card.captions),
            "headline": "mean_recall",
            "metrics": self.metrics(),
            "interval95": {
                f"{way}/recall@{k}": wilson(int((self.ranks[way] < k).sum()), len(self.ranks[way]))
                for way in WAYS
                for k in RECALLS
            },
            "reference": [asdict(published) for published in card.reference],
            "protocol": {
                "split": "Karpathy's test split, all captions",
                "preprocessing": asdict(encoder.preprocessing),
                "scores": "float32 cosines",
                "ties": "count against the model",
                "captions_sha256": hashlib.sha256("\n".join(data.captions).encode()).hexdigest(),
            },
            "data": {"layout": data.layout, "sha256": data.fingerprint},
            "versions": {name: version(name) for name in ("evaclip", "torch", "timm", "pillow")},
            "date": time.strftime("%Y-%m-%d"),
            "seconds": round(self.seconds, 2),
        }


class Retrieval:
    """An evaluator beside the training: calling it with a model yields `(name, value)` and leaves files behind."""

    def __init__(self, config: RetrievalConfig) -> None:
        """Reads the card and finds the images, so that a wrong path is known before the first step."""
        self.config = config
        self.card = load_retrieval_card(config.card)
        self.data = retrieval_data(self.card, config.data)

    def __call__(
        self, model: Clip, device: torch.device, folder: Path, share: tuple[int, int] = (0, 1)
    ) -> Iterator[tuple[str, float]]:
        """Score the model; `folder` receives the JSON and the ranks. Of several processes the first works."""
        if share[0] != 0:
            return
        encoder = encoder_of(model.to(device), {})
        result = retrieval(encoder, self.card, self.data, self.config.batch, self.config.workers)
        save_retrieval(result, encoder, folder)
        for name, value in result.metrics().items():
            yield f"retrieval/{self.card.name}/{name}", value


def retrieval_cards() -> dict[str, Path]:
    """The shipped cards by name."""
    return {path.stem: path for path in sorted(shipped("retrieval").glob("*.toml"))}


def load_retrieval_card(name: str) -> RetrievalCard:
    """A card by its shipped name, or by the path of a TOML file. Raises InputError."""
    known = retrieval_cards()
    path = known.get(name.lower()) or Path(name)
    if path.suffix != ".toml":
        raise InputError(f"no retrieval benchmark is called {name!r}; {did_you_mean(name.lower(), known)}")
    try:
        return structured(tomllib.loads(path.read_text()), RetrievalCard, path)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"the card {path} cannot be read: {error}") from None


def retrieval_data(card: RetrievalCard, folder: Path, allow_partial: bool = False) -> CaptionedImages:
    """The benchmark's images and captions. Raises InputError when they are not there, or not all."""
    found = find_captioned(card.name, folder) if folder.is_dir() else None
    if found is None:
        where = f"is in {folder} in no known layout;" if folder.is_dir() else f"is not at {folder}; {near_path(folder)}"
        raise InputError(f"{card.title} {where} To have it: {card.terms} Layouts understood: {', '.join(READERS)}")
    if (len(found), len(found.captions)) != (card.images, card.captions) and not allow_partial:
        raise InputError(
            f"{card.title} has {card.images:,} test images with {card.captions:,} captions, {len(found):,} with "
            f"{len(found.captions):,} were found in layout {found.layout}; --allow-partial scores what is there"
        )
    return found


def retrieval(
    encoder: Encoder, card: RetrievalCard, data: CaptionedImages, batch: int = 256, workers: int = 0
) -> RetrievalResult:
    """Score a model both ways. Raises InputError for an image that cannot be read."""
    start = time.perf_counter()
    images = image_features(encoder, data.keys, data.open, f"images of {card.title}", batch, workers)
    texts = finite(encoder.texts(list(data.captions)), encoder)
    owners = torch.from_numpy(data.owners).to(encoder.device)
    ranks = {
        "image_to_text": image_to_text_ranks(images, texts, owners).cpu().numpy(),
        "text_to_image": text_to_image_ranks(images, texts, owners).cpu().numpy(),
    }
    return RetrievalResult(card, data, ranks, time.perf_counter() - start)


def text_to_image_ranks(
    images: Float[Tensor, "images dim"], texts: Float[Tensor, "texts dim"], owners: Int64[Tensor, " texts"]
) -> Int64[Tensor, " texts"]:
    """For each caption, how many other images score at least as high as its own."""
    parts = []
    for rows, own in zip(texts.split(ROWS), owners.split(ROWS), strict=True):
        scores = rows @ images.T
        parts.append(_true(scores >= scores.gather(1, own[:, None])) - 1)
    return torch.cat(parts)


def image_to_text_ranks(
    images: Float[Tensor, "images dim"], texts: Float[Tensor, "texts dim"], owners: Int64[Tensor, " texts"]
) -> Int64[Tensor, " images"]:
    """For each image, how many captions of others score at least as high as the best of its own."""
    parts = []
    for first in range(0, len(images), ROWS):
        scores = images[first : first + ROWS] @ texts.T
        own = ((owners >= first) & (owners < first + ROWS)).nonzero()[:, 0]  # the captions of these images
        rows = owners[own] - first
        best = scores.new_full((len(scores),), -torch.inf).scatter_reduce_(0, rows, scores[rows, own], "amax")
        scores[rows, own] = -torch.inf
        parts.append(_true(scores >= best[:, None]))
    return torch.cat(parts)


def _true(mask: Bool[Tensor, "rows columns"]) -> Int64[Tensor, " rows"]:
    """How many of each row are true; summed as bytes, which torch does five times faster than as booleans."""
    return mask.view(torch.uint8).sum(1, dtype=torch.int32).long()


def save_retrieval(result: RetrievalResult, encoder: Encoder, folder: Path) -> Path:
    """`<benchmark>.json` and, beside it, `.npz` with the ranks."""
    arrays = {f"{way}_ranks": ranks for way, ranks in result.ranks.items()}
    return write_result(folder, result.card.name, result.record(encoder), arrays)
