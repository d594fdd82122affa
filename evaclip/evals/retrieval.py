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
from evaclip.evals.blocks import ALONE, Share, in_blocks
from evaclip.evals.captioned import READERS, CaptionedImages, find_captioned
from evaclip.evals.features import FeatureSource, Setting, Times, caption_features
from evaclip.evals.protocol import View, view_of
from evaclip.models.clip import Clip
from evaclip.records import structured
from evaclip.report.results import ledger, wilson, write_result
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
    view: View
    scored: np.ndarray
    """int64: which of the images could be read."""
    ranks: dict[str, np.ndarray]
    """By way: int64, of each image that could be read, and of each of their captions."""
    bad: dict[int, str]
    """Images that could not be read, with the reason: neither they nor their captions are candidates."""
    seconds: float
    times: Times

    def metrics(self) -> dict[str, float]:
        """Recall@1, 5 and 10 both ways, and the mean of the six."""
        recalls = {f"{way}/recall@{k}": float((self.ranks[way] < k).mean()) for way in WAYS for k in RECALLS}
        return {"mean_recall": sum(recalls.values()) / len(recalls)} | recalls

    def record(self, encoder: Encoder) -> dict[str, Any]:
        """Everything that is needed to trust the numbers, as JSON."""
        card, data, view = self.card, self.data, self.view
        images, captions = (len(self.ranks[way]) for way in WAYS)
        return {
            "dataset": card.name,
            "title": card.title,
            "model": {"name": encoder.name} | encoder.origin,
            "images": images,
            "captions": captions,
            "partial": (images, captions) != (card.images, card.captions),
            "coverage": {"scored": images, "bad": len(self.bad), "listed": card.images},
            "headline": "mean_recall",
            "metrics": self.metrics(),
            "interval95": {
                f"{way}/recall@{k}": wilson(int((self.ranks[way] < k).sum()), len(self.ranks[way]))
                for way in WAYS
                for k in RECALLS
            },
            "reference": [asdict(published) for published in card.reference],
            "protocol": view.record()
            | {
                "split": "Karpathy's test split, all captions",
                "scores": "float32 cosines",
                "ties": "count against the model",
                "captions_sha256": hashlib.sha256("\n".join(data.captions).encode()).hexdigest(),
            },
            "data": {"layout": data.layout, "sha256": data.fingerprint},
            "versions": {name: version(name) for name in ("evaclip", "torch", "timm", "pillow")},
            "date": time.strftime("%Y-%m-%d"),
            "seconds": round(self.seconds, 2),
            "speed": self.times.speed(self.seconds),
        }


class Retrieval:
    """An evaluator beside the training: calling it with a model yields `(name, value)` and leaves files behind."""

    def __init__(self, config: RetrievalConfig) -> None:
        """Reads the card and finds the images, so that a wrong path is known before the first step."""
        self.config = config
        self.card = load_retrieval_card(config.card)
        self.data = retrieval_data(self.card, config.data)

    def __call__(
        self, model: Clip, device: torch.device, folder: Path, share: Share = ALONE
    ) -> Iterator[tuple[str, float]]:
        """Score the model; `folder` receives the JSON and the ranks.

        `share`: this process's number, and how many score together; all get the numbers, the first writes.
        """
        encoder = encoder_of(model.to(device), {})
        setting = Setting(batch=self.config.batch, workers=self.config.workers, share=share)
        result = retrieval(encoder, self.card, self.data, setting)
        if share[0] == 0:
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
    encoder: Encoder, card: RetrievalCard, data: CaptionedImages, setting: Setting | None = None
) -> RetrievalResult:
    """Score a model both ways; of processes that share the work, each gets the whole result.

    Raises InputError when more images are damaged than the setting bears.
    """
    start, setting = time.perf_counter(), setting or Setting()
    view = view_of(setting.protocol, None, encoder.preprocessing)
    source = FeatureSource(encoder=encoder, images=data, view=view, setting=setting)
    found = source.whole(card.title)
    texts = caption_features(encoder, data.captions, setting, f"captions of {card.title}")
    kept = np.isin(data.owners, found.numbers)
    owners = torch.from_numpy(np.searchsorted(found.numbers, data.owners[kept])).to(encoder.device)
    images, texts = found.features.to(encoder.device), texts[torch.from_numpy(kept)].to(encoder.device)
    ranks = {
        "image_to_text": image_to_text_ranks(images, texts, owners, setting.share).numpy(),
        "text_to_image": text_to_image_ranks(images, texts, owners, setting.share).numpy(),
    }
    times = source.times.of_all(setting.share)
    return RetrievalResult(card, data, view, found.numbers, ranks, found.bad, time.perf_counter() - start, times)


def text_to_image_ranks(
    images: Float[Tensor, "images dim"],
    texts: Float[Tensor, "texts dim"],
    owners: Int64[Tensor, " texts"],
    share: Share = ALONE,
) -> Int64[Tensor, " texts"]:
    """For each caption, how many other images score at least as high as its own. On the CPU."""

    def ranks(rows: range) -> Tensor:
        scores = texts[rows.start : rows.stop] @ images.T
        own = owners[rows.start : rows.stop, None]
        return _true(scores >= scores.gather(1, own)) - 1

    return in_blocks(ranks, len(texts), ROWS, share)


def image_to_text_ranks(
    images: Float[Tensor, "images dim"],
    texts: Float[Tensor, "texts dim"],
    owners: Int64[Tensor, " texts"],
    share: Share = ALONE,
) -> Int64[Tensor, " images"]:
    """For each image, how many captions of others score at least as high as the best of its own. On the CPU."""

    def ranks(numbers: range) -> Tensor:
        scores = images[numbers.start : numbers.stop] @ texts.T
        own = ((owners >= numbers.start) & (owners < numbers.stop)).nonzero()[:, 0]  # the captions of these images
        rows = owners[own] - numbers.start
        best = scores.new_full((len(scores),), -torch.inf).scatter_reduce_(0, rows, scores[rows, own], "amax")
        scores[rows, own] = -torch.inf
        return _true(scores >= best[:, None])

    return in_blocks(ranks, len(images), ROWS, share)


def _true(mask: Bool[Tensor, "rows columns"]) -> Int64[Tensor, " rows"]:
    """How many of each row are true; summed as bytes, which torch does five times faster than as booleans."""
    return mask.view(torch.uint8).sum(1, dtype=torch.int32).long()


def save_retrieval(result: RetrievalResult, encoder: Encoder, folder: Path) -> Path:
    """`<benchmark>.json`; beside it `.npz` with keys and ranks, and `.bad.jsonl` if any image could not be read."""
    keys = result.data.keys
    arrays = {f"{way}_ranks": ranks for way, ranks in result.ranks.items()}
    arrays["keys"] = np.array([keys[number] for number in result.scored], dtype=np.str_)
    return write_result(folder, result.card.name, result.record(encoder), arrays, ledger(keys, result.bad))
