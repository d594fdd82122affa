"""The stream of batches.

    shards --pread--> bytes --decode, crop--> pixels ---\
                      text  --clean, encode-> token ids -+--> chunk --(worker processes)--> batch, cursor

Worker processes each make whole chunks of consecutive positions; the main process joins chunks into batches. A chunk
is a function of its first position alone, so the number of workers changes nothing but the speed. Pixels travel as
uint8 and are normalised on the device. Damaged samples are replaced (see `samples`), counted and named; beyond a
budget the run stops.
"""

import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Int32, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader

from evaclip.data.samples import Chunk, Chunks
from evaclip.data.shards import ShardSet
from evaclip.data.tokenizer import cut_to_longest
from evaclip.errors import CheckpointError, DamagedDataError, InputError
from evaclip.log import say
from evaclip.records import structured


@dataclass(frozen=True)
class Cursor:
    """The state of the data: everything after it is a function of it."""

    fingerprint: str
    """Hash of the shards."""
    seed: int
    position: int
    """Samples consumed, counted over the whole run and all ranks."""
    damaged: int = 0
    """Samples replaced so far."""
    passed_over: tuple[tuple[int, int], ...] = ()
    """Stretches of positions, first and end, whose batches are left out."""
    version: int = 1

    def record(self) -> dict[str, Any]:
        """As JSON, well under 4 kB."""
        return asdict(self)

    @staticmethod
    def from_record(record: dict[str, Any]) -> "Cursor":
        """The inverse of `record`. Raises CheckpointError for one of another version."""
        if record.get("version") != 1 or set(record) != {f.name for f in fields(Cursor)}:
            raise CheckpointError(f"the checkpoint's data state has version {record.get('version')!r}, known is 1")
        return structured(record, Cursor, "the checkpoint's data state")

    def next_position(self) -> int:
        """Where the next batch begins."""
        return _beyond(self.position, self.passed_over)


@dataclass(frozen=True)
class Batch:
    """What the model sees in a step; all tensors on one device."""

    images: UInt8[Tensor, "batch 3 size size"]
    tokens: Int32[Tensor, "batch length"]
    """Ids of the captions, cut to the longest of the batch."""
    positions: Int64[Tensor, " batch"]
    """Global positions of the samples: the key of their randomness."""

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device; the copy does not block when the memory is pinned."""
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))

    def split(self, parts: int) -> list["Batch"]:
        """Equal consecutive parts, captions cut to the longest of each."""
        if len(self) % parts:
            raise InputError(f"a batch of {len(self)} samples does not split into {parts} equal micro-batches")
        tensors = zip(*(getattr(self, f.name).chunk(parts) for f in fields(self)), strict=True)
        return [Batch(images, cut_to_longest(tokens), positions) for images, tokens, positions in tensors]


@dataclass
class LoaderTimes:
    """Seconds of work in each stage, summed over workers, and what the main process spent waiting."""

    read: float = 0.0
    decode: float = 0.0
    tokenize: float = 0.0
    wait: float = 0.0
    assemble: float = 0.0

    def slowest(self) -> tuple[str, float]:
        """The worker stage that took longest and its share of the workers' time."""
        stages = {"read": self.read, "decode and crop": self.decode, "tokenize": self.tokenize}
        name = max(stages, key=lambda stage: stages[stage])
        return name, stages[name] / max(sum(stages.values()), 1e-9)


