"""What comes out of a benchmark: accuracies with intervals, and a record of everything that a number depends on."""

import json
import platform
import re
import time
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import features as pillow

from evaclip.evals.alarm import permutation_alarm
from evaclip.evals.card import Card
from evaclip.evals.classifier import prompts_hash
from evaclip.evals.features import Times
from evaclip.evals.layouts import LabelledImages
from evaclip.evals.layouts.imagenet import validation_number
from evaclip.evals.protocol import View
from evaclip.report.results import ledger, wilson, write_result

TIE_RULE = "a tie goes to the class that the card names first"
# Fields of a record that say how fast this run was, and so differ between two runs of the same thing.
OF_THE_RUN = ("date", "seconds", "speed")


@dataclass(frozen=True)
class ZeroShotResult:
    """The outcome on one benchmark; arrays are in the order of the images that could be read."""

    card: Card
    images: LabelledImages
    view: View
    scored: np.ndarray
    """int64: which of the images could be read."""
    predictions: np.ndarray
    """int64: the predicted class of each."""
    ranks: np.ndarray
    """int64: how many classes come before the true one."""
    bad: dict[int, str]
    """Images that could not be read, with the reason; they count neither as right nor as wrong."""
    expected: int
    """How many images the benchmark has."""
    shown: np.ndarray
    """int64: the images whose thumbnails were kept, counted among those scored."""
    thumbnails: np.ndarray
    """uint8 [shown, size, size, 3]: those images as the tower saw them."""
    seconds: float
    times: Times = field(default_factory=Times)

    @property
    def labels(self) -> np.ndarray:
        """int64: the true class of each image that was scored."""
        return self.images.labels[self.scored]

    @property
    def listed(self) -> int:
        """How many there should be: by the data's own list where it has one, else by the card."""
        return int(self.images.listed.sum()) if self.images.listed is not None else self.expected

    @property
    def partial(self) -> bool:
        """Whether the score is from less than the benchmark, or from more."""
        if self.card.coverage == 1:
            return len(self.scored) != self.expected
        return min(len(self.scored) / max(self.listed, 1), self.listed / self.expected) < self.card.coverage

    def accuracy(self, k: int) -> float:
        """Share of images whose true class is among the first k."""
        return float((self.ranks < k).mean())

    def metrics(self) -> dict[str, float]:
        """Top-1; top-5 where there are more than five classes; their mean and ReaL accuracy where the card asks."""
        return {name: float(hits.mean()) for name, hits in self.hits.items()}

    @cached_property
    def hits(self) -> dict[str, np.ndarray]:
        """For each metric, what each image adds to it: 0, 1, or 0.5."""
        tops = [1, 5] if len(self.card.classes) > 5 else [1]
        found: dict[str, np.ndarray] = {f"top{k}": self.ranks < k for k in tops}
        if self.card.headline == "mean_top1_top5":
            found["mean_top1_top5"] = (found["top1"] + found["top5"].astype(np.float64)) / 2
        if self.card.real_labels:
            real = real_hits([str(self.images.keys[number]) for number in self.scored], self.predictions)
            found |= {"real": real} if len(real) else {}
        return found

    def interval(self, metric: int | str = 1) -> tuple[float, float]:
        """95 % interval: Wilson's of a share, the normal one of a mean of shares."""
        hits = self.hits[f"top{metric}" if isinstance(metric, int) else metric]
        if hits.dtype == bool:
            return wilson(int(hits.sum()), len(hits))
        half = 1.959964 * float(hits.std()) / np.sqrt(len(hits))
        return float(hits.mean() - half), float(hits.mean() + half)

    def per_class(self) -> dict[str, float]:
        """Top-1 accuracy of each class that has images; a second class of the same name is marked."""
        correct, labels = self.ranks < 1, self.labels
        found: dict[str, float] = {}
        for number, name in enumerate(self.card.classes):
            if (labels == number).any():
                unique = f"{name} ({self.card.data_labels[number]})" if name in found else name
                found[unique] = float(correct[labels == number].mean())
        return found

    def coverage(self) -> dict[str, Any]:
        """How much of what there should be was scored: in all, and of the class that misses most."""
        said: dict[str, Any] = {
            "scored": len(self.scored), "bad": len(self.bad), "listed": self.listed,
            "share": round(len(self.scored) / max(self.listed, 1), 6),
        }  # fmt: skip
        if self.images.listed is not None:
            have = np.bincount(self.labels, minlength=len(self.card.classes))
            share = np.where(self.images.listed > 0, have / np.maximum(self.images.listed, 1), 1.0)
            said |= {"least_class": self.card.classes[int(share.argmin())], "least_class_share": float(share.min())}
        return said

    def record(self, model: dict[str, Any]) -> dict[str, Any]:
        """Everything that is needed to trust the number, as JSON."""
        card, view, per_class = self.card, self.view, self.per_class()
        return {
            "dataset": card.name,
            "title": card.title,
            "model": model,
            "images": len(self.scored),
            "partial": self.partial,
            "coverage": self.coverage(),
            "headline": card.headline,
            "metrics": self.metrics(),
            "interval95": {name: self.interval(name) for name in self.hits},
            "mean_per_class": float(np.mean(list(per_class.values()))),
            "per_class": per_class,
            "alarm": permutation_alarm(self.labels, self.predictions, card.classes),
            "notes": list(self.images.notes),
            "reference": [asdict(reference) for reference in card.reference],
            "protocol": view.record()
            | {
                "classes": len(card.classes),
                "logits": "float32",
                "ties": TIE_RULE,
                "templates": len(card.templates),
                "prompts_sha256": prompts_hash(card),
            },
            "data": {"layout": self.images.layout, "sha256": self.images.fingerprint},
            "versions": _versions(card.media == "video"),
            "date": time.strftime("%Y-%m-%d"),
            "seconds": round(self.seconds, 2),
            "speed": self.times.speed(self.seconds),
        }


