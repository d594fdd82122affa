"""The data of a run: sources of shards, indexed and counted before the first step."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from evaclip.data.folder import SUFFIX, index_images
from evaclip.data.index import ShardHead, expand, fingerprint, index_shards, lines_of
from evaclip.data.manifest import read_merged
from evaclip.data.order import Order, Source
from evaclip.data.remote import CacheConfig, ShardCache, addresses, is_address
from evaclip.data.transforms import CropConfig
from evaclip.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A set of shards and its share of the stream."""

    name: str
    """What it is called in logs."""
    shards: tuple[str, ...]
    """Brace patterns, folders of .tar files, or @list files; addresses as s3://bucket/{000..099}.tar too. Where no
    captions are used, folders of image files as well."""
    weight: float = 1.0
    """Relative share of the samples."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the pairs come from and how they are read."""

    sources: tuple[SourceConfig, ...]
    """The data; several sources are mixed by their weights."""
    mix_by: Literal["sample", "batch"] = "sample"
    """What is mixed: samples, so that every batch has its share of each source; or whole batches, each of one source,
    as EVA-CLIP's published command does with equal weights. A caption then has negatives of its own source alone."""
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
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Where shards that lie at addresses are kept."""
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
        self.cache = ShardCache(config.cache, config.index_folder)
        for source in config.sources:
            heads = self._indexed(source)
            if source.name in listed and listed[source.name] != fingerprint(heads):
                raise InputError(
                    f"source {source.name!r} is not what {config.merged} says; if it is meant to be so, merge again"
                )
            heads = [head for head in heads if head.samples]
            if not heads:
                raise InputError(f"source {source.name!r} has no samples: its shards hold no images or captions")
            self.heads.append(heads)
        self.cache.check_size([head for heads in self.heads for head in heads], config.window)
        self.fingerprint = fingerprint(head for heads in self.heads for head in heads)

    def _indexed(self, source: SourceConfig) -> list[ShardHead]:
        """The heads of a source's shards, local ones and those at addresses, in the order in which they are named."""
        config = self.config
        named = lines_of(source.shards)
        loose = [
            head
            for name in named
            if _holds_no_tars(Path(name))
            for head in index_images(Path(name), config.index_folder)
        ]
        paths = [path for name in named if not _holds_no_tars(Path(name)) for path in self._places(name)]
        local = [path for path in paths if path not in self.cache.addresses]
        heads = index_shards(
            local or ([] if loose or paths else expand(())), index_folder=config.index_folder,
            skip_damaged=config.skip_damaged_shards, processes=max(1, config.workers),
        )  # fmt: skip
        away = [path for path in paths if path in self.cache.addresses]
        found = {head.path: head for head in heads + self.cache.heads(away, config.skip_damaged_shards)}
        return [found[str(path)] for path in paths if str(path) in found] + loose

    def _places(self, pattern: str) -> list[Path]:
        if is_address(pattern):
            return [self.cache.place(address) for address in addresses(pattern)]
        return expand([pattern])

    def without_captions(self) -> str | None:
        """The name of a source that is a folder of images, if there is one."""
        found = zip(self.config.sources, self.heads, strict=True)
        return next((s.name for s, heads in found if any(head.path.endswith(SUFFIX) for head in heads)), None)

    def __len__(self) -> int:
        return sum(head.samples for heads in self.heads for head in heads)

    def order(self, seed: int, batch_size: int) -> Order:
        """The order of the samples for a seed; the size of a batch matters where whole batches are mixed."""
        named = zip(self.config.sources, self.heads, strict=True)
        return Order(
            [Source(config.name, config.weight, tuple(h.samples for h in heads)) for config, heads in named],
            seed,
            self.config.window,
            batch_size if self.config.mix_by == "batch" else 1,
        )

    def names(self, positions: Sequence[int], seed: int, batch_size: int) -> list[str]:
        """The samples at these positions of the stream, as `shard#number within it`."""
        places = self.order(seed, batch_size).places(np.asarray(positions, dtype=np.int64))
        return [
            f"{self.heads[source][shard].name}#{sample}"
            for source, shard, sample in zip(places.source, places.shard, places.sample, strict=True)
        ]

    def manifest(self) -> dict[str, dict[str, Any]]:
        """Name, size and hash of every shard, for naming what changed when the fingerprint does.

        Downloads call the first shard of every folder 00000.tar: a name that comes twice has its folder before it.
        """
        heads = [head for heads in self.heads for head in heads]
        times = Counter(head.name for head in heads)
        names = (head.name if times[head.name] == 1 else "/".join(Path(head.path).parts[-2:]) for head in heads)
        return {name: asdict(head) for name, head in zip(names, heads, strict=True)}


def _holds_no_tars(path: Path) -> bool:
    """Whether it is a folder that must be one of images."""
    return path.is_dir() and next(path.glob("*.tar"), None) is None


def changed_shards(before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> list[str]:
    """What differs between two manifests, in words."""
    said = [f"{name} is gone" for name in before if name not in now]
    said += [f"{name} is new" for name in now if name not in before]
    return said + [
        f"{name} changed" for name in now if name in before and now[name]["sha256"] != before[name]["sha256"]
    ]
