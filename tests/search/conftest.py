"""Small collections, and a model whose space is known: an open_clip folder with random weights."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

VISION = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


def write_model(folder: Path, seed: int = 0) -> Path:
    """A model of 24 dimensions; another seed is another space."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    config = {
        "model_cfg": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.model.CLIP(24, open_clip.CLIPVisionCfg(**VISION), open_clip.CLIPTextCfg(**TEXT))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def picture(number: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    """A noisy image that no other number gives."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def photos(tmp_path) -> Callable[..., Path]:
    """A function that writes a folder of images with numbers as names."""

    def make(count: int = 10, name: str = "photos", first: int = 0) -> Path:
        folder = tmp_path / name
        (folder / "deep").mkdir(parents=True, exist_ok=True)
        for number in range(first, first + count):
            path = folder / ("deep" if number % 3 == 0 else ".") / f"{number:03}.png"
            picture(number).save(path)
        return folder

    return make


@pytest.fixture(scope="session")
def searchable(tmp_path_factory, model) -> Path:
    """Twelve images with captions, embedded and indexed; for tests that change nothing."""
    from evaclip.cli import main

    folder = tmp_path_factory.mktemp("searchable")
    (folder / "photos").mkdir()
    for number in range(12):
        picture(number).save(folder / "photos" / f"{number:03}.png")
        (folder / "photos" / f"{number:03}.txt").write_text(f"noise <b>number</b> {number}")
    assert main(["embed", str(folder / "photos"), str(folder / "out"), "--model", str(model), "--device", "cpu"]) == 0
    assert main(["index", str(folder / "out")]) == 0
    return folder / "out"
