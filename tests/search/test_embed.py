"""Collections to vectors: against the encoder itself, in every layout, interrupted, shared, and with bad files."""

import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch

from evaclip.cli import main
from evaclip.encoder import load_encoder
from evaclip.errors import InputError
from evaclip.inference import out_of_memory
from evaclip.search import embed as embedding
from evaclip.search import store
from evaclip.search.embed import Batches
from evaclip.search.processes import shared
from evaclip.search.sources import open_source
from tests.conftest import OUT_OF_MEMORY, encoded, made_pairs
from tests.search.conftest import picture, write_model
from tests.search.failing import fails


def run(*words) -> int:
    return main(["embed", *(str(word) for word in words), "--device", "cpu"])


def read(out):
    """All vectors and rows of what was embedded."""
    parts = json.loads((out / store.MANIFEST).read_text())["partitions"]
    names = [store.partition_name(number) for number in range(parts)]
    vectors = np.concatenate([np.load(out / f"{name}.npy") for name in names])
    return vectors, pa.concat_tables([parquet.read_table(out / f"{name}.parquet") for name in names]).to_pylist()


def expected(model, images):
    encoder = load_encoder(model)
    return encoder.images(torch.stack([encoder.preprocessing.pixels(image) for image in images])).numpy()


def test_a_folder_gives_the_encoders_vectors_in_the_order_of_names(photos, model, tmp_path, capfd):
    folder = photos(10)
    assert run(folder, tmp_path / "out", "--model", model, "--partition", 4, "--batch", 3) == 0
    vectors, rows = read(tmp_path / "out")
    assert [row["key"] for row in rows] == sorted(row["key"] for row in rows) and rows[0]["key"] == "001.png"
    numbers = [int(row["key"][-7:-4]) for row in rows]
    assert vectors.dtype == np.float16
    np.testing.assert_allclose(vectors, expected(model, [picture(n) for n in numbers]), atol=1e-3)
    assert {(row["width"], row["height"], row["status"], row["place"]) for row in rows} == {(20, 16, "ok", "file")}
    assert all(row["bytes"] == (folder / row["key"]).stat().st_size for row in rows)
    assert (tmp_path / "out" / store.LEDGER).read_text() == ""
    assert "10 images in 3 partitions" in capfd.readouterr().out


