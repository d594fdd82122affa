"""Labelled images as they lie on people's disks, recognised by content.

Each reader looks at a folder and returns the images it finds there, or None when the folder has another layout. A
label is joined to the card's class by its name wherever the data has names.
"""

import hashlib
import io
import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
from PIL import Image

from evaclip.errors import InputError, did_you_mean, near_path
from evaclip.evals.card import Card

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class LabelledImages:
    """A data set that is ready to be scored."""

    layout: str
    """Which reader recognised it."""
    keys: Sequence[str]
    """A name for each image, unique and stable."""
    labels: np.ndarray
    """int64: the card's class of each image."""
    open: Callable[[int], Image.Image]
    """The image with a given number."""
    fingerprint: str
    """Hash of keys, labels and the files' contents or sizes."""

    def __len__(self) -> int:
        return len(self.keys)


def find_images(card: Card, folder: Path, split: str = "test") -> LabelledImages:
    """The images of a benchmark in a folder. Raises InputError that says what was looked for, where."""
    if not folder.exists():
        raise InputError(
            f"{card.title} is not at {folder}; {near_path(folder)} To have it: {card.terms or card.source} "
            f"Then name its folder with --data; layouts understood: {', '.join(card.layouts)}"
        )
    for layout in card.layouts:
        if layout not in READERS:
            raise InputError(f"card {card.name}: no layout is called {layout!r}; {did_you_mean(layout, READERS)}")
        found = READERS[layout](card, folder, split)
        if found is not None:
            return found
    raise InputError(
        f"{folder} holds no {split} images of {card.title} in a layout known to this card: {', '.join(card.layouts)}"
    )


def class_folders(card: Card, folder: Path, split: str) -> LabelledImages | None:
    """`[split/]<label>/<image>`; folders with other names are an error, not another class."""
    root = next((folder / name for name in (split, "val", "valid") if (folder / name).is_dir()), folder)
    known = {label.lower(): number for number, label in enumerate(card.data_labels)}
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not any(path.name.lower() in known for path in folders):
        return None
    paths: list[Path] = []
    labels: list[int] = []
    for path in folders:
        if path.name.lower() not in known:
            raise InputError(f"{path} is no class of {card.title}; {did_you_mean(path.name, card.data_labels)}")
        images = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        paths += images
        labels += [known[path.name.lower()]] * len(images)
    keys = [str(path.relative_to(root)) for path in paths]
    sizes = [path.stat().st_size for path in paths]
    return LabelledImages(
        "class_folders", keys, np.array(labels), lambda i: Image.open(paths[i]), _hash(keys, labels, sizes)
    )


def huggingface_parquet(card: Card, folder: Path, split: str) -> LabelledImages | None:
    """`[data/]<split>-*.parquet` with a struct column {bytes, path} of images and an integer column of labels."""
    files = sorted([*folder.glob(f"{split}-*.parquet"), *folder.glob(f"data/{split}-*.parquet")])
    if not files:
        return None
    columns = parquet.read_schema(files[0])
    image = next((name for name in ("img", "image") if name in columns.names), None)
    label = next((name for name in ("label", "fine_label") if name in columns.names), None)
    if image is None or label is None:
        raise InputError(f"{files[0]} has the columns {', '.join(columns.names)}; an image and a label are needed")
    table = parquet.ParquetDataset(files).read(columns=[image, label])
    data = [entry["bytes"] for entry in table[image].to_pylist()]
    labels = _named_labels(card, columns.metadata, label, table[label].to_numpy())
    keys = [f"{split}-{row:06}" for row in range(len(data))]
    return LabelledImages(
        "huggingface_parquet", keys, labels, lambda i: Image.open(io.BytesIO(data[i])), _hash_files(files)
    )


