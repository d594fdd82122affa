"""From a published list of links to the list that is downloaded: columns by one name, filters, a keyed share of it.

    part.parquet or part.tsv --columns, filters, share, http(s) to public hosts only--> lists/00012.parquet

A list is a function of its source, the recipe and the share, so that an interrupted download goes on in the same one.
What it was made from stands in its own header, and another is never mixed with it.
"""

import importlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.csv as csv
import pyarrow.parquet as parquet

from evaclip import keyed
from evaclip.curate.recipe import LinksRecipe
from evaclip.errors import InputError, did_you_mean
from evaclip.fetch import RefusedAddressError, host_and_port, is_public

# pyarrow makes these functions when it is imported, out of its type checkers' sight.
compute: Any = importlib.import_module("pyarrow.compute")

ROWS = 1 << 18
# Names, with a letter in their last part, that are looked up on the internet; everything else is looked at one by one.
NAMED_HOST = r"(?i)^https?://([a-z0-9_-]+\.)+[a-z]{2,}(:[0-9]+)?([/?#]|$)"
# Last parts of names that never leave a network (RFC 6761, 6762, 8375 and what clouds call their own).
LOCAL_NAMES = ("localhost", "local", "internal", "lan", "home", "corp", "intranet", "home.arpa", "localdomain")
LOCAL_HOST = rf"(?i)^https?://([^/?#]*\.)?({'|'.join(map(re.escape, LOCAL_NAMES))})(:[0-9]+)?([/?#]|$)"


def prepared(
    source: Path,
    recipe: LinksRecipe,
    target: Path,
    *,
    share: float = 1.0,
    most: int = 0,
    allow_private: bool = False,
) -> dict[str, int]:
    """Write the list that is downloaded, unless it is there; returns how many links there were, taken and left out.

    `share`: of the links that pass the filters, drawn by a hash of their place. `most`: then only the first so many
    (0: all). Raises InputError when a list made in another way is already there.
    """
    made_from = {
        "source": source.name, "bytes": source.stat().st_size, "columns": repr(recipe.columns),
        "filters": repr(recipe.filters), "share": share, "most": most, "allow_private": allow_private,
    }  # fmt: skip
    if target.exists():
        stored = json.loads((parquet.read_metadata(target).metadata or {}).get(b"evaclip", b"{}"))
        if stored.get("made_from") != made_from:
            raise InputError(f"{target} was made from another list or with other settings; choose another --out")
        return stored["counts"]
    counts: Counter[str] = Counter()
    names = ["url", "caption", *recipe.columns.others]
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}")
    writer = None
    try:
        for batch in _batches(source, recipe):
            taken = _taken(batch, source, recipe, share, counts, allow_private)
            taken = taken.slice(0, most - counts["taken"]) if most else taken
            counts["taken"] += len(taken)
            writer = writer or parquet.ParquetWriter(temporary, taken.schema)
            writer.write_batch(taken.select(names))
            if most and counts["taken"] == most:
                break
        if not writer or not counts["taken"]:
            raise InputError(f"{source}: of {counts['links']:,} links none is left ({_said(counts)})")
        writer.add_key_value_metadata({"evaclip": json.dumps({"made_from": made_from, "counts": counts})})
        writer.close()
        temporary.replace(target)
    finally:
        if writer and writer.is_open:
            writer.close()
        temporary.unlink(missing_ok=True)
    return dict(counts)


