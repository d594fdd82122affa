"""Walks the headers of a tar file, and trusts none of them.

Python's `tarfile` takes ten times as long, extracts links, and reads a file that was cut at a header as complete. A
training set needs only where each member's bytes lie, and wants to know about a cut.

A tar whose headers are all plain is taken in at once with numpy; any other is walked header by header. Past damage the
walk goes on at the next header that is whole, so that what can be saved is found and what cannot is named.
"""

import mmap
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

BLOCK = 512
END = bytes(BLOCK)
MAGIC = b"ustar"
# An extended header holds a name and a time; larger ones are an attempt to fill the memory.
MAX_EXTENSION = 64 * 1024
OCTAL = re.compile(rb" *([0-7]*)[ \0]*").fullmatch
TIME = re.compile(rb"(\d\d) mtime=[0-9.]{1,40}\n").fullmatch
RECORD = re.compile(rb"([1-9][0-9]{0,5}) ([^=\n]{1,1024})=")


class DamagedTarError(Exception):
    """A tar file that is not whole: the message says where and how."""


class Member(NamedTuple):
    """One regular file inside a tar: its name and where its bytes lie."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Damage:
    """A place of a tar that is not as it should be."""

    code: str
    """`cut`, `bad-header`, `not-a-file` or `after-end`."""
    offset: int
    detail: str


class _Broken(Exception):
    """Why a header cannot be used."""


@contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap]:
    """The bytes of a file, not read before they are looked at. Raises DamagedTarError for an empty one."""
    if path.stat().st_size == 0:
        raise DamagedTarError("it is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def members(path: Path) -> list[Member]:
    """The regular files of a tar in their order (ustar, GNU long names, PAX).

    Directories are passed over; links, devices and anything else are not what a shard holds. Raises DamagedTarError
    for those, for a wrong checksum, for an archive that does not end with two empty blocks, and for anything after
    them: `cat` of two tars hides the second.
    """
    with mapped(path) as data:
        found, damage = survey(data)
    if damage:
        raise DamagedTarError(damage[0].detail)
    return found


def survey(data: mmap.mmap) -> tuple[list[Member], list[Damage]]:
    """Every regular file that can be found, and everything that is wrong. Raises nothing, whatever the bytes are."""
    plain = _plain(data)
    if plain is not None:
        return plain, []
    found, damage = [], []
    for item in _walk(data):
        (found if isinstance(item, Member) else damage).append(item)
    return found, damage


def _plain(data: mmap.mmap) -> list[Member] | None:
    """The members, if every header is of the usual form and each begins where the one before says; else None."""
    blocks = _blocks(data)
    count, at = len(blocks), _marked(blocks)
    headers = blocks[at]
    size, checksum = _octal(headers[:, 124:136]), _octal(headers[:, 148:155])
    if not len(at) or size is None or checksum is None or at[0]:
        return None
    after = at + 1 + (size + BLOCK - 1) // BLOCK
    end = int(after[-1])
    if (after[:-1] != at[1:]).any() or end + 2 > count or len(data) % BLOCK or blocks[end:].any():
        return None
    if (headers.sum(1) - headers[:, 148:156].sum(1) + 8 * 32 != checksum).any() or headers[:, 345].any():
        return None
    if ((headers[:, 155] != 32) & (headers[:, 155] != 0)).any():
        return None
    kinds = headers[:, 156].tobytes()
    if kinds.translate(None, b"0\0005x") or kinds[-1:] == b"x" or b"xx" in kinds:
        return None
    names = np.ascontiguousarray(headers[:, :100]).view("S100")[:, 0].tolist()
    starts, sizes = ((at + 1) * BLOCK).tolist(), size.tolist()
    found = []
    for name, kind, start, length in zip(names, kinds, starts, sizes, strict=True):
        if kind == 0x78:  # x: what PAX says of the next member; a time is all that the webdataset library writes
            time = TIME(data[start : start + length])
            if time is None or int(time[1]) != length:
                return None
        elif kind != 0x35:
            found.append(Member(name.decode("utf-8", "replace"), start, length))
    return found


def _blocks(data: mmap.mmap) -> np.ndarray:
    """uint8 [blocks, 512], without a copy."""
    count = len(data) // BLOCK
    return np.frombuffer(data, np.uint8, count * BLOCK).reshape(count, BLOCK)


def _marked(blocks: np.ndarray) -> np.ndarray:
    """Numbers of the blocks that have a header's magic word in its place."""
    at = np.flatnonzero(blocks[:, 257] == MAGIC[0])
    return at[(blocks[at, 257:262] == np.frombuffer(MAGIC, np.uint8)).all(1)]


