"""Shards at addresses (https://, s3://, gs://, whatever fsspec knows), read through a bounded folder on a local disk.

    address --again until whole, size and hash checked--> CACHE/shards/<place>/name.tar --as a local shard--> samples

Whole shards are fetched, so that training reads them as it reads local ones. The index of a shard stays when the shard
goes: with it a run starts without fetching anything. It is fetched too, where `evaclip data index` has left it beside
the shard. Workers and ranks of a machine share the folder: each shard is fetched by one of them. No shell is involved.
"""

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import braceexpand
import fsspec

from evaclip.data.index import FOLDER, ShardHead, damage_refused, index_file, index_or_reason, stored_head, whole_index
from evaclip.errors import InputError
from evaclip.fetch import fetch
from evaclip.log import progress

# Seconds before each new attempt through fsspec; for http(s), `fetch` has its own.
RETRY_AFTER = (1.0, 5.0, 20.0)
# Longest that one attempt at a shard may take over http(s).
SHARD_SECONDS = 3600.0
MAX_INDEX_BYTES = 256 << 20
# Fetched at once while shards are indexed: waiting for a network, not for a processor.
AT_ONCE = 8
# What stands behind the name of a shard that is not there yet.
UNFINISHED = re.compile(r"(\.came|\.part|\.reserved)+$")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """A folder on a local disk for shards that lie at addresses; each machine has its own."""

    folder: Path | None = None
    """Where it is."""
    gigabytes: float = 200.0
    """Most that its shards take; those least recently opened go first."""


def is_address(pattern: str) -> bool:
    """Whether a pattern names shards at an address. Raises InputError for one that would start a program."""
    if pattern.startswith("pipe:") or "::" in pattern.partition("?")[0]:
        raise InputError(f"{pattern}: shards are not read through programs or chains of them; name their address")
    return "://" in pattern


def addresses(pattern: str) -> list[str]:
    """The shards that `https://host/{000..099}.tar`, `s3://bucket/folder/` or `gs://bucket/*.tar` stand for."""
    scheme = urlsplit(pattern).scheme
    if not pattern.endswith("/") and "*" not in pattern:
        return list(braceexpand.braceexpand(pattern, escape=False))
    if scheme in ("http", "https"):
        raise InputError(
            f"{pattern}: a web server does not list its files; name the shards as {{000..099}} or in @list"
        )
    try:
        system, path = fsspec.core.url_to_fs(pattern)
        found = sorted(
            str(name) for name in system.glob(f"{path.rstrip('/')}/*.tar" if pattern.endswith("/") else path)
        )
    except Exception as error:  # each kind of storage has errors of its own
        raise _failed(pattern, error) from None
    if not found:
        raise InputError(f"{pattern} holds no .tar files")
    return [system.unstrip_protocol(name) for name in found]


