"""Writes shards that are the same bytes whenever they hold the same samples."""

import io
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from webdataset.writer import TarWriter

from evaclip.errors import InputError


@dataclass(frozen=True)
class Pair:
    """An image, as the bytes of a file, and its caption."""

    key: str
    image: bytes
    suffix: str
    """jpg, png or webp."""
    caption: str


def write_shards(pairs: Iterable[Pair], folder: Path, prefix: str, per_shard: int = 10_000) -> list[Path]:
    """`prefix-00000.tar` and so on, in the order given; existing ones are replaced.

    Plain ustar headers and no times: webdataset's own default adds a kilobyte to every member. A shard has another
    name until it is complete.
    """
    paths: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, block in enumerate(_blocks(pairs, per_shard)):
            path = folder / f"{prefix}-{number:05}.tar"
            temporary = path.with_name(f"{path.name}.part")
            with temporary.open("wb") as file:
                _write(block, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            paths.append(path)
    except OSError as error:
        raise InputError(f"shards cannot be written to {folder}: {error.strerror}") from None
    return paths


def _write(block: list[Pair], file: io.BufferedWriter) -> None:
    with TarWriter(file, encoder=False, mtime=0, format=tarfile.USTAR_FORMAT) as tar:
        for pair in block:
            tar.write({"__key__": pair.key, pair.suffix: pair.image, "txt": pair.caption.encode()})


def _blocks(pairs: Iterable[Pair], size: int) -> Iterator[list[Pair]]:
    block: list[Pair] = []
    for pair in pairs:
        block.append(pair)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block
