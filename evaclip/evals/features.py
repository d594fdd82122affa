"""Features of images and captions, in blocks: the one way of every evaluator to them.

A file that cannot be decoded has no feature and is named with the reason; nothing takes its place.
"""

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from evaclip.distributed import gathered
from evaclip.encoder import Encoder
from evaclip.errors import InputError
from evaclip.evals.blocks import ALONE, Block, Cache, Share, blocks_of, kept_blocks, whole
from evaclip.evals.captioned import CaptionedImages
from evaclip.evals.layouts import LabelledImages
from evaclip.evals.protocol import PROTOCOLS, Protocol, View
from evaclip.log import progress

Pictures = LabelledImages | CaptionedImages
Decoded = tuple[int, Tensor | None, str]
# Images that a worker decodes at a time.
PIECE = 16
# Share of files that may be damaged before a score is refused.
BAD_SHARE = 0.001
# Captions that show which tokenizer it is.
PROBE = ("A photo of a cat.", "naïve CAFÉ & 2,000 don'ts", "{}" * 60)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How benchmarks are run, whichever they are."""

    protocol: Protocol = PROTOCOLS["eva"]
    batch: int = 256
    """Images, or captions, of a block."""
    workers: int = 0
    """Processes that decode; 0 decodes in this one."""
    cache: Cache | None = None
    """Keeps features; None keeps none."""
    share: Share = ALONE
    """This process's number, and how many evaluate together."""
    allow_partial: bool = False
    """Whether many damaged files are borne."""


@dataclass
class Times:
    """Where a process's time went, in seconds, and how many images it had."""

    waiting: float = 0.0
    """For decoded images."""
    tower: float = 0.0
    images: int = 0
    """Images that were decoded and encoded, not taken from the cache."""
    cached: int = 0

    def of_all(self, share: Share) -> "Times":
        """The same with the images of all processes that share the work."""
        told = gathered((self.images, self.cached)) if share[1] > 1 else [(self.images, self.cached)]
        images, cached = (sum(counts) for counts in zip(*told, strict=True))
        return Times(self.waiting, self.tower, images, cached)

    def speed(self, seconds: float) -> dict[str, float]:
        """For the record of a result that took so long."""
        return {
            "images_per_second": round(self.images / seconds if seconds else 0.0, 1),
            "from_cache": self.cached,
            "waiting_for_images": round(self.waiting, 2),
            "in_the_tower": round(self.tower, 2),
        }


