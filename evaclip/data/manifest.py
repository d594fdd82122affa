"""What a set of shards is, as a file that travels with it: names, sizes, hashes, counts, and one fingerprint of all.

A set's manifest is `manifest.json` in its folder. `evaclip data merge` writes another kind, which names weighted
sources and copies nothing; training reads it in the place of `data.sources`.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from evaclip.data.index import ShardHead, fingerprint
from evaclip.errors import InputError
from evaclip.records import structured

NAME = "manifest.json"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """A shard of a manifest."""

    name: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A set of shards."""

    version: int
    fingerprint: str
    """Of `shards`; the one that runs and checkpoints carry when they train on this set alone."""
    samples: int
    bytes: int
    shards: tuple[ShardRecord, ...]
    made_by: dict[str, Any] = field(default_factory=dict)
    """The verb that wrote the shards, its settings, the fingerprint of what it read, and its counts."""


@dataclass(frozen=True, kw_only=True)
class MergedSource:
    """A part of a merged set."""

    name: str
    weight: float
    """Relative share of the stream."""
    shards: tuple[str, ...]
    """Patterns as in `data.sources`; relative ones are relative to the manifest's own folder."""
    samples: int
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Merged:
    """Weighted sources."""

    version: int
    fingerprint: str
    """Of all shards together."""
    sources: tuple[MergedSource, ...]


def manifest_of(heads: Iterable[ShardHead], made_by: dict[str, Any] | None = None) -> Manifest:
    """The manifest of shards that have been indexed."""
    heads = list(heads)
    return Manifest(
        version=VERSION,
        fingerprint=fingerprint(heads),
        samples=sum(head.samples for head in heads),
        bytes=sum(head.bytes for head in heads),
        shards=tuple(ShardRecord(name=h.name, bytes=h.bytes, sha256=h.sha256, samples=h.samples) for h in heads),
        made_by=made_by or {},
    )


def write_record(path: Path, record: Manifest | Merged) -> None:
    """As JSON; a file of that name is whole, or the one from before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.write_text(json.dumps(asdict(record), indent=1) + "\n")
    temporary.replace(path)


def read_manifest(path: Path) -> Manifest:
    """Raises InputError for a file that is no set's manifest, or whose fingerprint is not that of its shards."""
    manifest = structured(_read(path), Manifest, path)
    heads = [ShardHead(shard.name, shard.bytes, shard.sha256, shard.samples) for shard in manifest.shards]
    if manifest.version != VERSION or manifest.fingerprint != fingerprint(heads):
        raise InputError(
            f"{path}: its fingerprint is not that of the shards it lists; make it anew: evaclip data index"
        )
    return manifest


def read_merged(path: Path) -> Merged:
    """A manifest of weighted sources, its patterns made to start from where it lies. Raises InputError."""
    merged = structured(_read(path), Merged, path)
    if merged.version != VERSION or not merged.sources:
        raise InputError(f"{path} is not a manifest of weighted sources: evaclip data merge writes one")
    sources = [
        replace(source, shards=tuple(_from(path.parent, each) for each in source.shards)) for source in merged.sources
    ]
    return Merged(version=VERSION, fingerprint=merged.fingerprint, sources=tuple(sources))


def relative_patterns(patterns: Sequence[str], folder: Path) -> tuple[str, ...]:
    """Patterns that mean from `folder` what they mean from here."""
    return tuple(
        pattern[: pattern.startswith("@")] + os.path.relpath(pattern.removeprefix("@"), folder) for pattern in patterns
    )


def _from(folder: Path, pattern: str) -> str:
    return pattern[: pattern.startswith("@")] + str(folder / pattern.removeprefix("@"))


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"the manifest {path} cannot be read: {error}") from None
    if not isinstance(record, dict):
        raise InputError(f"{path} is not a manifest")
    return record