def _octal(field: np.ndarray) -> np.ndarray | None:
    """Numbers of a column of fields, each all octal digits and one NUL or space; None if one of them is not."""
    digits = field[:, :-1].astype(np.int64) - 48
    if (digits < 0).any() or (digits > 7).any() or ((field[:, -1] != 0) & (field[:, -1] != 32)).any():
        return None
    return digits @ (8 ** np.arange(digits.shape[1] - 1, -1, -1, dtype=np.int64))


def _walk(data: mmap.mmap) -> Iterator[Member | Damage]:
    at, size, longer, marked = 0, len(data), {}, _marked(_blocks(data))
    while True:
        header = data[at : at + BLOCK]
        try:
            if len(header) < BLOCK:
                yield Damage("cut", at, f"it is cut: no end of archive at byte {at:,}")
                return
            if header == END:
                yield from _after_end(data, at)
                after = _next_header(data, marked, at)
                if after is None:
                    return
                at = after
                continue
            _verify(header, at)
            kind, body = header[156:157], at + BLOCK
            extends = kind in (b"x", b"g", b"L", b"K")
            length = _number(header[124:136], at)
            if not extends:
                length = longer.get("size", length)
            if body + length > size:
                raise _Broken("cut", f"it is cut: a member ends at byte {body + length:,}, the file at {size:,}")
            following = body + (length + BLOCK - 1) // BLOCK * BLOCK
            if extends:
                if length > MAX_EXTENSION:
                    raise _Broken("bad-header", f"the extended header at byte {at:,} is {length:,} bytes long")
                longer |= _extended(kind, data[body : body + length], body)
                at = following
                continue
        except _Broken as error:
            yield Damage(error.args[0], at, error.args[1])
            longer, after = {}, _next_header(data, marked, at + BLOCK)
            if after is None:
                return
            at = after
            continue
        name = longer.get("path") or _name(header)
        longer = {}
        if kind in (b"0", b"\0"):
            yield Member(name, body, length)
        elif kind != b"5":
            yield Damage("not-a-file", at, f"member {name!r} is a link or device, not a file")
        at = following


def _after_end(data: mmap.mmap, at: int) -> Iterator[Damage]:
    """What is wrong with an end of archive: only one empty block, or something after it."""
    if data[at + BLOCK : at + 2 * BLOCK] != END:
        yield Damage("cut", at, f"it is cut: half an end of archive at byte {at:,}")
        return
    step = 8 * BLOCK
    while at < len(data):
        if data[at : at + step].strip(b"\0"):
            yield Damage("after-end", at, f"the archive ends before byte {at + step:,}, but the file goes on")
            return
        at, step = at + step, min(2 * step, 1 << 20)


def _next_header(data: mmap.mmap, marked: np.ndarray, at: int) -> int | None:
    """Where the next header with a right checksum begins, at or after block `at`; `marked`: see `_marked`."""
    first = int(np.searchsorted(marked, (at + BLOCK - 1) // BLOCK))
    for number in range(first, len(marked)):
        block = int(marked[number])
        try:
            _verify(data[block * BLOCK : (block + 1) * BLOCK], block * BLOCK)
            return block * BLOCK
        except _Broken:
            continue
    return None


def _verify(header: bytes, at: int) -> None:
    """The checksum field counts as eight spaces in its own sum."""
    expected = sum(header) - sum(header[148:156]) + 8 * 32
    if _number(header[148:156], at) != expected:
        raise _Broken("bad-header", f"the header at byte {at:,} has a wrong checksum")


def _number(field: bytes, at: int) -> int:
    """An octal field, or GNU's binary form for large numbers; never a negative one."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = OCTAL(field)
    if digits is None:
        raise _Broken("bad-header", f"the header at byte {at:,} holds no number where one belongs")
    return int(digits[1] or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].rstrip(b"\0")
    prefix = header[345:500].rstrip(b"\0") if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "replace")


def _extended(kind: bytes, body: bytes, at: int) -> dict:
    """What a PAX or GNU extension says of the member after it: `path`, a name, and `size`, a number."""
    if kind == b"L":
        return {"path": body.rstrip(b"\0").decode("utf-8", "replace")}
    if kind in (b"g", b"K"):  # defaults for the whole archive and the targets of links: none that matter here
        return {}
    said, start = {}, 0
    while start < len(body):
        record = RECORD.match(body, start)
        end = start + int(record[1]) if record else 0
        if record is None or record.end() >= end or end > len(body) or body[end - 1] != 0x0A:
            raise _Broken("bad-header", f"the extended header at byte {at:,} is damaged")
        value = body[record.end() : end - 1]
        if record[2] == b"path":
            said["path"] = value.decode("utf-8", "replace")
        elif record[2] == b"size":
            if not value.isdigit() or len(value) > 18:
                raise _Broken("bad-header", f"the extended header at byte {at:,} is damaged")
            said["size"] = int(value)
        start = end
    return said
