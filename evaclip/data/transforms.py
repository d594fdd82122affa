"""Compressed bytes to pixels: a fast random crop for training, the reference's own crop for evaluation.

Training decodes JPEGs at 1/2, 1/4 or 1/8 size inside the inverse DCT whenever the crop is large enough (libjpeg-turbo
has fast code for those), then resizes uint8 with antialiased bicubic filtering. Evaluation does what the published
scores were made with: PIL's bicubic resize of the shortest side and a centre crop.

Both look at the header before they decode, so that a small file cannot ask for a gigabyte of memory.
"""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

# OpenAI CLIP's, which every EVA-CLIP model uses.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# PIL's other decoders are large and little tested; shards have no use for them.
FORMATS = ("JPEG", "PNG", "WEBP")
JPEG = b"\xff\xd8"
# Bytes at the end of a JPEG among which its end marker is looked for: some cameras write behind it.
TAIL = 4096


class BadImageError(Exception):
    """An image that cannot be used; `code` is one word for counting."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """Random resized crop, the only augmentation of EVA-CLIP (arXiv 2303.15389, appendix)."""

    scale: tuple[float, float] = (0.9, 1.0)
    """Smallest and largest share of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Narrowest and widest aspect ratio of the crop."""
    flip: bool = False
    """Mirror every other image, as masked image modelling does; captions may tell left from right."""
    max_pixels: int = 40_000_000
    """Images with more pixels count as damaged; they are not decoded."""


def training_pixels(
    data: bytes, size: int, crop: CropConfig, random: np.random.Generator
) -> UInt8[Tensor, "3 size size"]:
    """A random crop resized to `size` pixels. Raises BadImageError."""
    with _bad_images_named():
        if data[:2] == JPEG:
            return _mirrored(_training_jpeg(data, size, crop, random), crop, random)
        pixels = np.array(opened(data, crop.max_pixels).convert("RGB"))
    top, left, height, width = crop_box(pixels.shape[0], pixels.shape[1], crop, random)
    return _mirrored(_resized(pixels[top : top + height, left : left + width], size), crop, random)


def image_size(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Width and height by the header; a JPEG without an end marker is decoded to see why. Raises BadImageError."""
    if data[:2] == JPEG:
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError as error:
            raise BadImageError("undecodable", str(error)) from None
        _check_pixels(int(width), int(height), max_pixels)
        if data.rfind(b"\xff\xd9", -TAIL) < 0:
            whole_pixels(data, max_pixels)
        return int(width), int(height)
    with _bad_images_named():
        return opened(data, max_pixels).size


def whole_pixels(data: bytes, max_pixels: int) -> UInt8[np.ndarray, "height width 3"]:
    """Every pixel, by the decoders that training uses. Raises BadImageError."""
    with _bad_images_named():
        if data[:2] == JPEG:
            height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
            _check_pixels(int(width), int(height), max_pixels)
            if colors not in ("CMYK", "YCCK"):
                return simplejpeg.decode_jpeg(data, "RGB")
        return np.array(opened(data, max_pixels).convert("RGB"))


def evaluation_pixels(
    image: Image.Image, size: int, filter: Image.Resampling = Image.Resampling.BICUBIC
) -> UInt8[Tensor, "3 size size"]:
    """Shortest side to `size` (antialiased), centre crop: bit for bit torchvision's Resize and CenterCrop.

    The conversion to RGB comes first: a palette cannot be interpolated.
    """
    image = image if image.mode == "RGB" else image.convert("RGB")  # which would copy it all
    width, height = image.size
    short = min(width, height)
    if short != size:
        width, height = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
        image = image.resize((width, height), filter)
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    cropped = image.crop((left, top, left + size, top + size))
    # By numpy: torch would share these few bytes among all cores, in every thread that decodes, and wait for them.
    return torch.from_numpy(np.asarray(cropped).transpose(2, 0, 1).copy())


def normalized(pixels: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    """Pixels as the towers take them: float32, zero mean and unit deviation per channel, on the pixels' device."""
    mean = torch.tensor(MEAN, device=pixels.device)[:, None, None]
    std = torch.tensor(STD, device=pixels.device)[:, None, None]
    return (pixels.to(torch.float32) / 255 - mean) / std


def crop_box(height: int, width: int, crop: CropConfig, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop, drawn as torchvision's RandomResizedCrop draws it.

    Ten tries with uniform area and log-uniform aspect ratio; then the largest central crop of an allowed ratio.
    """
    low, high = math.log(crop.ratio[0]), math.log(crop.ratio[1])
    for _ in range(10):
        area = height * width * random.uniform(*crop.scale)
        aspect = math.exp(random.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(random.integers(height - h + 1)), int(random.integers(width - w + 1)), h, w
    aspect = min(max(width / height, crop.ratio[0]), crop.ratio[1])
    w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
    return (height - h) // 2, (width - w) // 2, h, w


@contextmanager
def _bad_images_named() -> Iterator[None]:
    """Whatever a decoder raises becomes a BadImageError."""
    try:
        yield
    except BadImageError:
        raise
    except Image.DecompressionBombError as error:  # PIL's own limit, for those who set ours above it
        raise BadImageError("too-many-pixels", str(error)) from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise BadImageError("undecodable", str(error)) from None


def _training_jpeg(
    data: bytes, size: int, crop: CropConfig, random: np.random.Generator
) -> UInt8[Tensor, "3 size size"]:
    height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    full_height, full_width = int(height), int(width)
    _check_pixels(full_width, full_height, crop.max_pixels)
    top, left, height, width = crop_box(full_height, full_width, crop, random)
    factor = 1
    while factor < 8 and min(height, width) // (2 * factor) >= size:
        factor *= 2
    if colors == "CMYK" or colors == "YCCK":  # libjpeg-turbo cannot turn these into RGB
        pixels = np.array(opened(data, crop.max_pixels).convert("RGB"))
        factor = 1
    else:
        least = (math.ceil(full_height / factor), math.ceil(full_width / factor)) if factor > 1 else (0, 0)
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=least[0], min_width=least[1])
    top, left, height, width = top // factor, left // factor, height // factor, width // factor
    return _resized(pixels[top : top + height, left : left + width], size)


def _mirrored(
    pixels: UInt8[Tensor, "3 size size"], crop: CropConfig, random: np.random.Generator
) -> UInt8[Tensor, "3 size size"]:
    return pixels.flip(2) if crop.flip and random.random() < 0.5 else pixels


def _resized(pixels: UInt8[np.ndarray, "height width 3"], size: int) -> UInt8[Tensor, "3 size size"]:
    picture = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return F.interpolate(picture, size=(size, size), mode="bicubic", antialias=True)[0]


def opened(data: bytes, max_pixels: int) -> Image.Image:
    """An image whose header has been read and found harmless; its pixels have not been.

    Raises BadImageError for too many pixels, and what PIL raises for anything that is no image.
    """
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_pixels(*image.size, max_pixels)
    return image


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImageError("too-many-pixels", f"{width} x {height} is more than {max_pixels:,} pixels")
