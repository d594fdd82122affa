"""Which sample stands at which position of the endless stream: a pure function, nothing shuffled, nothing stored.

    position --mix--> source, place within it --epoch--> window of shards --permutation--> shard, sample

The mix spreads the sources evenly: after any number of positions each source has had its share, to within one sample;
or, where whole batches are mixed, after any number of batches to within one batch.
Each epoch of a source visits every sample exactly once. It permutes the shards, takes them `window` at a time, and
permutes the samples of a window with a keyed bijection. So a reader holds `window` shards open, and resuming at any
position costs the same. The state of the data is one number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import lcm

import numpy as np

from evaclip import keyed


@dataclass(frozen=True)
class Source:
    """A weighted set of shards."""

    name: str
    weight: float
    """Relative share of the stream; zero leaves the source out."""
    counts: tuple[int, ...]
    """Samples of each shard."""


@dataclass(frozen=True)
class Places:
    """Where a batch of positions lies; three arrays of the positions' shape."""

    source: np.ndarray
    shard: np.ndarray
    sample: np.ndarray


class Order:
    """The order of one run."""

    def __init__(self, sources: Sequence[Source], seed: int, window: int = 64, block: int = 1) -> None:
        """`window`: shards whose samples are mixed with each other. `block`: positions in a row of one source: 1 to mix
        samples, the batch size to mix whole batches.
        """
        self.sources = tuple(sources)
        self.sizes = [sum(source.counts) for source in sources]
        assert self.sizes and min(self.sizes) > 0
        self.seed = seed
        self.window = window
        self.block = block
        self._shares = _whole_shares([source.weight for source in sources])
        self._epoch = lru_cache(maxsize=4 * len(sources))(self._epoch_uncached)

    def places(self, positions: np.ndarray) -> Places:
        """Where the samples at these positions lie. `positions`: int64, any shape."""
        positions = np.asarray(positions, dtype=np.int64)
        source, place = self._mixed(positions)
        shard, sample = np.zeros_like(positions), np.zeros_like(positions)
        for number, size in enumerate(self.sizes):
            epochs = place // size
            for epoch in np.unique(epochs[source == number]):
                here = (source == number) & (epochs == epoch)
                shard[here], sample[here] = self._within(number, int(epoch), place[here] % size)
        return Places(source, shard, sample)

    def _mixed(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source at each position and how many samples of it came before.

        Source k takes its share of what the sources before it left over: of p blocks it gets floor(p a / b).
        """
        blocks, offset = positions // self.block, positions % self.block
        source, place = np.zeros_like(blocks), np.zeros_like(blocks)
        left = np.ones_like(blocks, dtype=bool)
        rest, total = blocks, sum(self._shares)
        for number, share in enumerate(self._shares):
            before = _share_of(rest, share, total)
            taken = left & (_share_of(rest + 1, share, total) > before)
            source[taken], place[taken] = number, before[taken]
            left &= ~taken
            rest, total = rest - before, total - share
        return source, place * self.block + offset

    def _within(self, number: int, epoch: int, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shards, ends = self._epoch(number, epoch)
        shuffled = np.empty_like(place)
        first_shard = np.searchsorted(ends, place, side="right") // self.window * self.window
        for first in np.unique(first_shard):
            here = first_shard == first
            start = ends[first - 1] if first else 0
            stop = ends[min(first + self.window, len(ends)) - 1]
            purpose = f"samples of {self.sources[number].name}, epoch {epoch}, window {first // self.window}"
            moved = keyed.permute(place[here] - start, int(stop - start), self.seed, purpose)
            shuffled[here] = start + moved
        slot = np.searchsorted(ends, shuffled, side="right")
        return shards[slot], shuffled - np.where(slot > 0, ends[slot - 1], 0)

    def _epoch_uncached(self, number: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of an epoch in their order, and where each of them ends."""
        counts = np.asarray(self.sources[number].counts, dtype=np.int64)
        purpose = f"shards of {self.sources[number].name}, epoch {epoch}"
        shards = keyed.permute(np.arange(len(counts)), len(counts), self.seed, purpose)
        return shards, np.cumsum(counts[shards])


def _whole_shares(weights: Sequence[float]) -> list[int]:
    """Weights as whole numbers in the same proportion, to a millionth."""
    fractions = [Fraction(weight).limit_denominator(1_000_000) for weight in weights]
    common = lcm(*(fraction.denominator for fraction in fractions))
    return [int(fraction * common) for fraction in fractions]


def _share_of(positions: np.ndarray, share: int, total: int) -> np.ndarray:
    """floor(positions * share / total) without overflow."""
    if share == total:
        return positions.copy()
    whole, rest = positions // total, positions % total
    return whole * share + rest * share // total
