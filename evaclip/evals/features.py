"""Image features in blocks of fixed size: what several processes share, what an interruption keeps, what is reused.

A data set is cut into blocks of `batch` images; block b is numbers b * batch to (b + 1) * batch - 1, and whole blocks
go to processes in turn. A block is the same computation wherever it runs, so one, two or four processes find the same
bits. A file that cannot be decoded has no feature and is named with the reason; nothing takes its place.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from evaclip.encoder import Encoder
from evaclip.errors import InputError
from evaclip.evals.classifier import Cache
from evaclip.evals.layouts import LabelledImages
from evaclip.evals.protocol import View
from evaclip.log import progress

Decoded = tuple[int, Tensor | None, str]


@dataclass(frozen=True)
class Block:
    """The features of some images."""

    numbers: np.ndarray
    """int64: the images that have a feature."""
    features: Float[Tensor, "images dim"]
    """Unit rows, float32, on the CPU."""
    bad: dict[int, str]
    """The images that have none, with the reason."""


@dataclass
class Times:
    """Where the time went, in seconds."""

    waiting: float = 0.0
    """For decoded images."""
    tower: float = 0.0
    images: int = 0
    """Images that were decoded and encoded, not taken from the cache."""
    cached: int = 0


@dataclass(frozen=True, kw_only=True)
class FeatureSource:
    """Which images pass through which tower, how."""

    encoder: Encoder
    images: LabelledImages
    view: View
    batch: int = 256
    """Images of a block."""
    workers: int = 0
    """Processes that decode; 0 decodes in this one."""
    cache: Cache | None = None
    """Keeps features; None keeps none."""
    share: tuple[int, int] = (0, 1)
    """This process's number, and how many share the work."""
    times: Times = field(default_factory=Times)

    def blocks(self, what: str) -> Iterator[Block]:
        """This process's blocks: those that are cached first, then the others as they are computed."""
        rank, ranks = self.share
        count = len(self.images)
        own = [range(at, min(at + self.batch, count)) for at in range(0, count, self.batch)][rank::ranks]
        folder = self.cache.folder / f"images-{self._key(self.cache)[:16]}" if self.cache else None
        missing = []
        for numbers in own:
            found = _load(folder, numbers)
            if found is None:
                missing.append(numbers)
            else:
                self.times.cached += len(numbers)
                yield found
        for block in self._computed(missing, what):
            if folder is not None:
                _save(folder, block)
            yield block

    def _computed(self, missing: Sequence[range], what: str) -> Iterator[Block]:
        loader = DataLoader(
            _Pixels(self.images, self.view),
            batch_sampler=[list(numbers) for numbers in missing],
            num_workers=self.workers,
            multiprocessing_context="fork" if self.workers else None,
            collate_fn=list,
        )
        started = time.perf_counter()
        for decoded in progress(loader, len(missing), what):
            ready = time.perf_counter()
            self.times.waiting += ready - started
            yield self._encoded(decoded)
            started = time.perf_counter()
            self.times.tower += started - ready
            self.times.images += len(decoded)

    def _encoded(self, decoded: Sequence[Decoded]) -> Block:
        good = [(number, pixels) for number, pixels, _ in decoded if pixels is not None]
        bad = {number: reason for number, pixels, reason in decoded if pixels is None}
        if not good:
            return Block(np.zeros(0, np.int64), torch.zeros(0, 1), bad)
        frames = [len(pixels) for _, pixels in good]
        flat = torch.cat([pixels for _, pixels in good])
        features = torch.cat([self.encoder.images(part) for part in flat.split(self.batch)]).cpu()
        if set(frames) != {1}:
            features = F.normalize(torch.stack([part.mean(0) for part in features.split(frames)]), dim=1)
        return Block(np.array([number for number, _ in good]), features, bad)

    def _key(self, cache: Cache) -> str:
        said = (cache.weights, self.view, self.images.fingerprint, self.images.stamp, self.batch)
        return hashlib.sha256(repr(said).encode()).hexdigest()


class _Pixels(Dataset[Decoded]):
    """Decoded images by number: uint8 [frames, 3, size, size], or the reason why there are none."""

    def __init__(self, images: LabelledImages, view: View) -> None:
        self.images, self.view = images, view

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> Decoded:
        try:
            pictures = self.images.pictures(number, self.view.frames, self.view.sampling)
            return number, torch.stack([self.view.pixels(picture) for picture in pictures]), ""
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            return number, None, f"{error}" or type(error).__name__


def _path(folder: Path, first: int) -> Path:
    return folder / f"{first:09}.safetensors"


def _save(folder: Path, block: Block) -> None:
    first = int(min([*block.numbers.tolist(), *block.bad]))
    folder.mkdir(parents=True, exist_ok=True)
    about = {"bad": json.dumps(block.bad), "sha256": _hash(block.features)}
    beside = _path(folder, first).with_suffix(".new")
    save_file({"numbers": torch.from_numpy(block.numbers), "features": block.features.contiguous()}, beside, about)
    beside.replace(_path(folder, first))


def _load(folder: Path | None, numbers: range) -> Block | None:
    """A block from the cache, None when it is not there, not whole, or not the same bits that were written."""
    if folder is None or not _path(folder, numbers[0]).is_file():
        return None
    try:
        with safe_open(_path(folder, numbers[0]), "pt") as stored:
            about = stored.metadata() or {}
            found = Block(
                stored.get_tensor("numbers").numpy(),
                stored.get_tensor("features"),
                {int(number): reason for number, reason in json.loads(about["bad"]).items()},
            )
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
    whole = len(found.numbers) + len(found.bad) == len(numbers) and _hash(found.features) == about.get("sha256")
    return found if whole else None


def _hash(features: Tensor) -> str:
    return hashlib.sha256(features.contiguous().numpy().tobytes()).hexdigest()


def refuse_too_many_bad(bad: dict[int, str], images: LabelledImages, share: float, title: str) -> None:
    """Raise InputError when more files are damaged than a score can bear."""
    if len(bad) > share * len(images):
        number, reason = next(iter(bad.items()))
        raise InputError(
            f"{len(bad):,} of {len(images):,} files of {title} cannot be read, {images.keys[number]} for one "
            f"({reason}); "
            "--allow-partial scores the others"
        )
