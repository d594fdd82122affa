"""New shards from samples of old ones: bytes untouched, plain headers, and every sample accounted for."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from evaclip.curate.journal import Journal, shard_state
from evaclip.curate.scan import Sample, scan
from evaclip.data.index import ShardHead, fingerprint, index_shards
from evaclip.data.manifest import NAME, Manifest, manifest_of, read_manifest, write_record
from evaclip.data.write import ShardWriter
from evaclip.errors import InputError

REJECTED = "rejected.jsonl"
Verdict = dict[int, tuple[str, str]]
"""Code and detail of each sample of a shard that is left out, by its place among those that `scan` finds good."""


def several_cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0))


def copy_samples(source: Path, samples: Sequence[Sample], target: Path) -> ShardHead:
    """A shard of some samples of another; none is written when there is no sample."""
    if not samples:
        target.unlink(missing_ok=True)
        return ShardHead(str(target), 0, "", 0)
    with source.open("rb", buffering=0) as file, ShardWriter(target) as shard:
        for sample in samples:
            for name, data in read_members(file.fileno(), sample):
                shard.add(name, data)
    return shard.head(len(samples))


def read_members(file: int, sample: Sample) -> list[tuple[str, bytes]]:
    """Names and bytes of a sample's members, in one reading. Raises InputError if the file has become shorter."""
    first = min(at for at, _ in sample.spans)
    last = max(at + size for at, size in sample.spans)
    block = os.pread(file, last - first, first)
    if len(block) != last - first:
        raise InputError(f"a shard has become shorter while it was read, at sample {sample.key}")
    return [
        (f"{sample.key}.{suffix}", block[at - first : at - first + size])
        for suffix, (at, size) in zip(sample.suffixes, sample.spans, strict=True)
    ]


def claim(folder: Path, settings: dict[str, Any], fingerprint: str) -> Manifest | None:
    """Make a folder for new shards. Returns its manifest if the same command has filled it before.

    Raises InputError for a folder that holds other shards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / NAME).is_file():
        manifest = read_manifest(folder / NAME)
        made_by = manifest.made_by
        same = made_by.get("settings") == settings and made_by.get("source") == fingerprint
        whole = all(
            (folder / s.name).is_file() and (folder / s.name).stat().st_size == s.bytes for s in manifest.shards
        )
        if same and whole:
            return manifest
        if not same:
            raise InputError(f"{folder} holds shards that were made otherwise; name another --out, or remove it")
        return None
    begun, mine = folder / "unfinished" / "settings.json", json.dumps([settings, fingerprint], sort_keys=True)
    if any(folder.glob("*.tar")) and not (begun.is_file() and begun.read_text() == mine):
        raise InputError(f"{folder} holds shards that this command did not write; name another --out, or remove it")
    begun.parent.mkdir(exist_ok=True)
    begun.write_text(mine)
    return None


def source_fingerprint(paths: Sequence[Path], out: Path, processes: int) -> str:
    """The fingerprint of old shards; the indexes go to the new folder when the old one cannot be written."""
    writable = all(os.access(folder, os.W_OK) for folder in {path.parent for path in paths})
    folder = None if writable else out / "unfinished" / "index"
    return fingerprint(index_shards(paths, index_folder=folder, skip_damaged=True, processes=processes))


def keep(
    paths: Sequence[Path], verdicts: Sequence[Verdict], out: Path, journal: Journal, made_by: dict[str, Any]
) -> Manifest:
    """One new shard for each old one that has a sample left, under its name, with a list of what was left out.

    `verdicts`: for each shard, what is left out beside what the scan rejects. Raises InputError when two shards have
    one name, or the counts do not add up.
    """
    items = list(zip(paths, verdicts, strict=True))
    heads, lines, found, rejected = [], [], 0, 0
    for _, result in journal.each("writing shards", partial(_kept, out=out), items, _verdict_state):
        heads += [ShardHead(**result["head"])] if result["head"]["samples"] else []
        lines += result["rejected"]
        found, rejected = found + result["found"], rejected + result["samples_rejected"]
    return finish(out, heads, lines, found, rejected, made_by)


def refuse_equal_names(paths: Sequence[Path]) -> None:
    """Raises InputError when two shards would become one file."""
    seen: set[str] = set()
    for path in paths:
        if path.name in seen:
            raise InputError(f"two shards are called {path.name}: reshard them first, or take one folder at a time")
        seen.add(path.name)


def finish(
    out: Path, heads: list[ShardHead], lines: list[dict[str, Any]], found: int, rejected: int, made_by: dict[str, Any]
) -> Manifest:
    """Write the list of the rejected and the manifest. Raises InputError unless in = out + rejected."""
    written = sum(head.samples for head in heads)
    if found != written + rejected:
        raise InputError(f"{out}: {found:,} samples in, but {written:,} out and {rejected:,} rejected; nothing is kept")
    part = out / f"{REJECTED}.part"
    part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    part.replace(out / REJECTED)
    manifest = manifest_of(heads, made_by | {"in": found, "out": written, "rejected": rejected})
    write_record(out / NAME, manifest)
    return manifest


def _verdict_state(item: tuple[Path, Verdict]) -> str:
    path, verdict = item
    return f"{shard_state(path)} {hashlib.sha256(repr(sorted(verdict.items())).encode()).hexdigest()}"


def _kept(item: tuple[Path, Verdict], *, out: Path) -> dict[str, Any]:
    path, verdict = item
    found = scan(path)
    lines = [asdict(problem) for problem in found.problems]
    for place, (code, detail) in sorted(verdict.items()):
        sample = found.good[place]
        where = {"shard": path.name, "offset": sample.spans[0][0], "key": sample.key}
        lines.append({"code": code} | where | {"detail": detail})
    good = [sample for place, sample in enumerate(found.good) if place not in verdict]
    head = copy_samples(path, good, out / path.name)
    return {"head": asdict(head), "rejected": lines, "found": found.found, "samples_rejected": found.found - len(good)}
