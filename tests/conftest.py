"""What several tests need: a small model shape, small shards, and two threads at most."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaclip.data.write import Pair, write_shards
from evaclip.models.shapes import ClipShape, TextShape, eva02_small

torch.set_num_threads(2)

# What torch says where memory runs out.
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
]


@pytest.fixture
def tiny_shape() -> ClipShape:
    """An EVA-02 dual tower that runs in milliseconds."""
    text = TextShape(width=32, depth=2, heads=2)
    return eva02_small("tiny", image_size=16, patch_size=4, width=48, depth=2, heads=2, dim=24, text=text)


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """An image file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return buffer.getvalue()


COLORS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 40, 220), "white": (240, 240, 240)}


def made_pairs(count: int, size: int = 20, seed: int = 0, first: int = 0) -> list[Pair]:
    """Noisy images of one colour above another, each with a caption that names the colours and its number."""
    random = np.random.default_rng(seed)
    pairs = []
    for number in range(first, first + count):
        above, below = (list(COLORS)[int(random.integers(len(COLORS)))] for _ in range(2))
        image = np.concatenate([np.full((size // 2, size, 3), COLORS[name]) for name in (above, below)])
        image = (image + random.integers(-20, 20, image.shape)).clip(0, 255).astype(np.uint8)
        pairs.append(Pair(f"{number:06}", encoded(image), "png", f"{above} above {below}, picture {number}"))
    return pairs


@pytest.fixture
def shards(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes shards of made pairs and returns their folder."""

    def make(count: int = 64, per_shard: int = 16, name: str = "shards", seed: int = 0, first: int = 0) -> Path:
        write_shards(made_pairs(count, seed=seed, first=first), tmp_path / name, "train", per_shard)
        return tmp_path / name

    return make
