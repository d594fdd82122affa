"""Two models on the same images: what `evaclip compare` prints.

Two intervals that overlap say little, because both models find the same images hard. What counts is where they differ:
McNemar's test asks whether the images that only one of them gets right are shared out evenly (exact, two-sided).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from evaclip.errors import InputError
from evaclip.report.results import Result, read_result, wilson

RECALLS = (1, 5, 10)


@dataclass(frozen=True, kw_only=True)
class CompareCommand:
    """Compare two models on the same images: accuracies, McNemar's test, and the classes that changed."""

    a: tyro.conf.Positional[Path]
    """JSON result of one model."""
    b: tyro.conf.Positional[Path]
    """JSON result of the other, on the same data."""
    classes: int = 10
    """How many of the classes that changed most to list."""


@dataclass(frozen=True)
class Paired:
    """One metric of two models, image by image."""

    metric: str
    images: int
    both: int
    only_a: int
    only_b: int
    p: float
    """McNemar's exact test: chance of a split as uneven as this or more if neither model were better."""

    @property
    def hits(self) -> tuple[int, int]:
        """How many each has right."""
        return self.both + self.only_a, self.both + self.only_b


@dataclass(frozen=True)
class ClassChange:
    """Images of a class that each model has right."""

    name: str
    images: int
    a: int
    b: int


def run_compare(command: CompareCommand) -> None:
    """Print the comparison."""
    a, b = read_result(command.a), read_result(command.b)
    pairs = compare(a, b)
    print(f"{a.record['title']}, {a.record['images']:,} images\n  A  {a.model} ({a.path})\n  B  {b.model} ({b.path})")
    table = Table()
    for column in ("metric", "A", "B", "B - A", "only one", "p"):
        table.add_column(column, justify="left" if column == "metric" else "right", no_wrap=True)
    for pair in pairs:
        change = 100 * (pair.hits[1] - pair.hits[0]) / pair.images
        table.add_row(
            pair.metric.replace("/", "\n"),
            *(_share(hits, pair.images) for hits in pair.hits),
            f"{change:+.2f}",
            f"A {pair.only_a:,}\nB {pair.only_b:,}",
            f"{pair.p:.3g}",
        )
    console = Console(highlight=False)
    console.print(table)
    print("below each share its 95 % interval (Wilson); p: McNemar's exact test on those that only one has right")
    changes = [change for change in class_changes(a, b) if change.a != change.b][: command.classes]
    if changes:
        table = Table(title="classes that changed most", title_justify="left")
        for column in ("class", "images", "A", "B", "B - A"):
            table.add_column(column, justify="left" if column == "class" else "right")
        for change in changes:
            shares = [f"{100 * hits / change.images:.1f}" for hits in (change.a, change.b)]
            points = 100 * (change.b - change.a) / change.images
            table.add_row(change.name, f"{change.images:,}", *shares, f"{points:+.1f}")
        console.print(table)


def compare(a: Result, b: Result) -> list[Paired]:
    """Every metric that both results have image by image. Raises InputError when they are not of the same data."""
    one, other = a.record, b.record
    if one["dataset"] != other["dataset"]:
        raise InputError(
            f"{a.path} is of {one['title']}, {b.path} of {other['title']}; a comparison needs one data set"
        )
    prints = [record.get("data", {}).get("sha256") for record in (one, other)]
    if None in prints or prints[0] != prints[1]:
        raise InputError(
            f"{a.path} and {b.path} are of different files of {one['title']} (fingerprints "
            f"{' and '.join(str(found)[:12] for found in prints)}): score both models on the same data first"
        )
    found, right = hits(a), hits(b)
    for name in ("labels", "classes"):
        if not np.array_equal(a.arrays.get(name, ()), b.arrays.get(name, ())):  # type: ignore[arg-type]
            raise InputError(
                f"{a.path} and {b.path} do not have the same {name}; score both with one version of the card"
            )
    shared = [metric for metric in found if metric in right]
    if any(found[metric].shape != right[metric].shape for metric in shared):
        raise InputError(f"{a.path} and {b.path} do not count the same files: some could be read for one of them alone")
    return [_paired(metric, found[metric], right[metric]) for metric in shared]


def hits(result: Result) -> dict[str, np.ndarray]:
    """By metric, whether each image (or caption) counts as right. Raises InputError when nobody kept that."""
    arrays = result.arrays
    found: dict[str, np.ndarray] = {}
    if {"predictions", "labels"} <= arrays.keys():
        found["top1"] = arrays["predictions"] == arrays["labels"]
    if "neighbours" in arrays:
        found["neighbours/top1"] = arrays["neighbours"] == arrays["labels"]
    for direction in ("image_to_text", "text_to_image"):
        if f"{direction}_ranks" in arrays:
            found |= {f"{direction}/recall@{k}": arrays[f"{direction}_ranks"] < k for k in RECALLS}
    if not found:
        raise InputError(f"{result.path.with_suffix('.npz')} with the single predictions is missing; score again")
    return found


def class_changes(a: Result, b: Result) -> list[ClassChange]:
    """Top-1 of each class that has images, largest change of the share first; empty for what has no classes."""
    if "classes" not in a.arrays:
        return []
    labels, right = a.arrays["labels"], [hits(result)["top1"] for result in (a, b)]
    changes = [
        ClassChange(str(name), int(own.sum()), int(right[0][own].sum()), int(right[1][own].sum()))
        for number, name in enumerate(a.arrays["classes"])
        if (own := labels == number).any()
    ]
    return sorted(changes, key=lambda change: (-abs(change.b - change.a) / change.images, change.name))


def mcnemar_p(both: int, only_a: int, only_b: int, neither: int) -> float:
    """p of McNemar's exact test (Psychometrika 12, 1947) for a table of two models' hits."""
    try:
        from statsmodels.stats.contingency_tables import mcnemar  # type: ignore[import-untyped]
    except ImportError:
        raise InputError("comparing two models needs statsmodels: pip install 'evaclip[compare]'") from None
    found: Any = mcnemar([[both, only_a], [only_b, neither]], exact=True)
    return float(found.pvalue)


def _paired(metric: str, a: np.ndarray, b: np.ndarray) -> Paired:
    both, only_a, only_b = int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum())
    return Paired(metric, len(a), both, only_a, only_b, mcnemar_p(both, only_a, only_b, int((~a & ~b).sum())))


def _share(hits: int, images: int) -> str:
    low, high = wilson(hits, images)
    return f"{100 * hits / images:.2f}\n{100 * low:.2f}–{100 * high:.2f}"
