"""The order of the samples: each once an epoch, the mix exact, and everything a function of the position."""

import numpy as np
import pytest

from evaclip.data.order import Order, Source

UNEVEN = (7, 1, 30, 12, 5, 9, 0, 16, 3, 17)


def order(*sources: Source, seed: int = 5, window: int = 3, block: int = 1) -> Order:
    return Order(sources, seed, window, block)


def ids(which: Order, positions: np.ndarray) -> list[tuple[int, int, int]]:
    places = which.places(positions)
    return list(zip(places.source.tolist(), places.shard.tolist(), places.sample.tolist(), strict=True))


@pytest.mark.parametrize("window", [1, 3, 64])
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_visits_every_sample_once(window, epoch):
    which, size = order(Source("a", 1.0, UNEVEN), window=window), sum(UNEVEN)
    seen = ids(which, np.arange(epoch * size, (epoch + 1) * size))
    assert sorted(seen) == [(0, shard, sample) for shard, count in enumerate(UNEVEN) for sample in range(count)]


def test_epochs_and_seeds_have_other_orders():
    size = sum(UNEVEN)
    first, second = (ids(order(Source("a", 1.0, UNEVEN)), np.arange(e * size, (e + 1) * size)) for e in (0, 1))
    other = ids(order(Source("a", 1.0, UNEVEN), seed=6), np.arange(size))
    assert first != second and first != other


def test_a_position_does_not_depend_on_its_company():
    which = order(Source("a", 0.8, UNEVEN), Source("b", 0.2, (40, 50)))
    positions = np.array([0, 3, 1000, 99, 10**11, 12345])
    assert ids(which, positions) == [ids(which, np.array([p]))[0] for p in positions]


def test_neighbours_come_from_a_window_of_shards():
    counts = (100,) * 20
    places = order(Source("a", 1.0, counts), window=4).places(np.arange(2000))
    for start in range(0, 2000, 400):
        inside = places.shard[start : start + 400]
        assert len(set(inside.tolist())) == 4
        assert len(set(inside[:50].tolist())) == 4  # mixed, not one after the other


@pytest.mark.parametrize(
    "weights",
    [(0.8, 0.2), (1.0, 1.0), (1.6, 0.4), (0.5, 0.3, 0.2), (1 / 3, 2 / 3), (1.0, 0.0, 1.0), (0.999999, 0.000001)],
)
def test_every_source_has_its_share_at_any_moment(weights):
    which = order(*[Source(str(n), weight, (50,) * 4) for n, weight in enumerate(weights)])
    sources = which.places(np.arange(5000)).source
    for number, weight in enumerate(weights):
        counted = np.cumsum(sources == number)
        expected = np.arange(1, 5001) * weight / sum(weights)
        assert np.abs(counted - expected).max() <= len(weights) - 1 + 1e-6


def test_each_source_of_a_mix_goes_through_its_own_epochs():
    which = order(Source("a", 0.75, (30,)), Source("b", 0.25, (6, 4)))
    places = which.places(np.arange(40))  # 30 samples of a, 10 of b: an epoch of each
    for number, counts in enumerate([(30,), (6, 4)]):
        mine = places.source == number
        pairs = sorted(zip(places.shard[mine].tolist(), places.sample[mine].tolist(), strict=True))
        assert pairs == [(shard, sample) for shard, count in enumerate(counts) for sample in range(count)]


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.8, 0.2), (0.5, 0.3, 0.2), (1.0, 0.0, 1.0)])
@pytest.mark.parametrize("block", [1, 7, 32])
def test_whole_blocks_come_from_one_source_in_their_shares(weights, block):
    """Against a plain walk: each block has the source of the mix of samples, and its samples one after another."""
    sources = [Source(str(n), weight, (50, 13) * 2) for n, weight in enumerate(weights)]
    mixed = order(*sources, block=block)._mixed(np.arange(200 * block))
    walk = order(*sources).places(np.arange(200)).source
    seen = [0] * len(sources)
    for number, source in enumerate(walk.tolist()):
        here = slice(number * block, (number + 1) * block)
        assert (mixed[0][here] == source).all()
        assert mixed[1][here].tolist() == list(range(seen[source], seen[source] + block))
        seen[source] += block
    for number, weight in enumerate(weights):
        counted = np.cumsum(walk == number)
        assert np.abs(counted - np.arange(1, 201) * weight / sum(weights)).max() <= len(weights) - 1 + 1e-6


def test_epochs_of_mixed_blocks_visit_every_sample_once():
    which = order(Source("a", 0.5, (30, 10)), Source("b", 0.5, (25, 15)), block=8)
    places = which.places(np.arange(160))  # two epochs of each
    for number, counts in enumerate([(30, 10), (25, 15)]):
        mine = np.flatnonzero(places.source == number)
        for half in (mine[:40], mine[40:]):
            pairs = sorted(zip(places.shard[half].tolist(), places.sample[half].tolist(), strict=True))
            assert pairs == [(shard, sample) for shard, count in enumerate(counts) for sample in range(count)]
    far = np.array([0, 5, 10**11, 10**11 + 7, 77])
    assert ids(which, far) == [ids(which, np.array([p]))[0] for p in far]


def test_positions_far_out_cost_and_work_the_same():
    which = order(Source("a", 0.8, (10_000,) * 300), Source("b", 0.2, (10_000,) * 70), window=64)
    places = which.places(np.arange(13 * 10**12, 13 * 10**12 + 256))
    assert places.sample.min() >= 0 and places.sample.max() < 10_000
    assert len(set(zip(places.source.tolist(), places.shard.tolist(), places.sample.tolist(), strict=True))) == 256
