"""Collections of images or captions as they lie on disks, in an order that never changes.

A source is a list of files with a number of items in each; any range of items can be read without the ones before it.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from evaclip.data.index import expand, index_shards
from evaclip.errors import InputError, near_path
from evaclip.search.readers import (
    COUNTERS,
    IMAGE_NAMES,
    READERS,
    Reading,
    Sample,
    What,
    column_named,
    lines_of,
    record_of,
    relative,
)

Kind = Literal["folder", "shards", "parquet", "jsonl", "text"]
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
SUFFIXES: dict[str, Kind] = {".tar": "shards", ".parquet": "parquet", ".jsonl": "jsonl", ".txt": "text"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A collection: which files, and how many items in each."""

    kind: Kind
    reading: Reading
    files: tuple[Path, ...]
    ends: np.ndarray
    """int64: items in this file and all before it."""
    fingerprint: str
    """Hash of names, sizes and counts."""

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, stop: int) -> Iterator[Sample]:
        """The items with numbers from `start` to before `stop`."""
        while start < stop:
            number = int(np.searchsorted(self.ends, start, side="right"))
            before = int(self.ends[number - 1]) if number else 0
            last = min(stop, int(self.ends[number]))
            yield from READERS[self.kind](self.reading, self.files[number], start - before, last - before)
            start = last


def open_source(
    name: str, out: Path, kind: Kind | None = None, what: What | None = None, images: Path | None = None
) -> Source:
    """Recognise a collection by its files and list it.

    `name`: a folder, a file, a brace pattern or `@list`. `out` takes the indexes of shards. `images`: the folder of the
    images that a table names, by default its own. Raises InputError with one sentence for what is not there, empty, or
    could be meant in two ways.
    """
    files, kind, root = _found(name, kind)
    tables = images.resolve() if images else files[0].parent
    reading = Reading(what or _what(kind, files[0]), root, tables, out / "shards")
    if kind == "shards":
        heads = index_shards(files, index_folder=reading.index_folder)
        counts, identity = [head.samples for head in heads], [head.sha256 for head in heads]
    else:
        counts = [COUNTERS[kind](path) for path in files]
        identity = [str(path.stat().st_size) for path in files]
    if sum(counts) == 0:
        raise InputError(f"{name} is empty: nothing is in its {len(files)} files")
    digest = hashlib.sha256()
    for path, count, identified in zip(files, counts, identity, strict=True):
        digest.update(f"{relative(path, root)}\t{count}\t{identified}\n".encode())
    return Source(
        kind=kind, reading=reading, files=tuple(files), ends=np.cumsum(counts), fingerprint=digest.hexdigest()
    )


def _found(name: str, kind: Kind | None) -> tuple[list[Path], Kind, Path]:
    """The files of a source in their order, its kind, and the folder that names are relative to."""
    path = Path(name)
    if path.is_dir():
        path = path.resolve()
        kind = kind or _kind_of_folder(path)
        if kind == "folder":
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        else:
            files = sorted(file for file in path.iterdir() if SUFFIXES.get(file.suffix.lower()) == kind)
        if not files:
            raise InputError(f"the folder {name} holds no {'images' if kind == 'folder' else f'{kind} files'}")
        return files, kind, path
    if not path.is_file() and not set(name) & set("{@"):
        raise InputError(f"the source {name} does not exist; {near_path(path)}")
    files = [file.resolve() for file in ([path] if path.is_file() else expand([name]))]
    kinds: set[Kind | None] = {SUFFIXES.get(file.suffix.lower()) for file in files}
    kind = kind or (kinds.pop() if len(kinds) == 1 else None)
    if kind is None:
        raise InputError(f"{name} is neither a folder nor .tar, .parquet, .jsonl or .txt: name one of these")
    return files, kind, Path(os.path.commonpath([file.parent for file in files]))


def _kind_of_folder(path: Path) -> Kind:
    held: set[Kind] = set()
    held |= {SUFFIXES[file.suffix.lower()] for file in path.iterdir() if file.suffix.lower() in SUFFIXES}
    if any(file.suffix.lower() in IMAGE_SUFFIXES for file in path.rglob("*")):
        held.discard("text")  # texts beside images are their captions
        held.add("folder")
    if len(held) > 1:
        raise InputError(f"{path} holds {' and '.join(sorted(held))}; say which is meant with --kind")
    if not held:
        raise InputError(f"the folder {path} holds no images, nor .tar, .parquet, .jsonl or .txt files")
    return held.pop()


def _what(kind: Kind, first: Path) -> What:
    """Images where there are any."""
    if kind == "parquet":
        return "image" if column_named(first, IMAGE_NAMES) else "text"
    if kind == "jsonl":
        record = record_of(next(lines_of(first, 0, 1)))
        return "image" if record and any(name in record for name in IMAGE_NAMES) else "text"
    return "text" if kind == "text" else "image"
