"""Every code of `evaclip data check` is given where it belongs, and the repaired shards hold the rest."""

import io
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from evaclip.curate.check import CheckCommand, check, key_hashes
from evaclip.curate.scan import CODES, parsed_json, scan
from evaclip.data.index import expand
from evaclip.data.transforms import BadImageError
from tests.curate.conftest import contents, run, sample_files, tar_of


def replaced(files, suffix, data):
    return [(name, data if name.endswith(suffix) else old) for name, old in files]


def renamed(files, change):
    return [(change(name), data) for name, data in files]


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


BAD = {
    "unsafe-name": [
        lambda f: renamed(f, lambda name: "../" + name),
        lambda f: renamed(f, lambda name: "/etc/" + name),
        lambda f: renamed(f, lambda name: "a/../../" + name),
        lambda f: renamed(f, lambda name: "a\\" + name),
        lambda f: renamed(f, lambda name: "C:" + name),
        lambda f: renamed(f, lambda name: "a\n" + name),
    ],
    "long-name": [lambda f: renamed(f, lambda name: "k" * 99 + name)],
    "pickle": [
        lambda f: [*f, (f[0][0].replace("jpg", "pkl"), b"x")],
        lambda f: [*f, (f[0][0].replace("jpg", "emb.PTH"), b"x")],
    ],
    "duplicate-member": [lambda f: [*f, f[1]]],
    "dotted-key": [lambda f: renamed(f, lambda name: "v1." + name)],
    "no-image": [lambda f: f[1:]],
    "two-images": [lambda f: [*f, (f[0][0].replace("jpg", "png"), b"x")]],
    "no-caption": [
        lambda f: [f[0], f[2]],
        lambda f: replaced(f, "txt", b""),
        lambda f: replaced(f, "txt", b" \n"),
    ],
    "long-caption": [lambda f: replaced(f, "txt", b"a" * 65537)],
    "caption-not-utf8": [lambda f: replaced(f, "txt", b"caf\xe9")],
    "bad-json": [
        lambda f: replaced(f, "json", b"{"),
        lambda f: replaced(f, "json", b"[1]"),
        lambda f: replaced(f, "json", b'{"a":' * 50 + b"1" + b"}" * 50),
        lambda f: replaced(f, "json", b"[" * 100_000),
        lambda f: replaced(f, "json", b'{"a": "' + b"a" * (1 << 20) + b'"}'),
        lambda f: replaced(f, "json", b'{"a": "\xff"}'),
    ],
    "undecodable": [
        lambda f: replaced(f, "jpg", b"not an image"),
        lambda f: replaced(f, "jpg", f[0][1][:-200]),
        lambda f: replaced(f, "jpg", b"\xff\xd8\xff"),
        lambda f: replaced(f, "jpg", b"GIF89a" + bytes(20)),
    ],
    "too-many-pixels": [lambda f: replaced(f, "jpg", png(7000, 7000))],
}
CASES = [(code, number) for code, changes in BAD.items() for number in range(len(changes))]


@pytest.mark.parametrize(("code", "number"), CASES)
def test_a_bad_sample_has_its_code_and_its_neighbours_are_good(tmp_path, code, number, capfd):
    bad = BAD[code][number](sample_files(1))
    tar_of([*sample_files(0), *bad, *sample_files(2)], tmp_path / "x.tar", tarfile.PAX_FORMAT)
    found = scan(tmp_path / "x.tar", "full")
    assert [problem.code for problem in found.problems] == [code] and found.found == 3
    assert [sample.key for sample in found.good] == ["000000", "000002"]
    assert run("check", tmp_path, "--out", tmp_path / "p", "--processes", 1, "--repair", tmp_path / "good") == 1
    line = json.loads((tmp_path / "p").read_text())
    assert line["code"] == code and line["shard"] == "x.tar" and line["key"] and line["offset"] > 0
    assert contents(tmp_path / "good") == dict([*sample_files(0), *sample_files(2)])
    assert "1  " + code in capfd.readouterr().out


def test_members_of_a_sample_that_lie_apart(tmp_path):
    a, b = sample_files(0), sample_files(1)
    found = scan(tar_of([a[0], *b, *a[1:]], tmp_path / "x.tar"))
    assert [(p.code, p.key) for p in found.problems] == [("scattered", "000000")]
    assert [sample.key for sample in found.good] == ["000001"]


def test_pixels_are_looked_at_only_when_asked_for(tmp_path):
    files = sample_files(0)
    broken = files[0][1][:-150] + b"\xff\xd9"  # an end before its time, among the pixels
    path = tar_of([("0.jpg", broken), ("0.txt", b"a"), *sample_files(1)], tmp_path / "x.tar")
    assert scan(path, "full").problems == []
    assert [problem.code for problem in scan(path, "decode").problems] == ["undecodable"]


def test_a_sound_set_has_no_problems_at_any_level_and_webdataset_agrees(drawn_set, tmp_path, capfd):
    folder = drawn_set()
    for level in ("fast", "full", "decode"):
        assert run("check", folder, "--level", level, "--out", tmp_path / "p", "--processes", 2) == 0
        assert (tmp_path / "p").read_text() == "" and "60 samples in 3 shards, 0 problems" in capfd.readouterr().out
    keys = [
        s["__key__"] for path in expand([str(folder)]) for s in webdataset.WebDataset(str(path), shardshuffle=False)
    ]
    assert keys == [sample.key for path in expand([str(folder)]) for sample in scan(path).good]
    assert not (tmp_path / "p.unfinished").exists()


