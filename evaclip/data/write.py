"""Writes shards that are the same bytes whenever they hold the same samples."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from evaclip.data.index import ShardHead
from evaclip.data.tar import BLOCK
from evaclip.errors import InputError

# Tars end at a multiple of this.
RECORD = 20 * BLOCK
WRITTEN_AT_ONCE = 4 << 20
# The fields of a header that are the same in all: mode and owner, time, and what follows the checksum.
HEADER_START = (b"0000444\0", b"0000000\0", b"0000000\0")
HEADER_MIDDLE = b"\0" + b"00000000000\0"
HEADER_END = (b"0" + bytes(100) + b"ustar\x0000" + b"bigdata".ljust(32, b"\0") * 2).ljust(356, b"\0")
HEADER_SUM = sum(b"".join((*HEADER_START, HEADER_MIDDLE, HEADER_END))) + 8 * 32


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
            with ShardWriter(path) as shard:
                for pair in block:
                    shard.add(f"{pair.key}.{pair.suffix}", pair.image)
                    shard.add(f"{pair.key}.txt", pair.caption.encode())
            paths.append(path)
    except OSError as error:
        raise InputError(f"shards cannot be written to {folder}: {error.strerror}") from None
    return paths


class ShardWriter:
    """One tar of plain ustar headers, under another name until it is whole; its hash is known when it is closed.

    The bytes are those of the webdataset library's writer with `mtime=0` and `USTAR_FORMAT`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self._part = path.with_name(f"{path.name}.part")
        self._hash = hashlib.sha256()

    def __enter__(self) -> "ShardWriter":
        self._file = self._part.open("wb", buffering=0)
        self._pieces: list[bytes] = []
        self._held = 0
        return self

    def add(self, name: str, data: bytes) -> None:
        """A file of the shard. `name`: at most 100 bytes, which `evaclip.curate.scan` sees to for names of others."""
        self._pieces += (plain_header(name.encode(), len(data)), data, bytes(-len(data) % BLOCK))
        self._held += len(data) + 2 * BLOCK
        if self._held > WRITTEN_AT_ONCE:
            self._flush()

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self._flush()
            self._pieces = [bytes(2 * BLOCK + -(self.bytes + 2 * BLOCK) % RECORD)]
            self._flush()
            os.fsync(self._file.fileno())
        self._file.close()
        if kind is None:
            self._part.replace(self.path)
        else:
            self._part.unlink(missing_ok=True)

    def head(self, samples: int) -> ShardHead:
        """What the index would find, once the shard is closed."""
        return ShardHead(str(self.path), self.bytes, self._hash.hexdigest(), samples)

    def _flush(self) -> None:
        block = b"".join(self._pieces)
        self._hash.update(block)
        left = memoryview(block)
        while left:
            left = left[self._file.write(left) :]
        self.bytes += len(block)
        self._pieces, self._held = [], 0


def plain_header(name: bytes, size: int) -> bytes:
    """A ustar header of a file that anyone may read, without owner or time."""
    if len(name) > 100 or size >= 8**11:
        raise InputError(f"{name.decode('utf-8', 'replace')}: a plain tar header holds names of 100 bytes and 8 GiB")
    digits = b"%011o" % size
    checksum = b"%06o\0 " % (HEADER_SUM + sum(name) + sum(digits))
    return b"".join((name, bytes(100 - len(name)), *HEADER_START, digits, HEADER_MIDDLE, checksum, HEADER_END))


def _blocks(pairs: Iterable[Pair], size: int) -> Iterator[list[Pair]]:
    block: list[Pair] = []
    for pair in pairs:
        block.append(pair)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block
