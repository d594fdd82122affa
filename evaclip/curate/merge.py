"""`evaclip data merge`: several sets as one, by weights, without copying."""

import re
from dataclasses import dataclass
from pathlib import Path

import tyro

from evaclip.curate.rewrite import several_cores
from evaclip.data.index import expand, fingerprint, index_shards
from evaclip.data.manifest import VERSION, Merged, MergedSource, relative_patterns, write_record
from evaclip.errors import InputError

SOURCE = re.compile(r"([\w.-]+)(?::([0-9.eE+-]+))?=(.+)").fullmatch


@dataclass(frozen=True, kw_only=True)
class MergeCommand:
    """Write a manifest of weighted sources; train on it with --data.merged."""

    sources: tyro.conf.Positional[tuple[str, ...]]
    """NAME:WEIGHT=PATTERN, or NAME=PATTERN for a weight that is its number of samples; patterns parted by spaces."""
    out: Path
    """The manifest."""
    index_folder: Path | None = None
    """Where indexes go when a shards' folder is read-only."""
    processes: int = several_cores()
    """Shards that are indexed at a time."""


def run_merge(command: MergeCommand) -> None:
    """Print the shares."""
    merged = merge(command)
    total = sum(source.weight for source in merged.sources)
    for source in merged.sources:
        passes = source.weight / total * sum(s.samples for s in merged.sources) / source.samples
        print(f"{source.name}: {source.weight / total:.2%} of the stream, {source.samples:,} samples, "
              f"{passes:.3g} times in as many samples as there are")  # fmt: skip
    print(f"fingerprint {merged.fingerprint}: {command.out}")


def merge(command: MergeCommand) -> Merged:
    """Index the sources and write their manifest. Raises InputError for one without samples or with a bad weight."""
    sources, every = [], []
    for text in command.sources:
        found = SOURCE(text)
        if found is None:
            raise InputError(f"{text!r} is not NAME:WEIGHT=PATTERN, as in laion:0.8=shards/{{000..099}}.tar")
        name, weight, patterns = found[1], found[2], tuple(found[3].split())
        if name in {source.name for source in sources}:
            raise InputError(f"two sources are called {name!r}")
        heads = index_shards(expand(patterns), index_folder=command.index_folder, processes=command.processes)
        samples = sum(head.samples for head in heads)
        if not samples:
            raise InputError(f"source {name!r} has no samples")
        patterns = relative_patterns(patterns, command.out.parent)
        share = _weight(weight, text) if weight else float(samples)
        source = MergedSource(name=name, weight=share, shards=patterns, samples=samples, fingerprint=fingerprint(heads))
        sources.append(source)
        every += heads
    if not sources:
        raise InputError("nothing to merge: give NAME:WEIGHT=PATTERN, once for each source")
    merged = Merged(version=VERSION, fingerprint=fingerprint(every), sources=tuple(sources))
    write_record(command.out, merged)
    return merged


def _weight(text: str, source: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise InputError(f"{source!r}: the weight is a number above 0")
    return weight
