"""Images as people see them: read with limits, shown as small JPEGs made anew, never as the bytes of a file."""

import io

from PIL import Image, ImageOps

from evaclip.data.transforms import BadImageError, opened
from evaclip.errors import InputError

MAX_PIXELS = 40_000_000
THUMBNAIL = 256


def read_image(data: bytes, what: str, max_pixels: int = MAX_PIXELS, least: int | None = None) -> Image.Image:
    """A JPEG, PNG or WebP, decoded. Raises InputError that names `what` when it is none, damaged or too large.

    `least`: a JPEG may be decoded at a smaller size, with at least so many pixels a side.
    """
    try:
        image = opened(data, max_pixels)
        if least is not None:
            image.draft("RGB", (least, least))
        image.load()
    except BadImageError as error:
        raise InputError(f"{what} cannot be used: {error}") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        raise InputError(f"{what} is no JPEG, PNG or WebP image, or is damaged") from None
    return image


def thumbnail(data: bytes, what: str, size: int = THUMBNAIL, max_pixels: int = MAX_PIXELS) -> bytes:
    """A JPEG of at most `size` pixels a side, upright as the camera was held, without anything but pixels."""
    image = read_image(data, what, max_pixels, least=2 * size)
    image = ImageOps.exif_transpose(image).convert("RGB")
    image.thumbnail((size, size))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
