"""How each kind of file gives its items: any range of them, without reading the ones before it where that is possible.

Nothing that a file says is trusted: paths inside it must stay in a folder, lines and images have a largest size.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.parquet as parquet

from evaclip.data.index import load_index
from evaclip.data.samples import MAX_CAPTION_BYTES
from evaclip.errors import InputError

What = Literal["image", "text"]
# Names by which tables and records call the same thing, in order of preference.
IMAGE_NAMES = ("image", "img", "jpg", "path", "file")
CAPTION_NAMES = ("caption", "text", "TEXT", "txt", "title")
KEY_NAMES = ("key", "id", "__key__")
MAX_IMAGE_BYTES = 256 * 1024**2
MAX_LINE_BYTES = 1024**2


@dataclass(frozen=True, slots=True)
class Sample:
    """One item; `data` is the encoded image. Where something is wrong, `status` says it in a word."""

    key: str
    path: str
    place: str
    offset: int
    caption: str = ""
    data: bytes | None = None
    status: str = "ok"
    reason: str = ""


@dataclass(frozen=True)
class Reading:
    """What is read, and around which folders."""

    what: What
    root: Path
    """Keys are relative to it."""
    images: Path
    """The images that a table names lie in it."""
    index_folder: Path
    """Where the indexes of shards lie."""


def original(row: dict[str, Any]) -> bytes:
    """The encoded image that a row of the table stands for, from where it was embedded.

    Raises InputError when the file is gone or is not as it was.
    """
    path, offset, size = Path(row["path"]), row["offset"], row["bytes"]
    try:
        if row["place"] == "row":
            data = _image_of_row(path, offset)
        else:
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(min(size, MAX_IMAGE_BYTES) + (row["place"] == "file"))
    except (OSError, pa.ArrowException, IndexError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if len(data) != size or size == 0:
        raise InputError(f"{path} has changed since it was embedded")
    return data


def relative(path: Path, root: Path) -> str:
    """A file's name in its collection."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def _stem(path: Path, root: Path) -> str:
    """A file's name in its collection without its suffix: two files of one name lie in two folders."""
    return relative(path, root).removesuffix(path.suffix)


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in _bounded(file, path))


