"""Asks an index: what `evaclip search` does.

A query is a direction in the shared space: the mean of the unit vectors of everything wanted, less a share of the mean
of everything unwanted, brought back to unit length.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from jaxtyping import Float32
from PIL import Image

from evaclip.encoder import Encoder, load_encoder
from evaclip.engine import EngineConfig
from evaclip.errors import InputError, did_you_mean
from evaclip.log import say
from evaclip.search.index import Index, open_index
from evaclip.search.pictures import MAX_PIXELS, read_image
from evaclip.search.readers import MAX_IMAGE_BYTES
from evaclip.search.sheet import write_sheet

# How much of the unwanted is taken off. Captions share a large component, which a weight of 1 would take off as well.
AWAY = 0.5
FIELDS = ("text", "image", "without")


@dataclass(frozen=True, kw_only=True)
class SearchCommand:
    """Search an index by words, images, or both; the results are JSON lines on standard output."""

    index: tyro.conf.Positional[Path]
    """Folder that `evaclip embed` wrote and `evaclip index` went over."""
    text: tyro.conf.Positional[tuple[str, ...]] = ()
    """What is wanted, in words; several count together."""
    image: tuple[Path, ...] = ()
    """Images like what is wanted."""
    without: tuple[str, ...] = ()
    """What is not wanted, in words."""
    batch: Path | None = None
    """File of queries, one a line: a text, or a JSON object with `text`, `image` (paths) and `without`."""
    top: int = 10
    """Results of a query."""
    html: Path | None = None
    """Also write a page of thumbnails with scores."""
    model: str | None = None
    """Where the model is now, if not where it was when the collection was embedded."""
    device: str = "auto"
    """`cuda`, `cpu`, or `auto` for a GPU if there is one."""
    exact: bool = False
    """Leave an approximate index out."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """What is wanted and what is not."""

    texts: tuple[str, ...] = ()
    images: tuple[Image.Image, ...] = ()
    rows: tuple[int, ...] = ()
    """Rows of the index, for more like them."""
    without: tuple[str, ...] = ()
    title: str = field(default="", compare=False)


def run_search(command: SearchCommand) -> None:
    """Print what is found, the nearest first."""
    index = open_index(command.index)
    queries = _queries(command)
    if command.top < 1:
        raise InputError("--top must be at least 1")
    encoder = encoder_for(index, command.model, command.device)
    vectors = np.stack([query_vector(query, encoder, index) for query in queries])
    found = results(index, vectors, command.top, command.exact)
    for number, rows in enumerate(found):
        for rank, row in enumerate(rows, 1):
            print(json.dumps(({"query": number} if command.batch else {}) | {"rank": rank} | row, ensure_ascii=False))
    if command.html is not None:
        write_sheet(command.html, [query.title for query in queries], found)
        say(f"a page of thumbnails is in {command.html}")


def encoder_for(index: Index, model: str | None = None, device: str = "auto") -> Encoder:
    """The model whose space an index is of. Raises InputError when the one that is named or found is another."""
    known = index.manifest["model"]
    encoder = load_encoder(model or known["source"], EngineConfig(device=device).resolved_device())
    if encoder.space_id != index.space_id:
        raise InputError(
            f"{index.folder} was embedded by {known['name']}, in the space {index.space_id[:12]}; "
            f"{model or known['source']} is of another space, {encoder.space_id[:12]}"
            + ("" if model else ": its weights have changed since")
            + ". Its queries would mean nothing here: name the right model with --model, or embed again"
        )
    return encoder


def query_vector(query: Query, encoder: Encoder, index: Index) -> Float32[np.ndarray, " dim"]:
    """A unit vector. Raises InputError for a query that wants nothing, or takes off all that it wants."""
    wanted = [vector for vector in encoder.texts(query.texts).cpu().numpy()] if query.texts else []
    if query.images:
        pixels = torch.stack([encoder.preprocessing.pixels(image) for image in query.images])
        wanted += [vector for vector in encoder.images(pixels).cpu().numpy()]
    wanted += [index.vector(row) for row in query.rows]
    if not wanted:
        raise InputError("nothing to search for: give a text, an image, or both")
    direction = np.mean(wanted, axis=0)
    if query.without:
        direction = direction - AWAY * encoder.texts(query.without).cpu().numpy().mean(axis=0)
    length = np.linalg.norm(direction)
    if length < 1e-6:
        raise InputError("the query takes off all that it asks for")
    return (direction / length).astype(np.float32)


def results(index: Index, vectors: Float32[np.ndarray, "queries dim"], top: int, exactly: bool = False) -> list[Any]:
    """For each query the rows found, with score, row number, and what the table says of it."""
    scores, numbers = index.search(vectors, min(top, len(index)), exactly) if len(index) else (vectors[:, :0],) * 2
    return [
        [_told(index, float(score), int(row)) for score, row in zip(*pair, strict=True) if row >= 0]
        for pair in zip(scores, numbers, strict=True)
    ]


def _told(index: Index, score: float, number: int) -> dict[str, Any]:
    row = index.row(number)
    return {"score": round(score, 6), "row": number} | {
        name: row[name] for name in ("key", "path", "place", "offset", "bytes", "caption", "width", "height")
    }


def _queries(command: SearchCommand) -> list[Query]:
    given = command.text or command.image or command.without
    if command.batch is None:
        return [_query({"text": command.text, "image": [str(path) for path in command.image],
                        "without": command.without}, Path.cwd(), "the command")]  # fmt: skip
    if given:
        raise InputError("--batch holds the queries; leave out the others")
    try:
        lines = command.batch.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{command.batch} cannot be read: {error}") from None
    queries = list(_batch(lines, command.batch))
    if not queries:
        raise InputError(f"{command.batch} holds no queries")
    return queries


def _batch(lines: Sequence[str], path: Path) -> Iterator[Query]:
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        if not line.lstrip().startswith("{"):
            yield _query({"text": line.strip()}, path.parent, where)
            continue
        try:
            yield _query(json.loads(line), path.parent, where)
        except ValueError as error:
            raise InputError(f"{where}: {error}") from None


def _query(record: dict[str, Any], folder: Path, where: str) -> Query:
    """A query from plain values; images are paths, relative to a folder."""
    for name in record:
        if name not in FIELDS:
            raise InputError(f"{where}: a query has no {name!r}; {did_you_mean(name, FIELDS)}")
    texts, images, without = (_strings(record.get(name, ()), name, where) for name in FIELDS)
    title = " + ".join([*texts, *(Path(name).name for name in images)]) + "".join(f" - {text}" for text in without)
    opened = tuple(_opened(folder / name) for name in images)
    return Query(texts=texts, images=opened, without=without, title=title)


def _strings(value: Any, name: str, where: str) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not all(isinstance(one, str) for one in values):
        raise InputError(f"{where}: {name!r} must be a text or a list of texts")
    return tuple(values)


def _opened(path: Path) -> Image.Image:
    try:
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise InputError(f"the image {path} has more than {MAX_IMAGE_BYTES:,} bytes")
        return read_image(path.read_bytes(), f"the image {path}", MAX_PIXELS)
    except OSError as error:
        raise InputError(f"the image {path} cannot be read: {error.strerror}") from None
