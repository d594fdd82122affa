"""Scores a trained model on benchmarks: what `evaclip zeroshot` does."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from evaclip.distributed import is_main
from evaclip.encoder import Encoder
from evaclip.errors import InputError
from evaclip.evals.card import Card
from evaclip.evals.command import ScoringCommand, begun, data_folder, encoder_of_command, in_company, print_metrics
from evaclip.evals.explain import explained
from evaclip.evals.features import Setting
from evaclip.evals.layouts import LabelledImages, find_images
from evaclip.evals.protocol import protocol_named
from evaclip.evals.scores import clip_benchmark_record, save_result, write_json
from evaclip.evals.suite import check_reference, chosen, summary, verified, why_different
from evaclip.evals.zero_shot import check_count, zero_shot
from evaclip.log import say
from evaclip.report.results import Result, read_result


@dataclass(frozen=True, kw_only=True)
class ZeroShotCommand(ScoringCommand):
    """Score a model zero-shot: the classes are known from their names alone.

    Under torchrun the images are shared by all processes; what is written is the same.
    """

    dataset: str
    """A benchmark (`imagenet`, `cifar10`), several with commas between, `all` for the twelve, or a card's path."""
    splits: str = "1"
    """Of UCF-101, the official test splits: 1, or 1,2,3."""
    format: Literal["evaclip", "clip_benchmark"] = "evaclip"
    """`clip_benchmark` also writes each result in CLIP_benchmark's schema, to `clip_benchmark/` in `out`."""
    explain: bool = False
    """Print what was found and how it would be scored, and score nothing."""
    verify: bool = False
    """Compare with the published scores on the card; exit with 2 where they differ by more than is known to happen."""
    reference: str | None = None
    """The model whose published scores are meant; by default the model's own name."""


def run_zero_shot(command: ZeroShotCommand) -> float:
    """Print the scores, and write them with everything needed to trust them. Returns the last headline number."""
    with in_company():
        return _run(command)


def _run(command: ZeroShotCommand) -> float:
    cards = chosen(command.dataset)
    found = _found(command, cards)
    if command.explain:
        return _explain(command, found)
    encoder, setting, out = begun(command)
    for card, _ in found if command.verify else []:
        check_reference(card, _reference(command, encoder))
    records, wrong = [], []
    for card, images in found:
        record = _scored(command, card, images, encoder, setting, out)
        records.append(record)
        if record["alarm"]:
            wrong.append(f"{card.title}: {record['alarm']}")
        if command.verify and record["partial"]:
            wrong.append(f"{card.title}: a score from partial data cannot be verified")
        wrong += [
            f"{card.title}: {check['metric']} is {check['ours']:.2f}, published {check['published']:.2f} "
            f"({check['source']}): {why_different(record, card)}"
            for check in record.get("verified", [])
            if not check["agrees"]
        ]
    if len(records) > 1 and is_main():
        _print_summary(summary(records), out)
    if wrong:
        raise InputError(f"{'; '.join(wrong)}. The results were written to {out}")
    return records[-1]["metrics"][records[-1]["headline"]]


def _found(command: ZeroShotCommand, cards: list[Card]) -> list[tuple[Card, LabelledImages]]:
    """The images of each benchmark, all looked for before the first is scored."""
    if command.data is not None and len(cards) > 1:
        raise InputError("--data names the folder of one benchmark; of several, --data-root names the folder above")
    found, missing = [], []
    for card in cards:
        try:
            images = find_images(card, data_folder(command, card.name, card.aliases), _split(command, card))
            check_count(card, images, command.allow_partial, _expected(command, card))
            found.append((card, images))
        except InputError as error:
            if len(cards) == 1:
                raise
            missing.append(f"{card.name}: {error}")
    for sentence in missing:
        say(sentence)
    if missing and (not found or not (command.allow_partial or command.explain)):
        raise InputError(
            f"{len(missing)} of {len(cards)} benchmarks cannot be scored; --allow-partial scores the others"
        )
    return found


