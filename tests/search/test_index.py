"""Nearest rows against a plain computation; changing an index; approximate search against exact."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaclip.cli import main
from evaclip.errors import InputError
from evaclip.search import approximate, exact, store
from evaclip.search.index import Index, open_index
from tests.search.conftest import write_model


def unit(random, count, dim=16):
    vectors = random.standard_normal((count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def clustered(random, count, dim=32, clusters=40):
    """Vectors with structure: on plain Gaussian ones every approximate index fails alike."""
    centres = unit(random, clusters, dim)
    vectors = centres[random.integers(clusters, size=count)] + 0.35 * unit(random, count, dim)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    k=st.integers(1, 20),
    queries=st.integers(1, 5),
    dead=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_top_k_is_the_sorted_product(sizes, k, queries, dead, seed):
    random = np.random.default_rng(seed)
    segments = [np.round(unit(random, size) * 8).astype(np.float16) / 8 for size in sizes]  # coarse: many ties
    alive = [random.random(size) >= dead for size in sizes]
    asked = np.round(unit(random, queries) * 8) / 8
    scores, rows = exact.top_k(asked, segments, alive, k)
    product = asked.astype(np.float64) @ np.concatenate(segments).astype(np.float64).T
    product[:, ~np.concatenate(alive)] = -np.inf
    order = np.argsort(-product, axis=1, kind="stable")[:, :k]
    sorted_scores = np.take_along_axis(product, order, 1)
    wide = np.full((queries, k), -np.inf)
    wide[:, : order.shape[1]] = sorted_scores
    assert np.array_equal(scores, wide.astype(np.float32))
    found = rows >= 0
    assert np.array_equal(found, wide > -np.inf)
    assert np.array_equal(np.take_along_axis(product, np.where(found, rows, 0), 1)[found], scores[found])
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in rows)


def test_top_k_over_many_blocks_and_chunks(monkeypatch):
    monkeypatch.setattr(exact, "CHUNK", 4096)
    monkeypatch.setattr(exact, "QUERIES", 3)
    random = np.random.default_rng(0)
    segments = [unit(random, size).astype(np.float16) for size in (9000, 1, 5000)]
    queries = unit(random, 7)
    scores, rows = exact.top_k(queries, segments, [np.ones(len(part), bool) for part in segments], 12)
    product = queries.astype(np.float64) @ np.concatenate(segments).astype(np.float64).T
    assert np.array_equal(rows, np.argsort(-product, axis=1, kind="stable")[:, :12])
    np.testing.assert_allclose(scores, -np.sort(-product, axis=1)[:, :12], atol=1e-6)


def made(folder, vectors, bad=(), partition=1000, prefix="k", space="s" * 32):
    """What `evaclip embed` would have written for some vectors."""
    folder.mkdir()
    parts = -(-len(vectors) // partition)
    for number in range(parts):
        span = range(number * partition, min(len(vectors), (number + 1) * partition))
        rows = [{"key": f"{prefix}{row}", "path": "/x", "place": "line", "offset": row, "bytes": 0, "width": 0,
                 "height": 0, "caption": f"row {row}", "reason": "",
                 "status": "undecodable" if row in bad else "ok"} for row in span]  # fmt: skip
        part = vectors[span.start : span.stop].copy()
        part[[row - span.start for row in span if row in bad]] = 0
        store.write_partition(folder, number, part, pa.Table.from_pylist(rows, schema=store.SCHEMA))
    manifest = {"version": 1, "space_id": space, "dim": vectors.shape[1], "partitions": parts, "items": len(vectors),
                "model": {"source": "model", "name": "tiny"}}  # fmt: skip
    store.write_json(folder / store.MANIFEST, manifest)
    return folder


def keys(index, vector, k=3):
    _, rows = index.search(np.asarray(vector, np.float32)[None], k)
    return [index.row(int(row))["key"] for row in rows[0] if row >= 0]


def test_an_index_leaves_bad_rows_out_and_survives_append_and_delete(tmp_path, capfd):
    random = np.random.default_rng(0)
    vectors = clustered(random, 2500)
    one, two = made(tmp_path / "one", vectors[:1500], bad={3, 1200}), made(tmp_path / "two", vectors[1500:], prefix="n")
    assert main(["index", str(one)]) == 0
    assert "1,498 rows of 32 numbers, exact" in capfd.readouterr().out
    index = open_index(one)
    assert keys(index, vectors[3])[0] != "k3" and keys(index, vectors[1300])[0] == "k1300"
    assert (one / "index" / "segment-00001.npy").samefile(one / "part-00001.npy")
    assert main(["index", str(one), "--append", str(two)]) == 0
    assert "1,000 rows appended" in capfd.readouterr().out
    grown = open_index(one)
    assert keys(grown, vectors[2000])[0] == "n500" and len(grown) == 2498
    assert keys(index, vectors[1300])[0] == "k1300"  # an open reader goes on
    (tmp_path / "gone.txt").write_text("n500\nk1300\n")
    assert main(["index", str(one), "--delete", str(tmp_path / "gone.txt")]) == 0
    assert "2 rows deleted" in capfd.readouterr().out
    after = open_index(one)
    assert "n500" not in keys(after, vectors[2000], 9) and len(after) == 2496
    assert len(list((one / "index").glob("alive-*.npy"))) == 1
    with pytest.raises(InputError, match="has no row"):
        after.row(2000)
    assert main(["index", str(one), "--delete", str(tmp_path / "gone.txt")]) == 2
    assert "has no 'k1300', nor 1 more" in capfd.readouterr().err
    assert main(["index", str(one), "--append", str(two)]) == 2
    assert "'n0' of" in capfd.readouterr().err and len(open_index(one)) == 2496


@pytest.mark.parametrize("kind", ["ivf-sq8", "hnsw"])
def test_an_approximate_index_is_measured_and_follows_changes(kind, tmp_path, capfd):
    random = np.random.default_rng(1)
    vectors = clustered(random, 5000)
    one, two = made(tmp_path / "one", vectors[:4000]), made(tmp_path / "two", vectors[4000:], prefix="n")
    assert main(["index", str(one), "--kind", kind]) == 0
    said = capfd.readouterr().out
    measured = open_index(one).manifest["approximate"]["measured"]
    assert f"recall@10 {measured['recall_at_10']:.4f} against exact on 500 held-out queries" in said
    assert measured["recall_at_10"] > 0.95
    queries = vectors[:200].astype(np.float32)
    index = open_index(one)
    near, true = index.search(queries, 10), index.search(queries, 10, exactly=True)
    agreement = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(near[1], true[1], strict=True)])
    assert agreement > 0.95
    same = near[1] == true[1]
    np.testing.assert_allclose(near[0][same], true[0][same], atol=1e-5)  # scores are exact
    assert main(["index", str(one), "--append", str(two)]) == 0
    assert keys(open_index(one), vectors[4321])[0] == "n321"
    (tmp_path / "gone.txt").write_text("n321\nk7")
    assert main(["index", str(one), "--delete", str(tmp_path / "gone.txt")]) == 0
    after = open_index(one)
    assert "n321" not in keys(after, vectors[4321], 20) and "k7" not in keys(after, vectors[7], 20)
    assert len(keys(after, vectors[7], 20)) == 20
    assert len(list((one / "index").glob("*.faiss"))) == 1
    capfd.readouterr()
    assert main(["index", str(one), "--kind", "exact"]) == 0
    assert not list((one / "index").glob("*.faiss")) and "exact" in capfd.readouterr().out


def test_recall_counts_what_the_definition_counts():
    random = np.random.default_rng(2)
    rows, queries = unit(random, 500), unit(random, 20)
    product = queries @ rows.T
    truth = -np.sort(-product, axis=1)[:, :11]
    assert approximate.recall(truth, truth, queries) == 1
    worse = np.concatenate([truth[:, 1:10], truth[:, 10:11], np.full((20, 1), -1.0)], 1)  # the best was missed
    assert approximate.recall(worse, truth, queries) == pytest.approx(0.9)
    own = np.concatenate([np.ones((20, 1)), truth[:, :10]], 1)  # rows that ask for their neighbours
    half = own.copy()
    half[:, 6:] = -1
    assert approximate.recall(own, own, queries) == 1 and approximate.recall(half, own, queries) == pytest.approx(0.5)


def test_export_holds_every_living_row(tmp_path, capfd):
    vectors = clustered(np.random.default_rng(3), 1200, dim=8)
    one = made(tmp_path / "one", vectors, bad={5})
    out = tmp_path / "deep" / "vectors.parquet"
    assert main(["index", str(one), "--export", str(out)]) == 0
    assert "1,199 rows exported" in capfd.readouterr().out
    table = parquet.read_table(out)
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 8)
    assert table.schema.metadata[b"space_id"] == b"s" * 32
    kept = [row for row in range(1200) if row != 5]
    assert table["row"].to_pylist() == kept and table["key"].to_pylist() == [f"k{row}" for row in kept]
    assert np.array_equal(np.array(table["vector"].to_pylist(), np.float32), vectors[kept].astype(np.float32))


def test_what_must_be_refused(tmp_path, capfd, monkeypatch):
    vectors = clustered(np.random.default_rng(4), 300)
    one = made(tmp_path / "one", vectors)

    def refused(sentence, *words):
        assert main(["index", *(str(word) for word in words)]) == 2
        said = capfd.readouterr().err
        assert sentence in said and said.count("\n") == 1, said

    assert main(["index", str(one)]) == 0
    before = (one / "index" / "index.json").read_text()
    other = made(tmp_path / "other", vectors, space="t" * 32, prefix="o")
    refused("vectors of two models cannot be compared", one, "--append", other)
    (other / "part-00000.parquet").unlink()
    refused("is not finished: 1 of 1 partitions are missing", one, "--append", other)
    refused("did you mean", tmp_path / "onne")
    refused("evaclip embed makes one", tmp_path)
    refused("cannot be read", one, "--delete", tmp_path / "no.txt")
    assert (one / "index" / "index.json").read_text() == before
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    refused("pip install 'evaclip[search]'", one, "--kind", "hnsw")
    twice = made(tmp_path / "twice", vectors[:50])
    rows = store.read_rows(twice / "part-00000.parquet").to_pylist()
    rows[7]["key"] = "k3"
    parquet.write_table(pa.Table.from_pylist(rows, schema=store.SCHEMA), twice / "part-00000.parquet")
    refused("have the key 'k3': give them different ones", twice)
    small = made(tmp_path / "small", vectors[:50])
    refused("exact search is faster for so few", small, "--kind", "ivf-sq8")
    with store.sole_writer(one / "index"):
        refused("another process is writing to", one)
    (one / "index" / "index.json").write_text(before.replace('"version": 1', '"version": 2'))
    refused("written by a newer evaclip (format 2, this one knows 1)", one)


def test_damaged_files_are_named(tmp_path):
    vectors = clustered(np.random.default_rng(5), 300)
    one = made(tmp_path / "one", vectors)
    assert main(["index", str(one)]) == 0
    folder = one / "index"
    whole = (folder / "segment-00000.npy").read_bytes()
    for name, data in (
        ("segment-00000.npy", whole[:-64]),
        ("segment-00000.npy", b"junk"),
        ("alive-1.npy", whole),
        ("index.json", b"{"),
    ):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()  # the segment is a link to the partition
        (folder / name).write_bytes(data)
        with pytest.raises(InputError, match=name):
            Index(folder)
        (folder / name).write_bytes(kept)
    (folder / "segment-00000.parquet").unlink()
    (folder / "segment-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"segment-00000\.parquet cannot be read"):
        Index(folder).row(0)


def test_tuning_with_ones_own_queries(searchable, model, tmp_path, capfd):
    (tmp_path / "texts.txt").write_text("\n".join(f"caption {number}" for number in range(300)))
    (tmp_path / "queries.txt").write_text("\n".join(f"query {number}" for number in range(40)))
    out = tmp_path / "out"
    assert main(["embed", str(tmp_path / "texts.txt"), str(out), "--model", str(model), "--device", "cpu"]) == 0
    assert main(["index", str(out), "--kind", "ivf-sq8", "--queries", str(tmp_path / "queries.txt")]) == 0
    assert "on 20 held-out queries" in capfd.readouterr().out
    manifest = json.loads((out / "index" / "index.json").read_text())
    assert manifest["approximate"]["measured"]["queries"] == 20
    manifest["model"]["source"] = str(write_model(tmp_path / "another", seed=5))
    (out / "index" / "index.json").write_text(json.dumps(manifest))
    assert main(["index", str(out), "--kind", "hnsw", "--queries", str(tmp_path / "queries.txt")]) == 2
    assert "have changed since" in capfd.readouterr().err
