"""Fits simple classifiers on a model's image features: what `evaclip probe` does."""

from dataclasses import dataclass

from evaclip.distributed import is_main
from evaclip.evals.card import load_card
from evaclip.evals.command import ScoringCommand, begun, data_folder, in_company, print_metrics
from evaclip.evals.linear_probe import Probe, ProbeConfig
from evaclip.log import say
from evaclip.report.results import read_result


@dataclass(frozen=True, kw_only=True)
class ProbeCommand(ScoringCommand):
    """Fit a linear probe and nearest neighbours on a benchmark's training images, and score both on its test images.

    Under torchrun all processes share the work; what is written is the same.
    """

    dataset: str
    """Name of a benchmark, or path of a card; its data needs a training part."""
    held_out: float = 0.2
    """Share of the training images on which the weight decay is chosen."""
    neighbours: int = 20
    """How many vote."""
    seed: int = 0
    """Decides which training images are held out."""


def run_probe(command: ProbeCommand) -> None:
    """Print the scores, and write them with everything needed to trust them."""
    with in_company():
        card = load_card(command.dataset)
        config = ProbeConfig(
            card=command.dataset,
            data=data_folder(command, card.name, card.aliases),
            held_out=command.held_out,
            neighbours=command.neighbours,
            seed=command.seed,
        )
        probe = Probe(config, command.allow_partial)
        encoder, setting, out = begun(command)
        result = probe.run(encoder, setting)
        if not is_main():
            return
        path = probe.save(result, probe.record(result, encoder), out)
        told = read_result(path)
        partial = " (partial data)" if told.record["partial"] else ""
        print(
            f"{told.record['title']}: {told.model}, {result.trained_on:,} training images, "
            f"{told.record['images']:,} test{partial}"
        )
        print_metrics(told)
        say(f"written to {path}")
