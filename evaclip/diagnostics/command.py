"""Looks into one or several image towers: what `evaclip diagnose` does."""

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from evaclip.diagnostics.attention import Attention, diagnosed
from evaclip.diagnostics.images import some_images
from evaclip.diagnostics.landscape import landscape, loss_of
from evaclip.diagnostics.pictures import average_maps, distances, landscapes, sections, similarities
from evaclip.encoder import ImageTower, load_image_tower
from evaclip.engine import EngineConfig
from evaclip.errors import InputError
from evaclip.log import say
from evaclip.report.plots import png

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ models | join(", ") }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem; color: #1d2126 }
  h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem } img { max-width: 100%; height: auto }
  .quiet { color: #666c74 }
</style>
<h1>Inside {{ models | join(", ") }}</h1>
<p class="quiet">{{ summary }}</p>
{% for section in pictures %}
<h2>{{ section.title }}</h2>
<p>{{ section.said }}</p>
<img alt="{{ section.title }}" src="data:image/png;base64,{{ section.data }}">
{% endfor %}
</html>
"""
SAID = {
    "attention distance": "How far from itself a patch looks, weighted by its attention to other patches. The dotted "
    "line is attention that is spread evenly. The paper finds heads of many distances in the deep blocks of distilled "
    "towers.",
    "similarity of heads": "The cosine similarity between the attention of two heads, the mean over pairs of heads, "
    "queries and images: 1 where all heads do the same. The paper finds less of it in the deep blocks of distilled "
    "towers.",
    "average attention maps": "The mean map over heads and images, queries down and keys to the right, the class token "
    "first. Diagonals are attention by relative position, columns attention that asks for no position.",
    "loss landscape": "The loss at the weights plus two random directions, each row of them as long as the row of "
    "weights that it moves. Of a distilled tower it is the loss that it was trained with; any other tower is its own "
    "teacher, so its centre is 0.",
    "sections of the landscape": "The same along each direction, counted from the centre: the flatter, the less a step "
    "of the optimizer costs.",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DiagnoseCommand:
    """Draw what image towers do inside: attention distance, heads, average attention, and the loss around them.

    Several models, such as a teacher and its student, share every plot.
    """

    models: tyro.conf.Positional[tuple[str, ...]]
    """Runs with or without text towers, exported folders, open_clip names, files, `timm:NAME`, `timm:NAME:FILE`."""
    images: str
    """Folder of images, at any depth, or of shards."""
    out: Path
    """Folder for the page, the pictures and their numbers."""
    count: int = 64
    """Images whose attention is averaged."""
    landscape_images: int = 64
    """Images that each loss is the mean of; 0 draws no landscape."""
    points: int = 11
    """Losses along each direction; odd, so that the weights themselves are among them."""
    span: float = 1.0
    """How far each direction goes; at 1 it is as long as the weights."""
    seed: int = 0
    """Decides the directions."""
    device: str = "auto"
    """`cuda`, `cpu`, or `auto` for a GPU if there is one."""

    def __post_init__(self) -> None:
        if not self.models:
            raise InputError("name the models to diagnose, for instance a teacher and its student")
        if len(set(self.models)) < len(self.models):
            raise InputError("a model is named twice, and each needs a place of its own in the plots")
        if self.points < 3 or self.points % 2 == 0:
            raise InputError(f"--points {self.points} must be odd and at least 3")
        if self.count < 1 or self.landscape_images < 0 or self.span <= 0:
            raise InputError("--count must be at least 1, --landscape-images at least 0, and --span above 0")


@torch.no_grad()
def run_diagnose(command: DiagnoseCommand) -> None:
    """Write the page, the pictures and the numbers, and print the numbers that fit into a table."""
    device = EngineConfig(device=command.device).resolved_device()
    towers = {name: load_image_tower(name, device) for name in command.models}
    teachers = {name: _teacher(tower, device) for name, tower in towers.items() if command.landscape_images}
    images = some_images(command.images, max(command.count, command.landscape_images))
    steps = np.linspace(-command.span, command.span, command.points)
    attention: dict[str, Attention] = {}
    losses: dict[str, np.ndarray] = {}
    for name, tower in towers.items():
        say(f"{name}: attention of {command.count} images")
        pixels = torch.stack([tower.preprocessing.pixels(image) for image in images]).to(device)
        attention[name] = diagnosed(tower, pixels[:: _stride(len(pixels), command.count)][: command.count])
        if command.landscape_images:
            say(f"{name}: {command.points**2} losses of {command.landscape_images} images")
            few = pixels[:: _stride(len(pixels), command.landscape_images)][: command.landscape_images]
            losses[name] = landscape(tower.model, loss_of(tower, teachers[name], few), steps, command.seed)
    _write(command, attention, losses, steps)
    _print(attention, losses)
    say(f"written to {command.out / 'diagnosis.html'}")


def _stride(there: int, wanted: int) -> int:
    return max(1, there // wanted)


def _teacher(tower: ImageTower, device: torch.device) -> ImageTower | None:
    """The teacher of a distilled tower; None for a tower that is its own."""
    trained = tower.objective or {}
    return load_image_tower(str(trained["teacher"]), device) if trained.get("kind") == "distillation" else None


def _write(
    command: DiagnoseCommand, attention: dict[str, Attention], losses: dict[str, np.ndarray], steps: np.ndarray
) -> None:
    drawn = {
        "attention distance": distances(attention),
        "similarity of heads": similarities(attention),
        "average attention maps": average_maps(attention),
    }
    if losses:
        drawn |= {"loss landscape": landscapes(losses, steps), "sections of the landscape": sections(losses, steps)}
    pictures = {title: png(figure) for title, figure in drawn.items()}
    command.out.mkdir(parents=True, exist_ok=True)
    for title, data in pictures.items():
        (command.out / f"{title.replace(' ', '_')}.png").write_bytes(data)
    record = {
        "images": {"source": command.images, "attention": command.count, "landscape": command.landscape_images},
        "seed": command.seed,
        "steps": steps.tolist() if losses else [],
        "models": {name: _record(found, losses.get(name)) for name, found in attention.items()},
    }
    (command.out / "diagnosis.json").write_text(json.dumps(record, indent=1) + "\n")
    sections_of_page = [
        {"title": title, "said": SAID[title], "data": base64.b64encode(data).decode()}
        for title, data in pictures.items()
    ]
    summary = f"{command.count} images of {command.images}, directions of seed {command.seed}"
    page = jinja2.Environment(autoescape=True).from_string(PAGE)
    part = command.out / "diagnosis.html.part"
    part.write_text(page.render(models=command.models, summary=summary, pictures=sections_of_page))
    part.replace(command.out / "diagnosis.html")


def _record(found: Attention, losses: np.ndarray | None) -> dict[str, Any]:
    similarity = [None if np.isnan(value) else value for value in found.similarity.tolist()]
    record: dict[str, Any] = {
        "attention_distance_pixels": found.distance.tolist(),
        "even_distance_pixels": found.even,
        "head_similarity": similarity,
    }
    return record | ({} if losses is None else {"loss": losses.tolist()})


def _print(attention: dict[str, Attention], losses: dict[str, np.ndarray]) -> None:
    table = Table()
    for number, column in enumerate(("model", "distance, pixels", "heads alike", "loss, centre and mean")):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for name, found in attention.items():
        far, alike = found.distance.mean(1), found.similarity
        loss = losses.get(name)
        middle = 0 if loss is None else len(loss) // 2
        table.add_row(
            name,
            f"{far[0]:.1f} to {far[-1]:.1f}",
            f"{alike[0]:.3f} to {alike[-1]:.3f}",
            "" if loss is None else f"{loss[middle, middle]:.4f}  {loss.mean():.4f}",
        )
    Console(highlight=False).print(table)
    say("distance and likeness of heads: from the first block to the last")