def layouts(folder, pairs):
    """The same pairs as shards, parquet of two kinds, and JSONL."""
    with tarfile.open(folder / "a.tar", "w") as tar:
        for pair in pairs:
            for name, data in ((f"{pair.key}.png", pair.image), (f"{pair.key}.txt", pair.caption.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    columns = {"caption": [pair.caption for pair in pairs], "key": [pair.key for pair in pairs]}
    structs = [{"bytes": pair.image, "path": None} for pair in pairs]
    parquet.write_table(pa.table({"image": structs} | columns), folder / "struct.parquet", row_group_size=3)
    parquet.write_table(pa.table({"jpg": [pair.image for pair in pairs]} | columns), folder / "bytes.parquet")
    (folder / "images").mkdir()
    for pair in pairs:
        (folder / "images" / f"{pair.key}.png").write_bytes(pair.image)
        (folder / "images" / f"{pair.key}.txt").write_text(pair.caption)
    lines = [json.dumps({"image": f"images/{p.key}.png", "caption": p.caption, "id": p.key}) for p in pairs]
    (folder / "list.jsonl").write_text("\n".join(lines))
    return [folder / name for name in ("a.tar", "struct.parquet", "bytes.parquet", "images", "list.jsonl")]


def test_every_layout_gives_the_same_vectors_captions_and_originals(model, tmp_path):
    from evaclip.search.readers import original

    pairs = made_pairs(8)
    for number, source in enumerate(layouts(tmp_path, pairs)):
        out = tmp_path / f"out{number}"
        assert run(source, out, "--model", model, "--partition", 5, "--batch", 2) == 0
        vectors, rows = read(out)
        assert [row["caption"] for row in rows] == [pair.caption for pair in pairs], source
        assert [original(row) for row in rows] == [pair.image for pair in pairs], source
        if number == 0:
            first = vectors
        assert np.array_equal(vectors, first), source


def test_shards_of_one_name_in_two_folders_have_keys_of_their_own(model, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        layouts(tmp_path / name, made_pairs(2))
    assert run(f"{tmp_path}/{{a,b}}/a.tar", tmp_path / "out", "--model", model) == 0
    assert [row["key"] for row in read(tmp_path / "out")[1]] == ["a/a/000000", "a/a/000001", "b/a/000000", "b/a/000001"]


@pytest.mark.parametrize("name", ["lines.txt", "texts.jsonl", "texts.parquet", "images.parquet"])
def test_captions(name, model, tmp_path):
    captions = ["a cat", "two dogs on a long, long walk", "", "ein Haus"]
    if name.endswith(".txt"):
        (tmp_path / name).write_text("\n".join(captions))
    elif name.endswith(".jsonl"):
        (tmp_path / name).write_text("\n".join(json.dumps({"text": caption}) for caption in captions))
    else:
        more = {"image": [encoded(np.zeros((4, 4, 3), np.uint8))] * 4} if name.startswith("images") else {}
        parquet.write_table(pa.table({"caption": captions} | more), tmp_path / name)
    assert run(tmp_path / name, tmp_path / "out", "--model", model, "--what", "text") == 0
    vectors, rows = read(tmp_path / "out")
    assert [row["status"] for row in rows] == ["ok", "ok", "no-caption", "ok"]
    kept = [0, 1, 3]
    reference = load_encoder(model).texts([captions[number] for number in kept]).numpy()
    np.testing.assert_allclose(vectors[kept], reference, atol=1e-3)
    assert not vectors[2].any()


def test_bad_files_go_to_the_ledger_and_the_rest_is_embedded(photos, model, tmp_path, capfd):
    folder = photos(4)
    whole = (folder / "001.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page.webp").write_text("<html>")
    picture(7, (300, 200)).save(folder / "large.png")
    assert run(folder, tmp_path / "out", "--model", model, "--max-pixels", 50_000) == 0
    vectors, rows = read(tmp_path / "out")
    ledger = [json.loads(line) for line in (tmp_path / "out" / store.LEDGER).read_text().splitlines()]
    codes = {row["key"]: row["status"] for row in ledger}
    assert codes == {"broken.png": "undecodable", "empty.jpg": "undecodable", "page.webp": "undecodable",
                     "large.png": "too-many-pixels"}  # fmt: skip
    assert all(row["reason"] for row in ledger)
    assert len(rows) == 8 and [bool(vector.any()) for vector in vectors] == [row["status"] == "ok" for row in rows]
    assert "4 could not be used" in capfd.readouterr().out


def test_interrupted_work_goes_on_and_ends_with_the_same_bytes(photos, model, tmp_path, monkeypatch, capfd):
    words = (photos(12), "--model", model, "--partition", 3, "--batch", 2)
    assert run(words[0], tmp_path / "whole", *words[1:]) == 0
    written, stop = store.write_partition, iter([False, False, True])

    def interrupted(*arguments):
        if next(stop):
            raise KeyboardInterrupt
        written(*arguments)

    monkeypatch.setattr(store, "write_partition", interrupted)
    assert run(words[0], tmp_path / "out", *words[1:]) == 130
    assert sorted(p.name for p in (tmp_path / "out").glob("*.npy")) == ["part-00000.npy", "part-00001.npy"]
    monkeypatch.setattr(store, "write_partition", written)
    (tmp_path / "out" / "part-00002.npy.tmp-0badcafe").write_bytes(b"half")
    before = (tmp_path / "out" / "part-00000.npy").stat().st_mtime_ns
    capfd.readouterr()
    assert run(words[0], tmp_path / "out", *words[1:]) == 0
    said = capfd.readouterr()
    assert "2 of 4 partitions are there already" in said.err and "6 embedded in" in said.out
    assert (tmp_path / "out" / "part-00000.npy").stat().st_mtime_ns == before
    for path in sorted((tmp_path / "whole").glob("part-*")):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert not list((tmp_path / "out").glob("*.tmp-*"))


def test_two_processes_end_with_the_bytes_of_one(photos, model, tmp_path, capfd):
    words = (photos(12), "--model", model, "--partition", 3, "--batch", 2)
    assert run(words[0], tmp_path / "one", *words[1:]) == 0
    assert run(words[0], tmp_path / "two", *words[1:], "--processes", 2) == 0
    for path in sorted((tmp_path / "one").glob("part-*.npy")):
        a, b = np.load(path), np.load(tmp_path / "two" / path.name)
        np.testing.assert_allclose(a, b, atol=1e-3)
    assert read(tmp_path / "one")[1] == read(tmp_path / "two")[1]


def test_a_process_that_fails_is_one_sentence():
    with pytest.raises(InputError, match="the disk is on fire"):
        list(shared(fails, "sentence", [1, 2, 3, 4], 2))
    with pytest.raises(InputError, match="ended with status 7"):
        list(shared(fails, "death", [1, 2, 3, 4], 2))


@pytest.mark.parametrize("what", ["text", "image"])
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["gpu", "cpu"])
def test_a_batch_that_does_not_fit_is_halved(model, capfd, what, error):
    encoder = load_encoder(model)
    sizes = []

    class Small(torch.nn.Module):
        def encode_text(self, tokens):
            return self.tried(encoder.model.encode_text, tokens)

        def encode_image(self, images):
            return self.tried(encoder.model.encode_image, images)

        def tried(self, encode, inputs):
            sizes.append(len(inputs))
            if len(inputs) > 3:
                raise error
            return encode(inputs)

    from dataclasses import replace

    size = encoder.preprocessing.size
    pixels = torch.randint(0, 256, (10, 3, size, size), dtype=torch.uint8)
    captions = [f"picture {number}" for number in range(10)]
    batches = Batches(encoder, 8)
    batches.encoder = replace(encoder, model=Small())
    found = batches(captions if what == "text" else list(pixels))
    expected = encoder.texts(captions) if what == "text" else encoder.images(pixels)
    assert sizes == [8, 4, 2, 2, 2, 2, 2] and batches.size == 2
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-3)
    assert "out of memory with 8 items at a time; going on with 4" in capfd.readouterr().err


def test_not_even_one_fits(model):
    class Full(torch.nn.Module):
        def encode_text(self, tokens):
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )

    from dataclasses import replace

    encoder = load_encoder(model)
    batches = Batches(encoder, 4)
    batches.encoder = replace(encoder, model=Full())
    with pytest.raises(InputError, match="no memory for even one item"):
        batches(["a", "b"])
    assert not out_of_memory(RuntimeError("shape mismatch"))


