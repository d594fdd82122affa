"""Parquet files as the Hugging Face hub has them: a struct of image bytes and a number for the class in each row."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
from PIL import Image

from evaclip.errors import InputError
from evaclip.evals.card import Card
from evaclip.evals.layouts.found import LabelledImages, digest_of_contents, stamp_of
from evaclip.evals.layouts.tree import opened
from evaclip.evals.names import join_list


def huggingface_parquet(card: Card, data: Path, split: str) -> LabelledImages | None:
    """`[data/]<split>-*.parquet`, of the card's names for its test part the first (ImageNet's "test" has no labels).

    Only the row group of the wanted image is held in memory.
    """
    if not data.is_dir():
        return None
    for name in [name for name in card.folders if "/" not in name] if split == "test" else [split]:
        files = sorted([*data.glob(f"{name}-*.parquet"), *data.glob(f"data/{name}-*.parquet")])
        if files:
            return _rows(card, files, name)
    return None


def _rows(card: Card, files: list[Path], split: str) -> LabelledImages:
    try:
        columns = parquet.read_schema(files[0])
    except (OSError, ValueError) as error:
        raise InputError(f"{files[0]} is no parquet file: {error}") from None
    image = next((name for name in ("img", "image", "jpg", "webp") if name in columns.names), None)
    label = next((name for name in ("fine_label", "label", "cls") if name in columns.names), None)
    if image is None or label is None:
        raise InputError(f"{files[0]} has the columns {', '.join(columns.names)}; an image and a label are needed")
    numbers, paths, places = [], [], []
    for file in files:
        table = parquet.ParquetFile(file)
        read = table.read(columns=[label, f"{image}.path"])
        numbers.append(read[label].to_numpy())
        if image in read.column_names:
            paths += [(row or {}).get("path") for row in read[image].to_pylist()]
        for group in range(table.num_row_groups):
            places += [(file, group, row) for row in range(table.metadata.row_group(group).num_rows)]

    @lru_cache(maxsize=2)
    def group_of(file: Path, group: int) -> Any:
        return parquet.ParquetFile(file).read_row_group(group, columns=[image])[image].combine_chunks()

    def open(number: int) -> Image.Image:
        file, group, row = places[number]
        data = (group_of(file, group)[row].as_py() or {}).get("bytes")
        if not isinstance(data, bytes):
            raise ValueError(f"row {row} of row group {group} of {file.name} holds no image")
        return opened(data)

    labels = _named_labels(card, columns.metadata, label, np.concatenate(numbers), files[0])
    keys = [f"{split}-{row:06}" for row in range(len(labels))]
    if len(paths) == len(keys) and all(paths) and len(set(paths)) == len(keys):
        keys = paths
    layout = "huggingface_parquet"
    return LabelledImages(layout, keys, labels, open, digest_of_contents(files), stamp=stamp_of(files))


def _named_labels(
    card: Card, metadata: dict[bytes, bytes] | None, column: str, numbers: np.ndarray, where: Path
) -> np.ndarray:
    """Labels as the card numbers them: by the names in the file's own metadata where it has them."""
    said = json.loads((metadata or {}).get(b"huggingface", b"{}"))
    names = said.get("info", {}).get("features", {}).get(column, {}).get("names")
    numbers = numbers.astype(np.int64)
    order = np.array(join_list(card, names, where)) if names else np.arange(len(card.classes))
    if len(numbers) and not (0 <= numbers.min() and numbers.max() < len(order)):
        raise InputError(
            f"{where} has labels from {numbers.min()} to {numbers.max()}; {card.title} has {len(card.classes)} classes"
        )
    return order[numbers]
