"""A collection that can be searched: segments that never change, a map of living rows, and one manifest.

    INDEX/index.json               which of the files below belong together; replaced last, so a change happens or not
    INDEX/segment-00000.npy        float16 [rows, dim], and .parquet: a partition of `evaclip embed`, linked if possible
    INDEX/alive-3.npy              bool [all rows]: false for deleted rows and those that could not be embedded
    INDEX/ivf-sq8-3.faiss          where an approximate index was asked for

Rows are numbered over all segments, and numbers are never used again. A reader keeps what it has opened while a writer
goes on to the next generation.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from jaxtyping import Float32, Int64

from evaclip.errors import InputError
from evaclip.search import approximate, exact, store
from evaclip.search.approximate import ApproximateKind, Measured

VERSION = 1
MANIFEST = "index.json"
FOLDER = "index"
EXPORT_AT_A_TIME = 4096


class Index:
    """An index, opened for reading: vectors stay on the disk until they are used."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError for an index that is damaged or newer than this code."""
        self.folder = folder
        self.manifest = store.read_json(folder / MANIFEST, VERSION, "evaclip index")
        self.dim: int = self.manifest["dim"]
        self.space_id: str = self.manifest["space_id"]
        self.names = [segment["name"] for segment in self.manifest["segments"]]
        counts = [segment["rows"] for segment in self.manifest["segments"]]
        self.segments = [
            store.mapped(folder / f"{name}.npy", rows, self.dim) for name, rows in zip(self.names, counts, strict=True)
        ]
        self.ends = np.cumsum(counts)
        self.living = self._living(int(self.ends[-1]))
        self.alive = np.split(self.living, self.ends[:-1])
        self.table = lru_cache(maxsize=64)(self._table)
        self._approximate: Any = None

    def __len__(self) -> int:
        return int(self.living.sum())

    def search(
        self, queries: Float32[np.ndarray, "queries dim"], k: int, exactly: bool = False
    ) -> tuple[Float32[np.ndarray, "queries k"], Int64[np.ndarray, "queries k"]]:
        """Cosines and row numbers of the k nearest rows, by the approximate index where there is one."""
        said = self.manifest["approximate"]
        if exactly or said is None:
            return exact.top_k(queries, self.segments, self.alive, k)
        if self._approximate is None:
            self._approximate = approximate.load(self.folder / said["file"])
        return approximate.search(self._approximate, said["measured"]["effort"], queries, self.segments, self.alive, k)

    def row(self, number: int) -> dict[str, Any]:
        """What a row stands for. Raises InputError for a number that there is none of, or whose row was deleted."""
        if not (0 <= number < len(self.living) and self.living[number]):
            raise InputError(f"{self.folder} has no row {number}")
        segment = int(np.searchsorted(self.ends, number, side="right"))
        place = number - int(self.ends[segment]) + len(self.segments[segment])
        return self.table(segment).slice(place, 1).to_pylist()[0]

    def vector(self, number: int) -> Float32[np.ndarray, " dim"]:
        """A row's vector."""
        self.row(number)
        return approximate.gathered(self.segments, np.array([number]))[0]

    def numbered_keys(self) -> Iterator[tuple[int, str]]:
        """Row numbers and keys of the living rows."""
        for segment, living in enumerate(self.alive):
            first = int(self.ends[segment]) - len(living)
            keys = store.read_rows(self.folder / f"{self.names[segment]}.parquet", ["key"])["key"].to_pylist()
            yield from ((first + int(place), keys[place]) for place in np.flatnonzero(living))

    def _table(self, segment: int) -> pa.Table:
        return store.read_rows(self.folder / f"{self.names[segment]}.parquet")

    def _living(self, rows: int) -> np.ndarray:
        path = self.folder / self.manifest["alive"]
        try:
            living = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read: {error}") from None
        if living.dtype != np.bool_ or living.shape != (rows,):
            raise InputError(f"{path} does not belong to the {rows:,} rows of {self.folder}")
        return living


def open_index(path: Path) -> Index:
    """The index in a folder, or in the folder `index` of one that `evaclip embed` wrote."""
    return Index(path / FOLDER if not (path / MANIFEST).exists() and (path / FOLDER).is_dir() else path)


