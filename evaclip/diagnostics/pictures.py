"""What diagnosis draws: every figure holds all models side by side, on the same scale."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evaclip.diagnostics.attention import Attention

# Columns of the figure of average maps; of a deeper tower, blocks evenly spread from the first to the last.
MOST_MAPS = 12
PER_ROW = 3


def distances(found: Mapping[str, Attention]) -> Figure:
    """One dot for each head, a line for their mean, a dotted one for attention that asks for nothing."""
    figure, panels = _panels(len(found), (3.6, 3.2), sharey=True)
    for axes, (name, attention) in zip(panels, found.items(), strict=True):
        depth, heads = attention.distance.shape
        blocks = np.arange(1, depth + 1)
        axes.plot(np.repeat(blocks, heads), attention.distance.ravel(), "o", markersize=3.5, alpha=0.6, label="a head")
        axes.plot(blocks, attention.distance.mean(1), color="black", linewidth=1.2, label="mean")
        axes.axhline(attention.even, color="black", linewidth=0.8, linestyle=":", label="spread evenly")
        _titled(axes, name, "block")
    panels[0].set_ylabel("mean attention distance, pixels")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def similarities(found: Mapping[str, Attention]) -> Figure:
    """A line for each model."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for name, attention in found.items():
        blocks = np.arange(1, len(attention.similarity) + 1)
        axes.plot(blocks, attention.similarity, marker="o", markersize=3, linewidth=1.4, label=name)
    _titled(axes, "", "block")
    axes.set_ylim(0, 1)
    axes.set_ylabel("cosine similarity of two heads")
    axes.legend(frameon=False, fontsize=8)
    return figure


def average_maps(found: Mapping[str, Attention]) -> Figure:
    """A row for each model: queries down, keys to the right; each map is bright at its own 99th percentile."""
    depth = max(len(attention.average) for attention in found.values())
    columns = min(depth, MOST_MAPS)
    figure = Figure(figsize=(1.35 * columns, 1.6 * len(found) + 0.2), layout="constrained")
    grid = figure.subplots(len(found), columns, squeeze=False)
    for row, (name, attention) in zip(grid, found.items(), strict=True):
        own = len(attention.average)
        chosen = np.unique(np.linspace(0, own - 1, min(own, columns)).round().astype(int))
        for place, axes in enumerate(row):
            axes.set_xticks([])
            axes.set_yticks([])
            if place >= len(chosen):
                axes.set_axis_off()
                continue
            shown = attention.average[chosen[place]]
            axes.imshow(shown, cmap="viridis", vmin=0, vmax=np.percentile(shown, 99), interpolation="nearest")
            axes.set_title(f"block {chosen[place] + 1}", fontsize=7, pad=2)
        row[0].set_ylabel(name, fontsize=8)
    return figure


def landscapes(found: Mapping[str, Float[np.ndarray, "points points"]], steps: Float[np.ndarray, " points"]) -> Figure:
    """Level lines over the two directions, the levels of all models being the same."""
    figure, panels = _panels(len(found), (3.6, 3.4))
    low, high = (
        edge(values.min() if edge is min else values.max() for values in found.values()) for edge in (min, max)
    )
    levels = MaxNLocator(16).tick_values(low, max(high, low + 1e-9))
    for axes, (name, values) in zip(panels, found.items(), strict=True):
        drawn = axes.contourf(steps, steps, values, levels=levels, cmap="magma")
        axes.contour(steps, steps, values, levels=levels, colors="white", linewidths=0.4, alpha=0.6)
        axes.plot(0, 0, "+", color="white")
        _titled(axes, name, "second direction")
        axes.set_aspect("equal")
        if axes is panels[-1]:
            figure.colorbar(drawn, ax=panels, label="loss", shrink=0.8)
    panels[0].set_ylabel("first direction")
    return figure


def sections(found: Mapping[str, Float[np.ndarray, "points points"]], steps: Float[np.ndarray, " points"]) -> Figure:
    """Through the centre of each landscape along both directions, counted from the centre's loss."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes, middle = figure.add_subplot(), len(steps) // 2
    for number, (name, values) in enumerate(found.items()):
        color = f"C{number}"
        axes.plot(steps, values[:, middle] - values[middle, middle], color=color, linewidth=1.4, label=name)
        axes.plot(steps, values[middle] - values[middle, middle], color=color, linewidth=1.4, linestyle="--")
    _titled(axes, "", "step along the first (line) or second (dashed) direction")
    axes.set_ylabel("loss above that at the weights")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _panels(count: int, size: tuple[float, float], *, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    rows = -(-count // PER_ROW)
    columns = min(count, PER_ROW)
    figure = Figure(figsize=(size[0] * columns + 0.6, size[1] * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat)
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels[:count]


def _titled(axes: Axes, title: str, below: str) -> None:
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_xlabel(below)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if below == "block":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
