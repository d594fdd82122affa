"""The data of a run: sources of shards, indexed and counted before the first step."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from evaclip.data.index import ShardHead, expand, fingerprint, index_shards
from evaclip.data.manifest import read_merged
from evaclip.data.order import Order, Source
from evaclip.data.transforms import CropConfig
from evaclip.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A set of shards and its share of the stream."""

    name: str
    """What it is called in logs."""
    shards: tuple[str, ...]
    """Brace patterns, folders of .tar files, or @list files."""
    weight: float = 1.0
    """Relative share of the samples."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the pairs come from and how they are read."""

    sources: tuple[SourceConfig, ...]
    """The data; several sources are mixed sample by sample by their weights."""
    merged: Path | None = None
    """A manifest of weighted sources, from `evaclip data merge`; it takes the place of `sources`."""
    crop: CropConfig = field(default_factory=CropConfig)
    """Augmentation of the images."""
    workers: int = 4
    """Worker processes that read and decode; 0 does it in the main process."""
    prefetch: int = 4
    """Chunks that each worker prepares ahead."""
    chunk: int = 64
    """Most samples of a chunk, the unit of work of a worker."""
    window: int = 64
    """Shards whose samples are shuffled together, and that are open at a time."""
    index_folder: Path | None = None
    """Where shard indexes go when the shards' folder is read-only."""
    skip_damaged_shards: bool = False
    """Leave shards that are no whole tar out, instead of refusing to start."""
    max_damaged: float = 0.01
    """Share of damaged samples, of all seen so far (and of at least 10,000), beyond which the run stops."""


class ShardSet:
    """Indexed sources: what there is to train on."""

    def __init__(self, config: DataConfig) -> None:
        """Raises InputError for missing, damaged or empty shards."""
        listed: dict[str, str] = {}
        if config.merged is not None:
            sources = read_merged(config.merged).sources
            listed = {source.name: source.fingerprint for source in sources}
            config = replace(
                config, sources=tuple(SourceConfig(name=s.name, shards=s.shards, weight=s.weight) for s in sources)
            )
        self.config = config
        self.heads: list[list[ShardHead]] = []
        if not config.sources:
            raise InputError("no data: the recipe needs at least one source of shards, --data.sources")
        for source in config.sources:
            heads = index_shards(
                expand(source.shards),
                index_folder=config.index_folder,
                skip_damaged=config.skip_damaged_shards,
                processes=max(1, config.workers),
            )
            if source.name in listed and listed[source.name] != fingerprint(heads):
                raise InputError(
                    f"source {source.name!r} is not what {config.merged} says; if it is meant to be so, merge again"
                )
            heads = [head for head in heads if head.samples]
            if not heads:
                raise InputError(f"source {source.name!r} has no samples: its shards hold no images or captions")
            self.heads.append(heads)
        self.fingerprint = fingerprint(head for heads in self.heads for head in heads)

    def __len__(self) -> int:
        return sum(head.samples for heads in self.heads for head in heads)

    def order(self, seed: int) -> Order:
        """The order of the samples for a seed."""
        named = zip(self.config.sources, self.heads, strict=True)
        return Order(
            [Source(config.name, config.weight, tuple(h.samples for h in heads)) for config, heads in named],
            seed,
            self.config.window,
        )

    def manifest(self) -> dict[str, dict[str, Any]]:
        """Name, size and hash of every shard, for naming what changed when the fingerprint does."""
        return {head.name: asdict(head) for heads in self.heads for head in heads}


def changed_shards(before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> list[str]:
    """What differs between two manifests, in words."""
    said = [f"{name} is gone" for name in before if name not in now]
    said += [f"{name} is new" for name in now if name not in before]
    return said + [
        f"{name} changed" for name in now if name in before and now[name]["sha256"] != before[name]["sha256"]
    ]
