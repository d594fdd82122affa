"""One small index per shard: where each sample's image and caption lie, and a hash of the whole file.

Indexes are made once, in parallel, and kept in a folder `.evaclip` beside the shards. Later runs look only at sizes
and modification times. Together the heads of all shards give the fingerprint of the data, which every checkpoint
carries: a run never continues on other data without being told to.
"""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np

from evaclip.data.tar import DamagedTarError, members
from evaclip.errors import InputError, did_you_mean
from evaclip.log import progress

VERSION = 2
FOLDER = ".evaclip"
IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})
CAPTION_SUFFIX = "txt"
NOTHING = (0, -1, 0, -1)
# Seconds before each new attempt to read a file.
RETRY_AFTER = (0.1, 1.0, 5.0)


@dataclass(frozen=True)
class ShardHead:
    """What identifies a shard, and how many samples it has."""

    path: str
    bytes: int
    sha256: str
    samples: int

    @property
    def name(self) -> str:
        """The file's name without its folder: a data set may move."""
        return Path(self.path).name


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of a shard lie."""

    spans: np.ndarray
    """int64 [samples, 4]: offset and size of the image, offset and size of the caption; size -1 where there is none."""
    keys: list[str]
    """The samples' names."""


def lines_of(patterns: Sequence[str]) -> list[str]:
    """The patterns, with those in `@file` in the place of its name. Raises InputError for a list that is not there."""
    found: list[str] = []
    for pattern in patterns:
        if not pattern.startswith("@"):
            found.append(pattern)
            continue
        path = Path(pattern[1:])
        if not path.is_file():
            raise InputError(f"the list of shards {path} does not exist")
        found += lines_of([line.strip() for line in path.read_text().splitlines() if line.strip()])
    return found


def expand(patterns: Sequence[str]) -> list[Path]:
    """The shards that patterns stand for: `a/{000..099}.tar`, a folder of tars, or `@file` with one pattern a line.

    Raises InputError for a pattern that stands for nothing and for shards that do not exist.
    """
    found: list[Path] = []
    for pattern in lines_of(patterns):
        if "://" in pattern or pattern.startswith("pipe:"):
            raise InputError(
                f"{pattern}: shards are read from local folders only; mount or copy them (training takes addresses)"
            )
        path = Path(pattern)
        if path.is_dir():
            tars = sorted(path.glob("*.tar"))
            if not tars:
                raise InputError(f"the folder {path} holds no .tar files")
            found += tars
        else:
            found += [Path(name) for name in braceexpand.braceexpand(pattern, escape=False)]
    if not found:
        raise InputError("no shards were named: give a brace pattern, a folder or @list to --data.sources")
    missing = [path for path in found if not path.is_file()]
    if missing:
        beside = [other.name for other in missing[0].parent.glob("*.tar")] if missing[0].parent.is_dir() else []
        raise InputError(
            f"{len(missing):,} of {len(found):,} shards do not exist, the first is {missing[0]}; "
            + (did_you_mean(missing[0].name, beside[:10_000]) if beside else f"{missing[0].parent} holds no shards")
        )
    return found


def index_shards(
    paths: Sequence[Path], *, index_folder: Path | None = None, skip_damaged: bool = False, processes: int = 1
) -> list[ShardHead]:
    """The heads of all shards, in their order; shards that are new or have changed are indexed first.

    `index_folder`: where indexes go when the shards' own folder is read-only. `skip_damaged`: leave shards that are
    no whole tar out of the data, instead of raising InputError with their names.
    """
    heads = {path: _known_head(path, index_folder) for path in paths}
    new = [path for path, head in heads.items() if head is None]
    damaged: list[str] = []
    if new:
        work = partial(index_or_reason, index_folder=index_folder)
        with ProcessPoolExecutor(processes) if processes > 1 and len(new) > 1 else _Inline() as pool:
            for path, result in zip(new, progress(pool.map(work, new), len(new), "indexing shards"), strict=True):
                if isinstance(result, ShardHead):
                    heads[path] = result
                else:
                    damaged.append(f"{path}: {result}")
    damage_refused(damaged, len(paths), skip_damaged)
    return [head for path in paths if (head := heads[path]) is not None]


def damage_refused(damaged: Sequence[str], count: int, skip_damaged: bool) -> None:
    """Raises InputError that names damaged shards, unless they are to be left out."""
    if damaged and not skip_damaged:
        shown = "; ".join(damaged[:5]) + (f"; and {len(damaged) - 5} more" if len(damaged) > 5 else "")
        raise InputError(
            f"{len(damaged)} of {count:,} shards are damaged ({shown}). "
            "Fetch them again, or leave them out with --data.skip-damaged-shards"
        )


def fingerprint(heads: Iterable[ShardHead]) -> str:
    """A hash of which samples there are: names, sizes and hashes of the shards, in any order, folders aside."""
    lines = sorted(f"{head.name} {head.bytes} {head.sha256} {head.samples}\n" for head in heads)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def load_index(path: Path, index_folder: Path | None = None) -> ShardIndex:
    """The index of a shard that `index_shards` has been over."""
    with np.load(index_file(path, index_folder), allow_pickle=False) as stored:
        return ShardIndex(stored["spans"], json.loads(stored["keys"].tobytes()))


