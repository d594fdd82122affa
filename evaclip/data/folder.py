"""A folder of image files as shards: for objectives that use no captions, a data set can stay as it is.

The files, those in sub-folders and behind links too, are put in a keyed order and dealt into shards of which nothing is
written but an index: the names and sizes of their files. So a shard is a random part of the set however the set is
sorted, and one order, one fingerprint and one way to replace damaged samples serve folders and tars. The fingerprint is
of names and sizes, since hashing the contents of loose files would mean to read all of them.

Later runs look only at the times of the folders, which change when a file comes or goes; a file that has another size
when it is read stops the run.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from evaclip import keyed
from evaclip.data.index import (
    IMAGE_SUFFIXES,
    RETRY_AFTER,
    ShardHead,
    ShardIndex,
    index_file,
    load_index,
    make_index_folder,
    stored_head,
    write_index,
)
from evaclip.errors import InputError
from evaclip.log import progress

VERSION = 1
SUFFIX = ".images"
PER_SHARD = 1000


def index_images(folder: Path, index_folder: Path | None = None) -> list[ShardHead]:
    """The heads of a folder's shards, `FOLDER/00000.images` and so on. Raises InputError when it holds no images."""
    record = index_file(folder / f"folder{SUFFIX}", index_folder).with_suffix(".json")
    known = _known(folder, record)
    if known is not None:
        return known
    make_index_folder(record.parent)  # before the time of the folder is looked at, which this changes
    try:
        files, folders = _found(folder)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}; mend it or take it away") from None
    if not files:
        raise InputError(
            f"the folder {folder} holds neither .tar files nor images ({', '.join(sorted(IMAGE_SUFFIXES))})"
        )
    order = keyed.permute(np.arange(len(files)), len(files), 0, "folder order").tolist()
    heads = []
    starts = range(0, len(files), PER_SHARD)
    for number, start in enumerate(progress(starts, len(starts), f"indexing {folder}")):
        part = [files[place] for place in order[start : start + PER_SHARD]]
        heads.append(_index(folder / f"{number:05}{SUFFIX}", part, index_folder))
    listed = [[head.path, head.bytes, head.sha256, head.samples] for head in heads]
    temporary = record.with_name(f"{record.name}.{os.getpid()}")
    temporary.write_text(json.dumps({"version": VERSION, "folders": folders, "heads": listed}))
    temporary.replace(record)
    return heads


def open_folder(head: ShardHead, index_folder: Path | None) -> "OpenFolder":
    """A shard of a folder. Raises InputError when another run has since indexed the folder and found other files."""
    path = Path(head.path)
    if stored_head(path, index_folder) != head:
        raise InputError(
            f"the index of {path.parent} is not the one that this run began with: the data has changed, and another "
            "run has indexed it again; put back what was there, or begin a new run"
        )
    return OpenFolder(path, load_index(path, index_folder))


class OpenFolder:
    """A shard of a folder, in the place of an `OpenShard`; no file stays open."""

    removed = False

    def __init__(self, path: Path, index: ShardIndex) -> None:
        self.path, self.index = path, index

    def close(self) -> None:
        """Nothing to give back."""

    def image(self, sample: int) -> bytes:
        """The bytes of a file. Raises InputError for one that is gone or has another size than when it was indexed."""
        path, size = self.path.parent / self.index.keys[sample], int(self.index.spans[sample, 1])
        data = _read(path)
        if len(data) != size:
            raise InputError(
                f"{path} has {len(data):,} bytes and had {size:,} when it was indexed: the data has changed; remove "
                f"{self.path.parent / '.evaclip'} to index the folder again"
            )
        return data


def _read(path: Path) -> bytes:
    """The bytes of a file, with a few more tries when the file system hiccups. Raises InputError."""
    for pause in (*RETRY_AFTER, None):
        try:
            return path.read_bytes()
        except OSError as error:
            if pause is None or isinstance(error, FileNotFoundError):
                raise InputError(f"{path} cannot be read: {error.strerror}") from None
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _known(folder: Path, record: Path) -> list[ShardHead] | None:
    """The heads as they were indexed, if no file has come or gone since."""
    try:
        found = json.loads(record.read_text())
        if found["version"] != VERSION or any(
            (folder / name).stat().st_mtime_ns != time for name, time in found["folders"]
        ):
            return None
        return [ShardHead(str(folder / Path(path).name), *rest) for path, *rest in found["heads"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _found(folder: Path) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Images as (name, size) and folders as (name, time of change), both sorted; hidden ones are passed over.

    Raises OSError for a folder that cannot be listed and a link that leads nowhere.
    """
    files, folders = [], []
    for place, names in _walked(folder):
        inside = os.path.relpath(place, folder)
        folders.append((inside, os.stat(place).st_mtime_ns))
        for name in names:
            if name.rpartition(".")[2].lower() in IMAGE_SUFFIXES:
                path = os.path.join(place, name)
                files.append((os.path.normpath(os.path.join(inside, name)), os.stat(path).st_size))
    return sorted(files), sorted(folders)


def _walked(folder: Path) -> Iterator[tuple[str, list[str]]]:
    seen: set[tuple[int, int]] = set()
    for place, inner, names in os.walk(folder, onerror=_raise, followlinks=True):
        stat = os.stat(place)
        if (stat.st_dev, stat.st_ino) in seen:  # a second link to it, or one back up
            inner.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield place, [name for name in names if not name.startswith(".")]


def _raise(error: OSError) -> None:
    raise error


def _index(path: Path, files: list[tuple[str, int]], index_folder: Path | None) -> ShardHead:
    text = "".join(f"{name}\0{size}\n" for name, size in files)
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()  # names may be in no encoding
    head = ShardHead(str(path), sum(size for _, size in files), digest, len(files))
    samples = {name: (0, size, 0, -1) for name, size in files}
    write_index(index_file(path, index_folder), head, samples, modified=0)
    return head
