"""Scores a trained model on benchmarks: what `evaclip zeroshot` does."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from evaclip.distributed import is_main, joined, main_first, rank, world_size
from evaclip.encoder import Encoder, load_encoder
from evaclip.engine import EngineConfig
from evaclip.errors import InputError
from evaclip.evals.card import Card
from evaclip.evals.classifier import cache_of
from evaclip.evals.explain import explained
from evaclip.evals.layouts import LabelledImages, find_images
from evaclip.evals.names import canonical
from evaclip.evals.protocol import protocol_named
from evaclip.evals.scores import clip_benchmark_record, save_result, write_json
from evaclip.evals.suite import check_reference, chosen, summary, verified, why_different
from evaclip.evals.zero_shot import Setting, check_count, zero_shot
from evaclip.log import quiet, say


@dataclass(frozen=True, kw_only=True)
class ZeroShotCommand:
    """Score a model zero-shot: the classes are known from their names alone.

    Under torchrun the images are shared by all processes; what is written is the same.
    """

    dataset: str
    """A benchmark (`imagenet`, `cifar10`), several with commas between, `all` for the twelve, or a card's path."""
    model: str = "EVA02-B-16"
    """Folder of a run or of an export, an open_clip NAME or NAME:TAG, or hf-hub:ORGANISATION/NAME; by default the
    published EVA02-CLIP-B/16."""
    data: Path | None = None
    """Folder (or tar) of the images; by default a folder of the benchmark's name in `data_root`."""
    data_root: Path = Path("data")
    """Where the folders of the benchmarks lie."""
    protocol: Literal["eva", "openai", "testbed", "pe"] = "eva"
    """Whose way of cutting images and choosing frames."""
    splits: str = "1"
    """Of UCF-101, the official test splits: 1, or 1,2,3."""
    out: Path | None = None
    """Folder for results and predictions; by default `scores/` in the run, or `scores/MODEL`."""
    cache: Path | None = None
    """Folder that keeps features of classes and images; by default `cache/` in the folder of the results."""
    format: Literal["evaclip", "clip_benchmark"] = "evaclip"
    """`clip_benchmark` also writes each result in CLIP_benchmark's schema, to `clip_benchmark/` in `out`."""
    explain: bool = False
    """Print what was found and how it would be scored, and score nothing."""
    verify: bool = False
    """Compare with the published scores on the card; exit with 2 where they differ by more than is known to happen."""
    reference: str | None = None
    """The model whose published scores are meant; by default the model's own name."""
    allow_partial: bool = False
    """Score a data set that is not whole, or some of several; the result says so."""
    batch: int = 256
    """Images that pass through the tower at a time."""
    workers: int = 2
    """Processes that decode images; 0 decodes in the main process."""
    device: str = "auto"
    """`cuda`, `cpu`, or `auto` for a GPU if there is one."""


def run_zero_shot(command: ZeroShotCommand) -> float:
    """Print the scores, and write them with everything needed to trust them. Returns the last headline number."""
    with joined(), quiet(not is_main()):
        return _run(command)


def _run(command: ZeroShotCommand) -> float:
    if command.batch < 1 or command.workers < 0:
        raise InputError("--batch must be at least 1 and --workers at least 0")
    cards = chosen(command.dataset)
    found = _found(command, cards)
    if command.explain:
        return _explain(command, found)
    with main_first():
        device = EngineConfig(device=command.device).resolved_device()
        encoder = load_encoder(command.model, device)
    out = command.out or _default_out(command.model)
    setting = Setting(
        protocol=protocol_named(command.protocol),
        batch=command.batch,
        workers=command.workers,
        cache=cache_of(encoder, command.cache or out / "cache"),
        share=(rank(), world_size()),
        allow_partial=command.allow_partial,
    )
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
            images = find_images(card, command.data or _folder(command.data_root, card), _split(command, card))
            check_count(card, images, command.allow_partial, _expected(command, card))
            found.append((card, images))
        except InputError as error:
            if len(cards) == 1:
                raise
            missing.append(f"{card.name}: {error}")
    for sentence in missing:
        say(sentence)
    if missing and (not found or not command.allow_partial):
        raise InputError(
            f"{len(missing)} of {len(cards)} benchmarks cannot be scored; --allow-partial scores the others"
        )
    return found


def _folder(root: Path, card: Card) -> Path:
    """The folder of a benchmark under one of its names."""
    names = {canonical(name) for name in (card.name, *card.aliases)}
    below = sorted(root.iterdir()) if root.is_dir() else []
    return next((path for path in below if path.is_dir() and canonical(path.name) in names), root / card.name)


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
        preprocessing = load_encoder(command.model).preprocessing
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
        print_score(path)
    return record


def _reference(command: ZeroShotCommand, encoder: Encoder) -> str:
    """The model whose published scores are compared with."""
    return command.reference or encoder.name.partition(":")[0]


def _default_out(model: str) -> Path:
    if (Path(model) / "config.json").is_file():
        return Path(model) / "scores"
    return Path("scores") / re.sub(r"[^A-Za-z0-9_.-]+", "_", model).strip("_.")


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
    coverage = record["coverage"]
    if coverage["bad"]:
        print(f"{coverage['bad']:,} files could not be read; they are listed in {path.with_suffix('.bad.jsonl')}")
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
    say(f"written to {path}")


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
