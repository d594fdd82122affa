"""What a score would be made of, before it is: the layout found, names, prompts, pixels, and what differs."""

from collections.abc import Iterator

import numpy as np

from evaclip.encoder import Preprocessing
from evaclip.evals.card import Card
from evaclip.evals.classifier import prompts_hash
from evaclip.evals.layouts import LabelledImages
from evaclip.evals.protocol import PROTOCOLS, Protocol, view_of


def explained(
    card: Card, images: LabelledImages, protocol: Protocol, preprocessing: Preprocessing | None, expected: int
) -> Iterator[str]:
    """Lines for the user; `preprocessing` None when there is no model to ask."""
    sizes = np.bincount(images.labels, minlength=len(card.classes))
    what = "videos" if card.media == "video" else "images"
    yield f"{card.title} ({card.name})"
    yield f"  layout        {images.layout}"
    yield f"  {what:<13} {len(images):,} of {expected:,}, {sizes.min():,} to {sizes.max():,} of each class"
    if images.listed is not None:
        listed = int(images.listed.sum())
        yield f"  listed        {listed:,}; {len(images) / max(listed, 1):.2%} of them are there"
    yield f"  fingerprint   {images.fingerprint[:16]}"
    yield f"  classes       {len(card.classes)}: {_few(card.classes)}"
    if card.labels:
        yield f"  in the data   {_few(card.labels)}"
    repeated = sorted({name for name in card.classes if card.classes.count(name) > 1})
    if repeated:
        yield f"  same name     {', '.join(repeated)}: a tie goes to the class that comes first"
    yield f"  templates     {len(card.templates)}: {_few(card.templates)}"
    yield f"  prompts       {prompts_hash(card)[:16]}"
    yield f"  score         {card.headline.replace('_', ' ')} over {len(card.classes)} classes, logits in float32"
    yield f"  protocol      {protocol.name}"
    if preprocessing is not None:
        view = view_of(protocol, card, preprocessing)
        yield f"  pixels        {view.described()}"
        yield f"  mean, std     {preprocessing.mean}, {preprocessing.std}"
        for other in PROTOCOLS.values():
            there = view_of(other, card, preprocessing).described()
            if there != view.described():
                yield f"  unlike        {other.name}: {there}"
    for note in (*images.notes, *([card.note] if card.note else [])):
        yield f"  note          {note}"
    for reference in card.reference:
        scores = [f"{n} {v}" for n in ("top1", "top5", "mean_top1_top5") if (v := getattr(reference, n)) is not None]
        yield f"  published     {reference.model}: {', '.join(scores)} ({reference.source})"


def _few(names: tuple[str, ...], count: int = 4) -> str:
    shown = [repr(name) for name in names]
    return ", ".join(shown if len(shown) <= count else [*shown[: count - 1], "...", shown[-1]])