def append(folder: Path, sources: Sequence[Path]) -> int:
    """Add the results of `evaclip embed` to an index, which is made if need be. Returns how many rows are new.

    Raises InputError, and changes nothing, for vectors of another space, unfinished work, and keys that are there.
    An approximate index takes the new rows too; its measured recall stays that of before.
    """
    said = [_finished(source) for source in sources]
    index = Index(folder) if (folder / MANIFEST).exists() else None
    first = index.manifest if index else said[0]
    for source, manifest in zip(sources, said, strict=True):
        if manifest["space_id"] != first["space_id"]:
            raise InputError(
                f"{source} was embedded by {manifest['model']['name']} into another space than "
                f"{folder}, which is of {first['model']['name']}: vectors of two models cannot be compared"
            )
    _check_keys(index, sources, said)
    segments = list(index.manifest["segments"]) if index else []
    living = [index.living] if index else []
    new = []
    for source, manifest in zip(sources, said, strict=True):
        for number in range(manifest["partitions"]):
            name, rows = f"segment-{len(segments):05}", _linked(source, number, folder, f"segment-{len(segments):05}")
            new.append(store.mapped(folder / f"{name}.npy", len(rows), first["dim"]))
            living.append(np.array(rows["status"].to_pylist()) == "ok")
            segments.append({"name": name, "rows": len(rows), "from": str(source)})
    record = {"dim": first["dim"], "space_id": first["space_id"], "model": first["model"], "segments": segments}
    found = dict(index.manifest["approximate"]) if index and index.manifest["approximate"] else None
    if index and found:
        grown = approximate.load(folder / found["file"], mapped=False)
        approximate.add(grown, new, living[1:], len(index.living))
        found["file"] = _faiss_file(folder, found["kind"], grown)
    _commit(folder, record | {"approximate": found}, np.concatenate(living))
    return int(sum(part.sum() for part in living[1 if index else 0 :]))


def delete(folder: Path, keys: Sequence[str]) -> int:
    """Take rows out by their keys. Returns how many went. Raises InputError, and changes nothing, for unknown keys."""
    index, wanted = Index(folder), set(keys)
    rows = {key: number for number, key in index.numbered_keys() if key in wanted}
    unknown = sorted(wanted - rows.keys())
    if unknown:
        raise InputError(f"{folder} has no {unknown[0]!r}" + (f", nor {len(unknown) - 1} more" * (len(unknown) > 1)))
    living = index.living.copy()
    living[list(rows.values())] = False
    _commit(folder, _kept(index.manifest), living)
    return len(rows)


def approximated(
    folder: Path, kind: ApproximateKind, queries: Float32[np.ndarray, "queries dim"] | None, target: float
) -> Measured:
    """Build an approximate index over the living rows and measure it.

    `queries`: what people will ask; without them, rows of the index ask for their neighbours. `target`: the recall@10
    that its effort is chosen for. Returns what was measured, which is also in the manifest.
    """
    index = Index(folder)
    if len(index) < 100:
        raise InputError(f"{folder} has {len(index)} rows: exact search is faster for so few")
    built = approximate.build(kind, index.segments, index.alive)
    if queries is None:
        queries = approximate.sampled(index.segments, index.alive, min(1000, len(index)), seed=1)
    measured = approximate.measure(
        lambda effort, some, k: approximate.search(built, effort, some, index.segments, index.alive, k),
        lambda some, k: exact.top_k(some, index.segments, index.alive, k),
        queries,
        built.nlist if kind == "ivf-sq8" else min(4096, len(index)),
        target,
    )
    said = {"kind": kind, "file": _faiss_file(folder, kind, built), "target": target, "measured": asdict(measured)}
    _commit(folder, _kept(index.manifest) | {"approximate": said}, index.living)
    return measured


def exact_only(folder: Path) -> None:
    """Leave the approximate index out from now on."""
    index = Index(folder)
    _commit(folder, _kept(index.manifest) | {"approximate": None}, index.living)


