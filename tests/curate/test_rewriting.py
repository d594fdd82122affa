"""Verbs that write shards again: in = out + rejected, bytes untouched, and the same outcome however often."""

import contextlib
import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import imagehash
import numpy as np
import pytest
from PIL import Image

from evaclip.curate.decontaminate import read_hashes
from evaclip.curate.dedup import first_of_each
from evaclip.curate.filter import condition, failed
from evaclip.curate.journal import Journal
from evaclip.curate.likeness import image_hashes, near_pairs, nearest
from evaclip.curate.rewrite import finish
from evaclip.data.index import expand, fingerprint, index_shards
from evaclip.data.manifest import read_manifest
from evaclip.data.tar import BLOCK
from evaclip.errors import CheckpointError, InputError
from evaclip.quickstart import write_digits
from tests.curate.conftest import contents, run, sample_files, tar_of


def rejected(folder):
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def reshard(*words):
    return run("reshard", *words)


def test_resharding_keeps_every_byte_of_every_member(drawn_set, tmp_path, capfd):
    folder = drawn_set(samples=50, per_shard=20)
    assert reshard(folder, "--out", tmp_path / "r", "--per-shard", 16, "--processes", 2) == 0
    assert "50 samples in, 50 out in 4 shards, 0 rejected" in capfd.readouterr().out
    assert contents(tmp_path / "r") == contents(folder)
    manifest = read_manifest(tmp_path / "r" / "manifest.json")
    assert [shard.samples for shard in manifest.shards] == [16, 16, 16, 2]
    paths = sorted((tmp_path / "r").glob("*.tar"))
    assert manifest.fingerprint == fingerprint(index_shards(paths))
    assert manifest.made_by["source"] == fingerprint(index_shards(expand([str(folder)])))
    for path in paths:
        with tarfile.open(path) as tar:
            headers = [(m.offset_data - m.offset, m.mtime, m.pax_headers) for m in tar.getmembers()]
        assert set(map(str, headers)) == {str((BLOCK, 0, {}))}
    assert run("check", tmp_path / "r", "--level", "decode", "--out", tmp_path / "p") == 0


def test_the_order_depends_on_the_seed_and_on_nothing_else(drawn_set, tmp_path):
    folder = drawn_set(samples=90, per_shard=30)
    results = []
    for number, words in enumerate((["--processes", 1], ["--processes", 3], ["--seed", 1], ["--window", 1])):
        assert reshard(folder, "--out", tmp_path / str(number), "--per-shard", 40, *words) == 0
        results.append(bytes_of(tmp_path / str(number)))
    assert results[0] == results[1]
    shards = [{k: v for k, v in each.items() if k.endswith("tar")} for each in results]
    assert len({str(sorted(each.items())) for each in shards}) == 3
    keys = [name.partition(".")[0] for name in contents(tmp_path / "0")][::3]
    assert keys != sorted(keys) and sorted(keys) == [f"{n:09}" for n in range(90)]
    from_other_shards = Counter(int(key) // 30 for key in keys[:40])
    assert min(from_other_shards[n] for n in range(3)) > 5  # shuffled over the whole set
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "0").iterdir()}
    assert reshard(folder, "--out", tmp_path / "0", "--per-shard", 40) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "0").iterdir()} == before


def test_resharding_without_shuffling_keeps_the_order(drawn_set, tmp_path):
    folder = drawn_set(samples=50, per_shard=20)
    assert reshard(folder, "--out", tmp_path / "r", "--per-shard", 35, "--no-shuffle") == 0
    assert list(contents(tmp_path / "r")) == list(contents(folder))


def test_bad_samples_are_rejected_and_named(tmp_path, capfd):
    (tmp_path / "s").mkdir()
    good = [sample_files(number) for number in range(6)]
    bad = [("000009.jpg", b"junk"), ("000009.txt", b"a caption")]
    tar_of([*good[0], *bad, *good[1], *good[2]], tmp_path / "s" / "a.tar", tarfile.PAX_FORMAT)
    cut = tar_of([*good[3], *good[4], *good[5]], tmp_path / "s" / "b.tar")
    cut.write_bytes(cut.read_bytes()[: -10240 + 600])
    assert reshard(tmp_path / "s", "--out", tmp_path / "r") == 0
    out = capfd.readouterr().out
    found = rejected(tmp_path / "r")
    assert ("undecodable", "000009") in {(line["code"], line["key"]) for line in found}
    assert "cut" in {line["code"] for line in found if line["shard"] == "b.tar"}
    kept = read_manifest(tmp_path / "r" / "manifest.json").made_by
    assert kept["in"] == kept["out"] + kept["rejected"] and f"{kept['rejected']} rejected" in out
    whole = dict(file for number in range(6) for file in good[number])
    del whole["000005.json"]  # what was cut away; the image and its caption are there
    assert kept["out"] == 6 and contents(tmp_path / "r") == whole


