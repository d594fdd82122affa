"""`evaclip data reshard`: the same samples in shards of equal size, shuffled over the whole set by a seed.

Which sample goes where is a pure function of the set and the seed (`data/order.py`, whose first epoch visits every
sample once). So shards are written in any order, by any number of processes, and an interrupted command goes on.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from evaclip.curate.check import key_hashes
from evaclip.curate.journal import Journal, shard_state
from evaclip.curate.rewrite import claim, finish, several_cores, source_fingerprint
from evaclip.curate.scan import Level, scan
from evaclip.data.index import ShardHead, expand
from evaclip.data.manifest import Manifest
from evaclip.data.order import Order, Source
from evaclip.data.write import ShardWriter
from evaclip.errors import InputError

# A row for each member of a shard's good samples; the name is what goes into a plain header.
MEMBER = np.dtype([("offset", np.int64), ("size", np.int64), ("name", "S100")])
# Shards that a process holds open.
OPEN = 256


@dataclass(frozen=True, kw_only=True)
class ReshardCommand:
    """Write the samples of a set again: equal shards, shuffled, plain tar headers, every member's bytes as they are."""

    shards: tyro.conf.Positional[tuple[str, ...]]
    """Brace patterns, folders of .tar files, or @list files."""
    out: Path
    """Folder for the new shards, their manifest, and the list of rejected samples."""
    per_shard: int = 10_000
    """Samples of a shard; the last one has what is left."""
    seed: int = 0
    """Decides the order."""
    shuffle: bool = True
    """--no-shuffle keeps the order of the shards and of the samples in them."""
    window: int = 0
    """Old shards that are mixed with each other; 0 mixes all, and reads all over the disk."""
    prefix: str = "shard"
    """Names are PREFIX-00000.tar and so on."""
    keys: str = "kept"
    """`kept`: as they were, refused when two samples share one; `numbered`: the place in the new set."""
    level: Level = "full"
    """How closely samples are looked at before they are taken, as in `evaclip data check`."""
    processes: int = several_cores()
    """Shards that are written at a time."""


def run_reshard(command: ReshardCommand) -> None:
    """Print what became of the samples."""
    manifest = reshard(command)
    made = manifest.made_by
    shards = f"{len(manifest.shards):,} shards"
    print(f"{made['in']:,} samples in, {made['out']:,} out in {shards}, {made['rejected']:,} rejected")
    print(f"fingerprint {manifest.fingerprint}: {command.out}")


def reshard(command: ReshardCommand) -> Manifest:
    """The manifest of the new shards. Raises InputError when keys collide or the folder holds something else."""
    if command.keys not in ("kept", "numbered") or command.per_shard < 1:
        raise InputError("--keys is `kept` or `numbered`, and --per-shard at least 1")
    paths = expand(command.shards)
    source = source_fingerprint(paths, command.out, command.processes)
    settings = {name: value for name, value in asdict(command).items() if name not in ("shards", "out", "processes")}
    done = claim(command.out, settings, source)
    if done is not None:
        return done
    journal = Journal(command.out / "unfinished", settings, command.processes)
    work = partial(_members_of, level=command.level)
    results = [result for _, result in journal.each("looking at samples", work, paths, shard_state)]
    counts = tuple(len(result["starts"]) - 1 for result in results)
    if not sum(counts):
        raise InputError(
            f"none of {sum(result['found'] for result in results):,} samples is good; see evaclip data check"
        )
    if command.keys == "kept":
        _refuse_equal_keys(paths, results)
    numbers = range(-(-sum(counts) // command.per_shard))
    state = f"{source} {[shard_state(path) for path in paths]}"
    write = partial(_write_shard, command=command, paths=paths, counts=counts, journal=journal)
    written = journal.each("writing shards", write, numbers, lambda number: f"{number} {state}")
    heads = [ShardHead(**result["head"]) for _, result in written]
    manifest = finish(
        command.out,
        heads,
        [line for result in results for line in result["rejected"]],
        sum(result["found"] for result in results),
        sum(result["found"] for result in results) - sum(counts),
        {"verb": "reshard", "settings": settings, "source": source},
    )
    journal.finished()
    return manifest


def placed(command: ReshardCommand, counts: Sequence[int], positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Old shard and sample at positions of the new set."""
    if not command.shuffle:
        ends = np.cumsum(counts)
        shard = np.searchsorted(ends, positions, side="right")
        return shard, positions - (ends[shard] - np.asarray(counts)[shard])
    order = Order([Source("reshard", 1.0, tuple(counts))], command.seed, command.window or len(counts))
    places = order.places(positions)
    return places.shard, places.sample


def _members_of(path: Path, *, level: Level) -> dict[str, Any]:
    """Where the members of a shard's good samples lie, flat, and where each sample begins in that list."""
    found = scan(path, level)
    rows = [
        (at, size, f"{sample.key}.{suffix}".encode())
        for sample in found.good
        for suffix, (at, size) in zip(sample.suffixes, sample.spans, strict=True)
    ]
    return {
        "found": found.found,
        "rejected": [asdict(problem) for problem in found.problems],
        "keys": key_hashes(sample.key for sample in found.good),
        "starts": np.cumsum([0, *(len(sample.spans) for sample in found.good)]),
        "members": np.array(rows, MEMBER),
    }


def _refuse_equal_keys(paths: Sequence[Path], results: Sequence[dict[str, Any]]) -> None:
    keys = np.concatenate([result["keys"] for result in results])
    again = len(keys) - len(np.unique(keys))
    if again:
        raise InputError(
            f"{again:,} samples of the {len(paths):,} shards have the key of another, as in sets that were downloaded "
            "apart; --keys numbered gives them new ones"
        )


def _write_shard(
    number: int, *, command: ReshardCommand, paths: Sequence[Path], counts: Sequence[int], journal: Journal
) -> dict[str, Any]:
    """One new shard, read from wherever its samples lie."""
    positions = np.arange(number * command.per_shard, min((number + 1) * command.per_shard, sum(counts)))
    shards, samples = placed(command, counts, positions)
    opened = lru_cache(maxsize=OPEN)(lambda shard: _Opened(paths[shard], journal))
    target = command.out / f"{command.prefix}-{number:05}.tar"
    with ShardWriter(target) as writer:
        for position, shard, sample in zip(positions.tolist(), shards.tolist(), samples.tolist(), strict=True):
            for name, data in opened(shard).read(sample):
                suffix = name.rpartition("/")[2].partition(".")[2]
                writer.add(name if command.keys == "kept" else f"{position:010}.{suffix}", data)
    return {"head": asdict(writer.head(len(positions)))}


class _Opened:
    """An old shard and where its samples lie."""

    def __init__(self, path: Path, journal: Journal) -> None:
        known = journal.result("looking at samples", shard_state(path))
        self.path, self._starts, self._members = path, known["starts"], known["members"]
        self._file = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self._file)

    def read(self, sample: int) -> list[tuple[str, bytes]]:
        """Names and bytes of its members, in one reading."""
        rows = self._members[self._starts[sample] : self._starts[sample + 1]].tolist()
        first = min(at for at, _, _ in rows)
        last = max(at + size for at, size, _ in rows)
        block = os.pread(self._file, last - first, first)
        if len(block) != last - first:
            raise InputError(f"{self.path} has become shorter while it was read")
        return [(name.decode(), block[at - first : at - first + size]) for at, size, name in rows]