def stored_head(path: Path, index_folder: Path | None = None) -> ShardHead | None:
    """The head of a shard as it was indexed, whatever has become of its file; None without an index."""
    head = _stored(index_file(path, index_folder))
    return ShardHead(str(path), head["bytes"], head["sha256"], head["samples"]) if head else None


def whole_index(file: Path) -> bool:
    """Whether an index that somebody else has made is one, and points nowhere outside its shard."""
    head = _stored(file)
    if head is None:
        return False
    try:
        with np.load(file, allow_pickle=False) as stored:
            spans, keys = stored["spans"], json.loads(stored["keys"].tobytes())
            offsets, sizes = spans[:, ::2], spans[:, 1::2]
            inside = (offsets >= 0) & (sizes >= -1) & (sizes <= head["bytes"]) & (offsets <= head["bytes"] - sizes)
            return (
                spans.dtype == np.int64 and spans.shape == (head["samples"], 4) == (len(keys), 4) and bool(inside.all())
            )
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return False


def _stored(file: Path) -> dict[str, Any] | None:
    """The record in an index of this version."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            head = json.loads(stored["head"].tobytes())
            return head if head["version"] == VERSION else None
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None


def _known_head(path: Path, index_folder: Path | None) -> ShardHead | None:
    """The head in an index that is up to date, else None."""
    head, stat = _stored(index_file(path, index_folder)), path.stat()
    if head is None or (head["modified"], head["bytes"]) != (stat.st_mtime_ns, stat.st_size):
        return None
    return stored_head(path, index_folder)


def index_or_reason(path: Path, index_folder: Path | None) -> ShardHead | str:
    """The head of a shard, which is indexed, or why it cannot be."""
    try:
        return _index(path, index_folder)
    except DamagedTarError as error:
        return str(error)


def _index(path: Path, index_folder: Path | None) -> ShardHead:
    stat = path.stat()
    samples = samples_of(path)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    head = ShardHead(str(path), stat.st_size, sha256, len(samples))
    file = index_file(path, index_folder)
    make_index_folder(file.parent)
    write_index(file, head, samples, modified=stat.st_mtime_ns)
    return head


def make_index_folder(folder: Path) -> None:
    """Raises InputError with the way out when it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_written(folder, error) from None


def write_index(file: Path, head: ShardHead, samples: dict[str, tuple[int, int, int, int]], *, modified: int) -> None:
    """An index file, whole or not at all. `samples`: as of `samples_of`. `modified`: the shard's time, nanoseconds."""
    record = asdict(head) | {"version": VERSION, "modified": modified}
    del record["path"]
    buffer = io.BytesIO()
    np.savez(
        buffer,
        head=np.frombuffer(json.dumps(record).encode(), np.uint8),
        spans=np.array(list(samples.values()), np.int64).reshape(-1, 4),
        keys=np.frombuffer(json.dumps(list(samples)).encode(), np.uint8),
    )
    try:
        temporary = file.with_name(f"{file.name}.{os.getpid()}")
        temporary.write_bytes(buffer.getvalue())
        temporary.replace(file)
    except OSError as error:
        raise _not_written(file, error) from None


def _not_written(path: Path, error: OSError) -> InputError:
    return InputError(
        f"the index {path} cannot be written ({error.strerror}); name a folder that can with --data.index-folder"
    )


def samples_of(path: Path) -> dict[str, tuple[int, int, int, int]]:
    """Spans of the samples of a shard, by key, as in `ShardIndex.spans`. Raises DamagedTarError.

    Members with the same name up to its first dot form a sample, as in the webdataset library.
    """
    samples: dict[str, tuple[int, int, int, int]] = {}
    for name, offset, size in members(path):
        key, suffix = split_name(name)
        image_at, image_size, caption_at, caption_size = samples.get(key, NOTHING)
        if suffix in IMAGE_SUFFIXES:
            samples[key] = (offset, size, caption_at, caption_size)
        elif suffix == CAPTION_SUFFIX:
            samples[key] = (image_at, image_size, offset, size)
        elif suffix and key not in samples:
            samples[key] = NOTHING
    return samples


def split_name(name: str) -> tuple[str, str]:
    """Key and suffix of a member: they part at the first dot of the file's name.

    A name without a dot, or that begins with one, has no suffix and belongs to no sample.
    """
    while name.startswith("./"):
        name = name[2:]
    folder, slash, last = name.rpartition("/")
    stem, _, suffix = last.partition(".")
    return folder + slash + stem, suffix.lower() if stem else ""


def index_file(path: Path, index_folder: Path | None) -> Path:
    """Where the index of a shard lies."""
    if index_folder is None:
        return path.parent / FOLDER / f"{path.name}.npz"
    place = hashlib.sha256(str(path.parent.resolve()).encode()).hexdigest()[:16]
    return index_folder / place / f"{path.name}.npz"


class _Inline:
    """An executor that does the work here and now."""

    def __enter__(self) -> "_Inline":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    map = staticmethod(map)
