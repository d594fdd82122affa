"""`evaclip data stats`: how many, how long, how large, how often twice, and how much of it could be downloaded."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure

from evaclip.curate.journal import Journal, shard_state
from evaclip.curate.page import inline, write_page
from evaclip.curate.rewrite import several_cores
from evaclip.curate.scan import MAX_PIXELS, parsed_json, scan
from evaclip.data.index import IMAGE_SUFFIXES, expand
from evaclip.data.tokenizer import clip_tokenizer
from evaclip.data.transforms import BadImageError, image_size
from evaclip.report.plots import png

CONTEXT = 77
# Columns of the samples' json that get a histogram where they are numbers.
COLUMNS = ("similarity", "punsafe", "pwatermark", "clip_similarity_vitb32", "aesthetic_score_laion_v2")
BODY = """<p class="quiet">{{ where }}</p>
<table>{% for name, value in table %}<tr><td>{{ name }}<td class="number">{{ value }}</tr>{% endfor %}</table>
<div class="grid">{% for name, picture in pictures %}<img alt="{{ name }}" src="{{ picture }}">{% endfor %}</div>
{% for title, rows in lists if rows %}
<h2>{{ title }}</h2>
<table>{% for name, value in rows %}<tr><td>{{ name }}<td class="number">{{ value }}</tr>{% endfor %}</table>
{% endfor %}
"""


@dataclass(frozen=True, kw_only=True)
class StatsCommand:
    """Count and measure a set of shards."""

    shards: tyro.conf.Positional[tuple[str, ...]]
    """Brace patterns, folders of .tar files, or @list files."""
    out: Path = Path("stats")
    """Folder for stats.json and stats.html."""
    processes: int = several_cores()
    """Shards that are read at a time."""


def run_stats(command: StatsCommand) -> None:
    """Print the numbers."""
    record = stats(command)
    for name, value in _table(record):
        print(f"{value:>16}  {name}")
    print(f"{command.out / 'stats.html'}")


def stats(command: StatsCommand) -> dict[str, Any]:
    """Measure, write both files, and return what stats.json holds."""
    paths = expand(command.shards)
    journal = Journal(command.out / "unfinished", {}, command.processes)
    results = [result for _, result in journal.each("measuring", _measured, paths, shard_state)]
    columns = {name: np.concatenate([np.array(result[name]) for result in results]) for name in ARRAYS}
    record = _record(results, columns)
    record |= {"shards": len(paths), "bytes": sum(path.stat().st_size for path in paths)}
    pictures = _pictures(columns, results)
    write_page(
        command.out / "stats.html",
        BODY,
        "What the shards hold",
        where=f"{len(paths):,} shards, the first {paths[0]}",
        table=_table(record),
        pictures=[(name, inline(data, "png")) for name, data in pictures.items()],
        lists=[
            ("Problems", sorted(record["problems"].items())),
            ("Formats", sorted(record["formats"].items())),
            ("Downloads that failed", sorted(record["download"].get("errors", {}).items(), key=lambda pair: -pair[1])),
        ],
    )
    part = command.out / "stats.json.part"
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(command.out / "stats.json")
    journal.finished()
    return record


ARRAYS = ("tokens", "characters", "widths", "heights", "image_bytes", "image_hashes", "caption_hashes")


def _measured(path: Path) -> dict[str, Any]:
    found = scan(path)
    tokenizer = clip_tokenizer(CONTEXT)
    rows: list[tuple[int, ...]] = []
    columns: dict[str, list[float]] = {name: [] for name in COLUMNS}
    problems, formats = Counter(problem.code for problem in found.problems), Counter[str]()
    with path.open("rb") as file:
        for sample in found.good:
            image, text, record = (
                _read(file, span) for span in (sample.image(), sample.caption(), sample.span("json") or (0, 0))
            )
            try:
                width, height = image_size(image, MAX_PIXELS)
                columns_here = parsed_json(record) if record else {}
                caption = text.decode("utf-8").strip()
            except BadImageError as error:
                problems[error.code] += 1
                continue
            except UnicodeDecodeError:
                problems["caption-not-utf8"] += 1
                continue
            formats[next(suffix for suffix in sample.suffixes if suffix in IMAGE_SUFFIXES)] += 1
            tokens = len(tokenizer.encode(caption)) + 2
            rows.append((tokens, len(caption), width, height, len(image), _hash(image), _hash(caption.encode())))
            for name in COLUMNS:
                value = columns_here.get(name)
                if isinstance(value, (int, float)) and np.isfinite(value):
                    columns[name].append(float(value))
    table = np.array(rows, np.int64).reshape(-1, len(ARRAYS))
    arrays = {name: table[:, place].copy() for place, name in enumerate(ARRAYS)}
    noted = {"samples": found.found, "problems": dict(problems), "formats": dict(formats), "columns": columns}
    return noted | {"download": _download(path)} | arrays


def _read(file: Any, span: tuple[int, int]) -> bytes:
    file.seek(span[0])
    return file.read(span[1])


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)


def _download(path: Path) -> dict[str, Any]:
    """What img2dataset counted while it wrote the shard: addresses, successes, and errors by their sentence."""
    try:
        record = json.loads(path.with_name(f"{path.stem}_stats.json").read_text())
        errors = {str(name)[:200]: int(count) for name, count in record.get("status_dict", {}).items()}
        errors.pop("success", None)
        return {"tried": int(record["count"]), "alive": int(record["successes"]), "errors": errors}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _record(results: Sequence[dict[str, Any]], columns: dict[str, np.ndarray]) -> dict[str, Any]:
    samples = sum(result["samples"] for result in results)
    usable = len(columns["tokens"])
    downloads = [result["download"] for result in results if result["download"]]
    errors = sum((Counter(download["errors"]) for download in downloads), Counter[str]())
    tried = sum(download["tried"] for download in downloads)
    download = {"tried": tried, "alive": sum(d["alive"] for d in downloads), "errors": dict(errors)} if tried else {}
    return {
        "samples": samples,
        "usable": usable,
        "problems": dict(sum((Counter(result["problems"]) for result in results), Counter[str]())),
        "formats": dict(sum((Counter(result["formats"]) for result in results), Counter[str]())),
        "repeated_images": usable - len(np.unique(columns["image_hashes"])),
        "repeated_captions": usable - len(np.unique(columns["caption_hashes"])),
        "cut_captions": int((columns["tokens"] > CONTEXT).sum()),
        "quantiles": {
            name: dict(zip(("5%", "50%", "95%"), np.quantile(columns[name], (0.05, 0.5, 0.95)).tolist(), strict=True))
            for name in ARRAYS[:5]
            if usable
        },
        "download": download,
    }


def _table(record: dict[str, Any]) -> list[tuple[str, str]]:
    usable = max(record["usable"], 1)
    rows = [
        ("shards", f"{record['shards']:,}"),
        ("bytes", f"{record['bytes']:,}"),
        ("samples", f"{record['samples']:,}"),
        ("of them usable", f"{record['usable']:,}"),
        ("images that are there before", f"{record['repeated_images'] / usable:.2%}"),
        ("captions that are there before", f"{record['repeated_captions'] / usable:.2%}"),
        (f"captions cut at {CONTEXT} tokens", f"{record['cut_captions'] / usable:.2%}"),
    ]
    for name, values in record["quantiles"].items():
        rows.append((f"{name}: 5 %, median, 95 %", ", ".join(f"{value:,.0f}" for value in values.values())))
    if record["download"]:
        rows.append(("addresses that were alive", f"{record['download']['alive'] / record['download']['tried']:.2%}"))
    return rows


def _pictures(columns: dict[str, np.ndarray], results: Sequence[dict[str, Any]]) -> dict[str, bytes]:
    """Histograms of everything that has more than one value."""
    shown = {
        "tokens of a caption, start and end with them": columns["tokens"],
        "characters of a caption": columns["characters"],
        "shortest side, pixels": np.minimum(columns["widths"], columns["heights"]),
        "width over height": columns["widths"] / np.maximum(columns["heights"], 1),
        "bytes of an image": columns["image_bytes"],
    }
    for name in COLUMNS:
        shown[name] = np.array([value for result in results for value in result["columns"][name]])
    return {name: png(histogram(values, name)) for name, values in shown.items() if len(values)}


def histogram(values: np.ndarray, title: str) -> Figure:
    """Counts in up to 60 bins, from the smallest value to the largest but one in a thousand."""
    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    axes = figure.add_subplot()
    low, high = float(values.min()), float(np.quantile(values, 0.999))
    whole = np.issubdtype(values.dtype, np.integer) and high - low < 60
    bins = np.arange(low - 0.5, high + 1.0) if whole else np.linspace(low, high if high > low else low + 1, 61)
    axes.hist(values.clip(low, high), bins=bins.tolist(), color="#3b6ea5")
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_ylabel("samples")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
