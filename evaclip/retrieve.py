"""Scores a model at finding captions and images: what `evaclip retrieval` does."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from evaclip.distributed import is_main
from evaclip.evals.command import ScoringCommand, begun, data_folder, in_company, print_bad
from evaclip.evals.retrieval import RECALLS, WAYS, load_retrieval_card, retrieval, retrieval_data, save_retrieval
from evaclip.log import say
from evaclip.report.results import Result, read_result


@dataclass(frozen=True, kw_only=True)
class RetrievalCommand(ScoringCommand):
    """Score a model at image-text retrieval: recall at 1, 5 and 10, both ways.

    Under torchrun all processes share the work; what is written is the same.
    """

    dataset: str
    """flickr30k or coco (Karpathy's test splits), or the path of a card."""


def run_retrieval(command: RetrievalCommand) -> None:
    """Print the recalls, and write them with everything needed to trust them."""
    with in_company():
        card = load_retrieval_card(command.dataset)
        data = retrieval_data(card, data_folder(command, card.name), command.allow_partial)
        encoder, setting, out = begun(command)
        result = retrieval(encoder, card, data, setting)
        if is_main():
            path = save_retrieval(result, encoder, out)
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
    print_bad(result)
