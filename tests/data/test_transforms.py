"""Pixels: evaluation bit for bit torchvision's, training close to it, and nothing hostile decoded."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision import transforms as reference

from evaclip import keyed
from evaclip.data.transforms import (
    MEAN,
    STD,
    BadImageError,
    CropConfig,
    crop_box,
    evaluation_pixels,
    normalized,
    training_pixels,
)
from tests.conftest import encoded

PHOTOS = [np.asarray(image) for image in load_sample_images().images]


def random(position: int = 0) -> np.random.Generator:
    return keyed.generator(0, "crop", position)


@pytest.mark.parametrize("size", [32, 224, 336])
@pytest.mark.parametrize("shape", [(427, 640), (640, 427), (300, 300), (37, 500), (224, 225), (8, 8)])
def test_evaluation_is_torchvisions_bit_for_bit(size, shape):
    image = Image.fromarray(PHOTOS[0]).resize(shape)
    expected = reference.Compose(
        [
            reference.Resize(size, reference.InterpolationMode.BICUBIC),
            reference.CenterCrop(size),
            reference.PILToTensor(),
        ]
    )(image)
    assert torch.equal(evaluation_pixels(image, size), expected)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_mode_becomes_rgb_first(mode):
    image = Image.fromarray(PHOTOS[1]).convert(mode)
    assert torch.equal(evaluation_pixels(image, 64), evaluation_pixels(image.convert("RGB"), 64))


def test_normalising_is_torchvisions():
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    expected = reference.Normalize(MEAN, STD)(pixels.float() / 255)
    assert torch.allclose(normalized(pixels), expected, atol=1e-6)


@pytest.mark.parametrize(("short", "factor", "close"), [(180, 1, 0.1), (300, 2, 2.0), (600, 4, 2.0), (2000, 8, 1.0)])
def test_a_training_crop_is_what_a_full_decode_and_pil_give(short, factor, close):
    """Scaling inside the DCT moves the box to whole pixels of the small picture and values by a grey level or two."""
    image = Image.fromarray(PHOTOS[0]).resize((round(short * 1.2), short), Image.Resampling.BICUBIC)
    data = encoded(np.asarray(image), "JPEG")
    for position in range(4):
        box = [side // factor * factor for side in crop_box(short, round(short * 1.2), CropConfig(), random(position))]
        assert factor == max(f for f in (1, 2, 4, 8) if min(box[2:]) // f >= 128)
        corners = (box[1], box[0], box[1] + box[3], box[0] + box[2])
        decoded = Image.open(io.BytesIO(data))
        expected = np.asarray(decoded.resize((128, 128), Image.Resampling.BICUBIC, box=corners)).transpose(2, 0, 1)
        pixels = training_pixels(data, 128, CropConfig(), random(position))
        assert np.abs(pixels.numpy().astype(int) - expected).mean() < close


def test_crops_are_keyed():
    data = encoded(PHOTOS[0][:, :500], "JPEG")
    first, again, other = (training_pixels(data, 64, CropConfig(), random(p)) for p in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_crop_boxes_have_the_area_and_ratio_asked_for():
    crop = CropConfig(scale=(0.5, 0.6), ratio=(0.9, 1.1))
    for position in range(200):
        top, left, height, width = crop_box(300, 400, crop, random(position))
        assert 0 <= top <= 300 - height and 0 <= left <= 400 - width
        assert 0.48 <= height * width / 120_000 <= 0.62 and 0.88 <= width / height <= 1.12


def test_extreme_shapes_fall_back_to_a_central_crop():
    assert crop_box(10, 1000, CropConfig(), random()) == (0, 493, 10, 13)
    assert crop_box(1000, 10, CropConfig(), random()) == (493, 0, 13, 10)
    assert crop_box(1, 1, CropConfig(), random()) == (0, 0, 1, 1)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_formats_and_modes(kind, mode):
    image = Image.fromarray(PHOTOS[1][:90, :120]).convert(mode)
    pixels = training_pixels(encoded(np.asarray(image), kind), 32, CropConfig(), random())
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.uint8
    assert abs(float(pixels.float().mean()) - np.asarray(image.convert("RGB")).mean()) < 12


def test_cmyk_jpegs_are_read():
    buffer = io.BytesIO()
    Image.fromarray(PHOTOS[1]).convert("CMYK").save(buffer, "JPEG")
    pixels = training_pixels(buffer.getvalue(), 64, CropConfig(), random())
    plain = training_pixels(encoded(PHOTOS[1], "JPEG"), 64, CropConfig(), random())
    assert (pixels.float() - plain.float()).abs().mean() < 6


def png_claiming(width: int, height: int) -> bytes:
    """A well-formed PNG of a few bytes whose header asks for much more."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(encoded(PHOTOS[0][:16, :16], "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


GIF = io.BytesIO()
Image.fromarray(PHOTOS[0][:8, :8]).save(GIF, "GIF")


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (png_claiming(20_000, 10_000), "too-many-pixels"),
        (jpeg_claiming(20_000, 10_000), "too-many-pixels"),
        (b"not an image at all", "undecodable"),
        (b"", "undecodable"),
        (b"\xff\xd8", "undecodable"),
        (encoded(PHOTOS[0], "JPEG")[:20_000], "undecodable"),
        (encoded(PHOTOS[0][:64, :64], "PNG")[:500], "undecodable"),
        (GIF.getvalue(), "undecodable"),
    ],
)
def test_what_is_no_image_is_damage_with_a_code(data, code):
    with pytest.raises(BadImageError) as error:
        training_pixels(data, 32, CropConfig(), random())
    assert error.value.code == code


def test_mutated_images_never_do_worse_than_damage():
    draw = np.random.default_rng(0)
    originals = [encoded(PHOTOS[0][:80, :100], kind) for kind in ("JPEG", "PNG", "WEBP")]
    for number in range(600):
        data = bytearray(originals[number % 3])
        for _ in range(int(draw.integers(1, 6))):
            data[int(draw.integers(len(data)))] = int(draw.integers(256))
        try:
            assert training_pixels(bytes(data), 16, CropConfig(), random()).shape == (3, 16, 16)
        except BadImageError:
            pass
