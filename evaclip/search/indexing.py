"""Makes, changes and exports an index: what `evaclip index` does."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from evaclip.encoder import load_encoder
from evaclip.errors import InputError
from evaclip.search import index, store
from evaclip.search.approximate import Measured


@dataclass(frozen=True, kw_only=True)
class IndexCommand:
    """Make what `evaclip embed` wrote searchable, or change an index; without options, only what is missing is done."""

    out: tyro.conf.Positional[Path]
    """Folder that `evaclip embed` wrote; the index is its folder `index`."""
    kind: Literal["exact", "ivf-sq8", "hnsw"] | None = None
    """How it is searched; `exact` needs nothing more and finds everything, the others need FAISS and are measured."""
    recall: float = 0.98
    """Recall@10 against exact search that an approximate index is tuned for."""
    queries: Path | None = None
    """Text file with a query a line, to tune and measure with; by default rows ask for their neighbours."""
    append: tuple[Path, ...] = ()
    """Other folders that `evaclip embed` wrote with the same model."""
    delete: Path | None = None
    """Text file with a key a line: these rows are taken out."""
    export: Path | None = None
    """Write the rows and their vectors to this .parquet, for LanceDB, Qdrant, pgvector, DuckDB."""


def run_index(command: IndexCommand) -> None:
    """Do what is asked, in the order: make, append, delete, approximate, export."""
    folder = command.out if (command.out / index.MANIFEST).exists() else command.out / index.FOLDER
    if not (folder / index.MANIFEST).exists():
        store.read_json(command.out / store.MANIFEST, store.VERSION, "evaclip embed")  # before a folder is made
    with store.sole_writer(folder):
        if not (folder / index.MANIFEST).exists():
            index.append(folder, [command.out])
        if command.append:
            print(f"{index.append(folder, command.append):,} rows appended")
        if command.delete is not None:
            print(f"{index.delete(folder, _lines(command.delete)):,} rows deleted")
        if command.kind == "exact":
            index.exact_only(folder)
        elif command.kind is not None:
            print(
                _told(command.kind, index.approximated(folder, command.kind, _queries(command, folder), command.recall))
            )
        opened = index.Index(folder)
        if command.export is not None:
            print(f"{index.export(opened, command.export):,} rows exported to {command.export}")
    said = opened.manifest["approximate"]
    print(f"{folder}: {len(opened):,} rows of {opened.dim} numbers, {said['kind'] if said else 'exact'}")


def _told(kind: str, measured: Measured) -> str:
    return (
        f"{kind}: recall@10 {measured.recall_at_10:.4f} against exact on {measured.queries:,} held-out queries, "
        f"{measured.ms_per_query:.3f} ms a query ({measured.ms_alone:.3f} one at a time; exact "
        f"{measured.exact_ms_per_query:.3f}), effort {measured.effort}"
    )


def _queries(command: IndexCommand, folder: Path) -> np.ndarray | None:
    if command.queries is None:
        return None
    opened, lines = index.Index(folder), _lines(command.queries)
    if len(lines) < 10:
        raise InputError(f"{command.queries} has {len(lines)} queries; at least 10 are needed to measure anything")
    encoder = load_encoder(opened.manifest["model"]["source"])
    if encoder.space_id != opened.space_id:
        raise InputError(f"the weights of {encoder.name} have changed since {command.out} was embedded: embed it again")
    return encoder.texts(lines).numpy()


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
