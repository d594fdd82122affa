"""All scores below a folder as one page: what `evaclip report` does.

It finds the results of every evaluation, whichever verb or training wrote them: a table of models and benchmarks, the
trend of each run by step, the pairs of classes that are taken for each other, and, where the benchmarks for them are
there, the numbers that papers quote of several. `scores.html` stands on its own.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import tyro
from PIL import Image

from evaclip.errors import InputError, near_path
from evaclip.log import say
from evaclip.report.plots import curves, png
from evaclip.report.results import FIELDS, Result, read_result
from evaclip.report.summary_page import PAGE

# EVA-CLIP's robustness table (arXiv 2303.15389): the mean over these, and how far it lies below ImageNet itself.
ROBUSTNESS = ("imagenet", "imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch", "objectnet")
TWELVE = (*ROBUSTNESS, "cifar10", "cifar100", "ucf101", "kinetics400", "kinetics600", "kinetics700")
# Pairs of classes shown of a benchmark, and pictures of each.
PAIRS, PICTURES = 12, 6


@dataclass(frozen=True, kw_only=True)
class ReportCommand:
    """Draw one page of all scores below a folder: models, benchmarks, trends, confusions."""

    folder: tyro.conf.Positional[Path]
    """Folder of a run, or one that holds several runs and results."""
    out: Path | None = None
    """The page; by default scores.html in the folder."""


@dataclass(frozen=True)
class Scored:
    """A model, of a run the one at a step, and its results by benchmark."""

    name: str
    place: str
    """Its run's folder, or the folder of its results."""
    step: int | None
    results: dict[str, Result] = field(default_factory=dict)

    def mean(self, benchmarks: Sequence[str]) -> float | None:
        """The mean headline over the benchmarks, None unless all of them are there, and whole."""
        found = [self.results[name] for name in benchmarks if name in self.results]
        if len(found) < len(benchmarks) or any(result.record.get("partial") for result in found):
            return None
        return float(np.mean([result.headline for result in found]))

    def robustness_gap(self) -> float | None:
        """ImageNet's accuracy minus the mean over ImageNet and its five variants."""
        mean = self.mean(ROBUSTNESS)
        return None if mean is None else self.results["imagenet"].headline - mean


def run_report(command: ReportCommand) -> None:
    """Write the page."""
    path = write_summary(command.folder, command.out)
    say(f"look at {path}")


