"""The images that towers are looked at with: some of a folder's files or of shards."""

from pathlib import Path

import numpy as np
from PIL import Image

from evaclip.data.index import IMAGE_SUFFIXES, expand, samples_of
from evaclip.data.tar import DamagedTarError
from evaclip.data.transforms import BadImageError, CropConfig, opened
from evaclip.errors import InputError, near_path


def some_images(source: str, count: int) -> list[Image.Image]:
    """`count` images, evenly spread over all in their order, so over a data set's classes too.

    `source`: a folder with JPEG, PNG or WebP files somewhere below it, a folder of shards, or a pattern of shards.
    Raises InputError when there are fewer, or one of them is damaged.
    """
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("*.tar")):
        files = [path for path in sorted(folder.rglob("*")) if path.suffix[1:].lower() in IMAGE_SUFFIXES]
        found = [(path, 0, path.stat().st_size) for path in files]
    elif not folder.exists() and not source.endswith(".tar"):
        raise InputError(f"the images {source} do not exist; {near_path(folder)}")
    else:
        found = [place for shard in expand([source]) for place in _of_shard(shard)]
    if len(found) < count:
        raise InputError(f"{source} holds {len(found):,} images and {count:,} were asked for")
    return [_image(*found[number]) for number in np.arange(count) * len(found) // count]


def _of_shard(shard: Path) -> list[tuple[Path, int, int]]:
    try:
        spans = samples_of(shard).values()
    except DamagedTarError as error:
        raise InputError(f"the shard {shard} is damaged: {error}") from None
    return [(shard, offset, size) for offset, size, _, _ in spans if size > 0]


def _image(path: Path, offset: int, size: int) -> Image.Image:
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    try:
        return opened(data, CropConfig.max_pixels).convert("RGB")
    except (BadImageError, OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise InputError(f"an image of {path} cannot be used: {error}") from None
