"""Vectors on the disk: partitions of a .npy and a .parquet with the same rows, and one manifest.

    OUT/embeddings.json                    what was embedded, with which model, in how many partitions
    OUT/part-00000.npy                     float16 [rows, dim], unit vectors; zeros for a row that is not `ok`
    OUT/part-00000.parquet                 what each row stands for
    OUT/bad.jsonl                          the rows that are not `ok`, with the reason

A file has another name until it is complete, and a partition's .parquet comes after its .npy: where it is, the
partition is whole. So work that was interrupted goes on with the partitions that are missing.
"""

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from jaxtyping import Float16

from evaclip.errors import InputError, near_path

VERSION = 1
MANIFEST = "embeddings.json"
LEDGER = "bad.jsonl"
LOCK = ".lock"
SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # the row's name, unique in its source
        ("path", pa.string()),  # the file that holds it
        ("place", pa.string()),  # how `offset` counts in that file: file (it is the whole), span (bytes), row, line
        ("offset", pa.int64()),
        ("bytes", pa.int64()),  # of the encoded image
        ("caption", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("status", pa.string()),  # ok, or one word for what is wrong
        ("reason", pa.string()),
    ]
)


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A name to write to; the file gets its own name when the block ends well, and is flushed to the disk before."""
    temporary = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """The only process that writes to a folder, which is made if need be. Raises InputError if there is another.

    The lock is the kernel's: it is gone when its process is, however that ended. What an interrupted writer left
    half written is removed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a")
    except OSError as error:
        raise InputError(f"{folder} cannot be written to: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is writing to {folder}; wait for it, or stop it first") from None
        for left in folder.glob("*.tmp-*"):
            left.unlink()
        yield


def write_json(path: Path, record: dict[str, Any]) -> None:
    """A record, atomically."""
    with atomically(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


def read_json(path: Path, version: int, made_by: str) -> dict[str, Any]:
    """A manifest. Raises InputError when it is not there, not JSON, or of a newer version than this code."""
    try:
        record = json.loads(path.read_text())
        found = record["version"]
    except FileNotFoundError:
        where = f"{path.parent} has no {path.name}" if path.parent.is_dir() else f"{path.parent} does not exist"
        near = "" if path.parent.is_dir() else f"; {near_path(path.parent)}"
        raise InputError(f"{where}: {made_by} makes one{near}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, int) or found > version:
        raise InputError(f"{path} was written by a newer evaclip (format {found}, this one knows {version}): update it")
    return record


def partition_name(number: int) -> str:
    """The name of a partition's files, without their ending."""
    return f"part-{number:05}"


def is_whole(folder: Path, number: int) -> bool:
    """Whether a partition has been written."""
    name = partition_name(number)
    return (folder / f"{name}.parquet").is_file() and (folder / f"{name}.npy").is_file()


def write_partition(folder: Path, number: int, vectors: Float16[np.ndarray, "rows dim"], rows: pa.Table) -> None:
    """A partition's two files, the table last."""
    with atomically(folder / f"{partition_name(number)}.npy") as temporary, temporary.open("wb") as file:
        np.save(file, vectors, allow_pickle=False)
    with atomically(folder / f"{partition_name(number)}.parquet") as temporary:
        parquet.write_table(rows, temporary)


def mapped(path: Path, rows: int, dim: int) -> Float16[np.ndarray, "rows dim"]:
    """Vectors, mapped into memory and not read. Raises InputError unless they are what the manifest says."""
    try:
        vectors = np.load(path, mmap_mode="c", allow_pickle=False)  # "c": changes would never reach the file
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if vectors.dtype != np.float16 or vectors.shape != (rows, dim):
        raise InputError(
            f"{path} holds {vectors.dtype} {vectors.shape}, not the float16 {(rows, dim)} that were written to it"
        )
    return vectors


def read_rows(path: Path, columns: list[str] | None = None) -> pa.Table:
    """The table of a partition. Raises InputError for a file that is damaged or has other columns."""
    try:
        return parquet.read_table(path, columns=columns, schema=None if columns else SCHEMA)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def write_ledger(folder: Path, partitions: int) -> int:
    """Gather what could not be embedded, in the order of the source. Returns how many there are."""
    count = 0
    with atomically(folder / LEDGER) as temporary, temporary.open("w") as file:
        for number in range(partitions):
            path = folder / f"{partition_name(number)}.parquet"
            if not is_whole(folder, number):
                continue
            for row in read_rows(path, ["key", "path", "status", "reason"]).to_pylist():
                if row["status"] != "ok":
                    file.write(json.dumps(row) + "\n")
                    count += 1
    return count
