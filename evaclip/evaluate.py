"""Scores a trained model on benchmarks: what `evaclip zeroshot` does."""

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from evaclip.encoder import clip_of_run
from evaclip.engine import EngineConfig
from evaclip.evals.card import load_card
from evaclip.evals.layouts import find_images
from evaclip.evals.zero_shot import check_count, save_result, zero_shot
from evaclip.log import say


@dataclass(frozen=True, kw_only=True)
class ZeroShotCommand:
    """Score a model zero-shot: the classes are known from their names alone."""

    dataset: str
    """Name of a benchmark (`digits`, `cifar10`), or path of a card."""
    model: Path
    """Folder of a run."""
    data: Path | None = None
    """Folder of the images; by default data/DATASET."""
    out: Path | None = None
    """Folder for the JSON result and the predictions; by default `scores/` in the run."""
    batch: int = 256
    """Images that pass through the tower at a time."""
    workers: int = 2
    """Processes that decode images; 0 decodes in the main process."""
    device: str = "auto"
    """`cuda`, `cpu`, or `auto` for a GPU if there is one."""
    allow_partial: bool = False
    """Score a data set that is not whole; the result says so."""


def run_zero_shot(command: ZeroShotCommand) -> float:
    """Print the score, and write it with everything needed to trust it. Returns the card's headline number."""
    card = load_card(command.dataset)
    images = find_images(card, command.data or Path("data") / card.name)
    check_count(card, images, command.allow_partial)
    model, origin = clip_of_run(command.model)
    device = EngineConfig(device=command.device).resolved_device()
    result = zero_shot(model.to(device), card, images, device, command.batch, command.workers)
    record = result.record(origin, model.shape.vision.image_size)
    path = save_result(result, record, command.out or command.model / "scores")
    print_score(path)
    return result.metrics()[card.headline]


def print_score(path: Path) -> None:
    """A result file as a table on standard output."""
    record = json.loads(path.read_text())
    partial = " (partial data)" if record.get("partial") else ""
    table = Table()
    for column in ("metric", "score", "95 % interval"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, value in record["metrics"].items():
        low, high = record["interval95"][name]
        table.add_row(name, f"{100 * value:.2f}", f"{100 * low:.2f} to {100 * high:.2f}")
    print(f"{record['title']}: {record['model']['name']}, {record['images']:,} images{partial}")
    Console(highlight=False).print(table)
    say(f"written to {path}")
