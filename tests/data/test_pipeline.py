"""The stream is a function of the cursor: the same batches for any number of workers and ranks, damage or not."""

import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import webdataset

from evaclip import keyed
from evaclip.data.masks import drop_path_factors, kept_patches
from evaclip.data.pipeline import Batch, Cursor, Stream
from evaclip.data.shards import DataConfig, ShardSet, SourceConfig, changed_shards
from evaclip.errors import CheckpointError, DamagedDataError, InputError
from tests.conftest import made_pairs


def shard_set(*folders: Path, weights=(1.0,), **changes) -> ShardSet:
    sources = tuple(
        SourceConfig(name=folder.name, shards=(str(folder),), weight=w)
        for folder, w in zip(folders, weights, strict=True)
    )
    return ShardSet(DataConfig(sources=sources, **({"workers": 0, "chunk": 4} | changes)))


def batches(data: ShardSet, count: int, position: int = 0, size: int = 8, rank: int = 0, ranks: int = 1) -> list:
    cursor = Cursor(data.fingerprint, 3, position)
    stream = Stream(data, cursor, batch_size=size, image_size=16, context=20, rank=rank, ranks=ranks)
    return [pair for pair, _ in zip(stream, range(count), strict=False)]


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(one, part), getattr(other, part)) for part in ("images", "tokens", "positions"))


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_number_of_ranks_and_workers_sees_the_same_global_batches(shards, ranks, workers):
    folder = shards()
    whole = batches(shard_set(folder), 6)
    data = shard_set(folder, workers=workers)
    parts = [batches(data, 6, rank=rank, ranks=ranks) for rank in range(ranks)]
    for number, (batch, cursor) in enumerate(whole):
        assert torch.equal(torch.cat([part[number][0].images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part[number][0].positions for part in parts]), batch.positions)
        assert all(part[number][1].position == cursor.position for part in parts)


def test_resuming_anywhere_continues_the_same(shards):
    data = shard_set(shards())
    straight = batches(data, 10)
    for start in (1, 4, 9):
        again = batches(data, 10 - start, position=straight[start - 1][1].position)
        assert all(same(a, b) for (a, _), (b, _) in zip(straight[start:], again, strict=True))


def test_stretches_that_are_passed_over_are_left_out_and_nothing_else(shards):
    data = shard_set(shards())
    straight = batches(data, 10)
    windows = ((16, 32), (48, 64))  # the third and fourth batch of eight, and the seventh and eighth
    cursor = replace(Cursor(data.fingerprint, 3, 0), passed_over=windows)
    stream = iter(Stream(data, cursor, batch_size=8, image_size=16, context=20))
    for (batch, after), number in zip(stream, (0, 1, 4, 5, 8, 9), strict=False):
        assert same(batch, straight[number][0]) and after.position == 8 * (number + 1), number
        assert after.passed_over == windows


def test_an_epoch_holds_every_caption_once(shards):
    data = shard_set(shards(count=64))
    rows = torch.cat([torch.nn.functional.pad(b.tokens, (0, 20 - b.tokens.shape[1])) for b, _ in batches(data, 8)])
    assert len(rows.unique(dim=0)) == 64


def test_two_sources_are_mixed_within_each_batch(shards):
    one, two = shards(name="one"), shards(name="two", seed=1, first=1000)
    data = shard_set(one, two, weights=(0.75, 0.25))
    assert len(data) == 128
    for batch, _ in batches(data, 5):
        places = data.order(3, 8).places(batch.positions.numpy())
        assert (places.source == 1).sum() == 2


def sources_of(data: ShardSet, found: list, size: int = 8) -> list[set[int]]:
    """The sources that each batch holds."""
    return [set(data.order(3, size).places(batch.positions.numpy()).source.tolist()) for batch, _ in found]


