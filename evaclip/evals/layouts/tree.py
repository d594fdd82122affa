"""A folder and an unpacked or packed tar look the same to a reader: folders, files, and the bytes of a file."""

import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from evaclip.data.tar import DamagedTarError, members
from evaclip.errors import InputError
from evaclip.evals.card import Card

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm")
# Formats that the benchmarks come in; PIL's other decoders are large and little tested.
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 100_000_000


@dataclass(frozen=True, slots=True)
class File:
    """A file in a folder, or in a tar file."""

    name: str
    """Its path below the tree's root."""
    path: Path
    """Where its bytes lie: itself, or the tar."""
    size: int
    time: int
    """When it was written, in ns."""
    offset: int | None = None
    """Where it begins in the tar."""

    @property
    def suffix(self) -> str:
        """`.jpg` of a `.JPG`."""
        return Path(self.name).suffix.lower()

    @property
    def stem(self) -> str:
        """The file's name without folders and suffix."""
        return Path(self.name).stem

    def read(self) -> bytes:
        """All of its bytes."""
        with self.path.open("rb") as stream:
            stream.seek(self.offset or 0)
            return stream.read(self.size)


@dataclass(frozen=True)
class Tree:
    """Files and folders below a root; of a folder on disk only what is asked for is looked at."""

    root: Path
    packed: dict[str, list[File]] | None = field(default=None, repr=False)
    """Of a tar: the files by folder."""
    below: str = ""
    """The part of a tar that is the root."""

    def folders(self) -> list[str]:
        """Names of the folders right below the root, sorted; hidden ones are left out."""
        if self.packed is None:
            found = [entry.name for entry in os.scandir(self.root) if entry.is_dir()]
        else:
            start = f"{self.below}/" if self.below else ""
            found = list({name[len(start) :].split("/")[0] for name in self.packed if name.startswith(start)} - {""})
        return sorted(name for name in found if not name.startswith((".", "__")))

    def files(self, folder: str = "") -> list[File]:
        """Files right below the root, or right below one of its folders, sorted by name."""
        if self.packed is not None:
            at = "/".join(part for part in (self.below, folder) if part)
            skipped = len(self.below) + 1 if self.below else 0
            return [File(f.name[skipped:], f.path, f.size, f.time, f.offset) for f in self.packed.get(at, [])]
        found = []
        for entry in os.scandir(self.root / folder):
            if entry.is_file() and not entry.name.startswith("."):
                about = entry.stat()
                name = f"{folder}/{entry.name}" if folder else entry.name
                found.append(File(name, Path(entry.path), about.st_size, about.st_mtime_ns))
        return sorted(found, key=lambda file: file.name)

    def at(self, folder: str) -> "Tree | None":
        """The tree below a folder, None where there is none."""
        if self.packed is None:
            return Tree(self.root / folder) if (self.root / folder).is_dir() else None
        below = "/".join(part for part in (self.below, folder) if part)
        inside = any(name == below or name.startswith(f"{below}/") for name in self.packed)
        return Tree(self.root, self.packed, below) if inside else None


def tree_of_tar(path: Path) -> Tree:
    """The tree of a tar file, whose members are read where they lie. Raises InputError for a damaged one."""
    packed: dict[str, list[File]] = {}
    time = path.stat().st_mtime_ns
    try:
        for member in members(path):
            name = member.name.removeprefix("./")
            packed.setdefault(name.rpartition("/")[0], []).append(File(name, path, member.size, time, member.offset))
    except DamagedTarError as error:
        raise InputError(f"{path} cannot be used: {error}") from None
    for files in packed.values():
        files.sort(key=lambda file: file.name)
    return Tree(path, packed)


def places(card: Card, data: Path, split: str) -> Iterator[Tree]:
    """Where the images of a split may lie in a folder or tar, likeliest first."""
    names = card.folders if split == "test" or re.fullmatch(r"[\d,]+", split) else (split,)
    trees = [tree_of_tar(data)] if data.is_file() else [Tree(data)]
    while trees:
        tree = trees.pop(0)
        yield from (found for name in names if (found := tree.at(name)) is not None)
        yield tree
        if tree.packed is None and tree.root == data:
            trees += [tree_of_tar(data / name) for name in card.archives if (data / name).is_file()]


def opened(data: bytes) -> Image.Image:
    """An image whose header has been read and found harmless. Raises OSError or ValueError."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"its {len(data):,} bytes are no JPEG, PNG or WebP image") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} is more than {MAX_PIXELS:,} pixels")
    return image