@dataclass(frozen=True, kw_only=True)
class FeatureSource:
    """Which images pass through which tower, how."""

    encoder: Encoder
    images: Pictures
    view: View
    setting: Setting = field(default_factory=Setting)
    times: Times = field(default_factory=Times)

    def blocks(self, what: str) -> Iterator[Block]:
        """This process's blocks. Whether all features are finite is asked where the processes meet."""
        setting, images = self.setting, self.images
        said = (self.view, images.fingerprint, images.stamp, setting.batch)
        own = blocks_of(len(images), setting.batch, setting.share)
        folder = _folder(setting.cache, "images", *said)
        for block, cached in kept_blocks(own, folder, lambda missing: self._computed(missing, what)):
            self.times.cached += cached * (len(block.numbers) + len(block.bad))
            yield block

    def whole(self, title: str, what: str = "images") -> Block:
        """The features of all images in every process.

        Raises InputError when more are damaged than the setting bears, or all, or when features are not finite.
        """
        found = whole(self.blocks(f"{what} of {title}"), self.setting.share)
        finite(found.features, self.encoder)
        if not self.setting.allow_partial:
            refuse_too_many_bad(found.bad, self.images, BAD_SHARE, title)
        if not len(found.numbers):
            raise none_readable(found.bad, self.images, title)
        return found

    def _computed(self, missing: list[range], what: str) -> Iterator[Block]:
        started = time.perf_counter()
        for decoded in progress(self._decoded(missing), len(missing), what):
            ready = time.perf_counter()
            self.times.waiting += ready - started
            yield self._encoded(decoded)
            started = time.perf_counter()
            self.times.tower += started - ready
            self.times.images += len(decoded)

    def _decoded(self, missing: list[range]) -> Iterator[list[Decoded]]:
        """Blocks of images; they are decoded in smaller pieces, so that all workers share a block."""
        workers = self.setting.workers
        pieces = [list(block[at : at + PIECE]) for block in missing for at in range(0, len(block), PIECE)]
        loader = DataLoader(
            _Pixels(self.images, self.view),
            batch_sampler=pieces,
            num_workers=workers,
            prefetch_factor=2 * -(-self.setting.batch // PIECE) if workers else None,  # two blocks for each worker
            multiprocessing_context="fork" if workers else None,
            collate_fn=_packed,
        )
        found: list[Decoded] = []
        sizes = iter([len(block) for block in missing])
        size = next(sizes)
        for piece in loader:
            found += _unpacked(*piece)
            if len(found) == size:
                yield found
                found, size = [], next(sizes, 0)

    def _encoded(self, decoded: Sequence[Decoded]) -> Block:
        good = [(number, pixels) for number, pixels, _ in decoded if pixels is not None]
        bad = {number: reason for number, pixels, reason in decoded if pixels is None}
        if not good:
            return Block(np.zeros(0, np.int64), torch.zeros(0, 1), bad)
        frames = [len(pixels) for _, pixels in good]
        flat = torch.cat([pixels for _, pixels in good])
        features = torch.cat([self.encoder.images(part) for part in flat.split(self.setting.batch)]).cpu()
        if set(frames) != {1}:
            features = F.normalize(torch.stack([part.mean(0) for part in features.split(frames)]), dim=1)
        return Block(np.array([number for number, _ in good]), features, bad)


def caption_features(
    encoder: Encoder, captions: Sequence[str], setting: Setting, what: str
) -> Float[Tensor, "captions dim"]:
    """Unit rows of all captions, float32, on the CPU, in every process. Raises InputError when they are not finite.

    Captions of like length share a block, which is padded to its longest.
    """
    order = sorted(range(len(captions)), key=lambda number: (len(captions[number]), number))

    def computed(missing: list[range]) -> Iterable[Block]:
        for numbers in progress(missing, len(missing), what):
            rows = encoder.texts([captions[order[number]] for number in numbers]).cpu()
            yield Block(np.array(numbers), rows, {})

    folder = None
    if setting.cache is not None:
        told = hashlib.sha256(repr(list(captions)).encode()).hexdigest()
        folder = _folder(setting.cache, "captions", tokenizer_ids(encoder), told, setting.batch)
    own = blocks_of(len(captions), setting.batch, setting.share)
    rows = whole((block for block, _ in kept_blocks(own, folder, computed)), setting.share).features
    features = torch.empty_like(finite(rows, encoder))
    features[torch.tensor(order)] = rows
    return features


def finite(features: Float[Tensor, "rows dim"], encoder: Encoder) -> Float[Tensor, "rows dim"]:
    """The same; raises InputError if a number among them is none: every comparison with it would be wrong."""
    if not torch.isfinite(features).all():
        raise diverged(encoder)
    return features


def diverged(encoder: Encoder) -> InputError:
    """What is raised when a number among the features is none."""
    return InputError(f"{encoder.name} gives features that are not finite: its weights have diverged")


def tokenizer_ids(encoder: Encoder) -> list[int]:
    """What the tokenizer makes of a few captions: what a cache of text features knows it by."""
    return encoder.tokenizer(PROBE).flatten().tolist()


def refuse_too_many_bad(bad: dict[int, str], images: Pictures, share: float, title: str) -> None:
    """Raise InputError when more files are damaged than a score can bear."""
    if len(bad) > share * len(images):
        number, reason = next(iter(bad.items()))
        raise InputError(
            f"{len(bad):,} of {len(images):,} files of {title} cannot be read, {images.keys[number]} for one "
            f"({reason}); "
            "--allow-partial scores the others"
        )


def none_readable(bad: dict[int, str], images: Pictures, title: str) -> InputError:
    """What is raised when there is nothing to score."""
    first = min(bad)
    return InputError(f"no file of {title} can be read, {images.keys[first]} for one ({bad[first]})")


def _folder(cache: Cache | None, kind: str, *said: object) -> Path | None:
    """Where blocks lie that depend on the weights and on what is said besides."""
    if cache is None:
        return None
    return cache.folder / f"{kind}-{hashlib.sha256(repr((cache.towers, *said)).encode()).hexdigest()[:16]}"


def _packed(decoded: Sequence[Decoded]) -> tuple[list[tuple[int, int, str]], Tensor]:
    """Decoded images with all frames in one tensor: each tensor that leaves a worker costs a file descriptor."""
    frames = [pixels for _, pixels, _ in decoded if pixels is not None]
    about = [(number, 0 if pixels is None else len(pixels), reason) for number, pixels, reason in decoded]
    return about, torch.cat(frames) if frames else torch.empty(0)


def _unpacked(about: Sequence[tuple[int, int, str]], frames: Tensor) -> list[Decoded]:
    """The inverse of `_packed`."""
    parts = iter(frames.split([count for _, count, _ in about if count]))
    return [(number, next(parts) if count else None, reason) for number, count, reason in about]


class _Pixels(Dataset[Decoded]):
    """Decoded images by number: uint8 [frames, 3, size, size], or the reason why there are none."""

    def __init__(self, images: Pictures, view: View) -> None:
        self.images, self.view = images, view

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> Decoded:
        try:
            pictures = self.images.pictures(number, self.view.frames, self.view.sampling)
            return number, torch.stack([self.view.pixels(picture) for picture in pictures]), ""
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            return number, None, f"{error}" or type(error).__name__