def test_two_writers_are_refused(photos, model, tmp_path, capfd):
    folder = photos(3)
    code = (
        "import sys, pathlib\nfrom evaclip.search.store import sole_writer\n"
        f"with sole_writer(pathlib.Path({str(tmp_path / 'out')!r})):\n    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        assert run(folder, tmp_path / "out", "--model", model) == 2
        assert "another process is writing to" in capfd.readouterr().err
        holder.kill()  # the lock goes with its holder
    assert run(folder, tmp_path / "out", "--model", model) == 0


def test_changed_weights_and_sources_are_refused_and_nothing_is_lost(photos, tmp_path, capfd):
    model, folder, out = write_model(tmp_path / "model"), photos(4), tmp_path / "out"
    assert run(folder, out, "--model", model) == 0
    before = {path.name: path.read_bytes() for path in out.glob("part-*")}
    write_model(model, seed=1)
    assert run(folder, out, "--model", model) == 2
    assert "vectors of another embedding space" in capfd.readouterr().err
    write_model(model, seed=0)
    assert run(folder, out, "--model", model, "--partition", 9) == 2
    assert "was begun with --partition 4096" in capfd.readouterr().err
    photos(2, first=50)
    assert run(folder, out, "--model", model) == 2
    assert "4 images then, 6 images now" in capfd.readouterr().err
    assert {path.name: path.read_bytes() for path in out.glob("part-*")} == before


def test_weights_that_change_between_start_and_work_are_refused(photos, model, tmp_path):
    source = open_source(str(photos(2)), tmp_path / "out")
    command = embedding.EmbedCommand(source="", out=tmp_path / "out", model=str(model), device="cpu")
    with pytest.raises(InputError, match="have changed since this began"):
        list(embedding._embed_share((command, source, "another", None), [0], 0, 1))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda f: None, "holds no images, nor .tar"),
        (lambda f: [(f / "a.tar").write_bytes(bytes(1024)), (f / "b.parquet").write_bytes(b"")], "say which is meant"),
        (lambda f: (f / "a.parquet").write_bytes(b"PAR1"), "cannot be read"),
        (lambda f: (f / "a.tar").write_bytes(b"x" * 700), "shards are damaged"),
        (lambda f: (f / "a.tar").write_bytes(bytes(1024)), "is empty"),
        (lambda f: (f / "a.txt").write_bytes(b"x" * 2**21), "more than 1,048,576 bytes"),
        (lambda f: parquet.write_table(pa.table({"x": [1]}), f / "a.parquet"), "has the columns x"),
        (lambda f: (f / "a.png").write_bytes(b"x"), "not one of the 1 images"),
    ],
)
def test_sources_that_cannot_be_used(make, sentence, model, tmp_path, capfd):
    folder = tmp_path / "source"
    folder.mkdir()
    make(folder)
    assert run(folder, tmp_path / "out", "--model", model) == 2
    said = capfd.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_a_missing_source_and_bad_numbers(model, tmp_path, capfd):
    (tmp_path / "photos").mkdir()
    assert run(tmp_path / "phtos", tmp_path / "out", "--model", model) == 2
    assert f"did you mean {tmp_path / 'photos'}" in capfd.readouterr().err
    assert run(tmp_path / "photos", tmp_path / "out", "--model", model, "--batch", 0) == 2
    assert "--batch must be at least 1" in capfd.readouterr().err


def test_a_table_cannot_name_what_lies_outside_its_folder(model, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    picture(1).save(tmp_path / "secret.png")
    picture(2).save(folder / "mine.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    names = ["mine.png", "../secret.png", str(tmp_path / "secret.png"), "link.png", "gone.png", "", "a\0b"]
    (folder / "list.jsonl").write_text("\n".join([*(json.dumps({"image": name}) for name in names), "[1]", "{"]))
    assert run(folder / "list.jsonl", tmp_path / "out", "--model", model) == 0
    _, rows = read(tmp_path / "out")
    assert [row["status"] for row in rows] == ["ok", "outside", "outside", "outside", "unreadable", "no-image",
                                               "unreadable", "not-json", "not-json"]  # fmt: skip
    assert run(folder / "list.jsonl", tmp_path / "wider", "--model", model, "--images", tmp_path) == 0
    assert [row["status"] for row in read(tmp_path / "wider")[1]][:3] == ["unreadable", "outside", "ok"]