def _split(command: ZeroShotCommand, card: Card) -> str:
    return command.splits if card.split_counts and command.splits != "1" else "test"


def _expected(command: ZeroShotCommand, card: Card) -> int:
    """Test images of the card, or of the splits that were asked for."""
    if _split(command, card) == "test":
        return card.count
    splits = command.splits.split(",")
    if not set(splits) <= {str(number + 1) for number in range(len(card.split_counts))}:
        raise InputError(f"--splits {command.splits}: {card.title} has the splits 1 to {len(card.split_counts)}")
    return sum(card.split_counts[int(split) - 1] for split in splits)


def _explain(command: ZeroShotCommand, found: list[tuple[Card, LabelledImages]]) -> float:
    try:
        preprocessing = encoder_of_command(command).preprocessing
    except InputError as error:
        preprocessing = None
        if is_main():
            print(f"model: {error}")
    for card, images in found if is_main() else []:
        protocol, expected = protocol_named(command.protocol), _expected(command, card)
        print(*explained(card, images, protocol, preprocessing, expected), sep="\n")
    return 0.0


def _scored(
    command: ZeroShotCommand, card: Card, images: LabelledImages, encoder: Encoder, setting: Setting, out: Path
) -> dict[str, Any]:
    """One benchmark's record; the first process writes and prints it."""
    expected = _expected(command, card)
    result = zero_shot(encoder, card, images, setting, expected)
    record = result.record(encoder.origin or {"name": encoder.name})
    if _split(command, card) != "test":
        record["splits"] = command.splits
    if command.verify:
        record["verified"] = [] if record["partial"] else verified(record, card, _reference(command, encoder))
    if is_main():
        path = save_result(result, record, out)
        if command.format == "clip_benchmark":
            (out / "clip_benchmark").mkdir(exist_ok=True)
            write_json(out / "clip_benchmark" / path.name, clip_benchmark_record(record, card))
        print_score(read_result(path))
    return record


def _reference(command: ZeroShotCommand, encoder: Encoder) -> str:
    """The model whose published scores are compared with."""
    return command.reference or encoder.name.partition(":")[0]


def print_score(result: Result) -> None:
    """A result as a table on standard output."""
    record, coverage = result.record, result.record["coverage"]
    partial = " (partial data)" if record.get("partial") else ""
    print(f"{record['title']}: {record['model']['name']}, {record['images']:,} images{partial}")
    print_metrics(result)
    if "least_class" in coverage:
        print(
            f"{coverage['scored']:,} of {coverage['listed']:,} listed were scored ({coverage['share']:.2%}); of "
            f"{coverage['least_class']!r}, which misses most, {coverage['least_class_share']:.0%}"
        )
    for note in record["notes"]:
        print(f"note: {note}")
    for check in record.get("verified", []):
        verdict = "agrees" if check["agrees"] else "DIFFERS"
        print(f"{check['metric']} {check['ours']:.2f}, published {check['published']:.2f}: {verdict}")
    if record["alarm"]:
        print(f"ALARM: {record['alarm']}")
    say(f"written to {result.path}")


def _print_summary(found: dict[str, Any], out: Path) -> None:
    """The headline numbers of several benchmarks and what the papers derive from them."""
    table = Table()
    table.add_column("benchmark")
    table.add_column("headline", justify="right")
    for name, value in found["headlines"].items():
        table.add_row(name + (" (partial)" if name in found["partial"] else ""), f"{value:.2f}")
    Console(highlight=False).print(table)
    whole = "the twelve" if found["is_the_twelve"] else f"{found['average_of']} benchmarks"
    print(f"average of {whole}: {found['average']:.2f}")
    if found["gap"] is not None:
        print(f"robustness gap, ImageNet-1K less the mean over it and its variants: {found['gap']:.2f}")
    write_json(out / "summary.json", found)
    say(f"written to {out / 'summary.json'}")
