"""Labelled images and videos as they lie on people's disks, recognised by content.

Each reader looks at a folder (or a tar) and returns what it finds there, or None when the data has another layout. A
label is joined to the card's class by its name wherever the data has names.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from evaclip.errors import InputError, did_you_mean, near_path
from evaclip.evals.card import Card
from evaclip.evals.layouts.cifar import arrays, cifar_binary, cifar_pickles
from evaclip.evals.layouts.folders import class_folders
from evaclip.evals.layouts.found import LabelledImages
from evaclip.evals.layouts.frames import frame_cache
from evaclip.evals.layouts.imagenet import flat_imagenet
from evaclip.evals.layouts.shards import webdataset
from evaclip.evals.layouts.table import huggingface_parquet
from evaclip.evals.layouts.videos import kinetics_csv, ucf_lists, video_list

__all__ = ["READERS", "LabelledImages", "find_images"]

READERS: dict[str, Callable[[Card, Path, str], LabelledImages | None]] = {
    reader.__name__: reader
    for reader in (
        class_folders, flat_imagenet, huggingface_parquet, webdataset, cifar_pickles, cifar_binary, arrays,
        frame_cache, ucf_lists, kinetics_csv, video_list,
    )
}  # fmt: skip


# What a reader meets in a list or table that is not what its name says.
OTHER_CONTENTS = (ValueError, KeyError, TypeError, AttributeError, OSError)


def find_images(card: Card, folder: Path, split: str = "test") -> LabelledImages:
    """The images of a benchmark in a folder. Raises InputError that says what was looked for, where."""
    if not folder.exists():
        raise InputError(
            f"{card.title} is not at {folder}; {near_path(folder)} To have it: {card.terms or card.source} "
            f"Then name its folder with --data; layouts understood: {', '.join(card.layouts)}"
        )
    for variant in card.other_variants:
        if variant in folder.resolve().name:
            raise InputError(f"{folder} is another variant ({variant}) of {card.title}, whose scores are not its own")
    for layout in card.layouts:
        if layout not in READERS:
            raise InputError(f"card {card.name}: no layout is called {layout!r}; {did_you_mean(layout, READERS)}")
        try:
            found = READERS[layout](card, folder, split)
        except OTHER_CONTENTS as error:
            raise InputError(f"{folder} looks like {layout}, but cannot be read as that: {error!r}") from None
        if found is not None:
            return _looked_at(card, found)
    raise InputError(
        f"{folder} holds no {split} images of {card.title} in a layout known to this card: {', '.join(card.layouts)}"
    )


def _looked_at(card: Card, found: LabelledImages) -> LabelledImages:
    """With a note where the pixels cannot be those that were published."""
    if card.lossless and len(found):
        try:
            kind = found.open(0).format
        except (OSError, ValueError, SyntaxError):
            return found
        if kind == "JPEG":
            note = "the pixels were encoded again as JPEG: not the reference data"
            return replace(found, notes=(*found.notes, note))
    return found