def _taken(
    batch: arrow.RecordBatch, source: Path, recipe: LinksRecipe, share: float, counts: Counter[str], allow_private: bool
) -> arrow.RecordBatch:
    """The rows of a batch that are downloaded, under our names for their columns."""
    first = counts["links"]
    counts["links"] += len(batch)
    keep = np.ones(len(batch), bool)

    def leave(what: str, those: np.ndarray) -> None:
        counts[what] += int((keep & those).sum())
        keep[those] = False

    for rule in recipe.filters:
        values = np.asarray(
            compute.cast(batch[rule.column], arrow.float64()).to_numpy(zero_copy_only=False), np.float64
        )
        low = -np.inf if rule.at_least is None else rule.at_least
        high = np.inf if rule.at_most is None else rule.at_most
        leave("filtered", ~((values >= low) & (values <= high)))
    if share < 1:
        drawn = keyed.permute(np.arange(first, first + len(batch)), 1 << 40, 0, f"links of {source.name}")
        leave("not drawn", drawn >= share * (1 << 40))
    url, caption = (_text(batch[name]) for name in (recipe.columns.url, recipe.columns.caption))
    leave("without caption", np.asarray(compute.equal(compute.utf8_trim_whitespace(caption), "")))
    leave("refused address", ~_harmless(url, allow_private))
    columns = {"url": url, "caption": caption} | {name: batch[name] for name in recipe.columns.others}
    return arrow.RecordBatch.from_pydict(columns).filter(arrow.array(keep))


def _harmless(urls: arrow.Array, allow_private: bool) -> np.ndarray:
    """Whether each address is http(s) and does not name a place in a private network, as far as its text tells.

    No name is looked up here: two thousand million would be. A name may still stand for a private address, so the
    downloader belongs on a machine that cannot reach anything private.
    """
    plain = np.array(compute.match_substring_regex(urls, NAMED_HOST))
    if not allow_private:
        plain &= ~np.asarray(compute.match_substring_regex(urls, LOCAL_HOST))
    for row in np.flatnonzero(~plain):
        plain[row] = _public(urls[row].as_py(), allow_private)
    return plain


def _public(url: str, allow_private: bool) -> bool:
    try:
        host = host_and_port(url)[0].rstrip(".")
    except RefusedAddressError:
        return False
    if allow_private:
        return True
    try:
        return is_public(host)
    except ValueError:  # a name, not numbers
        front, _, last = host.rpartition(".")
        # One word is looked up at home, and numbers in another notation (0x7f.1) are numbers all the same.
        return bool(front) and not re.fullmatch(r"(?i)[0-9]*|0x[0-9a-f]*", last) and not _local(host)


def _local(host: str) -> bool:
    return any(host.lower() == name or host.lower().endswith(f".{name}") for name in LOCAL_NAMES)


def _text(column: arrow.Array) -> arrow.Array:
    return compute.fill_null(compute.cast(column, arrow.string()), "")


def _batches(source: Path, recipe: LinksRecipe) -> Iterator[arrow.RecordBatch]:
    """The columns that are needed. Raises InputError for a file that is none, or lacks one of them."""
    columns = recipe.columns
    wanted = list(
        dict.fromkeys([columns.url, columns.caption, *columns.others, *(rule.column for rule in recipe.filters)])
    )
    try:
        if source.suffix == ".parquet":
            with parquet.ParquetFile(source) as file:
                _check_columns(wanted, file.schema_arrow.names, source)
                yield from file.iter_batches(ROWS, columns=wanted)
            return
        names = list(recipe.lists.columns) or None
        with csv.open_csv(
            source,
            csv.ReadOptions(column_names=names, block_size=32 << 20),
            csv.ParseOptions(delimiter="\t", quote_char=False, invalid_row_handler=lambda _: "skip"),
            csv.ConvertOptions(column_types=dict.fromkeys((columns.url, columns.caption), arrow.string())),
        ) as reader:
            _check_columns(wanted, reader.schema.names, source)
            for batch in reader:
                yield batch.select(wanted)
    except (arrow.ArrowException, OSError) as error:
        raise InputError(f"{source} cannot be read as a list of links: {str(error).splitlines()[0]}") from None


def _check_columns(wanted: list[str], there: list[str], source: Path) -> None:
    for name in wanted:
        if name not in there:
            raise InputError(f"{source} has no column {name!r}; {did_you_mean(name, there)}")


def _said(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if what not in ("links", "taken"))