class Stream:
    """Endless batches from a cursor on. Iterating yields `(batch, cursor after it)`.

    `batch_size` is the global batch; this rank yields its `batch_size / ranks` consecutive rows of it. `context`: token
    ids of a caption; 0 leaves captions alone, whether the data has them or not, and yields images with rows of none.
    """

    def __init__(
        self,
        shards: ShardSet,
        cursor: Cursor,
        *,
        batch_size: int,
        image_size: int,
        context: int,
        rank: int = 0,
        ranks: int = 1,
        pin_memory: bool = False,
    ) -> None:
        if context and (name := shards.without_captions()):
            raise InputError(
                f"source {name!r} is a folder of images without captions; image-text pairs come as .tar files, which "
                "`evaclip data` writes"
            )
        if batch_size > len(shards):
            raise InputError(f"a batch of {batch_size:,} is larger than the data: {len(shards):,} samples")
        if batch_size % ranks:
            raise InputError(f"a batch of {batch_size:,} does not divide among {ranks} ranks")
        if shards.config.mix_by == "batch" and cursor.position % batch_size:
            raise InputError(
                f"whole batches cannot be mixed from here: {cursor.position:,} samples have been seen, which is no "
                f"multiple of the batch of {batch_size:,}; use --data.mix-by sample, or the batch size of before"
            )
        self.cursor = cursor
        self.times = LoaderTimes()
        self.damage: Counter[str] = Counter()
        self._batch_size, self._rank, self._ranks = batch_size, rank, ranks
        self._config = shards.config
        local = batch_size // ranks
        self._chunk = next(size for size in range(min(self._config.chunk, local), 0, -1) if local % size == 0)
        self._chunks = Chunks(shards, cursor.seed, self._chunk, image_size, context, batch_size)
        self._pin = pin_memory

    def __iter__(self) -> Iterator[tuple[Batch, Cursor]]:
        local = self._batch_size // self._ranks
        chunks = iter(self._loader())
        # torch would raise a worker's death wherever the main process happens to be; `_next` sees it anyway.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        while True:
            start = time.perf_counter()
            parts = [self._next(chunks) for _ in range(local // self._chunk)]
            waited = time.perf_counter()
            batch = Batch(
                torch.cat([part.images for part in parts]),
                cut_to_longest(torch.cat([part.tokens for part in parts])),
                torch.cat([part.positions for part in parts]),
            )
            self.times.wait += waited - start
            self.times.assemble += time.perf_counter() - waited
            self._account(parts)
            self.cursor = replace(
                self.cursor,
                position=self.cursor.next_position() + self._batch_size,
                damaged=self.cursor.damaged + self._lost,
            )
            self._check_budget()
            yield batch, self.cursor

    def _loader(self) -> "DataLoader[Chunk | InputError]":
        workers = self._config.workers
        return DataLoader(
            self._chunks,
            batch_size=None,
            sampler=_Starts(self.cursor, self._batch_size, self._rank, self._ranks, self._chunk),
            num_workers=workers,
            prefetch_factor=self._config.prefetch if workers else None,
            worker_init_fn=_prepare_worker,
            pin_memory=self._pin,
            multiprocessing_context="fork" if workers else None,
            persistent_workers=False,
        )

    def _next(self, chunks: Iterator[Chunk | InputError]) -> Chunk:
        try:
            chunk = next(chunks)
        except (RuntimeError, OSError, EOFError) as error:
            # What a worker raises arrives with its traceback; a worker that was killed leaves a broken connection.
            if not self._config.workers or "Caught" in str(error):
                raise
            raise InputError(
                "a data worker was killed, perhaps for lack of memory; continue with --resume auto, "
                f"with fewer --data.workers (now {self._config.workers}) if it happens again"
            ) from error
        if isinstance(chunk, InputError):
            raise chunk
        return chunk

    def _account(self, parts: Sequence[Chunk]) -> None:
        self._lost = sum(len(part.damage) for part in parts)
        for part in parts:
            for stage, seconds in part.times.items():
                setattr(self.times, stage, getattr(self.times, stage) + seconds)
            for code, where in part.damage:
                self.damage[code] += 1
                if self.damage[code] <= 3:
                    say(f"damaged sample ({code}) in {where}: replaced by another of its shard")

    def _check_budget(self) -> None:
        allowed = self._config.max_damaged * max(self.cursor.position, 10_000)
        if self.cursor.damaged > allowed:
            codes = ", ".join(f"{count} {code}" for code, count in self.damage.most_common())
            raise DamagedDataError(
                f"{self.cursor.damaged:,} of {self.cursor.position:,} samples were damaged ({codes}), more than "
                f"--data.max-damaged {self._config.max_damaged:g} allows; the shards are named above"
            )


class _Starts:
    """First positions of this rank's chunks, for ever."""

    def __init__(self, cursor: Cursor, batch: int, rank: int, ranks: int, chunk: int) -> None:
        self.cursor, self.batch, self.rank, self.ranks, self.chunk = cursor, batch, rank, ranks, chunk

    def __iter__(self) -> Iterator[int]:
        local, base = self.batch // self.ranks, self.cursor.position
        while True:
            base = _beyond(base, self.cursor.passed_over)
            first = base + self.rank * local
            yield from range(first, first + local, self.chunk)
            base += self.batch


def _beyond(position: int, passed_over: Sequence[tuple[int, int]]) -> int:
    """The first position from this one on that lies in none of the stretches."""
    for first, end in sorted(passed_over):
        if first <= position < end:
            position = end
    return position


def _prepare_worker(_: int) -> None:
    """Ctrl-C and SIGTERM are for the main process, which then stops the workers, or they go after half a minute.

    One thread each, or they fight for the cores.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))
    torch.set_num_threads(1)
