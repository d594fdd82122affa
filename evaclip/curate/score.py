"""What a model makes of the samples of a shard: features of the images, and how well captions fit them."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from evaclip.curate.journal import Journal, shard_state
from evaclip.curate.scan import MAX_PIXELS, Sample, scan
from evaclip.data.transforms import BadImageError, whole_pixels
from evaclip.encoder import Encoder, load_encoder

BATCH = 256
# Features of an image that cannot be decoded: no other is like it.
NOTHING = 0.0


@lru_cache(maxsize=1)
def _encoder(model: str, device: str) -> Encoder:
    return load_encoder(model, device)


def embed_shards(paths: list[Path], model: str, device: str, journal: Journal) -> Float[Tensor, "samples dim"]:
    """Unit features of the images of all good samples, in order; zeros for one that cannot be decoded."""
    own = Journal(journal.folder, {"model": model}, 1)  # torch uses all cores within one process
    work = partial(_embedded, model=model, device=device)
    parts = [np.array(result["images"]) for _, result in own.each("embedding images", work, paths, shard_state)]
    return torch.from_numpy(np.concatenate(parts))


def score_shard(path: Path, *, model: str, device: str) -> dict[str, Any]:
    """`score` float32 [good samples]: the cosine of image and caption; NaN for an image that cannot be decoded."""
    encoder = _encoder(model, device)
    scores = [
        torch.where(usable, (encoder.images(pixels) * encoder.texts(captions)).sum(1).cpu(), torch.nan)
        for pixels, captions, usable in _batches(path, encoder)
    ]
    return {"score": torch.cat(scores).numpy() if scores else np.zeros(0, np.float32)}


def _embedded(path: Path, *, model: str, device: str) -> dict[str, Any]:
    encoder = _encoder(model, device)
    parts = [
        torch.where(usable[:, None], encoder.images(pixels).cpu(), NOTHING)
        for pixels, _, usable in _batches(path, encoder)
    ]
    width = encoder.images(torch.zeros(1, 3, encoder.preprocessing.size, encoder.preprocessing.size).byte()).shape[1]
    return {"images": torch.cat(parts).numpy() if parts else np.zeros((0, width), np.float32)}


def _batches(path: Path, encoder: Encoder) -> Iterator[tuple[Tensor, list[str], Tensor]]:
    """Pixels, captions, and which of them could be decoded; decoding takes as many threads as torch does."""
    good = scan(path).good
    with path.open("rb") as file, ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for start in range(0, len(good), BATCH):
            read = [_read(file, sample) for sample in good[start : start + BATCH]]
            pixels = list(threads.map(lambda pair: _pixels(pair[0], encoder), read))
            blank = torch.zeros(3, encoder.preprocessing.size, encoder.preprocessing.size, dtype=torch.uint8)
            stacked = torch.stack([blank if each is None else each for each in pixels])
            yield stacked, [caption for _, caption in read], torch.tensor([each is not None for each in pixels])


def _read(file: io.BufferedReader, sample: Sample) -> tuple[bytes, str]:
    parts = []
    for at, size in (sample.image(), sample.caption()):
        file.seek(at)
        parts.append(file.read(size))
    return parts[0], parts[1].decode("utf-8", "replace").strip()


def _pixels(data: bytes, encoder: Encoder) -> Tensor | None:
    try:
        return encoder.preprocessing.pixels(Image.fromarray(whole_pixels(data, MAX_PIXELS)))
    except BadImageError:
        return None