def real_hits(keys: list[str], predictions: np.ndarray) -> np.ndarray:
    """Whether each prediction is among the image's ReaL labels (arXiv 2006.07159); images without any are left out.

    bool; empty when the keys do not say which of ImageNet's validation images they are.
    """
    numbers = [validation_number(key) for key in keys]
    if not numbers or None in numbers:
        return np.zeros(0, bool)
    real = json.loads((files("timm") / "data" / "_info" / "imagenet_real_labels.json").read_text())
    pairs = [(real[n - 1], int(p)) for n, p in zip(numbers, predictions, strict=True) if n and 0 < n <= len(real)]
    return np.array([prediction in labels for labels, prediction in pairs if labels], bool)


def save_result(result: ZeroShotResult, record: dict[str, Any], folder: Path) -> Path:
    """`<benchmark>.json`; beside it `.npz` with keys, predictions, labels, ranks, thumbnails; `.bad.jsonl` if any."""
    arrays = {
        "keys": np.array([result.images.keys[number] for number in result.scored], dtype=np.str_),
        "predictions": result.predictions,
        "labels": result.labels,
        "ranks": result.ranks,
        "shown": result.shown,
        "thumbnails": result.thumbnails,
        "classes": np.array(result.card.classes),
    }
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", result.card.name)
    return write_result(folder, name, record, arrays, ledger(result.images.keys, result.bad))


def write_json(path: Path, record: Any) -> None:
    """A JSON file that is there whole or not at all."""
    beside = path.with_suffix(".new.json")
    beside.write_text(json.dumps(record, indent=1) + "\n")
    beside.replace(path)


def clip_benchmark_record(record: dict[str, Any], card: Card) -> dict[str, Any]:
    """The same result in CLIP_benchmark's schema."""
    metrics = {"acc1": record["metrics"]["top1"]}
    if "top5" in record["metrics"]:
        metrics["acc5"] = record["metrics"]["top5"]
    origin = record["model"]
    return {
        "dataset": card.clip_benchmark or card.name,
        "model": origin["name"],
        "pretrained": origin.get("weights") or origin.get("run") or origin["name"],
        "task": "zeroshot_classification",
        "metrics": metrics | {"mean_per_class_recall": record["mean_per_class"]},
        "language": "en",
    }


def _versions(video: bool) -> dict[str, str]:
    found = {name: version(name) for name in ("evaclip", "torch", "timm", "pillow")}
    found |= {"python": platform.python_version(), "jpeg": f"{pillow.version('jpg')}"}
    if video:
        try:
            found["av"] = version("av")
        except PackageNotFoundError:
            pass
    return found