def export(index: Index, path: Path) -> int:
    """The living rows as one parquet file: `vector`, a list of float32 of fixed length, and the table's columns.

    LanceDB, Qdrant's and pgvector's loaders and DuckDB read it as it is. Returns the number of rows.
    """
    schema = pa.schema(
        [
            pa.field("row", pa.int64()),
            *(store.SCHEMA.field(name) for name in ("key", "path", "place", "offset", "caption", "width", "height")),
            pa.field("vector", pa.list_(pa.float32(), index.dim)),
        ],
        metadata={"space_id": index.space_id, "model": index.manifest["model"]["name"], "metric": "cosine"},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with store.atomically(path) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        for segment, (vectors, living) in enumerate(zip(index.segments, index.alive, strict=True)):
            for part in np.array_split(np.flatnonzero(living), max(1, -(-len(living) // EXPORT_AT_A_TIME))):
                taken = index.table(segment).take(pa.array(part)).select(schema.names[1:-1])
                values = pa.array(vectors[part].astype(np.float32).ravel())
                rows = pa.array(part + int(index.ends[segment]) - len(living))
                column = pa.FixedSizeListArray.from_arrays(values, index.dim)
                writer.write_table(pa.Table.from_arrays([rows, *taken.columns, column], schema=schema))
    return len(index)


def _finished(source: Path) -> dict[str, Any]:
    """The manifest of embeddings that are complete."""
    manifest = store.read_json(source / store.MANIFEST, store.VERSION, "evaclip embed")
    missing = [number for number in range(manifest["partitions"]) if not store.is_whole(source, number)]
    if missing:
        raise InputError(
            f"{source} is not finished: {len(missing):,} of {manifest['partitions']:,} partitions are missing; "
            "run the same evaclip embed again, it goes on"
        )
    return manifest


def _check_keys(index: Index | None, sources: Sequence[Path], said: Sequence[dict[str, Any]]) -> None:
    """A key names one row."""
    there = {key for _, key in index.numbered_keys()} if index else set()
    new: set[str] = set()
    for source, manifest in zip(sources, said, strict=True):
        for number in range(manifest["partitions"]):
            rows = store.read_rows(source / f"{store.partition_name(number)}.parquet", ["key", "status"]).to_pylist()
            for key in (row["key"] for row in rows if row["status"] == "ok"):
                if key in there:
                    raise InputError(f"{key!r} of {source} is in the index already: if it has changed, delete it first")
                if key in new:
                    raise InputError(
                        f"two rows of {source} have the key {key!r}: give them different ones and embed again"
                    )
                new.add(key)


def _linked(source: Path, number: int, folder: Path, name: str) -> pa.Table:
    """A partition as a segment: the same bytes on the disk where the file system allows it. Returns its table."""
    for ending in ("npy", "parquet"):
        target = folder / f"{name}.{ending}"
        target.unlink(missing_ok=True)  # of a writer that was interrupted before its manifest
        made = source / f"{store.partition_name(number)}.{ending}"
        try:
            os.link(made, target)
        except OSError:
            with store.atomically(target) as temporary:
                shutil.copyfile(made, temporary)
    return store.read_rows(folder / f"{name}.parquet")


def _kept(manifest: dict[str, Any]) -> dict[str, Any]:
    return {name: manifest[name] for name in ("dim", "space_id", "model", "segments", "approximate")}


def _generation(folder: Path) -> int:
    return store.read_json(folder / MANIFEST, VERSION, "")["generation"] if (folder / MANIFEST).exists() else 0


def _faiss_file(folder: Path, kind: str, built: Any) -> str:
    name = f"{kind}-{_generation(folder) + 1}.faiss"
    with store.atomically(folder / name) as temporary:
        approximate.faiss_module().write_index(built, str(temporary))
    return name


def _commit(folder: Path, record: dict[str, Any], living: np.ndarray) -> None:
    """The next generation of an index; the files of the one before are removed."""
    generation = _generation(folder) + 1
    alive = f"alive-{generation}.npy"
    with store.atomically(folder / alive) as temporary, temporary.open("wb") as file:
        np.save(file, living, allow_pickle=False)
    store.write_json(
        folder / MANIFEST,
        {"version": VERSION, "generation": generation, "alive": alive, "rows": int(living.sum())} | record,
    )
    used = {alive, record["approximate"]["file"] if record["approximate"] else ""}
    for old in [*folder.glob("alive-*.npy"), *folder.glob("*.faiss")]:
        if old.name not in used:
            old.unlink()