def cifar_pickles(card: Card, folder: Path, split: str) -> LabelledImages | None:
    """`cifar-10-batches-py/{data_batch_1..5,test_batch}`, the pickles of the original site."""
    root = folder / "cifar-10-batches-py" if (folder / "cifar-10-batches-py").is_dir() else folder
    names = ["test_batch"] if split == "test" else [f"data_batch_{number}" for number in range(1, 6)]
    files = [root / name for name in names]
    if not all(file.is_file() for file in files):
        return None
    batches = [_restricted_unpickle(file) for file in files]
    try:
        labels = np.concatenate([np.asarray(batch[b"labels"], np.int64) for batch in batches])
        pixels = np.concatenate([np.asarray(batch[b"data"], np.uint8).reshape(-1, 3, 32, 32) for batch in batches])
    except (KeyError, ValueError) as error:
        raise InputError(f"{root} does not hold CIFAR batches as they were published: {error!r}") from None
    return _from_planes("cifar_pickles", split, labels, pixels, files)


def cifar_binary(card: Card, folder: Path, split: str) -> LabelledImages | None:
    """`cifar-10-batches-bin/{data_batch_1..5,test_batch}.bin`: a label byte and 3,072 bytes of colour planes each."""
    root = folder / "cifar-10-batches-bin" if (folder / "cifar-10-batches-bin").is_dir() else folder
    names = ["test_batch.bin"] if split == "test" else [f"data_batch_{number}.bin" for number in range(1, 6)]
    files = [root / name for name in names]
    if not all(file.is_file() for file in files):
        return None
    data = np.concatenate([np.fromfile(file, np.uint8) for file in files])
    if data.size % 3073:
        raise InputError(f"{root}: the size of {names[0]} is no multiple of 3,073 bytes; the file is cut")
    records = data.reshape(-1, 3073)
    return _from_planes(
        "cifar_binary", split, records[:, 0].astype(np.int64), records[:, 1:].reshape(-1, 3, 32, 32), files
    )


READERS: dict[str, Callable[[Card, Path, str], LabelledImages | None]] = {
    reader.__name__: reader for reader in (class_folders, huggingface_parquet, cifar_pickles, cifar_binary)
}


def _from_planes(
    layout: str, split: str, labels: np.ndarray, pixels: np.ndarray, files: Sequence[Path]
) -> LabelledImages:
    keys = [f"{split}-{row:06}" for row in range(len(labels))]
    return LabelledImages(
        layout, keys, labels, lambda i: Image.fromarray(pixels[i].transpose(1, 2, 0)), _hash_files(files)
    )


def _named_labels(card: Card, metadata: dict[bytes, bytes] | None, column: str, numbers: np.ndarray) -> np.ndarray:
    """Labels as the card numbers them: by the names in the file's own metadata where it has them."""
    said = json.loads((metadata or {}).get(b"huggingface", b"{}"))
    names = said.get("info", {}).get("features", {}).get(column, {}).get("names")
    if not names:
        return numbers.astype(np.int64)
    known = {label.lower(): number for number, label in enumerate(card.data_labels)}
    strange = [name for name in names if name.lower() not in known]
    if strange:
        raise InputError(f"{strange[0]!r} is no class of {card.title}; {did_you_mean(strange[0], card.data_labels)}")
    return np.array([known[name.lower()] for name in names])[numbers]


class _CifarUnpickler(pickle.Unpickler):
    """Allows numpy arrays and nothing else: a pickle can otherwise run any code."""

    ALLOWED = frozenset(
        [(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")]
        + [("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")]
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _restricted_unpickle(file: Path) -> Any:
    try:
        with file.open("rb") as stream:
            return _CifarUnpickler(stream, encoding="bytes").load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, ValueError) as error:
        raise InputError(f"{file} is not a CIFAR batch and was not loaded: {error}") from None


def _hash(keys: Sequence[str], labels: Sequence[int], sizes: Sequence[int]) -> str:
    lines = (f"{key}\t{label}\t{size}\n" for key, label, size in zip(keys, labels, sizes, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _hash_files(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