def test_keys_that_two_samples_share(drawn_set, tmp_path, capfd):
    one, two = drawn_set("one", samples=10, per_shard=10), drawn_set("two", samples=10, per_shard=10, seed=1)
    assert reshard(one, two, "--out", tmp_path / "r") == 2
    assert "10 samples of the 2 shards have the key of another" in capfd.readouterr().err
    assert reshard(one, two, "--out", tmp_path / "r", "--keys", "numbered") == 0
    images = sorted(data for name, data in contents(tmp_path / "r").items() if name.endswith("jpg"))
    expected = [data for folder in (one, two) for name, data in contents(folder).items() if name.endswith("jpg")]
    assert images == sorted(expected)


def test_a_folder_with_other_shards_is_left_alone(drawn_set, tmp_path, capfd):
    folder = drawn_set(samples=10)
    assert reshard(folder, "--out", folder) == 2
    assert "made otherwise" in capfd.readouterr().err
    (tmp_path / "x").mkdir()
    tar_of(sample_files(0), tmp_path / "x" / "0.tar")
    assert run("dedup", folder, "--out", tmp_path / "x") == 2
    assert "did not write" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "x").glob("*.tar")] == ["0.tar"]


def test_a_killed_command_goes_on_and_ends_as_an_undisturbed_one(drawn_set, tmp_path):
    """kill -9 of the parent while it writes; its processes go too, and what they finished is not done again."""
    folder = drawn_set(samples=400, per_shard=20, processes=2)
    words = ["reshard", str(folder), "--per-shard", "10", "--processes", "2"]
    script = (
        "import sys, time\nfrom evaclip.curate import reshard\nfrom evaclip.cli import main\n"
        "write = reshard._write_shard\n"
        "def slow(*args, **more):\n    time.sleep(0.05)\n    return write(*args, **more)\n"
        "reshard._write_shard = slow\nsys.exit(main(['data', *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", script, *words, "--out", str(tmp_path / "a")]
    killed = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "a").glob("*.tar"))) < 5:
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    deadline = time.monotonic() + 60
    while alive_in(killed.pid):  # the processes see that the parent is gone
        assert time.monotonic() < deadline, "processes were left behind"
        time.sleep(0.1)
    assert not (tmp_path / "a" / "manifest.json").exists()
    recorded = {p: p.stat().st_mtime_ns for p in (tmp_path / "a" / "unfinished").glob("*.json")}
    assert recorded
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("*.tar")}
    assert run(*words, "--out", tmp_path / "a") == 0
    assert any(path.stat().st_mtime_ns == time_before for path, time_before in before.items())
    assert run(*words, "--out", tmp_path / "b") == 0
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def alive_in(group: int) -> list[int]:
    """The processes of a group that run, zombies aside."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, own = path.read_text().rpartition(")")[2].split()[:3]
            found += [int(path.parent.name)] if int(own) == group and state not in "ZX" else []
    return found


def noted(folder, item):
    with open(folder / "calls", "a") as file:
        file.write(f"{item}\n")
    if item == "b" and not (folder / "allowed").exists():
        raise InputError("not yet")
    return {"item": item, "array": np.arange(1000)}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_journal_does_nothing_twice(tmp_path, processes):
    journal = Journal(tmp_path / "j", {"a": 1}, processes)
    with pytest.raises(InputError, match="not yet"):
        list(journal.each("trying", partial(noted, tmp_path), ["a", "b", "c"]))
    (tmp_path / "allowed").touch()
    found = list(journal.each("trying", partial(noted, tmp_path), ["a", "b", "c"]))
    assert [(item, result["item"]) for item, result in found] == [(n, n) for n in "abc"]
    assert all((result["array"] == np.arange(1000)).all() for _, result in found)
    assert (tmp_path / "calls").read_text().split().count("a") == 1
    list(Journal(tmp_path / "j", {"a": 2}, 1).each("trying", partial(noted, tmp_path), ["a"]))
    assert (tmp_path / "calls").read_text().split().count("a") == 2
    journal.finished()
    assert not (tmp_path / "j").exists()


def test_numbers_that_do_not_add_up_are_an_error(tmp_path):
    with pytest.raises(InputError, match="3 samples in, but 0 out and 1 rejected"):
        finish(tmp_path, [], [], 3, 1, {})
    assert not (tmp_path / "manifest.json").exists()


def test_filter_by_columns(drawn_set, tmp_path, capfd):
    folder = drawn_set()
    words = ["--where", "similarity >= 0.25", "words <= 12", "--processes", 2]
    assert run("filter", folder, "--out", tmp_path / "f", *words) == 0
    files, kept = contents(folder), contents(tmp_path / "f")
    expected = [
        name
        for name, data in files.items()
        if name.endswith("json")
        and json.loads(data)["similarity"] >= 0.25
        and len(files[name.replace("json", "txt")].split()) <= 12
    ]
    assert [name for name in kept if name.endswith("json")] == expected and 0 < len(expected) < 60
    assert all(files[name] == data for name, data in kept.items())
    assert len(rejected(tmp_path / "f")) == 60 - len(expected)
    assert "not similarity >= 0.25" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("text", "columns", "met"),
    [
        ("width >= 200", {"width": 200}, True),
        ("width > 200", {"width": 200}, False),
        ("width<200", {"width": 199.5}, True),
        ("nsfw == UNLIKELY", {"nsfw": "UNLIKELY"}, True),
        ("nsfw != UNLIKELY", {"nsfw": "UNLIKELY"}, False),
        ("nsfw != UNLIKELY", {"nsfw": None}, False),
        ("punsafe < 0.5", {"punsafe": float("nan")}, False),
        ("punsafe < 0.5", {}, False),
        ("punsafe < 0.5", {"punsafe": "0.1"}, False),
    ],
)
def test_conditions(text, columns, met):
    assert (failed([condition(text)], columns) is None) is met


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "nothing to filter by"),
        (["--where", "width"], "not COLUMN OPERATOR VALUE"),
        (["--where", "a < b"], "compares with a number"),
        (["--where", "__import__('os') == 1"], "not COLUMN OPERATOR VALUE"),
        (["--model", "x"], "--min-score or --top-share"),
        (["--model", "x", "--top-share", "2"], "at most 1"),
        (["--model", "x", "--top-share", "0.5", "--min-score", "0.1"], "two ways"),
        (["--model", "nowhere/x", "--top-share", "0.5"], "does not exist"),
    ],
)
def test_filter_without_a_meaning(drawn_set, tmp_path, words, sentence, capfd):
    assert run("filter", drawn_set(samples=4), "--out", tmp_path / "f", *words) in (2, CheckpointError.exit_status)
    assert sentence in capfd.readouterr().err


def test_the_perceptual_hash_is_imagehashs_and_survives_another_encoding():
    random = np.random.default_rng(0)
    grown = Image.fromarray(random.integers(0, 255, (12, 12, 3), np.uint8)).resize((96, 80), Image.Resampling.BICUBIC)
    files = []
    for kind, more in (("PNG", {}), ("JPEG", {"quality": 40}), ("WEBP", {"quality": 50})):
        buffer = io.BytesIO()
        grown.save(buffer, kind, **more)
        files.append(buffer.getvalue())
    values = [image_hashes(data)[1] for data in files]
    assert values[0] == int(str(imagehash.phash(grown)), 16)
    assert all(value is not None and (value ^ values[0]).bit_count() <= 4 for value in values)
    flat = io.BytesIO()
    Image.new("RGB", (64, 64), (10, 200, 30)).save(flat, "PNG")
    assert image_hashes(flat.getvalue())[1] is None


@pytest.mark.parametrize("distance", [0, 1, 4, 9])
def test_near_pairs_are_all_near_pairs(distance):
    random = np.random.default_rng(distance)
    hashes = random.integers(0, 1 << 63, 40, dtype=np.uint64)
    flips = [
        hashes ^ np.uint64(int(sum(1 << int(b) for b in random.choice(64, k, replace=False)))) for k in range(1, 12)
    ]
    hashes = np.unique(np.concatenate([hashes, *flips]))
    found = {pair for a, b in near_pairs(hashes, distance) for pair in zip(a.tolist(), b.tolist(), strict=True)}
    bits = np.bitwise_count(hashes[:, None] ^ hashes[None])
    assert found == {(i, j) for i, j in np.argwhere(bits <= distance).tolist() if i < j}
    asked = nearest(hashes[::2], hashes, distance)
    expected = np.bitwise_count(hashes[:, None] ^ hashes[None, ::2])
    assert ((asked >= 0) == (expected.min(1) <= distance)).all()
    assert (expected[asked >= 0][np.arange((asked >= 0).sum()), asked[asked >= 0]] == expected.min(1)[asked >= 0]).all()


def test_of_a_chain_what_is_near_to_one_that_stays_goes():
    hashes = np.array([0b0, 0b1111, 0b11111111, 1 << 40, 0b0], np.uint64)
    result = {
        "sha256": np.arange(10, dtype=np.uint64).reshape(5, 2),
        "perceptual": hashes,
        "textured": np.array([True, True, True, False, True]),
        "keys": list("abcde"),
        "undecodable": {},
    }
    first, codes = first_of_each([result], 4)
    assert first.tolist() == [0, 0, 2, 3, 0] and codes.tolist() == [0, 2, 0, 0, 2]
    result["sha256"][3] = result["sha256"][1]
    first, codes = first_of_each([result], -1)
    assert first.tolist() == [0, 1, 2, 1, 4] and codes.tolist() == [0, 0, 0, 1, 0]


def test_dedup_leaves_one_of_each_picture(drawn_set, tmp_path, capfd):
    folder = drawn_set(samples=120, per_shard=40, repeats=0.4, size=96)
    files = contents(folder)
    shows = {name.partition(".")[0]: json.loads(data)["shows"] for name, data in files.items() if name.endswith("json")}
    repeats = {key for key, shown in shows.items() if shown != int(key)}
    assert run("dedup", folder, "--out", tmp_path / "d", "--processes", 2) == 0
    kept = contents(tmp_path / "d")
    gone = set(shows) - {name.partition(".")[0] for name in kept}
    assert len(gone & repeats) >= 0.95 * len(repeats) > 20
    assert len(gone - repeats) <= 2  # shapes drawn alike by chance
    assert all(files[name] == data for name, data in kept.items())
    lines = rejected(tmp_path / "d")
    assert {line["key"] for line in lines} == gone and all("of synth-0000" in line["detail"] for line in lines)
    assert "120 samples in" in capfd.readouterr().out


def test_decontaminate_counts_for_each_evaluation_set(tmp_path, capfd):
    write_digits(tmp_path / "digits")
    assert run("hash", "digits", "--data", tmp_path / "digits", "--out", tmp_path / "hashes.txt") == 0
    assert len(read_hashes([tmp_path / "hashes.txt"]).names) == 360
    tests = sorted((tmp_path / "digits" / "test").rglob("*.png"))[:2]
    leaked = [
        (f"leak{n}.{s}", d) for n, p in enumerate(tests) for s, d in (("png", p.read_bytes()), ("txt", b"a digit"))
    ]
    (tmp_path / "s").mkdir()
    tar_of([*sample_files(0), *leaked, *sample_files(1)], tmp_path / "s" / "a.tar")
    buffer = io.BytesIO()
    Image.open(io.BytesIO(sample_files(2)[0][1])).save(buffer, "WEBP", quality=95)  # another encoding of sample 2
    digest, perceptual = image_hashes(buffer.getvalue())
    with (tmp_path / "hashes.txt").open("a") as file:
        file.write(f"other\t{digest.hex()}\t{perceptual:016x}\nunseen\t{'0' * 64}\t-\n")
    tar_of([*sample_files(2), *sample_files(3)], tmp_path / "s" / "b.tar")
    words = ["decontaminate", tmp_path / "s", "--against", tmp_path / "hashes.txt", "--out", tmp_path / "c"]
    capfd.readouterr()
    assert run(*words) == 0
    out = capfd.readouterr().out
    assert "2  digits" in out and "1  other" in out and "0  unseen" in out and "6 samples in, 3 out, 3 rejected" in out
    assert contents(tmp_path / "c") == dict(file for number in (0, 1, 3) for file in sample_files(number))
    assert read_manifest(tmp_path / "c" / "manifest.json").made_by["per_set"] == {"digits": 2, "other": 1, "unseen": 0}
    assert run("hash", "digits", "--data", tmp_path / "digits", "--out", tmp_path / "hashes.txt") == 0
    assert len(read_hashes([tmp_path / "hashes.txt"]).names) == 362  # the other sets' lines stay


def test_lists_of_hashes_that_are_none(tmp_path, capfd, drawn_set):
    folder = drawn_set(samples=2)
    for text, sentence in (("digits\tabc\t-\n", "line 1"), ("", "are empty")):
        (tmp_path / "h").write_text(text)
        assert run("decontaminate", folder, "--against", tmp_path / "h", "--out", tmp_path / "c") == 2
        assert sentence in capfd.readouterr().err
    assert run("decontaminate", folder, "--against", tmp_path / "none", "--out", tmp_path / "c") == 2
    assert "evaclip data hash writes one" in capfd.readouterr().err
