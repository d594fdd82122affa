"""A collection becomes vectors: what `evaclip embed` does.

The source is cut into partitions of equal length; a partition is computed by one process and written when it is
complete. Which items fall into which partition and batch depends on the source alone, so work that was interrupted, or
shared among processes, ends with the same files.
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import tyro
from jaxtyping import Float16
from PIL import Image
from torch import Tensor

from evaclip.data.samples import MAX_CAPTION_BYTES
from evaclip.data.transforms import BadImageError, opened
from evaclip.encoder import Encoder, load_encoder
from evaclip.engine import EngineConfig
from evaclip.errors import InputError
from evaclip.inference import out_of_memory
from evaclip.log import progress, say
from evaclip.search import store
from evaclip.search.processes import shared
from evaclip.search.readers import Sample, What
from evaclip.search.sources import Kind, Source, open_source


@dataclass(frozen=True, kw_only=True)
class EmbedCommand:
    """Embed a collection of images or captions: partitions of float16 vectors, and tables of what they stand for.

    Goes on where it was interrupted. What cannot be read is written to bad.jsonl.
    """

    source: tyro.conf.Positional[str]
    """A folder, a .tar, .parquet, .jsonl or .txt file, a brace pattern, or @list with one of these a line."""
    out: tyro.conf.Positional[Path]
    """Folder for the result."""
    model: str
    """Folder of a run or of an export, or an open_clip name."""
    kind: Kind | None = None
    """What the source is; by default recognised by its files."""
    what: What | None = None
    """Embed images or captions; by default images where there are any."""
    images: Path | None = None
    """Folder in which the images lie that a table names; by default the table's own."""
    batch: int = 64
    """Items that pass through a tower at a time; halved when they do not fit into memory."""
    partition: int = 4096
    """Items of a partition: what is lost at most when the work is interrupted."""
    processes: int = 1
    """Processes that share the partitions; with several GPUs, one for each."""
    workers: int = 2
    """Threads of each process that read and decode."""
    device: str = "auto"
    """`cuda`, `cpu`, or `auto` for a GPU if there is one."""
    max_pixels: int = 40_000_000
    """Images with more pixels are not decoded."""

    def __post_init__(self) -> None:
        for name in ("batch", "partition", "processes", "workers"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1")


def run_embed(command: EmbedCommand) -> None:
    """Embed, and say how fast, how much, and what was left out."""
    with store.sole_writer(command.out):
        source = open_source(command.source, command.out, command.kind, command.what, command.images)
        encoder = load_encoder(command.model, EngineConfig(device=command.device).resolved_device())
        manifest, todo = _agreed(command, source, encoder)
        parts = manifest["partitions"]
        if len(todo) < parts:
            say(f"{parts - len(todo):,} of {parts:,} partitions are there already")
        count = sum(len(_range(source, command.partition, number)) for number in todo)
        start = time.perf_counter()
        try:
            alone = encoder if command.processes == 1 else None
            del encoder  # each of several processes has its own
            done = shared(_embed_share, (command, source, manifest["space_id"], alone), todo, command.processes)
            for _ in progress(_each(done), count, "embedding"):
                pass
        finally:
            bad = store.write_ledger(command.out, parts)
    seconds = time.perf_counter() - start
    print(
        f"{len(source):,} {manifest['what']}s in {parts:,} partitions of {command.out}"
        + (f"; {bad:,} could not be used, see {command.out / store.LEDGER}" if bad else "")
        + (f"; {count:,} embedded in {seconds:.1f} s, {count / seconds:,.1f} a second" if count else "")
    )
    if bad == len(source):
        raise InputError(f"not one of the {bad:,} {manifest['what']}s of {command.source} could be used")


def _agreed(command: EmbedCommand, source: Source, encoder: Encoder) -> tuple[dict[str, Any], list[int]]:
    """The manifest, new or the same as the one that is there, and the partitions that are missing.

    Raises InputError when what is there is of another model or source.
    """
    path, parts = command.out / store.MANIFEST, -(-len(source) // command.partition)
    manifest = {
        "version": store.VERSION,
        "space_id": encoder.space_id,
        "dim": _width(encoder),
        "model": {"source": _findable(command.model), "name": encoder.name, "origin": encoder.origin},
        "source": command.source,
        "kind": source.kind,
        "what": source.reading.what,
        "items": len(source),
        "partition": command.partition,
        "partitions": parts,
        "fingerprint": source.fingerprint,
        "versions": {name: version(name) for name in ("evaclip", "torch", "pillow")},
        "date": time.strftime("%Y-%m-%d"),
    }
    if not path.exists():
        store.write_json(path, manifest)
        return manifest, list(range(parts))
    before = store.read_json(path, store.VERSION, "evaclip embed")
    if before["space_id"] != manifest["space_id"]:
        raise InputError(
            f"{command.out} holds vectors of another embedding space (of {before['model']['name']}): the weights, the "
            f"preprocessing or the tokenizer of {command.model} differ. Embed into another folder"
        )
    if before["partition"] != command.partition:
        raise InputError(f"{command.out} was begun with --partition {before['partition']}: go on with the same")
    if any(before[name] != manifest[name] for name in ("fingerprint", "what", "kind")):
        raise InputError(
            f"{command.source} is not the source that {command.out} was begun with ({before['items']:,} "
            f"{before['what']}s then, {len(source):,} {manifest['what']}s now). Embed what is new into another folder; "
            "evaclip index --append puts them together"
        )
    return before, [number for number in range(parts) if not store.is_whole(command.out, number)]


def _findable(model: str) -> str:
    """The model's name as it can be used from any folder."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def _width(encoder: Encoder) -> int:
    return encoder.texts(["a"]).shape[1]


def _range(source: Source, partition: int, number: int) -> range:
    return range(number * partition, min((number + 1) * partition, len(source)))


def _each(counts: Iterator[int]) -> Iterator[None]:
    """One item for each that was counted."""
    for count in counts:
        yield from (None for _ in range(count))


def _embed_share(
    work: tuple[EmbedCommand, Source, str, Encoder | None], partitions: list[int], process: int, processes: int
) -> Iterator[int]:
    """What one process does: it embeds and writes partitions, and yields how many items it has finished."""
    command, source, space, encoder = work
    device = EngineConfig(device=command.device).resolved_device()
    if device.type == "cuda":
        device = torch.device("cuda", process % torch.cuda.device_count())
    elif processes > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    encoder = encoder or load_encoder(command.model, device)
    if encoder.space_id != space:
        raise InputError(f"the weights of {command.model} have changed since this began: begin again in another folder")
    batches = Batches(encoder, command.batch)
    with ThreadPoolExecutor(command.workers) as pool:
        for number in partitions:
            vectors: list[np.ndarray] = []
            rows: list[dict[str, Any]] = []
            items = _range(source, command.partition, number)
            for block, done in embedded(batches, source, items, command, pool):
                vectors.append(block)
                rows += done
                yield len(done)
            table = pa.Table.from_pylist(rows, schema=store.SCHEMA)
            store.write_partition(command.out, number, np.concatenate(vectors), table)


def embedded(
    batches: "Batches", source: Source, items: range, command: EmbedCommand, pool: ThreadPoolExecutor
) -> Iterator[tuple[Float16[np.ndarray, "batch dim"], list[dict[str, Any]]]]:
    """Vectors and rows of some items, batch by batch; the next batches are read and decoded meanwhile."""
    samples = source.read(items.start, items.stop)
    ready = _prepared_images if source.reading.what == "image" else _prepared_texts

    def submitted() -> list[Any]:
        return [pool.submit(ready, sample, batches.encoder, command) for sample in islice(samples, command.batch)]

    waiting = [submitted(), submitted()]
    while waiting[0]:
        prepared = [future.result() for future in waiting.pop(0)]
        waiting.append(submitted())
        inputs = [value for _, value in prepared if value is not None]
        good = np.array([value is not None for _, value in prepared])
        found = batches(inputs) if inputs else None
        block = np.zeros((len(prepared), found.shape[1] if found is not None else batches.dim), np.float16)
        if found is not None:
            block[good] = found
        yield block, [row for row, _ in prepared]


def _row(sample: Sample, status: str, reason: str) -> dict[str, Any]:
    return {
        "key": sample.key,
        "path": sample.path,
        "place": sample.place,
        "offset": sample.offset,
        "bytes": len(sample.data or b""),
        "caption": sample.caption,
        "width": 0,
        "height": 0,
        "status": status,
        "reason": reason,
    }


def _prepared_images(sample: Sample, encoder: Encoder, command: EmbedCommand) -> tuple[dict[str, Any], Tensor | None]:
    """The row of an image and its pixels, None when it cannot be used."""
    if sample.status != "ok":
        return _row(sample, sample.status, sample.reason), None
    if sample.data is None:
        return _row(sample, "no-image", "there is none"), None
    try:
        image = opened(sample.data, command.max_pixels)
        pixels = encoder.preprocessing.pixels(image)
    except BadImageError as error:
        return _row(sample, error.code, str(error)), None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        return _row(sample, "undecodable", str(error)), None
    return _row(sample, "ok", "") | {"width": image.width, "height": image.height}, pixels


def _prepared_texts(sample: Sample, encoder: Encoder, command: EmbedCommand) -> tuple[dict[str, Any], str | None]:
    """The row of a caption and the caption itself, None when it cannot be used."""
    if sample.status != "ok":
        return _row(sample, sample.status, sample.reason), None
    sample = replace(sample, data=None)
    if not sample.caption:
        return _row(sample, "no-caption", "it is empty"), None
    if len(sample.caption) > MAX_CAPTION_BYTES:
        return _row(replace(sample, caption=""), "long-caption", f"{len(sample.caption):,} characters"), None
    return _row(sample, "ok", ""), sample.caption


class Batches:
    """Encodes what fits into memory at a time: a batch that does not is halved, and later ones start at that size."""

    def __init__(self, encoder: Encoder, size: int) -> None:
        self.encoder, self.size = encoder, size
        self.dim = _width(encoder)

    def __call__(self, inputs: list[Any]) -> Float16[np.ndarray, "rows dim"]:
        """Unit rows of pixels or captions. Raises InputError when not even one fits."""
        done: list[np.ndarray] = []
        start = 0
        while start < len(inputs):
            part = inputs[start : start + self.size]
            try:
                found = self.encoder.images(torch.stack(part)) if isinstance(part[0], Tensor) else self._texts(part)
            except RuntimeError as error:  # torch's own kind on a GPU, a plain RuntimeError on a CPU
                if not out_of_memory(error):
                    raise
                if len(part) == 1:
                    raise InputError(f"there is no memory for even one item at a time: {error}") from None
                self.size = len(part) // 2
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                say(f"out of memory with {len(part)} items at a time; going on with {self.size}")
                continue
            done.append(found.to("cpu", torch.float16).numpy())
            start += len(part)
        return np.concatenate(done)

    def _texts(self, captions: Any) -> Tensor:
        return self.encoder.texts(captions, batch=len(captions))
