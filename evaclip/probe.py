"""Fits simple classifiers on a model's image features: what `evaclip probe` does."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from evaclip.encoder import load_encoder
from evaclip.engine import EngineConfig
from evaclip.evals.card import load_card
from evaclip.evals.linear_probe import Probe, ProbeConfig
from evaclip.log import say


@dataclass(frozen=True, kw_only=True)
class ProbeCommand:
    """Fit a linear probe and nearest neighbours on a benchmark's training images, and score both on its test images."""

    dataset: str
    """Name of a benchmark, or path of a card; its data needs a training part."""
    model: str
    """Folder of a run or of an exported model, or an open_clip name such as EVA02-B-16."""
    data: Path | None = None
    """Folder of the images; by default data/DATASET."""
    out: Path | None = None
    """Folder for the JSON result and the predictions; by default `scores/` in the model's folder, or here."""
    held_out: float = 0.2
    """Share of the training images on which the weight decay is chosen."""
    neighbours: int = 20
    """How many vote."""
    seed: int = 0
    """Decides which training images are held out."""
    batch: int = 256
    """Images that pass through the tower at a time."""
    workers: int = 2
    """Processes that decode images; 0 decodes in the main process."""
    device: str = "auto"
    """`cuda`, `cpu`, or `auto` for a GPU if there is one."""
    allow_partial: bool = False
    """Score a data set that is not whole; the result says so."""


def run_probe(command: ProbeCommand) -> None:
    """Print the scores, and write them with everything needed to trust them."""
    config = ProbeConfig(
        card=command.dataset,
        data=command.data or Path("data") / load_card(command.dataset).name,
        held_out=command.held_out,
        neighbours=command.neighbours,
        seed=command.seed,
        batch=command.batch,
        workers=command.workers,
    )
    probe = Probe(config, command.allow_partial)
    encoder = load_encoder(command.model, EngineConfig(device=command.device).resolved_device())
    home = Path(command.model) if Path(command.model).is_dir() else Path()
    path, record = probe.save(probe.run(encoder), encoder, command.out or home / "scores")
    partial = " (partial data)" if record["partial"] else ""
    print(
        f"{record['title']}: {encoder.name}, {len(probe.train):,} training images, {record['images']:,} test{partial}"
    )
    table = Table()
    for column in ("metric", "score", "95 % interval"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, value in record["metrics"].items():
        low, high = record["interval95"][name]
        table.add_row(name, f"{100 * value:.2f}", f"{100 * low:.2f} to {100 * high:.2f}")
    Console(highlight=False).print(table)
    say(f"written to {path}")