def _bounded(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """Lines, none longer than is sane."""
    while line := file.readline(MAX_LINE_BYTES):
        if len(line) == MAX_LINE_BYTES:
            raise InputError(f"{path} has a line of more than {MAX_LINE_BYTES:,} bytes: it is not a list of captions")
        yield line


def lines_of(path: Path, first: int, last: int) -> Iterator[bytes]:
    """Lines number `first` to before `last`."""
    with path.open("rb") as file:
        yield from islice(_bounded(file, path), first, last)


def _count_rows(path: Path) -> int:
    try:
        return parquet.read_metadata(path).num_rows
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def _columns(path: Path) -> list[str]:
    try:
        return parquet.read_schema(path).names
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def column_named(path: Path, names: tuple[str, ...]) -> str | None:
    """The first of some names that a parquet file has a column for."""
    columns = _columns(path)
    return next((name for name in names if name in columns), None)


def _read_folder(reading: Reading, path: Path, first: int, last: int) -> Iterator[Sample]:
    beside = path.with_suffix(".txt")
    caption = beside.read_bytes()[:MAX_CAPTION_BYTES].decode("utf-8", "replace").strip() if beside.is_file() else ""
    yield _from_file(relative(path, reading.root), path, caption)


def _from_file(key: str, path: Path, caption: str) -> Sample:
    """An image that is a whole file."""
    try:
        if path.stat().st_size > MAX_IMAGE_BYTES:
            return Sample(key, str(path), "file", 0, caption, None, "too-large", f"more than {MAX_IMAGE_BYTES:,} bytes")
        return Sample(key, str(path), "file", 0, caption, path.read_bytes())
    except OSError as error:
        return Sample(key, str(path), "file", 0, caption, None, "unreadable", str(error.strerror))


def _read_shard(reading: Reading, path: Path, first: int, last: int) -> Iterator[Sample]:
    index = load_index(path, reading.index_folder)
    with path.open("rb") as file:

        def span(offset: int, size: int) -> bytes:
            file.seek(offset)
            return file.read(max(size, 0))

        for number in range(first, last):
            image_at, image_size, caption_at, caption_size = (int(value) for value in index.spans[number])
            caption = span(caption_at, min(caption_size, MAX_CAPTION_BYTES)).decode("utf-8", "replace").strip()
            data = span(image_at, image_size) if 0 < image_size <= MAX_IMAGE_BYTES else None
            yield Sample(
                f"{_stem(path, reading.root)}/{index.keys[number]}", str(path), "span", image_at, caption, data
            )


def _read_parquet(reading: Reading, path: Path, first: int, last: int) -> Iterator[Sample]:
    image, caption = column_named(path, IMAGE_NAMES), column_named(path, CAPTION_NAMES)
    key = column_named(path, KEY_NAMES)
    wanted = [name for name in (image if reading.what == "image" else None, caption, key) if name]
    if (image if reading.what == "image" else caption) is None:
        columns = ", ".join(_columns(path))
        raise InputError(f"{path} has the columns {columns}; none of them is known to hold {reading.what}s")
    for number, row in _table_rows(path, wanted, first, last):
        name = str(row[key]) if key else f"{_stem(path, reading.root)}/{number:08}"
        said = str(row[caption] or "") if caption else ""
        value = row[image] if reading.what == "image" and image else None
        if isinstance(value, str):  # a table of paths: the images lie beside it
            yield _named(name, path, value, said, number, reading.images)
            continue
        value = value.get("bytes") if isinstance(value, dict) else value
        yield Sample(name, str(path), "row", number, said, value if isinstance(value, bytes) else None)


def _table_rows(path: Path, columns: list[str], first: int, last: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a parquet file with their numbers; row groups before and after are not read."""
    try:
        file, start = parquet.ParquetFile(path), 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if start < last and start + count > first:
                at = start
                for batch in file.iter_batches(256, row_groups=[group], columns=columns):
                    if at < last and at + len(batch) > first:
                        begin, end = max(first - at, 0), min(last - at, len(batch))
                        yield from enumerate(batch.slice(begin, end - begin).to_pylist(), at + begin)
                    at += len(batch)
            start += count
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def _image_of_row(path: Path, row: int) -> bytes:
    image = column_named(path, IMAGE_NAMES)
    (_, found), *_ = _table_rows(path, [image or ""], row, row + 1)
    value = found[image or ""]
    value = value.get("bytes") if isinstance(value, dict) else value
    return value if isinstance(value, bytes) else b""


def _read_jsonl(reading: Reading, path: Path, first: int, last: int) -> Iterator[Sample]:
    for number, line in enumerate(lines_of(path, first, last), first):
        record, key = record_of(line), f"{_stem(path, reading.root)}:{number + 1}"
        if record is None:
            yield Sample(key, str(path), "line", number, status="not-json", reason="the line is no JSON object")
            continue
        key = next((str(record[name]) for name in KEY_NAMES if name in record), key)
        caption = next((str(record[name]) for name in CAPTION_NAMES if name in record), "")
        image = next((record[name] for name in IMAGE_NAMES if name in record), None)
        if reading.what == "image":
            yield _named(key, path, str(image or ""), caption, number, reading.images)
        else:
            yield Sample(key, str(path), "line", number, caption)


def record_of(line: bytes) -> dict[str, Any] | None:
    """The JSON object on a line, None where there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _named(key: str, table: Path, name: str, caption: str, number: int, root: Path) -> Sample:
    """An image that a table names: it must lie in the folder `root` or below, links resolved."""
    if not name:
        return Sample(key, str(table), "line", number, caption, None, "no-image", "the record names none")
    try:
        path = (root / name).resolve()
    except (OSError, ValueError) as error:
        return Sample(key, str(table), "line", number, caption, None, "unreadable", str(error))
    if not path.is_relative_to(root):
        reason = f"{name} lies outside {root}"
        return Sample(key, str(table), "line", number, caption, None, "outside", reason)
    return _from_file(key, path, caption)


def _read_text(reading: Reading, path: Path, first: int, last: int) -> Iterator[Sample]:
    for number, line in enumerate(lines_of(path, first, last), first):
        caption = line.decode("utf-8", "replace").strip()
        yield Sample(f"{_stem(path, reading.root)}:{number + 1}", str(path), "line", number, caption)


COUNTERS: dict[str, Callable[[Path], int]] = {
    "folder": lambda path: 1,
    "parquet": _count_rows,
    "jsonl": _count_lines,
    "text": _count_lines,
}
READERS: dict[str, Callable[[Reading, Path, int, int], Iterator[Sample]]] = {
    "folder": _read_folder,
    "shards": _read_shard,
    "parquet": _read_parquet,
    "jsonl": _read_jsonl,
    "text": _read_text,
}
