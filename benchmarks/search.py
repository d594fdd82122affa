"""Search of 200,000 and 1,000,000 vectors of 512 numbers: exact beside the bare matrix product, IVF-SQ8 beside exact.

The vectors have structure, as embeddings have: clusters of very different sizes around centres that share a few
directions, spread along a few directions of their own. On plain Gaussian vectors, recall would mean nothing.
"""

import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from measure import in_turns, write_result

from evaclip.search import exact, index, store

DIM = 512
SIZES = (200_000, 1_000_000)
PARTITION = 50_000
BATCH = 256
TARGET = 0.98


class Clusters:
    """Draws rows of a mixture: topics in 64 shared directions, each with a spread in 12 directions of its own."""

    def __init__(self, count: int) -> None:
        self.random = np.random.default_rng(0)
        shared = self.random.standard_normal((64, DIM)).astype(np.float32)
        self.centres = (self.random.standard_normal((count, 64)).astype(np.float32) @ shared) / 8
        self.own = self.random.standard_normal((count, 12, DIM)).astype(np.float32) / np.sqrt(12)
        weights = 1 / np.arange(1, count + 1) ** 0.7
        self.weights = weights / weights.sum()

    def draw(self, rows: int) -> np.ndarray:
        """Unit rows, float32."""
        topic = np.sort(self.random.choice(len(self.weights), rows, p=self.weights))
        latent = self.random.standard_normal((rows, 12)).astype(np.float32)
        found = self.centres[topic] + 0.25 * self.random.standard_normal((rows, DIM)).astype(np.float32)
        starts = np.searchsorted(topic, np.arange(len(self.weights) + 1))
        for number, (first, last) in enumerate(itertools.pairwise(starts)):
            found[first:last] += 0.7 * latent[first:last] @ self.own[number]
        found = found[self.random.permutation(rows)]
        return found / np.linalg.norm(found, axis=1, keepdims=True)


def collection(folder: Path, rows: int) -> tuple[Path, np.ndarray]:
    """Vectors as `evaclip embed` leaves them, indexed with IVF-SQ8 unless they are; and queries apart from them."""
    clusters, out = Clusters(2000), folder / str(rows)
    queries = clusters.draw(1000)
    if (out / "index" / index.MANIFEST).exists():
        return out / "index", queries
    out.mkdir(parents=True)
    for number in range(rows // PARTITION):
        names = [{"key": f"{number}-{row}", "status": "ok"} for row in range(PARTITION)]
        store.write_partition(
            out, number, clusters.draw(PARTITION).astype(np.float16), pa.Table.from_pylist(names, schema=store.SCHEMA)
        )
    manifest = {"version": 1, "space_id": "clusters", "dim": DIM, "partitions": rows // PARTITION,
                "model": {"source": "", "name": "clusters"}}  # fmt: skip
    store.write_json(out / store.MANIFEST, manifest)
    with store.sole_writer(out / "index"):
        index.append(out / "index", [out])
        started = time.perf_counter()
        print(index.approximated(out / "index", "ivf-sq8", queries, TARGET))
    print(f"built and measured in {time.perf_counter() - started:.0f} s")
    return out / "index", queries


def bare_product(vectors: list[np.ndarray], queries: np.ndarray) -> Callable[[], None]:
    """The product alone, float32 in memory, in chunks whose scores stay within the cache's reach, nothing kept."""
    rows, asked = torch.from_numpy(np.concatenate(vectors)).float(), torch.from_numpy(queries)
    scores = torch.empty(len(queries), exact.CHUNK)

    def product() -> None:
        for part in rows.split(exact.CHUNK):
            torch.mm(asked, part.T, out=scores) if len(part) == exact.CHUNK else torch.mm(asked, part.T)

    return product


def row(folder: Path, rows: int) -> list[str]:
    """One line of the table."""
    path, queries = collection(folder, rows)
    opened = index.Index(path)
    batch = queries[:BATCH]
    bare_work = bare_product(opened.segments, batch)
    ours, bare = in_turns(lambda: opened.search(batch, 10, exactly=True), bare_work, repeats=2)
    measured = opened.manifest["approximate"]["measured"]
    alone, fast, one_at_a_time = in_turns(
        lambda: opened.search(queries[:1], 10, exactly=True),
        lambda: opened.search(queries, 10),
        lambda: [opened.search(query[None], 10) for query in queries[:100]],
    )
    near, true = opened.search(queries, 10)[1], opened.search(queries, 10, exactly=True)[1]
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(near, true, strict=True)])
    return [
        f"{rows:,}",
        f"{1e3 * ours / BATCH:.2f}",
        f"{1e3 * bare / BATCH:.2f}",
        f"**{ours / bare:.2f}x**",
        f"{1e3 * alone:.0f}",
        f"{recall:.4f}",
        f"**{1e3 * fast / len(queries):.3f}**",
        f"{1e3 * one_at_a_time / 100:.3f}",
        str(measured["effort"]),
    ]


def main() -> None:
    """Both sizes; a folder as argument keeps vectors and indexes for another run."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else scratch)
        rows = [row(folder, size) for size in SIZES]
    write_result(
        "search",
        f"Search among vectors of {DIM} numbers",
        ["rows", f"exact, ms a query in batches of {BATCH}", "bare product, ms", "ratio", "exact, one query, ms",
         "IVF-SQ8 recall@10", "IVF-SQ8, ms a query, many at once", "one at a time", "lists visited"],
        rows,
        "Vectors of 2,000 clusters of very different sizes (see the script), float16 on the disk, mapped; 1,000 "
        "queries of the same clusters that are not among them. Exact: everything `Index.search` does, conversion to "
        "float32 and top 10 included. Bare product: float32 in memory, nothing kept. IVF-SQ8: FAISS's candidates "
        f"scored again from the disk; lists visited are the fewest that reach recall {TARGET} on half of the queries.",
    )  # fmt: skip


if __name__ == "__main__":
    main()
