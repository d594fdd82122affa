"""Reading tars as tarfile does, noticing every cut, and knowing when a shard has changed."""

import io
import os
import tarfile

import numpy as np
import pytest
import webdataset

from evaclip.data.index import expand, fingerprint, index_shards, load_index
from evaclip.data.tar import DamagedTarError, members
from evaclip.data.write import write_shards
from evaclip.errors import InputError
from tests.conftest import made_pairs

LONG = "a" * 90 + "/" + "b" * 120
NAMES = ["0001.jpg", "0001.txt", "folder/0002.png", LONG + ".jpg", "ünïcode/ключ.txt", "dir/with.dots.seg.png"]


def tar_bytes(names=NAMES, format=tarfile.PAX_FORMAT, mtime=1.5) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        directory = tarfile.TarInfo("folder")
        directory.type = tarfile.DIRTYPE
        tar.addfile(directory)
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 100 * number + number, mtime
            tar.addfile(info, io.BytesIO(os.urandom(info.size)))
    return buffer.getvalue()


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_tarfiles(tmp_path, format):
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes(format=format))
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar.getmembers() if m.isreg()]
    assert [(m.name, m.offset, m.size) for m in members(path)] == expected


def test_every_cut_is_noticed(tmp_path):
    """tarfile reads a file that was cut at a header as complete; here no cut passes."""
    whole = tar_bytes(NAMES[:3], tarfile.USTAR_FORMAT, 0)
    end = whole.rstrip(b"\0")
    last = (len(end) + 511) // 512 * 512 + 1024
    path = tmp_path / "x.tar"
    for size in range(0, last, 171):
        path.write_bytes(whole[:size])
        with pytest.raises(DamagedTarError):
            list(members(path))
    path.write_bytes(whole[:last])
    assert len(list(members(path))) == 3


def test_flipped_header_bits_are_noticed(tmp_path):
    whole = tar_bytes(NAMES[:2], tarfile.USTAR_FORMAT, 0)
    random = np.random.default_rng(0)
    path = tmp_path / "x.tar"
    for _ in range(200):
        broken = bytearray(whole)
        broken[512 + int(random.integers(512))] ^= 1 << int(random.integers(8))  # the first file's header
        path.write_bytes(broken)
        with pytest.raises(DamagedTarError):
            list(members(path))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("evil.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(DamagedTarError, match="link or device"):
        list(members(path))


def test_the_index_finds_what_webdataset_finds(shards):
    folder = shards(count=40, per_shard=16)
    for path in sorted(folder.glob("*.tar")):
        head = index_shards([path])[0]
        index = load_index(path)
        data = path.read_bytes()
        expected = list(webdataset.WebDataset(str(path), shardshuffle=False))
        assert head.samples == len(expected) == len(index.keys)
        for (at, size, text_at, text_size), key, sample in zip(index.spans, index.keys, expected, strict=True):
            assert key == sample["__key__"]
            assert data[at : at + size] == sample["png"]
            assert data[text_at : text_at + text_size] == sample["txt"]


def test_samples_that_lack_a_part_are_kept_and_marked(tmp_path):
    path = tmp_path / "x.tar"
    with webdataset.TarWriter(str(path)) as tar:
        tar.write({"__key__": "a", "jpg": b"1", "txt": "one", "json": b"{}"})
        tar.write({"__key__": "b", "txt": "no image"})
        tar.write({"__key__": "c", "jpg": b"no caption"})
        tar.write({"__key__": "d", "json": b"{}"})
    assert index_shards([path])[0].samples == 4
    spans = load_index(path).spans
    assert (spans[:, 1] >= 0).tolist() == [True, False, True, False]
    assert (spans[:, 3] >= 0).tolist() == [True, True, False, False]


def test_written_shards_are_the_same_bytes_and_webdataset_reads_them(tmp_path):
    pairs = made_pairs(10)
    first, second = (write_shards(pairs, tmp_path / name, "s", 4) for name in "ab")
    assert [p.name for p in first] == ["s-00000.tar", "s-00001.tar", "s-00002.tar"]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second, strict=True))
    read = [s for p in first for s in webdataset.WebDataset(str(p), shardshuffle=False)]
    assert [(s["__key__"], s["png"], s["txt"].decode()) for s in read] == [(p.key, p.image, p.caption) for p in pairs]
    assert not list(tmp_path.glob("*/*.part"))


