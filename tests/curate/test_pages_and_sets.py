"""Drawn sets, manifests, merged sources that train, statistics and contact sheets."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from evaclip.checkpoint import newest
from evaclip.cli import DATA_VERBS, main
from evaclip.curate.filter import FilterCommand, filter_shards
from evaclip.curate.scan import scan
from evaclip.data.index import expand, fingerprint, index_shards
from evaclip.data.manifest import read_manifest, read_merged
from evaclip.data.shards import DataConfig, ShardSet, SourceConfig
from evaclip.errors import InputError
from evaclip.log import read_log
from evaclip.recipes.small import eva02_tiny_digits
from evaclip.train import train
from tests.curate.conftest import contents, run, sample_files, tar_of


@pytest.mark.parametrize("verb", DATA_VERBS)
def test_each_verb_explains_its_fields(verb, capfd):
    with pytest.raises(SystemExit) as exit:
        main(["data", verb, "--help"])
    assert exit.value.code == 0 and len(capfd.readouterr().out.splitlines()) > 8


def test_a_drawn_set_is_the_same_for_its_seed_on_any_number_of_processes(drawn_set):
    one, two = drawn_set("one"), drawn_set("two", processes=3)
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}
    other = drawn_set("other", seed=1)
    assert contents(one).keys() == contents(other).keys() and contents(one) != contents(other)
    captions = {data for name, data in contents(one).items() if name.endswith("txt")}
    assert len(captions) > 50 and all(b" " in caption for caption in captions)


def test_index_writes_the_fingerprint_that_training_carries(drawn_set, tmp_path, capfd):
    folder = drawn_set()
    (folder / "manifest.json").unlink()
    assert run("index", folder, "--processes", 1) == 0
    manifest = read_manifest(folder / "manifest.json")
    assert manifest.samples == 60 and manifest.fingerprint in capfd.readouterr().out
    shards = ShardSet(DataConfig(sources=(SourceConfig(name="s", shards=(str(folder),)),), workers=0))
    assert shards.fingerprint == manifest.fingerprint
    made = json.loads((folder / "manifest.json").read_text())
    made["shards"][0]["sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(made))
    with pytest.raises(InputError, match="its fingerprint is not that of the shards"):
        read_manifest(folder / "manifest.json")
    (folder / "manifest.json").write_text("[1]")
    with pytest.raises(InputError, match="not a manifest"):
        read_manifest(folder / "manifest.json")


def test_index_keeps_what_a_manifest_says_of_how_the_set_was_made(drawn_set):
    folder = drawn_set()
    before = read_manifest(folder / "manifest.json")
    assert run("index", folder) == 0
    assert read_manifest(folder / "manifest.json") == before and before.made_by["verb"] == "synth"


def test_index_of_several_folders_needs_a_name(drawn_set, tmp_path, capfd):
    one, two = drawn_set("one", samples=2), drawn_set("two", samples=2)
    assert run("index", one, two) == 2
    assert "--out" in capfd.readouterr().err
    assert run("index", one, two, "--out", tmp_path / "m.json") == 0
    assert read_manifest(tmp_path / "m.json").samples == 4


def test_merged_sources_train_with_their_weights_and_the_run_carries_the_fingerprint(drawn_set, tmp_path, capfd):
    one, two = drawn_set("one", samples=80), drawn_set("two", samples=40, seed=1)
    path = tmp_path / "merged.json"
    assert run("merge", f"one:0.75={one}", f"two:0.25={two}/synth-0000{{0..1}}.tar", "--out", path) == 0
    assert "one: 75.00% of the stream" in capfd.readouterr().out
    merged = read_merged(path)
    assert merged.fingerprint == fingerprint(index_shards(expand([str(one), str(two)])))
    config = replace(eva02_tiny_digits(), run_dir=tmp_path / "run", steps=2, batch_size=16)
    config = replace(
        config,
        data=replace(config.data, sources=(), merged=path, workers=0),
        evals=replace(config.evals, zero_shot=()),
    )
    places = ShardSet(config.data).order(0, 16).places(np.arange(4000))
    assert np.bincount(places.source).tolist() == [3000, 1000]
    train(config)
    events = [record for record in read_log(tmp_path / "run") if record.get("fingerprint")]
    found = newest(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert events[0]["fingerprint"] == found.record["cursor"]["fingerprint"] == merged.fingerprint
    run("synth", "--out", tmp_path / "x", "--samples", 40, "--per-shard", 20, "--seed", 5)
    (tmp_path / "x" / "synth-00000.tar").rename(two / "synth-00000.tar")
    with pytest.raises(InputError, match=r"source 'two' is not what .*merged\.json says"):
        ShardSet(config.data)


def test_a_merged_set_may_move_with_its_shards(drawn_set, tmp_path):
    drawn_set("all/one", samples=4)
    assert run("merge", f"one={tmp_path}/all/one", "--out", tmp_path / "all" / "m.json") == 0
    (tmp_path / "all").rename(tmp_path / "moved")
    source = read_merged(tmp_path / "moved" / "m.json").sources[0]
    assert source.weight == 4 and [path.parent for path in expand(source.shards)] == [tmp_path / "moved" / "one"]


@pytest.mark.parametrize(
    ("source", "sentence"),
    [("one", "not NAME:WEIGHT=PATTERN"), ("one:0={}", "above 0"), ("one:1e999={}", "above 0"), ("a=nowhere", "do not")],
)
def test_sources_that_cannot_be_merged(drawn_set, tmp_path, source, sentence, capfd):
    assert run("merge", source.format(drawn_set(samples=2)), "--out", tmp_path / "m.json") == 2
    assert sentence in capfd.readouterr().err
    assert run("merge", f"a={tmp_path}/set", f"a={tmp_path}/set", "--out", tmp_path / "m.json") == 2
    assert "two sources" in capfd.readouterr().err


def test_stats_are_what_a_plain_count_gives(drawn_set, tmp_path, capfd):
    folder = drawn_set(samples=40, per_shard=20, size=48)
    extra = [("x.jpg", sample_files(0)[0][1]), ("x.txt", b"word " * 100), ("y.jpg", b"junk"), ("y.txt", b"a")]
    again = [("z.jpg", sample_files(0)[0][1]), ("z.txt", b"word " * 100)]
    tar_of([*extra, *again], folder / "zz.tar")
    (folder / "zz_stats.json").write_text(
        json.dumps({"count": 10, "successes": 3, "status_dict": {"success": 3, "HTTP Error 404: Not Found": 7}})
    )
    assert run("stats", folder, "--out", tmp_path / "st", "--processes", 2) == 0
    record = json.loads((tmp_path / "st" / "stats.json").read_text())
    assert (record["samples"], record["usable"], record["shards"]) == (43, 42, 3)
    assert record["problems"] == {"undecodable": 1} and record["formats"] == {"jpg": 42}
    assert record["repeated_images"] == 1 and record["cut_captions"] == 2
    captions = [data for name, data in contents(folder).items() if name.endswith("txt") and not name.startswith("y")]
    assert record["repeated_captions"] == len(captions) - len(set(captions))
    assert record["quantiles"]["widths"]["50%"] == 48
    assert record["download"] == {"tried": 10, "alive": 3, "errors": {"HTTP Error 404: Not Found": 7}}
    assert "30.00%  addresses that were alive" in capfd.readouterr().out
    page = (tmp_path / "st" / "stats.html").read_text()
    assert page.count("data:image/png;base64,") == 6 and "HTTP Error 404" in page  # with that of `similarity`


def test_a_contact_sheet_shows_the_same_samples_for_a_seed_and_runs_nothing(tmp_path, drawn_set):
    folder = drawn_set()
    hostile = b"<script>alert(1)</script>"
    tar_of(
        [("h.png", sample_files(0)[0][1]), ("h.txt", hostile), ("g.jpg", b"junk"), ("g.txt", b"b")], folder / "z.tar"
    )
    pages = []
    for number, seed in enumerate((0, 0, 1)):
        words = ["--out", tmp_path / f"{number}.html", "--samples", 10, "--seed", seed]
        assert run("sample", folder, *words) == 0
        pages.append((tmp_path / f"{number}.html").read_text())
    assert pages[0] == pages[1] != pages[2]
    assert run("sample", folder, "--out", tmp_path / "all.html", "--samples", 1000) == 0
    page = (tmp_path / "all.html").read_text()
    assert page.count("<figure>") == 62 and page.count("data:image/jpeg;base64,") == 61
    assert "<script>" not in page and "&lt;script&gt;" in page and "undecodable" in page
    assert sorted(re.findall(r"synth-\d+\.tar (\d+)", page)) == [f"{n:09}" for n in range(60)]
    assert run("sample", folder, "--samples", 0) == 2


def test_filter_by_a_models_score(drawn_set, tmp_path):
    """A recipe's tower with random weights: the scores mean nothing, the shares must be right all the same."""
    folder = drawn_set(samples=30, per_shard=15)
    config = replace(eva02_tiny_digits(), run_dir=tmp_path / "run", steps=1, batch_size=8)
    source = SourceConfig(name="s", shards=(str(folder),))
    config = replace(
        config,
        data=replace(config.data, sources=(source,), workers=0),
        evals=replace(config.evals, zero_shot=()),
    )
    train(config)
    command = FilterCommand(shards=(str(folder),), out=tmp_path / "f", model=str(tmp_path / "run"), top_share=0.5)
    manifest = filter_shards(replace(command, processes=1))
    assert manifest.samples == 15 and manifest.made_by["left_out"] == {"score": 15}
    lines = [json.loads(line) for line in (tmp_path / "f" / "rejected.jsonl").read_text().splitlines()]
    scores = [float(line["detail"].split()[1].rstrip(",")) for line in lines]
    least = float(lines[0]["detail"].split()[-1])
    assert len(scores) == 15 and max(scores) <= least
    assert filter_shards(replace(command, processes=1)) == manifest
    words = ["--model", tmp_path / "run", "--similarity", "-1", "--distance", "-1"]
    assert run("dedup", folder, "--out", tmp_path / "d", *words) == 0  # every image is like the first
    assert [sample.key for sample in scan(tmp_path / "d" / "synth-00000.tar").good] == ["000000000"]
    assert not (tmp_path / "d" / "synth-00001.tar").exists()