def write_summary(folder: Path, out: Path | None = None) -> Path:
    """Draw the page of everything below a folder. Raises InputError when there is nothing, or no such folder."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; {near_path(folder)}")
    results = find_results(folder)
    if not results:
        raise InputError(
            f"there are no results below {folder}; evaclip zeroshot, retrieval, probe and watch write them"
        )
    models = grouped(results)
    last = newest(models)
    benchmarks = sorted({name for model in models for name in model.results}, key=_place)
    page = (
        jinja2.Environment(autoescape=True)
        .from_string(PAGE)
        .render(
            folder=str(folder),
            titles=[_title(models, name) for name in benchmarks],
            rows=[_row(model, benchmarks) for model in last],
            trends=trends(models),
            confusions=[
                {"model": model.name, "step": model.step, "title": result.record["title"], "pairs": pairs}
                for model in last
                for result in model.results.values()
                if (pairs := confusion_pairs(result))
            ],
            count=len(results),
        )
    )
    path = out or folder / "scores.html"
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(page)
    temporary.replace(path)
    return path


def find_results(folder: Path) -> list[Result]:
    """Every result below a folder; other JSON files are passed over, a damaged result is an error."""
    found = []
    for path in sorted(folder.rglob("*.json")):
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and all(name in record for name in FIELDS):
            found.append(read_result(path))
    return found


def grouped(results: Sequence[Result]) -> list[Scored]:
    """Results of one model at one step together. Of two of a benchmark the later file counts: it was scored anew."""
    models: dict[tuple[str, str, int | None], Scored] = {}
    for result in sorted(results, key=lambda result: result.path.stat().st_mtime_ns):
        said, parent = result.record["model"], result.path.parent
        beside = parent.parent.name == "evals" and result.step is not None  # written inside or beside a training
        place = str((parent.parents[1] if beside else Path(said.get("run", parent))).resolve())
        name = f"{said['name']}, mean of steps {said['averaged']}" if "averaged" in said else str(said["name"])
        model = models.setdefault((name, place, result.step), Scored(name, place, result.step))
        model.results[result.record["dataset"]] = result
    return sorted(models.values(), key=lambda model: (model.name, model.place, model.step or 0))


def newest(models: Sequence[Scored]) -> list[Scored]:
    """Of each run the model of the last step."""
    return list({(model.name, model.place): model for model in models}.values())


def trends(models: Sequence[Scored]) -> list[dict[str, str]]:
    """A picture by run of its headline numbers over the steps, where there are two or more steps."""
    runs: dict[tuple[str, str], list[Scored]] = {}
    for model in models:
        if model.step is not None:
            runs.setdefault((model.name, model.place), []).append(model)
    pictures = []
    for (name, place), steps in runs.items():
        if len(steps) < 2:
            continue
        series: dict[str, tuple[list[float], list[float]]] = {}
        for model in steps:
            for benchmark, result in sorted(model.results.items()):
                over, values = series.setdefault(benchmark, ([], []))
                over.append(float(model.step or 0))
                values.append(result.headline)
        title = f"{name}, {Path(place).name}"
        pictures.append({"title": title, "place": place, "data": _inline(png(curves(series, title, percent=True)))})
    return pictures


def confusion_pairs(result: Result) -> list[dict[str, Any]]:
    """The pairs of classes that are most often taken for each other, with pictures where some were kept."""
    arrays = result.arrays
    if not {"predictions", "labels", "classes"} <= arrays.keys():
        return []
    predictions, labels, classes = arrays["predictions"], arrays["labels"], arrays["classes"]
    wrong = predictions != labels
    pairs, counts = np.unique(np.stack([labels[wrong], predictions[wrong]], 1), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:PAIRS]
    return [
        {
            "true": str(classes[true]),
            "said": str(classes[said]),
            "count": int(count),
            "images": int((labels == true).sum()),
            "pictures": _pictures(arrays, int(true), int(said)),
        }
        for (true, said), count in zip(pairs[order], counts[order], strict=True)
    ]


def _pictures(arrays: Mapping[str, np.ndarray], true: int, said: int) -> list[str]:
    """Thumbnails of the pair among those that the evaluation kept."""
    if "shown" not in arrays:
        return []
    shown = arrays["shown"]
    chosen = np.flatnonzero((arrays["labels"][shown] == true) & (arrays["predictions"][shown] == said))[:PICTURES]
    return [_thumbnail(arrays["thumbnails"][number]) for number in chosen]


def _thumbnail(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST).save(buffer, "PNG")
    return _inline(buffer.getvalue())


def _row(model: Scored, benchmarks: Sequence[str]) -> dict[str, Any]:
    cells = []
    for name in benchmarks:
        result = model.results.get(name)
        cells.append(None if result is None else _cell(result))
    numbers = {"mean6": model.mean(ROBUSTNESS), "gap": model.robustness_gap(), "mean12": model.mean(TWELVE)}
    return {"name": model.name, "place": model.place, "step": model.step, "cells": cells} | numbers


def _cell(result: Result) -> dict[str, Any]:
    record = result.record
    interval = record.get("interval95", {}).get(record["headline"])
    return {
        "value": result.headline,
        "interval": interval,
        "metric": record["headline"],
        "partial": bool(record.get("partial")),
    }


def _title(models: Sequence[Scored], name: str) -> str:
    return next(str(model.results[name].record["title"]) for model in models if name in model.results)


def _place(name: str) -> tuple[int, str]:
    """The twelve in their usual order, then the others by name."""
    return (TWELVE.index(name) if name in TWELVE else len(TWELVE), name)


def _inline(data: bytes) -> str:
    return base64.b64encode(data).decode()