def test_whole_batches_are_mixed_when_asked_for(shards):
    """The published command's mix: one source, then the other, whatever ranks, workers and chunks do."""
    one, two = shards(name="one"), shards(name="two", seed=1, first=1000)
    data = shard_set(one, two, weights=(0.5, 0.5), mix_by="batch")
    whole = batches(data, 16)
    assert sources_of(data, whole) == [{1}, {0}] * 8
    rows = torch.cat([torch.nn.functional.pad(b.tokens, (0, 20 - b.tokens.shape[1])) for b, _ in whole])
    assert len(rows.unique(dim=0)) == 128  # an epoch of both, each caption once
    for workers, chunk in ((1, 2), (3, 3)):
        again = batches(shard_set(one, two, weights=(0.5, 0.5), mix_by="batch", workers=workers, chunk=chunk), 16)
        assert all(same(a, b) and c == d for (a, c), (b, d) in zip(whole, again, strict=True))
    for ranks in (2, 4):
        parts = [batches(data, 16, rank=rank, ranks=ranks) for rank in range(ranks)]
        for number, (batch, _) in enumerate(whole):
            assert torch.equal(torch.cat([part[number][0].images for part in parts]), batch.images)
    resumed = batches(data, 9, position=whole[6][1].position)
    assert all(same(a, b) for (a, _), (b, _) in zip(whole[7:], resumed, strict=True))
    mixed = batches(shard_set(one, two, weights=(0.5, 0.5)), 4)
    assert sources_of(shard_set(one, two, weights=(0.5, 0.5)), mixed) == [{0, 1}] * 4


def test_whole_batches_are_not_mixed_from_within_one(shards):
    data = shard_set(shards(), shards(name="two", seed=1), weights=(0.5, 0.5), mix_by="batch")
    with pytest.raises(InputError, match=r"24 samples have been seen, which is no multiple of the batch of 16"):
        batches(data, 1, position=24, size=16)


def damaged_shards(folder: Path) -> Path:
    """64 samples, of which one has no caption, one an empty one, one no image, one junk, one bad UTF-8."""
    folder.mkdir()
    bad = {
        3: {"png": None},
        10: {"txt": None},
        17: {"txt": b"   "},
        30: {"png": b"junk"},
        41: {"txt": b"\xff\xfe\xff"},
        50: {"txt": b"x" * 70_000},
    }
    for shard in range(4):
        with webdataset.TarWriter(str(folder / f"{shard}.tar"), encoder=False) as tar:
            for number, pair in enumerate(made_pairs(16, seed=shard, first=16 * shard), 16 * shard):
                parts = {"png": pair.image, "txt": pair.caption.encode()} | bad.get(number, {})
                tar.write({"__key__": pair.key} | {k: v for k, v in parts.items() if v is not None})
    return folder


def test_damaged_samples_are_replaced_the_same_way_every_time_and_counted(tmp_path, capfd):
    data = shard_set(damaged_shards(tmp_path / "d"))
    first = batches(data, 8)
    said = capfd.readouterr().err
    again = batches(shard_set(tmp_path / "d", workers=2), 8)
    assert all(same(a, b) and c == d for (a, c), (b, d) in zip(first, again, strict=True))
    assert first[-1][1].damaged == 6
    for code in ("no-image", "no-caption", "undecodable", "caption-not-utf8", "long-caption"):
        assert f"damaged sample ({code}) in {tmp_path / 'd'}" in said
    assert "1.tar sample 000030" in said
    assert torch.equal(torch.cat([b.positions for b, _ in first]), torch.arange(64))


def test_too_much_damage_stops_the_run(tmp_path):
    damaged_shards(tmp_path / "d")
    with pytest.raises(DamagedDataError, match=r"of \d+ samples were damaged \(1 .*max-damaged 0.0001"):
        batches(shard_set(tmp_path / "d", max_damaged=0.0001), 8)


def test_a_shard_of_nothing_but_damage_stops_the_run(tmp_path):
    (tmp_path / "d").mkdir()
    with webdataset.TarWriter(str(tmp_path / "d" / "x.tar"), encoder=False) as tar:
        for number in range(8):
            tar.write({"__key__": f"{number}", "jpg": b"junk", "txt": b"caption"})
    for workers in (0, 1):
        with pytest.raises(DamagedDataError, match="in a row are damaged"):
            batches(shard_set(tmp_path / "d", workers=workers), 1)


def test_a_shard_that_shrinks_while_training_is_named(shards, monkeypatch):
    monkeypatch.setattr("evaclip.data.samples.RETRY_AFTER", (0.01,))
    folder = shards(count=16, per_shard=16)
    data = shard_set(folder)
    path = next(folder.glob("*.tar"))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"train-00000\.tar cannot be read at byte .* has become shorter"):
        batches(data, 2)


def test_a_batch_larger_than_the_data_is_refused(shards):
    with pytest.raises(InputError, match="a batch of 65 is larger than the data: 64 samples"):
        batches(shard_set(shards()), 1, size=65)
    with pytest.raises(InputError, match="does not divide among 3 ranks"):
        batches(shard_set(shards()), 1, ranks=3)


