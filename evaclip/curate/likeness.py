"""When two images are the same: by their bytes, by a perceptual hash, by the features of a model.

The perceptual hash is imagehash's `phash`: 64 signs of the low frequencies of a grey 32 x 32 thumbnail. An image
without texture has no such signs, only rounding errors; it is compared by its bytes alone.
"""

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from evaclip.curate.scan import MAX_PIXELS, scan
from evaclip.data.transforms import BadImageError, whole_pixels
from evaclip.errors import InputError

BITS = 64
# Standard deviation of the grey levels below which an image has no texture.
FLAT = 3.0
# Pairs that are compared at a time.
PAIRS = 1 << 22


def image_hashes(data: bytes) -> tuple[bytes, int | None]:
    """SHA-256 of the bytes, and the perceptual hash, None for an image without texture. Raises BadImageError."""
    try:
        import imagehash
    except ImportError:
        raise InputError("perceptual hashes need the imagehash package: pip install 'evaclip[curate]'") from None
    image = Image.fromarray(whole_pixels(data, MAX_PIXELS))
    digest = hashlib.sha256(data).digest()
    if np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), np.float32).std() < FLAT:
        return digest, None
    return digest, int(str(imagehash.phash(image)), 16)


def hash_shard(path: Path) -> dict[str, Any]:
    """The hashes of a shard's good samples: `sha256` uint64 [samples, 2] (its first half), `perceptual` uint64
    [samples], `textured` bool [samples]; `keys`; and `undecodable`, places and reasons of images without pixels."""
    good = scan(path).good
    sha256, perceptual = np.zeros((len(good), 2), np.uint64), np.zeros(len(good), np.uint64)
    textured, undecodable = np.zeros(len(good), bool), {}
    with path.open("rb") as file:
        for place, sample in enumerate(good):
            at, size = sample.image()
            file.seek(at)
            try:
                digest, value = image_hashes(file.read(size))
            except BadImageError as error:
                undecodable[place] = [error.code, str(error)]
                continue
            sha256[place] = np.frombuffer(digest[:16], np.uint64)
            perceptual[place], textured[place] = value or 0, value is not None
    keys = [sample.key for sample in good]
    return {"sha256": sha256, "perceptual": perceptual, "textured": textured, "keys": keys, "undecodable": undecodable}


def near_pairs(hashes: np.ndarray, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs of places i < j whose hashes differ in at most `distance` bits, some of them more than once.

    Cut into distance + 1 bands, two such hashes agree in one of them entirely. `hashes`: uint64 [n], all different.
    """
    for shift, mask in _bands(distance):
        band = (hashes >> shift) & mask
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.r_[True, band[order][1:] != band[order][:-1]])
        sizes = np.diff(np.r_[starts, len(order)])
        for size in np.unique(sizes[sizes > 1]).tolist():
            rows, columns = np.triu_indices(size, 1)
            for few in np.array_split(starts[sizes == size], max(1, int((sizes == size).sum()) * len(rows) // PAIRS)):
                first, second = order[few[:, None] + rows].ravel(), order[few[:, None] + columns].ravel()
                near = np.bitwise_count(hashes[first] ^ hashes[second]) <= distance
                a, b = first[near], second[near]
                yield np.minimum(a, b), np.maximum(a, b)


def nearest(known: np.ndarray, asked: np.ndarray, distance: int) -> np.ndarray:
    """For each hash in `asked`, the place of one in `known` at most `distance` bits away, the nearest of them, or -1.

    Both uint64, [n] and [m]; int64 [m] is returned. Compared in blocks, all with all: `known` is an evaluation set.
    """
    found = np.full(len(asked), -1, np.int64)
    if not len(known):
        return found
    for start in range(0, len(asked), block := max(1, PAIRS // len(known))):
        bits = np.bitwise_count(asked[start : start + block, None] ^ known[None, :])
        place = bits.argmin(1)
        close = bits[np.arange(len(place)), place] <= distance
        found[start : start + block][close] = place[close]
    return found


def _bands(distance: int) -> list[tuple[np.uint64, np.uint64]]:
    """Shift and mask of distance + 1 bands that make up all bits."""
    edges = [BITS * number // (distance + 1) for number in range(distance + 2)]
    return [(np.uint64(low), np.uint64((1 << (high - low)) - 1)) for low, high in itertools.pairwise(edges)]
