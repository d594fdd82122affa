"""A labelled data set as image-text shards: each image with its class name in one of many sentences."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from evaclip import keyed
from evaclip.curate.recipe import load_caption_record
from evaclip.data.write import Pair, write_shards
from evaclip.evals.card import load_card
from evaclip.evals.layouts import LabelledImages, find_images
from evaclip.log import progress


@dataclass(frozen=True, kw_only=True)
class CaptionCommand:
    """Write a labelled data set as image-text shards: each image with its class name in a sentence."""

    recipe: tyro.conf.Positional[str]
    """Name of a folder in data_recipes/."""
    data: Path
    """Folder of the labelled images."""
    out: Path
    """Folder for the shards."""


@dataclass(frozen=True, kw_only=True)
class CaptionRecipe:
    """How a labelled set becomes pairs; the file is `data_recipes/<name>/recipe.toml`."""

    card: str
    """The benchmark whose classes and layouts it shares."""
    split: str
    """Part of the data that is captioned; never the test part."""
    captions: tuple[str, ...]
    """Sentences with one {} for the class name."""
    samples_per_shard: int
    source: str
    licence: str


def load_caption_recipe(name: str) -> CaptionRecipe:
    """A recipe by the name of its folder. Raises InputError, with the nearest name."""
    return load_caption_record(name, CaptionRecipe)


def run_caption(command: CaptionCommand) -> None:
    """Write the shards, and say where."""
    paths = caption(command.recipe, command.data, command.out)
    print(f"{len(paths)} shards in {command.out}")


def caption(recipe_name: str, data: Path, out: Path) -> list[Path]:
    """Write the shards of a recipe from the labelled images in `data` to `out`."""
    recipe = load_caption_recipe(recipe_name)
    images = find_images(load_card(recipe.card), data, recipe.split)
    return write_shards(captioned(recipe, images), out, recipe.split, recipe.samples_per_shard)


def captioned(recipe: CaptionRecipe, images: LabelledImages) -> Iterator[Pair]:
    """The pairs, in a keyed order, since labelled sets often lie sorted by class."""
    card = load_card(recipe.card)
    count = len(images)
    order = keyed.permute(np.arange(count), count, 0, "caption order").tolist()
    for place, number in enumerate(progress(order, count, f"captioning {card.title}")):
        name = card.classes[int(images.labels[number])]
        drawn = keyed.generator(0, "caption", number).integers(len(recipe.captions))
        data, suffix = _encoded(images, number)
        yield Pair(f"{place:08}", data, suffix, recipe.captions[int(drawn)].replace("{}", name))


def _encoded(images: LabelledImages, number: int) -> tuple[bytes, str]:
    """The image's own bytes when it is a compressed file, else a PNG of its pixels."""
    image = images.open(number)
    kind = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}.get(image.format or "")
    if kind and isinstance(getattr(image, "fp", None), io.BytesIO):
        return image.fp.getvalue(), kind  # type: ignore[union-attr]
    if kind and (filename := getattr(image, "filename", "")):
        return Path(filename).read_bytes(), kind
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue(), "png"