def test_an_index_is_made_once_and_again_when_the_shard_changes(shards):
    folder = shards(count=20, per_shard=10)
    paths = sorted(folder.glob("*.tar"))
    before = index_shards(paths)
    stored = [(folder / ".evaclip" / f"{path.name}.npz").stat().st_mtime_ns for path in paths]
    assert index_shards(paths) == before
    assert [(folder / ".evaclip" / f"{path.name}.npz").stat().st_mtime_ns for path in paths] == stored
    shards(count=20, per_shard=10, seed=1)
    after = index_shards(paths)
    assert fingerprint(after) != fingerprint(before)
    assert fingerprint(reversed(after)) == fingerprint(after)


def test_moving_a_data_set_does_not_change_its_fingerprint(shards, tmp_path):
    one = index_shards(sorted(shards(name="one").glob("*.tar")))
    two = index_shards(sorted(shards(name="two").glob("*.tar")))
    assert one != two and fingerprint(one) == fingerprint(two)


def test_indexes_go_elsewhere_when_asked(shards, tmp_path):
    folder = shards()
    paths = sorted(folder.glob("*.tar"))
    heads = index_shards(paths, index_folder=tmp_path / "indexes")
    assert not (folder / ".evaclip").exists()
    assert len(load_index(paths[0], tmp_path / "indexes").keys) == heads[0].samples


def test_parallel_indexing_gives_the_same(shards):
    paths = sorted(shards(count=64, per_shard=8).glob("*.tar"))
    parallel = index_shards(paths, processes=2)
    assert parallel == index_shards(paths) and len(parallel) == 8


def test_damaged_shards_are_named_together_or_left_out(shards):
    folder = shards(count=64, per_shard=16)
    paths = sorted(folder.glob("*.tar"))
    for path in paths[1:3]:
        path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"2 of 4 shards are damaged .*train-00001\.tar: it is cut.*train-00002"):
        index_shards(paths)
    left = index_shards(paths, skip_damaged=True)
    assert [head.name for head in left] == ["train-00000.tar", "train-00003.tar"]


def test_patterns(shards, tmp_path):
    folder = shards(count=64, per_shard=16)
    names = [f"train-0000{n}.tar" for n in range(4)]
    assert [p.name for p in expand([str(folder)])] == names
    assert [p.name for p in expand([f"{folder}/train-{{00000..00003}}.tar"])] == names
    (tmp_path / "list").write_text(f"{folder}/train-{{00000..00001}}.tar\n\n{folder}/train-00003.tar\n")
    assert [p.name for p in expand([f"@{tmp_path}/list"])] == [names[0], names[1], names[3]]


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("{folder}/train-{{00002..00005}}.tar", r"2 of 4 shards do not exist, the first is .*train-00004.tar; did you"),
        ("{folder}/nothing", "1 of 1 shards do not exist"),
        ("{tmp}", "holds no .tar files"),
        ("@{tmp}/none", "does not exist"),
        ("s3://bucket/x.tar", "local folders only"),
        ("pipe:cat /etc/passwd", "local folders only"),
    ],
)
def test_patterns_that_stand_for_nothing(shards, tmp_path, pattern, sentence):
    folder = shards(count=64, per_shard=16)
    with pytest.raises(InputError, match=sentence):
        expand([pattern.format(folder=folder, tmp=tmp_path)])
    with pytest.raises(InputError, match="no shards were named"):
        expand([])
