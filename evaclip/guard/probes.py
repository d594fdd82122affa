"""What preflight measures: the speed of a GPU, of an all-reduce and of reading, clocks, and whether renames are atomic.

All of it takes seconds, and each function raises OSError, InputError or RuntimeError where a run would fail later.
"""

import errno
import hashlib
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import torch
import torch.distributed as dist

from evaclip.data.index import expand, lines_of
from evaclip.data.manifest import read_merged
from evaclip.data.remote import addresses, is_address
from evaclip.data.shards import DataConfig
from evaclip.distributed import gathered, rank, world_size
from evaclip.errors import InputError

# Seconds of a measurement.
SHORT = 0.5
# Shards that a node reads from, and bytes of each.
SHARDS, PIECE = 8, 4 << 20
# Words of the file that is replaced over and over.
WORDS = 10_000
# Side of the matrices, and bytes of the all-reduce, on a GPU and on a CPU.
SIDE = {"cuda": 8192, "cpu": 512}
REDUCED = {"cuda": 256 << 20, "cpu": 4 << 20}


def gpu_name(device: torch.device) -> str:
    """The name of a GPU with its identity."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} {properties.uuid}"


def matmul_tflops(device: torch.device) -> float:
    """Speed of a square product, bfloat16 on a GPU and float32 on a CPU."""
    side = SIDE[device.type]
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    seconds = _seconds(lambda: torch.mm(a, b), device, agreed=False)
    return 2 * side**3 / seconds / 1e12


def all_reduce_gbs(device: torch.device) -> float | None:
    """Bus bandwidth of an all-reduce over all processes; None where there is one. Raises InputError for a wrong sum."""
    count = world_size()
    if count == 1:
        return None
    told = torch.full((REDUCED[device.type] // 4,), rank() + 1.0, device=device)
    dist.all_reduce(told)
    if not bool((told == count * (count + 1) / 2).all()):
        raise InputError("the sum is wrong")
    seconds = _seconds(lambda: dist.all_reduce(told), device, agreed=True)
    return 2 * (count - 1) / count * REDUCED[device.type] / seconds / 1e9


def clock_skew(rounds: int = 5) -> float:
    """Seconds by which this process's clock is ahead of the middle one: the least of some tries, which includes the
    time that a message takes."""
    skews = []
    for _ in range(rounds):
        gathered({})  # leaves all processes at the same point
        clocks = [record["time"] for record in gathered({"time": time.time()})]
        skews.append(clocks[rank()] - statistics.median(clocks))
    return min(skews, key=abs)


def _seconds(work: Callable[[], Any], device: torch.device, agreed: bool) -> float:
    """Seconds of one call, the mean of as many as take about SHORT seconds; `agreed`: as many in every process."""

    def timed(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / count

    timed(1)
    once = torch.tensor(timed(2))
    if agreed:
        dist.all_reduce(once, dist.ReduceOp.MAX)
    return timed(max(1, min(100, int(SHORT / float(once)))))


def listing(data: DataConfig) -> tuple[list[str], str]:
    """All shards, paths and addresses, and a hash that is the same on each node that sees the same ones.

    Names count, and sizes of what lies on a file system. Raises InputError for shards that do not exist.
    """
    sources = read_merged(data.merged).sources if data.merged else data.sources
    patterns = [pattern for source in sources for pattern in lines_of(source.shards)]
    away = [address for pattern in patterns if is_address(pattern) for address in addresses(pattern)]
    here = [path for pattern in patterns if not is_address(pattern) for path in expand([pattern])]
    told = repr([(path.name, path.stat().st_size) for path in here] + away)
    return [*map(str, here), *away], hashlib.sha256(told.encode()).hexdigest()


def reading_mbs(places: Sequence[str], number: int) -> float:
    """Megabytes a second from the beginnings of some shards, and the ends of local ones; others for each `number`.

    What the operating system still holds in memory counts as read. Raises InputError that names the shard.
    """
    stride = max(1, len(places) // SHARDS)
    start, read = time.perf_counter(), 0
    for place in places[number % stride :: stride][:SHARDS]:
        try:
            opened: Any = fsspec.open(place, "rb") if is_address(place) else open(place, "rb")
            with opened as file:
                read += len(file.read(PIECE))
                if not is_address(place):
                    file.seek(max(0, os.path.getsize(place) - 512))
                    file.read(512)
        except Exception as error:  # each kind of storage has errors of its own
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
            raise InputError(f"{place} cannot be read: {reason}") from None
    return read / (time.perf_counter() - start) / 1e6


def write_trial(folder: Path, number: int) -> Path:
    """A folder under a temporary name, a file in it that is on the disk, then the name: as checkpoints are written."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{number}.tmp"
    temporary.mkdir()
    _put(temporary / "file", number, 0)
    return temporary.rename(folder / str(number))


def _put(path: Path, number: int, turn: int) -> None:
    """Replace a file by one that holds the same word many times."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        file.write(f"{number}-{turn % 10} " * WORDS)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def watch_renames(folder: Path, number: int, other: int) -> None:
    """Replace the file of `number` over and over while reading that of `other`, which does the same elsewhere.

    Raises InputError when the other's file is not to be seen, vanishes, or shows in part. That a network file system
    calls a file stale that was replaced while it was open is no fault: the reader is told.
    """
    mine, theirs = folder / str(number) / "file", folder / str(other) / "file"
    if not theirs.exists():
        raise InputError(f"what process {other} wrote to {folder} is not there: do all nodes share it?")
    until = time.monotonic() + SHORT

    def turn() -> None:
        turns = 0
        while time.monotonic() < until:
            turns += 1
            _put(mine, number, turns)

    with ThreadPoolExecutor(1) as pool:
        turning = pool.submit(turn)
        while time.monotonic() < until:
            try:
                words = theirs.read_text().split(" ")
            except FileNotFoundError:
                raise InputError("a file vanished while it was replaced: renaming is not atomic there") from None
            except OSError as error:
                if error.errno == errno.ESTALE:
                    continue
                raise
            if len(words) != WORDS + 1 or len(set(words[:-1])) != 1 or not words[0].startswith(f"{other}-"):
                raise InputError("a file was seen in part while it was replaced: renaming is not atomic there")
        turning.result()
