"""Zero-shot scoring beside CLIP_benchmark's own functions, on the same files with the same model, in one run.

Needs a trained small model and CIFAR-10 (`evaclip train eva02_tiny_cifar10`; parquet files in data/cifar10), and the
peer: pip install clip-benchmark, in an environment of its own, since it pins older libraries.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from clip_benchmark.metrics.zeroshot_classification import run_classification, zero_shot_classifier
from loader import photos
from measure import write_result
from open_clip import get_tokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch.utils.data import DataLoader, Dataset

from evaclip.encoder import Encoder, load_encoder
from evaclip.evals.blocks import cache_of
from evaclip.evals.card import Card, load_card
from evaclip.evals.features import Setting
from evaclip.evals.layouts import LabelledImages, find_images
from evaclip.evals.scores import ZeroShotResult
from evaclip.evals.zero_shot import zero_shot
from evaclip.log import quiet

T, U = TypeVar("T"), TypeVar("U")
RUN, CIFAR = "runs/eva02_tiny_cifar10", Path("data/cifar10")
BATCH, WORKERS, ROUNDS = 256, 2, 4
FAMILY = ("imagenet", "imagenet_v2", "imagenet_sketch", "imagenet_a", "imagenet_r")
# Of CIFAR-10's images, of the 80 templates, and of each set's images: so few that the peer ends within a minute or two.
TESTED, TEMPLATES, IMAGES = 4000, 4, 200


class Opened(Dataset):
    """The same files through open_clip's own transform, as CLIP_benchmark's loaders give them."""

    def __init__(self, images: LabelledImages, size: int) -> None:
        self.images, self.transform = images, image_transform_v2(PreprocessCfg(size=size), is_train=False)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int):
        return self.transform(self.images.open(number)), int(self.images.labels[number])


def theirs(encoder: Encoder, card: Card, images: LabelledImages) -> np.ndarray:
    """Predictions of CLIP_benchmark's classifier and loop, autocast off."""
    tokenizer = get_tokenizer("ViT-B-16")
    templates = [template.replace("{}", "{c}") for template in card.templates]
    weights = zero_shot_classifier(encoder.model, tokenizer, list(card.classes), templates, "cpu", amp=False)
    loader = DataLoader(Opened(images, encoder.preprocessing.size), batch_size=BATCH, num_workers=WORKERS)
    logits, _ = run_classification(encoder.model, weights, loader, "cpu", amp=False)
    return logits.argmax(1).numpy()


def ours(encoder: Encoder, card: Card, images: LabelledImages, cache: Path | None) -> ZeroShotResult:
    """The same through this project."""
    kept = cache_of(encoder, cache) if cache else None
    setting = Setting(batch=BATCH, workers=WORKERS, cache=kept, allow_partial=True)
    with quiet(True):
        return zero_shot(encoder, card, images, setting)


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds and result."""
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def raced(own: Callable[[Path], T], peer: Callable[[], U], folder: Path) -> tuple[float, T, float, U]:
    """The shortest of ROUNDS runs of each, in turns, and what it found; ours with an empty cache each time."""
    mine = [timed(lambda: own(folder / "0"))]
    others = [timed(peer)]
    for number in range(1, ROUNDS):
        mine.append(timed(lambda cache=folder / str(number): own(cache)))
        others.append(timed(peer))
    return (*min(mine, key=lambda run: run[0]), *min(others, key=lambda run: run[0]))


def shares(results: list[ZeroShotResult], seconds: float) -> str:
    """Where the time went, in words."""
    waiting, tower = (sum(getattr(r.times, part) for r in results) / seconds for part in ("waiting", "tower"))
    return f"{waiting:.0%} is waiting for decoded images and {tower:.0%} the image tower"


def made(folder: Path, card: Card) -> LabelledImages:
    """JPEGs of 256 px in class folders under a few of a card's labels."""
    for number, data in enumerate(photos(256, IMAGES)):
        path = folder / card.name / "val" / card.labels[number % 20] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return find_images(card, folder / card.name)


def row(what: str, images: int, own: float, peer: float, same: str) -> tuple[str, ...]:
    """A line of the table."""
    return what, f"{images / own:,.0f}", f"{images / peer:,.0f}", f"{peer / own:.2f}x", same


def main() -> None:
    """Race, and write the result."""
    encoder, card = load_encoder(RUN), load_card("cifar10")
    images = find_images(card, CIFAR)
    images = replace(images, keys=images.keys[:TESTED], labels=images.labels[:TESTED])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        ours(encoder, card, replace(images, keys=images.keys[:512]), None)  # both libraries are warm
        own, result, peer, predictions = raced(
            lambda cache: ours(encoder, card, images, cache), lambda: theirs(encoder, card, images), Path(folder)
        )
        same = f"{(result.predictions == predictions).mean():.2%} of {len(predictions):,}"
        alone = shares([result], own)
        again, result = timed(lambda: ours(encoder, card, images, Path(folder) / "0"))
        rows.append(row(f"CIFAR-10, {len(images):,} images, end to end", len(images), own, peer, same))
        kept = f"{(result.predictions == predictions).mean():.2%}"
        rows.append(row("the same once more, features kept", len(images), again, peer, kept))
    with tempfile.TemporaryDirectory() as folder:
        cards = [replace(load_card(n), templates=load_card(n).templates[:TEMPLATES], real_labels=False) for n in FAMILY]
        sets = [(card, made(Path(folder), card)) for card in cards]
        own, results, peer, predictions = raced(
            lambda cache: [ours(encoder, *one, cache) for one in sets],
            lambda: [theirs(encoder, *one) for one in sets],
            Path(folder) / "cache",
        )
        together = shares(results, own)
        equal = [(r.predictions == p).mean() for r, p in zip(results, predictions, strict=True)]
        what = f"ImageNet family, {len(sets)} sets of {IMAGES} photographs, {TEMPLATES} of 80 templates"
        rows.append(row(what, IMAGES * len(sets), own, peer, f"{np.mean(equal):.2%} of {IMAGES * len(sets):,}"))
    write_result(
        "zeroshot",
        "Zero-shot scoring beside CLIP_benchmark",
        ("what", "evaclip images/s", "CLIP_benchmark images/s", "ratio", "same predictions"),
        rows,
        f"Peer: clip_benchmark {version('clip_benchmark')}, its `zero_shot_classifier` and `run_classification` with "
        f"autocast off. Model: EVA02-tiny, {encoder.preprocessing.size} px, on the CPU. Both: {WORKERS} decoding "
        f"processes, batches of {BATCH}; the shortest of {ROUNDS} runs, in turns. Of evaclip's time, on CIFAR-10 "
        f"{alone}; on the family {together}; the rest is the text tower, hashes and the record. The peer encodes the "
        "classes of each set anew.",
    )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
