"""Reading tars as tarfile does, noticing every cut, and knowing when a shard has changed."""

import io
import os
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import webdataset

from evaclip.data.index import expand, fingerprint, index_shards, load_index, samples_of
from evaclip.data.tar import DamagedTarError, _plain, _walk, mapped, members, survey
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


def field(header: bytes, at: int, value: bytes) -> bytes:
    """A header with another field and the checksum that belongs to it."""
    changed = bytearray(header)
    changed[at : at + len(value)] = value
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


def surveyed(path, data: bytes):
    path.write_bytes(data)
    with mapped(path) as view:
        return survey(view)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_taken_in_at_once_is_the_tar_that_is_walked(tmp_path, format):
    path = tmp_path / "x.tar"
    names = [f"{n:04}.{suffix}" for n in range(50) for suffix in ("jpg", "txt")]
    path.write_bytes(tar_bytes(names, format, 1.25 if format == tarfile.PAX_FORMAT else 0))
    with mapped(path) as data:
        plain, walked = _plain(data), list(_walk(data))
    assert plain is not None and len(plain) == 100 and plain == walked


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (124, b"-0000001000\0"),  # would walk backwards for ever
        (124, b"0000_000144\0"),
        (124, b"+0000000144\0"),
        (124, b"\xff" * 12),
        (124, b"\x80" + b"\xff" * 11),
        (124, b"77777777777\0"),
        (156, b"2"),
        (156, b"S"),
    ],
)
def test_a_hostile_header_is_damage_and_what_follows_is_found(tmp_path, at, value):
    whole = tar_bytes(NAMES[:3], tarfile.USTAR_FORMAT, 0)
    broken = whole[:512] + field(whole[512:1024], at, value) + whole[1024:]
    found, damage = surveyed(tmp_path / "x.tar", broken)
    assert [member.name for member in found] == NAMES[1:3] and len(damage) == 1
    with pytest.raises(DamagedTarError):
        members(tmp_path / "x.tar")


@pytest.mark.parametrize(
    "body",
    [
        b"99999 size=1\n",
        b"11 size=-1\n",
        b"12 size=abc\n",
        b"13 size=\xd9\xa1\xd9\xa2\n",
        b"\0" * 40,
        b"3 =\n",
        b"5 a=b",
    ],
)
def test_hostile_extensions_are_damage(tmp_path, body):
    whole = tar_bytes(NAMES[:2], tarfile.USTAR_FORMAT, 0)
    header = field(field(whole[512:1024], 124, b"%011o\0" % len(body)), 156, b"x")
    broken = whole[:512] + header + body.ljust(512, b"\0") + whole[512:]
    found, damage = surveyed(tmp_path / "x.tar", broken)
    assert [each.code for each in damage] == ["bad-header"] and len(found) == 2


def test_a_size_that_an_extension_gives_is_where_the_next_member_begins(tmp_path):
    info = tarfile.TarInfo("big.jpg")
    info.size, info.pax_headers = 1000, {"size": "1000"}
    after = tarfile.TarInfo("big.txt")
    after.size = 3
    data = bytearray(info.tobuf(tarfile.PAX_FORMAT))
    data[-512:] = field(bytes(data[-512:]), 124, b"00000000000\0")  # as for files of more than 8 GiB
    whole = bytes(data) + bytes(1024) + after.tobuf(tarfile.USTAR_FORMAT) + b"abc".ljust(512, b"\0") + bytes(1024)
    found, damage = surveyed(tmp_path / "x.tar", whole)
    assert [(m.name, m.size) for m in found] == [("big.jpg", 1000), ("big.txt", 3)] and not damage


def test_two_tars_in_one_file_are_noticed(tmp_path):
    one = tar_bytes(NAMES[:2], tarfile.USTAR_FORMAT, 0)
    found, damage = surveyed(tmp_path / "x.tar", one + one)
    assert [each.code for each in damage] == ["after-end"] and len(found) == 4
    with pytest.raises(DamagedTarError, match="the file goes on"):
        members(tmp_path / "x.tar")


def test_hidden_files_and_names_without_a_dot_are_no_samples(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes(["README", "._0001.jpg", ".jpg", "./0001.jpg", "a.b/0002.txt"]))
    assert list(samples_of(path)) == ["0001", "a.b/0002"]
    assert [s["__key__"].removeprefix("./") for s in webdataset.WebDataset(str(path), shardshuffle=False)] == [
        "0001",
        "a.b/0002",
    ]


def test_our_shards_have_the_bytes_of_webdatasets_writer(tmp_path):
    pairs = made_pairs(23)
    path = write_shards(pairs, tmp_path, "s")[0]
    with webdataset.TarWriter(str(tmp_path / "w.tar"), encoder=False, mtime=0, format=tarfile.USTAR_FORMAT) as tar:
        for pair in pairs:
            tar.write({"__key__": pair.key, "png": pair.image, "txt": pair.caption.encode()})
    assert path.read_bytes() == (tmp_path / "w.tar").read_bytes()


def test_a_name_too_long_for_a_plain_header_is_refused(tmp_path):
    with pytest.raises(InputError, match="100 bytes"):
        write_shards([replace(made_pairs(1)[0], key="k" * 100)], tmp_path, "s")
    assert not list(tmp_path.iterdir())