def test_empty_sources_are_refused(tmp_path):
    (tmp_path / "d").mkdir()
    with webdataset.TarWriter(str(tmp_path / "d" / "x.tar")):
        pass
    with pytest.raises(InputError, match="has no samples"):
        shard_set(tmp_path / "d")
    with pytest.raises(InputError, match="at least one source"):
        ShardSet(DataConfig(sources=()))


def test_a_worker_that_dies_is_a_sentence(shards):
    data = shard_set(shards(), workers=1)
    stream = Stream(data, Cursor(data.fingerprint, 3, 0), batch_size=8, image_size=16, context=20)
    before = {child.pid for child in multiprocessing.active_children()}  # other tests' workers may still be leaving
    loop = iter(stream)
    next(loop)
    victim = next(child for child in multiprocessing.active_children() if child.pid not in before)
    os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(
        InputError, match=r"a data worker was killed, .* --resume auto, with fewer --data.workers .now 1"
    ):
        for _ in range(100):
            next(loop)


def test_times_name_the_slowest_stage(shards):
    data = shard_set(shards())
    stream = Stream(data, Cursor(data.fingerprint, 3, 0), batch_size=8, image_size=64, context=20)
    next(iter(stream))
    assert stream.times.slowest()[0] in {"read", "decode and crop", "tokenize"}
    assert 0 < stream.times.slowest()[1] <= 1 and stream.times.wait > 0


def test_the_cursor_survives_json_and_refuses_strangers():
    cursor = Cursor("f", 1, 10**13, 5)
    assert Cursor.from_record(cursor.record()) == cursor
    for record in ({**cursor.record(), "version": 2}, {**cursor.record(), "more": 1}, {}):
        with pytest.raises(CheckpointError, match="data state has version"):
            Cursor.from_record(record)


def test_changed_shards_are_named(shards):
    before = shard_set(shards()).manifest()
    folder = shards(seed=1)
    (folder / "train-00003.tar").rename(folder / "train-00009.tar")
    assert changed_shards(before, shard_set(folder).manifest()) == [
        "train-00003.tar is gone",
        "train-00009.tar is new",
        "train-00000.tar changed",
        "train-00001.tar changed",
        "train-00002.tar changed",
    ]


def test_shards_of_the_same_name_in_two_folders_are_two(shards):
    one, two = shards(name="one"), shards(name="two", seed=1)
    before = shard_set(one, two, weights=(1.0, 1.0)).manifest()
    assert len(before) == 8
    shards(name="two", seed=2)
    assert changed_shards(before, shard_set(one, two, weights=(1.0, 1.0)).manifest()) == [
        f"two/train-{number:05}.tar changed" for number in range(4)
    ]


def test_batches_split_into_equal_parts(shards):
    batch, _ = batches(shard_set(shards()), 1)[0]
    parts = batch.split(4)
    assert torch.equal(torch.cat([p.images for p in parts]), batch.images) and len(parts[0]) == 2
    with pytest.raises(InputError, match="does not split into 3"):
        batch.split(3)


@pytest.mark.parametrize(("ratio", "kept"), [(0.5, 8), (0.75, 4), (0.3, 11), (0.99, 1)])
def test_masks_keep_the_right_number_evenly_and_by_position(ratio, kept):
    positions = torch.arange(4000)
    keep = kept_patches(1, positions, 16, ratio)
    assert keep.shape == (4000, kept) and (keep.diff(dim=1) > 0).all()
    share = torch.bincount(keep.flatten(), minlength=16) / 4000
    assert (share - kept / 16).abs().max() < 0.04
    assert torch.equal(kept_patches(1, positions[100:103], 16, ratio), keep[100:103])
    assert not torch.equal(kept_patches(2, positions, 16, ratio), keep)
    assert kept_patches(1, positions, 16, 0.0) is None


def test_drop_path_rises_with_depth_and_keeps_the_mean():
    factors = drop_path_factors(1, torch.arange(20_000), 5, 0.4)
    assert factors.shape == (20_000, 10) and (factors[:, :2] == 1).all()
    dropped = (factors == 0).float().mean(0).view(5, 2).mean(1)
    assert torch.allclose(dropped, torch.linspace(0, 0.4, 5), atol=0.01)
    assert torch.allclose(factors.mean(0), torch.ones(10), atol=0.02)
    assert drop_path_factors(1, torch.arange(3), 5, 0.0) is None
    assert keyed.key(1, "drop path") != keyed.key(1, "kept patches")
