"""The pictures of a report, as matplotlib figures."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

GOOD, BAD, QUIET = "#2a7f4f", "#b3372f", "#7a7f87"


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str, percent: bool = False) -> Figure:
    """Lines over steps. `series`: name -> (steps, values)."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for name, (steps, values) in series.items():
        shown = [100 * value for value in values] if percent else values
        axes.plot(steps, shown, label=name, marker="o" if len(steps) < 30 else None, markersize=3, linewidth=1.4)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel("%" if percent else "")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8)
    return figure


def prediction_grid(
    images: np.ndarray, predictions: np.ndarray, labels: np.ndarray, classes: Sequence[str], columns: int = 8
) -> Figure:
    """Images with what the model says of them; a wrong answer is red and followed by the right one.

    `images`: uint8 [n, size, size, 3].
    """
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.25 * columns, 1.5 * rows), layout="constrained")
    for number, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.set_axis_off()
        if number >= len(images):
            continue
        right = predictions[number] == labels[number]
        said = str(classes[predictions[number]]) + ("" if right else f"\nis {classes[labels[number]]}")
        axes.imshow(_enlarged(images[number]))
        axes.set_title(said, fontsize=7, color=GOOD if right else BAD, pad=2)
    return figure


def confusion_matrix(predictions: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> Figure:
    """Rows are true classes, columns predictions; counts are written in while there is room."""
    count = len(classes)
    matrix = np.zeros((count, count), dtype=np.int64)
    np.add.at(matrix, (labels, predictions), 1)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = min(12.0, 2.0 + 0.42 * count)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if count <= 40:
        axes.set_xticks(range(count), classes, rotation=90, fontsize=8)
        axes.set_yticks(range(count), classes, fontsize=8)
    if count <= 20:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            color = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize=7, color=color)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    return figure


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file, the same for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def _enlarged(pixels: np.ndarray, least: int = 64) -> np.ndarray:
    """Small pictures without blur."""
    factor = max(1, least // pixels.shape[0])
    return np.asarray(Image.fromarray(pixels).resize((pixels.shape[1] * factor, pixels.shape[0] * factor), 0))
