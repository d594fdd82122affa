"""Scores a model at finding captions and images: what `evaclip retrieval` does."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from evaclip.encoder import load_encoder
from evaclip.engine import EngineConfig
from evaclip.evals.retrieval import RECALLS, WAYS, load_retrieval_card, retrieval, retrieval_data, save_retrieval
from evaclip.log import say
from evaclip.report.results import Result, read_result


@dataclass(frozen=True, kw_only=True)
class RetrievalCommand:
    """Score a model at image-text retrieval: recall at 1, 5 and 10, both ways."""

    dataset: str
    """flickr30k or coco (Karpathy's test splits), or the path of a card."""
    model: str
    """Folder of a run or of an exported model, or an open_clip name such as EVA02-B-16."""
    data: Path | None = None
    """Folder of the images and their captions; by default data/DATASET."""
    out: Path | None = None
    """Folder for the JSON result and the ranks; by default `scores/` in the model's folder, or here."""
    batch: int = 256
    """Images that pass through the tower at a time."""
    workers: int = 2
    """Processes that decode images; 0 decodes in the main process."""
    device: str = "auto"
    """`cuda`, `cpu`, or `auto` for a GPU if there is one."""
    allow_partial: bool = False
    """Score a data set that is not whole; the result says so."""


def run_retrieval(command: RetrievalCommand) -> None:
    """Print the recalls, and write them with everything needed to trust them."""
    card = load_retrieval_card(command.dataset)
    data = retrieval_data(card, command.data or Path("data") / card.name, command.allow_partial)
    encoder = load_encoder(command.model, EngineConfig(device=command.device).resolved_device())
    result = retrieval(encoder, card, data, command.batch, command.workers)
    home = Path(command.model) if Path(command.model).is_dir() else Path()
    path = save_retrieval(result, encoder, command.out or home / "scores")
    print_recalls(read_result(path))
    say(f"written to {path}")


def print_recalls(result: Result) -> None:
    """The recalls, and beside them the published ones of the same model, as a table on standard output."""
    record = result.record
    partial = " (partial data)" if record["partial"] else ""
    print(f"{record['title']}: {result.model}, {record['images']:,} images, {record['captions']:,} captions{partial}")
    table = Table()
    for column in ("way", *(f"R@{k}" for k in RECALLS), "95 % interval of R@1"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way in WAYS:
        low, high = record["interval95"][f"{way}/recall@1"]
        shares = [f"{100 * record['metrics'][f'{way}/recall@{k}']:.2f}" for k in RECALLS]
        table.add_row(way.replace("_", " "), *shares, f"{100 * low:.2f} to {100 * high:.2f}")
        for published in record["reference"]:
            if published["model"] == record["model"]["name"]:
                table.add_row("  published", *(f"{value:.2f}" for value in published[way]), "")
    Console(highlight=False).print(table)
    print(f"mean recall {100 * record['metrics']['mean_recall']:.2f}")