class ShardCache:
    """The folder, and which shard of it came from where."""

    def __init__(self, config: CacheConfig, index_folder: Path | None = None) -> None:
        self.limit = int(config.gigabytes * 1e9)
        self.folder, self.index_folder = config.folder, index_folder
        self.addresses: dict[Path, str] = {}

    @property
    def shards(self) -> Path:
        """The part of the folder that is bounded. Raises InputError where no folder has been named."""
        if self.folder is None:
            raise InputError("name a folder on a local disk for shards from addresses: --data.cache.folder")
        return self.folder / "shards"

    def place(self, address: str) -> Path:
        """Where the shard of an address lies when it is here. Signatures in an address make no other shard of it."""
        parts = urlsplit(address)
        whole = PurePosixPath(parts.path)
        folder = hashlib.sha256(f"{parts.scheme}://{parts.hostname}:{parts.port}{whole.parent}".encode()).hexdigest()
        path = self.shards / folder[:16] / whole.name
        self.addresses[path] = address
        return path

    def heads(self, paths: Sequence[Path], skip_damaged: bool) -> list[ShardHead]:
        """The heads of shards at their places; those without an index are indexed first. Raises InputError."""
        heads = {path: stored_head(path, self.index_folder) for path in paths}
        new = [path for path, head in heads.items() if head is None]
        damaged: list[str] = []
        with ThreadPoolExecutor(AT_ONCE) as pool:
            results = progress(pool.map(self._indexed, new), len(new), "indexing shards at addresses")
            for path, result in zip(new, results, strict=True):
                if isinstance(result, ShardHead):
                    heads[path] = result
                else:
                    damaged.append(f"{self.addresses[path]}: {result}")
        damage_refused(damaged, len(paths), skip_damaged)
        return [head for path in paths if (head := heads[path]) is not None]

    def check_size(self, shards: Sequence[ShardHead], window: int) -> None:
        """Raises InputError when the shards that are read at the same time, two windows of them, do not fit."""
        mine = [head.bytes for head in shards if Path(head.path) in self.addresses]
        needed = min(sum(mine), 2 * window * max(mine, default=0))
        if needed > self.limit:
            raise InputError(
                f"the cache of {self.limit / 1e9:g} GB does not hold two windows of {window} shards "
                f"({needed / 1e9:.3g} GB): raise --data.cache.gigabytes or lower --data.window"
            )

    @contextmanager
    def held(self, path: Path, head: ShardHead) -> Iterator[None]:
        """Inside, the shard is at its place: long enough to open it, after which it may go. Local ones always are."""
        if path not in self.addresses:
            yield
            return
        with self._locked(path):
            if not path.exists() or path.stat().st_size != head.bytes:
                self._bring(path, head)
            os.utime(path)
            yield

    def _indexed(self, path: Path) -> ShardHead | str:
        """The head of a shard, which is fetched if its index is not there to be fetched, or how it is damaged."""
        with self._locked(path):
            head = stored_head(path, self.index_folder) or self._ready_index(path)
            if head is not None:
                return head
            if not path.exists():
                self._bring(path, None)
            result = index_or_reason(path, self.index_folder)
        self._make_room(0)
        return result

    def _ready_index(self, path: Path) -> ShardHead | None:
        """The head in an index that lies beside the shard at its address, if one does and it is whole."""
        front, _, name = self.addresses[path].rpartition("/")
        if "?" in name:
            return None
        target = index_file(path, self.index_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        came = target.with_name(f"{target.name}.came")
        try:
            _transfer(f"{front}/{FOLDER}/{name}.npz", came, MAX_INDEX_BYTES)
            if not whole_index(came):
                return None
            came.replace(target)
        except InputError:
            return None
        finally:
            came.unlink(missing_ok=True)
        return stored_head(path, self.index_folder)

    def _bring(self, path: Path, head: ShardHead | None) -> None:
        """Fetch a shard to its place, as the one that was indexed. The caller holds its lock."""
        address = self.addresses[path]
        path.parent.mkdir(parents=True, exist_ok=True)
        reserved, came = path.with_name(f"{path.name}.reserved"), path.with_name(f"{path.name}.came")
        size = head.bytes if head else 0
        try:
            self._make_room(size, reserved)
            for _ in range(2):  # a hash that differs once is a bit lost on its way, twice another shard
                _transfer(address, came, max_bytes=size or self.limit)
                if head is None or (came.stat().st_size, _sha256(came)) == (head.bytes, head.sha256):
                    with self._counting():
                        came.replace(path)
                        reserved.unlink()
                    return
            raise InputError(f"{address} is not the shard that was indexed: its hash or size differs")
        finally:
            came.unlink(missing_ok=True)
            reserved.unlink(missing_ok=True)

    def _make_room(self, needed: int, reserved: Path | None = None) -> None:
        """Let shards go until `needed` bytes fit, and reserve them by a file of that size, which takes no space.

        Whoever is about to open a shard, or fetches one, holds its lock: those stay, and are waited for if need be.
        What a killed process has left behind goes.
        """
        while True:
            with self._counting():
                total, busy = self._shrunk(self.limit - needed)
                if total + needed <= self.limit:
                    if reserved is not None:
                        reserved.touch()
                        os.truncate(reserved, needed)
                    return
            if not busy:
                size = f"{self.limit / 1e9:g} GB in {self.folder}"
                raise InputError(f"the cache of {size} is too small for a shard of {needed:,} bytes")
            time.sleep(0.1)

    def _shrunk(self, limit: int) -> tuple[int, bool]:
        """Remove what nobody holds, oldest first, until the rest has at most `limit` bytes.

        Returns the bytes of the rest, and whether some of it is held. A shard that is on its way counts by its
        reservation alone.
        """
        files = []
        for path in self.shards.glob("*/*.tar*"):
            with suppress(FileNotFoundError):
                stat = path.stat()
                on_its_way = path.suffix in (".came", ".part")
                files.append((0 if on_its_way else stat.st_mtime_ns, 0 if on_its_way else stat.st_size, path))
        files = [(age, size, path) for age, size, path in sorted(files) if not path.name.startswith(".")]
        total, busy = sum(size for _, size, _ in files), False
        for age, size, path in files:
            if age and total <= limit:
                break
            try:
                with self._locked(path.with_name(UNFINISHED.sub("", path.name)), wait=False):
                    path.unlink(missing_ok=True)
                    total -= size
            except BlockingIOError:
                busy = True
        return total, busy

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Inside, nobody else's shard comes or goes."""
        with _lock(self.shards / ".lock"):
            yield

    @contextmanager
    def _locked(self, path: Path, wait: bool = True) -> Iterator[None]:
        with _lock(path.with_name(f".{path.name}.lock"), wait):
            yield


@contextmanager
def _lock(path: Path, wait: bool = True) -> Iterator[None]:
    """An exclusive lock between processes and threads. Without `wait`, BlockingIOError is raised where it is taken."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def _transfer(address: str, target: Path, max_bytes: int) -> None:
    """Fetch a file, again when the network fails. Raises InputError."""
    if urlsplit(address).scheme in ("http", "https"):
        # The address is the user's own, who may have a server of his own beside him.
        fetch(address, target, max_bytes=max_bytes, seconds=SHARD_SECONDS, allow_private=True)
        return
    problem: Exception = InputError("never tried")
    for pause in (*RETRY_AFTER, None):
        try:
            system, path = fsspec.core.url_to_fs(address)
            if (size := system.size(path)) is not None and size > max_bytes:
                raise InputError(f"{address} has {size:,} bytes, more than the {max_bytes:,} that are allowed")
            system.get_file(path, str(target))
            if size is not None and target.stat().st_size != size:
                raise OSError(f"{target.stat().st_size:,} of {size:,} bytes came")
            return
        except (InputError, FileNotFoundError, PermissionError, ImportError, ValueError) as error:
            raise error if isinstance(error, InputError) else _failed(address, error) from None
        except Exception as error:  # each kind of storage has errors of its own
            problem = error
        if pause is not None:
            time.sleep(pause)
    raise _failed(address, problem)


def _failed(address: str, error: Exception) -> InputError:
    if isinstance(error, ImportError):
        return InputError(f"{address} cannot be read: {error}")
    if isinstance(error, FileNotFoundError):
        return InputError(f"{address} does not exist")
    said = str(error).strip().splitlines() or [type(error).__name__]
    return InputError(f"{address} could not be fetched: {said[0]}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