def problems_of(folder, tmp_path, level="full", **more):
    command = CheckCommand(shards=(str(folder),), level=level, out=tmp_path / "p", processes=1, **more)
    return check(expand(command.shards), command)[0]


def test_what_the_manifest_lists_is_compared(drawn_set, tmp_path):
    folder = drawn_set()
    path = folder / "synth-00001.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1  # within a JPEG: no header says so
    path.write_bytes(data)
    assert "changed" in {problem.code for problem in problems_of(folder, tmp_path)}
    (folder / "synth-00000.tar").rename(folder / "other.tar")
    found = {(problem.code, problem.shard) for problem in problems_of(folder, tmp_path, "fast")}
    assert found == {("missing", "synth-00000.tar"), ("not-listed", "other.tar")}


def test_a_key_of_another_shard_is_named_and_left_out_of_the_repair(tmp_path):
    (tmp_path / "s").mkdir()
    tar_of([*sample_files(0), *sample_files(1)], tmp_path / "s" / "a.tar")
    tar_of([*sample_files(1), *sample_files(2)], tmp_path / "s" / "b.tar")
    found = problems_of(tmp_path / "s", tmp_path, repair=tmp_path / "r")
    assert [(p.code, p.shard, p.key) for p in found] == [("duplicate-key", "b.tar", "000001")]
    assert contents(tmp_path / "r") == dict(sample_files(2))
    listed = (tmp_path / "r" / "shards.txt").read_text().splitlines()
    assert listed == [str(tmp_path / "s" / "a.tar"), str(tmp_path / "r" / "b.tar")]
    assert problems_of(f"@{tmp_path}/r/shards.txt", tmp_path) == []


def test_what_img2dataset_counted_is_compared(tmp_path):
    (tmp_path / "s").mkdir()
    tar_of([*sample_files(0), *sample_files(1)], tmp_path / "s" / "00000.tar")
    (tmp_path / "s" / "00000_stats.json").write_text(json.dumps({"count": 3, "successes": 2}))
    table = pa.table({"status": ["success", "failed_to_download", "success"]})
    pq.write_table(table, tmp_path / "s" / "00000.parquet")
    assert problems_of(tmp_path / "s", tmp_path) == []
    pq.write_table(table.slice(0, 2), tmp_path / "s" / "00000.parquet")
    assert [p.code for p in problems_of(tmp_path / "s", tmp_path)] == ["counts-differ"]
    (tmp_path / "s" / "00000.parquet").write_bytes(b"junk")
    assert [p.code for p in problems_of(tmp_path / "s", tmp_path)] == ["counts-differ"]


def test_every_cut_is_a_problem_and_what_came_before_it_is_saved(tmp_path):
    """Where the webdataset library is silent or hands on half a sample."""
    (tmp_path / "s").mkdir()
    files = [file for number in range(3) for file in sample_files(number)]
    path = tar_of(files, tmp_path / "s" / "x.tar")
    whole = path.read_bytes()
    ends = [member.offset_data + member.size for member in tarfile.open(path).getmembers()][1::3]
    last = -(-ends[-1] // 512) * 512 + 1024
    for size in range(0, last, 511):
        path.write_bytes(whole[:size])
        found = scan(path, "full")
        assert found.problems, size
        assert len(found.good) == sum(end <= size for end in ends)


def test_a_damaged_header_costs_its_own_sample_alone(tmp_path):
    files = [file for number in range(4) for file in sample_files(number)]
    path = tar_of(files, tmp_path / "x.tar")
    at = next(m.offset for m in tarfile.open(path).getmembers() if m.name == "000001.txt")
    data = bytearray(path.read_bytes())
    data[at + 5] ^= 4
    path.write_bytes(data)
    found = scan(path, "full")
    assert {(problem.code, problem.key) for problem in found.problems} == {("bad-header", ""), ("no-caption", "000001")}
    assert [sample.key for sample in found.good] == ["000000", "000002", "000003"]


def test_links_are_problems_and_lead_nowhere(tmp_path):
    path = tar_of(sample_files(0), tmp_path / "x.tar")
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo("000009.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    found = scan(path)
    assert [problem.code for problem in found.problems] == ["not-a-file"] * 3 and len(found.good) == 1


def test_exit_status_2_and_one_sentence_when_it_cannot_be_done(drawn_set, tmp_path, capfd):
    assert run("check", tmp_path / "nowhere") == 2
    assert "do not exist" in capfd.readouterr().err
    folder = drawn_set()
    (folder / "synth-00000.tar").write_bytes(b"")
    assert run("check", folder, "--out", tmp_path / "p", "--repair", folder) == 2
    assert "name another folder" in capfd.readouterr().err
    (folder / "manifest.json").write_text('{"version": 1}')
    assert run("check", folder, "--out", tmp_path / "p") == 2
    assert "manifest.json" in capfd.readouterr().err


def test_every_code_is_explained_and_hashes_of_keys_are_stable():
    assert set(BAD) <= set(CODES) and all(CODES.values())
    assert key_hashes(["a"])[0] == key_hashes(["b", "a"])[1] and key_hashes([]).dtype == np.uint64


def test_json_at_its_limits():
    assert parsed_json(b'{"a": ' * 32 + b"1" + b"}" * 32)
    assert parsed_json(b'{"similarity": NaN}')
    with pytest.raises(BadImageError, match="bad-json"):
        parsed_json(os.urandom(100))
